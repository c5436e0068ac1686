"""What may leave this machine: names without its folders, and text from outside as one line of Markdown."""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath


def markdown(text: object) -> str:
    """Text from outside as one line of Markdown that shows it as it is, in a table's cell too."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def public_name(name: str) -> str:
    """A model's, dataset's or file's name without the folders of the machine it lies on."""
    if PureWindowsPath(name).is_absolute():
        return PureWindowsPath(name).name
    return Path(name).name if name.startswith(("/", "~", "./", "../")) or os.path.isdir(name) else name
