"""`longvpo train`: what goes to the recipe, what to accelerate, and which files names stand for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import accelerate.commands.launch
import pytest

from cli import longvpo
from longvpo_hf.shipped import shipped


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What accelerate is asked to launch."""
    calls: list[Any] = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", calls.append)
    return calls


def test_names_become_files_and_options_find_their_owner(started: list[SimpleNamespace]) -> None:
    words = ["--config", "internvl3_8b/stage1_lora", "--accelerate-config", "fsdp2", "--num_processes", "2"]
    result = longvpo(["train", "stage1", *words, "--learning_rate", "2", "--max-steps", "3"])
    assert result.exit_code == 0, result.output
    (launch,) = started
    assert launch.config_file == str(shipped("recipes/accelerate/fsdp2.yaml"))
    assert launch.num_processes == 2
    assert launch.training_script == str(shipped("recipes/stage1.py"))
    file = str(shipped("recipes/configs/internvl3_8b/stage1_lora.yaml"))
    assert launch.training_script_args == ["--config", file, "--learning_rate", "2", "--max-steps", "3"]


@pytest.mark.parametrize(
    ("words", "given"),
    [(["--cpu"], ["--use_cpu", "true"]), (["--cpu", "--use_cpu", "false"], ["--use_cpu", "false"]), ([], [])],
)
def test_cpu_is_told_to_the_recipe_too(started: list[SimpleNamespace], words: list[str], given: list[str]) -> None:
    result = longvpo(["train", "stage1", *words])
    assert result.exit_code == 0, result.output
    (launch,) = started
    assert launch.training_script_args == given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "internvl3_8b/stage1_lor"], "Did you mean internvl3_8b/stage1_lora?"),
        (["--accelerate_config", "fsdp"], "Did you mean fsdp2?"),
        (["--learning_rat", "2"], "Unknown option --learning_rat. Did you mean --learning_rate?"),
        (["--max-step=3"], "Unknown option --max-step=3. Did you mean --max_steps?"),
        (["--num_process", "2"], "Unknown option --num_process. Did you mean --num_processes?"),
        (["--num_framez", "3"], "Unknown option --num_framez. Did you mean --num_frames?"),
    ],
)
def test_what_nobody_knows_is_refused_by_name(started: list[Any], words: list[str], message: str) -> None:
    result = longvpo(["train", "stage1", *words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert started == []
