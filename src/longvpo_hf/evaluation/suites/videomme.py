"""Video-MME (arXiv 2405.21075), without subtitles and with those of the frames that are sampled."""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.evaluation.official import by_rank_of_four
from longvpo_hf.evaluation.scoring import by_question
from longvpo_hf.evaluation.suite import LETTERS, UNZIP, Question, Row, Suite

_INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option."
)


def _read(row: Row, _: str) -> Question:
    options, video = row.options("options"), row.text("videoID")
    return Question(
        text="\n".join(
            [
                _INSTRUCTION,
                row.text("question"),
                *options,
                "\nAnswer with the option's letter from the given choices directly.",
            ]
        ),
        letters=LETTERS[: len(options)],
        answer=row.text("answer"),
        videos=tuple(f"videomme/data/{video}.{ending}" for ending in ("mp4", "MP4", "mkv")),
        group=row.text("duration"),
    )


def _read_with_subtitles(row: Row, _: str) -> Question:
    return replace(_read(row, _), subtitles=f"videomme/subtitle/{row.text('videoID')}.srt")


_PLAIN = Suite(
    name="videomme",
    title="Video-MME, without subtitles",
    dataset="lmms-eval/Video-MME",
    split="test",
    read=_read,
    media="videomme",
    unpack=UNZIP,
    official=by_rank_of_four,
    units=by_question,
    groups=("short", "medium", "long"),
)
SUITES = (
    _PLAIN,
    replace(
        _PLAIN,
        name="videomme_subtitles",
        title="Video-MME, with subtitles",
        read=_read_with_subtitles,
        subtitles="videomme/subtitle",
        asked_with="videomme",
    ),
)
