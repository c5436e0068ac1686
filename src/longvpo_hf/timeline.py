"""Clips, timelines and views: which part of which video one model call sees.

There are two clocks, and names always say which: `source_seconds` counts inside a source file, `timeline_seconds`
counts along the clips laid end to end.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Clip:
    """A span `[start_seconds, end_seconds)` of a source video file, undecoded.

    Args:
        path: The source file, as the decoder opens it (a local path or an `hf://` address).
        start_seconds: First instant of the span, in source seconds, ≥ 0.
        end_seconds: First instant after the span, in source seconds, > `start_seconds`.
        caption: What the corpus says the clip shows; empty where it says nothing.
        source_id: The corpus' own name for the source video; empty where it has none.
        licence: The licence the corpus gives the source; empty where it gives none.
        source_start_seconds: Where the span starts in the source's own time. None where `path` is the source itself, so
            that this is `start_seconds`. A clip that was cut into a file of its own keeps it, see `origin`.

    Raises:
        ValueError: If the path is empty or no path, or the bounds are no numbers, not finite, negative or not in order.
    """

    path: str
    start_seconds: float
    end_seconds: float
    caption: str = ""
    source_id: str = ""
    licence: str = ""
    source_start_seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)) or not (path := os.fspath(self.path)):
            raise ValueError(f"A clip needs the path of its source file, got {self.path!r}.")
        object.__setattr__(self, "path", path)
        for name in ("start_seconds", "end_seconds", "source_start_seconds"):
            value = getattr(self, name)
            if value is None and name == "source_start_seconds":
                continue
            if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} of a clip must be finite and ≥ 0, got {value!r} ({path}).")
            object.__setattr__(self, name, float(value))  # one form, whoever made it: ids follow from it
        if self.end_seconds <= self.start_seconds:
            raise ValueError(
                f"A clip is [start_seconds, end_seconds): end_seconds must be > start_seconds = {self.start_seconds}, "
                f"got {self.end_seconds} ({self.path})."
            )
        if self.source_start_seconds == self.start_seconds:
            object.__setattr__(self, "source_start_seconds", None)  # one form, so that equal clips compare equal

    @property
    def duration_seconds(self) -> float:
        """Length of the span in seconds."""
        return self.end_seconds - self.start_seconds

    @property
    def origin(self) -> Origin:
        """Where the span is in the source video that the corpus names."""
        start = self.start_seconds if self.source_start_seconds is None else self.source_start_seconds
        return Origin(self.source_id, start, start + self.duration_seconds)


class Origin(NamedTuple):
    """A span `[start_seconds, end_seconds)` of a source video, in the source's own time."""

    source_id: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Clips laid end to end: what the policy sees as one long video. A real long video is a timeline of its scenes.

    Raises:
        ValueError: If there is no clip, or something else among them.
    """

    clips: tuple[Clip, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.clips, Iterable):
            raise ValueError(f"clips of a timeline must be a tuple of clips, got {self.clips!r}.")
        object.__setattr__(self, "clips", tuple(self.clips))
        for clip in self.clips:
            if not isinstance(clip, Clip):
                raise ValueError(f"A timeline is made of clips, got {clip!r}.")
        if not self.clips:
            raise ValueError("A timeline needs at least one clip, got none.")

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def duration_seconds(self) -> float:
        """Length of all clips in seconds."""
        return sum(clip.duration_seconds for clip in self.clips)

    @property
    def starts_timeline_seconds(self) -> tuple[float, ...]:
        """Where each clip starts on the timeline's own clock, in seconds; the first is 0."""
        starts, now = [], 0.0
        for clip in self.clips:
            starts.append(now)
            now += clip.duration_seconds
        return tuple(starts)

    def parts(self, max_clips: int) -> list[Timeline]:
        """Consecutive parts of at most `max_clips` clips each, as equal in number as possible.

        Raises:
            ValueError: If `max_clips` < 1.
        """
        if max_clips < 1:
            raise ValueError(f"max_clips of a part must be ≥ 1, got {max_clips}.")
        number = -(-len(self) // max_clips)
        bounds = [len(self) * part // number for part in range(number + 1)]
        return [Timeline(self.clips[start:end]) for start, end in itertools.pairwise(bounds)]

    def centre(self, index: int) -> float:
        """Where the middle of clip `index` lies on the timeline, from 0 (its start) to 1 (its end)."""
        clip_indices((index,), "clip index", len(self))
        start = self.starts_timeline_seconds[index]
        return (start + self.clips[index].duration_seconds / 2) / self.duration_seconds


@dataclass(frozen=True, slots=True)
class View:
    """Which clips of a timeline one model call sees, and at most how many frames of them.

    Make one with `View.whole()`, `View.only(clips)`, `View.ordered(clips)`, `View.without(clips)` or
    `View.sparse(num_frames)`.

    Args:
        keep: Indices of the clips that are seen; `None` for all.
        drop: Indices of the clips that are not seen; excludes `keep`.
        num_frames: Most frames over all seen clips; `None` leaves it to the caller's budget.
    """

    keep: tuple[int, ...] | None = None
    drop: tuple[int, ...] = ()
    num_frames: int | None = None

    def __post_init__(self) -> None:
        if self.keep is not None:
            object.__setattr__(self, "keep", clip_indices(self.keep, "clip of a view"))
        object.__setattr__(self, "drop", clip_indices(self.drop, "clip of a view"))
        if self.keep is not None and self.drop:
            raise ValueError(f"A view either keeps or drops clips, got keep={self.keep} and drop={self.drop}.")
        if self.keep is not None and not self.keep:
            raise ValueError("A view must keep at least one clip, got keep=(). Use View.whole() for all clips.")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames of a view must be ≥ 1, got {self.num_frames}.")

    @classmethod
    def whole(cls) -> View:
        """All clips."""
        return cls()

    @classmethod
    def only(cls, clips: Iterable[int]) -> View:
        """These clips alone, in timeline order."""
        return cls(keep=tuple(sorted(set(clips))))

    @classmethod
    def ordered(cls, clips: Iterable[int]) -> View:
        """These clips alone, in the given order."""
        return cls(keep=tuple(clips))

    @classmethod
    def without(cls, clips: Iterable[int]) -> View:
        """All clips but these."""
        return cls(drop=tuple(sorted(set(clips))))

    @classmethod
    def sparse(cls, num_frames: int) -> View:
        """All clips, at most `num_frames` frames."""
        return cls(num_frames=num_frames)

    def indices(self, num_clips: int) -> tuple[int, ...]:
        """Indices of the seen clips in a timeline of `num_clips`, ascending except in `ordered` views.

        Raises:
            ValueError: If an index is outside `[0, num_clips)` or no clip is left.
        """
        clip_indices(self.keep or self.drop, "clip of a view", num_clips)
        if self.keep is not None:
            return self.keep
        seen = tuple(index for index in range(num_clips) if index not in set(self.drop))
        if not seen:
            raise ValueError(f"A view without clips {self.drop} leaves nothing of a timeline of {num_clips} clips.")
        return seen

    def of(self, timeline: Timeline) -> Timeline:
        """The seen clips as a timeline of their own.

        Raises:
            ValueError: See `indices`.
        """
        return Timeline(tuple(timeline.clips[index] for index in self.indices(len(timeline))))

    def __str__(self) -> str:
        """Short form for provenance: `whole`, `only(3)`, `without(0,3)`, `sparse(8)`, `sparse(2) of only(0,3)`."""
        clips = ""
        if self.keep is not None:
            clips = f"only({','.join(map(str, self.keep))})"
        elif self.drop:
            clips = f"without({','.join(map(str, self.drop))})"
        frames = f"sparse({self.num_frames})" if self.num_frames is not None else ""
        return " of ".join(part for part in (frames, clips) if part) or "whole"


def clip_indices(given: Any, what: str, length: int | None = None) -> tuple[int, ...]:
    """Indices as whole numbers of Python, whatever made them.

    Args:
        given: Whole numbers, of NumPy too.
        what: Names them in an error.
        length: Of what they count; None leaves the upper bound out.

    Raises:
        ValueError: If they are no whole numbers, or one is outside `[0, length)`; with the value and the bound.
    """
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise ValueError(f"{what} must be whole numbers, got {given!r}.")
    found = []
    for index in given:
        if isinstance(index, bool) or not isinstance(index, Integral):
            raise ValueError(f"{what} must be a whole number, got {index!r}.")
        found.append(int(index))
        if length is not None and not 0 <= found[-1] < length:
            raise ValueError(f"{what} must be in [0, {length}), got {index}.")
    return tuple(found)
