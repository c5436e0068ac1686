"""CG-Bench (arXiv 2412.12075), the 3,000 questions of its mini split, without subtitles and without its clue scores."""

from __future__ import annotations

from longvpo_hf.evaluation.official import by_rank_of_fourteen
from longvpo_hf.evaluation.scoring import by_question
from longvpo_hf.evaluation.suite import LETTERS, UNPACK, Question, Row, Suite


def _read(row: Row, _: str) -> Question:
    choices, video = row.options("choices"), row.text("video_uid")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return Question(
        text="\n".join(
            [
                "Select the best answer to the following multiple-choice question based on the video.",
                row.text("question"),
                *lines,
                "Answer with the option letter only.",
            ]
        ),
        letters=LETTERS[: len(choices)],
        answer=row.word("right_answer").strip().upper(),
        videos=tuple(f"cg_videos_720p/{folder}{video}.mp4" for folder in ("", "cg_videos_720p/", "videos/")),
        group=row.text("domain"),
    )


SUITES = (
    Suite(
        name="cgbench",
        title="CG-Bench (mini)",
        dataset="CG-Bench/CG-Bench",
        split="train",
        read=_read,
        media="cg_videos_720p",
        unpack=UNPACK,
        official=by_rank_of_fourteen,
        units=by_question,
        config="cg-bench-mini",
        gated=True,
    ),
)
