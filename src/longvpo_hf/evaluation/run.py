"""One evaluation: models × numbers of frames × suites, through lmms-eval.

The data are looked for before a model is loaded; scores and all answers are written into a folder. Answers are kept as
they come, so the same call continues an interrupted one.

Scores of one model at one number of frames, all in percent:

    {"model": str, "stage": str | None, "num_frames": int, "fps": float | None, "max_pixels": int | None,
     "max_new_tokens": {suite: int} (those that were set), "limit": int | None,
     "tasks": {suite: see `scoring.summary`}}
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from longvpo_hf.artifacts import whole_file, write_json, write_text
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation import scoring
from longvpo_hf.evaluation.preflight import check
from longvpo_hf.evaluation.sampling import trained_sampling
from longvpo_hf.evaluation.suite import DATA_ROOT_VARIABLE, Suite
from longvpo_hf.evaluation.table import EvalRun, card_section, comparison, eval_results, to_markdown
from longvpo_hf.evaluation.task_files import task_names, tasks_folder
from longvpo_hf.public import markdown, public_name
from longvpo_hf.record import Sampling

if TYPE_CHECKING:
    from longvpo_hf.evaluation.adapter import LongVPO


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model to be evaluated.

    Args:
        checkpoint: Folder or name on the Hub.
        stage: What it is called in the table, e.g. `base`, `stage1`; None for its own name.
    """

    checkpoint: str
    stage: str | None = None

    @classmethod
    def of(cls, text: str) -> Contestant:
        """Reads `CHECKPOINT` or `STAGE=CHECKPOINT`."""
        match = re.fullmatch(r"([\w.-]+)=(.+)", text)
        return cls(match[2], match[1]) if match else cls(text)

    @property
    def label(self) -> str:
        """What it is called in tables and files."""
        return self.stage or public_name(self.checkpoint)


def evaluate(
    contestants: Sequence[Contestant],
    asked: Sequence[Suite],
    root: Path,
    output: Path,
    frames: Sequence[int] = (),
    fps: float | str | None = None,
    max_pixels: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    max_new_tokens: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Evaluates, and writes scores, tables, a section for the model card and all answers into `output`.

    Files: `<label>-<frames>.json` with the scores, `table.json`, `table.md`, `card.md`, `<label>.model-index.yaml` for
    the card's head (not under a limit), and `answers/<label>-<frames>/` with a line for each question; `cache/` keeps
    what lets an interrupted evaluation go on.

    Args:
        contestants: The models, of different labels.
        asked: What they are asked.
        root: See `suite.py`.
        output: Folder of the results.
        frames: Numbers of frames, each once; by default the one each model was trained with.
        fps: At most so many frames per second, "none" for no bound; by default as the model was trained, or as the
            others were, if its card does not say it.
        max_pixels: At most so many pixels per frame; by default like `fps`.
        batch_size: Questions per call of the model.
        limit: Only the first so many questions of each task; the scores then mean little.
        max_new_tokens: Bounds on answers by suite; for others see `LongVPO`.

    Returns:
        Scores as the module says, one for each model and number of frames; nothing on all processes but the first.

    Raises:
        longvpo_hf.evaluation.preflight.NotReady: If data are missing.
        ValueError: If two models have one label, or the frames are none.
    """
    labels = [contestant.label for contestant in contestants]
    if len({_safe(label) for label in labels}) < len(labels):
        raise ConfigError(f"Models of one name cannot be told apart in a table, got {labels}; write STAGE=MODEL.")
    trained = [trained_sampling(contestant.checkpoint) for contestant in contestants]
    default = next((sampling for sampling in trained if sampling), Sampling())
    plans = [
        [
            _changed(sampling or default, number, fps, max_pixels)
            for number in dict.fromkeys(frames) or [(sampling or default).num_frames]
        ]
        for sampling in trained
    ]
    check(asked, root)
    os.environ[DATA_ROOT_VARIABLE] = str(root.resolve())
    # Else lmms-eval gives every run a new name, under which it does not find what an interrupted one kept.
    os.environ.setdefault("LMMS_CACHE_RUN_ID", "longvpo")
    results = []
    for contestant, samplings in zip(contestants, plans, strict=True):
        results += _evaluate_one(contestant, samplings, asked, output, batch_size, limit, dict(max_new_tokens or {}))
        if results:
            _write(results, output)
    return results


def _changed(sampling: Sampling, num_frames: int, fps: float | str | None, max_pixels: int | None) -> Sampling:
    """A sampling with what was asked for explicitly."""
    if fps is not None:
        sampling = replace(sampling, fps=None if fps == "none" else float(fps))
    if max_pixels is not None:
        sampling = replace(sampling, max_pixels=max_pixels)
    return replace(sampling, num_frames=num_frames)


def _evaluate_one(
    contestant: Contestant,
    samplings: Sequence[Sampling],
    asked: Sequence[Suite],
    output: Path,
    batch_size: int,
    limit: int | None,
    max_new_tokens: Mapping[str, int],
) -> list[dict[str, Any]]:
    """One model at all numbers of frames: it is loaded once, and gone afterwards."""
    from longvpo_hf.evaluation.adapter import LongVPO

    model = LongVPO(contestant.checkpoint, batch_size=batch_size)
    results = []
    for sampling in samplings:
        model.use(
            sampling,
            {
                task: max_new_tokens[suite.name]
                for suite in asked
                if suite.name in max_new_tokens
                for task in task_names(suite)
            },
        )
        if model.rank == 0:
            print(f"{contestant.label}: {sampling}", file=sys.stderr)
        samples = _samples(model, asked, output / "cache", limit)
        if samples is None:
            continue
        folder = output / "answers" / _stem(contestant.label, sampling.num_frames)
        tasks = {}
        for suite in asked:
            mine = [(task, sample) for task in task_names(suite) for sample in samples[task]]
            tasks[suite.name] = scoring.summary(suite, [sample["score"] for _, sample in mine])
            _write_answers(folder / f"{suite.name}.jsonl", mine)
        results.append(
            {
                "model": public_name(contestant.checkpoint),
                "stage": contestant.stage,
                "num_frames": sampling.num_frames,
                "fps": sampling.fps,
                "max_pixels": sampling.max_pixels,
                "max_new_tokens": dict(max_new_tokens),
                "limit": limit,
                "tasks": tasks,
            }
        )
    del model
    gc.collect()
    return results


def _samples(
    model: LongVPO, asked: Sequence[Suite], cache: Path, limit: int | None
) -> Mapping[str, Sequence[Mapping[str, Any]]] | None:
    """Every answered question by task, as lmms-eval logs it; None on all processes but the first."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    results = simple_evaluate(
        model=model,
        tasks=[task for suite in asked for task in task_names(suite)],
        task_manager=TaskManager("WARNING", include_path=str(tasks_folder()), include_defaults=False),
        batch_size=model.batch_size,
        limit=limit,
        use_cache=str(cache),
        bootstrap_iters=0,
        log_samples=True,
    )
    return None if results is None else results["samples"]


# ------------------------------------------------------------------------------------------------------ what is written


def _write_answers(path: Path, samples: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Every answer on a line, so that a person can see what was counted as what."""
    with whole_file(path) as file:
        for task, sample in samples:
            line = {"task": task, "row": sample["doc_id"], "text": sample["resps"][0][0], **sample["score"]}
            # What is half a character in a reply stays one, as an escape.
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def _stem(label: str, num_frames: int) -> str:
    return f"{_safe(label)}-{num_frames}"


def _safe(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", label)


def _write(results: Sequence[Mapping[str, Any]], output: Path) -> None:
    runs = table_runs(results)
    for result, run in zip(results, runs, strict=True):
        write_json(output / f"{_stem(run.stage, run.num_frames)}.json", result)
    limit = results[0]["limit"]
    only = [f"- Only the first {limit} questions of each task were asked."] if limit else []
    # A card's metadata have no place to say that only some questions were asked.
    for stage, own in itertools.groupby([] if limit else runs, lambda run: run.stage):
        index = ModelCardData(model_name=stage, eval_results=eval_results(list(own))).to_yaml()
        write_text(output / f"{_safe(stage)}.model-index.yaml", f"{index}\n")
    found = comparison(runs)
    write_json(output / "table.json", found)
    write_text(output / "table.md", "\n".join([to_markdown(found), *only]).rstrip() + "\n")
    samplings = [Sampling(result["num_frames"], result["fps"], result["max_pixels"]) for result in results]
    lines = [f"- {markdown(run.stage)}: {sampling}" for run, sampling in zip(runs, samplings, strict=True)]
    lines += only
    lines += [f"- longvpo-hf {version('longvpo-hf')}, lmms-eval {version('lmms-eval')}"]
    write_text(output / "card.md", card_section(runs) + "\n" + "\n".join(lines) + "\n")


def table_runs(results: Sequence[Mapping[str, Any]]) -> list[EvalRun]:
    """Results as the table takes them; a model that was given no stage is called by its name."""
    return [
        EvalRun(result["model"], result["stage"] or result["model"], result["num_frames"], result["tasks"])
        for result in results
    ]
