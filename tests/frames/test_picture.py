"""What is shown is upright, not mirrored, of square pixels and of one size, whatever a file's pixels and matrices
are."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longvpo_hf.frames import FrameSampler, VideoFile, whole_clip
from longvpo_hf.intake.media import cut_clips
from longvpo_hf.timeline import Clip, Timeline

torch.set_num_threads(1)

HEIGHT, WIDTH = 96, 128
QUADRANTS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}
#: Of a film as it is coded: top left, top right, bottom left, bottom right.
CODED = "RGBW"
X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "2", "-crf", "10")
#: Turns by quarters and mirrors: (a, b, c, d) of a display matrix, x' = a x + c y, y' = b x + d y.
MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


def ffmpeg(*arguments: object) -> None:
    subprocess.run(["ffmpeg", "-y", "-v", "error", *map(str, arguments)], check=True)


def write_quadrants(path: Path, options: Sequence[str] = X264, filters: str = "null", seconds: float = 1.0) -> Path:
    """A film of four quarters, each of its own colour."""
    half = f"{WIDTH // 2}:{HEIGHT // 2}"
    boxes = f"drawbox=0:0:{half}:red:t=fill,drawbox={WIDTH // 2}:0:{half}:lime:t=fill,"
    boxes += f"drawbox=0:{HEIGHT // 2}:{half}:blue:t=fill"
    source = f"color=white:size={WIDTH}x{HEIGHT}:rate=10:duration={seconds}"
    ffmpeg("-f", "lavfi", "-i", source, "-vf", f"{boxes},{filters}", *options, path)
    return path


def quadrants(frame: Tensor) -> str:
    """The colours of the quarters of uint8 `[3, H, W]`, from left to right, top to bottom."""
    found = ""
    for y, x in ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)):
        pixel = frame[:, int(y * frame.shape[1]), int(x * frame.shape[2])].tolist()
        found += min(QUADRANTS, key=lambda name: sum((a - b) ** 2 for a, b in zip(QUADRANTS[name], pixel, strict=True)))
    return found


def shown(path: Path, folder: Path) -> list[Tensor]:
    """A frame as models see it, as building sees it, and of the file that is cut."""
    whole = whole_clip(str(path))
    video = VideoFile(str(path))
    (clip,) = cut_clips([whole], folder / "cache")
    assert isinstance(clip, Clip), clip
    return [
        FrameSampler(1)(Timeline((whole,))).pixels[0],
        next(video.frames(whole.start_seconds, whole.end_seconds, video.fps))[1][0],
        FrameSampler(1)(Timeline((clip,))).pixels[0],
    ]


def write_matrix(path: Path, matrix: tuple[int, ...]) -> None:
    """Puts a display matrix into the header of an MP4's only track."""
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd") + 4
    at = header + (52 if content[header] else 40)
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def transformed(matrix: tuple[int, ...]) -> str:
    """Where a display matrix puts the quarters."""
    a, b, c, d = matrix
    places = {}
    for colour, (x, y) in zip(CODED, ((-1, -1), (1, -1), (-1, 1), (1, 1)), strict=True):
        places[b * x + d * y, a * x + c * y] = colour
    return "".join(places[place] for place in sorted(places))


def test_there_are_eight_matrices() -> None:
    assert len(MATRICES) == 8
    assert len({transformed(matrix) for matrix in MATRICES}) == 8


@pytest.mark.parametrize("matrix", MATRICES)
def test_display_matrices_that_turn_and_mirror(tmp_path: Path, matrix: tuple[int, ...]) -> None:
    path = write_quadrants(tmp_path / "v.mp4")
    write_matrix(path, matrix)
    size = (WIDTH, HEIGHT) if matrix[0] == 0 else (HEIGHT, WIDTH)
    for frame in shown(path, tmp_path):
        assert (quadrants(frame), tuple(frame.shape[1:])) == (transformed(matrix), size)


@pytest.mark.parametrize("orientation", ["flip=horizontal", "flip=vertical", "rotate=90", "rotate=180"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_orientation_that_the_stream_itself_asks_for(tmp_path: Path, suffix: str, orientation: str) -> None:
    plain, path = write_quadrants(tmp_path / "plain.mp4"), tmp_path / f"v.{suffix}"
    ffmpeg("-i", plain, "-c", "copy", "-bsf:v", f"h264_metadata=display_orientation=insert:{orientation}", path)
    expected = {"flip=horizontal": "GRWB", "flip=vertical": "BWRG", "rotate=90": "GWRB", "rotate=180": "WBGR"}
    for frame in shown(path, tmp_path):
        assert quadrants(frame) == expected[orientation]
        assert tuple(frame.shape[1:]) == ((WIDTH, HEIGHT) if orientation == "rotate=90" else (HEIGHT, WIDTH))


PIXELS = {
    "mp4": X264,
    "mov": X264,
    "mkv": X264,
    "ts": X264,
    "flv": X264,
    "avi": ("-c:v", "mpeg4", "-q:v", "2"),
    "mpg": ("-c:v", "mpeg2video", "-q:v", "2", "-r", "25"),
    "webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
    "wmv": ("-c:v", "wmv2", "-q:v", "2"),
    "ogv": ("-c:v", "libtheora", "-q:v", "9"),
}


@pytest.mark.parametrize("suffix", PIXELS)
def test_pixels_that_are_not_square(tmp_path: Path, suffix: str) -> None:
    path = write_quadrants(tmp_path / f"v.{suffix}", PIXELS[suffix], "setsar=64/45")
    aspect = 16 / 9 if suffix == "mpg" else WIDTH * 64 / 45 / HEIGHT  # the nearest of the four that MPEG-2 has
    for frame in shown(path, tmp_path):
        assert quadrants(frame) == CODED
        assert frame.shape[1] == HEIGHT
        assert frame.shape[2] / frame.shape[1] == pytest.approx(aspect, rel=0.02)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pixels_whose_shape_only_the_container_states(tmp_path: Path, suffix: str) -> None:
    plain, path = write_quadrants(tmp_path / "plain.mp4"), tmp_path / f"v.{suffix}"
    ffmpeg("-i", plain, "-c", "copy", "-aspect", "16:9", path)
    for frame in shown(path, tmp_path):
        assert frame.shape[2] / frame.shape[1] == pytest.approx(16 / 9, rel=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_random_pixels_and_matrices(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    matrix = rng.choice(MATRICES)
    numerator, denominator = rng.randrange(8, 25), rng.randrange(8, 25)
    path = write_quadrants(tmp_path / "v.mp4", filters=f"setsar={numerator}/{denominator}")
    write_matrix(path, matrix)
    aspect = WIDTH * numerator / denominator / HEIGHT
    for frame in shown(path, tmp_path):
        assert quadrants(frame) == transformed(matrix)
        assert frame.shape[2] / frame.shape[1] == pytest.approx(1 / aspect if matrix[0] == 0 else aspect, rel=0.02)


@pytest.mark.parametrize("pixel_aspect", ["0/1", "1/1000", "1000/1"])
def test_nonsense_is_not_believed(tmp_path: Path, pixel_aspect: str) -> None:
    path = write_quadrants(tmp_path / "v.mp4", filters=f"setsar={pixel_aspect}:max=1000")
    assert VideoFile(str(path)).size == (HEIGHT, WIDTH)


# ------------------------------------------------------------------------------------------- sizes that change midway


def square_px(frame: Tensor) -> tuple[int, int]:
    """Height and width of the white square in a frame of uint8 `[3, H, W]`."""
    white = frame.float().mean(0) > 200
    rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


def write_parts(folder: Path, name: str, sizes: Sequence[tuple[int, int]], options: Sequence[str]) -> Path:
    """A film that changes its size every second; a white square is half as high as the frame's shorter side."""
    parts = []
    for number, (height, width) in enumerate(sizes):
        side = min(height, width) // 2
        part = folder / f"part{number}.{'webm' if 'libvpx' in options else 'mp4'}"
        square = f"drawbox={width // 2 - side // 2}:{height // 2 - side // 2}:{side}:{side}:white:t=fill"
        source = f"color=gray:size={width}x{height}:rate=10:duration=1"
        ffmpeg("-f", "lavfi", "-i", source, "-vf", square, *options, part)
        parts.append(f"file '{part}'\n")
    (folder / "parts.txt").write_text("".join(parts), encoding="utf-8")
    ffmpeg("-f", "concat", "-safe", "0", "-i", folder / "parts.txt", "-c", "copy", folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.mp4", X264),
        ("v.mkv", X264),
        ("v.ts", X264),
        ("v.webm", ("-c:v", "libvpx", "-deadline", "realtime", "-b:v", "1M")),
    ],
)
@pytest.mark.parametrize("sizes", [((90, 160), (160, 90)), ((90, 160), (180, 320), (120, 120))])
def test_a_square_stays_square(
    tmp_path: Path, name: str, options: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> None:
    path = write_parts(tmp_path, name, sizes, options)
    begin = whole_clip(str(path)).start_seconds
    clips = [Clip(str(path), begin + k, begin + k + 1) for k in range(len(sizes))]
    for sampled in (Timeline(tuple(clips)), *(Timeline((clip,)) for clip in clips)):
        for frame in FrameSampler(4 * len(sampled))(sampled).pixels:
            assert tuple(frame.shape[1:]) == sizes[0]
            height, width = square_px(frame)
            assert height == pytest.approx(width, abs=2)
            assert height >= 20
    for clip in cut_clips(clips, tmp_path / "cache"):
        assert isinstance(clip, Clip), clip
        for frame in FrameSampler(4)(Timeline((clip,))).pixels:
            height, width = square_px(frame)
            assert height == pytest.approx(width, abs=3)
