"""`LongVPOConfig`: the settings that `LongVPOTrainer` adds to TRL's `DPOConfig`, and defaults as in the papers.

Every number names its source; LongVPO is arXiv 2602.02341.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from trl import DPOConfig

from longvpo_hf.errors import ConfigError, check_seed, check_types, not_among
from longvpo_hf.precision import is_computed
from longvpo_hf.public import is_hub_name
from longvpo_hf.reasoning import AnswerReasoning

ReferenceView = Literal["row", "anchor", "full"]
OnBadVideo = Literal["raise", "skip"]
Divergence = Literal["forward", "reverse", "jsd"]
DistilledAnswer = Literal["chosen", "sampled"]
RejectedView = Literal["no_evidence", "reversed", "shuffled"]
OnBadRow = Literal["raise", "skip"]
#: What `loss_type` may be: TRL's losses, which it refuses others for at the first step.
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


@dataclass
class LongVPOConfig(DPOConfig):
    """Settings of `LongVPOTrainer`; all of TRL's `DPOConfig` and transformers' `TrainingArguments` besides.

    `bf16` is on by default, as in TRL, but with `use_cpu` only where this CPU computes in it.

    Parameters:
        num_frames (`int`, *optional*, defaults to `128`):
            Maximum number of frames the policy sees of a timeline, spread over its clips by duration, at least one
            each.
        reference_num_frames (`int`, *optional*):
            Maximum number of frames the reference model sees of its view. `None` means `num_frames`.
        fps (`float`, *optional*, defaults to `1.0`):
            Maximum frames per second of a clip, for policy and reference. `None` for no such bound.
        max_pixels (`int`, *optional*, defaults to `200704`):
            Maximum pixels (height × width) of a frame before it goes to the processor. `None` keeps the source's size.
        reference (`str`, *optional*, defaults to `"row"`):
            The view on which the reference model is scored: `"row"` the one each row names, `"anchor"` the row's
            reference clips (its evidence where it names none), `"full"` the whole timeline.
        sft_weight (`float`, *optional*, defaults to `1.0`):
            α of `L_DPO + α · (−log π(y⁺) / |y⁺|)`; `0.0` leaves the SFT term out. The mean is per answer, then over the
            batch, as in the paper. It is the only place where α is set: `loss_type` and `loss_weights` are about the
            preference losses, and `"sft"` among them is refused. `loss_type="sft"` alone trains without a preference
            loss, on `α · (−log π(y⁺) / |y⁺|)`.
        view_distillation_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the divergence between the reference on its own view and the policy on the whole timeline, over
            the vocabulary, averaged over the tokens of an answer, then over the batch. With `loss_type="sft"` and
            `sft_weight=0` it is trained on alone. Not in the papers.
        view_distillation_on (`str`, *optional*, defaults to `"chosen"`):
            Over which answer: `"chosen"` the row's, `"sampled"` one that the policy draws from its own distribution
            on the whole timeline. The gradient does not go through the drawing.
        view_distillation_refresh_steps (`int`, *optional*, defaults to `1`):
            Number of optimizer steps for which a sampled answer serves its row; the row is then answered anew. With 1
            the policy answers each batch. Larger numbers save work only where rows come again within so many steps.
        view_distillation_max_new_tokens (`int`, *optional*, defaults to `128`):
            Maximum number of tokens of a sampled answer, and no more than `max_length` and the model's context leave.
        view_distillation_top_k (`int`, *optional*, defaults to `64`):
            With `precompute_ref_log_probs=True`, number of the reference's likeliest tokens that are kept for each
            token of the chosen answer; all others count as one. The divergence is then at most the whole one, and
            equal where the vocabulary has no more tokens. 12 bytes a number and token of an answer on disk.
        view_distillation_divergence (`str`, *optional*, defaults to `"forward"`):
            `"forward"`: KL(reference ‖ policy), `"reverse"`: KL(policy ‖ reference), `"jsd"`: the mean of both's KL to
            their mean.
        view_distillation_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both; the divergence is not multiplied by its square.
        view_distillation_guard (`bool`, *optional*, defaults to `False`):
            Weigh each token by `1 − p/q`, at least 0, where q is what the reference on its view gives the answer's own
            token and p what the policy gives it: a reference that only seems to know teaches nothing.
        view_preference_weight (`float`, *optional*, defaults to `0.0`):
            Weight of a preference between views: of the chosen answer on the whole timeline over the same answer on a
            view that does not support it, by `−log σ` of `beta` times the difference of their log-ratios, averaged over
            the batch. Beside any loss; with `loss_type="sft"` and `sft_weight=0` it is trained on alone. Every row
            brings a second timeline. Not in the papers; after mDPO, which weighs it 1 beside DPO.
        view_preference_rejected (`str`, *optional*, defaults to `"no_evidence"`):
            The view that is rejected: `"no_evidence"` the timeline without the row's evidence clips, `"reversed"` its
            clips in the opposite order, `"shuffled"` in an order that follows from the row's id. The last two are for
            questions about order, and need at least two clips of evidence. A row without such a view cannot be trained
            on, see `on_bad_row`.
        freeze_vision_tower (`bool`, *optional*, defaults to `False`):
            Train everything but the vision tower, adapters in it included. A frozen tower runs without a graph, a
            bounded number of frames at a time.
        tiled_mlp_num_shards (`int`, *optional*, defaults to `1`):
            Number of parts of its tokens that each dense MLP of the text model takes one after the other, so that the
            activations inside it live for one part at a time: for long sequences, where one layer's are the most memory
            of a step under activation checkpointing. The same numbers; the MLP's forward pass is computed once more.
        tree_packing (`bool`, *optional*, defaults to `True`):
            Score all answers about a timeline in one forward pass: the same numbers, less time and memory. Models whose
            attention cannot take it score two sequences per row, and the log says why.
        tree_packing_trial (`bool`, *optional*):
            Score up to two rows of the first batch both ways, and go on without trees, with a warning, where the
            numbers differ. `None` does so for models of families that `docs/families.md` does not list.
        pairs_per_timeline (`int`, *optional*, defaults to `1`):
            Number of rows of one timeline that are kept next to each other, so that they share its video's forward pass
            when they are in one batch. Choose a divisor of `per_device_train_batch_size`. A streamed dataset keeps its
            own order.
        on_bad_video (`str`, *optional*, defaults to `"raise"`):
            What happens to a row whose video cannot be decoded: `"raise"` ends the run with an error that names row and
            clip, `"skip"` leaves the row out and counts it by reason (`bad_videos/<reason>` in the logs). The loss is
            then the mean over the remaining rows; a batch without any adds nothing to the gradient.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            What happens to rows that cannot be trained on: no clips, empty or equal answers, more clips than frames,
            more tokens than the model's context, texts that the chat template cannot take. All rows are looked over
            before training, without opening a video: `"raise"` ends the run with all that was found, `"skip"` leaves
            these rows out and logs them. Of a stream, the first 256 rows are looked over
            before training and each row when it comes.
        answer_reasoning (`str`, *optional*, defaults to `"keep"`):
            What happens to reasoning between tags (`<think>…</think>`) in the rows' answers: `"keep"` trains on it as
            the chat template renders it, `"drop"` leaves it out. Where the answers of a row have none, the empty
            reasoning that some templates write before them is part of the prompt: no loss is on it.
        max_nonfinite_steps (`int`, *optional*, defaults to `0`):
            Number of optimizer steps in a row that may have a loss or a gradient which is not finite (NaN or infinite).
            Such a step does not change the weights, and its loss is logged as NaN. One more ends the run with an error;
            nothing is saved after it. In fp16 the loss scaler skips steps whose gradient overflows, and only the loss
            counts. DeepSpeed applies a step before it can be looked at: there the setting must be 0.

    `precompute_ref_log_probs=True` works for video rows, see `LongVPOTrainer`.

    Defaults changed from TRL: `beta=0.01`, `learning_rate=5e-7`, `lr_scheduler_type="cosine"`, `warmup_steps=0.01` (a
    ratio), `num_train_epochs=1`, `max_length=None` (visual tokens are never truncated).
    """

    num_frames: int = field(
        default=128,
        metadata={
            "help": "Maximum number of frames the policy sees of a timeline, spread over its clips by duration, at "
            "least one each. LongVPO trains with at most 128, 256 or 512."
        },
    )
    reference_num_frames: int | None = field(
        default=None,
        metadata={"help": "Maximum number of frames the reference model sees of its view. None means num_frames."},
    )
    fps: float | None = field(
        default=1.0,
        metadata={
            "help": "Maximum frames per second of a clip, for policy and reference; None for no such bound. LongVPO "
            "samples its clips at 1 fps."
        },
    )
    max_pixels: int | None = field(
        default=448 * 448,
        metadata={
            "help": "Maximum pixels (height x width) of a frame before it goes to the processor; None keeps the "
            "source's size. The default is InternVL's tile of 448 x 448."
        },
    )
    reference: ReferenceView = field(
        default="row",
        metadata={
            "help": "The view on which the reference model is scored: 'row' the one each row names, 'anchor' the row's "
            "reference clips (its evidence where it names none), 'full' the whole timeline.",
            "choices": ["row", "anchor", "full"],
        },
    )
    sft_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight alpha of the SFT term on the chosen answer, averaged per answer; 0 leaves it out. The only "
            "place where it is set: 'sft' among several loss types is refused. LongVPO uses 1.0."
        },
    )
    view_distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the divergence between the reference on its own view and the policy on the whole "
            "timeline, per token of an answer; 0 leaves it out. Not in the papers."
        },
    )
    view_distillation_on: DistilledAnswer = field(
        default="chosen",
        metadata={
            "help": "The answer that view distillation is over: 'chosen' the row's, 'sampled' one that the policy "
            "draws on the whole timeline.",
            "choices": ["chosen", "sampled"],
        },
    )
    view_distillation_refresh_steps: int = field(
        default=1,
        metadata={
            "help": "Number of optimizer steps for which a sampled answer serves its row in view distillation; 1 "
            "answers each batch anew."
        },
    )
    view_distillation_max_new_tokens: int = field(
        default=128,
        metadata={
            "help": "Maximum number of tokens of a sampled answer in view distillation. The default is that of TRL's "
            "GKD, which samples too."
        },
    )
    view_distillation_top_k: int = field(
        default=64,
        metadata={
            "help": "With precompute_ref_log_probs, number of the reference's likeliest tokens that are kept for each "
            "token of the chosen answer in view distillation; all others count as one."
        },
    )
    view_distillation_divergence: Divergence = field(
        default="forward",
        metadata={
            "help": "'forward': KL of the policy from the reference, 'reverse': KL of the reference from the policy, "
            "'jsd': the mean of both's KL to their mean.",
            "choices": ["forward", "reverse", "jsd"],
        },
    )
    view_distillation_temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits of reference and policy in view distillation."}
    )
    view_distillation_guard: bool = field(
        default=False,
        metadata={
            "help": "Weigh each token in view distillation by 1 - p/q, at least 0: q is what the reference gives the "
            "answer's own token, p what the policy gives it."
        },
    )
    view_preference_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a preference of the chosen answer on the whole timeline over the same answer on a view "
            "that does not support it; 0 leaves it out. Every row brings a second timeline. Not in the papers."
        },
    )
    view_preference_rejected: RejectedView = field(
        default="no_evidence",
        metadata={
            "help": "The view that is rejected: 'no_evidence' the timeline without the row's evidence, 'reversed' its "
            "clips in the opposite order, 'shuffled' in another one. Order is for questions about order: rows then "
            "need two clips of evidence.",
            "choices": ["no_evidence", "reversed", "shuffled"],
        },
    )
    freeze_vision_tower: bool = field(
        default=False,
        metadata={
            "help": "Train everything but the vision tower, adapters in it included. LongVPO trains the whole model; "
            "TPO freezes the tower."
        },
    )
    tiled_mlp_num_shards: int = field(
        default=1,
        metadata={
            "help": "Number of parts of its tokens that each dense MLP of the text model takes one after the other: "
            "less memory inside a layer, one forward pass of the MLP more."
        },
    )
    tree_packing: bool = field(
        default=True,
        metadata={
            "help": "Score all answers about a timeline in one forward pass: same numbers, less time and memory. "
            "Models that cannot take it fall back to two sequences per row, and the log says why."
        },
    )
    tree_packing_trial: bool | None = field(
        default=None,
        metadata={
            "help": "Score up to two rows of the first batch both ways, and go on without trees where the numbers "
            "differ. None does so for models of families that are not known."
        },
    )
    pairs_per_timeline: int = field(
        default=1,
        metadata={
            "help": "Number of rows of one timeline that are kept next to each other, so that they share its video's "
            "forward pass when they are in one batch. Choose a divisor of per_device_train_batch_size."
        },
    )
    on_bad_video: OnBadVideo = field(
        default="raise",
        metadata={
            "help": "What happens to a row whose video cannot be decoded: 'raise' ends the run with an error that "
            "names row and clip, 'skip' leaves the row out and counts it by reason.",
            "choices": ["raise", "skip"],
        },
    )
    on_bad_row: OnBadRow = field(
        default="raise",
        metadata={
            "help": "What happens to rows that cannot be trained on. They are looked for before training: 'raise' ends "
            "the run with all that was found, 'skip' leaves them out and logs them.",
            "choices": ["raise", "skip"],
        },
    )
    answer_reasoning: AnswerReasoning = field(
        default="keep",
        metadata={
            "help": "What happens to reasoning between tags (<think>...</think>) in the rows' answers: 'keep' trains "
            "on it as the chat template renders it, 'drop' leaves it out.",
            "choices": ["keep", "drop"],
        },
    )
    max_nonfinite_steps: int = field(
        default=0,
        metadata={
            "help": "Number of optimizer steps in a row that may have a loss or gradient of NaN or infinity; they "
            "leave the weights unchanged. One more ends the run, and nothing is saved after it. 0 with DeepSpeed."
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
        metadata={
            "help": "Maximum number of tokens of a sequence. A longer one is an error: visual tokens are never "
            "truncated."
        },
    )

    def __post_init__(self) -> None:
        check_types(self, but={each.name for each in fields(DPOConfig)})
        for name in (
            "num_frames",
            "reference_num_frames",
            "max_pixels",
            "max_length",
            "pairs_per_timeline",
            "tiled_mlp_num_shards",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {value}.")
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"fps must be > 0, or None for no bound, got {self.fps}.")
        if self.reference not in ("row", "anchor", "full"):
            raise ConfigError(f"reference must be 'row', 'anchor' or 'full', got {self.reference!r}.")
        if self.on_bad_video not in ("raise", "skip"):
            raise ConfigError(f"on_bad_video must be 'raise' or 'skip', got {self.on_bad_video!r}.")
        if self.on_bad_row not in ("raise", "skip"):
            raise ConfigError(f"on_bad_row must be 'raise' or 'skip', got {self.on_bad_row!r}.")
        if self.answer_reasoning not in ("keep", "drop"):
            raise ConfigError(f"answer_reasoning must be 'keep' or 'drop', got {self.answer_reasoning!r}.")
        if self.max_nonfinite_steps < 0:
            raise ConfigError(f"max_nonfinite_steps must be ≥ 0, got {self.max_nonfinite_steps}.")
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_losses()
        self._check_everywhere()
        if self.bf16 is None and not self.fp16 and self.use_cpu:
            self.bf16 = is_computed(torch.bfloat16)
        super().__post_init__()
        every = (self.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
        if not isinstance(every, int) or every < 1:
            raise ConfigError(f"gradient_checkpointing_kwargs: every_n_layers must be a number ≥ 1, got {every!r}.")

    def _check_everywhere(self) -> None:
        """Refuses what transformers, torch or the Hub would refuse late, or never."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{each.name} must be finite, got {value}.")
        for name in (
            "learning_rate",
            "beta",
            "weight_decay",
            "warmup_steps",
            "max_grad_norm",
            "dataloader_num_workers",
        ):
            if isinstance(value := getattr(self, name), (int, float)) and value < 0:
                raise ConfigError(f"{name} must be ≥ 0, got {value}.")
        # transformers trains for all epochs with max_steps=0, and with none at all it saves the model as it was.
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(f"max_steps must be ≥ 1, or -1 for as many as the epochs have, got {self.max_steps}.")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise ConfigError(
                f"num_train_epochs must be > 0 where max_steps is not given, got {self.num_train_epochs}."
            )
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {value}.")
        if self.max_grad_norm is None:
            raise ConfigError("max_grad_norm must be a number ≥ 0, and is 0 for no bound, got None.")
        check_seed(self.seed, bits=32)
        if self.data_seed is not None:
            check_seed(self.data_seed, "data_seed")
        if self.hub_model_id is not None and not is_hub_name(self.hub_model_id):
            raise ConfigError(
                f"hub_model_id must be NAMESPACE/NAME, a repository on the Hub, got {self.hub_model_id!r}."
            )

    def _check_losses(self) -> None:
        """Refuses settings that contradict each other, and those that fail only at the first step."""
        for name in self.loss_type:
            if name not in LOSSES:
                raise not_among("loss_type", name, LOSSES)
        if not (self.sft_weight >= 0 and math.isfinite(self.sft_weight)):
            raise ConfigError(f"sft_weight must be ≥ 0 and finite, got {self.sft_weight}.")
        self._check_distillation()
        self._check_view_preference()
        if "sft" in self.loss_type:
            if len(self.loss_type) > 1:
                raise ConfigError(
                    f"loss_type={self.loss_type}: the SFT term is weighted by sft_weight alone (now "
                    f"{self.sft_weight:g}). Leave 'sft' out of loss_type, and its weight out of loss_weights."
                )
            if self.sft_weight == self.view_distillation_weight == self.view_preference_weight == 0:
                raise ConfigError("loss_type='sft' with sft_weight=0 leaves nothing to train on: set sft_weight > 0.")
            if self.loss_weights is not None:
                raise ConfigError(
                    f"loss_type='sft' is weighted by sft_weight (now {self.sft_weight:g}): leave loss_weights out, got "
                    f"{self.loss_weights}."
                )
        if self.use_weighting and "hinge" in self.loss_type:
            raise ConfigError(
                "use_weighting=True does not work with loss_type 'hinge': TRL multiplies the hinge loss in place, and "
                "its gradient cannot be computed. Set use_weighting=False, or choose another loss."
            )

    def check_run(self, has_clips: bool, is_deepspeed: bool) -> None:
        """Refuses settings that a run's rows, or DeepSpeed, cannot have.

        Raises:
            ConfigError: If there are such.
        """
        if self.max_nonfinite_steps and is_deepspeed:
            raise ConfigError(
                f"max_nonfinite_steps={self.max_nonfinite_steps}: DeepSpeed changes the weights before a step can be "
                "looked at; set it to 0."
            )
        if has_clips and self.train_sampling_strategy not in ("random", "sequential"):
            raise ConfigError(
                f"train_sampling_strategy must be 'random' or 'sequential' for rows with clips, whose lengths are not "
                f"known before they are decoded, got {self.train_sampling_strategy!r}."
            )
        if has_clips and self.accelerator_config.dispatch_batches:
            raise ConfigError(
                "accelerator_config: dispatch_batches=True does not go with rows with clips, whose tensors are not one "
                "for each row. Leave it out: every process reads its own rows."
            )
        if self.torch_compile and self.tree_packing and has_clips:
            raise ConfigError(
                "torch_compile=True does not go with tree_packing=True: a compiled model attends by its own masks, not "
                "along the tree. Set tree_packing=False, or leave torch_compile out."
            )
        if self.view_distillation_weight and (is_deepspeed or not has_clips):
            raise ConfigError(
                f"view_distillation_weight={self.view_distillation_weight:g} needs rows with clips, which have two "
                "views, and DDP or FSDP2: DeepSpeed keeps parts of the LM head elsewhere. Set it to 0."
            )
        if self.view_preference_weight and not has_clips:
            raise ConfigError(
                f"view_preference_weight={self.view_preference_weight:g} needs rows with clips, of which a view can be "
                "rejected. Set it to 0."
            )

    def _check_distillation(self) -> None:
        weight, divergence = self.view_distillation_weight, self.view_distillation_divergence
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(f"view_distillation_weight must be ≥ 0 and finite, got {weight}.")
        if self.view_distillation_on not in ("chosen", "sampled"):
            raise ConfigError(f"view_distillation_on must be 'chosen' or 'sampled', got {self.view_distillation_on!r}.")
        for name in ("refresh_steps", "max_new_tokens", "top_k"):
            value = getattr(self, f"view_distillation_{name}")
            if value < 1:
                raise ConfigError(f"view_distillation_{name} must be ≥ 1, got {value}.")
        if divergence not in ("forward", "reverse", "jsd"):
            raise ConfigError(
                f"view_distillation_divergence must be 'forward', 'reverse' or 'jsd', got {divergence!r}."
            )
        if not (self.view_distillation_temperature > 0 and math.isfinite(self.view_distillation_temperature)):
            raise ConfigError(
                f"view_distillation_temperature must be > 0 and finite, got {self.view_distillation_temperature}."
            )
        if weight and self.view_distillation_on == "sampled" and self.precompute_ref_log_probs:
            raise ConfigError(
                "view_distillation_on='sampled' does not go with precompute_ref_log_probs=True: the reference has to "
                "grade them when they are drawn. Set view_distillation_on='chosen', or train an adapter (use_peft), "
                "for which the reference takes no memory."
            )

    def _check_view_preference(self) -> None:
        weight, rejected = self.view_preference_weight, self.view_preference_rejected
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(f"view_preference_weight must be ≥ 0 and finite, got {weight}.")
        if rejected not in ("no_evidence", "reversed", "shuffled"):
            raise ConfigError(
                f"view_preference_rejected must be 'no_evidence', 'reversed' or 'shuffled', got {rejected!r}."
            )

    @property
    def draws_answers(self) -> bool:
        """Whether the policy draws answers to be distilled on."""
        return self.view_distillation_weight > 0 and self.view_distillation_on == "sampled"

    @property
    def preference_losses(self) -> dict[str, float]:
        """The preference losses and their weights; empty for the SFT term alone."""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return {name: weight for name, weight in zip(self.loss_type, weights, strict=True) if name != "sft"}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the token: transformers pickles the arguments into `training_args.bin`, which is published."""
        return {**self.__dict__, "hub_token": None}
