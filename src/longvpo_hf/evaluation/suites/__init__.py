"""The suites: a file of this package defines one benchmark each, as `SUITES`, and `suites` finds it.

To add one, add its file here and its rows to `tests/benchmark_doubles.py`; no other file knows suites by name.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from longvpo_hf.evaluation.paper import PAPER_ORDER
from longvpo_hf.evaluation.suite import Suite


@cache
def suites() -> dict[str, Suite]:
    """All suites by name: those of the paper's table in its order, then the others in the order of their files."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found = {suite.name: suite for module in modules for suite in module.SUITES}
    return {name: found[name] for name in sorted(found, key=lambda name: (*PAPER_ORDER, name).index(name))}
