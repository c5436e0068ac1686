"""A vision tower that is not trained: no graph, and a bounded number of frames at a time.

Takes a model's vision tower; replaces its forward so that, as long as none of its weights is trained, a long video goes
through it in pieces and its memory does not grow with the video (its outputs do). Towers see frames apart from one
another, so the pieces give what the whole gives. Knows nothing of the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import ModelOutput

#: Most elements of the pixel tensor that go through a frozen tower at once: 16 frames of InternVL's 448 × 448 tile,
#: which are 16,400 tokens of its tower and keep any device busy.
CHUNK_ELEMENTS = 16 * 3 * 448 * 448


def vision_tower(model: Any) -> nn.Module | None:
    """The vision tower of a transformers model, or of the PEFT model around one; None where transformers finds none."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    tower = base.get_encoder(modality="video")
    return None if tower is base or tower is base.base_model else tower


def bound_frozen_forward(tower: Any) -> None:
    """From now on, while no weight of `tower` is trained, its forward makes no graph and takes few frames at a time."""
    if not hasattr(tower, "_forward_of_all_frames"):
        # Bound methods: a copy of the model gets its own, where a closure would run the first one's weights.
        tower._forward_of_all_frames = tower.forward
        tower.forward = MethodType(_bounded_forward, tower)


def _bounded_forward(tower: Any, *args: Any, **kwargs: Any) -> Any:
    if any(weight.requires_grad for weight in tower.parameters()):
        return tower._forward_of_all_frames(*args, **kwargs)
    with torch.no_grad():
        return _join([tower._forward_of_all_frames(*a, **k) for a, k in _calls(args, kwargs)])


def _calls(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The call parted by frames, where it is large and its frames can be told apart; else as it is."""
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    pixels = next((value for value in tensors.values() if value.is_floating_point()), None)
    if pixels is None or pixels.numel() <= CHUNK_ELEMENTS:
        return [(args, kwargs)]
    if "grid_thw" in tensors:  # Qwen: [patches, width], the patches of all frames in a row
        if len(tensors) > 2:  # indices that were worked out beforehand
            return [(args, kwargs)]
        grids = [
            (min(frames, time - start), height, width)
            for time, height, width in tensors["grid_thw"].tolist()
            for frames in [max(1, CHUNK_ELEMENTS // (pixels.shape[1] * height * width))]
            for start in range(0, time, frames)
        ]
        pieces = [dict(zip(tensors, pair, strict=True)) for pair in _grid_pieces(tensors, pixels, grids)]
    elif pixels.ndim != 4:
        return [(args, kwargs)]
    else:  # [frames, channels, height, width]; whatever else has a line per frame goes with it
        size = max(1, CHUNK_ELEMENTS * len(pixels) // pixels.numel())
        parted = {
            name: value.split(size) for name, value in tensors.items() if value.ndim and len(value) == len(pixels)
        }
        pieces = [dict(zip(parted, values, strict=True)) for values in zip(*parted.values(), strict=True)]
    return [
        (
            tuple(piece.get(place, value) for place, value in enumerate(args)),
            {name: piece.get(name, value) for name, value in kwargs.items()},
        )
        for piece in pieces
    ]


def _grid_pieces(
    tensors: dict[Any, Tensor], pixels: Tensor, grids: Sequence[tuple[int, int, int]]
) -> list[tuple[Tensor, ...]]:
    """For each of `grids` the tensors of a call about it alone, in the order of `tensors`."""
    parts = pixels.split([time * height * width for time, height, width in grids])
    return [
        tuple(part if value is pixels else value.new_tensor([grid]) for value in tensors.values())
        for part, grid in zip(parts, grids, strict=True)
    ]


def _join(outputs: Sequence[Any]) -> Any:
    """Outputs of pieces as the output of the whole: tensors along their first axis, through all containers."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, ModelOutput):
        return type(first)(**{name: _join([output[name] for output in outputs]) for name in first})
    if isinstance(first, (tuple, list)):
        return type(first)(_join(parts) for parts in zip(*outputs, strict=True))
    return first
