"""What a study publishes: its model with card and report, and nothing of the machine it ran on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hub_double import HubDouble
from longvpo_hf.record import (
    AdapterRecord,
    MethodRecord,
    ModelRecord,
    Source,
    TrainedOn,
    TrainingRecord,
    write_record,
)
from longvpo_hf.studies.push import published_record, push
from longvpo_hf.studies.results import results_of


def lengths(percent: float) -> dict[str, Any]:
    """What the miniature measures, of one length."""
    part = {"accuracy": {"8": percent}, "interval": {"8": [percent - 10, percent + 10]}}
    return {**part, "positions": {"8": {"begin": {"questions": 5}, "end": {"questions": 7}}}, "pairs": part}


def test_a_model_is_pushed_with_its_report_and_nothing_of_this_machine(tmp_path: Path) -> None:
    run = tmp_path / "run"
    files = {
        "m/config.json": "{}",
        "m/model.safetensors": "weights",
        "m/README.md": "---\ntags: []\n---\n# A card",
        "m/probe/step-2/position.json": "{}",
        "m/training_args.bin": str(tmp_path),
        "m/checkpoint-3/optimizer.pt": "large",
        "m/_probe_media/clip.mp4": "film",
        "m/.lock": "",
        "m/.eval_results/mlvu.yaml": "- value: 1",
        "report.md": f"# A study\n\n    longvpo inspect {run}/stage1-rows\n",
        "pictures/accuracy.png": "picture",
        "state/m.json": "{}",
    }
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text, encoding="utf-8")
    write_record(run / "m", ModelRecord("m", "path/to/m", Source("base")))
    (run / "state" / "m-lengths.result.json").write_text(json.dumps(lengths(61.5)), encoding="utf-8")
    with HubDouble() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "longvpo_hf.studies.push", str(run / "m"), "someone/m", "private", "first-try"],
            env={**hub.environment(tmp_path / "hf")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["model", "someone/m"]
        commit = repository.at("first-try")
        assert commit is not None
        published = commit[1]
    assert repository.private
    assert not set(repository.files) - {".gitattributes"}, "the branch alone"
    assert set(published) - {".gitattributes"} == {
        "config.json", "model.safetensors", "README.md", "probe/step-2/position.json", "report.md",
        "pictures/accuracy.png", ".eval_results/mlvu.yaml", "longvpo.json",
    }  # fmt: skip
    assert published["report.md"].decode() == "# A study\n\n    longvpo inspect stage1-rows\n"
    card = published["README.md"].decode()
    assert 'from_pretrained("someone/m"' in card
    assert "| right answers about one clip of 8 | 61.5 (51.5–71.5) | 12 |" in card
    assert "[report.md](report.md)" in card
    assert json.loads(published["longvpo.json"])["load_from"] == "someone/m"
    assert not any(str(tmp_path).encode() in content for content in published.values())


def test_a_name_that_cannot_be_written_to_is_advice(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with HubDouble() as hub:
        words = [sys.executable, "-m", "longvpo_hf.studies.push", str(tmp_path / "m"), "not a name", "default"]
        environment = hub.environment(tmp_path / "hf")
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_card_names_the_first_base_and_all_rows(tmp_path: Path) -> None:
    """Two trainings of a study: others can find the base of the first, and not the model between."""
    base = Source.of("org/base", "abc")
    rows = [TrainedOn(Source(f"{name}-rows"), (MethodRecord(name),)) for name in ("stage1", "stage2")]
    lora = TrainingRecord(adapter=AdapterRecord("LoRA", 4))
    write_record(tmp_path / "stage1-model", ModelRecord("stage1-model", "path/to/stage1-model", base, data=(rows[0],)))
    second = ModelRecord("stage2-model", "path/to/stage2-model", Source("stage1-model"), data=(rows[1],), training=lora)
    write_record(tmp_path / "stage2-model", second)
    record = published_record(tmp_path / "stage2-model", "me/mine", is_merged=True)
    assert record is not None
    assert (record.name, record.load_from, record.base, record.data) == ("mine", "me/mine", base, tuple(rows))
    assert record.adapter == "", "its weights are those of a whole model"
    # Of an adapter that is none, the base is what it must be put on.
    record = published_record(tmp_path / "stage2-model", "me/mine", is_merged=False)
    assert record is not None
    assert (record.base, record.data) == (Source("stage1-model"), (rows[1],))
    # A model that says it is its own base ends the search.
    write_record(tmp_path / "m", ModelRecord("m", "m", Source("m")))
    record = published_record(tmp_path / "m", "me/m", is_merged=False)
    assert record is not None
    assert record.base == Source("m")
    assert published_record(tmp_path / "gone", "me/m", is_merged=False) is None


def test_results_stand_beside_those_of_the_base_that_were_measured_alike(tmp_path: Path) -> None:
    scored = {"percent": 50.0, "band_95": [40.0, 60.0], "number": 30}
    nothing = {"percent": None, "band_95": None, "number": 0}
    files = {
        "state/base-lengths.result.json": lengths(20.0),
        "state/m-lengths.result.json": lengths(61.5),
        "m-position/position.json": {
            "upper_bound": scored, "thirds": {"begin": scored, "middle": nothing, "end": scored},
        },
        "m-needle/needle.json": {
            "frames": [16, 64],
            "cells": [{"frames": 16, "right": right, "number": 4} for right in (4, 2)],  # 64 did not fit
        },
        "base-needle/needle.json": {"frames": [16], "cells": [{"frames": 16, "right": 1, "number": 4}]},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    found = {str(result.metric_name): result for result in results_of(tmp_path, "m", "base")}
    assert {name: result.metric_value for name, result in found.items()} == {
        "right answers about a short video alone": 50.0,
        "right answers about a short video at the begin": 50.0,
        "right answers about a short video at the end": 50.0,
        "needles found in 16 frames": 75.0,  # 6 of 8
        "right answers about one clip of 8": 61.5,
        "right answers about two clips of 8": 61.5,
    }
    # Four needles at two depths are four draws: Wilson's bounds of 3 of 4 and of 1 of 4, from scipy.
    assert found["needles found in 16 frames"].metric_args == {
        "questions": 4,
        "interval_95": [30.06, 95.44],
        "base": {"value": 25.0, "interval_95": [4.56, 69.94]},
    }
    assert found["right answers about one clip of 8"].metric_args == {
        "questions": 12,
        "interval_95": [51.5, 71.5],
        "base": {"value": 20.0, "interval_95": [10.0, 30.0]},
    }
    args = found["right answers about a short video alone"].metric_args
    assert args == {"questions": 30, "interval_95": [40.0, 60.0]}


def test_an_adapter_on_a_model_of_this_machine_is_published_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged, with a card that loads it so, and nothing of the adapter."""
    run = tmp_path / "run"
    files = {
        "m/adapter_config.json": json.dumps({"base_model_name_or_path": str(run / "m-base")}),
        "m/adapter_model.safetensors": "adapter",
        "m/training_curve.png": "picture",
        "m/.eval_results/mlvu.yaml": "- value: 1",
        "m-base/config.json": "{}",
    }
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text, encoding="utf-8")
    training = TrainingRecord(adapter=AdapterRecord("LoRA", 4, 8, ("q_proj",)))
    write_record(run / "m", ModelRecord("m", "path/to/m", Source("m-base"), training=training))
    write_record(
        run / "m-base", ModelRecord("m-base", "path/to/m-base", Source.of("org/base"), licence={"license": "mit"})
    )

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def save_pretrained(self, folder: Path) -> None:
            (folder / self.name).write_text("whole", encoding="utf-8")

    parts = Part("model.safetensors"), Part("tokenizer.json")
    monkeypatch.setattr("longvpo_hf.responders.checkpoint.load_checkpoint", lambda name, dtype, merged: parts)
    commits: list[list[CommitOperationAdd]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **facts: None)

    def create_commit(self: HfApi, repo_id: str, operations: list[CommitOperationAdd], **facts: Any) -> Any:
        commits.append(operations)
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    assert push(run / "m", "me/mine", private=None) == "https://hub/commit"
    ((*operations,),) = commits
    published = {operation.path_in_repo: operation for operation in operations}
    assert len(published) == len(operations), "each file once"
    assert set(published) == {
        "model.safetensors", "tokenizer.json", "README.md", "longvpo.json", "training_curve.png",
        ".eval_results/mlvu.yaml",
    }  # fmt: skip
    with published["README.md"].as_file() as file:
        card = file.read().decode()
    assert "PeftModel" not in card
    assert "base_model: org/base\n" in card
    assert "| trained weights | LoRA of rank 4, α 8 on q_proj, merged into the base |" in card
