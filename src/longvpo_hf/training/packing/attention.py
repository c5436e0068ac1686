"""Attention along packed trees, registered with transformers' `AttentionInterface`.

Calls without a tree (generation, plain batches) stay ordinary SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "longvpo_tree"
"""Name of the attention function, and of the model kwarg that hands it the trees."""

_UNSUPPORTED_KWARGS = ("sliding_window", "softcap", "position_bias", "s_aux")
_BIAS_ALIGNMENT = 16  # CUDA's memory-efficient kernel copies a bias whose rows are not aligned, in every layer


@dataclass(frozen=True, slots=True)
class Span:
    """One tree in the packed row: trunk [start, branches), branches [branches, end)."""

    start: int
    branches: int
    end: int
    sees: Tensor
    """Bool [n, n] among the n = end - branches branch tokens: row sees column."""


class Forest:
    """The trees of one packed row, as text layers need them, and how many layers followed them.

    Not a dataclass, on purpose: FSDP copies dataclasses among the kwargs, and the copy would do the counting.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.calls = 0
        self._biases: dict[tuple[int, torch.dtype, int], Tensor] = {}
        self._paths: dict[int, tuple[Tensor, Tensor]] = {}

    def bias(self, number: int, dtype: torch.dtype, groups: int) -> Tensor:
        """What is added to the scores of tree `number`: [groups * branch tokens, tree tokens], 0 or -inf.

        Made once and kept, so that all layers save the same tensor for the backward pass.
        """
        key = (number, dtype, groups)
        if key not in self._biases:
            span = self.spans[number]
            width = span.end - span.start
            aligned = -(-width // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
            bias = torch.zeros(span.end - span.branches, aligned, dtype=dtype, device=span.sees.device)
            bias[:, span.branches - span.start : width].masked_fill_(~span.sees, float("-inf"))
            self._biases[key] = bias.repeat(groups, 1)[:, :width]
        return self._biases[key]

    def paths(self, number: int) -> tuple[Tensor, Tensor]:
        """The branch tokens of tree `number` along every path to a leaf, and where each of them is found there.

        Made once and kept.

        Returns:
            Places among the branch tokens, int [paths, width of the longest, at least 2]: shorter paths go on with
            place 0, and a path of one token would be taken for a step of generation. And for each of the n branch
            tokens its place in the flattened paths, int [n].
        """
        if number not in self._paths:
            sees = self.spans[number].sees
            leaves = (sees.sum(0) == 1).nonzero()[:, 0]  # none but itself sees a leaf
            paths = [sees[leaf].nonzero()[:, 0] for leaf in leaves]
            width = max(2, *map(len, paths))
            tokens = torch.zeros(len(paths), width, dtype=torch.long, device=sees.device)
            places = torch.empty(len(sees), dtype=torch.long, device=sees.device)
            for row, path in enumerate(paths):
                tokens[row, : len(path)] = path
                places[path] = row * width + torch.arange(len(path), device=sees.device)
            self._paths[number] = tokens, places
        return self._paths[number]


def visibility(question: Tensor, answer: Tensor) -> Tensor:
    """Which branch token sees which: itself, and what comes before it in its own question and answer.

    Args:
        question: Int [n], the row whose branch a token belongs to.
        answer: Int [n], 0 in the rest of the question, 1 in the chosen and 2 in the rejected answer.

    Returns:
        Bool [n, n], row sees column.
    """
    place = torch.arange(len(question), device=question.device)
    before = place[:, None] >= place
    own_answer = (answer == 0) | (answer[:, None] == answer)
    return before & (question[:, None] == question) & own_answer


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    longvpo_tree: Forest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends along the trees; ordinary SDPA without any.

    Args:
        query: [1, heads, tokens, width]; `key` and `value` have their own, fewer, heads.

    Returns:
        [1, tokens, heads, width] and None, as the `AttentionInterface` has it.

    Raises:
        RuntimeError: If the layer asks for something that trees do not support.
    """
    if longvpo_tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check_call(module, query, key, attention_mask, longvpo_tree, kwargs)
    longvpo_tree.calls += 1

    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
    groups = heads // kv_heads
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    pieces = []
    for number, span in enumerate(longvpo_tree.spans):
        if span.branches > span.start:
            trunk = slice(span.start, span.branches)
            pieces.append(
                sdpa_attention_forward(
                    module,
                    query[:, :, trunk],
                    key[:, :, trunk],
                    value[:, :, trunk],
                    None,
                    dropout=dropout,
                    scaling=scaling,
                    is_causal=True,
                )[0]
            )
        # The query heads that share a key head become more query rows of it: keys and values are never copied.
        branches = query[:, :, span.branches : span.end].reshape(1, kv_heads, -1, width)
        attended = F.scaled_dot_product_attention(
            branches,
            key[:, :, span.start : span.end],
            value[:, :, span.start : span.end],
            attn_mask=longvpo_tree.bias(number, dtype, groups),
            dropout_p=dropout,
            scale=scaling,
        )
        pieces.append(attended.reshape(1, heads, span.end - span.branches, -1).transpose(1, 2))
    return torch.cat(pieces, dim=1), None


def _check_call(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, forest: Forest, kwargs: dict[str, Any]
) -> None:
    refused = [f"{kwarg}={kwargs[kwarg]}" for kwarg in _UNSUPPORTED_KWARGS if kwargs.get(kwarg) is not None]
    if mask is not None:
        refused.append(f"a mask of shape {tuple(mask.shape)}")
    tokens = forest.spans[-1].end
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        refused.append(f"queries {tuple(query.shape)} and keys {tuple(key.shape)} for a tree of {tokens} tokens")
    if refused:
        raise RuntimeError(
            f"Tree attention cannot serve {type(module).__name__}: it was called with {', '.join(refused)}. Train this "
            f"model without tree packing (tree_packing=False)."
        )


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
