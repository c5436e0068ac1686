"""Names from data become paths inside a named folder, or an error.

Corpora, archives, published rows and captions name files. Whoever wrote them may be careless or hostile, so every such
name goes through `path_inside` before anything opens, copies or publishes the file.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from longvpo_hf.errors import LongVPOError

#: How the folders of repositories in Hugging Face's cache are called.
_REPOSITORIES = ("models--", "datasets--", "spaces--")
#: PATH_MAX of Linux.
_MAX_CHARACTERS = 4096


class OutsideRoot(LongVPOError, ValueError):
    """A name leads out of the folder that it must stay in, or cannot be the name of a file."""


def path_inside(root: str | Path, name: str, *, allow_absolute: bool = False) -> Path:
    """The path of the file `name` in the folder `root`, whether or not there is such a file.

    A name that is spelled otherwise than the file is found too: with backslashes, or with its accents composed (NFC)
    where the disk has them decomposed (NFD), and the reverse.

    Args:
        root: The folder.
        name: A name from data, relative to `root`.
        allow_absolute: Whether the name may be an absolute path, still inside `root`.

    Returns:
        An absolute path. Links are followed to check it, and kept in what is returned.

    Raises:
        OutsideRoot: If the name is empty, too long, absolute, contains `..` or a null character, cannot be encoded, or
            leads out of `root` through a link.
    """
    root = Path(os.path.abspath(root))
    if problem := _problem(name, allow_absolute):
        raise OutsideRoot(f"{shown(name)} {problem}; it must name a file inside {root}.")
    slashed = name.replace("\\", "/")
    spellings = (name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
    path = root / next((spelling for spelling in spellings if os.path.lexists(root / spelling)), slashed)
    if not is_inside(root, path):
        raise OutsideRoot(f"{shown(name)} leads to {os.path.realpath(path)}; it must name a file inside {root}.")
    return path


def is_inside(root: str | Path, path: str | Path) -> bool:
    """Whether a path lies in a folder once links are followed.

    A snapshot in Hugging Face's cache consists of links into the `blobs` folder beside its `snapshots`; these count as
    inside.
    """
    real_root, real_path = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    blobs = [
        parent.parent.parent / "blobs"
        for parent in (real_root, *real_root.parents)
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith(_REPOSITORIES)
    ]
    return any(real_path.is_relative_to(folder) for folder in (real_root, *blobs))


def leads_out(name: str) -> bool:
    """Whether a name could lead out of any folder that it is joined to, whatever files are there."""
    return _problem(name, allow_absolute=False) is not None


def shown(text: str, most: int = 200) -> str:
    """Text from outside as a message shows it: quoted, on one line, of bounded length."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return repr(cut)


def printable(text: str) -> str:
    """Text from outside on one line, without what a terminal would obey: escapes in the place of control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shared_cache() -> Path:
    """The folder of cut clips, and of what is known about sources, that all builds share unless another is named."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "longvpo"


def common_folder(paths: Iterable[str]) -> str:
    """The innermost folder that holds all files; empty where they have none in common."""
    try:
        folder = os.path.commonpath({os.path.dirname(path) for path in paths})
    except ValueError:  # none, or some absolute and some not
        return ""
    return folder.rstrip(os.sep)


def below(folder: str, path: str) -> str:
    """A file as it is named below a folder, with forward slashes; unchanged where it is elsewhere.

    Finished work is found by such names, so that it is found again when the folder has moved.
    """
    return path[len(folder) + 1 :].replace(os.sep, "/") if folder and path.startswith(folder + os.sep) else path


def _problem(name: str, allow_absolute: bool) -> str | None:
    if not name.strip():
        return "is empty"
    if len(name) > _MAX_CHARACTERS:
        return f"has {len(name)} characters, more than any path"
    if "\0" in name:
        return "contains a null character"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid Unicode"
    windows = PureWindowsPath(name)
    is_absolute = PurePosixPath(name).is_absolute() or windows.is_absolute() or (os.name == "nt" and windows.drive)
    if is_absolute and not allow_absolute:
        return "is an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "contains '..'"
    return None
