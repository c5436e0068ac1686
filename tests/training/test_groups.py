"""Trainings by processes that share their batches are those of one process: every log, every weight."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import recursively_apply, send_to_device

import grouped
import trainers
from conftest import make_dataset
from longvpo_hf.errors import ConfigError
from longvpo_hf.families import family_of
from longvpo_hf.preference import VideoPreference
from longvpo_hf.training import groups
from longvpo_hf.training.collator import HostVideos
from longvpo_hf.training.packing.sharing import Seat

#: Of speed, or an estimate from padded lengths.
UNCOMPARED = ("runtime", "per_second", "total_flos")
SHARED = [name for name, scenario in grouped.SCENARIOS.items() if scenario.size > 1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, preferences: list[VideoPreference]) -> dict[str, Any]:
    """What each scenario wrote."""
    folder = tmp_path_factory.mktemp("groups")
    make_dataset(preferences).save_to_disk(str(folder / "rows"))
    done = subprocess.run(
        [sys.executable, grouped.__file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in grouped.SCENARIOS}


@pytest.mark.parametrize("name", SHARED)
def test_groups_train_and_evaluate_as_one_process(runs: dict[str, Any], name: str) -> None:
    scenario, shared, one = grouped.SCENARIOS[name], runs[name], runs[name.partition(",")[0]]
    assert shared["kind"] == "DistributedType.FSDP"
    assert shared["processes"] == scenario.groups
    assert shared["shared"][0] == shared["shared"][1] > 0
    assert one["shared"] == [0, 0]
    assert shared["weights"] == pytest.approx(one["weights"], rel=2e-5, abs=1e-5)
    assert len(shared["logs"]) == len(one["logs"]) == 4  # two steps, their summary, an evaluation
    assert ("loss/view_distillation" in one["logs"][0]) == ("view_distillation_weight" in scenario.more)
    for got, expected in zip(shared["logs"], one["logs"], strict=True):
        assert got.keys() == expected.keys()
        for metric, value in expected.items():
            # Rows that fill up an evaluation's last batch are no part of its metrics, but they are worked on.
            skipped = (*UNCOMPARED, *(["eval_visual_tokens"] if scenario.groups > 1 else []))
            skipped += ("num_tokens", "train_loss") if scenario.resumed else ()  # TRL's, of what came after
            if not any(part in metric for part in skipped):
                assert got[metric] == pytest.approx(value, rel=1e-4, abs=1e-4), metric


def test_frames_that_one_process_cannot_decode_end_all_with_one_error(
    runs: dict[str, Any], preferences: list[VideoPreference]
) -> None:
    errors = runs["full, 2 x 2"]["unreachable"]["raise"]["errors"]
    assert len(errors) == 4
    assert len(set(errors)) == 1
    gone = preferences[2].timeline
    assert re.match("Process [13] of 4 cannot make its batch: row ", errors[0])
    assert any(row.id in errors[0] for row in preferences if row.timeline == gone)
    assert f"unreachable: {gone.clips[0].path} " in errors[0]
    assert "no answer in time. Drop the row, or set on_bad_video='skip'." in errors[0]


def test_rows_that_one_process_cannot_decode_are_left_out_by_all(runs: dict[str, Any]) -> None:
    groups, one = (runs[name]["unreachable"]["skip"] for name in ("full, 2 x 2", "full"))
    assert groups["errors"] == [""] * 4
    assert len(groups["logs"]) == len(one["logs"]) == 3
    assert one["logs"][-2]["bad_videos/unreachable"] == 2
    for got, expected in zip(groups["logs"], one["logs"], strict=True):
        assert got.keys() == expected.keys()
        for metric, value in expected.items():
            if not any(part in metric for part in UNCOMPARED):
                assert got[metric] == pytest.approx(value, rel=1e-4, abs=1e-4), metric


# ------------------------------------------------------------------------------------------------ the parts of it


class _Accelerator:
    """Six processes in groups of two; each gathers its number and the number of the row."""

    num_processes = 6

    @staticmethod
    def gather(tensor: Any) -> Any:
        return recursively_apply(
            lambda own: torch.cat([own.reshape(-1, *own.shape[1:]) + 10 * rank for rank in range(6)]), tensor
        )


def test_one_process_of_each_group_speaks_for_it() -> None:
    everyone = _Accelerator.gather({"rows": torch.tensor([[0, 1], [2, 3]]), "one": torch.tensor([7])})
    assert groups._first_of_each(everyone["rows"], 2, 6).tolist() == [
        [0, 1], [2, 3], [20, 21], [22, 23], [40, 41], [42, 43]
    ]  # fmt: skip
    assert groups._first_of_each(everyone["one"], 2, 6).tolist() == [7, 27, 47]
    assert groups._first_of_each(everyone["one"], 3, 6).tolist() == [7, 37]
    assert groups._first_of_each(torch.zeros(0, 4), 2, 6).shape == (0, 4)


def test_frames_stay_on_the_host_until_they_are_cut(preferences: list[VideoPreference], tmp_path: Path) -> None:
    rows = make_dataset(preferences)
    trainer = trainers.make(tmp_path, rows)
    usual = trainers.loss_of(trainer, rows.select(range(2)))
    trainer.data_collator.seat = Seat(0, 2, family_of(trainer.model.config))
    batch = trainer.data_collator([rows[0], rows[1]])
    moved = send_to_device(batch, torch.device("meta"))
    assert moved["input_ids"].is_meta
    for videos in (moved["videos"], moved["reference"]["videos"]):
        assert isinstance(videos, HostVideos)
        assert len(videos) > 0
        assert not any(value.is_meta for visual in videos for value in visual.values())
    assert float(trainers.loss_of(trainer, rows.select(range(2)))) == pytest.approx(float(usual), abs=1e-6)


class _Group:
    @staticmethod
    def size() -> int:
        return 2

    @staticmethod
    def rank() -> int:
        return 0


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("internvl", {"tree_packing": False}, "tree_packing is off"),
        (
            "internvl",
            {"view_distillation_weight": 0.1, "view_distillation_on": "sampled"},
            "view_distillation_on='sampled' draws answers",
        ),
        ("llava_onevision", {}, "'llava_onevision' cannot be parted"),
        ("qwen3_5", {}, "linear attention"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_training(
    preferences: list[VideoPreference],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    settings: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(groups, "_share_batches", lambda accelerator: _Group())
    with pytest.raises(ConfigError, match=said) as raised:
        trainers.make(tmp_path, make_dataset(preferences), family=family, **settings)
    assert "parallelism_config_cp_size=2" in str(raised.value)
    assert "fsdp2.yaml" in str(raised.value)
