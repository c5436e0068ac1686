"""Where a corpus' videos are: files under its root, or members of its archives, unpacked once.

A record names a video; many files may have that name. `VideoStore.locate` finds the one that is meant, or says that
none or several could be. What is unpacked is named by the hash of its content, so that no name from an archive ever
becomes a path. An index on disk remembers what was unpacked; an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from longvpo_hf.artifacts import file_digest, make_folder
from longvpo_hf.errors import CorpusError, check_machine
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.archives import DAMAGE, Archive, Damaged, Member, TooLarge, archives_under
from longvpo_hf.intake.limits import MIB, IntakeLimits
from longvpo_hf.paths import OutsideRoot, below, is_inside, leads_out, path_inside, shown

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv"}
    | {".m2ts", ".mts", ".m2t", ".vob", ".asf", ".f4v", ".3g2", ".qt", ".mpe", ".m2v"}
)

#: What is found beside videos and is none: records, text, subtitles, pictures, sound, archives.
_OTHER_SUFFIXES = frozenset(
    {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md", ".yaml", ".yml", ".xml", ".html", ".pdf", ".log"}
    | {".srt", ".vtt", ".ass", ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".wav", ".mp3", ".m4a", ".flac", ".ogg"}
    | {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".npy", ".npz", ".pt", ".pkl", ".h5", ".db", ".sqlite", ".lock"}
    | {".py", ".sh", ".ini", ".cfg", ".toml", ".lnk", ".url", ".metadata", ".part"}
)
#: A part file older than this was left behind by a run that was killed.
_STALE_SECONDS = 24 * 3600
_SHOWN_CANDIDATES = 3
_SHOWN_CHARACTERS = 500
_MACOS_FOLDER = "__MACOSX"


def is_video(name: str) -> bool:
    """Whether a name is a video file's."""
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def is_unknown(name: str) -> bool:
    """Whether a name is neither a video's nor that of what is usually found beside videos: it may be a video."""
    path = PurePosixPath(name)
    return not path.name.startswith(".") and path.suffix.lower() not in VIDEO_SUFFIXES | _OTHER_SUFFIXES


def is_macos_file(name: str) -> bool:
    """Whether a name is that of a file in which macOS keeps what it knows of another: `._a.mp4` is not a video."""
    parts = PurePosixPath(name).parts
    return bool(parts) and (parts[-1].startswith("._") or _MACOS_FOLDER in parts)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A file or member that may be the one a record names.

    Args:
        parts: Folders and name, from the root of the file system, through the archive where it is in one.
        container: The archive, None for a file.
        member: Its name in the archive, or the file's path under the root.
        file: The unpacked file's name in the store; for a file empty.
        problem: Why it cannot be used, a reason of `funnel.REASONS`; empty where it can.
    """

    parts: tuple[str, ...]
    container: Archive | None
    member: str
    file: str = ""
    problem: str = ""

    def shown(self, root: Path) -> str:
        if self.container is None:
            return shown(self.member)
        archive = self.container.folder / self.container.name
        return shown(f"{archive.relative_to(root) if archive.is_relative_to(root) else archive}::{self.member}")


class VideoStore:
    """The videos of one corpus, by the names its records give them.

    Args:
        root: Folder of the corpus; videos and archives are anywhere under it.
        cache: Folder for what is unpacked; may be shared by corpora.
        limits: See `IntakeLimits`.
        archives: The archives that hold videos; None for all under `root`.

    Raises:
        CorpusError: If the root is not a folder.
    """

    def __init__(
        self, root: Path, cache: Path, limits: IntakeLimits | None = None, archives: Sequence[Archive] | None = None
    ) -> None:
        if not root.is_dir():
            raise CorpusError(f"{root} is no folder; give the folder that the corpus was downloaded to.")
        self.root = root
        self.cache = cache
        self.limits = limits or IntakeLimits()
        self.archives = archives_under(root) if archives is None else list(archives)
        self._problems: list[Dropped] = []
        self._told: dict[tuple[str, str], Dropped] = {}
        self._files = cache / "videos"
        make_folder(self._files)
        self._parts = cache / "parts"
        self._parts.mkdir(exist_ok=True)
        for part in self._parts.iterdir():
            if part.stat().st_mtime < time.time() - _STALE_SECONDS:
                part.unlink(missing_ok=True)
        self._index = sqlite3.connect(cache / "index.sqlite", timeout=60)
        self._index.executescript(
            "PRAGMA journal_mode = DELETE; PRAGMA synchronous = NORMAL;"
            "CREATE TABLE IF NOT EXISTS read_archives (archive TEXT PRIMARY KEY, problems TEXT);"
            "CREATE TABLE IF NOT EXISTS unpacked (archive TEXT, number INTEGER, name TEXT, base TEXT, file TEXT,"
            " problem TEXT, PRIMARY KEY (archive, number)) WITHOUT ROWID;"
            "CREATE INDEX IF NOT EXISTS unpacked_by_base ON unpacked (archive, base);"
        )
        self._listed: sqlite3.Connection | None = None
        self._read: set[str] = set()
        self._keys: dict[Archive, str] = {}

    # ------------------------------------------------------------------------------------------------ what is unpacked

    def put(self, content: IO[bytes], name: str) -> Path:
        """Stores bytes under the hash of their content, written whole or not at all.

        Args:
            content: The bytes.
            name: Where its suffix is taken from.

        Returns:
            The file; its stem is the content's sha256.

        Raises:
            Damaged: If it cannot be read.
            TooLarge: If it has more than `max_video_bytes`.
        """
        suffix = PurePosixPath(name).suffix.lower()
        digest = hashlib.sha256()
        handle, part = tempfile.mkstemp(dir=self._parts)
        num_bytes = 0
        try:
            with os.fdopen(handle, "wb") as file:
                while block := _read(content):
                    num_bytes += len(block)
                    self._check_bytes(num_bytes)
                    digest.update(block)
                    file.write(block)
            path = self._files / f"{digest.hexdigest()}{suffix if suffix in VIDEO_SUFFIXES else '.mp4'}"
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
        return path

    def members(self, archive: Archive) -> Iterator[tuple[int, Member]]:
        """An archive's files with their numbers; where it is damaged they end, which `take_problems` says."""
        num_macos, example = 0, ""
        try:
            for number, member in enumerate(archive.members(self.limits)):
                if is_macos_file(member.name):
                    num_macos, example = num_macos + 1, member.name
                else:
                    yield number, member
        except CorpusError as error:
            self._tell(Dropped("damaged_archive", str(archive.files[0]), "", str(error)))
        if num_macos:
            detail = f"{num_macos} files of the archive, e.g. {shown(example)}"
            self._tell(Dropped("macos_file", str(archive.files[0]), "", detail))

    def unpacked(self, archive: Archive, number: int, member: Member) -> Path | Dropped:
        """The file of an archive's member, unpacked at the first call."""
        key = self._key(archive)
        file, problem = self._known(key, number) or self._unpack(archive, key, number, member)
        return self._result(_Candidate((), archive, storable(member.name), file, problem), "")

    def sha256(self, path: Path) -> str:
        """Hash of a file's content where it was unpacked by this store; empty for another file."""
        return path.stem if path.parent == self._files else ""

    def take_problems(self) -> list[Dropped]:
        """Drops of archives and their members that no record's video stands for, since the last call."""
        problems, self._problems = self._problems, []
        return problems

    def _tell(self, problem: Dropped) -> None:
        """Adds a problem of an archive, once, however often it is read."""
        if (problem.reason, problem.path) not in self._told:
            self._told[problem.reason, problem.path] = problem
            self._problems.append(problem)

    def _check_bytes(self, num_bytes: int) -> None:
        if num_bytes > self.limits.max_video_bytes:
            raise TooLarge(f"more than max_video_bytes={self.limits.max_video_bytes} bytes")

    def _key(self, archive: Archive) -> str:
        """Tells an archive from others and from a changed one of its name, unpacked within the same limits."""
        if archive not in self._keys:
            # Below the corpus, so that what was unpacked is found again when the corpus has moved.
            stats = [(below(str(self.root), str(file)), file.stat()) for file in archive.files]
            limits = [self.limits.max_video_bytes, self.limits.max_expansion, self.limits.max_index_bytes]
            facts = [limits, *((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)]
            self._keys[archive] = hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()
        return self._keys[archive]

    def _known(self, key: str, number: int) -> tuple[str, str] | None:
        """File name and problem of a member that was unpacked before."""
        found: tuple[str, str] | None = self._index.execute(
            "SELECT file, problem FROM unpacked WHERE archive = ? AND number = ?", (key, number)
        ).fetchone()
        return found

    def _read_to_end(self, archive: Archive) -> None:
        """Unpacks all videos of an archive, unless that was done before."""
        key = self._key(archive)
        if key in self._read:
            return
        self._read.add(key)
        done = self._index.execute("SELECT problems FROM read_archives WHERE archive = ?", (key,)).fetchone()
        if done is not None:
            for problem in json.loads(done[0]):
                self._tell(Dropped(*problem))
            return
        for number, member in self.members(archive):
            if is_video(member.name) and not self._known(key, number):
                self._unpack(archive, key, number, member)
        first = str(archive.files[0])
        problems = [[drop.reason, drop.path, "", drop.detail] for drop in self._told.values() if drop.path == first]
        with self._index:
            self._index.execute("INSERT OR REPLACE INTO read_archives VALUES (?, ?)", (key, json.dumps(problems)))

    def _unpack(self, archive: Archive, key: str, number: int, member: Member) -> tuple[str, str]:
        """File name and problem of a member, one of them empty."""
        file, problem = "", ""
        if storable(member.name) != member.name:
            problem = "bad_name"
        elif member.is_link or leads_out(member.name):
            problem = "outside_root"
        else:
            try:
                self._check_bytes(member.num_bytes)
                with member.open() as content:
                    file = self.put(content, member.name).name
            except TooLarge:
                problem = "too_large"
            except Damaged:
                problem = "damaged_archive"  # of a zip, the other members can still be read
        name = storable(member.name)
        with self._index:
            self._index.execute(
                "INSERT OR REPLACE INTO unpacked VALUES (?, ?, ?, ?, ?, ?)",
                (key, number, name, _base(_parts(name)[-1]), file, problem),
            )
        return file, problem

    # ----------------------------------------------------------------------------------------------- which one is meant

    def locate(
        self, name: str, source_id: str = "", folder: Path | None = None, stem: str = "", archive: str | None = None
    ) -> Path | Dropped:
        """The file that a record names.

        A file or a member of an archive fits if its path, through the folders and the archive it is in, ends with the
        name. It is looked for in the record's own folder and everything below it, then in the folder above, up to the
        root; the first of these that holds a fitting one decides. Archives are unpacked, whole, as they are come to.

        Args:
            name: The name, with or without folders.
            source_id: Stands in the drop for a video that is not there.
            folder: The folder that the record's file is in; None for the root.
            stem: The name of the record's file, without suffixes: of several files that fit, the one in an archive or
                folder of this name is meant.
            archive: Only the archive of this name, where the record names one.
        """
        if leads_out(name):
            return Dropped("outside_root", _cut(name), source_id, "the record's name leads out of the corpus")
        wanted = _parts(name)
        elsewhere: list[_Candidate] = []
        for level in self._levels(folder):
            for base in (level, level / "videos"):
                try:
                    path = path_inside(base, name)
                except OutsideRoot:
                    path = base / name.replace("\\", "/")
                if _is_file(path):
                    return self._checked(path, source_id)
            elsewhere = self._of_name(wanted[-1], level, archive)
            fitting = _best_spelled(elsewhere, wanted)
            if len(fitting) > 1:
                fitting = _preferred(fitting, wanted, (archive or "").split(".")[0] or stem)
            if fitting:
                return self._chosen(fitting, name, source_id)
        where = f"under {self.root} or in its {len(self.archives)} archives" if archive is None else f"in {archive}"
        hint = f"; other folders have a file of this name: {elsewhere[0].shown(self.root)}" if elsewhere else ""
        return Dropped("missing_file", _cut(name), source_id, f"no such video {where}{hint}")

    def _levels(self, folder: Path | None) -> Iterator[Path]:
        """The folder of a record, then the ones above it up to the root."""
        level = folder if folder is not None and folder.is_relative_to(self.root) else self.root
        while True:
            yield level
            if level == self.root:
                return
            level = level.parent

    def _of_name(self, name: str, level: Path, archive: str | None) -> list[_Candidate]:
        """What has this name, whatever folders it is in, at `level` or below it."""
        found = []
        base = _base(name)
        for (path,) in self._disk().execute("SELECT path FROM files WHERE base = ? ORDER BY path", (base,)):
            if (self.root / path).is_relative_to(level):
                found.append(_Candidate((*self.root.parts, *_parts(path)), None, path))
        for container in self.archives:
            if container.folder.is_relative_to(level) and archive in (None, container.name):
                self._read_to_end(container)
                rows = self._index.execute(
                    "SELECT name, file, problem FROM unpacked WHERE archive = ? AND base = ? ORDER BY number",
                    (self._key(container), base),
                )
                for member, file, problem in rows:
                    parts = (*container.folder.parts, container.stem, *_parts(member))
                    found.append(_Candidate(parts, container, member, file, problem))
        return found

    def _disk(self) -> sqlite3.Connection:
        """The video files under the root by their names, listed once."""
        if self._listed is None:
            self._listed = sqlite3.connect("")  # a temporary file
            self._listed.execute("CREATE TABLE files (base TEXT, path TEXT)")
            paths = (
                path.relative_to(self.root).as_posix() for path in walk(self.root, self.cache) if is_video(path.name)
            )
            rows = ((_base(PurePosixPath(path).name), path) for path in paths if storable(path) == path)
            self._listed.executemany("INSERT INTO files VALUES (?, ?)", rows)
            self._listed.execute("CREATE INDEX by_base ON files (base)")
        return self._listed

    def _chosen(self, fitting: Sequence[_Candidate], name: str, source_id: str) -> Path | Dropped:
        """The one that fits, or a drop where several differ."""
        if len(fitting) > 1 and len({self._content(candidate) for candidate in fitting}) > 1:
            some = ", ".join(candidate.shown(self.root) for candidate in fitting[:_SHOWN_CANDIDATES])
            more = f" and {len(fitting) - _SHOWN_CANDIDATES} more" if len(fitting) > _SHOWN_CANDIDATES else ""
            detail = f"fits {len(fitting)} different files: {some}{more}; put the record beside the one it means"
            return Dropped("ambiguous_name", _cut(name), source_id, detail)
        return self._result(fitting[0], source_id)

    def _content(self, candidate: _Candidate) -> str:
        """The hash of a candidate's content; what cannot be read differs from all else."""
        if candidate.container is not None:
            return PurePosixPath(candidate.file).stem or candidate.shown(self.root)
        path = self.root / candidate.member
        return file_digest(path) if is_inside(self.root, path) else candidate.shown(self.root)

    def _result(self, candidate: _Candidate, source_id: str) -> Path | Dropped:
        if candidate.container is None:
            return self._checked(self.root / candidate.member, source_id)
        where = f"{candidate.container.files[0]}::{candidate.member}"
        if candidate.problem:
            return Dropped(candidate.problem, where, source_id, _DETAILS[candidate.problem])
        path = self._files / candidate.file
        if not path.is_file():
            raise CorpusError(f"{path}, unpacked from {where}, is gone; delete {self._files.parent}.")
        return path

    def _checked(self, path: Path, source_id: str) -> Path | Dropped:
        if is_inside(self.root, path):
            return path
        return Dropped("outside_root", str(path), source_id, f"a link to {os.path.realpath(path)}")


#: Details of drops of members.
_DETAILS = {
    "outside_root": "the archive's member is a link, not a plain file, or leads out of the corpus",
    "bad_name": "the archive's member has a name that is not valid Unicode",
    "too_large": "the archive's member exceeds max_video_bytes, or the archive unpacks to more than max_expansion",
    "damaged_archive": "the archive's member is damaged or encrypted; get the archive again",
}


def walk(root: Path, *without: Path) -> Iterator[Path]:
    """Every file under a folder in the order of names, folder by folder; links to folders are given, not followed.

    The folder itself may be a link.
    """
    left_out = {os.path.abspath(folder) for folder in without}
    stack = [Path(root)]
    while stack:
        path = stack.pop()
        if (path.is_symlink() and path != root) or not path.is_dir():
            yield path
        elif os.path.abspath(path) not in left_out:
            stack += sorted(path.iterdir(), reverse=True)


def _read(content: IO[bytes]) -> bytes:
    try:
        return content.read(MIB)
    except DAMAGE as error:
        check_machine(error)
        raise Damaged(str(error)) from error


def _parts(name: str) -> tuple[str, ...]:
    """Folders and name, without `.`, with accents composed."""
    parts = PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")).parts
    return tuple(part for part in parts if part not in ("/", ".")) or (name,)


def _base(name: str) -> str:
    """What names that differ in case or in the composition of accents have in common."""
    return unicodedata.normalize("NFC", name).casefold()


def storable(name: str) -> str:
    """A name as SQLite and JSON can hold it."""
    return name.encode("utf-8", "backslashreplace").decode()


def _cut(name: str) -> str:
    return storable(name[:_SHOWN_CHARACTERS])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than the file system has
        return False


def _endings(candidate: _Candidate, length: int) -> list[tuple[str, ...]]:
    """The last parts of a candidate's path, with and without the archive's name among its folders."""
    if candidate.container is None:
        return [candidate.parts[-length:]]
    folder = len(candidate.container.folder.parts)
    without = (*candidate.parts[:folder], *candidate.parts[folder + 1 :])
    return [candidate.parts[-length:], without[-length:]]


def _best_spelled(candidates: Iterable[_Candidate], wanted: tuple[str, ...]) -> list[_Candidate]:
    """The candidates whose path ends with the name: those of the same case if there are any, else of another."""
    same, other = [], []
    folded = tuple(part.casefold() for part in wanted)
    for candidate in candidates:
        endings = _endings(candidate, len(wanted))
        if wanted in endings:
            same.append(candidate)
        elif folded in [tuple(part.casefold() for part in ending) for ending in endings]:
            other.append(candidate)
    return same or other


def _preferred(candidates: list[_Candidate], wanted: tuple[str, ...], stem: str) -> list[_Candidate]:
    """Of several that fit, those in the record's own archive or folder; then those named exactly so in an archive."""
    own = [candidate for candidate in candidates if stem and stem in candidate.parts[:-1]]
    candidates = own or candidates
    exact = [item for item in candidates if item.container is not None and _parts(item.member) == wanted]
    return exact if exact and len(exact) < len(candidates) else candidates
