"""Public video corpora, and folders of videos, as clips.

    survey = CorpusSurvey("finevideo", Path("finevideo"), cache=Path("cache"))   # what is in it: survey.report
    clips = clips_of(survey, CuttingSettings(), benchmarks)                      # Clip | Dropped, one at a time

A corpus is what a user downloaded. Its clips have caption, source id and licence where the corpus has them; each video
that is left out has a named reason. Memory does not grow with the corpus.
"""

from __future__ import annotations

from longvpo_hf.intake.corpora import CORPORA, read_corpus
from longvpo_hf.intake.cutting import CuttingSettings, clips_of
from longvpo_hf.intake.leakage import BenchmarkVideos
from longvpo_hf.intake.limits import IntakeLimits
from longvpo_hf.intake.records import Scene, Source
from longvpo_hf.intake.report import CorpusReport, CorpusSurvey

__all__ = [
    "CORPORA",
    "BenchmarkVideos",
    "CorpusReport",
    "CorpusSurvey",
    "CuttingSettings",
    "IntakeLimits",
    "Scene",
    "Source",
    "clips_of",
    "read_corpus",
]
