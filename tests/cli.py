"""The `longvpo` command in this process: what it prints and its exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO

from longvpo_hf.commands.app import app
from longvpo_hf.commands.cli import run


@dataclass(frozen=True)
class Result:
    """What a command has printed, and its exit status."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def longvpo(words: Sequence[str]) -> Result:
    """Runs the `longvpo` command. What is no advice is raised."""
    return result_of(lambda: run(app, words))


def result_of(program: Callable[[], None]) -> Result:
    """Runs a program that may end with `sys.exit`."""
    status = 0
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            program()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Result(status, out.getvalue(), err.getvalue())
