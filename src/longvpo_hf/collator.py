"""From rows to one batch: what the policy sees, and what the reference model is scored on.

Takes preference rows (`preference.py`) as dictionaries; decodes, processes and tokenizes them, each view of a timeline
once however many rows ask about it. Gives two `batch`es of the same form, for the policy and for the reference view.
Knows nothing of models or losses.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from .config import ReferenceView
from .frames import FrameSampler
from .preference import VideoPreference
from .processing import EncodedPrompts, PromptEncoder
from .timeline import Timeline, View

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Batch = dict[str, Any]


class VideoPreferenceCollator:
    """Makes batches of video preference rows.

    Args:
        processor: The model's processor.
        num_frames: Frame budget of the policy's timeline.
        reference: What the reference model is scored on; see `LongVPOConfig.reference`.
        reference_num_frames: Frame budget of the reference view; None means `num_frames`.
        fps: Most frames per second of a clip.
        max_pixels: Most pixels of a frame.
        max_length: Most tokens of a prompt and its answer; longer ones are an error.

    A batch of B rows about V different views, with sequences of at most L tokens, is

        input_ids        long [2B, L], right padded: B prompts with their chosen answers, then with their rejected ones
        attention_mask   long [2B, L]
        completion_mask  long [2B, L], 1 on the answers' tokens
        mm_token_type_ids long [2B, L], for processors that give it
        videos           list of V dictionaries: the processor's visual tensors of each view, once
        video_index      long [B], which of `videos` a row shows
        ref_chosen_logps, ref_rejected_logps   float [B], where all rows hold them
        reference        the same for the reference view; absent where the rows hold its log-probabilities
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        num_frames: int,
        reference: ReferenceView = "row",
        reference_num_frames: int | None = None,
        fps: float | None = 1.0,
        max_pixels: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self.encoder = PromptEncoder(processor)
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.reference = reference
        self.max_length = max_length
        self.sampler = FrameSampler(num_frames, fps, max_pixels)
        self.reference_sampler = FrameSampler(reference_num_frames or num_frames, fps, max_pixels)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Raises:
        UnreadableVideo: If a clip cannot be decoded.
        ValueError: If a row is not a video preference, or does not fit the frame budget or `max_length`.
        """
        preferences = [VideoPreference.from_row(row) for row in rows]
        batch = self._encode(preferences, [View.whole()] * len(rows), self.sampler)
        if all(row.get("ref_chosen_logps") is not None for row in rows):
            for name in ("ref_chosen_logps", "ref_rejected_logps"):
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        else:
            batch["reference"] = self.encode_reference(preferences)
        return batch

    def encode_reference(self, preferences: Sequence[VideoPreference]) -> Batch:
        """The batch of what the reference model is scored on."""
        views = [self.reference_view(preference) for preference in preferences]
        return self._encode(preferences, views, self.reference_sampler)

    def reference_view(self, preference: VideoPreference) -> View:
        """What the reference model is scored on for this row.

        Raises:
            ValueError: If it is to be the anchor and the row names none.
        """
        if self.reference == "full":
            return View.whole()
        if self.reference == "row":
            return preference.reference_view
        anchor = preference.reference or preference.evidence
        if not anchor:
            raise ValueError(
                f"row {preference.id}: reference='anchor' needs the row's reference or evidence clips, and it names "
                "none. Use reference='row' or 'full'."
            )
        return View.only(anchor)

    def _encode(self, preferences: Sequence[VideoPreference], views: Sequence[View], sampler: FrameSampler) -> Batch:
        members: dict[Timeline, list[int]] = {}
        for i, (preference, view) in enumerate(zip(preferences, views, strict=True)):
            members.setdefault(view.of(preference.timeline), []).append(i)
        videos: list[dict[str, torch.Tensor]] = []
        video_index = torch.empty(len(preferences), dtype=torch.long)
        prompt_of: dict[int, tuple[list[int], list[int] | None]] = {}
        for seen, rows in members.items():
            prompts = self.encoder.encode(
                sampler(seen), [[{"role": "user", "content": preferences[i].question}] for i in rows]
            )
            for i, prompt in zip(rows, _each(prompts), strict=True):
                prompt_of[i] = prompt
                video_index[i] = len(videos)
            videos.append(prompts.visual)
        sequences = []  # (prompt ids, prompt types, answer ids), chosen first
        for answers in ("chosen", "rejected"):
            for i, preference in enumerate(preferences):
                answer = self.encoder.encode_answer(preference.question, getattr(preference, answers))
                sequences.append((*prompt_of[i], answer))
                self._check_length(preference, len(prompt_of[i][0]) + len(answer))
        batch: Batch = {
            "input_ids": _right_pad([ids + answer for ids, _, answer in sequences], self.pad_token_id),
            "attention_mask": _right_pad([[1] * len(ids + answer) for ids, _, answer in sequences], 0),
            "completion_mask": _right_pad([[0] * len(ids) + [1] * len(answer) for ids, _, answer in sequences], 0),
        }
        if sequences[0][1] is not None:
            batch["mm_token_type_ids"] = _right_pad(
                [(types or []) + [0] * len(answer) for _, types, answer in sequences], 0
            )
        return {**batch, "videos": videos, "video_index": video_index}

    def _check_length(self, preference: VideoPreference, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"row {preference.id}: {length} tokens of prompt and answer exceed max_length={self.max_length}. Visual"
                " tokens are never truncated: lower num_frames, fps or max_pixels, or raise max_length."
            )


class TimelineSampler(Sampler[int]):
    """Shuffles rows, keeping up to `pairs_per_timeline` rows of one timeline next to each other.

    The order follows from `seed` and the epoch alone, so every process draws the same and a resumed run goes on as the
    interrupted one would have.

    Args:
        timelines: What tells each row's timeline from the others, in row order.
        pairs_per_timeline: Most rows of a timeline that stand together.
        seed: Decides the order.
    """

    def __init__(self, timelines: Sequence[Hashable], pairs_per_timeline: int, seed: int) -> None:
        self._rows: dict[Hashable, list[int]] = {}
        for i, timeline in enumerate(timelines):
            self._rows.setdefault(timeline, []).append(i)
        self._num_rows = len(timelines)
        self._pairs_per_timeline = pairs_per_timeline
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed}/{self._epoch}")
        groups = []
        for rows in self._rows.values():
            shuffled = rng.sample(rows, len(rows))
            size = self._pairs_per_timeline
            groups += [shuffled[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(groups)
        return iter([row for group in groups for row in group])


def _each(prompts: EncodedPrompts) -> list[tuple[list[int], list[int] | None]]:
    types: Sequence[list[int] | None] = prompts.mm_token_type_ids or [None] * len(prompts.input_ids)
    return list(zip(prompts.input_ids, types, strict=True))


def _right_pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])
