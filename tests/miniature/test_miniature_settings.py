"""What the miniature's settings may be: a study that asks for others is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cli import longvpo

COUNTS = [
    "pretraining_clips", "stage1_clips", "stage2_clips", "evaluation_clips", "num_rows", "steps", "stage2_rows",
    "stage2_steps", "questions_per_length", "pair_questions_per_length",
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({name: value}, f"{name} must be ≥ 1, got {value}") for name in COUNTS for value in (0, -3)),
        *(({name: value}, f"{name} must be of type int") for name in COUNTS for value in ("ten", 2.5, True, None, [3])),
        ({"max_clips": 1}, "max_clips must be from 2 to stage1_clips (4096), got 1"),
        ({"max_clips": 8, "stage1_clips": 7}, "max_clips must be from 2 to stage1_clips (7), got 8"),
        *(
            ({"lengths": value}, "lengths must be numbers of clips from 1 to 2048, ascending, got")
            for value in ((), 3, "12", (0, 2), (2, 1), (1, 2.0), (1, "2"), (1, 4096), (True,))
        ),
        ({"pair_lengths": (1, 2)}, "pair_lengths must be numbers of clips from 2 to 2048, ascending"),
        ({"stage2_scenes": (2,)}, "stage2_scenes must be two numbers"),
        ({"stage2_scenes": (8, 4)}, "stage2_scenes must be numbers of clips from 2 to 4096, ascending"),
        ({"stage2_judge": "no"}, "stage2_judge must be of type bool, got 'no'"),
        ({"meaningless": 1}, "meaningless must be of type bool, got 1"),
        ({"language_model": 3}, "language_model must be a name or a folder, got 3"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_study_before_anything_runs(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    as_yaml = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    study = tmp_path / "s.yaml"
    content = {"base": "miniature", "miniature": as_yaml, "steps": [{"build": "stage1"}]}
    study.write_text(yaml.safe_dump(content), encoding="utf-8")
    result = longvpo(["run", str(study), "--dry-run", "--output", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert result.stderr.startswith("longvpo run: miniature: ")
    assert message in result.stderr
