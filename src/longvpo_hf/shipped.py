"""Files that ship with the package beside its modules: recipes with their configurations, templates of model cards."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path:
    """A shipped file or folder: in a wheel inside the package, in a checkout where the repository keeps it.

    Args:
        name: Its path in the repository, e.g. `recipes/stage1.py`.

    Raises:
        FileNotFoundError: If nothing of that name ships.
    """
    package = Path(__file__).parent
    for path in (package / name, package.parents[1] / name):
        if path.exists():
            return path
    raise FileNotFoundError(f"{name} does not ship with this package.")
