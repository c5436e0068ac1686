"""What a training run will need, before anything is loaded: tokens, memory and time of a recipe's configuration.

How a plan is worked out:

- *Parameters* are counted on the real model, adapters included, built on torch's meta device.
- *The text model's step* is run for real on fake tensors, with the trainer's own tree attention, autograd, autocast,
  checkpointing and adapters: every storage counts as long as it lives, and every matrix product. Two and three layers
  are run; the others follow, since all layers are alike.
- *The vision tower* is worked out from its layers: matrix products exactly, what is kept for the backward pass by what
  each layer keeps.
- *Weights, gradients, optimizer* follow from the numbers of parameters and how processes share them.
- *View distillation*: its loss is run on fake tensors likewise, in the pieces that the trainer takes.
- *Time* is the work over the FLOP/s that a device is said to achieve. It is not a measurement.

`benchmarks/results/plan.md` compares plans with what was measured. Memory is what tensors need; work space of kernels,
CUDA itself and fragmentation are an allowance. The timeline is assumed to fill its frame budget, and questions and
answers to be as long as `Rows` says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longvpo_hf.planning.bases import find_model_config, starting_point
from longvpo_hf.planning.memory import frames_that_fit, host_gib, memory_gib, saved_bytes
from longvpo_hf.planning.remedies import Remedy, find_remedies, fits
from longvpo_hf.planning.run import Parameters, Run, checkpointing
from longvpo_hf.planning.settings import GIB, Machine, Rows, Sharding, read_config
from longvpo_hf.planning.tokens import ANCHOR_SECONDS, Tokens
from longvpo_hf.planning.work import BEFOREHAND, received_gb, tflop
from longvpo_hf.training.config import LongVPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl import ModelConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs of each device.

    Args:
        model: Name or path of the model that the run starts from.
        machine: See `Machine`.
        parameters: See `Parameters`.
        tokens: See `Tokens`.
        memory_gib: GiB by what holds them, at the highest point of a step.
        host_gib: What waits in the host's memory: activations, or checkpoints alone.
        saved_gib: What autograd keeps between forward and backward pass, vision included.
        tflop: 10¹² operations of a device's batch by what does them; attention counts causally.
        seconds: Of a device's batch (a step is `gradient_accumulation_steps` of them).
        gpu_hours_per_1000_rows: Over all devices, for one epoch, with the reference's work, also where that is done
            beforehand.
        fits: Whether memory and context suffice.
        frames_that_fit: Most frames of a timeline that fit both, all else unchanged; 0 where not even one fits.
        remedies: What to change; empty where it fits.
        notes: What was assumed, and what the model cannot do.
    """

    model: str
    machine: Machine
    parameters: Parameters
    tokens: Tokens
    memory_gib: dict[str, float]
    host_gib: float
    saved_gib: float
    tflop: dict[str, float]
    seconds: float
    gpu_hours_per_1000_rows: float
    fits: bool
    frames_that_fit: int
    remedies: tuple[Remedy, ...]
    notes: tuple[str, ...]

    @property
    def total_gib(self) -> float:
        """Memory of a device at the highest point of a step."""
        return sum(self.memory_gib.values())

    def to_json(self) -> str:
        """All of it."""
        return json.dumps({**asdict(self), "total_gib": self.total_gib}, indent=1)


def plan_file(path: Path, overrides: Sequence[str] = (), machine: Machine | None = None) -> Plan:
    """The plan of a recipe's configuration.

    A configuration that starts from a run which is not trained yet is planned on the base of that run.

    Args:
        path: The configuration's YAML.
        overrides: Options of the recipe's command line, which override it.
        machine: See `Machine`.

    Raises:
        ConfigError: If the file is missing, a setting is wrong, or the model's shapes are not known.
        ModelError: If the model's family is not known.
    """
    model, training = read_config(path, overrides)
    name = str(model.model_name_or_path)
    start = starting_point(name, path)
    config = find_model_config(start, model.model_revision if start == name else "main")
    plan = make_plan(config, model, training, machine)
    if start == name:
        return plan
    return replace(plan, notes=(f"{name} is not there yet: planned as {start}, which it goes back to.", *plan.notes))


def make_plan(
    config: PreTrainedConfig,
    model: ModelConfig,
    training: LongVPOConfig,
    machine: Machine | None = None,
    rows: Rows | None = None,
) -> Plan:
    """What a run needs.

    Args:
        config: The model's shapes.
        model: Its type, adapters and quantisation.
        training: The trainer's settings.
        machine: See `Machine`.
        rows: See `Rows`.

    Raises:
        ModelError: If the model's family is not known.
    """
    machine = machine or Machine()
    run = Run(config, model, training, machine, rows or Rows())
    memory, work = memory_gib(run, training.num_frames), tflop(run)
    does_fit = fits(run, sum(memory.values()))
    hours = sum(work.values()) / machine.tflops / 3600
    return Plan(
        model=model.model_name_or_path or "",
        machine=machine,
        parameters=run.parameters,
        tokens=run.batch.tokens(),
        memory_gib=memory,
        host_gib=host_gib(run),
        saved_gib=saved_bytes(run, training.num_frames) / GIB,
        tflop=work,
        seconds=sum(value for name, value in work.items() if name != BEFOREHAND) / machine.tflops,
        gpu_hours_per_1000_rows=1000 * hours * machine.context_parallel / training.per_device_train_batch_size,
        fits=does_fit,
        frames_that_fit=frames_that_fit(run),
        remedies=() if does_fit else find_remedies(run),
        notes=tuple(_notes(run)),
    )


def _notes(run: Run) -> list[str]:
    """What was assumed, and what the model cannot do."""
    training, rows, tokens = run.training, run.rows, run.batch.tokens()
    notes = [
        f"A timeline is assumed to fill num_frames = {training.num_frames}; it has fewer where fps × duration is less.",
        f"Question, chosen and rejected answer are assumed to have {rows.question_tokens}, {rows.chosen_tokens} and "
        f"{rows.rejected_tokens} tokens.",
    ]
    if run.batch.sampled:
        notes.append(
            f"Sampled answers are assumed to have {run.batch.sampled} tokens, drawn anew for each batch. Keys and "
            "values while they are drawn are not counted; time counts operations, and drawing waits for memory."
        )
    if run.batch.is_rejecting:
        notes.append(
            f"Rejected views ({training.view_preference_rejected}) are assumed to have as many frames as the timeline."
        )
    if rows.reference_frames is None:
        view = {
            "row": "the whole timeline, its upper bound: rows may name less (Stage 1: the anchor)",
            "full": "the whole timeline",
            "anchor": f"one clip of {ANCHOR_SECONDS} s",
        }
        notes.append(f"reference={training.reference!r} is assumed to be {view[training.reference]}.")
    if run.machine.context_parallel > 1:
        views = {"A timeline": training.num_frames, "The reference's view": run.batch.reference_frames}
        notes += [
            f"{view} has fewer units of frames than processes that share it: each of them computes all of it."
            for view, frames in views.items()
            if run.sharing(frames) == 1
        ]
        notes.append(
            f"{run.machine.context_parallel} devices share each batch: memory and work are those of the one with the "
            f"most rows. It receives {received_gb(run):.2f} GB of keys and values for a batch, for which no time is "
            "counted."
        )
    if run.without_trees is not None:
        notes.append(f"Without trees, chosen and rejected are two sequences: {run.without_trees.rstrip('.')}.")
    if run.batch.family.is_sized_by_frames:
        notes.append("Frames are assumed to be 16:9 and to fill max_pixels.")
    if run.dtype == torch.float32 and training.bf16 and run.machine.sharding == Sharding.none:
        notes.append("dtype=float32 under bf16: weights take 4 bytes and are cast in every step (dtype=bfloat16: 2).")
    if (training.activation_offloading or checkpointing(training)[1]) and run.machine.sharding != Sharding.none:
        notes.append("Offloading is counted as on one device; it has not been tried with sharding.")
    if tokens.are_too_many:
        context = (
            f"the model's context of {run.batch.context:,} (positions × rope scaling)" if run.batch.context else ""
        )
        bound = f"max_length={training.max_length:,}" if tokens.allowed == training.max_length else context
        notes.append(
            f"TOO LONG: {tokens.longest:,} tokens exceed {bound}: training would end with an error. Lower num_frames "
            "or max_pixels, or scale rope in the model's config."
        )
    if run.parameters.adapters and training.precompute_ref_log_probs:
        notes.append("precompute_ref_log_probs with adapters saves no memory (there is no second model), only time.")
    return notes
