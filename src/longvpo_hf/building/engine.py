"""The one way rows are made, whatever the method: rounds of drafts, in pieces of work that are kept on disk.

`build` takes methods with their drafts and the model that answers, and writes a dataset folder (`publishing.dataset`).
A killed build goes on where it was when it is called again. docs/methods.md shows how to write a method of your own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm.auto import tqdm

from longvpo_hf.artifacts import Fields, Journal, Log, locked
from longvpo_hf.building.asking import Answer, Asker, answer_from_json
from longvpo_hf.building.judging import Watch
from longvpo_hf.building.method import Answered, Draft, Lost, Part
from longvpo_hf.building.rows import Shares, question_id, row_of
from longvpo_hf.building.work import work
from longvpo_hf.errors import DatasetError
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.funnel import Funnel, in_one_line, log_folder
from longvpo_hf.preference import VideoPreference
from longvpo_hf.publishing.dataset import DatasetWriter
from longvpo_hf.record import DatasetRecord, MethodRecord, Source
from longvpo_hf.responders import Responder, identity
from longvpo_hf.timeline import Timeline

#: Timelines per piece of work: what a kill can cost, and what is asked for at once.
_TIMELINES_PER_PIECE = 64


def build(
    parts: Sequence[Part],
    answerer: Responder,
    output: Path,
    *,
    name: str,
    title: str,
    seed: int,
    follows_from: Any,
    funnel: Funnel,
    facts: Mapping[str, object],
    remedy: str,
    max_rounds: int = 8,
    media_root: Path | None = None,
    settings: Any = None,
    models: Mapping[str, Responder | None] = MappingProxyType({}),
) -> dict[str, dict[str, int]]:
    """Builds a dataset.

    Finished work is kept in `<output>.job` beside the dataset, the log of drops and the funnel in `<output>.log`.
    Called again with the same arguments, an interrupted build goes on and ends with the same rows.

    Args:
        parts: What the dataset consists of, in this order.
        answerer: Gives both answers: the model that will be trained.
        output: Folder of the dataset; an earlier one there is replaced.
        name: Name of the dataset's kind, a tag of its card.
        title: Heading of the card.
        seed: Decides every random choice.
        follows_from: What else the rows follow from besides drafts, methods' names, prompt versions and models: JSON.
        funnel: Counts; it is closed here.
        facts: Named facts for the card.
        remedy: What to do where fewer rows came than were asked for.
        max_rounds: How often more drafts are drawn to make up for dropped ones before giving up.
        media_root: See `DatasetWriter`: None publishes the media, a folder names them by reference.
        settings: The method's settings, a dataclass, for the record.
        models: Who else was asked, by what they did, for the record; None for who might have been and was not.

    Returns:
        The funnel. Every draft is a row or a drop.

    Raises:
        DatasetError: If no row came out.
    """
    for part in parts:
        funnel.explain(part.method.reasons)
    num_rows = sum(part.num_rows for part in parts)
    bar = tqdm(total=num_rows, desc=f"{name} rows", unit="row")
    with locked(output), bar, DatasetWriter(output, media_root) as writer:
        run = _Build(parts, answerer, output, seed, funnel, follows_from)
        for part_index, part in enumerate(parts):
            missing = part.num_rows
            for round_index in range(max_rounds):
                if missing == 0:
                    break
                for row in run.round(part_index, round_index, missing):
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
            each = f" See {log_folder(output)} for each." if counts["dropped"] else ""
            raise DatasetError(f"No row came out; dropped: {in_one_line(counts)}.{each} {remedy}")
        asked = {**models, "answers": answerer}
        writer.write_record(
            DatasetRecord(
                title,
                methods=tuple(_recorded(part) for part in {part.method.name: part for part in parts}.values()),
                models={what: _source_of(model) for what, model in asked.items() if model is not None},
                settings=asdict(settings) if settings is not None else {},
                facts={**facts, **run.shares.facts()},
                funnel=counts,
                reasons={reason: funnel.reasons[reason] for reason in counts["dropped"]},
                seed=seed,
            )
        )
    if writer.num_rows < num_rows:
        tqdm.write(
            f"{writer.num_rows} of {num_rows} rows after {max_rounds} rounds; dropped: {in_one_line(counts)}. {remedy}"
        )
    return counts


def _recorded(part: Part) -> MethodRecord:
    return MethodRecord(part.method.name, part.method.prompt_version, part.method.citation)


def _source_of(model: Responder) -> Source:
    _, settings = identity(model)
    return Source.of_model(model.name, str((settings or {}).get("weights", "")))


class _Build:
    """One build's models, and what it has made so far."""

    def __init__(
        self,
        parts: Sequence[Part],
        answerer: Responder,
        output: Path,
        seed: int,
        funnel: Funnel,
        follows_from: Any,
    ) -> None:
        methods = [[part.method.name, part.method.prompt_version, part.method.question_model] for part in parts]
        self.parts = parts
        self.answerer = answerer
        self.seed = seed
        self.funnel = funnel
        self.shares = Shares()
        self._remembered: dict[str, Answer] = {}
        self._watch = Watch()
        self._job = Journal(output.with_name(output.name + ".job"), [methods, identity(answerer), seed, follows_from])
        self._ids: set[str] = set()
        self._questions: set[str] = set()
        #: Questions of the rows of each part, by the timeline of their drafts.
        self._known: defaultdict[tuple[int, Timeline], list[str]] = defaultdict(list)

    def round(self, part_index: int, round_index: int, missing: int) -> Iterator[VideoPreference]:
        """At most `missing` rows from the drafts of one round."""
        timelines = self.parts[part_index].drafts(round_index, missing)
        piece_index = made = 0
        while made < missing and (piece := list(islice(timelines, _TIMELINES_PER_PIECE))):
            drafts = [draft for timeline in piece for draft in timeline]
            self.funnel.count("timelines", sum(bool(timeline) for timeline in piece))
            self.funnel.count("drafts", len(drafts))
            outcomes = self._piece(part_index, f"{part_index}-{round_index:02d}-{piece_index:05d}", drafts)
            piece_index += 1
            for draft, outcome in zip(drafts, outcomes, strict=True):
                if made == missing:
                    self.funnel.count("drafts beyond the rows asked for")
                elif (row := self._row(part_index, draft, outcome)) is not None:
                    made += 1
                    yield row

    def _piece(self, part_index: int, name: str, drafts: Sequence[Draft]) -> list[Answered | Lost]:
        """What becomes of the drafts of a piece, asked now or by an earlier run."""
        known = {draft.timeline: self._known.get((part_index, draft.timeline), []) for draft in drafts}
        inputs = [[draft.to_fields(), known[draft.timeline]] for draft in drafts]
        remembered, *records = self._job.piece(name, inputs, partial(self._work, part_index, drafts, known))
        for key, answer in remembered.items():
            self._remembered.setdefault(key, answer_from_json(answer))
        return [
            Lost.from_fields(fields) if "drop" in fields else Answered.from_fields(draft, fields)
            for draft, fields in zip(drafts, records, strict=True)
        ]

    def _work(
        self, part_index: int, drafts: Sequence[Draft], known: Mapping[Timeline, Sequence[str]], log: Log
    ) -> list[Fields]:
        ask = Asker(log, self._remembered)
        outcomes = work(self.parts[part_index].method, drafts, known, self.answerer, self.seed, ask, self._watch)
        return [ask.remembered, *(outcome.to_fields() for outcome in outcomes)]

    def _row(self, part_index: int, draft: Draft, outcome: Answered | Lost) -> VideoPreference | None:
        """The row that a draft became; None, and a named drop, if it became none."""
        if isinstance(outcome, Lost):
            self._drop(draft, outcome)
            return None
        row = row_of(self.parts[part_index].method, outcome, self.answerer.name, self.seed)
        question = question_id(row.timeline, row.question)
        if row.id in self._ids:
            self.funnel.drop("duplicate_row", id=row.id)
            return None
        if question in self._questions:
            self.funnel.drop("duplicate_question", id=row.id, question=row.question)
            return None
        self._ids.add(row.id)
        self._questions.add(question)
        self._known[part_index, draft.timeline].append(question)
        self.shares.count(outcome)
        return row

    def _drop(self, draft: Draft, lost: Lost) -> None:
        clip = draft.timeline.clips[draft.evidence[0] if draft.evidence else 0]
        texts = {"question": lost.question, "chosen": lost.chosen, "rejected": lost.rejected}
        self.funnel.drop(
            lost.drop.reason,
            detail=lost.drop.detail,
            **{name: text for name, text in texts.items() if text},
            path=clip.path,
            start_seconds=clip.start_seconds,
            source_id=clip.source_id,
        )
