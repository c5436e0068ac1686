"""Clip files: what they show and when, how they are encoded and named, and runs that break off or go on in parallel."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longvpo_hf.frames import FrameSampler, VideoFile
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake import media
from longvpo_hf.intake.media import MediaSettings, check_clips, cut_clips
from longvpo_hf.timeline import Clip, Origin, Timeline
from media import copy_video, indices_of, write_video


def cut(clips: list[Clip | Dropped], folder: Path, **settings: Any) -> list[Clip]:
    found = list(cut_clips(clips, folder, MediaSettings(**settings)))
    assert all(isinstance(clip, Clip) for clip in found), found
    return [clip for clip in found if isinstance(clip, Clip)]


def probe(path: str, *entries: str) -> dict[str, Any]:
    """What ffprobe says of the video stream, or of its frames."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v", "-of", "json", *entries, path]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def all_frames(clip: Clip) -> list[int]:
    """Which frames of the source the whole clip file shows, one after the other."""
    video = VideoFile(clip.path)
    chunks = video.frames(video.begin_seconds, video.end_seconds, video.fps)
    return [index for _, pixels in chunks for index in indices_of(pixels)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 s of 10 frames a second, each telling which it is."""
    return write_video(tmp_path_factory.mktemp("source") / "v.mp4", 100)


def test_a_clip_file_shows_each_frame_of_its_span_once(tmp_path: Path, source: Path) -> None:
    clips: list[Clip | Dropped] = [
        Clip(str(source), 0.0, 3.0, "a", "id", "MIT"),
        Clip(str(source), 2.5, 4.1, "b", "id", "MIT"),
        Clip(str(source), 9.0, 10.0),
    ]
    first, second, last = cut(clips, tmp_path / "clips")
    assert all_frames(first) == list(range(30))
    assert all_frames(second) == list(range(25, 41))
    assert all_frames(last) == list(range(90, 100))
    assert (second.start_seconds, second.end_seconds) == (0.0, pytest.approx(1.6))
    assert (second.caption, second.source_id, second.licence) == ("b", "id", "MIT")
    assert second.origin == Origin("id", 2.5, pytest.approx(4.1))
    # Cut once more, it still names the second of its source.
    part = replace(second, start_seconds=0.5, source_start_seconds=3.0)
    (again,) = cut([part], tmp_path / "again")
    assert again.origin == Origin("id", 3.0, pytest.approx(4.1))


def test_frames_keep_their_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 60, fps=30000 / 1001)
    (clip,) = cut([Clip(str(path), 10 * 1001 / 30000, 40 * 1001 / 30000)], tmp_path)
    frames = probe(clip.path, "-show_entries", "frame=pts_time")["frames"]
    seconds = [float(frame["pts_time"]) for frame in frames]
    assert seconds == pytest.approx([i * 1001 / 30000 for i in range(30)], abs=1e-4)
    assert all_frames(clip) == list(range(10, 40))


def test_sampled_from_its_file_a_clip_looks_as_sampled_from_its_source(tmp_path: Path, source: Path) -> None:
    clips: list[Clip | Dropped] = [Clip(str(source), 1.23, 4.87), Clip(str(source), 5.0, 9.99)]
    sampler = FrameSampler(num_frames=16)
    of_sources = sampler(Timeline(tuple(clip for clip in clips if isinstance(clip, Clip))))
    of_files = sampler(Timeline(tuple(cut(clips, tmp_path))))
    assert of_files.timeline_seconds == pytest.approx(of_sources.timeline_seconds)
    # Half a frame is what a constant rate costs where a clip begins between two frames.
    differences = [abs(a - b) for a, b in zip(indices_of(of_files.pixels), indices_of(of_sources.pixels), strict=True)]
    assert max(differences) <= 1


def test_variable_rate_keeps_its_times_and_every_frame(tmp_path: Path) -> None:
    # 0 … 9 last 0.1 s each, 10 … 19 about 0.4 s each: 20 frames in 5 s, the closest of them at 10 a second.
    setpts = "setpts='if(lt(N,10),N*0.1,1+(N-10)*0.4)/TB'"
    options = ["-vf", setpts, "-vsync", "vfr", "-video_track_timescale", "1000"]
    path = write_video(tmp_path / "v.mp4", 20, options=options)
    video = VideoFile(str(path))
    (clip,) = cut([Clip(str(path), 0.0, video.end_seconds)], tmp_path)
    assert VideoFile(clip.path).fps == pytest.approx(10, rel=1e-3)
    starts = [float(frame["pts_time"]) for frame in probe(str(path), "-show_entries", "frame=pts_time")["frames"]]
    shown = all_frames(clip)
    for k, index in enumerate(shown):
        assert index == sum(start <= (k + 0.5) / 10 for start in starts) - 1, k
    assert sorted(set(shown)) == list(range(20))


def test_the_rate_is_the_clip_s_own(tmp_path: Path) -> None:
    """A screen recording: still for a minute, then 20 frames a second. The file's average is one in 5 s."""
    setpts = "setpts='if(eq(N,0),0,60+(N-1)*0.05)/TB'"
    options = ["-vf", setpts, "-vsync", "vfr", "-video_track_timescale", "1000"]
    path = write_video(tmp_path / "v.mp4", 13, fps=20, options=options)
    for start in (60.0, 59.0, 30.0):
        (clip,) = cut([Clip(str(path), start, 60.6)], tmp_path)
        video = VideoFile(clip.path)
        assert video.fps == pytest.approx(20, rel=1e-3)
        assert [index for index, _ in itertools.groupby(all_frames(clip))] == list(range(start == 60.0, 13))
    # "Beyond the end" is measured by the clip's rate, too: not by 5 s a frame.
    (dropped,) = cut_clips([Clip(str(path), 60.0, 61.0)], tmp_path)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "beyond_end"


def test_encoding(tmp_path: Path) -> None:
    # A picture that moves slowly: of changing colours x264 makes a key frame each.
    path = tmp_path / "v.mp4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=duration=4:size=64x48:rate=10", "-g", "250"]
    subprocess.run([*command, "-pix_fmt", "yuv420p", str(path)], check=True)
    (clip,) = cut([Clip(str(path), 0.0, 4.0)], tmp_path)
    (stream,) = probe(clip.path, "-show_streams")["streams"]
    assert (stream["codec_name"], stream["pix_fmt"], stream["has_b_frames"]) == ("h264", "yuv420p", 0)
    frames = probe(clip.path, "-show_entries", "frame=key_frame")["frames"]
    keys = [i for i, frame in enumerate(frames) if frame["key_frame"]]
    assert keys == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("size", "max_height", "expected"),
    [((48, 64), 480, (48, 64)), ((100, 178), 50, (50, 88)), ((64, 33), 480, (64, 32)), ((34, 34), 33, (32, 32))],
)
def test_sizes_are_even_and_bounded(
    tmp_path: Path, size: tuple[int, int], max_height: int, expected: tuple[int, int]
) -> None:
    path = write_video(tmp_path / "v.mp4", 10, size=size, options=["-pix_fmt", "yuv444p"])
    (clip,) = cut([Clip(str(path), 0.0, 1.0)], tmp_path, max_height=max_height)
    assert VideoFile(clip.path).size == expected
    assert all_frames(clip) == list(range(10))


def test_rotation_is_applied(tmp_path: Path) -> None:
    plain = write_video(tmp_path / "plain.mp4", 10, size=(32, 64))
    turned = copy_video(plain, tmp_path / "turned.mp4", ["-metadata:s:v", "rotate=90"])
    (clip,) = cut([Clip(str(turned), 0.0, 1.0)], tmp_path, max_height=32)
    assert VideoFile(clip.path).size == (32, 16)
    assert "side_data_list" not in probe(clip.path, "-show_streams")["streams"][0]


def test_ten_bit_hevc_becomes_h264(tmp_path: Path) -> None:
    options = ["-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=error"]
    path = write_video(tmp_path / "v.mp4", 10, size=(64, 64), options=options)
    (clip,) = cut([Clip(str(path), 0.0, 1.0)], tmp_path)
    (stream,) = probe(clip.path, "-show_streams")["streams"]
    assert (stream["codec_name"], stream["pix_fmt"]) == ("h264", "yuv420p")
    assert all_frames(clip) == list(range(10))


def test_a_frame_every_ten_minutes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 12, fps=1 / 600, options=["-r", "1/600"])
    (clip,) = cut([Clip(str(path), 1190.0, 1210.0)], tmp_path)
    assert all_frames(clip) == [1] * 10 + [2] * 10


def test_names_say_content_span_and_encoding(tmp_path: Path, source: Path) -> None:
    copy = tmp_path / "another name.mp4"
    copy.write_bytes(source.read_bytes())
    folder = tmp_path / "clips"
    (one,) = cut([Clip(str(source), 0.0, 1.0, "caption")], folder)
    (same,) = cut([Clip(str(copy), 0.0, 1.0)], folder)
    assert same.path == one.path
    others = [
        cut([Clip(str(source), 0.0, 1.1)], folder)[0],
        cut([Clip(str(source), 0.1, 1.0)], folder)[0],
        cut([Clip(str(source), 0.0, 1.0)], folder, crf=30)[0],
        cut([Clip(str(source), 0.0, 1.0)], folder, max_height=16)[0],
        cut([Clip(str(write_video(tmp_path / "w.mp4", 99)), 0.0, 1.0)], folder)[0],
    ]
    assert len({clip.path for clip in [one, *others]}) == 6
    assert len(list(folder.rglob("*.mp4"))) == 6


def test_what_is_there_is_not_cut_again(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips: list[Clip | Dropped] = [Clip(str(source), float(i), i + 1.0) for i in range(3)]
    write, written = media._write, []

    def interrupted(video: VideoFile, clip: Clip, path: Path, settings: MediaSettings) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(clip.start_seconds)
        write(video, clip, path, settings)

    monkeypatch.setattr(media, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut(clips, tmp_path)
    written.clear()
    found = cut(clips, tmp_path)
    assert written == [2.0]
    assert [all_frames(clip)[0] for clip in found] == [0, 10, 20]


def test_a_cut_that_breaks_off_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_chunk_only(self: VideoFile, *arguments: Any) -> Any:
        yield from list(frames(self, *arguments))[:1]
        raise KeyboardInterrupt

    frames = VideoFile.frames
    monkeypatch.setattr(VideoFile, "frames", first_chunk_only)
    with pytest.raises(KeyboardInterrupt):
        cut([Clip(str(source), 0.0, 1.0)], tmp_path)
    assert [path for path in (tmp_path / "clips").rglob("*") if path.is_file()] == []


def test_what_a_killed_run_left_is_removed_and_what_another_run_writes_is_not(tmp_path: Path, source: Path) -> None:
    (clip,) = cut([Clip(str(source), 0.0, 1.0)], tmp_path)
    content = Path(clip.path).read_bytes()
    Path(clip.path).write_bytes(content[: len(content) // 2])  # not as it was written: it is cut again
    left, being_written = Path(f"{clip.path}.1.part"), Path(f"{clip.path}.2.part")
    left.write_bytes(b"half a file")
    being_written.write_bytes(b"half a file")
    os.utime(left, (0, 0))
    assert cut([Clip(str(source), 0.0, 1.0)], tmp_path) == [clip]
    assert Path(clip.path).read_bytes() == content
    clips = (tmp_path / "clips").rglob("*")
    assert sorted(path for path in clips if path.is_file()) == [Path(clip.path), being_written]


def test_builds_share_what_is_cut(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips: list[Clip | Dropped] = [Clip(str(source), float(i), i + 1.0, f"caption {i}") for i in range(3)]
    found = cut(clips, tmp_path)
    assert all(Path(clip.path).parent.name == Path(clip.path).name[:2] for clip in found)
    monkeypatch.setattr(media, "_write", None)
    assert cut(clips[::-1], tmp_path) == found[::-1]


def test_a_clip_that_cannot_be_decoded_is_dropped_by_name(tmp_path: Path, source: Path) -> None:
    whole = write_video(tmp_path / "w.mp4", 100, size=(128, 128), options=["-movflags", "+faststart"])
    content = whole.read_bytes()
    half = len(content) * 2 // 3
    truncated, broken = tmp_path / "t.mp4", tmp_path / "b.mp4"
    truncated.write_bytes(content[:half])
    broken.write_bytes(content[:half] + bytes(byte ^ 0x5A for byte in content[half:]))
    before = Dropped("outside_root", "../x.mp4")
    clips: list[Clip | Dropped] = [
        before,
        Clip(str(broken), 0.0, 1.0),
        Clip(str(broken), 8.0, 9.0, source_id="b"),
        Clip(str(tmp_path / "gone.mp4"), 0.0, 1.0),
        Clip(str(truncated), 8.0, 9.0),
        Clip(str(source), 9.0, 11.0),
        Clip(str(source), 3.0, 4.0),
    ]
    folder = tmp_path / "clips"
    found = list(cut_clips(clips, folder))
    assert found[0] is before
    assert isinstance(found[1], Clip)  # its frames are there
    assert isinstance(found[6], Clip)
    dropped = [item for item in found[2:6] if isinstance(item, Dropped)]
    assert [item.reason for item in dropped] == ["unreadable", "missing_file", "beyond_end", "beyond_end"]
    assert (dropped[0].path, dropped[0].source_id) == (str(broken), "b")
    assert dropped[0].detail.startswith("[8.0, 9.0) s: ")
    assert len(list(folder.rglob("*.mp4"))) == 2


def test_processes_make_the_same_files_in_the_same_order(tmp_path: Path, source: Path) -> None:
    clips: list[Clip | Dropped] = []
    for number in range(3):
        path = write_video(tmp_path / f"{number}.mp4", 30, first=30 * number)
        clips += [Clip(str(path), 0.0, 1.5), Clip(str(path), 1.5, 3.0), Clip(str(path), 5.0, 6.0)]
    alone = list(cut_clips(clips, tmp_path / "alone"))
    together = list(cut_clips(clips, tmp_path / "together", num_workers=2))
    assert [Path(item.path).name for item in together] == [Path(item.path).name for item in alone]
    assert [type(item) for item in together] == [type(item) for item in alone] == [Clip, Clip, Dropped] * 3
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").rglob("*.mp4")}
    assert len(files) == 6
    assert {path.name: path.read_bytes() for path in (tmp_path / "together").rglob("*.mp4")} == files


def test_a_clip_longer_than_a_chunk_is_whole(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longvpo_hf.frames.video._CHUNK_BYTES", 7 * 3 * 32 * 48)
    (clip,) = cut([Clip(str(source), 0.0, 10.0)], tmp_path)
    assert all_frames(clip) == list(range(100))


def test_clips_that_stay_where_they_are_are_decoded_once(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = write_video(tmp_path / "b.mp4", 100, size=(128, 128), options=["-movflags", "+faststart"])
    content = broken.read_bytes()
    half = len(content) * 2 // 3
    broken.write_bytes(content[:half] + bytes(byte ^ 0x5A for byte in content[half:]))
    before = Dropped("outside_root", "../x.mp4")
    clips: list[Clip | Dropped] = [
        before,
        Clip(str(broken), 0.0, 1.0),
        Clip(str(broken), 8.0, 9.0),
        Clip(str(tmp_path / "gone.mp4"), 0.0, 1.0),
        Clip(str(source), 9.0, 11.0),
        Clip(str(source), 3.0, 4.0, "caption"),
    ]
    cache = tmp_path / "cache"
    found = list(check_clips(clips, cache))
    assert [found[k] for k in (0, 1, 5)] == [clips[k] for k in (0, 1, 5)]
    assert [item.reason for item in found[2:5] if isinstance(item, Dropped)] == [
        "unreadable", "missing_file", "beyond_end",
    ]  # fmt: skip
    assert not list(cache.rglob("*.mp4"))
    monkeypatch.setattr(VideoFile, "check_frames", None)
    assert list(check_clips([clips[5], clips[1]], cache)) == [clips[5], clips[1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_height": 1}, "max_height must be ≥ 2 pixels, got 1"), ({"crf": 52}, r"crf must be in \[0, 51\], got 52")],
)
def test_settings_that_do_not_fit(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MediaSettings(**settings)
