"""Trees over layers that attend within a sliding window: exact, without a mask that is a square of the tree."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_family_contract import TWO_TIMELINES, assert_forwards_agree
from test_recurrent import TEXT, double, doubled, gradients, separate_forwards, text_batch  # noqa: F401  (a fixture)
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
)
from trl.trainer.utils import add_fused_lm_head

import tiny_models
from longvpo_hf.training.packing import attention, enable_tree_packing, is_tree_packed, plain_forward, tree_forward
from longvpo_hf.training.packing.attention import Forest, Span

torch.set_num_threads(1)

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = 5


def qwen2_5_vl() -> Any:
    config = tiny_models.build("qwen2_5_vl")[0].config.to_dict()
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    del config["text_config"]["layer_types"]
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration.config_class(**config))


def mistral() -> Any:
    text = {name: value for name, value in TEXT.items() if name != "layer_types"}
    return MistralForCausalLM(MistralConfig(**text, sliding_window=WINDOW))


def gemma3() -> Any:
    text = {**TEXT, "layer_types": list(KINDS)}
    return Gemma3ForCausalLM(Gemma3TextConfig(**text, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8))


def gemma4(both_ways: str | None = None) -> Any:
    text = {**TEXT, "layer_types": list(KINDS), "num_kv_shared_layers": 1, "use_bidirectional_attention": both_ways}
    heads = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64}
    return Gemma4ForCausalLM(Gemma4TextConfig(**text, **heads, sliding_window=WINDOW))


MODELS: dict[str, Callable[[], Any]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "mistral": mistral,
    "gemma3": gemma3,
    "gemma4": gemma4,
}


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    add_fused_lm_head(model)
    return model.train()


@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize("name", MODELS)
def test_random_trees_equal_separate_sequences_in_double_precision(
    name: str,
    block: int,
    double: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    model = doubled(make_model(name))
    assert enable_tree_packing(model) is None
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for seed in range(5):
        batch = text_batch(random.Random(seed))
        separate = separate_forwards(model, batch)
        expected = gradients(model, separate)
        log_probs = tree_forward(model, batch).log_probs
        assert float((log_probs - separate).abs().max()) <= 1e-13
        found = gradients(model, log_probs)
        assert found.keys() == expected.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for key, gradient in expected.items():
            assert float((found[key] - gradient).abs().max()) <= 1e-13 * largest, key


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_family_with_windows_agrees_on_videos(lora: bool) -> None:
    torch.manual_seed(0)
    processor = tiny_models.build("qwen2_5_vl")[1]
    assert_forwards_agree(qwen2_5_vl(), processor, TWO_TIMELINES, [2, 5], lora)


@pytest.mark.parametrize("seed", range(20))
def test_attention_is_that_of_a_square_mask(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one mask of [tokens, tokens]: depth on a path is the number of tokens seen without a window."""
    draw = random.Random(seed)
    monkeypatch.setattr(attention, "_BLOCK", draw.randrange(1, 9))
    window, trunk, heads, groups = (draw.randrange(low, high) for low, high in ((1, 30), (0, 60), (1, 3), (1, 4)))
    tokens = sorted((draw.randrange(2), draw.randrange(3)) for _ in range(draw.randrange(1, 20)))
    branches = attention.visibility(
        torch.tensor([row for row, _ in tokens]), torch.tensor([kind for _, kind in tokens])
    )
    total = trunk + len(tokens)
    sees = torch.ones(total, total, dtype=torch.bool).tril()
    sees[trunk:, trunk:] = branches
    depth = sees.sum(1)
    sees &= depth[:, None] - depth < window
    torch.manual_seed(seed)
    query = torch.randn(1, heads * groups, total, 4, dtype=torch.float64)
    key, value = torch.randn(2, 1, heads, total, 4, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, enable_gqa=True).transpose(1, 2)
    module = torch.nn.Module()
    module.num_key_value_groups = groups  # type: ignore[assignment]
    forest = Forest([Span(0, trunk, total, branches)])
    found, _ = attention.tree_attention(module, query, key, value, None, longvpo_tree=forest, sliding_window=window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert (forest.calls, forest.windowed_calls) == (1, 1)


def test_no_mask_is_a_square_of_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma3")
    assert enable_tree_packing(model) is None
    batch = text_batch(random.Random(4))
    made: list[tuple[int, ...]] = []
    sdpa = F.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs.get("attn_mask")
        made.append(() if mask is None else tuple(mask.shape))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(
        attention, "sdpa_mask", lambda *_, **given: made.append((9999,)) if given["local_size"] else None
    )
    monkeypatch.setattr(attention, "_BLOCK", 8)
    trunk = 60
    batch = {
        **batch,
        "input_ids": F.pad(batch["input_ids"], (trunk, 0), value=7),
        "attention_mask": F.pad(batch["attention_mask"], (trunk, 0), value=1),
        "completion_mask": F.pad(batch["completion_mask"], (trunk, 0)),
    }
    tree_forward(model, batch)
    assert max(max(shape, default=0) for shape in made if len(shape) < 2) == 0
    small = [shape for shape in made if shape]
    assert small
    assert max(min(shape[-2:]) for shape in small) < trunk


def test_a_lost_window_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("gemma3"), text_batch(random.Random(4))
    assert enable_tree_packing(model) is None
    with torch.no_grad():
        expected = plain_forward(model, batch).log_probs
        torch.testing.assert_close(tree_forward(model, batch).log_probs, expected, rtol=0, atol=1e-5)
        for layer in model.get_decoder().layers:
            layer.self_attn.sliding_window = None
        with pytest.raises(RuntimeError, match=r"0 layers with a sliding window of Gemma3ForCausalLM .* expected 2"):
            tree_forward(model, batch)
        for layer, kind in zip(model.get_decoder().layers, KINDS, strict=True):
            layer.self_attn.sliding_window = WINDOW + 1 if kind == "sliding_attention" else None
        assert float((tree_forward(model, batch).log_probs - expected).abs().max()) > 1e-4


def test_visual_tokens_that_attend_both_ways_are_refused_by_name() -> None:
    model = gemma4(both_ways="vision")
    reason = enable_tree_packing(model)
    assert reason is not None
    assert "use_bidirectional_attention='vision'" in reason
    assert not is_tree_packed(model)


@pytest.mark.parametrize("kind", ["both ways in blocks", "in chunks", "of another width", "of one's own"])
def test_a_mask_that_is_more_than_a_window_is_refused(kind: str) -> None:
    blocks = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3])

    def window(batch: Any, head: Any, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row - column < WINDOW)

    functions: dict[str, Any] = {
        "both ways in blocks": lambda b, h, r, c: window(b, h, r, c) | (blocks[r] == blocks[c]),
        "in chunks": lambda b, h, r, c: (c <= r) & (r // WINDOW == c // WINDOW),
        "of another width": lambda b, h, r, c: (c <= r) & (r - c < WINDOW - 1),
        "of one's own": window,
    }
    given = {"mask_function": functions[kind], "local_size": WINDOW, "use_vmap": kind == "of one's own"}
    with attention.planted():
        assert attention._mask(1, 10, 10, mask_function=window, local_size=WINDOW) is None
        with pytest.raises(RuntimeError, match="more than a causal window of 5 tokens"):
            attention._mask(1, 10, 10, **given)
    assert attention._mask(1, 10, 10, mask_function=window, local_size=WINDOW) is not None
