"""The record of a model in training: what its trainer knows, in the form that is written beside the weights."""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, model_info, parse_hf_uri
from huggingface_hub.errors import HfUriError
from transformers import PreTrainedModel, TrainerState

from longvpo_hf import papers
from longvpo_hf.errors import LongVPOError
from longvpo_hf.preference import VideoPreference
from longvpo_hf.public import public_name
from longvpo_hf.record import (
    RECORD_FILE,
    AdapterRecord,
    DatasetRecord,
    EvaluationRecord,
    MethodRecord,
    ModelRecord,
    Sampling,
    Source,
    TrainedOn,
    TrainingRecord,
    hub_commit,
    installed_versions,
    read_record,
    weights_digest,
)
from longvpo_hf.record.old_cards import parsed
from longvpo_hf.training.config import LongVPOConfig

logger = logging.getLogger(__name__)

#: Metrics whose first and last value are recorded; all of them are in `trainer_state.json`.
_PROGRESS = ("loss", "rewards/accuracies", "rewards/margins")
_CLIPS_PER_READ = 1000


def record_of(
    model: PreTrainedModel,
    args: LongVPOConfig,
    state: TrainerState,
    rows: Any,
    *,
    is_packed: bool,
    sharing: int = 1,
    name: str | None = None,
    hub_model_id: str | None = None,
    dataset_name: str | None = None,
    tags: Iterable[str] = (),
    citation: str = "",
    eval_results: Sequence[EvalResult] = (),
) -> ModelRecord:
    """The record of a model in training.

    Args:
        model: The policy, or its adapter around it.
        args: Settings of the run.
        state: How far it came.
        rows: The dataset that it is trained on.
        is_packed: Whether the model is scored in packed sequences.
        sharing: How many processes share each batch.
        name: Heading of the card; by default the output folder's name.
        hub_model_id: Where the model is pushed to.
        dataset_name: What the model was trained on; by default found by the rows' media.
        tags: For the card.
        citation: BibTeX of the loss.
        eval_results: Measured after training.
    """
    path, tags = model.config.name_or_path or "", tuple(dict.fromkeys(tags))
    base = _base(path, (args.model_init_kwargs or {}).get("revision"))
    name = name or Path(args.output_dir).name
    return ModelRecord(
        name=name,
        load_from=hub_model_id or args.hub_model_id or f"path/to/{public_name(name)}",
        base=base,
        sampling=Sampling(args.num_frames, args.fps, args.max_pixels),
        data=_trained_on(rows, dataset_name),
        training=_training(model, args, state, is_packed, sharing),
        progress={
            metric: (_finite(values[0]), _finite(values[-1]))
            for metric in _PROGRESS
            if (values := [entry[metric] for entry in state.log_history if metric in entry])
        },
        evaluations=tuple(_evaluation(result) for result in eval_results),
        licence=_licence_of(path, base),
        citations=(papers.LONGVPO, citation, papers.TRL),
        tags=tags,
        runs=_runs(tags),
        versions=installed_versions(),
    )


def _training(model: Any, args: LongVPOConfig, state: TrainerState, is_packed: bool, sharing: int) -> TrainingRecord:
    peft = next(iter(getattr(model, "peft_config", {}).values()), None)
    terms = {"sft": args.sft_weight} if args.sft_weight else {}
    if args.view_distillation_weight:
        how = f"{args.view_distillation_divergence}, temperature {args.view_distillation_temperature:g}"
        how += ", guarded" if args.view_distillation_guard else ""
        how += ", on sampled answers" if args.view_distillation_on == "sampled" else ""
        terms[f"view distillation ({how})"] = args.view_distillation_weight
    if args.view_preference_weight:
        terms[f"view preference (rejected: {args.view_preference_rejected})"] = args.view_preference_weight
    return TrainingRecord(
        losses={**args.preference_losses, **terms},
        beta=args.beta,
        sft_weight=args.sft_weight,
        reference=args.reference,
        reference_num_frames=args.reference_num_frames,
        adapter=None if peft is None else _adapter(peft),
        freeze_vision_tower=args.freeze_vision_tower,
        learning_rate=args.learning_rate,
        lr_scheduler_type=_value(args.lr_scheduler_type),
        warmup_steps=args.warmup_steps,
        optim=_value(args.optim),
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_processes=args.world_size // sharing,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        gradient_checkpointing=args.gradient_checkpointing,
        tree_packing=is_packed,
        pairs_per_timeline=args.pairs_per_timeline,
        answer_reasoning=args.answer_reasoning,
        max_length=args.max_length,
        seed=args.seed,
        num_steps=state.global_step,
        num_epochs=state.epoch or 0.0,
    )


def _adapter(peft: Any) -> AdapterRecord:
    modules = peft.target_modules
    kind = _value(peft.peft_type)
    return AdapterRecord(
        "LoRA" if kind == "LORA" else kind,
        getattr(peft, "r", None),
        getattr(peft, "lora_alpha", None),
        (modules,) if isinstance(modules, str) else tuple(sorted(modules or ())),
    )


def _evaluation(result: EvalResult) -> EvaluationRecord:
    names = [field.name for field in fields(EvaluationRecord) if field.name != "extra"]
    return EvaluationRecord(**{name: getattr(result, name) for name in names})


def _value(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------------------ the base


@functools.lru_cache(maxsize=8)
def _base(path: str, revision: str | None) -> Source:
    """The model that training started from. Of a folder, its files are read once for their digest."""
    folder = Path(path)
    if path and folder.is_dir():
        return Source.of(path, digest=weights_digest(folder))
    return Source.of(path, hub_commit(path, revision) or revision or "")


def _licence_of(path: str, base: Source) -> dict[str, str]:
    """What the base model's card says of its licence; nothing where there is no card or no network."""
    readme = Path(path) / "README.md"
    if base.on_hub:
        data: Any = _hub_metadata(base.name, base.revision or None)
    else:
        text = readme.read_text(encoding="utf-8", errors="replace") if path and readme.is_file() else ""
        _, data = parsed(text)
    names = ("license", "license_name", "license_link")
    return {name: value for name in names if isinstance(value := data.get(name), str)}


@functools.lru_cache
def _hub_metadata(name: str, revision: str | None) -> Any:
    try:
        return model_info(name, revision=revision, timeout=5).card_data or {}
    except Exception:  # whatever it is, a missing network or repository must not cost a checkpoint
        return {}


# ------------------------------------------------------------------------------------------------------------ the data


def _trained_on(rows: Any, dataset_name: str | None) -> tuple[TrainedOn, ...]:
    """The datasets that rows are from, with their revisions, and the methods that made the rows."""
    found, methods = _data_of(rows)
    if dataset_name is not None:
        known = {data.source.name: data for data in found}
        found = (known.get(public_name(dataset_name)) or _described(Source.of(dataset_name), dataset_name),)
    if not found:
        return (TrainedOn(Source(""), tuple(map(MethodRecord, methods))),) if methods else ()
    named = {method.name for data in found for method in data.methods}
    missing = tuple(MethodRecord(method) for method in methods if method not in named)
    first, *others = found
    return (TrainedOn(first.source, (*first.methods, *missing)), *others)


@functools.lru_cache(maxsize=1)
def _data_of(rows: Any) -> tuple[tuple[TrainedOn, ...], tuple[str, ...]]:
    """Datasets and methods of rows. Read once, since a record is written with every checkpoint."""
    from datasets import Dataset

    if rows is None:
        return (), ()
    recorded = isinstance((rows.features or {}).get("provenance"), dict)
    if isinstance(rows, Dataset):
        folders = _media_folders(rows)
        methods = _methods_of(rows) if recorded else []
    else:
        row: Mapping[str, Any] = next(iter(rows), {})
        clips = row.get("clips") or ()
        folders = {_folder_of(media["path"] if isinstance(media, Mapping) else media) for media in map(_media, clips)}
        methods = [VideoPreference.from_row(row).provenance.method] if recorded else []
    sources = dict(_dataset_at(folder) for folder in sorted(folders) if folder)
    data = tuple(_described(source, where) for source, where in sources.items() if source is not None)
    return data, tuple(sorted({method for method in methods if method}))


def _media(clip: Mapping[str, Any]) -> Any:
    return clip.get("video") or clip.get("file_name")


def _folder_of(path: Any) -> str:
    return path.replace("\\", "/").rpartition("/")[0] if isinstance(path, str) else ""


def _media_folders(rows: Any) -> set[str]:
    """The folders that the media of all rows are in."""
    if "clips" not in rows.column_names:
        return set()
    folders: set[str] = set()
    for batch in rows.select_columns("clips").with_format("arrow").iter(_CLIPS_PER_READ):
        clips = batch["clips"].combine_chunks().flatten()
        media = clips.field("video" if "video" in [field.name for field in clips.type] else "file_name")
        paths = media.field("path") if hasattr(media.type, "fields") and media.type.num_fields else media
        folders.update(_folder_of(path) for path in paths.unique().to_pylist())
    return folders


def _methods_of(rows: Any) -> list[str]:
    column = rows.select_columns("provenance").with_format("arrow")[:]["provenance"].combine_chunks()
    names = [field.name for field in column.type]
    found: list[str] = column.field("method" if "method" in names else "recipe").unique().to_pylist()
    return found


def _dataset_at(folder: str) -> tuple[Source | None, str]:
    """The dataset that a folder of media belongs to, and where its record is: a folder, or a name on the Hub."""
    with suppress(HfUriError):
        uri = parse_hf_uri(folder)
        return Source.of(uri.id, uri.revision or ""), uri.id
    for root in (Path(folder), *Path(folder).parents[:2]):  # media lie in clips/ab/
        if (root / RECORD_FILE).is_file() or (root / "train.parquet").is_file():
            cached = _in_hub_cache(root)
            return cached or Source.of(str(root)), cached.name if cached else str(root)
    return None, ""


def _in_hub_cache(root: Path) -> Source | None:
    """The Hub's name of a snapshot in its cache, laid out as `datasets--namespace--name/snapshots/commit`."""
    kind, *name = root.parent.parent.name.split("--")
    if kind != "datasets" or not name or root.parent.name != "snapshots":
        return None
    return Source.of("/".join(name), root.name)


def _described(source: Source, where: str) -> TrainedOn:
    """A dataset with what its record says; without where it has none that can be read."""
    try:
        record = read_record(where, DatasetRecord, source.revision or None)
    except LongVPOError as error:  # must not cost a checkpoint
        logger.warning(f"What {source.name} was made by is not recorded: {error}")
        record = None
    if record is None:
        return TrainedOn(source)
    if not source.on_hub:
        source = Source(source.name, digest=record.digest)
    return TrainedOn(source, record.methods)


# --------------------------------------------------------------------------------------------------------- where logged


def _runs(tags: Iterable[str]) -> dict[str, str]:
    """Where the run was logged, as TRL finds it; a Space of trackio after the run's end by the tag it left."""
    from transformers import is_wandb_available
    from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

    tagged = next((tag.removeprefix("trackio:") for tag in tags if tag.startswith("trackio:https://")), None)
    urls = {"Trackio": get_trackio_space_url() or tagged, "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        run = importlib.import_module("wandb").run
        urls["Weights & Biases"] = run.url if run is not None else None
    return {label: url for label, url in urls.items() if url}
