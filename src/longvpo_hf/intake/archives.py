"""Archives of a corpus: tars, plain, compressed or cut up by `split`, and zips, read in bounded memory.

An archive can lie about what it holds: headers, lists of contents and members that unpack to far more than the file.
What is read between two members, an archive's index, and all that it unpacks to are bounded (`IntakeLimits`).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from longvpo_hf.errors import CorpusError, check_machine
from longvpo_hf.intake.limits import MIB, IntakeLimits

_TAR = re.compile(r".+\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz)", re.DOTALL)
#: `videos.part.aa`, `videos.tar.partaa`, `videos.tar.gz.part-03`, `videos.tar.aa`: a tar cut up by `split`.
_PART = re.compile(r"(.+?)(?:[._-]part[._-]?|(?<=\.tar)\.|(?<=\.tar\.gz)\.|(?<=\.tgz)\.)([a-z]{2,3}|\d{1,4})")
#: RuntimeError is what zipfile says of an encrypted member, NotImplementedError of a compression it does not know.
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError),
    *(RuntimeError, NotImplementedError, ValueError, OverflowError, UnicodeError),
)

_BLOCK_BYTES = tarfile.RECORDSIZE
#: Between two members of a tar stand their headers; names of thousands of characters are the longest part of them.
_HEADER_BYTES = MIB
#: xz says how much memory it needs; its highest level needs 65 MiB.
_XZ_BYTES = 256 * MIB
#: A header may claim a size that the file does not have; tarfile would go on reading nothing.
_READS_AFTER_END = 8


class TooLarge(Exception):
    """More than a bound allows; the message names it."""


class Damaged(Exception):
    """The bytes of a member cannot be read."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive.

    Args:
        name: Its name there.
        open: Returns its bytes; only until the next member is taken. Raises `Damaged` or `TooLarge`.
        is_link: Whether it is a link, a device, a sparse file or the like instead of plain bytes.
        num_bytes: How many bytes it says it has.
    """

    name: str
    open: Callable[[], IO[bytes]]
    is_link: bool = False
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Archive:
    """A tar (plain or compressed), a zip, or a tar that `split` cut into parts.

    Args:
        name: As people call it: the file's name, without the part.
        files: The file, or its parts in order.
    """

    name: str
    files: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """The folder it is in."""
        return self.files[0].parent

    @property
    def stem(self) -> str:
        """Its name without suffixes."""
        return self.name.split(".")[0]

    @property
    def is_zip(self) -> bool:
        """Whether it is a zip: one damaged member leaves the others readable."""
        return self.name.lower().endswith(".zip")

    def num_bytes(self) -> int:
        """The size of its files."""
        return sum(file.stat().st_size for file in self.files)

    def members(self, limits: IntakeLimits | None = None) -> Iterator[Member]:
        """Its files, in order, in bounded memory; folders are passed over.

        Raises:
            CorpusError: If it is damaged, or exceeds a limit.
        """
        limits = limits or IntakeLimits()
        name = "its start"
        try:
            for member in self._zip(limits) if self.is_zip else self._tar(limits):
                name = member.name
                yield member
        except TooLarge as error:
            raise CorpusError(f"{self.files[0]}, after {name}: {error}") from error
        except DAMAGE as error:
            check_machine(error)
            raise self.damaged(name, error) from error

    def damaged(self, member: str, error: Exception) -> CorpusError:
        """The error of an archive whose bytes are wrong."""
        message = str(error) or type(error).__name__
        return CorpusError(f"{self.files[0]}, at {member}: the archive is damaged ({message}); get it again.")

    def _tar(self, limits: IntakeLimits) -> Iterator[Member]:
        with _Joined(self.files) as file:
            most = limits.expanded_bytes(self.num_bytes())
            content = _Metered(_unpacked(file), most, f"it unpacks to more than {most} bytes, see max_expansion")
            content.allow(_HEADER_BYTES + _BLOCK_BYTES)
            with tarfile.open(fileobj=content, mode="r|") as tar:
                while True:
                    content.allow(tar.offset + _HEADER_BYTES + _BLOCK_BYTES)
                    info = tar.next()
                    content.allow(None)
                    if info is None:
                        return
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member it has seen
                    if not info.isdir():
                        is_link = not info.isreg() or info.issparse()
                        yield Member(info.name, partial(_bytes_of, tar, info), is_link, info.size)

    def _zip(self, limits: IntakeLimits) -> Iterator[Member]:
        most = limits.expanded_bytes(self.num_bytes())
        opened_bytes = 0

        def opened(info: zipfile.ZipInfo) -> IO[bytes]:
            nonlocal opened_bytes
            opened_bytes += info.file_size
            if opened_bytes > most:
                raise TooLarge(f"the archive unpacks to more than {most} bytes, see max_expansion")
            try:
                return archive.open(info)
            except DAMAGE as error:
                check_machine(error)
                raise Damaged(str(error)) from error

        with _ZipFile(self.files[0], limits.max_index_bytes) as file, zipfile.ZipFile(file) as archive:
            file.max_read_bytes = None
            for info in archive.infolist():
                if not info.is_dir():
                    is_link = stat.S_ISLNK(info.external_attr >> 16)
                    yield Member(info.filename, partial(opened, info), is_link, info.file_size)


def archives_under(folder: Path) -> list[Archive]:
    """The archives under a folder, in the order of their names.

    Raises:
        CorpusError: If a part of a split archive is missing between others, or the first is.
    """
    whole: list[Archive] = []
    parts: dict[Path, dict[str, Path]] = {}
    for base, _, names in os.walk(folder):
        for name in names:
            if name.startswith("._"):
                continue  # macOS's own, beside an archive
            lower = name.lower()
            if _TAR.fullmatch(lower) or lower.endswith(".zip"):
                whole.append(Archive(name, (Path(base, name),)))
            elif match := _PART.fullmatch(name):
                parts.setdefault(Path(base, match[1]), {})[match[2]] = Path(base, name)
    for stem, by_part in parts.items():
        order = sorted(by_part, key=lambda part: (len(part), part))
        numbers = [_part_number(part) for part in order]
        first = min(numbers[0], 1) if order[0].isdigit() else 0
        for expected, number, part in zip(range(first, first + len(order)), numbers, order, strict=True):
            if number != expected:
                raise CorpusError(f"{by_part[part]}: a part of {stem.name} before it is missing; get it, too.")
        whole.append(Archive(stem.name, tuple(by_part[part] for part in order)))
    return sorted(whole, key=lambda archive: archive.files)


class _Metered(io.RawIOBase):
    """A stream that ends with an error where more is read of it than is allowed.

    Args:
        content: The stream.
        most: Bytes of it that may be read at all.
        message: What the error says beyond these.
    """

    def __init__(self, content: io.BufferedIOBase, most: int, message: str) -> None:
        self._content = content
        self._most = most
        self._message = message
        self._allowed: int | None = None
        self._position = 0
        self._reads_after_end = 0

    def allow(self, position: int | None) -> None:
        """Allows reading to this position; None to the end."""
        self._allowed = position

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._content.read1(size)  # what is there, if the file ends too early
        self._position += len(block)
        if self._position > self._most:
            raise TooLarge(self._message)
        if self._allowed is not None and self._position > self._allowed:
            raise TooLarge(f"the header of a member has more than {_HEADER_BYTES} bytes.")
        if not block:
            self._reads_after_end += 1
            if self._reads_after_end > _READS_AFTER_END:
                raise EOFError("the file ends within a member")
        return block


class _ZipFile(io.FileIO):
    """A file whose single reads are bounded: zipfile reads a zip's list of contents in one."""

    def __init__(self, path: Path, max_read_bytes: int) -> None:
        super().__init__(path)
        self.max_read_bytes: int | None = max_read_bytes

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if self.max_read_bytes is not None and size > self.max_read_bytes:
            raise TooLarge(f"its list of contents has {size} bytes, over max_index_bytes={self.max_read_bytes}.")
        return super().read(size)


class _Joined(io.RawIOBase):
    """Several files read as one, front to back."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._rest = list(files)
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while True:
            if self._file is None:
                if not self._rest:
                    return 0
                self._file = self._rest.pop(0).open("rb", buffering=0)
            number = self._file.readinto(buffer)  # type: ignore[attr-defined]
            if number:
                return int(number)
            self._file.close()
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


class _Xz(io.RawIOBase):
    """An xz file, decompressed in bounded memory, which `lzma.LZMAFile` cannot be told."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = lzma.LZMADecompressor(memlimit=_XZ_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while True:
            new = self._file.read(_BLOCK_BYTES) if self._decompressor.needs_input else b""
            if self._decompressor.needs_input and not new:
                raise EOFError("the file ends within its compressed data")
            block = self._decompressor.decompress(new, len(buffer))
            if block:
                buffer[: len(block)] = block
                return len(block)
            if self._decompressor.eof:
                rest = self._decompressor.unused_data.lstrip(b"\0") or self._file.read(_BLOCK_BYTES).lstrip(b"\0")
                if not rest:
                    return 0
                raise lzma.LZMAError("several compressed files in one")


def _unpacked(joined: _Joined) -> io.BufferedIOBase:
    """The content of a tar's files, decompressed as their first bytes say."""
    file = io.BufferedReader(joined, _BLOCK_BYTES)
    start = file.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(_Xz(file), _BLOCK_BYTES)
    return file


def _bytes_of(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    try:
        content = tar.extractfile(info)
    except DAMAGE as error:
        check_machine(error)
        raise Damaged(str(error)) from error
    if content is None:
        raise Damaged(f"{info.name} holds no bytes")
    return content


def _part_number(part: str) -> int:
    """`aa` is 0, `ab` 1, `ba` 26; `07` is 7."""
    if part.isdigit():
        return int(part)
    number = 0
    for letter in part:
        number = number * 26 + ord(letter) - ord("a")
    return number
