"""The miniature's clip world: real mp4 files of tiny scenes, and the truth about them.

A clip has 32×32 pixels and lasts 1 second; each mp4 file holds many of them, back to back. A clip has a *marker* (wall
colour × frame colour, one word such as `navy-gold`), which tells it from its neighbours, and one big shape whose
*colour* is the answer to questions about one clip or two. The kind of the shape, its path and a small grey second shape
are nuisance variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchcodec.encoders import VideoEncoder

from longvpo_hf.artifacts import make_folder, write_text
from longvpo_hf.errors import ConfigError, DatasetError
from longvpo_hf.miniature.settings import FRAMES_PER_CLIP
from longvpo_hf.paths import path_inside
from longvpo_hf.timeline import Clip

FRAMES_PER_SECOND = 2
CLIP_SECONDS = FRAMES_PER_CLIP / FRAMES_PER_SECOND
FRAME_PIXELS = 32
CLIPS_PER_FILE = 64  # Opening an encoder or a decoder costs far more than these tiny frames do.
TRUTH_FILE = "truth.json"
_WORDS = "words"  # the language of models that are trained from nothing

# Three palettes without a colour in common (dark, pale, vivid), so that no shape disappears into its wall.
WALL_COLOURS: Mapping[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "navy": (10, 20, 100),
    "maroon": (100, 10, 20),
    "forest": (10, 80, 20),
    "chocolate": (95, 55, 15),
    "plum": (95, 20, 95),
    "petrol": (10, 85, 95),
    "slate": (85, 90, 100),
}
FRAME_COLOURS: Mapping[str, tuple[int, int, int]] = {
    "ivory": (250, 245, 225),
    "gold": (225, 180, 40),
    "rose": (245, 160, 180),
    "mint": (150, 245, 180),
    "sky": (140, 200, 250),
    "lilac": (195, 160, 245),
    "rust": (185, 85, 40),
    "ash": (165, 165, 165),
}
SHAPE_COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (235, 25, 25),
    "green": (30, 190, 30),
    "blue": (35, 70, 245),
    "yellow": (245, 235, 25),
    "orange": (250, 140, 10),
    "pink": (250, 80, 200),
    "cyan": (20, 225, 235),
    "white": (255, 255, 255),
}
MARKERS: tuple[str, ...] = tuple(f"{wall}-{frame}" for wall in WALL_COLOURS for frame in FRAME_COLOURS)

_BORDER_PIXELS = 4
_SHAPE_RADIUS_PIXELS = 6.0
_NUISANCE_RADIUS_PIXELS = 2.5
_NUISANCE_RGB = (128, 128, 128)
_STEP_PIXELS = 3.0  # The big shape moves so far between the two frames of its clip.
_DIRECTIONS = np.array([(0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0)])  # (down, right)
_CORNERS = np.array(
    [(7.0, 7.0), (7.0, 24.0), (24.0, 7.0), (24.0, 24.0)]
)  # Of the wall, where the nuisance shape stands.
_NUM_SHAPES = 4


@dataclass(frozen=True, slots=True)
class WorldClip:
    """A clip of the world and the truth about it.

    Args:
        clip: The span of the mp4 file that holds it.
        wall: Wall colour, a key of `WALL_COLOURS`.
        frame: Frame colour, a key of `FRAME_COLOURS`.
        colour: Colour of the big shape, a key of `SHAPE_COLOURS`: the answer.
    """

    clip: Clip
    wall: str
    frame: str
    colour: str

    @property
    def marker(self) -> str:
        """The one word that names the clip, as in `navy-gold`."""
        return f"{self.wall}-{self.frame}"


def write_world(folder: str | Path, num_clips: int, seed: int, language: str = _WORDS) -> list[WorldClip]:
    """Writes `num_clips` clips as mp4 files into `folder`; the truth about them comes last and marks a whole world.

    Args:
        folder: Made if absent; files of the same names are overwritten.
        num_clips: Number of clips, ≥ 1.
        seed: Decides every clip.
        language: Name of the language in which models are asked about it, see `longvpo_hf.miniature.language`.

    Returns:
        The clips, in the order they were drawn.

    Raises:
        ConfigError: If `num_clips` < 1.
    """
    if num_clips < 1:
        raise ConfigError(f"num_clips of a world must be ≥ 1, got {num_clips}.")
    folder = Path(folder)
    make_folder(folder)
    (folder / TRUTH_FILE).unlink(missing_ok=True)
    rng = np.random.default_rng(seed)
    records: list[dict[str, str | float]] = []
    for first in range(0, num_clips, CLIPS_PER_FILE):
        count = min(CLIPS_PER_FILE, num_clips - first)
        walls = rng.integers(0, len(WALL_COLOURS), size=count)
        frames = rng.integers(0, len(FRAME_COLOURS), size=count)
        colours = rng.integers(0, len(SHAPE_COLOURS), size=count)
        file_name = f"{first // CLIPS_PER_FILE:05d}.mp4"
        _encode(_render(walls, frames, colours, rng), folder / file_name)
        records.extend(
            {
                "file_name": file_name,
                "start_seconds": index * CLIP_SECONDS,
                "end_seconds": (index + 1) * CLIP_SECONDS,
                "wall": tuple(WALL_COLOURS)[walls[index]],
                "frame": tuple(FRAME_COLOURS)[frames[index]],
                "colour": tuple(SHAPE_COLOURS)[colours[index]],
            }
            for index in range(count)
        )
    named = {} if language == _WORDS else {"language": language}
    write_text(folder / TRUTH_FILE, json.dumps({"seed": seed, **named, "clips": records}))
    return read_world(folder)


def read_world(folder: str | Path) -> list[WorldClip]:
    """The clips that `write_world` wrote under `folder`.

    Raises:
        DatasetError: If the truth file is absent (not written, or not to the end), is none, or names a missing mp4
            file.
    """
    folder = Path(folder)
    try:
        return _clips(folder, _truth(folder)["clips"])
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DatasetError(f"{folder / TRUTH_FILE} is no truth of a miniature's world ({error}).") from error


def _clips(folder: Path, records: list[dict[str, Any]]) -> list[WorldClip]:
    for file_name in sorted({record["file_name"] for record in records}):
        if not path_inside(folder, file_name).is_file():
            raise DatasetError(
                f"{folder / TRUTH_FILE} names {file_name}, which does not exist. Call write_world again."
            )
    return [
        WorldClip(
            clip=Clip(
                path=str(folder / record["file_name"]),
                start_seconds=record["start_seconds"],
                end_seconds=record["end_seconds"],
                source_id=f"{record['file_name']}#{record['start_seconds']:g}",
            ),
            wall=record["wall"],
            frame=record["frame"],
            colour=record["colour"],
        )
        for record in records
    ]


def language_name(folder: str | Path) -> str:
    """The name of the language that `write_world` was given.

    Raises:
        DatasetError: If the truth file is absent.
    """
    name: str = _truth(Path(folder)).get("language", _WORDS)
    return name


def _truth(folder: Path) -> dict[str, Any]:
    """What the truth file holds."""
    truth = folder / TRUTH_FILE
    if not truth.is_file():
        raise DatasetError(
            f"No {TRUTH_FILE} in {folder}: it is no world of the miniature's, or writing it did not finish. Call "
            "write_world again."
        )
    try:
        content = json.loads(truth.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{truth} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{truth} is no truth of a miniature's world: it must be a JSON object.")
    return content


def _encode(frames: npt.NDArray[np.uint8], path: Path) -> None:
    VideoEncoder(torch.from_numpy(frames), frame_rate=FRAMES_PER_SECOND).to_file(
        path,
        codec="libx264",
        pixel_format="yuv420p",
        crf=18,
        # Every clip starts with a key frame, so that seeking to it decodes nothing before it. One thread: the files are
        # tiny. With x264's lookahead and macroblock tree, some files differed between processes.
        extra_options={"g": FRAMES_PER_CLIP, "bf": 0, "threads": 1, "x264-params": "mbtree=0:rc-lookahead=0"},
    )


def _render(
    walls: npt.NDArray[np.int64],
    frames: npt.NDArray[np.int64],
    colours: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> npt.NDArray[np.uint8]:
    """Draws clips of the given colour indices, nuisance from `rng`: uint8 `[len(walls) * FRAMES_PER_CLIP, 3, H, W]`."""
    count = len(walls)
    centres = FRAME_PIXELS / 2 + rng.uniform(-2.0, 2.0, size=(count, 2))
    steps = _STEP_PIXELS * _DIRECTIONS[rng.integers(0, len(_DIRECTIONS), size=count)]
    corners = _CORNERS[rng.integers(0, len(_CORNERS), size=count)]
    kinds, nuisance_kinds = (rng.integers(0, _NUM_SHAPES, size=count) for _ in range(2))

    images = np.empty((count, FRAMES_PER_CLIP, FRAME_PIXELS, FRAME_PIXELS, 3), dtype=np.uint8)
    images[:] = _palette(FRAME_COLOURS)[frames][:, None, None, None]
    inner = slice(_BORDER_PIXELS, FRAME_PIXELS - _BORDER_PIXELS)
    images[:, :, inner, inner] = _palette(WALL_COLOURS)[walls][:, None, None, None]
    for moment in range(FRAMES_PER_CLIP):
        moved = centres + steps * (moment - (FRAMES_PER_CLIP - 1) / 2)
        images[:, moment][_shape_mask(nuisance_kinds, corners, _NUISANCE_RADIUS_PIXELS)] = _NUISANCE_RGB
        mask = _shape_mask(kinds, moved, _SHAPE_RADIUS_PIXELS)
        images[:, moment][mask] = np.repeat(_palette(SHAPE_COLOURS)[colours], mask.sum(axis=(1, 2)), axis=0)
    return np.ascontiguousarray(images.reshape(-1, FRAME_PIXELS, FRAME_PIXELS, 3).transpose(0, 3, 1, 2))


def _palette(colours: Mapping[str, tuple[int, int, int]]) -> npt.NDArray[np.uint8]:
    return np.array(list(colours.values()), dtype=np.uint8)


def _shape_mask(
    kinds: npt.NDArray[np.int64], centres: npt.NDArray[np.float64], radius_pixels: float
) -> npt.NDArray[np.bool_]:
    """Which pixels the shapes cover, bool `[N, H, W]`: 0 square, 1 disc, 2 diamond, 3 triangle."""
    axis = np.arange(FRAME_PIXELS) + 0.5
    down = axis[None, :, None] - centres[:, 0, None, None]
    right = axis[None, None, :] - centres[:, 1, None, None]
    down, right = np.broadcast_arrays(down, right)
    shapes = np.stack(
        [
            np.maximum(abs(down), abs(right)) <= 0.85 * radius_pixels,
            down**2 + right**2 <= radius_pixels**2,
            abs(down) + abs(right) <= 1.2 * radius_pixels,
            (abs(down) <= 0.9 * radius_pixels) & (abs(right) <= (down + radius_pixels) / 1.8),
        ]
    )
    chosen: npt.NDArray[np.bool_] = shapes[kinds, np.arange(len(kinds))]
    return chosen
