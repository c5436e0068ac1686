"""Which videos are in benchmarks, so that nobody trains on what is evaluated."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

from longvpo_hf.errors import CorpusError
from longvpo_hf.intake.records import Source
from longvpo_hf.intake.store import is_video
from longvpo_hf.paths import shown

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
#: Hosts whose addresses are written without `https://`, too.
_HOSTS = ("youtube.com/", "youtu.be/", "vimeo.com/", "bilibili.com/", "dailymotion.com/")
#: What corpora write before an id (`ytb_<id>`, `v_<id>`) and after it (`<id>_10_20`, `<id>-Scene-001`).
_PREFIX = re.compile(r"(?:ytb?|youtube|v|vid|video|clip)[_-]", re.IGNORECASE)
_SUFFIX = re.compile(
    r"(?:[_-]\d{1,9}(?:\.\d{1,9})?[_-]\d{1,9}(?:\.\d{1,9})?|[_-](?:scene|clip|part|seg|segment|shot)[_-]?\d{1,9}"
    r"|[_-]\d{1,9}[_-]\d{1,9}to\d{1,9})$",
    re.IGNORECASE,
)
#: Ids that are looked for within longer names: a short or common one would be found in names of other videos.
_MIN_CHARACTERS = 8
_MIN_DIGITS = 9
#: Longer names, and ones of more parts, are cut: what is within them is tried pair by pair.
_MAX_CHARACTERS = 500
_MAX_PARTS = 60
#: Of a list of videos: the longest path of Linux, and no name or address comes near it.
_MAX_LINE = 4096


@dataclass(frozen=True, slots=True)
class BenchmarkMatches:
    """How much of one list was found in a corpus.

    Args:
        name: The benchmark.
        num_ids: Ids of its list.
        num_ids_matched: How many of them name a video of the corpus.
        num_hashes: Hashes of its list.
        num_hashes_matched: How many of them are those of a video of the corpus.
    """

    name: str
    num_ids: int
    num_ids_matched: int
    num_hashes: int
    num_hashes_matched: int

    def __str__(self) -> str:
        counts = ((self.num_ids_matched, self.num_ids, "ids"), (self.num_hashes_matched, self.num_hashes, "hashes"))
        return f"{self.name} " + " and ".join(f"{n} of {total} {what}" for n, total, what in counts if total)


@dataclass(frozen=True, slots=True)
class BenchmarkVideos:
    """The videos of benchmarks, by id and by hash of their content, and which of them were found.

    Args:
        ids: Ids (file names without folder and suffix) by benchmark.
        sha256: Hashes of files by benchmark.
    """

    ids: Mapping[str, frozenset[str]]
    sha256: Mapping[str, frozenset[str]]
    _found: dict[str, set[str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _all: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_all", frozenset().union(*self.ids.values()))

    @classmethod
    def from_files(cls, lists: Mapping[str, Path]) -> BenchmarkVideos:
        """Reads one list per benchmark, e.g. `{"Video-MME": Path("videomme.txt")}`.

        A line is an id (a YouTube id, say), a file name, the address of a video, or the sha256 of a file; empty lines
        and lines that begin with `# ` are passed over.

        Raises:
            CorpusError: If a file is missing, names no video, or is of another form, whose videos would not be found.
        """
        ids: dict[str, frozenset[str]] = {}
        sha256: dict[str, frozenset[str]] = {}
        for benchmark, path in lists.items():
            if not path.is_file():
                raise CorpusError(f"{path}, the list of the videos of {benchmark}, is missing.")
            lines = [line.strip() for line in _text_of(path).splitlines() if not line.startswith("# ")]
            names = [name for line in lines if (name := line.strip("\"',"))]
            if wrong := _other_form(lines) if names else "names no video":
                raise CorpusError(
                    f"{path}, the list of the videos of {benchmark}, {wrong}; one id, file name, address or sha256 per "
                    "line is expected."
                )
            sha256[benchmark] = frozenset(name.lower() for name in names if _SHA256.fullmatch(name))
            ids[benchmark] = frozenset(_id_of(name) for name in names if not _SHA256.fullmatch(name))
        return cls(ids, sha256)

    def match(self, source: Source, sha256: str = "") -> str | None:
        """Which benchmark the source is in, and how that was found; None where it is in none.

        Args:
            source: Compared by its id and by its file's name, as they are and in the ways that corpora spell ids.
            sha256: Hash of its file; empty compares none.
        """
        spelled: dict[str, str] = {}
        for name in (source.source_id, source.film, source.name or source.path.name):
            for candidate in _spelled(name, self._all) if name else ():
                spelled.setdefault(candidate, name)
        result = None
        for benchmark, ids in self.ids.items():
            matched = ids & spelled.keys()
            self._found.setdefault(benchmark, set()).update(matched)
            if matched and result is None:
                found = min(matched)
                within = "" if _id_of(spelled[found]) == found else f", within {shown(spelled[found])}"
                result = f"{benchmark} has the id {found}{within}"
            if sha256 in self.sha256[benchmark]:
                self._found[benchmark].add(sha256)
                result = result or f"{benchmark} has a video of the same content, sha256 {sha256}"
        return result

    def matches(self) -> tuple[BenchmarkMatches, ...]:
        """How much of each list was found so far."""
        return tuple(
            BenchmarkMatches(
                name,
                len(ids),
                len(ids & self._found.get(name, set())),
                len(self.sha256[name]),
                len(self.sha256[name] & self._found.get(name, set())),
            )
            for name, ids in self.ids.items()
        )

    def checked(self) -> str:
        """What was compared and found, as sentences for a dataset card."""
        lists = ", ".join(f"{name} ({len(self.ids[name])} ids, {len(self.sha256[name])} hashes)" for name in self.ids)
        return (
            f"Compared with the videos of {lists}, as given: by the source's id and its file's name, whole and without "
            "what corpora write around ids, and by the sha256 of its file. "
            f"Found and left out: {'; '.join(map(str, self.matches()))}. "
            "Another encoding of a benchmark's video under another name is not found."
        )


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is no text in UTF-8 (byte {error.start}); a list of videos is.") from error


def _other_form(lines: Sequence[str]) -> str:
    """What a list is whose lines are more than names, which would be found nowhere; empty where they may be names."""
    lines = [line.rstrip(",") for line in lines if line.rstrip(",")]
    if any("\0" in line for line in lines):
        return "is no text"
    if any(len(line) > _MAX_LINE for line in lines):
        return f"has a line of more than {_MAX_LINE:,} characters"
    for text in ("\n".join(lines), lines[0]):
        try:
            is_json = isinstance(json.loads(text), list | dict)
        except (ValueError, RecursionError):
            is_json = False
        if is_json:
            return "is JSON"
    for mark, said in (("\t", "tabs"), (",", "commas"), (";", "semicolons"), ("|", "bars")):
        widths = {len(row) for row in csv.reader(lines, delimiter=mark) if row}
        if len(lines) > 1 and len(widths) == 1 and widths != {1}:
            return f"is a table, with {said} between its columns"
    return ""


def _id_of(text: str) -> str:
    """The id that a line of a list, or a name of a source, stands for: of an address, a path or a file name."""
    text = unicodedata.normalize("NFC", text.strip())
    if "://" in text or any(host in text for host in _HOSTS):
        try:
            address = urlsplit(text if "://" in text else f"https://{text}")
            named = parse_qs(address.query).get("v", [""])[0]
        except ValueError:  # an address that is none
            return text
        text = named or address.path.rstrip("/") or text
    path = PurePosixPath(text.replace("\\", "/"))
    return path.stem if is_video(path.name) else path.name


def _spelled(name: str, ids: frozenset[str]) -> Iterator[str]:
    """The ids that a name spells: as it is, without what corpora write around ids, or in distinctive parts of it."""
    name = name[:_MAX_CHARACTERS]
    whole = bare = _id_of(name)
    spellings = {name, whole}
    for _ in range(3):
        spellings.add(bare := _SUFFIX.sub("", bare))
    spellings |= {_PREFIX.sub("", text, count=1) for text in spellings if _PREFIX.match(text)}
    yield from sorted(spellings & ids)
    path = PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/"))
    text = str(path.with_suffix("") if path.name and is_video(path.name) else path)
    starts = [i for i in range(len(text)) if i == 0 or not text[i - 1].isalnum()]
    ends = [i for i in range(1, len(text) + 1) if i == len(text) or not text[i].isalnum()]
    for start in starts[:_MAX_PARTS]:
        for end in ends[:_MAX_PARTS]:
            if end - start >= _MIN_CHARACTERS and text[start:end] in ids and _is_distinctive(text[start:end]):
                yield text[start:end]


def _is_distinctive(text: str) -> bool:
    """Whether text within a name is an id of one video rather than a word or a date."""
    if text.isdigit():
        return len(text) >= _MIN_DIGITS
    has_both = any(c.isdigit() for c in text) and any(c.isalpha() for c in text)
    return has_both or text.lower() != text or bool(_YOUTUBE_ID.fullmatch(text))
