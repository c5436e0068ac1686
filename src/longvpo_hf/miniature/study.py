"""The miniature as steps of a study: its world, its base, rows whose writer is a template, and its own measure.

Run as a program it does one of these steps: `python -m longvpo_hf.miniature.study STEP FOLDER SETTINGS …`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.artifacts import write_json
from longvpo_hf.errors import ConfigError, advice
from longvpo_hf.processes import end_with_parent
from longvpo_hf.studies.steps import InRun, Step
from longvpo_hf.studies.study import BASE

if TYPE_CHECKING:
    from longvpo_hf.miniature.settings import MiniatureSettings
    from longvpo_hf.studies.study import Study

WORLD = "world"
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
#: The model that is trained from nothing is so small that a second thread costs time, and one repeats its numbers.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
#: With a language model memory is kept once it is had. glibc gives large blocks back to the system after every
#: operation; getting them again took a sixth of a training step.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def settings_of(study: Study) -> MiniatureSettings:
    """The miniature's settings of a study.

    Raises:
        ConfigError: If one is not known, or cannot have its value.
    """
    from longvpo_hf.miniature.settings import MiniatureSettings

    given = dict(study.miniature)
    settings = MiniatureSettings.of(given.pop("scale", "standard"), study.seed)
    known = {item.name for item in fields(MiniatureSettings)} - {"seed", "scale", "pretraining", "alignment"}
    if unknown := sorted(set(given) - known):
        raise ConfigError(f"miniature: {unknown[0]} is not known; have scale, {', '.join(sorted(known))}.")
    changes: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in given.items()}
    try:
        return replace(settings, **changes)
    except ConfigError as error:
        raise ConfigError(f"miniature: {error}") from error


def environment(study: Study) -> dict[str, str]:
    """Variables of steps that need no network: all but the base's, where that has a pretrained language model."""
    return _environment(settings_of(study))


def _environment(settings: MiniatureSettings) -> dict[str, str]:
    if not settings.language_model:
        return {**_QUIET, **_OFFLINE, **_ONE_THREAD}
    # Said, for accelerate's launcher takes one thread where nobody does.
    threads = os.environ.get("OMP_NUM_THREADS") or str(_num_cores())
    return {**_QUIET, **_OFFLINE, **_KEEP_MEMORY, "OMP_NUM_THREADS": threads}


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_world(study: Study) -> Step:
    """Writes the mp4 files."""
    settings = settings_of(study)
    sizes = ("pretraining_clips", "stage1_clips", "stage2_clips", "evaluation_clips")
    return _step(WORLD, "world", settings, (), ("seed", *sizes))


def make_base(study: Study) -> Step:
    """Trains the base from nothing, or makes it of a pretrained language model."""
    settings = settings_of(study)
    if not settings.language_model:
        return _step(BASE, "base", settings, (WORLD,), ("seed", "pretraining"))
    step = _step(BASE, "base", settings, (WORLD,), ("seed", "pretraining", "language_model", "alignment"))
    return replace(step, environment={**_QUIET, **_KEEP_MEMORY})


def make_rows(study: Study, method: str, name: str, model: str) -> Step:
    """Makes rows by a method, asked and answered by a model."""
    about = {
        "stage1": ("seed", "num_rows", "max_clips"),
        "stage2": ("seed", "stage2_rows", "stage2_scenes", "stage2_judge"),
        "temporal": ("seed", "num_rows", "max_clips"),
    }
    needs = tuple(dict.fromkeys((WORLD, BASE, model)))
    return _step(name, "build", settings_of(study), needs, about[method], method, name, model)


def measure(study: Study, model: str) -> Step:
    """Right answers by number of clips."""
    lengths = ("lengths", "questions_per_length", "pair_lengths", "pair_questions_per_length")
    needs = tuple(dict.fromkeys((WORLD, model)))
    step = _step(f"{model}-lengths", "evaluate", settings_of(study), needs, ("seed", *lengths), model)
    return replace(step, model=model)


def training_options(study: Study, recipe: str) -> dict[str, Any]:
    """Options of a recipe that follow from the miniature's settings."""
    settings = settings_of(study)
    steps = settings.stage2_steps if recipe == "stage2" else settings.steps
    return {
        "num_frames": settings.num_frames,
        "max_steps": steps,
        "save_steps": max(1, steps // 6),
        "logging_steps": min(10, steps),
        # Only the large setting has work for a GPU.
        "use_cpu": settings.scale != "large" or not _has_gpu(),
    }


#: Seconds on one quiet core, mean of two seeds of benchmarks/results/miniature.md; loading torch comes to each. Those
#: of the pretrained language model are of two quiet cores that compute in bfloat16, one run
#: (benchmarks/results/pretrained-study.md).
_SECONDS = {
    "standard": {
        "world": 4,
        "base": 89,
        "lengths": 35,
        "audit": 6,
        "stage1-rows": 43,
        "stage1-model": 116,
        "stage2-rows": 26,
        "stage2-model": 57,
    },
    "pretrained": {
        "world": 8,
        "base": 306,
        "lengths": 67,
        "audit": 2,
        "stage1-rows": 175,
        "stage1-model": 528,
        "stage2-rows": 187,
        "stage2-model": 291,
    },
}

#: As many times as long takes the pretrained language model on two quiet cores without bfloat16 (a Zen 3): 7.0 seconds
#: a step of its alignment; with it about 3, from the seconds of the base above. The whole was not run without.
_WITHOUT_BFLOAT16 = 2.3


def expected_seconds(step: Step, settings: MiniatureSettings) -> int | None:
    """What a step of a scale took where it was measured; None for other scales and other steps."""
    measured = _SECONDS.get(settings.scale, {})
    seconds = measured.get({"evaluate": "lengths", "audit": "audit"}.get(step.kind, step.name))
    if seconds is None or not settings.language_model:
        return seconds
    import torch

    from longvpo_hf.precision import is_computed

    return seconds if is_computed(torch.bfloat16) else round(_WITHOUT_BFLOAT16 * seconds)


def expected_rows(step: Step) -> int | None:
    """Rows that a build makes; None for other steps."""
    if step.kind != "build":
        return None
    return next(value for name, value in step.settings.items() if name in ("num_rows", "stage2_rows"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _step(
    name: str,
    kind: str,
    settings: MiniatureSettings,
    needs: tuple[str, ...],
    about: tuple[str, ...],
    *words: str,
) -> Step:
    given = asdict(settings)
    result = InRun(f"state/{name}.result.json")
    program: tuple[str | InRun, ...] = ("-m", __name__, kind, InRun("."), json.dumps(given), result, *words)
    return Step(
        name,
        kind,
        program,
        needs,
        {"scale": settings.scale, "words": list(words), **{key: given[key] for key in about}},
        environment=_environment(settings),
    )


def main(argv: list[str]) -> None:
    """Does a step and writes what it found out."""
    from longvpo_hf.miniature.settings import AlignmentSettings, MiniatureSettings, PretrainingSettings
    from longvpo_hf.miniature.workshop import Workshop

    kind, folder, given, result, *words = argv
    read = json.loads(given)
    for name in ("lengths", "pair_lengths", "stage2_scenes"):
        read[name] = tuple(read[name])
    read["pretraining"]["betas"] = tuple(read["pretraining"]["betas"])
    read["pretraining"] = PretrainingSettings(**read["pretraining"])
    read["alignment"] = AlignmentSettings(**read["alignment"])
    workshop = Workshop(Path(folder), MiniatureSettings(**read))
    write_json(Path(result), _do(workshop, kind, words))


def _do(workshop: Any, kind: str, words: list[str]) -> Any:
    from longvpo_hf.miniature.temporal import temporal_rows

    if kind == "world":
        workshop.worlds()
        return {}
    if kind == "base":
        return workshop.base()
    if kind == "evaluate":
        return workshop.evaluate(words[0])
    method, rows, model = words
    if method == "stage1":
        return {"funnel": workshop.stage1_rows(rows, model)}
    if method == "temporal":
        return {"funnel": temporal_rows(workshop, workshop.folder / rows, "mixed")}
    scenes = f"{rows}.scenes"
    return {"captions": workshop.captions(scenes), **workshop.stage2_rows(rows, scenes, model)}


if __name__ == "__main__":
    end_with_parent()
    with advice("the miniature"):
        main(sys.argv[1:])
