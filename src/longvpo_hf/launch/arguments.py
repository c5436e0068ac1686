"""The arguments of a training script: a `--config` file, and options that override it."""

from __future__ import annotations

import importlib.util
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from peft import LoraConfig
from transformers import BitsAndBytesConfig
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from longvpo_hf.errors import ConfigError, not_among
from longvpo_hf.families import family_of, model_config
from longvpo_hf.paths import is_inside
from longvpo_hf.processes import end_with_parent
from longvpo_hf.shipped import find_config
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.yaml_file import read_yaml

#: Settings of `ModelConfig` that are about an adapter alone.
_OF_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)


#: The least that a number can be.
_LEAST = {
    "probe_steps": 1,
    "probe_frames": 2,
    "probe_video_frames": 1,
    "probe_number": 1,
    "probe_placements": 1,
    "benchmark_frames": 1,
}


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
    dataset_missing: str = field(
        default="raise",
        metadata={
            "help": "What happens to a row whose video is not in video_root, or that is malformed: `raise` stops the "
            "run, `drop` leaves the row out and says how many there were.",
            "choices": ["raise", "drop"],
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

    def __post_init__(self) -> None:
        if self.dataset_name is None:
            raise ConfigError("dataset_name is missing: the rows to train on, a dataset on the Hub or a folder.")
        if self.replay_name is not None and self.dataset_streaming:
            raise ConfigError("replay_name needs to know how many rows there are: leave dataset_streaming=false.")
        if self.video_root is not None and self.dataset_streaming:
            raise ConfigError("video_root is for rows that are all there: leave dataset_streaming=false.")
        if self.probe_haystack is not None and self.probe_questions is None:
            raise ConfigError("probe_haystack stands around your own short videos: give probe_questions too.")
        if self.probe_world is not None and self.probe_questions is not None:
            raise ConfigError("probe_world has questions of its own: leave it out, or probe_questions.")
        for name in ("probe_questions", "probe_world"):
            if self.probe_steps is None and getattr(self, name) is not None:
                raise ConfigError(f"{name} is about probes while training: say with probe_steps how often.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and number < least:
                    raise ConfigError(f"{name} must be ≥ {least}, got {number}.")
        if self.benchmarks is None and (self.benchmark_frames or self.benchmark_data is not None):
            raise ConfigError("benchmark_frames and benchmark_data are about benchmarks after training: name them too.")
        if self.video_root is None and self.dataset_missing != "raise":
            raise ConfigError("dataset_missing is about rows that come without their media: give video_root too.")
        if self.video_root is None and self.dataset_form != "reference":
            raise ConfigError(f"dataset_form={self.dataset_form} needs video_root, the folder that its videos lie in.")


class _RecipeParser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """Refuses a command line in one sentence; argparse would print the usage of some 300 options."""
        raise ConfigError(f"{message}; --help lists all options.")


def recipe_parser(defaults: Mapping[str, Any] | None = None) -> TrlParser:
    """The parser of a recipe's command line.

    Args:
        defaults: Settings of `LongVPOConfig` that the recipe has of its own.
    """
    # An option is spelled out: an abbreviation may come to mean another one with the next version of a library.
    parser = _RecipeParser((RecipeArguments, ModelConfig, LongVPOConfig), allow_abbrev=False)
    parser.set_defaults_with_config(**defaults or {})
    return parser


def refuse_unknown(words: Sequence[str], parser: ArgumentParser, also: Iterable[str] = ()) -> None:
    """Refuses the options among some words, by name and with the nearest that is known.

    Args:
        words: What the parser did not know.
        parser: Whose options may have been meant.
        also: Options that others know.

    Raises:
        ConfigError: If one of the words is an option that is not in `also`.
    """
    known = set(also)
    for word in words:
        name = "--" + word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("-") and name not in known:
            near = get_close_matches(name, [*parser._option_string_actions, *known], n=1)
            raise ConfigError(f"Unknown option {word}." + (f" Did you mean {near[0]}?" if near else ""))


def refuse_unknown_settings(file: Path, words: Sequence[str]) -> None:
    """Refuses settings that no recipe has, and empty ones, in its file and among its options.

    Args:
        file: A recipe's YAML.
        words: Options that override it.

    Raises:
        ConfigError: If there is one, by name and with the nearest that is known.
    """
    parser, content = recipe_parser(), read_yaml(file)
    _refuse_empty(content, words)
    _, unknown = parser.parse_known_args(list(words))
    # `env` is TRL's: variables that it sets.
    names = [f"--{name}" for name in content if name != "env"] if isinstance(content, dict) else []
    refuse_unknown([*(name for name in names if name not in parser._option_string_actions), *unknown], parser)


def parse(
    argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[RecipeArguments, ModelConfig, LongVPOConfig]:
    """The arguments of a recipe: those of the `--config` file, overridden by those of the command line.

    Args:
        argv: The command line; None for the process's own.
        defaults: Settings of `LongVPOConfig` where neither says anything.

    Raises:
        ConfigError: If a setting is not known, or does not go with the others.
    """
    if _is_launched():
        end_with_parent()
    words, content = list(sys.argv[1:] if argv is None else argv), None
    if "--config" in words[:-1]:
        place = words.index("--config") + 1
        file = find_config(words[place])
        content = read_yaml(file)  # TRL reads it, but would keep the last of a key that stands there twice
        words[place] = str(file)
    _refuse_empty(content, words)
    parser = recipe_parser(defaults)
    try:
        recipe, model, training, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    except ValueError as error:  # of TRL's and transformers' own checks
        raise ConfigError(str(error)) from error
    refuse_unknown(unknown, parser)
    _check_adapter(model)
    if recipe.dataset_test_split is None and training.eval_strategy != "no":
        raise ConfigError(f"eval_strategy={training.eval_strategy.value} needs dataset_test_split, the rows held out.")
    if model.model_name_or_path is None:
        raise ConfigError("model_name_or_path is missing: the model to train, a name on the Hub or a folder.")
    if model.load_in_4bit or model.load_in_8bit:
        if not model.use_peft:
            raise ConfigError("load_in_4bit and load_in_8bit keep the base as it is: train an adapter, use_peft=true.")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "load_in_4bit and load_in_8bit need bitsandbytes, which is not here: pip install bitsandbytes"
            )
    _check_output(recipe, model, training)
    _check_names(model, training)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    return recipe, model, training


def _refuse_empty(content: object, words: Sequence[str]) -> None:
    """Refuses empty texts, such as a shell makes of a variable that is not set."""
    given = content.items() if isinstance(content, dict) else ()
    empty = [name for name, value in given if isinstance(value, str) and not value.strip()]
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if not word.strip() or (equals and word.startswith("--") and not value.strip()):
            empty.append((name.strip() or before).lstrip("-"))
    if empty:
        raise ConfigError(f"{empty[0]} is empty: give a value, or leave it out.")


def _check_names(model: ModelConfig, training: LongVPOConfig) -> None:
    """Refuses names that transformers would refuse once the model is loaded."""
    wanted, attentions = model.attn_implementation, ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if wanted is not None and wanted not in attentions and "/" not in wanted:  # a kernel of the Hub: OWNER/NAME
        raise not_among("attn_implementation", wanted, attentions)
    for tracker in training.report_to or ():
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise not_among("report_to", tracker, [*INTEGRATION_TO_CALLBACK, "all", "none"])
        if tracker not in get_available_reporting_integrations():
            raise ConfigError(f"report_to={tracker} needs {tracker}, which is not here: install it, or name another.")


def _check_output(recipe: RecipeArguments, model: ModelConfig, training: LongVPOConfig) -> None:
    """Refuses to write the model over what it is made of: then the same command could not go on, or be given again."""
    output = Path(str(training.output_dir))
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir must be a folder, {output} is a file.")
    if output.is_dir() and output.resolve() == Path(str(model.model_name_or_path)).resolve():
        raise ConfigError(
            f"output_dir={output} is the model that is trained, and would be replaced; name another folder."
        )
    for name in (recipe.dataset_name, recipe.replay_name):
        if name is not None and Path(name).is_dir() and is_inside(name, output):
            raise ConfigError(
                f"output_dir={output} is the dataset {name} or lies in it, and would be mixed with it; name another "
                "folder."
            )


def _check_adapter(model: ModelConfig) -> None:
    """Refuses settings of an adapter that cannot be, and those that would be passed over as none is trained."""
    if not model.use_peft:
        for each in fields(ModelConfig):
            if each.name in _OF_ADAPTER and getattr(model, each.name) != each.default:
                raise ConfigError(f"{each.name} is about an adapter: add use_peft=true, or leave it out.")
    for name in ("lora_r", "lora_alpha"):
        if getattr(model, name) < 1:
            raise ConfigError(f"{name} must be ≥ 1, got {getattr(model, name)}.")
    if not 0 <= model.lora_dropout < 1:
        raise ConfigError(f"lora_dropout must be ≥ 0 and < 1, got {model.lora_dropout}.")


def _is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process, so that it must not outlive them.

    One that a person started may: `nohup`, a shell that was closed.
    """
    return any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))


def lora(model: ModelConfig) -> LoraConfig | None:
    """The adapter to train, on the layers of the model's family unless the arguments name some; None for none."""
    if model.use_peft and model.lora_target_modules is None and model.lora_target_parameters is None:
        config = model_config(str(model.model_name_or_path), model.model_revision)
        model.lora_target_modules = family_of(config).adapter_layers
    return get_peft_config(model)


def quantization(model: ModelConfig) -> BitsAndBytesConfig | None:
    """How the base is quantised; None for not at all."""
    return get_quantization_config(model)
