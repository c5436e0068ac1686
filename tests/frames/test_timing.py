"""When frames are shown, from labels that are missing, late, repeated, or start again; drawn at random, truth known."""

from __future__ import annotations

import random

import pytest

from longvpo_hf.frames.timing import Labels, healthy, times_in_order

NO_TIME = -1e14
SEEDS = range(20)


def labels(seconds: list[float], frame_seconds: float, num_drained: int, num_packets: int = 0) -> Labels:
    number = num_packets or len(seconds)
    packets = [k + num_drained for k in range(number)][: len(seconds)]
    return Labels(seconds, [frame_seconds] * len(seconds), packets, number, num_drained)


def drawn(seed: int) -> tuple[random.Random, int, float, int]:
    rng = random.Random(seed)
    return rng, rng.randrange(30, 400), 1 / rng.choice((10, 23.976, 25, 29.97, 60)), rng.randrange(1, 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_times_that_ascend_are_believed(seed: int) -> None:
    rng, number, step, delay = drawn(seed)
    start = rng.uniform(0, 1000)
    truth = [start]
    while len(truth) < number:
        truth.append(truth[-1] + step * rng.choice((1, 1, 1, 2, 40)))  # a rate that varies
    for container in ("mpegts", "matroska", "asf"):
        found = times_in_order(labels(truth, step, delay), truth, [0], container)
        assert found is not None
        assert found.starts_seconds == tuple(truth)
        assert found.end_seconds == pytest.approx(truth[-1] + step)
        assert (found.first, found.stop, found.given, found.can_seek) == (0, number, (), False)


@pytest.mark.parametrize("seed", SEEDS)
def test_decoding_times_are_those_of_frames_in_order(seed: int) -> None:
    """AVI: frame k comes with the time of packet k + delay; the last ones come with none."""
    _, number, step, delay = drawn(seed)
    ticks = [k * step for k in range(number)]
    late = [*ticks[delay:], *[NO_TIME] * delay]
    found = times_in_order(labels(late, step, delay), ticks, [0], "avi")
    assert found is not None
    assert found.starts_seconds == pytest.approx(ticks)
    assert found.end_seconds == pytest.approx(number * step)


@pytest.mark.parametrize("seed", SEEDS)
def test_times_of_decoding_for_times_of_showing(seed: int) -> None:
    """A healthy index whose frames come in another order: B-frames that were copied without their times."""
    rng, number, step, delay = drawn(seed)
    ticks = [k * step for k in range(number)]
    shuffled = list(ticks)
    for k in range(0, number - 3, 3):
        part = shuffled[k : k + 3]
        rng.shuffle(part)
        shuffled[k : k + 3] = part
    shuffled[:3] = [0.0, 2 * step, step]
    found = times_in_order(labels(shuffled, step, delay), ticks, [0], "mp4")
    assert found is not None
    assert found.starts_seconds == pytest.approx(ticks)


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_follow_each_other(seed: int) -> None:
    """Time stamps that start again, or jump by more than 10 s, in a stream that was joined."""
    rng, number, step, delay = drawn(seed)
    parts = [rng.randrange(20, number + 1) for _ in range(3)]
    starts = [rng.choice((0.0, 1.4, 50.0, 9000.0)) for _ in parts]
    seconds = [start + k * step for start, length in zip(starts, parts, strict=True) for k in range(length)]
    found = times_in_order(labels(seconds, step, delay), sorted(seconds), [0], "mpegts")
    assert found is not None
    close = [abs(b - a - step) < 1e-6 for a, b in zip(found.starts_seconds, found.starts_seconds[1:], strict=False)]
    # A part that starts up to 10 s after the one before cannot be told from a gap.
    assert close.count(False) <= 2
    if max(starts) - min(starts) < 1 or len(set(starts)) == 1:
        assert all(close)
    assert found.starts_seconds[0] == starts[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_few_and_inexact_time_stamps(seed: int) -> None:
    """A program stream: every tenth frame or so has a time stamp, which may be another frame's nearby."""
    rng, number, step, delay = drawn(seed)
    start = rng.uniform(0, 20)
    truth = [start + k * step for k in range(number)]
    seconds = [NO_TIME] * number
    seconds[0] = start
    for k in range(10, number, rng.randrange(7, 13)):
        seconds[k] = truth[min(k + rng.choice((0, 0, -1, 1, -2)), number - 1)]
    found = times_in_order(labels(seconds, step, delay), sorted(seconds), [0], "mpeg")
    assert found is not None
    assert found.starts_seconds == pytest.approx(truth)


def test_a_clock_that_starts_below_zero_starts_at_zero() -> None:
    seconds = [k / 25 - 2.0 for k in range(100)]
    found = times_in_order(labels(seconds, 0.04, 2), [], [], "mpegts")
    assert found is not None
    assert found.starts_seconds == pytest.approx([k / 25 for k in range(100)])
    assert found.end_seconds == pytest.approx(4.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_packets_that_gave_no_frame(seed: int) -> None:
    """Frames keep their places; those that are missing are not given."""
    rng, number, step, delay = drawn(seed)
    ticks = [k * step for k in range(number)]
    hole = range(rng.randrange(5, number - 20), 0)
    hole = range(hole.start, hole.start + rng.randrange(1, 5))
    numbers = [k for k in range(number) if k not in hole]
    seconds = [ticks[k + delay] if k + delay < number else NO_TIME for k in numbers]
    seen = Labels(seconds, [step] * len(numbers), [k + delay for k in numbers], number, delay)
    found = times_in_order(seen, ticks, [0], "avi")
    assert found is not None
    assert found.starts_seconds == pytest.approx(ticks)
    assert found.given == tuple(numbers)


def test_frames_without_times_and_rate_cannot_be_timed() -> None:
    assert times_in_order(Labels([NO_TIME] * 9, [0.0] * 9, list(range(9)), 9, 0), [], [], "mpeg") is None


def test_an_index_is_healthy() -> None:
    assert healthy((0.0, 0.1, 0.2))
    assert not healthy(())
    assert not healthy((-0.1, 0.0))
    assert not healthy((0.0, 0.1, 0.1))
    assert not healthy((NO_TIME, 0.0))
