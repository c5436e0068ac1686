"""Public video corpora, and folders of videos, as clips.

    sources = read_corpus("finevideo", Path("finevideo"), cache=Path("cache"))   # Source | Dropped, one at a time
    clips = clips_of(sources, CuttingSettings(), benchmarks)                     # Clip | Dropped, one at a time

Takes what a user downloaded; gives clips with caption, source id and licence where the corpus has them, and a named
reason for each video that is left out. A corpus that is not as expected is a `CorpusError` naming file, record and
field. Memory does not grow with the corpus. Knows nothing of questions, rows or models; `media.py` makes files of the
clips.
"""

from __future__ import annotations

from pathlib import Path

from longvpo_hf.errors import ConfigError
from longvpo_hf.intake.cutting import CuttingSettings, clips_of
from longvpo_hf.intake.leakage import BenchmarkVideos
from longvpo_hf.intake.readers import READERS, Sources
from longvpo_hf.intake.records import Scene, Source

__all__ = ["CORPORA", "BenchmarkVideos", "CuttingSettings", "Scene", "Source", "clips_of", "read_corpus"]

#: Names of the corpora that can be read.
CORPORA = tuple(READERS)


def read_corpus(corpus: str, root: Path, cache: Path) -> Sources:
    """The videos of a corpus, in a fixed order, one at a time.

    Args:
        corpus: One of `CORPORA`.
        root: The folder it was downloaded to.
        cache: Folder for what is extracted from archives and Parquet, once; may be shared by runs one after the other.

    Raises:
        CorpusError: While reading, if a file, record or field is not as expected.
        ValueError: If there is no such corpus.
    """
    if corpus not in READERS:
        raise ConfigError(f"corpus must be one of {', '.join(CORPORA)}, got {corpus!r}.")
    return READERS[corpus](root, cache)
