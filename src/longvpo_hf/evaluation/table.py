"""The paper's table: base, Stage 1 and Stage 2 side by side with deltas, next to the paper's own numbers.

Results of `longvpo eval` (one JSON file for each model and number of frames) become the table as JSON and Markdown, and
a section of a model card. Every number says whether it was measured or is the paper's; the paper's are shown only
beside results at the paper's own number of frames. Numbers of a row were measured under one protocol, or the table is
refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.pairs import Answer, compared, difference_row, pairs_of, same_questions
from longvpo_hf.evaluation.pairs import to_markdown as differences_to_markdown
from longvpo_hf.evaluation.paper import PAPER, PAPER_FRAMES, PaperModel, paper_model
from longvpo_hf.evaluation.protocol import BASELINES, THE_VIDEO, Protocol
from longvpo_hf.evaluation.suites import suites

#: How replies were read: as they are meant (`answers.letter_of`), by the benchmark's own rule (`official.py`).
_PARSERS = ("ours", "official")
_STAGES = {"base": "base", "stage1": "Stage 1", "stage2": "Stage 2"}


@dataclass(frozen=True, slots=True)
class EvalRun:
    """What `longvpo eval` measured of one model at one number of frames.

    Args:
        model: Its name.
        stage: `base`, `stage1`, `stage2` or another word for what it is.
        num_frames: Frames of each video.
        tasks: By suite what `scoring.summary` gives, and `protocol`, by parser; results of earlier versions lack
            `official`, `cut_off` and `protocol`.
        baselines: The same by what was shown instead of the video, e.g. `no video`.
        answers: All answers, by suite and what was shown, for differences; a suite may lack them.

    Raises:
        ValueError: If a benchmark is unknown, or a score is missing or no percentage.
    """

    model: str
    stage: str
    num_frames: int
    tasks: Mapping[str, Mapping[str, Any]]
    baselines: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    answers: Mapping[tuple[str, str], Sequence[Answer]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.model or not isinstance(self.num_frames, int) or self.num_frames < 1:
            raise ConfigError(f"A result needs a model and num_frames ≥ 1, got {self.model!r} and {self.num_frames!r}.")
        for name, task in [item for tasks in (self.tasks, *self.baselines.values()) for item in tasks.items()]:
            if name not in suites():
                raise ConfigError(f"{self.model}: no suite is called {name!r}; known are {', '.join(suites())}.")
            field = suites()[name].headline
            value = task.get(field)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= 100:
                raise ConfigError(f"{self.model}: {name}.{field} must be a percentage, got {value!r}.")

    @classmethod
    def of(cls, result: Mapping[str, Any], stage: str, answers: Path | None = None) -> EvalRun:
        """A result, as `run.evaluate` gives it.

        Args:
            result: The result.
            stage: What the model is called.
            answers: The folder with its answers, if they are there.
        """
        return cls(
            result["model"],
            stage,
            result["num_frames"],
            result["tasks"],
            result.get("baselines") or {},
            {} if answers is None else read_answers(answers),
        )

    @classmethod
    def read(cls, path: Path) -> EvalRun:
        """The result in a JSON file, with the answers beside it; a stage that is absent or null is the base.

        Raises:
            ValueError: If the file is no such result.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls.of(record, record.get("stage") or "base", path.parent / "answers" / path.stem)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{path.name} is no result of `longvpo eval`: {what}") from error

    def task(self, name: str, shown: str = THE_VIDEO) -> Mapping[str, Any] | None:
        """Its scores of a suite; None where it was not measured."""
        tasks = self.tasks if shown == THE_VIDEO else self.baselines.get(shown, {})
        return tasks.get(name)

    def score(self, name: str, parser: str = "ours", shown: str = THE_VIDEO) -> float | None:
        """Its score of a suite, as the paper's table has it; None where it was not measured.

        Args:
            name: The suite.
            parser: `ours` or `official`: see `comparison`.
            shown: What the model saw of the video.
        """
        task = self.task(name, shown)
        return None if task is None else task.get("official" if parser == "official" else suites()[name].headline)

    def answers_to(self, name: str, shown: str = THE_VIDEO) -> Sequence[Answer]:
        """Its answers to a suite that it was measured on; none where they are not there."""
        return self.answers.get((name, shown), ()) if self.task(name, shown) is not None else ()

    def protocol(self, name: str, parser: str, shown: str = THE_VIDEO) -> Protocol | None:
        """How a score was measured; None where it was not, or by an earlier version."""
        value = ((self.task(name, shown) or {}).get("protocol") or {}).get(parser)
        return None if value is None else Protocol.from_json(value)


def read_answers(folder: Path) -> dict[tuple[str, str], list[Answer]]:
    """Answers of one model at one number of frames, by suite and what was shown: `<suite>[.<shown>].jsonl` each."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        name, _, shown = path.stem.partition(".")
        lines = path.read_text(encoding="utf-8").splitlines()
        found[name, shown.replace("_", " ") or THE_VIDEO] = [json.loads(line) for line in lines]
    return found


def comparison(runs: Sequence[EvalRun], paper: str | None = None, mixed_protocols: bool = False) -> dict[str, Any]:
    """The table as JSON: for each number of frames its columns and rows.

    Args:
        runs: Results; of each stage and number of frames at most one.
        paper: The base model whose numbers in the paper stand beside, a key of `PAPER`; by default the one that the
            names of the models tell, if any.
        mixed_protocols: Whether numbers may stand side by side that were not measured alike.

    Returns:
        `{"paper": key or None, "tables": [{"num_frames", "columns": [{"label", "source", "model", "note"}], "rows":
        [{"name", "benchmark", "parser", "shown", "cells": [{"value", "delta", "source", "n", "unparsed", "cut_off",
        "protocol"} or None]}], "groups": [...], "differences": see `pairs.py`, "protocols": {hash: its fields}}]}`. A
        suite has a row `ours`, as replies are meant, and one `official`, as its own rule scores them, in which the
        paper's numbers stand; a parser that no result has gets no row. A delta is to the base of the same source; None
        where there is no base.

    Raises:
        ValueError: If there are no runs, two of one stage and number of frames, an unknown `paper`, or numbers of one
            row have other protocols.
    """
    if not runs:
        raise ConfigError("A table needs at least one result, got none.")
    if paper is None:
        named = [paper_model(run.model) for run in sorted(runs, key=lambda run: run.stage != "base")]
        paper = next((key for key in named if key), None)
    elif paper not in PAPER:
        raise ConfigError(f"The paper has no numbers of {paper!r}; it has {', '.join(PAPER)}.")
    by_frames: dict[int, list[EvalRun]] = {}
    for run in runs:
        others = by_frames.setdefault(run.num_frames, [])
        if any(other.stage == run.stage for other in others):
            raise ConfigError(f"Two results are of stage {run.stage!r} at {run.num_frames} frames; give one of them.")
        others.append(run)
    return {
        "paper": paper,
        "tables": [_table(by_frames[frames], paper, mixed_protocols) for frames in sorted(by_frames)],
    }


def _table(runs: Sequence[EvalRun], paper: str | None, mixed_protocols: bool) -> dict[str, Any]:
    from longvpo_hf.public import public_name

    order = [*_STAGES, *(run.stage for run in runs if run.stage not in _STAGES)]
    runs = sorted(runs, key=lambda run: order.index(run.stage))
    num_frames = runs[0].num_frames
    lines = PAPER[paper] if paper is not None and num_frames == PAPER_FRAMES else ()
    columns = [
        *[
            {"label": _label(run.stage), "source": "measured", "model": public_name(run.model), "note": ""}
            for run in runs
        ],
        *[{"label": _label(line.stage), "source": "paper", "model": paper, "note": line.note} for line in lines],
    ]
    rows: list[dict[str, Any]] = []
    protocols: dict[str, Protocol] = {}
    for name, suite in suites().items():
        parsers = [parser for parser in _PARSERS if any(run.score(name, parser) is not None for run in runs)]
        baselines = [shown for shown in BASELINES if any(run.task(name, shown) for run in runs)]
        for parser, shown in [*((parser, THE_VIDEO) for parser in parsers), *(("ours", shown) for shown in baselines)]:
            found = [run.protocol(name, parser, shown) for run in runs if run.score(name, parser, shown) is not None]
            if not mixed_protocols:
                _refuse_two(suite.title, [run for run in runs if run.score(name, parser, shown) is not None], found)
            protocols |= {protocol.hash: protocol for protocol in found if protocol is not None}
            cells = _measured_cells(runs, name, parser, shown)
            # Papers' numbers are of the suites' own rules.
            papers = lines if parser == parsers[-1] and shown == THE_VIDEO else ()
            cells += [_paper_cell(line, lines[0], name) for line in papers] or [None] * len(lines)
            row = {"name": name, "benchmark": suite.title, "parser": parser, "shown": shown, "cells": cells}
            rows.append(row)
    return {
        "num_frames": num_frames,
        "columns": columns,
        "rows": rows,
        "groups": _groups(runs),
        "differences": _differences(runs),
        "protocols": {key: {**protocol.json(), "line": protocol.line} for key, protocol in protocols.items()},
    }


def _refuse_two(title: str, runs: Sequence[EvalRun], protocols: Sequence[Protocol | None]) -> None:
    """Raises a ConfigError, which names the fields, where two numbers of a row were not measured alike."""
    for run, protocol in zip(runs[1:], protocols[1:], strict=True):
        first = protocols[0]
        if protocol == first:
            continue
        if protocol is None or first is None:
            differs = ["that of one of them is not known, as earlier versions did not record it"]
        else:
            differs = protocol.differences(first)
        raise ConfigError(
            f"{title}: {_label(run.stage)} and {_label(runs[0].stage)} were not measured alike: {'; '.join(differs)}. "
            "Measure both in the same way, or say --mixed-protocols to set them side by side all the same."
        )


def _differences(runs: Sequence[EvalRun]) -> list[dict[str, Any]]:
    """Of each suite the models with one another, and each with what it says without the video."""
    rows = []
    for name, suite in suites().items():
        known = [(_label(run.stage), answers) for run in runs if (answers := run.answers_to(name))]
        pairs = [(known[i], known[j]) for i, j in pairs_of(known)]
        for run in runs:
            label, whole = _label(run.stage), run.answers_to(name)
            less = [(f"{label} with {shown}", run.answers_to(name, shown)) for shown in BASELINES]
            pairs += [((what, answers), (label, whole)) for what, answers in less if answers and whole]
        for (first, theirs), (second, ours) in pairs:
            # Under --mixed-protocols models may have been asked different questions: these have no difference.
            if same_questions(theirs, ours):
                rows.append(difference_row(suite.title, first, second, compared(suite, theirs, ours)))
    return rows


def _measured_cells(runs: Sequence[EvalRun], name: str, parser: str, shown: str) -> list[dict[str, Any] | None]:
    base = next((run.score(name, parser, shown) for run in runs if run.stage == "base"), None)
    cells: list[dict[str, Any] | None] = []
    for run in runs:
        task, value = run.task(name, shown), run.score(name, parser, shown)
        if task is None or value is None:
            cells.append(None)
            continue
        protocol = run.protocol(name, parser, shown)
        cells.append(
            {
                "value": value,
                "delta": _delta(value, base, run.stage),
                "source": "measured",
                **{fact: task.get(fact) for fact in ("n", "unparsed", "cut_off")},
                "protocol": None if protocol is None else protocol.hash,
                "spread": ((task.get("repeats") or {}).get(parser) or {}).get("spread"),
            }
        )
    return cells


def _paper_cell(line: PaperModel, base: PaperModel, name: str) -> dict[str, Any] | None:
    value = line.scores.get(name)
    if value is None:
        return None
    return {"value": value, "delta": _delta(value, base.scores.get(name), line.stage), "source": "paper"}


def _groups(runs: Sequence[EvalRun]) -> list[dict[str, Any]]:
    """Scores by group (duration, task), measured ones alone: the paper has none."""
    rows = []
    for name, suite in suites().items():
        tasks = [run.tasks.get(name, {}).get("groups") or {} for run in runs]
        for group in dict.fromkeys(group for task in tasks for group in task):
            cells = [
                {"value": task[group]["score"], "source": "measured", "n": task[group].get("n")}
                if group in task
                else None
                for task in tasks
            ]
            rows.append({"name": name, "benchmark": suite.title.partition(" (")[0], "group": group, "cells": cells})
    return rows


def _label(stage: str) -> str:
    return _STAGES.get(stage, stage)


def _delta(value: float, base: float | None, stage: str) -> float | None:
    # Rounded first, so that a reader who subtracts the printed numbers finds the printed delta.
    return None if base is None or stage == "base" else round(round(value, 1) - round(base, 1), 1)


_PARSERS_EXPLAINED = (
    "Answers are read as they are meant (ours) and by each benchmark's own rule (official), which papers quote.",
)


_SPREAD_EXPLAINED = ("Answers are sampled: each number is the mean over repeats, ± their standard deviation.",)


def to_markdown(table: Mapping[str, Any]) -> str:
    """What `comparison` gives, as Markdown; each cell ends in `measured` or `paper`."""
    from longvpo_hf.public import markdown

    parts = []
    for part in table["tables"]:
        frames, columns = part["num_frames"], part["columns"]
        heads = [
            f"{markdown(column['label'])}, {column['source']}" + (f" ({column['note']})" if column["note"] else "")
            for column in columns
        ]
        has_protocols = bool(part["protocols"])
        lines = [
            f"Percent of right answers, at most {frames} frames of each video. In brackets the change from the base.",
            *_PARSERS_EXPLAINED * any(row["parser"] == "official" for row in part["rows"]),
            *_SPREAD_EXPLAINED * any(cell and cell.get("spread") for row in part["rows"] for cell in row["cells"]),
            "",
            "| benchmark | " + " | ".join(heads) + " |" + " protocol |" * has_protocols,
            "|---|" + "---:|" * len(heads) + "---|" * has_protocols,
            *[
                f"| {_named(row, part)} | "
                + " | ".join(_cell(cell) + _marked(cell, row) for cell in row["cells"])
                + (f" | {_row_protocol(row)} |" if has_protocols else " |")
                for row in part["rows"]
            ],
            "",
            *[
                f"- {markdown(column['label'])}, measured: {markdown(column['model'])}"
                for column in columns
                if column["source"] == "measured"
            ],
        ]
        if any(column["source"] == "paper" for column in columns):
            lines.append(f"- paper: {table['paper']} (LongVPO, arXiv 2602.02341), {PAPER_FRAMES} frames")
        elif table["paper"] is not None:
            lines.append(f"- The paper has numbers of {table['paper']} at {PAPER_FRAMES} frames, none at {frames}.")
        lines += [*_shares(part), *_protocol_lines(part), "", *_difference_lines(part), *_group_lines(part)]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    delta = "" if cell.get("delta") is None else f" ({cell['delta']:+.1f})"
    spread = "" if cell.get("spread") is None else f" ± {cell['spread']:.1f}"
    return f"{cell['value']:.1f}{spread}{delta} {cell['source']}"


def _named(row: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """A benchmark's name, with the parser where both are shown, and with what a baseline shows."""
    both = len({other["parser"] for other in part["rows"] if other["name"] == row["name"]}) > 1
    name = f"{row['benchmark']}, {row['parser']}" if both else str(row["benchmark"])
    return name if row["shown"] == THE_VIDEO else f"{name}: {row['shown']}"


def _protocols_in(row: Mapping[str, Any]) -> list[str]:
    """Hashes of the protocols that a row's measured numbers have."""
    return list(dict.fromkeys(cell["protocol"] for cell in row["cells"] if cell and cell.get("protocol")))


def _row_protocol(row: Mapping[str, Any]) -> str:
    found = _protocols_in(row)
    return "–" if not found else f"`{found[0]}`" if len(found) == 1 else "**several**"


def _marked(cell: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str:
    """The protocol of a number that stands beside numbers of another one."""
    return f" `{cell['protocol']}`" if cell and cell.get("protocol") and len(_protocols_in(row)) > 1 else ""


def _protocol_lines(part: Mapping[str, Any]) -> list[str]:
    """Each protocol in its line; those that differ in the parser or in what is shown alone share it."""
    hashes: dict[str, list[str]] = {}
    for key, protocol in part["protocols"].items():
        line = protocol["line"].replace(f"read by {protocol['parser']}; ", "")
        line = line.replace(f"shown: {protocol['shown']}; ", "")
        shown = "" if protocol["shown"] == THE_VIDEO else f", {protocol['shown']}"
        hashes.setdefault(line, []).append(f"`{key}` ({protocol['parser']}{shown})")
    return [f"- protocol {', '.join(keys)}: {line}" for line, keys in hashes.items()]


def _difference_lines(part: Mapping[str, Any]) -> list[str]:
    lines = differences_to_markdown(part["differences"])
    return [*lines, ""] if lines else []


def _shares(part: Mapping[str, Any]) -> list[str]:
    """How many measured answers named no option, or ended inside their reasoning; each of them counts as wrong."""
    lines = []
    for fact, text in (
        ("unparsed", "answers that name no option, counted as wrong"),
        ("cut_off", "answers that were cut off inside their reasoning, counted as wrong; --max-new-tokens gives room"),
    ):
        rates = [
            f"{row['benchmark']} {', '.join(f'{rate:.1f} %' for rate in known)}"
            for row in part["rows"]
            if row["parser"] == "ours"
            and row["shown"] == THE_VIDEO
            and (known := [cell[fact] for cell in row["cells"] if cell and cell.get(fact) is not None])
            and (fact == "unparsed" or any(known))
        ]
        if rates:
            lines.append(f"- {text}: {'; '.join(rates)}")
    return lines


def _group_lines(part: Mapping[str, Any]) -> list[str]:
    from longvpo_hf.public import markdown

    if not part["groups"]:
        return []
    labels = [column["label"] for column in part["columns"] if column["source"] == "measured"]
    return [
        "| group | " + " | ".join(f"{markdown(label)}, measured" for label in labels) + " |",
        "|---|" + "---:|" * len(labels),
        *[
            f"| {row['benchmark']}: {markdown(row['group'])} | " + " | ".join(map(_cell, row["cells"])) + " |"
            for row in part["groups"]
        ],
    ]


def card_section(table: Mapping[str, Any]) -> str:
    """What `comparison` gives as a section of a model card."""
    return (
        "## Benchmarks\n\n"
        "Measured with `longvpo eval` on the frame sampler of training. Numbers marked *paper* are the LongVPO paper's "
        "own, of another model that its authors trained.\n\n" + to_markdown(table)
    )
