"""What may leave this machine: names without its folders, texts without its paths and tokens, inert Markdown."""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath

#: Absolute paths of at least two parts inside a text; not addresses, fractions or closing tags.
_PATH = re.compile(
    r"(?<![\w.:/\\~<-])(?:(?:~\w*)?/[^\s/\"'<>|,;()]+|[A-Za-z]:\\[^\s\\\"'<>|,;()]+)[/\\][^\s\"'<>|,;()]*"
)
#: Access tokens of Hugging Face, and keys in the form of most endpoints'.
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})")


def markdown(text: object) -> str:
    """Text from outside as one line of Markdown that shows it unchanged, also in a table's cell."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def public_name(name: str) -> str:
    """A model's, dataset's or file's name without the folders of this machine."""
    return _last(name) if _is_path(name) or os.path.isdir(name) else name


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of a repository's on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_text(text: str) -> str:
    """A text in which absolute paths keep their last part only, and access tokens are three dots."""
    if _is_path(text) and "\n" not in text:
        text = _last(text)
    return _TOKEN.sub("…", _PATH.sub(lambda match: _last(match[0]), text))


def _is_path(text: str) -> bool:
    return PureWindowsPath(text).is_absolute() or re.match(r"~\w*/|\.{0,2}/", text) is not None


def _last(path: str) -> str:
    return PureWindowsPath(path).name if PureWindowsPath(path).is_absolute() else Path(path).name
