"""How a judge is asked yes or no, and how its verdict is read."""

from __future__ import annotations

from longvpo_hf.building.asking import Answer
from longvpo_hf.building.method import Drop
from longvpo_hf.responders.replies import yes_or_no

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
    return Drop("malformed_verdict" if answer is None else reason, f"{judged} — judge: {verdict}")
