"""What is in a corpus, counted before anything is decoded: `--dry-run` and the funnel show it."""

from __future__ import annotations

import pickle
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from longvpo_hf.funnel import REASONS, Dropped
from longvpo_hf.intake.corpora import read_corpus
from longvpo_hf.intake.leakage import BenchmarkMatches, BenchmarkVideos
from longvpo_hf.intake.limits import IntakeLimits
from longvpo_hf.intake.records import Source, Sources
from longvpo_hf.paths import printable

_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """The account of a corpus.

    Args:
        corpus: Its name.
        num_videos: Files of videos, each named by a record where the corpus has records.
        num_films: Films that these are, where scenes are files of their own; else `num_videos`.
        num_captioned: Videos that the corpus describes, as a whole or by scenes.
        num_scenes: Scenes that the corpus names.
        num_in_benchmarks: Videos whose names are in a list of benchmark videos.
        benchmarks: How much of each list was found; hashes are compared later.
        dropped: How many files and records were left out, by reason; see `funnel.REASONS`.
        unknown_suffixes: How many files are not known to be videos, by suffix.
        examples: Some of what was left out, by reason.
    """

    corpus: str
    num_videos: int
    num_films: int
    num_captioned: int
    num_scenes: int
    num_in_benchmarks: int
    benchmarks: tuple[BenchmarkMatches, ...]
    dropped: Mapping[str, int]
    unknown_suffixes: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]

    def stages(self) -> dict[str, int]:
        """The stages of a funnel that come before the clips."""
        return {"sources": self.num_videos + sum(self.dropped.values()), "videos": self.num_videos}

    def lines(self) -> list[str]:
        """The account for a person to read."""
        films = f", scenes of {self.num_films} films" if self.num_films != self.num_videos else ""
        scenes = f"; {self.num_scenes} scenes are named" if self.num_scenes else ""
        lines = [
            f"corpus            {self.corpus}: {self.num_videos} videos{films}",
            f"captions          {self.num_captioned} of {self.num_videos} videos have one{scenes}",
        ]
        if self.benchmarks:
            found = "; ".join(map(str, self.benchmarks))
            lines.append(f"benchmarks        {self.num_in_benchmarks} videos are in one and left out: {found}")
        for reason, number in self.dropped.items():
            lines.append(f"left out          {number} {reason}: {REASONS[reason]}")
            lines += [f"                    {printable(example)}" for example in self.examples[reason]]
        if self.unknown_suffixes:
            named = ", ".join(f"{printable(suffix)} {number}" for suffix, number in self.unknown_suffixes.items())
            lines.append(f"unknown suffixes  {named}")
        return lines


class CorpusSurvey:
    """A corpus that was read to its end once: its account, and its videos to go through.

    What was found is kept on disk, so that archives are not read a second time and memory does not grow.

    Args:
        name: One of `CORPORA`.
        root: The folder the corpus was downloaded to.
        cache: Folder for what is unpacked.
        limits: See `IntakeLimits`.
        benchmarks: The videos that will be left out; here they are counted.

    Raises:
        ConfigError: See `read_corpus`.
        CorpusError: See `read_corpus`.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        cache: Path,
        limits: IntakeLimits | None = None,
        benchmarks: BenchmarkVideos | None = None,
    ) -> None:
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as this object
        self._films: dict[str, str] = {}
        videos, dropped, suffixes = Counter[str](), Counter[str](), Counter[str]()
        examples: dict[str, list[str]] = {}
        before = ""
        for item in read_corpus(name, root, cache, limits):
            pickle.dump(item, self._spool)
            if isinstance(item, Source):
                videos["all"] += 1
                videos["films"] += not item.film or item.film != before
                videos["captioned"] += item.has_caption
                videos["scenes"] += len(item.scenes)
                videos["in benchmarks"] += benchmarks is not None and benchmarks.match(item) is not None
                before = item.film
                if item.film:
                    self._films[str(item.path)] = item.film
                continue
            dropped[item.reason] += 1
            if item.reason == "unknown_suffix":
                suffixes[PurePosixPath(item.path).suffix.lower() or "none"] += 1
            some = examples.setdefault(item.reason, [])
            if len(some) < _EXAMPLES:
                some.append(f"{item.path}{': ' if item.detail else ''}{item.detail}")
        self.report = CorpusReport(
            corpus=name,
            num_videos=videos["all"],
            num_films=videos["films"],
            num_captioned=videos["captioned"],
            num_scenes=videos["scenes"],
            num_in_benchmarks=videos["in benchmarks"],
            benchmarks=benchmarks.matches() if benchmarks is not None else (),
            dropped=dict(dropped.most_common()),
            unknown_suffixes=dict(suffixes.most_common()),
            examples={reason: tuple(some) for reason, some in examples.items()},
        )

    def video_of(self, path: str) -> str:
        """The video that a file of the corpus is, or is one scene of: the same for all scenes of a film."""
        return self._films.get(path, path)

    def __iter__(self) -> Sources:
        """The corpus' videos and drops, as `read_corpus` gives them."""
        self._spool.seek(0)
        for _ in range(self.report.num_videos + sum(self.report.dropped.values())):
            item: Source | Dropped = pickle.load(self._spool)
            yield item
