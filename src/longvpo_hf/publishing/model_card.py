"""The model card and the training curve, rendered from a model's record.

The text is in `model_cards/longvpo.md`. Whatever comes from outside (names of models, datasets, benchmarks) is escaped
wherever the template shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from longvpo_hf.artifacts import make_folder, write_text
from longvpo_hf.public import markdown
from longvpo_hf.publishing.curves import Logs, save_curves
from longvpo_hf.publishing.dataset_card import fenced, written_by_models
from longvpo_hf.record import AdapterRecord, EvaluationRecord, ModelRecord, Source, TrainingRecord, write_record
from longvpo_hf.shipped import shipped

CURVE_FILE = "training_curve.png"

_ADDRESS = re.compile(r"https?://[^\s()<>]+")
_CURVES = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
_REFERENCE_VIEWS = {
    "row": "what each row says",
    "anchor": "the row's reference clips, or its evidence where it names none",
    "full": "the whole timeline",
}


def write_model_card(folder: Path, record: ModelRecord, log_history: Logs = ()) -> None:
    """Writes the record, the card made of it, and the training curve where anything was logged, into `folder`.

    The card shows whatever curve is in the folder, also that of an earlier run.

    Args:
        folder: Made where there is none.
        record: See `ModelRecord`.
        log_history: As `TrainerState.log_history`.
    """
    make_folder(folder)
    if any("loss" in entry for entry in log_history):
        save_curves(log_history, folder / CURVE_FILE)
    write_record(folder, record)
    write_text(folder / "README.md", model_card(record, has_curve=(folder / CURVE_FILE).is_file()))


def update_model_card(folder: Path, old: ModelRecord, new: ModelRecord) -> bool:
    """Writes a changed record, and makes the card anew unless it is not the one that was made of the old record.

    Args:
        folder: Of a model with a record; it may have a card.
        old: The record that is there.
        new: What replaces it.

    Returns:
        False where there is a card that somebody wrote into: it is left as it is.
    """
    card, has_curve = folder / "README.md", (folder / CURVE_FILE).is_file()
    is_ours = card.is_file() and card.read_text(encoding="utf-8") == model_card(old, has_curve=has_curve)
    write_record(folder, new)
    if is_ours:
        write_text(card, model_card(new, has_curve=has_curve))
    return is_ours or not card.is_file()


def model_card(record: ModelRecord, *, has_curve: bool, has_report: bool = False) -> str:
    """Text of a model's card.

    Args:
        record: See `ModelRecord`.
        has_curve: Whether the training curve is beside the card.
        has_report: Whether a study's `report.md` is.
    """
    return str(_card(record, has_curve, has_report))


# ---------------------------------------------------------------------------------------------------------- the text


class _Verbatim(str):
    """Text the template shows unescaped: made here, not taken from outside."""


def _card(record: ModelRecord, has_curve: bool, has_report: bool) -> ModelCard:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, _Verbatim) else markdown(value),
    )
    environment.filters["code"] = _code
    methods = {method.name: method for data in record.data for method in data.methods if method.name}
    protocols = [result.metric_args.get("protocol") for result in record.evaluations if result.metric_args]
    citations = [*record.citations, *(method.citation for method in methods.values())]
    text = environment.from_string(shipped("model_cards/longvpo.md").read_text(encoding="utf-8")).render(
        metadata=_Verbatim(_metadata(record).to_yaml()),
        name=record.name,
        load_from=record.load_from,
        base=record.base,
        base_link=_link(record.base, ""),
        adapter=record.adapter,
        sampling=record.sampling,
        settings=[
            *([("method", ", ".join(sorted(methods)))] if methods else []),
            *[("dataset", _link(data.source, "datasets/")) for data in record.data if data.source.name],
            *(_settings(record, record.training) if record.training else []),
        ],
        runs=[(label, _Verbatim(url)) for label, url in record.runs.items() if _ADDRESS.fullmatch(url)],
        curve=_Verbatim(CURVE_FILE) if has_curve else None,
        progress=[
            (label, *(f"{value:.4g}" for value in (values[0], values[-1])))
            for key, label in _CURVES.items()
            if (values := [value for value in record.progress.get(key, ()) if value is not None])
        ],
        report=_Verbatim("report.md") if has_report else None,
        evaluations=[_result(result) for result in record.evaluations],
        has_base=any(_base_of(result) for result in record.evaluations),
        protocols=list(dict.fromkeys(protocol for protocol in protocols if protocol)),
        by_models=written_by_models(methods),
        licence=record.licence.get("license_name") or record.licence.get("license"),
        versions=list(record.versions.items()),
        citations=[_Verbatim(fenced(entry)) for entry in dict.fromkeys(citations) if entry],
    )
    return ModelCard(text)


def _metadata(record: ModelRecord) -> ModelCardData:
    """The card's YAML."""
    metadata = ModelCardData(
        base_model=record.base.name if record.base.on_hub else None,
        base_model_relation=("adapter" if record.adapter else "finetune") if record.base.on_hub else None,
        datasets=list(dict.fromkeys(data.source.name for data in record.data if data.source.on_hub)) or None,
        library_name="peft" if record.adapter else "transformers",
        pipeline_tag="video-text-to-text",
        model_name=record.name,
        tags=["generated_from_trainer", *record.tags],
        eval_results=[_eval_result(result) for result in record.evaluations] or None,
    )
    for name in ("license", "license_name", "license_link"):
        if name in record.licence:
            metadata[name] = record.licence[name]
    return metadata


def _result(result: EvaluationRecord) -> dict[str, Any]:
    """A line of the card's table."""
    args = result.metric_args or {}
    base = _base_of(result)
    return {
        "dataset": result.dataset_name,
        "split": result.dataset_split or "",
        "metric": result.metric_name or result.metric_type,
        "value": _with_bounds(result.metric_value, args.get("interval_95")),
        "base": _with_bounds(base.get("value"), base.get("interval_95")),
        "questions": args.get("questions") or "–",
    }


def _base_of(result: EvaluationRecord) -> Mapping[str, Any]:
    """What was measured of the base model; nothing where that is not known."""
    base = (result.metric_args or {}).get("base")
    return base if isinstance(base, Mapping) else {}


def _with_bounds(value: Any, bounds: Any) -> str:
    """A value with its 95 % bounds, e.g. `61.5 (58.1–64.9)`; the record may be a stranger's, with anything in it."""
    if value is None:
        return "–"
    is_interval = (
        isinstance(bounds, Sequence)
        and len(bounds) == 2
        and all(type(bound) in (int, float) for bound in bounds)  # no text, no bool
    )
    return f"{value} ({bounds[0]:.1f}–{bounds[1]:.1f})" if is_interval else str(value)


def _eval_result(result: EvaluationRecord) -> EvalResult:
    args = {name: fact for name, fact in (result.metric_args or {}).items() if name == "protocol"}  # a head is no table
    known = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "extra"}
    return EvalResult(**{**known, "metric_args": args or None})


def _settings(record: ModelRecord, training: TrainingRecord) -> list[tuple[str, str]]:
    """Label and value of each setting, in the order of the table."""
    frames = []
    if (policy := record.sampling) is not None:
        reference = replace(policy, num_frames=training.reference_num_frames or policy.num_frames)
        frames = [("frames of the policy", str(policy)), ("frames of the reference", str(reference))]
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.num_processes
    tower = ", vision tower frozen" if training.freeze_vision_tower else ""
    packed = f"on, pairs_per_timeline = {training.pairs_per_timeline}" if training.tree_packing else "off"
    return [
        ("loss", " + ".join(f"{weight:g} × {kind}" for kind, weight in training.losses.items())),
        ("β", f"{training.beta:g}"),
        ("α (weight of the SFT term)", f"{training.sft_weight:g}"),
        ("the reference model sees", _REFERENCE_VIEWS.get(training.reference, training.reference)),
        *frames,
        ("trained weights", (_adapter(training.adapter) if training.adapter else "all") + tower),
        (
            "learning rate",
            f"{training.learning_rate:g}, {training.lr_scheduler_type}, warm-up {training.warmup_steps:g}",
        ),
        (
            "optimiser",
            f"{training.optim}, weight decay {training.weight_decay:g}, gradient norm ≤ {training.max_grad_norm}",
        ),
        (
            "batch",
            f"{rows} rows = {training.per_device_train_batch_size} (per device) × "
            f"{training.gradient_accumulation_steps} (accumulated) × {training.num_processes} (processes)",
        ),
        ("epochs", f"{training.num_epochs:.3g} ({training.num_steps} steps)"),
        ("precision", training.precision),
        ("gradient checkpointing", "on" if training.gradient_checkpointing else "off"),
        ("tree packing", packed),
        ("longest sequence", "unbounded" if training.max_length is None else f"{training.max_length} tokens"),
        ("seed", f"{training.seed}"),
    ]


def _adapter(adapter: AdapterRecord) -> str:
    rank = "" if adapter.rank is None else f" of rank {adapter.rank}, α {adapter.alpha:g}"
    merged = ", merged into the base" if adapter.is_merged else ""
    return f"{adapter.kind}{rank} on {', '.join(adapter.target_modules)}{merged}"


def _code(value: object) -> _Verbatim:
    """A Python literal that also leaves the fence around it alone."""
    return _Verbatim(json.dumps(value).replace("`", "\\u0060") if isinstance(value, str) else repr(value))


def _link(source: Source, kind: str) -> _Verbatim:
    """A source as Markdown, with its revision."""
    if not source.on_hub:
        return _Verbatim(f"{markdown(source.name)} (not on the Hub)")
    at = f" at revision [{source.revision[:10]}](https://huggingface.co/{kind}{source.name}/tree/{source.revision})"
    return _Verbatim(
        f"[{markdown(source.name)}](https://huggingface.co/{kind}{source.name})" + (at if source.revision else "")
    )
