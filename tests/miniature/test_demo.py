"""`longvpo demo`: the whole method end to end at its fast setting; the same numbers twice; resuming."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from cli import longvpo
from longvpo_hf.miniature import demo as demo_module
from longvpo_hf.miniature.demo import Demo, run_demo
from longvpo_hf.miniature.evaluation import Score, make_pair_questions, make_questions
from longvpo_hf.miniature.machine import PeakMemory
from longvpo_hf.miniature.settings import STAGE2, DemoSettings
from longvpo_hf.miniature.world import read_world
from longvpo_hf.preference import VideoPreference

SETTINGS = replace(
    DemoSettings.fast(seed=3),
    lengths=(1, 2, 8),
    questions_per_length=12,
    pair_lengths=(2, 4),
    pair_questions_per_length=8,
)
WORLDS = ("pretraining", "stage1", "stage2", "evaluation")
MODELS = ("before", "stage1", "stage2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fast run."""
    output = tmp_path_factory.mktemp("demo") / "run"
    run_demo(output, SETTINGS)
    return output


def test_writes_all_it_promises(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    for model in MODELS:
        assert list(metrics["accuracy"][model]) == ["1", "2", "8"]
        assert all(0 <= value <= 100 for value in metrics["accuracy"][model].values())
        for measured, length in ((metrics, "8"), (metrics["pairs"], "4")):
            low, high = measured["interval_95"][model][length]
            assert low <= measured["accuracy"][model][length] <= high
        assert sum(part["questions"] for part in metrics["positions"][model]["8"].values()) == 12
        assert list(metrics["pairs"]["accuracy"][model]) == ["2", "4"]
    assert metrics["chance"] == 12.5
    assert metrics["pairs"]["chance"] == pytest.approx(100 / 56)
    assert metrics["seed"] == 3
    phases = ["worlds", "base", "evaluate base", "rows", "train model", "evaluate model"]
    phases += ["stage2-captions", "stage2-dataset", "train stage2-model", "evaluate stage2-model"]
    assert list(metrics["seconds"]) == phases
    report = (finished / "report.md").read_text()
    assert "mean nothing" in report
    assert f"| 8 | {metrics['accuracy']['before']['8']:.1f} " in report
    for picture in ("accuracy.png", "positions.png", "stage1-row.png", "stage2-row.png"):
        assert picture in report
        assert min(Image.open(finished / picture).size) > 200


def test_dataset_and_models_open_with_the_usual_calls(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    for stage, folder in (("stage1", "dataset"), ("stage2", "stage2-dataset")):
        rows = load_dataset(str(finished / folder), split="train", cache_dir=str(finished / "elsewhere"))
        assert len(rows) == metrics["funnels"][stage]["stages"]["rows"] > 0
    for folder in ("base", "model", "stage2-model"):
        model = AutoModelForImageTextToText.from_pretrained(finished / folder)
        processor = AutoProcessor.from_pretrained(finished / folder)
        assert type(model).__name__ == "InternVLForConditionalGeneration"
        assert processor.chat_template
    assert "longvpo_tree" not in (finished / "model" / "config.json").read_text()


def test_training_changed_the_language_model_and_not_the_vision_tower(finished: Path) -> None:
    weights = [
        AutoModelForImageTextToText.from_pretrained(finished / folder).state_dict()
        for folder in ("base", "model", "stage2-model")
    ]
    for start, trained in pairwise(weights):
        changed = {name for name in start if not torch.equal(start[name], trained[name])}
        assert any("language_model" in name for name in changed)
        assert not any("vision_tower" in name for name in changed)


def test_evaluation_clips_were_in_no_training(finished: Path) -> None:
    worlds = {name: read_world(finished / "world" / name) for name in WORLDS}
    media = {name: {Path(item.clip.path).read_bytes() for item in clips} for name, clips in worlds.items()}
    for name in WORLDS[:-1]:
        assert media["evaluation"].isdisjoint(media[name])


def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    # The finished run, as it was before the rows of Stage 2 were made.
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for phase in (STAGE2.rows, f"train {STAGE2.name}", f"evaluate {STAGE2.name}"):
        (output / "state" / f"{phase}.json").unlink()
    for folder in (STAGE2.rows, f"{STAGE2.rows}.job", STAGE2.name):
        shutil.rmtree(output / folder)
    stamps = {path: path.stat().st_mtime_ns for path in (output / "base").iterdir()}

    with monkeypatch.context() as patch:
        patch.setattr(demo_module, "_Progress", Interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(output, SETTINGS)
    assert list((output / "training" / STAGE2.name).glob("checkpoint-*"))
    assert not (output / STAGE2.name).exists()
    run_demo(output, SETTINGS)

    assert {path: path.stat().st_mtime_ns for path in (output / "base").iterdir()} == stamps
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (output, finished))
    for name in ("accuracy", "positions", "pairs", "funnels", "stage2_truth"):
        assert ours[name] == theirs[name]
    trained = [
        AutoModelForImageTextToText.from_pretrained(folder / STAGE2.name).state_dict() for folder in (output, finished)
    ]
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=0, atol=0)


def test_a_folder_with_other_settings_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match="holds a run with other settings"):
        Demo(finished, replace(SETTINGS, steps=5))


def test_restart_deletes_nothing_but_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    result = longvpo(["demo", "--fast", "--restart", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds no demo run" in result.output
    assert (tmp_path / "thesis.tex").exists()


def test_questions_are_answerable_and_anchors_spread(finished: Path) -> None:
    clips = read_world(finished / "world" / "evaluation")
    by_clip = {item.clip: item for item in clips}
    questions = make_questions(clips, num_clips=8, number=40, seed=1)
    anchors = [question.asked[0] for question in questions]
    assert {anchors.count(place) for place in range(8)} == {5}
    for question in questions:
        asked = by_clip[question.timeline.clips[question.asked[0]]]
        others = [by_clip[clip] for i, clip in enumerate(question.timeline.clips) if i != question.asked[0]]
        assert question.answer == asked.colour
        assert asked.marker in question.text
        assert asked.marker not in {other.marker for other in others}


def test_pair_questions_are_answerable_and_ask_in_either_order(finished: Path) -> None:
    clips = read_world(finished / "world" / "evaluation")
    by_clip = {item.clip: item for item in clips}
    questions = make_pair_questions(clips, num_clips=8, number=60, seed=1)
    assert 15 < sum(question.asked[0] < question.asked[1] for question in questions) < 45
    assert {place for question in questions for place in question.asked} == set(range(8))
    for question in questions:
        first, second = (by_clip[question.timeline.clips[place]] for place in question.asked)
        markers = [by_clip[clip].marker for clip in question.timeline.clips]
        assert markers.count(first.marker) == markers.count(second.marker) == 1
        assert question.text.index(first.marker) < question.text.index(second.marker)
        assert question.answer == f"{first.colour} {second.colour}"
        assert first.colour != second.colour
    with pytest.raises(ValueError, match="need num_clips ≥ 2, got 1"):
        make_pair_questions(clips, num_clips=1, number=1, seed=1)


def test_truth_of_the_rows_is_what_the_media_show(finished: Path) -> None:
    """Counted again, from the captions of the world that the scenes of each row have by their source ids."""
    metrics = json.loads((finished / "metrics.json").read_text())
    truth = {item.clip.source_id: item for item in read_world(finished / "world" / "stage2")}
    rows = load_dataset(str(finished / "stage2-dataset"), split="train", cache_dir=str(finished / "elsewhere"))
    right = wrong = exact = 0
    for row in rows.with_format("arrow")[:].to_pylist():
        markers = re.findall(r"[a-z]+-[a-z]+", row["prompt"][0]["content"])
        scenes = [truth[clip["origin"]["source_id"]] for clip in row["clips"]]
        found = [[scene.colour for scene in scenes if scene.marker == marker] for marker in markers]
        answer = " ".join(colours[0] for colours in found) if all(len(colours) == 1 for colours in found) else None
        right += row["chosen"][0]["content"] == answer
        wrong += row["rejected"][0]["content"] != answer
        places = {place for place, scene in enumerate(scenes) if scene.marker in markers}
        exact += places == set(row["evidence"]) and len(places) == 2
    counts = metrics["stage2_truth"]["rows"]
    assert counts == {
        "pairs": len(rows),
        "chosen_right": right,
        "rejected_wrong": wrong,
        "evidence_exact": exact,
    }
    assert metrics["stage2_truth"]["before filters"]["pairs"] >= len(rows)


def test_long_videos_are_runs_of_consecutive_scenes(finished: Path) -> None:
    row = Demo(finished, SETTINGS).sample_row(STAGE2.rows)
    clips = VideoPreference.from_row(row).timeline.clips
    sources = [clip.source_id.split("#") for clip in clips]
    assert len({name for name, _ in sources}) == 1
    starts = [float(start) for _, start in sources]
    assert starts == [starts[0] + index for index in range(len(starts))]
    assert 4 <= len(clips) <= 8


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells")
def test_peak_memory_counts_other_processes_and_what_is_gone_again() -> None:
    with PeakMemory() as memory:
        script = "import time; held = b'x' * (300 * 1024**2); time.sleep(3)"
        subprocess.run([sys.executable, "-c", script], check=True)
    with PeakMemory() as after:
        pass
    assert memory.peak_gib is not None
    assert after.peak_gib is not None
    assert memory.peak_gib - after.peak_gib > 0.25


def test_interval_is_wilsons() -> None:
    # By hand: p = 0.9, n = 10, z = 1.96 -> centre (0.9 + 0.19207) / 1.38415 = 0.78898, half 0.19318.
    low, high = Score(9, 10).interval_percent
    assert low == pytest.approx(59.58, abs=0.01)
    assert high == pytest.approx(98.21, abs=0.01)
