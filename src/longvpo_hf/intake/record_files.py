"""Files of records: JSON Lines, a JSON list, CSV or Parquet, read one record at a time.

A malformed record is given as a named drop in its place, and reading goes on after it. Memory is bounded by one record,
however long the file and whatever is in it.

The JSON list is read by `json.JSONDecoder.raw_decode`, not by ijson: that ends a file at its first malformed record,
NaN or byte-order mark, and replaces half a character silently.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from longvpo_hf.errors import CorpusError, check_machine
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.limits import MIB, IntakeLimits
from longvpo_hf.intake.parquet import parquet_rows
from longvpo_hf.intake.records import BadRecord, Record, first_line, shown_value

#: Files that hold records.
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_READ_BYTES = MIB
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
#: Where a value of a JSON list that cannot be read may end: strings are passed over whole.
_STRUCTURE = re.compile(r'["\[\]{},]')
_IN_STRING = re.compile(r'["\\\n]')
_SPACE, _BETWEEN = re.compile(r"[ \t\r\n]*"), re.compile(r"[, \t\r\n]*")
_DECODER = json.JSONDecoder()
#: `-Infinity` and `\ud83d\ude00` are the longest of what JSON may break off in.
_LONGEST_TOKEN = 16


def read_records(
    path: Path, limits: IntakeLimits | None = None, columns: Iterable[str] = ()
) -> Iterator[Record | Dropped]:
    """The records of a JSON Lines, JSON (a list), CSV or Parquet file, in order; drops where one is malformed.

    Args:
        path: The file; its suffix says what it is.
        limits: See `IntakeLimits`.
        columns: The columns of a Parquet file that are read; empty for all.

    Raises:
        CorpusError: If the file is missing or of another kind.
    """
    if not path.is_file():
        raise CorpusError(f"{path} is missing.")
    suffix = path.suffix.lower()
    if suffix not in RECORD_SUFFIXES:
        raise CorpusError(f"{path} must be one of {', '.join(RECORD_SUFFIXES)}, got {path.suffix!r}.")
    limits = limits or IntakeLimits()
    rows = _parquet(path, limits, tuple(columns)) if suffix == ".parquet" else _text_rows(path, suffix, limits)
    try:
        for place, value in rows:
            if isinstance(value, BadRecord):
                yield value.dropped()
            elif isinstance(value, Mapping):
                yield Record(str(path), place, value, folder=path.parent)
            else:
                problem = f"a record with named fields is expected, got {shown_value(value)}."
                yield BadRecord(str(path), place, problem).dropped()
    except (BadRecord, OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        check_machine(error)
        bad = error if isinstance(error, BadRecord) else BadRecord(str(path), "", _unreadable(suffix, error))
        yield bad.dropped()


def json_record(content: IO[bytes], file: str, limits: IntakeLimits, folder: Path | None = None) -> Record:
    """A JSON file that holds one record.

    Args:
        content: The file.
        file: Its name, as an error shows it.
        limits: Bounds its bytes.
        folder: See `Record`.

    Raises:
        BadRecord: If it does not.
    """
    text = content.read(limits.max_record_bytes + 1)
    if len(text) > limits.max_record_bytes:
        raise BadRecord(file, "the record", _too_long(limits))
    value = _json(text, file, "")
    if isinstance(value, BadRecord):
        raise value
    if not isinstance(value, Mapping):
        raise BadRecord(file, "", f"must hold a record with named fields, got {shown_value(value)}.")
    return Record(file, "the record", value, folder=folder)


def _json(text: str | bytes, file: str, place: str) -> Any:
    """The value that JSON text holds, or a `BadRecord`."""
    try:
        return json.loads(text.removeprefix(_BOM).decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        return BadRecord(file, place, f"{'' if place else 'is '}no readable json: {first_line(error)}.")


def _text_rows(path: Path, suffix: str, limits: IntakeLimits) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        if file.read(2) in _UTF_16:
            raise BadRecord(str(path), "", f"is no readable {suffix} file: it is in UTF-16; save it in UTF-8.")
        file.seek(0)
        yield from {".jsonl": _jsonl, ".json": _json_list, ".csv": _csv}[suffix](file, str(path), limits)


def _jsonl(file: IO[bytes], path: str, limits: IntakeLimits) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(file, limits), 1):
        place = f"line {number}"
        if line is None:
            yield place, BadRecord(path, place, _too_long(limits))
        elif line.strip():
            yield place, _json(line, path, place)


def _lines(file: IO[bytes], limits: IntakeLimits) -> Iterator[bytes | None]:
    """The lines of a file, each without its byte-order mark; None for one that is too long."""
    while line := file.readline(limits.max_record_bytes + 1):
        if len(line) <= limits.max_record_bytes:
            yield line.removeprefix(_BOM)
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_READ_BYTES)
        yield None


def _json_list(file: IO[bytes], path: str, limits: IntakeLimits) -> Iterator[tuple[str, Any]]:
    """The members of the list in a JSON file, without holding the list: such files have gigabytes."""
    text = _Text(file)
    text.skip(_SPACE)
    if not text.starts_with("["):
        raise BadRecord(
            path, "", f"is no readable json: a list of records is expected, got {shown_value(text.start(40))}."
        )
    text.at += 1
    number = 0
    while True:
        text.skip(_BETWEEN)
        if text.starts_with("]"):
            return
        if not text.start(1):
            raise BadRecord(path, "", "is no readable json: the list does not end; get the file again.")
        yield f"record {number}", _member(text, path, f"record {number}", limits)
        number += 1


def _member(text: _Text, path: str, place: str, limits: IntakeLimits) -> Any:
    """The next member of the list; a `BadRecord` where it cannot be read, and was passed over."""
    problem = ""
    while not problem:
        try:
            value, end = _DECODER.raw_decode(text.buffer, text.at)
        except (ValueError, RecursionError) as error:
            if len(text.buffer) - text.at > limits.max_record_bytes:
                problem = _too_long(limits)
            elif not (_is_cut_off(error, text.buffer) and text.more()):
                problem = f"no readable json: {first_line(error)}."
        else:
            too_long = end - text.at > limits.max_record_bytes
            text.at = end
            return BadRecord(path, place, _too_long(limits)) if too_long else value
    if not text.pass_over_member():
        problem += " The records after it cannot be told apart."
    return BadRecord(path, place, problem)


def _is_cut_off(error: Exception, buffer: str) -> bool:
    """Whether JSON may be unreadable because its end has not been read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(buffer) - _LONGEST_TOKEN


class _Text:
    """The text of a file, read in pieces: `buffer` holds what has been read, `at` is the position in it."""

    def __init__(self, file: IO[bytes]) -> None:
        # What is not UTF-8 becomes half characters, which cost the record that they are in.
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
        self.buffer = ""
        self.at = 0

    def more(self) -> bool:
        """Reads on, and forgets what is before `at`; whether there was more."""
        new = self._file.read(_READ_BYTES)
        self.buffer = self.buffer[self.at :] + new
        self.at = 0
        return bool(new)

    def start(self, number: int) -> str:
        """The next characters: so many, or fewer at the end of the file."""
        while len(self.buffer) - self.at < number and self.more():
            pass
        return self.buffer[self.at : self.at + number]

    def starts_with(self, character: str) -> bool:
        """Whether this character is next."""
        return self.start(1) == character

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Passes over what is next and matches."""
        while True:
            self.at = pattern.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.buffer) or not self.more():
                return

    def pass_over_member(self) -> bool:
        """Goes to the comma or bracket after a member of a list that cannot be read; False at the end of the file.

        Brackets and braces are counted outside strings. A string ends with its line at the latest, so that a missing
        quotation mark costs one line of a file that has lines.
        """
        depth, in_string, closed = 0, False, False
        while True:
            match = (_IN_STRING if in_string else _STRUCTURE).search(self.buffer, self.at)
            if match is None:
                self.at = len(self.buffer)
                if not self.more():
                    return False
                continue
            character = match.group()
            if depth == 0 and not in_string and (character in ",]" or (closed and character in "[{")):
                self.at = match.start()
                return True
            self.at = match.end()
            if in_string:
                if character == "\\":
                    self.at += len(self.start(1))
                else:
                    in_string = False
            elif character == '"':
                in_string = True
            elif character in "[{":
                depth += 1
            elif character in "]}" and depth:
                depth -= 1
                closed = depth == 0


class _CsvLines:
    """Lines for `csv.reader`, which adds those of a quoted field together: bounded for each row."""

    def __init__(self, file: IO[bytes], limits: IntakeLimits) -> None:
        self._lines = _lines(file, limits)
        self._limits = limits
        self._num_bytes = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._num_bytes += len(line or b"")
        if line is None or self._num_bytes > self._limits.max_record_bytes:
            self.start_row()
            raise csv.Error(_too_long(self._limits))
        return line.decode("utf-8", "surrogateescape")

    def start_row(self) -> None:
        """Counts from here."""
        self._num_bytes = 0


def _csv(file: IO[bytes], path: str, limits: IntakeLimits) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(limits.max_record_bytes)
    lines = _CsvLines(file, limits)
    rows = csv.reader(lines, strict=True)
    names: list[str] = []
    while True:
        lines.start_row()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if not names:
                raise
            yield "", BadRecord(path, f"line {rows.line_num}", f"no readable csv: {first_line(error)}.")
            continue
        place = f"line {rows.line_num}"
        if not names:
            names = row
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise BadRecord(path, place, f"the column {shown_value(repeated[0])} is there more than once.")
        elif len(row) > len(names):
            problem = f"{len(row)} fields in {len(names)} columns; put fields that hold commas into quotation marks."
            yield place, BadRecord(path, place, problem)
        elif row:
            yield place, dict(zip(names, row, strict=False))


def _parquet(path: Path, limits: IntakeLimits, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for place, fields in parquet_rows(path, limits, columns):
        yield place, BadRecord(str(path), place, fields) if isinstance(fields, str) else fields


def _too_long(limits: IntakeLimits) -> str:
    return f"longer than max_record_bytes={limits.max_record_bytes}."


def _unreadable(suffix: str, error: Exception) -> str:
    return f"is no readable {suffix} file: {first_line(error)}."
