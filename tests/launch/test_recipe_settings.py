"""Settings of recipes that would fail after hours, or be passed over, are refused when the command line is read."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig

from cli import longvpo
from longvpo_hf import LongVPOConfig, launch
from longvpo_hf.errors import ConfigError, LongVPOError
from longvpo_hf.launch import RecipeArguments

RECIPES = {name: launch.load_recipe(name) for name in ("stage1", "stage2", "temporal")}
WORDS = {"model_name_or_path": "m", "dataset_name": "d", "use_cpu": "true"}


def parsed(**settings: Any) -> tuple[RecipeArguments, ModelConfig, LongVPOConfig]:
    words = {**WORDS, **settings}
    return launch.parse(
        [
            word
            for name, value in words.items()
            for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
        ]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"max_steps": steps}, f"max_steps must be ≥ 1, or -1 .* got {steps}") for steps in (0, -2)),
        *(({"num_train_epochs": epochs}, "num_train_epochs must be > 0 where max_steps") for epochs in (0, -1)),
        ({"weight_decay": -0.1}, "weight_decay must be ≥ 0, got -0.1"),
        ({"warmup_steps": -1}, "warmup_steps must be ≥ 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be ≥ 0, got -1"),
        ({"loss_type": "sigmoidd"}, "loss_type must be among .* got 'sigmoidd'. Did you mean sigmoid"),
        ({"loss_type": "dpo"}, "loss_type must be among sigmoid, hinge, .* got 'dpo'"),
        ({"loss_type": ["ipo", "nope"], "sft_weight": 0}, "loss_type must be among .* got 'nope'"),
        ({"lora_r": 8}, "lora_r is about an adapter: add use_peft=true"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules is about an adapter"),
        ({"use_dora": "true"}, "use_dora is about an adapter"),
        ({"use_peft": "true", "lora_r": 0}, "lora_r must be ≥ 1, got 0"),
        ({"use_peft": "true", "lora_alpha": -1}, "lora_alpha must be ≥ 1, got -1"),
        *(({"use_peft": "true", "lora_dropout": p}, "lora_dropout must be ≥ 0 and < 1") for p in (-0.1, 1.0, "nan")),
        (
            {"attn_implementation": "sdpaa"},
            "attn_implementation must be among eager, .* got 'sdpaa'. Did you mean sdpa",
        ),
        ({"report_to": "wandbb"}, "report_to must be among .*wandb.* got 'wandbb'. Did you mean wandb"),
        ({"report_to": "azure_ml"}, "report_to=azure_ml needs azure_ml, which is not here"),
        ({"eval_strategy": "steps", "eval_steps": 2}, "eval_strategy=steps needs dataset_test_split"),
        ({"dataset_missing": "drop"}, "dataset_missing is about rows .* give video_root too"),
        ({"probe_questions": "x.jsonl"}, "probe_questions is about probes .* probe_steps"),
        ({"probe_world": "world"}, "probe_world is about probes .* probe_steps"),
        ({"probe_steps": 2, "probe_world": "w", "probe_questions": "q"}, "probe_world has questions of its own"),
        ({"benchmark_data": "x"}, "about benchmarks after training: name them too"),
        ({"benchmark_frames": [8]}, "about benchmarks after training: name them too"),
        ({"benchmarks": "mlvu", "benchmark_frames": [8, 0]}, "benchmark_frames must be ≥ 1, got 0"),
        *(
            ({"probe_steps": 2, name: value}, f"{name} must be ≥ {least}, got {value}")
            for name, least in (("probe_frames", 2), ("probe_video_frames", 1), ("probe_number", 1))
            for value in (least - 1, -3)
        ),
        ({"probe_steps": 2, "probe_placements": 0}, "probe_placements must be ≥ 1, got 0"),
    ],
    ids=str,
)
def test_what_would_fail_late_or_be_passed_over_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(**settings)


@pytest.mark.parametrize("way", ["itself", "below", "link", "dots"])
@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "replay_name"])
def test_a_model_is_not_written_over_what_it_is_made_of(tmp_path: Path, name: str, way: str) -> None:
    """Its card replaced the dataset's, or its weights those of the base, from which a killed run then began."""
    (tmp_path / "given" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "given")
    output = tmp_path / {"itself": "given", "below": "given/new", "link": "link", "dots": "given/inner/.."}[way]
    recipe = {name: tmp_path / "given", "output_dir": output}
    if name == "model_name_or_path" and way == "below":  # beside its base is a place for an adapter
        parsed(**recipe)
    else:
        with pytest.raises(ConfigError, match=r"output_dir=.* would be (replaced|mixed with it); name another folder"):
            parsed(**recipe)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir must be a folder, .*file is a file"):
        parsed(output_dir=tmp_path / "file")


def test_what_goes_together_is_accepted() -> None:
    parsed()
    parsed(num_train_epochs=0, max_steps=3)
    parsed(max_steps=-1, num_train_epochs=0.5)
    parsed(use_peft="true", lora_r=1, lora_dropout=0, use_dora="true")
    parsed(probe_steps=1, probe_frames=2, probe_world="w")
    parsed(loss_type=["ipo", "apo_zero"], sft_weight=0)


def test_no_setting_is_an_empty_text(tmp_path: Path) -> None:
    """A shell makes `--output_dir ""` of a variable that is not set, and it would be the current folder."""
    names = [
        each.name
        for kind in (RecipeArguments, ModelConfig, LongVPOConfig)
        for each in fields(kind)
        if str(each.type) in ("str", "str | None", "<class 'str'>")
    ]
    assert {"dataset_config", "video_root", "replay_name", "model_revision", "output_dir", "run_name"} <= set(names)
    rng = random.Random(0)
    for name in names:
        with pytest.raises(ConfigError, match=f"{name} is empty: give a value, or leave it out"):
            parsed(**{name: rng.choice(["", " ", "\t"])})
    with pytest.raises(ConfigError, match="run_name is empty"):
        launch.parse(["--model_name_or_path", "m", "--dataset_name", "d", "--run_name="])
    for name in ("output_dir", "video_root", "run_name", "model_revision"):
        (tmp_path / "stage1.yaml").write_text(yaml.safe_dump({**WORDS, "use_cpu": True, name: ""}), encoding="utf-8")
        with pytest.raises(ConfigError, match=f"{name} is empty: give a value, or leave it out"):
            launch.parse(["--config", str(tmp_path / "stage1.yaml")])
        checked = longvpo(["check", str(tmp_path / "stage1.yaml")])
        assert (checked.exit_code, f"{name} is empty" in checked.stderr) == (2, True)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("given", ["probe_questions", "probe_world"])
def test_probes_that_cannot_be_asked_are_known_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, given: str
) -> None:
    module = RECIPES[recipe]
    for name in ("load_rows", "LongVPOTrainer"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("too late"))
    words = {**WORDS, "probe_steps": 2, given: str(tmp_path / "nowhere"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(LongVPOError, match="nowhere"):
        module.main([word for name, value in words.items() for word in (f"--{name}", str(value))])
