"""What an audit says of videos: where the evidence stands, clips that look alike, sources, videos seen elsewhere."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from longvpo_hf.auditing.findings import MIN_GROUPS, Finding, Verdict
from longvpo_hf.auditing.pairs import clip_key
from longvpo_hf.intake.leakage import BenchmarkVideos
from longvpo_hf.intake.records import Source
from longvpo_hf.preference import VideoPreference
from longvpo_hf.publishing.rows import source_key
from longvpo_hf.timeline import Clip

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: How far the places of the evidence may be from those that chance gives it: half the sum of absolute differences of
#: shares, so the share of rows that would have to move. Conventions; chance itself is taken off by simulation.
_WARN_MOVED, _FAIL_MOVED = 0.15, 0.30
_PLACES = ("first fifth", "second fifth", "middle fifth", "fourth fifth", "last fifth")
_DRAWS = 200
#: Share of rows in which a clip that should not hold the answer looks like one that does. Conventions, as is the
#: cosine, far above the bound of 0.6 that LongVPO puts on distractors.
_WARN_ALIKE, _FAIL_ALIKE, _ALIKE_COSINE = 0.01, 0.10, 0.9
#: A source may give so many times its fair share of the rows, and such a share, before the others hardly count: both
#: must be exceeded. Conventions; the miniature's rows, whose largest of 3,408 sources gives 0.1%, must pass.
_WARN_TIMES, _FAIL_TIMES = 3.0, 10.0
_WARN_OF_ALL, _FAIL_OF_ALL = 0.05, 0.20
_SHOWN = 12

#: Gives one unit vector per clip.
Embedder = Callable[[Sequence[Clip]], "NDArray[np.floating]"]


@dataclass(slots=True)
class Videos:
    """What is counted over all rows of a dataset, however many."""

    ids: Counter[str] = field(default_factory=Counter)
    rows_of_source: Counter[str] = field(default_factory=Counter)
    sources: set[str] = field(default_factory=set)
    alike: list[str] = field(default_factory=list)
    num_mixed: int = 0
    seen: NDArray[np.floating] = field(default_factory=lambda: np.zeros(5))
    places: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def add(self, row: VideoPreference) -> None:
        """Counts a row."""
        clips, evidence = row.timeline.clips, set(row.evidence)
        self.ids[row.id] += 1
        self.sources.update(map(source_key, clips))
        self.rows_of_source.update({source_key(clips[i]) for i in evidence or range(len(clips))})
        if not evidence or len(evidence) == len(clips):
            return
        bins = tuple(min(4, int(5 * row.timeline.centre(i))) for i in range(len(clips)))
        self.places[bins] += 1
        for index in evidence:
            self.seen[bins[index]] += 1 / len(evidence)
        if len({source_key(clip) for clip in clips}) > 1:  # of one film, all clips are alike in some way
            self.num_mixed += 1
            others = [i for i in range(len(clips)) if i not in evidence]
            if similarities := row.provenance.similarities:  # a builder measured them
                is_alike = any(i < len(similarities) and similarities[i] >= _ALIKE_COSINE for i in others)
            else:
                sources = {source_key(clips[i]) for i in evidence}
                is_alike = any(source_key(clips[i]) in sources for i in others)
            if is_alike:
                self.alike.append(row.id)


def positions(videos: Videos) -> Finding:
    """Does the evidence stand where chance would put it?"""
    name, title = "positions", "Does the evidence stand anywhere, or always in one place?"
    number = sum(videos.places.values())
    if number < MIN_GROUPS:
        said = f"{number} rows name clips with the answer among others: too few to tell (≥ {MIN_GROUPS})."
        return Finding(name, title, Verdict.UNKNOWN, said)
    expected = np.zeros(5)
    for bins, rows in videos.places.items():
        expected += rows * np.bincount(bins, minlength=5) / len(bins)
    shares, fair = videos.seen / number, expected / number
    moved = float(np.abs(shares - fair).sum() / 2)
    by_chance = _moved_by_chance(videos, fair)
    most = int(np.argmax(shares - fair))
    said = (
        f"{moved:.1%} of the rows would have to move for evidence to stand where chance puts it (chance alone: up to "
        f"{by_chance:.1%}); the {_PLACES[most]} of the timeline has {shares[most]:.0%}, by chance {fair[most]:.0%}."
    )
    beyond = moved - by_chance
    verdict = Verdict.FAIL if beyond > _FAIL_MOVED else Verdict.WARN if beyond > _WARN_MOVED else Verdict.PASS
    return Finding(
        name,
        title,
        verdict,
        said,
        f"warn above {_WARN_MOVED:.0%}, fail above {_FAIL_MOVED:.0%} beyond chance",
        moved,
        "A model may learn to look there alone. Draw places anew (Stage 1 draws them evenly), or drop such rows.",
        tuple((place, f"{share:.1%}, chance {by:.1%}") for place, share, by in zip(_PLACES, shares, fair, strict=True)),
    )


def _moved_by_chance(videos: Videos, fair: NDArray[np.floating]) -> float:
    """The 99% quantile of the share that would have to move where places are drawn at random."""
    rng = np.random.default_rng(0)
    number = sum(videos.places.values())
    moved = []
    for _ in range(_DRAWS):
        drawn = np.zeros(5)
        for bins, rows in videos.places.items():
            # One place for each row: evidence of several clips moves less, so this is on the safe side.
            drawn += rng.multinomial(rows, np.bincount(bins, minlength=5) / len(bins))
        moved.append(np.abs(drawn / number - fair).sum() / 2)
    return float(np.quantile(moved, 0.99))


def near_duplicates(videos: Videos) -> Finding:
    """Do clips that should not hold the answer look like those that do?"""
    name, title = "near_duplicates", "Do other clips show what the evidence shows?"
    if not videos.num_mixed:
        said = "Every row is about one film, or names no clip with the answer: its scenes are alike in any case."
        return Finding(name, title, Verdict.UNKNOWN, said)
    share = len(videos.alike) / videos.num_mixed
    return _alike(
        name,
        title,
        share,
        f"In {share:.1%} of {videos.num_mixed:,} rows of several films, a clip that should not hold the answer is of "
        f"the film that does or, where a build measured it, has a cosine of at least {_ALIKE_COSINE} with it.",
        tuple(videos.alike[:_SHOWN]),
    )


def look_alikes(rows: Sequence[VideoPreference], embed: Embedder) -> Finding:
    """The same by an embedder, over some rows."""
    name, title = "look_alikes", "Do other clips look like the evidence?"
    rows = [row for row in rows if row.evidence and len({source_key(clip) for clip in row.timeline.clips}) > 1]
    clips = {clip_key(clip): clip for row in rows for clip in row.timeline.clips}
    if not clips:
        return Finding(name, title, Verdict.UNKNOWN, "No row has clips of several films and names one with the answer.")
    vectors = dict(zip(clips, embed(list(clips.values())), strict=True))
    alike, highest = [], []
    for row in rows:
        own = np.stack([vectors[clip_key(clip)] for clip in row.timeline.clips])
        evidence = list(row.evidence)
        others = [i for i in range(len(own)) if i not in row.evidence]
        cosine = float((own[others] @ own[evidence].T).max()) if others else -1.0
        highest.append(cosine)
        if cosine >= _ALIKE_COSINE:
            alike.append(row.id)
    share = len(alike) / len(rows)
    said = (
        f"In {share:.1%} of {len(rows):,} rows another clip has a cosine of at least {_ALIKE_COSINE} with the evidence"
    )
    return _alike(
        name, title, share, f"{said} (median of the highest: {np.median(highest):.2f}).", tuple(alike[:_SHOWN])
    )


def _alike(name: str, title: str, share: float, said: str, examples: tuple[str, ...]) -> Finding:
    verdict = Verdict.FAIL if share > _FAIL_ALIKE else Verdict.WARN if share > _WARN_ALIKE else Verdict.PASS
    return Finding(
        name,
        title,
        verdict,
        said,
        f"warn above {_WARN_ALIKE:.0%}, fail above {_FAIL_ALIKE:.0%} of the rows",
        share,
        "The rejected answer may then be right. Build with an embedder, or with a lower max_similarity.",
        (),
        examples,
    )


def sources(videos: Videos) -> Finding:
    """Does one source give most of the rows?"""
    name, title = "sources", "Do a few sources give most rows?"
    total, number = videos.rows_of_source.total(), len(videos.rows_of_source)
    rows = max(videos.rows_of_source.values())
    effective = total**2 / sum(rows**2 for rows in videos.rows_of_source.values())
    times = rows / (total / number)
    share = rows / total
    verdict = Verdict.PASS
    if times > _WARN_TIMES and share > _WARN_OF_ALL:
        verdict = Verdict.FAIL if times > _FAIL_TIMES and share > _FAIL_OF_ALL else Verdict.WARN
    if number == 1:
        verdict = Verdict.WARN
    said = f"one source holds all answers, of {total:,} row{'s' * (total != 1)}."
    if number > 1:
        said = (
            f"{number:,} sources hold the answers; the largest gives {share:.1%} of the rows, {times:.1f} times its "
            f"fair share. They count like {effective:,.1f} sources of equal share."
        )
    return Finding(
        name,
        title,
        verdict,
        said,
        f"warn above {_WARN_TIMES:g} times a fair share and {_WARN_OF_ALL:.0%} of the rows, fail above "
        f"{_FAIL_TIMES:g} times and {_FAIL_OF_ALL:.0%}; warn at a single source",
        times,
        "Add sources, or take fewer rows of the largest: `longvpo rows filter --max-rows-per-source N`.",
        tuple(
            (Path(source).name[:80], f"{rows:,} rows, {rows / total:.1%}")
            for source, rows in videos.rows_of_source.most_common(_SHOWN)
        ),
    )


def duplicates(videos: Videos) -> Finding:
    """Is a row there twice?"""
    repeated = {row: number for row, number in videos.ids.items() if number > 1}
    extra = sum(repeated.values()) - len(repeated)
    said = f"{extra:,} rows are copies of others." if extra else "No row is there twice."
    remedy = "Keep one of each: `longvpo rows merge` does."
    verdict = Verdict.FAIL if extra else Verdict.PASS
    return Finding(
        "duplicates", "Is a row there twice?", verdict, said, "", float(extra), remedy, (), tuple(repeated)[:_SHOWN]
    )


def benchmark_overlap(videos: Videos, lists: Mapping[str, Path]) -> Finding:
    """Are videos of benchmarks among the sources?"""
    name, title = "benchmarks", "Are videos of benchmarks in it?"
    if not lists:
        said = "Not compared: name lists of their videos with --benchmark-videos NAME=FILE."
        return Finding(name, title, Verdict.UNKNOWN, said)
    benchmarks = BenchmarkVideos.from_files(lists)
    found = {}
    for source in sorted(videos.sources):
        if match := benchmarks.match(Source(Path(source), source_id=source)):
            found[source] = match
    said = f"{len(found)} sources are of a benchmark ({'; '.join(map(str, benchmarks.matches()))})."
    remedy = "Drop their rows: `longvpo rows filter --benchmark-videos NAME=FILE`."
    details = tuple((Path(source).name[:80], match) for source, match in list(found.items())[:_SHOWN])
    verdict = Verdict.FAIL if found else Verdict.PASS
    return Finding(name, title, verdict, said, "fail at the first", float(len(found)), remedy, details)


def evaluation_overlap(videos: Videos, others: Mapping[str, Videos]) -> Finding:
    """Are the clips or sources of evaluation rows in it?"""
    name, title = "evaluation_rows", "Are the videos of evaluation rows in it?"
    if not others:
        return Finding(name, title, Verdict.UNKNOWN, "Not compared: name evaluation rows with --evaluation DATASET.")
    own = videos.rows_of_source.keys()
    shared = {label: own & other.rows_of_source.keys() for label, other in others.items()}
    shown = {label: videos.sources & other.rows_of_source.keys() for label, other in others.items()}
    rows = {label: len(videos.ids.keys() & other.ids.keys()) for label, other in others.items()}
    number = sum(map(len, shared.values()))
    said = "; ".join(
        f"{label}: both ask about {len(shared[label])} sources and have {rows[label]} rows in common; "
        f"{len(shown[label])} of its sources are shown here"
        for label in others
    )
    remedy = "Split by source: `longvpo rows split`, with --strict where held-out sources may not even be distractors."
    details = tuple(
        (Path(source).name[:80], label) for label, found in shared.items() for source in sorted(found)[:_SHOWN]
    )
    verdict = Verdict.FAIL if number else Verdict.WARN if any(shown.values()) else Verdict.PASS
    threshold = "fail where both ask about a source, warn where one is shown"
    return Finding(name, title, verdict, f"{said}.", threshold, float(number), remedy, details)


def evenly(number: int, most: int) -> list[int]:
    """Ascending indices of at most `most` of `number` things, spread evenly."""
    return [math.floor(i * number / min(number, most)) for i in range(min(number, most))]
