"""View distillation: what the reference says of an answer where it sees the evidence, taught to the policy.

DPO is told one bit of a row, which answer is better. The reference, scored on its own view, has a whole distribution
for each token of an answer, and is sure where the policy, which sees the whole timeline, is not. The term is the
divergence of the two, averaged over an answer's tokens and then over rows. The answer is the row's chosen one, or one
that the policy samples (`sampling.py`), as in Vision-OPD (arXiv 2605.18740) and S²VOPD (arXiv 2608.14144).

Hidden states of the answers' tokens are kept from the passes that are made anyway (`ModelCall`); distributions over the
vocabulary exist for a bounded number of tokens at a time, in the backward pass too. Of processes that share a timeline
each is given the states of all answers, and computes the whole term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import FusedCausalLMOutput

from longvpo_hf.errors import ModelError
from longvpo_hf.training.collator import TOP_COLUMNS
from longvpo_hf.training.config import Divergence, LongVPOConfig
from longvpo_hf.training.packing.exchange import summed
from longvpo_hf.training.packing.sharing import Share

#: Numbers of a table of tokens × vocabulary that is held at once: 128 MiB in float32.
_TABLE = 2**25
#: How far log-probabilities from the states may be from those that the model was scored with, in nats a token: float32,
#: and half precision, where a logit of 30 is rounded by up to 0.06.
_BOUNDS = {False: 1e-3, True: 0.2}


@dataclass(frozen=True, slots=True)
class AnswerStates:
    """Where a model predicts an answer of each of B rows, and the LM head that reads it.

    Args:
        hidden: Of each row `[tokens of the answer, width]`.
        labels: Of each row the answer's token ids, `[tokens]`.
        scores: Of each row the log-probabilities that the model was scored with, `[tokens]`.
        weight: Of the head, `[vocabulary, width]`.
        bias: Of the head, `[vocabulary]`; None without.
        softcap: Bound of the logits, by a tanh; None without.
    """

    hidden: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def of(self, rows: Sequence[int]) -> AnswerStates:
        """The same of some rows."""
        hidden, labels, scores = (tuple(each[row] for row in rows) for each in (self.hidden, self.labels, self.scores))
        return AnswerStates(hidden, labels, scores, self.weight, self.bias, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[tokens, vocabulary]`, float32, of states `[tokens, width]`."""
        logits = F.linear(hidden, self.weight.to(hidden.dtype), self.bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, slots=True)
class TopTokens:
    """What a model finds likeliest for each token of an answer of each of B rows; in place of its states.

    Args:
        tokens: Of each row `[tokens of the answer, k]`.
        log_probs: Of each row those of these tokens at the term's temperature, and last that of all other tokens
            together, `[tokens of the answer, k + 1]`; without the last where no others are.
        own: Of each row the log-probabilities of the answer's own tokens at temperature 1, `[tokens of the answer]`.
    """

    tokens: tuple[Tensor, ...]
    log_probs: tuple[Tensor, ...]
    own: tuple[Tensor, ...]

    def of(self, rows: Sequence[int]) -> TopTokens:
        """The same of some rows."""
        fields = (self.tokens, self.log_probs, self.own)
        return TopTokens(*(tuple(each[row] for row in rows) for each in fields))

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any]) -> TopTokens:
        """Those of a batch whose rows hold them."""
        lengths = batch["completion_mask"][: len(batch["row_keys"])].sum(1).tolist()
        return cls(*(batch[name].split(lengths) for name in TOP_COLUMNS))


Teacher = AnswerStates | TopTokens


@torch.no_grad()
def top_tokens(states: AnswerStates, k: int, temperature: float, table: int = _TABLE) -> TopTokens:
    """The `k` likeliest tokens of each place, or the whole vocabulary where that is no more."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    size = max(1, table // len(states.weight))
    pieces = zip(torch.cat(states.hidden).split(size), torch.cat(states.labels).split(size), strict=True)
    for hidden, labels in pieces:
        logits = states.logits(hidden)
        log_probs = (logits / temperature).log_softmax(-1)
        tokens = log_probs.topk(min(k, log_probs.shape[-1])).indices
        found.append((tokens, _gathered(log_probs, tokens), _of_labels(logits, labels)))
    lengths = [len(labels) for labels in states.labels]
    return TopTokens(*(torch.cat(field).split(lengths) for field in zip(*found, strict=True)))


def _gathered(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities `[tokens, vocabulary]` of some tokens `[tokens, k]`, and of all others together."""
    some = log_probs.gather(-1, tokens)
    if tokens.shape[-1] == log_probs.shape[-1]:
        return some
    return torch.cat([some, log_probs.scatter(-1, tokens, -math.inf).logsumexp(-1, keepdim=True)], dim=-1)


@contextmanager
def hidden_states_of(base: Any) -> Iterator[list[Tensor]]:
    """Within, collects what the text model gives in each call of a model, `[rows, tokens, width]`."""
    found: list[Tensor] = []
    hook = base.base_model.register_forward_hook(lambda _, __, output: found.append(output.last_hidden_state))
    try:
        yield found
    finally:
        hook.remove()


def answer_states(
    base: Any, calls: Sequence[Tensor], scored: FusedCausalLMOutput, batch: Mapping[str, Any]
) -> AnswerStates:
    """The states of a batch's sampled answers; where it has none, of the chosen ones.

    Args:
        base: The transformers model, its head gathered where it is sharded.
        calls: See `hidden_states_of`.
        scored: What `plain_forward` or `tree_forward` made of these calls.
        batch: What was scored.
    """
    input_ids, pairs = batch["input_ids"], len(batch["video_index"])
    block = slice(2 * pairs, None) if len(input_ids) > 2 * pairs else slice(pairs)
    places: Tensor | None = getattr(scored, "places", None)
    widths: Sequence[int] = getattr(scored, "widths", None) or ()
    if places is None:  # one call, whose rows are the batch's; prompt learning puts virtual tokens before them
        rows, width = scored.log_probs.shape
        places, widths = torch.arange(rows * width, device=input_ids.device).view(rows, width), [width]
        places = places[:, 1 - input_ids.shape[1] :]
    shares: Sequence[Share | None] = getattr(scored, "shares", None) or [None] * len(calls)
    answers = batch["completion_mask"][block, 1:] == 1
    counts = answers.sum(1).tolist()
    hidden = _states_at(places[block][answers], calls, widths, shares)
    scores = scored.log_probs[block, 1 - input_ids.shape[1] :]
    head = base.get_output_embeddings()
    return AnswerStates(
        hidden.split(counts),
        input_ids[block, 1:][answers].split(counts),
        scores[answers].detach().float().split(counts),
        head.weight,
        head.bias,
        getattr(base.config.get_text_config(), "final_logit_softcapping", None),
    )


def _states_at(
    places: Tensor, calls: Sequence[Tensor], widths: Sequence[int], shares: Sequence[Share | None]
) -> Tensor:
    """The states at some places, `[places, width]`, on every process that shares a call.

    Args:
        places: Counted over the positions of all calls laid end to end.
        calls: See `hidden_states_of`; of a shared one, the states of this process's tokens.
        widths: See `Scored`.
        shares: See `Scored`.
    """
    states, start = calls[0].new_zeros(len(places), calls[0].shape[-1]), 0
    for call, width, share in zip(calls, widths, shares, strict=True):
        stop = start + width * len(call)
        here = ((places >= start) & (places < stop)).nonzero()[:, 0]
        wanted, start = places[here] - start, stop
        if share is None:
            found = call[:, :width].flatten(0, 1)[wanted]
        else:
            own = wanted.new_full((width,), -1)
            own[share.held] = torch.arange(share.tokens, device=own.device)
            held = (own[wanted] >= 0).nonzero()[:, 0]
            mine = call.new_zeros(len(wanted), call.shape[-1]).index_copy(0, held, call[0, own[wanted[held]]])
            assert share.group is not None
            found = summed(mine, share.group)
        states = states.index_copy(0, here, found)
    return states


def divergences(
    student: AnswerStates,
    teacher: Teacher,
    kind: Divergence,
    temperature: float,
    is_guarded: bool = False,
    table: int = _TABLE,
) -> Tensor:
    """The divergence of student from teacher, averaged over the tokens of each row's answer, `[B]`.

    Args:
        student: Of the policy.
        teacher: Of the reference, on its view of the same rows; without gradient. Of `TopTokens` the divergence is
            that of the likeliest tokens with all others as one, which is never more than that of all.
        kind: "forward" is KL(teacher ‖ student), "reverse" KL(student ‖ teacher), "jsd" the mean of both's KL to their
            mean distribution, at most ln 2.
        temperature: Both's logits are divided by it. The result is not multiplied by its square.
        is_guarded: Weighs each token by 1 − p/q, at least 0, where q and p are what teacher and student give the
            answer's own token: a teacher that is no surer than the student teaches nothing there.
        table: Numbers of a table of tokens × vocabulary that is held at once.
    """

    def of_tokens(mine: Tensor, labels: Tensor, *theirs: Tensor) -> Tensor:
        logits = student.logits(mine)
        log_probs = (logits / temperature).log_softmax(-1)
        if isinstance(teacher, TopTokens):
            tokens, known, sure = theirs
            log_probs = _gathered(log_probs, tokens)
        else:
            with torch.no_grad():
                known = teacher.logits(*theirs)
                sure = _of_labels(known, labels) if is_guarded else known
                known = (known / temperature).log_softmax(-1)
        values = _divergence(log_probs, known, kind)
        if not is_guarded:
            return values
        return values * (1 - (_of_labels(logits.detach(), labels) - sure).exp()).clamp(min=0)

    size = max(1, table // len(student.weight))
    given = (teacher.tokens, teacher.log_probs, teacher.own) if isinstance(teacher, TopTokens) else (teacher.hidden,)
    of_teacher = (torch.cat(each).detach() for each in given)
    tensors = (torch.cat(student.hidden), torch.cat(student.labels), *of_teacher)
    pieces = [
        checkpoint(of_tokens, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(*(each.split(size) for each in tensors), strict=True)
    ]
    tokens: Tensor = torch.cat(pieces)
    lengths = [len(labels) for labels in student.labels]
    return torch.stack([part.sum() / max(len(part), 1) for part in tokens.split(lengths)])


def _divergence(student: Tensor, teacher: Tensor, kind: Divergence) -> Tensor:
    """Of log-probabilities `[tokens, vocabulary]`, `[tokens]`."""
    if kind == "forward":
        return _kl(teacher, student)
    if kind == "reverse":
        return _kl(student, teacher)
    mean = torch.logaddexp(student, teacher) - math.log(2)
    return (_kl(student, mean) + _kl(teacher, mean)) / 2


def _of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels, `[tokens]`."""
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


@torch.no_grad()
def check_states(states: AnswerStates, is_half: bool) -> None:
    """Refuses states that give other log-probabilities than the model was scored with.

    Args:
        states: Of the policy.
        is_half: Whether the model computes in half precision.

    Raises:
        ModelError: If they differ: the head does more than multiply, or the states are those of other tokens.
    """
    size = max(1, _TABLE // len(states.weight))
    found = [
        _of_labels(states.logits(hidden), labels)
        for hidden, labels in zip(
            torch.cat(states.hidden).split(size), torch.cat(states.labels).split(size), strict=True
        )
    ]
    difference = float((torch.cat(found) - torch.cat(states.scores)).abs().mean())
    if not difference <= _BOUNDS[is_half]:
        raise ModelError(
            f"view_distillation_weight: the log-probabilities of this model's answers do not follow from its hidden "
            f"states and its LM head (mean difference {difference:.2g} nats a token, bound {_BOUNDS[is_half]:g}): its "
            "head scales logits. Set view_distillation_weight=0."
        )


class ViewDistillation:
    """The term as the trainer adds it to the loss.

    Attributes:
        weight: `view_distillation_weight`; 0 for no term.
        teacher: What the reference says of the batch at hand.
    """

    def __init__(self, settings: LongVPOConfig) -> None:
        self.weight = settings.view_distillation_weight
        self.teacher: Teacher | None = None
        self._top_k = settings.view_distillation_top_k
        self._kind = settings.view_distillation_divergence
        self._temperature = settings.view_distillation_temperature
        self._is_guarded = settings.view_distillation_guard
        self._is_checked = False

    @property
    def kept(self) -> str:
        """What `top_of` keeps."""
        return f"{self._top_k} at {self._temperature:g}"

    def top_of(self, states: AnswerStates) -> TopTokens:
        """What is kept of the reference's states, for `precompute_ref_log_probs`."""
        return top_tokens(states, self._top_k, self._temperature)

    def losses(self, student: AnswerStates, rows: Tensor | None, is_half: bool) -> Tensor:
        """The term of each row, `[B]`.

        Args:
            student: States of the policy's pass over the rows.
            rows: Which of the teacher's rows they are; None for all.
            is_half: See `check_states`.

        Raises:
            ModelError: On the first batch, see `check_states`.
        """
        teacher, self.teacher = self.teacher, None
        if teacher is None:
            raise RuntimeError("The reference was not scored on this batch: view distillation has no teacher.")
        if not self._is_checked:
            check_states(student, is_half)
            self._is_checked = True
        teacher = teacher if rows is None else teacher.of(rows.tolist())
        if isinstance(teacher, TopTokens):  # its fingerprint tells whose they are
            is_same = [len(labels) for labels in student.labels] == [len(own) for own in teacher.own]
        else:
            is_same = torch.equal(torch.cat(student.labels), torch.cat(teacher.labels))
        if not is_same:
            raise RuntimeError("The reference was scored on other answers than the policy: tokens cannot be compared.")
        return divergences(student, teacher, self._kind, self._temperature, self._is_guarded)
