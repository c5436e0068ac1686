"""Frames against the truth: a sequential decode of the whole file by the ffmpeg program, over random films.

Each film tells its frames apart by colour; containers, codecs, orders of frames, key frames, rates and offsets are
drawn.
"""

from __future__ import annotations

import itertools
import random
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from longvpo_hf.frames import FrameSampler, VideoFile, whole_clip
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.media import cut_clips
from longvpo_hf.timeline import Clip, Timeline
from media import indices_of, write_video

torch.set_num_threads(1)

#: Container -> codecs that it can hold.
HOLDS = {
    "mp4": ("h264", "h265", "mpeg4"),
    "mov": ("h264", "mpeg4", "mjpeg"),
    "mkv": ("h264", "h265", "mpeg2", "vp9"),
    "webm": ("vp8", "vp9"),
    "avi": ("h264", "mpeg4", "xvid", "mjpeg"),
    "ts": ("h264", "h265", "mpeg2"),
    "mpg": ("mpeg1", "mpeg2", "h264"),
    "flv": ("h264", "flv1"),
    "wmv": ("wmv2",),
    "ogv": ("theora",),
}
MPEG_RATES = ("24000/1001", "25", "30000/1001")
RATES = (*MPEG_RATES, "10", "12.5", "50")


@dataclass(frozen=True)
class Film:
    """A film as it is drawn: its name's ending, how many frames it has, how fast, and ffmpeg's options."""

    suffix: str
    num_frames: int
    fps: Fraction
    size: tuple[int, int]
    options: tuple[str, ...]

    def write(self, path: Path) -> Path:
        return write_video(path, self.num_frames, float(self.fps), self.size, options=self.options)


def draw(rng: random.Random) -> Film:
    suffix = rng.choice(sorted(HOLDS))
    codec = rng.choice(HOLDS[suffix])
    fps = rng.choice(MPEG_RATES if codec in ("mpeg1", "mpeg2") else RATES)
    gop, b_frames = rng.choice((1, 5, 12, 30, 250)), rng.randrange(4)
    closed = rng.random() < 0.5
    x264 = [
        f"scenecut={rng.choice((0, 40))}",
        f"open-gop={int(not closed)}",
        f"b-pyramid={rng.choice(('none', 'normal'))}",
    ]
    if rng.random() < 0.15:
        x264, b_frames = ["intra-refresh=1"], 0
    encoding = {
        "h264": ["libx264", "-bf", str(b_frames), "-x264-params", ":".join(x264), "-crf", "10"],
        "h265": [
            "libx265",
            "-bf",
            str(b_frames),
            "-x265-params",
            f"log-level=none:open-gop={int(not closed)}",
            "-crf",
            "10",
        ],
        "mpeg4": ["mpeg4", "-bf", str(min(b_frames, 2)), "-q:v", "2"],
        "xvid": ["libxvid", "-bf", str(min(b_frames, 2)), "-q:v", "2"],
        "mpeg1": ["mpeg1video", "-bf", str(min(b_frames, 2)), "-q:v", "2"],
        "mpeg2": ["mpeg2video", "-bf", str(min(b_frames, 2)), "-q:v", "2"],
        "mjpeg": ["mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p"],
        "vp8": ["libvpx", "-deadline", "realtime", "-b:v", "2M", "-auto-alt-ref", str(rng.randrange(2))],
        "vp9": ["libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "2M"],
        "flv1": ["flv1", "-q:v", "2"],
        "wmv2": ["wmv2", "-q:v", "2"],
        "theora": ["libtheora", "-q:v", "9"],
    }[codec]
    options = ["-c:v", *encoding, "-g", str(gop)]
    if codec in ("h264", "h265"):
        options += ["-preset", rng.choice(("ultrafast", "medium"))]
    if suffix in ("mp4", "mov"):
        options += rng.choice(([], ["-movflags", "+faststart"], ["-movflags", "+frag_keyframe+empty_moov"]))
    if suffix in ("mkv", "webm", "ts", "mpg") and rng.random() < 0.5:
        options += ["-output_ts_offset", f"{rng.uniform(0, 40):.3f}"]
    if suffix == "ts" and rng.random() < 0.2:
        options += ["-output_ts_offset", f"{2**33 / 90000 - rng.uniform(0, 3):.3f}"]  # its clock wraps within the film
    if suffix == "mpg":
        options += ["-f", "vob" if codec == "h264" else "mpeg"]
    size = (rng.randrange(24, 100, 2), rng.randrange(24, 100, 2))
    return Film(suffix, rng.randrange(2, 150), Fraction(fps), size, tuple(options))


def decoded_by_ffmpeg(path: Path, size: tuple[int, int]) -> list[int]:
    """Which frames ffmpeg gives, one after the other, of the whole file."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-vsync", "0", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return indices_of(torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, *size, 3).permute(0, 3, 1, 2))


def check(film: Film, folder: Path, rng: random.Random) -> None:
    path = film.write(folder / f"film.{film.suffix}")
    truth = decoded_by_ffmpeg(path, film.size)
    whole = whole_clip(str(path))
    fps, begin = float(film.fps), whole.start_seconds
    assert whole.duration_seconds == pytest.approx(film.num_frames / fps, abs=0.6 / fps)

    # Clips in any order, of one file: seeking forwards and back.
    sampler = FrameSampler(num_frames=16, cache_bytes=0)
    for _ in range(4):
        first = rng.randrange(len(truth))
        length = rng.randrange(1, len(truth) - first + 1)
        clip = Clip(str(path), begin + first / fps, begin + (first + length) / fps)
        count = rng.randrange(1, 17)
        shown = indices_of(FrameSampler(count)(Timeline((clip,))).pixels)
        again = indices_of(sampler(Timeline((clip,))).pixels)
        for frames in (shown, again):
            centres = [first + (k + 0.5) * length / len(frames) for k in range(len(frames))]
            for frame, centre in zip(frames, centres, strict=True):
                # Time stamps are rounded, to a millisecond in some containers: at the border of two frames either is
                # right.
                near = {truth[min(max(int(centre + shift), first), first + length - 1)] for shift in (-0.1, 0.1)}
                assert frame in near, (first, length, frames, centres)

    # Files that are cut: every frame of the span once.
    spans = sorted(rng.sample(range(len(truth) + 1), min(len(truth) + 1, 4)))
    clips = [Clip(str(path), begin + start / fps, begin + stop / fps) for start, stop in itertools.pairwise(spans)]
    for clip, (start, stop) in zip(cut_clips(clips, folder), itertools.pairwise(spans), strict=True):
        assert not isinstance(clip, Dropped), clip
        video = VideoFile(clip.path)
        of_file = [i for _, pixels in video.frames(0, video.end_seconds, video.fps) for i in indices_of(pixels)]
        assert of_file == truth[start:stop], (start, stop)


@pytest.mark.parametrize("seed", range(24))
def test_random_films(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    film = draw(rng)
    check(film, tmp_path, rng)
