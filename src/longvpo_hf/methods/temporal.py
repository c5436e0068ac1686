"""Temporal preferences (TPO, arXiv 2501.13919): localized and comprehensive.

*Localized*: a question about one segment; rejected is the answer from the video without it. *Comprehensive*: a question
about the whole video; rejected is the answer from a few of its frames. *Mixed*: both. A language model writes the
questions from captions (`building.captioning`). Not to be mistaken for TRL's "TPO" (Triple Preference Optimization).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from longvpo_hf.building.asking import Answer, Asker
from longvpo_hf.building.filters import is_ellipsis
from longvpo_hf.building.judging import YES_OR_NO, ByProbability, described, unless
from longvpo_hf.building.method import (
    Answered,
    Draft,
    Drop,
    Method,
    PairFilter,
    Part,
    ViewOf,
    evidence,
    whole,
    without_evidence,
)
from longvpo_hf.building.rehearsal import things_in
from longvpo_hf.building.scenes import Rotation, evidence_captions, follows_from, with_captions, within
from longvpo_hf.errors import ConfigError, check_seed, check_types
from longvpo_hf.funnel import Funnel, open_log
from longvpo_hf.papers import TPO
from longvpo_hf.paths import common_folder
from longvpo_hf.reasoning import without_reasoning
from longvpo_hf.responders import CutOff, Request, Responder
from longvpo_hf.responders.replies import json_object
from longvpo_hf.timeline import Timeline, View

if TYPE_CHECKING:
    import numpy as np

    from longvpo_hf.building.executors import Executor
    from longvpo_hf.captions import CaptionedVideo

LOCALIZED = "temporal-localized"
COMPREHENSIVE = "temporal-comprehensive"
#: Version of the prompt texts below; a change of wording is a new version.
PROMPT_VERSION = "temporal-1"
#: Drops of these methods' own.
REASONS = {
    "declined": "the question writer said that no such question can be asked",
    "not_better": "the judge: the chosen answer is not better than the rejected one",
    "ambiguous": "the judge: the question has another answer, or contradicts the captions",
    "not_correct": "the judge: the chosen answer is not correct, given the captions",
}
#: Settings of the training on these rows, with their source; see `training.config.LongVPOConfig`.
TRAINING: Mapping[str, tuple[Any, str]] = {
    "reference": ("full", "TPO: on the whole video"),
    "beta": (0.2, "TPO, LLaVA-Video (LongVA: 0.3)"),
    "sft_weight": (1.0, "TPO, LLaVA-Video: α (LongVA: 0.5)"),
    "learning_rate": (3e-7, "TPO, LLaVA-Video (LongVA: 4e-6)"),
    "warmup_steps": (0.1, "TPO: a share of the steps"),
    "num_frames": (32, "TPO"),
    "freeze_vision_tower": (True, "TPO"),
}

#: Kinds of question a temporal preference may be about. The paper has eight kinds; their names are not public, so these
#: are ours: kinds that the benchmarks of long video ask for.
QUESTION_TYPES: Mapping[str, str] = {
    "action": "what somebody does",
    "object": "what a thing looks like, or which thing is used",
    "person": "who somebody is, or how a person looks",
    "attribute": "a detail such as a colour, a number or a written text",
    "place": "where something happens",
    "order": "what happens before or after something else",
    "cause": "why something happens, or what follows from it",
    "summary": "what goes on as a whole",
}

#: What the question writer answers; `json_object` reads it.
QUESTION_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"question": {"type": ["string", "null"]}},
    "required": ["question"],
    "additionalProperties": False,
}

#: The post-filter's questions: what is asked, which verdict keeps a pair, and the reason for the drop of another.
POST_FILTER: Mapping[str, tuple[str, bool, str]] = {
    "better": ("Is answer 1 better than answer 2?", True, "not_better"),
    "ambiguous": (
        "Does the question with answer 1 contradict what the video shows, or has the question another possible answer?",
        False,
        "ambiguous",
    ),
    "correct": ("Is answer 1 correct, given what the video shows?", True, "not_correct"),
}

#: What the judge answers; `json_object` reads it.
POST_FILTER_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "better": {"enum": ["Yes", "No", "Equally"]},
        "ambiguous": {"enum": ["Yes", "No"]},
        "correct": {"enum": ["Yes", "No"]},
    },
    "required": ["better", "ambiguous", "correct"],
    "additionalProperties": False,
}

Mode: TypeAlias = Literal["localized", "comprehensive", "mixed"]

#: What stands for null where a model cannot be held to a schema.
_DECLINED = ("none", "null")


@dataclass(frozen=True, slots=True)
class TemporalSettings:
    """What a temporal build is asked for.

    Args:
        mode: Which rows to make; `mixed` is both kinds (TPO trains LongVA on both, LLaVA-Video on comprehensive rows
            only).
        num_rows: Rows to make (TPO: 10k).
        localized_share: Share of localized rows where both kinds are made (TPO: half).
        chosen_from: View of a localized row's chosen answer: the segment the question is about (TPO), or the whole
            video.
        sparse_frames: Frames that a comprehensive row's rejected answer is given from (TPO: a sparse downsample,
            without a number; an eighth of its 32 frames is ours).
        max_context_characters: Most characters of captions that the question writer and the judge read, about 6,000
            tokens; of a longer video they read the summaries, each cut where these are too long together.
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
        check_types(self)
        check_seed(self.seed)
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


def most_rows(timelines: Sequence[Timeline], settings: TemporalSettings) -> int:
    """Most rows that can be made of videos: a question of each type about each scene, and about each video.

    Args:
        timelines: The videos. Clips without captions are taken to get one, unless others of the video have theirs.
        settings: See `TemporalSettings`.
    """
    scenes = sum(sum(bool(clip.caption) for clip in timeline.clips) or len(timeline) for timeline in timelines)
    num_localized = min(settings.num_localized, len(QUESTION_TYPES) * scenes)
    return num_localized + min(settings.num_rows - settings.num_localized, len(QUESTION_TYPES) * len(timelines))


# ------------------------------------------------------------------------------------------------------------- prompts


def question_prompt(captions: Sequence[str], question_type: str, is_segment: bool) -> str:
    """Asks for a question of one of `QUESTION_TYPES`, or none (TPO: "answers None").

    Args:
        captions: What the segment, or the whole video, shows, a line each.
        question_type: Key of `QUESTION_TYPES`.
        is_segment: Whether the question is about one segment of a longer video.
    """
    lines = "\n".join(captions)
    what = "one short segment of a longer video" if is_segment else "a whole video, in order"
    where = (
        "whoever has seen this segment, and nobody else, can answer it: name distinct things that are seen in it"
        if is_segment
        else "only whoever has seen all of the video can answer it, not somebody who saw a few pictures of it"
    )
    return (
        f"This is what {what} shows:\n{lines}\n\n"
        f"Write one question about it that asks {QUESTION_TYPES[question_type]}, so that {where}. It must have one "
        "right answer. Do not say where in the video something is. If no such question can be asked, answer null.\n"
        'Answer with a JSON object and nothing else: {"question": "..."} or {"question": null}'
    )


def post_filter_prompt(captions: Sequence[str], question: str, chosen: str, rejected: str) -> str:
    """Asks the three questions of TPO's post-filter at once."""
    better, ambiguous, correct = (asked for asked, _, _ in POST_FILTER.values())
    return (
        f"{_shown_pair(captions, question, chosen, rejected)}"
        f"better: {better} Yes, No or Equally.\n"
        f"ambiguous: {ambiguous} Yes or No.\n"
        f"correct: {correct} Yes or No.\n"
        'Answer with a JSON object and nothing else: {"better": "...", "ambiguous": "...", "correct": "..."}'
    )


def _shown_pair(captions: Sequence[str], question: str, chosen: str, rejected: str) -> str:
    lines = "\n".join(captions)
    return f"What a video shows:\n{lines}\n\nQuestion: {question}\nAnswer 1: {chosen}\nAnswer 2: {rejected}\n"


# --------------------------------------------------------------------------------------------------------- the methods


def localized(
    videos: Sequence[CaptionedVideo],
    question_writer: Responder,
    settings: TemporalSettings,
    judge: Responder | None = None,
) -> Method:
    """How localized rows are made; see `build_temporal` for who does what."""
    context = _Context(videos, settings.max_context_characters)
    views: dict[str, ViewOf] = {"segment": evidence, "whole": whole}
    return Method(
        name=LOCALIZED,
        prompt_version=PROMPT_VERSION,
        question_model=question_writer.name,
        write=partial(_write, question_writer, context),
        chosen=views[settings.chosen_from],
        rejected=without_evidence,
        pair_filters=_post_filter(judge, context),
        reasons=REASONS,
        citation=TPO,
    )


def comprehensive(
    videos: Sequence[CaptionedVideo],
    question_writer: Responder,
    settings: TemporalSettings,
    judge: Responder | None = None,
) -> Method:
    """How comprehensive rows are made; see `build_temporal` for who does what."""
    context = _Context(videos, settings.max_context_characters)
    return Method(
        name=COMPREHENSIVE,
        prompt_version=PROMPT_VERSION,
        question_model=question_writer.name,
        write=partial(_write, question_writer, context),
        chosen=whole,
        rejected=partial(_sparse, settings.sparse_frames),
        pair_filters=_post_filter(judge, context),
        reasons=REASONS,
        citation=TPO,
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
    executor: Executor | None = None,
) -> dict[str, dict[str, int]]:
    """Builds a dataset of temporal preferences; see `building.engine.build` for how it resumes.

    Args:
        videos: What questions are asked about, as often as it takes. Those with fewer than two captions are dropped.
        question_writer: Writes a question of a given type from captions, or says that there is none; sees no frame.
        answerer: Gives both answers: the model that will be trained.
        output: Folder of the dataset; an earlier one there is replaced.
        settings: See `TemporalSettings`.
        judge: Answers the three questions of the paper's post-filter from the captions; None leaves it out, which the
            card then says.
        media_root: See `publishing.dataset.DatasetWriter`: None publishes the media, a folder names them by reference.
        facts: What else the card should say of how the videos came about.
        funnel: One that has counted what came before the videos; it is closed here. None starts with the videos.
        executor: Who works the pieces, see `building.executors`; None: this process.

    Returns:
        The funnel: what came through each stage, what was dropped for which reason. Every draft is a row or a drop.

    Raises:
        ConfigError: If no video has two captions.
        DatasetError: If no row came out.
    """
    from longvpo_hf.building.engine import build
    from longvpo_hf.building.executors import HERE

    executor = executor or HERE
    with open_log(executor.place(output), funnel) as funnel:
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
            settings=settings,
            root=common_folder(clip.path for video in usable for clip in video.timeline.clips),
            executor=executor,
            models={"questions": question_writer, "judge": judge},
            facts={
                "mode": settings.mode,
                "rows asked for": settings.num_rows,
                "localized rows asked for": settings.num_localized,
                "videos": len(usable),
                "question model": question_writer.name,
                "answer model": answerer.name,
                "judge of the post-filter": described(judge, "none: not applied"),
                "localized, chosen answers from": settings.chosen_from,
                "comprehensive, rejected answers from": f"{settings.sparse_frames} frames",
                "prompt version": PROMPT_VERSION,
                "seed": settings.seed,
                **(facts or {}),
            },
            remedy="Add videos, raise max_rounds, or choose a stronger question writer.",
        )


# ------------------------------------------------------------------------------------------------- drafts and questions


class _Typed:
    """Goes round the videos; types come evenly, and each of them once before one comes again for a video."""

    def __init__(self, videos: Sequence[CaptionedVideo], seed: int) -> None:
        self._rotation = Rotation(videos, seed)
        self._first = {videos[index].timeline: place for place, index in enumerate(self._rotation.order(0))}

    def __call__(self, round_index: int, missing: int) -> Iterator[list[Draft]]:
        types = list(QUESTION_TYPES)
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
    requests = []
    for draft in drafts:
        text = question_prompt(context(draft), draft.question_type, bool(draft.evidence))
        question = f"What is the {draft.question_type} of {things_in(text)}?"
        requests.append(Request(text, schema=QUESTION_SCHEMA, rehearsed=partial(json.dumps, {"question": question})))
    answers = ask(writer, requests, "questions", remember=True)
    return [_read(draft, answer) for draft, answer in zip(drafts, answers, strict=True)]


def _read(draft: Draft, answer: Answer) -> Draft | Drop:
    if isinstance(answer, Drop):
        return answer
    fields = json_object(answer)
    question = fields.get("question", 0) if fields is not None else without_reasoning(answer)
    if question is None or (isinstance(question, str) and question.strip().strip(".").casefold() in _DECLINED):
        return Drop("declined", draft.question_type)
    if fields is None or not isinstance(question, str):
        return Drop("cut_off" if isinstance(answer, CutOff) else "malformed_question", answer)
    if is_ellipsis(question):
        return Drop("copied_example", answer)
    return replace(draft, question=question.strip())


def _sparse(num_frames: int, draft: Draft, rng: np.random.Generator) -> View:
    """So many frames, spread over the timeline; of so many clips where it has more."""
    num_clips = len(draft.timeline)
    if num_frames >= num_clips:
        return View.sparse(num_frames)
    clips = tuple(int((place + 0.5) * num_clips / num_frames) for place in range(num_frames))
    return View(keep=clips, num_frames=num_frames)


def _post_filter(judge: Responder | None, context: _Context) -> tuple[PairFilter, ...]:
    if judge is None:
        return ()
    by = _ask_each if isinstance(judge, ByProbability) else _ask_three
    return (PairFilter("post_filter", partial(by, judge, context), judge.name),)


def _ask_three(judge: Responder, context: _Context, pairs: Sequence[Answered], ask: Asker) -> list[Drop | None]:
    """TPO's post-filter."""
    passed = partial(json.dumps, {"better": "Yes", "ambiguous": "No", "correct": "Yes"})
    requests = []
    for pair in pairs:
        text = post_filter_prompt(context(pair.draft), pair.draft.question, pair.chosen, pair.rejected)
        requests.append(Request(text, schema=POST_FILTER_SCHEMA, rehearsed=passed))
    verdicts = ask(judge, requests, "post-filter")
    return [_verdict(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True)]


def _ask_each(judge: Responder, context: _Context, pairs: Sequence[Answered], ask: Asker) -> list[Drop | None]:
    """TPO's post-filter for a judge that is read by probability: one question at a time, each of those that passed."""
    drops: dict[int, Drop | None] = dict.fromkeys(range(len(pairs)))
    for name, (question, wanted, reason) in POST_FILTER.items():
        left = [place for place, drop in drops.items() if drop is None]
        requests = []
        for place in left:
            pair = pairs[place]
            shown = _shown_pair(context(pair.draft), pair.draft.question, pair.chosen, pair.rejected)
            rehearsed = partial(str, "Yes" if wanted else "No")
            requests.append(Request(f"{shown}{question} {YES_OR_NO}", rehearsed=rehearsed))
        for place, verdict in zip(left, ask(judge, requests, f"post-filter: {name}"), strict=True):
            pair = pairs[place]
            judged = f"{pair.draft.question} — {pair.chosen} / {pair.rejected}"
            drops[place] = unless(wanted, verdict, reason, judged)
    return list(drops.values())


def _verdict(pair: Answered, verdict: Answer) -> Drop | None:
    if isinstance(verdict, Drop):
        return verdict
    fields = json_object(verdict) or {}
    answers = {
        name: str(fields.get(name, "")).strip().strip(".").casefold() for name in ("better", "ambiguous", "correct")
    }
    detail = f"{pair.draft.question} — {pair.chosen} / {pair.rejected} — judge: {verdict}"
    if not (
        answers["better"] in ("yes", "no", "equally") and {answers["ambiguous"], answers["correct"]} <= {"yes", "no"}
    ):
        return Drop("cut_off" if isinstance(verdict, CutOff) else "malformed_verdict", detail)
    if answers["better"] != "yes":
        return Drop("not_better", detail)
    if answers["ambiguous"] != "no":
        return Drop("ambiguous", detail)
    return None if answers["correct"] == "yes" else Drop("not_correct", detail)
