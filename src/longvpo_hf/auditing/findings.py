"""What an audit says of each item, and the one rule by which judges that see no video get their verdict."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum


class Verdict(StrEnum):
    """What an item came to, from best to worst; `unknown` is no verdict."""

    UNKNOWN = "unknown"
    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"

    def __str__(self) -> str:
        return self.value

    def is_at_least(self, other: Verdict) -> bool:
        """Whether this verdict is as bad as another, or worse."""
        order = list(Verdict)
        return order.index(self) >= order.index(other)


#: A judge that knows a fifth of the rows and tosses a coin for the others is right in 60%, one that knows half of them
#: in 75%: from there on, most of what a row teaches can be had without the video.
WARN_ACCURACY, FAIL_ACCURACY = 0.60, 0.75
#: Fewer independent groups of rows than this cannot tell a shortcut from chance.
MIN_GROUPS = 20
#: Normal quantile of a one-sided bound at 99%: a clean dataset gets about one false warning in ten audits.
_Z = 2.326


@dataclass(frozen=True, slots=True)
class Finding:
    """One item of an audit.

    Args:
        name: Of the item, as `Audit.findings` and the JSON name it.
        title: What it asks, for a person.
        verdict: What came of it.
        said: What was found, in one or two sentences.
        threshold: The bounds of the verdict, in words; empty where there is none.
        value: The number that the verdict follows from; None where nothing was measured.
        remedy: What to do; empty where nothing has to be done.
        details: Further numbers under their labels, most telling first.
        examples: Ids of some rows it is about.
    """

    name: str
    title: str
    verdict: Verdict
    said: str
    threshold: str = ""
    value: float | None = None
    remedy: str = ""
    details: tuple[tuple[str, str], ...] = ()
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Audit:
    """All findings about one dataset.

    Args:
        name: Of the dataset.
        num_rows: Rows it has.
        num_read: Rows whose texts were compared; fewer than `num_rows` in a large dataset.
        findings: One for each item, in the order in which they are shown.
    """

    name: str
    num_rows: int
    num_read: int
    findings: tuple[Finding, ...] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        return max((finding.verdict for finding in self.findings), key=list(Verdict).index, default=Verdict.UNKNOWN)

    def of(self, name: str) -> Finding:
        """The finding of this name."""
        return next(finding for finding in self.findings if finding.name == name)

    def to_json(self) -> str:
        """The audit as JSON text."""
        return json.dumps({**asdict(self), "verdict": self.verdict}, indent=2)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.num_rows:,} rows{self._read()}"]
        for finding in self.findings:
            lines.append(f"  {finding.verdict!s:<8}{finding.name:<18}{finding.said}")
            if finding.verdict.is_at_least(Verdict.WARN) and finding.remedy:
                lines.append(f"{'':28}→ {finding.remedy}")
        return "\n".join(lines)

    def _read(self) -> str:
        return "" if self.num_read == self.num_rows else f", of which the texts of {self.num_read:,} were compared"


def group_accuracy(right: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float, int]:
    """How often a judge is right, and a lower bound of that, where rows of one group are no independent rows.

    Rows about the same evidence often have the same answers, so each group counts as one observation in the bound: it
    is Wilson's, one-sided at 99%, with as many observations as there are groups.

    Args:
        right: For each row 1 where the judge picks the chosen answer, 0 where the rejected one, 0.5 for a tie.
        groups: The group of each row.

    Returns:
        The mean over groups of their means, its lower bound, and the number of groups.
    """
    by_group: defaultdict[Hashable, list[float]] = defaultdict(list)
    for value, group in zip(right, groups, strict=True):
        by_group[group].append(value)
    number = len(by_group)
    if not number:
        return 0.5, 0.0, 0
    mean = sum(sum(values) / len(values) for values in by_group.values()) / number
    return mean, lower_bound(mean, number), number


def lower_bound(share: float, number: int) -> float:
    """Wilson's lower bound, one-sided at 99%, of a share that was seen in `number` observations."""
    square = _Z * _Z
    spread = _Z * math.sqrt(share * (1 - share) / number + square / (4 * number * number))
    return (share + square / (2 * number) - spread) / (1 + square / number)


def judged(
    name: str,
    title: str,
    right: Sequence[float],
    groups: Sequence[Hashable],
    said: str,
    remedy: str,
    details: tuple[tuple[str, str], ...] = (),
    examples: tuple[str, ...] = (),
) -> Finding:
    """The finding about a judge that sees no video.

    Args:
        name: See `Finding`.
        title: See `Finding`.
        right: See `group_accuracy`.
        groups: See `group_accuracy`.
        said: What the judge does, as the start of a sentence that ends in its accuracy.
        remedy: What to do if it is right too often.
        details: See `Finding`.
        examples: See `Finding`.
    """
    accuracy, lower, number = group_accuracy(right, groups)
    threshold = f"warn above {WARN_ACCURACY:.0%}, fail above {FAIL_ACCURACY:.0%}, both with 99% certainty"
    if number < MIN_GROUPS:
        said = f"{said} in {accuracy:.0%}, but {number} groups of rows cannot tell that from chance (≥ {MIN_GROUPS})."
        return Finding(name, title, Verdict.UNKNOWN, said, threshold, accuracy, "", details)
    verdict = Verdict.FAIL if lower > FAIL_ACCURACY else Verdict.WARN if lower > WARN_ACCURACY else Verdict.PASS
    said = f"{said} in {accuracy:.1%} of {len(right):,} rows (chance: 50%; at least {lower:.1%} with 99% certainty)."
    return Finding(name, title, verdict, said, threshold, accuracy, remedy, details, examples)
