"""A folder of video files, in any layout, in the order of their paths.

Files `metadata.jsonl`, `.json`, `.csv` or `.parquet` in it, or in any folder below, say more: `file_name` (from the
file's own folder, or from the top) and where they are known `caption`, `source_id`, `licence`. Without a `source_id`,
the path under the folder is the id.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.corpus import Corpus
from longvpo_hf.intake.record_files import RECORD_SUFFIXES, read_records
from longvpo_hf.intake.records import BadRecord, Record, Source, Sources
from longvpo_hf.intake.store import is_macos_file, is_unknown, is_video, storable, walk
from longvpo_hf.paths import is_inside

_FIELDS = ("caption", "source_id", "licence")
#: Other names of a field.
_ALIASES = {"licence": "license"}


def read(corpus: Corpus) -> Sources:
    """A source for each video file; what metadata files say of files that are not there comes last, as drops."""
    corpus.open_store(archives=())
    described = _Described(corpus)
    for path in walk(corpus.root, corpus.cache):
        name = path.relative_to(corpus.root).as_posix()
        if not is_inside(corpus.root, path):
            yield Dropped("outside_root", str(path), name, f"a link to {path.resolve()}")
        elif is_macos_file(name):
            yield Dropped("macos_file", str(path), name)
        elif is_video(name) and storable(name) != name:
            yield Dropped("bad_name", str(path), name, "rename it to UTF-8: a row could not hold the name")
        elif is_video(name):
            caption, source_id, licence = described.take(name)
            yield Source(path, caption, source_id or name, licence)
        elif path.suffix.lower() in RECORD_SUFFIXES and not _is_metadata(path):
            yield Dropped(
                "unread_metadata", str(path), "", "metadata is read from metadata.jsonl, .json, .csv, .parquet"
            )
        elif not path.is_dir() and is_unknown(name):
            yield Dropped("unknown_suffix", str(path), name, f"{path.suffix or 'no suffix'} is no known video")
    yield from described.rest()


def _is_metadata(path: Path) -> bool:
    return path.stem.lower() == "metadata" and path.suffix.lower() in RECORD_SUFFIXES


class _Described:
    """What the metadata files say of the videos, kept on disk: it may be larger than memory."""

    def __init__(self, corpus: Corpus) -> None:
        self._root = corpus.root
        self._table = sqlite3.connect("")  # a temporary file
        self._table.execute("CREATE TABLE videos (name TEXT PRIMARY KEY, caption, source_id, licence, record)")
        self._table.execute("CREATE TABLE drops (reason, path, source_id, detail)")
        for path in corpus.files(*(f"metadata{suffix}" for suffix in RECORD_SUFFIXES)):
            for record in read_records(path, corpus.limits):
                try:
                    drop = record if isinstance(record, Dropped) else self._add(record, corpus)
                except BadRecord as error:
                    drop = error.dropped()
                if drop is not None:
                    self._table.execute("INSERT INTO drops VALUES (?, ?, ?, ?)", _columns(drop))

    def take(self, name: str) -> tuple[str, str, str]:
        """Caption, id and licence of the file `name`."""
        query = "SELECT caption, source_id, licence FROM videos WHERE name = ?"
        return self._table.execute(query, (name,)).fetchone() or ("", "", "")

    def rest(self) -> Iterator[Dropped]:
        """Records that are malformed or name no file, several files, or one that another record names."""
        for columns in self._table.execute("SELECT * FROM drops ORDER BY path, detail"):
            yield Dropped(*columns)

    def _add(self, record: Record, corpus: Corpus) -> Dropped | None:
        name = record.name("file_name")
        values = [record.find(field, str) or record.find(_ALIASES.get(field, field), str) or "" for field in _FIELDS]
        if values[1]:
            values[1] = record.name("source_id")
        place = corpus.store.locate(name, values[1] or name, record.folder)
        if isinstance(place, Dropped):
            return place
        name = place.relative_to(self._root).as_posix()
        if not is_video(name) or is_macos_file(name):
            return Dropped("unknown_suffix", name, values[1], f"{record.file}, {record.place} names it: no known video")
        where = f"{record.file}, {record.place}"
        row = self._table.execute("SELECT * FROM videos WHERE name = ?", (name,)).fetchone()
        if row is None:
            self._table.execute("INSERT INTO videos VALUES (?, ?, ?, ?, ?)", (name, *values, where))
            return None
        # Another record of the same video adds what the first does not say, and is reported where it says otherwise.
        first, before = row[1:4], row[4]
        merged = [old or new for old, new in zip(first, values, strict=True)]
        query = "UPDATE videos SET caption = ?, source_id = ?, licence = ? WHERE name = ?"
        self._table.execute(query, (*merged, name))
        other = [field for field, old, new in zip(_FIELDS, merged, values, strict=True) if new and new != old]
        if not other:
            return None
        detail = f"{record.place}: another {' and '.join(other)} of {name} than {before}, which is used"
        return Dropped("repeated_record", record.file, values[1] or name, detail)


def _columns(drop: Dropped) -> tuple[str, str, str, str]:
    return drop.reason, *(storable(text) for text in (drop.path, drop.source_id, drop.detail))  # type: ignore[return-value]
