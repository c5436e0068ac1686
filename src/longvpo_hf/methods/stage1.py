"""LongVPO Stage 1 (arXiv 2602.02341): anchored preference rows from short clips.

A clip with a question about it, the *anchor*, stands among clips unlike it in one pseudo-long timeline. Chosen is the
answer given from the anchor alone, rejected the one given from the others, and the reference is scored on the anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from longvpo_hf.building.asking import Asker
from longvpo_hf.building.judging import YES_OR_NO, described, unless
from longvpo_hf.building.method import (
    Answered,
    Draft,
    Drop,
    Method,
    PairFilter,
    Part,
    QuestionFilter,
    evidence,
    what_rows_follow_from,
    without_evidence,
)
from longvpo_hf.building.rehearsal import thing_of
from longvpo_hf.errors import ConfigError, check_seed, check_types
from longvpo_hf.funnel import Funnel, open_log
from longvpo_hf.papers import LONGVPO
from longvpo_hf.paths import common_folder
from longvpo_hf.responders import Request, Responder, identity
from longvpo_hf.timeline import Clip, Timeline

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from longvpo_hf.building.executors import Executor

NAME = "longvpo-stage1"
#: Version of the prompt texts below; a change of wording is a new version.
PROMPT_VERSION = "stage1-1"
#: Drops of this method's own.
REASONS = {
    "no_distractors": "not enough clips are unlike the anchor: embedding cosine above the bound, or of the same video",
    "not_specific": "the judge: the question can be answered without its anchor, or asks for too little of it",
    "rejected_is_right": "the judge: the rejected answer is right too",
}
#: Settings of the training on these rows, with their source; see `training.config.LongVPOConfig`.
TRAINING: Mapping[str, tuple[Any, str]] = {
    "reference": ("anchor", "LongVPO, Stage 1: the reference is scored on the anchor clip alone"),
    "beta": (0.01, "LongVPO"),
    "sft_weight": (1.0, "LongVPO: α"),
    "learning_rate": (5e-7, "LongVPO"),
    "warmup_steps": (0.01, "LongVPO: a share of the steps"),
}

#: LongVPO samples clips at 1 frame per second.
_FPS = 1.0

#: Gives one vector per clip, `[num_clips, dim]`; any length but zero.
Embedder: TypeAlias = "Callable[[Sequence[Clip]], NDArray[np.floating]]"


@dataclass(frozen=True, slots=True)
class Stage1Settings:
    """What a Stage-1 build is asked for.

    Args:
        num_rows: Rows to make (LongVPO: 10k).
        min_clips: Fewest clips of a timeline, at least 2.
        max_clips: Most clips of a timeline (LongVPO: several). None: as many as fill frame_budget.
        frame_budget: Training frames that a row should span at 1 per second (LongVPO: 128).
        questions_per_timeline: Anchors, and so rows, of a timeline (LongVPO: 1). More let training share a video's
            forward pass among its questions.
        max_similarity: Highest cosine of a distractor's embedding with an anchor's (LongVPO: 0.6).
        max_rounds: How often more timelines are drawn to make up for dropped rows before giving up.
        seed: Same seed, same clips, same models: same rows.
    """

    num_rows: int = 10_000
    min_clips: int = 2
    max_clips: int | None = None
    frame_budget: int = 128
    questions_per_timeline: int = 1
    max_similarity: float = 0.6
    max_rounds: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        for name in ("num_rows", "frame_budget", "questions_per_timeline", "max_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {getattr(self, name)}.")
        if not 2 <= self.min_clips <= (self.min_clips if self.max_clips is None else self.max_clips):
            raise ConfigError(
                "A timeline needs an anchor and a distractor: 2 ≤ min_clips ≤ max_clips, "
                f"got min_clips={self.min_clips}, max_clips={self.max_clips}."
            )
        if not -1 <= self.max_similarity <= 1:
            raise ConfigError(f"max_similarity is a cosine in [-1, 1], got {self.max_similarity}.")

    def fitted(self, clips: Sequence[Clip]) -> Stage1Settings:
        """These settings with a number for `max_clips`: as many of the clips as fill the budget, unless one is set."""
        if self.max_clips is not None:
            return self
        most = min(len(clips), clips_for_budget(clips, self.frame_budget, _FPS))
        return replace(self, max_clips=max(self.min_clips, most))


def clips_for_budget(clips: Sequence[Clip], num_frames: int, fps: float) -> int:
    """How many clips of median length fill a training budget of `num_frames` at `fps`: a `max_clips` that uses it."""
    import numpy as np

    median_seconds = float(np.median([clip.duration_seconds for clip in clips]))
    return int(min(num_frames, max(2, round(num_frames / max(1.0, median_seconds * fps)))))


# ------------------------------------------------------------------------------------------------------------- prompts


def question_prompt(caption: str) -> str:
    """Asks for a question that only this clip answers (LongVPO: from the anchor and its caption, if there is one)."""
    hint = f"The clip's caption: {caption}\n" if caption else ""
    return (
        "You see one short clip of a longer video. "
        f"{hint}"
        "Write one question about it that can be answered from this clip alone and from no other clip: name several "
        "distinct things that are seen in it, so that whoever watches the long video can find it, and ask for one "
        "detail. Do not say where in the video the clip is. Answer with the question only."
    )


def specific_prompt(question: str, caption: str) -> str:
    """Asks whether a question is specific to the clip that is shown.

    LongVPO: it must depend on several distinct visual elements of the anchor and not be answerable from other clips.
    """
    hint = f"The clip's caption: {caption}\n" if caption else ""
    return (
        f"You see one clip of a longer video.\n{hint}Question about it: {question}\n"
        "Does answering it depend on several distinct things seen in this clip, so that it could not be answered from "
        f"other clips? {YES_OR_NO}"
    )


def also_right_prompt(question: str, chosen: str, rejected: str) -> str:
    """Asks whether the rejected answer is right too, of the clip that holds the answer."""
    return (
        f"You see the clip a question is about.\nQuestion: {question}\nAnswer 1: {chosen}\nAnswer 2: {rejected}\n"
        f"Is answer 2 also right? {YES_OR_NO}"
    )


# ---------------------------------------------------------------------------------------------------------- the method


def method(question_writer: Responder, judge: Responder | None = None) -> Method:
    """How Stage-1 rows are made.

    Args:
        question_writer: Writes a question from an anchor clip.
        judge: Says whether a question is specific to its anchor, and whether a rejected answer is right after all (the
            paper's optional LLM judge); None leaves that out.
    """
    return Method(
        name=NAME,
        prompt_version=PROMPT_VERSION,
        question_model=question_writer.name,
        write=partial(_write_questions, question_writer),
        chosen=evidence,
        rejected=without_evidence,
        reference=evidence,
        question_filters=(QuestionFilter("specific", partial(_drop_unspecific, judge), judge.name),) if judge else (),
        pair_filters=(PairFilter("rejected_is_wrong", partial(_drop_right_ones, judge), judge.name),) if judge else (),
        reasons=REASONS,
        citation=LONGVPO,
    )


def build_stage1(
    clips: Sequence[Clip],
    question_writer: Responder,
    answerer: Responder,
    output: Path,
    settings: Stage1Settings,
    embed: Embedder | None = None,
    judge: Responder | None = None,
    media_root: Path | None = None,
    facts: Mapping[str, object] | None = None,
    funnel: Funnel | None = None,
    executor: Executor | None = None,
) -> dict[str, dict[str, int]]:
    """Builds a Stage-1 dataset; see `building.engine.build` for how it resumes.

    Args:
        clips: The pool anchors and distractors are drawn from.
        question_writer: Writes a question from an anchor clip.
        answerer: Gives both answers: the model that will be trained.
        output: Folder of the dataset; an earlier one there is replaced.
        settings: See `Stage1Settings`.
        embed: Embeds clips for the similarity filter; None leaves it out, which the card then says.
        judge: See `method`; None leaves it out, which the card then says.
        media_root: See `publishing.dataset.DatasetWriter`: None publishes the media, a folder names them by reference.
        facts: What else the card should say of how the clips came about.
        funnel: One that has counted what came before the clips; it is closed here. None starts with the clips.
        executor: Who works the pieces, see `building.executors`; None: this process.

    Returns:
        The funnel: what came through each stage, what was dropped for which reason. Every draft is a row or a drop.

    Raises:
        ConfigError: If the pool is smaller than `max_clips`.
        DatasetError: If no row came out.
    """
    from longvpo_hf.building.engine import build
    from longvpo_hf.building.executors import HERE

    executor = executor or HERE
    settings = settings.fitted(clips)
    most = settings.max_clips or 0
    if len(clips) < most:
        raise ConfigError(
            f"A pool of {len(clips)} clips cannot fill timelines of up to max_clips={most}; "
            "add clips or lower max_clips."
        )
    if embed is None and len({clip.source_id or clip.path for clip in clips}) == 1:
        raise ConfigError(
            "All clips are of one video, and clips of one video are not distractors of each other unless their "
            "similarity is measured: add videos, or give an embedder."
        )
    with open_log(executor.place(output), funnel) as funnel:
        funnel.count("clips", len(clips))
        timelines = _Timelines(clips, settings, most, _unit(embed(clips), len(clips)) if embed else None)
        return build(
            [Part(method(question_writer, judge), timelines, settings.num_rows)],
            answerer,
            output,
            name=NAME,
            title="LongVPO Stage 1: anchored preference rows",
            seed=settings.seed,
            max_rounds=settings.max_rounds,
            follows_from=[what_rows_follow_from(settings), identity(question_writer), identity(judge) if judge else ""],
            funnel=funnel,
            media_root=media_root,
            settings=settings,
            root=common_folder(clip.path for clip in clips),
            executor=executor,
            models={"questions": question_writer, "judge": judge},
            facts={
                "method": NAME,
                "rows asked for": settings.num_rows,
                "clips per timeline": f"{settings.min_clips}–{most}",
                "questions per timeline": settings.questions_per_timeline,
                "question model": question_writer.name,
                "answer model": answerer.name,
                "judge": described(judge),
                "similarity filter": f"cosine ≤ {settings.max_similarity}"
                if embed
                else "not applied: no embedder; clips of one video are not distractors of each other",
                "prompt version": PROMPT_VERSION,
                "seed": settings.seed,
                **(facts or {}),
            },
            remedy="Add clips, or raise max_rounds or max_similarity.",
        )


# ----------------------------------------------------------------------------------------------------------- timelines


class _Timelines:
    """Draws pseudo-long timelines from the pool: the drafts of Stage 1."""

    def __init__(
        self,
        clips: Sequence[Clip],
        settings: Stage1Settings,
        max_clips: int,
        vectors: NDArray[np.floating] | None,
    ) -> None:
        self.clips = clips
        self.settings = settings
        self.max_clips = max_clips
        self.vectors = vectors
        #: What cannot be told apart without embeddings: clips of one video look alike.
        self.videos = [clip.source_id or clip.path for clip in clips]

    def __call__(self, round_index: int, missing: int) -> Iterator[list[Draft] | Drop]:
        """Timelines that could give `missing` rows, each as its drafts; a drop where distractors are lacking."""
        import numpy as np

        rng = np.random.default_rng([self.settings.seed, round_index])
        per_timeline = self.settings.questions_per_timeline
        num_timelines = -(-missing // per_timeline)
        # Stratified: one anchor position in each of `num_timelines` equal parts of [0, 1), in random order.
        places = (rng.permutation(num_timelines) + rng.random(num_timelines)) / num_timelines
        for place in places:
            length = int(rng.integers(self.settings.min_clips, self.max_clips + 1))
            num_anchors = min(per_timeline, length)
            members = self._members(rng, length, num_anchors)
            if members is None:
                yield Drop("no_distractors", f"for a timeline of {length} clips")
                continue
            # Further anchors of the timeline are spread evenly from the first, so that they balance too.
            positions = [int(((place + j / num_anchors) % 1.0) * length) for j in range(num_anchors)]
            rest = [i for i in range(length) if i not in positions]
            order = dict(zip([*positions, *rest], members, strict=True))
            drawn = [order[i] for i in range(length)]
            timeline = Timeline(tuple(self.clips[i] for i in drawn))
            yield [
                Draft(timeline, (position,), number, similarities=self._similarities(drawn, position))
                for number, position in enumerate(positions)
            ]

    def _members(self, rng: np.random.Generator, length: int, num_anchors: int) -> list[int] | None:
        """`length` pool indices, anchors first, in which no clip is too like an anchor; None if there are too few."""
        members: list[int] = []
        order = rng.permutation(len(self.clips))
        for index in order:
            if len(members) == length:
                break
            anchors = members[:num_anchors]
            if anchors and self._is_like(int(index), anchors):
                continue
            members.append(int(index))
        return members if len(members) == length else None

    def _is_like(self, index: int, anchors: Sequence[int]) -> bool:
        """Whether a clip may show what an anchor shows: it is too similar or, unmeasured, of the same video."""
        if self.vectors is None:
            return any(self.videos[anchor] == self.videos[index] for anchor in anchors)
        return bool((self.vectors[anchors] @ self.vectors[index]).max() > self.settings.max_similarity)

    def _similarities(self, drawn: Sequence[int], anchor: int) -> tuple[float, ...]:
        if self.vectors is None:
            return ()
        return tuple(float(value) for value in self.vectors[list(drawn)] @ self.vectors[drawn[anchor]])


def _unit(vectors: NDArray[np.floating], length: int) -> NDArray[np.floating]:
    import numpy as np

    if vectors.ndim != 2 or vectors.shape[0] != length:
        raise ConfigError(f"embed must give one vector per clip, [{length}, dim], got shape {list(vectors.shape)}.")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise ConfigError(f"embed gave {int((norms == 0).sum())} zero vectors; a cosine needs a direction.")
    return vectors / norms


# ----------------------------------------------------------------------------------------------- questions and filters


def _anchor(draft: Draft) -> Clip:
    return draft.timeline.clips[draft.evidence[0]]


def _about_anchor(draft: Draft, text: str, rehearsed: str) -> Request:
    return Request(text, Timeline((_anchor(draft),)), rehearsed=lambda: rehearsed)


def _write_questions(writer: Responder, drafts: Sequence[Draft], ask: Asker) -> list[Draft | Drop]:
    requests = [
        _about_anchor(
            draft,
            question_prompt(_anchor(draft).caption),
            rehearsed=f"What can be seen where {thing_of(_anchor(draft))} is shown?",
        )
        for draft in drafts
    ]
    # Remembered: a clip has the same question in all its rows.
    texts = ask(writer, requests, "questions", remember=True)
    return [
        text if isinstance(text, Drop) else replace(draft, question=text)
        for draft, text in zip(drafts, texts, strict=True)
    ]


def _drop_unspecific(judge: Responder, drafts: Sequence[Draft], ask: Asker) -> list[Drop | None]:
    requests = [
        _about_anchor(draft, specific_prompt(draft.question, _anchor(draft).caption), rehearsed="Yes")
        for draft in drafts
    ]
    verdicts = ask(judge, requests, "specificity", remember=True)
    return [
        unless(True, verdict, "not_specific", draft.question) for draft, verdict in zip(drafts, verdicts, strict=True)
    ]


def _drop_right_ones(judge: Responder, pairs: Sequence[Answered], ask: Asker) -> list[Drop | None]:
    requests = [
        _about_anchor(pair.draft, also_right_prompt(pair.draft.question, pair.chosen, pair.rejected), rehearsed="No")
        for pair in pairs
    ]
    verdicts = ask(judge, requests, "judging pairs")
    return [
        unless(False, verdict, "rejected_is_right", pair.rejected)
        for pair, verdict in zip(pairs, verdicts, strict=True)
    ]
