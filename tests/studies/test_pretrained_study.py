"""The study of a pretrained language model end to end, in small: as shipped, but for its scale and a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from forked import longvpo_of_forks
from longvpo_hf.miniature.language import SENTENCES, language_of
from longvpo_hf.miniature.study import environment, make_base, make_world
from longvpo_hf.studies.study import Study, find_study, shipped_studies
from small_english import write_language_model

SMALL = {
    "pretraining_clips": 256,
    "stage1_clips": 64,
    "stage2_clips": 128,
    "evaluation_clips": 128,
    "num_rows": 16,
    "max_clips": 4,
    "stage2_rows": 8,
    "steps": 2,
    "stage2_steps": 2,
    "lengths": [1, 8],
    "questions_per_length": 24,
    "pair_lengths": [2],
    "pair_questions_per_length": 4,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("study")
    language_model = str(write_language_model(folder / "language", steps=150))
    content = yaml.safe_load(shipped_studies()["pretrained"].read_text(encoding="utf-8"))
    content["miniature"] = {"scale": "fast", "language_model": language_model, **SMALL}
    (folder / "small.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    result = longvpo_of_forks(["run", str(folder / "small.yaml"), "--output", str(folder / "run")])
    assert result.exit_code == 0, result.output
    return folder / "run"


def results(finished: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((finished / "metrics.json").read_text())["results"]
    return found


def test_every_model_is_measured_in_sentences(finished: Path) -> None:
    for model in ("base", "stage1-model", "stage2-model"):
        measured = results(finished)[f"{model}-lengths"]
        assert list(measured["accuracy"]) == ["1", "8"]
        assert list(measured["pairs"]["accuracy"]) == ["2"]
    # The language model reads colour words; that the projector says them is all that one clip asks for.
    assert results(finished)["base-lengths"]["accuracy"]["1"] >= 40


def test_rows_speak_english(finished: Path) -> None:
    for rows, named in (("stage1-rows", 1), ("stage2-rows", 2)):
        data = load_dataset(str(finished / rows), split="train", cache_dir=str(finished / "elsewhere"))
        assert len(data) > 0
        for row in data.with_format("arrow")[:].to_pylist():
            assert len(SENTENCES.named_markers(row["prompt"][0]["content"])) == named
            assert row["chosen"][0]["content"].startswith("The ")


def test_the_base_answers_what_stage_1_unlearns(finished: Path) -> None:
    for rows in ("stage1-rows", "stage2-rows"):
        data = load_dataset(str(finished / rows), split="train", cache_dir=str(finished / "elsewhere"))
        answered = {
            row["answer_model"].partition("@")[0] for row in data.with_format("arrow")["provenance"].to_pylist()
        }
        assert answered == {"miniature-base"}


def test_the_report_says_what_the_base_is_and_what_it_was_told(finished: Path) -> None:
    made = results(finished)["base"]
    assert made["recall_steps"] == 0
    report = (finished / "report.md").read_text(encoding="utf-8")
    assert "mean nothing" in report
    assert "was told the world's truth about single clips" in " ".join(report.split())
    assert f"{100 * made['words_right'][2]:.1f} %" in report
    assert "A pretrained language model learnt to see on videos of one and two clips." in report


def test_trained_models_are_adapters_on_the_base_before_them(finished: Path) -> None:
    for model in ("stage1-model", "stage2-model"):
        settings = json.loads((finished / model / "adapter_config.json").read_text())
        base = Path(settings["base_model_name_or_path"])
        adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), finished / model)
        names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
        assert names
        assert all("language_model" in name for name in names)
        assert AutoProcessor.from_pretrained(finished / model).image_seq_length == 4
    assert base.name == "stage2-model-base"  # Stage 1's adapter was merged first


def test_a_world_says_in_which_language_its_models_are_asked(finished: Path) -> None:
    assert language_of(finished / "world" / "evaluation") is SENTENCES


def test_the_shipped_study_is_of_half_an_hour_and_of_the_default_model() -> None:
    study = find_study("pretrained")
    base = make_base(study)
    assert base.settings["language_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "HF_HUB_OFFLINE" not in base.environment  # it may come from the Hub
    assert make_world(study).environment["HF_HUB_OFFLINE"] == "1"
    assert "OMP_NUM_THREADS" not in base.environment


def test_its_trainings_have_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's launcher gave them one thread, without a word."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment(find_study("pretrained"))["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment(find_study("pretrained"))["OMP_NUM_THREADS"] == "3"


def test_without_a_language_model_a_step_is_what_it_was() -> None:
    """Finished runs of the miniature are not made anew, and stay in one thread."""
    step = make_base(Study("miniature", find_study("miniature").steps))
    assert set(step.settings) == {"scale", "words", "seed", "pretraining"}
    assert step.environment["OMP_NUM_THREADS"] == "1"
