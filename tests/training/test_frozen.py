"""Frozen is frozen, and checkpointing is what was asked for: no reference pass, evaluation or checkpoint undoes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.families.vision import vision_tower
from longvpo_hf.preference import VideoPreference


def everywhere() -> LoraConfig:
    """Made anew for each model: peft replaces "all-linear" by the names of that model's layers."""
    return LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0)


def frozen(folder: Path, rows: Any, **more: Any) -> Any:
    """A trainer with adapters in every linear layer, the tower's among them, and the tower frozen."""
    more = {"peft_config": everywhere(), "freeze_vision_tower": True, "learning_rate": 1e-2, **more}
    return trainers.make(folder, rows, **more)


def assert_tower_is_frozen(trainer: Any) -> None:
    tower = vision_tower(trainer.accelerator.unwrap_model(trainer.model))
    assert tower is not None
    adapters = [weight for name, weight in tower.named_parameters() if "lora_B" in name]
    assert adapters
    assert all(weight.abs().max() == 0 for weight in adapters)
    assert not any(weight.requires_grad for weight in tower.parameters())


@pytest.mark.parametrize("tree_packing", [True, False], ids=["trees", "plain"])
@pytest.mark.parametrize("how", ["live", "precomputed", "evaluated before"])
def test_adapters_in_a_frozen_tower_stay_as_they_were(
    tmp_path: Path, preferences: list[VideoPreference], how: str, tree_packing: bool
) -> None:
    rows = make_dataset(preferences[:4])
    explicit = frozen(tmp_path, rows, ref_model=tiny_models.build("internvl")[0], tree_packing=tree_packing)
    explicit.train()
    trainer = frozen(
        tmp_path, rows, eval_dataset=rows, precompute_ref_log_probs=how == "precomputed", tree_packing=tree_packing
    )
    if how == "evaluated before":
        trainer.evaluate()
    assert_tower_is_frozen(trainer)
    trainer.train()
    assert_tower_is_frozen(trainer)
    assert trainers.logged(trainer, "grad_norm") == pytest.approx(trainers.logged(explicit, "grad_norm"), rel=1e-4)
    assert trainers.logged(trainer) == pytest.approx(trainers.logged(explicit), abs=1e-5)
    trained = [name for name, weight in trainer.model.named_parameters() if "lora_B" in name and weight.abs().max() > 0]
    assert trained


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_towers_of_all_families_stay_frozen(
    tmp_path: Path, preferences: list[VideoPreference], family: str
) -> None:
    trainer = frozen(tmp_path, make_dataset(preferences[:4]), family=family, max_steps=1)
    trainer.train()
    assert_tower_is_frozen(trainer)


def test_an_adapter_trained_further_keeps_its_tower_and_its_reference_frozen(
    tmp_path: Path, preferences: list[VideoPreference]
) -> None:
    """TRL scores the reference with a second adapter, "ref", that it activates and deactivates at every batch."""
    model = get_peft_model(tiny_models.build("internvl")[0], everywhere())
    trainer = trainers.make(
        tmp_path, make_dataset(preferences[:4]), model=model, freeze_vision_tower=True, learning_rate=1e-2
    )
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters() if ".ref." in name}
    assert before
    trainer.train()
    assert_tower_is_frozen(trainer)
    assert all(torch.equal(trainer.model.get_parameter(name), weight) for name, weight in before.items())


def test_a_resumed_run_keeps_the_tower_frozen(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:4])
    whole = frozen(tmp_path / "whole", rows, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = frozen(tmp_path / "resumed", rows, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-2"))
    assert_tower_is_frozen(resumed)
    assert trainers.logged(resumed) == pytest.approx(trainers.logged(whole), abs=1e-5)


def test_what_a_user_froze_stays_frozen(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:4])
    trainer = trainers.make(tmp_path, rows, eval_dataset=rows, peft_config=everywhere(), learning_rate=1e-2)
    own = [weight for name, weight in trainer.model.named_parameters() if "lora_" in name and ".layers.0." in name]
    for weight in own:
        weight.requires_grad_(False)
    before = [weight.clone() for weight in own]
    trainer.evaluate()
    trainer.train()
    assert not any(weight.requires_grad for weight in own)
    assert all(torch.equal(weight, was) for weight, was in zip(own, before, strict=True))


def test_a_frozen_tower_of_the_trainers_runs_without_a_graph(
    tmp_path: Path, preferences: list[VideoPreference]
) -> None:
    trainer = trainers.make(tmp_path, make_dataset(preferences[:2]), freeze_vision_tower=True)
    tower = vision_tower(trainer.model)
    assert tower is not None
    with_graph: list[bool] = []
    tower.encoder.register_forward_hook(lambda *_: with_graph.append(torch.is_grad_enabled()))
    trainers.loss_of(trainer, make_dataset(preferences[:2]))
    assert with_graph == [False]  # the reference has a tower of its own


def checkpointed_layers(trainer: Any) -> list[bool]:
    """Of the text model; of every second layer the first is the tower's only one."""
    return [layer.gradient_checkpointing for layer in trainer.model.get_decoder().layers]


def test_checkpointing_stays_as_it_was_asked_for(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    """`every_n_layers` keeps its meaning after a reference pass, and no hook is added by one."""
    rows = make_dataset(preferences[:4])
    kwargs = {"every_n_layers": 2, "use_reentrant": False}
    trainer = trainers.make(
        tmp_path,
        rows,
        eval_dataset=rows,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kwargs,
        peft_config=everywhere(),
    )
    hooks: list[int] = []
    embeddings = trainer.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda *_: hooks.append(len(embeddings._forward_hooks)))
    trainer.train()
    trainer.evaluate()
    assert checkpointed_layers(trainer) == [False, True]
    assert len(set(hooks)) == 1
    expected = trainers.make(tmp_path, rows, peft_config=everywhere())
    expected.train()
    assert trainers.logged(trainer) == pytest.approx(trainers.logged(expected), abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"peft_config": everywhere()}], ids=["full", "lora"])
def test_a_reference_pass_changes_nothing_of_text_rows_either(tmp_path: Path, more: dict[str, Any]) -> None:
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Question {i}?"}],
                "chosen": [{"role": "assistant", "content": "red"}],
                "rejected": [{"role": "assistant", "content": "green, or so"}],
            }
            for i in range(4)
        ]
    )
    trainer = trainers.make(
        tmp_path,
        rows,
        freeze_vision_tower=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"every_n_layers": 2, "use_reentrant": False},
        max_length=512,
        eval_dataset=rows,
        **more,
    )
    trainer.evaluate()
    trainer.train()
    tower = vision_tower(trainer.accelerator.unwrap_model(trainer.model))
    assert tower is not None
    assert not any(weight.requires_grad for weight in tower.parameters())
    assert checkpointed_layers(trainer) == [False, True]
