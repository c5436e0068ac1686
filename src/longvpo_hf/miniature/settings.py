"""How much the miniature does, and the two trainings whose claim `benchmarks/results/` holds over five seeds."""

from __future__ import annotations

from dataclasses import dataclass, field

from longvpo_hf.miniature.pretraining import PretrainingSettings
from longvpo_hf.training.config import ReferenceView


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """How much the demo does. The defaults are those of the claim in `benchmarks/results/`.

    Args:
        seed: Decides worlds, weights, rows and order.
        scale: Name of the setting, for the report.
        pretraining_clips: Clips the base is trained on.
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
    """

    seed: int = 0
    scale: str = "standard"
    pretraining_clips: int = 8192
    stage1_clips: int = 4096
    stage2_clips: int = 4096
    evaluation_clips: int = 2048
    pretraining: PretrainingSettings = field(default_factory=PretrainingSettings)
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

    @classmethod
    def fast(cls, seed: int = 0) -> DemoSettings:
        """The same code with few steps, to see that everything runs."""
        return cls(
            seed=seed,
            scale="fast",
            pretraining_clips=512,
            stage1_clips=256,
            stage2_clips=256,
            evaluation_clips=256,
            pretraining=PretrainingSettings.fast(),
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
    def large(cls, seed: int = 0) -> DemoSettings:
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


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train.

    Args:
        name: Folder of its model.
        start: Folder of the model it starts from, which is also the reference model.
        rows: Folder of the dataset.
        replay: Folder of an earlier stage's dataset, of which half as many rows are mixed in; none if empty.
        learning_rate: Peak.
        reference: See `LongVPOConfig.reference`.
        beta: DPO's β.
        sft_weight: α.
        loss_type: Losses besides the SFT term.
    """

    name: str
    start: str = "base"
    rows: str = "dataset"
    replay: str = ""
    learning_rate: float = 3e-4
    reference: ReferenceView = "row"
    # β 0.1 where the paper has 0.01 (α is the paper's): these settings were found with it, and frozen.
    beta: float = 0.1
    sft_weight: float = 1.0
    loss_type: tuple[str, ...] = ("sigmoid",)


# At 1e-3 Stage 1 unlearns what it does not train: questions about two clips, on two clips (seed 1: 99 % → 81 %).
LONGVPO = Arm("model")
# Without Stage-1 rows Stage 2 costs 3 points about one of 4 or 8 clips (seed 1).
STAGE2 = Arm("stage2-model", start="model", rows="stage2-dataset", replay="dataset", learning_rate=1e-3)
