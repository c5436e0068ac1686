"""When the frames of a file are shown, from what its packets and its decoder say.

In MP4 and Matroska every packet has its presentation time, and the sorted times of the packets are those of the frames.
Elsewhere that may not hold: AVI has no such times, program streams have them for some frames only, and in transport
streams they may start again. FFmpeg then labels frames with times that are missing, late or repeated. What can be
relied on is the order in which the decoder gives frames, so that is what times are assigned to.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: No label is as large as this in seconds but FFmpeg's "no time stamp".
_NO_TIME = 1e8
#: So many frames at a file's end may be undecodable; of a file that lacks more, clips are dropped.
MAX_LOST_FRAMES = 16
#: Frames that a codec may give out of order (H.264 and H.265: 16).
_MAX_REORDERED = 16
#: A larger step forwards in a stream that may be joined of parts is where the next part starts; ffmpeg's own bound.
_JOINT_SECONDS = 10.0
#: Containers whose time stamps may jump: what was broadcast or recorded in parts.
_JOINABLE = frozenset({"mpegts", "mpeg", "flv"})


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """When each frame of a file is shown.

    Args:
        starts_seconds: First instant of each frame, ascending.
        end_seconds: When the last frame ends.
        first: Index of the first frame that can be decoded.
        stop: Index after the last frame that can be decoded.
        key_frames: Indices of frames from which decoding can start, as far as known.
        can_seek: Whether the file can be read from there; else frames are only had in order from the file's start.
        given: Indices of the frames that the decoder gives when it decodes the file in order; empty for all.
    """

    starts_seconds: tuple[float, ...]
    end_seconds: float
    first: int
    stop: int
    key_frames: tuple[int, ...] = ()
    can_seek: bool = False
    given: tuple[int, ...] = ()

    @property
    def num_lost(self) -> int:
        """Frames before the first and after the last that can be decoded."""
        return len(self.starts_seconds) - (self.stop - self.first)

    def start(self, index: int) -> float:
        """First instant of a frame; the end, for the index after the last."""
        return self.starts_seconds[index] if index < len(self.starts_seconds) else self.end_seconds


@dataclass(frozen=True, slots=True)
class Labels:
    """What a decoder said of the frames of a file, in the order in which it gave them.

    Args:
        seconds: The time stamp of each frame, which may be none (a very large number).
        durations_seconds: How long each frame is shown, where known; else 0.
        packets: How many packets had been read when each frame came; those that came at the end count on from there.
        num_packets: Packets of the file.
        num_drained: Frames that came only at the end of the file.
    """

    seconds: Sequence[float]
    durations_seconds: Sequence[float]
    packets: Sequence[int]
    num_packets: int
    num_drained: int


def times_in_order(
    labels: Labels, ticks: Sequence[float], key_ticks: Sequence[int], container: str
) -> FrameTimes | None:
    """When frames that were decoded in order, from the file's start to its end, are shown; None if that cannot be told.

    Args:
        labels: Of the decoded frames; at least one.
        ticks: The sorted times of the packets, as far as they have any.
        key_ticks: Indices of those of key frames.
        container: One of `headers.CONTAINERS`.
    """
    frame_seconds = _frame_seconds(labels, ticks)
    if frame_seconds is None:
        return None
    durations = [seconds if 0 < seconds < _NO_TIME else frame_seconds for seconds in labels.durations_seconds]
    runs = _runs(labels.seconds, frame_seconds, container)
    times: Sequence[float] = ()
    given: list[int] = []
    if len(runs) == 1 and _ascending(ticks) and not _overlapping(ticks, frame_seconds):
        if container == "avi" or (container != "mpeg" and not _are_times(labels.seconds)):
            given = _ticks_of(labels, len(ticks))
        if given:
            times = _as_presented(ticks, labels.num_drained, frame_seconds) if container == "avi" else ticks
    if not times:
        times = _by_runs(labels.seconds, durations, runs, frame_seconds, may_trust=container not in ("mpeg", "avi"))
    shift = -min(times[0], 0.0)  # a clock that starts below 0 (edit lists, wrapped counters) starts at 0 here
    first = given[0] if given else 0
    stop = next((a + 1 for a, b in itertools.pairwise(given) if b > a + 1 and a + 1 >= len(times) - MAX_LOST_FRAMES), 0)
    stop = stop or (given[-1] + 1 if given else len(times))
    end = (max(times[-1], ticks[-1]) if given else times[-1]) + durations[-1]  # an encoder may lose its last frames
    return FrameTimes(
        tuple(time + shift for time in times),
        end + shift,
        first,
        stop if len(times) - stop <= MAX_LOST_FRAMES else len(times),
        tuple(key_ticks) if given else (),
        given=tuple(given) if len(given) < len(times) else (),
    )


def healthy(starts_seconds: Sequence[float]) -> bool:
    """Whether sorted times of packets can be those of frames: none repeats, is missing or below 0."""
    return _are_times(starts_seconds) and starts_seconds[0] >= 0


def _is_time(seconds: float) -> bool:
    return abs(seconds) < _NO_TIME


def _ascending(seconds: Sequence[float]) -> bool:
    return bool(seconds) and all(a < b for a, b in itertools.pairwise(seconds))


def _are_times(seconds: Sequence[float]) -> bool:
    return _ascending(seconds) and _is_time(seconds[0]) and _is_time(seconds[-1])


def _overlapping(ticks: Sequence[float], frame_seconds: float) -> bool:
    """Whether packets come more densely than frames last: two parts with times of their own, sorted into each other."""
    close = sum(b - a < 0.75 * frame_seconds for a, b in itertools.pairwise(ticks))
    return not _is_time(ticks[0]) or close > len(ticks) // 8


def _frame_seconds(labels: Labels, ticks: Sequence[float]) -> float | None:
    """How long a frame usually is: by the steps from one to the next, else by what is stated."""
    steps = [b - a for a, b in itertools.pairwise(labels.seconds) if 0 < b - a < _NO_TIME]
    durations = [seconds for seconds in labels.durations_seconds if 0 < seconds < _NO_TIME]
    if len(steps) < 0.9 * (len(labels.seconds) - 1):  # out of order, or none: steps say little
        steps = durations or steps or [b - a for a, b in itertools.pairwise(ticks) if 0 < b - a < _NO_TIME]
    return statistics.median(steps or durations) if steps or durations else None


def _runs(seconds: Sequence[float], frame_seconds: float, container: str) -> list[range]:
    """The parts that a file was joined of: where time stamps start again, rather than step back as far as frames are
    reordered, or jump."""
    starts, latest = [0], -_NO_TIME
    for k, label in enumerate(seconds):
        if not _is_time(label):
            continue
        restarts = label < latest - _MAX_REORDERED * frame_seconds
        if restarts or (container in _JOINABLE and latest > -_NO_TIME and label - latest > _JOINT_SECONDS):
            starts.append(k)
            latest = label
        latest = max(latest, label)
    return [range(start, stop) for start, stop in itertools.pairwise([*starts, len(seconds)])]


def _by_runs(
    seconds: Sequence[float], durations: Sequence[float], runs: Sequence[range], frame_seconds: float, may_trust: bool
) -> list[float]:
    """Parts one after the other. Within one, frames are shown at their time stamps if those can be trusted; else they
    are counted on, by their durations, from the first one that has a time stamp."""
    times: list[float] = []
    for run in runs:
        labels = seconds[run.start : run.stop]
        lengths = durations[run.start : run.stop]
        known = [k for k, label in enumerate(labels) if _is_time(label)]
        if may_trust and _are_times(labels):
            own = list(labels)
        else:
            counted = sum(lengths[known[0] : known[-1]]) if known else 0.0
            stated = labels[known[-1]] - labels[known[0]] if known else 0.0
            wrong = abs(stated - counted) > max(0.02 * stated, _MAX_REORDERED * frame_seconds)
            scale = stated / counted if wrong and stated > 0 and counted > 0 else 1.0
            own = [0.0, *itertools.accumulate(length * scale for length in lengths[:-1])]
            offset = labels[known[0]] - own[known[0]] if known else 0.0
            own = [time + offset for time in own]
        offset = times[-1] + durations[run.start - 1] - own[0] if times else 0.0
        times += [time + offset for time in own]
    return times


def _as_presented(ticks: Sequence[float], num_reordered: int, frame_seconds: float) -> list[float]:
    """When frames are shown whose packets have decoding times only: a stream that reorders by n frames shows frame k
    when packet k + n is decoded. Counted from the first packet on, so that picture and sound start together."""
    late = ticks[min(num_reordered, len(ticks) - 1)] - ticks[0]
    times = [tick - late for tick in ticks[num_reordered:]] or [ticks[0]]
    while len(times) < len(ticks):
        times.append(times[-1] + frame_seconds)
    return times


def _ticks_of(labels: Labels, num_ticks: int) -> list[int]:
    """The tick at which each frame is shown; empty if there are more frames than ticks.

    Frame k is shown at tick k. Where packets gave no frame, the packet at which a frame came tells its tick: in a
    stream that reorders by `num_drained` frames, each comes so many packets late.
    """
    num_frames = len(labels.seconds)
    if num_frames > num_ticks or labels.num_packets != num_ticks:
        return []
    places: list[int] = []
    for k, packet in enumerate(labels.packets):
        place = k if num_frames == num_ticks else packet - labels.num_drained
        lowest, highest = (places[-1] + 1 if places else 0), num_ticks - (num_frames - k)
        places.append(min(max(place, lowest), highest))
    return places
