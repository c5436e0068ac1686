"""LongVideoBench (arXiv 2407.15754), validation split."""

from __future__ import annotations

from longvpo_hf.evaluation.official import by_first_capital
from longvpo_hf.evaluation.scoring import by_question
from longvpo_hf.evaluation.suite import LETTERS, Question, Row, Suite


def _read(row: Row, _: str) -> Question:
    options = [option for i in range(5) if (option := row.text(f"option{i}")) != "N/A"]
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return Question(
        text="\n".join(
            [row.text("question"), *lines, "Answer with the option's letter from the given choices directly.\n"]
        ),
        letters=LETTERS[: len(options)],
        answer=row.letter("correct_choice", options),
        videos=(f"datasets/longvideobench/videos/{row.text('video_path')}",),
        group=f"{row.word('duration_group')}s",
    )


SUITES = (
    Suite(
        name="longvideobench",
        title="LongVideoBench",
        dataset="longvideobench/LongVideoBench",
        split="validation",
        read=_read,
        media="datasets/longvideobench",
        unpack="cat {archives}/videos.tar.part.* | tar -x -C {media}",
        official=by_first_capital,
        units=by_question,
        groups=("15s", "60s", "600s", "3600s"),
        gated=True,
    ),
)
