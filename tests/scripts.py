"""The builders' commands, which `dataset_scripts/` call."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[1] / "dataset_scripts"


def load(name: str) -> ModuleType:
    """The module whose `main` the script of that name calls."""
    return importlib.import_module(f"longvpo_hf.commands.build.{name}")
