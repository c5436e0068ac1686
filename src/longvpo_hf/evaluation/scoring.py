"""What a reply chose, and scores of many replies.

One rule for all benchmarks (`answers.letter_of`): every question counts. A reply that chooses nothing is wrong, and
counted as `unparsed`; one that ends inside its reasoning is wrong whatever letters are in it, and counted as `cut_off`.
Beside it stands the score of each suite's own rule (`official.py`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import TYPE_CHECKING, Any, TypedDict

from longvpo_hf.evaluation.differences import Unit, mean_score
from longvpo_hf.evaluation.longvideo_mcq.answers import is_cut_off, letter_of, without_reasoning

if TYPE_CHECKING:
    from longvpo_hf.evaluation.suite import Question, Suite


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
        facts: See `Question.facts`.
    """

    score: float
    official: float | None
    choice: str
    cut_off: bool
    answer: str
    group: str
    video: str
    facts: Mapping[str, Any]


def record(suite: Suite, text: str, question: Question) -> Record:
    """What becomes of a reply to one question of a suite."""
    choice, cut_off = letter_of(text, question.letters), is_cut_off(text)
    return Record(
        score=100.0 * (choice == question.answer),
        official=0.0 if cut_off else suite.official(without_reasoning(text), question),
        choice=choice,
        cut_off=cut_off,
        answer=question.answer,
        group=question.group,
        video=question.videos[0],
        facts=question.facts,
    )


def by_question(records: Sequence[Record], field: str) -> list[Unit]:
    """Each question as a unit: the score is the share of right answers."""
    return [
        Unit(str(i), "", record["video"], record[field])  # type: ignore[literal-required]
        for i, record in enumerate(records)
    ]


def by_group(records: Sequence[Record], field: str) -> list[Unit]:
    """Each question as a unit of its group: the score is the mean over the groups that were asked."""
    return [
        Unit(str(i), record["group"], record["video"], record[field])  # type: ignore[literal-required]
        for i, record in enumerate(records)
    ]


def mean(records: Sequence[Record]) -> float:
    """Right answers in percent of all questions."""
    return math.fsum(record["score"] for record in records) / len(records)


def unparsed(records: Sequence[Record]) -> float:
    """Replies that came to an end and chose nothing, in percent of all questions."""
    return 100 * sum(not record["choice"] and not record["cut_off"] for record in records) / len(records)


def cut_off(records: Sequence[Record]) -> float:
    """Replies that ended inside their reasoning, in percent of all questions."""
    return 100 * sum(record["cut_off"] for record in records) / len(records)


def headline(suite: Suite, records: Sequence[Record]) -> float:
    """The score that papers quote of a suite, with answers read as they are meant."""
    return mean_score(suite.units(records, "score"))


def official(suite: Suite, records: Sequence[Record]) -> float:
    """The score that papers quote of a suite, by its own rule.

    Questions that the rule leaves out count nowhere; a group of which it leaves out all counts as 0.
    """
    answered = {record["group"] for record in records if record["official"] is not None}
    counted = [
        Record(**{**record, "official": record["official"] or 0.0})
        for record in records
        if record["official"] is not None or record["group"] not in answered
    ]
    return mean_score(suite.units(counted, "official"))


def summary(suite: Suite, records: Sequence[Record]) -> dict[str, Any]:
    """Scores of one suite, in percent.

    Args:
        suite: The suite.
        records: All its answered questions.

    Returns:
        `{"overall", "official", "n", "unparsed", "cut_off", "groups": {group: {"score", "n"}}}`, and the score under
        `suite.headline` where that is not the share of right answers. Groups of which nothing was asked are left out.
    """
    sizes = Counter(record["group"] for record in records)
    known = [group for group in suite.groups if group in sizes]
    groups = [*known, *sorted(sizes.keys() - {*known, ""}, key=_natural)]
    return {
        "overall": mean(records),
        "official": official(suite, records),
        "n": len(records),
        "unparsed": unparsed(records),
        "cut_off": cut_off(records),
        "groups": {
            group: {"score": mean([record for record in records if record["group"] == group]), "n": sizes[group]}
            for group in groups
        },
        suite.headline: headline(suite, records),
    }


def averaged(suite: Suite, repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of one suite whose questions were asked several times: the means.

    Args:
        suite: The suite.
        repeats: What `summary` gives of each time.

    Returns:
        As `summary`; and, where there are several, `repeats`: of the suite's headline and of `official` the scores of
        each time, and their standard deviation as `spread`.
    """
    first = dict(repeats[0])
    if len(repeats) == 1:
        return first
    for name in first:
        if name not in ("n", "groups"):
            first[name] = math.fsum(each[name] for each in repeats) / len(repeats)
    first["groups"] = {
        group: {**score, "score": math.fsum(each["groups"][group]["score"] for each in repeats) / len(repeats)}
        for group, score in first["groups"].items()
    }
    first["repeats"] = {
        parser: {"scores": [each[name] for each in repeats], "spread": stdev(each[name] for each in repeats)}
        for parser, name in (("ours", suite.headline), ("official", "official"))
    }
    return first


def _natural(name: str) -> tuple[float, str]:
    """Numbers in order of their values, before words."""
    return (float(name), "") if re.fullmatch(r"[0-9]{1,15}(\.[0-9]+)?", name) else (math.inf, name)
