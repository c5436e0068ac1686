"""What a page of rows and a page of captions share: its bounds, pictures of clips, and which clips it has room for."""

from __future__ import annotations

import base64
import io
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from longvpo_hf.frames import FrameSampler, UnreadableVideo
from longvpo_hf.paths import OutsideRoot
from longvpo_hf.public import public_name
from longvpo_hf.timeline import Clip, Timeline

# What bounds the page: at these numbers about 25 MB of pictures.
PICTURES = 4_800
PICTURES_PER_ROW = 64
_PICTURE_PIXELS = 160 * 90
_JPEG_QUALITY = 70
TEXT_CHARACTERS = 4_000
CAPTION_CHARACTERS = 400
ENTRIES = 50  # verdicts of a row, fields of a drop


def sample(total: int, wanted: int, seed: int) -> list[int]:
    """Ascending row numbers, one drawn from each of `wanted` equal parts of `[0, total)`."""
    rng = random.Random(seed)
    parts = min(total, wanted)
    return [rng.randrange(i * total // parts, (i + 1) * total // parts) for i in range(parts)]


def clips_to_show(num_clips: int, evidence: Sequence[int], reference: Sequence[int], most: int) -> list[int]:
    """Ascending indices of at most `most` clips: first evidence, then reference, then others, each spread evenly."""
    shown: set[int] = set()
    for group in (evidence, reference, range(num_clips)):
        left = sorted(set(group) - shown)
        number = min(len(left), most - len(shown))
        shown.update(left[(2 * i + 1) * len(left) // (2 * number)] for i in range(number))
    return sorted(shown)


def spans(timeline: Timeline, indices: Iterable[int]) -> list[list[float]]:
    """Where clips lie on the timeline, as [begin, end) from 0 to 1; neighbours make one span."""
    edges = [*timeline.starts_timeline_seconds, timeline.duration_seconds]
    spans: list[list[float]] = []
    last = None
    for index in sorted(set(indices)):
        end = round(edges[index + 1] / edges[-1], 4)
        if last is not None and index == last + 1:
            spans[-1][1] = end
        else:
            spans.append([round(edges[index] / edges[-1], 4), end])
        last = index
    return spans


class Pictures:
    """One small JPEG per clip, made once however many rows show it.

    Args:
        locate: The path of a clip's file; raises `OutsideRoot` if it may not be opened.
    """

    def __init__(self, locate: Callable[[str], Path]) -> None:
        self.encoded: list[str] = []
        self._locate = locate
        self._sampler = FrameSampler(num_frames=1, max_pixels=_PICTURE_PIXELS, cache_bytes=0)
        self._known: dict[tuple[str, float, float], tuple[int | None, str]] = {}

    def of(self, clip: Clip) -> tuple[int | None, str]:
        """Which of `encoded` shows the clip's middle; or None and the reason."""
        key = (clip.path, clip.start_seconds, clip.end_seconds)
        if key not in self._known:
            self._known[key] = self._take(clip)
        return self._known[key]

    def _take(self, clip: Clip) -> tuple[int | None, str]:
        try:
            path = self._locate(clip.path)
        except OutsideRoot:
            return None, "outside: the file is not in the folder of the media, so it was not opened"
        try:
            frames = self._sampler(Timeline((replace(clip, path=str(path)),)))
        except UnreadableVideo as error:
            detail = error.detail.replace(f"{path.parent}{os.sep}", "")
            return None, cut(f"{error.reason}: {detail}", CAPTION_CHARACTERS)
        buffer = io.BytesIO()
        image = Image.fromarray(frames.pixels[0].permute(1, 2, 0).numpy())
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
        self.encoded.append(base64.b64encode(buffer.getvalue()).decode())
        return len(self.encoded) - 1, ""


def cut(text: object, most: int = TEXT_CHARACTERS) -> str:
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def shown_clip(clip: Clip, start: float, pictures: Pictures | None, has_origin: bool = True) -> dict[str, Any]:
    """A clip as the page's script takes it: its spans on the timeline, in its file and in its source; its picture.

    Args:
        clip: The clip.
        start: Where it starts on the timeline, in seconds.
        pictures: Takes its picture; None for no picture.
        has_origin: Whether it is known where in its source the clip is from; rows of before did not say.
    """
    picture, problem = pictures.of(clip) if pictures is not None else (None, "")
    origin = clip.origin if has_origin and clip.source_id else None
    return {
        "start": round(start, 3),
        "end": round(start + clip.duration_seconds, 3),
        "file_start": round(clip.start_seconds, 3),
        "file_end": round(clip.end_seconds, 3),
        "source": cut(public_name(clip.source_id), CAPTION_CHARACTERS),
        "source_start": None if origin is None else round(origin.start_seconds, 3),
        "source_end": None if origin is None else round(origin.end_seconds, 3),
        "licence": cut(clip.licence, CAPTION_CHARACTERS),
        "caption": cut(clip.caption, CAPTION_CHARACTERS),
        "picture": picture,
        "problem": problem,
    }
