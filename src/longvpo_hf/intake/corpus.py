"""A downloaded corpus as its reader sees it: its files of records, and the videos they name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from longvpo_hf.errors import CorpusError
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.archives import Archive
from longvpo_hf.intake.limits import IntakeLimits
from longvpo_hf.intake.record_files import read_records
from longvpo_hf.intake.records import BadRecord, Record, Scene, Source, Sources
from longvpo_hf.intake.store import VideoStore, is_macos_file, walk


class Corpus:
    """A corpus on disk.

    Args:
        root: The folder it was downloaded to.
        cache: Folder for what is unpacked of archives and Parquet.
        limits: See `IntakeLimits`.

    Raises:
        CorpusError: If the root is not a folder.
    """

    def __init__(self, root: Path, cache: Path, limits: IntakeLimits | None = None) -> None:
        if not root.is_dir():
            raise CorpusError(f"{root} is no folder; give the folder that the corpus was downloaded to.")
        self.root = Path(os.path.abspath(root))  # FFmpeg takes a relative `12:30.mp4` for a protocol
        self.cache = cache
        self.limits = limits or IntakeLimits()
        self._store: VideoStore | None = None
        self._problems: list[Dropped] = []

    def open_store(self, archives: Sequence[Archive] | None = None) -> VideoStore:
        """The corpus' videos.

        Args:
            archives: The archives that hold some; None for all.
        """
        self._store = VideoStore(self.root, self.cache, self.limits, archives)
        return self._store

    @property
    def store(self) -> VideoStore:
        """The corpus' videos: those of `open_store`, by default in all archives."""
        return self._store or self.open_store()

    def files(self, *patterns: str) -> list[Path]:
        """Its files whose names match, in order; hidden ones and those in hidden folders are passed over.

        Args:
            patterns: As in a shell, in lower case; the case of names does not matter.
        """
        found = []
        for path in walk(self.root, self.cache):
            if path.is_dir() or not any(fnmatch(path.name.lower(), pattern) for pattern in patterns):
                continue
            name = path.relative_to(self.root).as_posix()
            if is_macos_file(name):
                self._problems.append(Dropped("macos_file", str(path)))
            elif not any(part.startswith(".") for part in name.split("/")):
                found.append(path)
        return found

    def records(self, *patterns: str, paths: Iterable[Path] | None = None) -> Iterator[Record | Dropped]:
        """The records of its files whose names match, or of these files.

        Raises:
            CorpusError: If no file matches.
        """
        files = list(self.files(*patterns) if paths is None else paths)
        if not files:
            raise CorpusError(f"{self.root} holds no {' or '.join(patterns)}; get the corpus' records, too.")
        for path in files:
            yield from read_records(path, self.limits)

    def each(
        self, records: Iterable[Record | Dropped], make: Callable[[Record], Iterable[Source | Dropped]]
    ) -> Sources:
        """What `make` makes of each record; a drop in the place of one that is malformed."""
        for record in records:
            if isinstance(record, Dropped):
                yield record
                continue
            try:
                yield from make(record)
            except BadRecord as error:
                yield error.dropped()
            yield from self.take_problems()
        yield from self.take_problems()

    def take_problems(self) -> list[Dropped]:
        """Drops of files and archives that are no record's, since the last call."""
        problems, self._problems = self._problems, []
        return problems + self.store.take_problems()

    def source(
        self,
        record: Record,
        name: str,
        source_id: str,
        *,
        caption: str = "",
        licence: str = "",
        archive: str | None = None,
        film: str = "",
        film_start_seconds: float | None = None,
    ) -> Source | Dropped:
        """The video that a record names, as a source.

        Args:
            record: Names it.
            name: The name.
            source_id: See `Source`, as for the rest.
            caption: What it shows.
            licence: Its licence.
            archive: The archive it is in, where the record says so.
            film: The film it is a scene of.
            film_start_seconds: Where in the film it starts.
        """
        place = self.store.locate(name, source_id, record.folder, record.stem, archive)
        if isinstance(place, Dropped):
            return place
        return self.stored(
            place, name, source_id, caption=caption, licence=licence, film=film, film_start_seconds=film_start_seconds
        )

    def stored(
        self,
        path: Path,
        name: str,
        source_id: str,
        *,
        caption: str = "",
        licence: str = "",
        scenes: tuple[Scene, ...] = (),
        film: str = "",
        film_start_seconds: float | None = None,
    ) -> Source:
        """A file of the corpus' store as a source; see `source`."""
        base = PurePosixPath(name.replace("\\", "/")).name
        return Source(
            path, caption, source_id, licence, scenes, self.store.sha256(path), base, film, film_start_seconds
        )


def sentences(texts: Iterable[str]) -> str:
    """Texts as one, each a sentence."""
    stripped = (text.strip().rstrip(".") for text in texts)
    return " ".join(f"{text}." for text in stripped if text)
