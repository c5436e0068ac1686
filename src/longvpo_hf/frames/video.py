"""One video file: what it is, when its frames are shown, and its frames, upright, with square pixels, each checked.

The decoder is not believed. Every frame that it gives is compared with the one that was asked for, by its own time.
Where seeking gives another, or none, frames are decoded in order; where the times of a file cannot be relied on at all,
it is decoded once from start to end and its frames are counted.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from longvpo_hf.frames.headers import RANDOM_ACCESS
from longvpo_hf.frames.opening import Bounds, Source, UnreadableVideo
from longvpo_hf.frames.packets import SAME_SECONDS, Mistimed, Packets, Picture, Walk, number_at
from longvpo_hf.frames.timing import MAX_LOST_FRAMES, FrameTimes, Labels, healthy, times_in_order
from longvpo_hf.timeline import Clip

if TYPE_CHECKING:
    import torch
    from torchcodec.decoders import RawFrame, VideoDecoder

#: Decoded frames that are held at a time.
_CHUNK_BYTES = 32 * 1024**2
#: Frames at the start of a file whose order is compared with that of its times.
_CHECKED_FRAMES = 8
#: A second attempt at a frame starts from a key frame so many frames earlier: twice as many as may be reordered.
_LEAD_FRAMES = 32
#: What an open file is taken to hold: so many frames, of 1.5 bytes a pixel, and for the start of each of its frames a
#: float in a tuple. Of 20 open films of 3840 × 2160, those in H.264 took 83 MiB each, in H.265 of 10 bits 175: 7 and 15
#: such frames.
_HELD_FRAMES, _LEAST_HELD_BYTES, _TIME_BYTES = 16, 4 * 1024**2, 40
#: So much of a file may be missing at its end.
_MAX_MISSING = 0.02
#: A clip whose rate varies is given at most so many frames per second.
_MAX_VARIABLE_FPS = 60.0
#: By so much of a frame may a span be longer than whole frames: containers round times, to milliseconds some.
_ROUNDING_FRAMES = 0.1

#: Is shown a frame: for how many seconds the file says that it lasts, and what gives its pixels, uint8 `[C, H, W]`, of
#: at most a height.
Watch = Callable[[float, Callable[[int], "torch.Tensor"]], None]


class VideoFile:
    """One video file.

    Args:
        path: The file, or an `hf://` address.
        bounds: What it may ask of this machine.
        times: What an earlier look at the same content found; looking again costs a scan, or a decode of the whole
            file.
        watch: If all of the file has to be decoded to know its times, each frame is also shown to this, in order.

    Attributes:
        times: When its frames are shown.
        begin_seconds: When the first frame appears, in source seconds.
        end_seconds: When the last frame ends.
        num_frames: How many frames can be decoded, as far as that is known.
        fps: Frames per second, as an average where the rate varies.
        size: Height and width of its frames in pixels: upright, with square pixels.

    Raises:
        UnreadableVideo: If the file is missing, is no video or passes a bound.
    """

    def __init__(
        self,
        path: str,
        bounds: Bounds | None = None,
        times: FrameTimes | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.path = path
        self.bounds = bounds or Bounds()
        self._source = Source(path)
        for track in self._source.header.tracks.values():
            if track.size_px is not None:
                self._check_pixels(*track.size_px)  # before FFmpeg decodes a frame to find out more
        packets = Packets(self._source)
        self._stream_index = packets.stream.index
        self._picture = Picture(self._source.header, packets.stream)
        self.size: tuple[int, int] = self._picture.size_px
        self._check_pixels(*self.size)
        self._decoder: VideoDecoder | None = None
        self._walk: Walk | None = None
        self._damaged: set[int] = set()
        self._watch = watch
        self.times = times if times is not None else self._look(packets)
        self._can_seek = self.times.can_seek

    @property
    def held_bytes(self) -> int:
        """About how much memory it holds while it is open: reference frames of its decoder, and the times of frames."""
        return max(_LEAST_HELD_BYTES, _HELD_FRAMES * 3 * math.prod(self._picture.coded_px) // 2) + (
            _TIME_BYTES * len(self.times.starts_seconds)
        )

    @property
    def begin_seconds(self) -> float:
        return self.times.start(self.times.first)

    @property
    def end_seconds(self) -> float:
        return self.times.start(self.times.stop)

    @property
    def num_frames(self) -> int:
        return self.times.stop - self.times.first

    @property
    def fps(self) -> float:
        return self.num_frames / (self.end_seconds - self.begin_seconds)

    def index_at(self, seconds: float) -> int:
        """The frame that is shown at an instant; the nearest, outside the file."""
        index = bisect.bisect_right(self.times.starts_seconds, seconds + SAME_SECONDS) - 1
        return min(max(index, self.times.first), self.times.stop - 1)

    # ---------------------------------------------------------------------------------------------------- examining

    def probe(self) -> None:
        """Decodes frames at the start and the end, and checks what the file declares.

        A few frames that cannot be decoded are left out: `num_frames`, `begin_seconds` and `end_seconds` then are those
        of the others, and `times.num_lost` counts them.

        Raises:
            UnreadableVideo: If neither start nor end can be decoded, much of the file is missing, or a bound is passed.
        """
        self.check_declared()
        if self.times.can_seek:  # else all of it has been decoded
            try:
                self.times = self._without_lost_frames()
            except Mistimed:
                self.times = self._time_in_order()
                self._can_seek, self._walk = False, None

    def check_declared(self) -> None:
        """Raises UnreadableVideo if much of the file is missing, or it declares what exceeds a bound."""
        times = self.times
        if self._source.header.container in RANDOM_ACCESS and self._is_cut_short:
            raise UnreadableVideo("unreadable", self.path, f"the file is cut off: {self._missing()}")
        longest = max(
            times.start(index + 1) - times.starts_seconds[index] for index in range(len(times.starts_seconds))
        )
        if longest > self.bounds.max_frame_seconds:
            raise UnreadableVideo(
                "stretched",
                self.path,
                f"one of its {len(times.starts_seconds)} frames is declared to last {longest:.6g} s, more than "
                f"max_frame_seconds={self.bounds.max_frame_seconds:g}",
            )

    @property
    def not_shown(self) -> str:
        """What the file should hold or holds besides, and FFmpeg does not show; empty mostly."""
        header = self._source.header
        if header.next_file:
            return f"another {header.container} file stands at byte {header.next_file}, joined on behind this one"
        return f"the file is cut off: {self._missing()}" if self._is_cut_short else ""

    @property
    def _is_cut_short(self) -> bool:
        header = self._source.header
        return header.missing_bytes > _MAX_MISSING * header.declared_bytes

    def _missing(self) -> str:
        header = self._source.header
        return f"{header.missing_bytes} of its {header.declared_bytes} bytes are missing"

    def _without_lost_frames(self) -> FrameTimes:
        times = self.times
        num_frames = len(times.starts_seconds)
        first = self._start_walk(None).begun
        final = self._last_decodable()
        if first == num_frames and final < 0:
            raise self._broken()
        lost = num_frames - 1 - final
        stop = num_frames - (lost if lost <= MAX_LOST_FRAMES else 0)
        return replace(times, first=first if first < num_frames else 0, stop=stop)

    def _last_decodable(self) -> int:
        """The last of the frames that can be decoded without a gap, as seen from `MAX_LOST_FRAMES` before the end; -1
        if there is none."""
        num_frames = len(self.times.starts_seconds)
        walk = self._walk_to(max(0, num_frames - _LEAD_FRAMES))
        final = -1
        while walk.position < num_frames:
            if final >= num_frames - MAX_LOST_FRAMES and walk.gap:
                break
            final = walk.position
            walk.frame(final + 1)
        return final

    def check_span(self, clip: Clip) -> None:
        """Raises UnreadableVideo if a clip is not within the file.

        Containers round their durations, so one frame is forgiven, of the clip's own rate. In the place of a few frames
        that are lost at the end, the last one that is there is shown.
        """
        starts, end = self._starts(clip.start_seconds, clip.end_seconds), self.times.end_seconds
        forgiven = min(b - a for a, b in itertools.pairwise(starts))
        if clip.start_seconds >= end or clip.end_seconds > end + forgiven:
            raise UnreadableVideo("beyond_end", clip, f"the video ends at {end} s; shorten the clip")
        if clip.end_seconds <= self.begin_seconds:
            raise UnreadableVideo("before_begin", clip, f"the video begins at {self.begin_seconds} s; move the clip")

    def rate(self, start_seconds: float, end_seconds: float) -> float:
        """Frames per second at which every frame of a span is shown once; of a varying rate, at least once.

        A rate above `_MAX_VARIABLE_FPS` is only given where the frames come at that rate throughout.
        """
        starts = self._starts(start_seconds, end_seconds)
        step = (starts[-1] - starts[0]) / (len(starts) - 1)
        if all(abs(start - starts[0] - k * step) < 0.5 * step for k, start in enumerate(starts)):
            return 1 / step
        return min(1 / min(b - a for a, b in itertools.pairwise(starts)), _MAX_VARIABLE_FPS)

    def _starts(self, start_seconds: float, end_seconds: float) -> list[float]:
        """When the frames of a span start, and the one after it, or the end of the file."""
        first = self.index_at(start_seconds)
        stop = max(bisect.bisect_left(self.times.starts_seconds, end_seconds, hi=self.times.stop), first + 1)
        return [*self.times.starts_seconds[first:stop], self.times.start(stop)]

    # ------------------------------------------------------------------------------------------------------- frames

    def frames_at(self, indices: Sequence[int], canvas: tuple[int, int]) -> torch.Tensor:
        """Frames by number, uint8 `[N, C, *canvas]`: scaled to fit and centred on black.

        Raises:
            UnreadableVideo: If one of them cannot be decoded.
        """
        import torch

        wanted = sorted(set(indices))
        frames = self._sought(wanted, canvas) if self._can_seek else None
        if frames is None:
            frames = torch.stack([self._frame(index, canvas) for index in wanted])
        if list(indices) == wanted:
            return frames
        place = {index: number for number, index in enumerate(wanted)}
        return frames[[place[index] for index in indices]]

    def frames(
        self,
        start_seconds: float,
        end_seconds: float,
        fps: float,
        size: tuple[int, int] | None = None,
    ) -> Iterator[tuple[tuple[float, ...], torch.Tensor]]:
        """Frames at a constant rate, in chunks of bounded memory: when each is shown, and uint8 `[N, C, *size]`.

        Frame k is what the file shows at the middle of `[start + k / fps, start + (k + 1) / fps)`, never one after the
        end: every frame once where `fps` is the file's own constant rate; where the file's rate varies, frames are
        repeated or left out. Together they last as long as the span or, rounded up, a part of a frame longer.

        Args:
            start_seconds: First instant, in source seconds.
            end_seconds: First instant after.
            fps: Frames per second.
            size: Height and width that the frames are fitted into; `None` keeps the file's.

        Raises:
            UnreadableVideo: If a frame cannot be decoded.
        """
        import torch

        size = size or self.size
        last = min(end_seconds, self.end_seconds) - 2 * SAME_SECONDS
        count = max(1, math.ceil((end_seconds - start_seconds) * fps - _ROUNDING_FRAMES))
        seconds = [min(max(start_seconds + (k + 0.5) / fps, self.begin_seconds), last) for k in range(count)]
        per_chunk = max(1, _CHUNK_BYTES // (3 * size[0] * size[1]))
        shown, pixels = -1, torch.empty(0)
        for chunk in range(0, count, per_chunk):
            frames = []
            for index in map(self.index_at, seconds[chunk : chunk + per_chunk]):
                if index != shown:
                    shown, pixels = index, self._frame(index, size)
                frames.append(pixels)
            yield tuple(seconds[chunk : chunk + per_chunk]), torch.stack(frames)

    def check_frames(self, clip: Clip) -> None:
        """Raises UnreadableVideo if a clip is not within the file, or one of its frames cannot be decoded."""
        self.check_span(clip)
        last = self.index_at(clip.end_seconds - 2 * SAME_SECONDS)
        for index in range(self.index_at(clip.start_seconds), last + 1):
            self._decoded(index)

    def shown(self, max_fps: float, max_height: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Every frame, its number and as uint8 `[C, H, W]`, but those that follow one within 1 / `max_fps` s.

        Frames that cannot be decoded are passed over.
        """
        next_seconds = -math.inf
        for index in range(self.times.first, self.times.stop):
            start = self.times.starts_seconds[index]
            if start < next_seconds:
                continue
            try:
                pixels = self._lowered(self._decoded(index), max_height)
            except UnreadableVideo as error:
                if error.reason != "unreadable":
                    raise
                continue
            next_seconds = start + (1 - _ROUNDING_FRAMES) / max_fps
            yield index, pixels

    def _sought(self, wanted: Sequence[int], canvas: tuple[int, int]) -> torch.Tensor | None:
        """Frames by number, by seeking; None if the decoder fails or gives others than were asked for."""
        import torch
        from torchcodec.decoders import VideoDecoder

        per_chunk = max(1, _CHUNK_BYTES // (3 * self.size[0] * self.size[1]))
        frames = []
        try:
            with self._source.reading():
                if self._decoder is None:
                    self._walk = None  # two decoders of one file would hold twice its reference frames
                    # Exact seeking: the approximate one claims frames that a truncated file does not have. One FFmpeg
                    # thread, since decoding runs in several dataloader workers. Frames are scaled here rather than in
                    # the decoder, which would squash those of another size without a word; it is no slower.
                    self._decoder = VideoDecoder(
                        self._source.for_ffmpeg(),
                        stream_index=self._stream_index,
                        seek_mode="exact",
                        num_ffmpeg_threads=1,
                    )
                for chunk in range(0, len(wanted), per_chunk):
                    numbers = list(wanted[chunk : chunk + per_chunk])
                    batch = self._decoder.get_frames_at(numbers)
                    starts = [self.times.starts_seconds[number] for number in numbers]
                    differences = batch.pts_seconds - torch.tensor(starts, dtype=torch.float64)
                    if differences.abs().max() > SAME_SECONDS:
                        return None
                    frames.append(self._picture.fit(batch.data, canvas))
        except UnreadableVideo as error:
            if error.reason != "unreadable":
                raise
            return None  # a frame is damaged, or of another size than the header states
        return torch.cat(frames) if len(frames) > 1 else frames[0]

    # ----------------------------------------------------------------------------------------------------- in order

    def _frame(self, index: int, canvas: tuple[int, int]) -> torch.Tensor:
        """One frame, uint8 `[C, *canvas]`. Ascending calls decode the file once."""
        return self._picture.convert(self._decoded(index), canvas, self._check_pixels)

    def _lowered(self, frame: RawFrame, max_height: int) -> torch.Tensor:
        height = min(max_height, self.size[0])
        canvas = (height, max(1, round(self.size[1] * height / self.size[0])))
        return self._picture.convert(frame, canvas, self._check_pixels)

    def _decoded(self, index: int) -> RawFrame:
        try:
            found = self._raw(index)
            if found is None and index >= len(self.times.starts_seconds) - MAX_LOST_FRAMES:
                final = self._last_decodable()
                if 0 <= final < index:
                    self.times = replace(self.times, stop=final + 1)
                    found = self._raw(final)
        except Mistimed as error:
            raise UnreadableVideo(
                "untimed", self.path, f"its frames contradict their own time stamps; {self._repair()}"
            ) from error
        if found is None:
            raise self._broken()
        return found

    def _raw(self, index: int) -> RawFrame | None:
        """A frame as the decoder gives it; None if it gives none, also from earlier in the file."""
        if index in self._damaged:
            return None
        walk = self._walk_to(index)
        found = walk.frame(index)
        if found is None and not walk.is_from_start and walk.begun >= self._key_frame(index):
            # Perhaps it leans on frames before the key frame (intra refresh), or is one that FFmpeg's H.264 decoder
            # does not give at the end of a file if it started at an open GOP just before, or the decoder came out too
            # late.
            walk = self._start_walk(self._key_frame(self._key_frame(index) - _LEAD_FRAMES))
            if walk.begun > index:
                walk = self._start_walk(None)
                self._can_seek = False
            found = walk.frame(index)
        if found is None:
            self._damaged.update(walk.gap)
        return found

    def _walk_to(self, index: int) -> Walk:
        """The walk that is under way, where it leads to a frame; else one from the key frame before that."""
        walk = self._walk
        if walk is None or walk.position > index or self._key_frame(index) > walk.position:
            return self._start_walk(self._key_frame(index))
        return walk

    def _start_walk(self, key_frame: int | None) -> Walk:
        key_frame = None if key_frame is None or key_frame <= 0 else key_frame
        self._walk = Walk(self._source, self.times, key_frame)
        return self._walk

    def _key_frame(self, index: int) -> int:
        """The key frame to decode a frame from; -1 where there is none, or the file cannot be read from there."""
        place = bisect.bisect_right(self.times.key_frames, index)
        return self.times.key_frames[place - 1] if place and self._can_seek else -1

    # ------------------------------------------------------------------------------------------------------- timing

    def _look(self, packets: Packets) -> FrameTimes:
        """When frames are shown: by the times of the packets, where the first frames that are decoded have those."""
        if self._source.header.container in RANDOM_ACCESS:
            with self._source.reading():
                scanned = packets.stream.scan()
            starts = tuple(scanned.pts_seconds.tolist())
            if not starts:
                raise UnreadableVideo("unreadable", self.path, "the stream holds no frames")
            key_frames = tuple(scanned.key_frame_indices.tolist())
            if healthy(starts) and key_frames and self._starts_in_order(starts):
                end = max(scanned.end_stream_seconds_from_content, math.nextafter(starts[-1], math.inf))
                return FrameTimes(starts, end, 0, len(starts), key_frames, can_seek=True)
        return self._time_in_order()

    def _starts_in_order(self, starts: tuple[float, ...]) -> bool:
        before = -1
        # Opened anew: after a scan, torchcodec goes on at time 0, past frames before that.
        for _, frame in itertools.islice(Packets(self._source).frames(), _CHECKED_FRAMES):
            number = number_at(starts, frame.pts_seconds)
            if number is None or number <= before:
                return False
            before = number
        return True

    def _time_in_order(self) -> FrameTimes:
        """Decodes the whole file once."""
        ticks: list[float] = []
        key_ticks: list[int] = []
        with suppress(RuntimeError):  # of a format that cannot be read twice
            scanned = Packets(self._source).stream.scan()
            ticks, key_ticks = scanned.pts_seconds.tolist(), scanned.key_frame_indices.tolist()
        packets = Packets(self._source)
        decoded = []
        for number, frame in packets.frames():
            decoded.append((number, frame.pts_seconds, frame.duration_seconds))
            if self._watch is not None:
                self._watch(frame.duration_seconds, functools.partial(self._lowered, frame))
        if not decoded:
            reason = packets.error or "the stream holds no frames"
            raise UnreadableVideo("unreadable", self.path, reason)
        numbers, seconds, durations = zip(*decoded, strict=True)
        labels = Labels(seconds, durations, numbers, packets.num_packets, packets.num_drained)
        times = times_in_order(labels, ticks, key_ticks, self._source.header.container)
        if times is None:
            raise UnreadableVideo("untimed", self.path, f"its frames have no times and no rate; {self._repair()}")
        return times

    # ------------------------------------------------------------------------------------------------------- errors

    def _check_pixels(self, height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise UnreadableVideo("unreadable", self.path, "the stream names no frame size")
        if height * width > self.bounds.max_frame_px:
            raise UnreadableVideo(
                "too_many_pixels",
                self.path,
                f"its frames are {width}×{height}, more than max_frame_px={self.bounds.max_frame_px}",
            )

    def _broken(self) -> UnreadableVideo:
        detail = self._walk.error if self._walk is not None and self._walk.error else "a frame cannot be decoded"
        return UnreadableVideo("unreadable", self.path, detail)

    def _repair(self) -> str:
        name = shlex.quote(self.path)
        return f"to repair it: ffmpeg -i {name} -map 0:v:0 -c:v libx264 -crf 18 repaired.mp4"


def whole_clip(path: str) -> Clip:
    """The clip that spans a whole video file, in its own source seconds.

    Raises:
        UnreadableVideo: If the file is missing or is no video.
    """
    video = VideoFile(path)
    return Clip(path, video.begin_seconds, video.end_seconds)
