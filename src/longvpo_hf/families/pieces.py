"""How a call of a vision tower is cut into calls of fewer frames, where towers see frames apart from one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def by_frames(tensors: Mapping[Any, Tensor], max_elements: int) -> list[dict[Any, Tensor]] | None:
    """For towers that take frames, [frames, channels, height, width] or [frames, patches, width].

    What else has a row per frame is cut along.
    A `Pieces` function, see `family.py`.
    """
    pixels = pixel_tensor(tensors)
    if pixels is None or pixels.ndim < 3:
        return None
    size = max(1, max_elements * len(pixels) // pixels.numel())
    parted = {name: value.split(size) for name, value in tensors.items() if value.ndim and len(value) == len(pixels)}
    return [dict(zip(parted, values, strict=True)) for values in zip(*parted.values(), strict=True)]


def by_grid(tensors: Mapping[Any, Tensor], max_elements: int) -> list[dict[Any, Tensor]] | None:
    """For towers that take the patches of all frames in a row, [patches, width], and `grid_thw` [grids, 3].

    What else has a row per grid goes with it. A `Pieces` function, see `family.py`. None where a tensor was worked out
    beforehand from the whole.
    """
    pixels, grids = pixel_tensor(tensors), tensors.get("grid_thw")
    if pixels is None or grids is None:
        return None
    others = [name for name, value in tensors.items() if value is not pixels and value is not grids]
    if any(tensors[name].shape[:1] != grids.shape[:1] for name in others):
        return None
    pieces = _grid_pieces(grids.tolist(), max(1, max_elements // pixels.shape[1]))
    parts = pixels.split([sum(time * height * width for _, (time, height, width) in piece) for piece in pieces])
    cut: list[dict[Any, Tensor]] = []
    for piece, part in zip(pieces, parts, strict=True):
        rows = [row for row, _ in piece]
        along = {name: tensors[name][rows] for name in others}
        of_piece = {**along, "grid_thw": grids.new_tensor([grid for _, grid in piece])}
        cut.append({name: part if value is pixels else of_piece[name] for name, value in tensors.items()})
    return cut


def units_of_frames(visual: Mapping[str, Tensor]) -> list[dict[str, Tensor]] | None:
    """For processors that give a row per frame, or one video of a row per frame, [1, frames, channels, height, width].

    A `Units` function, see `family.py`.
    """
    pixels = pixel_tensor(visual)
    axis = 0 if pixels is not None and pixels.ndim == 4 else 1
    if pixels is None or pixels.ndim not in (4, 5) or (axis and len(pixels) > 1):
        return None
    if any(value.shape[: axis + 1] != pixels.shape[: axis + 1] for value in visual.values()):
        return None
    frames = zip(*(value.split(1, dim=axis) for value in visual.values()), strict=True)
    return [dict(zip(visual, frame, strict=True)) for frame in frames]


def units_of_grid(visual: Mapping[str, Tensor]) -> list[dict[str, Tensor]] | None:
    """For processors that give the patches of all frames in a row, [patches, width], and `video_grid_thw` [grids, 3].

    What else has a row per grid goes with each of its units. A `Units` function, see `family.py`.
    """
    pixels, grids = pixel_tensor(visual), visual.get("video_grid_thw")
    if pixels is None or grids is None:
        return None
    others = [name for name, value in visual.items() if value is not pixels and value is not grids]
    if any(visual[name].shape[:1] != grids.shape[:1] for name in others):
        return None
    units = [(row, [1, height, width]) for row, (time, height, width) in enumerate(grids.tolist()) for _ in range(time)]
    parts = pixels.split([height * width for _, (_, height, width) in units])
    cut: list[dict[str, Tensor]] = []
    for (row, grid), part in zip(units, parts, strict=True):
        along = {name: visual[name][row : row + 1] for name in others}
        of_unit = {**along, "video_grid_thw": grids.new_tensor([grid])}
        cut.append({name: part if value is pixels else of_unit[name] for name, value in visual.items()})
    return cut


#: Rows of a grid, [time, height, width] each, with the place of the row they were cut from.
_Piece = list[tuple[int, tuple[int, int, int]]]


def _grid_pieces(grids: Sequence[Sequence[int]], max_patches: int) -> list[_Piece]:
    """Grids cut in time, and joined again, into pieces of at most so many patches or of one unit of frames."""
    pieces: list[_Piece] = []
    free = 0
    for row, (time, height, width) in enumerate(grids):
        while time > 0:
            if not pieces or free < height * width:
                pieces.append([])
                free = max(max_patches, height * width)
            taken = min(time, free // (height * width))
            pieces[-1].append((row, (taken, height, width)))
            free -= taken * height * width
            time -= taken
    return pieces


def pixel_tensor(tensors: Mapping[Any, Tensor]) -> Tensor | None:
    """The pixels among the tensors of a tower's call: the first of floating point; None where there is none."""
    return next((value for value in tensors.values() if value.is_floating_point()), None)
