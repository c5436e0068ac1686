"""What was measured before and after: probes and benchmarks of every model, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.studies.report.sections import Picture, Section, Table, percent
from longvpo_hf.studies.steps import Step
from longvpo_hf.studies.study import BASE

if TYPE_CHECKING:
    from longvpo_hf.studies.session import Session


def measured_sections(session: Session, done: Sequence[Step]) -> list[Section]:
    """A section for each measure, with all models that it has measured."""
    by_measure: dict[str, dict[str, Step]] = {}
    for step in done:
        if step.kind == "evaluate":
            by_measure.setdefault(step.name.removeprefix(f"{step.model}-"), {})[step.model] = step
    makers = {"position": _position, "needle": _needle, "benchmarks": _benchmarks}
    sections = []
    for measure, steps in by_measure.items():
        if measure == "lengths":
            from longvpo_hf.miniature.report import lengths_section

            results = {_label(model): session.ledger.result(step.name) for model, step in steps.items()}
            sections.append(lengths_section(results, session.study))
        else:
            folders = {_label(model): session.run_folder / step.name for model, step in steps.items()}
            sections.append(makers[measure](folders))
    return sections


def _label(model: str) -> str:
    return "before" if model == BASE else f"after {model.removesuffix('-model')}".replace("stage", "Stage ")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _position(folders: Mapping[str, Path]) -> Section:
    from longvpo_hf.evaluation.position import plot_position

    results = {label: _read(folder / "position.json") for label, folder in folders.items()}
    lines = []
    for label, result in results.items():
        parts = [result["upper_bound"], *(result["thirds"][third] for third in ("begin", "middle", "end"))]
        lines.append((label, *map(_scored, parts), _scored(result["dip"])))
    table = Table(
        "Right answers about a short video, in percent with 95 % bounds: alone, and by the third of a long video it "
        "stands in; the dip is alone − middle",
        ("model", "alone", "begin", "middle", "end", "dip"),
        lines,
    )
    picture = Picture.of("position", "Right answers against the distance to the question", plot_position(results))
    return Section("Position", tables=[table], pictures=[picture])


def _scored(part: Mapping[str, Any]) -> str:
    if part["percent"] is None:
        return "–"
    return percent(part["percent"], part.get("band_95"))


def _needle(folders: Mapping[str, Path]) -> Section:
    from longvpo_hf.evaluation.needle import found_at, plot_needle

    results = {label: _read(folder / "needle.json") for label, folder in folders.items()}
    lengths = list(dict.fromkeys(cell["frames"] for result in results.values() for cell in result["cells"]))
    lines = []
    for label, result in results.items():
        found = [found_at(result, length) for length in lengths]
        lines.append((label, *("–" if cell is None else percent(cell[0], cell[1]) for cell in found)))
    table = Table(
        "Needles found, in percent with 95 % bounds, by frames of the video",
        ("model", *(f"{length} frames" for length in lengths)),
        lines,
    )
    picture = Picture.of(
        "needle",
        "Needles found by frames and depth",
        plot_needle([{**result, "model": label} for label, result in results.items()]),
    )
    return Section("Needle in a haystack", tables=[table], pictures=[picture])


def _benchmarks(folders: Mapping[str, Path]) -> Section:
    """Scores, and each difference between two models with its certainty, paired by question."""
    from longvpo_hf.evaluation.table import EvalRun, comparison

    runs = []
    for label, folder in folders.items():
        stage = "base" if label == "before" else label.removeprefix("after ").lower().replace(" ", "")
        runs += [replace(EvalRun.read(path), stage=stage) for path in sorted(folder.glob("*-*.json"))]
    tables = []
    for part in comparison(runs, mixed_protocols=True)["tables"]:
        at = f"At {part['num_frames']} frames"
        header = ("benchmark", *(f"{column['label']}, {column['source']}" for column in part["columns"]))
        lines = [
            (
                f"{row['benchmark']} ({row['parser']}, {row['shown']})",
                *("–" if cell is None else f"{cell['value']:.1f}" for cell in row["cells"]),
            )
            for row in part["rows"]
        ]
        tables.append(Table(f"{at}, percent", header, lines))
        differences = [
            (
                row["benchmark"],
                f"{row['second']} − {row['first']}",
                f"{row['points']:+.1f}",
                "–" if row["interval"] is None else f"{row['interval'][0]:+.1f} … {row['interval'][1]:+.1f}",
                f"{row['p_value']:.3g}",
                row["verdict"],
            )
            for row in part["differences"]
        ]
        if differences:
            header = ("benchmark", "compared", "points", "95 % interval", "p", "conclusion")
            tables.append(Table(f"{at}, differences, paired by question", header, differences))
    return Section("Benchmarks", tables=tables)
