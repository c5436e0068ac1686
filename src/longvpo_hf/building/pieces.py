"""Pieces of rows: what a round's plan consists of, and the bench that works them, in whatever process it stands.

A build goes round by round. The *plan* of a round follows from settings, videos and the rows of earlier rounds alone,
and is the same on every machine. A *piece* of it is worked by whoever comes first and kept under the digest of all it
follows from. The *join* (`engine.py`) takes the pieces in the plan's order, whoever worked them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longvpo_hf.artifacts import Fields, Journal, Log
from longvpo_hf.building.asking import Asker, Remembered
from longvpo_hf.building.judging import Watch
from longvpo_hf.building.method import Answered, Draft, Drop, Lost, Method
from longvpo_hf.building.rows import question_of
from longvpo_hf.building.work import work
from longvpo_hf.responders import Responder, identity
from longvpo_hf.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Piece:
    """Some timelines of one round of one part.

    Args:
        part: Index of the part.
        round: Index of the part's round.
        number: Which piece of the round this is.
        timelines: The drafts of each, or why a timeline came to nothing.
        known: Questions of the rows of the part's earlier rounds about these timelines, see `rows.question_id`.
    """

    part: int
    round: int
    number: int
    timelines: tuple[list[Draft] | Drop, ...]
    known: Mapping[Timeline, Sequence[str]]

    @property
    def name(self) -> str:
        """How its file's name starts."""
        return f"{self.part}-{self.round:02d}-{self.number:05d}"

    @property
    def drafts(self) -> list[Draft]:
        """The drafts of all its timelines."""
        return [draft for drafts in self.timelines if not isinstance(drafts, Drop) for draft in drafts]


class RowBench:
    """All that working a piece of rows takes: the methods and their models, and where results are kept.

    Args:
        methods: Of the parts, in their order.
        answerer: Gives both answers.
        seed: Decides every random choice.
        folder: Where finished work is kept, by any number of benches in any number of processes.
        follows_from: See `engine.build`.
        root: Folder below which finished work names files, see `paths.below`.
    """

    def __init__(
        self, methods: Sequence[Method], answerer: Responder, seed: int, folder: Path, follows_from: Any, root: str
    ) -> None:
        self.methods = methods
        self.answerer = answerer
        self.seed = seed
        self.root = root
        self.folder = folder
        named = [[method.name, method.prompt_version, method.question_model] for method in methods]
        self._journal = Journal(folder, [named, identity(answerer), seed, follows_from])
        self._remembered = Remembered(folder / f"answers-{self._journal.base}")
        self._watch = Watch()
        #: Questions that pieces of one round asked here, each with its piece's number, by the timeline.
        self._round = (-1, -1)
        self._asked: defaultdict[Timeline, list[tuple[int, str]]] = defaultdict(list)

    def finished(self, piece: Piece) -> list[Fields] | None:
        """What a piece gave, if it is there."""
        return self._journal.finished(piece.name, self._inputs(piece))

    def work(self, piece: Piece) -> list[Fields]:
        """What a piece gives, one record for each draft, now or because it is there already."""
        records = self._journal.piece(piece.name, self._inputs(piece), partial(self._work, piece))
        if self._round != (piece.part, piece.round):
            self._round = (piece.part, piece.round)
            self._asked.clear()
        for outcome in outcomes_of(piece, records):
            if isinstance(outcome, Answered):
                question = question_of(self.methods[piece.part], outcome.draft, self.seed, self.root)
                self._asked[outcome.draft.timeline].append((piece.number, question))
        return records

    def _inputs(self, piece: Piece) -> list[Any]:
        return [[draft.to_fields(self.root), piece.known.get(draft.timeline, [])] for draft in piece.drafts]

    def _work(self, piece: Piece, log: Log) -> list[Fields]:
        ask = Asker(log, self._remembered, self.root)
        method = self.methods[piece.part]
        known = {draft.timeline: self._known(piece, draft.timeline) for draft in piece.drafts}
        outcomes = work(method, piece.drafts, known, self.answerer, self.seed, ask, self._watch, self.root)
        return [outcome.to_fields() for outcome in outcomes]

    def _known(self, piece: Piece, timeline: Timeline) -> list[str]:
        """Questions that need no answers: of earlier rounds, and of the round's earlier pieces as far as they were
        worked here. The join drops all of the latter whether they are answered or not, so that they decide no row."""
        here = self._asked[timeline] if self._round == (piece.part, piece.round) and timeline in self._asked else ()
        return [*piece.known.get(timeline, ()), *(question for number, question in here if number < piece.number)]


def outcomes_of(piece: Piece, records: Sequence[Fields]) -> list[Answered | Lost]:
    """What became of the drafts of a piece."""
    return [
        Lost.from_fields(fields) if "drop" in fields else Answered.from_fields(draft, fields)
        for draft, fields in zip(piece.drafts, records, strict=True)
    ]
