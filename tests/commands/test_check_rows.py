"""`longvpo check` from the command line: settings that no recipe has; rows, alone and with a recipe's settings."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import tiny_models
from cli import longvpo
from longvpo_hf.preference import VideoPreference
from longvpo_hf.training.config import LongVPOConfig


@pytest.fixture
def rows(tmp_path: Path, preferences: list[VideoPreference]) -> Path:
    """Four rows, two of which cannot be trained on: one never, one not with few tokens."""
    rows = [preference.to_row(lambda clip: clip.path) for preference in preferences[:4]]
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["chosen"] = [{"role": "assistant", "content": "word " * 3000}]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "rows"))
    return tmp_path / "rows"


def test_rows_are_checked_alone(rows: Path) -> None:
    result = longvpo(["check", "--rows", str(rows)])
    assert result.exit_code == 1
    assert "1 of 4 rows cannot be trained on:\n  1 same_answers (" in result.stdout
    assert "\n    row 1: " in result.stdout
    found = json.loads(longvpo(["check", "--rows", str(rows), "--json"]).stdout)
    assert found["rows"]["num_rows"] == 4
    assert [(problem["kind"], problem["rows"]) for problem in found["rows"]["problems"]] == [("same_answers", [1])]


def test_rows_are_checked_with_a_recipe(rows: Path, tmp_path: Path) -> None:
    model, processor = tiny_models.build("internvl")
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    config = tmp_path / "recipe.yaml"
    settings = {"model_name_or_path": str(tmp_path / "tiny"), "dataset_name": "elsewhere", "output_dir": "run"}
    config.write_text(yaml.safe_dump({**settings, "num_frames": 6, "fps": None, "bf16": False, "use_cpu": True}))
    result = longvpo(["check", str(config), "--max_length", "2000", "--rows", str(rows)])
    assert result.exit_code == 1
    assert "2 of 4 rows cannot be trained on:" in result.stdout
    assert "1 too_long (" in result.stdout
    assert "1 same_answers (" in result.stdout


def test_nothing_to_check_is_said() -> None:
    result = longvpo(["check"])
    assert result.exit_code == 2
    assert "Nothing to check" in result.stderr


def misspelt(number: int) -> list[str]:
    """Names of settings with a letter too few or twice, which are no other settings."""
    rng, known = random.Random(9), [field.name for field in fields(LongVPOConfig) if field.init]
    found: list[str] = []
    while len(found) < number:
        name = rng.choice(known)
        place = rng.randrange(1, len(name))
        wrong = name[:place] + rng.choice(("", name[place] * 2)) + name[place + 1 :]
        if wrong not in known and "_" not in (wrong[0], wrong[-1]):
            found.append(wrong)
    return found


@pytest.mark.parametrize("wrong", ["nope", "betaa", *misspelt(12)])
def test_settings_that_no_recipe_has_are_refused(tmp_path: Path, wrong: str) -> None:
    """Else the plan would be one of other settings than were meant."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "gone/model", wrong: 1}))
    for words in (["check", str(file)], ["check", "miniature/stage1", f"--{wrong}", "1"]):
        result = longvpo(words)
        assert result.exit_code == 2
        assert f"Unknown option --{wrong}." in result.stderr
