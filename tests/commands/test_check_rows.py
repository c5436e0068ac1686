"""`longvpo check --rows`: rows are looked over from the command line, alone and with a recipe's model and settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import tiny_models
from cli import longvpo
from longvpo_hf.preference import VideoPreference


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
