"""Errors that a user can mend.

    LongVPOError
    ├── ConfigError     a setting, or settings that exclude each other
    ├── CorpusError     a corpus, an archive or a metadata file is not as its reader expects
    ├── VideoError      a video, or a clip of one, cannot be read
    ├── DatasetError    preference rows, captions or the folder they are in
    ├── ModelError      a checkpoint, a processor or a model's family
    ├── TrainingError   a run that cannot go on: its numbers are not finite, or a process has no batch
    ├── EndpointError   a server that answers requests
    └── StorageError    the disk is full, broken or closed to us, or the system is out of files

Every message says what was wrong, with the value and the bound, and what to do. The command line shows these as one
line of advice and lets every other exception show its traceback: a defect of ours must not look like advice. What the
system says of its disks reaches us through many libraries, each with exceptions of its own: see `storage_error`.

The subclasses are `ValueError`s too, or `RuntimeError`s where the arguments were right and the world was not, so that
code that catches the built-in ones keeps working.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from types import UnionType
from typing import TYPE_CHECKING, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: Exit status of a program that ends with advice, as argparse has it, and after Ctrl-C, as shells have it.
_ADVICE, _INTERRUPTED = 2, 130


class LongVPOError(Exception):
    """Base of the errors that a user can mend."""


class ConfigError(LongVPOError, ValueError):
    """A setting has a value it cannot have, or settings exclude each other."""


class CorpusError(LongVPOError, ValueError):
    """A corpus is not as its reader expects; names the file, the record and the field."""


class VideoError(LongVPOError, ValueError):
    """A video, or a clip of one, cannot be read."""


class DatasetError(LongVPOError, ValueError):
    """Preference rows or captions, or the folder that holds them, are not as they should be."""


class ModelError(LongVPOError, ValueError):
    """A checkpoint or a processor is missing or cannot do what is asked of it."""


class TrainingError(LongVPOError, RuntimeError):
    """A run cannot go on: its loss, a gradient or a weight is not finite, or one of its processes has no batch."""


class EndpointError(LongVPOError, RuntimeError):
    """A server refuses what it is asked, or is gone."""


class StorageError(LongVPOError, RuntimeError):
    """The system refuses to read or write: a full or broken disk, missing rights, too many open files."""


#: What to do about each of the system's refusals that a user can mend.
_STORAGE_REMEDIES = {
    errno.ENOSPC: "Free some space, or name a place that has more.",
    errno.EDQUOT: "Free some space within your quota, or name another place.",
    errno.EFBIG: "Raise the limit on a file's size (ulimit -f), or name a place that takes files so large.",
    errno.EROFS: "Name a place that can be written to.",
    errno.EACCES: "Give yourself the right to it (chmod, chown), or name another place.",
    errno.EPERM: "Give yourself the right to it (chmod, chown), or name another place.",
    errno.EIO: "See whether the disk is full or broken, or to the network it is mounted over.",
    errno.ESTALE: "See to the network file system, and mount it again.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n), or lower the number of workers.",
    errno.ENFILE: "Close other programs: the machine has no more files to open.",
    errno.ENOTDIR: "A part of this path is a file, not a folder: name another place.",
    errno.EISDIR: "A folder has this name, where a file is needed: name another place.",
    errno.ENAMETOOLONG: "Name a place with a shorter path.",
}
#: Those that are never about the file that is read, so that another try may read it.
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ESTALE}
#: How libraries say it that give neither the system's number nor its words: SQLite, torch.save, numpy.
_SAID_OTHERWISE = {
    "database or disk is full": errno.ENOSPC,
    "disk I/O error": errno.EIO,
    "readonly database": errno.EROFS,
    "unable to open database file": errno.EACCES,
    "PytorchStreamWriter failed": errno.EIO,
    ". unexpected pos ": errno.EIO,
    "iostream error": errno.EIO,
    " requested and ": errno.EIO,
}


def check_seed(seed: int, name: str = "seed", bits: int = 63) -> None:
    """Refuses a seed that no generator, or no row, can hold.

    Args:
        seed: The seed.
        name: Of the setting.
        bits: 63 where it is written into rows, 32 where transformers seeds everything with it.

    Raises:
        ConfigError: If it is negative, or too large.
    """
    if not 0 <= seed < 2**bits:
        raise ConfigError(f"{name} must be ≥ 0 and < 2^{bits}, got {seed}.")


def check_types(settings: DataclassInstance, but: Collection[str] = ()) -> None:
    """Refuses numbers and truths of a dataclass that are none: `"no"` would count as True, and 8.5 as a number of rows.

    Whole numbers are floats too, and become such. Fields of any other type are left alone.

    Args:
        settings: Whose values.
        but: Fields that somebody else checks.

    Raises:
        ConfigError: If one has a value of another type.
    """
    hints = get_type_hints(type(settings))
    for each in fields(settings):
        value, expected = getattr(settings, each.name), hints[each.name]
        kinds = set(get_args(expected)) if get_origin(expected) in (Union, UnionType) else {expected}
        if each.name in but or not kinds <= {int, float, bool, type(None)}:
            continue
        if float in kinds and type(value) is int:
            object.__setattr__(settings, each.name, float(value))  # also where it is frozen
        elif type(value) not in kinds:
            wanted = getattr(expected, "__name__", str(expected))
            raise ConfigError(f"{each.name} must be of type {wanted}, got {value!r}.")


def not_among(name: str, value: object, known: Collection[str]) -> ConfigError:
    """What is wrong with a setting that must be one of some names, with the nearest of them."""
    near = get_close_matches(str(value), known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return ConfigError(f"{name} must be among {', '.join(known)}, got {value!r}.{meant}")


def storage_error(error: BaseException) -> StorageError | None:
    """What the system refused, in one sentence with its remedy; None if the error, and what caused it, is not about it.

    Args:
        error: Of Python, or of a library that wraps the system's refusal in an exception of its own.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        code = _refusal(cause)
        if code in _STORAGE_REMEDIES:
            # Of two files, as of a copy, the second is written.
            names = (getattr(link, name, None) for link in seen for name in ("filename2", "filename"))
            where = next((str(name) for name in names if name), "")
            at = f"{where}: " if where else ""
            said = os.strerror(code) if isinstance(cause, OSError) else " ".join(str(cause).split())[:300]
            return StorageError(f"{at}{said}. {_STORAGE_REMEDIES[code]}")
        cause = cause.__cause__ or cause.__context__
    return None


def check_machine(error: BaseException) -> None:
    """Raises a `StorageError` if the machine was short of something when a file was read.

    That says nothing about the file, which must not be dropped for it.
    """
    if isinstance(error, StorageError):
        raise error
    if _refusal(error) in _OF_THE_MACHINE and (refused := storage_error(error)):
        raise refused from error


def _refusal(error: BaseException) -> int:
    """The number of the system's refusal; 0 for none."""
    if isinstance(error, LongVPOError):
        return 0
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = str(error)
    words = {**{os.strerror(code): code for code in _STORAGE_REMEDIES}, **_SAID_OTHERWISE}
    return next((code for text, code in words.items() if text in said), 0)


@contextmanager
def advice(program: str, go_on: str = "") -> Iterator[None]:
    """Shows what a user can mend as one line of advice and ends the program with status 2; raises all other exceptions.

    After Ctrl-C the status is 130.

    Args:
        program: What the user called, to begin the line with.
        go_on: How to go on after Ctrl-C, or where the disk or the system stopped it: a sentence.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted. {go_on}".rstrip(), file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        told = error if isinstance(error, LongVPOError) else storage_error(error)
        if told is None:
            raise
        more = f" {go_on}" if go_on and isinstance(told, StorageError) else ""
        print(f"{program}: {told}{more}", file=sys.stderr)
        sys.exit(_ADVICE)
