"""What processes that share one batch tell each other, within autograd; over gloo and nccl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Who holds the next rows, and how many.
Stretch = tuple[int, int]


def gathered(rows: Tensor, stretches: Sequence[Stretch], group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes, in one order; backward, each process's rows get the sum of all gradients.

    Args:
        rows: [own rows, …], this process's, in the order of its stretches.
        stretches: The order of all rows: whose they are, by rank in the group, and how many.
        group: The processes.

    Returns:
        [all rows, …].
    """
    everyone: Tensor = _Gather.apply(rows, tuple(stretches), group)
    return everyone


def summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over processes that all go on to compute the same loss from it.

    Its gradient is multiplied by their number: it is then averaged over all processes, as DDP and FSDP do, to be the
    gradient of the sum.
    """
    total: Tensor = _Sum.apply(values, group)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, stretches: tuple[Stretch, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.stretches, ctx.group = stretches, group
        sizes = _sizes(stretches, dist.get_world_size(group))
        most = max(sizes)
        padding = (0, 0) * (rows.ndim - 1) + (0, most - len(rows))
        everyone = rows.new_empty(len(sizes) * most, *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, F.pad(rows, padding).contiguous(), group=group)
        taken = [rank * most for rank in range(len(sizes))]
        parts = []
        for rank, size in stretches:
            parts.append(everyone[taken[rank] : taken[rank] + size])
            taken[rank] += size
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        number, own = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        sizes = _sizes(ctx.stretches, number)
        parts = gradient.split([size for _, size in ctx.stretches])
        by_rank = [
            part
            for rank in range(number)
            for (whose, _), part in zip(ctx.stretches, parts, strict=True)
            if whose == rank
        ]
        received = gradient.new_empty(number * sizes[own], *gradient.shape[1:])
        dist.all_to_all_single(received, torch.cat(by_rank), [sizes[own]] * number, sizes, group=ctx.group)
        exact = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        return received.view(number, sizes[own], *gradient.shape[1:]).sum(0, dtype=exact).to(gradient.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = dist.get_world_size(group)
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None


def _sizes(stretches: Sequence[Stretch], number: int) -> list[int]:
    """Rows of each process."""
    return [sum(size for rank, size in stretches if rank == wanted) for wanted in range(number)]
