"""One description of every method, and the one way rows are made of it.

A `Method` says how a question is written, which views of the timeline the chosen and the rejected answer come from,
which view the policy is trained on and which the reference is scored on, and what is filtered. `build` takes methods
with their drafts (timelines that may become rows) and the model that answers; gives a dataset folder (`hub.py`). A
killed build goes on where it was when it is called again. A new method is a `Method` of its own: nothing here changes
(docs/methods.md has one). Knows nothing of training, nor where timelines come from.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from longvpo_hf.artifacts import Fields, Journal
from longvpo_hf.building.filters import check_answer, check_pair, check_question, normalise
from longvpo_hf.errors import DatasetError
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.funnel import Funnel
from longvpo_hf.preference import Provenance, VideoPreference
from longvpo_hf.responders import CutOff, Request, Responder, Result, Unanswered, Unreached, identity
from longvpo_hf.responders.replies import whole_characters, without_reasoning
from longvpo_hf.timeline import Timeline, View

if TYPE_CHECKING:
    import numpy as np

#: Timelines per piece of work: what a kill can cost, and what is asked for at once.
_TIMELINES_PER_PIECE = 64


@dataclass(frozen=True, slots=True)
class Draft:
    """A row on its way.

    Args:
        timeline: What the question is about.
        evidence: Clips that hold the answer; empty until the question writer says so, or where no clip stands out.
        number: Which draft of its timeline this is.
        question: Empty until it is written.
        question_type: Kind of question, where the method has kinds.
        reasoning: Why the evidence answers the question, in the question writer's words.
        similarities: See `Provenance.similarities`.
    """

    timeline: Timeline
    evidence: tuple[int, ...] = ()
    number: int = 0
    question: str = ""
    question_type: str = ""
    reasoning: str = ""
    similarities: tuple[float, ...] = ()

    def random(self, seed: int, purpose: str) -> np.random.Generator:
        """Randomness that follows from the draft alone, whatever came before it and wherever its files lie."""
        import numpy as np

        spans = [[PurePath(path).name, *span] for path, *span in _identity(self.timeline)]
        content = [seed, purpose, *spans, self.number, self.evidence, self.question]
        digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True, slots=True)
class Drop:
    """Why something is dropped (one of `filters.REASONS`), and what a person may want to know of it."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """A draft with both its answers."""

    draft: Draft
    chosen: str
    rejected: str


class Asker:
    """Asks models in batches: one answer or `Drop` per request, in order; no bad video costs its batch.

    What is asked with `remember` is asked once in a build, also in one that was killed and goes on.
    """

    def __init__(self) -> None:
        self._known: dict[str, str | Drop] = {}
        self._new: dict[str, str | Drop] = {}

    def __call__(
        self, responder: Responder, requests: Sequence[Request], what: str, remember: bool = False
    ) -> list[str | Drop]:
        """The answers.

        Args:
            responder: Who is asked.
            requests: What is asked.
            what: Name of the progress bar.
            remember: Whether the same request gets the same answer from now on.
        """
        if not remember:
            return _respond(responder, requests, what)
        keys = [_key(responder, request) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        answers = dict(zip(new, _respond(responder, list(new.values()), what), strict=True))
        self._known.update(answers)
        self._new.update(answers)
        return [self._known[key] for key in keys]

    def take_new(self) -> Fields:
        """What was remembered since the last call, for the disk."""
        new, self._new = self._new, {}
        return {
            key: asdict(answer) if isinstance(answer, Drop) else [answer, isinstance(answer, CutOff)]
            for key, answer in new.items()
        }

    def learn(self, stored: Fields) -> None:
        """Remembers what `take_new` gave, in this run or in one that was killed."""
        for key, answer in stored.items():
            if isinstance(answer, list):
                text, is_cut_off = answer
                self._known.setdefault(key, CutOff(text) if is_cut_off else text)
            else:
                self._known.setdefault(key, Drop(**answer))


#: A view of the draft's timeline; the randomness follows from the draft.
ViewOf: TypeAlias = "Callable[[Draft, np.random.Generator], View]"
#: Writes the questions of a batch of drafts: each comes back with its question (and evidence, type and reasoning, as
#: far as the writer decides them), or is dropped.
QuestionWriter: TypeAlias = Callable[[Sequence[Draft], Asker], Sequence[Draft | Drop]]
#: Gives drafts, a list for each timeline (an empty one where a timeline came to nothing), for a round (0, 1, …) that
#: is to make so many more rows. It is called once for each round, in order, and what it gives then is always the same.
DraftSource: TypeAlias = Callable[[int, int], Iterator[list[Draft]]]


def whole(draft: Draft, rng: np.random.Generator) -> View:
    """All of the timeline."""
    return View.whole()


def evidence(draft: Draft, rng: np.random.Generator) -> View:
    """The evidence alone."""
    return View.only(draft.evidence)


def without_evidence(draft: Draft, rng: np.random.Generator) -> View:
    """All but the evidence."""
    return View.without(draft.evidence)


@dataclass(frozen=True, slots=True)
class QuestionFilter:
    """Drops drafts by their questions.

    Args:
        verdict: What stands in a row that it let through.
        check: Gives a `Drop` for each draft that cannot stand, None for the others.
    """

    verdict: str
    check: Callable[[Sequence[Draft], Asker], Sequence[Drop | None]]


@dataclass(frozen=True, slots=True)
class PairFilter:
    """Drops drafts by their questions and both answers; see `QuestionFilter`."""

    verdict: str
    check: Callable[[Sequence[Pair], Asker], Sequence[Drop | None]]


@dataclass(frozen=True, slots=True)
class Method:
    """How rows of one kind are made.

    Every method also drops what is no question or no answer, and pairs whose answers agree.

    Args:
        name: Stands in every row, e.g. `longvpo-stage1`.
        prompt_version: Version of the prompt texts it uses.
        question_model: Name of who writes the questions.
        write: Writes them.
        chosen: View the chosen answer is given from.
        rejected: View the rejected answer is given from.
        policy: Clips the policy is trained on: the row's timeline, which must show all evidence. The views in a row's
            provenance go on counting the draft's clips.
        reference: Clips the reference model is scored on: some of the policy's, or all of them.
        question_filters: Applied before answers are asked for.
        pair_filters: Applied to pairs that differ.
    """

    name: str
    prompt_version: str
    question_model: str
    write: QuestionWriter
    chosen: ViewOf
    rejected: ViewOf
    policy: ViewOf = whole
    reference: ViewOf = whole
    question_filters: tuple[QuestionFilter, ...] = ()
    pair_filters: tuple[PairFilter, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """So many rows of one method, made of these drafts."""

    method: Method
    drafts: DraftSource
    num_rows: int


def build(
    parts: Sequence[Part],
    answerer: Responder,
    output: Path,
    *,
    name: str,
    title: str,
    seed: int,
    max_rounds: int,
    follows_from: Any,
    funnel: Funnel,
    facts: Mapping[str, object],
    remedy: str,
    media_root: Path | None = None,
) -> dict[str, dict[str, int]]:
    """Builds a dataset.

    Finished work lies in `<output>.job` beside the dataset, the log of drops and the funnel in `<output>.log`. Called
    again with the same arguments, an interrupted build goes on and ends with the same rows.

    Args:
        parts: What the dataset consists of, in this order.
        answerer: Gives both answers: the model that will be trained.
        output: Folder of the dataset; an earlier one there is replaced.
        name: Name of the dataset's method on the card; decides the citation.
        title: Heading of the card.
        seed: Decides every random choice.
        max_rounds: How often more drafts are drawn to make up for dropped ones before giving up.
        follows_from: What else the rows follow from besides drafts, methods' names, prompt versions and models: JSON.
        funnel: Counts; it is closed here.
        facts: Named facts for the card.
        remedy: What to do where fewer rows came than were asked for.
        media_root: See `hub.DatasetWriter`: None publishes the media, a folder names them by reference.

    Returns:
        The funnel. Every draft is a row or a drop.

    Raises:
        ValueError: If no row came out.
    """
    from tqdm.auto import tqdm

    from longvpo_hf.publishing.dataset import DatasetWriter, dataset_card

    num_rows = sum(part.num_rows for part in parts)
    versions = [[part.method.name, part.method.prompt_version, part.method.question_model] for part in parts]
    job = Journal(output.with_name(output.name + ".job"), [versions, identity(answerer), seed, follows_from])
    run = _Build(answerer, seed, funnel, job)
    with DatasetWriter(output, media_root) as writer, tqdm(total=num_rows, desc=f"{name} rows", unit="row") as bar:
        for part_index, part in enumerate(parts):
            missing = part.num_rows
            for round_index in range(max_rounds):
                if missing == 0:
                    break
                for row in run.round(part_index, round_index, part, missing):
                    try:
                        writer.add(row)
                    except UnreadableVideo as error:  # of a clip that neither answer saw
                        funnel.drop(error.reason, id=row.id, path=error.path, detail=str(error))
                        continue
                    bar.update()
                    missing -= 1
        funnel.count("rows", writer.num_rows)
        counts = funnel.close()
        if writer.num_rows == 0:
            raise DatasetError(f"No row came out; dropped: {dropped(counts)}. See {log_folder(output)} for each.")
        writer.write_card(dataset_card(title, name, writer.num_rows, counts, {**facts, **run.facts()}))
    if writer.num_rows < num_rows:
        tqdm.write(
            f"{writer.num_rows} of {num_rows} rows after {max_rounds} rounds; dropped: {dropped(counts)}. {remedy}"
        )
    return counts


def log_folder(output: Path) -> Path:
    """Where a build writes its drops and its funnel: beside the dataset, which holds nothing but itself."""
    return output.with_name(output.name + ".log")


def what_rows_follow_from(settings: Any) -> dict[str, Any]:
    """A builder's settings, but for how many rows are asked for: more of them keep what is there."""
    return {name: value for name, value in asdict(settings).items() if name not in ("num_rows", "max_rounds")}


def dropped(counts: Mapping[str, Mapping[str, int]]) -> str:
    """A funnel's drops in one line."""
    return ", ".join(f"{reason} {number}" for reason, number in counts["dropped"].items()) or "nothing"


class _Build:
    """One build's models, and what it has made so far."""

    def __init__(self, answerer: Responder, seed: int, funnel: Funnel, job: Journal) -> None:
        self.answerer = answerer
        self.seed = seed
        self.funnel = funnel
        self.job = job
        self.ask = Asker()
        self.ids: set[str] = set()
        self.questions: set[str] = set()
        #: Of the rows of each part, by the timeline of their drafts.
        self._asked: defaultdict[tuple[int, Timeline], list[str]] = defaultdict(list)
        self._places = [0] * 10  # of evidence in the rows, by tenth of the timeline
        self._rejected_from: Counter[str] = Counter()
        self._types: Counter[str] = Counter()

    def round(self, part_index: int, round_index: int, part: Part, missing: int) -> Iterator[VideoPreference]:
        """At most `missing` rows from the drafts of one round."""
        timelines = part.drafts(round_index, missing)
        piece_index = made = 0
        while made < missing and (piece := list(islice(timelines, _TIMELINES_PER_PIECE))):
            drafts = [draft for timeline in piece for draft in timeline]
            self.funnel.count("timelines", sum(bool(timeline) for timeline in piece))
            self.funnel.count("drafts", len(drafts))
            known = [list(self._asked.get((part_index, draft.timeline), ())) for draft in drafts]
            inputs = [
                [
                    _identity(draft.timeline), [clip.caption for clip in draft.timeline.clips], draft.evidence,
                    draft.number, draft.question, draft.question_type, draft.reasoning, draft.similarities, questions,
                ]
                for draft, questions in zip(drafts, known, strict=True)
            ]  # fmt: skip
            name = f"{part_index}-{round_index:02d}-{piece_index:05d}"
            asked, *records = self.job.piece(name, inputs, partial(self._work, part.method, drafts, known))
            self.ask.learn(asked)
            piece_index += 1
            for draft, record in zip(drafts, records, strict=True):
                if made == missing:
                    self.funnel.count("drafts beyond the rows asked for")
                elif "drop" in record:
                    self.funnel.drop(**record["drop"], **record["of"])
                elif (row := self._row(part.method, draft, record)).id in self.ids:
                    self.funnel.drop("duplicate_row", id=row.id)
                elif (question := _question_id(row.timeline, row.question)) in self.questions:
                    self.funnel.drop("duplicate_question", id=row.id, question=row.question)
                else:
                    self.ids.add(row.id)
                    self.questions.add(question)
                    self._asked[part_index, draft.timeline].append(question)
                    self._count(draft, record)
                    made += 1
                    yield row

    def facts(self) -> dict[str, object]:
        """What the card shall say of the rows."""
        total = sum(self._places)
        facts: dict[str, object] = {}
        if total:
            shares = ", ".join(f"{100 * place / total:.0f} %" for place in self._places)
            facts["evidence positions"] = f"by tenth of the timeline: {shares}"
        for name, counter in (("rejected answers from", self._rejected_from), ("question types", self._types)):
            number = sum(counter.values())
            if number:
                facts[name] = ", ".join(f"{kind} {100 * n / number:.0f} %" for kind, n in counter.most_common())
        return facts

    def _work(self, method: Method, drafts: Sequence[Draft], known: Sequence[Sequence[str]]) -> list[Fields]:
        """Asks all that a piece needs: what is to be remembered, and one record per draft.

        `known` are the questions of earlier rows about each draft's timeline: nobody answers them again.
        """
        outcomes: list[Draft | Pair | Drop] = list(method.write(drafts, self.ask))
        texts: list[Fields] = [{"question": o.question} if isinstance(o, Draft) else {} for o in outcomes]
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, Draft) and (reason := check_question(outcome.question)):
                outcomes[i] = Drop(reason, outcome.question)
                texts[i] = {}
            elif isinstance(outcome, Draft) and self._is_known(method, drafts[i], outcome, known[i]):
                outcomes[i] = Drop("duplicate_question")
        for question_filter in method.question_filters:
            open_drafts = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, Draft)}
            verdicts = question_filter.check(list(open_drafts.values()), self.ask)
            for i, verdict in zip(open_drafts, verdicts, strict=True):
                outcomes[i] = verdict or outcomes[i]
        views: dict[int, tuple[View, View]] = {}
        for role, remember in (("chosen", True), ("rejected", False)):
            open_drafts = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, Draft)}
            if role == "chosen":
                views = {
                    i: (
                        method.chosen(draft, draft.random(self.seed, "chosen")),
                        method.rejected(draft, draft.random(self.seed, "rejected")),
                    )
                    for i, draft in open_drafts.items()
                }
            requests = [
                Request(draft.question, draft.timeline, views[i][role == "rejected"])
                for i, draft in open_drafts.items()
            ]
            answers = self.ask(self.answerer, requests, f"{role} answers", remember)
            for (i, draft), answer in zip(open_drafts.items(), answers, strict=True):
                checked = answer if isinstance(answer, Drop) else _checked(answer, draft.question)
                if isinstance(checked, Drop):
                    outcomes[i] = checked
                else:
                    texts[i][role] = checked
        self._pairs(method, outcomes, texts)
        records = [
            self._record(draft, outcome, text, views.get(i))
            for i, (draft, outcome, text) in enumerate(zip(drafts, outcomes, texts, strict=True))
        ]
        return [self.ask.take_new(), *records]

    def _pairs(self, method: Method, outcomes: list[Draft | Pair | Drop], texts: Sequence[Fields]) -> None:
        """Makes pairs of drafts with both answers, and drops those that cannot stand."""
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, Draft):
                pair = Pair(outcome, texts[i]["chosen"], texts[i]["rejected"])
                agreeing = check_pair(pair.chosen, pair.rejected)
                outcomes[i] = Drop(agreeing) if agreeing else pair
        for pair_filter in method.pair_filters:
            pairs = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, Pair)}
            for i, verdict in zip(pairs, pair_filter.check(list(pairs.values()), self.ask), strict=True):
                outcomes[i] = verdict or outcomes[i]

    def _record(
        self, draft: Draft, outcome: Draft | Pair | Drop, text: Fields, views: tuple[View, View] | None
    ) -> Fields:
        if isinstance(outcome, Pair):
            written = outcome.draft
            assert views is not None
            return {
                **text,
                "evidence": written.evidence,
                "question_type": written.question_type,
                "reasoning": written.reasoning,
                "views": [str(view) for view in views],
                "kind": degradation(views[1], written),
            }
        assert isinstance(outcome, Drop)
        shown = [draft.timeline.clips[i] for i in draft.evidence] or draft.timeline.clips[:1]
        of = {**text, "path": shown[0].path, "start_seconds": shown[0].start_seconds, "source_id": shown[0].source_id}
        return {"drop": asdict(outcome), "of": of}

    def _is_known(self, method: Method, draft: Draft, written: Draft, questions: Sequence[str]) -> bool:
        if not questions:
            return False
        written = replace(written, timeline=draft.timeline, number=draft.number)
        policy = method.policy(written, written.random(self.seed, "policy"))
        return _question_id(policy.of(draft.timeline), written.question) in questions

    def _row(self, method: Method, draft: Draft, record: Fields) -> VideoPreference:
        written = replace(
            draft,
            question=record["question"],
            evidence=tuple(record["evidence"]),
            question_type=record["question_type"],
            reasoning=record["reasoning"],
        )
        policy = method.policy(written, written.random(self.seed, "policy"))
        scored = method.reference(written, written.random(self.seed, "reference"))
        place = {index: position for position, index in enumerate(policy.indices(len(draft.timeline)))}
        reference = () if scored == View.whole() else scored.indices(len(draft.timeline))
        for whose, view, needed in (("policy", policy, written.evidence), ("reference", scored, reference)):
            hidden = [index for index in needed if index not in place]
            if hidden:
                what = "all evidence" if whose == "policy" else "all that the reference is scored on"
                raise DatasetError(f"{method.name}: the policy's view must show {what}; it lacks clips {hidden}.")
            if view.num_frames is not None:
                raise DatasetError(
                    f"{method.name}: the {whose}'s view is {view}, but a row holds clips, not frames: choose clips "
                    "here, and frames in the training's settings."
                )
        return VideoPreference(
            timeline=Timeline(tuple(draft.timeline.clips[index] for index in place)),
            question=record["question"],
            chosen=record["chosen"],
            rejected=record["rejected"],
            evidence=tuple(place[index] for index in written.evidence),
            reference=tuple(place[index] for index in reference),
            provenance=Provenance(
                method=method.name,
                chosen_view=record["views"][0],
                rejected_view=record["views"][1],
                question_model=method.question_model,
                answer_model=self.answerer.name,
                prompt_version=method.prompt_version,
                question_type=record["question_type"],
                reasoning=record["reasoning"],
                similarities=draft.similarities,
                verdicts=(
                    *(question_filter.verdict for question_filter in method.question_filters),
                    "answers_differ",
                    *(pair_filter.verdict for pair_filter in method.pair_filters),
                ),
                seed=self.seed,
            ),
        )

    def _count(self, draft: Draft, record: Fields) -> None:
        for index in record["evidence"]:
            self._places[min(9, int(10 * draft.timeline.centre(index)))] += 1
        self._rejected_from[record["kind"]] += 1
        if record["question_type"]:
            self._types[record["question_type"]] += 1


def degradation(view: View, draft: Draft) -> str:
    """What a view lacks, in words: stands on the card, and follows from a row's evidence and `rejected_view`."""
    seen = view.indices(len(draft.timeline))
    if list(seen) != sorted(seen):
        return "other order"
    found = set(seen) & set(draft.evidence)
    if draft.evidence and not found:
        return "no evidence"
    if len(found) < len(draft.evidence):
        return "part of the evidence"
    return "all evidence" if view.num_frames is None else "sparse frames"


def _question_id(timeline: Timeline, question: str) -> str:
    content = [_identity(timeline), normalise(question)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:32]


def _identity(timeline: Timeline) -> list[Any]:
    return [[clip.path, clip.start_seconds, clip.end_seconds] for clip in timeline.clips]


def _key(responder: Responder, request: Request) -> str:
    """The same for requests that show a model the same and ask the same."""
    shown = None if request.timeline is None else _identity(request.view.of(request.timeline))
    schema = None if request.schema is None else dict(request.schema)
    content = [responder.name, request.text, shown, request.view.num_frames, schema]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:20]


def _checked(answer: str, question: str) -> str | Drop:
    reason = check_answer(question, answer) or ("cut_off" if isinstance(answer, CutOff) else None)
    return Drop(reason, answer) if reason else answer


def _respond(responder: Responder, requests: Sequence[Request], what: str) -> list[str | Drop]:
    """Answers in order; why there is none where the video cannot be decoded or the model is not reached."""
    if not requests:
        return []
    from tqdm.auto import tqdm

    with tqdm(total=len(requests), desc=what, unit="call", leave=False) as bar:

        def received(index: int, result: Result) -> None:
            bar.set_postfix_str("", refresh=False)
            bar.update()

        try:
            results: Sequence[Result | Unreached] = responder.respond(requests, received, bar.set_postfix_str)
        except Unanswered as error:  # what was answered is kept
            results = error.results
    return [_said(result) if isinstance(result, str) else Drop(result.reason, str(result)) for result in results]


def _said(reply: str) -> str:
    """The answer in a reply, as files can hold it."""
    answer = whole_characters(without_reasoning(reply))
    return CutOff(answer) if isinstance(reply, CutOff) else answer
