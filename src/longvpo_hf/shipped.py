"""Files that ship with the package beside its modules: recipes with their configurations, templates of model cards."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from longvpo_hf.errors import ConfigError


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


def shipped_configs() -> dict[str, Path]:
    """The recipes' configurations by name, e.g. `internvl3_8b/stage1_lora`."""
    folder = shipped("recipes/configs")
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.rglob("*.yaml"))}


def shipped_accelerate_configs() -> dict[str, Path]:
    """accelerate's configurations by name, e.g. `fsdp2`."""
    return {path.stem: path for path in sorted(shipped("recipes/accelerate").glob("*.yaml"))}


def find_config(name: str) -> Path:
    """A recipe's configuration: a file, or else a shipped one.

    Args:
        name: Path of the file, or the name as `shipped_configs` has it.

    Raises:
        ConfigError: If it is neither.
    """
    path = Path(name)
    return path if path.is_file() else find_among(shipped_configs(), name)


def find_accelerate_config(name: str) -> Path:
    """A configuration of accelerate; as `find_config`."""
    path = Path(name)
    return path if path.is_file() else find_among(shipped_accelerate_configs(), name)


def find_among(configs: dict[str, Path], name: str, kind: str = "configuration") -> Path:
    """The configuration, or the file of another kind, of that name.

    Raises:
        ConfigError: If there is none; names the nearest.
    """
    found = configs.get(name.removesuffix(".yaml"))
    if found is None:
        near = get_close_matches(name, configs, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"{name or 'An empty name'} is not a file and not a shipped {kind}. {meant}`longvpo configs` lists them."
        )
    return found
