"""Records as JSON and back. A stranger may have written what is read: its size, depth and types are checked."""

from __future__ import annotations

import functools
import json
import math
import types
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from longvpo_hf.public import public_text
from longvpo_hf.record.types import RecordError

_MAX_CHARACTERS = 20_000  # of one text: BibTeX and the names of a few hundred layers
_MAX_ENTRIES = 10_000  # of one list or object
_MAX_DEPTH = 12
_MAX_INTEGER = 2**63


def to_json(value: Any) -> Any:
    """The value as JSON that may leave this machine; numbers that JSON lacks (NaN, infinity) become null."""
    if is_dataclass(value) and not isinstance(value, type):
        mine = {field.name: getattr(value, field.name) for field in fields(value) if field.name != "extra"}
        return to_json({**mine, **value.extra})  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return {public_text(str(name)): to_json(item) for name, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item) for item in value), key=repr)  # in another order in each process
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return public_text(str(value))


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """A checked JSON value as the type of a record's field.

    Raises:
        RecordError: If it is not of that type; names the field.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        for one in arguments:
            if one is type(None) if value is None else one is not type(None) and _fits(one, value):
                return None if value is None else from_json(one, value, where)
    elif is_dataclass(kind) and isinstance(value, dict):
        return _dataclass_from_json(kind, value, where)
    elif origin is tuple and isinstance(value, list):
        return tuple(from_json(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is Mapping and isinstance(value, dict):
        return {name: from_json(arguments[1], item, f"{where}.{_short(name)}") for name, item in value.items()}
    elif _fits(kind, value):
        return float(value) if kind is float else value
    raise RecordError(f"{where.removeprefix('.')} must be {_named(kind)}, got {_short(value)}")


def _fits(kind: Any, value: Any) -> bool:
    if kind is float:
        return type(value) in (int, float)
    if kind in (str, int, bool):
        return type(value) is kind
    return isinstance(value, dict if is_dataclass(kind) or get_origin(kind) is Mapping else list)


def _dataclass_from_json(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = _hints(kind)
    known, extra = {}, {}
    for name, item in value.items():
        if name in hints:
            known[name] = from_json(hints[name], item, f"{where}.{name}")
        else:
            extra[name] = item
    try:
        return kind(**known, extra=extra)
    except TypeError:
        missing = [field.name for field in fields(kind) if field.name not in known]
        raise RecordError(f"{where.removeprefix('.') or 'the record'} lacks some of {missing}") from None
    except ValueError as error:
        raise RecordError(f"{where.removeprefix('.')}: {error}") from error


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if name != "extra"}


def _named(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind) if not get_args(kind) else kind).replace("longvpo_hf.record.types.", "")


def loads(text: str) -> Any:
    """JSON from a stranger.

    Raises:
        RecordError: If it is not JSON, or larger or deeper than a record has to be, or a text in it is not fit to show.
    """
    try:
        value = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise RecordError(f"it is nested deeper than {_MAX_DEPTH} levels") from None
    except ValueError as error:
        raise RecordError(f"it is not JSON ({error})") from error
    _check(value, 0)
    return value


def _check(value: Any, depth: int) -> None:
    """Raises RecordError, with the bound, where a JSON value exceeds one."""
    if depth > _MAX_DEPTH:
        raise RecordError(f"it is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, (dict, list)):
        if len(value) > _MAX_ENTRIES:
            raise RecordError(f"a list or object has {len(value)} entries, and at most {_MAX_ENTRIES} are read")
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            _check(item, depth + 1)
    elif isinstance(value, str):
        if len(value) > _MAX_CHARACTERS:
            raise RecordError(f"a text has {len(value)} characters, and at most {_MAX_CHARACTERS} are read")
        # Control characters reach terminals, halves of a character no file.
        if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in value):
            raise RecordError(f"a text holds control characters or half a character, {_short(value)}")
    elif isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        raise RecordError("a whole number has more than 63 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecordError("a number is beyond what a float holds")


def _no_number(name: str) -> Any:
    raise RecordError(f"JSON has no {name}")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
