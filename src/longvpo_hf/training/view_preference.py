"""View preference: the chosen answer, preferred on the whole timeline to itself on a view that does not support it.

DPO compares two answers about one video, and a policy can win there by how answers read. Here the answer stays and the
video is rejected, as the conditional preference of mDPO (arXiv 2406.11839) rejects the image:

    −log σ(β · [log π(y | whole) − log π_ref(y | reference's view) − log π(y | rejected) + log π_ref(y | rejected)])

PaMi-VDPO (arXiv 2504.05810, of which the abstract was read) warns of false rejections, views on which the answer is
right all the same. A row therefore has to name the evidence without which, or the clips out of whose order, its answer
does not follow.
"""

from __future__ import annotations

import random

import torch.nn.functional as F
from torch import Tensor

from longvpo_hf.errors import ConfigError
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import View
from longvpo_hf.training.config import RejectedView

#: Column of the precomputed score of the chosen answer on the rejected view.
REJECTED_VIEW_COLUMN = "ref_rejected_view_logps"


def rejected_view(preference: VideoPreference, kind: RejectedView) -> View:
    """The view of a row on which its chosen answer is not to be given.

    Args:
        preference: The row.
        kind: "no_evidence" leaves the evidence out. "reversed" has all clips in the opposite order, "shuffled" in one
            that follows from the row's id and has its evidence in another order.

    Raises:
        ConfigError: If the row has no such view: it names no evidence, or nothing else; or, where the order is changed,
            fewer than two clips of evidence, for then the answer is right in any order; or the clips are the same.
    """
    evidence, number = sorted(set(preference.evidence)), len(preference.timeline)
    reason = None
    view = View.whole()
    if kind == "no_evidence":
        if not evidence:
            reason = "needs evidence clips, and the row names none"
        elif len(evidence) == number:
            reason = f"needs clips beside the evidence, and all {number} are evidence"
        else:
            view = View.without(evidence)
    elif len(evidence) < 2:
        reason = f"needs at least 2 evidence clips, whose order may matter, and the row names {len(evidence)}"
    else:
        order = list(range(number))[::-1]
        if kind == "shuffled":
            rng = random.Random(preference.id)
            order.sort()
            while [clip for clip in order if clip in evidence] == evidence:
                rng.shuffle(order)
        view = View.ordered(order)
        if view.of(preference.timeline) == preference.timeline:
            reason = "needs clips that differ, and the timeline is the same in the other order"
    if reason is not None:
        raise ConfigError(
            f"row {preference.id}: view_preference_rejected={kind!r} {reason}. Leave the row out, or set "
            "view_preference_weight=0."
        )
    return view


def view_preference_losses(chosen_rewards: Tensor, rejected_view_rewards: Tensor) -> Tensor:
    """The term of each row, `[B]`.

    Args:
        chosen_rewards: β (log π − log π_ref) of the chosen answer, the policy on the whole timeline and the reference
            on its view, `[B]`.
        rejected_view_rewards: The same of the same answer, both on the rejected view.
    """
    return -F.logsigmoid(chosen_rewards - rejected_view_rewards)
