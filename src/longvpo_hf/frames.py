"""From a view of a timeline to its frames: the one sampler of training, building and evaluation, and the only decoder.

Takes a `Timeline` and a `View`; gives uint8 frames of one size with their place on the timeline's clock. Knows nothing
of models, tokens or rows. Frames are taken at the centres of equal parts of each clip, so a clip's first frame never
depends on what lies before its `[start_seconds, end_seconds)`.
"""

from __future__ import annotations

import heapq
import math
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from longvpo_hf.errors import ConfigError, VideoError
from longvpo_hf.timeline import Clip, Timeline, View

if TYPE_CHECKING:
    import torch
    from torchcodec.decoders import VideoDecoder

#: Files kept open per sampler. Clips of one long video then share its decoder.
_OPEN_DECODERS = 16
#: Decoded frames that `VideoFile.frames` holds at a time.
_CHUNK_BYTES = 32 * 1024**2

Reason = Literal["missing_file", "unreadable", "beyond_end", "before_begin"]


class UnreadableVideo(VideoError):
    """A clip, or a whole file, whose frames cannot be had.

    Args:
        reason: `missing_file`, `unreadable` (not a video, truncated, corrupted), `beyond_end` or `before_begin`.
        clip: The clip, or the path of the file.
        detail: What the decoder said, or the bound that was passed.
    """

    def __init__(self, reason: Reason, clip: Clip | str, detail: str) -> None:
        self.reason = reason
        self.clip = clip
        self.detail = detail
        self.path = clip if isinstance(clip, str) else clip.path
        span = "" if isinstance(clip, str) else f" [{clip.start_seconds}, {clip.end_seconds}) s"
        super().__init__(f"{reason}: {self.path}{span}: {detail}")

    def __reduce__(self) -> tuple[type[UnreadableVideo], tuple[Reason, Clip | str, str]]:
        """Lets the error leave a dataloader worker as it is."""
        return type(self), (self.reason, self.clip, self.detail)


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


def whole_clip(path: str) -> Clip:
    """The clip that spans a whole video file, in its own source seconds.

    Raises:
        UnreadableVideo: If the file is missing or is no video.
    """
    bounds = _stream_seconds(_open(path, None))
    if bounds is None or bounds[1] <= 0:
        raise UnreadableVideo("unreadable", path, "the stream holds no frames")
    return Clip(path, max(bounds[0], 0.0), bounds[1])


class VideoFile:
    """One video file as a whole: what it is, whether it decodes, and its frames from one instant to another, in order.

    For building (probing sources, finding scenes, cutting clips); models see `FrameSampler`'s frames.

    Args:
        path: The file.

    Attributes:
        begin_seconds: When the first frame appears, in source seconds.
        end_seconds: When the last frame ends.
        num_frames: How many frames its packets hold, counted.
        fps: Frames per second, as an average where the rate varies.
        size: Height and width of its frames in pixels, upright (after the rotation that the file asks for).

    Raises:
        UnreadableVideo: If the file is missing or is no video.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._decoder: VideoDecoder = _open(path, None)
        bounds, metadata = _stream_seconds(self._decoder), self._decoder.metadata
        if bounds is None or not metadata.num_frames or not metadata.height or not metadata.width:
            raise UnreadableVideo("unreadable", path, "the stream holds no frames")
        self.begin_seconds, self.end_seconds = bounds
        self.num_frames: int = metadata.num_frames
        self.fps = self.num_frames / (self.end_seconds - self.begin_seconds)
        self.size: tuple[int, int] = (metadata.height, metadata.width)
        self._scaled: tuple[tuple[int, int], VideoDecoder] = (self.size, self._decoder)

    def probe(self) -> None:
        """Decodes the first, the middle and the last frame: a truncated or corrupted file opens well and fails later.

        Raises:
            UnreadableVideo: If one of them cannot be decoded.
        """
        try:
            self._decoder.get_frames_at(sorted({0, self.num_frames // 2, self.num_frames - 1}))
        except (RuntimeError, IndexError, ValueError) as error:
            raise UnreadableVideo("unreadable", self.path, _said(error)) from error

    def frames(
        self, start_seconds: float, end_seconds: float, fps: float, size: tuple[int, int] | None = None
    ) -> Iterator[tuple[tuple[float, ...], torch.Tensor]]:
        """Frames at a constant rate, in chunks of bounded memory: when each is shown, and uint8 `[N, C, *size]`.

        Frame k is what the file shows at the middle of `[start + k / fps, start + (k + 1) / fps)`, never one after the
        end: every frame once where `fps` is the file's own constant rate; where the file's rate varies, frames are
        repeated or left out. Together they last as long as the span or, rounded up, a part of a frame longer.

        Args:
            start_seconds: First instant, in source seconds.
            end_seconds: First instant after.
            fps: Frames per second.
            size: Height and width the frames are scaled to; `None` keeps the file's.

        Raises:
            UnreadableVideo: If a frame cannot be decoded.
        """
        size = size or self.size
        if self._scaled[0] != size:
            self._scaled = (size, _open(self.path, size))
        last = math.nextafter(min(end_seconds, self.end_seconds), -math.inf)
        count = max(1, math.ceil((end_seconds - start_seconds) * fps - 1e-6))
        per_chunk = max(1, _CHUNK_BYTES // (3 * size[0] * size[1]))
        for first in range(0, count, per_chunk):
            seconds = tuple(
                min(max(start_seconds + (k + 0.5) / fps, self.begin_seconds), last)
                for k in range(first, min(first + per_chunk, count))
            )
            try:
                pixels = self._scaled[1].get_frames_played_at(list(seconds)).data
            except (RuntimeError, IndexError, ValueError) as error:
                raise UnreadableVideo("unreadable", self.path, _said(error)) from error
            yield seconds, pixels


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
        if num_frames < 1:
            raise ConfigError(f"num_frames must be ≥ 1, got {num_frames}.")
        if max_pixels is not None and max_pixels < 1:
            raise ConfigError(f"max_pixels must be ≥ 1, got {max_pixels}.")
        if cache_bytes < 0:
            raise ConfigError(f"cache_bytes must be ≥ 0, got {cache_bytes}; 0 keeps nothing.")
        self.num_frames = num_frames
        self.fps = fps
        self.max_pixels = max_pixels
        self.cache_bytes = cache_bytes
        self._forget()

    def _forget(self) -> None:
        self._cache: OrderedDict[tuple[Clip, int, tuple[int, int]], torch.Tensor] = OrderedDict()
        self._cached_bytes = 0
        self._decoders: OrderedDict[tuple[str, tuple[int, int] | None], VideoDecoder] = OrderedDict()
        self._sizes: dict[str, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, object]:
        """What a dataloader worker gets: the settings. Decoders belong to one process."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, timeline: Timeline, view: View | None = None) -> Frames:
        """Frames of `view` (default: the whole timeline).

        Raises:
            UnreadableVideo: If a clip's file is missing, cannot be decoded, or ends before the clip does.
            ValueError: If the budget is too small for the clips, or the view does not fit the timeline.
        """
        import torch

        seen, counts = self._plan(timeline, view)
        size = self._canvas(seen)
        pixels = [self._clip_frames(clip, count, size) for clip, count in zip(seen.clips, counts, strict=True)]
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
            seconds_by_size[self._source_size(clip)] += clip.duration_seconds  # type: ignore[assignment]  # float counts
        height, width = seconds_by_size.most_common(1)[0][0]
        if self.max_pixels is not None and height * width > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (height * width))
            height, width = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        return height, width

    def _source_size(self, clip: Clip) -> tuple[int, int]:
        if clip.path not in self._sizes:
            metadata = self._decoder(clip).metadata
            if metadata.height is None or metadata.width is None:
                raise UnreadableVideo("unreadable", clip, "the stream names no frame size")
            self._sizes[clip.path] = (metadata.height, metadata.width)
        return self._sizes[clip.path]

    def _clip_frames(self, clip: Clip, count: int, size: tuple[int, int]) -> torch.Tensor:
        key = (clip, count, size)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        frames = self._decode(clip, count, size)
        self._cache[key] = frames
        self._cached_bytes += frames.numel()
        while self._cached_bytes > self.cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.numel()
        return frames

    def _decoder(self, clip: Clip, size: tuple[int, int] | None = None) -> VideoDecoder:
        """A decoder of the clip's file, scaling to `size`. Opening reads all packets of the file: keep some open."""
        key = (clip.path, size)
        if key not in self._decoders:
            try:
                self._decoders[key] = _open(clip.path, size)
            except UnreadableVideo as error:
                raise UnreadableVideo(error.reason, clip, error.detail) from error
            if len(self._decoders) > _OPEN_DECODERS:
                self._decoders.popitem(last=False)
        self._decoders.move_to_end(key)
        return self._decoders[key]

    def _decode(self, clip: Clip, count: int, canvas: tuple[int, int]) -> torch.Tensor:
        """uint8 `[count, C, *canvas]`: the clip's frames, scaled to fit and centred on black."""
        import torch.nn.functional as F

        source_size = self._source_size(clip)
        scale = min(canvas[0] / source_size[0], canvas[1] / source_size[1])
        fitted = (max(1, round(source_size[0] * scale)), max(1, round(source_size[1] * scale)))
        if canvas[0] - fitted[0] <= 1 and canvas[1] - fitted[1] <= 1:
            fitted = canvas  # bars of a pixel come of rounding the canvas, not of another aspect
        decoder = self._decoder(clip, fitted if fitted != source_size else None)
        bounds, fps = _stream_seconds(decoder), decoder.metadata.average_fps
        if bounds is None or not fps:
            raise UnreadableVideo("unreadable", clip, "the stream holds no frames")
        begin, end = bounds
        # Containers round their durations: one frame is forgiven.
        if clip.end_seconds > end + 1 / fps or clip.start_seconds >= end:
            raise UnreadableVideo("beyond_end", clip, f"the video ends at {end} s; shorten the clip")
        if clip.end_seconds <= begin:
            raise UnreadableVideo("before_begin", clip, f"the video begins at {begin} s; move the clip")
        last = math.nextafter(end, -math.inf)
        wanted = [min(max(clip.start_seconds + offset, begin), last) for offset in _offsets_seconds(clip, count)]
        try:
            frames = decoder.get_frames_played_at(wanted).data
        except (RuntimeError, IndexError, ValueError) as error:
            raise UnreadableVideo("unreadable", clip, _said(error)) from error
        top, left = (canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2
        if fitted == canvas:
            return frames
        return F.pad(frames, (left, canvas[1] - fitted[1] - left, top, canvas[0] - fitted[0] - top))


def _stream_seconds(decoder: VideoDecoder) -> tuple[float, float] | None:
    """When the first frame of a stream appears and the last one ends, in source seconds; None of an empty stream."""
    begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    return None if begin is None or end is None or end <= begin else (float(begin), float(end))


def _seconds(timeline: Timeline, counts: Sequence[int]) -> tuple[float, ...]:
    """When the frames are, on the timeline's clock."""
    clips = zip(timeline.clips, counts, timeline.starts_timeline_seconds, strict=True)
    return tuple(start + offset for clip, count, start in clips for offset in _offsets_seconds(clip, count))


def _offsets_seconds(clip: Clip, count: int) -> list[float]:
    """Centres of `count` equal parts of the clip, in seconds after its start."""
    return [(i + 0.5) * clip.duration_seconds / count for i in range(count)]


def _open(path: str, size: tuple[int, int] | None) -> VideoDecoder:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    source: Any = path
    if path.startswith("hf://"):  # rows streamed from the Hub; FFmpeg does not know the protocol
        from huggingface_hub import HfFileSystem

        try:
            source = HfFileSystem().open(path, "rb")
        except FileNotFoundError:
            raise UnreadableVideo("missing_file", path, "no such file on the Hub") from None
    elif "://" not in path and not os.path.isfile(path):
        raise UnreadableVideo("missing_file", path, "no such file")
    try:
        # Exact seeking: the approximate one claims frames that a truncated file does not have. One FFmpeg thread, since
        # decoding runs in several dataloader workers.
        return VideoDecoder(
            source, seek_mode="exact", num_ffmpeg_threads=1, transforms=[Resize(size)] if size else None
        )
    except (RuntimeError, ValueError) as error:
        raise UnreadableVideo("unreadable", path, _said(error)) from error


def _said(error: Exception) -> str:
    """What the decoder said, without its own source lines ("Class, /path/file.cpp:41, ") and pleas to report it."""
    if "best video stream is unknown" in str(error):
        return "the file has no video stream"
    return re.sub(r"^\w+, \S+:\d+, ", "", str(error).strip().splitlines()[0])
