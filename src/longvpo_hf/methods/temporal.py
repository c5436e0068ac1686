"""Temporal preferences (TPO, arXiv 2501.13919): localized and comprehensive.

Takes captioned videos (`captioning.py`), who writes questions from captions, who answers and who judges; gives a
dataset folder (`hub.py`). *Localized*: a question about one segment; rejected is the answer from the video without it.
*Comprehensive*: a question about the whole video; rejected is the answer from a few of its frames. *Mixed*: both. How
rows are made of the methods is `engine.py`'s; knows nothing of training. Not to be mistaken for TRL's "TPO" (Triple
Preference Optimization).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longvpo_hf.building import prompts
from longvpo_hf.building.engine import (
    Asker,
    Draft,
    Drop,
    Method,
    Pair,
    PairFilter,
    Part,
    ViewOf,
    build,
    evidence,
    log_folder,
    whole,
    without_evidence,
)
from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.errors import ConfigError
from longvpo_hf.funnel import Funnel
from longvpo_hf.methods.stage2 import Rotation, evidence_captions, follows_from, with_captions, within
from longvpo_hf.responders import Request, Responder
from longvpo_hf.responders.replies import json_object, without_reasoning
from longvpo_hf.timeline import View

if TYPE_CHECKING:
    import numpy as np

LOCALIZED = "temporal-localized"
COMPREHENSIVE = "temporal-comprehensive"

Mode = Literal["localized", "comprehensive", "mixed"]

#: What stands for null where a model cannot be held to a schema.
_DECLINED = ("none", "null")


@dataclass(frozen=True, slots=True)
class TemporalSettings:
    """What a build of temporal preferences is asked for.

    Args:
        mode: Which method; `mixed` is both. TPO trains LongVA on both, LLaVA-Video on comprehensive rows only.
        num_rows: Rows to make (paper: 10k).
        localized_share: Share of localized rows where both are made (paper: half).
        chosen_from: View the chosen answer of a localized row is given from: the segment the question is about (the
            paper's pipeline), or the whole video.
        sparse_frames: Frames a comprehensive row's rejected answer is given from. The paper: a sparse downsample,
            without a number; four, an eighth of its 32 frames, is ours.
        max_context_characters: Most characters of captions the question writer and the judge are shown, about 6,000
            tokens; of a longer video they are shown the summaries, each cut where these are too long together.
        max_rounds: How often more questions are asked for to make up for dropped ones before giving up.
        seed: Same seed, same videos, same models: same rows.
    """

    mode: Mode = "mixed"
    num_rows: int = 10_000
    localized_share: float = 0.5
    chosen_from: Literal["segment", "whole"] = "segment"
    sparse_frames: int = 4
    max_context_characters: int = 24_000
    max_rounds: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("localized", "comprehensive", "mixed"):
            raise ConfigError(f"mode must be 'localized', 'comprehensive' or 'mixed', got {self.mode!r}.")
        for name in ("num_rows", "sparse_frames", "max_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {getattr(self, name)}.")
        if not 0 <= self.localized_share <= 1:
            raise ConfigError(f"localized_share must be in [0, 1], got {self.localized_share}.")
        if self.chosen_from not in ("segment", "whole"):
            raise ConfigError(f"chosen_from must be 'segment' or 'whole', got {self.chosen_from!r}.")
        if self.max_context_characters < 1000:
            raise ConfigError(f"max_context_characters must be ≥ 1000, got {self.max_context_characters}.")

    @property
    def num_localized(self) -> int:
        """How many rows are localized."""
        return {"localized": self.num_rows, "comprehensive": 0}.get(
            self.mode, round(self.num_rows * self.localized_share)
        )


def localized(
    videos: Sequence[CaptionedVideo],
    question_writer: Responder,
    settings: TemporalSettings,
    judge: Responder | None = None,
) -> Method:
    """Localized temporal preferences as a method; see `build_temporal` for who does what."""
    context = _Context(videos, settings.max_context_characters)
    views: dict[str, ViewOf] = {"segment": evidence, "whole": whole}
    return Method(
        name=LOCALIZED,
        prompt_version=prompts.TEMPORAL_VERSION,
        question_model=question_writer.name,
        write=partial(_write, question_writer, context),
        chosen=views[settings.chosen_from],
        rejected=without_evidence,
        pair_filters=_post_filter(judge, context),
    )


def comprehensive(
    videos: Sequence[CaptionedVideo],
    question_writer: Responder,
    settings: TemporalSettings,
    judge: Responder | None = None,
) -> Method:
    """Comprehensive temporal preferences as a method; see `build_temporal` for who does what."""
    context = _Context(videos, settings.max_context_characters)
    return Method(
        name=COMPREHENSIVE,
        prompt_version=prompts.TEMPORAL_VERSION,
        question_model=question_writer.name,
        write=partial(_write, question_writer, context),
        chosen=whole,
        rejected=partial(_sparse, settings.sparse_frames),
        pair_filters=_post_filter(judge, context),
    )


def build_temporal(
    videos: Sequence[CaptionedVideo],
    question_writer: Responder,
    answerer: Responder,
    output: Path,
    settings: TemporalSettings,
    judge: Responder | None = None,
    media_root: Path | None = None,
    facts: Mapping[str, object] | None = None,
    funnel: Funnel | None = None,
) -> dict[str, dict[str, int]]:
    """Builds a dataset of temporal preferences; see `engine.build` for how it resumes.

    Args:
        videos: What questions are asked about, as often as it takes. Those with fewer than two captions are dropped.
        question_writer: Writes a question of a given type from captions, or says that there is none; sees no frame.
        answerer: Gives both answers: the model that will be trained.
        output: Folder of the dataset; see `hub.py`. An earlier one there is replaced.
        settings: See `TemporalSettings`.
        judge: Answers the three questions of the paper's post-filter from the captions; None leaves it out, which the
            card then says.
        media_root: See `hub.DatasetWriter`: None publishes the media, a folder names them by reference.
        facts: What else the card shall say of how the videos came about.
        funnel: One that has counted what came before the videos; it is closed here. None begins with the videos.

    Returns:
        The funnel: what came through each stage, what was dropped for which reason. Every draft is a row or a drop.

    Raises:
        ValueError: If no row came out.
    """
    funnel = funnel or Funnel(log_folder(output))
    usable = with_captions(videos, 2, funnel)
    segments = _Segments(usable, settings.seed)
    wholes = _Typed(usable, settings.seed)
    num_localized = settings.num_localized
    parts = [
        Part(localized(usable, question_writer, settings, judge), segments, num_localized),
        Part(comprehensive(usable, question_writer, settings, judge), wholes, settings.num_rows - num_localized),
    ]
    return build(
        [part for part in parts if part.num_rows],
        answerer,
        output,
        name="temporal" if settings.mode == "mixed" else f"temporal-{settings.mode}",
        title="Temporal preference rows",
        seed=settings.seed,
        max_rounds=settings.max_rounds,
        follows_from=follows_from(settings, usable, question_writer, judge),
        funnel=funnel,
        media_root=media_root,
        facts={
            "mode": settings.mode,
            "rows asked for": settings.num_rows,
            "localized rows asked for": settings.num_localized,
            "videos": len(usable),
            "question model": question_writer.name,
            "answer model": answerer.name,
            "judge of the post-filter": judge.name if judge else "none: not applied",
            "localized, chosen answers from": settings.chosen_from,
            "comprehensive, rejected answers from": f"{settings.sparse_frames} frames",
            "prompt version": prompts.TEMPORAL_VERSION,
            "seed": settings.seed,
            **(facts or {}),
        },
        remedy="Add videos, raise max_rounds, or choose a stronger question writer.",
    )


class _Typed:
    """Goes round the videos; types come evenly, and each of them once before one comes again for a video."""

    def __init__(self, videos: Sequence[CaptionedVideo], seed: int) -> None:
        self._rotation = Rotation(videos, seed)
        self._first = {videos[index].timeline: place for place, index in enumerate(self._rotation.order(0))}

    def __call__(self, round_index: int, missing: int) -> Iterator[list[Draft]]:
        types = list(prompts.QUESTION_TYPES)
        for (draft,) in self._rotation(round_index, missing):
            yield [replace(draft, question_type=types[(self._first[draft.timeline] + draft.number) % len(types)])]


class _Segments:
    """Gives each draft a segment, so that segments stand everywhere in the timelines alike, and a type."""

    def __init__(self, videos: Sequence[CaptionedVideo], seed: int) -> None:
        self._captioned = {video.timeline: video.captioned_scenes for video in videos}
        self._seed = seed
        self._typed = _Typed(videos, seed)

    def __call__(self, round_index: int, missing: int) -> Iterator[list[Draft]]:
        import numpy as np

        rng = np.random.default_rng([self._seed, round_index])
        # Stratified: one segment position in each of `missing` equal parts of [0, 1), in random order.
        places = (rng.permutation(missing) + rng.random(missing)) / missing
        for place, (draft,) in zip(places, self._typed(round_index, missing), strict=True):
            scenes = self._captioned[draft.timeline]
            yield [replace(draft, evidence=(scenes[int(place * len(scenes))],))]


class _Context:
    """What models without eyes are told of a draft: its segment's caption, or what happens in the whole video."""

    def __init__(self, videos: Sequence[CaptionedVideo], max_characters: int) -> None:
        self._videos = {video.timeline: video for video in videos}
        self._max_characters = max_characters

    def __call__(self, draft: Draft) -> list[str]:
        lines = evidence_captions(draft)
        if not draft.evidence and sum(len(line) + 1 for line in lines) > self._max_characters:
            lines = list(self._videos[draft.timeline].history)
        return within(lines, self._max_characters)


def _write(writer: Responder, context: _Context, drafts: Sequence[Draft], ask: Asker) -> list[Draft | Drop]:
    requests = [
        Request(
            prompts.temporal_question(context(draft), draft.question_type, bool(draft.evidence)),
            schema=prompts.TEMPORAL_QUESTION_SCHEMA,
        )
        for draft in drafts
    ]
    answers = ask(writer, requests, "questions", remember=True)
    return [_read(draft, answer) for draft, answer in zip(drafts, answers, strict=True)]


def _read(draft: Draft, answer: str | Drop) -> Draft | Drop:
    if isinstance(answer, Drop):
        return answer
    fields = json_object(answer)
    question = fields.get("question", 0) if fields is not None else without_reasoning(answer)
    if question is None or (isinstance(question, str) and question.strip().strip(".").casefold() in _DECLINED):
        return Drop("declined", draft.question_type)
    if fields is None or not isinstance(question, str):
        return Drop("malformed_question", answer)
    return replace(draft, question=question.strip())


def _sparse(num_frames: int, draft: Draft, rng: np.random.Generator) -> View:
    """So many frames, spread over the timeline; of so many clips where it has more."""
    num_clips = len(draft.timeline)
    if num_frames >= num_clips:
        return View.sparse(num_frames)
    clips = tuple(int((place + 0.5) * num_clips / num_frames) for place in range(num_frames))
    return View(keep=clips, num_frames=num_frames)


def _post_filter(judge: Responder | None, context: _Context) -> tuple[PairFilter, ...]:
    return (PairFilter("post_filter", partial(_ask_three, judge, context)),) if judge else ()


def _ask_three(judge: Responder, context: _Context, pairs: Sequence[Pair], ask: Asker) -> list[Drop | None]:
    """TPO's post-filter."""
    requests = [
        Request(
            prompts.post_filter(context(pair.draft), pair.draft.question, pair.chosen, pair.rejected),
            schema=prompts.POST_FILTER_SCHEMA,
        )
        for pair in pairs
    ]
    verdicts = ask(judge, requests, "post-filter")
    return [_verdict(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True)]


def _verdict(pair: Pair, verdict: str | Drop) -> Drop | None:
    if isinstance(verdict, Drop):
        return verdict
    fields = json_object(verdict) or {}
    said = {
        name: str(fields.get(name, "")).strip().strip(".").casefold() for name in ("better", "ambiguous", "correct")
    }
    detail = f"{pair.draft.question} — {pair.chosen} / {pair.rejected} — judge: {verdict}"
    if not (said["better"] in ("yes", "no", "equally") and {said["ambiguous"], said["correct"]} <= {"yes", "no"}):
        return Drop("malformed_verdict", detail)
    if said["better"] != "yes":
        return Drop("not_better", detail)
    if said["ambiguous"] != "no":
        return Drop("ambiguous", detail)
    return None if said["correct"] == "yes" else Drop("not_correct", detail)
