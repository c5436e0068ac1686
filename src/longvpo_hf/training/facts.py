"""What a model card tells of a trainer's run."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, model_info, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from longvpo_hf.preference import VideoPreference
from longvpo_hf.public import public_name
from longvpo_hf.publishing.model_card import CardFacts, Source

if TYPE_CHECKING:
    from longvpo_hf.training.trainer import LongVPOTrainer

_REFERENCE_VIEWS = {
    "row": "what each row says",
    "anchor": "the row's reference clips, or its evidence where it names none",
    "full": "the whole timeline",
}


def facts_of(
    trainer: LongVPOTrainer,
    model_name: str | None,
    dataset_name: str | None,
    tags: str | Sequence[str] | None,
    eval_results: Sequence[EvalResult] = (),
) -> CardFacts:
    """What a card tells of a trainer's model; the arguments are those of `create_model_card`."""
    args, path = trainer.args, trainer.model.config.name_or_path or ""
    name = model_name or Path(args.output_dir).name
    base = Source.of(path)
    if base.on_hub:
        base = replace(base, revision=_revision_of(path, (args.model_init_kwargs or {}).get("revision")))
    datasets, methods = _data_of(trainer.train_dataset)
    if dataset_name is not None:
        known = {source.name: source for source in datasets}
        datasets = (known.get(dataset_name, Source.of(dataset_name)),)
    peft = next(iter(getattr(trainer.model, "peft_config", {}).values()), None)
    return CardFacts(
        name=name,
        load_from=trainer.hub_model_id or args.hub_model_id or f"path/to/{public_name(name)}",
        base=base,
        adapter="" if peft is None else _kind(peft),
        datasets=datasets,
        methods=methods,
        settings=tuple(_settings(trainer, peft)),
        sampling={"num_frames": args.num_frames, "fps": args.fps, "max_pixels": args.max_pixels},
        licence=_licence_of(path, base),
        log_history=trainer.state.log_history,
        eval_results=eval_results,
        tags=tuple(dict.fromkeys([*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or ())])),
        runs=tuple(_runs()),
        method_citation=trainer._paper["citation"],
    )


def _settings(trainer: LongVPOTrainer, peft: Any) -> list[tuple[str, str]]:
    from longvpo_hf.training.packing import is_tree_packed

    args = trainer.args
    losses = [*args.preference_losses.items(), *([("sft", args.sft_weight)] if args.sft_weight else [])]
    packed = args.tree_packing and is_tree_packed(trainer.model)
    rate = "" if args.fps is None else f", {args.fps:g} a second"
    pixels = "" if args.max_pixels is None else f", {args.max_pixels} pixels each"
    accumulated = args.gradient_accumulation_steps
    rows = args.per_device_train_batch_size * accumulated * args.world_size
    tower = ", vision tower frozen" if args.freeze_vision_tower else ""
    return [
        ("loss", " + ".join(f"{weight:g} × {name}" for name, weight in losses)),
        ("β", f"{args.beta:g}"),
        ("α (weight of the SFT term)", f"{args.sft_weight:g}"),
        ("the reference model sees", _REFERENCE_VIEWS[args.reference]),
        ("frames of the policy", f"at most {args.num_frames}{rate}{pixels}"),
        ("frames of the reference", f"at most {args.reference_num_frames or args.num_frames}{rate}{pixels}"),
        ("trained weights", (_adapter_settings(peft) if peft is not None else "all") + tower),
        ("learning rate", f"{args.learning_rate:g}, {_value(args.lr_scheduler_type)}, warm-up {args.warmup_steps:g}"),
        (
            "optimiser",
            f"{_value(args.optim)}, weight decay {args.weight_decay:g}, gradient norm ≤ {args.max_grad_norm}",
        ),
        (
            "batch",
            f"{rows} rows = {args.per_device_train_batch_size} (per device) × {accumulated} (accumulated) × "
            f"{args.world_size} (processes)",
        ),
        ("epochs", f"{trainer.state.epoch or 0:.3g} ({trainer.state.global_step} steps)"),
        ("precision", "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"),
        ("gradient checkpointing", "on" if args.gradient_checkpointing else "off"),
        ("tree packing", f"on, pairs_per_timeline = {args.pairs_per_timeline}" if packed else "off"),
        ("longest sequence", "unbounded" if args.max_length is None else f"{args.max_length} tokens"),
        ("seed", f"{args.seed}"),
    ]


def _adapter_settings(peft: Any) -> str:
    modules = peft.target_modules
    shown = modules if isinstance(modules, str) else ", ".join(sorted(modules or ()))
    rank = f" of rank {peft.r}, α {peft.lora_alpha}" if hasattr(peft, "lora_alpha") else ""
    return f"{_kind(peft)}{rank} on {shown}"


def _kind(peft: Any) -> str:
    kind = _value(peft.peft_type)
    return "LoRA" if kind == "LORA" else kind


def _value(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


def _data_of(dataset: Any) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """The Hub datasets that rows are from, with their revisions, and the methods they were made by."""
    from datasets import Dataset

    recorded = isinstance((dataset.features or {}).get("provenance"), dict)
    if isinstance(dataset, Dataset):
        # Files of the cache: <namespace>___<name>/<config>/<version>/<commit>/<name>-train.arrow
        paths = [file["filename"] for file in dataset.cache_files]
        found = [re.search(r"[/\\]([^/\\]+)___([^/\\]+)[/\\].*?([0-9a-f]{40})[/\\]", path) for path in paths]
        methods: list[str] = []
        if recorded:
            column = dataset.select_columns("provenance").with_format("arrow")[:]["provenance"]
            names = [field.name for field in column.type]
            methods = column.combine_chunks().field("method" if "method" in names else "recipe").unique().to_pylist()
    else:
        row = _first_row(dataset)
        media = json.dumps([clip.get("video") for clip in row.get("clips") or ()], default=str)
        found = list(re.finditer(r"hf://datasets/([^/@]+)/([^/@]+)@([0-9a-f]{40})/", media))
        methods = [VideoPreference.from_row(row).provenance.method] if recorded else []
    sources = (Source.of(f"{match[1]}/{match[2]}", match[3]) for match in found if match)
    return tuple(dict.fromkeys(sources)), tuple(sorted({method for method in methods if method}))


@functools.lru_cache(maxsize=1)
def _first_row(dataset: Any) -> dict[str, Any]:
    """First row of a stream; read once, since a card is written with every checkpoint."""
    return next(iter(dataset), {})


def _revision_of(name: str, asked: str | None) -> str:
    """Commit of a Hub model in this machine's cache. Empty where it holds several: nobody knows which was loaded."""
    if asked is not None:
        file = try_to_load_from_cache(name, "config.json", revision=asked)
        return Path(file).parent.name if isinstance(file, str) else asked
    snapshots = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    commits = [folder.name for folder in snapshots.iterdir()] if snapshots.is_dir() else []
    return commits[0] if len(commits) == 1 else ""


def _licence_of(path: str, base: Source) -> dict[str, str]:
    """What the base model's card says of its licence; nothing where there is no card or no network."""
    readme = Path(path) / "README.md"
    if base.on_hub:
        data: Any = _hub_metadata(base.name, base.revision or None)
    else:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data if path and readme.is_file() else {}
    fields = ("license", "license_name", "license_link")
    return {name: value for name in fields if isinstance(value := data.get(name), str)}


@functools.lru_cache
def _hub_metadata(name: str, revision: str | None) -> Any:
    try:
        return model_info(name, revision=revision, timeout=5).card_data or {}
    except Exception:  # whatever it is, a missing network or repository must not cost a checkpoint
        return {}


def _runs() -> list[tuple[str, str]]:
    """Where the run was logged, as TRL finds it."""
    from transformers import is_wandb_available
    from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

    urls = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        run = importlib.import_module("wandb").run
        urls["Weights & Biases"] = run.url if run is not None else None
    return [(label, url) for label, url in urls.items() if url]
