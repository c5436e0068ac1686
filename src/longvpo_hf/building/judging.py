"""How a judge is asked yes or no, and how its verdict is read: by its words, or by how probable its yes is.

A small model may say "No" to everything and yet find a yes more probable where it is right, see `ByProbability`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longvpo_hf.building.asking import Answer
from longvpo_hf.building.method import Drop, PairFilter, QuestionFilter
from longvpo_hf.errors import ConfigError
from longvpo_hf.reasoning import CutOff
from longvpo_hf.responders import OnResult, OnWait, Request, Responder, Result, Unanswered, identity
from longvpo_hf.responders.replies import yes_or_no

#: A filter is reported once it has judged so many drafts and dropped at least this share of them.
_ENOUGH, _NEARLY_ALL = 32, 0.95

#: How every prompt for a verdict of yes or no ends.
YES_OR_NO = "Answer Yes or No."


@dataclass(frozen=True, slots=True)
class ByProbability:
    """A judge that is read by the probability of its yes against its no, for verdicts of yes or no.

    Args:
        judge: Who is asked. It must give probabilities: a model of this process, or an endpoint with `top_logprobs`.
        yes_from: A verdict is yes from this probability on, in (0, 1). What is dropped is logged with its probability:
            to see what separates good from bad, look there.
    """

    judge: Responder
    yes_from: float

    def __post_init__(self) -> None:
        if not 0 < self.yes_from < 1:
            raise ConfigError(f"judge_yes_from must be in (0, 1), got {self.yes_from}; 0.5 takes the likelier word.")

    @property
    def name(self) -> str:
        """See `Responder.name`."""
        return self.judge.name

    @property
    def settings(self) -> Any:
        """See `identity`."""
        _, settings = identity(self.judge)
        return {**(settings or {}), "yes_from": self.yes_from}

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """See `Responder.respond`; answers are e.g. `Yes (0.8312)`."""

        def received(index: int, result: Result) -> None:
            if on_result is not None:
                on_result(index, self._read(result))

        asked = [replace(request, is_verdict=request.text.endswith(YES_OR_NO)) for request in requests]
        try:
            return [self._verdict(text) for text in self.judge.respond(asked, received, on_wait)]
        except Unanswered as error:
            raise Unanswered([self._read(result) for result in error.results]) from error

    def _read(self, result: Any) -> Any:
        return self._verdict(result) if isinstance(result, str) else result

    def _verdict(self, text: str) -> str:
        try:
            probability = float(text)
        except ValueError:  # a rehearsal's word; neither word among the likely ones
            return text
        return f"{'Yes' if probability >= self.yes_from else 'No'} ({text})"


def described(judge: Responder | None, nobody: str = "none") -> str:
    """Who judged and how it was read, for a dataset's card."""
    if isinstance(judge, ByProbability):
        return f"{judge.name}, yes from a probability of {judge.yes_from:g} on"
    return judge.name if judge else nobody


def unless(wanted: bool, verdict: Answer, reason: str, judged: str) -> Drop | None:
    """A drop, unless the verdict is the wanted one.

    Args:
        wanted: The verdict that keeps what was judged.
        verdict: What the judge answered, or why it did not.
        reason: Reason for the drop where it answered the opposite.
        judged: What was judged, for a person.
    """
    if isinstance(verdict, Drop):
        return verdict
    answer = yes_or_no(verdict)
    if answer is wanted:
        return None
    if answer is None:
        reason = "cut_off" if isinstance(verdict, CutOff) else "malformed_verdict"
    return Drop(reason, f"{judged} — judge: {verdict}")


class Watch:
    """Notices a filter that drops nearly everything, and reports it once: small judges say the same of everything."""

    def __init__(self) -> None:
        self._judged: Counter[str] = Counter()
        self._dropped: dict[str, Counter[str]] = {}
        self._reported: set[str] = set()

    def count(self, by: QuestionFilter | PairFilter, drops: Sequence[Drop | None]) -> None:
        """Counts what a filter made of some drafts."""
        name = by.verdict
        self._judged[name] += len(drops)
        dropped = self._dropped.setdefault(name, Counter())
        dropped.update(drop.reason for drop in drops if drop)
        judged = self._judged[name]
        if name in self._reported or judged < _ENOUGH or dropped.total() < _NEARLY_ALL * judged:
            return
        from tqdm.auto import tqdm

        self._reported.add(name)
        reasons = ", ".join(f"{reason} {number}" for reason, number in dropped.most_common())
        tqdm.write(
            f"The filter {name!r} has dropped {dropped.total()} of {judged} drafts ({reasons})."
            + (
                f" The judge {by.judge} may be saying the same of everything: look at its words in dropped.jsonl, then "
                "read it by probability (--judge-yes-from 0.5), or name a stronger judge or none."
                if by.judge
                else ""
            )
        )
