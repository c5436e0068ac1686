"""Attention in parts: softmax over all keys that a query sees, and its gradients, without a mask of all of them."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longvpo_hf.training.packing import parts as parts_module
from longvpo_hf.training.packing.attention import row_parts, visibility
from longvpo_hf.training.packing.parts import Part, attend


def visible(parts: list[Part], queries: int, widths: list[int]) -> Tensor:
    """Bool [queries, all keys], keys of all tensors one after another: who sees whom."""
    sees = torch.zeros(queries, sum(widths), dtype=torch.bool)
    for part in parts:
        first = sum(widths[: part.number])
        columns = slice(first + part.start, first + part.stop)
        rows = slice(*(part.queries or (0, queries)))
        shape = sees[rows, columns].shape
        own = torch.ones(shape, dtype=torch.bool) if part.sees is None else part.sees
        sees[rows, columns] |= own.tril() if part.is_causal else own
    return sees


def plain(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~sees, -torch.inf)
    return scores.softmax(-1) @ value


def drawn(seed: int) -> tuple[int, list[int], list[Part]]:
    """A trunk's chunk, or branches of several rows: number of queries, of keys in each tensor, and parts."""
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    trunk, queries = draw.randint(1, 40), draw.randint(1, 30)
    before = [Part(0, draw.randint(0, trunk - 1), trunk)] if draw.random() < 0.8 else []
    if draw.random() < 0.3:
        return queries, [trunk + queries], [*before, Part(0, trunk, trunk + queries, is_causal=True)]
    parts, first = before, 0
    while first < queries:
        stop = min(queries, first + draw.randint(1, 12))
        sees = (torch.rand(stop - first, stop - first, generator=noise) < 0.5).tril() | torch.eye(stop - first).bool()
        parts.append(Part(1, first, stop, sees=sees, queries=(first, stop)))
        first = stop
    return queries, [trunk, queries], parts


@pytest.mark.parametrize(("has_kernel", "width"), [(True, 8), (False, 8), (True, 6)])
@pytest.mark.parametrize("seed", range(16))
def test_parts_equal_one_softmax(seed: int, has_kernel: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`width` is that of values; the keys' is 8."""
    if not has_kernel:
        monkeypatch.setattr(parts_module, "_kernel", lambda query, value: None)
        monkeypatch.setattr(parts_module, "_SCORES", 200)  # several blocks of queries
    queries, widths, parts = drawn(seed)
    noise = torch.Generator().manual_seed(seed)

    def random_tensor(heads: int, tokens: int, size: int) -> Tensor:
        return 3 * torch.randn(1, heads, tokens, size, generator=noise, dtype=torch.float64).requires_grad_()

    query = random_tensor(4, queries, 8)
    keys, values = ([random_tensor(2, tokens, size) for tokens in widths] for size in (8, width))
    given = [tensor.detach().requires_grad_() for tensor in (query, *keys, *values)]
    query, keys, values = given[0], given[1 : 1 + len(widths)], given[1 + len(widths) :]
    sees = visible(parts, queries, widths)
    expected = plain(query, torch.cat(keys, 2), torch.cat(values, 2), sees, 0.3)
    found = attend(query, keys, values, parts, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, generator=noise, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), given)
    for got, gradient in zip(
        torch.autograd.grad((found * weights).sum(), given, allow_unused=True), wanted, strict=True
    ):
        torch.testing.assert_close(torch.zeros_like(gradient) if got is None else got, gradient, rtol=0, atol=1e-12)


def test_scores_of_any_size_stay_finite() -> None:
    """The sum of exponentials overflows in float32 beyond 88."""
    query, key = torch.full((1, 1, 2, 8), 5.0), torch.full((1, 1, 6, 8), 5.0)
    value = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 8)
    found = attend(query, [key], [value], [Part(0, 0, 4), Part(0, 4, 6, is_causal=True)], 1.0)
    torch.testing.assert_close(found[0, 0, :, 0], torch.tensor([2.0, 2.5]), rtol=1e-4, atol=0)


def test_half_precision_is_merged_in_float32() -> None:
    """Against float64: as near as one kernel over all keys, a hundredth."""
    noise = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64, 8, generator=noise).bfloat16() for _ in range(3))
    parts = [Part(0, start, start + 4) for start in range(0, 64, 4)]
    found = attend(query, [key], [value], parts, 0.3)
    assert found.dtype == torch.bfloat16
    expected = plain(query.double(), key.double(), value.double(), torch.ones(64, 64).bool(), 0.3)
    assert float((found.double() - expected).abs().max()) < 0.01


@pytest.mark.parametrize("seed", range(40))
def test_short_rows_share_a_square_and_see_nothing_of_one_another(seed: int) -> None:
    """Squares cost what their sides have squared: none is wider than 64 tokens but where one row is."""
    draw = random.Random(seed)
    rows = [draw.choice([1, 7, 30, 33, 64, 65, 200]) for _ in range(draw.randint(1, 12))]
    question = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    answer = torch.cat([torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed)) for size in rows])
    sees = visibility(question, answer)
    parts = row_parts(sees, rows, 1, 5)
    assert torch.equal(visible(parts, len(sees), [0, 5 + len(sees)])[:, 5:], sees)
    widths = [part.stop - part.start for part in parts]
    assert sum(widths) == len(sees)
    assert all(width <= 64 or width in rows for width in widths)
    assert all(sum(pair) > 64 for pair in pairwise(widths))


def test_rows_that_are_not_told_apart_are_one_square() -> None:
    sees = torch.ones(100, 100).tril().bool()
    assert [(part.start, part.stop, part.queries) for part in row_parts(sees, (), 0, 3)] == [(3, 103, None)]
