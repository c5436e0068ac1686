"""Small video files whose frames tell which they are: frame i is one flat colour that stands for i."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_LEVELS = 6
_STEP = 48  # far more than what H.264 and 4:2:0 change of a flat colour


def colour(index: int) -> tuple[int, int, int]:
    """The colour of frame `index`, in [0, 216). Red changes fastest; none is black."""
    digits = (index % _LEVELS, index // _LEVELS % _LEVELS, index // _LEVELS**2)
    return tuple(_STEP // 4 + _STEP * digit for digit in digits)  # type: ignore[return-value]


def index_of(frame: Tensor) -> int:
    """Which frame of its video this is, by the colour of its centre. `frame` is uint8 `[3, H, W]`."""
    pixel = frame[:, frame.shape[1] // 2, frame.shape[2] // 2].float()
    digits = ((pixel - _STEP // 4) / _STEP).round().clamp(0, _LEVELS - 1).int().tolist()
    return digits[0] + _LEVELS * digits[1] + _LEVELS**2 * digits[2]


def indices_of(frames: Tensor) -> list[int]:
    """`index_of` each frame of uint8 `[N, 3, H, W]`."""
    return [index_of(frame) for frame in frames]


def unfilmed_bytes(text: str) -> bytes:
    """A file that is never decoded but may be published: an mp4 without tracks, whose only box holds the text."""
    content = text.encode()
    return (8 + len(content)).to_bytes(4, "big") + b"free" + content


def write_video(
    path: Path,
    num_frames: int,
    fps: float = 10.0,
    size: tuple[int, int] = (32, 48),
    first: int = 0,
    options: Sequence[str] = (),
) -> Path:
    """Writes frames `first` … `first + num_frames - 1`, `size` is (height, width), through the ffmpeg binary.

    Args:
        options: More options of the output, e.g. filters, offsets, metadata.
    """
    colours = torch.tensor([colour(first + i) for i in range(num_frames)], dtype=torch.uint8)
    raw = colours[:, None, None, :].expand(-1, *size, -1).contiguous()
    command = ["ffmpeg", "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}"]
    command += ["-r", str(fps), "-i", "-", "-c:v", "libx264", "-preset", "ultrafast", "-crf", "10", "-g", "12"]
    command += ["-pix_fmt", "yuv420p", "-threads", "1", *options, str(path)]
    subprocess.run(command, input=raw.numpy().tobytes(), check=True)
    return path


def copy_video(source: Path, path: Path, options: Sequence[str] = ()) -> Path:
    """Copies the stream of a file without encoding it again, with more options of the output."""
    subprocess.run(["ffmpeg", "-y", "-v", "error", "-i", str(source), "-c", "copy", *options, str(path)], check=True)
    return path
