"""The rows that a training script names: from the Hub, a folder of the builders, or `save_to_disk`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetsError
from transformers import AutoProcessor

from longvpo_hf.errors import DatasetError, storage_error
from longvpo_hf.families import check_kind, context_tokens, model_config
from longvpo_hf.intake.formats import from_longva_tpo, from_longvpo, from_reference, from_trl
from longvpo_hf.launch.arguments import RecipeArguments, parse
from longvpo_hf.preference import undecoded
from longvpo_hf.training.checks import RowCheck, check_rows
from longvpo_hf.training.collator import VideoPreferenceCollator

_FORMS: dict[str, Callable[..., Dataset]] = {
    "reference": from_reference,
    "longvpo": from_longvpo,
    "longva-tpo": from_longva_tpo,
    "trl": from_trl,
}


def load_rows(recipe: RecipeArguments) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The rows to train on, and those to evaluate on if a split is named."""
    rows = _split(recipe, recipe.dataset_train_split)
    held_out = _split(recipe, recipe.dataset_test_split) if recipe.dataset_test_split else None
    if recipe.replay_name is not None:
        earlier = _split(replace(recipe, dataset_name=recipe.replay_name, dataset_config=None), "train")
        rows = concatenate_datasets([rows, earlier.select(range(min(len(earlier), len(rows) // 2)))])
    return rows, held_out


def check_dataset(name: str, config: str | None = None, options: Sequence[str] = ()) -> RowCheck:
    """Looks over the rows of a dataset, as a training script does before it trains.

    Args:
        name: The dataset, as `dataset_name` takes it.
        config: A recipe's YAML, with whose model and settings the rows are checked; None checks the rows alone.
        options: Options of the recipe, which override the file.
    """
    if config is None:
        return check_rows(training_rows(name))
    recipe, model, training = parse(["--config", config, *options])
    rows = _split(replace(recipe, dataset_name=name, dataset_streaming=False), recipe.dataset_train_split)
    base = str(model.model_name_or_path)
    check_kind(base, model.model_revision)
    processor = AutoProcessor.from_pretrained(base, revision=model.model_revision)
    collator = VideoPreferenceCollator.of(processor, training)
    shapes = model_config(base, model.model_revision or "main")
    collator.context_tokens = context_tokens(shapes)
    return check_rows(rows, collator, shapes)


def training_rows(name: str) -> Dataset:
    """The training split of a dataset on the Hub or in a folder, with undecoded media."""
    return _split(RecipeArguments(dataset_name=name), "train")


def _split(recipe: RecipeArguments, split: str) -> Dataset | IterableDataset:
    name = str(recipe.dataset_name)
    if not name.strip():
        raise DatasetError(f"Name a folder of rows, or a dataset on the Hub (OWNER/NAME), got {name!r}.")
    if Path(name).is_file():
        raise DatasetError(f"{name} is a file: name the folder it lies in, which is the dataset.")
    if (Path(name) / "state.json").is_file():  # of `save_to_disk`, e.g. rows with their reference scores
        return load_from_disk(name)
    # datasets tells local folders apart by their last name and the version in their card: a dataset that was moved, or
    # a copy of it, would give the paths of before.
    digest = hashlib.sha256(str(Path(name).resolve()).encode()).hexdigest()[:16]
    cache = Path(HF_DATASETS_CACHE) / "longvpo_hf" / digest if Path(name).is_dir() else None
    try:
        rows = load_dataset(
            name, recipe.dataset_config, split=split, streaming=recipe.dataset_streaming, cache_dir=cache
        )
    except (OSError, ValueError, DatasetsError) as error:
        if (refused := storage_error(error)) is not None:
            raise refused from error
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DatasetError(
            f"The dataset {name} cannot be loaded ({said}): give a folder of rows, or the name of a dataset on the Hub "
            "that is there and that you may read (hf auth login)."
        ) from error
    if recipe.video_root is None:
        return undecoded(rows)
    return _FORMS[recipe.dataset_form](rows, recipe.video_root, missing=recipe.dataset_missing)
