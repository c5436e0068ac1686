"""The corpora that can be read: one module each, with a function `read(corpus)`.

`read` yields a corpus' videos in a fixed order, one `Source` at a time, with caption, scenes, id and licence where the
corpus has them, and a `Dropped` for each that is not there or must not be opened. A malformed record costs itself.
Nothing is decoded. A module's docstring says where the corpus' shape is described, and what is assumed where it is not.

To add a corpus, write such a module, name it here, and write a test and a line in docs/corpora.md.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from longvpo_hf.errors import ConfigError, CorpusError
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.limits import IntakeLimits
from longvpo_hf.intake.records import Source, Sources

#: Names of the corpora; the module of `pe-video` is `pe_video`.
CORPORA = ("videofolder", "finevideo", "pe-video", "llava-video", "vript", "sharegpt4video", "longva-tpo")

#: Drops of which only so many are allowed.
_BAD = ("bad_record", "damaged_archive")


def read_corpus(name: str, root: Path, cache: Path, limits: IntakeLimits | None = None) -> Sources:
    """The videos of a corpus, in a fixed order, one at a time.

    Args:
        name: One of `CORPORA`.
        root: The folder it was downloaded to.
        cache: Folder for what is unpacked of archives and Parquet, once.
        limits: See `IntakeLimits`.

    Raises:
        ConfigError: If there is no such corpus.
        CorpusError: While reading, if the corpus is not there, if more records are malformed than `max_bad_records`, or
            if some are and nothing else can be read.
    """
    if name not in CORPORA:
        raise ConfigError(f"corpus must be one of {', '.join(CORPORA)}, got {name!r}.")
    return _checked(name, root, cache, limits or IntakeLimits())


def _checked(name: str, root: Path, cache: Path, limits: IntakeLimits) -> Sources:
    from longvpo_hf.intake.corpus import Corpus

    reader = import_module(f"longvpo_hf.intake.corpora.{name.replace('-', '_')}")
    num_sources, bad = 0, 0
    first: Dropped | None = None
    for item in reader.read(Corpus(root, cache, limits)):
        num_sources += isinstance(item, Source)
        if isinstance(item, Dropped) and item.reason in _BAD:
            bad += 1
            first = first or item
            if bad > limits.max_bad_records:
                raise CorpusError(
                    f"{_where(item)} More than max_bad_records={limits.max_bad_records} records or archives are bad; "
                    f"is this {name}, and downloaded whole? If it is, raise --max-bad-records."
                )
        yield item
    if first is not None and not num_sources:
        raise CorpusError(f"{_where(first)} None of the videos of {root} can be read; is this {name}?")


def _where(drop: Dropped) -> str:
    """A drop as a sentence that starts with its file."""
    detail = drop.detail.rstrip(".")
    if detail.startswith(drop.path):
        return f"{detail}."
    is_of_file = detail.startswith(("is ", "must ", "cannot "))
    return f"{drop.path}{' ' if is_of_file else ', '}{detail}."
