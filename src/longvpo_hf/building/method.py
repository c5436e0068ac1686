"""What a method is, and the types its work passes through: `Draft` → `Asked` → `Answered` → row.

A `Method` says how a question is written, which views of the timeline the chosen and the rejected answer come from,
which view the policy is trained on and which the reference is scored on, and what is filtered. `engine.build` makes
rows of it. Importing this module, and so a method's file, is light: the command line reads its settings for `--help`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from longvpo_hf.artifacts import Fields
from longvpo_hf.paths import below
from longvpo_hf.timeline import Timeline, View

if TYPE_CHECKING:
    import numpy as np

    from longvpo_hf.building.asking import Asker


@dataclass(frozen=True, slots=True)
class Drop:
    """Why something is dropped, and what a person may want to know of it.

    Args:
        reason: One of `funnel.REASONS` or of the method's own `reasons`.
        detail: What was seen, for a person.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A timeline that may become a row.

    Args:
        timeline: What the question is about.
        evidence: Clips that hold the answer; empty until the question writer names them, or where no clip stands out.
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
        """Randomness that follows from the draft alone, whatever came before it and wherever its files are."""
        import numpy as np

        spans = [[PurePath(path).name, *span] for path, *span in spans_of(self.timeline)]
        content = [seed, purpose, *spans, self.number, self.evidence, self.question]
        digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))

    def to_fields(self, root: str) -> Fields:
        """All that the draft consists of, as JSON, its files named below a folder."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "timeline"}
        return {
            "clips": spans_of(self.timeline, root),
            "captions": [clip.caption for clip in self.timeline.clips],
            **fields,
        }


@dataclass(frozen=True, slots=True)
class Asked:
    """A draft whose question is written, and the views that its answers are given from."""

    draft: Draft
    chosen_view: View
    rejected_view: View


@dataclass(frozen=True, slots=True)
class Answered:
    """A draft with both answers.

    Args:
        asked: The draft and its views.
        chosen: The answer from the chosen view.
        rejected: The answer from the rejected view.
    """

    asked: Asked
    chosen: str
    rejected: str

    @property
    def draft(self) -> Draft:
        """The draft that was asked about."""
        return self.asked.draft

    def to_fields(self) -> Fields:
        """What a piece of work stores of it: all but what the draft had before its question was written."""
        draft = self.draft
        return {
            "question": draft.question,
            "evidence": draft.evidence,
            "question_type": draft.question_type,
            "reasoning": draft.reasoning,
            "chosen_view": asdict(self.asked.chosen_view),
            "rejected_view": asdict(self.asked.rejected_view),
            "chosen": self.chosen,
            "rejected": self.rejected,
        }

    @classmethod
    def from_fields(cls, draft: Draft, fields: Fields) -> Answered:
        """The inverse of `to_fields`, given the draft before its question was written."""
        written = replace(
            draft,
            question=fields["question"],
            evidence=tuple(fields["evidence"]),
            question_type=fields["question_type"],
            reasoning=fields["reasoning"],
        )
        asked = Asked(written, _view(fields["chosen_view"]), _view(fields["rejected_view"]))
        return cls(asked, fields["chosen"], fields["rejected"])


@dataclass(frozen=True, slots=True)
class Lost:
    """A draft that was dropped, and how far it had come.

    Args:
        drop: Why.
        question: Its question, if that passed its checks.
        chosen: Its chosen answer, if that passed its checks.
        rejected: Its rejected answer, if that passed its checks.
        question_id: See `rows.question_id`; empty where it came to no question.
    """

    drop: Drop
    question: str = ""
    chosen: str = ""
    rejected: str = ""
    question_id: str = ""

    def to_fields(self) -> Fields:
        """What a piece of work stores of it."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> Lost:
        """The inverse of `to_fields`."""
        return cls(**{**fields, "drop": Drop(**fields["drop"])})


def spans_of(timeline: Timeline, root: str = "") -> list[list[Any]]:
    """Path (below the folder `root`, if one is given), start and end of each clip, as JSON."""
    return [[below(root, clip.path), clip.start_seconds, clip.end_seconds] for clip in timeline.clips]


def _view(fields: Mapping[str, Any]) -> View:
    keep = fields["keep"]
    return View(None if keep is None else tuple(keep), tuple(fields["drop"]), fields["num_frames"])


#: A view of the draft's timeline; the randomness follows from the draft.
ViewOf: TypeAlias = "Callable[[Draft, np.random.Generator], View]"
#: Writes the questions of a batch of drafts: each comes back with its question (and evidence, type and reasoning, as
#: far as the writer decides them), or is dropped.
QuestionWriter: TypeAlias = "Callable[[Sequence[Draft], Asker], Sequence[Draft | Drop]]"
#: Gives drafts, a list for each timeline (an empty one, or a `Drop`, where a timeline came to nothing), for a round
#: (0, 1, …) that is to make so many more rows. It is called once for each round, in order, and what it gives then is
#: always the same, on every machine, whoever works the drafts.
DraftSource: TypeAlias = Callable[[int, int], Iterator[list[Draft] | Drop]]


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
        verdict: Stands in the rows that it let through.
        check: Gives a `Drop` for each draft to drop, None for the others.
        judge: Name of the model that it asks, if it asks one.
    """

    verdict: str
    check: Callable[[Sequence[Draft], Asker], Sequence[Drop | None]]
    judge: str = ""


@dataclass(frozen=True, slots=True)
class PairFilter:
    """Drops drafts by their questions and both answers; see `QuestionFilter`."""

    verdict: str
    check: Callable[[Sequence[Answered], Asker], Sequence[Drop | None]]
    judge: str = ""


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
        reasons: Names of the method's own drops, each with its meaning; see `funnel.REASONS` for those of all methods.
        citation: BibTeX of the paper it is from, for the dataset's card.
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
    reasons: Mapping[str, str] = field(default_factory=dict)
    citation: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """So many rows of one method, made of these drafts."""

    method: Method
    drafts: DraftSource
    num_rows: int


def what_rows_follow_from(settings: Any) -> dict[str, Any]:
    """A method's settings, but for how many rows are asked for: a build of more rows keeps what is there."""
    return {name: value for name, value in asdict(settings).items() if name not in ("num_rows", "max_rounds")}
