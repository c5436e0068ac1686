"""What a plan is about: a recipe's configuration, the machine that it is to run on, and the rows that it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longvpo_hf.errors import ConfigError, LongVPOError
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.yaml_file import read_yaml

if TYPE_CHECKING:
    from trl import ModelConfig

GIB = 2**30

#: 30 % of the dense bf16 peak of an H100 or H200 (989 TFLOP/s), about the share that TPO's stated four hours on eight
#: A100 amount to (docs/reproduce_tpo.md). Attention counts causally. Not measured on any device.
DEFAULT_TFLOPS = 300.0
#: An H100, the device of LongVPO's experiments.
DEFAULT_GPU_MEMORY_GIB = 80.0


class Sharding(StrEnum):
    """How processes share weights, gradients and optimizer; "none" is one device, or DDP on several."""

    none = "none"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices that a run gets.

    Args:
        gpu_memory_gib: Memory of one device.
        processes: Devices, one process each.
        sharding: See `Sharding`.
        context_parallel: How many processes share each batch and its timelines; under FSDP2 alone.
        tflops: 10¹² floating-point operations per second that a device achieves in training, not its peak.

    Raises:
        ConfigError: If a number is not > 0, one process is to share, or processes cannot be parted into such groups.
    """

    gpu_memory_gib: float = DEFAULT_GPU_MEMORY_GIB
    processes: int = 1
    sharding: Sharding = Sharding.none
    tflops: float = DEFAULT_TFLOPS
    context_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("gpu_memory_gib", "processes", "tflops", "context_parallel"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}.")
        if self.sharding is not Sharding.none and self.processes == 1:
            raise ConfigError(
                f"sharding={self.sharding.value} shares the model among several processes, got processes=1."
            )
        if self.context_parallel == 1:
            return
        if self.processes % self.context_parallel:
            raise ConfigError(
                f"context_parallel={self.context_parallel} does not divide processes={self.processes}: each group of "
                f"processes shares a batch of its own."
            )
        if self.sharding is not Sharding.fsdp2:
            raise ConfigError(
                f"context_parallel={self.context_parallel} needs sharding=fsdp2 (recipes/accelerate/cp8.yaml), got "
                f"sharding={self.sharding.value}."
            )


@dataclass(frozen=True, slots=True)
class Rows:
    """Lengths that rows are assumed to have; the papers do not state theirs.

    Args:
        question_tokens: Of the question.
        chosen_tokens: Of the chosen answer, with its end.
        rejected_tokens: Of the rejected answer.
        reference_frames: Frames of the reference's view. `None`: those of the whole timeline, or of a clip of 64
            seconds under `reference="anchor"`.
        label_tokens: Text tokens that the processor writes around each unit of frames. `None`: the family's number.
        source_px: Height and width of the videos. `None`: 16:9, as large as `max_pixels` allows.
    """

    question_tokens: int = 32
    chosen_tokens: int = 128
    rejected_tokens: int = 128
    reference_frames: int | None = None
    label_tokens: int | None = None
    source_px: tuple[int, int] | None = None


def read_config(path: Path, overrides: Sequence[str] = ()) -> tuple[ModelConfig, LongVPOConfig]:
    """A recipe's configuration, read as the recipe reads it.

    Args:
        path: Its YAML.
        overrides: Options of the recipe's command line.

    Returns:
        The settings of the model and of the training. The rest (rows, among others) does not enter a plan.

    Raises:
        ConfigError: If the file is missing, or a setting is wrong.
    """
    from trl import ModelConfig, TrlParser

    if not path.is_file():
        raise ConfigError(
            f"{path} is not a file: name a recipe's YAML, e.g. recipes/configs/internvl3_8b/stage1_lora.yaml."
        )
    content = read_yaml(path)  # TRL reads it too, but would keep the last of a key that stands there twice
    said = set(content) if isinstance(content, dict) else set()  # TRL refuses others
    said |= {word.partition("=")[0].lstrip("-").replace("-", "_") for word in overrides if word.startswith("--")}
    arguments = ["--config", str(path), *overrides]
    if not torch.accelerator.is_available():
        arguments += ["--use_cpu", "true"]  # else transformers refuses bf16 on a machine without a device
        if not said & {"use_cpu", "bf16", "fp16"}:
            arguments += ["--bf16", "true"]  # as on the device that is planned for, whatever this CPU computes in
    try:
        model, training, _ = TrlParser((ModelConfig, LongVPOConfig)).parse_args_and_config(
            arguments, return_remaining_strings=True
        )
    except ValueError as error:
        if isinstance(error, LongVPOError):
            raise
        raise ConfigError(f"{path} is no recipe's configuration: {' '.join(str(error).split())}") from error
    except SystemExit:
        raise ConfigError(
            f"{path} or the options {list(overrides)} hold a value of the wrong kind; see above."
        ) from None
    if model.model_name_or_path is None:
        raise ConfigError(f"{path} names no model_name_or_path.")
    return model, training


def device_memory_gib() -> float:
    """Memory of this machine's first CUDA device; `DEFAULT_GPU_MEMORY_GIB` where there is none."""
    if not torch.cuda.is_available():
        return DEFAULT_GPU_MEMORY_GIB
    return torch.cuda.get_device_properties(0).total_memory / GIB
