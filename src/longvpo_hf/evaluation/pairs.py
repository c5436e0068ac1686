"""Differences between the models of a table, from their answers: which pairs, and what may be concluded of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.differences import LEVEL, POWER, Difference, Unit, difference
from longvpo_hf.evaluation.suite import Suite
from longvpo_hf.public import markdown

#: One answered question: a `scoring.Record` with its task, its row, and which repeat it is of (0 where there is one).
Answer = Mapping[str, Any]


def compared(suite: Suite, first: Sequence[Answer], second: Sequence[Answer]) -> Difference:
    """The difference between two models' scores of a suite, with answers read as they are meant.

    Args:
        suite: The suite.
        first: Answers of the model that is compared with.
        second: Answers of the other.

    Raises:
        ConfigError: If they were not asked the same questions.
    """
    if not same_questions(first, second):
        raise ConfigError(
            f"{suite.name}: only answers to the same questions can be compared; of {len(first)} and {len(second)} some "
            "are to others."
        )
    return difference(units_of(suite, first), units_of(suite, second))


def same_questions(first: Sequence[Answer], second: Sequence[Answer]) -> bool:
    """Whether two models were asked the same questions, with the same right answers."""
    asked, others = ({_question(answer): answer["answer"] for answer in each} for each in (first, second))
    return asked == others


def units_of(suite: Suite, answers: Sequence[Answer]) -> list[Unit]:
    """What a suite's score is the mean of, each with its mean score over the repeats."""
    repeats: dict[int, list[Answer]] = {}
    for answer in sorted(answers, key=_question):
        repeats.setdefault(answer.get("repeat", 0), []).append(answer)
    scores: dict[str, list[float]] = {}
    units: dict[str, Unit] = {}
    for repeat in repeats.values():
        for unit in suite.units(repeat, "score"):  # type: ignore[arg-type]  # an answer holds a record
            units[unit.key] = unit
            scores.setdefault(unit.key, []).append(unit.score)
    return [unit._replace(score=math.fsum(scores[key]) / len(scores[key])) for key, unit in units.items()]


def _question(answer: Answer) -> tuple[str, int]:
    return answer["task"], answer["row"]


def pairs_of(models: Sequence[object]) -> list[tuple[int, int]]:
    """Which models of a table are compared: each with the first, and each with the one before it."""
    found = [(0, i) for i in range(1, len(models))]
    return found + [(i - 1, i) for i in range(2, len(models))]


def difference_row(title: str, first: str, second: str, found: Difference) -> dict[str, Any]:
    """A difference as the table's JSON holds it."""
    return {
        "benchmark": title,
        "first": first,
        "second": second,
        "points": found.points,
        "interval": found.interval,
        "p_value": found.p_value,
        "mcnemar_p": found.mcnemar_p,
        "only_first": found.only_first,
        "only_second": found.only_second,
        "questions": found.num_units,
        "videos": found.num_videos,
        "detectable_points": found.detectable_points,
        "needed": found.needed,
        "verdict": found.verdict,
    }


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: a table of differences and how to read it; none where there are no differences."""
    if not rows:
        return []
    return [
        "Differences, paired by question; the questions of one video count as one draw. Below "
        f"p = {LEVEL:g} a difference is called one; {1 - LEVEL:.0%} intervals. The number of questions needed finds "
        f"a difference of the size measured with a chance of {POWER:.0%}, *visible* is the smallest that so many "
        "questions would find as often.",
        "",
        "| suite | compared | points | interval | p | better : worse | questions (videos) | visible | conclusion |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
        *[
            f"| {row['benchmark']} | {markdown(row['second'])} − {markdown(row['first'])} | {row['points']:+.1f} "
            f"| {_interval(row['interval'])} | {row['p_value']:.3g} | {row['only_second']} : {row['only_first']} "
            f"| {row['questions']:,} ({row['videos']:,}) | {_points(row['detectable_points'])} | {row['verdict']} |"
            for row in rows
        ],
    ]


def _interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:+.1f} … {interval[1]:+.1f}"


def _points(points: float | None) -> str:
    return "–" if points is None else f"{points:.1f}"
