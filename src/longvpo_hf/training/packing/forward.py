"""Scores a batch as a sequence for each answer or as trees; both give the same per-token numbers (see the package)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import family_of
from longvpo_hf.families.encoding import concatenate_visuals, visual_shapes
from longvpo_hf.training.packing.attention import ATTENTION, planted
from longvpo_hf.training.packing.exchange import summed
from longvpo_hf.training.packing.experts import (
    Routing,
    balancing_loss,
    balancing_weight,
    is_routing_wanted,
    routing_of,
)
from longvpo_hf.training.packing.guards import is_tree_packed, reason_in_calls, unwrapped
from longvpo_hf.training.packing.sharing import Share, share_of
from longvpo_hf.training.packing.tree import Batch, Packed, find_visual_tokens, pack, trees_of, trunk_positions

TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
"""Per-token fields [A·B, L - 1] of TRL's `FusedCausalLMOutput`; those the head was not asked for are None."""


@dataclass
class Scored(FusedCausalLMOutput):
    """What several calls of a model, or a call on trees, gave a batch.

    Args:
        places: `[A·B, L - 1]`, where each token was predicted, counted over the positions of all calls laid end to end;
            -1 for nowhere.
        widths: How many positions of a sequence count, for each call.
        shares: For each call this process's share of its row; None where it computed all of it.
    """

    places: Tensor | None = None
    widths: tuple[int, ...] | None = None
    shares: tuple[Share | None, ...] | None = None


def number_of_calls(batch: Batch) -> int:
    """How many calls of a model a batch takes, as trees or as sequences."""
    videos = batch["videos"]
    return max(1, len({visual_shapes(videos[number]) for number in range(len(videos))}))


def require_equal_calls(*calls: Sequence[int]) -> None:
    """Refuses batches for which processes that share weights would call a model unequally often, and deadlock.

    Args:
        calls: Of each model, how many calls each process's batch takes.

    Raises:
        ConfigError: If they differ.
    """
    for of_processes in calls:
        if len(set(of_processes)) > 1:
            raise ConfigError(
                f"Processes that share weights would call the model {min(of_processes)} to {max(of_processes)} times "
                "on their batches, and deadlock: it takes videos of unequal numbers of frames in calls of their own. "
                "Give each device rows of one timeline (per_device_train_batch_size=1, or as many as "
                "pairs_per_timeline) and reject no views (view_preference_weight=0), or train by DDP."
            )


def plain_forward(model: Any, batch: Batch, **kwargs: Any) -> FusedCausalLMOutput:
    """A sequence for each answer, each with its own copy of the video.

    One call of the model; more only where the visual tensors of different videos cannot be concatenated.

    Args:
        model: A model with TRL's fused LM head, wrapped or not.
        batch: See the package.
        kwargs: Passed on to the model.

    Returns:
        Per-token fields [A·B, L - 1], zero where no answer token is predicted.
    """
    input_ids = batch["input_ids"]
    labels = input_ids.masked_fill(batch["completion_mask"] == 0, -100)
    index = batch["video_index"].tolist()
    parts = _concatenable([[row] for row in range(len(index))], index, batch["videos"])
    base = unwrapped(model)
    outputs, counts, source = [], [], torch.full_like(input_ids[:, 1:], -1)
    done, of_row = 0, len(input_ids) // len(index)
    with routing_of(base) as routing:
        for part in parts:
            rows = sorted(row for (row,) in part)
            answers = [row + number * len(index) for number in range(of_row) for row in rows]
            every = torch.tensor(answers, device=input_ids.device)
            visual = concatenate_visuals([batch["videos"][index[row]] for row in rows * of_row if index[row] >= 0])
            visual = {name: value.to(input_ids.device) for name, value in visual.items()}
            if "mm_token_type_ids" in batch:
                visual["mm_token_type_ids"] = batch["mm_token_type_ids"][every]
            output = _checked(
                model(
                    input_ids=input_ids[every],
                    attention_mask=batch["attention_mask"][every],
                    labels=labels[every],
                    fused_lm_head=True,
                    **visual,
                    **kwargs,
                )
            )
            if len(parts) == 1:
                return output
            outputs.append(output)
            width = output.log_probs.shape[1]  # prompt learning puts virtual tokens before the real ones
            places = torch.arange(done, done + output.log_probs.numel(), device=input_ids.device).view(
                len(every), width
            )
            source[every] = places[:, -source.shape[1] :]
            done += places.numel()
            virtual = width + 1 - input_ids.shape[1]
            counts.append(F.pad(batch["attention_mask"][every], (virtual, 0), value=1))
    return _at(base, outputs, source, routing, counts, [None] * len(outputs))


def tree_forward(model: Any, batch: Batch, group: ProcessGroup | None = None, **kwargs: Any) -> FusedCausalLMOutput:
    """All answers of a batch in one sequence; equal to `plain_forward`, several times cheaper.

    One call of the model; more only where the visual tensors of different videos cannot be concatenated
    (LLaVA-OneVision with different numbers of frames). Under FSDP and ZeRO-3, processes that make different numbers of
    calls deadlock: keep to one timeline per device there. Layers of linear attention call their weights twice a tree,
    for its trunk and its branches: for them, too, the trees of all devices must be equally many under ZeRO-3.

    Args:
        model: A model with TRL's fused LM head that `enable_tree_packing` accepted, wrapped or not.
        batch: See the package. With a group, its videos may be on another device than the rest.
        group: Processes that were all given this batch and share its work, see `sharing`; a row that is too short to
            be cut, or whose videos cannot be parted, is computed by each of them. The result is the same on all.
            Gradients of their weights are to be averaged over the group, as DDP and FSDP do. None: this one alone.
        kwargs: Passed on to the model.

    Returns:
        Per-token fields [A·B, L - 1], zero where no answer token is predicted.

    Raises:
        RuntimeError: If the model's layers did not all attend along the tree; the numbers would be wrong.
        ValueError: If the batch is not as described in the package.
    """
    base = unwrapped(model)
    decoder = base.get_decoder()
    if not is_tree_packed(base):
        raise RuntimeError(
            f"The text model of {type(base).__name__} attends by {decoder.config._attn_implementation!r}, which "
            f"ignores trees: call enable_tree_packing(model) first and keep the attention implementation it sets."
        )
    index = batch["video_index"].tolist()
    visual_tokens = find_visual_tokens(base, batch)
    trees = trees_of(batch, visual_tokens)
    outputs, counts, source = [], [], torch.full_like(batch["input_ids"][:, 1:], -1)
    shares: list[Share | None] = []
    done, balances = 0, is_routing_wanted(base, kwargs)
    with routing_of(base) as routing, planted():
        for part in _concatenable([tree.rows for tree in trees], index, batch["videos"]):
            together = [tree for tree in trees if tree.rows in part]
            positions = [trunk_positions(base, batch, tree, index[tree.rows[0]]) for tree in together]
            packed = pack(batch, together, positions, with_last_tokens=balances)
            visuals = [batch["videos"][index[tree.rows[0]]] if index[tree.rows[0]] >= 0 else {} for tree in together]
            share = None
            if group is not None:
                visible = [visual_tokens[tree.rows[0], : tree.trunk] for tree in together]
                share = share_of(packed, visuals, visible, family_of(base.config), group)
            outputs.append(_call(model, base, packed, share, [visual for visual in visuals if visual], kwargs))
            shares.append(share)
            source = torch.where(packed.source >= 0, packed.source + done, source)
            done += packed.input_ids.shape[1]
            counts.append(packed.counts)
    return _at(base, outputs, source, routing, counts, shares)


def _call(
    model: Any,
    base: PreTrainedModel,
    packed: Packed,
    share: Share | None,
    visuals: Sequence[Mapping[str, Tensor]],
    kwargs: dict[str, Any],
) -> Any:
    """The model's output of a packed row, per-token fields [1, T]; of all processes where they share it."""
    rows = (packed.input_ids, packed.position_ids, packed.shift_labels)
    ids, positions, labels = rows if share is None else (row[..., share.held] for row in rows)
    forest, visual = (packed.forest, concatenate_visuals(visuals)) if share is None else (share, share.visual)
    with _scoring(base, labels) as (scored_labels, spread):
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            shift_labels=scored_labels,
            fused_lm_head=True,
            **{ATTENTION: forest},
            **{name: value.to(ids.device) for name, value in visual.items()},
            **kwargs,
        )
    spread(_checked(output))
    reason = reason_in_calls(base, forest)
    if reason is not None:
        raise RuntimeError(
            f"{reason} The log-probabilities would be wrong. Train this model without tree packing "
            f"(tree_packing=False)."
        )
    return output if share is None else _of_all(output, share, packed.input_ids.shape[1])


@contextmanager
def _scoring(base: PreTrainedModel, labels: Tensor) -> Iterator[tuple[Tensor, Callable[[Any], None]]]:
    """Within, the head of a call on a packed row is given the states that have labels, and no others.

    TRL's leaves the others out by itself only where Triton runs; elsewhere it projects every token of the videos onto
    the vocabulary.

    Args:
        base: The transformers model.
        labels: [1, T], -100 for no label.

    Yields:
        The labels of these states, and what puts the per-token fields of the output, in place, where they belong in a
        row of T tokens.
    """
    places = (labels[0] != -100).nonzero()[:, 0]

    def pick(_: Any, __: Any, output: Any) -> Any:
        states = output.last_hidden_state
        output.last_hidden_state = states.index_select(1, places.to(states.device))
        return output

    def spread(output: Any) -> None:
        for name in TOKEN_FIELDS:
            value = getattr(output, name)
            if value is not None:
                whole = value.new_zeros(labels.shape)
                setattr(output, name, whole.index_copy(1, places.to(value.device), value))

    hook = base.base_model.register_forward_hook(pick)
    try:
        yield labels[:, places], spread
    finally:
        hook.remove()


def _of_all(output: Any, share: Share, tokens: int) -> FusedCausalLMOutput:
    """Per-token fields [1, T] of a packed row of T tokens, from what each process has of its own tokens."""
    names = [name for name in TOKEN_FIELDS if getattr(output, name) is not None]
    own = torch.stack([getattr(output, name)[0].to(output.log_probs.dtype) for name in names])
    places = share.held.to(own.device)
    assert share.group is not None
    everyone = summed(own.new_zeros(len(names), tokens).index_copy(1, places, own), share.group)
    fields = dict(zip(names, everyone[:, None], strict=True))
    for name in ("is_top1", "label_mask"):
        if name in fields:
            fields[name] = fields[name] > 0.5
    loss = -fields["log_probs"].sum() / fields["label_mask"].sum().clamp(min=1)
    return FusedCausalLMOutput(loss=loss, **fields)


def _concatenable(
    groups: Sequence[list[int]], index: Sequence[int], videos: Sequence[Mapping[str, Tensor]]
) -> list[list[list[int]]]:
    """Groups of rows split into as few forwards as their videos' shapes allow; groups without video join the first."""
    parts: dict[Any, list[list[int]]] = {}
    without = []
    for group in groups:
        video = index[group[0]]
        if video < 0:
            without.append(group)
        else:
            parts.setdefault(visual_shapes(videos[video]), []).append(group)
    forwards = list(parts.values()) or [[]]
    forwards[0] += without
    return forwards


def _checked(output: Any) -> Any:
    """The output, if TRL's fused LM head made it."""
    if getattr(output, "log_probs", None) is None:
        raise RuntimeError(
            f"The model returned {type(output).__name__} without log_probs: give it TRL's fused LM head with "
            f"trl.trainer.utils.add_fused_lm_head(model)."
        )
    return output


def _at(
    base: PreTrainedModel,
    outputs: Sequence[Any],
    source: Tensor,
    routing: Routing,
    counts: Sequence[Tensor],
    shares: Sequence[Share | None],
) -> FusedCausalLMOutput:
    """What calls of the model gave, as one output.

    Args:
        source: [A·B, L - 1], the places of per-token fields, counted over all outputs laid end to end; -1 for a 0.
        routing: The experts' part of the calls; empty where no load-balancing loss is asked for.
        counts: Of each call, how often each of its tokens counts for that loss.
        shares: See `Scored`.
    """
    nowhere, place = source < 0, source.clamp(min=0)
    fields: dict[str, Any] = {}
    for name in TOKEN_FIELDS:
        values = [getattr(output, name) for output in outputs]
        if all(value is not None for value in values):
            flat = torch.cat([value.reshape(-1) for value in values])
            fields[name] = flat[place.to(flat.device)].masked_fill(nowhere.to(flat.device), 0)
    numbers = torch.stack([output.label_mask.sum() for output in outputs])
    portions = numbers / numbers.sum().clamp(min=1)
    losses = [portion * output.loss for portion, output in zip(portions, outputs, strict=True)]
    widths = tuple(output.log_probs.shape[1] for output in outputs)
    fields |= {"places": source, "widths": widths, "shares": tuple(shares)}
    if not routing:
        return Scored(loss=torch.stack(losses).sum(), **fields)
    weight, aux = balancing_weight(base), balancing_loss(base, routing, counts, shares)
    # That of a shared call is left out of its loss already.
    theirs = [
        portion * (0.0 if share is not None else output.aux_loss)
        for portion, output, share in zip(portions, outputs, shares, strict=True)
    ]
    loss = torch.stack(losses).sum() + weight * (aux - torch.stack(theirs).sum())
    return Scored(loss=loss, aux_loss=aux, **fields)
