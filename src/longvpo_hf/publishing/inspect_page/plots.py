"""Histograms of a whole dataset, and of all captions."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.preference import VideoPreference

_BINS = 12
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


class Summary:
    """Numbers over all rows. Keeps eight bytes per row."""

    def __init__(self) -> None:
        self.num_invalid = 0
        self._tenths = [0] * 10
        self._num_clips: Counter[int] = Counter()
        self._seconds = array("d")
        self._similarities: Counter[int] = Counter()  # by twentieths

    def add(self, preference: VideoPreference) -> None:
        timeline = preference.timeline
        for index in preference.evidence:
            self._tenths[min(9, int(10 * timeline.centre(index)))] += 1
        self._num_clips[len(timeline)] += 1
        self._seconds.append(timeline.duration_seconds)
        for index, value in enumerate(preference.provenance.similarities):
            if index not in preference.evidence and value is not None and math.isfinite(value):
                self._similarities[max(-20, min(19, math.floor(round(20 * value, 6))))] += 1

    def plots(self) -> list[dict[str, Any]]:
        """Histograms, without those of which there is nothing to show. `edges` are the bounds between `counts`."""
        longest = max(self._seconds, default=0.0)
        unit, scale = next((u, s) for u, s in _UNITS if longest > 3 * s or s == 1)
        low = min([0, *self._similarities])
        plots = [
            {
                "title": "Where the evidence stands",
                "axis": "middle of the clip, % of the timeline",
                "of": "evidence clips",
                "edges": [str(10 * i) for i in range(11)],
                "counts": self._tenths,
                "expected": sum(self._tenths) / 10,
            },
            {
                "title": "Clips per row",
                "axis": "clips",
                "of": "rows",
                **histogram(self._num_clips, whole=True),
            },
            {
                "title": "Length of a timeline",
                "axis": unit,
                "of": "rows",
                **histogram(Counter(round(seconds / scale, 2) for seconds in self._seconds)),
            },
            {
                "title": "How like the anchor the others are",
                "axis": "cosine of a clip's embedding with the anchor's",
                "of": "clips that are no evidence",
                "edges": [f"{i / 20:g}" for i in range(low, 21)],
                "counts": [self._similarities[i] for i in range(low, 20)],
            },
        ]
        return [plot for plot in plots if any(plot["counts"])]


def histogram(numbers: Mapping[Any, int], whole: bool = False) -> dict[str, Any]:
    """About `_BINS` equal parts with round bounds; one value, or whole numbers in a small range, stand as `labels`."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    if low == high:
        return {"labels": [f"{low:g}"], "counts": [numbers.get(low, 0)]}
    if whole and high - low < 2 * _BINS:
        values = range(int(low), int(high) + 1)
        return {"labels": [str(value) for value in values], "counts": [numbers.get(value, 0) for value in values]}
    power = 10.0 ** math.floor(math.log10((high - low) / _BINS))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * _BINS >= high - low)
    counts: Counter[int] = Counter()
    for value, number in numbers.items():
        counts[math.floor(round(value / step, 6))] += number
    first, last = min(counts, default=0), max(counts, default=0)
    return {
        "edges": [f"{i * step:.10g}" for i in range(first, last + 2)],
        "counts": [counts[i] for i in range(first, last + 1)],
    }


def caption_plots(videos: Sequence[CaptionedVideo]) -> list[dict[str, Any]]:
    """Histograms of all videos and their scenes."""
    scenes = [clip for video in videos for clip in video.timeline.clips]
    levels = [len(video.summary_path(scene)) for video in videos for scene in video.captioned_scenes]
    plots: list[tuple[str, str, str, Sequence[float]]] = [
        ("Scenes per video", "scenes", "videos", [len(video.timeline) for video in videos]),
        ("Length of a scene", "seconds", "scenes", [round(clip.duration_seconds, 2) for clip in scenes]),
        ("Length of a caption", "characters", "captions", [len(clip.caption) for clip in scenes if clip.caption]),
        ("Summaries over a scene", "summaries", "captioned scenes", levels),
    ]
    return [
        {"title": title, "axis": axis, "of": of, **histogram(Counter(numbers), whole=axis != "seconds")}
        for title, axis, of, numbers in plots
    ]
