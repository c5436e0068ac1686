"""Video-MME-v2 (github.com/MME-Benchmarks/Video-MME-v2), without subtitles: four questions a video, of eight options.

Its score is of videos, not of questions. The questions of a *relevance* group ask one thing in four ways: n right ones
score n²/16. Those of a *logic* group are steps, and what is right after the first wrong step does not count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.differences import Unit
from longvpo_hf.evaluation.scoring import Record
from longvpo_hf.evaluation.suite import LETTERS, UNPACK, Question, Row, Suite

_INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, D, E, F, G, or H) of the correct option."
)
#: Score of a video by the steps that were reached: of four in a row, of two that may change places, of a pair first.
_REACHED: Mapping[str, tuple[float, ...]] = {
    "[1, 2, 3, 4]": (0, 100 / 16, 400 / 16, 900 / 16, 100),
    "[1, [2, 3], 4]": (0, 100 / 12, 400 / 12, 700 / 12, 100),
    "[[1, 2], 3, 4]": (0, 100 / 10, 200 / 10, 500 / 10, 100),
}


def _read(row: Row, _: str) -> Question:
    options, kind = row.text("options").split("\n"), row.text("group_type")
    return Question(
        text=f"Question: {row.text('question')}\n{row.text('options')}\n{_INSTRUCTION}",
        letters=LETTERS[: len(options)],
        answer=row.text("answer"),
        videos=(f"videomme_v2/{row.text('video_id')}.mp4",),
        group=kind,
        options=tuple(options),
        facts={"place": _place(row), "steps": _steps(row)},
    )


def _by_video(records: Sequence[Record], field: str) -> list[Unit]:
    """One unit a video: its group's score."""
    videos: dict[str, list[Record]] = {}
    for record in records:
        videos.setdefault(record["video"], []).append(record)
    units = []
    for video, group in videos.items():
        group.sort(key=lambda record: record["facts"]["place"])
        if len(group) > 4:
            raise ConfigError(f"A video must have four questions at most, {video} has {len(group)}.")
        right = [record[field] == 100.0 for record in group]  # type: ignore[literal-required]
        score = _relevance(right) if group[0]["group"] == "relevance" else _logic(right, group[0]["facts"]["steps"])
        units.append(Unit(video, "", video, score))
    return units


def _relevance(right: Sequence[bool]) -> float:
    return 100 * sum(right) ** 2 / 16


def _place(row: Row) -> int:
    """Which of a video's four questions a row is."""
    name = row.word("question_id")
    last = name.rpartition("-")[2]
    if not (last.isascii() and last.isdecimal()):
        raise ConfigError(f"The field 'question_id' must end in a hyphen and a number, got {name!r:.200}.")
    return int(last)


def _steps(row: Row) -> str:
    """Which steps of a logic group stand in which order; "" for a relevance group."""
    kind = row.text("group_type")
    if kind == "relevance":
        return ""
    steps = " ".join(row.text("group_structure").split()).replace(",", ", ").replace(",  ", ", ")
    if kind != "logic" or steps not in _REACHED:
        raise ConfigError(
            "A group must be of the type relevance, or logic with a structure among "
            f"{', '.join(_REACHED)}; got {kind!r:.200} with {steps!r:.200}."
        )
    return steps


def _logic(right: Sequence[bool], steps: str) -> float:
    reached = next((place for place, is_right in enumerate(right) if not is_right), len(right))
    # With a pair that may change places, its second question counts where the first one is wrong.
    if (steps == "[1, [2, 3], 4]" and reached == 1 and len(right) > 2 and right[2]) or (
        steps == "[[1, 2], 3, 4]" and reached == 0 and len(right) > 1 and right[1]
    ):
        reached += 1
    return _REACHED[steps][reached]


_LINE = re.compile(r"(?:^|\n)[ \t]*(?:\*\*[ \t]*)?([A-H])(?:[ \t]*\*\*)?(?:[ \t]*[.)])?[ \t]*$", re.IGNORECASE)
_START = re.compile(r"[ \t]*(?:\*\*[ \t]*)?([A-H])(?:[ \t]*\*\*)?[ \t]*(?:[.)]|\r?\n|$)", re.IGNORECASE)


def _official(reply: str, question: Question) -> float:
    """A letter on a line by itself, at the start, after a word for "answer", or in bold; else the only option named."""
    text = reply.strip()
    letter = ""
    if match := _LINE.search(text) or _START.match(text):
        letter = match[1]
    if not letter:
        said = re.findall(
            r"(?:The (?:best|correct) answer is|The answer is|The answer|The (?:best|correct) option is|Final Answer:"
            r"|Best answer:|Best option:|Answer:|Option:|\b(?:answer|option)(?:\s+(?:is|would\s+be)|\s*:))[\s:*]*"
            r"([A-H])\b",
            text,
            re.IGNORECASE,
        )
        bold = {found.upper() for found in re.findall(r"\*\*\s*([A-H])(?=\s*\*\*|[.)])", text, re.IGNORECASE)}
        letter = said[-1] if said else bold.pop() if len(bold) == 1 else _named(reply, question.options)
    return 100.0 * (letter.upper() == question.answer.upper())


def _named(reply: str, options: Sequence[str]) -> str:
    """The only option whose text stands in the reply."""
    named = []
    for letter, option in zip(LETTERS, options, strict=False):
        _, mark, text = option.partition(f"{letter}.")
        if mark and text.strip(". \n").lower() in reply.lower():
            named.append(letter)
    return named[0] if len(named) == 1 else ""


SUITES = (
    Suite(
        name="videomme_v2",
        title="Video-MME-v2 (group score)",
        dataset="MME-Benchmarks/Video-MME-v2",
        split="test",
        read=_read,
        media="videomme_v2",
        unpack=UNPACK,
        official=_official,
        units=_by_video,
        headline="group_score",
        groups=("relevance", "logic"),
        max_new_tokens=64,
    ),
)
