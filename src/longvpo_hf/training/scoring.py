"""How TRL's calls of the model become scores of our batches, and what is read from those scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial
from trl.trainer.utils import FusedCausalLMOutput

from longvpo_hf.errors import ConfigError
from longvpo_hf.training.collator import SCORE_COLUMNS, Batch
from longvpo_hf.training.distillation import AnswerStates, answer_states, hidden_states_of
from longvpo_hf.training.metrics import POSITIONS, RowScores
from longvpo_hf.training.packing import is_tree_packed, plain_forward, tree_forward, unwrapped
from longvpo_hf.training.packing.forward import TOKEN_FIELDS
from longvpo_hf.training.view_preference import REJECTED_VIEW_COLUMN

_TEXT_KEYS = ("input_ids", "attention_mask", "completion_mask")
_SCORES = (*SCORE_COLUMNS, REJECTED_VIEW_COLUMN)


class ModelCall:
    """Takes the model's place where TRL calls it: scores our batch, as trees if the model can, and keeps the scores.

    Args:
        model: The model, perhaps wrapped.
        batch: The batch with its videos; None to call the model as TRL does.
        rows: Int, which of the batch's rows TRL is given; None for all of them.
        keeps_states: Whether the states of the answers that are distilled are kept.
        group: Processes that share the batch, see `tree_forward`.

    Attributes:
        scored: What TRL was given, after its call.
        log_probs: `[A·B, L - 1]` of all of the batch's sequences, after the call.
        states: Those of the rows it was given.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch | None,
        rows: Tensor | None = None,
        keeps_states: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self.group = group
        self.batch = batch
        self.rows = rows
        self.scored: FusedCausalLMOutput
        self.log_probs: Tensor
        self.states: AnswerStates | None = None
        self._keeps_states = keeps_states

    def __call__(self, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            if self.batch is not None:
                raise ConfigError(
                    "The logits of video rows are not computed: leave compute_metrics=None, or set "
                    "prediction_loss_only=True. The trainer's own metrics are in the logs."
                )
            return self.model(**kwargs)
        with _head_of_all_processes(self.model):
            if self.batch is None:
                self.scored = self.model(**kwargs)
                return self.scored
            # What TRL asks of a mixture of experts, for its load-balancing loss; the inputs are our batch's own.
            asked = {name: kwargs[name] for name in ("output_router_logits",) if name in kwargs}
            base = unwrapped(self.model)
            with hidden_states_of(base) as calls:
                if is_tree_packed(self.model):
                    scored = tree_forward(self.model, self.batch, self.group, **asked)
                else:
                    scored = plain_forward(self.model, self.batch, **asked)
            if self._keeps_states:
                states = answer_states(base, calls, scored, self.batch)
                self.states = states if self.rows is None else states.of(self.rows.tolist())
        self.log_probs = scored.log_probs
        self.scored = _of_rows(scored, both_answers(self.rows, self.batch))
        return self.scored


def texts_of(batch: Batch, rows: Tensor | None = None) -> Batch:
    """What TRL takes of a batch: its token ids and masks, and the reference's scores; of all rows, or of some."""
    both = both_answers(rows, batch)
    texts = {key: batch[key] if both is None else batch[key][both] for key in _TEXT_KEYS}
    scores = {key: batch[key] if rows is None else batch[key][rows] for key in _SCORES if key in batch}
    return {**texts, **scores}


def both_answers(rows: Tensor | None, batch: Batch) -> Tensor | None:
    """Where the chosen and the rejected answers of rows are in a batch, chosen first: `[2 · len(rows)]`.

    Args:
        rows: None for all.

    Returns:
        None if they are all that the batch holds, in its order.
    """
    pairs = len(batch["video_index"])
    if rows is None:
        if len(batch["input_ids"]) == 2 * pairs:
            return None
        rows = torch.arange(pairs, device=batch["input_ids"].device)
    return torch.cat([rows, rows + pairs])


def _of_rows(scored: FusedCausalLMOutput, both: Tensor | None) -> FusedCausalLMOutput:
    if both is None:
        return scored
    values = {name: getattr(scored, name) for name in TOKEN_FIELDS}
    chosen = {name: None if value is None else value[both.to(value.device)] for name, value in values.items()}
    return FusedCausalLMOutput(loss=scored.loss, aux_loss=scored.aux_loss, **chosen)


def answer_scores(log_probs: Tensor, completion_mask: Tensor, ld_alpha: float | None) -> Tensor:
    """Log-probability of each sequence's answer, `[2B]`, as TRL counts it.

    Args:
        log_probs: `[2B, L-1]`, 0 outside answers.
        completion_mask: `[2B, L]`.
        ld_alpha: Weight of the tokens beyond the shorter answer's length (LD-DPO); None for 1.
    """
    mask = completion_mask[:, 1:]
    log_probs = of_real_tokens(log_probs, mask)
    if ld_alpha is None:
        return log_probs.sum(1)
    shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    return (log_probs * torch.where(mask.cumsum(1) <= shared[:, None], 1.0, ld_alpha)).sum(1)


def rejected_view_scores(call: ModelCall, rows: Tensor, ld_alpha: float | None) -> Tensor:
    """Log-probability of the chosen answer of some rows on their rejected views, `[len(rows)]`.

    Args:
        call: A call with a batch that has rejected views.
        rows: Which rows.
        ld_alpha: See `answer_scores`; tokens weigh what they weigh on the whole timeline.
    """
    batch = call.batch
    assert batch is not None
    both = both_answers(rows + len(batch["row_keys"]), batch)
    return answer_scores(call.log_probs[both], batch["completion_mask"][both], ld_alpha).chunk(2)[0]


def sft_losses(log_probs: Tensor, completion_mask: Tensor) -> Tensor:
    """−log π(y⁺) / |y⁺| of each chosen answer, `[B]`; `log_probs` is `[2B, L-1]`, `completion_mask` `[2B, L]`."""
    chosen_mask = completion_mask[:, 1:].chunk(2)[0]
    chosen = of_real_tokens(log_probs, chosen_mask).chunk(2)[0]
    return -(chosen * chosen_mask).sum(1) / chosen_mask.sum(1).clamp(min=1)


def of_real_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Per-token values without the virtual tokens that prompt learning puts before them; as wide as `mask`."""
    return values[:, -mask.shape[1] :]


def row_scores(
    scored: FusedCausalLMOutput,
    texts: Batch,
    ld_alpha: float | None,
    places: Tensor,
    sft: Tensor,
    distilled: Tensor,
    rejected_view: Tensor,
    loss: Tensor,
) -> RowScores:
    """What was measured of the rows of a batch.

    Args:
        scored: What TRL was given of them.
        texts: Their token ids, masks and reference scores.
        ld_alpha: See `answer_scores`.
        places: `[B]`, where the middle of their evidence lies on the timeline, in [0, 1]; NaN without evidence.
        sft: `[B]`, see `sft_losses`.
        distilled: `[B]`, see `divergences`.
        rejected_view: `[B]`, see `rejected_view_scores`; NaN where no view is rejected.
        loss: The loss of all of them.
    """
    mask = texts["completion_mask"][:, 1:]
    chosen, rejected = answer_scores(scored.log_probs.detach(), texts["completion_mask"], ld_alpha).chunk(2)
    chosen_tokens, rejected_tokens = mask.sum(1).chunk(2)
    entropy, logits, top1 = (
        (of_real_tokens(values.detach().float(), mask) * mask).sum(1)
        for values in (scored.entropy, scored.mean_logits, scored.is_top1)
    )
    last = len(POSITIONS) - 1
    return RowScores(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=texts["ref_chosen_logps"],
        ref_rejected_logps=texts["ref_rejected_logps"],
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        sft=sft.detach(),
        distilled=distilled.detach(),
        rejected_view_logps=rejected_view.detach(),
        ref_rejected_view_logps=texts.get(REJECTED_VIEW_COLUMN, rejected_view.detach()),
        loss=loss.detach().expand(len(sft)),
        entropy=sum(entropy.chunk(2)),
        chosen_logits=logits.chunk(2)[0],
        rejected_logits=logits.chunk(2)[1],
        chosen_top1=top1.chunk(2)[0],
        third=torch.where(places.isnan(), -1, (places * len(POSITIONS)).floor().clamp(max=last)),
    )


@contextmanager
def gather_of_unequal_rows(accelerator: Any, has_rows: bool) -> Iterator[None]:
    """Within, TRL's own metrics need no equal number of rows on each process.

    Numbers are gathered, those of a process without rows as 0. Values of rows stay on their process: `RowScores`
    gathers them.
    """
    gather, usual = accelerator.gather, dict(vars(accelerator))

    def gather_numbers(tensor: Tensor) -> Tensor:
        if tensor.ndim:
            return tensor
        return gather(tensor if has_rows else torch.zeros_like(tensor))

    accelerator.gather = accelerator.gather_for_metrics = gather_numbers
    try:
        yield
    finally:
        for name in ("gather", "gather_for_metrics"):
            if name in usual:
                setattr(accelerator, name, usual[name])
            else:
                delattr(accelerator, name)


@contextmanager
def _head_of_all_processes(model: nn.Module) -> Iterator[None]:
    """Within, the gradient of an LM head that FSDP2 shards is the mean over processes, as that of all other weights.

    TRL's fused head multiplies by the weight itself, so FSDP never sees the head run and reduces nothing: with TRL's
    own `full_tensor()` each process's part of the weight is trained by that process's rows alone. A tied head is whole
    by then, as FSDP gathers it with the embeddings.
    """
    base = unwrapped(model)
    get_head = base.get_output_embeddings

    def head() -> Any:
        sharded = get_head()
        if not isinstance(getattr(sharded, "weight", None), DTensor):
            return sharded
        return SimpleNamespace(weight=_gathered(sharded.weight), bias=_gathered(sharded.bias))

    base.get_output_embeddings = head
    try:
        yield
    finally:
        del base.get_output_embeddings


def _gathered(weight: DTensor | None) -> Tensor | None:
    if weight is None:
        return None
    whole = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    if whole.requires_grad:
        processes = weight.device_mesh.size()
        whole.register_hook(lambda gradient: gradient / processes)
    return whole
