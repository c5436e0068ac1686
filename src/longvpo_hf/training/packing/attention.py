"""Attention along packed trees, registered with transformers' `AttentionInterface`.

Calls without a tree (generation, plain batches) stay ordinary SDPA. Within a sliding window a token sees what is less
than so many tokens before it on its own path, through the trunk. No mask of a tree is a square of its tokens: the trunk
runs in blocks, branches attend to their trunk and to one another in parts, and `planted` keeps transformers from making
one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from longvpo_hf.training.packing.parts import Part, attend

if TYPE_CHECKING:
    from longvpo_hf.training.packing.sharing import Share

ATTENTION = "longvpo_tree"
"""Name of the attention function, and of the model kwarg that hands it the trees."""

_UNSUPPORTED_KWARGS = ("softcap", "position_bias", "s_aux")
_BLOCK = 1024  # queries that attend at once within a sliding window
_SQUARE = 64  # tokens of rows whose squares are computed as one: each costs some 150 operations, however small
_BIAS_ALIGNMENT = 16  # CUDA's memory-efficient kernel copies a bias whose rows are not aligned, in every layer


@dataclass(frozen=True, slots=True)
class Span:
    """One tree in the packed row: trunk [start, branches), branches [branches, end)."""

    start: int
    branches: int
    end: int
    sees: Tensor
    """Bool [n, n] among the n = end - branches branch tokens: row sees column."""
    rows: tuple[int, ...] = ()
    """How many branch tokens each row has, in their order; none sees those of another row. (): not told apart."""

    def seen_trunk(self, window: int | None) -> int:
        """How many of the trunk's last tokens some branch token sees."""
        trunk = self.branches - self.start
        return trunk if window is None else min(trunk, window - 1)


class Forest:
    """The trees of one packed row, as text layers need them, and how many layers followed them.

    Not a dataclass, on purpose: FSDP copies dataclasses among the kwargs, and the copy would do the counting.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.calls = 0
        self.windowed_calls = 0
        self._biases: dict[tuple[int, torch.dtype, int, int | None], Tensor] = {}
        self._bands: dict[tuple[torch.dtype, int, int, int], Tensor] = {}
        self._paths: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def tokens(self) -> int:
        """How many tokens the row has."""
        return self.spans[-1].end

    def bias(self, number: int, dtype: torch.dtype, groups: int, window: int | None = None) -> Tensor:
        """What is added to the scores of tree `number`, 0 or -inf: [groups * branch tokens, trunk + branch tokens].

        Made once and kept, so that all layers save the same tensor for the backward pass.

        Args:
            window: How many tokens of its path a token sees, itself among them; None: all. Of the trunk only those
                that some branch token can see have a column.
        """
        key = (number, dtype, groups, window)
        if key not in self._biases:
            span = self.spans[number]
            trunk = span.seen_trunk(window)
            hidden = torch.cat([torch.zeros(len(span.sees), trunk, device=span.sees.device).bool(), ~span.sees], dim=1)
            if window is not None:
                depths = span.sees.sum(1) - 1
                columns = torch.cat([torch.arange(-trunk, 0, device=depths.device), depths])
                hidden |= depths[:, None] - columns >= window
            self._biases[key] = _bias(hidden, dtype, groups)
        return self._biases[key]

    def band(self, dtype: torch.dtype, groups: int, window: int, block: int, device: torch.device) -> Tensor:
        """What is added to the scores of a block of the trunk and the `window` tokens before it, 0 or -inf.

        Made once and kept: [groups * block, window + block].
        """
        key = (dtype, groups, window, block)
        if key not in self._bands:
            rows, columns = torch.arange(block, device=device)[:, None], torch.arange(window + block, device=device)
            self._bands[key] = _bias((columns <= rows) | (columns > rows + window), dtype, groups)
        return self._bands[key]

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


def _bias(hidden: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """-inf where hidden, else 0, for each of the groups: [groups * rows, columns], with aligned rows."""
    rows, columns = hidden.shape
    aligned = -(-columns // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
    bias = torch.zeros(rows, aligned, dtype=dtype, device=hidden.device)
    bias[:, :columns].masked_fill_(hidden, float("-inf"))
    return bias.repeat(groups, 1)[:, :columns]


def visibility(question: Tensor, answer: Tensor) -> Tensor:
    """Which branch token sees which: itself, and what comes before it in its own question and answer.

    Args:
        question: Int [n], the row whose branch a token belongs to.
        answer: Int [n], 0 in the rest of the question, 1 in the chosen, 2 in the rejected and 3 in the sampled answer.

    Returns:
        Bool [n, n], row sees column.
    """
    place = torch.arange(len(question), device=question.device)
    before = place[:, None] >= place
    own_answer = (answer == 0) | (answer[:, None] == answer)
    return before & (question[:, None] == question) & own_answer


def row_parts(sees: Tensor, rows: Sequence[int], number: int, start: int) -> list[Part]:
    """What branch tokens see of one another, as parts of the keys: squares of one row, or of several short ones.

    Args:
        sees: Bool [n, n], row sees column.
        rows: Branch tokens of each row.
        number: Of the tensors of keys that holds theirs.
        start: Their first place there.
    """
    stops = list(accumulate(rows or (len(sees),)))
    first, parts = 0, []
    for stop, following in zip(stops, [*stops[1:], math.inf], strict=True):
        if following - first > _SQUARE:
            queries = None if stop - first == len(sees) else (first, stop)
            square = sees[first:stop, first:stop]
            parts.append(Part(number, start + first, start + stop, sees=square, queries=queries))
            first = stop
    return parts


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    longvpo_tree: Forest | Share | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends along the trees; ordinary SDPA without any.

    Args:
        query: [1, heads, tokens, width]; `key` and `value` have their own, fewer, heads.
        longvpo_tree: The trees, or one process's share of them.
        sliding_window: How many tokens of its path a token sees, itself among them; None: all.

    Returns:
        [1, tokens, heads, width] and None, as the `AttentionInterface` has it.

    Raises:
        RuntimeError: If the layer asks for something that trees do not support.
    """
    if longvpo_tree is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    _check_call(module, query, key, attention_mask, longvpo_tree, kwargs)
    longvpo_tree.calls += 1
    longvpo_tree.windowed_calls += sliding_window is not None

    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if not isinstance(longvpo_tree, Forest):
        refused = {"dropout": dropout, "sliding_window": sliding_window}
        if any(refused.values()):
            raise RuntimeError(f"A timeline that several processes share cannot be attended to with {refused}.")
        return longvpo_tree.attend(query, key, value, scale), None
    pieces = []
    for number, span in enumerate(longvpo_tree.spans):
        own = [tensor[:, :, span.start : span.end] for tensor in (query, key, value)]
        trunk = span.branches - span.start
        if trunk:
            of_trunk = [tensor[:, :, :trunk] for tensor in own]
            pieces += _along_trunk(module, of_trunk, dropout, scale, sliding_window, longvpo_tree)
        if dropout or sliding_window is not None:
            pieces.append(_biased_branches(own, dropout, scale, sliding_window, longvpo_tree, number))
        else:
            parts = [Part(0, 0, trunk)] if trunk else []
            parts += row_parts(span.sees, span.rows, 0, trunk)
            pieces.append(attend(own[0][:, :, trunk:], own[1:2], own[2:], parts, scale).transpose(1, 2))
    return torch.cat(pieces, dim=1), None


def _along_trunk(
    module: torch.nn.Module,
    of_trunk: Sequence[Tensor],
    dropout: float,
    scale: float,
    window: int | None,
    forest: Forest,
) -> list[Tensor]:
    """The tokens of a trunk, causally: [1, tokens, heads, width] of those before the window's width, and behind it.

    Args:
        of_trunk: Query, key and value of its tokens.
    """
    query, key, value = of_trunk
    first = slice(0, query.shape[2] if window is None else window)
    causal = (tensor[:, :, first] for tensor in of_trunk)
    pieces = [sdpa_attention_forward(module, *causal, None, dropout=dropout, scaling=scale, is_causal=True)[0]]
    if window is not None and window < query.shape[2]:
        attend_masked = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scale)
        pieces.append(_behind_window(query, key, value, window, query.dtype, forest, attend_masked))
    return pieces


def _biased_branches(
    of_tree: Sequence[Tensor],
    dropout: float,
    scale: float,
    window: int | None,
    forest: Forest,
    number: int,
) -> Tensor:
    """The branches of one tree under a sliding window or dropout, by a bias: [1, branch tokens, heads, width].

    Args:
        of_tree: Query, key and value of its tokens.
        number: Of the tree.
    """
    query, key, value = of_tree
    span, heads, groups = forest.spans[number], query.shape[1], query.shape[1] // key.shape[1]
    trunk = span.branches - span.start
    # The query heads that share a key head become more query rows of it: keys and values are never copied.
    branches = query[:, :, trunk:].reshape(1, key.shape[1], -1, query.shape[3])
    seen = slice(trunk - span.seen_trunk(window), None)
    bias = forest.bias(number, query.dtype, groups, window)
    attended = F.scaled_dot_product_attention(
        branches, key[:, :, seen], value[:, :, seen], attn_mask=bias, dropout_p=dropout, scale=scale
    )
    return attended.reshape(1, heads, span.end - span.branches, -1).transpose(1, 2)


def _behind_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    dtype: torch.dtype,
    forest: Forest,
    attend: Callable[..., Tensor],
) -> Tensor:
    """The trunk's tokens from `window` on, in blocks that see the `window` tokens before them and themselves.

    Args:
        query: [1, heads, trunk, width].

    Returns:
        [1, trunk - window, heads, width].
    """
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    tokens = query.shape[2] - window
    block = min(_BLOCK, tokens)
    padding = (0, 0, 0, -tokens % block)
    blocks = F.pad(query[:, :, window:], padding).unflatten(2, (-1, block))  # [1, heads, blocks, block, width]
    number = blocks.shape[2]
    # [blocks, key heads, groups * block, width]: query heads that share a key head are more query rows of it
    rows = blocks.unflatten(1, (-1, groups)).permute(0, 3, 1, 2, 4, 5)[0].flatten(2, 3)
    columns = (
        F.pad(tensor, padding).unfold(2, window + block, block)[0].permute(1, 0, 3, 2) for tensor in (key, value)
    )
    band = forest.band(dtype, groups, window, block, query.device)
    attended = attend(rows, *columns, attn_mask=band)  # [blocks, key heads, groups * block, width]
    attended = attended.reshape(number, heads, block, -1).transpose(1, 2).flatten(0, 1)
    return attended[None, :tokens]


@contextmanager
def planted() -> Iterator[None]:
    """Within, transformers makes no masks for sliding windows: the calls of the model have a tree."""
    token = _is_planted.set(True)
    try:
        yield
    finally:
        _is_planted.reset(token)


_is_planted: ContextVar[bool] = ContextVar("longvpo_planted", default=False)


def _mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """transformers' mask for SDPA; None for the sliding window of a tree, once it is known to be nothing else.

    Raises:
        RuntimeError: If tokens see what is after them, or not all of what the window holds.
    """
    if local_size is None or not _is_planted.get():
        mask: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, *args, local_size=local_size, **kwargs)
        return mask
    function, device, is_custom = kwargs["mask_function"], kwargs.get("device", "cpu"), kwargs.get("use_vmap", False)
    places = torch.arange(kv_length, device=device)
    zero, last = places[:1], places[-1:]
    if is_custom or not (
        torch.equal(function(zero, zero, last, places), last - places < local_size)
        and bool(function(zero, zero, places[1:], places[:-1]).all())
        and not bool(function(zero, zero, places[:-1], places[1:]).any())
    ):
        raise RuntimeError(
            f"The model's mask is more than a causal window of {local_size} tokens, which trees do not support. Train "
            f"this model without tree packing (tree_packing=False)."
        )
    return None


def _check_call(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    forest: Forest | Share,
    kwargs: dict[str, Any],
) -> None:
    refused = [f"{kwarg}={kwargs[kwarg]}" for kwarg in _UNSUPPORTED_KWARGS if kwargs.get(kwarg) is not None]
    if mask is not None:
        refused.append(f"a mask of shape {tuple(mask.shape)}")
    tokens = forest.tokens
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        refused.append(f"queries {tuple(query.shape)} and keys {tuple(key.shape)} for a tree of {tokens} tokens")
    if refused:
        raise RuntimeError(
            f"Tree attention cannot serve {type(module).__name__}: it was called with {', '.join(refused)}. Train this "
            f"model without tree packing (tree_packing=False)."
        )


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, _mask)
