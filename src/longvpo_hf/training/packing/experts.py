"""The load-balancing loss of mixtures of experts, over the tokens that separate sequences would have.

A token of a tree counts as often as there are sequences it stands for: the trunk for every answer about its video, the
rest of a question for its answers. Counted once, a long video would weigh less beside its answers than in the plain
way, and the loss would depend on how many rows share it. Padding does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longvpo_hf.training.packing.exchange import summed
from longvpo_hf.training.packing.sharing import Share

#: Of each call of the model, of each layer: [tokens, experts].
Routing = list[tuple[Tensor, ...]]


@contextmanager
def routing_of(base: PreTrainedModel) -> Iterator[Routing]:
    """Within, collects the router logits of the model's calls that ask for them.

    TRL's head reads the number of experts as `num_experts`, which the configs of some models do not have (GLM-4.5V's
    calls it `num_local_experts`): within, they do.
    """
    found: Routing = []
    text = base.config.get_text_config()
    is_unnamed = hasattr(text, "num_local_experts") and not hasattr(text, "num_experts")

    def collect(_: Any, __: Any, output: Any) -> None:
        logits = getattr(output, "router_logits", None)
        if logits:
            found.append(logits)

    hook = base.base_model.register_forward_hook(collect)
    if is_unnamed:
        text.num_experts = text.num_local_experts
    try:
        yield found
    finally:
        hook.remove()
        if is_unnamed:
            del text.num_experts


def is_routing_wanted(base: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a call of the model with these arguments makes the load-balancing loss."""
    is_usual = getattr(base.config.get_text_config(), "output_router_logits", False)
    return bool(kwargs.get("output_router_logits", is_usual))


def balancing_loss(
    base: PreTrainedModel, routing: Routing, counts: Sequence[Tensor], shares: Sequence[Share | None]
) -> Tensor:
    """The load-balancing loss over all calls of the model (Switch Transformer, equations 4 to 6).

    transformers' own function gives the product of two means over tokens. Of processes that share a call each has some
    of the tokens, so the sums are needed.

    Args:
        routing: See `Routing`; of a shared call, of this process's tokens.
        counts: Of each call, how often each of its tokens counts.
        shares: Of each call, this process's share of it; None where it computed all of it.
    """
    num_chosen = base.config.get_text_config().num_experts_per_tok
    sums: Tensor | float = 0.0
    for layers, count, share in zip(routing, counts, shares, strict=True):
        times = count.reshape(-1).float()
        if share is not None:
            times = times[share.held.to(times.device)]
        chosen, likely = (times.new_zeros(layers[0].shape[-1]) for _ in range(2))
        for logits in layers:
            probabilities = logits.to(times.device).softmax(-1)
            best = probabilities.detach().topk(num_chosen, dim=-1).indices
            chosen = chosen.index_add(0, best.flatten(), times.repeat_interleave(num_chosen))
            likely = likely + times @ probabilities.float()
        own = torch.stack([chosen, likely, (times.sum() * len(layers)).expand_as(likely)])
        if share is not None:
            assert share.group is not None
            own = summed(own, share.group)
        sums = sums + own
    assert isinstance(sums, Tensor)
    chosen, likely, tokens = sums
    return len(chosen) * (chosen * likely / tokens**2).sum()


def balancing_weight(base: PreTrainedModel) -> float:
    """The weight of the load-balancing loss in the loss that TRL's fused head returns."""
    return float(getattr(base.config.get_text_config(), "router_aux_loss_coef", 0.0))
