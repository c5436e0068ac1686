"""Losses, gradients and weights that are not finite: when a run ends because of them, and what its error says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from longvpo_hf.errors import TrainingError
from longvpo_hf.training.checkpoints import last_whole_checkpoint

if TYPE_CHECKING:
    from longvpo_hf.training.config import LongVPOConfig


class NonFiniteSteps:
    """Counts the optimizer steps in a row whose loss or gradient is not finite.

    Args:
        num_tolerated: How many may follow one another; see `LongVPOConfig.max_nonfinite_steps`.
    """

    def __init__(self, num_tolerated: int) -> None:
        self._num_tolerated = num_tolerated
        self._num_in_a_row = 0
        self._losses: list[float] = []
        self._in_this_log = False

    def add_loss(self, loss: float) -> None:
        """Notes the loss of a batch of the current step, the same number on every process."""
        self._losses.append(loss)

    def take_loss(self) -> float:
        """The mean loss of the current step's batches; the next call is about the next step."""
        losses, self._losses = self._losses, []
        loss = sum(losses) / len(losses) if losses else 0.0
        self._in_this_log = self._in_this_log or not math.isfinite(loss)
        return loss

    def ends_run(self, is_finite: bool) -> bool:
        """Whether the run is to end with this step."""
        self._num_in_a_row = 0 if is_finite else self._num_in_a_row + 1
        return self._num_in_a_row > self._num_tolerated

    def take_log(self) -> bool:
        """Whether a loss since the last log was not finite; transformers leaves it out of the mean that it logs."""
        seen, self._in_this_log = self._in_this_log, False
        return seen


def nonfinite_error(what: str, args: LongVPOConfig) -> TrainingError:
    """The error that ends a run.

    Args:
        what: What was seen, as a sentence without its full stop.
        args: The settings to change.
    """
    saved = last_whole_checkpoint(args.output_dir)
    checkpoint = f"the last checkpoint is {saved}" if saved else "there is no checkpoint"
    clipping = "" if 0 < args.max_grad_norm <= 1 else f", set max_grad_norm=1.0 (now {args.max_grad_norm:g})"
    precision = ", use bf16 instead of fp16" if args.fp16 else ""
    tolerated = args.max_nonfinite_steps
    skipping = (
        f"steps like this were skipped as often as max_nonfinite_steps={tolerated} allows"
        if tolerated
        else "to skip a single step like this, set max_nonfinite_steps=1"
    )
    return TrainingError(
        f"{what}. The run ends and nothing more is saved; {checkpoint}. Lower learning_rate (now "
        f"{args.learning_rate:g}){clipping}{precision}, or raise warmup_steps; {skipping}."
    )


def nonfinite_weight(model: nn.Module) -> str | None:
    """Name of a trained weight that is not finite everywhere on this process; None if there is none."""
    names, finite = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            here: Any = getattr(weight, "ds_tensor", weight)  # ZeRO-3 keeps this process's part apart
            here = here.to_local() if isinstance(here, DTensor) else here
            names.append(name)
            finite.append(here.detach().isfinite().all())
    if not finite:
        return None
    bad = (~torch.stack([value.to(finite[0].device) for value in finite])).nonzero().flatten().tolist()
    return names[bad[0]] if bad else None
