"""What a training run will need, before anything is loaded: tokens, memory and step time of a recipe's configuration.

Takes the shapes of a model (its config) and the settings of a recipe; gives an `Estimate`. How it is worked out:

- *Parameters* are counted on the real model, adapters included, built on torch's meta device.
- *The text model's step* is run for real on fake tensors (which have shapes and no contents), with the trainer's own
  tree attention, autograd, autocast, checkpointing and adapters; every storage that comes to life is counted as long as
  it lives, and every matrix product. It is run with two and with three layers, of which the others follow: all layers
  are alike.
- *The vision tower* is worked out from its layers: matrix products exactly, what is kept for the backward pass by what
  each layer keeps.
- *Weights, gradients, optimizer* follow from the numbers of parameters and how they are shared among processes.
- *Time* is the work over the FLOP/s that you say a device achieves. It is no measurement.

`benchmarks/results/budget.md` has the estimates beside what was measured. Memory is what tensors need; kernels' work
space, CUDA itself and fragmentation are an allowance. Knows nothing of rows: the timeline is taken to fill its frame
budget, questions and answers are as long as `Rows` says.
"""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import FrameGrid, context_tokens, family_of
from longvpo_hf.families.vision import CHUNK_ELEMENTS, vision_tower
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.packing.attention import Forest, Span, tree_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from trl import ModelConfig


class Sharding(StrEnum):
    """How processes share weights, gradients and optimizer; "none" is one device, or DDP on several."""

    none = "none"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


GIB = 2**30

#: 30 % of the dense bf16 peak of an H100 or H200 (989 TFLOP/s), about the share that TPO's stated four hours on eight
#: A100 come to (docs/reproduce_tpo.md). Attention counts causally. No device was measured.
DEFAULT_TFLOPS = 300.0
#: An H100, the device of LongVPO's experiments.
DEFAULT_GPU_MEMORY_GIB = 80.0
#: CUDA's context and the work space of its libraries, GiB; and the share that the allocator leaves in pieces.
RESERVE_GIB = 1.5
FRAGMENTED = 0.10

#: A source of 16:9; its size where `max_pixels` sets no bound.
_UNBOUNDED_FRAME = (720, 1280)
#: LongVPO samples an anchor clip at 1 fps, at most 64 frames; `dataset_scripts/stage1.py` cuts clips of at most 64 s.
_ANCHOR_SECONDS = 64
_CHAT_TOKENS = 24

#: Work that is no part of a step: `precompute_ref_log_probs`.
BEFOREHAND = "reference, beforehand"

_ATTENTION = "longvpo_budget"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": torch.bfloat16}
_HEAD_TILE = (4096, 32768)  # tokens × vocabulary that TRL's fused head holds at once
#: Parameters that DeepSpeed keeps gathered under ZeRO-3 (`stage3_max_live_parameters`), and elements of its buckets.
_ZERO_LIVE, _ZERO_BUCKET = 1e9, 5e8


# ---------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True, slots=True)
class Machine:
    """What it is to run on.

    Args:
        gpu_memory_gib: Memory of one device.
        processes: Devices, one process each.
        sharding: See `Sharding`.
        tflops: 10¹² floating-point operations a second that a device achieves in training, not its peak.
    """

    gpu_memory_gib: float = DEFAULT_GPU_MEMORY_GIB
    processes: int = 1
    sharding: Sharding = Sharding.none
    tflops: float = DEFAULT_TFLOPS

    def __post_init__(self) -> None:
        for name in ("gpu_memory_gib", "processes", "tflops"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}.")
        if self.sharding is not Sharding.none and self.processes == 1:
            raise ConfigError(f"sharding={self.sharding.value} shares among several processes, got processes=1.")


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows are taken to be; the papers do not say how long their texts are.

    Args:
        question_tokens: Of the question.
        chosen_tokens: Of the chosen answer, with its end.
        rejected_tokens: Of the rejected answer.
        reference_frames: Frames of the reference's view. `None`: those of the whole timeline, but of a clip of 64
            seconds where `reference="anchor"`.
        label_tokens: Text that the processor writes around a frame (or pair of frames that share tokens). `None`: what
            tokenizers like Qwen's make of the family's.
        source_px: Height and width of the videos. `None`: 16:9, and as large as `max_pixels` allows.
    """

    question_tokens: int = 32
    chosen_tokens: int = 128
    rejected_tokens: int = 128
    reference_frames: int | None = None
    label_tokens: int | None = None
    source_px: tuple[int, int] | None = None


# ------------------------------------------------------------------------------------------- what is answered


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights. Tied ones count once."""

    total: int
    vision: int
    trained: int
    adapters: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of one timeline, and of a device's batch.

    Args:
        visual_per_frame: Mean over the frames of a timeline.
        visual: Of one timeline, as the collator counts them.
        prompt: Visual tokens with the text around them and the question.
        packed: Tokens of a device's batch as the policy runs it.
        reference: Tokens of a device's batch as the reference runs it.
    """

    frames: int
    reference_frames: int
    visual_per_frame: float
    visual: int
    prompt: int
    packed: int
    reference: int


@dataclass(frozen=True, slots=True)
class Remedy:
    """A setting that would make it fit, or come nearer, and what memory it would then take."""

    setting: str
    gib: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run needs of each device.

    Args:
        memory_gib: GiB by what holds them; `host_gib` is what activation offloading keeps in the host's memory.
        saved_gib: What autograd keeps between forward and backward pass, vision included.
        tflop: 10¹² operations of a device's batch by what does them; attention counts causally.
        seconds: Of a device's batch (a step is `gradient_accumulation_steps` of them).
        gpu_hours_per_1000_rows: Over all devices, for one epoch; with the reference's, also where that is computed
            beforehand.
        frames_that_fit: Most frames of a timeline with everything else as it is; 0 where not even one fits.
        remedies: What to change; empty where it fits.
        notes: What was assumed, and what the model cannot do.
    """

    model: str
    machine: Machine
    parameters: Parameters
    tokens: Tokens
    memory_gib: dict[str, float]
    host_gib: float
    saved_gib: float
    tflop: dict[str, float]
    seconds: float
    gpu_hours_per_1000_rows: float
    frames_that_fit: int
    remedies: tuple[Remedy, ...]
    notes: tuple[str, ...]

    @property
    def total_gib(self) -> float:
        """Memory of a device at the highest point of a step."""
        return sum(self.memory_gib.values())

    @property
    def fits(self) -> bool:
        """Whether that is at most what the device has."""
        return self.total_gib <= self.machine.gpu_memory_gib

    def to_json(self) -> str:
        """All of it."""
        return json.dumps({**asdict(self), "total_gib": self.total_gib, "fits": self.fits}, indent=1)


# ------------------------------------------------------------------------------------------------- public


def read_config(path: Path, overrides: Sequence[str] = ()) -> tuple[ModelConfig, LongVPOConfig, list[str]]:
    """A recipe's configuration, read as the recipe reads it.

    Args:
        path: Its YAML.
        overrides: Options of the recipe's command line.

    Returns:
        The model's and the training's settings, and what the estimate does not look at (rows, among others).

    Raises:
        ValueError: If the file is not there, or a setting is not as it should be.
    """
    from trl import ModelConfig, TrlParser

    if not path.is_file():
        raise ConfigError(
            f"{path} is not a file: name a recipe's YAML, e.g. recipes/configs/internvl3_8b/stage1_lora.yaml."
        )
    arguments = ["--config", str(path), *overrides]
    if not torch.accelerator.is_available():
        arguments += ["--use_cpu", "true"]  # else transformers refuses bf16 where there is no device
    try:
        model, training, rest = TrlParser((ModelConfig, LongVPOConfig)).parse_args_and_config(
            arguments, return_remaining_strings=True
        )
    except SystemExit:
        raise ConfigError(
            f"{path} or the options {list(overrides)} hold a value of the wrong kind; see above."
        ) from None
    if model.model_name_or_path is None:
        raise ConfigError(f"{path} names no model_name_or_path.")
    return model, training, rest


def device_memory_gib() -> float:
    """Memory of this machine's first CUDA device; `DEFAULT_GPU_MEMORY_GIB` where there is none."""
    if not torch.cuda.is_available():
        return DEFAULT_GPU_MEMORY_GIB
    return torch.cuda.get_device_properties(0).total_memory / GIB


def find_model_config(name: str, revision: str = "main") -> PreTrainedConfig:
    """Shapes of a model: its own config from a folder or this machine's Hub cache, else those of a known base model.

    Of an adapter's folder those of its base.

    Raises:
        ValueError: If it is neither; the message says what to do.
    """
    from transformers import AutoConfig

    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        name = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        return AutoConfig.from_pretrained(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        pass
    known = json.loads((Path(__file__).parent / "base_models.json").read_text(encoding="utf-8"))["models"]
    for prefix, model in known.items():
        if name.rpartition("/")[2].lower().startswith(prefix.lower()):
            shapes = dict(model["config"])
            config = AutoConfig.for_model(shapes.pop("model_type"), **shapes)
            config.name_or_path = prefix
            return config
    raise ConfigError(
        f"The shapes of {name!r} are not known: it is no folder with a config.json, not in this machine's Hub cache, "
        f"and none of {', '.join(known)}. Fetch its config (hf download {name} config.json), or give "
        "--model_name_or_path of a model of the same shapes."
    )


def estimate(
    config: PreTrainedConfig,
    model: ModelConfig,
    training: LongVPOConfig,
    machine: Machine | None = None,
    rows: Rows | None = None,
) -> Estimate:
    """What a run needs.

    Args:
        config: The model's shapes.
        model: Its type, adapters and quantisation.
        training: The trainer's settings.
        machine: See `Machine`.
        rows: See `Rows`.

    Raises:
        ValueError: If the model's family is not known.
    """
    machine = machine or Machine()
    run = _Run(config, model, training, machine, rows or Rows())
    memory = run.memory(training.num_frames)
    total = sum(memory.values())
    fits = total <= machine.gpu_memory_gib
    tflop = run.tflop()
    seconds = sum(value for name, value in tflop.items() if name != BEFOREHAND) / machine.tflops
    return Estimate(
        model=model.model_name_or_path or "",
        machine=machine,
        parameters=run.parameters,
        tokens=run.tokens,
        memory_gib=memory,
        host_gib=run.host_gib(),
        saved_gib=run.saved(training.num_frames) / GIB,
        tflop=tflop,
        seconds=seconds,
        gpu_hours_per_1000_rows=sum(tflop.values())
        / machine.tflops
        / training.per_device_train_batch_size
        * (1000 / 3600),
        frames_that_fit=run.frames_that_fit(),
        remedies=() if fits else tuple(remedy for remedy in _remedies(run) if remedy.gib < total),
        notes=tuple(run.notes()),
    )


def report(estimate: Estimate) -> str:
    """The estimate as plain text."""
    machine, tokens, parameters = estimate.machine, estimate.tokens, estimate.parameters
    sharing = "" if machine.processes == 1 else f", {machine.processes} processes ({machine.sharding.value})"
    lines = [
        f"{estimate.model}: estimates, nothing was loaded or run on a device{sharing}",
        "",
        "Parameters",
        _line("all", f"{parameters.total / 1e9:.3f} billion ({parameters.vision / 1e9:.3f} of them see)"),
        _line("trained", f"{parameters.trained / 1e6:,.1f} million"),
        "",
        "Tokens",
        _line("frames of a timeline", f"{tokens.frames} × {tokens.visual_per_frame:.1f} = {tokens.visual:,} visual"),
        _line("prompt", f"{tokens.prompt:,}"),
        _line("a device's batch, packed", f"{tokens.packed:,}"),
        _line(f"reference ({tokens.reference_frames} frames)", f"{tokens.reference:,}"),
        "",
        "Memory of a device, GiB",
        *(_line(name, f"{gib:7.1f}") for name, gib in estimate.memory_gib.items()),
        _line("together", f"{estimate.total_gib:7.1f} of {machine.gpu_memory_gib:g}"),
    ]
    if estimate.host_gib:
        lines.append(_line("in the host's memory, each", f"{estimate.host_gib:7.1f}"))
    fits = "FITS" if estimate.fits else "DOES NOT FIT"
    lines += [
        "",
        f"{fits}. Frames that fit, all else as it is: {estimate.frames_that_fit}.",
    ]
    if estimate.remedies:
        lines += ["", "What to change, each with what the device would then hold, GiB"]
        lines += [
            _line(remedy.setting, f"{remedy.gib:7.1f}  {'fits' if remedy.fits else 'too much'}", width=52)
            for remedy in estimate.remedies
        ]
    lines += [
        "",
        f"Work of a device's batch, TFLOP; at {machine.tflops:g} TFLOP/s",
        *(_line(name, f"{value:9.1f}") for name, value in estimate.tflop.items()),
        _line("seconds", f"{estimate.seconds:9.1f}"),
        _line("GPU-hours per 1,000 rows", f"{estimate.gpu_hours_per_1000_rows:9.2f}"),
        "",
        *(f"- {note}" for note in estimate.notes),
    ]
    return "\n".join(lines)


def _line(name: str, value: str, width: int = 30) -> str:
    return f"  {name:<{width}} {value}"


# ------------------------------------------------------------------------------------------------ the frames


def _frame_grid(config: PreTrainedConfig, max_pixels: int | None, frame: tuple[int, int] | None) -> FrameGrid:
    """`frame` is the (height, width) of the source; None for one of 16:9 that fills `max_pixels`."""
    height, width = frame or _UNBOUNDED_FRAME
    if max_pixels is not None and (frame is None or height * width > max_pixels):
        scale = math.sqrt(max_pixels / (height * width))
        height, width = math.floor(height * scale), math.floor(width * scale)
    return family_of(config).frame_grid(config, height, width)


# --------------------------------------------------------------------------------------- the text model, traced


class _Ledger(TorchDispatchMode):
    """Counts the bytes that live, with their highest mark, and the floating-point operations of matrix products."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops = 0.0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.flops += _flops_of(function, args, kwargs or {})
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


def _flops_of(function: Any, args: Any, kwargs: Mapping[str, Any]) -> float:
    name = function.overloadpacket.__name__
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        left, right = args[-2:] if name in ("mm", "bmm") else args[1:3]
        return 2.0 * left.numel() * right.shape[-1]
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        backward = name.endswith("backward")
        query, key = args[1:3] if backward else args[:2]
        place = 7 if backward else 4
        causal = kwargs.get("is_causal", len(args) > place and args[place])
        products = 5 if backward else 2  # the backward pass makes the scores again
        return 2.0 * products * query.numel() * key.shape[-2] * (0.5 if causal else 1.0)
    return 0.0


@dataclass(frozen=True, slots=True)
class _Trace:
    """Of one step of the text model: bytes kept when the forward ends, the most that live, and the work."""

    saved: float
    peak: float
    forward_flops: float
    flops: float

    def plus(self, other: _Trace, times: float) -> _Trace:
        """This and `times` the other."""
        mine, others = asdict(self), asdict(other)
        return _Trace(**{name: mine[name] + times * others[name] for name in mine})


def _fake(module: nn.Module, mode: FakeTensorMode) -> list[Tensor]:
    """Gives a module of the meta device fake weights; returns them."""
    made: dict[int, Tensor] = {}

    def faked(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made[id(tensor)]

    kept: list[Tensor] = []  # the originals, so that no other takes their id
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


# ----------------------------------------------------------------------------------------------- the whole run


class _Run:
    """One configuration: its model on the meta device, and what follows from it."""

    def __init__(
        self,
        config: PreTrainedConfig,
        model: ModelConfig,
        training: LongVPOConfig,
        machine: Machine,
        rows: Rows,
    ) -> None:
        self.config, self.model, self.training, self.machine, self.rows = config, model, training, machine, rows
        self.family = family_of(config)
        self.grid = _frame_grid(config, training.max_pixels, rows.source_px)
        self.built = _build(config, model, training, machine)
        tower = vision_tower(self.built)
        assert tower is not None
        self.tower = tower
        found = [self.built.base_model.get_submodule(name) for name in self.family.connectors]
        parts = list(tower.modules())
        self.mergers = [connector for connector in found if connector in parts]
        self.projectors = [connector for connector in found if connector not in parts]
        weights = list(self.built.parameters())
        adapters = [weight for name, weight in self.built.named_parameters() if "lora_" in name]
        self.tower_trained = any(weight.requires_grad for weight in tower.parameters())
        self.parameters = Parameters(
            total=sum(weight.numel() for weight in weights) - sum(weight.numel() for weight in adapters),
            vision=sum(weight.numel() for weight in tower.parameters()),
            trained=sum(weight.numel() for weight in weights if weight.requires_grad),
            adapters=sum(weight.numel() for weight in adapters),
        )
        self._traces: dict[tuple[int, int, bool], _Trace] = {}

    # ------------------------------------------------------------------------------------------ tokens

    @property
    def trees(self) -> int:
        """Timelines of a device's batch: as few as `pairs_per_timeline` allows."""
        return -(-self.training.per_device_train_batch_size // self.training.pairs_per_timeline)

    @property
    def pairs(self) -> int:
        """Rows of a timeline."""
        return -(-self.training.per_device_train_batch_size // self.trees)

    @property
    def reference_frames(self) -> int:
        """Frames of the reference's view."""
        if self.rows.reference_frames is not None:
            return self.rows.reference_frames
        most = self.training.reference_num_frames or self.training.num_frames
        if self.training.reference != "anchor" or self.training.fps is None:
            return most
        return min(most, math.ceil(_ANCHOR_SECONDS * self.training.fps))

    def trunk(self, frames: int) -> int:
        """Tokens that all answers about a timeline share."""
        given = self.rows.label_tokens
        label = self.family.label_tokens if given is None else given
        return self.grid.visual_tokens(frames) + label * self.grid.units(frames) + _CHAT_TOKENS

    @property
    def branch(self) -> int:
        """Tokens of a row besides the trunk."""
        return self.rows.question_tokens + self.rows.chosen_tokens + self.rows.rejected_tokens

    @property
    def tokens(self) -> Tokens:
        """See `Tokens`."""
        frames = self.training.num_frames
        visual = self.grid.visual_tokens(frames)
        return Tokens(
            frames=frames,
            reference_frames=self.reference_frames,
            visual_per_frame=visual / frames,
            visual=visual,
            prompt=self.trunk(frames) + self.rows.question_tokens,
            packed=sum(end - start for start, end in self._sequences(frames)),
            reference=sum(end - start for start, end in self._sequences(self.reference_frames, reference=True)),
        )

    def _sequences(self, frames: int, reference: bool = False) -> list[tuple[int, int]]:
        """[start, end) of each sequence or tree of a device's batch; every pair has an anchor of its own."""
        trunk, pairs = self.trunk(frames), self.pairs
        trees = self.trees
        if reference and self.training.reference == "anchor":
            trees, pairs = trees * pairs, 1
        lengths = [trunk + pairs * self.branch] * trees
        if not self.training.tree_packing:
            answer = max(self.rows.chosen_tokens, self.rows.rejected_tokens)
            lengths = [trunk + self.rows.question_tokens + answer] * (2 * trees * pairs)
        ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
        return list(zip([0, *ends], ends, strict=False))

    # ------------------------------------------------------------------------------------------ traces

    def _trace(self, frames: int, layers: int, grad: bool) -> _Trace:
        """Runs a text model of so many layers on fake tensors."""
        key = (frames, layers, grad)
        if key not in self._traces:
            sequences = self._sequences(frames, reference=not grad)
            self._traces[key] = _run_text_model(self, sequences, self.trunk(frames), layers, grad)
        return self._traces[key]

    def text_model(self, frames: int, grad: bool = True) -> tuple[_Trace, _Trace]:
        """Of the whole text model, and of one layer of it."""
        layers = self.config.get_text_config().num_hidden_layers
        two, three = (self._trace(frames, number, grad) for number in (2, 3))
        layer = three.plus(two, -1)
        return two.plus(layer, layers - 2), layer

    # ------------------------------------------------------------------------------------------ memory

    @property
    def _compute_bytes(self) -> int:
        return 2 if self.training.bf16 or self.training.fp16 else self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        return _DTYPES[self.model.dtype or "auto"]

    def _activations(self, frames: int) -> dict[str, float]:
        """Bytes by what holds them, for a timeline of so many frames; linear in them beyond what is traced."""
        whole, layer = self.text_model(frames)
        # Into the text model: embeddings, frames' features, both in one, and the mask of where they go.
        inputs = self._packed(frames) * (3 * self._compute_bytes + 1)
        text = whole.peak
        kept, besides = self._tower_bytes(frames)
        if self.training.activation_offloading:
            # What is kept for the backward pass leaves the device. What checkpointing makes again does not.
            two = self._trace(frames, 2, grad=True)
            text = two.peak - two.saved + (0 if self.training.gradient_checkpointing else layer.saved)
            kept = 0.0
        return {
            "vision": kept + besides,
            "text model's activations": inputs + text,
            "LM head": self._head_bytes(),
            "pixels": self._pixels(frames),
        }

    def _packed(self, frames: int) -> int:
        """Elements of a hidden state of a device's batch."""
        return sum(end - start for start, end in self._sequences(frames)) * self.config.get_text_config().hidden_size

    def saved(self, frames: int) -> float:
        """Bytes kept between forward and backward pass."""
        inputs = self._packed(frames) * (self._compute_bytes + 1)
        tower, _ = self._tower_bytes(frames)
        pixels = self._pixels(frames) if self.tower_trained else 0.0
        return self.text_model(frames)[0].saved + inputs + tower + pixels

    def _pixels(self, frames: int) -> float:
        """Bytes of the frames as the model takes them, in float32."""
        return self.trees * self.grid.units(frames) * self.grid.pixels * 4.0

    def _tower_bytes(self, frames: int) -> tuple[float, float]:
        """What vision keeps for the backward pass, and what it needs besides while it runs."""
        width = self._compute_bytes
        units = self.trees * self.grid.units(frames) * (1 if self.training.tree_packing else 2 * self.pairs)
        vision: Any = self.config.vision_config
        hidden, middle = vision.hidden_size, vision.intermediate_size
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers
        block = _kept_by_block(self.tower, hidden, middle) * width * self.grid.patches
        projector = units * self.grid.projected * width * self._projector_width()
        if not self.tower_trained:
            chunk = math.ceil(CHUNK_ELEMENTS / self.grid.pixels)
            return projector, block * (min(units, chunk) if self.machine.sharding == Sharding.none else units)
        if self.training.gradient_checkpointing:
            return projector + units * self.grid.patches * width * hidden * depth, units * block
        return projector + units * block * depth, units * block if self.training.activation_offloading else 0.0

    @property
    def _is_connector_trained(self) -> bool:
        return any(weight.requires_grad for part in (*self.mergers, *self.projectors) for weight in part.parameters())

    def _projector_width(self) -> int:
        """Elements that a projector keeps of a row for its backward pass: what goes in and out of its layers."""
        if not self._is_connector_trained:
            return 0
        layers = [part for projector in self.projectors for part in projector.modules() if isinstance(part, nn.Linear)]
        return sum(part.in_features + part.out_features for part in layers)

    def _head_bytes(self) -> float:
        text = self.config.get_text_config()
        answers = self.training.per_device_train_batch_size * (self.rows.chosen_tokens + self.rows.rejected_tokens)
        tile = min(answers, _HEAD_TILE[0]) * min(text.vocab_size, _HEAD_TILE[1]) * self._compute_bytes
        hidden = answers * text.hidden_size * (4 + 2 * self._compute_bytes)
        weight = text.vocab_size * text.hidden_size
        head = self.built.get_output_embeddings().weight
        gradient = weight * 4 if head.requires_grad else 0  # summed up in float32
        gathered = weight * self._compute_bytes if self.machine.sharding in (Sharding.fsdp2, Sharding.zero3) else 0
        return float(tile + hidden + gradient + gathered)

    def _states(self) -> dict[str, float]:
        """Bytes of weights, gradients and optimizer on a device."""
        machine, training = self.machine, self.training
        shared = machine.processes
        trained, frozen = self.parameters.trained, self.parameters.total + self.parameters.adapters
        frozen -= trained
        of = self._dtype.itemsize
        frozen_bytes = self._frozen_bytes(frozen)
        reference = self._reference_weights()
        width: float = 4 if self.parameters.adapters and not self._quantised else of
        if self._quantised:
            width = 2  # TRL turns adapters of a quantised base into bf16
        if machine.sharding == Sharding.none:
            weights = trained * width + frozen_bytes
            gradients = trained * width * (2 if shared > 1 else 1)  # DDP's buckets
            states = trained * _optimizer_bytes(training.optim, width)
        elif machine.sharding == Sharding.fsdp2:
            # Sharded in float32, gathered in bf16: the largest layer, the next one, and the embeddings.
            weights = (trained * 4 + frozen_bytes) / shared + self._gathered()
            gradients = trained * 4 / shared
            states = trained * _optimizer_bytes(training.optim, 4) / shared
            reference /= shared
        else:
            half = 2 if training.bf16 or training.fp16 else 4
            weights = trained * half + frozen_bytes
            states = trained * (4 * (half == 2) + _optimizer_bytes(training.optim, 4)) / shared
            gradients = trained * half / shared + min(trained, _ZERO_BUCKET) * half
            if machine.sharding == Sharding.zero3:
                everything = trained + frozen
                weights = weights / shared + min(everything, _ZERO_LIVE) * half
                reference /= shared
        return {"weights": weights, "reference model": reference, "gradients": gradients, "optimizer": states}

    @property
    def _quantised(self) -> bool:
        return self.model.load_in_4bit or self.model.load_in_8bit

    def _frozen_bytes(self, frozen: int) -> float:
        if not self._quantised:
            return float(frozen * self._dtype.itemsize)
        linear = sum(
            part.weight.numel()
            for name, part in self.built.named_modules()
            if isinstance(part, nn.Linear) and "lora_" not in name and part is not self.built.get_output_embeddings()
        )
        # nf4 has a float32 for every 64 weights, or a byte and a little where that is quantised again.
        scale = 1 / 64 if self.model.use_bnb_nested_quant else 4 / 64
        return linear * (0.5 + scale if self.model.load_in_4bit else 1.0) + (frozen - linear) * 2.0

    def _reference_weights(self) -> float:
        if self.parameters.adapters or self.training.precompute_ref_log_probs:
            return 0.0
        return float(self.parameters.total * self._dtype.itemsize)

    def _gathered(self) -> float:
        layers = list(self.built.get_decoder().layers)
        layer = sum(weight.numel() for weight in layers[0].parameters())
        embeddings = self.built.get_input_embeddings().weight.numel()
        return (2.0 * layer + embeddings) * self._compute_bytes

    def memory(self, frames: int) -> dict[str, float]:
        """GiB of a device by what holds them."""
        parts = {**self._states(), **self._activations(frames)}
        gib = {name: value / GIB for name, value in parts.items() if value}
        gib["CUDA, work space, fragments"] = RESERVE_GIB + FRAGMENTED * sum(gib.values())
        return gib

    def host_gib(self) -> float:
        """What activation offloading moves to the host, per device."""
        return self.saved(self.training.num_frames) / GIB if self.training.activation_offloading else 0.0

    def frames_that_fit(self) -> int:
        """Activations grow linearly: from two sizes follow all others."""
        asked = max(self.training.num_frames, 16)
        few, many = (sum(self.memory(frames).values()) for frames in (asked // 2, asked))
        slope = (many - few) / (asked - asked // 2)
        frames = math.floor(asked + (self.machine.gpu_memory_gib - many) / slope)
        return max(0, frames)

    # -------------------------------------------------------------------------------------------- work

    def tflop(self) -> dict[str, float]:
        """Of a device's batch, by what does it."""
        policy, _ = self.text_model(self.training.num_frames)
        work = {
            "policy: text model": policy.flops,
            "policy: vision": self._vision_flops(self.training.num_frames, self.trees, policy=True),
            "policy: LM head": self._head_flops(backward=True),
        }
        reference, _ = self.text_model(self.reference_frames, grad=False)
        apart = self.trees * (self.pairs if self.training.reference == "anchor" else 1)
        work[BEFOREHAND if self.training.precompute_ref_log_probs else "reference"] = (
            reference.forward_flops
            + self._vision_flops(self.reference_frames, apart, policy=False)
            + self._head_flops(backward=False)
        )
        return {name: value / 1e12 for name, value in work.items()}

    def _vision_flops(self, frames: int, timelines: int, policy: bool) -> float:
        grid, vision = self.grid, self.config.vision_config
        if not self.training.tree_packing:
            timelines *= 2 * self.pairs
        projecting = sum(_linear_elements(part) for part in self.projectors)
        merging = sum(_linear_elements(part) for part in self.mergers)
        pixels = sum(part.weight.numel() for part in self.tower.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d)))
        linear = 2.0 * ((_linear_elements(self.tower) - merging - pixels) * grid.patches)
        attention = sum(4.0 * grid.patches * span * vision.hidden_size * layers for span, layers in grid.windows)
        units = timelines * grid.units(frames)
        again = 1 if policy and self.training.gradient_checkpointing else 0
        trained = policy and self.tower_trained
        passes = (3 + again, 3.5 + again) if trained else (1, 1)
        projector = 2.0 * (merging * grid.tokens + projecting * grid.projected)
        projected = 3 if policy and self._is_connector_trained else 1
        embedded = 2.0 * pixels * grid.patches * (2 if trained else 1)  # pixels have no gradient
        return units * (embedded + linear * passes[0] + attention * passes[1] + projector * projected)

    def _head_flops(self, backward: bool) -> float:
        text = self.config.get_text_config()
        answers = self.training.per_device_train_batch_size * (self.rows.chosen_tokens + self.rows.rejected_tokens)
        product = 2.0 * answers * text.vocab_size * text.hidden_size
        if not backward:
            return product
        trained = self.built.get_output_embeddings().weight.requires_grad
        return product * (4 if trained else 3)  # the logits once more, for the hidden states, for the weight

    # ------------------------------------------------------------------------------------------- words

    def notes(self) -> list[str]:
        """What was assumed."""
        training, rows = self.training, self.rows
        notes = [
            f"A timeline is taken to fill num_frames = {training.num_frames}; fewer where fps × duration is less.",
            f"Question, chosen and rejected answer are taken to be {rows.question_tokens}, {rows.chosen_tokens} and "
            f"{rows.rejected_tokens} tokens long.",
        ]
        if self.rows.reference_frames is None:
            whole = {
                "row": "the whole timeline, its upper bound: rows may name less (Stage 1: the anchor)",
                "full": "the whole timeline",
                "anchor": f"one clip of {_ANCHOR_SECONDS} s",
            }
            notes.append(f"reference={training.reference!r} is taken to be {whole[training.reference]}.")
        if self.family.is_sized_by_frames:
            notes.append("Frames are taken to be 16:9 and to fill max_pixels.")
        if self._dtype == torch.float32 and training.bf16 and self.machine.sharding == Sharding.none:
            notes.append(
                "dtype=float32 under bf16: weights take 4 bytes and are cast in every step (dtype=bfloat16: 2)."
            )
        if training.activation_offloading and self.machine.sharding != Sharding.none:
            notes.append("Offloading is counted as on one device; it has not been tried with sharding.")
        context = context_tokens(self.config)
        longest = self.tokens.prompt + max(rows.chosen_tokens, rows.rejected_tokens)
        if context is not None and longest > context:
            notes.append(
                f"TOO LONG: {longest:,} tokens exceed the model's context of {context:,} (positions × rope scaling): "
                "training would end with an error. Lower num_frames or max_pixels, or scale rope in the model's config."
            )
        if self.parameters.adapters and self.training.precompute_ref_log_probs:
            notes.append(
                "precompute_ref_log_probs with adapters saves no memory (there is no second model), only time."
            )
        return notes


def _run_text_model(run: _Run, sequences: Sequence[tuple[int, int]], trunk: int, layers: int, grad: bool) -> _Trace:
    """A step of the first `layers` layers on fake tensors; `grad=False` for a forward pass alone."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, tree_attention)
    # The tree needs no mask; transformers' own would be built, since it cannot see that fake tensors hold nothing.
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    training = run.training
    decoder = _build(run.config, run.model, training, run.machine, layers).get_decoder()
    decoder.set_attn_implementation(_ATTENTION)
    mode = FakeTensorMode()
    held = _fake(decoder, mode)
    for part in decoder.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0 if training.disable_dropout else part.p
            if part.p:  # as devices do it: a mask of bytes, not of floats
                part.forward = partial(_dropout, part.p)  # type: ignore[method-assign]
    for weight in decoder.parameters():
        if weight.requires_grad:  # gradients are counted apart
            weight.register_post_accumulate_grad_hook(_drop_gradient)
    packed = training.tree_packing
    rows, length = (1, sequences[-1][1]) if packed else (len(sequences), sequences[0][1])
    config = run.config.get_text_config()
    width = config.hidden_size
    half = training.bf16 or training.fp16
    with mode:
        embeddings = torch.empty(rows, length, width, dtype=_embedding_dtype(run), requires_grad=grad)
        axes = run.family.position_axes
        shape = (rows, length) if axes == 1 else (axes, rows, length)
        inputs = {
            "attention_mask": torch.empty(rows, length, dtype=torch.long),
            "position_ids": torch.empty(shape, dtype=torch.long),
        }
        spans = [
            Span(start, start + trunk, end, torch.empty(end - start - trunk, end - start - trunk, dtype=torch.bool))
            for start, end in sequences
        ]
        forest = {"longvpo_tree": Forest(spans)} if packed else {}
        ledger = _Ledger([*held, embeddings, *inputs.values(), *(span.sees for span in spans)])
        with ledger, torch.set_grad_enabled(grad):
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                output = decoder(inputs_embeds=embeddings, use_cache=False, **inputs, **forest).last_hidden_state
            saved, forward = ledger.live, ledger.flops
            if grad:
                gradient = torch.empty_like(output)
                del forest
                output.backward(gradient)
    return _Trace(saved, ledger.peak, forward, ledger.flops)


def _dropout(share: float, hidden: Tensor) -> Tensor:
    return torch.native_dropout(hidden, share, True)[0]


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


def _embedding_dtype(run: _Run) -> torch.dtype:
    return torch.bfloat16 if run.machine.sharding != Sharding.none and run.training.bf16 else run._dtype


def _build(
    config: PreTrainedConfig, model: ModelConfig, training: LongVPOConfig, machine: Machine, layers: int | None = None
) -> PreTrainedModel:
    """The model as the trainer readies it, on the meta device; with the first `layers` layers of the text model."""
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText
    from trl import get_peft_config

    config = copy.deepcopy(config)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = (list(text.layer_types) * layers)[:layers]
        rope = getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):  # look at the positions, which fake tensors do not hold
            text.rope_parameters = {**rope, "rope_type": "default"}
    dtype = _DTYPES[model.dtype or "auto"]
    if machine.sharding != Sharding.none and training.bf16 and layers is not None:
        dtype = torch.bfloat16  # what a layer is gathered in
    if model.load_in_4bit or model.load_in_8bit:
        dtype = torch.bfloat16
    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        if training.freeze_vision_tower and (tower := vision_tower(built)) is not None:
            tower.requires_grad_(False)
        if model.use_peft:
            adapted = copy.copy(model)
            adapted.load_in_4bit = adapted.load_in_8bit = False
            if adapted.lora_target_modules is None and adapted.lora_target_parameters is None:
                adapted.lora_target_modules = family_of(config).adapter_layers
            built = get_peft_model(built, get_peft_config(adapted)).get_base_model()
            if training.freeze_vision_tower and (tower := vision_tower(built)) is not None:
                tower.requires_grad_(False)
    built.train()
    if training.gradient_checkpointing:
        built.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return built


def _optimizer_bytes(optimizer: Any, width: float) -> float:
    """Bytes of state per trained weight."""
    name = str(getattr(optimizer, "value", optimizer))
    moments = 0 if name in ("sgd", "adafactor") else 1 if name.startswith(("lion", "paged_lion")) else 2
    return moments * (1.0 if "8bit" in name else width)


def _linear_elements(module: nn.Module) -> int:
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, kinds))


def _kept_by_block(tower: nn.Module, hidden: int, middle: int) -> int:
    """Elements that a block of a vision transformer keeps of a patch for its backward pass.

    What goes into the two norms and the two groups of layers behind them, query, key and value, what attention and its
    projection give; and inside the MLP what goes in and out of the activation, with its gate where there is one. Root
    mean square norms keep their input in float32 and its normalised form besides; scaled branches what is scaled.
    """
    names = {type(part).__name__ for part in tower.modules()}
    gated = any("gate_proj" in name for name, _ in tower.named_modules())
    scaled = any("lambda_" in name for name, _ in tower.named_parameters())
    squares = any("RMSNorm" in name for name in names)
    return (8 + 6 * squares + 2 * scaled) * hidden + (4 if gated else 2) * middle


# ---------------------------------------------------------------------------------------------- what to change


def _remedies(run: _Run) -> list[Remedy]:
    """Settings that take less memory, one by one, then all together, then the frames that would fit."""
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    training, model = run.training, run.model
    if not training.gradient_checkpointing:
        changes.append(("gradient_checkpointing: true", {"gradient_checkpointing": True}, {}))
    if run.tower_trained:
        changes.append(("freeze_vision_tower: true", {"freeze_vision_tower": True}, {}))
    if model.dtype == "float32" and run.machine.sharding == Sharding.none:
        changes.append(("dtype: bfloat16", {}, {"dtype": "bfloat16"}))
    if not model.use_peft:
        changes.append(("use_peft: true (LoRA)", {}, {"use_peft": True}))
        if not training.precompute_ref_log_probs:
            changes.append(("precompute_ref_log_probs: true", {"precompute_ref_log_probs": True}, {}))
    if training.per_device_train_batch_size > 1:
        changes.append(("per_device_train_batch_size: 1", {"per_device_train_batch_size": 1}, {}))
    if not training.activation_offloading:
        changes.append(("activation_offloading: true", {"activation_offloading": True}, {}))
    found = [_changed(run, settings, shapes) for _, settings, shapes in changes]
    remedies = [_remedy(name, other) for name, other in zip((c[0] for c in changes), found, strict=True)]
    if len(changes) > 1:
        together = _changed(
            run,
            {name: value for _, settings, _ in changes for name, value in settings.items()},
            {name: value for _, _, shapes in changes for name, value in shapes.items()},
        )
        remedies.append(_remedy("all of these", together))
    frames = run.frames_that_fit()
    if 0 < frames < training.num_frames:
        remedies.append(_remedy(f"num_frames: {frames}", _changed(run, {"num_frames": frames}, {})))
    return sorted(remedies, key=lambda remedy: remedy.setting == "all of these")


#: Settings that change nothing of what the text model does in a step.
_LEAVE_TEXT_MODEL = {"precompute_ref_log_probs", "freeze_vision_tower", "activation_offloading"}


def _changed(run: _Run, settings: Mapping[str, Any], shapes: Mapping[str, Any]) -> _Run:
    training, model = copy.copy(run.training), copy.copy(run.model)
    for key, value in settings.items():
        setattr(training, key, value)
    for key, value in shapes.items():
        setattr(model, key, value)
    other = _Run(run.config, model, training, run.machine, run.rows)
    if not shapes and set(settings) <= _LEAVE_TEXT_MODEL:
        other._traces = run._traces
    return other


def _remedy(name: str, run: _Run) -> Remedy:
    gib = sum(run.memory(run.training.num_frames).values())
    return Remedy(name, gib, gib <= run.machine.gpu_memory_gib)


__all__ = [
    "Estimate",
    "Machine",
    "Parameters",
    "Remedy",
    "Rows",
    "Sharding",
    "Tokens",
    "device_memory_gib",
    "estimate",
    "find_model_config",
    "read_config",
    "report",
]
