"""What a report consists of, as plain data that the page and the Markdown are rendered from."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Args:
        caption: What it shows.
        header: Names of the columns.
        lines: Its cells; the first of a line is its name.
    """

    caption: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture.

    Args:
        name: Of its file.
        text: What it shows, for those who do not see it.
        png: The file's content.
    """

    name: str
    text: str
    png: bytes

    @classmethod
    def of(cls, name: str, text: str, figure: Figure) -> Picture:
        """A figure as a picture."""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
        return cls(name, text, file.getvalue())


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report.

    Args:
        title: Its heading.
        paragraphs: Text before the rest.
        bars: Numbers that are shown as bars beside each other, by name, with what they mean.
        rows: Preference rows with filmstrips, as the inspect page has them.
        pictures_of_rows: Their pictures, base64.
        tables: Tables.
        pictures: Pictures.
        commands: What to type, with why.
    """

    title: str
    paragraphs: Sequence[str] = ()
    bars: Sequence[tuple[str, Sequence[tuple[str, int, str]]]] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    pictures_of_rows: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    commands: Sequence[tuple[str, str]] = field(default_factory=tuple)


def clock(seconds: float) -> str:
    """A place in a video, as the inspect page has it: `0:04`, `1:05.5`, `2:03:04`."""
    tenths = round(seconds * 10)
    minutes, left = divmod(tenths // 10, 60)
    rest = f"{left:02d}" + (f".{tenths % 10}" if tenths % 10 else "")
    return f"{minutes}:{rest}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest}"


def percent(value: float, bounds: Sequence[float] | None = None) -> str:
    """A percentage, with the bounds of its 95 % interval."""
    return f"{value:.1f}" if bounds is None else f"{value:.1f} ({bounds[0]:.0f}–{bounds[1]:.0f})"
