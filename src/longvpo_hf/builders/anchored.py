"""LongVPO Stage 1: anchored preference rows from short clips.

Takes clips, who writes questions and who answers them; gives a dataset folder (`hub.py`) of rows in which a clip with a
question about it, the anchor, stands among clips unlike it. Chosen is the answer given from the anchor alone, rejected
the one given from the others. Rows say that the reference is scored on the anchor only. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from longvpo_hf import prompts
from longvpo_hf.filters import Funnel, check_answers, check_question
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.hub import DatasetWriter, dataset_card
from longvpo_hf.preference import Provenance, VideoPreference
from longvpo_hf.responders import Request, Responder
from longvpo_hf.timeline import Clip, Timeline, View

RECIPE = "longvpo-stage1"

#: Gives one vector per clip, `[num_clips, dim]`; any length but zero.
Embedder = Callable[[Sequence[Clip]], NDArray[np.floating]]

_REQUESTS_PER_CALL = 256


@dataclass(frozen=True, slots=True)
class AnchoredSettings:
    """What a Stage-1 build is asked for.

    Args:
        num_rows: Rows to make (paper: 10k).
        min_clips: Fewest clips of a timeline, ≥ 2.
        max_clips: Most clips of a timeline. The paper says "several".
        questions_per_timeline: Anchors (and so rows) per timeline; 1 as in the paper. More let training share a video's
            forward pass among its questions.
        max_similarity: A distractor's embedding may have at most this cosine with an anchor (paper: 0.6).
        max_rounds: How often more timelines are drawn to make up for dropped rows before giving up.
        seed: Same seed, same clips, same models: same rows.
    """

    num_rows: int = 10_000
    min_clips: int = 2
    max_clips: int = 16
    questions_per_timeline: int = 1
    max_similarity: float = 0.6
    max_rounds: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_rows", "questions_per_timeline", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}.")
        if not 2 <= self.min_clips <= self.max_clips:
            raise ValueError(
                "A timeline needs an anchor and a distractor: 2 ≤ min_clips ≤ max_clips, "
                f"got min_clips={self.min_clips}, max_clips={self.max_clips}."
            )
        if not -1 <= self.max_similarity <= 1:
            raise ValueError(f"max_similarity is a cosine in [-1, 1], got {self.max_similarity}.")


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row on its way: a timeline by pool indices, and which of its clips is the anchor."""

    clips: tuple[int, ...]
    anchor: int  # index into `clips`
    similarities: tuple[float, ...]

    @property
    def anchor_clip(self) -> int:
        return self.clips[self.anchor]


def build_anchored(
    clips: Sequence[Clip],
    question_writer: Responder,
    answerer: Responder,
    output: Path,
    settings: AnchoredSettings,
    embed: Embedder | None = None,
) -> dict[str, dict[str, int]]:
    """Builds a Stage-1 dataset.

    Args:
        clips: The pool anchors and distractors are drawn from.
        question_writer: Writes a question from an anchor clip.
        answerer: Gives both answers: the model that will be trained.
        output: Folder of the dataset; see `hub.py`. An earlier one there is replaced.
        settings: See `AnchoredSettings`.
        embed: Embeds clips for the similarity filter; None leaves it out, which the card then says.

    Returns:
        The funnel: what came through each stage, what was dropped for which reason. It says where rows are missing.

    Raises:
        ValueError: If the pool is smaller than `max_clips`.
    """
    if len(clips) < settings.max_clips:
        raise ValueError(
            f"A pool of {len(clips)} clips cannot fill timelines of up to max_clips={settings.max_clips}; "
            "add clips or lower max_clips."
        )
    funnel = Funnel(output.with_name(output.name + ".log"))
    funnel.count("clips", len(clips))
    build = _Build(clips, question_writer, answerer, settings, funnel, embed)
    with DatasetWriter(output) as writer, tqdm(total=settings.num_rows, desc="Stage-1 rows", unit="row") as bar:
        for round_index in range(settings.max_rounds):
            missing = settings.num_rows - writer.num_rows
            if missing <= 0:
                break
            for row in build.round(round_index, missing):
                writer.add(row)
                bar.update()
        funnel.count("rows", writer.num_rows)
        counts = funnel.close()
        writer.write_card(
            dataset_card(
                "LongVPO Stage 1: anchored preference rows",
                RECIPE,
                writer.num_rows,
                counts,
                {
                    "recipe": RECIPE,
                    "rows asked for": settings.num_rows,
                    "clips per timeline": f"{settings.min_clips}–{settings.max_clips}",
                    "questions per timeline": settings.questions_per_timeline,
                    "question model": question_writer.name,
                    "answer model": answerer.name,
                    "similarity filter": f"cosine ≤ {settings.max_similarity}" if embed else "not applied",
                    "prompt version": prompts.VERSION,
                    "seed": settings.seed,
                },
            )
        )
    return counts


class _Build:
    """One build's pool, models and memory of what was already asked."""

    def __init__(
        self,
        clips: Sequence[Clip],
        question_writer: Responder,
        answerer: Responder,
        settings: AnchoredSettings,
        funnel: Funnel,
        embed: Embedder | None,
    ) -> None:
        self.clips = clips
        self.question_writer = question_writer
        self.answerer = answerer
        self.settings = settings
        self.funnel = funnel
        self.vectors = _unit(embed(clips), len(clips)) if embed else None
        self.questions: dict[int, str] = {}  # by pool index; "" where there is none
        self.chosen: dict[int, str] = {}

    def round(self, round_index: int, missing: int) -> list[VideoPreference]:
        """At most `missing` rows from freshly drawn timelines."""
        rng = np.random.default_rng([self.settings.seed, round_index])
        drafts = self._drafts(rng, missing)
        self.funnel.count("drafts", len(drafts))
        self._ask_questions(drafts)
        drafts = [draft for draft in drafts if self.questions[draft.anchor_clip]]
        self._answer_from_anchors(drafts)
        drafts = [draft for draft in drafts if draft.anchor_clip in self.chosen]
        rejected = self._respond(
            self.answerer,
            [
                Request(self.questions[draft.anchor_clip], self._timeline(draft), View.without([draft.anchor]))
                for draft in drafts
            ],
            "rejected answers",
        )
        rows: list[VideoPreference] = []
        for draft, answer in zip(drafts, rejected, strict=True):
            if answer is None or len(rows) == missing:
                continue
            chosen = self.chosen[draft.anchor_clip]
            reason = check_answers(chosen, answer)
            if reason:
                self.funnel.drop(
                    reason,
                    question=self.questions[draft.anchor_clip],
                    chosen=chosen,
                    rejected=answer,
                    anchor=self.clips[draft.anchor_clip].path,
                )
                continue
            rows.append(self._row(draft, answer))
        return rows

    def _drafts(self, rng: np.random.Generator, missing: int) -> list[_Draft]:
        per_timeline = self.settings.questions_per_timeline
        num_timelines = -(-missing // per_timeline)
        # Stratified: one anchor position in each of `num_timelines` equal parts of [0, 1), in random order.
        places = (rng.permutation(num_timelines) + rng.random(num_timelines)) / num_timelines
        drafts: list[_Draft] = []
        for place in places:
            length = int(rng.integers(self.settings.min_clips, self.settings.max_clips + 1))
            members = self._members(rng, length, min(per_timeline, length))
            if members is None:
                self.funnel.drop("no_distractors", clips=length)
                continue
            num_anchors = min(per_timeline, length)
            # Further anchors of the timeline are spread evenly from the first, so that they balance too.
            positions = [int(((place + j / num_anchors) % 1.0) * length) for j in range(num_anchors)]
            rest = [i for i in range(length) if i not in positions]
            order = dict(zip([*positions, *rest], members, strict=True))
            clips = tuple(order[i] for i in range(length))
            drafts += [_Draft(clips, position, self._similarities(clips, position)) for position in positions]
        return drafts

    def _members(self, rng: np.random.Generator, length: int, num_anchors: int) -> list[int] | None:
        """`length` pool indices, anchors first, in which no clip is too like an anchor; None if there are too few."""
        members: list[int] = []
        order = rng.permutation(len(self.clips))
        for index in order:
            if len(members) == length:
                break
            if self.vectors is not None and members:
                others = members if len(members) < num_anchors else members[:num_anchors]
                if (self.vectors[others] @ self.vectors[index]).max() > self.settings.max_similarity:
                    continue
            members.append(int(index))
        return members if len(members) == length else None

    def _similarities(self, clips: tuple[int, ...], anchor: int) -> tuple[float, ...]:
        if self.vectors is None:
            return ()
        return tuple(float(value) for value in self.vectors[list(clips)] @ self.vectors[clips[anchor]])

    def _ask_questions(self, drafts: Sequence[_Draft]) -> None:
        anchors = sorted({draft.anchor_clip for draft in drafts} - self.questions.keys())
        requests = [
            Request(prompts.question_from_clip(self.clips[i].caption), Timeline((self.clips[i],))) for i in anchors
        ]
        for index, question in zip(anchors, self._respond(self.question_writer, requests, "questions"), strict=True):
            reason = None if question is None else check_question(question)
            if reason:
                self.funnel.drop(reason, question=question, anchor=self.clips[index].path)
            self.questions[index] = "" if reason or question is None else question
        self.funnel.count("questions", sum(bool(self.questions[i]) for i in anchors))

    def _answer_from_anchors(self, drafts: Sequence[_Draft]) -> None:
        anchors = sorted({draft.anchor_clip for draft in drafts} - self.chosen.keys())
        requests = [Request(self.questions[i], Timeline((self.clips[i],))) for i in anchors]
        for index, answer in zip(anchors, self._respond(self.answerer, requests, "chosen answers"), strict=True):
            if answer is not None:
                self.chosen[index] = answer

    def _respond(self, responder: Responder, requests: Sequence[Request], what: str) -> list[str | None]:
        """Answers in order; None (and a counted drop) where the video cannot be decoded."""
        answers: list[str | None] = []
        for start in tqdm(range(0, len(requests), _REQUESTS_PER_CALL), desc=what, unit="call", leave=False):
            batch = requests[start : start + _REQUESTS_PER_CALL]
            try:
                answers += responder.respond(batch)
            except UnreadableVideo:  # one bad clip must not cost its batch: ask one by one
                answers += [self._respond_one(responder, request) for request in batch]
        return answers

    def _respond_one(self, responder: Responder, request: Request) -> str | None:
        try:
            return responder.respond([request])[0]
        except UnreadableVideo as error:
            self.funnel.drop(error.reason, clip=error.path, detail=str(error))
            return None

    def _timeline(self, draft: _Draft) -> Timeline:
        return Timeline(tuple(self.clips[i] for i in draft.clips))

    def _row(self, draft: _Draft, rejected: str) -> VideoPreference:
        return VideoPreference(
            timeline=self._timeline(draft),
            question=self.questions[draft.anchor_clip],
            chosen=self.chosen[draft.anchor_clip],
            rejected=rejected,
            evidence=(draft.anchor,),
            reference=(draft.anchor,),
            provenance=Provenance(
                recipe=RECIPE,
                chosen_view=str(View.only([draft.anchor])),
                rejected_view=str(View.without([draft.anchor])),
                question_model=self.question_writer.name,
                answer_model=self.answerer.name,
                prompt_version=prompts.VERSION,
                similarities=draft.similarities,
                verdicts=("answers_differ",),
                seed=self.settings.seed,
            ),
        )


def _unit(vectors: NDArray[np.floating], length: int) -> NDArray[np.floating]:
    if vectors.ndim != 2 or vectors.shape[0] != length:
        raise ValueError(f"embed must give one vector per clip, [{length}, dim], got shape {list(vectors.shape)}.")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise ValueError(f"embed gave {int((norms == 0).sum())} zero vectors; a cosine needs a direction.")
    return vectors / norms
