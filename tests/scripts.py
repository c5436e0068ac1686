"""The scripts of `dataset_scripts/` as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[1] / "dataset_scripts"


def load(name: str) -> ModuleType:
    """The script of that name, imported as Python imports it when it is run: with its folder on the path."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)
