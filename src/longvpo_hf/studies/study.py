"""What a study is: a base, videos, steps and measurements, as frozen settings read from YAML.

Keys that are not known are refused by name. Options of builds, trainings and probes are those of `longvpo build`, of
the recipes and of `longvpo probe`, and are checked against them before anything runs (`studies.steps`).
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from longvpo_hf.errors import ConfigError, check_seed
from longvpo_hf.public import is_hub_name
from longvpo_hf.shipped import find_among
from longvpo_hf.yaml_file import read_yaml

#: The base and the corpus that are made from nothing, on a laptop.
MINIATURE = "miniature"
#: The base that is chosen so that the study ends within its hours.
AUTO = "auto"
#: The name of the model to start from among those of steps.
BASE = "base"
PROBES = ("position", "needle", "lengths")
_METHODS = ("stage1", "stage2", "temporal")
#: Settings of a training that the study itself decides, and what they are in a study.
_OWN_OF_TRAINING = {
    "model_name_or_path": "`start`",
    "dataset_name": "`rows`",
    "replay_name": "`replay`",
    "output_dir": "`name`",
    "seed": "the study's `seed`",
    "resume_from_checkpoint": "the same command, which goes on",
    "push_to_hub": "the study's `push_to`",
    "hub_model_id": "the study's `push_to`",
}


@dataclass(frozen=True, slots=True)
class Build:
    """Makes rows.

    Args:
        build: The method: `stage1`, `stage2` or `temporal`.
        name: Of the step and of its folder. Empty: the method's, e.g. `stage1-rows`.
        responder: The model that answers: a step that trains one, `base` for the base, or as `--responder` of
            `longvpo build`. None: the last training, or the base.
        options: As in `longvpo build METHOD`.
    """

    build: str
    name: str = ""
    responder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("build", self.build, _METHODS)
        if self.responder is not None and not self.responder.strip():
            raise ConfigError(f"build: {self.build}: responder is empty; name a model, or leave it out.")
        _check_name("build", self.name)
        _check_own(f"build: {self.build}", self.options, ("output", "push_to_hub", "dry_run", "config", "seed"))


@dataclass(frozen=True, slots=True)
class Train:
    """Trains a model.

    Args:
        train: The recipe: `stage1`, `stage2` or `temporal`.
        name: Of the step and of its folder. Empty: the recipe's, e.g. `stage1-model`.
        config: The recipe's YAML, or the name of a shipped one. None: the shipped one of the base that fits this
            machine.
        accelerate_config: accelerate's YAML, or the name of a shipped one. None: what the machine has.
        num_processes: Processes, one for each GPU. None: as accelerate's file says.
        rows: The step whose rows it is trained on. None: the last build.
        start: The step whose model it starts from; `base` for the base. None: the last training, or the base.
        replay: A step whose rows are mixed in, half as many. None: none are.
        options: As in the recipe, and override its file.
    """

    train: str
    name: str = ""
    config: str | None = None
    accelerate_config: str | None = None
    num_processes: int | None = None
    rows: str | None = None
    start: str | None = None
    replay: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("train", self.train, _METHODS)
        _check_name("train", self.name)
        for option in self.options:
            if instead := _OWN_OF_TRAINING.get(option.replace("-", "_")):
                raise ConfigError(f"train: {self.train}: {option} is decided by the study itself; it has {instead}.")
            if self.options[option] is None:
                raise ConfigError(f"train: {self.train}: {option} has no value; give one, or leave it out.")
        if self.num_processes is not None and self.num_processes < 1:
            raise ConfigError(f"train: {self.train}: num_processes must be ≥ 1, got {self.num_processes}.")


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe of every model.

    Args:
        probe: `position` or `needle`; `lengths` is that of the miniature's world.
        options: As in `longvpo probe NAME`.
    """

    probe: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("probe", self.probe, PROBES)
        _check_own(f"probe: {self.probe}", self.options, ("output", "config"))


@dataclass(frozen=True, slots=True)
class Evaluate:
    """What is measured before, and after every training.

    Args:
        tasks: Benchmarks, as in `longvpo eval --tasks`.
        probes: See `Probe`; a name alone has its default options.
        options: As in `longvpo eval`: frames, data_root, limit, …
    """

    tasks: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [probe.probe for probe in self.probes]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"evaluate.probes: {twice[0]} is there twice; a study has one of each.")
        _check_own("evaluate", self.options, ("output", "config"))


@dataclass(frozen=True, slots=True)
class Study:
    """A study.

    Args:
        base: The model to start from: a name on the Hub or a folder; `miniature`: a tiny one, trained from nothing;
            `auto`: chosen by `hours`.
        steps: In order.
        videos: Where videos come from, for every build: `source`, `corpus` and more options of `longvpo build`.
        evaluate: See `Evaluate`.
        push_to: NAMESPACE/NAME of the last model on the Hub. None: nothing is pushed.
        private: Whether a new repository is private. None: as the namespace has it.
        revision: Branch to push to; made if it is not there. None: main.
        seed: Decides every random choice.
        hours: With `base: auto`: base, frames and rows are chosen so that the study ends within these on this machine.
        miniature: With `base: miniature`: `scale` (standard, fast or large), and fields of `MiniatureSettings`.
        name: Of the study; by default its file's.
    """

    base: str
    steps: tuple[Build | Train, ...]
    videos: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Evaluate = field(default_factory=Evaluate)
    push_to: str | None = None
    private: bool | None = None
    revision: str | None = None
    seed: int = 0
    hours: float | None = None
    miniature: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if not self.base or not self.steps:
            raise ConfigError("A study needs a base and at least one step.")
        check_seed(self.seed, bits=32)
        if self.name in (".", "..") or len(self.name) > 100 or re.search(r"[/\\]|[^\x20-\x7e\w]", self.name):
            raise ConfigError(
                f"A study's name is that of a folder in runs/: without / and \\, at most 100 characters, got "
                f"{self.name!r}. Where the run goes is said with --output."
            )
        if self.push_to is not None and not (is_hub_name(self.push_to) and "/" in self.push_to):
            raise ConfigError(f"push_to must be NAMESPACE/NAME, a repository on the Hub, got {self.push_to!r}.")
        if self.push_to is None and (self.private is not None or self.revision is not None):
            raise ConfigError("private and revision are about a push: name the repository with push_to.")
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise ConfigError(f"hours must be a number > 0, got {self.hours}.")
        if (self.base == AUTO) != (self.hours is not None):
            raise ConfigError("base: auto and hours go together: the base is chosen by the hours.")
        if self.base == MINIATURE:
            self._check_miniature()
        elif self.miniature or any(probe.probe == "lengths" for probe in self.evaluate.probes):
            raise ConfigError("miniature and the probe `lengths` need base: miniature.")
        else:
            for step in self.steps:
                if isinstance(step, Build) and not {**self.videos, **step.options}.get("source"):
                    raise ConfigError("videos: source is missing: the folder of videos that rows are made of.")

    def _check_miniature(self) -> None:
        if self.videos:
            raise ConfigError("base: miniature has videos of its own; leave `videos` out.")
        if self.evaluate.tasks or self.push_to:
            raise ConfigError("base: miniature knows a few words: leave `tasks` and `push_to` out.")
        for step in self.steps:
            if isinstance(step, Build) and step.options:
                raise ConfigError(
                    "base: miniature makes rows as its own settings say: give `miniature: {num_rows: …}` in place of "
                    f"{', '.join(step.options)} at build: {step.build}."
                )


def find_study(name: str) -> Study:
    """Reads a study: a YAML file, or else a shipped one.

    Args:
        name: Path of the file, or a name as `shipped_studies` has it.

    Raises:
        ConfigError: If it is neither, or not a study.
    """
    path = Path(name)
    if not path.is_file():
        path = find_among(shipped_studies(), name, "study")
    return read_study(path)


def shipped_studies() -> dict[str, Path]:
    """The studies that ship with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "shipped").glob("*.yaml"))}


def read_study(path: Path) -> Study:
    """Reads a study's YAML.

    Raises:
        ConfigError: If it cannot be read, a key is not known, or a value is not of its kind.
    """
    content = read_yaml(path)
    try:
        study: Study = _read(Study, content, "")
        return study if study.name else replace(study, name=path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def content_of(study: Study) -> dict[str, Any]:
    """A study as its YAML would have it: what `study_of` reads."""
    content = asdict(study)
    content["steps"] = [_flat(step) for step in content["steps"]]
    content["evaluate"] = _flat({**content["evaluate"], "probes": [_flat(p) for p in content["evaluate"]["probes"]]})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}


def study_of(content: Mapping[str, Any]) -> Study:
    """The study of `content_of`.

    Raises:
        ConfigError: If it is none.
    """
    study: Study = _read(Study, content, "")
    return study


def _flat(item: Mapping[str, Any]) -> dict[str, Any]:
    flat = {**item, **item["options"]}
    del flat["options"]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def _check_own(key: str, options: Mapping[str, Any], own: tuple[str, ...]) -> None:
    for option in options:
        if option.replace("-", "_") in own:
            raise ConfigError(f"{key}: {option} is decided by the study itself; leave it out.")


def _check_name(key: str, name: str) -> None:
    if name == BASE:
        raise ConfigError(f"{key}: name: {BASE} is the model that the study starts from; choose another name.")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {value!r}.{meant}")


# ------------------------------------------------------------------------------------------------------------- reading


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value of YAML as the type of a field."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [one for one in arguments if one is not type(None)]
        return _read(choices[0], value, where) if len(choices) == 1 else _read_step(value, where)
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {value!r}.")
        return tuple(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        return dict(_mapping(value, where))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} must be {_KINDS[kind]}, got {value!r}.")
    return value


_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _read_step(value: Any, where: str) -> Build | Train:
    step = _mapping(value, where)
    if ("build" in step) == ("train" in step):
        raise ConfigError(f"{where} must have one of `build` and `train`, got {', '.join(step) or 'nothing'}.")
    read: Build | Train = _read_dataclass(Build if "build" in step else Train, step, where)
    return read


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if kind is Probe and isinstance(value, str):
        value = {"probe": value}
    given = _mapping(value, where)
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    read: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, item in given.items():
        if key in known and key != "options":
            read[key] = _read(hints[key], item, f"{where}.{key}" if where else key)
        elif "options" in known and key != "options":
            rest[key] = item
        else:
            near = get_close_matches(key, known, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown key {f'{where}.{key}' if where else key}.{meant}")
    if "options" in known:
        read["options"] = rest
    for name, item in known.items():
        if name not in read and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{f'{where}.{name}' if where else name} is missing.")
    return kind(**read)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where or 'a study'} must be a mapping of names to values, got {value!r}.")
    return value
