"""Early signs, in a run's log, that preference training goes wrong.

`find_signs` reads a log history (`TrainerState.log_history`, as `LongVPOTrainer` and TRL's `DPOTrainer` write it) and
says what was seen, in numbers, and what to change. `LongVPOTrainer(..., callbacks=[EarlyWarning()])` does so during the
run; it only warns and never changes the training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

Logs = Sequence[Mapping[str, float]]

#: Logs that are averaged before anything is compared. At 10 steps of 8 rows a log these are 400 rows, among which
#: chance has an accuracy of 0.50 ± 0.025, and the SFT term of rows that differ by 0.5 nats a token an error of 0.025.
WINDOW = 5
#: Share of the run after which chance-level accuracy counts as stuck. An anchored reference sees the evidence alone, so
#: accuracy starts near 0 and rises late (benchmarks/results/miniature-stage1.json: 0.5 after a fifth of the run).
STUCK_AFTER = 0.5
#: Two standard deviations above chance, see `WINDOW`.
STUCK_ACCURACY = 0.55
#: Accuracy that still rises by more within `WINDOW` logs is late, not stuck: with an anchored reference the miniature's
#: runs are at 0.25 to 0.57 half-way, and end at 0.87 to 0.95 (benchmarks/results/miniature.json).
STUCK_RISE = 0.05
#: Six standard deviations below the best accuracy of the run, see `WINDOW`.
FALLEN_ACCURACY = 0.15
#: Nats per token: the probability of each token of the chosen answer has fallen by a tenth. Likelihood displacement
#: (Razin et al., arXiv 2410.08847) goes far beyond: whole nats per token.
FALLEN_NATS = 0.1
#: The same as a share, where only the log-probability of whole answers is logged.
FALLEN_SHARE = 0.1
#: At this margin sigmoid(-margin), the weight of a row in DPO's gradient, is 2e-9: the loss no longer asks for more.
#: The largest of the miniature's runs that did well is 12 (DPO alone, β = 1).
EXPLODED_MARGIN = 20.0


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign of failure.

    Args:
        name: Which: `not_finite`, `chosen_falls`, `margin_explodes`, `accuracy_stuck`, `accuracy_falls`, `sft_rises`.
        message: What was seen, in numbers, and what to change.
    """

    name: str
    message: str


def find_signs(log_history: Logs, progress: float = 1.0, has_preference_loss: bool = True) -> list[Sign]:
    """The signs of failure in a log history; the same history gives the same signs.

    Args:
        log_history: As `TrainerState.log_history`; entries of evaluations are ignored.
        progress: Share of the run that is done, in [0, 1].
        has_preference_loss: Whether there is a loss besides SFT; without one, rewards are by-products.
    """
    logs = [entry for entry in log_history if "loss" in entry]
    found = [_not_finite(logs), _sft_rises(logs)]
    if has_preference_loss:
        found += [_chosen_falls(logs), _margin_explodes(logs), _accuracy_stuck(logs, progress), _accuracy_falls(logs)]
    return [sign for sign in found if sign is not None]


class EarlyWarning(TrainerCallback):
    """Warns in the log, once for each sign, when a run shows signs of failure (`find_signs`)."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the history whenever something was logged."""
        if not state.is_world_process_zero:
            return
        losses = getattr(args, "loss_type", None) or ["sigmoid"]
        losses = [losses] if isinstance(losses, str) else losses
        progress = state.global_step / state.max_steps if state.max_steps > 0 else 1.0
        for sign in find_signs(state.log_history, progress, any(loss != "sft" for loss in losses)):
            if sign.name not in self._warned:
                self._warned.add(sign.name)
                logger.warning(f"Early warning at step {state.global_step}: {sign.message}")


# ---------------------------------------------------------------------------------------------------- the signs


def _values(logs: Logs, name: str) -> list[float]:
    return [entry[name] for entry in logs if name in entry and math.isfinite(entry[name])]


def _windows(values: Sequence[float]) -> list[float]:
    """Means of all `WINDOW` consecutive values; empty below two windows."""
    if len(values) < 2 * WINDOW:
        return []
    return [sum(values[start : start + WINDOW]) / WINDOW for start in range(len(values) - WINDOW + 1)]


def _not_finite(logs: Logs) -> Sign | None:
    # In TRL's own trainer transformers filters the loss (`logging_nan_inf_filter`); the other values show it.
    names = ("loss", "grad_norm", "loss/sft", "logps/chosen", "logps/rejected", "rewards/margins")
    for entry in logs:
        for name in names:
            if name in entry and not math.isfinite(entry[name]):
                return Sign(
                    "not_finite",
                    f"{name} is {entry[name]} at step {entry.get('step', '?')}. Training further is useless: go back "
                    "to the last checkpoint with a lower learning_rate and max_grad_norm=1.0; with fp16 use bf16.",
                )
    return None


def _chosen_falls(logs: Logs) -> Sign | None:
    margins = _windows(_values(logs, "rewards/margins"))
    name = "logps_per_token/chosen"
    windows = _windows(_values(logs, name))
    bound = FALLEN_NATS
    if not windows:
        name = "logps/chosen"
        windows = _windows(_values(logs, name))
        bound = FALLEN_SHARE * abs(windows[0]) if windows else 0.0
    if not windows or not margins:
        return None
    first, middle, last = windows[0], windows[len(windows) // 2], windows[-1]
    if not (first - last > bound and last <= middle <= first and margins[-1] > margins[0]):
        return None
    return Sign(
        "chosen_falls",
        f"the chosen answers become less probable ({name} {first:.3g} → {last:.3g}) while the margin grows "
        f"({margins[0]:.3g} → {margins[-1]:.3g}): the rejected ones only fall faster, and the model "
        "will say something else than either. Raise sft_weight (LongVPO: 1.0) or beta, or lower learning_rate.",
    )


def _margin_explodes(logs: Logs) -> Sign | None:
    windows = _windows(_values(logs, "rewards/margins"))
    if not windows or windows[-1] <= EXPLODED_MARGIN or windows[-1] <= windows[-1 - WINDOW]:
        return None
    return Sign(
        "margin_explodes",
        f"rewards/margins is {windows[-1]:.3g} and growing, beyond {EXPLODED_MARGIN:g}, where the DPO loss has no "
        "gradient left: the model drifts from the reference to no end. Lower learning_rate, stop earlier, "
        "or raise sft_weight; loss_type=ipo bounds the margin.",
    )


def _accuracy_stuck(logs: Logs, progress: float) -> Sign | None:
    windows = _windows(_values(logs, "rewards/accuracies"))
    if not windows or progress < STUCK_AFTER or windows[-1] > STUCK_ACCURACY:
        return None
    if windows[-1] - windows[max(0, len(windows) - 1 - WINDOW)] > STUCK_RISE:
        return None
    return Sign(
        "accuracy_stuck",
        f"rewards/accuracies is {windows[-1]:.2f} after {progress:.0%} of the run (chance: 0.5; it started at "
        f"{windows[0]:.2f}). Look at the rows (`longvpo inspect`): does the video tell chosen and rejected apart? If "
        "so, raise learning_rate or train longer. With an anchored reference accuracy starts below 0.5; a short run "
        "with reference=full shows whether that is the only reason.",
    )


def _accuracy_falls(logs: Logs) -> Sign | None:
    windows = _windows(_values(logs, "rewards/accuracies"))
    if not windows or max(windows) - windows[-1] <= FALLEN_ACCURACY:
        return None
    return Sign(
        "accuracy_falls",
        f"rewards/accuracies fell from {max(windows):.2f} to {windows[-1]:.2f}. Lower learning_rate, lengthen the "
        "warm-up, or check whether the kind of rows changes in their order (then shuffle them).",
    )


def _sft_rises(logs: Logs) -> Sign | None:
    windows = _windows(_values(logs, "loss/sft"))
    if not windows or windows[-1] - min(windows) <= FALLEN_NATS:
        return None
    return Sign(
        "sft_rises",
        f"loss/sft (−log-probability of a token of the chosen answer) rose from {min(windows):.3g} to "
        f"{windows[-1]:.3g}. Lower learning_rate, or raise sft_weight if the margin grows at the same time.",
    )


__all__ = ["EarlyWarning", "Sign", "find_signs"]
