"""Ways to train: full and LoRA, the tower frozen or trained, memory savers, accumulation, evaluation, resuming."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.errors import ConfigError
from longvpo_hf.families import vision
from longvpo_hf.families.vision import bound_frozen_forward, vision_tower
from longvpo_hf.preference import VideoPreference
from longvpo_hf.training.packing import enable_tree_packing, plain_forward, tree_forward, unwrapped

LORA = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", lora_dropout=0.0)


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def changed(trainer: Any) -> set[str]:
    """Weights that training moved."""
    before = weights(trainer)
    trainer.train()
    return {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}


def test_full_training_moves_tower_connector_and_text_model(tmp_path: Path, dataset: Dataset) -> None:
    moved = changed(trainers.make(tmp_path, dataset))
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        assert any(part in name for name in moved), part


def test_lora_moves_its_adapters_alone(tmp_path: Path, dataset: Dataset) -> None:
    trainer = trainers.make(tmp_path, dataset, peft_config=LORA)
    moved = changed(trainer)
    assert moved
    assert all("lora_" in name for name in moved)


def test_a_compiled_model_is_trained_alike_and_only_without_trees(tmp_path: Path, dataset: Dataset) -> None:
    """The first step ended in a TypeError: a compiled reference was asked for its truth."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}  # traced, which is what went wrong
    with pytest.raises(ConfigError, match="tree_packing=False"):
        trainers.make(tmp_path, dataset, **compiled)
    losses = []
    for more in ({}, compiled):
        torch._dynamo.reset()
        trainer = trainers.make(tmp_path, dataset, tree_packing=False, **more)
        trainer.train()
        losses.append(trainers.logged(trainer))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_rows_are_seen_in_the_order_that_is_asked_for(tmp_path: Path, dataset: Dataset) -> None:
    """`sequential` was silently shuffled where rows of one timeline are kept together."""
    seen: dict[str, list[int]] = {}
    for strategy in ("random", "sequential"):
        trainer = trainers.make(tmp_path, dataset, pairs_per_timeline=2, train_sampling_strategy=strategy)
        seen[strategy] = list(trainer._get_train_sampler())
    assert seen["sequential"] == list(range(len(dataset)))
    assert sorted(seen["random"]) == seen["sequential"] != seen["random"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "^train_sampling_strategy must be"),
        ({"train_sampling_strategy": "batch_rebalance", "pairs_per_timeline": 1}, "^train_sampling_strategy must be"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        ({"gradient_accumulation_steps": 0}, "^gradient_accumulation_steps must be ≥ 1, got 0"),
        ({"per_device_train_batch_size": 0}, "^per_device_train_batch_size must be ≥ 1, got 0"),
        ({"per_device_eval_batch_size": -1}, "^per_device_eval_batch_size must be ≥ 1, got -1"),
        ({"max_grad_norm": None}, "^max_grad_norm must be a number ≥ 0"),
    ],
)
def test_what_transformers_would_do_otherwise_or_end_in_a_traceback_is_refused(
    tmp_path: Path, dataset: Dataset, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainers.make(tmp_path, dataset, **more)


def _note_tokens(tokens: list[int], _: Any, args: tuple[Tensor, ...]) -> None:
    tokens.append(args[0].shape[-2])


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("internvl", {"gradient_checkpointing": True}),
        ("internvl", {"peft_config": LORA, "reference": "full"}),
        ("glm4v", {"tree_packing": False}),
        ("qwen3_5", {}),
    ],
)
def test_mlps_in_tiles_train_as_whole_ones(tmp_path: Path, dataset: Dataset, family: str, settings: Any) -> None:
    """Logs and weights; 7 tiles divide no number of tokens here."""
    found = {}
    for shards in (1, 7):
        given = copy.deepcopy(settings)
        trainer = trainers.make(tmp_path, dataset, family, max_steps=2, tiled_mlp_num_shards=shards, **given)
        tokens: list[int] = []
        for part in unwrapped(trainer.model).get_decoder().modules():
            if type(part).__name__.endswith("MLP"):
                part.down_proj.register_forward_pre_hook(partial(_note_tokens, tokens))
        trainer.train()
        found[shards] = trainers.logged(trainer), weights(trainer), max(tokens)
    assert found[7][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, weight in found[1][1].items():
        assert torch.allclose(found[7][1][name], weight, atol=2e-6), name
    assert found[7][2] == -(-found[1][2] // 7)


def test_models_of_experts_alone_have_no_mlp_to_tile(tmp_path: Path, dataset: Dataset) -> None:
    with pytest.raises(
        ConfigError, match=r"tiled_mlp_num_shards=2: the text layers of Qwen3VLMoe\w* have no dense MLP"
    ):
        trainers.make(tmp_path, dataset, "qwen3_vl_moe", tiled_mlp_num_shards=2)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_frozen_tower_does_not_move(tmp_path: Path, dataset: Dataset, family: str) -> None:
    trainer = trainers.make(tmp_path, dataset, family, freeze_vision_tower=True)
    tower = {name for name, weight in trainer.model.named_parameters() if not weight.requires_grad}
    assert tower == {n for n, _ in trainer.model.named_parameters() if "vision_tower" in n or "visual." in n}
    moved = changed(trainer)
    assert moved
    assert not moved & tower


# ------------------------------------------------------------------------------- the tower in pieces


@pytest.mark.parametrize("forward", [plain_forward, tree_forward])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_frozen_tower_takes_few_frames_at_a_time_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, preferences: list[VideoPreference], family: str, forward: Any
) -> None:
    from longvpo_hf.training.collator import VideoPreferenceCollator

    make = VideoPreferenceCollator(tiny_models.build(family)[1], 8, fps=None, max_pixels=56 * 56)
    rows = make_dataset(preferences)
    batch = make([rows[i] for i in (0, 1, 2)])
    model = trainers.with_head(family)
    assert enable_tree_packing(model) is None
    tower = vision_tower(model)
    assert tower is not None
    tower.requires_grad_(False)
    sizes: list[int] = []
    tower.register_forward_hook(lambda *_: None)  # hooks still run around the whole
    inner = tower.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        assert not torch.is_grad_enabled() or not bounded
        sizes.append(next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v)).numel())
        return inner(*args, **kwargs)

    bounded = False
    tower.forward = counted
    weight_names = [name for name, weight in model.named_parameters() if weight.requires_grad]

    def run() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        log_probs = forward(model, batch).log_probs
        log_probs.sum().backward()
        return log_probs.detach(), [model.get_parameter(name).grad.clone() for name in weight_names]

    expected, gradients = run()
    whole = sizes[0]
    monkeypatch.setattr(vision, "CHUNK_ELEMENTS", whole // 5)
    bound_frozen_forward(model)
    bound_frozen_forward(model)  # a second trainer changes nothing
    bounded = True
    sizes.clear()
    got, got_gradients = run()
    assert len(sizes) > 4
    assert sum(sizes) == whole
    assert max(sizes) <= whole // 5
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for a, b in zip(got_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # Trained, it runs whole and with graph: the second trainer of one model may want that.
    bounded = False
    tower.requires_grad_(True)
    sizes.clear()
    forward(model, batch).log_probs.sum().backward()
    assert sizes == [whole]
    assert all(weight.grad is not None for name, weight in tower.named_parameters() if "embeddings.patch" in name)
    assert any(weight.grad is not None for weight in tower.parameters())


def test_a_frozen_towers_activations_do_not_grow_with_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trainers.with_head("internvl")
    tower = vision_tower(model)
    assert tower is not None
    tower.requires_grad_(False)
    bound_frozen_forward(model)
    monkeypatch.setattr(vision, "CHUNK_ELEMENTS", 4 * 3 * 56 * 56)
    largest: list[int] = []
    for module in tower.encoder.modules():
        module.register_forward_hook(
            lambda _, __, output: largest.append(output.numel()) if torch.is_tensor(output) else None
        )
    peaks = []
    for frames in (4, 16, 64):
        largest.clear()
        features = tower(pixel_values=torch.zeros(frames, 3, 56, 56)).last_hidden_state
        assert len(features) == frames
        assert not features.requires_grad
        peaks.append(max(largest))
    assert peaks[0] == peaks[1] == peaks[2]


def test_a_copied_model_runs_its_own_tower() -> None:
    model = trainers.with_head("internvl")
    tower = vision_tower(model)
    assert tower is not None
    bound_frozen_forward(model)
    copied = vision_tower(copy.deepcopy(model))
    assert copied is not None
    for weight in copied.parameters():
        weight.data.zero_()
    pixels = torch.ones(2, 3, 56, 56)
    assert copied(pixel_values=pixels).last_hidden_state.abs().sum() == 0
    assert tower(pixel_values=pixels).last_hidden_state.abs().sum() > 0


def test_a_model_without_a_tower_is_named(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longvpo_hf.training.models.vision_tower", lambda model: None)
    with pytest.raises(ValueError, match="no vision tower in InternVLForConditionalGeneration"):
        trainers.make(tmp_path, dataset, freeze_vision_tower=True)


# ----------------------------------------------------------------------------------- memory and numbers


def losses(folder: Path, rows: Dataset, **more: Any) -> list[float]:
    trainer = trainers.make(folder, rows, learning_rate=1e-2, **more)
    trainer.train()
    return trainers.logged(trainer)


@pytest.mark.parametrize(
    "more",
    [{}, {"freeze_vision_tower": True}, {"freeze_vision_tower": True, "peft_config": LORA}],
    ids=["full", "frozen tower", "lora"],
)
def test_checkpointing_changes_no_number(tmp_path: Path, dataset: Dataset, more: dict[str, Any]) -> None:
    expected = losses(tmp_path, dataset, **more)
    assert len(set(expected)) == 2
    kwargs = {"use_reentrant": False}
    checkpointed = losses(tmp_path, dataset, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **more)
    assert checkpointed == pytest.approx(expected, abs=1e-5)


def test_offloaded_activations_change_no_number(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's offloading needs an accelerator; on the CPU a stand-in packs and unpacks what it would."""
    packed: list[int] = []

    def stand_in(model: Any) -> Any:
        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor.numel())
            return tensor.clone()

        return torch.autograd.graph.saved_tensors_hooks(pack, torch.clone)

    expected = losses(tmp_path, dataset)
    if not torch.cuda.is_available():
        monkeypatch.setattr("trl.trainer.dpo_trainer.get_act_offloading_ctx_manager", stand_in)
    assert losses(tmp_path, dataset, activation_offloading=True) == pytest.approx(expected, abs=1e-5)
    assert packed or torch.cuda.is_available()


def test_gradient_checkpointing_is_on_by_default_and_not_reentrant(tmp_path: Path, dataset: Dataset) -> None:
    args = trainers.settings(tmp_path)
    assert type(args)(output_dir=str(tmp_path), use_cpu=True, bf16=False).gradient_checkpointing
    trainer = trainers.make(tmp_path, dataset, gradient_checkpointing=True, max_steps=1)
    trainer.train()
    layer = trainer.model.get_decoder().layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False


def test_half_precision_stays_near(tmp_path: Path, dataset: Dataset) -> None:
    exact = losses(tmp_path, dataset)
    half = losses(tmp_path, dataset, bf16=True)
    assert half != exact
    assert half == pytest.approx(exact, rel=0.05)


def test_the_plain_path_gives_the_same_losses(tmp_path: Path, dataset: Dataset) -> None:
    packed = losses(tmp_path, dataset, pairs_per_timeline=2)
    assert losses(tmp_path, dataset, pairs_per_timeline=2, tree_packing=False) == pytest.approx(packed, abs=1e-5)


def test_a_model_that_cannot_be_packed_takes_the_plain_path_and_says_why(
    tmp_path: Path, dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    def eager() -> Any:
        model = tiny_models.build("internvl")[0]
        model.set_attn_implementation("eager")
        return model

    got = losses(tmp_path, dataset, model=eager(), ref_model=eager())
    assert [r.getMessage() for r in caplog.records if "Tree packing is off" in r.getMessage()] != []
    assert "attends by 'eager'" in caplog.text
    assert got == pytest.approx(losses(tmp_path, dataset), abs=1e-4)


# ------------------------------------------------------------------------------------- steps and epochs


def test_accumulated_batches_equal_the_big_one(tmp_path: Path, dataset: Dataset) -> None:
    runs = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = trainers.make(
            tmp_path,
            dataset,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            pairs_per_timeline=2,
            optim="sgd",
        )
        trainer.train()
        runs.append(trainer)
    big, small = runs
    for name in ("loss", "rewards/margins", "logps_per_token/chosen", "ref_logps_per_token/rejected", "visual_tokens"):
        assert trainers.logged(small, name) == pytest.approx(trainers.logged(big, name), abs=1e-4), name
    for position in ("begin", "middle", "end"):  # shares of unequally many rows in each of the two batches
        for kind in ("chosen", "rejected", "accuracies"):
            name = f"rewards/{kind}/{position}"
            assert trainers.logged(small, name) == pytest.approx(trainers.logged(big, name), abs=1e-4), name
    expected = weights(big)
    for name, weight in weights(small).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path: Path, dataset: Dataset, peft: Any) -> None:
    more = {
        "max_steps": 6,  # an epoch is two: the interruption is within the second
        "per_device_train_batch_size": 4,
        "pairs_per_timeline": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        **({} if peft is None else {"peft_config": peft}),
    }
    whole = trainers.make(tmp_path / "whole", dataset, **more)
    whole.train()
    first = trainers.make(tmp_path / "parted", dataset, save_strategy="steps", save_steps=3, **more)
    first.train()
    checkpoint = tmp_path / "parted" / "run" / "checkpoint-3"
    second = trainers.make(tmp_path / "resumed", dataset, **more)
    second.train(resume_from_checkpoint=str(checkpoint))
    expected = trainers.logged(whole)
    assert len(set(expected)) == 6
    assert trainers.logged(first) == pytest.approx(expected, abs=1e-6)
    assert trainers.logged(second) == pytest.approx(expected, abs=1e-5)


def test_evaluation_reports_the_loss_of_held_out_rows(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    held_out = make_dataset(preferences[4:8])
    trainer = trainers.make(
        tmp_path,
        make_dataset(preferences[:4]),
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
    )
    before = [trainers.loss_of(trainer, held_out.select(range(i, i + 2))).item() for i in (0, 2)]
    dict(trainer._means["train"].take())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(before) / 2, abs=1e-5)
    entry = trainer.state.log_history[-1]
    assert {f"eval_rewards/{kind}/{place}" for kind in ("chosen", "accuracies") for place in ("begin", "middle")} <= {
        *entry
    }
    assert "eval_tokens_per_second" not in entry
    trainer.train()
    assert len(trainers.logged(trainer, "eval_loss")) == 2  # one after each step


def test_logits_of_video_rows_are_refused_clearly(tmp_path: Path, dataset: Dataset) -> None:
    trainer = trainers.make(tmp_path, dataset)
    with pytest.raises(ValueError, match="leave compute_metrics=None, or set prediction_loss_only=True"):
        trainer.predict(dataset.select([0]))


# ------------------------------------------------------------------------------------------ the metrics


def test_rewards_are_reported_by_place_of_the_evidence(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    asked = [preferences[0], preferences[3], preferences[5]]  # anchors at 0, 2 and 0 of three clips
    trainer = trainers.make(tmp_path, make_dataset(asked), per_device_train_batch_size=3, max_steps=1)
    model, processor = tiny_models.build("internvl")
    rewards: dict[str, list[tuple[float, float]]] = {"begin": [], "middle": [], "end": []}
    tokens, policy_sum, reference_sum = 0, 0.0, 0.0
    for row in asked:
        pair = []
        for answer in (row.chosen, row.rejected):
            seen = trainers.answer_log_probs(model, processor, row, row.reference_view, answer)
            shown = trainers.answer_log_probs(model, processor, row, type(row.reference_view).whole(), answer)
            pair.append(0.5 * float(shown.sum() - seen.sum()))
            if answer == row.chosen:
                tokens += len(shown)
                policy_sum += float(shown.sum())
                reference_sum += float(seen.sum())
        rewards[("begin", "middle", "end")[row.evidence[0]]].append((pair[0], pair[1]))
    trainer.train()
    for place, pairs in rewards.items():
        for number, kind in enumerate(("chosen", "rejected")):
            mean = [sum(pair[number] for pair in pairs) / len(pairs)] if pairs else []
            assert trainers.logged(trainer, f"rewards/{kind}/{place}") == pytest.approx(mean, abs=1e-4)
        accuracy = [sum(pair[0] > pair[1] for pair in pairs) / len(pairs)] if pairs else []
        assert trainers.logged(trainer, f"rewards/accuracies/{place}") == pytest.approx(accuracy)
    assert trainers.logged(trainer, "logps_per_token/chosen") == pytest.approx([policy_sum / tokens], abs=1e-5)
    assert trainers.logged(trainer, "ref_logps_per_token/chosen") == pytest.approx([reference_sum / tokens], abs=1e-5)


def test_rows_without_evidence_report_no_place(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    from dataclasses import replace

    rows = make_dataset([replace(row, evidence=(), id="") for row in preferences[:2]])
    trainer = trainers.make(tmp_path, rows, max_steps=1)
    trainer.train()
    assert not any(
        name.endswith(("/begin", "/middle", "/end")) for entry in trainer.state.log_history for name in entry
    )
    assert len(trainers.logged(trainer, "logps_per_token/chosen")) == 1


def test_tokens_per_second_is_what_num_tokens_says(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]

    def clock() -> float:
        now[0] += 2.0
        return now[0]

    trainer = trainers.make(tmp_path, dataset)
    monkeypatch.setattr("longvpo_hf.training.metrics.time.perf_counter", clock)
    trainer.train()
    first, second = trainers.logged(trainer, "num_tokens")
    assert trainers.logged(trainer, "tokens_per_second")[0] == pytest.approx(first / 2)
    assert trainers.logged(trainer, "tokens_per_second")[1] == pytest.approx((second - first) / 2)


# -------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_checkpoints_hold_processor_and_template(tmp_path: Path, dataset: Dataset, peft: Any) -> None:
    more = {} if peft is None else {"peft_config": peft}
    trainer = trainers.make(tmp_path, dataset, save_strategy="steps", save_steps=1, max_steps=1, **more)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "final"):
        processor = AutoProcessor.from_pretrained(folder)
        assert type(processor).__name__ == "InternVLProcessor"
        assert processor.chat_template == trainer.processing_class.chat_template
        assert processor.video_processor is not None
        row = dataset[0]
        ids = [
            type(trainer.data_collator)(p, 6, fps=None, max_pixels=56 * 56)([row])["input_ids"]
            for p in (processor, trainer.processing_class)
        ]
        assert torch.equal(*ids)
        if peft is None:
            model = AutoModelForImageTextToText.from_pretrained(folder)
            for name, weight in model.named_parameters():
                assert torch.equal(weight, trainer.model.get_parameter(name)), name


def test_a_model_is_loaded_by_name_with_its_processor_and_reference(tmp_path: Path, dataset: Dataset) -> None:
    model, processor = tiny_models.build("internvl")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    trainer = trainers.LongVPOTrainer(
        model=str(tmp_path / "base"), args=trainers.settings(tmp_path), train_dataset=dataset
    )
    trainer.train()
    expected = trainers.make(tmp_path, dataset)
    expected.train()
    assert trainers.logged(trainer) == pytest.approx(trainers.logged(expected), abs=1e-6)
