"""Files and folders that appear whole or not at all, locks on outputs, digests, and the journal of finished work.

Whatever a run leaves on disk for a later run goes through here: a process killed between any two operations, or a
machine that loses power, leaves the old artefact or the new one under its name, and nothing half-written that a later
run could mistake for either.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from longvpo_hf.errors import LongVPOError, StorageError, storage_error

#: A finished piece of work, a remembered answer: JSON.
Fields = dict[str, Any]

#: What is read of a long file for its digest.
_PIECES, _PIECE_BYTES = 64, 1024**2
#: Ends the name of a file or folder that is being written.
PART = ".part"
#: Of a name that a stranger chose. File systems allow 255, and while a file is written its name is longer.
_MAX_NAME_BYTES = 150
#: After so long nobody on another machine is still writing a part of a file.
_STALE_SECONDS = 24 * 3600
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
#: How a file system says that it has no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)


class Locked(LongVPOError, RuntimeError):
    """Another run is writing this output."""


# ------------------------------------------------------------------------------------------------------------ digests


def digest(value: Any) -> str:
    """16 hexadecimal digits that follow from the content of a JSON value alone."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_digest(path: str | Path) -> str:
    """The SHA-256 of a file of at most 64 MiB; of a longer one, of 64 pieces of 1 MiB, first and last among them.

    A file that was cut, replaced, or left without its content by a power cut has another, and so has a short one of
    which any bit changed. It takes a tenth of a second, however long the file is.
    """
    size = os.path.getsize(path)
    if size <= _PIECES * _PIECE_BYTES:
        return file_digest(path)
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(_PIECES):
            file.seek((size - _PIECE_BYTES) * number // (_PIECES - 1))
            found.update(file.read(_PIECE_BYTES))
    return found.hexdigest()


# ----------------------------------------------------------------------------------------------------- whole artefacts


def make_folder(folder: Path) -> None:
    """Makes a folder, and those it is in, where there is none.

    Raises:
        StorageError: If a file has its name, or if it is where the system makes none, as under `/proc`.
        OSError: If the system refuses for another reason; `storage_error` knows those.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError(
            f"{error.filename or folder}: a file has the name of this folder. Name another place."
        ) from error
    except FileNotFoundError as error:
        raise StorageError(f"{folder}: the system makes no folder there. Name another place.") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets the system's refusal to write in the block name the file, which it does not do of itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _opened(part: Path, path: Path) -> IO[bytes]:
    try:
        return part.open("wb")
    except FileNotFoundError as error:  # though its folder is there, as under `/proc`
        raise StorageError(f"{path}: the system makes no file there. Name another place.") from error


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write into; it takes the name `path`, flushed to disk, when the block ends without an error."""
    part = _part_of(path)
    make_folder(path.parent)
    with naming(path):
        try:
            with _opened(part, path) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        _sync_folder(path.parent)


def first_file(path: Path, content: bytes, lasting: bool = True, parts: Path | None = None) -> bool:
    """Writes a file whole, unless one has its name by then: of several writers, on whatever machines, the first wins.

    Args:
        path: The file.
        content: What it is to hold.
        lasting: Whether it is flushed to disk, so that a power cut does not cost it.
        parts: Folder on the same disk where it is written; None: where it will be. Both are made if absent.

    Returns:
        Whether it holds this content; else it holds that of the first.
    """
    part = _part_of(path if parts is None else parts / path.name)
    make_folder(part.parent)
    with naming(path):
        try:
            with part.open("wb", buffering=0) as file:
                _write_all(file, content)
                if lasting:
                    os.fsync(file.fileno())
            if not _linked(part, path):
                return False
        finally:
            part.unlink(missing_ok=True)
        if lasting:
            _sync_folder(path.parent)
    return True


def file_with(content: bytes, name: str, folder: Path | None = None) -> Path:
    """A file for media that a dataset stores itself, as after `save_to_disk` or `Dataset.push_to_hub`.

    Args:
        content: Of the file.
        name: What the file was called, where that is known; its path, if any, is not used.
        folder: Where it is written; None: `longvpo_hf/videos` in `HF_HOME`.

    Returns:
        The same path for the same content and name. The file is written once.

    Raises:
        StorageError: If it cannot be written.
    """
    if folder is None:
        from huggingface_hub.constants import HF_HOME

        folder = Path(HF_HOME, "longvpo_hf", "videos")
    name = PurePosixPath(name).name
    if not name.isprintable() or "\\" in name or name in ("", "..") or len(name.encode()) > _MAX_NAME_BYTES:
        name = "video"
    path = folder / hashlib.sha256(content).hexdigest()[:20] / name
    if not path.is_file() or path.stat().st_size != len(content):
        try:
            with whole_file(path) as file:
                file.write(content)
        except OSError as error:
            raise storage_error(error) or error from error
    return path


def _linked(part: Path, path: Path) -> bool:
    """Gives a file a second name, unless that is taken."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except FileNotFoundError:
        if not part.exists():
            raise
        make_folder(path.parent)  # another may have made it since
        return _linked(part, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():  # without links, two that look in the same instant both write, and the last one stays
            return False
        part.replace(path)
    return True


def _part_of(path: Path) -> Path:
    """What a file is called while it is written: a name of this process, on this machine, and of this one try."""
    return path.with_name(f"{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}{PART}")


def remove_parts(folder: Path, name: str = "") -> None:
    """Removes what killed runs left half-written in a folder: of the files whose names start with `name`.

    Others may be writing there. Parts of this machine's living processes stay, and so do those of another machine
    until they are a day old.
    """
    for part in folder.glob(f"{glob.escape(name)}*{PART}"):
        if part.is_file() and not _is_written(part):
            part.unlink(missing_ok=True)


def _is_written(part: Path) -> bool:
    """Whether somebody may still be writing a part of a file."""
    import psutil

    _, host, pid, _, _ = ("." * 4 + part.name).rsplit(".", 4)
    if host == _HOST and pid.isdecimal():
        return psutil.pid_exists(int(pid))
    try:
        return time.time() - part.stat().st_mtime < _STALE_SECONDS
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole, in UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole, for people to read: two spaces of indentation."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; it takes the name `folder` when the block ends without an error.

    What was there is replaced in one step, so that at every instant the name stands for the old folder or the new one.
    """
    part = folder.with_name(folder.name + PART)
    between = _between(folder)
    if between.exists() and not folder.exists():  # killed between the renamings of a system that cannot exchange names
        between.rename(folder)
    for stray in (part, between):
        shutil.rmtree(stray, ignore_errors=True)
    make_folder(part)
    try:
        with naming(folder):
            yield part
        for path in part.rglob("*"):
            if path.is_file():
                sync(path)
        _put_in_place(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _put_in_place(part: Path, folder: Path) -> None:
    if folder.exists():
        _exchange(part, folder)
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.rename(folder)
    _sync_folder(folder.parent)


def _exchange(one: Path, other: Path) -> None:
    """Exchanges the names of two folders: in one step on Linux, by way of a third name elsewhere."""
    if sys.platform == "linux":
        at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename is not None and rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
            return
        # Not every file system can: network and overlay ones among them.
    between = _between(other)
    other.rename(between)
    one.rename(other)
    between.rename(one)


def _between(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old{PART}")


def sync(path: Path) -> None:
    """Makes a file last through a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a renaming last through a power cut, where folders can be flushed."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------------------------------- locks


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps every other run from writing `output` until the block ends. Blocks of one thread may be nested.

    The lock is released by the system when the process dies, however it dies. Its file, `.NAME.lock` beside the output,
    goes with the lock; one that a killed run left is used by the next, and goes with that.

    Raises:
        Locked: At once, if another run holds it; the message names that run.
        StorageError: If no file can be made beside it, or it is the current folder or the root, by such names.
    """
    from filelock import FileLock, Timeout

    if output.name in ("", ".."):  # files that belong to it are called after it
        raise StorageError(f"{output} is not the name of a folder of its own: name one, such as rows.")
    path = output.with_name(f".{output.name}.lock")
    make_folder(path.parent)
    owner = path.with_name(f"{path.name}.json")
    lock = FileLock(path, is_singleton=True)  # one for this path, which counts who holds it
    is_outermost = not lock.is_locked
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if path.exists():
                raise Locked(
                    f"{output} is being written by another run{_owner(owner)}: wait for it, or name another."
                ) from None
            # It has gone with the lock of a run that ended just now, or no file can be made there.
            with naming(path), _opened(part := _part_of(path), output):
                part.unlink()
    try:
        if is_outermost:
            remove_parts(owner.parent, owner.name)
            write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        if is_outermost:
            owner.unlink(missing_ok=True)
            # While it is held: whoever opened the file before finds, when the lock is his, that it has no name any
            # more, and starts over (filelock looks at `st_nlink`).
            path.unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f" (process {found['pid']} on {found['host']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun or ended
        return ""


# --------------------------------------------------------------------------------------------------------- the journal


class Log:
    """Lines that are appended one by one while work is under way, so that a killed run loses none of them.

    Each line is sealed with its own digest: what a kill or a power cut has torn is passed over by the next run. A kill
    of the process costs no line that was appended; a power cut may cost the last seconds.

    Args:
        path: The file; made with the first line.

    Attributes:
        entries: What earlier runs appended.
        is_final: Whether what the work gives may be stored as finished; where not, the next run works it again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _read_log(path)
        self.is_final = True
        self._file: IO[bytes] | None = None

    def append(self, fields: Fields) -> None:
        """Appends a line; it has left this process when the call returns."""
        body = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with naming(self.path):
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)  # so that nothing torn is written after an error
                self._file.write(b"\n")  # ends a line that an earlier run may have left torn
            _write_all(self._file, body + b"\t" + _seal(body) + b"\n")

    def close(self) -> None:
        """Closes the file; a later line would open it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Removes the file: what it held is kept elsewhere."""
        self.close()
        self.path.unlink(missing_ok=True)


def _write_all(file: IO[bytes], content: bytes) -> None:
    """Writes to a file without a buffer, which may take a part at a time."""
    while content:
        content = content[file.write(content) :]


def _seal(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()


def _read_log(path: Path) -> list[Fields]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        body, _, seal = line.rpartition(b"\t")  # JSON escapes tabs
        if body and seal == _seal(body):
            entries.append(json.loads(body.decode("utf-8", "surrogatepass")))
    return entries


class Journal:
    """Finished pieces of work under one folder: a run that is called again does only what is missing.

    A piece is one file that appears whole, under the digest of all it follows from: other settings, clips or models ask
    for other files and never meet stale ones. Each file carries the digest of its content, so that a torn one is
    recognised and its work done again. While a piece is under way its answers are in a `Log` beside it, which goes when
    the piece is there. Any number of processes and machines may work in one folder; of two that do the same piece, the
    first to end gives it.

    Args:
        folder: Where the pieces are; made if absent.
        follows_from: All that every piece's result follows from besides its own inputs, e.g. settings and models; JSON.

    Attributes:
        base: The digest of `follows_from`.
        num_reused: How many pieces an earlier run had finished.
    """

    def __init__(self, folder: Path, follows_from: Any) -> None:
        self.folder = folder
        self.base = digest(follows_from)
        self.num_reused = 0
        make_folder(folder)
        remove_parts(folder)

    def finished(self, name: str, inputs: Any) -> list[Fields] | None:
        """What a piece gave, if it is there; see `piece`."""
        return _read_piece(self._path(name, inputs))

    def piece(self, name: str, inputs: Any, work: Callable[[Log], Sequence[Fields]]) -> list[Fields]:
        """What `work` returns, done now or in an earlier run.

        Args:
            name: Starts the file's name, for whoever looks into the folder.
            inputs: What this piece follows from; JSON.
            work: Does it; returns JSON. It gets the log of the piece, with what a killed run had appended.
        """
        path = self._path(name, inputs)
        finished = _read_piece(path)
        log = Log(path.with_suffix(".log"))
        if finished is not None:
            log.remove()  # of a run that was killed in between
            self.num_reused += 1
            return finished
        try:
            lines = [json.dumps(fields, ensure_ascii=False) + "\n" for fields in work(log)]
        finally:
            log.close()
        # As a later run will read it: what JSON changes (tuples, keys) is changed in both.
        given: list[Fields] = [json.loads(line) for line in lines]
        if log.is_final:
            body = "".join(lines).encode("utf-8", "surrogatepass")
            content = body + json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n"
            if not first_file(path, content):
                others = _read_piece(path)
                if others is None:  # a torn one
                    with whole_file(path) as file:
                        file.write(content)
                given = given if others is None else others
            log.remove()
        return given

    def _path(self, name: str, inputs: Any) -> Path:
        return self.folder / f"{name}-{digest([self.base, inputs])}.jsonl"


def _read_piece(path: Path) -> list[Fields] | None:
    """A finished piece; None if there is none, or if it is not what was written."""
    try:
        *lines, seal = path.read_bytes().splitlines(keepends=True)
        if json.loads(seal) != {"sha256": hashlib.sha256(b"".join(lines)).hexdigest()}:
            return None
        return [json.loads(line.decode("utf-8", "surrogatepass")) for line in lines]
    except (OSError, ValueError):
        return None
