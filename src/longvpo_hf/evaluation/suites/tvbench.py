"""TVBench (arXiv 2410.07752): ten tasks that cannot be answered without the order of the frames.

As in its paper the score is the mean of its tasks'.
"""

from __future__ import annotations

import re

from longvpo_hf.evaluation.scoring import by_group
from longvpo_hf.evaluation.suite import LETTERS, UNPACK, Question, Row, Suite

_TASKS = (
    *("action_antonym", "action_count", "action_localization", "action_sequence", "egocentric_sequence"),
    *("moving_direction", "object_count", "object_shuffle", "scene_transition", "unexpected_action"),
)


def _read(row: Row, subset: str) -> Question:
    candidates = row.options("candidates")
    plain, answer = [_plain(candidate) for candidate in candidates], _plain(row.word("answer"))
    lines = [f"{letter}. {candidate}" for letter, candidate in zip(LETTERS, candidates, strict=False)]
    # Those of the task first: its videos may be called like another task's.
    folders = (f"video/{subset}/", f"{subset}/", f"videos/{subset}/", "video/", "", "videos/", "data/")
    return Question(
        text="\n".join([row.text("question").strip(), *lines, "Answer with the option letter only."]),
        letters=LETTERS[: len(candidates)],
        answer=LETTERS[plain.index(answer)] if answer in plain else "",
        videos=tuple(f"tvbench/{folder}{row.text('video')}" for folder in folders),
        group=subset,
        options=tuple(candidates),
    )


def _official(reply: str, question: Question) -> float:
    """The first letter that is a word, whatever its case; else the only option whose text is in the reply."""
    text = reply.strip().upper()
    for match in (re.search(r"\b([A-Z])\b", text), re.match(r"[\(\[]?([A-Z])[\)\].:]?", text)):
        if match and match[1] in question.letters:
            return 100.0 * (match[1] == question.answer)
    named = [letter for letter, option in zip(question.letters, question.options, strict=True)
             if _plain(option) and _plain(option) in _plain(reply)]  # fmt: skip
    return 100.0 * (named == [question.answer])


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())


SUITES = (
    Suite(
        name="tvbench",
        title="TVBench",
        dataset="FunAILab/TVBench",
        split="train",
        read=_read,
        media="tvbench",
        unpack=UNPACK,
        official=_official,
        units=by_group,
        subsets=_TASKS,
        groups=_TASKS,
    ),
)
