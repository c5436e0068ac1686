"""`longvpo` with steps that are forks: each a process of its own, without the seconds of imports.

`longvpo_of_forks` runs a command in a process that has loaded torch and computed nothing: autograd's threads, which the
tests before may have started in theirs, do not survive a fork. In there `_as_forks` takes the place of
`subprocess.Popen` where studies start their steps, and accelerate its script. What only a fresh interpreter shows is
for the tests of the wheel.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import IO

import accelerate.commands.launch
import pytest

import longvpo_hf.launch
import longvpo_hf.methods.stage2
import longvpo_hf.miniature.temporal
import longvpo_hf.miniature.workshop  # noqa: F401  # loaded once, before the forks
from cli import Result
from longvpo_hf.commands.app import main
from longvpo_hf.studies import running


def longvpo_of_forks(words: Sequence[str]) -> Result:
    """Runs the `longvpo` command in a process of its own, whose steps are forks of it."""
    ended = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, timeout=600, check=False)
    return Result(ended.returncode, ended.stdout, ended.stderr)


@contextmanager
def _as_forks() -> Iterator[None]:
    """Within it, steps of studies are forks of this process."""
    double = SimpleNamespace(Popen=_Fork, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "subprocess", double)
        patch.setattr(accelerate.commands.launch, "subprocess", double)
        yield


class _Fork:
    """As much of `subprocess.Popen` as they use, of `[python, "-m", module, …]` and `[python, script, …]`."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int | None = None,
        stdout: IO[bytes] | None = None,
        stderr: int | None = None,
        start_new_session: bool = False,
    ) -> None:
        assert words[0] == sys.executable
        assert stderr in (None, subprocess.STDOUT)
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            _become(words[1:], env, None if stdout is None else stdout.fileno())

    def poll(self) -> int | None:
        return self._end(os.WNOHANG)

    def wait(self) -> int | None:
        return self._end(0)

    def _end(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _become(words: Sequence[str], environment: Mapping[str, str], output: int | None) -> None:
    """Runs a program in this process, and ends with it."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.clear()
        os.environ.update(environment)
        is_module = words[0] == "-m"
        sys.argv = list(words[1:] if is_module else words)
        run = runpy.run_module if is_module else runpy.run_path
        run(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    with _as_forks():
        main()
