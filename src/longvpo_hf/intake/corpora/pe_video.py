"""facebook/PE-Video: WebDataset tars of `KEY.mp4` and `KEY.json`.

The caption is the record's `human_caption` or else its `model_caption`; the id is the key's last part, with the tar's
name before it where another tar has the same key.
"""

from __future__ import annotations

import io
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from longvpo_hf.errors import CorpusError, check_machine
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.archives import DAMAGE, Archive, Damaged, Member, TooLarge
from longvpo_hf.intake.corpus import Corpus
from longvpo_hf.intake.limits import IntakeLimits
from longvpo_hf.intake.record_files import json_record
from longvpo_hf.intake.records import BadRecord, Source, Sources
from longvpo_hf.intake.store import is_unknown, is_video, storable

#: Names of files, and what is in them.
_Files: TypeAlias = list[tuple[str, bytes]]


def read(corpus: Corpus) -> Sources:
    """A video for each sample, tar by tar."""
    store = corpus.store
    if not store.archives:
        raise CorpusError(f"{corpus.root} holds no tar; PE-Video is made of tars of KEY.mp4 and KEY.json.")
    ids = _Ids()
    for archive in store.archives:
        samples = _Samples(archive)
        for number, member in store.members(archive):
            where = f"{archive.files[0]}::{member.name}"
            if is_video(member.name):
                place = store.unpacked(archive, number, member)
                samples.add(member.name, "refused" if isinstance(place, Dropped) else "video", os.fsencode(str(place)))
                if isinstance(place, Dropped):
                    yield place
            elif member.name.lower().endswith(".json") and not member.is_link:
                try:
                    samples.add(member.name, "json", _content(member, where, corpus.limits))
                except BadRecord as error:
                    yield error.dropped()
            elif is_unknown(member.name):
                yield Dropped("unknown_suffix", where, "", f"{PurePosixPath(member.name).suffix} is no known video")
        for pair in samples.pairs():
            try:
                yield pair if isinstance(pair, Dropped) else _source(corpus, archive, *pair, ids)
            except BadRecord as error:
                yield error.dropped()
        yield from corpus.take_problems()


def _content(member: Member, where: str, limits: IntakeLimits) -> bytes:
    try:
        with member.open() as content:
            text = content.read(limits.max_record_bytes + 1)
    except (Damaged, TooLarge, *DAMAGE) as error:
        check_machine(error)
        raise BadRecord(where, "", f"cannot be read: {error}.") from error
    if len(text) > limits.max_record_bytes:
        raise BadRecord(where, "the record", f"longer than max_record_bytes={limits.max_record_bytes}.")
    return text


def _source(corpus: Corpus, archive: Archive, key: str, path: Path, name: str, content: bytes, ids: _Ids) -> Source:
    record = json_record(io.BytesIO(content), f"{archive.files[0]}::{name}", corpus.limits)
    caption = record.find("human_caption", str) or record.find("model_caption", str)
    if not caption:
        raise record.error("human_caption", "is missing, and model_caption, too")
    base = PurePosixPath(key).name
    return corpus.stored(path, base + path.suffix, ids.unique(base, archive), caption=caption.strip())


class _Samples:
    """The files of one tar by their keys, kept on disk: whoever wrote the tar chose their number and order.

    WebDataset's key is a name up to its first dot; but `take 1.0.mp4` and `take 1.5.mp4` are two samples. So a video
    and a record belong together if their names are the same up to the last dot, and else if they alone have the same
    key.
    """

    def __init__(self, archive: Archive) -> None:
        self._where = str(archive.files[0])
        self._table = sqlite3.connect("")  # a temporary file
        self._table.execute("CREATE TABLE files (number INTEGER PRIMARY KEY, stem, key, kind, name, content)")
        self._table.execute("CREATE INDEX by_stem ON files (stem, kind)")
        self._table.execute("CREATE INDEX by_key ON files (key, kind)")

    def add(self, name: str, kind: str, content: bytes) -> None:
        """Adds a file: a video with its path, one that is refused, or a record with its text."""
        path = PurePosixPath(name)
        key = str(path.parent / path.name.split(".")[0])
        values = (storable(str(path.with_suffix(""))), storable(key), kind, storable(name), content)
        self._table.execute("INSERT INTO files (stem, key, kind, name, content) VALUES (?, ?, ?, ?, ?)", values)

    def pairs(self) -> Iterator[tuple[str, Path, str, bytes] | Dropped]:
        """Key and file of each video with name and text of its record; drops of what has no other or several."""
        stems = self._table.execute("SELECT stem, key FROM files GROUP BY stem ORDER BY min(number)")
        for stem, key in stems:
            videos, records = self._of("stem", stem, "video"), self._of("stem", stem, "json")
            refused = self._of("stem", stem, "refused")
            if not (videos or refused) or not records:
                of_key = [self._of("key", key, kind) for kind in ("video", "refused", "json")]
                if len(of_key[0]) + len(of_key[1]) == 1 and len(of_key[2]) == 1:
                    if not (videos or refused):
                        continue  # comes with its video
                    records = of_key[2]
            yield from self._sample(stem, videos, records, is_refused=bool(refused))

    def _sample(
        self, stem: str, videos: _Files, records: _Files, is_refused: bool
    ) -> Iterator[tuple[str, Path, str, bytes] | Dropped]:
        name = PurePosixPath(stem).name
        for again, _ in records[1:]:
            detail = f"sample {stem}: {again} is a second record of it; the first is used."
            yield Dropped("bad_record", self._where, name, detail)
        if len(videos) > 1:
            yield Dropped("ambiguous_name", f"{self._where}::{stem}", name, f"{len(videos)} different videos or more")
        elif videos and not records:
            yield Dropped("bad_record", self._where, name, f"sample {stem}: {name}.json is missing beside its video.")
        elif videos:
            yield stem, Path(os.fsdecode(videos[0][1])), *records[0]
        elif not is_refused:
            yield Dropped("missing_file", f"{self._where}::{stem}", name, "the sample has no video")

    def _of(self, column: str, value: str, kind: str) -> _Files:
        """Names and contents of the files of a stem or a key, without repetitions; the first few."""
        query = (
            f"SELECT name, content FROM files WHERE {column} = ? AND kind = ? GROUP BY content ORDER BY number LIMIT 3"
        )
        return self._table.execute(query, (value, kind)).fetchall()


class _Ids:
    """Ids that name one video each."""

    def __init__(self) -> None:
        self._table = sqlite3.connect("")  # a temporary file
        self._table.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def unique(self, name: str, archive: Archive) -> str:
        """The name, with that of its archive before it if there is another one."""
        is_new = self._table.execute("INSERT OR IGNORE INTO ids VALUES (?)", (name,)).rowcount
        return name if is_new else f"{archive.stem}/{name}"
