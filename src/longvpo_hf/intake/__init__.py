"""Public video corpora, and folders of videos, as clips.

    sources = read_corpus("finevideo", Path("finevideo"), cache=Path("cache"))   # Source | Dropped, one at a time
    clips = clips_of(sources, CuttingSettings(), benchmarks)                     # Clip | Dropped, one at a time

A corpus is what a user downloaded. Its clips have caption, source id and licence where the corpus has them; each video
that is left out has a named reason. Memory does not grow with the corpus.
"""

from __future__ import annotations

from longvpo_hf.intake.corpora import CORPORA, read_corpus
from longvpo_hf.intake.cutting import CuttingSettings, clips_of
from longvpo_hf.intake.leakage import BenchmarkVideos
from longvpo_hf.intake.limits import IntakeLimits
from longvpo_hf.intake.records import Scene, Source

__all__ = [
    "CORPORA",
    "BenchmarkVideos",
    "CuttingSettings",
    "IntakeLimits",
    "Scene",
    "Source",
    "clips_of",
    "read_corpus",
]
