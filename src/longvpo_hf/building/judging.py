"""How a judge is asked yes or no, and how its verdict is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from longvpo_hf.building.asking import Answer
from longvpo_hf.building.method import Drop, PairFilter, QuestionFilter
from longvpo_hf.reasoning import CutOff
from longvpo_hf.responders.replies import yes_or_no

#: A filter is reported once it has judged so many drafts and dropped at least this share of them.
_ENOUGH, _NEARLY_ALL = 32, 0.95

#: How every prompt for a verdict of yes or no ends.
YES_OR_NO = "Answer Yes or No."


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
                "name a stronger judge or none."
                if by.judge
                else ""
            )
        )
