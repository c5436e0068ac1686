"""Floating-point operations of a step, by what does them; attention counts causally."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn

from longvpo_hf.planning.memory import is_connector_trained
from longvpo_hf.planning.run import Run, checkpointed_share

#: Work that is no part of a step: `precompute_ref_log_probs`.
BEFOREHAND = "reference, beforehand"


def tflop(run: Run) -> dict[str, float]:
    """10¹² operations of a device's batch, by what does them."""
    batch, frames = run.batch, run.training.num_frames
    policy = run.text_model(frames).step
    reference = run.text_model(batch.reference_frames, has_backward=False).step
    work = {
        "policy: text model": policy.flops,
        "policy: vision": _vision_flops(run, frames, batch.timelines, is_policy=True),
        "policy: LM head": _head_flops(run, frames, has_backward=True),
        BEFOREHAND if run.training.precompute_ref_log_probs else "reference": reference.forward_flops
        + _rejected_flops(run)
        + _vision_flops(run, batch.reference_frames, batch.reference_timelines, is_policy=False)
        + _head_flops(run, batch.reference_frames, has_backward=False),
    }
    if run.distillation is not None:
        work["view distillation"] = run.distillation.flops
    if run.batch.sampled:
        work["sampling"] = _sampling_flops(run)
    return {name: value / 1e12 for name, value in work.items()}


def _rejected_flops(run: Run) -> float:
    """What the reference does of rejected views: the policy's forward pass of them, without its LM head."""
    batch, frames = run.batch, run.training.num_frames
    if not batch.is_rejecting:
        return 0.0
    forward = run.text_model(frames).step.forward_flops * batch.rejected_timelines / batch.timelines
    return forward + _vision_flops(run, frames, batch.rejected_timelines, is_policy=False)


def _sampling_flops(run: Run) -> float:
    """Each row's whole timeline once more, without a backward pass, with the answer that is drawn."""
    batch, frames = run.batch, run.training.num_frames
    policy = run.text_model(frames).step
    rows = run.training.per_device_train_batch_size
    of_sequence = policy.forward_flops / batch.packed(frames) * (batch.trunk(frames) + batch.sampled)
    timelines = 1 if batch.is_packed else 1 / (batch.answers_of_row * batch.pairs)
    return rows * (of_sequence + timelines * _vision_flops(run, frames, 1, is_policy=False))


def received_gb(run: Run) -> float:
    """10⁹ bytes that a device receives of those it shares its batch with: keys and values of trunks, in every layer.

    Forward, once more where checkpointing makes them again, and as much of their gradients; and for the reference.
    """
    text, batch = run.config.get_text_config(), run.batch
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    of_token = 2 * text.num_key_value_heads * width * text.num_hidden_layers * run.compute_bytes
    passes = 2 + checkpointed_share(run.built.get_decoder())
    views = [(run.training.num_frames, batch.timelines * passes)]
    if not run.training.precompute_ref_log_probs:
        views.append((batch.reference_frames, batch.reference_timelines))
        views.append((run.training.num_frames, batch.rejected_timelines))
    tokens = sum(batch.trunk(frames) * times * (1 - 1 / run.sharing(frames)) for frames, times in views)
    return tokens * of_token / 1e9


def _vision_flops(run: Run, frames: int, timelines: int, is_policy: bool) -> float:
    shapes = run.batch.shapes
    if not run.batch.is_packed:
        timelines *= run.batch.answers_of_row * run.batch.pairs
    connecting = sum(_linear_elements(part) for part in run.connectors)
    inside = [part for connector in run.connectors if connector not in run.projectors for part in connector.modules()]
    convolutions = [part for part in run.tower.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d))]
    pixels = sum(part.weight.numel() for part in convolutions if part not in inside)
    blocks = _linear_elements(run.tower) - sum(_linear_elements(part) for part in inside if _is_linear(part)) - pixels
    linear = 2.0 * (blocks * shapes.patches)
    attention = sum(4.0 * shapes.patches * span * shapes.hidden * layers for span, layers in shapes.windows)
    again = checkpointed_share(run.tower) if is_policy else 0.0
    is_trained = is_policy and run.is_tower_trained
    passes = (3 + again, 3.5 + again) if is_trained else (1, 1)
    connector = 2.0 * connecting * shapes.projected * (3 if is_policy and is_connector_trained(run) else 1)
    embedded = 2.0 * pixels * shapes.patches * (2 if is_trained else 1)  # pixels have no gradient
    units = -(-timelines * shapes.units(frames) // run.sharing(frames))
    return units * (embedded + linear * passes[0] + attention * passes[1] + connector)


def _head_flops(run: Run, frames: int, has_backward: bool) -> float:
    text = run.config.get_text_config()
    product = 2.0 * run.batch.answers * run.most_rows(frames) * text.vocab_size * text.hidden_size
    if not has_backward:
        return product
    is_trained = run.built.get_output_embeddings().weight.requires_grad
    return product * (4 if is_trained else 3)  # the logits once more, for the hidden states, for the weight


def _linear_elements(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if _is_linear(part))


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d | nn.Conv3d]:
    return isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
