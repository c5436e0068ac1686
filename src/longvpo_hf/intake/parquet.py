"""Parquet files of strangers, read in a process of their own whose memory is bounded.

What a Parquet file unpacks to is said by its index and its pages, and both may lie: a row of a kilobyte can become a
list of a billion members, and Arrow believes the file. So Arrow reads it in a process that may hold no more than a
bound (on Linux; elsewhere only what the index says is checked). What exceeds the bound, or ends that process, costs
its row group.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from longvpo_hf.errors import CorpusError
from longvpo_hf.intake.limits import MIB, IntakeLimits
from longvpo_hf.intake.records import BadRecord, first_line
from longvpo_hf.processes import end_with_parent

_READ_BYTES = MIB
#: A row group that unpacks to more than this is refused if it is that much larger than on disk.
_SUSPICIOUS_BYTES = 256 * MIB
#: So many rows may be in a file of any size: others can be stored in no room at all.
_FREE_ROWS = 2**20
_MEMBER_BYTES = 16
#: What the rows that are held at once may take, if each is as large as its row group.
_BATCH_BYTES = 64 * MIB
_ROWS_AT_A_TIME = 1_000
#: Ends of a Parquet file: the length of its own index, and its mark.
_FOOTER_BYTES = 8
#: What the process that reads may allocate, in `max_row_bytes`: measured for one row of random bytes, with zstd and
#: without, that Arrow unpacks into growing buffers, Python copies, and the pipe copies again.
_COPIES = 6
#: What it may allocate besides: Arrow's and Python's own, the index, and batches of small rows.
_OTHER_BYTES = 64 * MIB

#: A process that reads ends when it has had nothing to do for so long.
_IDLE_SECONDS = 10.0
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); from longvpo_hf.intake.parquet import serve; serve(int(sys.argv[2]))"
)
#: Where rows are in a file, and their fields, or what is wrong with them.
_Rows = list[tuple[str, "dict[str, Any] | str"]]


def parquet_rows(
    path: Path, limits: IntakeLimits, columns: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The place and the fields of each row, in order; for what cannot be read, its place and what is wrong with it.

    Args:
        path: The file.
        limits: `max_row_bytes`, `max_expansion` and `max_index_bytes` bound it.
        columns: The columns that are read; empty for all.

    Raises:
        BadRecord: If it declares more than a bound.
        CorpusError: If the process that reads it is ended from outside.
        OSError: If it cannot be read, or is no Parquet file.
        pyarrow.ArrowException: If it is no Parquet file.
    """
    group = 0
    while True:
        reader = _Reader.ready()
        is_open = False
        try:
            for found in reader.read(path, limits, columns, group):
                is_open = True
                group, rows = found
                yield from rows
            return
        except MemoryError:
            bound = f"{_COPIES} times max_row_bytes={limits.max_row_bytes} and {_OTHER_BYTES} bytes of memory"
            yield f"row group {group}", f"it needs more than {bound}."
            group += 1
            continue
        except EOFError:
            status = reader.end()
        finally:
            reader.release()
        if -status in (signal.SIGKILL, signal.SIGTERM):
            raise CorpusError(f"{path}: the process that reads it was ended from outside (signal {-status}).")
        problem = f"reading it ended the process that reads (status {status})."
        if not is_open:
            raise BadRecord(str(path), "", f"is no readable .parquet file: {problem}")
        yield f"row group {group}", problem
        group += 1


class _Reader:
    """A process that reads one file after another. It is this module alone, started as a program: a worker of
    `multiprocessing` would run the user's script once more."""

    _idle: ClassVar[list[_Reader]] = []

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-P", "-c", _PROGRAM, root, str(theirs.fileno())]
        # Arrow's other pools reserve more than they use.
        environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        self._is_idle = True

    @classmethod
    def ready(cls) -> _Reader:
        """One that waits: an idle one, or a new one."""
        while cls._idle:
            reader = cls._idle.pop()
            with suppress(OSError, EOFError):
                reader._pipe.send(None)
                reader._pipe.recv()
                return reader
            reader.end()
        return cls()

    def read(self, *request: Any) -> Iterator[tuple[int, _Rows]]:
        """What `_rows_of` gives.

        Raises:
            EOFError: If the process ends.
        """
        self._is_idle = False
        self._pipe.send(request)
        while (found := self._pipe.recv()) is not None:
            if isinstance(found, Exception):
                self._is_idle = True
                raise found
            yield found
        self._is_idle = True

    def end(self) -> int:
        """Ends the process, if it has not ended itself; its status."""
        self._pipe.close()
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(1.0)
        self._process.kill()
        return self._process.wait()

    def release(self) -> None:
        """Keeps the process for the next file, or ends it in the middle of one."""
        if self._is_idle:
            self._idle.append(self)
        else:
            self._process.kill()
            self.end()


# ------------------------------------------------------------------------------------------ in the process that reads


def serve(descriptor: int) -> None:
    """Reads what is asked for, until nothing is asked for some time or the one that asks has ended.

    Args:
        descriptor: Of the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    end_with_parent()
    with Connection(descriptor) as pipe, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while pipe.poll(_IDLE_SECONDS):
            request = pipe.recv()
            if request is not None:
                try:
                    for found in _rows_of(*request):
                        pipe.send(found)
                except (BrokenPipeError, ConnectionResetError):
                    raise
                except Exception as error:  # whatever it is, it is raised where the rows are wanted
                    pipe.send(error)
                    continue
            pipe.send(None)


def _rows_of(
    path: Path, limits: IntakeLimits, columns: tuple[str, ...], first_group: int
) -> Iterator[tuple[int, _Rows]]:
    """The number of each row group from the first on, with some of its rows."""
    _bound_memory(_OTHER_BYTES + _COPIES * limits.max_row_bytes)
    _check_footer(path, limits)
    bound = limits.max_index_bytes
    # Read page by page; but a writer may have put a whole row group into one page.
    with pq.ParquetFile(
        path, pre_buffer=False, buffer_size=_READ_BYTES, thrift_string_size_limit=bound,
        thrift_container_size_limit=bound,
    ) as file:  # fmt: skip
        _check_rows(file, path, limits)
        names = [name for name in file.schema_arrow.names if not columns or name in columns]
        first = 0
        for index in range(file.num_row_groups):
            if index >= first_group:
                yield index, []
                for rows in _group(file, index, names, first, limits):
                    yield index, rows
            first += file.metadata.row_group(index).num_rows


def _bound_memory(num_bytes: int) -> None:
    """Lets this process allocate so much more than it has; beyond that, allocations fail with a MemoryError."""
    with suppress(OSError):
        found = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            bound = int(found[1]) * 1024 + num_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (bound, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _check_footer(path: Path, limits: IntakeLimits) -> None:
    """Refuses a Parquet file whose own index, which is held in memory, is too large."""
    with path.open("rb") as file:
        file.seek(-min(_FOOTER_BYTES, path.stat().st_size), 2)
        length = int.from_bytes(file.read(4), "little")
    if length > limits.max_index_bytes:
        problem = f"is no readable .parquet file: its index has {length} bytes, over max_index_bytes="
        raise BadRecord(str(path), "", f"{problem}{limits.max_index_bytes}.")


def _check_rows(file: pq.ParquetFile, path: Path, limits: IntakeLimits) -> None:
    """Refuses a file of more rows than its bytes can tell apart: rows that are all the same take no room."""
    num_rows = sum(file.metadata.row_group(index).num_rows for index in range(file.num_row_groups))
    num_bytes = path.stat().st_size
    if num_rows > max(_FREE_ROWS, limits.max_expansion * num_bytes):
        problem = f"is no readable .parquet file: {num_rows} rows in {num_bytes} bytes, over max_expansion="
        raise BadRecord(str(path), "", f"{problem}{limits.max_expansion:g} rows a byte.")


def _group(file: pq.ParquetFile, index: int, names: list[str], first: int, limits: IntakeLimits) -> Iterator[_Rows]:
    """The rows of a row group, some at a time."""
    group = file.metadata.row_group(index)
    place = f"rows {first} to {first + group.num_rows - 1}"
    unpacked, packed = _group_bytes(group, names)
    if unpacked > max(_SUSPICIOUS_BYTES, limits.max_expansion * packed):
        yield [(place, f"{packed} bytes unpack to {unpacked}, over max_expansion={limits.max_expansion:g} times.")]
        return
    # No value is larger than its row group says, where it tells the truth.
    num_rows = max(1, min(_ROWS_AT_A_TIME, _BATCH_BYTES // max(1, unpacked)))
    try:
        for batch in file.iter_batches(batch_size=num_rows, row_groups=[index], columns=names, use_threads=False):
            yield from _of_batch(batch, first, limits)
            first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the machine, not of the file
        yield [(place, f"is no readable .parquet file: {first_line(error)}.")]


def _group_bytes(group: Any, names: list[str]) -> tuple[int, int]:
    """How many bytes columns of a row group unpack to, as the file says, and have on disk."""
    unpacked = packed = 0
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema.split(".")[0] in names:
            packed += column.total_compressed_size
            # Members of lists may take no room in the file: runs of the same are stored once.
            unpacked += column.total_uncompressed_size + _MEMBER_BYTES * max(0, column.num_values - group.num_rows)
    return unpacked, packed


def _of_batch(batch: pa.RecordBatch, first: int, limits: IntakeLimits) -> Iterator[_Rows]:
    """The rows of a batch: all at once if they are small."""
    if batch.nbytes <= limits.max_record_bytes:
        with suppress(ValueError, OverflowError):  # one row is to blame
            yield [(f"row {first + index}", row) for index, row in enumerate(batch.to_pylist())]
            return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        besides = sum(column.nbytes for column in row.columns if not pa.types.is_binary(column.type))
        if row.nbytes > limits.max_row_bytes:
            fields: dict[str, Any] | str = f"{row.nbytes} bytes, over max_row_bytes={limits.max_row_bytes}."
        elif besides > limits.max_record_bytes:  # Python needs many times as much for it
            fields = f"{besides} bytes besides its videos, over max_record_bytes={limits.max_record_bytes}."
        else:
            try:
                fields = row.to_pylist()[0]
            except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates beyond Python's
                fields = f"no readable row: {first_line(error)}."
        yield [(f"row {first + index}", fields)]
