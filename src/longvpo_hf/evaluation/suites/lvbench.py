"""LVBench (arXiv 2406.08035): questions about videos of an hour and more."""

from __future__ import annotations

from longvpo_hf.evaluation.official import by_rank_of_four
from longvpo_hf.evaluation.scoring import by_question
from longvpo_hf.evaluation.suite import LETTERS, UNZIP, Question, Row, Suite


def _read(row: Row, _: str) -> Question:
    options = row.options("options") if row.has("options") else []
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return Question(
        text="\n".join([row.text("question"), *lines, "Answer the question with the option letter"]),
        letters=LETTERS[: len(options)] or LETTERS[:4],
        answer=row.text("answer"),
        videos=(f"lvbench/{row.text('video_path')}",),
    )


SUITES = (
    Suite(
        name="lvbench",
        title="LVBench",
        dataset="lmms-eval/LVBench",
        split="train",
        read=_read,
        media="lvbench",
        unpack=UNZIP,
        official=by_rank_of_four,
        units=by_question,
    ),
)
