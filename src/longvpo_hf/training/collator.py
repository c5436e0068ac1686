"""From rows to one batch: what the policy sees, and the view on which the reference model is scored.

Every view of a timeline is decoded, processed and tokenized once, however many rows ask about it. The policy and the
reference view get batches of the same form.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.utils.data import get_worker_info

from longvpo_hf.errors import ConfigError, LongVPOError
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.families.positions import visual_token_ids
from longvpo_hf.frames import Frames, FrameSampler, Reason, UnreadableVideo
from longvpo_hf.preference import VideoPreference
from longvpo_hf.processes import end_with_parent
from longvpo_hf.reasoning import AnswerReasoning
from longvpo_hf.timeline import Timeline, View
from longvpo_hf.training.config import LongVPOConfig, OnBadVideo, ReferenceView, RejectedView
from longvpo_hf.training.packing.sharing import Seat
from longvpo_hf.training.view_preference import REJECTED_VIEW_COLUMN, rejected_view

if TYPE_CHECKING:
    from transformers import ProcessorMixin

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

#: Why `on_bad_video="skip"` leaves a row out. The last: its reference view could not be decoded when reference scores
#: were precomputed.
BAD_VIDEO_REASONS: tuple[str, ...] = (*get_args(Reason), "no_reference_score")

#: In `row_keys`: the stand-in of a batch that has no row left.
NO_ROW = -1

#: Columns of precomputed reference scores, as TRL names them.
SCORE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")

#: Columns of the reference's likeliest tokens for each token of the chosen answer, see `distillation.TopTokens`.
TOP_COLUMNS = ("ref_top_tokens", "ref_top_logps", "ref_token_logps")


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A row's question about one view of its timeline.

    Args:
        ids: Token ids, visual placeholders expanded.
        types: Per token 0 text, 1 image, 2 video; None for processors that give none.
        visual: The processor's tensors of the view; rows about one view hold the same object.
        num_frames: Frames of the view.
    """

    ids: list[int]
    types: list[int] | None
    visual: dict[str, torch.Tensor]
    num_frames: int


@dataclass(frozen=True, slots=True)
class GivenRows:
    """What a batch was made of. Not a list, which would be gone through when a batch is moved.

    Args:
        rows: As the dataset has them.
        views: Which views the batch is of.
    """

    rows: Sequence[Mapping[str, Any]]
    views: Literal["all", "reference", "rejected"] = "all"


class HostVideos:
    """The visual tensors of a batch's videos, which stay where they are when the batch is moved to a device.

    Each of the processes that share the batch then moves its own frames alone. Not a list, which would be moved.
    """

    def __init__(self, videos: list[Mapping[str, torch.Tensor]]) -> None:
        self._videos = videos

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, number: int) -> Mapping[str, torch.Tensor]:
        return self._videos[number]


class VideoPreferenceCollator:
    """Makes batches of video preference rows.

    Args:
        processor: The model's processor.
        num_frames: Frame budget of the policy's timeline.
        reference: The view on which the reference model is scored; see `LongVPOConfig.reference`.
        reference_num_frames: Frame budget of the reference view; None means `num_frames`.
        fps: Maximum frames per second of a clip.
        max_pixels: Maximum pixels of a frame.
        max_length: Maximum tokens of a prompt and its answer; longer ones are an error.
        on_bad_video: See `LongVPOConfig.on_bad_video`.
        precomputed: Rows hold the reference's scores (`SCORE_COLUMNS`), known to be those of these settings. Otherwise
            such columns are ignored.
        answer_reasoning: See `LongVPOConfig.answer_reasoning`.
        rejected: See `LongVPOConfig.view_preference_rejected`; None where no view is rejected.

    Attributes:
        context_tokens: Maximum tokens the model was made for; longer sequences are an error. None: not known.
        seat: This process's place among those that share its batches: it then decodes its own frames alone, and the
            visual tensors stay on the host when a batch is moved, see `HostVideos`. None: it has batches of its own.

    A batch of B rows about V different views, with sequences of at most L tokens, is as follows. Where views are
    rejected, the rows come a second time, about those; B is then twice as many in `input_ids` to `video_index`.

        input_ids        long [2B, L], right padded: B prompts with their chosen answers, then with their rejected ones
        attention_mask   long [2B, L]
        completion_mask  long [2B, L], 1 on the answers' tokens
        mm_token_type_ids long [2B, L], for processors that give it
        videos           list of V dictionaries: the processor's visual tensors of each view, once
        video_index      long [B], which of `videos` a row shows
        visual_tokens    int, tokens of the V views together
        ref_chosen_logps, ref_rejected_logps   float [B], if `precomputed`; with rejected views also
                         `ref_rejected_view_logps`
        ref_top_tokens, ref_top_logps, ref_token_logps   `[T, k]`, `[T, k + 1]` and `[T]` over the T tokens of all
                         chosen answers, if `precomputed` rows have them
        reference        the same for the reference view, unless `precomputed`
        row_keys         long [B], what tells the rows apart in every batch and process; `NO_ROW` for a stand-in
        places           float [B], where the middle of the row's evidence lies on the timeline, in [0, 1]; NaN: none
        rows             int, how many rows were given
        kept             long, which of them the batch holds: all but those that `on_bad_video="skip"` left out
        bad_videos       long, how many were left out for each of `BAD_VIDEO_REASONS`
        left_out         dictionary: by place among the rows given, why a row was left out
        given            these rows, and
        error            why there is no batch, in place of all the rest, "" for none; both where `hands_over_errors`

    If no row is left, `kept` is empty and the batch holds one stand-in row with a blank video, so that every process
    still runs the model.
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
        on_bad_video: OnBadVideo = "raise",
        precomputed: bool = False,
        answer_reasoning: AnswerReasoning = "keep",
        rejected: RejectedView | None = None,
    ) -> None:
        self.encoder = PromptEncoder(processor, answer_reasoning=answer_reasoning)
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.visual_token_ids = visual_token_ids(processor)
        self.reference = reference
        self.rejected = rejected
        self.max_length = max_length
        self.context_tokens: int | None = None
        self.seat: Seat | None = None
        #: Whether an error is put into the batch, for the trainer to raise on all processes at once.
        self.hands_over_errors = False
        self.on_bad_video = on_bad_video
        self.precomputed = precomputed
        self.sampler = FrameSampler(num_frames, fps, max_pixels)
        self.reference_sampler = FrameSampler(reference_num_frames or num_frames, fps, max_pixels)

    @classmethod
    def of(cls, processor: Any, settings: LongVPOConfig) -> VideoPreferenceCollator:
        """The collator of a run.

        Raises:
            ConfigError: If `processor` is a tokenizer.
        """
        if getattr(processor, "tokenizer", None) is None:
            raise ConfigError(
                f"Rows with clips need the model's processor as processing_class, got {type(processor).__name__}: load "
                "it with AutoProcessor.from_pretrained."
            )
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return cls(
            processor,
            num_frames=settings.num_frames,
            reference=settings.reference,
            reference_num_frames=settings.reference_num_frames,
            fps=settings.fps,
            max_pixels=settings.max_pixels,
            max_length=settings.max_length,
            on_bad_video=settings.on_bad_video,
            precomputed=settings.precompute_ref_log_probs,
            answer_reasoning=settings.answer_reasoning,
            rejected=settings.view_preference_rejected if settings.view_preference_weight else None,
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Raises:
        UnreadableVideo: If a clip cannot be decoded and `on_bad_video` is "raise".
        DatasetError: If a row is not a video preference.
        ConfigError: If a row does not fit the frame budget, `max_length` or the model's context.
        """
        if get_worker_info() is not None:  # a dataloader's process, which would outlive a trainer that is killed
            end_with_parent()
        return self._handed_over(GivenRows(rows), {})

    def reference_batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The batch of the reference views, with `rows`, `kept`, `left_out`; nothing else is decoded."""
        return self._handed_over(GivenRows(rows, "reference"), {})

    def rejected_view_batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The batch of the rejected views, with `rows`, `kept`, `left_out`; nothing else is decoded."""
        return self._handed_over(GivenRows(rows, "rejected"), {})

    def without(self, given: GivenRows, left_out: Mapping[int, str]) -> Batch:
        """The batch of rows again, without some.

        Args:
            given: The batch's.
            left_out: By place in it, why.
        """
        return self._handed_over(given, left_out)

    def _handed_over(self, given: GivenRows, left_out: Mapping[int, str]) -> Batch:
        make = {
            "all": self._batch_of,
            "reference": self._reference_batch_of,
            "rejected": self._rejected_view_batch_of,
        }[given.views]
        if not self.hands_over_errors:
            return make(given.rows, left_out)
        try:
            return {**make(given.rows, left_out), "given": given, "error": ""}
        except LongVPOError as error:
            return {"error": str(error)}

    def _batch_of(self, rows: Sequence[Mapping[str, Any]], left_out: Mapping[int, str]) -> Batch:
        preferences = [VideoPreference.from_row(row) for row in rows]
        prompts = [self._prompts(preferences, [View.whole()] * len(rows), self.sampler, left_out)]
        scores: tuple[str, ...] = SCORE_COLUMNS
        if self.rejected is not None:
            prompts.append(self._rejected_prompts(preferences, left_out))
            scores = (*SCORE_COLUMNS, REJECTED_VIEW_COLUMN)
        if not self.precomputed:
            asked = [self._reference_prompts(preferences, left_out), *prompts[1:]]
            bad = _bad(*prompts, *asked)
        else:
            missing = [any(math.isnan(row[name]) for name in scores) for row in rows]
            reasons = zip(_bad(*prompts), missing, strict=True)
            bad = [policy or ("no_reference_score" if lacks else None) for policy, lacks in reasons]
        kept = [i for i, reason in enumerate(bad) if reason is None]
        batch = self._batch(preferences, prompts, kept, "num_frames")
        if self.precomputed:
            for name in scores:
                batch[name] = torch.tensor([rows[i][name] for i in kept] or [0.0], dtype=torch.float32)
            if TOP_COLUMNS[0] in rows[0]:
                batch.update(_top_tokens([rows[i] for i in kept], int(batch["completion_mask"][0].sum())))
        else:
            batch["reference"] = self._batch(preferences, asked, kept, "reference_num_frames")
        batch["places"] = torch.tensor([_place(preferences[i]) for i in kept] or [math.nan])
        batch["row_keys"] = torch.tensor([_key(preferences[i]) for i in kept] or [NO_ROW])
        batch["bad_videos"] = torch.tensor([bad.count(reason) for reason in BAD_VIDEO_REASONS])
        batch["left_out"] = {i: reason for i, reason in enumerate(bad) if reason is not None}
        return {**batch, "rows": len(rows), "kept": torch.tensor(kept, dtype=torch.long)}

    def _reference_batch_of(self, rows: Sequence[Mapping[str, Any]], left_out: Mapping[int, str]) -> Batch:
        preferences = [VideoPreference.from_row(row) for row in rows]
        prompts = self._reference_prompts(preferences, left_out)
        return self._batch_of_one_view(preferences, prompts, "reference_num_frames")

    def _rejected_view_batch_of(self, rows: Sequence[Mapping[str, Any]], left_out: Mapping[int, str]) -> Batch:
        preferences = [VideoPreference.from_row(row) for row in rows]
        return self._batch_of_one_view(preferences, self._rejected_prompts(preferences, left_out), "num_frames")

    def reference_view(self, preference: VideoPreference) -> View:
        """The view on which the reference model is scored for this row.

        Raises:
            ConfigError: If it is to be the anchor and the row names none.
        """
        if self.reference == "full":
            return View.whole()
        if self.reference == "row":
            return preference.reference_view
        anchor = preference.reference or preference.evidence
        if not anchor:
            raise ConfigError(
                f"row {preference.id}: reference='anchor' needs the row's reference or evidence clips, and it names "
                "none. Use reference='row' or 'full'."
            )
        return View.only(anchor)

    def rejected_view(self, preference: VideoPreference) -> View:
        """The view on which policy and reference are not to give this row's chosen answer.

        Raises:
            ConfigError: If the row has none, see `view_preference.rejected_view`.
        """
        if self.rejected is None:
            raise RuntimeError("This collator rejects no views.")
        return rejected_view(preference, self.rejected)

    def _reference_prompts(
        self, preferences: Sequence[VideoPreference], left_out: Mapping[int, str]
    ) -> list[_Prompt | str]:
        views = [self.reference_view(preference) for preference in preferences]
        return self._prompts(preferences, views, self.reference_sampler, left_out)

    def _rejected_prompts(
        self, preferences: Sequence[VideoPreference], left_out: Mapping[int, str]
    ) -> list[_Prompt | str]:
        views = [self.rejected_view(preference) for preference in preferences]
        return self._prompts(preferences, views, self.sampler, left_out)

    def _prompts(
        self,
        preferences: Sequence[VideoPreference],
        views: Sequence[View],
        sampler: FrameSampler,
        left_out: Mapping[int, str],
    ) -> list[_Prompt | str]:
        """Each row's prompt about its view, every view decoded once; the reason where it has none."""
        members: dict[Timeline, list[int]] = {}
        for i, (preference, view) in enumerate(zip(preferences, views, strict=True)):
            if i not in left_out:
                members.setdefault(view.of(preference.timeline), []).append(i)
        prompts: dict[int, _Prompt | str] = dict(left_out)
        for seen, rows in members.items():
            try:
                asked = self._look(seen, sampler, [preferences[i] for i in rows])
            except UnreadableVideo as error:
                names = ", ".join(preferences[i].id for i in rows)
                if self.on_bad_video == "raise":
                    error.args = (f"row {names}: {error}. Drop the row, or set on_bad_video='skip'.",)
                    raise
                logger.warning(f"on_bad_video='skip': row {names} is left out: {error}")
                prompts.update(dict.fromkeys(rows, error.reason))
                continue
            prompts.update(zip(rows, asked, strict=True))
        return [prompts[i] for i in range(len(preferences))]

    def _look(self, seen: Timeline, sampler: FrameSampler, preferences: Sequence[VideoPreference]) -> list[_Prompt]:
        """The prompts about a view, of which a process that shares its batches decodes its own frames alone."""
        number = len(sampler.timeline_seconds(seen))
        wanted = None if self.seat is None else self.seat.likely_frames(number)
        frames = sampler(seen, wanted=wanted)
        prompts = self._ask(frames, preferences)
        while self.seat is not None and wanted is not None:
            ids = max((prompt.ids for prompt in prompts), key=len)
            is_visual = torch.tensor([token in self.visual_token_ids for token in ids])
            lacking = self.seat.frames_needed(prompts[0].visual, is_visual, number) - wanted
            if not lacking:
                break
            wanted |= lacking
            places = sorted(lacking)
            frames.pixels[places] = sampler(seen, wanted=lacking).pixels[places]
            prompts = self._ask(frames, preferences)
        return prompts

    def _ask(self, frames: Frames, preferences: Sequence[VideoPreference]) -> list[_Prompt]:
        answers = [_answers(preference) for preference in preferences]
        encoded = self.encoder.encode(frames, [preference.prompt for preference in preferences], answers)
        types: Sequence[list[int] | None] = encoded.mm_token_type_ids or [None] * len(preferences)
        pairs = zip(encoded.input_ids, types, strict=True)
        return [_Prompt(ids, kinds, encoded.visual, len(frames)) for ids, kinds in pairs]

    def _batch_of_one_view(
        self, preferences: Sequence[VideoPreference], prompts: Sequence[_Prompt | str], setting: str
    ) -> Batch:
        bad = {i: reason for i, reason in enumerate(_bad(prompts)) if reason is not None}
        kept = [i for i in range(len(preferences)) if i not in bad]
        batch = self._batch(preferences, [prompts], kept, setting)
        return {**batch, "rows": len(preferences), "kept": torch.tensor(kept, dtype=torch.long), "left_out": bad}

    def _batch(
        self,
        preferences: Sequence[VideoPreference],
        views: Sequence[Sequence[_Prompt | str]],
        kept: Sequence[int],
        setting: str,
    ) -> Batch:
        """The tensors of the kept rows, once for each of some views; of a stand-in if there are none.

        Args:
            preferences: The rows.
            views: Of each view the rows' prompts.
            kept: Which rows.
            setting: Names the frame budget in errors.
        """
        asked = [(preferences[i], prompt) for seen in views for i in kept if isinstance(prompt := seen[i], _Prompt)]
        if not asked:
            asked = [self._stand_in(preferences[0])] * len(views)
        videos = list({id(prompt.visual): prompt for _, prompt in asked}.values())
        index = {id(prompt.visual): number for number, prompt in enumerate(videos)}
        pairs = [self.encoder.encode_texts(preference.prompt, _answers(preference))[1] for preference, _ in asked]
        sequences = []  # (prompt, answer ids), chosen first
        for answers in zip(*pairs, strict=True):
            for (preference, prompt), answer in zip(asked, answers, strict=True):
                sequences.append((prompt, answer))
                self._check_length(preference, prompt, len(answer), setting)
        batch: Batch = {
            "input_ids": _right_pad([prompt.ids + answer for prompt, answer in sequences], self.pad_token_id),
            "attention_mask": _right_pad([[1] * (len(prompt.ids) + len(answer)) for prompt, answer in sequences], 0),
            "completion_mask": _right_pad(
                [[0] * len(prompt.ids) + [1] * len(answer) for prompt, answer in sequences], 0
            ),
        }
        if sequences[0][0].types is not None:
            batch["mm_token_type_ids"] = _right_pad(
                [(prompt.types or []) + [0] * len(answer) for prompt, answer in sequences], 0
            )
        visuals: list[Mapping[str, torch.Tensor]] = [prompt.visual for prompt in videos]
        return {
            **batch,
            "videos": visuals if self.seat is None else HostVideos(visuals),
            "video_index": torch.tensor([index[id(prompt.visual)] for _, prompt in asked]),
            "visual_tokens": sum(map(self._visual_tokens, videos)),
        }

    def _stand_in(self, preference: VideoPreference) -> tuple[VideoPreference, _Prompt]:
        frames = Frames(torch.zeros(2, 3, 56, 56, dtype=torch.uint8), (0.25, 0.75), (0, 0), 1.0)
        return preference, self._ask(frames, [preference])[0]

    def _visual_tokens(self, prompt: _Prompt) -> int:
        return sum(token in self.visual_token_ids for token in prompt.ids)

    def _check_length(self, preference: VideoPreference, prompt: _Prompt, answer_tokens: int, setting: str) -> None:
        length = len(prompt.ids) + answer_tokens
        bounds = {"max_length": self.max_length, "the model's context": self.context_tokens}
        for name, bound in bounds.items():
            if bound is not None and length > bound:
                longer = ", or raise max_length" if name == "max_length" else ", or take a model of longer context"
                raise ConfigError(
                    f"row {preference.id}: {length} tokens exceed {name} = {bound}: {self._visual_tokens(prompt)} of "
                    f"{prompt.num_frames} frames, {answer_tokens} of the answer and the rest of the question. Visual "
                    f"tokens are never truncated: lower {setting} (below {prompt.num_frames}), fps or max_pixels"
                    f"{longer}."
                )


def _answers(preference: VideoPreference) -> tuple[str, str]:
    return preference.chosen, preference.rejected


def _bad(*views: Sequence[_Prompt | str]) -> list[str | None]:
    """Per row the reason why it lacks a prompt about one of the views; None where it has them all."""
    return [next((prompt for prompt in of_row if isinstance(prompt, str)), None) for of_row in zip(*views, strict=True)]


def _top_tokens(rows: Sequence[Mapping[str, Any]], stand_in_tokens: int) -> Batch:
    """The reference's likeliest tokens for the answers of rows; without rows, of any for a stand-in's."""
    if not rows:
        rows = [dict(zip(TOP_COLUMNS, ([[0]], [[math.log(0.5)] * 2], [0.0]), strict=True))] * stand_in_tokens
    types = (torch.long, torch.float32, torch.float32)
    return {
        name: torch.cat([torch.tensor(row[name], dtype=dtype) for row in rows])
        for name, dtype in zip(TOP_COLUMNS, types, strict=True)
    }


def _key(preference: VideoPreference) -> int:
    """A number ≥ 0 that follows from the row's id."""
    return int.from_bytes(hashlib.sha256(preference.id.encode()).digest()[:8]) >> 1


def _place(preference: VideoPreference) -> float:
    """Where the middle of the evidence lies on the timeline, in [0, 1]; NaN without evidence."""
    centres = [preference.timeline.centre(clip) for clip in preference.evidence]
    return sum(centres) / len(centres) if centres else math.nan


def _right_pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])
