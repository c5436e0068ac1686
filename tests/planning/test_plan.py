"""`longvpo check`: its estimates against real models, real batches and real steps, and sums done by hand."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from trl import ModelConfig

import tiny_models
import trainers
from cli import longvpo
from longvpo_hf import planning
from longvpo_hf.errors import ConfigError
from longvpo_hf.miniature.model import build_model as build_miniature
from longvpo_hf.miniature.model import build_processor
from longvpo_hf.planning import Machine, Plan, Rows, Sharding, make_plan, report
from longvpo_hf.planning import run as run_module
from longvpo_hf.planning.bases import known_bases, starting_point
from longvpo_hf.planning.memory import RESERVE_GIB, activations, frames_that_fit, memory_gib, states
from longvpo_hf.planning.run import Run, build_model
from longvpo_hf.planning.settings import GIB
from longvpo_hf.planning.tokens import CHAT_TOKENS, DeviceBatch, frame_shapes
from longvpo_hf.planning.trace import FlopCounter, _delta_rule_at_once
from longvpo_hf.planning.work import received_gb, tflop
from longvpo_hf.shipped import shipped
from longvpo_hf.training import distillation
from longvpo_hf.training.collator import VideoPreferenceCollator

FAMILIES = list(tiny_models.ALL)
SOURCE_PX = (64, 64)  # of the tests' clips
FRAMES = trainers.NUM_FRAMES


def family(name: str) -> tuple[Any, Any]:
    return tiny_models.build(name)


def model_settings(**more: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path="tiny", dtype="float32", **more)


def plan_of(name: str, folder: Path, rows: Rows | None = None, machine: Machine | None = None, **more: Any) -> Plan:
    """The plan for a tiny model of a family; `more` are the trainer's settings."""
    settings = trainers.settings(folder, **{"per_device_train_batch_size": 1, **more})
    rows = rows or Rows(source_px=SOURCE_PX)
    return make_plan(family(name)[0].config, model_settings(), settings, machine, rows)


#: Answers that are short beside the few tokens of a tiny model's frames, as real answers are beside real frames.
SHORT = Rows(question_tokens=4, chosen_tokens=8, rejected_tokens=8, source_px=SOURCE_PX)


def run_of(name: str, folder: Path, machine: Machine | None = None, rows: Rows | None = None, **more: Any) -> Run:
    """The run behind a plan, to be asked in part."""
    settings = trainers.settings(folder, **{"per_device_train_batch_size": 1, **more})
    config = family(name)[0].config
    return Run(config, model_settings(), settings, machine or Machine(), rows or Rows(source_px=SOURCE_PX))


# ------------------------------------------------------------------------------------------------- counted exactly


def test_known_base_models_have_the_parameters_their_pages_state() -> None:
    for name, model in known_bases().items():
        config = planning.find_model_config(f"some-org/{name.lower()}-Instruct-hf")
        built = build_model(config, model_settings(), _no_training(), Machine())
        total = sum(weight.numel() for weight in built.parameters()) / 1e9
        tolerance = 0.003 if name.startswith("LLaVA") else 1e-12  # of LLaVA-Video no exact count was found
        assert total == pytest.approx(model["total"], rel=tolerance), name
        assert {weight.device.type for weight in built.parameters()} == {"meta"}


def _no_training() -> Any:
    plain = {"freeze_vision_tower": False, "gradient_checkpointing": False, "bf16": False, "tiled_mlp_num_shards": 1}
    plain["gradient_checkpointing_kwargs"] = None
    return type("Training", (), plain)()


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_and_visual_tokens_are_those_of_the_model_and_the_batch(
    name: str, dataset: Any, tmp_path: Path
) -> None:
    model, processor = family(name)
    collator = VideoPreferenceCollator(processor, FRAMES, fps=None, max_pixels=trainers.MAX_PIXELS, reference="full")
    batch = collator([dataset[0]])
    found = run_of(name, tmp_path)
    assert found.batch.tokens().visual == batch["visual_tokens"]
    assert found.parameters.total == sum(weight.numel() for weight in model.parameters())
    assert found.parameters.trained == found.parameters.total
    assert found.parameters.adapters == 0


def test_adapters_are_counted_as_peft_makes_them(dataset: Any, tmp_path: Path) -> None:
    settings = model_settings(use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"])
    from trl import get_peft_config

    trainer = trainers.make(tmp_path, dataset, peft_config=get_peft_config(settings))
    real = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    found = Run(tiny_models.build("internvl")[0].config, settings, trainer.args, Machine(), Rows())
    assert found.parameters.trained == found.parameters.adapters == real
    assert states(found)["reference model"] == 0  # the adapters are turned off


@pytest.mark.parametrize("name", ["gemma4", "internvl", "lfm3_vl", "molmo2", "qwen3_5"])
def test_models_that_take_no_trees_are_planned_without_and_it_is_said(name: str, tmp_path: Path) -> None:
    packed, plain = plan_of(name, tmp_path), plan_of(name, tmp_path, tree_packing=False)
    said = [note for note in packed.notes if note.startswith("Without trees, chosen and rejected are two sequences: ")]
    assert len(said) == (name in ("gemma4", "lfm3_vl", "molmo2"))
    assert (packed.tokens == plain.tokens) == (packed.total_gib == plain.total_gib) == bool(said)
    assert not any("Without trees" in note for note in plain.notes)  # it was asked for


# ------------------------------------------------------------------------------------------------ against real steps


@pytest.mark.parametrize("tokens", [70, 640])
def test_linear_attention_is_planned_as_it_runs(tokens: int, tmp_path: Path) -> None:
    text = tiny_models.build("qwen3_5")[0].get_decoder().layers[0].train()
    hidden = torch.zeros(1, tokens, tiny_models.HIDDEN)

    def measured() -> tuple[int, int]:
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda it: it):
            text.linear_attn(hidden)
        return counter.get_total_flops(), sum(saved.values())

    looped = measured()
    with _delta_rule_at_once(text):
        assert measured() == pytest.approx(looped, rel=0.15)
    assert measured() == looped


def deep_run(name: str, folder: Path, types: Sequence[str], **checkpointing: Any) -> Run:
    """A run of a tiny model with text layers of these types; the settings of checkpointing it has."""
    config = copy.deepcopy(family(name)[0].config)
    config.text_config.num_hidden_layers = len(types)
    config.text_config.layer_types = list(types)
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    settings = trainers.settings(folder, per_device_train_batch_size=1, **more)
    return Run(config, model_settings(), settings, Machine(), Rows(source_px=SOURCE_PX))


_LINEAR, _FULL = "linear_attention", "full_attention"


@pytest.mark.parametrize(
    ("name", "types", "checkpointed"),
    [
        ("qwen3_5", [_LINEAR, _LINEAR, _FULL, _LINEAR], "1111"),
        ("qwen3_5", [_FULL, _LINEAR, _LINEAR, _FULL], "1010"),  # behind two layers of the vision tower
        ("internvl", [_FULL] * 6, "010101"),  # behind one
        ("internvl", [_FULL] * 5, "00100"),
    ],
)
def test_layers_of_several_kinds_are_planned_as_many_as_there_are(
    name: str, types: list[str], checkpointed: str, tmp_path: Path
) -> None:
    every = {"1111": 1, "00100": 3}.get(checkpointed, 2)
    run = deep_run(name, tmp_path, types, every_n_layers=every)
    assert run.layers == list(zip(types, (flag == "1" for flag in checkpointed), strict=True))
    found = run.text_model(2).step
    whole = run.trace(2, tuple(run.layers), has_backward=True)
    assert found.flops == pytest.approx(whole.flops)
    assert found.saved == pytest.approx(whole.saved, rel=5e-3)
    assert found.peak == pytest.approx(whole.peak, rel=0.02)


@pytest.mark.parametrize("every_n_layers", [1, 2])
def test_checkpoints_that_wait_on_the_host_are_no_part_of_the_peak(
    every_n_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a step of all layers in which what checkpoints keep is dropped, and made anew for the backward pass."""
    run = deep_run("internvl", tmp_path, [_FULL] * 8, every_n_layers=every_n_layers, offload=True)
    found = run.text_model(32)
    build, dropped = run_module.build_model, []

    def pack(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
        dropped.append(tensor.nbytes)
        return tensor.shape, tensor.dtype

    def away(*args: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: torch.empty(kept[0], dtype=kept[1])):
            return checkpoint(*args, use_reentrant=False)

    def built(*args: Any) -> Any:
        model = build(*args)
        for layer in model.get_decoder().layers:
            layer._gradient_checkpointing_func = away
        return model

    monkeypatch.setattr(run_module, "build_model", built)
    run._traces.clear()
    whole = run.trace(32, tuple(run.layers), has_backward=True)
    assert found.checkpoints == sum(dropped)
    assert found.peak_without_checkpoints == pytest.approx(whole.peak, abs=0.5 * dropped[0])
    stay = 1 + run.layers[0].is_checkpointed  # one comes back, and the first layer's is what goes into the model
    assert found.peak_without_checkpoints == found.step.peak - sum(dropped[stay:])


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        *((name, kwargs) for name in ("internvl", "qwen3_vl") for kwargs in (None, {})),
        ("internvl", {"every_n_layers": 2}),
        ("qwen3_vl", {"offload": True}),
    ],
)
def test_work_and_saved_bytes_are_those_of_a_real_step(
    name: str, checkpointing: dict[str, Any] | None, dataset: Any, tmp_path: Path
) -> None:
    frames = 48  # enough for the video to outweigh the text
    more: dict[str, Any] = {"num_frames": frames, "per_device_train_batch_size": 1}
    more |= {"gradient_checkpointing": checkpointing is not None, "gradient_checkpointing_kwargs": checkpointing}
    trainer = trainers.make(tmp_path, dataset.select([0]), name, reference="full", **more)
    batch = trainers.batch_of(trainer, dataset.select([0]))
    answers = batch["completion_mask"].sum(1).tolist()
    prompt = int(batch["attention_mask"][0].sum()) - answers[0]
    grid = frame_shapes(trainer.model.config, trainers.MAX_PIXELS, SOURCE_PX)
    beside = prompt - grid.visual_tokens(frames) - 1 - CHAT_TOKENS
    guessed = Rows(1, *answers, label_tokens=round(beside / grid.units(frames)), source_px=SOURCE_PX)
    found = make_plan(trainer.model.config, model_settings(), trainer.args, rows=guessed)

    if checkpointing is not None:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False}, **checkpointing)
    weights = {weight.untyped_storage().data_ptr() for weight in trainer.model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, dict(batch))
    # What waits in the host's memory is saved by other hooks.
    assert (found.saved_gib - found.host_gib) * GIB == pytest.approx(sum(saved.values()), rel=0.1)
    loss.backward()

    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    products = sum(
        count
        for operator, count in counter.get_flop_counts()["Global"].items()
        if "scaled_dot_product" not in str(operator)  # torch counts those in full, and not all of them
    )
    # On a CPU a part of the head's work is done by products torch does not count.
    text = trainer.model.config.get_text_config()
    heads = {"policy": 2 * sum(answers), "reference": sum(answers)}  # logits, and again in the backward pass
    head = 2.0 * sum(heads.values()) * text.vocab_size * text.hidden_size
    share = 0.0 if checkpointing is None else 1 / checkpointing.get("every_n_layers", 1)
    attention = _attention(trainer.model.config, found, grid, frames, share)
    answers_head = sum(answers) * 2.0 * text.vocab_size * text.hidden_size
    mine = (sum(found.tflop.values()) - found.tflop["policy: LM head"]) * 1e12 - answers_head - attention
    assert mine == pytest.approx(products - head, rel=0.1)


def _attention(config: Any, found: Any, grid: Any, frames: int, checkpointed: float) -> float:
    """Work of all attention, by hand: 4 × queries × keys × width, half of it where causal; 3.5 times that with its
    backward pass, once more where layers are checkpointed, once more for the reference."""
    text = config.get_text_config()
    times = 4.5 + checkpointed
    tokens = found.tokens.packed
    width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    causal = 4 * tokens**2 * width * text.num_hidden_layers / 2
    seen = sum(4 * grid.patches * span * grid.hidden * layers for span, layers in grid.windows)
    return times * (causal + seen * grid.units(frames))


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl", "qwen3_vl_moe"])
def test_operations_are_counted_as_by_torch_and_causal_attention_half(name: str) -> None:
    model = family(name)[0].train()
    decoder, text = model.get_decoder(), model.config.get_text_config()
    tokens = 37
    embedded = torch.randn(1, tokens, text.hidden_size, requires_grad=True)

    def step() -> None:
        decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state.sum().backward()

    with FlopCounterMode(display=False) as theirs:
        step()
    with FlopCounter() as ours:
        step()
    experts = 0
    if (
        name == "qwen3_vl_moe"
    ):  # 2 of 4 experts of 32 for each token: gate and up, then down; forward and twice backward
        experts = 3 * 2 * (2 * tokens) * (text.hidden_size * 2 * 32 + 32 * text.hidden_size) * text.num_hidden_layers
    assert ours.flops == theirs.get_total_flops() + experts
    # scores and their use forward, and with the scores again five products backward: 7 × 2 × tokens² × width
    attention = 14 * tokens**2 * text.hidden_size * text.num_hidden_layers
    assert ours.skipped == attention // 2
    with FlopCounter() as in_place:
        torch.zeros(3, 5).addmm_(torch.ones(3, 4), torch.ones(4, 5))
    assert (in_place.flops, in_place.skipped) == (2 * 3 * 4 * 5, 0)


# ---------------------------------------------------------------------------------------------------- sums by hand


def test_weights_gradients_and_optimizer_by_hand(tmp_path: Path) -> None:
    def held(machine: Machine | None = None, **more: Any) -> dict[str, float]:
        return states(run_of("internvl", tmp_path, machine, **more))

    count = sum(weight.numel() for weight in tiny_models.build("internvl")[0].parameters())
    one = held()
    assert one["weights"] == one["reference model"] == one["gradients"] == 4 * count
    assert one["optimizer"] == 8 * count  # AdamW: two moments
    assert held(Machine(processes=2))["gradients"] == 8 * count  # and DDP's buckets

    sharded = held(Machine(processes=8, sharding=Sharding.fsdp2))
    assert sharded["optimizer"] == count
    assert sharded["gradients"] == sharded["reference model"] == count / 2
    assert count / 2 < sharded["weights"] < 4 * count  # its share, and what is gathered

    zero2 = held(Machine(processes=8, sharding=Sharding.zero2))
    assert (zero2["weights"], zero2["optimizer"]) == (4 * count, count)
    zero3 = held(Machine(processes=8, sharding=Sharding.zero3))
    assert (zero3["reference model"], zero3["optimizer"]) == (count / 2, count)
    half = held(Machine(processes=8, sharding=Sharding.zero2), bf16=True)
    assert (half["weights"], half["optimizer"]) == (2 * count, (4 + 8) * count / 8)  # and the master weights

    eight = held(optim="adamw_bnb_8bit", precompute_ref_log_probs=True)
    assert (eight["optimizer"], eight["reference model"]) == (2 * count, 0)


def test_quantised_weights_take_half_a_byte_and_their_scales(tmp_path: Path) -> None:
    config = planning.find_model_config("OpenGVLab/InternVL3-8B-hf")
    settings = ModelConfig(dtype="bfloat16", use_peft=True, load_in_4bit=True)
    training = trainers.settings(tmp_path, bf16=True, num_frames=16, per_device_train_batch_size=1)
    run = Run(config, settings, training, Machine(), Rows())
    embeddings = 2 * 151674 * 3584  # in and out, kept in bf16
    expected = (run.parameters.total - embeddings) * (0.5 + 4 / 64) + embeddings * 2 + run.parameters.adapters * 2
    assert states(run)["weights"] == pytest.approx(expected, rel=0.005)  # but for norms and patches


def test_what_makes_it_smaller_makes_it_smaller(tmp_path: Path) -> None:
    def needed(**more: Any) -> float:
        run = run_of("internvl", tmp_path, rows=SHORT, **{"num_frames": 256, **more})
        memory = activations(run, more.get("num_frames", 256))
        return memory["text model's activations"] + memory["vision"]

    plain = needed()
    checkpointed = needed(gradient_checkpointing=True)
    assert checkpointed < 0.8 * plain
    assert needed(activation_offloading=True) < 0.8 * plain
    assert needed(gradient_checkpointing=True, activation_offloading=True) < checkpointed
    assert needed(gradient_checkpointing=True, tiled_mlp_num_shards=8) < checkpointed
    assert needed(num_frames=128) == pytest.approx(plain / 2, rel=0.1)
    assert needed(tree_packing=False) > 1.3 * plain  # twice, but for the mask of the branches


def test_devices_that_share_a_timeline_hold_a_part_of_it(tmp_path: Path) -> None:
    alone, shared = (
        run_of(
            "qwen3_vl",
            tmp_path,
            Machine(processes=8, sharding=Sharding.fsdp2, context_parallel=size),
            SHORT,
            num_frames=256,
            gradient_checkpointing=True,
        )
        for size in (1, 4)
    )
    assert states(shared) == states(alone)
    whole, part = (activations(run, 256) for run in (alone, shared))
    assert part["pixels"] == whole["pixels"] / 4
    assert part["vision"] == pytest.approx(whole["vision"] / 4, rel=0.05)
    # The keys and values of all tokens come to each device: of a tiny model they are half of a hidden state.
    assert 1 < part["text model's activations"] / (whole["text model's activations"] / 4) < 1.5
    for name, value in tflop(shared).items():
        if name != "policy: LM head":  # of the one row that there is
            assert value == pytest.approx(tflop(alone)[name] / 4, rel=0.1), name
    layers, key_heads, width, tokens = 2, 2, 8, alone.batch.trunk(256)
    passes, reference = 3, alone.batch.trunk(alone.batch.reference_frames)
    of_token = 2 * layers * key_heads * width * 4
    assert received_gb(shared) == pytest.approx(of_token * (passes * tokens + reference) * 3 / 4 / 1e9)
    assert received_gb(alone) == 0
    few = run_of("qwen3_vl", tmp_path, shared.machine, SHORT, num_frames=6)  # three units of frames for four devices
    assert few.sharing(6) == 1
    assert few.sharing(8) == 4


# ------------------------------------------------------------------------------------------------ view distillation


@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        (torch.float32, {}),
        (torch.float32, {"view_distillation_divergence": "jsd", "view_distillation_guard": True}),
        (torch.float32, {"precompute_ref_log_probs": True, "view_distillation_top_k": 8}),
        (torch.bfloat16, {"view_distillation_divergence": "reverse"}),
    ],
    ids=["forward", "jsd", "precomputed", "bfloat16"],
)
def test_view_distillation_takes_at_its_highest_point_what_is_planned(
    dtype: torch.dtype, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every allocation and release of the real loss and its gradient, as torch's profiler sees them."""
    vocabulary, tokens, rows = 4000, 64, 2
    monkeypatch.setattr(distillation.divergences, "__defaults__", (False, 50 * vocabulary))  # three pieces
    training = trainers.settings(tmp_path, view_distillation_weight=1.0, per_device_train_batch_size=rows, **more)
    config = copy.deepcopy(tiny_models.build("internvl")[0].config)
    config.text_config.vocab_size = vocabulary
    model = ModelConfig(model_name_or_path="tiny", dtype=str(dtype).removeprefix("torch."))
    run = Run(config, model, training, Machine(), Rows(chosen_tokens=tokens, source_px=SOURCE_PX))
    planned = run.distillation
    assert planned is not None
    heads = [torch.randn(vocabulary, tiny_models.HIDDEN).to(dtype) for _ in range(2)]
    heads[0].requires_grad_()
    labels = tuple(torch.randint(vocabulary, (tokens,)) for _ in range(rows))
    kind, guard = training.view_distillation_divergence, training.view_distillation_guard

    def states(head: torch.Tensor) -> distillation.AnswerStates:
        hidden = [torch.randn(tokens, tiny_models.HIDDEN).to(dtype) for _ in range(rows)]
        return distillation.AnswerStates(tuple(hidden), labels, (), head)

    student, teacher = states(heads[0]), states(heads[1])
    for hidden in student.hidden:
        hidden.requires_grad_()
    known = distillation.top_tokens(teacher, 8, 1.0) if "view_distillation_top_k" in more else teacher
    given = [*student.hidden, *labels]
    given += teacher.hidden if known is teacher else [*known.tokens, *known.log_probs, *known.own]
    held = sum(tensor.nbytes for tensor in given)
    with FlopCounter() as counter:
        distillation.divergences(student, known, kind, 1.0, guard).mean().backward()
    heads[0].grad = None
    with torch.profiler.profile(profile_memory=True) as profile:
        distillation.divergences(student, known, kind, 1.0, guard).mean().backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert planned.flops == counter.flops
    assert planned.peak == pytest.approx(held + peak, rel=0.05)
    assert memory_gib(run, FRAMES)["view distillation"] == planned.peak / GIB
    assert tflop(run)["view distillation"] == counter.flops / 1e12


def test_sampled_answers_are_one_more_branch_and_work_of_their_own(tmp_path: Path) -> None:
    more = {"view_distillation_weight": 1.0, "num_frames": 64}  # enough for the video to outweigh the text
    sampled = {"view_distillation_on": "sampled", "view_distillation_max_new_tokens": 5}
    one, other = (run_of("internvl", tmp_path, rows=SHORT, **more, **given) for given in ({}, sampled))
    assert other.batch.packed(64) == one.batch.packed(64) + 5
    assert other.batch.answers == one.batch.answers + 5
    work = tflop(other)
    assert work["sampling"] == pytest.approx(work["reference"], rel=0.1)  # as a forward pass of the whole timeline
    plain, third = (
        run_of("internvl", tmp_path, rows=SHORT, tree_packing=False, **more, **given).batch for given in ({}, sampled)
    )
    assert third.packed(64) == 1.5 * plain.packed(64)
    note = "Sampled answers are assumed to have 5 tokens"
    assert any(note in said for said in planning.plan._notes(other))


def test_rejected_views_are_timelines_of_their_own(tmp_path: Path) -> None:
    more: dict[str, Any] = {"num_frames": 64, "per_device_train_batch_size": 4, "pairs_per_timeline": 2}
    more["reference"] = "full"
    given = [{}, *({"view_preference_rejected": kind} for kind in ("no_evidence", "reversed"))]
    weighed = [{"view_preference_weight": float(bool(kind)), **kind} for kind in given]
    plain, of_each, of_all = (run_of("internvl", tmp_path, rows=SHORT, **more, **kind) for kind in weighed)
    trunk, branches = plain.batch.trunk(64), plain.batch.branches
    assert plain.batch.packed(64) == 2 * trunk + 4 * branches
    assert of_each.batch.packed(64) == (2 + 4) * trunk + 8 * branches  # each row lacks other evidence
    assert of_all.batch.packed(64) == (2 + 2) * trunk + 8 * branches
    work, doubled = tflop(plain), tflop(of_all)
    for name in ("policy: text model", "policy: vision", "policy: LM head", "reference"):
        assert doubled[name] / work[name] == pytest.approx(2, rel=1e-6), name
    kept, more_kept = (sum(activations(run, 64).values()) for run in (plain, of_all))
    assert 1.8 < more_kept / kept < 2.05
    assert any("Rejected views (reversed)" in note for note in planning.plan._notes(of_all))
    sequences = [run_of("internvl", tmp_path, rows=SHORT, tree_packing=False, **more, **kind) for kind in weighed]
    assert sequences[1].batch.packed(64) == sequences[2].batch.packed(64) == 2 * sequences[0].batch.packed(64)
    assert [run.batch.timelines for run in sequences] == [2, 4, 4]  # each as often as its rows have answers


def test_groups_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="context_parallel=3 does not divide processes=8"):
        Machine(processes=8, sharding=Sharding.fsdp2, context_parallel=3)
    with pytest.raises(ConfigError, match="needs sharding=fsdp2"):
        Machine(processes=8, sharding=Sharding.zero3, context_parallel=8)
    machine = Machine(processes=8, sharding=Sharding.fsdp2, context_parallel=8)
    with pytest.raises(ConfigError, match="'llava_onevision' cannot be parted"):
        run_of("llava_onevision", tmp_path, machine)
    with pytest.raises(ConfigError, match="tree_packing is off"):
        run_of("qwen3_vl", tmp_path, machine, tree_packing=False)
    with pytest.raises(ConfigError, match="view_distillation_on='sampled' draws answers"):
        run_of("qwen3_vl", tmp_path, machine, view_distillation_weight=0.5, view_distillation_on="sampled")


def test_pairs_of_a_timeline_share_its_video(tmp_path: Path) -> None:
    apart = plan_of("internvl", tmp_path, num_frames=256, per_device_train_batch_size=4)
    together = plan_of("internvl", tmp_path, num_frames=256, per_device_train_batch_size=4, pairs_per_timeline=4)
    question, answers = 32, 256
    trunk = apart.tokens.packed // 4 - question - answers
    assert together.tokens.packed == trunk + 4 * (question + answers)
    assert together.tokens.reference == apart.tokens.reference  # each has an anchor of its own
    assert together.seconds < apart.seconds


def test_frames_that_fit_fit_and_more_do_not(tmp_path: Path) -> None:
    machine = Machine(gpu_memory_gib=RESERVE_GIB + 0.2)
    run = run_of("internvl", tmp_path, machine, SHORT, num_frames=64)
    most = frames_that_fit(run)
    assert most > 64
    assert sum(memory_gib(run, most).values()) <= machine.gpu_memory_gib
    assert sum(memory_gib(run, round(most * 1.02) + 1).values()) > machine.gpu_memory_gib


def test_what_does_not_fit_is_told_what_to_change(tmp_path: Path) -> None:
    machine = Machine(gpu_memory_gib=RESERVE_GIB + 0.01)
    kwargs = {"every_n_layers": 2, "offload": False}
    found = plan_of("internvl", tmp_path, machine=machine, rows=SHORT, num_frames=512)
    sparse = plan_of(
        "internvl",
        tmp_path,
        machine=machine,
        rows=SHORT,
        num_frames=512,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kwargs,
    )
    assert sparse.total_gib < found.total_gib
    assert sparse.remedies[0].setting == 'gradient_checkpointing_kwargs: {"every_n_layers": 1, "offload": false}'
    assert not found.fits
    remedies = {remedy.setting: remedy for remedy in found.remedies}
    assert {"gradient_checkpointing: true", "activation_offloading: true", "all of these"} <= set(remedies)
    assert all(remedy.gib < found.total_gib for remedy in found.remedies)
    frames = remedies[f"num_frames: {found.frames_that_fit}"]
    assert frames.fits
    text = report(found)
    assert "DOES NOT FIT" in text
    assert "gradient_checkpointing: true" in text


# ----------------------------------------------------------------------------------------------------- the context


def shorter(name: str, context: int) -> Any:
    """The tiny model's config, made for so many tokens."""
    config = family(name)[0].config
    config.get_text_config().max_position_embeddings = context
    return config


def test_what_is_longer_than_the_context_does_not_fit(tmp_path: Path) -> None:
    training = trainers.settings(tmp_path, num_frames=64, per_device_train_batch_size=1)
    # 64 frames of 4 tokens and 9 of their labels, the chat's 24, the question's 32, the longer answer's 128
    needed = 64 * (4 + 9) + 24 + 32 + 128
    exact = make_plan(shorter("internvl", needed), model_settings(), training)
    assert (exact.fits, exact.frames_that_fit, exact.tokens.longest) == (True, 64, needed)
    found = make_plan(shorter("internvl", needed - 1), model_settings(), training)
    assert found.total_gib == exact.total_gib < found.machine.gpu_memory_gib  # memory is not the reason
    assert (found.fits, found.frames_that_fit) == (False, 63)
    assert [(remedy.setting, remedy.fits) for remedy in found.remedies] == [("num_frames: 63", True)]
    assert json.loads(found.to_json())["fits"] is False
    text = report(found)
    assert "DOES NOT FIT. Frames that fit, all else unchanged: 63." in text
    assert f"TOO LONG: {needed:,} tokens exceed the model's context of {needed - 1:,}" in text


def test_max_length_bounds_as_the_context_does(tmp_path: Path) -> None:
    found = plan_of("internvl", tmp_path, num_frames=64, max_length=500)
    assert (found.fits, found.frames_that_fit) == (False, (500 - 24 - 32 - 128) // 13)
    assert "tokens exceed max_length=500" in report(found)


def test_a_reference_that_is_too_long_leaves_no_frames(tmp_path: Path) -> None:
    training = trainers.settings(tmp_path, num_frames=4, reference_num_frames=64, fps=None, reference="full")
    found = make_plan(shorter("internvl", 800), model_settings(), training)
    assert (found.fits, found.frames_that_fit) == (False, 0)


@pytest.mark.parametrize("seed", range(8))
def test_frames_that_fit_a_random_context_are_the_most(seed: int, tmp_path: Path) -> None:
    """By trying: so many frames are not too long, one unit more is."""
    draw = random.Random(seed)
    name, context = draw.choice(FAMILIES), draw.randrange(200, 40_000)
    rows = Rows(*(draw.randrange(1, 200) for _ in range(3)), label_tokens=draw.choice([None, 0, 20]))
    max_pixels = draw.choice([56 * 56, 224 * 224])

    def batch(num_frames: int) -> DeviceBatch:
        training = trainers.settings(tmp_path, num_frames=num_frames, max_pixels=max_pixels, reference="full")
        return DeviceBatch(shorter(name, context), training, rows)

    most = batch(1).frames_within()
    assert most is not None
    if most:
        assert not batch(most).tokens().are_too_many
    assert batch(most + 1).tokens().are_too_many


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe's YAML about a tiny model's folder that holds a config and no weights."""
    tiny_models.build("internvl")[0].config.save_pretrained(tmp_path / "tiny")
    path = tmp_path / "recipe.yaml"
    lines = [f"model_name_or_path: {tmp_path / 'tiny'}", "output_dir: run", "dataset_name: rows", "dtype: bfloat16"]
    path.write_text("\n".join([*lines, "num_frames: 16", "gradient_checkpointing: true"]), encoding="utf-8")
    return path


def test_the_command_reads_a_recipe_and_its_options(recipe: Path) -> None:
    done = longvpo(["check", str(recipe), "--processes", "8", "--sharding", "fsdp2"])
    assert done.exit_code == 0, done.output
    assert "8 processes (fsdp2)" in done.stdout
    assert "16 × 4.0 = 64 visual" in done.stdout
    assert "FITS" in done.stdout
    wider = longvpo(["check", str(recipe), "--num_frames", "32", "--json", "--gpu-memory", "1"])
    assert wider.exit_code == 1
    found = json.loads(wider.stdout)
    assert (found["tokens"]["frames"], found["fits"], found["frames_that_fit"]) == (32, False, 0)
    assert [remedy["setting"] for remedy in found["remedies"]][-1] == "all of these"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "nowhere.yaml is not a file"),
        (["RECIPE", "--model_name_or_path", "some/model"], "hf download some/model config.json"),
        (["RECIPE", "--sharding", "zero3"], "processes=1"),
        (["RECIPE", "--num_frames", "0"], "num_frames must be ≥ 1"),
        (
            ["RECIPE", "--gradient_checkpointing_kwargs", '{"every_n_layers": 0}'],
            "every_n_layers must be a number ≥ 1, got 0",
        ),
        (["RECIPE", "--num_frames", "many"], "invalid int value: 'many'"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_else(recipe: Path, arguments: list[str], said: str) -> None:
    arguments = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    done = longvpo(["check", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stdout == ""


# ------------------------------------------------------------------------------------------------- bases of runs


def test_an_adapter_has_the_shapes_of_its_base(recipe: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = str(tmp_path / "tiny")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}), encoding="utf-8")
    assert planning.find_model_config(str(adapter)).to_dict() == planning.find_model_config(base).to_dict()


#: A base's ways to train see the same frames, so one of them will do.
SHIPPED = [path for path in sorted(shipped("recipes/configs").rglob("*.yaml")) if not path.stem.endswith("_full")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_configuration_has_shapes_and_fits_the_context(path: Path) -> None:
    model, training = planning.read_config(path)
    start = starting_point(str(model.model_name_or_path), path)
    tokens = DeviceBatch(planning.find_model_config(start), training, Rows()).tokens()
    assert tokens.allowed is not None
    assert tokens.longest <= tokens.allowed
    if path.parent.name != "miniature":  # whose base is made, not loaded
        first = path.with_stem(path.stem.replace("stage2", "stage1"))
        assert start == planning.read_config(first)[0].model_name_or_path


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("smolvlm2_500m/stage2_lora", []),
        ("internvl3_2b/stage2_full", ["--processes", "8", "--sharding", "fsdp2"]),
        ("llava_video_7b/temporal_full", ["--processes", "8", "--sharding", "zero3"]),
        ("miniature/stage2", []),
    ],
)
def test_shipped_configurations_pass_the_command(
    file: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # away from the models of a `make demo`
    done = longvpo(["check", str(shipped("recipes/configs") / f"{file}.yaml"), *options])
    assert done.exit_code == 0, done.output
    assert "FITS. " in done.stdout
    assert ("is not there yet" in done.stdout) == ("temporal" not in file)


def test_a_run_that_is_not_trained_yet_is_planned_on_its_own_base(recipe: Path, tmp_path: Path) -> None:
    def write(name: str, model: str, output: str) -> Path:
        path = tmp_path / name
        path.write_text(f"model_name_or_path: {model}\noutput_dir: {output}\nnum_frames: 16\n", encoding="utf-8")
        return path

    second = write("second.yaml", "run", "runs/second")  # `run` is what the recipe writes
    third = write("third.yaml", "runs/second/", "third")
    expected = str(tmp_path / "tiny")
    assert starting_point("run", second) == starting_point("runs/second/", third) == expected
    found = planning.plan_file(third)
    assert found.tokens.visual == 64
    assert f"runs/second/ is not there yet: planned as {expected}" in report(found)
    assert starting_point("runs/other", third) == "runs/other"
    circle = write("circle.yaml", "circle", "circle")
    assert starting_point("circle", circle) == "circle"
    with pytest.raises(ConfigError, match="no run that a configuration beside this one"):
        planning.plan_file(circle)


def test_the_miniatures_shapes_are_those_of_its_model() -> None:
    built = build_miniature(build_processor(), seed=0).config
    shapes = known_bases()["miniature"]["config"]
    parts = {"": built, "text_config": built.get_text_config(), "vision_config": built.vision_config}
    for part, config in parts.items():
        for name, value in (shapes[part] if part else shapes).items():
            if name not in parts:
                of_model = getattr(config, name)
                assert (list(of_model) if isinstance(of_model, tuple) else of_model) == value, name
