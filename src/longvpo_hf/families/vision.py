"""A frozen vision tower runs without a graph and takes a bounded number of frames at a time.

As long as none of its weights is trained, a long video then goes through the tower in pieces, and the tower's memory
does not grow with the video (its outputs do).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import ModelOutput

from longvpo_hf.families import family_of
from longvpo_hf.families.pieces import pixel_tensor

#: Most elements of the pixel tensor that go through a frozen tower at once: 16 frames of InternVL's 448 × 448 tile,
#: which are 16,400 tokens of its tower and keep any device busy.
CHUNK_ELEMENTS = 16 * 3 * 448 * 448


def vision_tower(model: Any) -> nn.Module | None:
    """The vision tower of a transformers model, or of the PEFT model around one; None where transformers finds none."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    tower = base.get_encoder(modality="video")
    return None if tower is base or tower is base.base_model else tower


def bound_frozen_forward(model: Any) -> None:
    """While no weight of the model's vision tower is trained, its forward makes no graph and takes few frames at once.

    Models of a family that does not say how its tower's calls are cut keep the one call, without a graph.
    """
    tower: Any = vision_tower(model)
    if tower is not None and not hasattr(tower, "_forward_of_all_frames"):
        # Bound methods: a copy of the model gets its own, where a closure would run the first one's weights.
        tower._forward_of_all_frames = tower.forward
        tower._cut_into_pieces = family_of(model.config).pieces
        tower.forward = MethodType(_bounded_forward, tower)


def _bounded_forward(tower: Any, *args: Any, **kwargs: Any) -> Any:
    if any(weight.requires_grad for weight in tower.parameters()):
        return tower._forward_of_all_frames(*args, **kwargs)
    with torch.no_grad():
        return _join([tower._forward_of_all_frames(*a, **k) for a, k in _calls(tower, args, kwargs)])


def _calls(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each piece's call; of one call where the frames are few or cannot be told apart."""
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    pixels, cut = pixel_tensor(tensors), tower._cut_into_pieces
    is_large = pixels is not None and pixels.numel() > CHUNK_ELEMENTS
    pieces = cut(tensors, CHUNK_ELEMENTS) if cut is not None and is_large else None
    if pieces is None:
        return [(args, kwargs)]
    return [
        (
            tuple(piece.get(place, value) for place, value in enumerate(args)),
            {name: piece.get(name, value) for name, value in kwargs.items()},
        )
        for piece in pieces
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
