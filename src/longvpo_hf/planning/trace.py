"""A step of a text model, and view distillation, run for real on fake tensors: the bytes that live, the operations.

Fake tensors have shapes and no contents, so nothing is computed and no memory is taken. The model is on the meta
device; attention is the trainer's own.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from longvpo_hf.training.config import Divergence
from longvpo_hf.training.distillation import AnswerStates, Teacher, TopTokens, divergences
from longvpo_hf.training.packing.attention import Forest, Span, tree_attention
from longvpo_hf.training.packing.sharing import SupposedShare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "longvpo_plan"


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations by torch's own formulas: matrix products, convolutions, attention.

    Under `torch.inference_mode` torch hands over some operators whole, which are then not counted.

    Attributes:
        flops: All of them, attention as full squares.
        skipped: Half of every square of attention that is causal: kernels leave it out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.skipped = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        operator = function.overloadpacket
        formula = _formulas().get(operator)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            self.flops += flops
            if _is_causal(operator, args, kwargs):
                self.skipped += flops // 2
        return result


@cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """Of an operator's arguments and its result; besides torch's own the LM head's backward pass, and experts."""

    def addmm(_: Tensor, left: Tensor, right: Tensor, **kwargs: Any) -> int:
        return 2 * math.prod(left.shape) * right.shape[1]

    def grouped(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
        return 2 * math.prod(left.shape[-2:]) * right.shape[-1]  # each row of one of them belongs to one expert

    return {**flop_registry, torch.ops.aten.addmm_: addmm, torch.ops.aten._grouped_mm: grouped}


def _is_causal(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if not operator.__name__.startswith("_scaled_dot_product"):
        return False
    place = _causal_place(operator)
    return bool(kwargs.get("is_causal", len(args) > place and args[place]))


@cache
def _causal_place(operator: Any) -> int:
    return [argument.name for argument in operator.default._schema.arguments].index("is_causal")


class _Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that live, and their highest number; those of `held` do not count."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


@dataclass(frozen=True, slots=True)
class Trace:
    """What a step of a text model takes; attention counts causally.

    Args:
        saved: Bytes that are kept when the forward pass ends.
        peak: Most bytes that live at once.
        forward_flops: Operations of the forward pass.
        flops: Operations of forward and backward pass.
    """

    saved: float
    peak: float
    forward_flops: float
    flops: float

    def plus(self, other: Trace, times: float) -> Trace:
        """This trace and `times` the other one."""
        mine, others = asdict(self), asdict(other)
        return Trace(**{name: mine[name] + times * others[name] for name in mine})


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a text model.

    Args:
        sequences: `[start, stop)` of each tree, or of each sequence.
        trunk: Tokens of each tree's trunk.
        branches: Tokens of the branches of each row of a tree.
        is_packed: Whether trees lie in one row; else each sequence is a row.
        sharing: How many processes share the row; the step is then the first one's, which holds as many rows as any.
        position_axes: 3 for multimodal rope, else 1.
        dtype: Of the embeddings.
        is_autocast: Whether it computes in bfloat16 under autocast.
        has_backward: Whether a backward pass follows.
    """

    sequences: tuple[tuple[int, int], ...]
    trunk: int
    branches: int
    is_packed: bool
    sharing: int
    position_axes: int
    dtype: torch.dtype
    is_autocast: bool
    has_backward: bool


def trace_step(decoder: PreTrainedModel, step: Step) -> Trace:
    """Runs a step of a text model of the meta device, which is of no use afterwards."""
    _attend_along_trees(decoder)
    mode = FakeTensorMode()
    held = _fake_weights(decoder, mode)
    for part in decoder.modules():
        if isinstance(part, nn.Dropout) and part.p:  # as devices do it: a mask of bytes, not of floats
            part.forward = partial(_dropout, part.p)  # type: ignore[method-assign]
    for weight in decoder.parameters():
        if weight.requires_grad:  # gradients are counted apart
            weight.register_post_accumulate_grad_hook(_drop_gradient)
    with mode, _delta_rule_at_once(decoder):
        spans = _spans(step)
        followed = SupposedShare(spans, step.sharing) if step.sharing > 1 else Forest(spans)
        forest = {"longvpo_tree": followed} if step.is_packed else {}
        inputs = _inputs(step, decoder.config.hidden_size, followed.tokens)
        counter, ledger = FlopCounter(), _Ledger([*held, *inputs.values(), *(span.sees for span in spans)])
        with ledger, counter, torch.set_grad_enabled(step.has_backward):
            with torch.autocast("cpu", torch.bfloat16) if step.is_autocast else nullcontext():
                output = decoder(use_cache=False, **inputs, **forest).last_hidden_state
            saved, forward = ledger.live, counter.flops - counter.skipped
            if step.has_backward:
                gradient = torch.empty_like(output)
                del forest, followed
                output.backward(gradient)
    return Trace(saved, ledger.peak, forward, counter.flops - counter.skipped)


@dataclass(frozen=True, slots=True)
class Distilled:
    """View distillation of a batch, once both models have run.

    Args:
        answers: Tokens of each answer that is distilled.
        width: Of the hidden states.
        vocabulary: Of the head.
        kept: How many of the reference's likeliest tokens were precomputed; None where it has hidden states.
        divergence: See `LongVPOConfig`.
        is_guarded: See `LongVPOConfig`.
        is_head_trained: Whether the head's weight has a gradient.
        weight_dtype: Of the head.
        dtype: Of the hidden states.
    """

    answers: tuple[int, ...]
    width: int
    vocabulary: int
    kept: int | None
    divergence: Divergence
    is_guarded: bool
    is_head_trained: bool
    weight_dtype: torch.dtype
    dtype: torch.dtype


def trace_distillation(step: Distilled) -> Trace:
    """Runs the term and its backward pass; what it takes of the models, hidden states of the answers, counts."""
    with FakeTensorMode():
        weight, its_own = (torch.empty(step.vocabulary, step.width, dtype=step.weight_dtype) for _ in range(2))
        weight.requires_grad_(step.is_head_trained)
        if step.is_head_trained:
            weight.register_post_accumulate_grad_hook(_drop_gradient)  # gradients are counted apart
        counter, ledger = FlopCounter(), _Ledger([weight, its_own])
        with ledger, counter:
            labels = tuple(torch.zeros(tokens, dtype=torch.long) for tokens in step.answers)

            def states(head: Tensor, has_gradient: bool) -> AnswerStates:
                hidden = [
                    torch.empty(tokens, step.width, dtype=step.dtype, requires_grad=has_gradient)
                    for tokens in step.answers
                ]
                return AnswerStates(tuple(hidden), labels, (), head)

            student = states(weight, has_gradient=True)
            teacher: Teacher = states(its_own, has_gradient=False)
            if step.kept is not None:
                shapes = [(tokens, min(step.kept, step.vocabulary)) for tokens in step.answers]
                teacher = TopTokens(
                    tuple(torch.zeros(shape, dtype=torch.long) for shape in shapes),
                    tuple(torch.empty(tokens, k + (k < step.vocabulary)) for tokens, k in shapes),
                    tuple(torch.empty(tokens) for tokens in step.answers),
                )
            term = divergences(student, teacher, step.divergence, 1.0, step.is_guarded).mean()
            saved, forward = ledger.live, counter.flops
            term.backward()
    return Trace(saved, ledger.peak, forward, counter.flops)


def _attend_along_trees(decoder: PreTrainedModel) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, tree_attention)
    # Trees need no mask. transformers would build one, since it cannot see that fake tensors have no contents.
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    decoder.set_attn_implementation(_ATTENTION)


@contextmanager
def _delta_rule_at_once(decoder: PreTrainedModel) -> Iterator[None]:
    """Within, linear attention (gated delta rule) takes all chunks of a sequence at once.

    PyTorch's way is a loop over chunks of 64 tokens, which takes minutes on fake tensors of long videos.
    """
    name = "torch_chunk_gated_delta_rule"
    found = {type(part).__module__ for part in decoder.modules()}
    modules = [sys.modules[module] for module in found if hasattr(sys.modules[module], name)]
    loops = [getattr(module, name) for module in modules]
    for module in modules:
        setattr(module, name, _delta_rule)
    try:
        yield
    finally:
        for module, loop in zip(modules, loops, strict=True):
            setattr(module, name, loop)


def _delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The products of the gated delta rule for tensors without contents, in float32 as PyTorch's way has them.

    Shapes are those of transformers: query and key `[rows, tokens, key heads, width]`, value `[rows, tokens, heads,
    width]`, g and beta `[rows, tokens, heads]`.
    """
    tokens, heads, dtype = value.shape[1], value.shape[2], value.dtype
    query, key = (each.repeat_interleave(heads // key.shape[2], dim=2) for each in (query, key))
    padding = -tokens % 64

    def chunks(each: Tensor) -> Tensor:
        return F.pad(each.float().transpose(1, 2), (0, 0, 0, padding)).unflatten(2, (-1, 64))

    query, key, value, g, beta = map(chunks, (query, key, value, g[..., None], beta[..., None]))
    decay = (g.cumsum(3) - g.cumsum(3).transpose(3, 4)).exp()
    system, within = (key * beta) @ key.mT * decay, query @ key.mT * decay
    written, read = (
        torch.linalg.solve_triangular(system, right * beta, upper=False, unitriangular=True) for right in (value, key)
    )
    states = key.mT @ written
    new = written - read @ states
    mixed = query @ states + within @ new
    return mixed.flatten(2, 3)[:, :, :tokens].transpose(1, 2).to(dtype), None


def _inputs(step: Step, width: int, packed: int) -> dict[str, Tensor]:
    """The arguments of the call; `packed` are the tokens of a packed row."""
    rows, length = (1, packed) if step.is_packed else (len(step.sequences), step.sequences[0][1])
    axes = () if step.position_axes == 1 else (step.position_axes,)
    return {
        "inputs_embeds": torch.empty(rows, length, width, dtype=step.dtype, requires_grad=step.has_backward),
        "attention_mask": torch.empty(rows, length, dtype=torch.long),
        "position_ids": torch.empty((*axes, rows, length), dtype=torch.long),
    }


def _spans(step: Step) -> list[Span]:
    """What a tree's attention needs."""
    spans = []
    for start, stop in step.sequences:
        branch, size = start + step.trunk, stop - start - step.trunk
        rows = (step.branches,) * (size // step.branches) if step.is_packed else (size,)
        spans.append(Span(start, branch, stop, torch.empty(size, size, dtype=torch.bool), rows))
    return spans


def _fake_weights(module: nn.Module, mode: FakeTensorMode) -> list[Tensor]:
    """Gives a module of the meta device fake weights; returns them."""
    made: dict[int, Tensor] = {}

    def faked(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made[id(tensor)]

    kept: list[Tensor] = []  # the originals, so that no other tensor takes their id
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                kept.append(weight)
                part._parameters[name] = nn.Parameter(faked(weight), requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                kept.append(buffer)
                part._buffers[name] = faked(buffer)
    return [*module.parameters(), *module.buffers()]


def _dropout(share: float, hidden: Tensor) -> Tensor:
    return torch.native_dropout(hidden, share, True)[0]


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None
