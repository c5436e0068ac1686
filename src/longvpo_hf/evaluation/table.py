"""The paper's table: base, Stage 1 and Stage 2 side by side with deltas, next to the paper's own numbers.

Results of `longvpo eval` (one JSON file for each model and number of frames) become the table as JSON and Markdown, a
section of a model card, and the card's `model-index`. Every number says whether it was measured or is the paper's; the
paper's are shown only beside results at the paper's own number of frames.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.paper import PAPER, PAPER_FRAMES, PaperModel, paper_model
from longvpo_hf.evaluation.suites import suites

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

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
        tasks: By benchmark what `scoring.summary` gives; results of earlier versions lack `official` and `cut_off`.

    Raises:
        ValueError: If a benchmark is unknown, or a score is missing or no percentage.
    """

    model: str
    stage: str
    num_frames: int
    tasks: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not self.model or not isinstance(self.num_frames, int) or self.num_frames < 1:
            raise ConfigError(f"A result needs a model and num_frames ≥ 1, got {self.model!r} and {self.num_frames!r}.")
        for name, task in self.tasks.items():
            if name not in suites():
                raise ConfigError(f"{self.model}: no suite is called {name!r}; known are {', '.join(suites())}.")
            field = suites()[name].headline
            value = task.get(field)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= 100:
                raise ConfigError(f"{self.model}: {name}.{field} must be a percentage, got {value!r}.")

    @classmethod
    def read(cls, path: Path) -> EvalRun:
        """The result in a JSON file; a stage that is absent or null is the base.

        Raises:
            ValueError: If the file is no such result.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(record["model"], record.get("stage") or "base", record["num_frames"], record["tasks"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{path.name} is no result of `longvpo eval`: {what}") from error

    def score(self, name: str, parser: str = "ours") -> float | None:
        """Its score of a benchmark, as the paper's table has it; None where it was not measured.

        Args:
            name: The benchmark.
            parser: `ours` or `official`: see `comparison`.
        """
        field = "official" if parser == "official" else suites()[name].headline
        return self.tasks[name].get(field) if name in self.tasks else None


def comparison(runs: Sequence[EvalRun], paper: str | None = None) -> dict[str, Any]:
    """The table as JSON: for each number of frames its columns and rows.

    Args:
        runs: Results; of each stage and number of frames at most one.
        paper: The base model whose numbers in the paper stand beside, a key of `PAPER`; by default the one that the
            names of the models tell, if any.

    Returns:
        `{"paper": key or None, "tables": [{"num_frames", "columns": [{"label", "source", "model", "note"}], "rows":
        [{"name", "benchmark", "parser", "cells": [{"value", "delta", "source", "n", "unparsed", "cut_off"} or None]}],
        "groups": [...]}]}`. A benchmark has a row `ours`, as replies are meant, and one `official`, as its own rule
        scores them, in which the paper's numbers stand; a parser that no result has gets no row. A delta is to the base
        of the same source; None where there is no base.

    Raises:
        ValueError: If there are no runs, two of one stage and number of frames, or an unknown `paper`.
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
    return {"paper": paper, "tables": [_table(by_frames[frames], paper) for frames in sorted(by_frames)]}


def _table(runs: Sequence[EvalRun], paper: str | None) -> dict[str, Any]:
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
    rows = []
    for name, suite in suites().items():
        parsers = [parser for parser in _PARSERS if any(run.score(name, parser) is not None for run in runs)]
        for parser in parsers:
            cells = _measured_cells(runs, name, parser)
            # Papers' numbers are of the benchmarks' own rules.
            shown = lines if parser == parsers[-1] else ()
            cells += [_paper_cell(line, lines[0], name) for line in shown] or [None] * len(lines)
            rows.append({"name": name, "benchmark": suite.title, "parser": parser, "cells": cells})
    return {"num_frames": num_frames, "columns": columns, "rows": rows, "groups": _groups(runs)}


def _measured_cells(runs: Sequence[EvalRun], name: str, parser: str) -> list[dict[str, Any] | None]:
    base = next((run.score(name, parser) for run in runs if run.stage == "base"), None)
    return [
        None
        if (value := run.score(name, parser)) is None
        else {
            "value": value,
            "delta": _delta(value, base, run.stage),
            "source": "measured",
            **{fact: run.tasks[name].get(fact) for fact in ("n", "unparsed", "cut_off")},
        }
        for run in runs
    ]


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
        lines = [
            f"Percent of right answers, at most {frames} frames of each video. In brackets the change from the base.",
            *_PARSERS_EXPLAINED * any(row["parser"] == "official" for row in part["rows"]),
            "",
            "| benchmark | " + " | ".join(heads) + " |",
            "|---|" + "---:|" * len(heads),
            *[f"| {_named(row, part)} | " + " | ".join(map(_cell, row["cells"])) + " |" for row in part["rows"]],
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
        lines += [*_shares(part), "", *_group_lines(part)]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    delta = "" if cell.get("delta") is None else f" ({cell['delta']:+.1f})"
    return f"{cell['value']:.1f}{delta} {cell['source']}"


def _named(row: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """A benchmark's name, with the parser where both are shown."""
    both = sum(other["name"] == row["name"] for other in part["rows"]) > 1
    return f"{row['benchmark']}, {row['parser']}" if both else str(row["benchmark"])


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


def card_section(runs: Sequence[EvalRun], paper: str | None = None) -> str:
    """The table as a section of a model card."""
    return (
        "## Benchmarks\n\n"
        "Measured with `longvpo eval` on the frame sampler of training. Numbers marked *paper* are the LongVPO paper's "
        "own, of another model that its authors trained.\n\n" + to_markdown(comparison(runs, paper))
    )


def eval_results(runs: Sequence[EvalRun]) -> list[EvalResult]:
    """What was measured of one model, for its card's metadata: `trainer.push_to_hub(eval_results=...)`.

    Args:
        runs: Of one model, e.g. at several numbers of frames.

    Raises:
        ValueError: If the runs are of several models.
    """
    from huggingface_hub import EvalResult

    if len({run.model for run in runs}) > 1:
        raise ConfigError(f"A model's card holds its own results only, got those of {sorted({r.model for r in runs})}.")
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
        )
        for run in runs
        for name, suite in suites().items()
        if (value := run.score(name)) is not None
    ]


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
