"""TimeScope (huggingface.co/blog/timescope-video-lmm-benchmark): short clips inserted into videos of a minute to hours.

LongTimeScope is the same with longer videos. Scores stand by the length of the video, as the dataset writes it: where a
model stops to see what was inserted is what the benchmark is about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from longvpo_hf.evaluation.scoring import by_question
from longvpo_hf.evaluation.suite import LETTERS, UNPACK, Question, Row, Suite, letters_of

_PREFIXES = ("The best answer is", "The correct answer is", "The answer is", "The answer")
_TIMESCOPE = (*_PREFIXES, "The best option is", "The correct option is", "Best answer:", "Best option:")
#: In lmms-eval's file of LongTimeScope commas are missing, so that these two are never found.
_LONG = (*_PREFIXES, "The best option isThe correct option is", "Best answer:Best option:")


def _reader(folder: str) -> Callable[[Row, str], Question]:
    def read(row: Row, _: str) -> Question:
        text, path = row.text("input"), f"{folder}/{row.text('video')}"
        return Question(
            text=text,
            letters=letters_of(text) or LETTERS[:6],
            answer=row.word("answer").strip().upper(),
            videos=(path, path.replace("mp4", "MP4"), path.replace("mp4", "mkv")),
            group=row.word("length"),
        )

    return read


def _rule(prefixes: Sequence[str]) -> Callable[[str, Question], float]:
    """The first capital from A to F, without these phrases before it; none in a long reply is no answer."""

    def official(reply: str, question: Question) -> float:
        text = reply.strip()
        for prefix in prefixes:
            text = text.replace(prefix, "")
        match = re.search("[ABCDEF]", text)
        return 100.0 * (match is not None and match[0] == question.answer)

    return official


SUITES = tuple(
    Suite(
        name=name,
        title=title,
        dataset=dataset,
        split="test",
        read=_reader(name),
        media=name,
        unpack=UNPACK,
        official=_rule(prefixes),
        units=by_question,
    )
    for name, title, dataset, prefixes in (
        ("timescope", "TimeScope", "Apollo-LMMs/TimeScope", _TIMESCOPE),
        ("longtimescope", "LongTimeScope", "Apollo-LMMs/LongTimeScope2", _LONG),
    )
)
