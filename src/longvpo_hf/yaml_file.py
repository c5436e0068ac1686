"""YAML files that users write: options of a command, a recipe's configuration, a study."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from longvpo_hf.errors import ConfigError


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values alone, and no key twice, of which YAML's readers keep the last.

    Raises:
        ConfigError: If it cannot be read, with the place in the file.
    """
    try:
        with path.open("rb") as file:
            return yaml.load(file, _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} cannot be read as YAML: it is nested too deep.") from error


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)
