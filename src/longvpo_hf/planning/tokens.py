"""Tokens of a device's batch: how long its sequences or trees are, for any number of frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longvpo_hf.families import FrameShapes, context_tokens, family_of
from longvpo_hf.planning.settings import Rows
from longvpo_hf.training.config import LongVPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Height and width of a 16:9 frame, in pixels, where `max_pixels` sets no bound.
UNBOUNDED_FRAME_PX = (720, 1280)
#: LongVPO samples an anchor clip at 1 fps, at most 64 frames; the Stage-1 builder cuts clips of at most 64 s.
ANCHOR_SECONDS = 64
#: Text of a chat template around question and answer, with tokenizers like Qwen's.
CHAT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of one timeline, and of a device's batch.

    Args:
        frames: Frames of the timeline.
        reference_frames: Frames of the reference's view.
        visual_per_frame: Mean over the frames of the timeline.
        visual: Of the timeline, as the collator counts them.
        prompt: Visual tokens with the text around them and the question.
        packed: Of a device's batch as the policy runs it.
        reference: Of a device's batch as the reference runs it.
        longest: Of the longest sequence that policy or reference sees: a prompt with its longer answer.
        allowed: The most that a sequence may have: the model's context or `max_length`, the lower. `None`: unknown.
    """

    frames: int
    reference_frames: int
    visual_per_frame: float
    visual: int
    prompt: int
    packed: int
    reference: int
    longest: int
    allowed: int | None

    @property
    def are_too_many(self) -> bool:
        """Whether the longest sequence exceeds what is allowed, so that training would end with an error."""
        return self.allowed is not None and self.longest > self.allowed


class DeviceBatch:
    """The sequences of a device's batch, by the number of frames.

    Args:
        config: The model's shapes.
        training: The trainer's settings.
        rows: See `Rows`.

    Raises:
        ModelError: If the model's family is not known.
    """

    def __init__(self, config: PreTrainedConfig, training: LongVPOConfig, rows: Rows) -> None:
        self.training, self.rows = training, rows
        self.family = family_of(config)
        self.shapes = frame_shapes(config, training.max_pixels, rows.source_px)
        self.context = context_tokens(config)
        #: Whether rows that share a timeline are packed into a tree.
        self.is_packed = training.tree_packing
        #: Timelines: as few as `pairs_per_timeline` allows.
        self.trees = -(-training.per_device_train_batch_size // training.pairs_per_timeline)
        #: Rows of a timeline.
        self.pairs = -(-training.per_device_train_batch_size // self.trees)
        is_sampled = training.draws_answers
        #: Tokens of an answer that the policy draws, as long as the chosen one if it may be; 0 where it draws none.
        self.sampled = min(rows.chosen_tokens, training.view_distillation_max_new_tokens) if is_sampled else 0
        #: Tokens of an answer that is distilled.
        self.distilled = self.sampled or rows.chosen_tokens
        #: Answers that are scored of each row.
        self.answers_of_row = 3 if is_sampled else 2
        #: Whether the rows come a second time, about their rejected views.
        self.is_rejecting = training.view_preference_weight > 0
        #: Tokens of all answers.
        self.answers = training.per_device_train_batch_size * self._answer_tokens * (1 + self.is_rejecting)

    @property
    def reference_frames(self) -> int:
        """Frames of the reference's view."""
        if self.rows.reference_frames is not None:
            return self.rows.reference_frames
        most = self.training.reference_num_frames or self.training.num_frames
        if self.training.reference != "anchor" or self.training.fps is None:
            return most
        return min(most, math.ceil(ANCHOR_SECONDS * self.training.fps))

    @property
    def reference_timelines(self) -> int:
        """Views that the reference sees: each pair has an anchor of its own, or all share the timeline."""
        return self.trees * (self.pairs if self.training.reference == "anchor" else 1)

    @property
    def rejected_timelines(self) -> int:
        """Rejected views beside the timelines: in a tree each pair has its own, but for one that all rows share."""
        if not self.is_rejecting:
            return 0
        is_shared = not self.is_packed or self.training.view_preference_rejected == "reversed"
        return self.trees * (1 if is_shared else self.pairs)

    @property
    def timelines(self) -> int:
        """Timelines that the policy sees, and their rejected views, which have at most as many frames."""
        return self.trees + self.rejected_timelines

    def trunk(self, frames: int) -> int:
        """Tokens that all answers about a timeline share."""
        return self.shapes.visual_tokens(frames) + self._label_tokens * self.shapes.units(frames) + CHAT_TOKENS

    def sequences(self, frames: int, reference: bool = False) -> list[tuple[int, int]]:
        """`[start, stop)` of each tree of the packed batch, or of each sequence where nothing is packed.

        Those of the reference are about its own views; on rejected views it runs what the policy runs.
        """
        trunk = self.trunk(frames)
        trees = self.reference_timelines if reference else self.trees
        rejected = 0 if reference else self.rejected_timelines
        pairs = self.trees * self.pairs
        lengths = [trunk + pairs // views * self.branches for views in (trees, rejected) for _ in range(views)]
        if not self.is_packed:
            times = 2 if rejected else 1
            lengths = [trunk + self._question_and_answer] * (self.answers_of_row * pairs * times)
        stops = [sum(lengths[: place + 1]) for place in range(len(lengths))]
        return list(zip([0, *stops], stops, strict=False))

    @property
    def branches(self) -> int:
        """Tokens of a row beside the trunk: the rest of its question, and its answers."""
        return self.rows.question_tokens + self._answer_tokens

    def packed(self, frames: int) -> int:
        """Tokens of the policy's batch."""
        return sum(stop - start for start, stop in self.sequences(frames))

    def tokens(self) -> Tokens:
        """Tokens of the timeline that the configuration asks for."""
        frames = self.training.num_frames
        visual = self.shapes.visual_tokens(frames)
        reference = self.sequences(self.reference_frames, reference=True)
        return Tokens(
            frames=frames,
            reference_frames=self.reference_frames,
            visual_per_frame=visual / frames,
            visual=visual,
            prompt=self.trunk(frames) + self.rows.question_tokens,
            packed=self.packed(frames),
            reference=sum(stop - start for start, stop in reference),
            longest=self.trunk(max(frames, self.reference_frames)) + self._question_and_answer,
            allowed=self._allowed,
        )

    def frames_within(self) -> int | None:
        """Most frames whose sequence is not longer than allowed; `None` where that is unknown."""
        if self._allowed is None:
            return None
        free = self._allowed - self.trunk(0) - self._question_and_answer
        fixed = self.rows.reference_frames or self.training.reference_num_frames or 0
        if self.trunk(fixed) > free + self.trunk(0):
            return 0  # the reference's view is too long, however few the policy's frames are
        return max(0, free // (self.shapes.tokens + self._label_tokens)) * self.shapes.frames

    @property
    def _allowed(self) -> int | None:
        bounds = [bound for bound in (self.context, self.training.max_length) if bound is not None]
        return min(bounds, default=None)

    @property
    def _label_tokens(self) -> int:
        given = self.rows.label_tokens
        return self.family.label_tokens if given is None else given

    @property
    def _answer_tokens(self) -> int:
        return self.rows.chosen_tokens + self.rows.rejected_tokens + self.sampled

    @property
    def _question_and_answer(self) -> int:
        return self.rows.question_tokens + max(self.rows.chosen_tokens, self.rows.rejected_tokens)


def frame_shapes(config: PreTrainedConfig, max_pixels: int | None, source_px: tuple[int, int] | None) -> FrameShapes:
    """Shapes of frames of the source (height, width); without it of 16:9 frames that fill `max_pixels`."""
    height, width = source_px or UNBOUNDED_FRAME_PX
    if max_pixels is not None and (source_px is None or height * width > max_pixels):
        scale = math.sqrt(max_pixels / (height * width))
        height, width = math.floor(height * scale), math.floor(width * scale)
    return family_of(config).frame_shapes(config, height, width)
