"""Mixtures of experts under trees: the load-balancing loss is that of separate sequences, and experts take adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from test_family_contract import ONE_QUESTION, THREE_QUESTIONS, TWO_TIMELINES, Row, make_batch, separate_forwards
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

import tiny_models
import trainers
from longvpo_hf.families import family_of
from longvpo_hf.training.packing import enable_tree_packing, experts, forward, plain_forward, tree_forward

torch.set_num_threads(1)

NAMES = ["glm4v_moe", "qwen3_vl_moe", "qwen3_5_moe"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BATCHES: dict[str, tuple[list[Row], list[int]]] = {
    "one question": (ONE_QUESTION, [5]),
    "three questions": (THREE_QUESTIONS, [4]),
    "two timelines": (TWO_TIMELINES, [2, 5]),
}


def make_model(name: str) -> tuple[Any, Any]:
    model, processor = tiny_models.build(name)
    add_fused_lm_head(model)
    assert enable_tree_packing(model) is None
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train(), processor


def expert_layers(model: Any) -> int:
    """Its layers that have experts; GLM's first ones have none."""
    text = model.config.text_config
    return int(text.num_hidden_layers - getattr(text, "first_k_dense_replace", 0))


def separate_balance(model: Any, batch: dict[str, Any]) -> Tensor:
    """Switch Transformer's loss (equations 4 to 6) over all layers and tokens, one unpadded sequence after another."""
    text = model.config.text_config
    routed = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        video = batch["videos"][batch["video_index"][row % len(batch["video_index"])]]
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        inputs = {name: batch[name][row : row + 1, :length] for name in names}
        logits = model(**inputs, **video, output_router_logits=True).router_logits
        assert [len(layer) for layer in logits] == [length] * expert_layers(model)
        routed += list(logits)
    probabilities = torch.cat(routed).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(text.num_experts_per_tok).indices, 1.0)
    return probabilities.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("calls", ["one call", "a call for each video"])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_the_load_balancing_loss_is_that_of_separate_sequences(
    name: str, rows: str, calls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_model(name)
    batch = make_batch(processor, *BATCHES[rows])
    balance = separate_balance(model, batch)
    expected = gradients(model, balance)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    log_probs = separate_forwards(model, batch)
    if calls != "one call":
        monkeypatch.setattr(forward, "visual_shapes", id)
    for score in (plain_forward, tree_forward):
        output = score(model, batch, output_router_logits=True)
        torch.testing.assert_close(output.aux_loss, balance, rtol=1e-5, atol=0)
        torch.testing.assert_close(output.log_probs, log_probs, rtol=0, atol=1e-5)
        coefficient = model.config.text_config.router_aux_loss_coef
        answers = -log_probs.sum() / batch["completion_mask"].sum()
        torch.testing.assert_close(output.loss, answers + coefficient * balance, rtol=1e-5, atol=0)
        found = gradients(model, output.aux_loss)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert float((found[key] - gradient).abs().max()) <= 1e-5 * largest, key


@pytest.mark.parametrize("wrong", ["each token once", "without the last tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_counted_otherwise_is_noticed(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = make_model(name)
    batch = make_batch(processor, *BATCHES["three questions"])
    with torch.no_grad():
        expected = separate_balance(model, batch)
        if wrong == "each token once":
            balanced = experts.balancing_loss

            def once(base: Any, routing: Any, counts: Any, shares: Any) -> Any:
                return balanced(base, routing, [torch.ones_like(count) for count in counts], shares)

            monkeypatch.setattr(forward, "balancing_loss", once)
        else:
            pack = forward.pack
            monkeypatch.setattr(forward, "pack", lambda *given, with_last_tokens: pack(*given))
        assert abs(tree_forward(model, batch, output_router_logits=True).aux_loss / expected - 1) > 1e-4


def test_a_tree_holds_no_last_tokens_where_nothing_is_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = make_model("qwen3_vl_moe")
    batch = make_batch(processor, *BATCHES["one question"])
    sizes = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        assert tree_forward(model, batch).aux_loss is None
        assert tree_forward(model, batch, output_router_logits=True).aux_loss is not None
        model.config.text_config.output_router_logits = True
        assert tree_forward(model, batch).aux_loss is not None
    assert sizes == [sizes[0], sizes[0] + 2, sizes[0] + 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_the_same_loss_with_and_without_trees(name: str, tmp_path: Path, dataset: Dataset) -> None:
    found = []
    for packed in (True, False):
        more = {"tree_packing": packed, "router_aux_loss_coef": 0.5, "pairs_per_timeline": 2}
        trainer = trainers.make(tmp_path, dataset, name, **more)
        trainer.train()
        found.append((trainers.logged(trainer), trainers.logged(trainer, "aux_loss")))
    (losses, balances), (plain_losses, plain_balances) = found
    assert losses == pytest.approx(plain_losses, abs=1e-4)
    assert balances == pytest.approx(plain_balances, rel=1e-4)
    assert all(balance > 0.5 for balance in balances)


@pytest.mark.parametrize("name", NAMES)
def test_experts_take_adapters_by_their_parameters_names(name: str, tmp_path: Path) -> None:
    """`lora_target_parameters` of the recipes; the adapters train under trees as in the plain way, save and reload."""
    model, processor = make_model(name)
    settings = LoraConfig(
        r=2, target_modules=family_of(name).adapter_layers, target_parameters=EXPERTS, lora_dropout=0.0
    )
    model = get_peft_model(model, settings)
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.1)
    adapted = [key for key, weight in model.named_parameters() if weight.requires_grad and ".experts." in key]
    assert len(adapted) == 2 * len(EXPERTS) * expert_layers(model.get_base_model())
    batch = make_batch(processor, *BATCHES["two timelines"])
    weights = torch.linspace(-1, 1, batch["input_ids"][:, 1:].numel()).view_as(batch["input_ids"][:, 1:])
    expected = gradients(model, (separate_forwards(model, batch) * weights).sum())
    found = gradients(model, (tree_forward(model, batch).log_probs * weights).sum())
    assert set(adapted) <= found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) <= 1e-5 * largest, key
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make_model(name)[0], tmp_path)
    kept = dict(model.named_parameters())
    assert {key for key, _ in reloaded.named_parameters()} == set(kept)
    assert all(torch.equal(weight, kept[key]) for key, weight in reloaded.named_parameters())
    with torch.no_grad():
        once_more = tree_forward(reloaded, batch).log_probs
        torch.testing.assert_close(once_more, tree_forward(model, batch).log_probs, rtol=0, atol=1e-6)
