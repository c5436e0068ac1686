"""FSDP2 and DeepSpeed, by the files of `recipes/accelerate/`, train what one process trains.

On two CPU processes that accelerate takes for accelerators (`sharded.py`). Those of DeepSpeed run where it is
installed: `pip install deepspeed`.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_recipes import STAGE1, options
from transformers import AutoModelForImageTextToText

import sharded
import tiny_models
from conftest import make_dataset
from longvpo_hf.preference import VideoPreference
from longvpo_hf.shipped import shipped

#: Runs of two steps, each step of four rows over both processes, in float32.
SCENARIOS: dict[str, dict[str, object]] = {
    "whole": {"save_strategy": "steps", "save_steps": 1},
    "whole-then-resumed": {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "true"},
    # As the configurations `full` do: the tower trained, checkpointing, the reference's scores computed before.
    "full": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": "true",
        "precompute_ref_log_probs": "true",
    },
    # FSDP has a tied head in one group with the embeddings, which it reduces itself.
    "tied": {"model_name_or_path": "tied"},
    "frozen": {"freeze_vision_tower": "true"},
    "lora": {"use_peft": "true", "lora_r": 2, "lora_dropout": 0.0},
    "bad": {"on_bad_video": "skip", "dataset_name": "bad_rows"},
}

#: Not by DeepSpeed, which the term refuses.
FSDP2: dict[str, dict[str, object]] = {
    "distilled": {"view_distillation_weight": 1.0, "view_preference_weight": 1.0, "sft_weight": 0.0},
    "sampled": {
        "view_distillation_weight": 1.0,
        "view_distillation_on": "sampled",
        "view_distillation_max_new_tokens": 4,
        "use_peft": "true",
        "lora_r": 2,
        "lora_dropout": 0.0,
    },
}

#: Folders of `given` that a run takes unless it names others.
NAMES = {"model_name_or_path": "base", "dataset_name": "rows"}

#: By a launch of its own: accelerate has one precision per process.
HALF: dict[str, dict[str, object]] = {"half": {"bf16": "true"}}

#: No dependency: its wheel is built from source, against torch. Who changes the trainer installs it and runs these.
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, preferences: list[VideoPreference]) -> Path:
    """A model, its eight rows, and the same rows of which the first process has none left in the first step."""
    folder = tmp_path_factory.mktemp("given")
    model, processor = tiny_models.build("internvl")
    model.save_pretrained(folder / "base")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    type(model)(config).save_pretrained(folder / "tied")
    for name in ("base", "tied"):
        processor.save_pretrained(folder / name)
    rows = make_dataset(preferences)
    rows.save_to_disk(str(folder / "rows"))
    broken = rows.to_list()
    for row in (0, 1, 6):
        broken[row]["clips"][0]["file_name"] = str(folder / "gone.mp4")
    Dataset.from_list(broken).save_to_disk(str(folder / "bad_rows"))
    return folder


def words(given: Path, output: Path, processes: int, changes: dict[str, object]) -> list[str]:
    """A run's options; one process has the batch of both."""
    more = {
        "train_sampling_strategy": "sequential",
        "adam_epsilon": 1e-2,  # else a gradient of nearly nothing, whose sign is chance, moves a weight as any other
        "per_device_train_batch_size": 2,
        "use_cpu": "false" if processes > 1 else "true",
        **changes,
    }
    if processes == 1:
        more["per_device_train_batch_size"] = 2 * int(str(more["per_device_train_batch_size"]))
    model, rows = (given / str(more.pop(name, default)) for name, default in NAMES.items())
    return options(model, rows, output, **more)


def launch(file: str, precision: str, given: Path, folder: Path, scenarios: dict[str, dict[str, object]]) -> Path:
    """Runs the scenarios by an accelerate configuration, but on two processes."""
    folder.mkdir()
    for name, changes in scenarios.items():
        (folder / f"{name}.json").write_text(json.dumps(words(given, folder / name, 2, changes)))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(shipped(f"recipes/accelerate/{file}.yaml")), "--num_processes", "2"]
    command += ["--mixed_precision", precision, "--main_process_port", "0"]
    done = subprocess.run(
        [*command, sharded.__file__, str(folder), *scenarios],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


Runs = Callable[[str, str], Path]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, given: Path) -> Runs:
    """The folder of all scenarios of a precision, by an accelerate configuration; each is launched once."""
    folders: dict[tuple[str, str], Path] = {}

    def run(file: str, precision: str) -> Path:
        if (file, precision) not in folders:
            folder = tmp_path_factory.mktemp(f"{file}-{precision}") / "runs"
            scenarios = SCENARIOS | FSDP2 if file == "fsdp2" else SCENARIOS
            folders[file, precision] = launch(
                file, precision, given, folder, HALF if precision == "bf16" else scenarios
            )
        return folders[file, precision]

    return run


def trained(folder: Path) -> Weights:
    """Weights of what a run saved, by the names they have in a model: ZeRO-3 saves under names of its own."""
    if (folder / "adapter_model.safetensors").is_file():
        return load_file(folder / "adapter_model.safetensors")
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    return dict(model.state_dict())


def both(given: Path, two: Path, scenario: str, tolerance: float, tmp_path: Path) -> tuple[Weights, Weights, Weights]:
    """Weights before, after two processes and after one; what they logged is equal to `tolerance`."""
    changes = dict((SCENARIOS | FSDP2 | HALF)[scenario.partition("-then-")[0]])
    one = STAGE1.main(words(given, tmp_path / "one", 1, changes))
    done = json.loads((two / f"{scenario}.done.json").read_text())
    expected = [entry for entry in one.state.log_history if "loss" in entry]
    assert len(done["logs"]) == len(expected) == 2
    for got, wanted in zip(done["logs"], expected, strict=True):
        for name in (
            "loss",
            "loss/sft",
            "loss/view_distillation",
            "loss/view_preference",
            "rewards/margins",
            "logps_per_token/chosen",
            "ref_logps_per_token/rejected",
        ):
            if name in wanted or name in got:  # a batch without rows has none
                assert got[name] == pytest.approx(wanted[name], abs=tolerance), name
    assert done["log_probs"] == ["torch.float32"]
    ours, theirs = trained(two / scenario), trained(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    before = (
        {}
        if "lora_r" in changes
        else trained(given / str(changes.get("model_name_or_path", NAMES["model_name_or_path"])))
    )
    return before, ours, theirs


BY_DEEPSPEED = [
    pytest.param(file, scenario, marks=needs_deepspeed) for file in ("zero2", "zero3") for scenario in SCENARIOS
]


@pytest.mark.parametrize(("file", "scenario"), [*(("fsdp2", name) for name in SCENARIOS | FSDP2), *BY_DEEPSPEED])
def test_sharded_training_equals_one_process(
    given: Path, launched: Runs, file: str, scenario: str, tmp_path: Path
) -> None:
    two = launched(file, "no")
    kind = json.loads((two / f"{scenario}.done.json").read_text())["type"]
    assert kind == ("DistributedType.FSDP" if file == "fsdp2" else "DistributedType.DEEPSPEED")
    before, ours, theirs = both(given, two, scenario, 1e-4, tmp_path)
    moved = max(float((theirs[name] - before.get(name, 0.0)).abs().max()) for name in theirs)
    assert moved > 1e-3
    for name, weight in theirs.items():
        assert float((ours[name] - weight).abs().max()) <= 1e-4 * moved, name


@pytest.mark.parametrize(
    "file",
    ["fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_bf16_as_the_files_have_it_stays_near(given: Path, launched: Runs, file: str, tmp_path: Path) -> None:
    """Against one process under autocast: two ways to compute in bf16, with weights in float32."""
    before, ours, theirs = both(given, launched(file, "bf16"), "half", 0.1, tmp_path)
    saved = next(iter(ours.values())).dtype  # DeepSpeed saves in bf16
    assert saved == (torch.float32 if file == "fsdp2" else torch.bfloat16)
    difference = sum(float((ours[name].float() - theirs[name].to(saved)).square().sum()) for name in ours)
    moved = sum(float((theirs[name] - before[name]).square().sum()) for name in theirs)
    assert (difference / moved) ** 0.5 <= 0.2  # seen: 0.05, and 0.13 with weights rounded to bf16
