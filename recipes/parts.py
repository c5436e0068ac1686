"""What the three recipes share: arguments, rows, the model they start from, checkpoints to resume from.

Takes a command line (`--config FILE.yaml`, and options that override it); gives what `LongVPOTrainer` takes. Knows
nothing of how rows are made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from longvpo_hf import LongVPOConfig
from longvpo_hf.artifacts import whole_folder, write_json
from longvpo_hf.errors import ConfigError
from longvpo_hf.intake.formats import from_longva_tpo, from_longvpo, from_reference, from_trl
from longvpo_hf.preference import undecoded

logger = get_logger(__name__)

#: LoRA's default here: every linear layer of the text model and none of the vision tower's, in all families of
#: docs/families.md. SmolVLM calls its text model `text_model`.
TEXT_LAYERS = r".*(language_model|text_model)\..*(q|k|v|o|gate|up|down)_proj"

_FORMS: dict[str, Callable[[Dataset, str], Dataset]] = {
    "reference": from_reference,
    "longvpo": from_longvpo,
    "longva-tpo": from_longva_tpo,
    "trl": from_trl,
}

_MERGED_FROM = "merged_from.json"


@dataclass
class RecipeArguments:
    """What to train on, and what to do beside training."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Preference rows: a dataset on the Hub, a folder, or one of save_to_disk."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split that eval_strategy evaluates on. None: nothing is held out."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Stream the rows instead of downloading them first; needs max_steps."}
    )
    video_root: str | None = field(
        default=None, metadata={"help": "Folder that the rows' videos lie in, for rows that come without their media."}
    )
    dataset_form: str = field(
        default="reference",
        metadata={
            "help": "Whose form rows without media have: `reference` this package's, `longvpo` and `longva-tpo` those "
            "of the two papers' releases, `trl` TRL's rows with videos. See longvpo_hf.intake.formats.",
            "choices": ["reference", "longvpo", "longva-tpo", "trl"],
        },
    )
    replay_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows of an earlier stage that are mixed in, half as many as there are rows. Ours, not the papers'."
        },
    )
    probe_steps: int | None = field(
        default=None, metadata={"help": "Probe long context before training, every so many steps, and at the end."}
    )
    probe_frames: int = field(default=100, metadata={"help": "Frames of a probe's videos; LongVPO has 10 x 10."})
    probe_questions: str | None = field(
        default=None,
        metadata={
            "help": "Short videos with questions, JSON lines (`longvpo probe position --help`). None: clips of a "
            "synthetic world, asked about in plain English."
        },
    )
    probe_video_frames: int = field(default=8, metadata={"help": "Frames of each of the short videos."})
    probe_haystack: str | None = field(
        default=None, metadata={"help": "A video whose frames stand around them. None: black frames."}
    )
    probe_world: str | None = field(
        default=None, metadata={"help": "A miniature's world, for a miniature's model: FOLDER/world/evaluation."}
    )
    probe_number: int = field(default=24, metadata={"help": "Clips of a world that are asked about."})
    probe_placements: int = field(default=3, metadata={"help": "Random places for each short video."})
    benchmarks: str | None = field(
        default=None,
        metadata={
            "help": "Benchmarks after training, e.g. longvideobench,mlvu,videomme,mvbench: `longvpo eval`, from the "
            "recipe. Their data are looked for before training."
        },
    )
    benchmark_frames: list[int] | None = field(
        default=None, metadata={"help": "Numbers of frames to evaluate at. None: that of training."}
    )
    benchmark_data: str | None = field(
        default=None, metadata={"help": "Folder of the benchmarks' data. None: HF_HOME, as for lmms-eval."}
    )
    miniature: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the miniature's run: its model and rows are made there first, where they are not yet. "
            "The seed is that of the training."
        },
    )
    miniature_fast: bool = field(
        default=False, metadata={"help": "A miniature of a minute, which learns nothing, to see that everything runs."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None:
            raise ConfigError("dataset_name is missing: the rows to train on, a dataset on the Hub or a folder.")
        if self.replay_name is not None and self.dataset_streaming:
            raise ConfigError("replay_name needs to know how many rows there are: leave dataset_streaming=false.")
        if self.video_root is not None and self.dataset_streaming:
            raise ConfigError("video_root is for rows that are all there: leave dataset_streaming=false.")
        if self.probe_haystack is not None and self.probe_questions is None:
            raise ConfigError("probe_haystack stands around your own short videos: give probe_questions too.")
        if self.probe_steps is not None and self.probe_steps < 1:
            raise ConfigError(f"probe_steps must be ≥ 1, or left out, got {self.probe_steps}.")
        if self.video_root is None and self.dataset_form != "reference":
            raise ConfigError(f"dataset_form={self.dataset_form} needs video_root, the folder that its videos lie in.")


def parse(
    argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[RecipeArguments, ModelConfig, LongVPOConfig]:
    """The arguments of a recipe: those of the `--config` file, overridden by those of the command line.

    Args:
        argv: The command line; None for the process's own.
        defaults: Settings of `LongVPOConfig` where neither says anything.

    Raises:
        ValueError: If a setting is not known, or does not go with the others.
    """
    parser = TrlParser((RecipeArguments, ModelConfig, LongVPOConfig))
    parser.set_defaults_with_config(**defaults or {})
    recipe, model, training = parser.parse_args_and_config(argv)
    if model.model_name_or_path is None:
        raise ConfigError("model_name_or_path is missing: the model to train, a name on the Hub or a folder.")
    if model.load_in_4bit or model.load_in_8bit:
        if not model.use_peft:
            raise ConfigError("load_in_4bit and load_in_8bit keep the base as it is: train an adapter, use_peft=true.")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "load_in_4bit and load_in_8bit need bitsandbytes, which is not here: pip install bitsandbytes"
            )
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    return recipe, model, training


def lora(model: ModelConfig) -> LoraConfig | None:
    """The adapter to train, on `TEXT_LAYERS` unless the arguments name other layers; None for the whole model."""
    if model.lora_target_modules is None and model.lora_target_parameters is None:
        model.lora_target_modules = TEXT_LAYERS
    return get_peft_config(model)


def quantization(model: ModelConfig) -> BitsAndBytesConfig | None:
    """How the base is quantised; None for not at all."""
    return get_quantization_config(model)


# ----------------------------------------------------------------------------------------------------- rows


def load_rows(recipe: RecipeArguments) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The rows to train on, and those to evaluate on if a split is named."""
    rows = _split(recipe, recipe.dataset_train_split)
    held_out = _split(recipe, recipe.dataset_test_split) if recipe.dataset_test_split else None
    if recipe.replay_name is not None:
        earlier = _split(replace(recipe, dataset_name=recipe.replay_name, dataset_config=None), "train")
        rows = concatenate_datasets([rows, earlier.select(range(min(len(earlier), len(rows) // 2)))])
    return rows, held_out


def _split(recipe: RecipeArguments, split: str) -> Dataset | IterableDataset:
    name = str(recipe.dataset_name)
    if (Path(name) / "state.json").is_file():  # of `save_to_disk`, e.g. rows with their reference scores
        return load_from_disk(name)
    # datasets tells local folders apart by their last name and the version in their card: a dataset that was moved, or
    # a copy of it, would give the paths of before.
    digest = hashlib.sha256(str(Path(name).resolve()).encode()).hexdigest()[:16]
    cache = Path(HF_DATASETS_CACHE) / "longvpo_hf" / digest if Path(name).is_dir() else None
    rows = load_dataset(name, recipe.dataset_config, split=split, streaming=recipe.dataset_streaming, cache_dir=cache)
    return _FORMS[recipe.dataset_form](rows, recipe.video_root) if recipe.video_root else undecoded(rows)


# ---------------------------------------------------------------------------------------------------- model


def start_from(model: ModelConfig, training: LongVPOConfig) -> str:
    """The checkpoint that policy and reference start from, as `from_pretrained` takes it.

    A LoRA adapter is merged into its base first, and the whole is written to `<output_dir>-base`: the reference is then
    the adapted model, not the bare base, and an adapter trained on top names a base that is really its own.
    """
    name = str(model.model_name_or_path)
    config_file = find_adapter_config_file(name, revision=model.model_revision)
    if config_file is None:
        return name
    folder = Path(f"{str(training.output_dir).rstrip('/')}-base")
    with PartialState().main_process_first():
        digest = _digest(Path(config_file).parent)
        if not _holds(folder, digest):
            _merge(name, model, folder, digest)
    # What is in the folder has no revision of its own.
    training.model_init_kwargs = {**(training.model_init_kwargs or {}), "revision": "main"}
    return str(folder)


def _digest(folder: Path) -> str:
    """Of an adapter: its settings and weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("adapter_*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _holds(folder: Path, digest: str) -> bool:
    stamp = folder / _MERGED_FROM
    return stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8"))["adapter"] == digest


def _merge(name: str, model: ModelConfig, folder: Path, digest: str) -> None:
    config = PeftConfig.from_pretrained(name, revision=model.model_revision)
    base = config.base_model_name_or_path
    if not base:
        raise ConfigError(f"The adapter {name} names no base model (base_model_name_or_path in adapter_config.json).")
    logger.info(f"Merging the adapter {name} into {base}: {folder}")
    # In float32: half precision would round what the adapter adds.
    whole = AutoModelForImageTextToText.from_pretrained(base, revision=config.revision, dtype=torch.float32)
    kept = whole.config.dtype if model.dtype in (None, "auto") else getattr(torch, model.dtype)
    merged = PeftModel.from_pretrained(whole, name, revision=model.model_revision).merge_and_unload().to(kept)
    try:
        processor = AutoProcessor.from_pretrained(name, revision=model.model_revision)
    except (OSError, ValueError):  # an adapter's folder need not hold one
        processor = AutoProcessor.from_pretrained(base, revision=config.revision)
    with whole_folder(folder) as part:
        merged.save_pretrained(part)
        processor.save_pretrained(part)
        write_json(part / _MERGED_FROM, {"adapter": digest})


# -------------------------------------------------------------------------------------------------- resuming


def checkpoint_to_resume(training: LongVPOConfig) -> str | None:
    """The checkpoint that training goes on from; None to begin.

    `resume_from_checkpoint=true` means the last whole one in `output_dir`, if there is any: a killed run may leave a
    checkpoint that was not written to its end.

    Raises:
        ValueError: If `output_dir` holds checkpoints and nothing was said of resuming.
    """
    asked = training.resume_from_checkpoint
    if asked is not None and str(asked).lower() not in ("true", "false"):
        return str(asked)
    folders = Path(training.output_dir).glob("checkpoint-*")
    whole = [folder for folder in folders if (folder / "trainer_state.json").is_file()]  # written last
    if not whole:
        return None
    if str(asked).lower() != "true":
        raise ConfigError(
            f"{training.output_dir} holds checkpoints of an earlier run: go on with --resume_from_checkpoint true, "
            "name another --output_dir, or delete them."
        )
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2])))
