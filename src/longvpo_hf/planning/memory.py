"""Bytes of a device at the highest point of a step, by what holds them.

What the text model holds is traced (`trace.py`); of the vision tower it follows from what each of its layers keeps for
the backward pass; weights, gradients and optimizer follow from the numbers of parameters and how they are shared.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn

from longvpo_hf.families import FrameShapes
from longvpo_hf.families.vision import CHUNK_ELEMENTS
from longvpo_hf.planning.run import Run, checkpointed_share, checkpointing
from longvpo_hf.planning.settings import GIB, Sharding

#: CUDA's context and the work space of its libraries, GiB; and the share that the allocator leaves in fragments.
RESERVE_GIB = 1.5
FRAGMENTED = 0.10

_HEAD_TILE = (4096, 32768)  # tokens × vocabulary that TRL's fused head holds at once
#: Parameters that DeepSpeed keeps gathered under ZeRO-3 (`stage3_max_live_parameters`), and elements of its buckets.
_ZERO_LIVE, _ZERO_BUCKET = 1e9, 5e8


def memory_gib(run: Run, frames: int) -> dict[str, float]:
    """GiB of a device by what holds them, for timelines of so many frames."""
    parts = {**states(run), **activations(run, frames)}
    if run.distillation is not None:
        parts["view distillation"] = run.distillation.peak
    gib = {name: value / GIB for name, value in parts.items() if value}
    gib["CUDA, work space, fragments"] = RESERVE_GIB + FRAGMENTED * sum(gib.values())
    return gib


def host_gib(run: Run) -> float:
    """GiB of the host's memory, per device: what activation offloading moves there, or checkpoints that wait there."""
    training, frames = run.training, run.training.num_frames
    if training.activation_offloading:
        return saved_bytes(run, frames) / GIB
    if checkpointing(training)[1]:
        return (run.text_model(frames).checkpoints + _tower_bytes(run, frames).checkpoints) / GIB
    return 0.0


def frames_that_fit(run: Run) -> int:
    """Most frames of a timeline that fit a device's memory and the model's context; 0 where not even one does."""
    asked = max(run.training.num_frames, 16, 4 * run.machine.context_parallel)
    # Memory grows nearly linearly with the frames: two sizes give all others, and a third one those beside it.
    in_memory = _meeting(run, asked // 2, asked)
    if in_memory > 0 and sum(memory_gib(run, in_memory).values()) > run.machine.gpu_memory_gib:
        in_memory = _meeting(run, asked, in_memory) if in_memory != asked else asked - 1
    in_context = run.batch.frames_within()
    return in_memory if in_context is None else min(in_memory, in_context)


def _meeting(run: Run, one: int, other: int) -> int:
    """Most frames below the device's memory on the line through two numbers of them; 0 if that is below none."""
    first, second = (sum(memory_gib(run, frames).values()) for frames in (one, other))
    slope = (second - first) / (other - one)
    return max(0, math.floor(other + (run.machine.gpu_memory_gib - second) / slope))


# ------------------------------------------------------------------------------- weights, gradients and optimizer


def states(run: Run) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer on a device."""
    machine, training = run.machine, run.training
    trained = run.parameters.trained
    frozen = run.parameters.total + run.parameters.adapters - trained
    frozen_bytes, reference = _frozen_bytes(run, frozen), _reference_bytes(run)
    if machine.sharding == Sharding.none:
        width: float = 4 if run.parameters.adapters else run.dtype.itemsize
        if run.is_quantised:
            width = 2  # TRL turns adapters of a quantised base into bf16
        weights = trained * width + frozen_bytes
        gradients = trained * width * (2 if machine.processes > 1 else 1)  # DDP's buckets
        optimizer = trained * _optimizer_bytes(training.optim, width)
    elif machine.sharding == Sharding.fsdp2:
        # Sharded in float32, gathered in bf16: the largest layer, the next one, and the embeddings.
        weights = (trained * 4 + frozen_bytes) / machine.processes + _gathered_bytes(run)
        gradients = trained * 4 / machine.processes
        optimizer = trained * _optimizer_bytes(training.optim, 4) / machine.processes
        reference /= machine.processes
    else:
        half = 2 if training.bf16 or training.fp16 else 4
        weights = trained * half + frozen_bytes
        optimizer = trained * (4 * (half == 2) + _optimizer_bytes(training.optim, 4)) / machine.processes
        gradients = trained * half / machine.processes + min(trained, _ZERO_BUCKET) * half
        if machine.sharding == Sharding.zero3:
            weights = weights / machine.processes + min(trained + frozen, _ZERO_LIVE) * half
            reference /= machine.processes
    return {"weights": weights, "reference model": reference, "gradients": gradients, "optimizer": optimizer}


def _frozen_bytes(run: Run, frozen: int) -> float:
    if not run.is_quantised:
        return float(frozen * run.dtype.itemsize)
    linear = sum(
        part.weight.numel()
        for name, part in run.built.named_modules()
        if isinstance(part, nn.Linear) and "lora_" not in name and part is not run.built.get_output_embeddings()
    )
    # nf4 has a float32 for every 64 weights, or a byte and a little where that is quantised again.
    scale = 1 / 64 if run.model.use_bnb_nested_quant else 4 / 64
    return linear * (0.5 + scale if run.model.load_in_4bit else 1.0) + (frozen - linear) * 2.0


def _reference_bytes(run: Run) -> float:
    if run.parameters.adapters or run.training.precompute_ref_log_probs:
        return 0.0  # the adapters are turned off instead; or the reference has left the memory
    return float(run.parameters.total * run.dtype.itemsize)


def _gathered_bytes(run: Run) -> float:
    layer = sum(weight.numel() for weight in run.built.get_decoder().layers[0].parameters())
    embeddings = run.built.get_input_embeddings().weight.numel()
    return (2.0 * layer + embeddings) * run.compute_bytes


def _optimizer_bytes(optimizer: Any, width: float) -> float:
    """Bytes of state per trained weight."""
    name = str(getattr(optimizer, "value", optimizer))
    moments = 0 if name in ("sgd", "adafactor") else 1 if name.startswith(("lion", "paged_lion")) else 2
    return moments * (1.0 if "8bit" in name else width)


# ----------------------------------------------------------------------------------------------------- activations


def activations(run: Run, frames: int) -> dict[str, float]:
    """Bytes by what holds them, for timelines of so many frames."""
    text, tower = run.text_model(frames), _tower_bytes(run, frames)
    # Into the text model: embeddings, frames' features, both in one, and the mask of where they go.
    inputs = _hidden_elements(run, frames) * (3 * run.compute_bytes + 1)
    peak, vision = text.step.peak, sum(tower)
    if run.training.activation_offloading:  # what is kept for the backward pass leaves the device
        peak, vision = text.peak_without_saved, tower.besides
    elif checkpointing(run.training)[1]:
        peak, vision = text.peak_without_checkpoints, tower.kept + tower.besides
    return {
        "vision": vision,
        "text model's activations": inputs + peak,
        "LM head": _head_bytes(run, frames),
        "pixels": _pixel_bytes(run, frames),
    }


def saved_bytes(run: Run, frames: int) -> float:
    """Bytes kept between forward and backward pass."""
    inputs = _hidden_elements(run, frames) * (run.compute_bytes + 1)
    tower = _tower_bytes(run, frames)
    pixels = _pixel_bytes(run, frames) if run.is_tower_trained else 0.0
    return run.text_model(frames).step.saved + inputs + tower.kept + tower.checkpoints + pixels


def _hidden_elements(run: Run, frames: int) -> int:
    """Elements of a hidden state of a device's batch, or of its share of the group's."""
    return -(-run.batch.packed(frames) // run.sharing(frames)) * int(run.config.get_text_config().hidden_size)


def _pixel_bytes(run: Run, frames: int) -> float:
    """Bytes of the frames as the model takes them, in float32."""
    return _units(run, frames) * run.batch.shapes.pixels * 4.0


def _units(run: Run, frames: int) -> int:
    """Units of frames that a device takes of its batch."""
    return -(-run.batch.timelines * run.batch.shapes.units(frames) // run.sharing(frames))


class _Tower(NamedTuple):
    """Bytes that vision keeps for the backward pass, those of checkpoints apart; and what it needs besides to run."""

    kept: float
    checkpoints: float
    besides: float


def _tower_bytes(run: Run, frames: int) -> _Tower:
    training, shapes, width = run.training, run.batch.shapes, run.compute_bytes
    units = _units(run, frames) * (1 if run.batch.is_packed else run.batch.answers_of_row * run.batch.pairs)
    layers = sum(layers for _, layers in shapes.windows)
    block = _kept_by_block(run.tower, shapes) * width * shapes.patches
    projector = units * shapes.projected * width * _projector_width(run)
    if not run.is_tower_trained:
        chunk = math.ceil(CHUNK_ELEMENTS / shapes.pixels)
        is_cut = run.machine.sharding == Sharding.none and run.batch.family.pieces is not None
        return _Tower(projector, 0.0, block * (min(units, chunk) if is_cut else units))
    checkpointed = layers * checkpointed_share(run.tower)
    is_made_again = checkpointed > 0 or training.activation_offloading
    return _Tower(
        kept=projector + units * block * (layers - checkpointed),
        checkpoints=units * shapes.patches * width * shapes.hidden * checkpointed,
        besides=units * block if is_made_again else 0.0,
    )


def _kept_by_block(tower: nn.Module, shapes: FrameShapes) -> int:
    """Elements that a block of a vision transformer keeps of a patch for its backward pass.

    What goes into the two norms and the two groups of layers behind them, query, key and value, what attention and its
    projection return; and inside the MLP what goes in and out of the activation, with its gate where there is one. Root
    mean square norms keep their input in float32 and its normalised form besides; scaled branches what is scaled.
    """
    is_gated = any("gate_proj" in name for name, _ in tower.named_modules())
    is_scaled = any("lambda_" in name for name, _ in tower.named_parameters())
    has_rms_norms = any("RMSNorm" in type(part).__name__ for part in tower.modules())
    return (8 + 6 * has_rms_norms + 2 * is_scaled) * shapes.hidden + (4 if is_gated else 2) * shapes.mlp


def _projector_width(run: Run) -> int:
    """Elements that a projector keeps of a row for its backward pass: what goes in and out of its layers."""
    if not is_connector_trained(run):
        return 0
    layers = [part for projector in run.projectors for part in projector.modules() if isinstance(part, nn.Linear)]
    return sum(part.in_features + part.out_features for part in layers)


def is_connector_trained(run: Run) -> bool:
    """Whether any weight between vision tower and text model is trained."""
    return any(weight.requires_grad for connector in run.connectors for weight in connector.parameters())


def _head_bytes(run: Run, frames: int) -> float:
    text = run.config.get_text_config()
    answers = run.batch.answers * run.most_rows(frames)
    tile = min(answers, _HEAD_TILE[0]) * min(text.vocab_size, _HEAD_TILE[1]) * run.compute_bytes
    hidden = answers * text.hidden_size * (4 + 2 * run.compute_bytes)
    weight = text.vocab_size * text.hidden_size
    gradient = weight * 4 if run.built.get_output_embeddings().weight.requires_grad else 0  # summed up in float32
    is_gathered = run.machine.sharding in (Sharding.fsdp2, Sharding.zero3)
    return float(tile + hidden + gradient + (weight * run.compute_bytes if is_gathered else 0))
