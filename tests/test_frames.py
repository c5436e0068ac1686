"""The decoded frames of a view are those of the named spans, whatever the file; what cannot be decoded says why."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import random
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torchcodec.decoders import VideoDecoder

from longvpo_hf.frames import FrameSampler, UnreadableVideo, VideoFile, spread_frames, whole_clip
from longvpo_hf.timeline import Clip, Timeline, View
from media import colour, copy_video, index_of, indices_of, write_video

torch.set_num_threads(1)

FPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def video(folder: Path) -> str:
    """40 frames at 10 per second: frame i is shown in [i / 10, (i + 1) / 10) s."""
    return str(write_video(folder / "constant.mp4", 40, FPS))


@pytest.fixture(scope="module")
def slowing(folder: Path) -> str:
    """20 frames of variable rate: frames 0 to 9 for 0.1 s each, 10 to 18 for 0.4 s each, and 19 from 4.6 to 4.7 s."""
    late = "if(lt(N,10),N,10+4*(N-10))"
    return str(
        write_video(
            folder / "slowing.mp4", 20, FPS, options=["-vf", f"setpts={late}".replace(",", r"\,"), "-vsync", "0"]
        )
    )


def sample(path: str, start: float, end: float, num_frames: int) -> list[int]:
    return indices_of(FrameSampler(num_frames)(Timeline((Clip(path, start, end),))).pixels)


# --------------------------------------------------------------------------------------------- the named frames


def test_a_clip_gives_each_of_its_frames_and_no_other(video: str) -> None:
    assert sample(video, 0.0, 4.0, 40) == list(range(40))
    assert sample(video, 1.0, 2.0, 10) == list(range(10, 20))
    assert sample(video, 3.0, 4.0, 10) == list(range(30, 40))
    assert sample(video, 1.0, 2.0, 1) == [15]
    assert sample(video, 1.1, 1.2, 1) == [11]


@pytest.mark.parametrize("start", [0, 7, 12, 13, 29])
@pytest.mark.parametrize("length", [1, 3, 11])
@pytest.mark.parametrize("num_frames", [1, 2, 64])
def test_nothing_outside_start_and_stop_is_ever_shown(video: str, start: int, length: int, num_frames: int) -> None:
    """Also with more samples than frames: the first lies 1/128 of the clip from its start, the last from its end."""
    indices = sample(video, start / FPS, (start + length) / FPS, num_frames)
    assert indices == sorted(indices)
    assert start <= indices[0] <= indices[-1] < start + length
    if num_frames == 64:
        assert set(indices) == set(range(start, start + length))


def test_bounds_between_frames(video: str) -> None:
    # [0.95, 1.25) s shows the last half of frame 9, frames 10 and 11, and the first half of frame 12: 6 parts of 0.05 s
    assert sample(video, 0.95, 1.25, 6) == [9, 10, 10, 11, 11, 12]


def test_variable_frame_rate(slowing: str) -> None:
    stamps = VideoDecoder(slowing).get_frames_in_range(0, 20).pts_seconds.tolist()
    assert stamps == pytest.approx([i / 10 for i in range(10)] + [1 + 0.4 * i for i in range(10)])
    assert sample(slowing, 0.0, 1.0, 10) == list(range(10))
    # centres of ninths of [1, 4.6): 1.2, 1.6, …
    assert sample(slowing, 1.0, 4.6, 9) == list(range(10, 19))
    assert sample(slowing, 4.5, 4.7, 4) == [18, 18, 19, 19]
    # 1.1, 1.3, 1.5, 1.7: each of the frames of 0.4 s twice
    assert sample(slowing, 1.0, 1.8, 4) == [10, 10, 11, 11]
    # 0.25, 0.75, 1.25, 1.75, 2.25, 2.75: a sampler that counts frames instead of seconds would go on evenly
    assert sample(slowing, 0.0, 3.0, 6) == [2, 7, 10, 11, 13, 14]


def test_a_timeline_shows_its_clips_in_order_and_says_where_each_frame_stands(video: str, slowing: str) -> None:
    timeline = Timeline((Clip(video, 3.0, 4.0), Clip(slowing, 0.5, 4.5), Clip(video, 0.0, 1.0)))
    frames = FrameSampler(12)(timeline)
    assert frames.pixels.dtype == torch.uint8
    assert frames.pixels.shape == (12, 3, 32, 48)
    assert len(frames) == 12
    assert frames.duration_seconds == 6.0
    assert frames.clip_indices == (0, 0, *[1] * 8, 2, 2)
    # halves of 1 s, eighths of 4 s, halves of 1 s, each at its centre; the clips begin at 0, 1 and 5 s
    assert frames.timeline_seconds == pytest.approx(
        [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5.25, 5.75]
    )
    assert indices_of(frames.pixels) == [32, 37, 7, 10, 11, 13, 14, 15, 16, 18, 2, 7]


def test_a_view_has_its_own_clock_and_never_shows_the_rest(video: str) -> None:
    timeline = Timeline(tuple(Clip(video, float(i), i + 1.0) for i in range(4)))
    only = FrameSampler(6)(timeline, View.only([1, 3]))
    assert indices_of(only.pixels) == [11, 15, 18, 31, 35, 38]
    assert only.duration_seconds == 2.0
    assert only.timeline_seconds == pytest.approx([1 / 6, 0.5, 5 / 6, 7 / 6, 1.5, 11 / 6])
    rest = FrameSampler(6)(timeline, View.without([1, 3]))
    assert indices_of(rest.pixels) == [1, 5, 8, 21, 25, 28]
    assert indices_of(FrameSampler(40)(timeline, View.sparse(4)).pixels) == [5, 15, 25, 35]


def test_fps_bounds_each_clip(video: str) -> None:
    timeline = Timeline((Clip(video, 0.0, 3.0), Clip(video, 3.0, 3.5)))
    frames = FrameSampler(100, fps=2.0)(timeline)
    assert frames.clip_indices == (0, 0, 0, 0, 0, 0, 1)


# ------------------------------------------------------------------------------------------------ spread_frames


def test_frames_are_spread_by_duration() -> None:
    assert spread_frames([1, 1, 1], 7) == [3, 2, 2]
    assert spread_frames([30, 10], 8) == [6, 2]
    assert spread_frames([100, 0.1], 8) == [7, 1]
    assert spread_frames([4, 4], 100, fps=1) == [4, 4]
    assert spread_frames([0.2, 4], 100, fps=1) == [1, 4]
    assert spread_frames([0.3], 8, fps=10) == [3]  # 0.3 · 10 is a little less than 3 in floats


def test_properties_of_spreading() -> None:
    rng = random.Random(1)
    for _ in range(300):
        durations = [rng.choice([rng.uniform(0.05, 2), rng.uniform(2, 600), 10.0]) for _ in range(rng.randrange(1, 20))]
        budget = rng.randrange(len(durations), 200)
        fps = rng.choice([None, 0.5, 1.0, 3.0])
        counts = spread_frames(durations, budget, fps)
        caps = [budget if fps is None else max(1, int(d * fps + 1e-6)) for d in durations]
        assert min(counts) >= 1
        assert sum(counts) == min(budget, sum(min(budget, cap) for cap in caps)) or fps is None
        assert sum(counts) <= budget
        assert all(count <= cap for count, cap in zip(counts, caps, strict=True))
        if fps is None:
            assert sum(counts) == budget
        longest_first = sorted(zip(durations, counts, strict=True), key=lambda pair: -pair[0])
        assert all(a >= b for (d, a), (e, b) in itertools.pairwise(longest_first) if d > e)
        # No frame would serve better elsewhere: seconds per frame never differ by more than rounding and caps explain.
        for d, count, cap in zip(durations, counts, caps, strict=True):
            for e, other in zip(durations, counts, strict=True):
                assert count >= cap or other == 1 or d / (count + 0.5) <= e / (other - 0.5) + 1e-9
        if fps is None:
            assert all(b >= a for a, b in zip(counts, spread_frames(durations, budget + 1), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1, 1], 2), "num_frames=2 cannot give each of 3 clips a frame; raise num_frames to at least 3"),
        (([1], 2, 0.0), "fps must be > 0, got 0.0"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spread_frames(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 0}, "num_frames must be ≥ 1, got 0"),
        ({"num_frames": 1, "max_pixels": 0}, "max_pixels must be ≥ 1, got 0"),
        ({"num_frames": 1, "cache_bytes": -1}, "cache_bytes must be ≥ 0, got -1"),
        ({"num_frames": "8"}, "num_frames must be ≥ 1, got '8'"),
        ({"num_frames": 8.5}, "num_frames must be ≥ 1, got 8.5"),
        ({"num_frames": 8, "max_pixels": 1e5}, "max_pixels must be ≥ 1, got 100000.0"),
        *(
            ({"num_frames": 8, "fps": fps}, f"fps must be > 0, or None for no bound, got {fps!r}")
            for fps in (0, -1.0, "1", float("nan"), float("inf"))
        ),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameSampler(**settings)


# ---------------------------------------------------------------------------------------------- size and aspect


def bars(frame: torch.Tensor) -> tuple[int, int]:
    """Black rows and columns of a frame that is one colour else."""
    seen = frame.amax(0) > 8
    return int((~seen.any(1)).sum()), int((~seen.any(0)).sum())


def test_frames_of_another_aspect_get_bars_and_the_longest_size_decides(folder: Path) -> None:
    wide = str(write_video(folder / "wide.mp4", 30, FPS, size=(32, 64)))
    tall = str(write_video(folder / "tall.mp4", 10, FPS, size=(64, 32), first=100))
    small = str(write_video(folder / "small.mp4", 10, FPS, size=(16, 32), first=150))
    timeline = Timeline((Clip(tall, 0, 1), Clip(wide, 0, 3), Clip(small, 0, 1)))
    frames = FrameSampler(5)(timeline)
    assert frames.pixels.shape == (5, 3, 32, 64)
    # 64 × 32 into 32 × 64: 32 × 16 in the middle, so 48 black columns; half the size fits without bars
    assert [bars(frame) for frame in frames.pixels] == [(0, 48), (0, 0), (0, 0), (0, 0), (0, 0)]
    assert indices_of(frames.pixels) == [105, 5, 15, 25, 155]
    left, right = frames.pixels[0, :, 16, 20], frames.pixels[0, :, 16, 44]
    assert left.max() == right.max() == 0, "the picture does not stand in the middle"
    # Shown alone, the tall clip keeps its own shape.
    assert FrameSampler(5)(timeline, View.only([0])).pixels.shape == (5, 3, 64, 32)


@pytest.mark.parametrize(
    ("max_pixels", "expected"), [(32 * 48, (32, 48)), (16 * 24, (16, 24)), (500, (18, 27)), (22, (3, 5)), (1, (1, 1))]
)
def test_max_pixels_scales_down_and_keeps_the_picture(video: str, max_pixels: int, expected: tuple[int, int]) -> None:
    frames = FrameSampler(2, max_pixels=max_pixels)(Timeline((Clip(video, 0.0, 4.0),)))
    assert tuple(frames.pixels.shape[-2:]) == expected
    assert indices_of(frames.pixels) == [10, 30]
    assert {bars(frame) for frame in frames.pixels} == {(0, 0)}


def test_rotation_is_applied(folder: Path, video: str) -> None:
    rotated = str(copy_video(Path(video), folder / "rotated.mp4", ["-metadata:s:v:0", "rotate=90"]))
    timeline = Timeline((Clip(rotated, 0.0, 4.0),))
    assert FrameSampler(2)(timeline).pixels.shape == (2, 3, 48, 32)
    small = FrameSampler(2, max_pixels=24 * 16)(timeline).pixels
    assert small.shape == (2, 3, 24, 16)
    assert [bars(frame) for frame in small] == [(0, 0), (0, 0)]
    assert indices_of(small) == [10, 30]


# --------------------------------------------------------------------------------------------- unusual, but fine


def test_a_stream_that_begins_later(folder: Path, video: str) -> None:
    later = str(copy_video(Path(video), folder / "later.mkv", ["-output_ts_offset", "5"]))
    assert sample(later, 5.0, 9.0, 4) == [5, 15, 25, 35]
    assert sample(later, 6.0, 7.0, 10) == list(range(10, 20))
    assert sample(later, 4.9, 5.1, 2) == [0, 0]  # before its begin there is nothing but the first frame to show
    assert whole_clip(later) == Clip(later, 5.0, 9.0)
    with pytest.raises(UnreadableVideo, match=r"^before_begin: .*later.mkv \[1.0, 5.0\) s: the video begins at 5.0 s"):
        sample(later, 1.0, 5.0, 2)


def test_a_video_of_one_frame(folder: Path) -> None:
    one = str(write_video(folder / "one.mp4", 1, FPS, first=7))
    assert whole_clip(one) == Clip(one, 0.0, 0.1)
    assert sample(one, 0.0, 0.1, 1) == [7]
    assert sample(one, 0.0, 0.1, 3) == [7, 7, 7]


def test_a_clip_may_end_a_frame_late(video: str) -> None:
    """Containers round their durations."""
    assert sample(video, 3.0, 4.09, 11)[-2:] == [39, 39]
    with pytest.raises(UnreadableVideo, match=r"the video ends at 4.0 s"):
        sample(video, 3.0, 4.11, 11)


def test_whole_clip(video: str, slowing: str) -> None:
    assert whole_clip(video) == Clip(video, 0.0, 4.0)
    assert sample(video, 0.0, whole_clip(video).end_seconds, 40) == list(range(40))
    assert whole_clip(slowing).end_seconds == pytest.approx(4.7)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad(folder: Path, video: str) -> Path:
    data = Path(video).read_bytes()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("hello " * 100)
    (folder / "truncated.mp4").write_bytes(data[: len(data) // 2])  # its index stood at the end
    front = write_video(
        folder / "front.mp4", 100, FPS, size=(128, 128), options=["-movflags", "+faststart"]
    ).read_bytes()
    (folder / "cut.mp4").write_bytes(front[: int(len(front) * 0.7)])  # its index stands at the front: it opens
    payload = bytearray(front)
    middle = front.index(b"mdat") + len(front) // 2
    payload[middle:] = random.Random(0).randbytes(len(front) - middle)
    (folder / "corrupted.mp4").write_bytes(bytes(payload))
    audio = ["ffmpeg", "-y", "-v", "error", "-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", str(folder / "audio.mp4")]
    subprocess.run(audio, check=True)
    return folder


@pytest.mark.parametrize(
    ("name", "end", "reason", "detail"),
    [
        ("nowhere.mp4", 1.0, "missing_file", "no such file"),
        (".", 1.0, "missing_file", "no such file"),
        ("zero.mp4", 1.0, "unreadable", "it is an empty file, by its first bytes; opened are mp4, "),
        ("text.mp4", 1.0, "unreadable", "it is no video of a known container, by its first bytes; opened are mp4, "),
        ("truncated.mp4", 1.0, "unreadable", "Could not open input file: .* Invalid data"),
        ("corrupted.mp4", 10.0, "unreadable", "Invalid data found"),
        ("cut.mp4", 10.0, "beyond_end", "the video ends at .* s; shorten the clip"),
        ("audio.mp4", 1.0, "unreadable", "the file has no video stream"),
        ("constant.mp4", 9.0, "beyond_end", r"the video ends at 4.0 s; shorten the clip"),
    ],
)
def test_bad_input_is_named(bad: Path, name: str, end: float, reason: str, detail: str) -> None:
    path = str(bad / name)
    with pytest.raises(UnreadableVideo, match=f"^{reason}: .* \\[0.0, {end}\\) s: .*{detail}") as caught:
        sample(path, 0.0, end, 40)
    assert caught.value.reason == reason
    assert caught.value.path == path
    assert ".cpp" not in str(caught.value), "torchcodec's own source lines help nobody"
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (str(copied), copied.reason, copied.clip) == (str(caught.value), reason, Clip(path, 0.0, end))


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere.mp4", "missing_file"), ("text.mp4", "unreadable"), ("audio.mp4", "unreadable")]
)
def test_a_whole_file_that_is_no_video_is_named(bad: Path, name: str, reason: str) -> None:
    with pytest.raises(UnreadableVideo, match=f"^{reason}: .*{name}: "):
        whole_clip(str(bad / name))


# -------------------------------------------------------------------------------------------- cache and processes


def test_the_cache_is_bounded_and_never_changes_what_is_shown(video: str, slowing: str) -> None:
    rng = random.Random(2)
    clips = [Clip(path, 0.5 * i, 0.5 * i + 0.5) for path in (video, slowing) for i in range(8)]
    frame_bytes = 3 * 32 * 48
    cached = FrameSampler(6, cache_bytes=10 * frame_bytes)
    for _ in range(40):
        timeline = Timeline(tuple(rng.choices(clips, k=rng.randrange(1, 5))))
        shown = cached(timeline)
        fresh = FrameSampler(6, cache_bytes=0)(timeline)
        assert torch.equal(shown.pixels, fresh.pixels)
        assert shown.timeline_seconds == fresh.timeline_seconds
        assert sum(frames.numel() for frames in cached._cache.values()) == cached._cached_bytes <= 10 * frame_bytes


def test_what_a_caller_does_to_its_frames_is_its_own(video: str) -> None:
    sampler = FrameSampler(4)
    timeline = Timeline((Clip(video, 0.0, 4.0),))
    sampler(timeline).pixels.zero_()
    assert indices_of(sampler(timeline).pixels) == [5, 15, 25, 35]


def test_the_cache_saves_decoding(video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = FrameSampler._decode

    def counted(self: FrameSampler, *args: object) -> torch.Tensor:
        decoded.append(args[0])
        return decode(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(FrameSampler, "_decode", counted)
    a, b = Clip(video, 0.0, 1.0), Clip(video, 1.0, 2.0)
    sampler = FrameSampler(4)
    sampler(Timeline((a, b)))
    sampler(Timeline((b, a)))
    assert decoded == [a, b]
    sampler(Timeline((a,)))  # four frames of it now, not two
    assert decoded == [a, b, a]


def test_more_files_than_are_kept_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(write_video(folder / f"many{i}.mp4", 2, FPS, first=2 * i)) for i in range(20)]
    timeline = Timeline(tuple(Clip(path, 0.0, 0.2) for path in paths))
    sampler = FrameSampler(40, max_pixels=16 * 24, cache_bytes=0)
    held_bytes = VideoFile(paths[0]).held_bytes
    monkeypatch.setattr("longvpo_hf.frames.sampler._OPEN_BYTES", 5 * held_bytes)
    for _ in range(2):
        assert indices_of(sampler(timeline).pixels) == list(range(40))
    assert len(sampler._files) == 5
    monkeypatch.setattr("longvpo_hf.frames.sampler._OPEN_BYTES", 0)
    assert indices_of(sampler(timeline).pixels) == list(range(40))
    assert len(sampler._files) == 1


def test_a_file_holds_more_the_larger_and_the_longer_it_is(folder: Path) -> None:
    small, large, long = (
        VideoFile(str(write_video(folder / f"held{number}.mp4", num_frames, FPS, size)))
        for number, (num_frames, size) in enumerate([(2, (32, 48)), (2, (1080, 1920)), (200, (32, 48))])
    )
    assert large.held_bytes > 4 * 1080 * 1920 * 1.5
    assert small.held_bytes < long.held_bytes < large.held_bytes


def in_a_worker(sampler: FrameSampler, timeline: Timeline) -> list[int]:
    return indices_of(sampler(timeline).pixels)


def test_a_sampler_goes_to_spawned_workers(video: str) -> None:
    timeline = Timeline((Clip(video, 1.0, 3.0),))
    sampler = FrameSampler(5, fps=2.0, max_pixels=16 * 24)
    here = in_a_worker(sampler, timeline)  # it now holds a decoder, which cannot be pickled
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(in_a_worker, sampler, timeline).result() == here == [12, 17, 22, 27]
    assert not pickle.loads(pickle.dumps(sampler))._files


def test_colours_tell_frames_apart() -> None:
    """The measure of the other tests: no two frames share a colour, and each is read back."""
    frames = torch.tensor([colour(i) for i in range(216)], dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 3, 3)
    assert [index_of(frame) for frame in frames] == list(range(216))
