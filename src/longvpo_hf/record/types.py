"""What a record holds: the dataclasses whose JSON is `longvpo.json`, with the checks that their values go through."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from longvpo_hf.errors import ConfigError, LongVPOError
from longvpo_hf.public import is_hub_name, public_name

#: Version of the record's fields. A newer one is read as far as it is known.
FORMAT = 1


class RecordError(LongVPOError, ValueError):
    """A record is not what it should be."""


def _extra() -> Any:
    return field(default_factory=dict, kw_only=True, hash=False)


@dataclass(frozen=True, slots=True)
class Source:
    """A model or dataset that others can find, or that is on this machine alone.

    Args:
        name: Its name on the Hub, or the last part of its path; empty for a model built from a configuration.
        revision: Commit on the Hub; empty where not known.
        on_hub: Whether `name` is one on the Hub.
        digest: Tells content of one name apart where there is no revision: of weights `weights_digest`, of rows the
            digest in their record; empty where not known.

    Raises:
        RecordError: If `on_hub` and the name or the revision is not of the Hub's form.
    """

    name: str
    revision: str = ""
    on_hub: bool = False
    digest: str = ""
    extra: Mapping[str, Any] = _extra()

    def __post_init__(self) -> None:
        if self.on_hub and not (is_hub_name(self.name) and re.fullmatch(r"[\w./-]{0,200}", self.revision)):
            raise RecordError(
                f"On the Hub are only names of its form, at a commit or branch, got {self.name!r} at {self.revision!r}."
            )

    @classmethod
    def of(cls, name: str, revision: str = "", digest: str = "") -> Source:
        """What `from_pretrained` or `load_dataset` would find under `name`."""
        public = public_name(name)
        if public != name or not is_hub_name(name):
            return cls(public, digest=digest)
        return cls(name, revision, on_hub=True, digest=digest)

    @classmethod
    def of_model(cls, name: str, weights: str = "") -> Source:
        """A model that answers, by its responder's name: `name`, or `name@revision`.

        Args:
            name: The responder's name.
            weights: The commit it was loaded at, or the digest of its files.
        """
        model, _, revision = name.partition("@")
        is_commit = re.fullmatch(r"[0-9a-f]{40}", weights) is not None
        if is_commit or (not weights and "/" in model):
            return cls.of(model, revision or weights)
        return cls(public_name(model), revision, digest=weights)

    @property
    def load_from(self) -> str:
        """The name as it stands in code."""
        return self.name if self.on_hub else f"path/to/{self.name or 'the/base/model'}"


@dataclass(frozen=True, slots=True)
class MethodRecord:
    """A method that made rows.

    Args:
        name: As in the rows' provenance.
        prompt_version: Version of its prompt texts.
        citation: BibTeX of its paper.
        num_rows: Rows it made; None where not counted.
    """

    name: str
    prompt_version: str = ""
    citation: str = ""
    num_rows: int | None = None
    extra: Mapping[str, Any] = _extra()


@dataclass(frozen=True, slots=True)
class LicenceRecord:
    """Clips of one licence.

    Args:
        licence: As the corpus calls it; empty where it states none.
        num_clips: Clips of the rows.
        num_sources: Source videos they are from.
        sources: Names of some of these.
    """

    licence: str
    num_clips: int
    num_sources: int
    sources: tuple[str, ...] = ()
    extra: Mapping[str, Any] = _extra()


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """How the rows of a dataset came about.

    Args:
        title: Heading of the card.
        methods: What made the rows.
        models: Who did what, e.g. `questions`, `answers`, `judge`.
        settings: Of the method.
        facts: More named facts, e.g. of the corpus, for the card's table.
        funnel: What came through each of `stages`, and how many were `dropped` for each reason.
        reasons: What the names of reasons mean.
        seed: Decided every random choice.
        num_rows: Rows of the dataset.
        num_clips: Different clips they show.
        licences: Licences and sources of the clips.
        by_reference: Whether the rows come without their media.
        digest: Follows from the rows.
        versions: Of the packages that made them.
    """

    title: str
    methods: tuple[MethodRecord, ...] = ()
    models: Mapping[str, Source] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    funnel: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    num_rows: int = 0
    num_clips: int = 0
    licences: tuple[LicenceRecord, ...] = ()
    by_reference: bool = False
    digest: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT
    extra: Mapping[str, Any] = _extra()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How frames were taken of a timeline; the defaults are those of `LongVPOConfig`.

    Args:
        num_frames: At most so many frames per video.
        fps: At most so many frames per second; None for no such bound.
        max_pixels: At most so many pixels per frame; None keeps the source's size.

    Raises:
        ConfigError: If one of them is out of bounds.
    """

    num_frames: int = 128
    fps: float | None = 1.0
    max_pixels: int | None = 448 * 448
    extra: Mapping[str, Any] = _extra()

    def __post_init__(self) -> None:
        for name in ("num_frames", "max_pixels"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {value}.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ConfigError(f"fps must be > 0, or None for no bound, got {self.fps}.")

    def __str__(self) -> str:
        rate = "" if self.fps is None else f", {self.fps:g} a second"
        pixels = "" if self.max_pixels is None else f", {self.max_pixels} pixels each"
        return f"at most {self.num_frames} frames{rate}{pixels}"


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """Rows that a model was trained on, and the methods that made them."""

    source: Source
    methods: tuple[MethodRecord, ...] = ()
    extra: Mapping[str, Any] = _extra()


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """The adapter that was trained; see peft for its fields.

    Args:
        is_merged: Whether the weights beside this record are the whole model, with the adapter in it.
    """

    kind: str
    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    is_merged: bool = False
    extra: Mapping[str, Any] = _extra()


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """Settings of a training run, under the names of `LongVPOConfig`, and how far it came.

    Args:
        losses: Weight of each loss.
        sft_weight: α, the weight of the SFT term.
        precision: `bf16`, `fp16` or `fp32`.
        tree_packing: Whether the model was scored in one packed sequence per timeline.
        num_processes: Processes that trained together; those that share each batch count as one.
        answer_reasoning: Whether reasoning in the answers was kept or dropped.
        num_steps: Optimizer steps so far.
        num_epochs: Epochs so far.
    """

    losses: Mapping[str, float] = field(default_factory=dict)
    beta: float = 0.0
    sft_weight: float = 0.0
    reference: str = ""
    reference_num_frames: int | None = None
    adapter: AdapterRecord | None = None
    freeze_vision_tower: bool = False
    learning_rate: float = 0.0
    lr_scheduler_type: str = ""
    warmup_steps: float = 0.0
    optim: str = ""
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    num_processes: int = 1
    precision: str = ""
    gradient_checkpointing: bool = False
    tree_packing: bool = False
    pairs_per_timeline: int = 1
    answer_reasoning: str = "keep"
    max_length: int | None = None
    seed: int = 0
    num_steps: int = 0
    num_epochs: float = 0.0
    extra: Mapping[str, Any] = _extra()


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """A result that was measured after training; the fields of `huggingface_hub.EvalResult` of these names.

    Args:
        metric_args: `protocol`: how it was measured, in one line. `questions`: how many were asked. `interval_95`: the
            95 % bounds of the value. `base`: `value` and `interval_95` of the base model, measured alike. Each as far
            as known.
    """

    task_type: str
    dataset_type: str
    dataset_name: str
    metric_type: str
    metric_value: float | str | None
    metric_name: str | None = None
    dataset_split: str | None = None
    metric_args: Mapping[str, Any] | None = field(default=None, hash=False)
    extra: Mapping[str, Any] = _extra()


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """How a model came about.

    Args:
        name: Heading of the card.
        load_from: What `from_pretrained` takes.
        base: The model that was trained.
        sampling: Frames the policy saw; None where not known.
        data: What it was trained on.
        training: Settings of the run; None where not known.
        progress: First and last logged value of each metric.
        evaluations: Measured after training.
        licence: The base model's `license`, `license_name`, `license_link`, as far as known.
        citations: BibTeX of what the training uses; the methods' stand in `data`.
        tags: Beside those every card has.
        runs: Name and address of where the run was logged.
        versions: Of the packages that trained it.
    """

    name: str
    load_from: str
    base: Source
    sampling: Sampling | None = None
    data: tuple[TrainedOn, ...] = ()
    training: TrainingRecord | None = None
    progress: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    evaluations: tuple[EvaluationRecord, ...] = ()
    licence: Mapping[str, str] = field(default_factory=dict)
    citations: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    runs: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT
    extra: Mapping[str, Any] = _extra()

    @property
    def adapter(self) -> str:
        """Kind of adapter that must be loaded, e.g. `LoRA`; empty where the weights are those of a whole model."""
        adapter = self.training.adapter if self.training else None
        return adapter.kind if adapter and not adapter.is_merged else ""

    def merged(self) -> ModelRecord:
        """The record of the whole model that the adapter was merged into; of a whole model the same record."""
        if self.training is None or self.training.adapter is None:
            return self
        return replace(self, training=replace(self.training, adapter=replace(self.training.adapter, is_merged=True)))
