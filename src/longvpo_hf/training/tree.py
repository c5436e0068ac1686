"""One forward for every answer about a timeline: rows that share a video are packed into a tree and scored together.

Takes a model with TRL's fused LM head and a batch of the collator: `input_ids`, `attention_mask`, `completion_mask`
[2B, L] (right padded, row i is prompt + chosen, row B + i prompt + rejected), `videos` (the processor's tensors, each
timeline once), `video_index` [B] (which of them a row shows, -1 for none) and, where the processor gives them,
`mm_token_type_ids` [2B, L]. Gives TRL's `FusedCausalLMOutput` with per-token fields [2B, L - 1], two ways that agree:

- `plain_forward`: the ordinary two sequences per row, each with its own copy of the video;
- `tree_forward`: one sequence per batch. Per timeline a *trunk* (the longest common prefix of the prompts, with all
  visual tokens), then for each row the rest of its question and under it two answers:

      trunk | question 1 | chosen 1 | rejected 1 | question 2 | chosen 2 | rejected 2 | …

  Each answer begins with its own copy of the last prompt token (one position predicts one next token) and leaves its
  last token out (that one predicts nothing), so a position of an answer predicts exactly one token of it. Positions
  restart in every branch where its parent ends. A token sees its trunk, its question and its own answer, nothing else.

What makes it cheap: the trunk, nearly all of the tokens, goes once through the vision tower and the text model, by
plain causal attention; only the few branch tokens need a mask, of [branch tokens, tree tokens]. Trees of several
timelines lie behind one another in one row without padding.

`enable_tree_packing` puts the attention function in place, or says why a model cannot take it. Knows nothing of losses,
reference models, rows or videos. Load-balancing losses of mixture-of-experts models are over the tokens of the tree.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import FusedCausalLMOutput

from longvpo_hf.families.encoding import concatenate_visuals, visual_shapes

ATTENTION = "longvpo_tree"
"""Name of the attention function, and of the model kwarg that tells it the trees."""

Batch = Mapping[str, Any]

_TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
_UNSUPPORTED_KWARGS = ("sliding_window", "softcap", "position_bias", "s_aux")
_BIAS_ALIGNMENT = 16  # CUDA's memory-efficient kernel copies a bias whose rows are not aligned, in every layer


# ---------------------------------------------------------------------------------------------- public


def enable_tree_packing(model: Any) -> str | None:
    """Readies `model` for `tree_forward`. Its calls without a tree (generation, plain batches) stay ordinary SDPA.

    Args:
        model: A transformers model, or a PEFT model around one; before or after TRL's fused head was added.

    Returns:
        `None` when the model is ready. Otherwise the reason, in plain English, why it cannot be packed; the model is
        then as it was.
    """
    base = unwrapped(model)
    decoder = base.get_decoder()
    before = decoder.config._attn_implementation
    if before == ATTENTION:
        return None
    reason = _reason_in_config(model, base, decoder)
    if reason is not None:
        return reason
    decoder.set_attn_implementation(ATTENTION)
    reason = _reason_in_probe(base, decoder)
    if reason is not None:
        decoder.set_attn_implementation(before)
    return reason


def is_tree_packed(model: Any) -> bool:
    """Whether `enable_tree_packing` readied `model` (wrapped or not) and nobody changed its attention since."""
    return unwrapped(model).get_decoder().config._attn_implementation == ATTENTION


def plain_forward(model: Any, batch: Batch, **kwargs: Any) -> FusedCausalLMOutput:
    """Two sequences per row, each with its own copy of the video.

    One call of the model; more only where the visual tensors of different videos cannot be concatenated.

    Args:
        model: A model with TRL's fused LM head, wrapped or not.
        batch: See the module.
        kwargs: Passed on to the model.

    Returns:
        Per-token fields [2B, L - 1], zero where no answer token is predicted.
    """
    input_ids = batch["input_ids"]
    labels = input_ids.masked_fill(batch["completion_mask"] == 0, -100)
    index = batch["video_index"].tolist()
    parts = _concatenable([[row] for row in range(len(index))], index, batch["videos"])
    outputs, source = [], torch.full_like(input_ids[:, 1:], -1)
    done = 0
    for part in parts:
        rows = sorted(row for (row,) in part)
        both = torch.tensor(rows + [row + len(index) for row in rows], device=input_ids.device)
        visual = concatenate_visuals([batch["videos"][index[row]] for row in rows * 2 if index[row] >= 0])
        if "mm_token_type_ids" in batch:
            visual["mm_token_type_ids"] = batch["mm_token_type_ids"][both]
        output = _checked(
            model(
                input_ids=input_ids[both],
                attention_mask=batch["attention_mask"][both],
                labels=labels[both],
                fused_lm_head=True,
                **visual,
                **kwargs,
            )
        )
        if len(parts) == 1:
            return output
        outputs.append(output)
        width = output.log_probs.shape[1]  # prompt learning puts virtual tokens before the real ones
        places = torch.arange(done, done + output.log_probs.numel(), device=input_ids.device).view(len(both), width)
        source[both] = places[:, -source.shape[1] :]
        done += places.numel()
    return _at(outputs, source)


def tree_forward(model: Any, batch: Batch, **kwargs: Any) -> FusedCausalLMOutput:
    """All answers of a batch in one sequence; equal to `plain_forward`, several times cheaper.

    One call of the model; more only where the visual tensors of different videos cannot be concatenated
    (LLaVA-OneVision with different numbers of frames). Processes that make different numbers of calls wait for one
    another for ever under FSDP and ZeRO-3: keep to one timeline per device there.

    Args:
        model: A model with TRL's fused LM head that `enable_tree_packing` accepted, wrapped or not.
        batch: See the module.
        kwargs: Passed on to the model.

    Returns:
        Per-token fields [2B, L - 1], zero where no answer token is predicted.

    Raises:
        RuntimeError: If the model's layers did not all attend along the tree; the numbers would be wrong.
        ValueError: If the batch is not as described in the module.
    """
    base = unwrapped(model)
    decoder = base.get_decoder()
    if not is_tree_packed(base):
        raise RuntimeError(
            f"The text model of {type(base).__name__} attends by {decoder.config._attn_implementation!r}, which "
            f"ignores trees: call enable_tree_packing(model) first and keep the attention implementation it sets."
        )
    input_ids = batch["input_ids"]
    index = batch["video_index"].tolist()
    visual_tokens = _visual_tokens(base, batch)
    trees = [part for group in _same_video(index) for part in _trunks(batch, group, visual_tokens)]
    outputs, source = [], torch.full_like(input_ids[:, 1:], -1)
    done = 0
    for part in _concatenable([tree.rows for tree in trees], index, batch["videos"]):
        planted = [tree for tree in trees if tree.rows in part]
        packed = _pack(batch, planted, [_trunk_positions(base, batch, tree, index[tree.rows[0]]) for tree in planted])
        output = model(
            input_ids=packed.input_ids,
            attention_mask=torch.ones_like(packed.input_ids),
            position_ids=packed.position_ids,
            shift_labels=packed.shift_labels,
            fused_lm_head=True,
            **{ATTENTION: packed.forest},
            **concatenate_visuals(
                [batch["videos"][index[tree.rows[0]]] for tree in planted if index[tree.rows[0]] >= 0]
            ),
            **kwargs,
        )
        outputs.append(_checked(output))
        if packed.forest.calls != decoder.config.num_hidden_layers:
            raise RuntimeError(
                f"{packed.forest.calls} attention layers of {type(base).__name__} saw the tree, expected all "
                f"{decoder.config.num_hidden_layers}: the log-probabilities would be wrong. Train this model without "
                f"tree packing."
            )
        source = torch.where(packed.source >= 0, packed.source + done, source)
        done += packed.input_ids.shape[1]
    return _at(outputs, source)


# ------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True, slots=True)
class _Span:
    """One tree in the packed row: trunk [start, branches), branches [branches, end)."""

    start: int
    branches: int
    end: int
    sees: Tensor
    """Bool [n, n] among the n = end - branches branch tokens: row sees column."""


class _Forest:
    """The trees of one packed row, as attention needs them, and how many layers attended along them.

    No dataclass, on purpose: FSDP copies dataclasses among the kwargs, and the copy would do the counting.
    """

    def __init__(self, spans: Sequence[_Span]) -> None:
        self.spans = spans
        self.calls = 0
        self._biases: dict[tuple[int, torch.dtype, int], Tensor] = {}

    def bias(self, number: int, dtype: torch.dtype, groups: int) -> Tensor:
        """What is added to the scores of tree `number`: [groups * branch tokens, tree tokens], 0 or -inf.

        Made once and kept, so that all layers save one and the same tensor for the backward pass.
        """
        key = (number, dtype, groups)
        if key not in self._biases:
            span = self.spans[number]
            width = span.end - span.start
            aligned = -(-width // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
            bias = torch.zeros(span.end - span.branches, aligned, dtype=dtype, device=span.sees.device)
            bias[:, span.branches - span.start : width].masked_fill_(~span.sees, float("-inf"))
            self._biases[key] = bias.repeat(groups, 1)[:, :width]
        return self._biases[key]


def _sees(question: Tensor, answer: Tensor) -> Tensor:
    """Which branch token sees which: itself, and what stands before it in its own question and answer.

    Args:
        question: Int [n], the row whose branch a token belongs to.
        answer: Int [n], 0 in the rest of the question, 1 in the chosen and 2 in the rejected answer.

    Returns:
        Bool [n, n], row sees column.
    """
    place = torch.arange(len(question), device=question.device)
    before = place[:, None] >= place
    own_answer = (answer == 0) | (answer[:, None] == answer)
    return before & (question[:, None] == question) & own_answer


def _tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    longvpo_tree: _Forest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention along the trees; ordinary SDPA when told of none.

    Args:
        query: [1, heads, tokens, width]; `key` and `value` have their own, fewer, heads.

    Returns:
        [1, tokens, heads, width] and None, as the `AttentionInterface` has it.
    """
    if longvpo_tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    name = type(module).__name__
    refused = [f"{kwarg}={kwargs[kwarg]}" for kwarg in _UNSUPPORTED_KWARGS if kwargs.get(kwarg) is not None]
    if attention_mask is not None:
        refused.append(f"a mask of shape {tuple(attention_mask.shape)}")
    tokens = longvpo_tree.spans[-1].end
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        refused.append(f"queries {tuple(query.shape)} and keys {tuple(key.shape)} for a tree of {tokens} tokens")
    if refused:
        raise RuntimeError(
            f"Tree attention cannot serve {name}: it was called with {', '.join(refused)}. Train this model without "
            f"tree packing."
        )
    longvpo_tree.calls += 1

    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
    groups = heads // kv_heads
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    pieces = []
    for number, span in enumerate(longvpo_tree.spans):
        if span.branches > span.start:
            trunk = slice(span.start, span.branches)
            pieces.append(
                sdpa_attention_forward(
                    module,
                    query[:, :, trunk],
                    key[:, :, trunk],
                    value[:, :, trunk],
                    None,
                    dropout=dropout,
                    scaling=scaling,
                    is_causal=True,
                )[0]
            )
        # The query heads that share a key head become more query rows of it: keys and values are never copied.
        branches = query[:, :, span.branches : span.end].reshape(1, kv_heads, -1, width)
        attended = F.scaled_dot_product_attention(
            branches,
            key[:, :, span.start : span.end],
            value[:, :, span.start : span.end],
            attn_mask=longvpo_tree.bias(number, dtype, groups),
            dropout_p=dropout,
            scale=scaling,
        )
        pieces.append(attended.reshape(1, heads, span.end - span.branches, -1).transpose(1, 2))
    return torch.cat(pieces, dim=1), None


AttentionInterface.register(ATTENTION, _tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# --------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True, slots=True)
class _Tree:
    """Which rows share a trunk, and how long it is: prompts[row] tokens of a row are its prompt, `trunk` are common."""

    rows: list[int]
    trunk: int
    prompts: dict[int, int]


@dataclass(frozen=True, slots=True)
class _Packed:
    """A packed row of T tokens.

    Args:
        input_ids: [1, T].
        position_ids: [1, T], or [3, 1, T] for multimodal rope.
        shift_labels: [1, T], the token each position is to predict; -100 where none.
        source: [2B, L - 1], the place in the packed row that predicts a row's next token; -1 where none.
        forest: What attention needs.
    """

    input_ids: Tensor
    position_ids: Tensor
    shift_labels: Tensor
    source: Tensor
    forest: _Forest


def _same_video(index: Sequence[int]) -> list[list[int]]:
    """Rows grouped by the video they show, in order of appearance; a row without video is alone."""
    groups: dict[int, list[int]] = {}
    for row, video in enumerate(index):
        groups.setdefault(video if video >= 0 else -1 - row, []).append(row)
    return list(groups.values())


def _trunks(batch: Batch, rows: list[int], visual_tokens: Tensor) -> list[_Tree]:
    """The tree of rows that show one video; a tree for each row where their prompts part before the video ends.

    The trunk leaves at least the last prompt token to the branches.

    Args:
        visual_tokens: Bool [2B, L].
    """
    input_ids, pairs = batch["input_ids"], len(batch["video_index"])
    prompts = {row: _prompt_length(batch, row, row + pairs) for row in rows}
    shortest = min(prompts.values())
    ids = input_ids[rows, :shortest]
    common = int((ids == ids[:1]).all(dim=0).long().cumprod(dim=0).sum())
    trunk = min(common, shortest - 1)
    if not any(bool(visual_tokens[row, trunk : prompts[row]].any()) for row in rows):
        return [_Tree(rows, trunk, prompts)]
    if len(rows) == 1:
        raise ValueError(
            f"The prompt of row {rows[0]} ends in a visual token: it must end in text, such as the answer's header."
        )
    return [tree for row in rows for tree in _trunks(batch, [row], visual_tokens)]


def _prompt_length(batch: Batch, chosen: int, rejected: int) -> int:
    """How many tokens the prompt of a pair has.

    Raises:
        ValueError: If the two rows do not begin with one and the same prompt of at least one token.
    """
    lengths = []
    for row in (chosen, rejected):
        answer = batch["completion_mask"][row].nonzero()
        lengths.append(int(answer[0]) if len(answer) else int(batch["attention_mask"][row].sum()))
    ids, length = batch["input_ids"], lengths[0]
    if length < 1 or length != lengths[1] or not torch.equal(ids[chosen, :length], ids[rejected, :length]):
        raise ValueError(
            f"Rows {chosen} (chosen) and {rejected} (rejected) must begin with one prompt of at least 1 token, got "
            f"prompts of {lengths[0]} and {lengths[1]} tokens: tokenize the prompt apart from the answers."
        )
    return length


def _pack(batch: Batch, trees: Sequence[_Tree], trunk_positions: Sequence[Tensor]) -> _Packed:
    """Lays trees behind one another.

    Args:
        trunk_positions: For each tree [axes, trunk + 1]: positions of its trunk and of the first token after it.
    """
    input_ids, completion_mask = batch["input_ids"], batch["completion_mask"]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    pairs, device = len(lengths) // 2, input_ids.device
    source = torch.full_like(input_ids[:, 1:], -1)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    labels: list[Tensor] = []
    spans: list[_Span] = []
    placed = 0

    def add(row: int, begin: int, end: int, at: Tensor, answers: bool) -> int:
        nonlocal placed
        ids.append(input_ids[row, begin:end])
        positions.append(at)
        if answers:
            wanted = slice(begin + 1, end + 1)
            labels.append(input_ids[row, wanted].masked_fill(completion_mask[row, wanted] == 0, -100))
            source[row, begin:end] = torch.arange(placed, placed + end - begin, device=device)
        else:
            labels.append(torch.full_like(input_ids[row, begin:end], -100))
        placed += end - begin
        return end - begin

    for tree, trunk in zip(trees, trunk_positions, strict=True):
        start = placed
        add(tree.rows[0], 0, tree.trunk, trunk[:, :-1], answers=False)
        branches, questions, answers = placed, [], []
        for row in tree.rows:
            last = tree.prompts[row] - 1
            parent_end = trunk[:, -1:]
            added = [add(row, tree.trunk, last, _restart(parent_end, last - tree.trunk), answers=False)]
            parent_end = parent_end + last - tree.trunk
            for answer in (row, row + pairs):
                size = max(lengths[answer] - 1 - last, 0)
                added.append(add(answer, last, last + size, _restart(parent_end, size), answers=True))
            questions += [row] * sum(added)
            answers += [kind for kind, size in enumerate(added) for _ in range(size)]
        sees = _sees(torch.tensor(questions, device=device), torch.tensor(answers, device=device))
        spans.append(_Span(start, branches, placed, sees))

    axes = torch.cat(positions, dim=1)
    return _Packed(
        input_ids=torch.cat(ids)[None],
        position_ids=axes if len(axes) == 1 else axes[:, None],
        shift_labels=torch.cat(labels)[None],
        source=source,
        forest=_Forest(spans),
    )


def _restart(first: Tensor, size: int) -> Tensor:
    """Positions [axes, size] of a branch whose first token stands at `first` [axes, 1], whatever lies before it."""
    return first + torch.arange(size, device=first.device)


def _trunk_positions(base: PreTrainedModel, batch: Batch, tree: _Tree, video: int) -> Tensor:
    """Positions [axes, trunk + 1] of a trunk and of the text token after it, as the backbone counts them.

    axes is 3 for multimodal rope (time, height, width), else 1.
    """
    row, size = tree.rows[0], tree.trunk + 1
    input_ids = batch["input_ids"][row : row + 1, :size]
    rope_index = getattr(base.base_model, "get_rope_index", None)
    plain = torch.arange(size, device=input_ids.device)[None]
    if rope_index is None:
        return plain
    if video < 0:
        return plain.expand(3, -1)
    if "mm_token_type_ids" not in batch:
        raise ValueError(
            f"{type(base).__name__} finds its positions by `mm_token_type_ids`, which the batch lacks: keep what the "
            f"processor returns under that name."
        )
    known = {
        **batch["videos"][video],
        "input_ids": input_ids,
        "mm_token_type_ids": batch["mm_token_type_ids"][row : row + 1, :size],
        "attention_mask": torch.ones_like(input_ids),
    }
    wanted = inspect.signature(rope_index).parameters
    positions, _ = rope_index(**{name: value for name, value in known.items() if name in wanted})
    return positions[:, 0]


# ---------------------------------------------------------------------------------------------- videos


def _visual_tokens(base: PreTrainedModel, batch: Batch) -> Tensor:
    """Bool [2B, L], true on placeholders of visual features."""
    if "mm_token_type_ids" in batch:
        return batch["mm_token_type_ids"] != 0
    names = ("image_token_id", "video_token_id")
    ids = [token for name in names if (token := getattr(base.config, name, None)) is not None]
    return torch.isin(batch["input_ids"], torch.tensor(ids, dtype=torch.long, device=batch["input_ids"].device))


def _concatenable(
    groups: Sequence[list[int]], index: Sequence[int], videos: Sequence[Mapping[str, Tensor]]
) -> list[list[list[int]]]:
    """Groups of rows parted into as few forwards as their videos' shapes allow; groups without video join the first."""
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


# --------------------------------------------------------------------------------------------- outputs


def _checked(output: Any) -> Any:
    """The output, if TRL's fused LM head made it."""
    if getattr(output, "log_probs", None) is None:
        raise RuntimeError(
            f"The model returned {type(output).__name__} without log_probs: give it TRL's fused LM head with "
            f"trl.trainer.utils.add_fused_lm_head(model)."
        )
    return output


def _at(outputs: Sequence[Any], source: Tensor) -> FusedCausalLMOutput:
    """Per-token fields at the places `source` [2B, L - 1] names, counted over all outputs laid end to end; 0 for -1."""
    nowhere, place = source < 0, source.clamp(min=0)
    fields = {}
    for name in _TOKEN_FIELDS:
        values = [getattr(output, name) for output in outputs]
        if all(value is not None for value in values):
            flat = torch.cat([value.reshape(-1) for value in values])
            fields[name] = flat[place.to(flat.device)].masked_fill(nowhere.to(flat.device), 0)
    counts = torch.stack([output.label_mask.sum() for output in outputs])
    shares = counts / counts.sum().clamp(min=1)
    aux = [output.aux_loss for output in outputs if output.aux_loss is not None]
    return FusedCausalLMOutput(
        loss=torch.stack([share * output.loss for share, output in zip(shares, outputs, strict=True)]).sum(),
        aux_loss=torch.stack(aux).mean() if aux else None,
        **fields,
    )


# ----------------------------------------------------------------------------------------------- guards


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    if isinstance(model, torch.nn.DataParallel):
        raise ValueError(
            f"torch.nn.DataParallel splits a batch by rows, and a packed batch is one row: start one process a device "
            f"(accelerate launch) instead of one for {len(model.device_ids)}."
        )
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def _reason_in_config(model: Any, base: PreTrainedModel, decoder: PreTrainedModel) -> str | None:
    """Why the model's configuration rules packing out, or None."""
    name, config = type(base).__name__, decoder.config
    implementation = config._attn_implementation
    layer_types = getattr(config, "layer_types", None)
    others = sorted({kind for kind in layer_types or () if kind != "full_attention"})
    window = getattr(config, "sliding_window", None) if layer_types is None else None
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder (is_encoder_decoder=True); packing needs one causal sequence."
    if others:
        return f"{name} has text layers of other kinds than full attention (layer_types has {', '.join(others)})."
    if window is not None:
        return f"{name} attends within a sliding window (sliding_window={window}); packing needs full attention."
    if base._is_stateful or decoder._is_stateful:
        return f"{name} carries a recurrent state from token to token ({type(decoder).__name__}._is_stateful=True)."
    if implementation != "sdpa":
        return (
            f"the text model of {name} attends by {implementation!r} (attn_implementation); packing extends SDPA only: "
            f'load it with attn_implementation="sdpa".'
        )
    if not decoder._can_set_attn_implementation():
        return f"{type(decoder).__name__} does not take its attention function from transformers' AttentionInterface."
    if isinstance(inner, PeftModel) and inner.active_peft_config.is_prompt_learning:
        return f"{name} is trained by prompt learning (peft_type={inner.active_peft_config.peft_type.value})."
    return None


@torch.no_grad()
def _reason_in_probe(base: PreTrainedModel, decoder: PreTrainedModel) -> str | None:
    """Why the text model, tried on two pairs of a few tokens, cannot be packed, or None.

    A model whose weights are not here (meta, ZeRO-3, FSDP) is not tried; `tree_forward` still counts its layers.
    """
    weights = list(decoder.parameters())
    if any(weight.is_meta or weight.numel() == 0 or isinstance(weight, DTensor) for weight in weights):
        return None
    name = type(base).__name__
    prompt, device = [3, 1, 4, 1, 5], weights[0].device
    rows = [[*prompt, 9, 2, 6], [*prompt, 5, 3, 5], [*prompt, 9, 7], [*prompt, 5, 9, 3, 2]]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
        "video_index": torch.tensor([0, 0], device=device),
    }
    batch["completion_mask"] = batch["attention_mask"].clone()
    batch["completion_mask"][:, : len(prompt) + 1] = 0
    places = torch.arange(width, device=device)[None]
    tree = _Tree([0, 1], len(prompt), {0: len(prompt) + 1, 1: len(prompt) + 1})
    packed = _pack(batch, [tree], [places[:, : len(prompt) + 1]])
    training = {module: module.training for module in decoder.modules()}
    decoder.eval()
    try:
        plain = decoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=places.expand(len(rows), -1),
            use_cache=False,
        ).last_hidden_state
        planted = decoder(
            input_ids=packed.input_ids,
            attention_mask=torch.ones_like(packed.input_ids),
            position_ids=packed.position_ids,
            use_cache=False,
            **{ATTENTION: packed.forest},
        ).last_hidden_state
    except Exception as error:  # whatever it is, it would come in training too: said, and the plain way taken
        return f"{type(decoder).__name__} failed on a probe: {error}"
    finally:
        for module, mode in training.items():
            module.training = mode
    if packed.forest.calls != decoder.config.num_hidden_layers:
        return (
            f"{packed.forest.calls} attention layers of {name} take their attention function from transformers' "
            f"AttentionInterface, expected all {decoder.config.num_hidden_layers} (num_hidden_layers)."
        )
    answers = packed.source >= 0
    expected = plain[:, :-1][answers].float()
    got = planted[0, packed.source[answers]].float()
    difference = float((got - expected).norm() / expected.norm())
    bound = 1e-3 if plain.dtype == torch.float32 else 0.1
    if not difference <= bound:
        return (
            f"the text model of {name} gave other results for a packed probe than for separate sequences (relative "
            f"difference {difference:.2g}, bound {bound:g}): something besides attention mixes its tokens."
        )
    return None
