"""What a corpus says of its videos: records read one by one, and the `Source` a reader makes of each.

Takes jsonl, json (a list), csv and parquet files; gives `Record`s whose fields are checked as they are asked for, so
that an error names file, record and field. Memory does not grow with the file; of Parquet, a row group may be held.
Knows nothing of any one corpus, of archives or of video.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from longvpo_hf.errors import CorpusError

#: Files that hold records.
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_READ_BYTES = 1024**2
#: No record of text is longer; a json file that seems to hold one is broken.
_MAX_RECORD_CHARACTERS = 64 * 1024**2
_BETWEEN = re.compile(r"[,\s]*")
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:[.,]\d+)?)")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Scene:
    """A span of a source that its corpus names, in source seconds; not yet checked against the video.

    Args:
        start_seconds: First instant.
        end_seconds: First instant after.
        caption: What it shows; empty where the corpus says nothing.
    """

    start_seconds: float
    end_seconds: float
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A video file of a corpus and what the corpus says of it; not yet opened.

    Args:
        path: The local file.
        caption: What the whole video shows; empty where the corpus says nothing.
        source_id: The corpus' name for the video.
        licence: Its licence; empty where the corpus gives none.
        scenes: The scenes the corpus names, in order; empty where it names none.
        sha256: Hash of the file's bytes, where it is known already.
        name: What the corpus calls the file, where `path` is an extracted one of another name.
    """

    path: Path
    caption: str = ""
    source_id: str = ""
    licence: str = ""
    scenes: tuple[Scene, ...] = ()
    sha256: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """Fields of one record, and where they stand.

    Args:
        file: The file, as an error names it.
        place: The record in it, e.g. `line 3`.
        fields: The values by name.
        within: Name of the field that `fields` are in; empty for the record itself.
    """

    file: str
    place: str
    fields: Mapping[str, Any]
    within: str = ""

    def get(self, name: str, kind: type[T]) -> T:
        """The field `name`; a dot leads into a field of a field.

        Raises:
            CorpusError: If it is absent, or no `kind`.
        """
        value = self._walk(name)
        if value is None:
            raise self.error(name, f"is missing; a {kind.__name__} is expected")
        return self._checked(name, value, kind)

    def find(self, name: str, kind: type[T]) -> T | None:
        """The field `name` as `get` gives it; None where it is absent or null.

        Raises:
            CorpusError: If it is there and no `kind`.
        """
        value = self._walk(name)
        return None if value is None else self._checked(name, value, kind)

    def text(self, name: str) -> str:
        """The field `name`, text that is not empty.

        Raises:
            CorpusError: If it is absent, no text, or empty.
        """
        text = self.get(name, str).strip()
        if not text:
            raise self.error(name, "is empty")
        return text

    def items(self, name: str) -> Iterator[Record]:
        """The members of the list `name`, each a record of its own.

        Raises:
            CorpusError: If the field is no list, or a member has no fields.
        """
        for number, member in enumerate(self.get(name, list)):
            place = f"{self._full(name)}[{number}]"
            if not isinstance(member, Mapping):
                raise self.error(f"{name}[{number}]", f"has no fields but is {_shown(member)}")
            yield Record(self.file, self.place, member, place)

    def named(self, name: str) -> Iterator[tuple[str, Record]]:
        """The members of `name`, a field of named records, in the order of their names.

        Raises:
            CorpusError: If the field is none, or a member has no fields.
        """
        for key, member in sorted(self.get(name, dict).items()):
            if not isinstance(member, Mapping):
                raise self.error(f"{name}.{key}", f"has no fields but is {_shown(member)}")
            yield key, Record(self.file, self.place, member, self._full(f"{name}.{key}"))

    def seconds(self, name: str) -> float:
        """The field `name` as seconds: a number, or text such as `83.5`, `01:23.5` or `00:01:23,500`.

        Raises:
            CorpusError: If it is absent or neither.
        """
        value = self._walk(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
            return float(value)
        match = _CLOCK.fullmatch(value.strip()) if isinstance(value, str) else None
        if not match:
            raise self.error(name, f"must be seconds or a time such as 00:01:23.5, got {_shown(value)}")
        hours, minutes, seconds = match.groups()
        return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds.replace(",", "."))

    def error(self, name: str, problem: str) -> CorpusError:
        """An error that says where: file, record and field."""
        has = f" (it has {', '.join(map(str, list(self.fields)[:12]))})" if "missing" in problem else ""
        return CorpusError(f"{self.file}, {self.place}: field {self._full(name)!r} {problem}{has}.")

    def _full(self, name: str) -> str:
        return f"{self.within}.{name}" if self.within else name

    def _walk(self, name: str) -> Any:
        value: Any = self.fields
        for part in name.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(part)
        return value

    def _checked(self, name: str, value: Any, kind: type[T]) -> T:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, f"must be a {kind.__name__}, got {_shown(value)}")
        return value


def read_records(path: Path, rows_at_a_time: int = 1000) -> Iterator[Record]:
    """The records of a jsonl, json (a list), csv or parquet file, in order.

    Args:
        path: The file; its suffix says what it is.
        rows_at_a_time: Rows of a parquet file that are held at once; few where rows hold videos.

    Raises:
        CorpusError: If the file is missing, of another kind, or not what its suffix says.
    """
    import pyarrow as pa

    if not path.is_file():
        raise CorpusError(f"{path} is missing.")
    readers = {".jsonl": _jsonl, ".json": _json_list, ".csv": _csv}
    if path.suffix == ".parquet":
        rows = _parquet(path, rows_at_a_time)
    elif path.suffix in readers:
        rows = readers[path.suffix](path)
    else:
        raise CorpusError(f"{path} must be one of {', '.join(RECORD_SUFFIXES)}, got {path.suffix!r}.")
    try:
        for place, value in rows:
            if not isinstance(value, Mapping):
                raise CorpusError(f"{path}, {place}: a record with named fields is expected, got {_shown(value)}.")
            yield Record(str(path), place, value)
    except (UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise CorpusError(f"{path} is no readable {path.suffix} file: {str(error).splitlines()[0]}.") from error


def json_record(text: str | bytes, file: str) -> Record:
    """A json file that holds one record.

    Raises:
        CorpusError: If it does not.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(f"{file} is no readable json: {error}.") from error
    if not isinstance(value, Mapping):
        raise CorpusError(f"{file}: a record with named fields is expected, got {_shown(value)}.")
    return Record(file, "the record", value)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise CorpusError(f"{path}, line {number}: no readable json: {error}.") from error


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """The members of the list a json file holds, without holding the list: such files have gigabytes."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        buffer = file.read(_READ_BYTES).lstrip()
        if not buffer.startswith("["):
            raise CorpusError(f"{path}: a list of records is expected, got {_shown(buffer[:40])}.")
        at, number = 1, 0
        while True:
            at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if buffer.startswith("]", at):
                return
            try:
                value, at = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                more = file.read(_READ_BYTES) if len(buffer) - at < _MAX_RECORD_CHARACTERS else ""
                if not more:
                    raise CorpusError(f"{path}, record {number}: no readable json: {error}.") from error
                buffer, at = buffer[at:] + more, 0
                continue
            yield f"record {number}", value
            number += 1


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_MAX_RECORD_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        for row in rows:
            yield f"line {rows.line_num}", row


def _parquet(path: Path, rows_at_a_time: int) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as pq

    # Read page by page; but a writer may have put a whole row group into one page.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
        number = 0
        for batch in file.iter_batches(batch_size=rows_at_a_time):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
