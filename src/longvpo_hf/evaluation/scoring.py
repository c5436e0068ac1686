"""What a reply chose, and scores of many replies.

One rule for all benchmarks (`answers.letter_of`): every question counts. A reply that chooses nothing is wrong, and
counted as `unparsed`; one that ends inside its reasoning is wrong whatever letters are in it, and counted as `cut_off`.
Beside it stands the score of each benchmark's own rule (`official.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from longvpo_hf.evaluation.longvideo_mcq.answers import is_cut_off, letter_of, without_reasoning
from longvpo_hf.evaluation.official import official_score


class Record(TypedDict):
    """One answered question, as lmms-eval keeps it.

    Fields:
        score: 100 if the choice is right, else 0: percent, as all scores are.
        official: What the benchmark's own rule gives the reply; None where it leaves the question out.
        choice: The letter chosen; empty where there is none.
        cut_off: Whether the reply ended inside its reasoning.
        answer: The right letter.
        group: The question's group.
        video: What the question is about: questions about one video are no independent samples.
    """

    score: float
    official: float | None
    choice: str
    cut_off: bool
    answer: str
    group: str
    video: str


def record(benchmark: str, text: str, letters: str, answer: str, group: str = "", video: str = "") -> Record:
    """What becomes of a reply to one question of a benchmark."""
    choice, cut_off = letter_of(text, letters), is_cut_off(text)
    return Record(
        score=100.0 * (choice == answer),
        official=0.0 if cut_off else official_score(benchmark, without_reasoning(text), letters, answer),
        choice=choice,
        cut_off=cut_off,
        answer=answer,
        group=group,
        video=video,
    )


def mean_score(records: Sequence[Record]) -> float:
    """Right answers in percent of all questions."""
    return math.fsum(record["score"] for record in records) / len(records)


def unparsed(records: Sequence[Record]) -> float:
    """Replies that came to an end and chose nothing, in percent of all questions."""
    return 100 * sum(not record["choice"] and not record["cut_off"] for record in records) / len(records)


def cut_off(records: Sequence[Record]) -> float:
    """Replies that ended inside their reasoning, in percent of all questions."""
    return 100 * sum(record["cut_off"] for record in records) / len(records)


def group_score(records: Sequence[Record], group: str) -> float:
    """`mean_score` of one group."""
    return mean_score([record for record in records if record["group"] == group])


def mean_of_groups(records: Sequence[Record]) -> float:
    """Mean over the groups that were asked of their `mean_score`: MLVU's M-Avg, MVBench's mean."""
    scores = [group_score(records, group) for group in dict.fromkeys(record["group"] for record in records)]
    return math.fsum(scores) / len(scores)


def official(name: str, records: Sequence[Record]) -> float:
    """The score that papers quote of a benchmark, by its own rule: a mean over groups for MLVU and MVBench."""
    by_group: dict[str, list[float]] = {}
    for record in records:
        group = by_group.setdefault(record["group"] if name in _MEANS_OF_GROUPS else "", [])
        if record["official"] is not None:
            group.append(record["official"])
    scores = [math.fsum(group) / len(group) if group else 0.0 for group in by_group.values()]
    return math.fsum(scores) / len(scores)


def summary(name: str, groups: Iterable[str], records: Sequence[Record]) -> dict[str, Any]:
    """Scores of one benchmark, in percent.

    Args:
        name: The benchmark. MLVU gets its M-Avg besides; MVBench's `overall` is the mean of its 20 tasks.
        groups: Its groups, in order.
        records: All its answered questions.

    Returns:
        `{"overall", "official", "n", "unparsed", "cut_off", "groups": {group: {"score", "n"}}}`, and `m_avg` for MLVU.
        Groups of which nothing was asked are left out.
    """
    sizes = {group: sum(record["group"] == group for record in records) for group in groups}
    scores: dict[str, Any] = {
        "overall": mean_of_groups(records) if name == "mvbench" else mean_score(records),
        "official": official(name, records),
        "n": len(records),
        "unparsed": unparsed(records),
        "cut_off": cut_off(records),
        "groups": {group: {"score": group_score(records, group), "n": size} for group, size in sizes.items() if size},
    }
    if name == "mlvu":
        scores["m_avg"] = mean_of_groups(records)
    return scores


#: Benchmarks whose papers quote the mean of their tasks' scores.
_MEANS_OF_GROUPS = ("mlvu", "mvbench")
