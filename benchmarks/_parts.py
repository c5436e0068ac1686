"""Parts of a measurement, each in a process of its own: a crash, a hang or a lack of memory costs one part."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class World:
    """What a part is told.

    Args:
        device: "cuda" or "cpu"; on a CPU every part runs in small.
        deadline: `time.monotonic()` at which the part is ended.
    """

    device: str
    deadline: float

    @property
    def is_small(self) -> bool:
        """Whether this is a rehearsal."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Args:
        name: For `--only`.
        title: Its heading in the report.
        measure: Called with the world and a function that takes records as soon as they are known.
        budget_seconds: The part is ended after so long.
        is_beside: It needs no device, so it runs beside the others.
    """

    name: str
    title: str
    measure: Callable[[World, Callable[[Record], None]], None]
    budget_seconds: float
    is_beside: bool = False


class _Running:
    """A part at work."""

    def __init__(self, part: Part, device: str, deadline: float, method: str) -> None:
        self.part = part
        self.started = time.monotonic()
        self.deadline = min(deadline, self.started + part.budget_seconds)
        self.failed: str | None = None
        self.is_over = False
        context = multiprocessing.get_context(method)
        self.connection, theirs = context.Pipe(duplex=False)
        world = World(device, self.deadline)
        self._process = context.Process(target=_work, args=(theirs, part.measure, world), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> Record | None:
        """What the process sent: a record, or None when that was its end."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            kind, value = "end", f"its process ended with status {self._process.exitcode}"
        if kind == "record":
            record: Record = value
            return record
        self._end(value)
        return None

    def stop_if_late(self) -> None:
        """Ends the process after its deadline."""
        if not self.is_over and time.monotonic() >= self.deadline:
            self._end(f"not finished in {self.deadline - self.started:.0f} s")

    def _end(self, failed: str | None) -> None:
        self.failed, self.is_over = failed, True
        if failed is None:
            self._process.join(timeout=5)
        self._process.kill()
        self._process.join()
        self.connection.close()


def run_parts(
    parts: Sequence[Part],
    device: str,
    seconds: float,
    save: Callable[[Part, Record], None],
    finish: Callable[[Part, float, str | None], None],
    method: str = "fork",
) -> None:
    """Runs parts one after another, those that need no device beside the others.

    Args:
        parts: Those that come first matter most.
        device: See `World`.
        seconds: All of them together; a part that would start later is not run.
        save: Called with each record.
        finish: Called when a part is over, with its seconds and why it failed; None if it did not.
        method: How processes start. "fork" shares what this process has imported, so this process must not have
            touched the device.
    """
    deadline = time.monotonic() + seconds

    def start(part: Part) -> _Running:
        return _Running(part, device, deadline, method)

    def pump(running: Sequence[_Running]) -> None:
        active = [each for each in running if not each.is_over]
        patience = max(0.0, min(each.deadline for each in active) - time.monotonic())
        ready = wait([each.connection for each in active], timeout=patience)
        for each in active:
            if each.connection in ready:
                record = each.receive()
                if record is not None:
                    save(each.part, record)
            each.stop_if_late()
            if each.is_over:
                finish(each.part, time.monotonic() - each.started, each.failed)

    beside = [start(part) for part in parts if part.is_beside]
    for part in parts:
        if part.is_beside:
            continue
        if time.monotonic() >= deadline:
            finish(part, 0.0, f"not run: the {seconds / 60:.1f} minutes were over")
            continue
        current = start(part)
        while not current.is_over:
            pump([current, *beside])
    while not all(each.is_over for each in beside):
        pump(beside)


def _work(connection: Connection, measure: Callable[..., None], world: World) -> None:
    """Inside the process."""
    import torch
    from _processes import quiet

    quiet(torch.get_num_threads())
    failed: str | None = None
    try:
        measure(world, lambda record: connection.send(("record", record)))
    except torch.OutOfMemoryError as error:
        failed = f"out of memory: {str(error).splitlines()[0]}"
    except ImportError as error:
        failed = f"not run here: {error}"
    except Exception:  # goes into the report, with its traceback
        failed = traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):
        connection.send(("end", failed))
