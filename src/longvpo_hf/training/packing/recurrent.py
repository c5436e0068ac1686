"""Layers that carry a state from token to token (linear attention), along packed trees.

The trunk of a tree runs once. Every path from its first branch token to a leaf then starts from the trunk's states: the
recurrent one, and the last tokens before its causal convolution. Tokens that several paths share, those of a question,
are computed on each of them.

The mixer's own forward does both, with `States` in the place of a cache, so nothing of a model is copied here, and the
kernels are the model's own. All of it is one call of the layer: activation checkpointing recomputes it whole.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from longvpo_hf.training.packing.attention import ATTENTION, Forest

logger = logging.getLogger(__name__)

#: Classes of mixers that are known to run along trees; `tests/training/test_recurrent.py` has each of them.
_MIXERS = {
    "KimiLinearDeltaAttention",
    "OlmoHybridGatedDeltaNet",
    "Qwen3NextGatedDeltaNet",
    "Qwen3_5GatedDeltaNet",
    "Qwen3_5MoeGatedDeltaNet",
}
#: Packages of the fast kernels, by the name they are imported under.
_KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}


class States:
    """What a mixer asks of its `cache_params`: the states before and after a call, all of them within autograd.

    transformers' own caches write into their tensors in place, which autograd cannot follow.

    Args:
        conv: The inputs of the convolution before the call, [rows, width, up to its kernel's width - 1].
        recurrent: The recurrent state before the call, [rows, …].
    """

    def __init__(self, conv: Tensor | None = None, recurrent: Tensor | None = None) -> None:
        self.conv = conv
        self.recurrent = recurrent

    def of_paths(self, count: int) -> States:
        """The same states for each of `count` paths."""
        several = [None if s is None else s.expand(count, *s.shape[1:]) for s in (self.conv, self.recurrent)]
        return States(*several)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.recurrent

    def is_recording_past(self, layer_idx: int) -> bool:
        """True: keeps the mixer from its kernel for one token, which has no backward pass."""
        return True

    def update_conv_state(self, inputs: Tensor, layer_idx: int, conv_kernel_size: int) -> Tensor:
        """The inputs with those before them, [rows, width, …]; as many as the kernel reaches back are kept."""
        whole = inputs if self.conv is None else torch.cat([self.conv, inputs], dim=-1)
        self.conv = whole[..., max(whole.shape[-1] - conv_kernel_size + 1, 0) :]
        return whole

    def update_recurrent_state(self, state: Tensor, layer_idx: int) -> Tensor:
        self.recurrent = state
        return state


def mixers(decoder: nn.Module) -> list[Any]:
    """The layers of a text model that carry a state and can run along trees."""
    return [module for module in decoder.modules() if type(module).__name__ in _MIXERS]


def plant(decoder: nn.Module) -> None:
    """From now on the mixers of a text model take trees; their calls without one stay what they are."""
    for mixer in mixers(decoder):
        # Bound methods: a copy of the model gets its own, where a closure would run the first one's weights.
        mixer._forward_of_sequences = mixer.forward
        mixer.forward = MethodType(_forward, mixer)


def uproot(decoder: nn.Module) -> None:
    """Undoes `plant`."""
    for mixer in mixers(decoder):
        mixer.forward = mixer._forward_of_sequences
        del mixer._forward_of_sequences


def log_kernels(decoder: nn.Module) -> None:
    """Says in the log by what the mixers of a text model run."""
    count = len(mixers(decoder))
    missing = [package for module, package in _KERNELS.items() if find_spec(module) is None]
    if count and missing:
        logger.warning(
            f"{count} layers of linear attention run by PyTorch's own operations, which is right and slow: "
            f"{' and '.join(missing)} not installed."
        )
    elif count:
        logger.info(f"{count} layers of linear attention run by the kernels of {' and '.join(_KERNELS.values())}.")


def _forward(mixer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A mixer's forward; along the trees where there are some, [1, tokens, width] to the same shape."""
    forest: Forest | None = kwargs.pop(ATTENTION, None)
    if forest is None:
        whole: Tensor = mixer._forward_of_sequences(hidden_states, *args, **kwargs)
        return whole
    _check_call(mixer, hidden_states, forest, args, kwargs)
    forest.calls += 1
    kwargs = {name: value for name, value in kwargs.items() if name not in ("cache_params", "attention_mask")}
    pieces = []
    for number, span in enumerate(forest.spans):
        states = States()
        if span.branches > span.start:
            trunk = hidden_states[:, span.start : span.branches]
            pieces.append(mixer._forward_of_sequences(trunk, cache_params=states, **kwargs))
        if span.end > span.branches:
            tokens, places = forest.paths(number)
            along = hidden_states[0, span.branches : span.end][tokens]
            mixed = mixer._forward_of_sequences(along, cache_params=states.of_paths(len(tokens)), **kwargs)
            pieces.append(mixed.flatten(0, 1)[places][None])
    return torch.cat(pieces, dim=1)


def _check_call(mixer: Any, tokens: Tensor, forest: Forest, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    refused = [f"{len(args)} unnamed arguments"] if args else []
    refused += [f"{name}" for name in ("cache_params", "attention_mask") if kwargs.get(name) is not None]
    if tokens.shape[:2] != (1, forest.spans[-1].end):
        refused.append(f"states {tuple(tokens.shape)} for a tree of {forest.spans[-1].end} tokens")
    if refused:
        raise RuntimeError(
            f"{type(mixer).__name__} cannot run along a tree: it was called with {', '.join(refused)}. Train this "
            f"model without tree packing (tree_packing=False)."
        )
