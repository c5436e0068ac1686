"""What a study measured of a model, in the form of its record: benchmarks, probes, and the miniature's own measure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longvpo_hf.evaluation.protocol import Protocol
from longvpo_hf.record import EvaluationRecord
from longvpo_hf.studies.ledger import STATE

_TASK = "video-text-to-text"


def results_of(run: Path, model: str, base: str | None = None) -> tuple[EvaluationRecord, ...]:
    """What was measured of a model, each with the base's result where that was measured alike.

    Args:
        run: Folder of the run.
        model: Name of the step that made it.
        base: Name of what it is compared with; None compares with nothing.
    """
    found = [
        *_benchmarks(run / f"{model}-benchmarks"),
        *_position(run / f"{model}-position" / "position.json"),
        *_needle(run / f"{model}-needle" / "needle.json"),
        *_lengths(run / STATE / f"{model}-lengths.result.json"),
    ]
    if base is None:
        return tuple(found)
    of_base = {_key(result): result for result in results_of(run, base)}
    return tuple(_beside(result, of_base.get(_key(result))) for result in found)


def _key(result: EvaluationRecord) -> tuple[Any, ...]:
    return result.dataset_type, result.metric_name, (result.metric_args or {}).get("protocol")


def _beside(result: EvaluationRecord, base: EvaluationRecord | None) -> EvaluationRecord:
    if base is None:
        return result
    theirs = {"value": base.metric_value, "interval_95": (base.metric_args or {}).get("interval_95")}
    known = {name: fact for name, fact in theirs.items() if fact is not None}
    return replace(result, metric_args={**(result.metric_args or {}), "base": known})


def _benchmarks(folder: Path) -> Iterator[EvaluationRecord]:
    from longvpo_hf.evaluation.results import eval_results, evaluation_of
    from longvpo_hf.evaluation.table import EvalRun

    for path in sorted(folder.glob("*-*.json")):
        yield from map(evaluation_of, eval_results([EvalRun.read(path)]))


def _position(path: Path) -> Iterator[EvaluationRecord]:
    result = _read(path)
    if result is None:
        return
    places = {"alone": result["upper_bound"], **result["thirds"]}
    for place, part in places.items():
        if part["percent"] is not None:
            where = place if place == "alone" else f"in the {place} third" if place == "middle" else f"at the {place}"
            name = f"right answers about a short video {where}"
            yield _result("position probe", name, part["percent"], part["band_95"], part["number"], result)


def _needle(path: Path) -> Iterator[EvaluationRecord]:
    result = _read(path)
    if result is None:
        return
    from longvpo_hf.evaluation.needle import found_at

    for frames in result["frames"]:
        if (found := found_at(result, frames)) is not None:
            yield _result("needle probe", f"needles found in {frames} frames", *found, result)


def _lengths(path: Path) -> Iterator[EvaluationRecord]:
    result = _read(path)
    if result is None:
        return
    for about, part in (("one clip", result), ("two clips", result["pairs"])):
        for length, percent in part["accuracy"].items():
            name = f"right answers about {about} of {length}"
            number = sum(place["questions"] for place in part.get("positions", {}).get(length, {}).values()) or None
            yield _result("miniature world", name, percent, part["interval"][length], number, result)


def _result(
    dataset: str,
    metric: str,
    percent: float,
    bounds: Sequence[float] | None,
    questions: int | None,
    result: Mapping[str, Any],
) -> EvaluationRecord:
    protocol = result.get("protocol")
    facts = {
        "protocol": None if protocol is None else Protocol.from_json(protocol).line,
        "questions": questions,
        "interval_95": None if bounds is None else [round(bound, 2) for bound in bounds],
    }
    return EvaluationRecord(
        task_type=_TASK,
        dataset_type=dataset.replace(" ", "-"),
        dataset_name=dataset,
        metric_type="accuracy",
        metric_name=metric,
        metric_value=round(percent, 2),
        metric_args={name: fact for name, fact in facts.items() if fact is not None},
    )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
