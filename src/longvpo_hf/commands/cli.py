"""How every command runs: options and help from its settings, a YAML file below the command line, errors as advice.

A command is a function whose parameters are settings dataclasses (`flat`) and a few options of its own. It imports what
it needs when it runs, so that help is shown at once.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from cyclopts import UNSET, App, CycloptsError, Group, Parameter
from cyclopts.config import Dict
from cyclopts.help import DefaultFormatter

from longvpo_hf import __version__
from longvpo_hf.errors import ConfigError, advice
from longvpo_hf.yaml_file import read_yaml

if TYPE_CHECKING:
    from cyclopts import ArgumentCollection
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

Command = TypeVar("Command", bound=Callable[..., int | None])

#: The option of commands that take their options from a file too.
ConfigFile = Annotated[
    Path | None, Parameter(help="YAML file of options, by their names here; the command line overrides it.")
]


def flat(group: Group) -> Parameter:
    """Makes every field of a settings dataclass an option of the command, in this group of its help."""
    return Parameter(name="*", group=group)


def decoded(group: Group) -> Parameter:
    """`flat` for `Decoding`, whose `thinking` can be turned off: `--no-thinking`."""
    return Parameter(name="*", group=group, negative=None, negative_bool="no-", negative_iterable=(), negative_none=())


def resumable(command: Command) -> Command:
    """Marks a command that goes on, when it is typed again, where it was interrupted."""
    command.resumable = True  # type: ignore[attr-defined]
    return command


def checked_by(check: Callable[..., None]) -> Callable[[Command], Command]:
    """Marks a command whose options are checked together by a function, before it runs or stands in a study's plan.

    Args:
        check: Gets what the command gets, of which it names what it looks at; raises a ConfigError.
    """

    def marked(command: Command) -> Command:
        command.check = check  # type: ignore[attr-defined]  # as `resumable` marks one
        return command

    return marked


def new_app(name: str, help: str | None = None, **settings: Any) -> App:
    """An empty command line.

    Args:
        name: What is typed to run it.
        help: One sentence about it.
        settings: Further ones of `cyclopts.App`.
    """
    settings.setdefault("config", check_values)
    return App(
        name=name,
        help=help,
        version=__version__,
        help_format="plaintext",
        help_formatter=_HelpFormatter(),
        default_parameter=Parameter(
            negative=(), allow_repeating=True, show_default=lambda value: "none" if value == () else str(value)
        ),
        **settings,
    )


@contextmanager
def quiet_libraries(**variables: str) -> Iterator[None]:
    """Libraries keep their advice to themselves, so that a command's own lines stand out; also a decorator of commands.

    Whoever calls the command from Python finds environment, filters of warnings and transformers' log as they were.

    Args:
        variables: Further environment variables, set where they are not set already.
    """
    wanted = {"TRANSFORMERS_VERBOSITY": "error", "TRL_EXPERIMENTAL_SILENCE": "1", **variables}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    was_loaded = "transformers" in sys.modules  # which reads the variable once
    os.environ.update(added)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        if not was_loaded and "TRANSFORMERS_VERBOSITY" in added and "transformers" in sys.modules:
            sys.modules["transformers"].logging.set_verbosity_warning()


#: What a shell reports of a program that SIGPIPE ended.
_CLOSED_PIPE = 141


def run(app: App, argv: Sequence[str] | None = None) -> None:
    """Runs a command line, and ends the program where its exit status is not 0.

    Advice (`errors.advice`, or about a wrong option) has status 2, an interrupt 130. Every other exception is a defect
    and is raised.

    Args:
        app: The command line.
        argv: Its words; None for those the process was started with.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    chain, _, _ = app.parse_commands(words)
    program = " ".join([*app.name, *chain])
    with advice(program):
        try:
            command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
            go_on = "The same command goes on where this one stopped." if hasattr(command, "resumable") else ""
            if hasattr(command, "check"):
                command.check(*bound.args, **bound.kwargs)
            with advice(program, go_on):
                status = command(*bound.args, **bound.kwargs)
            if status:
                sys.exit(status)
        except CycloptsError as error:
            raise ConfigError(str(error)) from error
        except BrokenPipeError:  # the reader of a pipe, `longvpo configs | head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(_CLOSED_PIPE)


def script(command: Command, name: str) -> Callable[..., None]:
    """A `main` that runs one command as a program of its own.

    Args:
        command: The command.
        name: File name of the program.
    """
    app = new_app(name, config=options_of_file)
    app.default(command)

    def main(argv: Sequence[str] | None = None) -> None:
        run(app, argv)

    return main


def whole_numbers(text: str) -> list[int]:
    """The numbers of a list such as `64,128`, which must be ≥ 1.

    Raises:
        ValueError: If it is no such list.
    """
    if not re.fullmatch(r"\s*[1-9]\d{0,8}\s*(,\s*[1-9]\d{0,8}\s*)*", text, re.ASCII):
        raise ValueError("Must be whole numbers ≥ 1 with commas between them.")
    return [int(part) for part in text.split(",")]


def _check_whole_numbers(kind: Any, text: str | None) -> None:
    if text is not None:
        whole_numbers(text)


#: An option that is such a list.
WholeNumbers = Annotated[str, Parameter(validator=_check_whole_numbers)]


def check_page(output: Path | None) -> None:
    """Makes sure, before any work, that `--output` is the name of a page, and not of something that it would replace.

    Raises:
        ConfigError: If it is not.
    """
    if output is not None and (output.suffix.lower() not in (".html", ".htm") or output.is_dir()):
        raise ConfigError(f"--output must be the name of a page, e.g. page.html, got {output}.")


def named_files(option: str, items: Iterable[str]) -> dict[str, Path]:
    """The files of an option that is given as NAME=FILE, any number of times, by name.

    Raises:
        ConfigError: If one is no such pair, or a name is given twice.
    """
    files: dict[str, Path] = {}
    for item in items:
        name, _, file = (part.strip() for part in item.partition("="))
        if not name or not file:
            raise ConfigError(f"--{option} must be NAME=FILE, got {item!r}.")
        if name in files:
            raise ConfigError(f"--{option} names {name} twice, {files[name]} and {file}: give each file its own name.")
        files[name] = Path(file)
    return files


def options_of_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Reads the file that `--config` names, for the options that the command line leaves open."""
    check_values(app, commands, arguments)
    for argument in arguments:
        if argument.name == "--config" and argument.tokens:
            path = Path(argument.tokens[0].value)
            if not path.is_file():
                raise ConfigError(f"--config {path} is not a file.")
            content = read_yaml(path) or {}
            if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
                raise ConfigError(f"{path} must be a mapping of options to values.")
            Dict(content, use_commands_as_keys=False, source=str(path.absolute()))(app, commands, arguments)
    check_values(app, commands, arguments)


def check_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuses values that would be taken for others: 2.5 where a whole number is asked for, and an empty value.

    The first would be rounded (2.0 is a whole number); the second, such as a shell makes of a variable that is not set,
    would be the current folder, or as if the option were left out.

    Raises:
        ConfigError: If an option has such a value.
    """
    for argument in arguments:
        kinds = (argument.hint, *get_args(argument.hint))
        for token in argument.tokens:
            of_file = "" if token.source == "cli" else f" in {token.source}"
            if int in kinds and float not in kinds and _is_fraction(token.value):
                raise ConfigError(f"{argument.name}{of_file} must be a whole number, got {token.value}.")
            is_looked_at = argument.name.startswith("--") or Path in kinds
            is_given = token.implicit_value is UNSET  # not a flag, nor a file's []
            if is_looked_at and is_given and not token.value.strip():
                raise ConfigError(f"{argument.name}{of_file} is empty: give a value, or leave the option out.")


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:  # no number at all: refused where it is read
        return False


class _HelpFormatter(DefaultFormatter):
    """Help as docstrings have it, but with lines as long as the terminal's."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        for entry in panel.entries:
            text = getattr(entry.description, "primary_renderable", None)
            if text is not None:
                text.plain = " ".join(text.plain.split())
        super().__call__(console, options, panel)

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        text = getattr(description, "primary_renderable", None)
        if text is not None:
            paragraphs = text.plain.split("\n\n")
            text.plain = "\n\n".join(
                part if part.startswith(" ") else " ".join(part.split()) for part in paragraphs if part.strip()
            )
        super().render_description(console, options, description)
