"""What steps made: rows with their funnel and some of them, trainings with their curves."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.errors import LongVPOError
from longvpo_hf.publishing.curves import save_curves
from longvpo_hf.publishing.inspect_page.rows import rows_data
from longvpo_hf.record import DatasetRecord, ModelRecord, read_record
from longvpo_hf.studies.audits import audit_in_words, findings_of
from longvpo_hf.studies.ledger import Ledger
from longvpo_hf.studies.report.sections import Picture, Section
from longvpo_hf.studies.steps import Step
from longvpo_hf.training.checkpoints import last_whole_checkpoint

if TYPE_CHECKING:
    from longvpo_hf.studies.session import Session

_ROWS_SHOWN = 4
_CLIPS_SHOWN = 16
_BARS_SHOWN = 12
_CHARACTERS_SHOWN = 300


def outcome_of(step: Step, run: Path, ledger: Ledger) -> str:
    """What came of a step, in a few words."""
    try:
        if step.kind == "build":
            rows = read_record(run / step.name, DatasetRecord)
            return f"{rows.num_rows:,} rows about {rows.num_clips:,} clips" if rows else ""
        if step.kind == "train":
            model = read_record(run / step.name, ModelRecord)
            return _training_in_words(model) if model else ""
    except LongVPOError as error:
        return str(error)
    if step.kind == "audit":
        return audit_in_words(run / step.name)
    if step.kind == "evaluate":
        return _measured_in_words(run / step.name, ledger.result(step.name))
    if step.kind == "base":
        made = ledger.result(step.name)
        steps = sum(number for name, number in made.items() if name.endswith("_steps"))
        return f"{made['parameters']:,} parameters, {steps} steps"
    return ""


def _measured_in_words(folder: Path, result: Mapping[str, Any] | None) -> str:
    """The number that a measurement is about; empty for benchmarks, whose table follows."""
    if result is not None:
        length, percent = list(result["accuracy"].items())[-1]
        return f"one of {length} clips: {percent:.1f} %"
    if (folder / "position.json").is_file():
        found = json.loads((folder / "position.json").read_text(encoding="utf-8"))
        middle = found["thirds"]["middle"]["percent"]
        return f"alone {found['upper_bound']['percent']:.1f} %" + ("" if middle is None else f", middle {middle:.1f} %")
    if (folder / "needle.json").is_file():
        cells = json.loads((folder / "needle.json").read_text(encoding="utf-8"))["cells"]
        right, number = sum(cell["right"] for cell in cells), sum(cell["number"] for cell in cells)
        return f"found {100 * right / number:.1f} %" if number else ""
    return ""


def _training_in_words(model: ModelRecord) -> str:
    parts = [f"{model.training.num_steps} steps"] if model.training else []
    for name, label in (("loss", "loss"), ("rewards/accuracies", "reward accuracy")):
        values = [value for value in model.progress.get(name, ()) if value is not None]
        if len(values) == 2:
            parts.append(f"{label} {values[0]:.2f} → {values[1]:.2f}")
    return ", ".join(parts)


def sections_of_step(step: Step, session: Session) -> list[Section]:
    """The sections of a step that is done."""
    folder = session.run_folder / step.name
    if step.kind == "build":
        return [_rows_section(step, folder, session.ledger.result(step.name))]
    if step.kind == "train":
        return [_training_section(step, folder)]
    if step.kind == "audit" and (found := findings_of(folder)):
        lines = [f"{item['name']}: {item['verdict']}. {item['said']} → {item['remedy']}" for item in found]
        return [Section(f"Audit: {step.needs[0]}", [*lines, f"All items are in {step.name}/audit.html."])]
    if step.kind == "base" and "language_model" in (made := session.ledger.result(step.name)):
        from longvpo_hf.miniature.report import base_section

        return [base_section(made)]
    return []


def _rows_section(step: Step, folder: Path, result: Mapping[str, Any] | None) -> Section:
    record = read_record(folder, DatasetRecord)
    with contextlib.redirect_stderr(io.StringIO()):  # its bar
        data = rows_data(folder, _ROWS_SHOWN, 0, None)
    for row in data["rows"]:
        row.setdefault("error", "")
        row["clips"] = row.get("clips", [])[:_CLIPS_SHOWN]
        for text in ("question", "chosen", "rejected"):
            if len(row.get(text, "")) > _CHARACTERS_SHOWN:
                row[text] = f"{row[text][:_CHARACTERS_SHOWN]} …"
    funnel = record.funnel if record else {}
    reasons = record.reasons if record else {}
    # Stages are words, not bars: source videos and drafts about them are no parts of one whole.
    dropped = [(name, number, reasons.get(name, "")) for name, number in funnel.get("dropped", {}).items()]
    bars: list[tuple[str, Sequence[tuple[str, int, str]]]] = []
    if dropped:
        bars.append(("Dropped", dropped[:_BARS_SHOWN]))
    # In words, not as bars: source videos and drafts about them are no parts of one whole.
    came = ", ".join(f"{number:,} {name}" for name, number in funnel.get("stages", {}).items())
    paragraphs = [f"Came through: {came}."] if came else []
    tables = []
    if result and "truth" in result:
        captions = result["captions"]
        right = 100 * captions["captions_right"] / captions["scenes"] if captions["scenes"] else 0.0
        paragraphs.append(
            "Below they are held against the world's truth, which no step of building or training sees. Before "
            f"filters: every pair of answers that was given. Of {captions['scenes']:,} captions, {right:.1f} % are "
            "right."
        )
        from longvpo_hf.miniature.report import truth_table

        tables.append(truth_table(result["truth"]))
    return Section(
        f"Rows: {step.name}",
        paragraphs,
        bars=bars,
        tables=tables,
        rows=data["rows"],
        pictures_of_rows=data["pictures"],
    )


def _training_section(step: Step, folder: Path) -> Section:
    record = read_record(folder, ModelRecord)
    training = record.training if record else None
    facts = []
    if record and training:
        losses = " + ".join(f"{weight:g} × {name}" for name, weight in training.losses.items())
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.num_processes
        facts = [
            f"{training.num_steps} steps of {rows} rows, learning rate {training.learning_rate:g}, {losses}, "
            f"β {training.beta:g}, reference on {training.reference!r}, {record.sampling}."
        ]
    curves = _curves(folder)
    pictures = [Picture(f"{step.name}-curves", f"Training curves of {step.name}", curves)] if curves else []
    return Section(f"Training: {step.name}", facts, pictures=pictures)


def _curves(folder: Path) -> bytes | None:
    """The curves of a training, from the log of its last checkpoint."""
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is None:
        return None
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "curves.png")
        return path.read_bytes() if save_curves(state["log_history"], path) else None
