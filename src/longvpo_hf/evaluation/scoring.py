"""What an answer chose, and scores of many answers.

Takes a model's text and the letters it could choose; gives its choice, and percentages overall and by group. One rule
for all benchmarks: every question counts. An answer without a choice is wrong, and told apart as `unparsed`. Choices
are read by lmms-eval's own extractor, with two guards against what it misreads (see `choice_of`). Knows nothing of
benchmarks' files, models or lmms-eval's tasks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

#: Reasoning that models write before their answer.
_REASONING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<analysis>", "</analysis>"))
_WORD = re.compile(r"[A-Za-z]{2,}|[A-Za-z](?=['’][A-Za-z])")
_OPTION_TEXT = re.compile(r"(\([A-H]\)|\b[A-H][.:)])(\s+)A\b")


class Record(TypedDict):
    """One answered question, as lmms-eval keeps it.

    Fields:
        score: 100 if the choice is right, else 0: percent, as all scores are.
        choice: The letter chosen; empty where there is none.
        answer: The right letter.
        group: The question's group.
        video: What the question is about: questions about one video are no independent samples.
    """

    score: float
    choice: str
    answer: str
    group: str
    video: str


def choice_of(text: str, letters: str) -> str:
    """The letter that an answer chooses; empty where it chooses none, as in a refusal.

    Reasoning between tags is left out; if it never ends, there is no answer. What remains goes to
    `lmms_eval.tasks._task_utils.mcq_extract.extract_mcq_answer`, with the capitals inside of words lowered ("Cannot be
    determined" is no C, and "The answer is (B) because the Cat …" no C either) and the article of an option's text as
    well ("The correct answer is (B) A man" is no A). Of two letters the extractor takes the first in "A or B", and the
    last of two in the same form, "not (A) but (B)".

    Args:
        text: What the model wrote.
        letters: What it could choose, e.g. `ABCD`.
    """
    from lmms_eval.api.reasoning import strip_reasoning_tags
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

    text = strip_reasoning_tags(text, [list(pair) for pair in _REASONING])
    if any(opening in text for opening, _ in _REASONING):
        return ""
    text = _WORD.sub(lambda match: match.group().lower(), text)
    text = _OPTION_TEXT.sub(r"\1\2a", text)
    return extract_mcq_answer(text, list(letters))


def record(text: str, letters: str, answer: str, group: str = "", video: str = "") -> Record:
    """What becomes of an answer to one question."""
    choice = choice_of(text, letters)
    return Record(score=100.0 * (choice == answer), choice=choice, answer=answer, group=group, video=video)


def mean_score(records: Sequence[Record]) -> float:
    """Right answers in percent of all questions."""
    return math.fsum(record["score"] for record in records) / len(records)


def unparsed(records: Sequence[Record]) -> float:
    """Answers without a choice, in percent of all questions."""
    return 100 * sum(not record["choice"] for record in records) / len(records)


def group_score(records: Sequence[Record], group: str) -> float:
    """`mean_score` of one group."""
    return mean_score([record for record in records if record["group"] == group])


def mean_of_groups(records: Sequence[Record]) -> float:
    """Mean over the groups that were asked of their `mean_score`: MLVU's M-Avg, MVBench's mean."""
    scores = [group_score(records, group) for group in dict.fromkeys(record["group"] for record in records)]
    return math.fsum(scores) / len(scores)


def summary(name: str, groups: Iterable[str], records: Sequence[Record]) -> dict[str, Any]:
    """Scores of one benchmark, in percent.

    Args:
        name: The benchmark. MLVU gets its M-Avg besides; MVBench's `overall` is the mean of its 20 tasks.
        groups: Its groups, in order.
        records: All its answered questions.

    Returns:
        `{"overall", "n", "unparsed", "groups": {group: {"score", "n"}}}`, and `m_avg` for MLVU. Groups of which nothing
        was asked are left out.
    """
    sizes = {group: sum(record["group"] == group for record in records) for group in groups}
    scores: dict[str, Any] = {
        "overall": mean_of_groups(records) if name == "mvbench" else mean_score(records),
        "n": len(records),
        "unparsed": unparsed(records),
        "groups": {group: {"score": group_score(records, group), "n": size} for group, size in sizes.items() if size},
    }
    if name == "mlvu":
        scores["m_avg"] = mean_of_groups(records)
    return scores
