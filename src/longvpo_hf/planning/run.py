"""A training run before anything is loaded: its model on torch's meta device, and traces of its text model's step."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from longvpo_hf.errors import ConfigError, ModelError
from longvpo_hf.families import family_of
from longvpo_hf.families.vision import vision_tower
from longvpo_hf.planning.settings import Machine, Rows, Sharding
from longvpo_hf.planning.tokens import DeviceBatch
from longvpo_hf.planning.trace import Distilled, Step, Trace, trace_distillation, trace_step
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.models import prepare_trees, tile_mlps
from longvpo_hf.training.packing import reason_not_shared

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from trl import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights; tied ones count once."""

    total: int
    vision: int
    trained: int
    adapters: int


class Layer(NamedTuple):
    """A kind of text layer, all of which are alike: its entry in `layer_types`, and whether it is checkpointed."""

    type: str
    is_checkpointed: bool


@dataclass(frozen=True, slots=True)
class TextModel:
    """A step of the whole text model.

    Args:
        step: With everything on the device.
        checkpoints: Bytes that its checkpointed layers keep for the backward pass.
        peak_without_checkpoints: Most bytes that live on the device if these wait in the host's memory.
        peak_without_saved: The same if all that is kept for the backward pass waits there.
    """

    step: Trace
    checkpoints: float
    peak_without_checkpoints: float
    peak_without_saved: float


class Run:
    """One configuration: what memory, work and remedies are worked out from.

    Args:
        config: The model's shapes.
        model: Its type, adapters and quantisation.
        training: The trainer's settings.
        machine: See `Machine`.
        rows: See `Rows`.

    Raises:
        ModelError: If the model's family is not known, or transformers finds no vision tower in it.
        ConfigError: If processes are to share timelines, and the trainer would refuse it.
    """

    def __init__(
        self, config: PreTrainedConfig, model: ModelConfig, training: LongVPOConfig, machine: Machine, rows: Rows
    ) -> None:
        self.config, self.model, self.training, self.machine, self.rows = config, model, training, machine, rows
        self.batch = DeviceBatch(config, training, rows)
        self.built = build_model(config, model, training, machine)
        #: Why the trainer would leave trees; None where it packs, or was told not to.
        self.without_trees = prepare_trees(self.built) if training.tree_packing else None
        self.batch.is_packed = training.tree_packing and self.without_trees is None
        self._check_sharing()
        tower = vision_tower(self.built)
        if tower is None:
            raise ModelError(f"transformers finds no vision tower in {type(self.built).__name__}.")
        self.tower = tower
        self.is_tower_trained = any(weight.requires_grad for weight in tower.parameters())
        #: Modules between tower and text model; the tower of some families holds them.
        self.connectors = [self.built.base_model.get_submodule(name) for name in self.batch.family.connectors]
        parts = list(tower.modules())
        self.projectors = [connector for connector in self.connectors if connector not in parts]
        self.parameters = _count(self.built, tower)
        #: Of each text layer, in order.
        self.layers = _layers(self.built)
        self._traces: dict[tuple[int, tuple[Layer, ...], bool], Trace] = {}

    def _check_sharing(self) -> None:
        """Raises:
        ConfigError: If processes are to share timelines, and the trainer would refuse it.
        """
        if self.machine.context_parallel == 1:
            return
        if self.training.draws_answers:
            reason: str | None = "view_distillation_on='sampled' draws answers, and each sees some of the frames alone"
        elif self.batch.is_packed:
            reason = reason_not_shared(self.built)
        else:
            reason = self.without_trees or "tree_packing is off"
        if reason is not None:
            raise ConfigError(
                f"context_parallel={self.machine.context_parallel}: processes cannot share a timeline here: "
                f"{reason.rstrip('.')}. Set context_parallel=1."
            )

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are loaded in."""
        return _DTYPES[self.model.dtype or "auto"]

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element of what layers compute."""
        return 2 if self.training.bf16 or self.training.fp16 else self.dtype.itemsize

    @property
    def is_quantised(self) -> bool:
        """Whether the base is loaded in 4 or 8 bits."""
        return bool(self.model.load_in_4bit or self.model.load_in_8bit)

    def sharing(self, frames: int) -> int:
        """How many processes share a view of so many frames: one, where some of them would be left without a frame."""
        wanted = self.machine.context_parallel
        return wanted if self.batch.shapes.units(frames) >= wanted else 1

    def most_rows(self, frames: int) -> float:
        """The share of a batch's rows that one process holds at most."""
        rows, sharing = self.training.per_device_train_batch_size, self.sharing(frames)
        return -(-rows // sharing) / rows

    def text_model(self, frames: int, has_backward: bool = True) -> TextModel:
        """A step of the whole text model, put together from steps of two and of three layers.

        Layers of a kind are alike. A backward pass holds most at one of the layers; what comes after that one has been
        freed by then. So each pair of neighbours that occurs is run as the last two layers there are, and once more
        with a layer of each kind before the heaviest pair.
        """
        layers = self.layers if has_backward else [Layer(kind, False) for kind, _ in self.layers]
        ends = {pair: place for place, pair in enumerate(pairwise(layers), start=1)} or {(layers[0],) * 2: 0}
        pairs = {pair: self.trace(frames, pair, has_backward) for pair in ends}
        heaviest = max(pairs, key=lambda pair: pairs[pair].peak)
        added = {
            layer: self.trace(frames, (layer, *heaviest), has_backward).plus(pairs[heaviest], -1)
            for layer in set(layers)
        }

        def up_to(pair: tuple[Layer, Layer]) -> Trace:
            """A step of the layers down to this pair's last place, the pair included."""
            counts = Counter(layers[: ends[pair] + 1])
            counts.subtract(pair)
            step = pairs[pair]
            for layer, count in counts.items():
                step = step.plus(added[layer], count)
            return step

        def kept(some: Sequence[Layer]) -> float:
            return sum(added[layer].saved for layer in some if layer.is_checkpointed)

        steps = {pair: up_to(pair) for pair in ends}
        whole = steps[layers[-2], layers[-1]] if len(layers) > 1 else steps[heaviest]
        return TextModel(
            step=replace(whole, peak=max(step.peak for step in steps.values())),
            checkpoints=kept(layers),
            # One of them at a time comes back, to make its layer's activations again; the first layer's is the input,
            # which is not counted here.
            peak_without_checkpoints=max(step.peak - kept(layers[1 : ends[pair]]) for pair, step in steps.items()),
            # What checkpointing makes again does not leave the device.
            peak_without_saved=max(
                step.peak - step.saved + (0 if last.is_checkpointed else added[last].saved)
                for (_, last), step in pairs.items()
            ),
        )

    def trace(self, frames: int, layers: tuple[Layer, ...], has_backward: bool) -> Trace:
        """A step of layers of these kinds: the policy's, or the reference's, which has no backward pass."""
        key = (frames, layers, has_backward)
        if key not in self._traces:
            types = [layer.type for layer in layers]
            decoder = build_model(self.config, self.model, self.training, self.machine, types).get_decoder()
            for part, layer in zip(decoder.layers, layers, strict=True):
                part.gradient_checkpointing = layer.is_checkpointed
            if self.training.disable_dropout:
                for part in decoder.modules():
                    if isinstance(part, nn.Dropout):
                        part.p = 0.0
            is_half_sharded = self.machine.sharding != Sharding.none and self.training.bf16
            step = Step(
                sequences=tuple(self.batch.sequences(frames, reference=not has_backward)),
                trunk=self.batch.trunk(frames),
                branches=self.batch.branches,
                is_packed=self.batch.is_packed,
                sharing=self.sharing(frames),
                position_axes=self.batch.family.position_axes,
                dtype=torch.bfloat16 if is_half_sharded else self.dtype,
                is_autocast=self.training.bf16 or self.training.fp16,
                has_backward=has_backward,
            )
            self._traces[key] = trace_step(decoder, step)
        return self._traces[key]

    @cached_property
    def distillation(self) -> Trace | None:
        """The loss term of view distillation; None without one."""
        training, text = self.training, self.config.get_text_config()
        if training.view_distillation_weight == 0:
            return None
        return trace_distillation(
            Distilled(
                answers=(self.batch.distilled,) * training.per_device_train_batch_size,
                width=text.hidden_size,
                vocabulary=text.vocab_size,
                kept=training.view_distillation_top_k if training.precompute_ref_log_probs else None,
                divergence=training.view_distillation_divergence,
                is_guarded=training.view_distillation_guard,
                is_head_trained=self.built.get_output_embeddings().weight.requires_grad,
                weight_dtype=self.dtype,
                dtype=torch.bfloat16 if training.bf16 or training.fp16 else self.dtype,
            )
        )

    def with_changes(self, training: dict[str, Any], model: dict[str, Any]) -> Run:
        """This run with other settings of the trainer and of the model."""
        changed = copy.copy(self.training), copy.copy(self.model)
        for settings, changes in zip(changed, (training, model), strict=True):
            for name, value in changes.items():
                setattr(settings, name, value)
        other = Run(self.config, changed[1], changed[0], self.machine, self.rows)
        if not model and set(training) <= _LEAVE_TEXT_MODEL:
            other._traces = self._traces
        return other


#: Settings that change nothing of what the text model does in a step.
_LEAVE_TEXT_MODEL = {"precompute_ref_log_probs", "freeze_vision_tower", "activation_offloading"}


def build_model(
    config: PreTrainedConfig,
    model: ModelConfig,
    training: LongVPOConfig,
    machine: Machine,
    layers: Sequence[str] | None = None,
) -> PreTrainedModel:
    """The model as the trainer readies it, on the meta device; with text layers of these kinds alone, if any."""
    from transformers import AutoModelForImageTextToText

    config = config if layers is None else _shortened(config, layers)
    dtype = _DTYPES[model.dtype or "auto"]
    if model.load_in_4bit or model.load_in_8bit or (machine.sharding != Sharding.none and training.bf16 and layers):
        dtype = torch.bfloat16  # of quantised models; what a sharded layer is gathered in
    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)
        if training.freeze_vision_tower:
            _freeze_tower(built)
        if model.use_peft:
            built = _adapted(built, model, family_of(config).adapter_layers)
            if training.freeze_vision_tower:
                _freeze_tower(built)
    tile_mlps(built, training.tiled_mlp_num_shards)
    built.train()
    if training.gradient_checkpointing:
        every, _ = checkpointing(training)
        built.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    return built


def checkpointing(training: LongVPOConfig) -> tuple[int, bool]:
    """Which of the layers are checkpointed, every so many, and whether the checkpoints wait in the host's memory."""
    settings = training.gradient_checkpointing_kwargs or {}
    return settings.get("every_n_layers", 1), training.gradient_checkpointing and settings.get("offload", False)


def checkpointed_share(module: nn.Module) -> float:
    """The share of its layers that are checkpointed."""
    parts = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    return sum(part.gradient_checkpointing for part in parts) / len(parts) if parts else 0.0


def _layers(built: PreTrainedModel) -> list[Layer]:
    parts = built.get_decoder().layers
    types = getattr(built.config.get_text_config(), "layer_types", None) or ["full_attention"] * len(parts)
    return [Layer(kind, part.gradient_checkpointing) for kind, part in zip(types, parts, strict=True)]


def _shortened(config: PreTrainedConfig, layers: Sequence[str]) -> PreTrainedConfig:
    """The config with text layers of these kinds alone, and without rope that looks at the positions' values."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        text.layer_types = list(layers)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):  # fake tensors have no values
        text.rope_parameters = {**rope, "rope_type": "default"}
    return config


def _adapted(built: PreTrainedModel, model: ModelConfig, adapter_layers: str) -> PreTrainedModel:
    from peft import get_peft_model
    from trl import get_peft_config

    settings = copy.copy(model)
    settings.load_in_4bit = settings.load_in_8bit = False
    if settings.lora_target_modules is None and settings.lora_target_parameters is None:
        settings.lora_target_modules = adapter_layers
    adapted: PreTrainedModel = get_peft_model(built, get_peft_config(settings)).get_base_model()
    return adapted


def _freeze_tower(built: PreTrainedModel) -> None:
    if (tower := vision_tower(built)) is not None:
        tower.requires_grad_(False)


def _count(built: PreTrainedModel, tower: nn.Module) -> Parameters:
    named = list(built.named_parameters())
    adapters = _elements([weight for name, weight in named if "lora_" in name])
    return Parameters(
        total=_elements([weight for _, weight in named]) - adapters,
        vision=_elements(list(tower.parameters())),
        trained=_elements([weight for _, weight in named if weight.requires_grad]),
        adapters=adapters,
    )


def _elements(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
