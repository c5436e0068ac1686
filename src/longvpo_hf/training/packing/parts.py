"""Attention over keys that lie in parts, without a mask of all queries and keys.

Each part is attended to on its own, by a kernel that also gives the logarithm of its softmax's denominator, and the
results are weighed by these. Backward, a kernel that is given the whole result and the whole denominator computes its
part of the gradient, since the probabilities are then those of the whole softmax (as in ring attention, arXiv
2310.01889).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_flash_attention

#: Scores that are computed at once where no kernel is used: 16 MiB in float32.
_SCORES = 2**22

#: What a kernel needs besides, for its backward pass.
_State = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Keys that the queries see.

    Args:
        number: Of the tensors of keys and values, which one.
        start: First of its keys.
        stop: Where they end.
        is_causal: Whether query i sees the first i + 1 of them alone; they are then as many as the queries.
        sees: Bool [queries, keys], which query sees which key; None: all of them.
        queries: First and last + 1 of the queries that see the part at all; None: all of them do.
    """

    number: int
    start: int
    stop: int
    is_causal: bool = False
    sees: Tensor | None = None
    queries: tuple[int, int] | None = None


def attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], parts: Sequence[Part], scale: float
) -> Tensor:
    """Softmax attention of all queries over all parts together; each query sees a key at least.

    Args:
        query: [1, heads, queries, width], of one type with keys and values.
        keys: [1, key heads, any number, width] each; heads are a multiple of key heads.
        values: As the keys, of a width of their own.
        parts: What is seen of them.
        scale: Of the scores.

    Returns:
        [1, heads, queries, width of the values].
    """
    attended: Tensor = _InParts.apply(query, tuple(parts), scale, *keys, *values)
    return attended


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, parts: tuple[Part, ...], scale: float, *tensors: Tensor) -> Tensor:
        out: Any = None
        total: Any = None
        states: list[_State] = []
        for part in parts:
            attended, log_sum, state = _Call(query, tensors, part, scale).forward()
            states.append(state)
            if out is None:
                if part.queries is None:
                    out, total = attended, log_sum
                    continue
                out = attended.new_zeros(*query.shape[:3], attended.shape[3], dtype=log_sum.dtype)
                total = log_sum.new_full(query.shape[:3], -torch.inf)
            before, sums = (out, total) if part.queries is None else (_rows(out, part), _rows(total, part))
            both = torch.logaddexp(sums, log_sum)
            merged = (sums - both).exp()[..., None] * before + (log_sum - both).exp()[..., None] * attended
            if part.queries is None:
                out, total = merged, both
            else:
                out = out.to(merged.dtype)
                _rows(out, part).copy_(merged)
                _rows(total, part).copy_(both)
        out = out.to(query.dtype)
        ctx.parts, ctx.scale, ctx.states = parts, scale, states
        ctx.save_for_backward(query, out, total, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, out, total, *tensors = ctx.saved_tensors
        half = len(tensors) // 2
        of_query: Tensor | None = None
        of_tensors: list[Tensor | None] = [None] * len(tensors)
        for part, state in zip(ctx.parts, ctx.states, strict=True):
            found, *of_part = _Call(query, tensors, part, ctx.scale).backward(gradient, out, total, state)
            if of_query is None:
                of_query = found if part.queries is None else torch.zeros_like(query)
            if of_query is not found:
                _rows(of_query, part).add_(found)
            for place, grown in zip((part.number, part.number + half), of_part, strict=True):
                whole = of_tensors[place]
                if whole is None:
                    whole = of_tensors[place] = torch.zeros_like(tensors[place])
                whole[:, :, part.start : part.stop] += grown
        return of_query, None, None, *of_tensors


def _rows(tensor: Tensor, part: Part) -> Tensor:
    """[1, heads, queries, …], of the queries that see the part."""
    return tensor if part.queries is None else tensor[:, :, slice(*part.queries)]


class _Call:
    """Attention to one part, forward and backward: by a kernel where there is one for it.

    Query heads that share a key head become more queries of it, so that keys and values are not copied; only a causal
    part, which is as short as the queries, has them repeated.
    """

    def __init__(self, query: Tensor, tensors: Sequence[Tensor], part: Part, scale: float) -> None:
        half = len(tensors) // 2
        self.query, self.part, self.scale = _rows(query, part), part, scale
        self.key, self.value = (
            tensors[place][:, :, part.start : part.stop] for place in (part.number, part.number + half)
        )
        self.groups = query.shape[1] // self.key.shape[1]
        self.kernel = None if part.sees is not None else _kernel(query, self.value)

    def _of_key_heads(self, tensor: Tensor) -> Tensor:
        """[1, heads, queries, …] as a kernel takes it: [1, key heads, groups · queries, …], unless it is causal."""
        if self.part.is_causal:
            return tensor
        return tensor.reshape(1, self.key.shape[1], -1, *tensor.shape[3:])

    def _repeated(self, tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(self.groups, dim=1) if self.part.is_causal else tensor

    def forward(self) -> tuple[Tensor, Tensor, _State]:
        """The result [1, heads, queries, width of values], the logarithm of its denominator, and a state.

        The logarithm is [1, heads, queries].
        """
        if self.kernel is None:
            return *self._forward_by_products(), ()
        out, log_sum, state = self.kernel.forward(
            self._of_key_heads(self.query),
            self._repeated(self.key),
            self._repeated(self.value),
            self.part.is_causal,
            self.scale,
        )
        return out.reshape(*self.query.shape[:3], -1), log_sum.reshape(self.query.shape[:3]), state

    def backward(self, gradient: Tensor, out: Tensor, total: Tensor, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        """The part's gradients of query, keys and values, given the whole result and its denominator's logarithm."""
        gradient, out, total = (_rows(tensor, self.part) for tensor in (gradient, out, total))
        if self.kernel is None:
            return self._backward_by_products(gradient, out, total)
        of_query, *others = self.kernel.backward(
            *map(self._of_key_heads, (gradient, self.query)),
            self._repeated(self.key),
            self._repeated(self.value),
            *map(self._of_key_heads, (out, total)),
            self.part.is_causal,
            self.scale,
            state,
        )
        if self.part.is_causal:
            others = [other.unflatten(1, (-1, self.groups)).sum(2) for other in others]
        return of_query.reshape(self.query.shape), others[0], others[1]

    # ------------------------------------------------------------------------------ without a kernel, in blocks

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Queries, in at least float32, and their scores: [heads, block, width], [heads, block, keys]."""
        keys = self._whole(self.key)
        number, heads = self.query.shape[2], self.query.shape[1]
        size = max(1, _SCORES // (heads * keys.shape[1]))
        for start in range(0, number, size):
            rows = slice(start, min(start + size, number))
            query = _precise(self.query[0, :, rows])
            scores = (query @ keys.mT).mul_(self.scale)
            sees = self.part.sees[rows] if self.part.sees is not None else None
            if self.part.is_causal:
                places = torch.arange(number, device=query.device)
                sees = places[rows, None] >= places
            yield rows, query, scores if sees is None else scores.masked_fill_(~sees, -torch.inf)
            del query, scores  # before the next block's are made

    def _whole(self, tensor: Tensor) -> Tensor:
        return _precise(tensor[0].repeat_interleave(self.groups, dim=0))

    def _forward_by_products(self) -> tuple[Tensor, Tensor]:
        values = self._whole(self.value)
        out, log_sums = [], []
        for _, _, scores in self._blocks():
            log_sum = scores.logsumexp(-1)
            out.append(scores.sub_(log_sum[..., None]).exp_() @ values)
            log_sums.append(log_sum)
        return torch.cat(out, dim=1)[None], torch.cat(log_sums, dim=1)[None]

    def _backward_by_products(self, gradient: Tensor, out: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self._whole(self.key), self._whole(self.value)
        of_query, of_keys, of_values = [], torch.zeros_like(keys), torch.zeros_like(values)
        for rows, query, scores in self._blocks():
            of_out = _precise(gradient[0, :, rows])
            shares = scores.sub_(total[0, :, rows, None]).exp_()
            of_values += shares.mT @ of_out
            common = (of_out * out[0, :, rows]).sum(-1, keepdim=True)
            of_scores = (of_out @ values.mT).sub_(common).mul_(shares).mul_(self.scale)
            of_query.append(of_scores @ keys)
            of_keys += of_scores.mT @ query
        others = (of.unflatten(0, (-1, self.groups)).sum(1)[None].to(self.key.dtype) for of in (of_keys, of_values))
        return torch.cat(of_query, dim=1)[None].to(self.query.dtype), *others


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ----------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True, slots=True)
class _Kernel:
    """One of torch's kernels: both passes, with the logarithm of the denominator."""

    forward: Callable[..., tuple[Tensor, Tensor, _State]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Any:
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return *call(query, key, value, 0.0, is_causal, scale=scale), ()


def _cpu_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    is_causal: bool,
    scale: float,
    state: _State,
) -> Any:
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return call(gradient, query, key, value, out, total, 0.0, is_causal, scale=scale)


def _cuda_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Any:
    call = torch.ops.aten._scaled_dot_product_flash_attention
    out, log_sum, *state, _ = call(query, key, value, 0.0, is_causal, False, scale=scale)
    return out, log_sum, tuple(state)


def _cuda_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    is_causal: bool,
    scale: float,
    state: _State,
) -> Any:
    call = torch.ops.aten._scaled_dot_product_flash_attention_backward
    of_queries, of_keys, most_queries, most_keys, *random = state
    sizes = (of_queries, of_keys, most_queries, most_keys)
    return call(gradient, query, key, value, out, total, *sizes, 0.0, is_causal, *random, scale=scale)


_CPU, _CUDA = _Kernel(_cpu_forward, _cpu_backward), _Kernel(_cuda_forward, _cuda_backward)


def _kernel(query: Tensor, value: Tensor) -> _Kernel | None:
    """The kernel for such queries and values, or None."""
    if query.shape[3] != value.shape[3]:
        return None
    if query.device.type == "cpu":
        return _CPU
    is_flash = query.is_cuda and can_use_flash_attention(SDPAParams(query, query, query, None, 0.0, False, False))
    return _CUDA if is_flash else None
