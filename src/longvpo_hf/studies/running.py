"""Runs a study's steps, each in a process of its own, so that the memory of a GPU is free in between.

A killed run goes on with the same command: done steps are recognised (`ledger`), and builders, trainings and
measurements go on where they were.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from longvpo_hf.errors import ConfigError, LongVPOError
from longvpo_hf.processes import WATCH_SECONDS
from longvpo_hf.studies.audits import audit_in_words
from longvpo_hf.studies.ledger import LOGS, Ledger
from longvpo_hf.studies.steps import Step

_POLL_SECONDS = 0.2
_MEMORY_SECONDS = 2.0
#: How often a run that is under way is told of, to `on_change`.
_TELL_SECONDS = 20.0
#: How long processes of a killed run may take to notice it.
_PATIENCE_SECONDS = 60 * WATCH_SECONDS
#: How long a step that is interrupted may take to stop by itself.
_STOPPING_SECONDS = 10.0
#: A bar of tqdm: what it counts, how far, of how many, and the time that is left.
_BAR = re.compile(r"(?:([^\r\n|:]{1,60}): +)?\d{1,3}%\|[^|\r\n]*\| *([\d.,kM]+)/([\d.,kM]+) \[[\d:]+<([\d:?]+)")


class StepFailed(LongVPOError, RuntimeError):
    """A step of a study did not come to its end."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which steps of a study run; the others are left as they are.

    Args:
        until: The last step that runs. None: the study's last.
        start: The first step that runs. None: the study's first.
        only: The one step that runs. None: all between.

    Raises:
        ConfigError: If `only` stands beside one of the others.
    """

    until: str | None = None
    start: str | None = None
    only: str | None = None

    def __post_init__(self) -> None:
        if self.only is not None and (self.until, self.start) != (None, None):
            raise ConfigError("--only runs one step alone: leave out --from and --until.")

    def of(self, steps: Sequence[Step]) -> list[Step]:
        """The steps that run.

        Raises:
            ConfigError: If one that is named is not there, or nothing is left between.
        """
        names = [step.name for step in steps]
        for option, name in (("--until", self.until), ("--from", self.start), ("--only", self.only)):
            if name is not None and _full_name(name, names) is None:
                raise ConfigError(f"{option} {name} is no step of this study; have {', '.join(names)}.")
        if self.only is not None:
            return [steps[names.index(_full_name(self.only, names) or "")]]
        first = names.index(_full_name(self.start, names) or "") if self.start else 0
        last = names.index(_full_name(self.until, names) or "") if self.until else len(names) - 1
        if last < first:
            raise ConfigError(f"--until {self.until} comes before --from {self.start}.")
        return list(steps[first : last + 1])


def _full_name(name: str, names: Sequence[str]) -> str | None:
    """A step's name; a method's alone stands for its model: `--until stage1`."""
    return next((full for full in (name, f"{name}-model", f"{name}-rows") if full in names), None)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step is.

    Args:
        step: Its name.
        seconds: It has been running.
        text: What its last bar says, e.g. `111/300`; empty where there is none yet.
        left: The time left by that bar.
    """

    step: str
    seconds: float
    text: str = ""
    left: str = ""


#: Told of every beginning and end of a step, and now and then: the steps that run.
OnChange = Callable[[Sequence[Progress]], None]


def run_steps(ledger: Ledger, selected: Sequence[Step], *, slots: int = 1, delete: bool, on_change: OnChange) -> None:
    """Runs the steps that are not done.

    Args:
        ledger: The run's notes.
        selected: The steps that may run, each after those it takes from.
        slots: How many of them may run at once. More than one is for machines whose GPU nobody needs.
        delete: Whether what earlier settings left is deleted, instead of moved to `earlier/`.
        on_change: See `OnChange`.

    Raises:
        StepFailed: If a step fails, or one that it needs is not done.
    """
    names = [step.name for step in selected]
    waiting = list(selected)
    running: list[_Running] = []
    told = time.monotonic()
    may_start = True  # only where a step has ended: what is done is found by reading what steps made
    try:
        while waiting or running:
            for step in list(waiting) if may_start else ():
                if len(running) == slots:
                    break
                head = f"[{names.index(step.name) + 1}/{len(names)}] {step.name}"
                if (found := _start(ledger, step, head, names, delete)) == "not yet":
                    continue
                waiting.remove(step)
                if isinstance(found, _Running):
                    running.append(found)
                    on_change([found.progress() for found in running])
            may_start = False
            time.sleep(_POLL_SECONDS if running else 0)
            for one in list(running):
                one.look()
                if one.process.poll() is not None:
                    running.remove(one)
                    one.end()
                    may_start = True
                    on_change([other.progress() for other in running])
            _show(" · ".join(f"{one.head}: {_in_words(one.progress())}" for one in running))
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                on_change([one.progress() for one in running])
    finally:
        _stop([one.process for one in running])


def _start(
    ledger: Ledger, step: Step, head: str, selected: Sequence[str], delete: bool
) -> _Running | Literal["done", "not yet"]:
    """Starts a step where it is time.

    Raises:
        StepFailed: If what it needs is not done, and nobody will do it.
    """
    if ledger.state(step.name) == "done":
        _say(f"{head}: done")
        return "done"
    missing = [need for need in step.needs if ledger.state(need) != "done"]
    if any(need not in selected for need in missing):
        raise StepFailed(f"{step.name} needs {', '.join(missing)}, which is not done: run that first.")
    if missing or any(before in selected and ledger.state(before) != "done" for before in step.after):
        return "not yet"
    _wait_for_earlier(ledger, step.name)
    if ledger.begin(step.name, delete=delete):
        _say(f"{head}: done earlier with these settings, and back")
        return "done"
    return _Running(ledger, step, head)


class _Running:
    """A step that runs.

    Args:
        ledger: The run's notes.
        step: The step.
        head: What its line begins with.
    """

    def __init__(self, ledger: Ledger, step: Step, head: str) -> None:
        self.ledger, self.step, self.head = ledger, step, head
        note = ledger.note(step.name)
        self._before = note.seconds if note else 0.0
        self._peak_gib = (note.peak_gib if note else None) or 0.0
        self._log = ledger.run / LOGS / f"{step.name}.log"
        self._log.parent.mkdir(exist_ok=True)
        self._start = self._noted = self._asked = time.monotonic()
        with self._log.open("ab") as file:
            self._offset = file.tell()
            self.process = subprocess.Popen(
                [sys.executable, *step.words(ledger.run)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **step.environment, "PYTHONUNBUFFERED": "1"},
                # A group of its own: an interrupt is passed on to it, and the next run can see whether all have ended.
                start_new_session=True,
            )
        ledger.update(step.name, process_group=self.process.pid)

    @property
    def seconds(self) -> float:
        """That the step has taken, over all its runs."""
        return self._before + time.monotonic() - self._start

    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self.step.name, self.seconds, *_bar_of(self._log, self._offset))

    def look(self) -> None:
        """Notes now and then how much memory it holds and how long it has taken."""
        now = time.monotonic()
        if now - self._asked > _MEMORY_SECONDS:
            self._asked, self._peak_gib = now, max(self._peak_gib, _held_gib(self.process.pid))
        if now - self._noted > _TELL_SECONDS:
            self._noted = now
            self._note()

    def _note(self) -> None:
        self.ledger.update(self.step.name, seconds=round(self.seconds, 1), peak_gib=round(self._peak_gib, 2) or None)

    def end(self) -> None:
        """Notes that it has ended.

        Raises:
            StepFailed: If it failed.
        """
        self._note()
        name, status = self.step.name, self.process.returncode
        if status != 0:
            _show("")
            raise StepFailed(
                f"{name} failed with status {status}: {_last_words(self._log, self._offset)} All it said is in "
                f"{self._log}; the same command goes on where this one stopped."
            )
        self.ledger.finish(name)
        found = f": {audit_in_words(self.ledger.run / name)}" if self.step.kind == "audit" else ""
        _say(f"{self.head}: done in {in_time(self.seconds)}{found}")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Passes an interrupt on to steps, and ends those that do not stop by themselves, with all that they started."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                _send(process.pid, sign)
        end = time.monotonic() + _STOPPING_SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
    for process in processes:
        _send(process.pid, signal.SIGKILL)


def _send(group: int, sign: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, sign)


def _wait_for_earlier(ledger: Ledger, name: str) -> None:
    """Waits until the processes of a killed run have noticed: two may not write one folder.

    Raises:
        StepFailed: If they do not end.
    """
    note = ledger.note(name)
    if note is None or not note.process_group or note.is_finished:
        return
    end = time.monotonic() + _PATIENCE_SECONDS
    while members := _members(note.process_group):
        if time.monotonic() > end:
            raise StepFailed(f"{name} is still being worked on by the processes {members} of an earlier run: end them.")
        time.sleep(_POLL_SECONDS)


def _members(group: int) -> list[int]:
    found = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


def _held_gib(pid: int) -> float:
    """Memory of a process and of those it started, pages that several share counted once."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            held = one.memory_full_info()
            total += int(getattr(held, "pss", held.uss))
    except psutil.Error:  # it has ended meanwhile
        pass
    return total / 1024**3


# ------------------------------------------------------------------------------------------------------ what is shown


def _bar_of(log: Path, offset: int) -> tuple[str, str]:
    """What the last bar in a log says, and the time it expects."""
    try:
        with log.open("rb") as file:
            file.seek(max(offset, log.stat().st_size - 4096))
            found = _BAR.findall(file.read().decode("utf-8", "replace"))
    except OSError:
        return "", ""
    if not found:
        return "", ""
    what, done, total, left = found[-1]
    if done == total:  # the next one has not begun: a model is loaded, say
        return "", ""
    return f"{what.strip()[-30:]} {done}/{total}".strip(), "" if "?" in left else left


def _in_words(progress: Progress) -> str:
    left = f", {progress.left} left" if progress.left else ""
    return f"{progress.text or 'at work'}, {in_time(progress.seconds)}{left}"


def _show(line: str) -> None:
    """One line that replaces the last, where somebody looks on."""
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        print(f"\r{line[:width]:<{width}}" if line else f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)


def _say(line: str) -> None:
    """A line that stays."""
    _show("")
    print(line, flush=True)


def in_time(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `7 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _last_words(log: Path, offset: int) -> str:
    """The last line of a log that is not a progress bar."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = re.split(r"[\r\n]+", file.read()[-20_000:].decode("utf-8", "replace"))
    said = [line.strip() for line in lines if line.strip() and not re.search(r"\d%\||it/s\]", line)]
    return said[-1][:600] if said else "it said nothing."
