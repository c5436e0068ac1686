"""Shapes of the model that a configuration starts from, before the model is on this machine.

They come from the model's own config where that is at hand, else from `base_models.json`, which holds the bases of the
shipped configurations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import model_config
from longvpo_hf.shipped import shipped

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Bases that studies make, by the end of their folders, and their names in `base_models.json`.
_MADE: dict[tuple[str, ...], str] = {("miniature", "base"): "miniature", ("pretrained", "base"): "miniature-pretrained"}


def find_model_config(name: str, revision: str = "main") -> PreTrainedConfig:
    """The config of a model, or of the base of an adapter: from a folder, this machine's Hub cache, or the known bases.

    Raises:
        ConfigError: If it is in none of them; the message says what to do.
        ModelError: If its kind of model cannot be used, or transformers does not know it.
    """
    from transformers import AutoConfig

    try:
        return model_config(name, revision, local_files_only=True)
    except OSError:  # not on this machine
        pass
    known = known_bases()
    for prefix, model in known.items():
        if name.rpartition("/")[2].lower().startswith(prefix.lower()):
            shapes = dict(model["config"])
            config = AutoConfig.for_model(shapes.pop("model_type"), **shapes)
            config.name_or_path = prefix
            return config
    raise ConfigError(
        f"The shapes of {name!r} are not known: it is no folder with a config.json, not in this machine's Hub cache, "
        f"no run that a configuration beside this one or a shipped one trains, and none of {', '.join(known)}. Fetch "
        f"its config (hf download {name} config.json), or give --model_name_or_path of a model of the same shapes."
    )


def starting_point(name: str, path: Path) -> str:
    """The model that `name` goes back to: a run that is not trained yet has the shapes of what it starts from.

    Args:
        name: The `model_name_or_path` of a configuration.
        path: The configuration's file. A run is looked for by its `output_dir` in the files beside it, then in the
            shipped ones.

    Returns:
        `name` itself where it exists, or where no configuration trains it.
    """
    if Path(name).exists():
        return name
    runs = {**_shipped_runs(), **_runs([*sorted(path.parent.glob("*.yaml")), path])}
    passed: set[str] = set()
    while name not in passed and not Path(name).exists():
        passed.add(name)
        if Path(name).parts[-2:] in _MADE:
            return _MADE[Path(name).parts[-2:]]
        name = str(runs.get(str(Path(name)), {}).get("model_name_or_path", name))
    return name


@cache
def _shipped_runs() -> dict[str, dict[str, Any]]:
    return _runs(sorted(shipped("recipes/configs").rglob("*.yaml")))


def _runs(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What configurations train, each by its `output_dir`."""
    runs = {}
    for file in files:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and "output_dir" in settings:
            runs[str(Path(settings["output_dir"]))] = settings
    return runs


@cache
def known_bases() -> dict[str, Any]:
    """The bases of the shipped configurations, by the start of their names: shapes, and where each figure is from."""
    known: dict[str, Any] = json.loads((Path(__file__).parent / "base_models.json").read_text(encoding="utf-8"))
    return dict(known["models"])
