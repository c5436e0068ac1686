"""`longvpo train`: starts a recipe with accelerate, as `trl dpo` starts TRL's script."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Annotated, Literal, NoReturn

from cyclopts import Parameter

from longvpo_hf.errors import ConfigError
from longvpo_hf.shipped import find_accelerate_config, find_config, shipped


def train(
    recipe: Literal["stage1", "stage2", "temporal"],
    /,
    *options: Annotated[str, Parameter(allow_leading_hyphen=True)],
    config: str | None = None,
    accelerate_config: str | None = None,
) -> None:
    """Trains: starts a recipe with accelerate.

    For example:

        longvpo train stage1 --config internvl3_8b/stage1_lora \\
            --accelerate_config one_gpu --dataset_name my-org/stage1
        longvpo train stage1 --config miniature/stage1 --cpu --max_steps 2

    A killed run goes on with `--resume_from_checkpoint true`. `longvpo train stage1 -- --help` lists the recipe's
    options: its own, TRL's ModelConfig and DPOConfig, and all of transformers' TrainingArguments.

    Args:
        recipe: What is trained: LongVPO's stages, or Temporal Preference Optimization.
        options: Options of the recipe, which override the file. Those that the recipe does not know go to `accelerate
            launch`, e.g. --num_processes or --machine_rank.
        config: The recipe's YAML, or the name of a shipped one (`longvpo configs`). None: options alone.
        accelerate_config: accelerate's YAML, or the name of a shipped one. None: accelerate's own default.
    """
    parser = _launch_parser()
    for_launch, words = _split(list(options), {name for action in parser._actions for name in action.option_strings})
    launch(recipe, config, accelerate_config, for_launch, words)


def launch(
    recipe: str, config: str | None, accelerate_config: str | None, for_launch: Sequence[str], words: Sequence[str]
) -> None:
    """Starts a recipe with accelerate and waits for its end.

    Args:
        recipe: Its name.
        config: See `train`.
        accelerate_config: See `train`.
        for_launch: Options of `accelerate launch`.
        words: Options of the recipe.
    """
    from accelerate.commands.launch import launch_command

    from longvpo_hf.hub import go_offline_if_unreachable

    file = ["--config", str(find_config(config))] if config else []
    first = ["--config_file", str(find_accelerate_config(accelerate_config))] if accelerate_config else []
    if "--cpu" in for_launch and not any(word.partition("=")[0] in ("--use_cpu", "--use-cpu") for word in words):
        words = [*words, "--use_cpu", "true"]  # accelerate's option alone leaves transformers to ask for a GPU
    go_offline_if_unreachable([""])  # for the recipe's process, which names models and rows
    # Quiet: the recipe itself says what went wrong, and its parent's traceback would say nothing more.
    script = str(shipped(f"recipes/{recipe}.py"))
    launch_command(_launch_parser().parse_args([*first, *for_launch, "--quiet", script, *file, *words]))


def _launch_parser() -> ArgumentParser:
    """That of `accelerate launch`, which would print the usage of some 100 options where one is wrong."""
    from accelerate.commands.launch import launch_command_parser

    def error(message: str) -> NoReturn:
        raise ConfigError(f"{message}; `accelerate launch --help` lists its options.")

    parser: ArgumentParser = launch_command_parser()
    parser.error = error  # type: ignore[method-assign]  # accelerate makes the parser: no subclass of ours
    return parser


def _split(words: list[str], launch_options: set[str]) -> tuple[list[str], list[str]]:
    """The words for `accelerate launch`, and those that the recipe knows.

    Raises:
        ConfigError: If neither knows one.
    """
    from longvpo_hf.launch.arguments import recipe_parser, refuse_unknown

    parser = recipe_parser()
    if "--help" in words:
        parser.print_help()
        sys.exit()
    _, unknown = parser.parse_known_args(words)
    refuse_unknown(unknown, parser, launch_options)
    # `unknown` is in the order of the command line: what is left over is the recipe's.
    rest = iter(unknown)
    next_unknown = next(rest, None)
    known = []
    for word in words:
        if word == next_unknown:
            next_unknown = next(rest, None)
        else:
            known.append(word)
    return unknown, known
