"""From a view of a timeline to its frames: the one sampler of training, building and evaluation.

Frames are taken at the centres of equal parts of each clip, so a clip's first frame never depends on what lies before
its `[start_seconds, end_seconds)`.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from longvpo_hf.errors import ConfigError
from longvpo_hf.frames.opening import UnreadableVideo, need_ffmpeg
from longvpo_hf.frames.video import VideoFile
from longvpo_hf.timeline import Clip, Timeline, View

if TYPE_CHECKING:
    import torch

#: What the files may hold that a sampler keeps open: 16 of 1920 × 1080, or 4 of 3840 × 2160. Clips of one long video
#: then share its decoder.
_OPEN_BYTES = 768 * 1024**2


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames of one view.

    Args:
        pixels: uint8 `[N, C, H, W]`, RGB.
        timeline_seconds: Where each frame stands on the view's own clock (its clips laid end to end), length N.
        clip_indices: Which clip of the view each frame is of, length N.
        duration_seconds: Length of the view.
    """

    pixels: torch.Tensor
    timeline_seconds: tuple[float, ...]
    clip_indices: tuple[int, ...]
    duration_seconds: float

    def __len__(self) -> int:
        return len(self.timeline_seconds)


def spread_frames(durations_seconds: Sequence[float], num_frames: int, fps: float | None = None) -> list[int]:
    """How many frames each clip gets of a budget: in proportion to its length, at least one each.

    Args:
        durations_seconds: Length of each clip.
        num_frames: Budget over all clips.
        fps: At most so many frames per second of a clip (but always one); `None` for no such bound.

    Returns:
        Frames per clip; their sum is `num_frames`, or less where `fps` bounds all clips.

    Raises:
        ValueError: If the budget is smaller than the number of clips, or `fps` is not > 0.
    """
    if num_frames < len(durations_seconds):
        raise ConfigError(
            f"num_frames={num_frames} cannot give each of {len(durations_seconds)} clips a frame; raise num_frames to "
            f"at least {len(durations_seconds)} or make timelines of fewer clips."
        )
    if fps is not None and not fps > 0:
        raise ConfigError(f"fps must be > 0, got {fps}.")
    caps = [num_frames if fps is None else max(1, math.floor(d * fps + 1e-6)) for d in durations_seconds]
    counts = [1] * len(durations_seconds)
    # Sainte-Laguë: the next frame goes to the clip with the most seconds per frame; ties to the earlier clip.
    queue = [(-d / 1.5, i) for i, d in enumerate(durations_seconds) if caps[i] > 1]
    heapq.heapify(queue)
    for _ in range(num_frames - len(counts)):
        if not queue:
            break
        _, i = heapq.heappop(queue)
        counts[i] += 1
        if counts[i] < caps[i]:
            heapq.heappush(queue, (-durations_seconds[i] / (counts[i] + 0.5), i))
    return counts


class FrameSampler:
    """Decodes views of timelines under one frame budget.

    Args:
        num_frames: At most so many frames per view, spread over its clips by duration, at least one each.
        fps: At most so many frames per second; `None` for no such bound.
        max_pixels: At most so many pixels per frame (height × width); larger frames are scaled down, keeping their
            aspect. `None` keeps the source's size.
        cache_bytes: Decoded clips kept in memory for the next view that shows them.

    Frames of one view have one size: that which most of its seconds have. Frames of another aspect are fitted into it
    with black bars.
    """

    def __init__(
        self,
        num_frames: int,
        fps: float | None = None,
        max_pixels: int | None = None,
        cache_bytes: int = 256 * 1024**2,
    ) -> None:
        given: dict[str, Any] = {"num_frames": num_frames, "max_pixels": 1 if max_pixels is None else max_pixels}
        for name, value in given.items():
            if not isinstance(value, Integral) or value < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {value!r}.")
        rate: Any = fps
        if rate is not None and not (isinstance(rate, Real) and 0 < float(rate) < math.inf):
            raise ConfigError(f"fps must be > 0, or None for no bound, got {rate!r}.")
        if cache_bytes < 0:
            raise ConfigError(f"cache_bytes must be ≥ 0, got {cache_bytes}; 0 keeps nothing.")
        self.num_frames = num_frames
        self.fps = fps
        self.max_pixels = max_pixels
        self.cache_bytes = cache_bytes
        need_ffmpeg()
        self._forget()

    def _forget(self) -> None:
        self._cache: OrderedDict[tuple[Clip, int, tuple[int, ...], tuple[int, int]], torch.Tensor] = OrderedDict()
        self._cached_bytes = 0
        self._files: OrderedDict[str, VideoFile] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        """What a dataloader worker gets: the settings. Decoders belong to one process."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, timeline: Timeline, view: View | None = None, wanted: Set[int] | None = None) -> Frames:
        """Frames of `view` (default: the whole timeline).

        Args:
            timeline: What the view is of.
            view: What is seen of it.
            wanted: Numbers of the frames that are decoded; all others are black. None: all are.

        Raises:
            UnreadableVideo: If a clip's file is missing, cannot be decoded, or ends before the clip does.
            ValueError: If the budget is too small for the clips, or the view does not fit the timeline.
        """
        import torch

        seen, counts = self._plan(timeline, view)
        size, pixels, before = self._canvas(seen), [], 0
        for clip, count in zip(seen.clips, counts, strict=True):
            of_clip = tuple(i for i in range(count) if wanted is None or before + i in wanted)
            pixels.append(self._clip_frames(clip, count, of_clip, size))
            before += count
        clip_indices = tuple(i for i, count in enumerate(counts) for _ in range(count))
        return Frames(torch.cat(pixels), _seconds(seen, counts), clip_indices, seen.duration_seconds)

    def timeline_seconds(self, timeline: Timeline, view: View | None = None) -> tuple[float, ...]:
        """When the frames of `view` will be, as `Frames.timeline_seconds` has it, without decoding anything.

        Raises:
            ValueError: If the budget is too small for the clips, or the view does not fit the timeline.
        """
        return _seconds(*self._plan(timeline, view))

    def _plan(self, timeline: Timeline, view: View | None) -> tuple[Timeline, list[int]]:
        """The clips that are seen, and how many frames of each."""
        view = view or View.whole()
        seen = view.of(timeline)
        budget = self.num_frames if view.num_frames is None else min(self.num_frames, view.num_frames)
        return seen, spread_frames([clip.duration_seconds for clip in seen.clips], budget, self.fps)

    def _canvas(self, timeline: Timeline) -> tuple[int, int]:
        seconds_by_size: Counter[tuple[int, int]] = Counter()
        for clip in timeline.clips:
            seconds_by_size[self._file(clip).size] += clip.duration_seconds  # type: ignore[assignment]  # float counts
        height, width = seconds_by_size.most_common(1)[0][0]
        if self.max_pixels is not None and height * width > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (height * width))
            height, width = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        return height, width

    def _clip_frames(self, clip: Clip, count: int, wanted: tuple[int, ...], size: tuple[int, int]) -> torch.Tensor:
        key = (clip, count, wanted, size)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        frames = self._decode(clip, count, wanted, size)
        self._cache[key] = frames
        self._cached_bytes += frames.numel()
        while self._cached_bytes > self.cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.numel()
        return frames

    def _file(self, clip: Clip) -> VideoFile:
        """The clip's file. Opening reads all packets of a file: keep some open."""
        if clip.path not in self._files:
            try:
                self._files[clip.path] = VideoFile(clip.path)
            except UnreadableVideo as error:
                raise UnreadableVideo(error.reason, clip, error.detail) from error
            while len(self._files) > 1 and sum(file.held_bytes for file in self._files.values()) > _OPEN_BYTES:
                self._files.popitem(last=False)
        self._files.move_to_end(clip.path)
        return self._files[clip.path]

    def _decode(self, clip: Clip, count: int, wanted: tuple[int, ...], canvas: tuple[int, int]) -> torch.Tensor:
        """uint8 `[count, C, *canvas]`: the wanted ones of the clip's frames, scaled to fit and centred on black."""
        video = self._file(clip)
        video.check_span(clip)
        offsets = _offsets_seconds(clip, count)
        indices = [video.index_at(clip.start_seconds + offsets[i]) for i in wanted]
        try:
            found = video.frames_at(indices, canvas) if indices else None
        except UnreadableVideo as error:
            raise UnreadableVideo(error.reason, clip, error.detail) from error
        if found is not None and len(found) == count:
            return found
        import torch

        frames = torch.zeros(count, 3, *canvas, dtype=torch.uint8)
        if found is not None:
            frames[list(wanted)] = found
        return frames


def _seconds(timeline: Timeline, counts: Sequence[int]) -> tuple[float, ...]:
    """When the frames are, on the timeline's clock."""
    clips = zip(timeline.clips, counts, timeline.starts_timeline_seconds, strict=True)
    return tuple(start + offset for clip, count, start in clips for offset in _offsets_seconds(clip, count))


def _offsets_seconds(clip: Clip, count: int) -> list[float]:
    """Centres of `count` equal parts of the clip, in seconds after its start."""
    return [(i + 0.5) * clip.duration_seconds / count for i in range(count)]
