"""One piece of work: from drafts to answered pairs, each draft either through all steps or dropped at one of them.

Models are asked for a whole piece at a time, so every step takes all drafts that are still there. A draft keeps its
place, whatever becomes of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from longvpo_hf.building.asking import Answer, Asker
from longvpo_hf.building.filters import check_answer, check_pair, check_question
from longvpo_hf.building.judging import Watch
from longvpo_hf.building.method import Answered, Asked, Draft, Drop, Lost, Method, PairFilter, QuestionFilter
from longvpo_hf.building.rows import question_of
from longvpo_hf.responders import CutOff, Request, Responder
from longvpo_hf.timeline import Timeline, View

T = TypeVar("T")
U = TypeVar("U")


def work(
    method: Method,
    drafts: Sequence[Draft],
    known: Mapping[Timeline, Sequence[str]],
    answerer: Responder,
    seed: int,
    ask: Asker,
    watch: Watch,
    root: str,
) -> list[Answered | Lost]:
    """What becomes of the drafts of a piece, in order.

    Args:
        method: How its rows are made.
        drafts: The drafts.
        known: Questions about the drafts' timelines that earlier rows ask, as `question_id`: nobody answers them again.
        answerer: Gives both answers.
        seed: Decides every random choice.
        ask: Asks the models.
        watch: Is told what the method's filters drop.
        root: Folder below which `known` names files.
    """
    steps = _Steps(method, answerer, seed, ask, watch, root)
    asking = _then(drafts, steps.write_questions)
    written = _then(asking, partial(steps.drop_known, known))
    for question_filter in method.question_filters:
        written = _then(written, partial(steps.filter_questions, question_filter))
    asked = _then(written, steps.choose_views)
    answered = _then(_then(asked, steps.answer_well), steps.answer_badly)
    answered = _then(answered, steps.drop_agreeing)
    for pair_filter in method.pair_filters:
        answered = _then(answered, partial(steps.filter_pairs, pair_filter))
    return [
        replace(outcome, question_id=steps.question_id(draft))
        if isinstance(outcome, Lost) and isinstance(draft, Draft)
        else outcome
        for draft, outcome in zip(asking, answered, strict=True)
    ]


def _then(items: Sequence[T | Lost], step: Callable[[list[T]], list[U | Lost]]) -> list[U | Lost]:
    """Takes a step with all that is still there."""
    results = iter(step([item for item in items if not isinstance(item, Lost)]))
    return [item if isinstance(item, Lost) else next(results) for item in items]


@dataclass(frozen=True, slots=True)
class _Steps:
    method: Method
    answerer: Responder
    seed: int
    ask: Asker
    watch: Watch
    root: str

    def write_questions(self, drafts: list[Draft]) -> list[Draft | Lost]:
        """The drafts with their questions, unless these are none."""
        outcomes: list[Draft | Lost] = []
        for draft, written in zip(drafts, self.method.write(drafts, self.ask), strict=True):
            if isinstance(written, Drop):
                outcomes.append(Lost(written))
            elif isinstance(written.question, CutOff):
                outcomes.append(Lost(Drop("cut_off", written.question)))
            elif reason := check_question(written.question):
                outcomes.append(Lost(Drop(reason, written.question)))
            else:
                # The writer decides these, and nothing else of a draft.
                outcomes.append(
                    replace(
                        draft,
                        question=written.question,
                        evidence=written.evidence,
                        question_type=written.question_type,
                        reasoning=written.reasoning,
                    )
                )
        return outcomes

    def drop_known(self, known: Mapping[Timeline, Sequence[str]], drafts: list[Draft]) -> list[Draft | Lost]:
        """Drops questions that an earlier row asks of the same timeline."""
        outcomes: list[Draft | Lost] = []
        for draft in drafts:
            questions = known.get(draft.timeline, ())
            if questions and self.question_id(draft) in questions:
                outcomes.append(Lost(Drop("duplicate_question"), draft.question))
            else:
                outcomes.append(draft)
        return outcomes

    def question_id(self, draft: Draft) -> str:
        """The id that the question has in the draft's row."""
        return question_of(self.method, draft, self.seed, self.root)

    def filter_questions(self, question_filter: QuestionFilter, drafts: list[Draft]) -> list[Draft | Lost]:
        """Applies one of the method's filters of questions."""
        drops = question_filter.check(drafts, self.ask)
        self.watch.count(question_filter, drops)
        return [Lost(drop, draft.question) if drop else draft for draft, drop in zip(drafts, drops, strict=True)]

    def choose_views(self, drafts: list[Draft]) -> list[Asked | Lost]:
        """Decides which views the answers are given from."""
        chosen, rejected = self.method.chosen, self.method.rejected
        return [
            Asked(
                draft,
                chosen(draft, draft.random(self.seed, "chosen")),
                rejected(draft, draft.random(self.seed, "rejected")),
            )
            for draft in drafts
        ]

    def answer_well(self, asked: list[Asked]) -> list[tuple[Asked, str] | Lost]:
        """Asks for the chosen answers. They are remembered, so that a question has the same one in all its rows."""
        answers = self._answers([(one.draft, one.chosen_view) for one in asked], "chosen answers", remember=True)
        return [
            Lost(answer, one.draft.question) if isinstance(answer, Drop) else (one, answer)
            for one, answer in zip(asked, answers, strict=True)
        ]

    def answer_badly(self, halves: list[tuple[Asked, str]]) -> list[Answered | Lost]:
        """Asks for the rejected answers."""
        answers = self._answers([(one.draft, one.rejected_view) for one, _ in halves], "rejected answers")
        return [
            Lost(answer, one.draft.question, chosen) if isinstance(answer, Drop) else Answered(one, chosen, answer)
            for (one, chosen), answer in zip(halves, answers, strict=True)
        ]

    def _answers(self, shown: Sequence[tuple[Draft, View]], what: str, remember: bool = False) -> list[Answer]:
        requests = [Request(draft.question, draft.timeline, view) for draft, view in shown]
        answers = self.ask(self.answerer, requests, what, remember)
        return [_checked(draft.question, answer) for (draft, _), answer in zip(shown, answers, strict=True)]

    def drop_agreeing(self, pairs: list[Answered]) -> list[Answered | Lost]:
        """Drops pairs with nothing to prefer."""
        return [
            _lost(pair, Drop(reason)) if (reason := check_pair(pair.chosen, pair.rejected)) else pair for pair in pairs
        ]

    def filter_pairs(self, pair_filter: PairFilter, pairs: list[Answered]) -> list[Answered | Lost]:
        """Applies one of the method's filters of pairs."""
        drops = pair_filter.check(pairs, self.ask)
        self.watch.count(pair_filter, drops)
        return [_lost(pair, drop) if drop else pair for pair, drop in zip(pairs, drops, strict=True)]


def _lost(pair: Answered, drop: Drop) -> Lost:
    return Lost(drop, pair.draft.question, pair.chosen, pair.rejected)


def _checked(question: str, answer: Answer) -> Answer:
    if isinstance(answer, Drop):
        return answer
    reason = "cut_off" if isinstance(answer, CutOff) else check_answer(question, answer)
    return Drop(reason, answer) if reason else answer
