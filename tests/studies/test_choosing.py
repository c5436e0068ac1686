"""What a study leaves open, chosen for a machine: by its plan, in the hours, once per run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from longvpo_hf.errors import ConfigError
from longvpo_hf.studies import choosing
from longvpo_hf.studies.choosing import Gpus
from longvpo_hf.studies.study import Study, Train, content_of, find_study, shipped_studies, study_of

#: GiB at 128 frames, and hours per 1,000 rows at 128 frames and 300 TFLOP/s; both fall with the frames.
FACTS = {"internvl3_8b": (42.0, 2.6), "internvl3_2b": (17.0, 0.9), "smolvlm2_500m": (4.0, 0.1)}


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans by the table above, in place of the planner's, which takes seconds."""

    def plan(name: str, base: str, gpus: Gpus, accelerate: str, options: dict[str, Any]) -> Any:
        gib, hours = FACTS[name.partition("/")[0]]
        share = options.get("num_frames", 128) / 128
        held = (
            gib * (0.5 + share / 2) * (2.0 if "full" in name else 1.0) / (gpus.number if accelerate == "fsdp2" else 1)
        )
        return SimpleNamespace(
            fits=held <= gpus.memory_gib,
            frames_that_fit=48,
            remedies=(),
            tflop={"reference": 100 * share},
            gpu_hours_per_1000_rows=hours * share,
        )

    monkeypatch.setattr(choosing, "_plan", plan)


def weekend(gpus: Gpus, hours: float = 48) -> Study:
    return choosing._by_hours(replace(find_study("weekend"), hours=hours), gpus)


def test_more_memory_or_more_hours_never_choose_less() -> None:
    sizes = list(reversed(choosing._AUTO_BASES))

    def size(study: Study) -> tuple[int, int, int]:
        base = next(folder for folder, name in choosing._shipped_bases() if name == study.base)
        options = study.steps[0].options
        return sizes.index(base), options["frame_budget"], options["num_rows"]

    by_memory = [size(weekend(Gpus(1, gib, 300.0))) for gib in (8.0, 24.0, 48.0, 80.0)]
    assert by_memory == sorted(by_memory)
    assert by_memory[0][0] == 0
    assert by_memory[-1][0] == 2
    by_hours = [size(weekend(Gpus(1, 80.0, 300.0), hours)) for hours in (1, 6, 24, 48, 200)]
    assert by_hours == sorted(by_hours)


def test_what_is_chosen_ends_within_the_hours() -> None:
    for hours in (2, 10, 48):
        study = weekend(Gpus(1, 80.0, 300.0), hours)
        folder = next(folder for folder, name in choosing._shipped_bases() if name == study.base)
        frames, rows = study.steps[0].options["frame_budget"], study.steps[0].options["num_rows"]
        # Two stages, each with its training and four forward passes a row of building.
        expected = 2 * rows / 1000 * (FACTS[folder][1] * frames / 128 + 4 * 1000 * 100 * frames / 128 / 300 / 3600)
        assert expected <= hours * 0.7
        assert all(step.options["num_frames"] == frames for step in study.steps if isinstance(step, Train))


def test_too_little_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"In 0.001 hours, 1 GPU of 24 GiB at 300.0 TFLOP/s builds and trains fewer"):
        weekend(Gpus(1, 24.0, 300.0), hours=0.001)
    with pytest.raises(ConfigError, match=r"This machine has no GPU.*--gpu-memory 24"):
        weekend(Gpus(0, 80.0, 0.02))


@pytest.mark.parametrize(
    ("gpus", "config", "accelerate", "options"),
    [
        (Gpus(1, 100.0, 300.0), "internvl3_8b/stage1_full", "one_gpu", {"gradient_accumulation_steps": 8}),
        (Gpus(1, 80.0, 300.0), "internvl3_8b/stage1_lora", "one_gpu", {"gradient_accumulation_steps": 8}),
        (Gpus(8, 24.0, 300.0), "internvl3_8b/stage1_full", "fsdp2", {"gradient_accumulation_steps": 1}),
        (
            Gpus(1, 24.0, 300.0),
            "internvl3_8b/stage1_lora",
            "one_gpu",
            {"num_frames": 48, "gradient_accumulation_steps": 8},
        ),
        (
            Gpus(0, 80.0, 0.02),
            "internvl3_8b/stage1_lora",
            None,
            {"use_cpu": True, "bf16": False, "dtype": "float32", "dataloader_num_workers": 0},
        ),
    ],
)
def test_a_training_gets_what_fits(
    gpus: Gpus, config: str, accelerate: str | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gpus, "here", classmethod(lambda cls, memory=None: gpus))
    study = Study("OpenGVLab/InternVL3-8B-hf", (Train("stage1", rows="x", options={"beta": 0.1}),))
    (step,) = choosing.chosen(study).steps
    assert isinstance(step, Train)
    assert (step.config, step.accelerate_config) == (config, accelerate)
    assert step.options == {**options, "beta": 0.1}


@pytest.mark.parametrize(
    ("folder", "billions"),
    [("internvl3_2b", 2), ("smolvlm2_500m", 0.5), ("qwen3_vl_30b_a3b", 30), ("glm4_6v_flash", float("inf"))],
)
def test_the_size_of_a_base_is_in_its_folders_name(folder: str, billions: float) -> None:
    assert choosing._billions(folder) == billions


def test_a_base_that_is_not_known_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="name one at each `train`"):
        choosing.chosen(Study("someone/model", (Train("stage1", rows="x"),)))


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_a_study_is_kept_and_read_again_unchanged(name: str) -> None:
    study = find_study(name)
    assert study_of(content_of(study)) == study
