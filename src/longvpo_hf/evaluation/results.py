"""What an evaluation leaves: scores, tables, a section for a model card, and results as the Hub reads them.

`.eval_results/*.yaml` in a model's repository is what the Hub shows in 2026, on the model's page and on the leaderboard
of the benchmark's dataset; `model-index` in the card's head is the older form. A checkpoint of this machine that has a
record (`longvpo.json`) gets the results too.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from longvpo_hf.artifacts import write_json, write_text
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.differences import score_bounds
from longvpo_hf.evaluation.pairs import units_of
from longvpo_hf.evaluation.suite import Suite
from longvpo_hf.evaluation.suites import suites
from longvpo_hf.evaluation.table import EvalRun, card_section, comparison, read_answers, to_markdown
from longvpo_hf.public import markdown
from longvpo_hf.publishing.model_card import update_model_card
from longvpo_hf.record import EvaluationRecord, ModelRecord, Sampling, read_record

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

logger = logging.getLogger(__name__)

#: Where the Hub looks for results in a model's repository.
HUB_FOLDER = ".eval_results"


def stem_of(label: str, num_frames: int) -> str:
    """Name of the files about one model at one number of frames."""
    return f"{_safe(label)}-{num_frames}"


def _safe(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", label)


def write_results(results: Sequence[Mapping[str, Any]], output: Path, mixed_protocols: bool = False) -> None:
    """Writes what `run.evaluate` gives.

    `<label>-<frames>.json` with the scores, `table.json`, `table.md`, `card.md`; where all questions were asked also
    `<label>.model-index.yaml` for the card's head, and `hub/<label>/.eval_results/<suite>.yaml`.

    Raises:
        ConfigError: If models were not measured alike, and may not stand side by side.
    """
    runs = table_runs(results, output)
    for result, run in zip(results, runs, strict=True):
        write_json(output / f"{stem_of(run.stage, run.num_frames)}.json", result)
    limit = results[0]["limit"]
    only = [f"- Only the first {limit} questions of each task were asked."] if limit else []
    # The Hub's forms have no place to say that only some questions were asked.
    for stage, own in itertools.groupby([] if limit else runs, lambda run: run.stage):
        mine = list(own)
        index = ModelCardData(model_name=stage, eval_results=eval_results(mine)).to_yaml()
        write_text(output / f"{_safe(stage)}.model-index.yaml", f"{index}\n")
        write_hub_results(mine, output / "hub" / _safe(stage))
    found = comparison(runs, mixed_protocols=mixed_protocols)
    write_json(output / "table.json", found)
    published = [f"- {markdown(text)}" for text in dict.fromkeys(result["published"] for result in results) if text]
    write_text(output / "table.md", "\n".join([to_markdown(found), *published, *only]).rstrip() + "\n")
    samplings = [Sampling(result["num_frames"], result["fps"], result["max_pixels"]) for result in results]
    lines = [f"- {markdown(run.stage)}: {sampling}" for run, sampling in zip(runs, samplings, strict=True)]
    lines += [*published, *only, f"- longvpo-hf {version('longvpo-hf')}, lmms-eval {version('lmms-eval')}"]
    write_text(output / "card.md", card_section(found) + "\n" + "\n".join(lines) + "\n")


def table_runs(results: Sequence[Mapping[str, Any]], output: Path) -> list[EvalRun]:
    """Results as the table takes them, with the answers that lie in `output`.

    A model that was given no stage is called by its name.
    """
    runs = [EvalRun.of(result, result["stage"] or result["model"]) for result in results]
    return [replace(run, answers=read_answers(output / "answers" / stem_of(run.stage, run.num_frames))) for run in runs]


def write_hub_results(runs: Sequence[EvalRun], folder: Path) -> None:
    """Writes `.eval_results/<suite>.yaml` into a folder that is, or will be, a model's repository.

    The value is the suite's own score, which leaderboards and papers have; the notes say the protocol, and ours.

    Args:
        runs: Of one model.
        folder: `hf upload me/my-model FOLDER` brings them to the Hub.
    """
    _one_model(runs)
    for name, suite in suites().items():
        entries = []
        for run in runs:
            value, ours = run.score(name, "official"), run.score(name)
            protocol = run.protocol(name, "official")
            if value is not None and ours is not None and protocol is not None:
                notes = f"at most {run.num_frames} frames; {ours:.2f} with answers read as meant; protocol "
                entry = EvalResultEntry(
                    dataset_id=suite.dataset,
                    task_id=name,
                    value=round(value, 2),
                    notes=f"{notes}{protocol.hash}: {protocol.line}",
                )
                entries.append(entry)
        if entries:
            content = yaml.safe_dump(
                eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=120
            )
            write_text(folder / HUB_FOLDER / f"{name}.yaml", content)


def add_to_checkpoint(checkpoint: str, runs: Sequence[EvalRun]) -> bool:
    """Adds results to a checkpoint of this machine: to its record and card, and as `.eval_results/`. A push takes all.

    Results of the same suites and numbers of frames that are there are replaced. A card that somebody wrote into stays
    what it is, and the log says so.

    Args:
        checkpoint: Folder, or name on the Hub, where nothing is changed.
        runs: Of this model.

    Returns:
        Whether there was a record to add to.
    """
    folder = Path(checkpoint)
    record = read_record(folder, ModelRecord) if folder.is_dir() else None
    if record is None:
        return False
    fresh = [evaluation_of(result) for result in eval_results(runs)]
    names = {(each.dataset_type, each.metric_name) for each in fresh}
    kept = [each for each in record.evaluations if (each.dataset_type, each.metric_name) not in names]
    if not update_model_card(folder, record, replace(record, evaluations=(*kept, *fresh))):
        logger.warning(
            f"{folder / 'README.md'} is not the card made of its record: it stays as it is, without these results."
        )
    write_hub_results(runs, folder)
    return True


def evaluation_of(result: EvalResult) -> EvaluationRecord:
    """A result as the record has it."""
    return EvaluationRecord(
        task_type=result.task_type,
        dataset_type=result.dataset_type,
        dataset_name=result.dataset_name,
        metric_type=result.metric_type,
        metric_value=result.metric_value,
        metric_name=result.metric_name,
        dataset_split=result.dataset_split,
        metric_args=result.metric_args,
    )


def _one_model(runs: Sequence[EvalRun]) -> None:
    if len({run.model for run in runs}) > 1:
        raise ConfigError(f"A model's card holds its own results only, got those of {sorted({r.model for r in runs})}.")


def eval_results(runs: Sequence[EvalRun]) -> list[EvalResult]:
    """What was measured of one model, for its card's metadata: `trainer.push_to_hub(eval_results=...)`.

    Args:
        runs: Of one model, e.g. at several numbers of frames; 95 % bounds need their answers.

    Raises:
        ValueError: If the runs are of several models.
    """
    from huggingface_hub import EvalResult

    _one_model(runs)
    return [
        EvalResult(
            task_type="video-text-to-text",
            dataset_type=suite.dataset,
            dataset_name=suite.title.partition(" (")[0].partition(",")[0],
            dataset_split=suite.split,
            metric_type="accuracy",
            # With what distinguishes runs of one dataset: the Hub merges their entries.
            metric_name=f"{suite.title}, {run.num_frames} frames",
            metric_value=round(value, 2),
            metric_args=_how_sure(run, suite),
        )
        for run in runs
        for name, suite in suites().items()
        if (value := run.score(name)) is not None
    ]


def _how_sure(run: EvalRun, suite: Suite) -> dict[str, Any] | None:
    """Protocol, questions and 95 % bounds of a score, as far as they are known: see `EvaluationRecord`."""
    protocol, task = run.protocol(suite.name, "ours"), run.task(suite.name) or {}
    answers = run.answers_to(suite.name)
    bounds = score_bounds(units_of(suite, answers)) if answers else None
    facts = {
        "protocol": None if protocol is None else protocol.line,
        "questions": task.get("n"),
        "interval_95": None if bounds is None else [round(bound, 2) for bound in bounds],
    }
    return {name: fact for name, fact in facts.items() if fact is not None} or None


def model_index(name: str, runs: Sequence[EvalRun]) -> list[dict[str, Any]]:
    """The `model-index` of a model card's YAML.

    Args:
        name: The model's name in it.
        runs: See `eval_results`.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(model_name=name, eval_results=eval_results(runs))
    index: list[dict[str, Any]] = data.to_dict()["model-index"]
    return index
