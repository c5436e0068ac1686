"""LongVPO Stage 1: anchored preference rows from short clips.

Takes clips, who writes questions, who answers and, if wanted, who judges; gives a dataset folder (`hub.py`) of rows in
which a clip with a question about it, the anchor, stands among clips unlike it. Chosen is the answer given from the
anchor alone, rejected the one given from the others. Rows say that the reference is scored on the anchor only. A killed
build goes on where it was when it is called again. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from longvpo_hf import prompts
from longvpo_hf.builders.job import Job, Record
from longvpo_hf.filters import Funnel, check_answer, check_pair, check_question
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.hub import DatasetWriter, dataset_card
from longvpo_hf.preference import Provenance, VideoPreference
from longvpo_hf.responders import Request, Responder, Unanswered
from longvpo_hf.timeline import Clip, Timeline, View

RECIPE = "longvpo-stage1"

#: Gives one vector per clip, `[num_clips, dim]`; any length but zero.
Embedder = Callable[[Sequence[Clip]], NDArray[np.floating]]

#: Timelines per piece of work: what a kill can cost, and what is asked for at once.
_TIMELINES_PER_PIECE = 64


@dataclass(frozen=True, slots=True)
class AnchoredSettings:
    """What a Stage-1 build is asked for.

    Args:
        num_rows: Rows to make (paper: 10k).
        min_clips: Fewest clips of a timeline, ≥ 2.
        max_clips: Most clips of a timeline. The paper says "several"; `clips_for_budget` fits it to a frame budget.
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


def log_folder(output: Path) -> Path:
    """Where a build writes its drops and its funnel: beside the dataset, which holds nothing but itself."""
    return output.with_name(output.name + ".log")


def clips_for_budget(clips: Sequence[Clip], num_frames: int, fps: float) -> int:
    """How many clips of median length fill a training budget of `num_frames` at `fps`: a `max_clips` that uses it."""
    median_seconds = float(np.median([clip.duration_seconds for clip in clips]))
    return int(min(num_frames, max(2, round(num_frames / max(1.0, median_seconds * fps)))))


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row on its way: a timeline by pool indices, and which of its clips is the anchor."""

    clips: tuple[int, ...]
    anchor: int  # index into `clips`
    similarities: tuple[float, ...]

    @property
    def anchor_clip(self) -> int:
        return self.clips[self.anchor]


@dataclass(frozen=True, slots=True)
class _Drop:
    """Why something is dropped, and what a person may want to know of it."""

    reason: str
    detail: str = ""


def build_anchored(
    clips: Sequence[Clip],
    question_writer: Responder,
    answerer: Responder,
    output: Path,
    settings: AnchoredSettings,
    embed: Embedder | None = None,
    judge: Responder | None = None,
    media_root: Path | None = None,
    facts: Mapping[str, object] | None = None,
    funnel: Funnel | None = None,
) -> dict[str, dict[str, int]]:
    """Builds a Stage-1 dataset.

    Finished work lies in `<output>.job` beside the dataset, the log of drops and the funnel in `<output>.log`. Called
    again with the same arguments, an interrupted build goes on and ends with the same rows.

    Args:
        clips: The pool anchors and distractors are drawn from.
        question_writer: Writes a question from an anchor clip.
        answerer: Gives both answers: the model that will be trained.
        output: Folder of the dataset; see `hub.py`. An earlier one there is replaced.
        settings: See `AnchoredSettings`.
        embed: Embeds clips for the similarity filter; None leaves it out, which the card then says.
        judge: Says whether a question is specific to its anchor, and whether a rejected answer is right after all (the
            paper's optional LLM judge); None leaves that out, which the card then says.
        media_root: See `hub.DatasetWriter`: None publishes the media, a folder names them by reference.
        facts: What else the card shall say of how the clips came about.
        funnel: One that has counted what came before the clips; it is closed here. None begins with the clips.

    Returns:
        The funnel: what came through each stage, what was dropped for which reason. Every draft is a row or a drop.

    Raises:
        ValueError: If the pool is smaller than `max_clips`, or no row came out.
    """
    if len(clips) < settings.max_clips:
        raise ValueError(
            f"A pool of {len(clips)} clips cannot fill timelines of up to max_clips={settings.max_clips}; "
            "add clips or lower max_clips."
        )
    funnel = funnel or Funnel(log_folder(output))
    funnel.count("clips", len(clips))
    build = _Build(
        clips, question_writer, answerer, judge, settings, funnel, embed, output.with_name(output.name + ".job")
    )
    with (
        DatasetWriter(output, media_root) as writer,
        tqdm(total=settings.num_rows, desc="Stage-1 rows", unit="row") as bar,
    ):
        for round_index in range(settings.max_rounds):
            missing = settings.num_rows - writer.num_rows
            if missing == 0:
                break
            for row in build.round(round_index, missing):
                writer.add(row)
                bar.update()
        funnel.count("rows", writer.num_rows)
        counts = funnel.close()
        if writer.num_rows == 0:
            raise ValueError(
                f"No row came of {len(clips)} clips; dropped: {_dropped(counts)}. See {log_folder(output)} for each."
            )
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
                    "judge": judge.name if judge else "none",
                    "similarity filter": f"cosine ≤ {settings.max_similarity}" if embed else "not applied",
                    "prompt version": prompts.VERSION,
                    "seed": settings.seed,
                    "anchor positions": _histogram(build.places),
                    **(facts or {}),
                },
            )
        )
    if writer.num_rows < settings.num_rows:
        tqdm.write(
            f"{writer.num_rows} of {settings.num_rows} rows after {settings.max_rounds} rounds; dropped: "
            f"{_dropped(counts)}. Add clips, or raise max_rounds or max_similarity."
        )
    return counts


class _Build:
    """One build's pool, models and memory of what was already asked."""

    def __init__(
        self,
        clips: Sequence[Clip],
        question_writer: Responder,
        answerer: Responder,
        judge: Responder | None,
        settings: AnchoredSettings,
        funnel: Funnel,
        embed: Embedder | None,
        folder: Path,
    ) -> None:
        self.clips = clips
        self.question_writer = question_writer
        self.answerer = answerer
        self.judge = judge
        self.settings = settings
        self.funnel = funnel
        self.vectors = _unit(embed(clips), len(clips)) if embed else None
        names = [responder.name if responder else "" for responder in (question_writer, answerer, judge)]
        self.job = Job(folder, [RECIPE, prompts.VERSION, asdict(settings), names])
        self.ids: set[str] = set()
        #: Anchors of the rows, by tenth of the timeline.
        self.places = [0] * 10
        # What is known of a clip as an anchor, by pool index: the same question and chosen answer in all its rows.
        self.questions: dict[int, str | _Drop] = {}
        self.chosen: dict[int, str | _Drop] = {}

    def round(self, round_index: int, missing: int) -> Iterator[VideoPreference]:
        """At most `missing` rows from freshly drawn timelines."""
        timelines = self._timelines(np.random.default_rng([self.settings.seed, round_index]), missing)
        piece_index = made = 0
        while made < missing and (piece := list(islice(timelines, _TIMELINES_PER_PIECE))):
            drafts = [draft for timeline in piece for draft in timeline]
            self.funnel.count("timelines", sum(bool(timeline) for timeline in piece))
            self.funnel.count("drafts", len(drafts))
            inputs = [[[self._identity(i) for i in draft.clips], draft.anchor, draft.similarities] for draft in drafts]
            records = self.job.piece(f"{round_index:02d}-{piece_index:05d}", inputs, partial(self._work, drafts))
            piece_index += 1
            for draft, record in zip(drafts, records, strict=True):
                self._remember(draft, record)
                if made == missing:
                    self.funnel.count("drafts beyond the rows asked for")
                elif "drop" in record:
                    self.funnel.drop(**record["drop"], **record["of"])
                elif (row := self._row(draft, record)).id in self.ids:
                    self.funnel.drop("duplicate_row", id=row.id)
                else:
                    self.ids.add(row.id)
                    self.places[min(9, int(10 * row.timeline.centre(draft.anchor)))] += 1
                    made += 1
                    yield row

    def _identity(self, index: int) -> list[Any]:
        clip = self.clips[index]
        return [clip.path, clip.start_seconds, clip.end_seconds]

    def _timelines(self, rng: np.random.Generator, missing: int) -> Iterator[list[_Draft]]:
        """Timelines that could give `missing` rows, each as its drafts; an empty one where distractors are lacking."""
        per_timeline = self.settings.questions_per_timeline
        num_timelines = -(-missing // per_timeline)
        # Stratified: one anchor position in each of `num_timelines` equal parts of [0, 1), in random order.
        places = (rng.permutation(num_timelines) + rng.random(num_timelines)) / num_timelines
        for place in places:
            length = int(rng.integers(self.settings.min_clips, self.settings.max_clips + 1))
            num_anchors = min(per_timeline, length)
            members = self._members(rng, length, num_anchors)
            if members is None:
                self.funnel.drop("no_distractors", clips=length)
                yield []
                continue
            # Further anchors of the timeline are spread evenly from the first, so that they balance too.
            positions = [int(((place + j / num_anchors) % 1.0) * length) for j in range(num_anchors)]
            rest = [i for i in range(length) if i not in positions]
            order = dict(zip([*positions, *rest], members, strict=True))
            clips = tuple(order[i] for i in range(length))
            yield [_Draft(clips, position, self._similarities(clips, position)) for position in positions]

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

    def _work(self, drafts: Sequence[_Draft]) -> list[Record]:
        """Asks all that a piece needs; one record per draft: its texts, and why it is dropped if it is."""
        self._ask_questions(sorted({draft.anchor_clip for draft in drafts} - self.questions.keys()))
        asked = [draft for draft in drafts if isinstance(self.questions[draft.anchor_clip], str)]
        self._answer_from_anchors(sorted({draft.anchor_clip for draft in asked} - self.chosen.keys()))
        answered = [draft for draft in asked if isinstance(self.chosen[draft.anchor_clip], str)]
        rejected = self._respond(
            self.answerer,
            [Request(self._question(draft), self._timeline(draft), View.without([draft.anchor])) for draft in answered],
            "rejected answers",
        )
        pairs = dict(zip(answered, rejected, strict=True))
        self._judge_pairs(pairs)
        return [self._record(draft, pairs.get(draft)) for draft in drafts]

    def _record(self, draft: _Draft, rejected: str | _Drop | None) -> Record:
        question, chosen = self.questions[draft.anchor_clip], self.chosen.get(draft.anchor_clip)
        texts = {"question": question, "chosen": chosen, "rejected": rejected}
        record: Record = {name: text for name, text in texts.items() if isinstance(text, str)}
        reason = next((text for text in texts.values() if isinstance(text, _Drop)), None)
        if reason is None and isinstance(chosen, str) and isinstance(rejected, str):
            agreeing = check_pair(chosen, rejected)
            reason = _Drop(agreeing) if agreeing else None
        if reason is not None:
            anchor = self.clips[draft.anchor_clip]
            record["drop"] = asdict(reason)
            record["of"] = {
                **{name: record[name] for name in texts if name in record},
                "anchor": anchor.path,
                "start_seconds": anchor.start_seconds,
            }
            record["at"] = next((name for name, text in texts.items() if isinstance(text, _Drop)), "pair")
        return record

    def _remember(self, draft: _Draft, record: Record) -> None:
        """Learns from a finished piece what a resumed run would otherwise ask again, and perhaps hear otherwise."""
        drop = _Drop(**record["drop"]) if "drop" in record else None
        for known, name in ((self.questions, "question"), (self.chosen, "chosen")):
            if drop is not None and record["at"] == name:
                known.setdefault(draft.anchor_clip, drop)
                return
            if name in record:
                known.setdefault(draft.anchor_clip, record[name])

    def _ask_questions(self, anchors: Sequence[int]) -> None:
        requests = [
            Request(prompts.question_from_clip(self.clips[i].caption), Timeline((self.clips[i],))) for i in anchors
        ]
        for index, question in zip(anchors, self._respond(self.question_writer, requests, "questions"), strict=True):
            self.questions[index] = _checked(question, check_question)
        if self.judge is None:
            return
        kept = [index for index in anchors if isinstance(self.questions[index], str)]
        requests = [
            Request(prompts.is_specific(str(self.questions[i]), self.clips[i].caption), Timeline((self.clips[i],)))
            for i in kept
        ]
        for index, verdict in zip(kept, self._respond(self.judge, requests, "specificity"), strict=True):
            if isinstance(verdict, _Drop):
                self.questions[index] = verdict
            elif prompts.yes_or_no(verdict) is not True:
                self.questions[index] = _Drop("not_specific", f"{self.questions[index]} — judge: {verdict}")

    def _answer_from_anchors(self, anchors: Sequence[int]) -> None:
        requests = [Request(str(self.questions[i]), Timeline((self.clips[i],))) for i in anchors]
        for index, answer in zip(anchors, self._respond(self.answerer, requests, "chosen answers"), strict=True):
            self.chosen[index] = _checked(answer, partial(check_answer, str(self.questions[index])))

    def _judge_pairs(self, pairs: dict[_Draft, str | _Drop]) -> None:
        """Replaces rejected answers that cannot stand by why they cannot."""
        for draft, answer in pairs.items():
            pairs[draft] = _checked(answer, partial(check_answer, self._question(draft)))
        if self.judge is None:
            return
        open_drafts = [
            draft
            for draft, answer in pairs.items()
            if isinstance(answer, str) and check_pair(str(self.chosen[draft.anchor_clip]), answer) is None
        ]
        requests = [
            Request(
                prompts.is_also_right(self._question(draft), str(self.chosen[draft.anchor_clip]), str(pairs[draft])),
                Timeline((self.clips[draft.anchor_clip],)),
            )
            for draft in open_drafts
        ]
        for draft, verdict in zip(open_drafts, self._respond(self.judge, requests, "judging pairs"), strict=True):
            if isinstance(verdict, _Drop):
                pairs[draft] = verdict
            elif prompts.yes_or_no(verdict) is not False:
                pairs[draft] = _Drop("rejected_is_right", f"{pairs[draft]} — judge: {verdict}")

    def _respond(self, responder: Responder, requests: Sequence[Request], what: str) -> list[str | _Drop]:
        """Answers in order; why there is none where the video cannot be decoded or the model is not reached."""
        if not requests:
            return []
        with tqdm(total=len(requests), desc=what, unit="call", leave=False) as bar:
            try:
                answers = _answers(responder, requests)
                bar.update(len(requests))
            except UnreadableVideo:  # one bad clip must not cost its batch: ask one by one
                answers = []
                for request in requests:
                    answers.append(_respond_one(responder, request))
                    bar.update()
        return answers

    def _question(self, draft: _Draft) -> str:
        return str(self.questions[draft.anchor_clip])

    def _timeline(self, draft: _Draft) -> Timeline:
        return Timeline(tuple(self.clips[i] for i in draft.clips))

    def _row(self, draft: _Draft, record: Record) -> VideoPreference:
        verdicts = ("answers_differ",) if self.judge is None else ("specific", "answers_differ", "rejected_is_wrong")
        return VideoPreference(
            timeline=self._timeline(draft),
            question=record["question"],
            chosen=record["chosen"],
            rejected=record["rejected"],
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
                verdicts=verdicts,
                seed=self.settings.seed,
            ),
        )


def _answers(responder: Responder, requests: Sequence[Request]) -> list[str | _Drop]:
    try:
        return list(responder.respond(requests))
    except Unanswered as error:  # what was answered is kept
        return [result if isinstance(result, str) else _Drop(result.reason, str(result)) for result in error.results]


def _respond_one(responder: Responder, request: Request) -> str | _Drop:
    try:
        return _answers(responder, [request])[0]
    except UnreadableVideo as error:
        return _Drop(error.reason, str(error))


def _checked(text: str | _Drop, check: Callable[[str], str | None]) -> str | _Drop:
    """The text, or why it cannot stand."""
    if isinstance(text, _Drop):
        return text
    reason = check(text)
    return _Drop(reason, text) if reason else text


def _dropped(counts: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in counts["dropped"].items()) or "nothing"


def _histogram(places: Sequence[int]) -> str:
    """Shares of the rows by tenth of the timeline, begin to end."""
    total = max(1, sum(places))
    return "by tenth of the timeline: " + ", ".join(f"{100 * place / total:.0f} %" for place in places)


def _unit(vectors: NDArray[np.floating], length: int) -> NDArray[np.floating]:
    if vectors.ndim != 2 or vectors.shape[0] != length:
        raise ValueError(f"embed must give one vector per clip, [{length}, dim], got shape {list(vectors.shape)}.")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise ValueError(f"embed gave {int((norms == 0).sum())} zero vectors; a cosine needs a direction.")
    return vectors / norms
