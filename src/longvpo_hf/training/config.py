"""`LongVPOConfig`: what `LongVPOTrainer` adds to TRL's `DPOConfig`, and the papers' values where they differ.

Knows nothing of models or data. Every number names its source; LongVPO is arXiv 2602.02341.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trl import DPOConfig

from longvpo_hf.errors import ConfigError

ReferenceView = Literal["row", "anchor", "full"]
OnBadVideo = Literal["raise", "skip"]


@dataclass
class LongVPOConfig(DPOConfig):
    """Settings of `LongVPOTrainer`; all of TRL's `DPOConfig` and transformers' `TrainingArguments` besides.

    Parameters:
        num_frames (`int`, *optional*, defaults to `128`):
            Most frames the policy sees of a timeline, spread over its clips by duration, at least one each.
        reference_num_frames (`int`, *optional*):
            Most frames the reference model sees of its view. `None` means `num_frames`.
        fps (`float`, *optional*, defaults to `1.0`):
            Most frames per second of a clip, for policy and reference. `None` for no such bound.
        max_pixels (`int`, *optional*, defaults to `200704`):
            Most pixels (height × width) of a frame before it goes to the processor. `None` keeps the source's size.
        reference (`str`, *optional*, defaults to `"row"`):
            What the reference model is scored on: `"row"` what each row says, `"anchor"` the row's reference clips (its
            evidence where it names none), `"full"` the whole timeline.
        sft_weight (`float`, *optional*, defaults to `1.0`):
            α of `L_DPO + α · (−log π(y⁺) / |y⁺|)`. The mean is per answer, then over the batch, as in the paper;
            `0.0` leaves the term out. Shorthand for `"sft"` in `loss_type` with its weight in `loss_weights`.
        freeze_vision_tower (`bool`, *optional*, defaults to `False`):
            Train everything but the vision tower, which then runs without graph, a bounded number of frames at a time.
        tree_packing (`bool`, *optional*, defaults to `True`):
            Score all answers about a timeline in one forward pass, which gives the same numbers for less. Models whose
            attention cannot take it are scored in two sequences per row, and the log says why.
        pairs_per_timeline (`int`, *optional*, defaults to `1`):
            Up to so many rows of one timeline come next to each other, so that they share its video's forward pass when
            they fall into one batch. Choose a divisor of `per_device_train_batch_size`. A streamed dataset keeps its
            own order.
        on_bad_video (`str`, *optional*, defaults to `"raise"`):
            What becomes of a row whose video cannot be decoded: `"raise"` ends the run with an error that names row and
            clip, `"skip"` leaves the row out and counts it by reason (`bad_videos/<reason>` in the logs). The loss is
            then the mean over the rows that are left; a batch without any adds nothing to the gradient.

    `precompute_ref_log_probs=True` works for video rows, see `LongVPOTrainer`.

    Defaults changed from TRL: `beta=0.01`, `learning_rate=5e-7`, `lr_scheduler_type="cosine"`, `warmup_steps=0.01` (a
    ratio), `num_train_epochs=1`, `max_length=None` (visual tokens are never truncated).
    """

    num_frames: int = field(
        default=128,
        metadata={
            "help": "Most frames the policy sees of a timeline, spread over its clips by duration, at least one each. "
            "LongVPO trains with at most 128, 256 or 512."
        },
    )
    reference_num_frames: int | None = field(
        default=None,
        metadata={"help": "Most frames the reference model sees of its view. None means num_frames."},
    )
    fps: float | None = field(
        default=1.0,
        metadata={
            "help": "Most frames per second of a clip, for policy and reference; None for no such bound. LongVPO "
            "samples its clips at 1 fps."
        },
    )
    max_pixels: int | None = field(
        default=448 * 448,
        metadata={
            "help": "Most pixels (height x width) of a frame before it goes to the processor; None keeps the source's "
            "size. The default is InternVL's tile of 448 x 448."
        },
    )
    reference: ReferenceView = field(
        default="row",
        metadata={
            "help": "What the reference model is scored on: 'row' what each row says, 'anchor' the row's reference "
            "clips (its evidence where it names none), 'full' the whole timeline.",
            "choices": ["row", "anchor", "full"],
        },
    )
    sft_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight alpha of the SFT term on the chosen answer, averaged per answer. LongVPO uses 1.0; 0 "
            "leaves it out."
        },
    )
    freeze_vision_tower: bool = field(
        default=False,
        metadata={"help": "Train everything but the vision tower. LongVPO trains the whole model; TPO freezes it."},
    )
    tree_packing: bool = field(
        default=True,
        metadata={
            "help": "Score all answers about a timeline in one forward pass: same numbers, less time and memory. "
            "Models that cannot take it fall back to two sequences per row, and the log says why."
        },
    )
    pairs_per_timeline: int = field(
        default=1,
        metadata={
            "help": "Up to so many rows of one timeline come next to each other, so that they share its video's "
            "forward pass when they fall into one batch. Choose a divisor of per_device_train_batch_size."
        },
    )
    on_bad_video: OnBadVideo = field(
        default="raise",
        metadata={
            "help": "What becomes of a row whose video cannot be decoded: 'raise' ends the run with an error that "
            "names row and clip, 'skip' leaves the row out and counts it by reason.",
            "choices": ["raise", "skip"],
        },
    )

    beta: float = field(default=0.01, metadata={"help": "Strength of the reference in DPO. LongVPO uses 0.01."})
    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate. LongVPO uses 5e-7."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule. LongVPO uses cosine."})
    warmup_steps: float = field(
        default=0.01, metadata={"help": "Warm-up steps, or their share below 1. LongVPO uses a ratio of 0.01."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs. LongVPO trains one per stage."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a sequence. A longer one is an error: visual tokens are never truncated."},
    )

    def __post_init__(self) -> None:
        for name in ("num_frames", "reference_num_frames", "max_pixels", "max_length", "pairs_per_timeline"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {value}.")
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"fps must be > 0, or None for no bound, got {self.fps}.")
        if self.reference not in ("row", "anchor", "full"):
            raise ConfigError(f"reference must be 'row', 'anchor' or 'full', got {self.reference!r}.")
        if self.on_bad_video not in ("raise", "skip"):
            raise ConfigError(f"on_bad_video must be 'raise' or 'skip', got {self.on_bad_video!r}.")
        if self.sft_weight < 0:
            raise ConfigError(f"sft_weight must be ≥ 0, got {self.sft_weight}.")
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.sft_weight and "sft" not in self.loss_type:
            weights = self.loss_weights or [1.0] * len(self.loss_type)
            self.loss_type = [*self.loss_type, "sft"]
            self.loss_weights = [*weights, self.sft_weight]
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """All but the token: transformers pickles its arguments into `training_args.bin`, which is published."""
        return {**self.__dict__, "hub_token": None}
