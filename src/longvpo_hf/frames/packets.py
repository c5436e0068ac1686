"""Frames of a file in the order in which it stores them, decoded packet by packet, and how they are made upright.

Each frame is told apart by its own time stamp, or, where those cannot be relied on, by counting from the file's start.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from longvpo_hf.frames.headers import Header
from longvpo_hf.frames.opening import Source, UnreadableVideo, said
from longvpo_hf.frames.timing import FrameTimes

if TYPE_CHECKING:
    import torch
    from torchcodec.decoders import ColorConverter, RawFrame, VideoStream

#: Time stamps of one frame, from its packet and from the decoder, differ by less.
SAME_SECONDS = 1e-6


class Packets:
    """The packets of a file's video stream, and the frames that they give.

    Args:
        source: The file.

    Attributes:
        stream: torchcodec's stream: its metadata and the scan of its packets.
        num_packets: How many packets have been read.
        num_drained: How many frames came only when there were no more packets.
        error: What the decoder said last of a packet that it could not decode; empty if it could decode all.
        is_damaged: Whether packets were decoded after one that could not be: their frames may lean on what is missing.

    Raises:
        UnreadableVideo: If FFmpeg does not open the file, or it has no video stream.
    """

    def __init__(self, source: Source) -> None:
        from torchcodec.decoders import Demuxer

        self._source = source
        with source.reading():
            self._demuxer = Demuxer(source.for_ffmpeg())
            self.stream: VideoStream = self._demuxer.streams[0]
        self.num_packets = 0
        self.num_drained = 0
        self.error = ""
        self._has_failed = False
        self.is_damaged = False

    def frames(self, seconds: float | None = None) -> Iterator[tuple[int, RawFrame]]:
        """How many packets had been read, and a frame: from the file's start, or from the key frame up to an instant.

        Packets that cannot be decoded are passed over.
        """
        with self._source.reading():
            decoder = self.stream.make_decoder()
            if seconds is not None:
                self._demuxer.seek(seconds)
        while (packet := self._next()) is not None:
            self.num_packets += 1
            try:
                with self._source.reading():
                    decoded = decoder.decode(packet)
            except UnreadableVideo as error:
                if error.reason != "unreadable":
                    raise
                self.error = error.detail
                self._has_failed = True
                continue
            self.is_damaged, self._has_failed = self.is_damaged or self._has_failed, False
            for frame in decoded:
                yield self.num_packets - 1, frame
        for frame in decoder.drain():
            self.num_drained += 1
            yield self.num_packets - 1 + self.num_drained, frame

    def _next(self) -> object | None:
        with self._source.reading():
            try:
                return next(self._demuxer)
            except StopIteration:
                return None
            except RuntimeError as error:  # what follows in the file is not there, or is no packet
                self.error = said(error)
                return None


class Mistimed(Exception):
    """A decoder's frames are not in the order of their time stamps, or have others than their packets."""


class Walk:
    """Frames by number, each at or after the one before.

    After a packet that cannot be decoded, frames up to the next key frame are not given: they lean on what is missing.

    Args:
        source: The file.
        times: When its frames are shown.
        key_frame: The frame to start from; None starts at the file's start.

    Attributes:
        begun: Number of the first frame that the decoder gave; the number of frames, if it gave none.
        is_from_start: Whether nothing before can be missing because of where it started.
        error: What the decoder said of the last packet that it could not decode.
    """

    def __init__(self, source: Source, times: FrameTimes, key_frame: int | None) -> None:
        self._times = times
        self._packets = Packets(source)
        self.is_from_start = key_frame is None
        self._frames = self._packets.frames(None if key_frame is None else times.starts_seconds[key_frame])
        self._key_frames = frozenset(times.key_frames)
        self._before, self._number, self._latest, self._count = -1, -1, -1, 0
        self._frame: RawFrame | None = None
        self._advance()
        self.begun = self._number

    @property
    def error(self) -> str:
        return self._packets.error

    @property
    def position(self) -> int:
        """Number of the frame that it stands at."""
        return self._number

    @property
    def gap(self) -> range:
        """The frames that were not given between the one that it stands at and the one before."""
        return range(self._before + 1, self._number)

    def frame(self, number: int) -> RawFrame | None:
        """A frame; None if the decoder does not give it.

        Raises:
            Mistimed: If the frames' time stamps contradict their order.
        """
        while self._number < number:
            self._advance()
        return self._frame if self._number == number else None

    def _advance(self) -> None:
        self._before = self._number
        for _, frame in self._frames:
            number = self._number_of(frame)
            if number in self._key_frames:
                self._packets.is_damaged = False
            if not self._key_frames or not self._packets.is_damaged:
                self._number, self._frame = number, frame
                return
        self._number, self._frame = len(self._times.starts_seconds), None

    def _number_of(self, frame: RawFrame) -> int:
        if self._times.can_seek:
            number = number_at(self._times.starts_seconds, frame.pts_seconds)
            if number is None or number <= self._latest:
                raise Mistimed
        else:
            number = self._times.given[self._count] if self._times.given else self._count
            self._count += 1
        self._latest = number
        return number


def number_at(starts_seconds: tuple[float, ...], seconds: float) -> int | None:
    """The frame that starts at a time stamp; None if none does."""
    place = bisect.bisect_left(starts_seconds, seconds - SAME_SECONDS)
    if place < len(starts_seconds) and abs(starts_seconds[place] - seconds) <= SAME_SECONDS:
        return place
    return None


class Picture:
    """How decoded frames become what a viewer sees: upright, not mirrored, with square pixels.

    torchcodec turns frames by the display matrix; what it leaves undone is done here.

    Attributes:
        size_px: Height and width of the shown picture, of the size that the stream's header states.
        coded_px: Height and width of what torchcodec gives, of that size.
    """

    def __init__(self, header: Header, stream: VideoStream) -> None:
        metadata, track = stream.metadata, header.track(stream.index)
        turned = round((metadata.rotation or 0.0) / 90) % 4
        self._flips: list[int] = []
        self._turns = 0
        if track.mirrored:  # after torchcodec's turn, by the axis that the turn made the vertical one
            self._flips = [-1 if turned % 2 else -2]
        elif header.orientation is not None and not metadata.rotation and metadata.codec in ("h264", "hevc"):
            asked = header.orientation
            self._flips = [-1] * asked.flip_horizontal + [-2] * asked.flip_vertical
            self._turns = asked.quarter_turns
        aspect = track.pixel_aspect or float(metadata.pixel_aspect_ratio or 1)
        self._aspect = aspect if 1 / 16 <= aspect <= 16 and abs(aspect - 1) > 0.005 else 1.0
        self._is_aspect_of_height = (turned + self._turns) % 2 == 1
        self._converter: ColorConverter | None = None
        self.coded_px = (metadata.height or 0, metadata.width or 0)
        self.size_px = self._shown(*self.coded_px)

    def fit(self, frames: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
        """Frames as torchcodec gives them, uint8 `[N, C, H, W]`, made upright, scaled to fit and centred on black:
        `[N, C, *canvas]`."""
        import torch
        import torch.nn.functional as F

        shown = self._shown(*frames.shape[-2:])
        if self._flips:
            frames = torch.flip(frames, self._flips)
        if self._turns:
            frames = torch.rot90(frames, self._turns, (-2, -1))
        scale = min(canvas[0] / shown[0], canvas[1] / shown[1])
        fitted = (max(1, round(shown[0] * scale)), max(1, round(shown[1] * scale)))
        if all(side - inner <= max(1, min(2, side // 100)) for side, inner in zip(canvas, fitted, strict=True)):
            fitted = canvas  # bars of a pixel or two come of rounding the canvas, not of another aspect
        if fitted != frames.shape[-2:]:
            frames = F.interpolate(frames, fitted, mode="bilinear", antialias=True)
        if fitted == canvas:
            return frames
        top, left = (canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2
        return F.pad(frames, (left, canvas[1] - fitted[1] - left, top, canvas[0] - fitted[0] - top))

    def convert(
        self, frame: RawFrame, canvas: tuple[int, int], check_pixels: Callable[[int, int], None]
    ) -> torch.Tensor:
        """A decoded frame as uint8 `[C, *canvas]`; `check_pixels` is asked before its pixels are converted."""
        from torchcodec.decoders import ColorConverter

        check_pixels(frame.height, frame.width)
        if self._converter is None:
            self._converter = ColorConverter()
        return self.fit(self._converter.convert(frame).data[None], canvas)[0]

    def _shown(self, height: int, width: int) -> tuple[int, int]:
        if self._turns % 2:
            height, width = width, height
        if self._is_aspect_of_height:
            return max(1, round(height * self._aspect)), width
        return height, max(1, round(width * self._aspect))
