"""Trees tried on a run's first batch, for models that the package's own tests do not cover.

`enable_tree_packing` looks at a model's text layers alone. What a whole model does beside them, such as a mask or
positions of its own, shows on a real video.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from longvpo_hf.errors import ModelError
from longvpo_hf.training.packing.forward import plain_forward, tree_forward
from longvpo_hf.training.packing.guards import unwrapped
from longvpo_hf.training.packing.tree import Batch

_ROWS = 2
#: How much a tree's log-probabilities may always differ, in float32 and in half precision: all of them, relative to the
#: norm of the plain ones, and any one, relative to their root mean square. Of twelve tiny models, right trees differed
#: by at most 2e-7 in float32 (one number by 6e-7) and 0.0025 in bfloat16 (one number by 0.01; all of a mixture of
#: experts by 0.013), wrong ones by 0.01 to 0.18.
_FLOORS = {False: (1e-3, 1e-3), True: (5e-3, 0.03)}
#: … and in any case by so many times what padding alone changes.
_TIMES_NOISE = 4
_PADDING = 64


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial found, the same on all processes.

    Args:
        had_video: Whether any process had a row with a video: else trees are still to be tried.
        reason: Why trees cannot be trusted, of the first process that has a reason; None where none has.
    """

    had_video: bool
    reason: str | None


def trial_on_batches(model: Any, batch: Batch, is_half: bool) -> Trial:
    """`reason_on_batch` on each process's own batch, agreed on by all processes.

    Raises:
        ModelError: On all processes, if the plain way fails on any.
    """
    reason, error = None, None
    try:
        reason = reason_on_batch(model, batch, is_half)
    except ModelError as failed:
        error = failed  # raised once the others know
    found = gather_object([(bool((batch["video_index"] >= 0).any()), reason, error and str(error))])
    errors = [text for _, _, text in found if text is not None]
    if errors:
        raise ModelError(errors[0]) from error
    return Trial(
        any(has_video for has_video, _, _ in found), next((why for _, why, _ in found if why is not None), None)
    )


@torch.no_grad()
def reason_on_batch(model: Any, batch: Batch, is_half: bool) -> str | None:
    """Why a model that was prepared for trees cannot be trusted with them, or None.

    Up to two rows of the batch that show one video are scored both ways, without dropout. Neither weights nor random
    state change.

    Args:
        model: A model with TRL's fused LM head that `enable_tree_packing` accepted, wrapped or not.
        batch: See the package.
        is_half: Whether the model computes in half precision, where the two ways round differently.

    Raises:
        ModelError: If the plain way fails: then there is none to score the batch.
    """
    rows, name = _rows(batch), type(unwrapped(model)).__name__
    with evaluating(model):
        try:
            plain = plain_forward(model, rows)
            expected, is_answer = plain.log_probs.float(), plain.label_mask.bool()
            padded = plain_forward(model, _padded(rows)).log_probs.float()[:, -_PADDING - expected.shape[1] : -_PADDING]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model of no known family may fail in any way
            raise ModelError(
                f"{name} cannot be trained: its forward pass failed on the first batch ({type(error).__name__}: "
                f"{error}). docs/families.md lists the families that were run."
            ) from error
        if not expected.isfinite().all():
            raise ModelError(f"{name} cannot be trained: log-probabilities of the first batch are not finite.")
        try:
            found = tree_forward(model, rows).log_probs.float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # likewise; training goes on without trees, and says so
            return f"{name} failed on a tree of the first batch ({type(error).__name__}: {error})."
    of_tree, of_padding = (_differences(other[is_answer], expected[is_answer]) for other in (found, padded))
    for what, difference, noise, floor in zip(("all", "one"), of_tree, of_padding, _FLOORS[is_half], strict=True):
        bound = max(floor, _TIMES_NOISE * noise)
        if not difference <= bound:
            return (
                f"{name} gave other log-probabilities for a tree of the first batch than for separate sequences "
                f"(relative difference of {what} {difference:.2g}, bound {bound:g}): something besides its text layers "
                "knows where tokens stand."
            )
    return None


def _differences(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Of all numbers, relative to the norm of what is expected; of any one, relative to its root mean square."""
    error, scale = found - expected, expected.norm()
    return float(error.norm() / scale), float(error.abs().max() / scale * len(expected) ** 0.5)


def _rows(batch: Batch) -> Batch:
    """The first row of a batch and the next one about its video, as a batch."""
    index = batch["video_index"].tolist()
    rows = [row for row, video in enumerate(index) if row == 0 or video == index[0] >= 0][:_ROWS]
    both = torch.tensor(rows + [row + len(index) for row in rows], device=batch["input_ids"].device)
    names = ("input_ids", "attention_mask", "completion_mask", "mm_token_type_ids")
    some: dict[str, Any] = {name: batch[name][both] for name in names if name in batch}
    width = int(some["attention_mask"].sum(1).max())
    return {
        **{name: value[:, :width] for name, value in some.items()},
        "videos": [batch["videos"][index[0]]] if index[0] >= 0 else [],
        "video_index": torch.tensor([min(index[0], 0)] * len(rows), device=both.device),
    }


def _padded(batch: Batch) -> Batch:
    """The batch with more padding: the same numbers by other kernels, which round differently."""
    names = ("input_ids", "attention_mask", "completion_mask", "mm_token_type_ids")
    return {**batch, **{name: F.pad(batch[name], (0, _PADDING)) for name in names if name in batch}}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model and its parts are in evaluation mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
