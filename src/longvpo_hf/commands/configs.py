"""`longvpo configs`: the configurations and studies that ship with the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from longvpo_hf.artifacts import write_text
from longvpo_hf.commands.cli import new_app
from longvpo_hf.errors import ConfigError
from longvpo_hf.shipped import find_among, shipped_accelerate_configs, shipped_configs
from longvpo_hf.studies.study import shipped_studies

app = new_app("configs", "Lists the shipped configurations, or copies one.")


@app.default
def configs() -> None:
    """Lists the shipped configurations, for `longvpo train`, `longvpo check` and `longvpo run`."""
    for title, option, ship in (
        ("Recipes", "--config", shipped_configs()),
        ("accelerate", "--accelerate_config", shipped_accelerate_configs()),
        ("Studies", "longvpo run", shipped_studies()),
    ):
        width = max(map(len, ship))
        print(f"{title} ({option} NAME):")
        for name, path in ship.items():
            print(f"  {name:<{width}}  {_first_line(path)}")


@app.command
def copy(name: str, destination: Path = Path(), /) -> None:
    """Copies a configuration, to change it, and beside it the JSON schema by which editors complete it.

    Args:
        name: As `longvpo configs` lists it.
        destination: The new file, or a folder for it.
    """
    found = find_among({**shipped_configs(), **shipped_accelerate_configs(), **shipped_studies()}, name)
    path = destination / found.name if destination.is_dir() else destination
    if path.exists():
        raise ConfigError(f"{path} is there already and is not replaced; name another file.")
    text = found.read_text(encoding="utf-8")
    if reference := re.search(r"\$schema=(\S+)", text):
        schema = found.parent / reference[1]
        if not (path.parent / schema.name).exists():
            write_text(path.parent / schema.name, schema.read_text(encoding="utf-8"))
        text = text.replace(reference[1], schema.name, 1)
    write_text(path, text)
    print(path)


@app.command
def schema(of: Literal["recipe", "study"], /) -> None:
    """Prints the JSON schema of a recipe's or a study's YAML, by which editors complete it.

    For example, for a file whose first line is `# yaml-language-server: $schema=recipe.schema.json`:

        longvpo configs schema recipe > recipe.schema.json

    Args:
        of: Which files.
    """
    from longvpo_hf.launch.schema import recipe_schema, schema_text, study_schema

    print(schema_text(recipe_schema() if of == "recipe" else study_schema()), end="")


def _first_line(path: Path) -> str:
    """What a configuration is, as its first comment says."""
    with path.open(encoding="utf-8") as file:
        return re.split(r"[.:](?:\s|$)", file.readline().removeprefix("#").strip())[0]
