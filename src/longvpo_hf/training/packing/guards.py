"""Which models can be packed: their configuration is read, and their text model tried on a small tree.

A model that cannot be packed keeps its attention, and the reason is given in plain English.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from longvpo_hf.families import family_of
from longvpo_hf.training.packing import recurrent
from longvpo_hf.training.packing.attention import ATTENTION, Forest, planted
from longvpo_hf.training.packing.tree import Packed, Tree, pack

if TYPE_CHECKING:
    from longvpo_hf.training.packing.sharing import Share


def enable_tree_packing(model: Any) -> str | None:
    """Prepares `model` for `tree_forward`. Its calls without a tree (generation, plain batches) stay ordinary SDPA.

    Args:
        model: A transformers model, or a PEFT model around one; before or after TRL's fused head was added.

    Returns:
        `None` when the model is ready. Otherwise the reason, in plain English, why it cannot be packed; the model is
        then unchanged.
    """
    base = unwrapped(model)
    decoder = base.get_decoder()
    if decoder.config._attn_implementation == ATTENTION:
        return None
    reason = _reason_in_config(model, base, decoder)
    if reason is not None:
        return reason
    decoder.set_attn_implementation(ATTENTION)
    recurrent.plant(decoder)
    reason = _reason_in_probe(base, decoder)
    if reason is not None:
        disable_tree_packing(base)
        return reason
    recurrent.log_kernels(decoder)
    return None


def disable_tree_packing(model: Any) -> None:
    """Undoes `enable_tree_packing`: the model, wrapped or not, is as it was before."""
    decoder = unwrapped(model).get_decoder()
    if decoder.config._attn_implementation == ATTENTION:
        decoder.set_attn_implementation("sdpa")  # no other is accepted
        recurrent.uproot(decoder)


def is_tree_packed(model: Any) -> bool:
    """Whether `enable_tree_packing` prepared `model` (wrapped or not) and its attention was not changed since."""
    return unwrapped(model).get_decoder().config._attn_implementation == ATTENTION


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    if isinstance(model, torch.nn.DataParallel):
        raise ValueError(
            f"torch.nn.DataParallel splits a batch by rows, and a packed batch is one row: start one process a device "
            f"(accelerate launch) instead of one for {len(model.device_ids)}."
        )
    inner = model
    # accelerate looks through all modules for compiled ones: with adapters some thousands, several times a step.
    if not isinstance(model, (PeftModel, PreTrainedModel)) or "_orig_mod" in model.__dict__:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def _reason_in_config(model: Any, base: PreTrainedModel, decoder: PreTrainedModel) -> str | None:
    """Why the model's configuration rules packing out, or None."""
    name, config = type(base).__name__, decoder.config
    implementation = config._attn_implementation
    layer_types = list(getattr(config, "layer_types", None) or ())
    mixers = recurrent.mixers(decoder)
    packed = {"full_attention", "sliding_attention"}
    if mixers and len(mixers) == layer_types.count("linear_attention"):
        packed.add("linear_attention")
    others = sorted(set(layer_types) - packed)
    both_ways = getattr(config, "use_bidirectional_attention", None)
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder (is_encoder_decoder=True); packing needs one causal sequence."
    if others:
        return f"{name} has text layers of kinds that cannot follow trees (layer_types has {', '.join(others)})."
    if both_ways:
        return f"visual tokens of {name} attend both ways (use_bidirectional_attention={both_ways!r})."
    if (base._is_stateful or decoder._is_stateful) and not mixers:
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


def reason_not_shared(model: Any) -> str | None:
    """Why several processes cannot share a timeline of a model that takes trees, in plain English; None if they can.

    Args:
        model: A model that `enable_tree_packing` accepted, wrapped or not.
    """
    base = unwrapped(model)
    name, config = type(base).__name__, base.get_decoder().config
    if recurrent.mixers(base.get_decoder()):
        return f"{name} has layers of linear attention, whose state goes through all tokens one after another."
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        window is not None and not getattr(config, "layer_types", None)
    ):
        return f"{name} has layers with a sliding window (sliding_window={window})."
    if family_of(base.config).units is None:
        return f"the video of a {base.config.model_type!r} cannot be parted into frames that processes share."
    return None


def reason_in_calls(base: PreTrainedModel, forest: Forest | Share) -> str | None:
    """Why the calls of a model's layers with a tree were not those that they should be, or None."""
    config = base.get_decoder().config
    kinds = list(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    windowed = kinds.count("sliding_attention") if kinds else (config.num_hidden_layers if window is not None else 0)
    for count, what, expected in (
        (forest.calls, "attention layers", config.num_hidden_layers),
        (forest.windowed_calls, "layers with a sliding window", windowed),
    ):
        if count != expected:
            return (
                f"{count} {what} of {type(base).__name__} follow a tree (they take their attention function from "
                f"transformers' AttentionInterface), expected {expected}."
            )
    return None


@torch.no_grad()
def _reason_in_probe(base: PreTrainedModel, decoder: PreTrainedModel) -> str | None:
    """Why the text model, tried on two pairs of a few tokens, cannot be packed, or None.

    A model whose weights are elsewhere (meta, ZeRO-3, FSDP) is not tried; `tree_forward` still counts its layers.
    """
    weights = list(decoder.parameters())
    if any(weight.is_meta or weight.numel() == 0 or isinstance(weight, DTensor) for weight in weights):
        return None
    name = type(base).__name__
    batch, packed = _probe(weights[0].device)
    try:
        plain, along = _hidden_states(decoder, batch, packed)
    except Exception as error:  # it would come in training too: the reason is given and the plain way taken
        return f"{type(decoder).__name__} failed on a probe: {error}"
    reason = reason_in_calls(base, packed.forest)
    if reason is not None:
        return reason
    answers = packed.source >= 0
    expected = plain[:, :-1][answers].float()
    got = along[0, packed.source[answers]].float()
    difference = float((got - expected).norm() / expected.norm())
    bound = 1e-3 if plain.dtype == torch.float32 else 0.1
    if not difference <= bound:
        return (
            f"the text model of {name} gave other results for a packed probe than for separate sequences (relative "
            f"difference {difference:.2g}, bound {bound:g}): something besides attention mixes its tokens."
        )
    return None


def _probe(device: torch.device) -> tuple[dict[str, Tensor], Packed]:
    """Two pairs of a few tokens that share a prompt, as a batch and as a tree."""
    prompt = [3, 1, 4, 1, 5]
    rows = [[*prompt, 9, 2, 6], [*prompt, 5, 3, 5], [*prompt, 9, 7], [*prompt, 5, 9, 3, 2]]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
        "video_index": torch.tensor([0, 0], device=device),
    }
    batch["completion_mask"] = batch["attention_mask"].clone()
    batch["completion_mask"][:, : len(prompt) + 1] = 0
    tree = Tree([0, 1], len(prompt), {0: len(prompt) + 1, 1: len(prompt) + 1})
    return batch, pack(batch, [tree], [torch.arange(len(prompt) + 1, device=device)[None]])


def _hidden_states(decoder: PreTrainedModel, batch: Mapping[str, Tensor], packed: Packed) -> tuple[Tensor, Tensor]:
    """What the text model gives for the batch and for its tree, [2B, L, width] and [1, T, width], without dropout."""
    training = {module: module.training for module in decoder.modules()}
    decoder.eval()
    rows, width = batch["input_ids"].shape
    try:
        plain = decoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=torch.arange(width, device=batch["input_ids"].device)[None].expand(rows, -1),
            use_cache=False,
        ).last_hidden_state
        with planted():
            along = decoder(
                input_ids=packed.input_ids,
                attention_mask=torch.ones_like(packed.input_ids),
                position_ids=packed.position_ids,
                use_cache=False,
                **{ATTENTION: packed.forest},
            ).last_hidden_state
    finally:
        for module, mode in training.items():
            module.training = mode
    return plain, along
