"""The one way rows are made, whatever the method: rounds of drafts, in pieces of work that are kept on disk.

`build` takes methods with their drafts and the model that answers, and writes a dataset folder (`publishing.dataset`).
A killed build goes on where it was when it is called again. docs/methods.md shows how to write a method of your own,
docs/scaling.md how many machines make one dataset.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm.auto import tqdm

from longvpo_hf.artifacts import Fields, locked
from longvpo_hf.building.executors import HERE, Executor, Unfinished, Worked, made_otherwise, named
from longvpo_hf.building.method import Answered, Draft, Drop, Lost, Part
from longvpo_hf.building.pieces import Piece, RowBench, outcomes_of
from longvpo_hf.building.rows import Shares, question_id, row_of
from longvpo_hf.errors import DatasetError
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.funnel import Funnel, in_one_line, log_folder
from longvpo_hf.preference import VideoPreference
from longvpo_hf.publishing.dataset import DatasetWriter, check_media
from longvpo_hf.record import DatasetRecord, MethodRecord, Source
from longvpo_hf.responders import Responder, identity
from longvpo_hf.timeline import Clip, Timeline

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
    root: str = "",
    executor: Executor = HERE,
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
        root: Folder below which finished work names files, so that it is found again when the folder has moved; empty:
            by their whole paths. See `paths.common_folder`.
        executor: Who works the pieces. The rows are the same. A shard writes no dataset.

    Returns:
        The funnel. Every draft is a row or a drop; of a shard, as far as the pieces that are there go.

    Raises:
        DatasetError: If no row came out.
        Unfinished: If pieces are missing that no shard has worked.
    """
    for part in parts:
        funnel.explain(part.method.reasons)
    num_rows = sum(part.num_rows for part in parts)
    bar = tqdm(total=num_rows, desc=f"{name} rows", unit="row")
    with locked(executor.place(output)), bar:
        methods = [part.method for part in parts]
        bench = RowBench(methods, answerer, seed, output.with_name(output.name + ".job"), follows_from, root)
        run = _Build(parts, bench, funnel)
        if not executor.joins:
            with executor.opened(bench) as worked:
                run.make(worked, _look_only(media_root), max_rounds, bar)
            funnel.count("pieces that are there", run.num_joined)
            funnel.count("pieces that others have to work", len(run.absent))
            if otherwise := made_otherwise(run.absent, bench.folder):
                tqdm.write(otherwise)
            return funnel.close()
        with DatasetWriter(output, media_root) as writer:
            with executor.opened(bench) as worked:
                run.make(worked, writer.add, max_rounds, bar)
            if run.absent:
                funnel.close()
                otherwise = made_otherwise(run.absent, bench.folder)
                raise Unfinished(" ".join(filter(None, [_what_is_missing(run.absent), otherwise])))
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


def _look_only(media_root: Path | None) -> Callable[[VideoPreference], None]:
    """Refuses the rows that a `DatasetWriter` would refuse, and writes none."""
    look = cache(partial(check_media, media_root=media_root))

    def add(row: VideoPreference) -> None:
        for clip in row.timeline.clips:
            look(Clip(clip.path, 0.0, 1.0))

    return add


def _what_is_missing(absent: Sequence[Piece]) -> str:
    """Which pieces have to be worked before the dataset can be written."""
    first = absent[0]
    of_round = [piece for piece in absent if (piece.part, piece.round) == (first.part, first.round)]
    if first.round and [piece.number for piece in of_round] == list(range(len(of_round))):
        why = f"Round {first.round + 1} is needed, to make up for drafts that were dropped"
    else:
        why = "Some shards have not worked their pieces"
    return (
        f"{why}; missing: {named(absent)} (piece P-RR-NNNNN is shard NNNNN mod N's, of N shards). Run these shards, or "
        "all of them, and then --merge again."
    )


def _recorded(part: Part) -> MethodRecord:
    return MethodRecord(part.method.name, part.method.prompt_version, part.method.citation)


def _source_of(model: Responder) -> Source:
    _, settings = identity(model)
    return Source.of_model(model.name, str((settings or {}).get("weights", "")))


class _Build:
    """The join: what a build has made so far of the pieces, in the order of the plan, whoever worked them.

    Attributes:
        absent: Pieces that are not there. What follows one of them is not joined.
        num_joined: How many were joined.
        shares: Counts the rows.
    """

    def __init__(self, parts: Sequence[Part], bench: RowBench, funnel: Funnel) -> None:
        self.parts = parts
        self.bench = bench
        self.funnel = funnel
        self.shares = Shares()
        self.absent: list[Piece] = []
        self.num_joined = 0
        self._ids: set[str] = set()
        self._questions: set[str] = set()
        #: Which piece, of those joined, was the first in which a question of a part got answers.
        self._asked_by: dict[tuple[int, str], int] = {}
        #: Questions of the rows of each part's earlier rounds, by the timeline of their drafts; and of this round.
        self._known: defaultdict[tuple[int, Timeline], list[str]] = defaultdict(list)
        self._new: list[tuple[tuple[int, Timeline], str]] = []

    def make(
        self, worked: Worked[Piece], add: Callable[[VideoPreference], None], max_rounds: int, bar: tqdm[Any]
    ) -> None:
        """Makes the rows of all parts, round by round.

        Where pieces are absent, how many rows the next round has to make is not known yet; the first round of the other
        parts is planned, and worked, nevertheless.
        """
        for part_index, part in enumerate(self.parts):
            missing = part.num_rows
            for round_index in range(max_rounds):
                if missing == 0:
                    break
                for row in self._round(part_index, round_index, missing, worked):
                    try:
                        add(row)
                    except UnreadableVideo as error:  # of a clip that neither answer saw
                        self.funnel.drop(error.reason, id=row.id, path=error.path, detail=str(error))
                        continue
                    bar.update()
                    missing -= 1
                if self.absent:
                    break

    def _round(self, part: int, round_index: int, missing: int, worked: Worked[Piece]) -> Iterator[VideoPreference]:
        """At most `missing` rows from the drafts of one round."""
        made = 0
        with closing(worked(self._plan(part, round_index, missing))) as pieces:
            for piece, records in pieces:
                if records is None:
                    self.absent.append(piece)
                if records is None or self.absent:
                    continue
                self.num_joined += 1
                for row in self._joined(piece, records, missing - made):
                    made += 1
                    yield row
                if made == missing:
                    break
        for timeline, question in self._new:
            self._known[timeline].append(question)
        self._new.clear()

    def _plan(self, part: int, round_index: int, missing: int) -> Iterator[Piece]:
        """The pieces of a round, which follow from settings, videos and the rows of earlier rounds."""
        timelines = self.parts[part].drafts(round_index, missing)
        number = 0
        while some := tuple(islice(timelines, _TIMELINES_PER_PIECE)):
            shown = {draft.timeline for drafts in some if not isinstance(drafts, Drop) for draft in drafts}
            known = {timeline: self._known[part, timeline] for timeline in shown if (part, timeline) in self._known}
            yield Piece(part, round_index, number, some, known)
            number += 1

    def _joined(self, piece: Piece, records: Sequence[Fields], missing: int) -> Iterator[VideoPreference]:
        """At most `missing` rows of a piece."""
        self.funnel.count("timelines", sum(bool(drafts) for drafts in piece.timelines if not isinstance(drafts, Drop)))
        for drop in piece.timelines:
            if isinstance(drop, Drop):
                self.funnel.drop(drop.reason, detail=drop.detail)
        drafts = piece.drafts
        self.funnel.count("drafts", len(drafts))
        made = 0
        for draft, outcome in zip(drafts, outcomes_of(piece, records), strict=True):
            if made == missing:
                self.funnel.count("drafts beyond the rows asked for")
            elif (row := self._row(piece.part, draft, outcome)) is not None:
                made += 1
                yield row

    def _row(self, part_index: int, draft: Draft, outcome: Answered | Lost) -> VideoPreference | None:
        """The row that a draft became; None, and a named drop, if it became none."""
        if isinstance(outcome, Lost):
            is_known = self._is_known(part_index, outcome.question_id)
            self._drop(draft, Lost(Drop("duplicate_question"), outcome.question) if is_known else outcome)
            return None
        row = row_of(self.parts[part_index].method, outcome, self.bench.answerer.name, self.bench.seed)
        question = question_id(row.timeline, row.question, self.bench.root)
        self._asked_by.setdefault((part_index, question), self.num_joined)
        if self._is_known(part_index, question):
            self._drop(draft, Lost(Drop("duplicate_question"), row.question))
            return None
        if row.id in self._ids:
            self.funnel.drop("duplicate_row", id=row.id)
            return None
        if question in self._questions:
            self.funnel.drop("duplicate_question", id=row.id, question=row.question)
            return None
        self._ids.add(row.id)
        self._questions.add(question)
        self._new.append(((part_index, draft.timeline), question))
        self.shares.count(outcome)
        return row

    def _is_known(self, part_index: int, question: str) -> bool:
        """Whether an earlier piece asked this and had answers: it is a duplicate then, answered again or not."""
        return self._asked_by.get((part_index, question), self.num_joined) < self.num_joined

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
