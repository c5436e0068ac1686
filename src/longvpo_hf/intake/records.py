"""What a corpus says of its videos: the fields of a record, checked as they are read, and the `Source` made of each."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from longvpo_hf.errors import CorpusError
from longvpo_hf.funnel import Dropped

#: Hours, minutes, seconds. Digits are bounded: a float cannot hold thousands of them.
_CLOCK = re.compile(r"(?:(?:(\d{1,6}):)?(\d{1,8}):)?(\d{1,10}(?:[.,]\d{1,12})?)")
#: Longer than any video, and exact as a float.
_MAX_SECONDS = 10**9
#: Of a name of a file or a video: the longest path that Linux has.
MAX_NAME_CHARACTERS = 4096
_SHOWN_CHARACTERS = 60
_SHOWN_FIELDS = 12
_MESSAGE_CHARACTERS = 300
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 2 * _SHOWN_CHARACTERS

T = TypeVar("T")


class BadRecord(CorpusError):
    """One record is malformed; the others of its corpus can still be read.

    Args:
        path: The file, or `archive::member`.
        place: The record in it, e.g. `line 3`; empty for the file as a whole.
        problem: What is wrong.
    """

    def __init__(self, path: str, place: str, problem: str) -> None:
        super().__init__(f"{path}, {place}: {problem}" if place else f"{path} {problem}")
        self.path = path
        self._place, self._problem = place, problem
        self.detail = f"{place}: {problem}" if place else problem

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str, str]]:
        """Lets the error leave a process unchanged."""
        return type(self), (self.path, self._place, self._problem)

    def dropped(self) -> Dropped:
        """The record as a named drop."""
        return Dropped("bad_record", self.path, "", self.detail)


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
        film: The film that this file is one scene of; empty where the file is the film. The scenes of a film follow
            each other in order.
        film_start_seconds: Where in its film the file starts, if the corpus says so.
    """

    path: Path
    caption: str = ""
    source_id: str = ""
    licence: str = ""
    scenes: tuple[Scene, ...] = ()
    sha256: str = ""
    name: str = ""
    film: str = ""
    film_start_seconds: float | None = None

    @property
    def has_caption(self) -> bool:
        """Whether the corpus describes the video, or a scene of it."""
        return bool(self.caption) or any(scene.caption for scene in self.scenes)


#: What readers give: videos in a fixed order, and a drop in the place of each that is left out.
Sources = Iterator[Source | Dropped]


@dataclass(frozen=True, slots=True)
class Record:
    """Fields of one record, and where they are.

    Args:
        file: The file, as an error names it.
        place: The record in it, e.g. `line 3`.
        fields: The values by name.
        within: Name of the field that `fields` are in; empty for the record itself.
        folder: The folder that the record's file is in; names of videos are looked for here first. None if unknown.
    """

    file: str
    place: str
    fields: Mapping[str, Any]
    within: str = ""
    folder: Path | None = None

    @property
    def stem(self) -> str:
        """The file's name without folders and suffixes: `train` of `corpus/train.tar::a.json` or `train.jsonl`."""
        return Path(self.file.split("::")[0]).name.split(".")[0]

    def get(self, name: str, kind: type[T]) -> T:
        """The field `name`; a dot leads into a field of a field.

        Raises:
            BadRecord: If it is absent, or of another type.
        """
        value = self._walk(name)
        if value is None:
            raise self.error(name, f"is missing; a {kind.__name__} is expected")
        return self._checked(name, value, kind)

    def find(self, name: str, kind: type[T]) -> T | None:
        """The field `name` as `get` returns it; None where it is absent or null.

        Raises:
            BadRecord: If it is there and of another type.
        """
        value = self._walk(name)
        return None if value is None else self._checked(name, value, kind)

    def text(self, name: str) -> str:
        """The field `name`, text that is not empty.

        Raises:
            BadRecord: If it is absent, not text, or empty.
        """
        text = self.get(name, str).strip()
        if not text:
            raise self.error(name, "is empty")
        return text

    def name(self, name: str) -> str:
        """The field `name`, text that names something: a file, a video.

        Raises:
            BadRecord: If it is absent, not text, empty, or longer than any name.
        """
        text = self.text(name)
        if len(text) > MAX_NAME_CHARACTERS:
            raise self.error(name, f"has {len(text)} characters; a name has {MAX_NAME_CHARACTERS} at most")
        return text

    def items(self, name: str) -> Iterator[Record]:
        """The members of the list `name`, each a record of its own.

        Raises:
            BadRecord: If the field is not a list, or a member has no fields.
        """
        for number, member in enumerate(self.get(name, list)):
            yield self._member(f"{name}[{number}]", member)

    def named(self, name: str) -> Iterator[tuple[str, Record]]:
        """The members of `name`, a field of named records, in the order of their names.

        Raises:
            BadRecord: If the field has no members with names, or a member has no fields.
        """
        for key, member in sorted(self.get(name, dict).items()):
            if _is_broken(key):
                raise self.error(f"{name}.{key}", "has half a character (a lone surrogate) in its name")
            yield key, self._member(f"{name}.{key}", member)

    def seconds(self, name: str) -> float:
        """The field `name` as seconds: a number, or text such as `83.5`, `01:23.5` or `00:01:23,500`.

        Raises:
            BadRecord: If it is absent or neither, negative, or longer than any video.
        """
        value = self._walk(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_SECONDS:
            return float(value)
        match = _CLOCK.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 100 else None
        if not match:
            raise self.error(name, f"must be seconds or a time such as 00:01:23.5, got {shown_value(value)}")
        hours, minutes, seconds = match.groups()
        return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds.replace(",", "."))

    def error(self, name: str, problem: str) -> BadRecord:
        """An error that says where: file, record and field."""
        has = ""
        if "missing" in problem:
            has = f" (it has {', '.join(_cut(str(field)) for field in list(self.fields)[:_SHOWN_FIELDS])})"
        return BadRecord(self.file, self.place, f"field {_cut(self._full(name), 3)!r} {problem}{has}.")

    def _member(self, name: str, member: Any) -> Record:
        if not isinstance(member, Mapping):
            raise self.error(name, f"has no fields but is {shown_value(member)}")
        return replace(self, fields=member, within=self._full(name))

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
            raise self.error(name, f"must be a {kind.__name__}, got {shown_value(value)}")
        if isinstance(value, str) and _is_broken(value):
            raise self.error(name, f"has half a character (a lone surrogate): {shown_value(value)}")
        return value


def shown_value(value: object) -> str:
    """A value as an error shows it: its type and its start, however long or deep it is."""
    return f"{type(value).__name__} {short_repr(value)}"


def short_repr(value: object) -> str:
    """`repr` of a value, of bounded length."""
    return _cut(_REPR.repr(value))


def first_line(error: Exception) -> str:
    """What an error says first, of bounded length and without the full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:_MESSAGE_CHARACTERS]


def _cut(text: str, times: int = 1) -> str:
    most = times * _SHOWN_CHARACTERS
    return text if len(text) <= most else text[: most - 3] + "..."


def _is_broken(text: str) -> bool:
    """Whether text holds half a character, which no file in UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
