"""Metrics as means over rows and tokens, however these were grouped into batches, accumulated or spread over processes.

A batch gives `RowScores`, one value per row and field. They are gathered from all processes and summed until the next
log, so a ragged batch weighs what its rows weigh. TRL instead averages the means of batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from longvpo_hf.training.view_preference import view_preference_losses

#: Thirds of the timeline, by where the middle of a row's evidence lies.
POSITIONS = ("begin", "middle", "end")


@dataclass(frozen=True, slots=True)
class RowScores:
    """What was measured of each of B rows; every field is a tensor `[B]`.

    Args:
        chosen_logps: Log-probability of the chosen answer under the policy, as the loss counts it (`ld_alpha`).
        rejected_logps: The same of the rejected answer.
        ref_chosen_logps: Log-probability of the chosen answer under the reference model, on its own view.
        ref_rejected_logps: The same of the rejected answer.
        chosen_tokens: Tokens of the chosen answer.
        rejected_tokens: Tokens of the rejected answer.
        sft: −log π(y⁺) / |y⁺| of the chosen answer.
        distilled: Divergence from the reference on its view, a token of the chosen answer; 0 where it is not trained.
        rejected_view_logps: Log-probability of the chosen answer under the policy on the rejected view; NaN where no
            view is rejected.
        ref_rejected_view_logps: The same under the reference model, on the same view.
        loss: Loss of the row's batch on its process.
        entropy: Summed over the tokens of both answers.
        chosen_logits: Mean logit of the vocabulary, summed over the chosen tokens.
        rejected_logits: The same over the rejected tokens.
        chosen_top1: How many chosen tokens are the model's most probable one.
        third: Index in `POSITIONS`; −1 for a row without evidence.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    sft: Tensor
    distilled: Tensor
    rejected_view_logps: Tensor
    ref_rejected_view_logps: Tensor
    loss: Tensor
    entropy: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    chosen_top1: Tensor
    third: Tensor

    def __len__(self) -> int:
        return len(self.loss)

    def first(self, number: int) -> RowScores:
        """The first rows alone."""
        return RowScores(*(getattr(self, field.name)[:number] for field in fields(self)))

    def gathered(self, gather: Callable[[Tensor], Tensor], num_rows: int) -> RowScores:
        """The rows of all processes.

        Args:
            gather: Concatenates a tensor of equal shape from each process.
            num_rows: Rows of the fullest process, the same number on each; a process may hold fewer, or none.
        """
        columns = torch.stack([getattr(self, field.name).float() for field in fields(self)], dim=1)
        present = columns.new_ones(len(columns), 1)
        missing = num_rows - len(columns)
        padded = torch.nn.functional.pad(torch.cat([columns, present], dim=1), (0, 0, 0, missing))
        everyone = gather(padded)
        everyone = everyone[everyone[:, -1] > 0]
        return RowScores(*everyone[:, :-1].unbind(dim=1))

    def sums(self, beta: float) -> dict[str, tuple[float, float]]:
        """Sum and count of each metric; a metric that none of the rows has is absent.

        Args:
            beta: What turns a log-ratio into a reward.
        """
        chosen_rewards = beta * (self.chosen_logps - self.ref_chosen_logps)
        rejected_rewards = beta * (self.rejected_logps - self.ref_rejected_logps)
        correct = (chosen_rewards > rejected_rewards).float()
        one = torch.ones_like(self.loss)
        chosen, rejected = self.chosen_tokens, self.rejected_tokens
        metrics = {
            "loss": (self.loss, one),
            "loss/sft": (self.sft, one),
            "loss/view_distillation": (self.distilled, one),
            "rewards/chosen": (chosen_rewards, one),
            "rewards/rejected": (rejected_rewards, one),
            "rewards/accuracies": (correct, one),
            "rewards/margins": (chosen_rewards - rejected_rewards, one),
            "logps/chosen": (self.chosen_logps, one),
            "logps/rejected": (self.rejected_logps, one),
            "logps_per_token/chosen": (self.chosen_logps, chosen),
            "logps_per_token/rejected": (self.rejected_logps, rejected),
            "ref_logps_per_token/chosen": (self.ref_chosen_logps, chosen),
            "ref_logps_per_token/rejected": (self.ref_rejected_logps, rejected),
            "entropy": (self.entropy, chosen + rejected),
            "logits/chosen": (self.chosen_logits, chosen),
            "logits/rejected": (self.rejected_logits, rejected),
            "mean_token_accuracy": (self.chosen_top1, chosen),
        }
        seen = ~self.rejected_view_logps.isnan()
        view_rewards = (beta * (self.rejected_view_logps - self.ref_rejected_view_logps))[seen]
        preferred, ones = chosen_rewards[seen], one[seen]
        metrics |= {
            "loss/view_preference": (view_preference_losses(preferred, view_rewards), ones),
            "rewards/rejected_view": (view_rewards, ones),
            "rewards/view_accuracies": ((preferred > view_rewards).float(), ones),
            "rewards/view_margins": (preferred - view_rewards, ones),
        }
        for number, position in enumerate(POSITIONS):
            here = self.third == number
            metrics[f"rewards/chosen/{position}"] = (chosen_rewards[here], one[here])
            metrics[f"rewards/rejected/{position}"] = (rejected_rewards[here], one[here])
            metrics[f"rewards/accuracies/{position}"] = (correct[here], one[here])
        pairs = torch.stack([torch.stack([values.sum(), counts.sum()]) for values, counts in metrics.values()])
        return {name: (total, count) for name, (total, count) in zip(metrics, pairs.tolist(), strict=True) if count}


#: Metrics of TRL's that `RowScores` replaces. What else TRL logs (`num_tokens`, `aux_loss`) stays TRL's.
REPLACED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
)


class Means:
    """Sums of metrics since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Adds to a metric the sum of `count` values."""
        before, number = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before + total, number + count)

    def take(self) -> Iterator[tuple[str, float]]:
        """Names and means; starts anew."""
        sums, self._sums = self._sums, {}
        return ((name, total / count) for name, (total, count) in sums.items())


class Throughput:
    """Tokens per second between two logs."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None  # seconds and tokens

    def start(self, tokens: float) -> None:
        """Starts measuring, unless it has started."""
        if self._start is None:
            self._start = (time.perf_counter(), tokens)

    def take(self, tokens: float) -> float | None:
        """Tokens per second since the last call, or the start; None if there were none. Goes on measuring."""
        if self._start is None:
            return None
        before, self._start = self._start, (time.perf_counter(), tokens)
        grown = tokens - before[1]
        return grown / (self._start[0] - before[0]) if grown > 0 else None

    def stop(self) -> None:
        """Leaves out the time until `start`, such as that of an evaluation."""
        self._start = None
