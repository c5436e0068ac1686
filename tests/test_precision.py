"""Half precision on a CPU that computes in it, and on one that only holds it, whichever of them runs these tests."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

import tiny_models
import trainers
from longvpo_hf import LongVPOConfig, precision
from longvpo_hf.commands.build.models import Models
from longvpo_hf.commands.build.options import ModelSettings
from longvpo_hf.intake.embeddings import VisionEmbedder
from longvpo_hf.miniature.language import SENTENCES, WORDS
from longvpo_hf.miniature.settings import MiniatureSettings
from longvpo_hf.miniature.study import expected_seconds
from longvpo_hf.miniature.workshop import Workshop
from longvpo_hf.planning.settings import read_config
from longvpo_hf.responders.checkpoint import load_checkpoint
from small_english import write_language_model

Cpu = Callable[..., None]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cpu]:
    """Makes this CPU one on which products take so many times as long in half precision as in float32."""

    def becomes(bfloat16: float, float16: float | None = None) -> None:
        times = {torch.float32: 1.0, torch.bfloat16: bfloat16, torch.float16: float16 or bfloat16}
        monkeypatch.setattr(precision, "_seconds", lambda dtype: times[dtype])
        precision.is_computed.cache_clear()

    yield becomes
    precision.is_computed.cache_clear()


def tiny(dtype: torch.dtype) -> Any:
    return tiny_models.build("internvl")[0].to(dtype)


def saved(folder: Path, dtype: torch.dtype) -> str:
    model, processor = tiny_models.build("internvl")
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------ what is computed


def test_this_cpu_is_judged_as_pytorch_s_own_libraries_judge_it() -> None:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        pytest.skip("this PyTorch has no oneDNN, which knows")
    precision.is_computed.cache_clear()
    assert precision.is_computed(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("seed", range(8))
def test_what_takes_tens_of_times_as_long_is_not_computed(cpu: Cpu, seed: int) -> None:
    rng = random.Random(seed)
    cpu(rng.uniform(0.1, 2), rng.uniform(20, 200))
    assert [precision.is_computed(dtype) for dtype in (torch.float32, *HALF)] == [True, True, False]


def test_one_process_asks_once(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a busy moment would have one part of a run computed in another type."""
    cpu(80)
    assert not precision.is_computed(torch.bfloat16)
    monkeypatch.setattr(precision, "_seconds", lambda dtype: 1.0)
    assert not precision.is_computed(torch.bfloat16)


# ------------------------------------------------------------------------------------------ models that are loaded


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_model_is_used_in_float32_where_its_type_is_only_held(
    cpu: Cpu, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    cpu(80)
    used = precision.computable(model)
    assert {weight.dtype for weight in used.parameters()} == {torch.float32}
    assert all(torch.equal(weight.to(dtype), before[name]) for name, weight in used.named_parameters())
    assert f"no instructions for {str(dtype).removeprefix('torch.')}" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "slowness", "change"),
    [
        (torch.bfloat16, 0.5, {}),
        (torch.float32, 80, {}),
        (torch.bfloat16, 80, {"is_quantized": True}),
    ],
    ids=["computed", "float32", "quantised"],
)
def test_other_models_stay_as_they_are(
    cpu: Cpu, dtype: torch.dtype, slowness: float, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    cpu(slowness)
    model = tiny(dtype)
    for name, value in change.items():
        setattr(model, name, value)
    assert precision.computable(model).dtype == dtype
    assert not caplog.records


def test_models_on_a_gpu_stay_as_they_are(cpu: Cpu) -> None:
    cpu(80)
    model: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert precision.computable(model) is model


def test_checkpoints_are_loaded_in_what_is_computed_and_merged_in_their_own(cpu: Cpu, tmp_path: Path) -> None:
    folder, device = saved(tmp_path, torch.bfloat16), torch.device("cpu")
    cpu(80)
    assert load_checkpoint(folder, device)[0].dtype == torch.float32
    assert load_checkpoint(folder, device, dtype="auto")[0].dtype == torch.bfloat16, "what is pushed is as it was"
    cpu(0.5)
    assert load_checkpoint(folder, device)[0].dtype == torch.bfloat16


def test_models_of_builds_are_loaded_in_what_is_computed(cpu: Cpu, tmp_path: Path) -> None:
    cpu(80)
    seeing = saved(tmp_path / "seeing", torch.bfloat16)
    reading = write_language_model(tmp_path)
    AutoModelForCausalLM.from_pretrained(reading).bfloat16().save_pretrained(reading)
    models = Models(ModelSettings(device="cpu"), 4, 0)
    for name in (seeing, str(reading)):
        assert models.load(name, 8).model.dtype == torch.float32


def test_clips_are_embedded_in_what_is_computed(cpu: Cpu, tmp_path: Path) -> None:
    small = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    SiglipVisionModel(small).bfloat16().save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    cpu(0.5)
    assert VisionEmbedder(str(tmp_path)).model.dtype == torch.bfloat16
    cpu(80)
    assert VisionEmbedder(str(tmp_path)).model.dtype == torch.float32


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("slowness", "given", "expected"),
    [
        (80, {}, False),
        (0.5, {}, True),
        (80, {"bf16": True}, True),
        (0.5, {"bf16": False}, False),
    ],
)
def test_bf16_is_on_by_default_where_it_is_computed(
    cpu: Cpu, tmp_path: Path, slowness: float, given: dict[str, Any], expected: bool
) -> None:
    cpu(slowness)
    assert LongVPOConfig(str(tmp_path), use_cpu=True, report_to="none", **given).bf16 is expected


def test_a_machine_without_a_device_is_still_refused_where_the_cpu_was_not_asked_for(cpu: Cpu, tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has a device")
    cpu(80)
    with pytest.raises(ValueError, match="assign use_cpu"):
        LongVPOConfig(str(tmp_path), report_to="none")


@pytest.mark.parametrize(
    ("slowness", "dtype", "bf16", "words"),
    [
        (80, torch.float32, True, "no instructions for bfloat16: .* than with bf16=False\\."),
        (80, torch.bfloat16, False, "no instructions for bfloat16: .* than with dtype=float32\\."),
        (80, torch.float16, True, "for bfloat16 and float16: .* than with bf16=False and dtype=float32\\."),
        (80, torch.float32, False, None),
        (0.5, torch.bfloat16, True, None),
    ],
)
def test_training_in_what_is_not_computed_is_warned_of(
    cpu: Cpu,
    tmp_path: Path,
    dataset: Dataset,
    caplog: pytest.LogCaptureFixture,
    slowness: float,
    dtype: torch.dtype,
    bf16: bool,
    words: str | None,
) -> None:
    cpu(slowness)
    with caplog.at_level(logging.WARNING, logger="longvpo_hf.precision"):
        trainers.make(tmp_path, dataset, model=tiny(dtype), bf16=bf16)
    said = [record.getMessage() for record in caplog.records if record.name == "longvpo_hf.precision"]
    if words is None:
        assert said == []
    else:
        (message,) = said
        assert re.search(words, message)


@pytest.mark.parametrize(("is_native", "is_bf16"), [(False, True), (True, True), (False, False)])
def test_a_gpu_that_emulates_bf16_is_warned_of(
    cpu: Cpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_native: bool, is_bf16: bool
) -> None:
    """As a T4: PyTorch says that it supports bfloat16. The model is on the CPU still, as under FSDP."""
    cpu(80)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or is_native
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    precision.warn_of_half_precision(tiny(torch.bfloat16), torch.device("cuda"), is_bf16)
    said = [record.getMessage() for record in caplog.records]
    if is_native or not is_bf16:
        assert said == []
    else:
        (message,) = said
        assert re.search(r"GPU \(Tesla T4\) has no instructions for bfloat16.*set fp16=True", message)


@pytest.mark.parametrize(
    ("given", "overrides", "expected"),
    [
        ({}, [], True),
        ({"bf16": False}, [], False),
        ({}, ["--bf16=false"], False),
        ({}, ["--bf16", "false"], False),
        ({"use_cpu": True}, [], False),
    ],
)
def test_a_plan_for_a_gpu_does_not_depend_on_this_cpu(
    cpu: Cpu, tmp_path: Path, given: dict[str, Any], overrides: list[str], expected: bool
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has a device")
    cpu(80)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_name_or_path": "x", "output_dir": "y", "report_to": "none", **given}))
    assert read_config(recipe, overrides)[1].bf16 is expected


# ------------------------------------------------------------------------------------------------ the miniature


@pytest.mark.parametrize(("slowness", "expected"), [(80, torch.float32), (0.5, torch.bfloat16)])
def test_the_pretrained_language_model_is_measured_in_what_is_computed(
    cpu: Cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slowness: float, expected: torch.dtype
) -> None:
    cpu(slowness)
    saved(tmp_path / "base", torch.float32)
    workshop = Workshop(tmp_path, MiniatureSettings.fast())
    for language, dtype in ((WORDS, torch.float32), (SENTENCES, expected)):
        monkeypatch.setattr(workshop, "language", language)
        assert workshop.responder("base").model.dtype == dtype


@pytest.mark.parametrize("name", ["base", "stage1-model"])
def test_the_plan_of_a_cpu_without_it_says_more_minutes(cpu: Cpu, name: str) -> None:
    step: Any = SimpleNamespace(kind="train", name=name)
    both = (MiniatureSettings.pretrained(), MiniatureSettings())
    cpu(0.5)
    with_it = [expected_seconds(step, settings) for settings in both]
    cpu(80)
    pretrained, standard = (expected_seconds(step, settings) for settings in both)
    assert None not in (pretrained, *with_it)
    assert (pretrained > 2 * with_it[0], standard) == (True, with_it[1])
