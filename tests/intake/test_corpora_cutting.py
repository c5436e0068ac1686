"""From sources to clips: where long videos are cut, what is dropped and why, and benchmarks' videos."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchcodec.encoders import VideoEncoder

from longvpo_hf.artifacts import file_digest as sha256_of
from longvpo_hf.errors import ConfigError, CorpusError
from longvpo_hf.frames.packets import Packets
from longvpo_hf.funnel import REASONS, Dropped
from longvpo_hf.intake import BenchmarkVideos, CuttingSettings, Scene, Source, clips_of
from longvpo_hf.timeline import Clip
from media import copy_video, write_video

SHORT = CuttingSettings(min_clip_seconds=0.5, max_clip_seconds=2.0, cutting="windows")


def spans(found: list[Clip | Dropped]) -> list[tuple[float, float]]:
    assert all(isinstance(item, Clip) for item in found), found
    return [(item.start_seconds, item.end_seconds) for item in found if isinstance(item, Clip)]


def reasons(found: list[Clip | Dropped]) -> list[str]:
    return [item.reason if isinstance(item, Dropped) else "clip" for item in found]


# ------------------------------------------------------------------------------------------------- where it is cut


def test_a_short_video_is_one_clip_with_all_that_is_known(tmp_path: Path) -> None:
    source = Source(write_video(tmp_path / "v.mp4", 15), "a dog", "id", "MIT")
    (clip,) = clips_of([source], SHORT)
    assert clip == Clip(str(source.path), 0.0, 1.5, "a dog", "id", "MIT")


def test_windows_are_equal_and_carry_no_caption_of_the_whole(tmp_path: Path) -> None:
    source = Source(write_video(tmp_path / "v.mp4", 50), "a dog", "id", "MIT")
    lost, *found = clips_of([source], SHORT)
    assert lost == Dropped(
        "split_caption", str(source.path), "id", "a caption of the whole video, of which 3 clips are cut"
    )
    assert [end for _, end in spans(found)] == pytest.approx([5 / 3, 10 / 3, 5.0])
    assert [start for start, _ in spans(found)] == [0.0, *[end for _, end in spans(found)][:-1]]
    clips = [item for item in found if isinstance(item, Clip)]
    assert {(clip.caption, clip.source_id, clip.licence) for clip in clips} == {("", "id", "MIT")}


def test_scenes_of_the_corpus(tmp_path: Path) -> None:
    scenes = (
        Scene(0.0, 1.5, "one"),
        Scene(1.5, 1.7, "two"),  # too short: joined to the next, with its caption
        Scene(1.7, 3.0, "three"),
        Scene(3.0, 6.0, "four"),  # too long: split, and no caption
        Scene(6.0, 6.2, "five"),  # too short, and the last: joined to the one before
        Scene(5.0, 4.0, "inverted"),
        Scene(9.0, 12.0, "beyond the end"),
    )
    source = Source(write_video(tmp_path / "v.mp4", 70), "the whole", "id", "", scenes[:4] + scenes[5:])
    found = list(clips_of([source], SHORT))
    clips = [item for item in found if isinstance(item, Clip)]
    assert [(clip.start_seconds, clip.end_seconds, clip.caption) for clip in clips] == [
        (0.0, 1.5, "one"),
        (1.5, 3.0, "two three"),
        (3.0, 4.5, ""),
        (4.5, 6.0, ""),
    ]
    assert [item.detail for item in found if isinstance(item, Dropped)] == [
        "a scene from 5.0 to 4.0 s, cut to the video's bounds",
        "a scene from 9.0 to 7.0 s, cut to the video's bounds",
        "1 of 4 captions, of scenes at 3 s, which are cut into several clips or joined to one without a caption",
    ]
    last = Source(write_video(tmp_path / "w.mp4", 62), "", "id", "", (Scene(4.5, 6.0, "four"), Scene(6.0, 6.2, "five")))
    (clip,) = clips_of([last], SHORT)
    assert isinstance(clip, Clip)
    assert (clip.start_seconds, clip.end_seconds, clip.caption) == (4.5, 6.2, "four five")


def test_a_short_scene_without_neighbour_is_dropped(tmp_path: Path) -> None:
    source = Source(write_video(tmp_path / "v.mp4", 60), scenes=(Scene(0.0, 0.3, "a"), Scene(3.0, 4.0, "b")))
    found = list(clips_of([source], SHORT))
    assert reasons(found) == ["too_short", "clip"]


def write_scenes(path: Path, seconds: tuple[float, ...], fps: int = 12) -> Path:
    """A video whose scenes are textures of their own, each moving a little; lengths in seconds."""
    generator = torch.Generator().manual_seed(0)
    frames = []
    for number, length in enumerate(seconds):
        texture = torch.randint(0, 120, (3, 4, 4), generator=generator, dtype=torch.uint8)
        texture[number % 3] += 120
        image = texture.repeat_interleave(16, 1).repeat_interleave(24, 2)
        frames += [image.roll(k, 2) for k in range(round(length * fps))]
    VideoEncoder(torch.stack(frames), frame_rate=fps).to_file(str(path), crf=18, extra_options={"threads": 1})
    return path


def test_scenes_are_found_where_they_begin(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "v.mp4", (2.0, 3.25, 1.5, 4.0))
    cutting = CuttingSettings(min_clip_seconds=1.0, max_clip_seconds=5.0)
    found = list(clips_of([Source(path)], cutting))
    ends = [end for _, end in spans(found)]
    assert ends == pytest.approx([2.0, 5.25, 6.75, 10.75], abs=1 / 8)
    assert [start for start, _ in spans(found)] == [0.0, *ends[:-1]]
    assert list(clips_of([Source(path)], cutting)) == found


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("avi", "mpeg4"), ("ts", "libx264"), ("flv", "flv1")]
)
def test_examining_decodes_a_source_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, codec: str
) -> None:
    path = tmp_path / f"v.{suffix}"
    made = write_scenes(tmp_path / "made.mkv", (2.0, 3.25, 1.5, 4.0))
    ffmpeg("-i", str(made), "-c:v", codec, "-q:v", "2", "-g", "12", str(path))
    decoded: list[int] = []
    frames = Packets.frames

    def counted(packets: Packets, seconds: float | None = None) -> Iterator[tuple[int, Any]]:
        for item in frames(packets, seconds):
            decoded.append(1)
            yield item

    monkeypatch.setattr(Packets, "frames", counted)
    cutting = CuttingSettings(min_clip_seconds=1.0, max_clip_seconds=5.0)
    found = list(clips_of([Source(path)], cutting, cache=tmp_path / "cache"))
    begin = spans(found)[0][0]
    assert [end - begin for _, end in spans(found)] == pytest.approx([2.0, 5.25, 6.75, 10.75], abs=1 / 8)
    # Of a file that can be sought, besides, some frames at its start and end.
    most = {"mp4": 129 + 64}.get(suffix, 129)
    assert 129 <= len(decoded) <= most
    decoded.clear()
    assert list(clips_of([Source(path)], cutting, cache=tmp_path / "cache")) == found
    assert len(decoded) <= (8 if suffix == "mp4" else 0)
    assert list(clips_of([Source(path)], cutting)) == found  # found without a cache, in two decodes


def test_a_caption_of_the_whole_is_kept_or_counted(tmp_path: Path) -> None:
    """Of a short video with a cut, of one whose cuts leave one scene, and of one without."""
    cut, jump, still = (
        write_scenes(tmp_path / name, seconds)
        for name, seconds in (("cut.mp4", (2.0, 3.0)), ("jump.mp4", (2.0, 0.75)), ("still.mp4", (2.5,)))
    )
    found = list(clips_of([Source(path, path.stem) for path in (cut, jump, still)], CuttingSettings(1.0, 8.0)))
    (lost,) = (item for item in found if isinstance(item, Dropped))
    assert (lost.reason, lost.path) == ("split_caption", str(cut))
    assert lost.detail == (
        "a caption of the whole video, of which 2 clips are cut; with cutting=windows a video of up to 8 s stays whole"
    )
    captions = [item.caption for item in found if isinstance(item, Clip)]
    assert captions == ["", "", "jump", "still"]
    windows = clips_of([Source(cut, "cut")], CuttingSettings(1.0, 8.0, "windows"))
    assert [item.caption for item in windows if isinstance(item, Clip)] == ["cut"]


@pytest.mark.parametrize("seed", range(20))
def test_every_caption_is_on_a_clip_or_counted(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "counted.mp4"
    if not path.exists():
        write_video(path, 120)
    times = sorted(rng.sample(range(121), rng.randrange(2, 12)))
    spans = [(a / 10, b / 10) for a, b in itertools.pairwise(times) if rng.random() < 0.8]
    scenes = tuple(Scene(a, b, f"<{k}>" if rng.random() < 0.7 else "") for k, (a, b) in enumerate(spans))
    found = list(clips_of([Source(path, scenes=scenes)], SHORT))
    shown = "".join(item.caption for item in found if isinstance(item, Clip))
    counted = sum(
        int(item.detail.split()[0]) for item in found if isinstance(item, Dropped) and item.reason == "split_caption"
    )
    starts = [item.detail for item in found if isinstance(item, Dropped) and item.reason == "too_short"]
    dropped = sum(bool(scene.caption) and f"<{k}>" not in shown for k, scene in enumerate(scenes))
    assert counted <= dropped <= counted + len(starts)


def test_without_a_cut_a_long_scene_is_split_equally(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "v.mp4", (6.0,))
    found = list(clips_of([Source(path)], CuttingSettings(min_clip_seconds=1.0, max_clip_seconds=4.0)))
    assert spans(found) == [(0.0, 3.0), (3.0, 6.0)]


def test_without_the_library_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scenedetect", None)
    path = write_video(tmp_path / "v.mp4", 50)
    with pytest.raises(ConfigError, match=r"longvpo-hf\[scenes\].*cutting=windows"):
        list(clips_of([Source(path)], CuttingSettings(min_clip_seconds=0.5, max_clip_seconds=2.0)))
    assert len(list(clips_of([Source(path)], SHORT))) == 3


@pytest.mark.parametrize("bounds", [(0.0, 4.0), (3.0, 4.0), (-1.0, 4.0), (1.0, float("inf")), (float("nan"), 4.0)])
def test_bounds_that_do_not_fit(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 < min_clip_seconds ≤ max_clip_seconds / 2, got min_clip_seconds="):
        CuttingSettings(*bounds)


def test_an_unknown_way_to_cut() -> None:
    with pytest.raises(ValueError, match="cutting must be 'scenes' or 'windows', got 'magic'"):
        CuttingSettings(cutting="magic")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- bad media


def ffmpeg(*arguments: str) -> None:
    subprocess.run(["ffmpeg", "-y", "-v", "error", *arguments], check=True)


def zero_bytes(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def text(path: Path) -> Path:
    path.write_text("this is not a video\n" * 200, encoding="utf-8")
    return path


def truncated(path: Path) -> Path:
    """The index stands at the end, and is lost."""
    write_video(path, 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def truncated_faststart(path: Path) -> Path:
    """The index stands at the begin: the file opens, and its last frames are not there."""
    write_video(path, 100, size=(128, 128), options=["-movflags", "+faststart"])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def corrupted(path: Path) -> Path:
    """Every byte of the payload is wrong, the index is right."""
    write_video(path, 100, size=(128, 128), options=["-movflags", "+faststart"])
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 4
    content[begin:] = bytes(byte ^ 0x5A for byte in content[begin:])
    path.write_bytes(content)
    return path


def audio_only(path: Path) -> Path:
    ffmpeg("-f", "lavfi", "-i", "sine=duration=2", str(path))
    return path


def one_frame(path: Path) -> Path:
    return write_video(path, 1)


def gone(path: Path) -> Path:
    return path


def under_the_bound(path: Path) -> Path:
    return write_video(path, 3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (zero_bytes, "unreadable"),
        (text, "unreadable"),
        (truncated, "unreadable"),
        (truncated_faststart, "unreadable"),
        (corrupted, "unreadable"),
        (audio_only, "unreadable"),
        (one_frame, "single_frame"),
        (under_the_bound, "too_short"),
        (gone, "missing_file"),
    ],
)
def test_bad_media_is_dropped_by_name(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    good = write_video(tmp_path / "good.mp4", 10, first=50)
    bad = make(tmp_path / "bad.mp4")
    dropped, clip = clips_of([Source(bad, source_id="b"), Source(good)], SHORT)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.path, dropped.source_id) == (reason, str(bad), "b")
    assert dropped.reason in REASONS
    assert dropped.detail
    assert isinstance(clip, Clip)


CODECS = {"mp4": "libx264", "avi": "mpeg4", "flv": "flv1"}


@pytest.mark.parametrize("suffix", ["mp4", "flv"])
def test_a_file_joined_on_behind_another_is_named(tmp_path: Path, suffix: str) -> None:
    """FFmpeg, and every player, shows the first only."""
    options = ["-c:v", CODECS[suffix]]
    first, second = (
        write_video(tmp_path / f"{number}.{suffix}", 15, first=15 * number, options=options) for number in range(2)
    )
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    named, clip = clips_of([Source(joined)], SHORT)
    assert isinstance(named, Dropped)
    assert named.reason == "not_shown"
    assert f"file stands at byte {first.stat().st_size}, joined on behind this one" in named.detail
    assert isinstance(clip, Clip)
    assert clip.duration_seconds == pytest.approx(1.5, abs=0.1)
    assert reasons(list(clips_of([Source(first)], SHORT))) == ["clip"]


@pytest.mark.parametrize("suffix", ["avi", "flv"])
def test_a_file_that_is_cut_short_is_used_and_named(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"v.{suffix}", 40, size=(128, 128), options=["-c:v", CODECS[suffix], "-q:v", "2"])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - size // 5])
    found = list(clips_of([Source(path)], SHORT))
    (named,) = (item for item in found if isinstance(item, Dropped) and item.reason == "not_shown")
    assert f"{size // 5} of its {size} bytes are missing" in named.detail
    assert 0.5 < sum(clip.duration_seconds for clip in found if isinstance(clip, Clip)) < 3.95


def odd_size(path: Path) -> Path:
    ffmpeg("-f", "lavfi", "-i", "testsrc=duration=1:size=33x17:rate=10", "-pix_fmt", "yuv444p", str(path))
    return path


def variable_rate(path: Path) -> Path:
    """20 frames a second, then 4."""
    select = "select='if(lt(t,0.5),1,not(mod(n,5)))'"
    ffmpeg("-f", "lavfi", "-i", "testsrc=duration=1:size=64x48:rate=20", "-vf", select, "-vsync", "vfr", str(path))
    return path


def rotated(path: Path) -> Path:
    plain = write_video(path.with_name("plain.mp4"), 10)
    return copy_video(plain, path, ["-metadata:s:v", "rotate=90"])


def ten_bit_hevc(path: Path) -> Path:
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc=duration=1:size=64x48:rate=10", "-pix_fmt", "yuv420p10le"),
        *("-c:v", "libx265", "-x265-params", "log-level=error", str(path)),
    )
    return path


@pytest.mark.parametrize("make", [odd_size, variable_rate, rotated, ten_bit_hevc])
def test_unusual_media_is_kept(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    (clip,) = clips_of([Source(make(tmp_path / "v.mp4"))], SHORT)
    assert isinstance(clip, Clip)
    assert clip.duration_seconds == pytest.approx(1.0, abs=0.21)


def test_twelve_hours_take_neither_minutes_nor_memory(tmp_path: Path) -> None:
    # A frame every ten minutes: 72 of them.
    path = write_video(tmp_path / "v.mp4", 72, fps=1 / 600, options=["-r", "1/600"])
    tracemalloc.start()
    begin = time.process_time()
    clips = spans(list(clips_of([Source(path)], CuttingSettings())))
    seconds = time.process_time() - begin
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert clips[0][0] == 0.0
    assert clips[-1][1] == pytest.approx(12 * 3600, abs=600)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(clips))
    assert {end - start <= 64.0 for start, end in clips} == {True}
    # Bounds for what goes wrong by orders of magnitude, not a measurement: 8 frames a second would be 345,600.
    assert seconds < 20
    assert peak_bytes < 64 * 1024**2


def test_the_same_content_is_kept_once(tmp_path: Path) -> None:
    first = write_video(tmp_path / "a.mp4", 10)
    second = tmp_path / "b.mkv.mp4"
    second.write_bytes(first.read_bytes())
    found = list(clips_of([Source(first), Source(second, source_id="again")], SHORT))
    assert reasons(found) == ["clip", "duplicate_video"]
    assert isinstance(found[1], Dropped)
    assert (found[1].source_id, sha256_of(first) in found[1].detail) == ("again", True)


def test_what_readers_dropped_passes_through(tmp_path: Path) -> None:
    dropped = Dropped("outside_root", "../x.mp4")
    assert list(clips_of([dropped], SHORT)) == [dropped]


# ----------------------------------------------------------------------------------------------------- benchmarks


def benchmark_list(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["# one per line", "", *lines]) + "\n", encoding="utf-8")
    return path


def test_benchmark_videos_are_dropped_by_id_name_and_content(tmp_path: Path) -> None:
    videos = [write_video(tmp_path / f"{name}.mp4", 10, first=20 * i) for i, name in enumerate("abcd")]
    lists = {
        "Video-MME": benchmark_list(tmp_path / "1.txt", "yt-ID", "#hash-like-id"),
        "MLVU": benchmark_list(tmp_path / "2.txt", "b.mp4", "named"),
        "LVBench": benchmark_list(tmp_path / "3.txt", sha256_of(videos[2]).upper()),
    }
    benchmarks = BenchmarkVideos.from_files(lists)
    stored = write_video(tmp_path / "0123abcd.mp4", 10, first=90)
    found = list(
        clips_of(
            [
                Source(videos[0], source_id="yt-ID"),
                Source(videos[1]),
                Source(videos[2], source_id="other"),
                Source(stored, name="named.webm"),
                Source(videos[3], source_id="yt-id"),  # ids are compared exactly
            ],
            SHORT,
            benchmarks,
        )
    )
    assert reasons(found) == ["benchmark_video"] * 4 + ["clip"]
    assert [item.detail.split(", ")[0] for item in found if isinstance(item, Dropped)] == [
        "Video-MME has the id yt-ID",
        "MLVU has the id b",
        "LVBench has a video of the same content",
        "MLVU has the id named",
    ]
    assert "Video-MME (2 ids, 0 hashes), MLVU (2 ids, 0 hashes), LVBench (0 ids, 1 hashes)" in benchmarks.checked()
    assert reasons(list(clips_of([Source(videos[0], source_id="yt-ID")], SHORT))) == ["clip"]


def test_a_benchmark_list_that_checks_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"empty\.txt, the list of the videos of MLVU, names no video; one id, "):
        BenchmarkVideos.from_files({"MLVU": benchmark_list(tmp_path / "empty.txt")})
    with pytest.raises(CorpusError, match=r"gone\.txt, the list of the videos of MLVU, is missing"):
        BenchmarkVideos.from_files({"MLVU": tmp_path / "gone.txt"})


def test_a_benchmark_video_is_not_even_opened(tmp_path: Path) -> None:
    benchmarks = BenchmarkVideos.from_files({"MVBench": benchmark_list(tmp_path / "l.txt", "locked")})
    path = write_video(tmp_path / "locked.mp4", 10)
    os.remove(path)
    assert reasons(list(clips_of([Source(path)], SHORT, benchmarks))) == ["benchmark_video"]
