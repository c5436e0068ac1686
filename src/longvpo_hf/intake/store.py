"""Where a corpus' videos lie: files under its root, or members of its archives, extracted once.

Takes a corpus' root and a cache folder; gives local files. What is extracted is named by the hash of its content, so no
name from an archive ever becomes a path, and a member that would leave its root is refused with a reason. An index on
disk remembers what was extracted; a run that broke off goes on where it was. Knows nothing of records or of decoding.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import sqlite3
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO

from longvpo_hf.errors import CorpusError
from longvpo_hf.funnel import Dropped

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv"}
)

_COPY_BYTES = 1024**2
_TAR = re.compile(r".+\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz)")
#: `videos.part.aa`, `videos.tar.partaa`, `videos.tar.gz.part-03`, `videos.tar.aa`: a tar cut up by `split`.
_PART = re.compile(r"(.+?)(?:[._-]part[._-]?|(?<=\.tar)\.|(?<=\.tar\.gz)\.|(?<=\.tgz)\.)([a-z]{2,3}|\d{1,4})")
#: RuntimeError is what zipfile says of an encrypted member, NotImplementedError of a compression it does not know.
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, LZMAError, RuntimeError, NotImplementedError)


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_video(name: str) -> bool:
    """Whether a name is a video file's."""
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def leaves_root(name: str) -> bool:
    """Whether a name from outside would lead out of the folder that it is joined to."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:", name)) or "\0" in name


def stays_within(path: Path, root: Path) -> bool:
    """Whether a file that is joined to a root lies under it, links followed.

    A folder in Hugging Face's cache consists of links into the `blobs` beside its `snapshots`: these stay.
    """
    root, real = root.resolve(), path.resolve()
    blobs = [parent.parent.parent / "blobs" for parent in (root, *root.parents) if parent.parent.name == "snapshots"]
    return any(real.is_relative_to(folder) for folder in (root, *blobs))


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive.

    Args:
        name: Its name there.
        open: Gives its bytes; only until the next member is taken.
        is_link: Whether it is a link, a device or the like instead of bytes.
    """

    name: str
    open: Callable[[], IO[bytes]]
    is_link: bool = False


@dataclass(frozen=True, slots=True)
class Archive:
    """A tar (plain or compressed), a zip, or a tar that `split` cut into parts.

    Args:
        name: As people call it: the file's name, without the part.
        files: The file, or its parts in order.
    """

    name: str
    files: tuple[Path, ...]

    def members(self) -> Iterator[Member]:
        """Its files, in order, in bounded memory; folders are passed over.

        Raises:
            CorpusError: If it is damaged.
        """
        name = "its begin"
        try:
            for member in self._zip() if self.name.endswith(".zip") else self._tar():
                name = member.name
                yield member
        except _DAMAGE as error:
            raise self.damaged(name, error) from error

    def damaged(self, member: str, error: Exception) -> CorpusError:
        """The error of an archive whose bytes are wrong."""
        said = str(error) or type(error).__name__
        return CorpusError(f"{self.files[0]}, at {member}: the archive is damaged ({said}); get it again.")

    def _tar(self) -> Iterator[Member]:
        with _Joined(self.files) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member it has seen
                if info.isdir():
                    continue
                yield Member(info.name, lambda info=info: _bytes_of(tar, info), not info.isreg())  # type: ignore[misc]

    def _zip(self) -> Iterator[Member]:
        with zipfile.ZipFile(self.files[0]) as archive:
            for info in archive.infolist():
                if info.is_dir() or info.filename.startswith("__MACOSX/"):
                    continue
                is_link = stat.S_ISLNK(info.external_attr >> 16)
                yield Member(info.filename, lambda info=info: archive.open(info), is_link)  # type: ignore[misc]


def archives_under(folder: Path) -> list[Archive]:
    """The archives under a folder, in the order of their names.

    Raises:
        CorpusError: If a part of a split archive is missing between others, or the first is.
    """
    whole: list[Archive] = []
    parts: dict[Path, dict[str, Path]] = {}
    for base, _, names in os.walk(folder):
        for name in names:
            if _TAR.fullmatch(name) or name.endswith(".zip"):
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


class VideoStore:
    """The videos of one corpus, by the names its records give them.

    Args:
        root: Folder of the corpus; videos and archives lie anywhere under it.
        cache: Folder for what is extracted; may be shared by corpora and runs, one run at a time.
        archives: The archives that hold videos; default all under `root`.

    Raises:
        CorpusError: If the root is no folder.
    """

    def __init__(self, root: Path, cache: Path, archives: Sequence[Archive] | None = None) -> None:
        if not root.is_dir():
            raise CorpusError(f"{root} is no folder; give the folder that the corpus was downloaded to.")
        self.root = root
        self.archives = archives_under(root) if archives is None else list(archives)
        self._files = cache / "videos"
        self._files.mkdir(parents=True, exist_ok=True)
        # What a killed run left here is of no use: parts are written from their begin.
        self._parts = cache / "parts"
        shutil.rmtree(self._parts, ignore_errors=True)
        self._parts.mkdir()
        self._index = sqlite3.connect(cache / "index.sqlite")
        self._index.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
            "CREATE TABLE IF NOT EXISTS done (archive TEXT PRIMARY KEY);"
            "CREATE TABLE IF NOT EXISTS members (archive TEXT, name TEXT, base TEXT, file TEXT,"
            " PRIMARY KEY (archive, name)) WITHOUT ROWID;"
            "CREATE INDEX IF NOT EXISTS by_base ON members (archive, base);"
        )

    def put(self, content: IO[bytes], name: str) -> Path:
        """Stores bytes under the hash of their content, written whole or not at all.

        Args:
            content: The bytes.
            name: Where its suffix is taken from.

        Returns:
            The file; its stem is the content's sha256.
        """
        suffix = PurePosixPath(name).suffix.lower()
        digest = hashlib.sha256()
        handle, part = tempfile.mkstemp(dir=self._parts)
        try:
            with os.fdopen(handle, "wb") as file:
                while block := content.read(_COPY_BYTES):
                    digest.update(block)
                    file.write(block)
            path = self._files / f"{digest.hexdigest()}{suffix if suffix in VIDEO_SUFFIXES else '.mp4'}"
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
        return path

    def extracted(self, archive: Archive, member: Member) -> Path | Dropped:
        """The file of an archive's member, extracted at the first call."""
        key = _identity(archive)
        found = self._index.execute(
            "SELECT file FROM members WHERE archive = ? AND name = ?", (key, member.name)
        ).fetchone()
        if found is None:
            found = (self._extract(archive, key, member),)
        return self._result(archive, member.name, found[0], "")

    def locate(self, name: str, source_id: str = "", archive: str | None = None) -> Path | Dropped:
        """The file that a record names.

        It is looked for under the root, under its folder `videos`, then in the archives: a member matches when one of
        the two names ends with the other, folder by folder. Archives are extracted as they are come to, whole.

        Args:
            name: The name, with or without folders.
            source_id: Stands in what is given for a video that is not there.
            archive: Only the archive of this name, where the record says which one.
        """
        if leaves_root(name):
            return Dropped("outside_root", name, source_id, "the record's name leads out of the corpus")
        for folder in (self.root, self.root / "videos"):
            path = folder / name
            if path.is_file():
                if stays_within(path, self.root):
                    return path
                return Dropped("outside_root", str(path), source_id, f"a link to {path.resolve()}")
        for candidate in self.archives:
            if archive is None or candidate.name == archive:
                key = _identity(candidate)
                found = self._lookup(key, name)
                if found is None and self._read_to_end(candidate, key):
                    found = self._lookup(key, name)
                if found is not None:
                    return self._result(candidate, *found, source_id)
        where = f"under {self.root} or in its {len(self.archives)} archives" if archive is None else f"in {archive}"
        return Dropped("missing_file", name, source_id, f"no such video {where}")

    def sha256(self, path: Path) -> str:
        """Hash of a file's content where it was extracted by this store; empty for another file."""
        return path.stem if path.parent == self._files else ""

    def _lookup(self, key: str, name: str) -> tuple[str, str] | None:
        wanted = PurePosixPath(name).parts
        rows = self._index.execute(
            "SELECT name, file FROM members WHERE archive = ? AND base = ? ORDER BY name", (key, wanted[-1])
        ).fetchall()
        matches = []
        for member, file in rows:
            parts = PurePosixPath(member).parts
            shared = min(len(parts), len(wanted))
            if parts[-shared:] == wanted[-shared:]:
                matches.append((parts != wanted, member, file))
        return min(matches)[1:] if matches else None

    def _read_to_end(self, archive: Archive, key: str) -> bool:
        """Extracts all videos of an archive; False where that was done before."""
        if self._index.execute("SELECT 1 FROM done WHERE archive = ?", (key,)).fetchone():
            return False
        known = self._index.execute("SELECT count(*) FROM members WHERE archive = ?", (key,)).fetchone()[0]
        for member in archive.members():
            if is_video(member.name):
                if (
                    known
                    and self._index.execute(
                        "SELECT 1 FROM members WHERE archive = ? AND name = ?", (key, member.name)
                    ).fetchone()
                ):
                    continue
                self._extract(archive, key, member)
        with self._index:
            self._index.execute("INSERT OR IGNORE INTO done VALUES (?)", (key,))
        return True

    def _extract(self, archive: Archive, key: str, member: Member) -> str:
        """File name of the extracted member; empty for one that is refused."""
        file = ""
        if not member.is_link and not leaves_root(member.name):
            try:
                with member.open() as content:
                    file = self.put(content, member.name).name
            except _DAMAGE as error:
                raise archive.damaged(member.name, error) from error
        with self._index:
            self._index.execute(
                "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)",
                (key, member.name, PurePosixPath(member.name).name, file),
            )
        return file

    def _result(self, archive: Archive, member: str, file: str, source_id: str) -> Path | Dropped:
        if not file:
            detail = "the archive's member is a link or leads out of the corpus"
            return Dropped("outside_root", f"{archive.files[0]}::{member}", source_id, detail)
        path = self._files / file
        if not path.is_file():
            raise CorpusError(f"{path}, extracted from {archive.files[0]}, is gone; delete {self._files.parent}.")
        return path


class _Joined(io.RawIOBase):
    """Several files read as one, front to back."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._rest = list(files)
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        blocks: list[bytes] = []
        while size != 0:
            if self._file is None:
                if not self._rest:
                    break
                self._file = self._rest.pop(0).open("rb")
            block = self._file.read(size)
            if not block or size < 0:
                self._file.close()
                self._file = None
            blocks.append(block)
            size -= len(block) if size > 0 else 0
        return b"".join(blocks)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def _bytes_of(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(info)
    if content is None:
        raise tarfile.ReadError(f"{info.name} holds no bytes")
    return content


def _part_number(part: str) -> int:
    """`aa` is 0, `ab` 1, `ba` 26; `07` is 7."""
    if part.isdigit():
        return int(part)
    number = 0
    for letter in part:
        number = number * 26 + ord(letter) - ord("a")
    return number


def _identity(archive: Archive) -> str:
    """Tells an archive from others and from a changed one of its name."""
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in archive.files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
