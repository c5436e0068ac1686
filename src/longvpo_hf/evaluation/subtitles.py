"""Subtitles of a video, and those that belong to the frames a model sees.

A line of an SRT file belongs to a frame if it is shown at the frame's instant, as Video-MME asks: "the subtitles
corresponding to the sampled frames".
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longvpo_hf.errors import ConfigError

#: What follows the times says where on the screen the line is shown.
_TIME = r"(\d{1,9}):(\d{1,9}):(\d{1,9})[,.](\d{1,9})"
_TIMES = re.compile(rf"{_TIME}\s*-->\s*{_TIME}[^\r\n]*")
#: The number of the next line, on a line of its own before that line's times.
_COUNTER = re.compile(r"\n[ \t]*\d+[ \t]*\r?\n[ \t]*$")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|\{\\[^{}]*\}")


@dataclass(frozen=True, slots=True)
class Subtitle:
    """One line, shown in `[start_seconds, end_seconds)` of its video.

    Args:
        start_seconds: First instant, in source seconds.
        end_seconds: First instant after, in source seconds.
        text: What is shown, without markup.
    """

    start_seconds: float
    end_seconds: float
    text: str


def read_srt(path: Path) -> list[Subtitle]:
    """The lines of an SRT file in order; those without text are left out.

    Raises:
        ValueError: If the file holds text, but not one line with its times.
    """
    content = path.read_text(encoding="utf-8-sig", errors="replace")
    matches = list(_TIMES.finditer(content))
    if not matches and content.strip():
        raise ConfigError(f"{path} is no SRT file: no line of it has times such as 00:00:01,000 --> 00:00:02,500.")
    subtitles = []
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        text = content[match.end() : following.start() if following else None]
        if following:
            text = _COUNTER.sub("", text)
        text = " ".join(html.unescape(_TAG.sub("", text)).split())
        if text:
            subtitles.append(Subtitle(_seconds(*match.groups()[:4]), _seconds(*match.groups()[4:]), text))
    return subtitles


def shown_at(subtitles: Sequence[Subtitle], seconds: Iterable[float]) -> list[str]:
    """The lines that are shown at one of these instants, each once, in order."""
    instants = sorted(seconds)
    return [
        subtitle.text
        for subtitle in subtitles
        if any(subtitle.start_seconds <= instant < subtitle.end_seconds for instant in instants)
    ]


def _seconds(hours: str, minutes: str, seconds: str, fraction: str) -> float:
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}")
