"""ruili0/LongVA-TPO-10k: `dataset.csv`, whose column `video` names the video, and a tar in parts.

Its rows are preferences, several about one video, none a caption: each video is given once for each run of rows.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from longvpo_hf.intake.corpus import Corpus
from longvpo_hf.intake.records import Record, Sources


def read(corpus: Corpus) -> Sources:
    """The videos of the rows."""
    before = ""

    def video(record: Record) -> Sources:
        nonlocal before
        name = record.name("video")
        if name != before:
            yield corpus.source(record, name, PurePosixPath(name).stem, licence="MIT")
        before = name

    yield from corpus.each(corpus.records(paths=[corpus.root / "dataset.csv"]), video)
