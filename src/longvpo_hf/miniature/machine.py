"""The machine that a run is on: its processor, its threads, and the memory that the run takes."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Self

import psutil
import torch

_MEMORY_SAMPLE_SECONDS = 0.5


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch in one thread: the model is so small that a second one costs time, and one repeats its numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PeakMemory:
    """Most memory that this process and those it started held at once, sampled every half second.

    On Linux a page that several of them share counts once; elsewhere only pages of their own count. `peak_gib` is None
    where the system does not say.
    """

    def __init__(self) -> None:
        self.peak_gib: float | None = None
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while True:
            try:
                gib = (_held(this) + sum(map(_held_or_gone, this.children(recursive=True)))) / 1024**3
            except psutil.Error:
                return
            self.peak_gib = round(max(self.peak_gib or 0.0, gib), 2)
            if self._done.wait(_MEMORY_SAMPLE_SECONDS):
                return


def _held(process: psutil.Process) -> int:
    """Bytes of its pages: each divided by the number of processes that share it (PSS), or those of its own (USS)."""
    held = process.memory_full_info()
    return int(getattr(held, "pss", held.uss))


def _held_or_gone(process: psutil.Process) -> int:
    with suppress(psutil.Error):  # it has ended meanwhile
        return _held(process)
    return 0


def processor_name() -> str:
    """Name of the CPU, for reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
