"""From a study to its steps: each a program, what it takes from other steps, and what its result follows from.

A step's *identity* is the digest of its settings and of the identities of the steps it takes from. It names no folder
of the run, so that a run may be moved, and equal identities stand for equal results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from longvpo_hf.artifacts import digest
from longvpo_hf.errors import ConfigError
from longvpo_hf.shipped import find_accelerate_config, find_config
from longvpo_hf.studies.study import BASE, MINIATURE, Build, Evaluate, Study, Train

#: Folders of a run that are no step's.
_RESERVED = ("state", "earlier", "logs", "pictures", "cache")


@dataclass(frozen=True, slots=True)
class InRun:
    """A file or folder of the run, as an option's value.

    Args:
        name: Its name in the run's folder.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Step:
    """A step.

    Args:
        name: Of the step, of its folder and of its log.
        kind: `world`, `base`, `build`, `audit`, `train`, `evaluate` or `push`.
        program: What runs: words after the interpreter, `InRun` among them.
        needs: The steps it takes from.
        settings: What its result follows from besides those: JSON.
        model: Of an evaluation: the step whose model is measured, `base` for the base.
        source: Of a build: its folder of videos.
        environment: Variables its process gets.
        after: Steps that come before it where they run, though it takes nothing from them.
    """

    name: str
    kind: str
    program: tuple[str | InRun, ...]
    needs: tuple[str, ...]
    settings: Mapping[str, Any]
    model: str = ""
    source: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    def words(self, run: Path) -> list[str]:
        """The program's words in a run's folder."""
        return [str(run / word.name) if isinstance(word, InRun) else word for word in self.program]


def identities(steps: Iterable[Step]) -> dict[str, str]:
    """The identity of every step."""
    found: dict[str, str] = {}
    for step in steps:
        found[step.name] = digest([step.kind, dict(step.settings), {need: found[need] for need in step.needs}])
    return found


def steps_of(study: Study, base_identity: str, videos_identity: Callable[[str], str]) -> list[Step]:
    """The steps of a study, each after those it takes from.

    Args:
        study: The study.
        base_identity: Tells the base's weights from others.
        videos_identity: Tells the videos in a folder from others.

    Raises:
        ConfigError: If a step takes from one that is not before it, two have one name, or an option is not known.
    """
    compiler = _Compiler(study, base_identity, videos_identity)
    steps = list(compiler.steps())
    names = [step.name for step in steps]
    for name in names:
        if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name) is None or name in _RESERVED:
            raise ConfigError(f"A step's name is a folder's: lower-case letters, digits, - and _, got {name!r}.")
        if names.count(name) > 1:
            raise ConfigError(f"Two steps are called {name}; give one of them another `name`.")
    return steps


class _Compiler:
    def __init__(self, study: Study, base_identity: str, videos_identity: Callable[[str], str]) -> None:
        self._study = study
        self._base_identity = base_identity
        self._videos_identity = videos_identity
        self._is_miniature = study.base == MINIATURE
        #: The step, and what of it is given: the last model and the last rows.
        self._model = BASE
        self._rows = ""
        self._made: dict[str, str] = {}
        self._audited: set[str] = set()
        #: Lists of benchmarks' videos that a build was given, for the audit of its rows.
        self._lists: dict[str, Any] = {}

    def steps(self) -> Iterator[Step]:
        if self._is_miniature:
            from longvpo_hf.miniature.study import make_base, make_world

            yield make_world(self._study)
            yield make_base(self._study)
        yield from self._evaluations(BASE)
        for item in self._study.steps:
            name = item.name or self._default_name(item)
            if isinstance(item, Build):
                yield self._build(item, name)
                self._rows = name
            else:
                training = self._train(item, name)
                yield from self._audits(training)
                yield training
                self._model = name
            self._made[name] = "rows" if isinstance(item, Build) else "model"
            if isinstance(item, Train):
                yield from self._evaluations(name)
        if self._study.push_to is not None:
            yield self._push()

    def _default_name(self, item: Build | Train) -> str:
        name = f"{item.build}-rows" if isinstance(item, Build) else f"{item.train}-model"
        number = sum(made == name or made.startswith(f"{name}-") for made in self._made)
        return f"{name}-{number + 1}" if number else name

    # ------------------------------------------------------------------------------------------------------ models

    def _given(self, model: str) -> tuple[str | InRun, tuple[str, ...], Mapping[str, Any]]:
        """A model as an option's value, the step it is from, and what tells it apart where no step makes it."""
        if model != BASE or self._is_miniature:
            return InRun(model), (model,), {}
        return self._study.base, (), {"base": self._base_identity}

    def _of(self, name: str, made: str, key: str, step: str) -> str:
        """The name of an earlier step that a step names.

        Raises:
            ConfigError: If there is no such step before it.
        """
        if self._made.get(name) != made and not (made == "model" and name == BASE):
            before = [step for step, what in self._made.items() if what == made]
            raise ConfigError(f"{step}: {key}: {name} is no step before it that makes {made}; have {before}.")
        return name

    # ------------------------------------------------------------------------------------------------------- kinds

    def _build(self, item: Build, name: str) -> Step:
        if self._is_miniature:
            from longvpo_hf.miniature.study import make_rows

            answerer = self._model if item.responder is None else self._of(item.responder, "model", "responder", name)
            return make_rows(self._study, item.build, name, answerer)
        options: dict[str, Any] = {**self._study.videos, **item.options}
        options = {option.replace("-", "_"): value for option, value in options.items()}
        if item.responder is None or item.responder == BASE or self._made.get(item.responder) == "model":
            model, needs, settings = self._given(item.responder or self._model)
        else:
            model, needs, settings = item.responder, (), {}
            options["responder"] = model
        followed = {option: value for option, value in options.items() if option not in _LEAVE_ROWS}
        if "iterate_from" not in options:
            options.setdefault("responder", model)
        options.update(seed=self._study.seed, output=InRun(name))
        words = ["build", item.build, *_words(options)]
        _check_command(["build", item.build], options)
        videos = self._videos_identity(str(options["source"]))
        self._lists[name] = options.get("benchmark_videos")
        return Step(
            name,
            "build",
            _longvpo(words),
            needs,
            {"method": item.build, "options": _plain(followed), "videos": videos, "seed": self._study.seed, **settings},
            source=str(options["source"]),
        )

    def _train(self, item: Train, name: str) -> Step:
        start = self._model if item.start is None else self._of(item.start, "model", "start", name)
        rows = item.rows or self._rows
        if not rows:
            raise ConfigError(f"{name}: there are no rows to train on: put a `build` before it, or name `rows`.")
        rows = self._of(rows, "rows", "rows", name)
        model, needs, settings = self._given(start)
        needs = (*needs, rows)
        options: dict[str, Any] = {"model_name_or_path": model, "dataset_name": InRun(rows)}
        if item.replay is not None:
            options["replay_name"] = InRun(self._of(item.replay, "rows", "replay", name))
            needs = (*needs, item.replay)
        variables: Mapping[str, str] = {}
        if self._is_miniature:
            from longvpo_hf.miniature.study import environment, training_options

            options |= training_options(self._study, item.train)
            variables = environment(self._study)
        options |= {**item.options, "seed": self._study.seed}
        config = item.config
        if config is None:
            raise ConfigError(f"{name}: `config` is missing: {self._study.base} is no base of a shipped configuration.")
        content = _content(config)
        on_cpu = {**content, **options}.get("use_cpu")
        accelerate = "cpu" if on_cpu else item.accelerate_config or "one_gpu"
        if on_cpu and (item.accelerate_config or item.num_processes):
            raise ConfigError(
                f"{name}: with `use_cpu` it is one process: leave out accelerate_config and num_processes."
            )
        if item.accelerate_config is not None:
            find_accelerate_config(item.accelerate_config)
        processes = str(item.num_processes or "")
        program = ("-m", "longvpo_hf.studies.child", "train", item.train, config, accelerate, processes)
        words = ["--resume_from_checkpoint", "true", "--output_dir", InRun(name), *_recipe_words(options)]
        return Step(
            name,
            "train",
            (*program, *words),
            tuple(dict.fromkeys(needs)),
            {"recipe": item.train, "config": content, "options": _plain(options), **settings},
            after=tuple(f"{need}-audit" for need in dict.fromkeys(needs) if self._made.get(need) == "rows"),
            environment=variables,
        )

    def _audits(self, training: Step) -> Iterator[Step]:
        """The audits of the rows that no training before this one took."""
        for audit in training.after:
            if audit not in self._audited:
                self._audited.add(audit)
                rows = audit.removesuffix("-audit")
                options = {"output": InRun(f"{audit}/audit.html"), "benchmark_videos": self._lists.get(rows)}
                yield Step(audit, "audit", _longvpo(["audit", InRun(rows), *_words(options)]), (rows,), {})

    def _evaluations(self, model: str) -> Iterator[Step]:
        evaluate = self._study.evaluate
        for probe in evaluate.probes:
            if probe.probe == "lengths":
                from longvpo_hf.miniature.study import measure

                yield measure(self._study, model)
                continue
            yield self._measurement(model, probe.probe, ["probe", probe.probe], probe.options)
        if evaluate.tasks:
            options = {"tasks": ",".join(evaluate.tasks), **self._sampling(), **evaluate.options}
            yield self._measurement(model, "benchmarks", ["eval"], options)

    def _sampling(self) -> dict[str, Any]:
        """How benchmarks show videos unless the study says it: to all models alike, as the first training does."""
        training = next((step for step in self._study.steps if isinstance(step, Train) and step.config), None)
        if training is None:
            return {}
        settings = {**_content(str(training.config)), **training.options}
        shown = {"frames": settings.get("num_frames"), "max_pixels": settings.get("max_pixels")}
        if "fps" in settings:
            shown["fps"] = "none" if settings["fps"] is None else settings["fps"]
        return shown

    def _measurement(self, model: str, what: str, command: list[str], options: Mapping[str, Any]) -> Step:
        given, needs, settings = self._given(model)
        name = f"{model}-{what}"
        options = {option.replace("-", "_"): value for option, value in options.items()} | {"output": InRun(name)}
        _check_command([*command, "model"], options)
        return Step(
            name,
            "evaluate",
            _longvpo([*command, given, *_words(options)]),
            needs,
            {"measures": what, "options": _plain(options), **settings},
            model=model,
        )

    def _push(self) -> Step:
        if self._model == BASE:
            raise ConfigError("push_to pushes the model that was trained last, and no step trains one.")
        study = self._study
        where = {"repo_id": study.push_to, "private": study.private, "revision": study.revision}
        words = (str(study.push_to), _private(study.private), *([study.revision] if study.revision else []))
        measured = [f"{self._model}-{what}" for what in _measured(self._study.evaluate)]
        return Step(
            "push",
            "push",
            ("-m", "longvpo_hf.studies.push", InRun(self._model), *words),
            (self._model, *measured),
            where,
        )


#: Options of a build that change how it is done, and not what comes of it.
_LEAVE_ROWS = (
    "output",
    "source",
    "cache",
    "num_workers",
    "concurrency",
    "patience_seconds",
    "api_key_env",
)


def _private(private: bool | None) -> str:
    return {None: "default", True: "private", False: "public"}[private]


def _measured(evaluate: Evaluate) -> list[str]:
    return [*(probe.probe for probe in evaluate.probes), *(["benchmarks"] if evaluate.tasks else [])]


def _longvpo(words: Sequence[str | InRun]) -> tuple[str | InRun, ...]:
    return ("-m", "longvpo_hf.studies.child", "command", *words)


def _words(options: Mapping[str, Any]) -> list[str | InRun]:
    """Options as words of a `longvpo` command."""
    words: list[str | InRun] = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            for item in value if isinstance(value, (list, tuple)) else [value]:
                words += [option, item if isinstance(item, InRun) else str(item)]
    return words


def _recipe_words(options: Mapping[str, Any]) -> list[str | InRun]:
    """Options as words of a recipe."""
    words: list[str | InRun] = []
    for name, value in options.items():
        words.append(f"--{name.replace('-', '_')}")
        if isinstance(value, (list, tuple)):
            words += [str(item) for item in value]
        elif isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif isinstance(value, InRun):
            words.append(value)
        else:
            words.append(str(value).lower() if isinstance(value, bool) else str(value))
    return words


def _check_command(command: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuses an option that the command does not have, or a value that it cannot have.

    Raises:
        ConfigError: With what is wrong.
    """
    from cyclopts import CycloptsError

    from longvpo_hf.commands.app import app

    words = [word if isinstance(word, str) else word.name for word in _words(options)]
    said = " ".join(part for part in command if part != "model")
    try:
        function, bound, _ = app.parse_args([*command, *words], exit_on_error=False, print_error=False)
        if hasattr(function, "check"):
            function.check(*bound.args, **bound.kwargs)
    except (CycloptsError, ConfigError) as error:
        raise ConfigError(f"{said}: {error}") from error
    _, (*_, parsed), _ = app.parse_commands([*command, *words])
    hints = {argument.name: argument.hint for argument in parsed.assemble_argument_collection()}
    for option, value in options.items():
        hint = hints.get(f"--{option.replace('_', '-')}")
        if isinstance(value, (list, tuple)) and not any(
            get_origin(kind) in (list, tuple) for kind in (hint, *get_args(hint))
        ):
            raise ConfigError(f"{said}: {option} has one value, got {value}; several in one are a text: 'a,b'.")


def _plain(value: Any) -> Any:
    """A value as JSON in which the run's own files have the names of their steps."""
    if isinstance(value, InRun):
        return f"→ {value.name}"
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if name != "output"}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _content(config: str) -> Any:
    """What a recipe's configuration says, without comments.

    Raises:
        ConfigError: If it is none.
    """
    from longvpo_hf.yaml_file import read_yaml

    content = read_yaml(find_config(config))
    if not isinstance(content, dict):
        raise ConfigError(f"{config} is no recipe's configuration: it must be a mapping of settings to values.")
    return content
