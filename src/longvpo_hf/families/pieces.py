"""How a call of a vision tower is cut into calls of fewer frames, where towers see frames apart from one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def by_frames(tensors: Mapping[Any, Tensor], max_elements: int) -> list[dict[Any, Tensor]] | None:
    """For towers that take frames [frames, channels, height, width]; what else has a row per frame is cut along.

    A `Pieces` function, see `family.py`.
    """
    pixels = pixel_tensor(tensors)
    if pixels is None or pixels.ndim != 4:
        return None
    size = max(1, max_elements * len(pixels) // pixels.numel())
    parted = {name: value.split(size) for name, value in tensors.items() if value.ndim and len(value) == len(pixels)}
    return [dict(zip(parted, values, strict=True)) for values in zip(*parted.values(), strict=True)]


def by_grid(tensors: Mapping[Any, Tensor], max_elements: int) -> list[dict[Any, Tensor]] | None:
    """For towers that take the patches of all frames in a row, [patches, width], and `grid_thw` [videos, 3].

    A `Pieces` function, see `family.py`. None where other tensors were worked out beforehand from the whole.
    """
    pixels = pixel_tensor(tensors)
    if pixels is None or "grid_thw" not in tensors or len(tensors) > 2:
        return None
    grids = [
        (min(frames, time - start), height, width)
        for time, height, width in tensors["grid_thw"].tolist()
        for frames in [max(1, max_elements // (pixels.shape[1] * height * width))]
        for start in range(0, time, frames)
    ]
    parts = pixels.split([time * height * width for time, height, width in grids])
    return [
        {name: part if value is pixels else value.new_tensor([grid]) for name, value in tensors.items()}
        for part, grid in zip(parts, grids, strict=True)
    ]


def pixel_tensor(tensors: Mapping[Any, Tensor]) -> Tensor | None:
    """The pixels among the tensors of a tower's call: the first of floating point; None where there is none."""
    return next((value for value in tensors.values() if value.is_floating_point()), None)
