"""The scripts of `dataset_scripts/` as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[1] / "dataset_scripts"


def load(name: str) -> ModuleType:
    """The script of that name. Under a name of its own: the recipes have the same."""
    module_name = f"dataset_scripts_{name}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))  # for what the scripts share, as when Python runs one
    spec = importlib.util.spec_from_file_location(module_name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
