"""Multiple-choice accuracy over long videos, overall and by group, with confidence intervals.

A metric for `evaluate.load`. Every question counts: a reply that chooses no option is wrong, and counted as `unparsed`;
one that ends inside its reasoning is wrong too, and counted as `cut_off`. `answers.py` has the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# On one line, `import datasets, evaluate` breaks evaluate's scanner.
import datasets
import evaluate

from .answers import LETTERS, is_cut_off, is_right, letter_of, wilson_interval

_DESCRIPTION = """\
Accuracy of replies to multiple-choice questions about (long) videos, overall and by group such as the video's length,
with Wilson's 95 % intervals. Free-form replies are read as they are meant; those that choose no option count as wrong
(`unparsed`), and so do those that end inside their reasoning (`cut_off`). Answers may also be texts, which replies must
equal but for capitals, blanks and outer marks.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): What the model said.
    references (`list` of `str`): The right answers: letters, or texts.
    groups (`list` of `str`, *optional*): The group of each question.
    num_options (`int`, *optional*, defaults to 5): Options of each question: with 5, the letters A to E. A longer
        reference than one capital letter is a text.
Returns:
    `dict`: `accuracy`, `interval_95`, `unparsed` (percent of the questions with options), `cut_off` (percent), `n`,
    and, with groups, `by_group`: the same for each group, in order of appearance.
Examples:
    >>> metric = evaluate.load("path/to/longvideo_mcq")
    >>> metric.compute(predictions=["**C**", "The answer is (B)."], references=["C", "A"], groups=["60s", "600s"])
"""

_CITATION = """\
@inproceedings{huang2025longvpo,
    title     = {{LongVPO: From Anchored Cues to Self-Reasoning for Long-Form Video Preference Optimization}},
    author    = {Zhenpeng Huang and Jiaqi Li and Zihan Jia and Xinhao Li and Desen Meng and Lingxue Song and Xi Chen and
                 Liang Li and Limin Wang},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2025},
    url       = {https://arxiv.org/abs/2602.02341}
}
"""


class LongVideoMCQ(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        groups: Sequence[str] | None = None,
        num_options: int = 5,
    ) -> dict[str, Any]:
        if not predictions:
            raise ValueError("An accuracy needs at least one prediction, got none.")
        if groups is not None and len(groups) != len(predictions):
            raise ValueError(f"Each prediction needs a group: got {len(groups)} for {len(predictions)} predictions.")
        if not 2 <= num_options <= len(LETTERS):
            raise ValueError(f"num_options must be in [2, {len(LETTERS)}], got {num_options}.")
        letters = LETTERS[:num_options]
        judged = [_judge(*pair, letters) for pair in zip(predictions, references, strict=True)]
        result = _scores(judged)
        if groups is not None:
            result["by_group"] = {
                group: _scores([one for one, of in zip(judged, groups, strict=True) if of == group])
                for group in dict.fromkeys(groups)
            }
        return result


def _judge(reply: str, answer: str, letters: str) -> tuple[bool, bool | None, bool]:
    """Whether a reply is right; chose nothing, None of a question without options; was cut off in its reasoning."""
    cut_off = is_cut_off(reply)
    if len(answer) != 1 or answer not in LETTERS:
        return is_right(reply, answer), None, cut_off
    if answer not in letters:
        raise ValueError(
            f"The reference {answer!r} is none of {letters}; give num_options={LETTERS.index(answer) + 1}."
        )
    return is_right(reply, answer, letters), not cut_off and not letter_of(reply, letters), cut_off


def _scores(judged: Sequence[tuple[bool, bool | None, bool]]) -> dict[str, Any]:
    right, number = sum(hit for hit, _, _ in judged), len(judged)
    unparsed = [chose_nothing for _, chose_nothing, _ in judged if chose_nothing is not None]
    return {
        "accuracy": 100 * right / number,
        "interval_95": [100 * bound for bound in wilson_interval(right, number)],
        "unparsed": 100 * sum(unparsed) / len(unparsed) if unparsed else 0.0,
        "cut_off": 100 * sum(cut_off for _, _, cut_off in judged) / number,
        "n": number,
    }
