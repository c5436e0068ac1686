"""Processes of measurements: quiet, with the highest mark of their memory, and apart, so that one's end is its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

OUT_OF_MEMORY = "out of memory"


def quiet(threads: int) -> None:
    """Sets torch's threads, and keeps warnings out of the output."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def reset_peak(device: str) -> int:
    """Starts the highest mark of this process's memory anew; returns the bytes it holds now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """The highest mark since `reset_peak`: on a GPU what the allocator gave out, else the resident set."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    """A figure of this process's memory, as Linux keeps it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def wait_for_device(device: str) -> None:
    """Returns when the device has done all that it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def best_matmul(device: str, dtype: torch.dtype, width: int, repeats: int) -> float:
    """FLOP/s of the best of a few square matrix products."""
    left, right = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        wait_for_device(device)
        started = time.perf_counter()
        left @ right
        wait_for_device(device)
        best = max(best, 2 * width**3 / (time.perf_counter() - started))
    return best


class Lane:
    """A configuration's process, told what to do; silent once it ran out of memory.

    Args:
        target: Run there, with a connection and `setup`.
        setup: Given to `target`; its `device` is "cpu" or "cuda".
    """

    def __init__(self, target: Callable[[Connection, Any], None], setup: Any) -> None:
        forked = setup.device == "cpu" and sys.platform == "linux"
        context = multiprocessing.get_context("fork" if forked else "spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, setup), daemon=True)
        self._process.start()
        if (
            sys.platform == "linux"
        ):  # what outgrows the memory is ended by the kernel, before anything else on the machine
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000", encoding="ascii")
        theirs.close()
        self.failed: str | None = None

    def ask(self, command: str) -> Any:
        """The answer to a command; None if memory ran out, now or before."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(command)
        return self.answer()

    def answer(self) -> Any:
        """What the process sends next."""
        if self.failed is not None:
            return None
        try:
            answer = self._connection.recv()
        except EOFError:  # the kernel ended it
            answer = OUT_OF_MEMORY
        if isinstance(answer, Exception):
            raise answer
        if answer == OUT_OF_MEMORY:
            self.failed = OUT_OF_MEMORY
            return None
        return answer

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send("stop")
        self._process.join()


def one_answer(target: Callable[[Connection, Any], None], setup: Any) -> Any:
    """What a process that is asked nothing sends."""
    lane = Lane(target, setup)
    answer = lane.answer()
    lane.stop()
    return answer
