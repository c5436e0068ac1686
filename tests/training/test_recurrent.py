"""Trees over layers that carry a state: exact in double precision, and wrong at once where a state is lost."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

import tiny_models
from longvpo_hf.training.packing import enable_tree_packing, is_tree_packed, plain_forward, recurrent, tree_forward
from longvpo_hf.training.packing.attention import Forest, Span, visibility

torch.set_num_threads(1)

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DELTA = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def qwen3_next() -> Any:
    config = Qwen3NextConfig(**TEXT, **DELTA, **EXPERTS, head_dim=8, shared_expert_intermediate_size=8)
    return Qwen3NextForCausalLM(config)


def olmo_hybrid() -> Any:
    return OlmoHybridForCausalLM(OlmoHybridConfig(**TEXT, **DELTA))


def kimi_linear() -> Any:
    heads = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = KimiLinearConfig(**TEXT, **EXPERTS, **heads, linear_num_heads=2, linear_head_dim=8, num_shared_experts=1)
    return KimiLinearForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_5": lambda: tiny_models.build("qwen3_5")[0],
    "qwen3_5_moe": lambda: tiny_models.build("qwen3_5_moe")[0],
    "qwen3_next": qwen3_next,
    "olmo_hybrid": olmo_hybrid,
    "kimi_linear": kimi_linear,
}


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    model = tiny_models._remembering(MODELS[name]())
    add_fused_lm_head(model)
    return model.train()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """What models compute in float32, whatever their weights are, is computed in double precision too."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def doubled(model: Any) -> Any:
    model.double()
    if hasattr(model.config.get_text_config(), "num_experts"):
        model.set_experts_implementation("eager")  # the grouped product of matrices takes no doubles
    return model


def text_batch(draw: random.Random) -> dict[str, Any]:
    """Rows of random tokens about one video, which has none: a tree of random lengths, down to one token."""
    questions = draw.randrange(1, 4)
    trunk = [draw.randrange(60) for _ in range(draw.choice([1, 2, 3, 17, 70]))]
    prompts = [[*trunk, *(draw.randrange(60) for _ in range(draw.choice([0, 1, 2, 9])))] for _ in range(questions)]
    answers = [[draw.randrange(60) for _ in range(draw.choice([1, 2, 3, 12]))] for _ in range(2 * questions)]
    rows = [(prompts[number % questions], answer) for number, answer in enumerate(answers)]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)

    def padded(values: list[int]) -> Tensor:
        return F.pad(torch.tensor(values), (0, width - len(values)))

    return {
        "input_ids": torch.stack([padded(prompt + answer) for prompt, answer in rows]),
        "attention_mask": torch.stack([padded([1] * len(prompt + answer)) for prompt, answer in rows]),
        "completion_mask": torch.stack([padded([0] * len(prompt) + [1] * len(answer)) for prompt, answer in rows]),
        "mm_token_type_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "videos": [{}],
        "video_index": torch.zeros(questions, dtype=torch.long),
    }


def separate_forwards(model: Any, batch: dict[str, Any]) -> Tensor:
    """Log-probs [2B, L - 1] by one unpadded sequence after another, with plain calls of the model."""
    found = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        ids = batch["input_ids"][row : row + 1, :length]
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        scores = scores * batch["completion_mask"][row, 1:length]
        found.append(F.pad(scores, (0, batch["input_ids"].shape[1] - length)))
    return torch.stack(found)


def gradients(model: Any, log_probs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, log_probs.numel(), dtype=log_probs.dtype).view_as(log_probs)
    (log_probs * weights).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


# -------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("name", MODELS)
def test_random_trees_equal_separate_sequences_in_double_precision(name: str, double: None) -> None:
    model = doubled(make_model(name))
    assert enable_tree_packing(model) is None
    model.gradient_checkpointing_enable({"use_reentrant": False})
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
            # 1e-13 but for one of these 25: the norm behind a mixer divides by outputs near 0.
            assert float((found[key] - gradient).abs().max()) <= 1e-12 * largest, key


@pytest.mark.parametrize("name", MODELS)
def test_a_path_is_never_taken_for_a_step_of_generation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for one token has no backward pass in flash-linear-attention."""
    model = make_model(name)
    assert enable_tree_packing(model) is None
    module = __import__(type(recurrent.mixers(model)[0]).__module__, fromlist=["_"])
    called = [key for key in vars(module) if "recurrent" in key and key.endswith(("_rule", "_attention"))]
    assert called
    for key in (*called, "causal_conv1d_update"):
        monkeypatch.setattr(module, key, None)
    for seed in range(5):
        tree_forward(model, text_batch(random.Random(seed)))


# --------------------------------------------------------------------------------------- the power of the equality


@pytest.mark.parametrize("lost", ["recurrent", "conv"])
@pytest.mark.parametrize("name", MODELS)
def test_a_lost_state_is_noticed(name: str, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name)
    batch = text_batch(random.Random(2))
    assert enable_tree_packing(model) is None
    of_paths = recurrent.States.of_paths

    def forgetful(states: recurrent.States, count: int) -> recurrent.States:
        setattr(states, lost, None)
        return of_paths(states, count)

    with torch.no_grad():
        expected = plain_forward(model, batch).log_probs
        torch.testing.assert_close(tree_forward(model, batch).log_probs, expected, rtol=0, atol=1e-5)
        monkeypatch.setattr(recurrent.States, "of_paths", forgetful)
        assert float((tree_forward(model, batch).log_probs - expected).abs().max()) > 1e-2
    refused = enable_tree_packing(make_model(name))
    assert refused is not None
    assert "something besides attention mixes its tokens" in refused


def test_every_mixer_that_is_taken_is_tried_here() -> None:
    assert {type(recurrent.mixers(make_model(name))[0]).__name__ for name in MODELS} == recurrent._MIXERS


def test_a_refused_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3_5")
    model.get_decoder().layers[1].mlp.register_forward_hook(lambda _, args, output: output + output.roll(1, dims=1))
    batch = text_batch(random.Random(0))
    with torch.no_grad():
        before = separate_forwards(model, batch)
        assert enable_tree_packing(model) is not None
        assert not is_tree_packed(model)
        assert torch.equal(separate_forwards(model, batch), before)
    assert not any(hasattr(mixer, "_forward_of_sequences") for mixer in recurrent.mixers(model))


# ------------------------------------------------------------------------------------------------ paths, and guards


@pytest.mark.parametrize("seed", range(20))
def test_paths_hold_every_token_behind_all_that_it_sees(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [(row, kind, draw.randrange(4)) for row in range(draw.randrange(1, 4)) for kind in range(3)]
    tokens = [(row, kind) for row, kind, size in sizes for _ in range(size)] or [(0, 0)]
    sees = visibility(torch.tensor([row for row, _ in tokens]), torch.tensor([kind for _, kind in tokens]))
    paths, places = Forest([Span(0, 5, 5 + len(tokens), sees)]).paths(0)
    assert paths.shape[1] >= 2
    assert paths.flatten()[places].tolist() == list(range(len(tokens)))
    for token, place in enumerate(places.tolist()):
        row, column = divmod(place, paths.shape[1])
        assert paths[row, : column + 1].tolist() == sees[token].nonzero()[:, 0].tolist()


def test_a_mixer_with_a_cache_or_padding_refuses_a_tree() -> None:
    model = make_model("qwen3_5")
    assert enable_tree_packing(model) is None
    mixer = recurrent.mixers(model)[0]
    forest = Forest([Span(0, 1, 3, torch.ones(2, 2, dtype=torch.bool).tril())])
    with pytest.raises(RuntimeError, match=r"Qwen3_5GatedDeltaNet .* called with attention_mask"):
        mixer(torch.zeros(1, 3, 32), attention_mask=torch.ones(1, 3), longvpo_tree=forest)
    with pytest.raises(RuntimeError, match=r"states \(1, 2, 32\) for a tree of 3 tokens"):
        mixer(torch.zeros(1, 2, 32), longvpo_tree=forest)


def test_a_copy_of_an_enabled_model_runs_its_own_weights() -> None:
    model = make_model("qwen3_5")
    assert enable_tree_packing(model) is None
    copied = copy.deepcopy(model)
    mixer, other = recurrent.mixers(model)[0], recurrent.mixers(copied)[0]
    with torch.no_grad():
        other.out_proj.weight.zero_()
        tokens = torch.randn(1, 3, 32)
        assert float(other(tokens).abs().max()) == 0
        assert float(mixer(tokens).abs().max()) > 0


@pytest.mark.parametrize("installed", [False, True])
def test_the_log_says_by_what_the_layers_run(
    installed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recurrent, "find_spec", lambda name: installed or None)
    with caplog.at_level(logging.INFO, "longvpo_hf"):
        assert enable_tree_packing(make_model("qwen3_5")) is None
        assert enable_tree_packing(tiny_models.build("internvl")[0]) is None
    (record,) = [record for record in caplog.records if "linear attention" in record.message]
    assert record.message.startswith("2 layers of linear attention run by")
    assert (record.levelno == logging.INFO) == installed
    assert "flash-linear-attention" in record.message
