"""VideoEval-Pro (arXiv 2505.14640) in its multiple-choice form; the open-ended one needs a paid model as its judge."""

from __future__ import annotations

from longvpo_hf.evaluation.official import by_rank
from longvpo_hf.evaluation.scoring import by_question
from longvpo_hf.evaluation.suite import LETTERS, UNPACK, Question, Row, Suite


def _read(row: Row, _: str) -> Question:
    options = row.options("options")
    return Question(
        text="\n".join(
            [row.text("question"), *(option.strip() for option in options), "Answer with the option letter only."]
        ),
        letters=LETTERS[: len(options)],
        answer=row.word("answer").strip().upper(),
        videos=(f"videoevalpro/videos_filtered/{row.text('video')}",),
        group=row.text("qa_type").strip(),
    )


SUITES = (
    Suite(
        name="videoevalpro",
        title="VideoEval-Pro (multiple choice)",
        dataset="TIGER-Lab/VideoEval-Pro",
        split="test",
        read=_read,
        media="videoevalpro",
        unpack=UNPACK,
        official=by_rank,
        units=by_question,
        groups=("Local Perception", "Local Reasoning", "Holistic Perception", "Holistic Reasoning"),
    ),
)
