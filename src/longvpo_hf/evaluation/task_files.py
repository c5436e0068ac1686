"""The folder that lmms-eval is given as `--include_path`: a YAML file for each suite, subset and group.

lmms-eval finds tasks by such files alone. They follow from the suites, so they are written when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from longvpo_hf.artifacts import digest, write_text
from longvpo_hf.evaluation.suite import Suite
from longvpo_hf.evaluation.suites import suites

_CLASS = "class: !function longvpo_hf.evaluation.tasks.MultipleChoice\n"
#: lmms-eval adds up all metrics whose name contains the one given here: no other may hold the word `score`.
_MEANS = ("score", "official", "unparsed", "cut_off")


def tasks_folder() -> Path:
    """The folder, in the cache of the Hugging Face libraries; its name follows from its content."""
    files = _files()
    folder = cached_assets_path("longvpo-hf", "lmms-eval", f"tasks-{digest(files)[:12]}")
    for name, text in files.items():
        if not (folder / name).is_file():
            write_text(folder / name, text)
    return folder


def task_names(suite: Suite) -> list[str]:
    """Names of a suite's tasks."""
    if suite.subsets:
        return [f"{_name(suite)}_{subset}" for subset in suite.subsets]
    has_others = any(other.asked_with == suite.name for other in suites().values())
    return [f"{_name(suite)}_plain" if has_others else _name(suite)]  # else the name is that of the group of both


def _name(suite: Suite) -> str:
    return f"longvpo_{suite.name}"


def _files() -> dict[str, str]:
    """Content of each file."""
    files = {"longvpo.yaml": _yaml({"group": "longvpo", "task": [_name(suite) for suite in suites().values()
                                                                  if not suite.asked_with]})}  # fmt: skip
    for suite in suites().values():
        names = task_names(suite)
        for name, subset in zip(names, suite.subsets or ("",), strict=True):
            task = {"task": name, "metadata": {"suite": suite.name, "version": 1.0}}
            files[f"{name}.yaml"] = _yaml(task | ({"dataset_name": subset} if subset else {})) + _CLASS
        others = [_name(other) for other in suites().values() if other.asked_with == suite.name]
        if suite.subsets:
            means = [{"metric": metric, "aggregation": "mean", "weight_by_size": False} for metric in _MEANS]
            group = {"group": _name(suite), "task": names, "aggregate_metric_list": means}
            files[f"{_name(suite)}.yaml"] = _yaml(group)
        elif others:
            files[f"{_name(suite)}.yaml"] = _yaml({"group": _name(suite), "task": [*names, *others]})
    return files


def _yaml(value: Mapping[str, Any]) -> str:
    """A mapping as YAML, each entry as JSON, which is YAML too."""
    return "".join(f"{name}: {json.dumps(entry)}\n" for name, entry in value.items())
