"""`longvpo demo`: the whole method end to end at its fast setting; the same numbers twice; resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from typer.testing import CliRunner

from longvpo_hf.cli import app
from longvpo_hf.miniature import demo as demo_module
from longvpo_hf.miniature.demo import LONGVPO, Demo, DemoSettings, run_demo
from longvpo_hf.miniature.evaluation import Score, make_questions
from longvpo_hf.miniature.world import read_world

SETTINGS = replace(DemoSettings.fast(seed=3), lengths=(1, 2, 8), questions_per_length=12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fast run."""
    output = tmp_path_factory.mktemp("demo") / "run"
    run_demo(output, SETTINGS)
    return output


def test_writes_all_it_promises(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    for when in ("before", "after"):
        assert list(metrics["accuracy"][when]) == ["1", "2", "8"]
        assert all(0 <= value <= 100 for value in metrics["accuracy"][when].values())
        low, high = metrics["interval_95"][when]["8"]
        assert low <= metrics["accuracy"][when]["8"] <= high
        assert sum(part["questions"] for part in metrics["positions"][when]["8"].values()) == 12
    assert metrics["chance"] == 12.5
    assert metrics["seed"] == 3
    assert metrics["seconds"].keys() >= {"worlds", "base", "evaluate base", "rows", "train model", "evaluate model"}
    report = (finished / "report.md").read_text()
    assert "mean nothing" in report
    assert f"| 8 | {metrics['accuracy']['before']['8']:.1f} " in report
    for picture in ("accuracy.png", "positions.png", "filmstrip.png"):
        assert picture in report
        assert min(Image.open(finished / picture).size) > 200


def test_dataset_and_models_open_with_the_usual_calls(finished: Path) -> None:
    rows = load_dataset(str(finished / "dataset"), split="train", cache_dir=str(finished / "elsewhere"))
    metrics = json.loads((finished / "metrics.json").read_text())
    assert len(rows) == metrics["funnel"]["stages"]["rows"] > 0
    for folder in ("base", "model"):
        model = AutoModelForImageTextToText.from_pretrained(finished / folder)
        processor = AutoProcessor.from_pretrained(finished / folder)
        assert type(model).__name__ == "InternVLForConditionalGeneration"
        assert processor.chat_template
    assert "longvpo_tree" not in (finished / "model" / "config.json").read_text()


def test_training_changed_the_language_model_and_not_the_vision_tower(finished: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(finished / "base").state_dict()
    trained = AutoModelForImageTextToText.from_pretrained(finished / "model").state_dict()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_evaluation_clips_were_in_no_training(finished: Path) -> None:
    worlds = {name: read_world(finished / "world" / name) for name in ("pretraining", "stage1", "evaluation")}
    media = {name: {Path(item.clip.path).read_bytes() for item in clips} for name, clips in worlds.items()}
    assert media["evaluation"].isdisjoint(media["pretraining"] | media["stage1"])


def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(demo_module, "_Progress", Interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(output, SETTINGS)
    assert list((output / "training" / "model").glob("checkpoint-*"))
    assert not (output / "model").exists()
    stamps = {path: path.stat().st_mtime_ns for path in (output / "base").iterdir()}

    run_demo(output, SETTINGS)

    assert {path: path.stat().st_mtime_ns for path in (output / "base").iterdir()} == stamps
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (output, finished))
    for name in ("accuracy", "positions", "funnel"):
        assert ours[name] == theirs[name]
    trained = [
        AutoModelForImageTextToText.from_pretrained(folder / LONGVPO.name).state_dict() for folder in (output, finished)
    ]
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=0, atol=0)


def test_a_folder_with_other_settings_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match="holds a run with other settings"):
        Demo(finished, replace(SETTINGS, steps=5))


def test_restart_deletes_nothing_but_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    result = CliRunner().invoke(app, ["demo", "--fast", "--restart", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds no demo run" in result.output
    assert (tmp_path / "thesis.tex").exists()


def test_questions_are_answerable_and_anchors_spread(finished: Path) -> None:
    clips = read_world(finished / "world" / "evaluation")
    by_clip = {item.clip: item for item in clips}
    questions = make_questions(clips, num_clips=8, number=40, seed=1)
    anchors = [question.anchor for question in questions]
    assert {anchors.count(place) for place in range(8)} == {5}
    for question in questions:
        asked = by_clip[question.timeline.clips[question.anchor]]
        others = [by_clip[clip] for i, clip in enumerate(question.timeline.clips) if i != question.anchor]
        assert question.answer == asked.colour
        assert asked.marker in question.text
        assert asked.marker not in {other.marker for other in others}


def test_interval_is_wilsons() -> None:
    # By hand: p = 0.9, n = 10, z = 1.96 -> centre (0.9 + 0.19207) / 1.38415 = 0.78898, half 0.19318.
    low, high = Score(9, 10).interval_percent
    assert low == pytest.approx(59.58, abs=0.01)
    assert high == pytest.approx(98.21, abs=0.01)
