"""What seeking, time stamps, headers and names claim is not believed: the right frames all the same, or a named
reason."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BufferedReader, FileIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from longvpo_hf.errors import VideoError
from longvpo_hf.frames import Bounds, FrameSampler, UnreadableVideo, VideoFile, whole_clip
from longvpo_hf.frames import video as video_module
from longvpo_hf.funnel import REASONS, Dropped
from longvpo_hf.intake import CuttingSettings, Source, clips_of
from longvpo_hf.intake.media import cut_clips
from longvpo_hf.timeline import Clip, Timeline
from media import copy_video, indices_of, write_video

torch.set_num_threads(1)

FPS = 25
X264 = ("-c:v", "libx264", "-preset", "medium", "-bf", "3", "-g", "25", "-x264-params")
B_FRAMES = (*X264, "b-pyramid=normal:scenecut=0")
MPEG4 = ("-c:v", "mpeg4", "-bf", "2", "-g", "50", "-q:v", "2")
EIGHT = [12, 37, 62, 87, 112, 137, 162, 187]  # the centres of eighths of 200 frames
WINDOWS = CuttingSettings(min_clip_seconds=0.5, max_clip_seconds=1.0, cutting="windows")


def film(path: Path, options: tuple[str, ...] = B_FRAMES, num_frames: int = 200, first: int = 0) -> Path:
    return write_video(path, num_frames, FPS, size=(64, 96), first=first, options=options)


def sample(path: Path, num_frames: int) -> list[int]:
    return indices_of(FrameSampler(num_frames)(Timeline((whole_clip(str(path)),))).pixels)


def shown_by(clip: Clip) -> list[int]:
    """Every frame of a cut file."""
    video = VideoFile(clip.path)
    return [index for _, pixels in video.frames(0, video.end_seconds, video.fps) for index in indices_of(pixels)]


def built(path: Path, folder: Path, cutting: CuttingSettings = WINDOWS) -> tuple[list[Clip], list[Dropped]]:
    """What a build makes of a source."""
    found = list(cut_clips(clips_of([Source(path)], cutting, cache=folder), folder))
    dropped = [item for item in found if isinstance(item, Dropped)]
    assert {item.reason for item in dropped} <= set(REASONS)
    return [item for item in found if isinstance(item, Clip)], dropped


# ----------------------------------------------------------------------------------------------- seeking, time stamps


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b.ts", B_FRAMES),
        ("b.avi", B_FRAMES),
        ("m.avi", MPEG4),
        ("x.avi", ("-c:v", "libxvid", "-g", "50", "-q:v", "2")),
        ("m.mpg", ("-c:v", "mpeg2video", "-bf", "2", "-g", "15", "-q:v", "2")),
        ("h.mpg", (*B_FRAMES, "-f", "vob")),
        ("open.mp4", (*X264, "open-gop=1:scenecut=0")),
        ("wrap.ts", (*B_FRAMES, "-output_ts_offset", "95440")),
        ("b.flv", B_FRAMES),
    ],
)
def test_eight_frames_of_a_film(tmp_path: Path, name: str, options: tuple[str, ...]) -> None:
    path = film(tmp_path / name, options)
    assert sample(path, 8) == EIGHT
    clips, dropped = built(path, tmp_path)
    assert dropped == []
    assert [shown_by(clip) for clip in clips] == [list(range(25 * k, 25 * k + 25)) for k in range(8)]


def test_xvid_with_b_frames_counts_from_its_first_frame(tmp_path: Path) -> None:
    """ffmpeg's XviD encoder loses its last two frames; the first packets of the file are empty."""
    path = write_video(tmp_path / "x.avi", 48, 10, options=["-c:v", "libxvid", "-bf", "2", "-q:v", "2", "-g", "250"])
    assert indices_of(FrameSampler(3)(Timeline((Clip(str(path), 0.0, 4.8),))).pixels) == [8, 24, 40]


def test_time_stamps_that_start_again(tmp_path: Path) -> None:
    """Two transport streams joined by `cat`: 4 s and 8 s."""
    parts = [film(tmp_path / "a.ts", num_frames=100, first=100), film(tmp_path / "b.ts")]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert whole_clip(str(joined)).duration_seconds == pytest.approx(12.0)
    truth = [*range(100, 200), *range(200)]
    assert sample(joined, 6) == [truth[int((k + 0.5) * 50)] for k in range(6)]
    clips, dropped = built(joined, tmp_path)
    assert dropped == []
    assert [index for clip in clips for index in shown_by(clip)] == truth


@pytest.mark.parametrize("options", [MPEG4, B_FRAMES])
def test_decoding_times_for_presentation_times(tmp_path: Path, options: tuple[str, ...]) -> None:
    """An AVI copied into an MP4: its packets have no presentation times, so the copy's are wrong, in healthy order."""
    path = copy_video(film(tmp_path / "a.avi", options), tmp_path / "copy.mp4")
    assert sample(path, 8) == EIGHT
    clips, dropped = built(path, tmp_path)
    assert dropped == []
    assert [index for clip in clips for index in shown_by(clip)] == list(range(200))


def test_a_decoder_that_answers_with_another_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchcodec.decoders import VideoDecoder

    def late(decoder: VideoDecoder, indices: list[int]) -> Any:
        return decoder.get_frames_in_range(indices[0] + 3, indices[0] + 3 + len(indices))

    monkeypatch.setattr(VideoDecoder, "get_frames_at", late)
    assert sample(film(tmp_path / "v.mp4"), 8) == EIGHT


def test_a_file_that_cannot_be_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeks come out at the wrong place, as in a WebM without an index: decoding starts at the front instead."""
    from torchcodec.decoders import Demuxer

    path = film(tmp_path / "v.mkv")
    monkeypatch.setattr(VideoFile, "_sought", lambda *_: None)
    seek = Demuxer.seek
    monkeypatch.setattr(Demuxer, "seek", lambda self, seconds: seek(self, min(seconds + 3, 7.5)))
    assert sample(path, 8) == EIGHT


# ------------------------------------------------------------------------------------------------------------- damage


def spoil(path: Path, numbers: list[int]) -> None:
    """Overwrites packets, counted in the order of the file, with noise."""
    command = ["ffprobe", "-v", "error", "-show_entries", "packet=pos,size", "-of", "json", path]
    packets = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["packets"]
    content = bytearray(path.read_bytes())
    for number in numbers:
        start, size = int(packets[number]["pos"]), int(packets[number]["size"])
        content[start : start + size] = random.Random(number).randbytes(size)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
@pytest.mark.parametrize("cutting", ["windows", "scenes"])
def test_one_bad_packet_costs_a_clip(tmp_path: Path, name: str, cutting: Any) -> None:
    options = MPEG4 if name.endswith("avi") else (*X264, "scenecut=0:min-keyint=25")
    path = film(tmp_path / name, options)
    spoil(path, [112])
    clips, dropped = built(path, tmp_path, CuttingSettings(0.5, 1.0, cutting))
    assert [item.reason for item in dropped] == ["unreadable"]
    assert "Invalid data found" in dropped[0].detail
    for clip in clips:
        fps, start = VideoFile(clip.path).fps, clip.origin.start_seconds
        assert shown_by(clip) == [int((start + (k + 0.5) / fps) * FPS) for k in range(len(shown_by(clip)))]
    if cutting == "windows":
        shown = [index for clip in clips for index in shown_by(clip)]
        assert shown == [index for index in range(200) if index not in range(100, 125)]


@pytest.mark.parametrize("seed", range(6))
def test_a_random_bad_packet(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    name = rng.choice(["v.mp4", "v.avi"])
    path = film(tmp_path / name, MPEG4 if name.endswith("avi") else B_FRAMES)
    bad = rng.randrange(60, 190)
    spoil(path, [bad])
    clips, dropped = built(path, tmp_path)
    # The packet's own group of pictures, of at most 50 frames, lies in at most three clips.
    assert len(clips) >= 5
    assert len(dropped) <= 3
    for clip in clips:
        start = round(clip.origin.start_seconds * FPS)
        if abs(start - bad) > 75:
            assert shown_by(clip) == list(range(start, start + len(shown_by(clip))))


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_a_few_bad_frames_at_the_end_cost_these_frames(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / name, MPEG4 if name.endswith("avi") else B_FRAMES, num_frames=20)
    spoil(path, [19])
    (clip,), (lost,) = built(path, tmp_path)
    assert lost.reason == "lost_frames"
    number = VideoFile(str(path))
    number.probe()
    assert lost.detail == f"the first 0 and the last {number.times.num_lost} of its 20 frames cannot be decoded"
    assert 1 <= number.times.num_lost <= 2
    assert shown_by(clip) == list(range(20 - number.times.num_lost))
    # A row that was made of the whole file still shows what is there.
    assert indices_of(FrameSampler(20)(Timeline((Clip(str(path), 0.0, 0.8),))).pixels)[:17] == list(range(17))


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_transport_stream_costs_few_frames_and_no_other_is_moved(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = film(tmp_path / "v.ts")
    begin = whole_clip(str(path)).start_seconds
    content = bytearray(path.read_bytes())
    for packet in rng.sample(range(30, len(content) // 188 - 30), 2):
        content[188 * packet + 20 : 188 * packet + 188] = rng.randbytes(168)
    path.write_bytes(content)
    whole = whole_clip(str(path))
    assert whole.start_seconds == begin
    times = [begin + (k + 0.5) / FPS for k in range(round(whole.duration_seconds * FPS))]
    video = VideoFile(str(path))
    shown = indices_of(video.frames_at([video.index_at(time) for time in times], video.size))
    wrong = [(k, index) for k, index in enumerate(shown) if k != index]
    # In the place of a frame that is lost FFmpeg, or nobody, puts one before it, and says nothing; the frames that lean
    # on it, up to the next reference, may look like that one too.
    assert len(wrong) <= 2 * 6
    assert all(index < k <= index + 6 for k, index in wrong)


FRAGMENTS = (*B_FRAMES, "-movflags", "frag_keyframe+empty_moov+default_base_moof")


@pytest.mark.parametrize("options", [B_FRAMES, FRAGMENTS])
@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_of_joined_files_the_first_is_shown_and_the_other_named(
    tmp_path: Path, options: tuple[str, ...], size: tuple[int, int]
) -> None:
    first = write_video(tmp_path / "a.mp4", 50, FPS, size=(64, 96), options=options)
    second = write_video(tmp_path / "b.mp4", 50, FPS, size=size, first=50, options=options)
    path = tmp_path / "v.mp4"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    clips, dropped = built(path, tmp_path)
    assert [(item.reason, item.detail.split(",")[0]) for item in dropped] == [
        ("not_shown", f"another mp4 file stands at byte {first.stat().st_size}")
    ]
    assert [index for clip in clips for index in shown_by(clip)] == list(range(50))
    assert sample(path, 5) == [5, 15, 25, 35, 45]


# --------------------------------------------------------------------------------------------- what must not be opened


def private(folder: Path) -> Path:
    return film(folder / "private.ts", num_frames=50)


MANIFESTS: dict[str, Callable[[Path], str]] = {
    "hls": lambda film: f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{film}\n#EXT-X-ENDLIST\n",
    "hls after a byte order mark": lambda film: f"\ufeff#EXTM3U\n#EXTINF:2,\n{film}\n#EXT-X-ENDLIST\n",
    "concat": lambda film: f"ffconcat version 1.0\nfile '{film}'\n",
    "dash": lambda film: f'<?xml version="1.0"?><MPD profiles="urn:mpeg:dash:profile:isoff-live:2011">{film}</MPD>',
    "sdp": lambda film: f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns={film}\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "vobsub": lambda film: f"# VobSub index file, v7\nid: en, index: 0\n{film}\n",
    "sdp that starts like packets": lambda film: "".join(
        f"{'G' + chr(10) + 'c=IN IP4 127.0.0.1' + chr(10) + str(film)[:100]:<188}" for _ in range(20)
    ),
    "a playlist behind the type of an mp4": lambda film: f"#EXTftypM3U\n{film}\n",
}


@pytest.mark.parametrize("kind", MANIFESTS)
@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".ts", ".sdp"])
def test_a_manifest_never_opens_what_it_names(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    path.write_text(MANIFESTS[kind](private(tmp_path)), encoding="utf-8")
    with pytest.raises(UnreadableVideo, match=r"^unreadable: "):
        VideoFile(str(path))
    clips, (dropped,) = built(path, tmp_path / "cache")
    assert clips == []
    assert dropped.reason == "unreadable"


def test_a_manifest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_text(MANIFESTS["hls"](private(tmp_path)), encoding="utf-8")
    with pytest.raises(UnreadableVideo, match="it is a playlist or manifest that names other files"):
        VideoFile(str(path))


@pytest.mark.parametrize(
    "name",
    ["12:30.mp4", "concat:x.mp4", "pipe:0.mp4", "file:x.mp4", "http:x.mp4", "data:x.mp4", "-i.mp4", "a%02d.mp4",
     "a%02d.png", "hf:x.mp4", "é.mp4", os.fsdecode(b"\xff.mp4")],
)  # fmt: skip
def test_a_name_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A relative name that FFmpeg would take for a protocol or a pattern gives what the absolute one gives."""
    made = film(tmp_path / "made.mp4", num_frames=50)
    path = tmp_path / "corpus" / name
    path.parent.mkdir()
    path.write_bytes(made.read_bytes())
    monkeypatch.chdir(path.parent)
    relative, dropped = built(Path(name), tmp_path / "cache")
    assert dropped == []
    absolute, _ = built(path, tmp_path / "cache")
    assert [clip.path for clip in relative] == [clip.path for clip in absolute]
    assert [index for clip in relative for index in shown_by(clip)] == list(range(50))
    assert indices_of(FrameSampler(5)(Timeline((Clip(name, 0.0, 2.0),))).pixels) == [5, 15, 25, 35, 45]


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{port}/v.mp4", "tcp://127.0.0.1:{port}", "subfile,,start,0,end,0,,:x.mp4"]
)
def test_an_address_opens_nothing(address: str) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(UnreadableVideo, match=r"^missing_file: .*: no such file"):
        VideoFile(address.format(port=server.server_port))
    server.shutdown()
    assert asked == []


class Remote(BufferedReader):
    """A file on the Hub; all that are open stop answering after so many reads."""

    def __init__(self, path: Path, left: list[int], error: Exception) -> None:
        super().__init__(FileIO(path))
        self._left = left
        self._error = error

    def read(self, size: int | None = -1) -> bytes:
        self._left[0] -= 1
        if self._left[0] < 0:
            raise self._error
        return super().read(size)


@pytest.mark.parametrize("num_reads", [0, 2, 10, 20, 1000])
@pytest.mark.parametrize("kind", ["OSError", "httpx2"])
def test_a_remote_file_that_stops_answering_is_not_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_reads: int, kind: str
) -> None:
    import httpx2
    import huggingface_hub

    path = film(tmp_path / "v.mp4", num_frames=50)
    late = TimeoutError("no answer in 10 s") if kind == "OSError" else httpx2.ReadTimeout("no answer in 10 s")
    left = [num_reads]

    class FileSystem:
        def open(self, name: str, mode: str) -> Remote:
            return Remote(path, left, late)

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    timeline = Timeline((Clip("hf://datasets/a/b/v.mp4", 0.0, 2.0),))
    if num_reads == 1000:
        assert indices_of(FrameSampler(5)(timeline).pixels) == [5, 15, 25, 35, 45]
        assert left[0] < 960
    else:
        with pytest.raises(UnreadableVideo, match=r"^unreachable: .*: no answer in 10 s$"):
            FrameSampler(5)(timeline)


# ------------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi", "v.ts"])
def test_frames_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = film(tmp_path / name, MPEG4, num_frames=25)
    assert VideoFile(str(path), Bounds(max_frame_px=64 * 96)).size == (64, 96)
    if name != "v.ts":  # its header does not say: FFmpeg has to look

        def opened(_: object) -> None:
            raise AssertionError("FFmpeg decodes frames to find out more")

        monkeypatch.setattr(video_module, "Packets", opened)
    (dropped,) = clips_of([Source(path)], WINDOWS, bounds=Bounds(max_frame_px=64 * 96 - 1))
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.detail) == ("too_many_pixels", "its frames are 96×64, more than max_frame_px=6143")


def test_three_frames_that_declare_hours(tmp_path: Path) -> None:
    stretch = "setpts='if(eq(N,2),40000,N)/TB'"
    options = ["-vf", stretch, "-vsync", "vfr", "-video_track_timescale", "1000"]
    path = write_video(tmp_path / "v.mp4", 3, 1, options=options)
    assert whole_clip(str(path)).duration_seconds == pytest.approx(40001)
    (dropped,) = clips_of([Source(path)], CuttingSettings())
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "stretched"
    assert dropped.detail == "one of its 3 frames is declared to last 39999 s, more than max_frame_seconds=1800"
    clips = list(clips_of([Source(path)], CuttingSettings(cutting="windows"), bounds=Bounds(max_frame_seconds=50_000)))
    assert len(clips) == 626


@pytest.mark.parametrize(("field", "value"), [("max_frame_px", 0), ("max_frame_seconds", 0.0)])
def test_bounds_that_allow_nothing(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"A frame must be allowed a pixel and an instant, got .*{field}={value}"):
        Bounds(**{field: value})  # type: ignore[arg-type]


def test_without_ffmpeg_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchcodec

    def sources() -> Any:
        raise AssertionError("a source was looked at")
        yield

    monkeypatch.setattr(torchcodec, "ffmpeg_major_version", None)
    for start in (
        lambda: clips_of(sources(), WINDOWS),
        lambda: cut_clips(sources(), tmp_path),
        lambda: FrameSampler(4),
        lambda: VideoFile("v.mp4"),
    ):
        with pytest.raises(VideoError, match=r"FFmpeg's shared libraries, version 4 to 9, are missing .* apt-get"):
            start()
