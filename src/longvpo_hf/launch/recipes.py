"""The training scripts as modules, for a program that runs several of them."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from longvpo_hf.shipped import shipped


def load_recipe(name: str) -> ModuleType:
    """A training script as a module, which has a `main`.

    Args:
        name: `stage1`, `stage2` or `temporal`.
    """
    module_name = f"longvpo_recipe_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, shipped(f"recipes/{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[module_name] = module
    return sys.modules[module_name]
