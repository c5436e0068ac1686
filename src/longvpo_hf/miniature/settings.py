"""How much the miniature does. The standard scale is that of the claim in `benchmarks/results/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from longvpo_hf.errors import ConfigError, check_types

#: Frames of a clip of the world, which lasts a second.
FRAMES_PER_CLIP = 2
#: Small enough for a laptop, instruction-tuned, Apache-2.0.
DEFAULT_LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


#: Settings that are a number of something, of which there is at least one.
_COUNTS = (
    "pretraining_clips", "stage1_clips", "stage2_clips", "evaluation_clips", "num_rows", "steps", "stage2_rows",
    "stage2_steps", "questions_per_length", "pair_questions_per_length",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PretrainingSettings:
    """How long and how to train. The defaults are the miniature's own; `fast()` is a smoke run that learns little.

    Args:
        naming_steps: Steps of one-clip training with vision.
        naming_clips: Clips per naming step.
        caption_share: Share of naming examples that ask for the caption, the others for the colour.
        recall_search_steps: At most so many steps of one- and two-clip training on cached features at the peak learning
            rate, until the model finds the named clip; and at most so many again, with questions about both clips,
            until it answers these. Seeds 1, 2, 5, 6 and 9 took 130 to 260 steps, then 70 to 135.
        recall_found_loss: It has found it when the running mean of the loss of each kind of question is below this. Per
            answer token, guessing between the two clips' colours costs 0.30, and between all colours 1.04.
        recall_steps: Steps from then on, with the cosine. With one count for all steps, models that were late to find
            the clip were weak at 4 and 8 clips.
        recall_videos: Timelines per recall step, each with two questions.
        single_every: Every so many recall steps the timelines have one clip instead of two.
        hard_share: Share of two-clip timelines whose markers share a word, once the named clip is found. Hard pairs
            from the start delay that: in one of five seeds beyond 600 steps.
        learning_rate: Peak of each phase.
        warmup_steps: Steps of linear warm-up of each phase.
        final_share: Share of the peak at which the cosine of each phase ends.
        weight_decay: AdamW's.
        betas: AdamW's.
        max_grad_norm: Gradients are clipped to this norm.
    """

    naming_steps: int = 150
    naming_clips: int = 64
    caption_share: float = 0.6
    recall_search_steps: int = 700
    recall_found_loss: float = 0.12
    recall_steps: int = 500
    recall_videos: int = 32
    single_every: int = 5
    hard_share: float = 0.5
    learning_rate: float = 2e-3
    warmup_steps: int = 40
    final_share: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0

    def naming_only(self) -> PretrainingSettings:
        """The same without the second phase: for a model of which only the vision tower is wanted."""
        return replace(self, recall_search_steps=0, recall_steps=0)

    @classmethod
    def fast(cls) -> PretrainingSettings:
        """A few steps of each phase: shows that everything runs, and that the loss falls."""
        return cls(naming_steps=100, naming_clips=16, recall_search_steps=5, recall_steps=5, warmup_steps=5)


@dataclass(frozen=True, slots=True)
class AlignmentSettings:
    """How a pretrained language model learns to see the miniature's world: first the projector, then adapters.

    Args:
        projector_steps: Steps in which the projector learns to say each frame in the model's own embeddings.
        projector_frames: Frames per such step.
        projector_learning_rate: Peak.
        steps: Steps of adapters on videos of one and two clips. Of 100 at seed 0 the loss fell no further after 55, and
            the model then answered all of 64 questions about one of two clips, and 36 about one of eight.
        videos: Timelines per step, each with two questions.
        single_every: Every so many steps the timelines have one clip instead of two.
        hard_share: Share of two-clip timelines whose markers share a word.
        learning_rate: Peak of the adapters.
        warmup_steps: Steps of linear warm-up of both.
        lora_rank: Of the adapters on all linear layers, which are then merged.
    """

    projector_steps: int = 500
    projector_frames: int = 128
    projector_learning_rate: float = 3e-3
    steps: int = 80
    videos: int = 8
    single_every: int = 4
    hard_share: float = 0.25
    learning_rate: float = 5e-4
    warmup_steps: int = 15
    lora_rank: int = 16

    @classmethod
    def fast(cls) -> AlignmentSettings:
        """A few steps of each: shows that everything runs."""
        return cls(projector_steps=300, projector_frames=64, steps=2, videos=2, warmup_steps=2, lora_rank=2)


@dataclass(frozen=True, slots=True)
class MiniatureSettings:
    """How much the miniature does. The defaults are those of the claim in `benchmarks/results/`.

    Args:
        seed: Decides worlds, weights, rows and order.
        scale: Name of the setting, for the report.
        pretraining_clips: Clips the base is trained on.
        language_model: Name on the Hub or folder of a small causal language model with a chat template, which then is
            the base's text model, sees one frame a clip and speaks in sentences. Empty: the base is trained from
            nothing, sees two frames a clip and speaks in words.
        alignment: How that language model learns to see.
        stage1_clips: Clips Stage-1 rows are made of.
        stage2_clips: Clips of the long videos that Stage-2 rows are about.
        evaluation_clips: Clips of the evaluation; no training phase sees them.
        pretraining: Settings of the base's training.
        num_rows: Stage-1 rows.
        max_clips: Most clips of a Stage-1 timeline; the fewest are 2.
        steps: Stage-1 steps of 48 rows: 12 timelines with up to 4 questions each.
        stage2_rows: Stage-2 rows.
        stage2_scenes: Fewest and most scenes of a long video.
        stage2_judge: Whether a judge drops Stage-2 rows whose answers do not fit the captions.
        stage2_steps: Stage-2 steps of 48 rows.
        lengths: Numbers of clips at which questions about one clip are evaluated.
        questions_per_length: Questions at each of them.
        pair_lengths: Numbers of clips at which questions about two clips are evaluated.
        pair_questions_per_length: Questions at each of them.
        meaningless: Whether the run is too short for its numbers to mean anything; the report then says so.

    Raises:
        ConfigError: If a value is not of its kind, or the world has too few clips for it.
    """

    seed: int = 0
    scale: str = "standard"
    pretraining_clips: int = 8192
    stage1_clips: int = 4096
    stage2_clips: int = 4096
    evaluation_clips: int = 2048
    pretraining: PretrainingSettings = field(default_factory=PretrainingSettings)
    language_model: str = ""
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    num_rows: int = 7200
    max_clips: int = 16
    steps: int = 300
    stage2_rows: int = 2400
    stage2_scenes: tuple[int, int] = (4, 16)
    stage2_judge: bool = True
    stage2_steps: int = 150
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    questions_per_length: int = 400
    pair_lengths: tuple[int, ...] = (2, 4, 8, 16, 32)
    pair_questions_per_length: int = 400
    meaningless: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not isinstance(self.language_model, str):
            raise ConfigError(f"language_model must be a name or a folder, got {self.language_model!r}.")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {getattr(self, name)}.")
        if not 2 <= self.max_clips <= self.stage1_clips:
            raise ConfigError(f"max_clips must be from 2 to stage1_clips ({self.stage1_clips}), got {self.max_clips}.")
        for name, fewest, most in (
            ("lengths", 1, self.evaluation_clips),
            ("pair_lengths", 2, self.evaluation_clips),
            ("stage2_scenes", 2, self.stage2_clips),
        ):
            value = getattr(self, name)
            is_list = isinstance(value, tuple) and all(type(number) is int for number in value)
            if not (is_list and value and sorted(value) == list(value) and fewest <= value[0] <= value[-1] <= most):
                raise ConfigError(f"{name} must be numbers of clips from {fewest} to {most}, ascending, got {value!r}.")
        if len(self.stage2_scenes) != 2:
            raise ConfigError(f"stage2_scenes must be two numbers, fewest and most, got {self.stage2_scenes!r}.")

    @property
    def num_frames(self) -> int:
        """Frames of the longest video."""
        return self.frames_per_clip * max(self.lengths)

    @property
    def frames_per_clip(self) -> int:
        """Frames that the model sees of a clip, which lasts a second."""
        return 1 if self.language_model else FRAMES_PER_CLIP

    @classmethod
    def of(cls, scale: str, seed: int = 0) -> MiniatureSettings:
        """The settings of a scale.

        Raises:
            ConfigError: If there is none of that name.
        """
        scales: dict[str, Callable[[int], MiniatureSettings]] = {
            "standard": cls,
            "fast": cls.fast,
            "large": cls.large,
            "pretrained": cls.pretrained,
        }
        if scale not in scales:
            raise ConfigError(f"scale must be one of {', '.join(scales)}, got {scale!r}.")
        return scales[scale](seed)

    @classmethod
    def fast(cls, seed: int = 0) -> MiniatureSettings:
        """The same code with few steps, to see that everything runs."""
        return cls(
            seed=seed,
            scale="fast",
            pretraining_clips=512,
            stage1_clips=256,
            stage2_clips=256,
            evaluation_clips=256,
            pretraining=PretrainingSettings.fast(),
            alignment=AlignmentSettings.fast(),
            num_rows=96,
            steps=4,
            stage2_rows=48,
            stage2_scenes=(4, 8),
            # A model that has learnt next to nothing answers nothing a judge would keep.
            stage2_judge=False,
            stage2_steps=4,
            questions_per_length=24,
            pair_questions_per_length=12,
            meaningless=True,
        )

    @classmethod
    def large(cls, seed: int = 0) -> MiniatureSettings:
        """Four times the length: training on up to 64 clips, evaluation on up to 256."""
        return cls(
            seed=seed,
            scale="large",
            stage1_clips=16384,
            stage2_clips=16384,
            evaluation_clips=8192,
            num_rows=28800,
            max_clips=64,
            steps=1200,
            stage2_rows=9600,
            stage2_scenes=(4, 64),
            stage2_steps=400,
            lengths=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            pair_lengths=(2, 4, 8, 16, 32, 64),
        )

    @classmethod
    def pretrained(cls, seed: int = 0) -> MiniatureSettings:
        """A pretrained language model of 135 million parameters: half an hour of one core up to Stage 1."""
        return cls(
            seed=seed,
            scale="pretrained",
            language_model=DEFAULT_LANGUAGE_MODEL,
            pretraining_clips=3072,
            stage1_clips=512,
            stage2_clips=1024,
            evaluation_clips=1024,
            num_rows=800,
            steps=200,
            stage2_rows=320,
            stage2_steps=80,
            lengths=(1, 2, 4, 8, 16, 32),
            questions_per_length=64,
            pair_lengths=(2, 4, 8, 16),
            pair_questions_per_length=32,
        )
