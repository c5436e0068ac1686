"""Processes that a run starts: they end with it, however it ends.

A killed parent cannot tell its children to stop, and a worker holds a decoder or a copy of torch: most of a gigabyte
each. So every child watches its parent and ends within `WATCH_SECONDS` of its death; an interrupt (Ctrl-C), which the
terminal sends to all processes at once, is left to the parent, which then stops its children.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

#: How often a child looks whether its parent is still there.
WATCH_SECONDS = 0.5

_watching: int | None = None


def end_with_parent() -> None:
    """From now on this process ends soon after its parent has; calling it again changes nothing."""
    global _watching
    if _watching == os.getpid():  # a fork inherits the number, not the thread
        return
    _watching = os.getpid()
    threading.Thread(target=_watch, args=(os.getppid(),), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)  # no clean-up: whatever is written here appears whole or not at all


def ready_worker(prepare: Callable[[], object] | None = None) -> None:
    """Readies a worker process: it ends with its parent, leaves Ctrl-C to it, and computes in one thread.

    Args:
        prepare: What else is done before its first work.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    import torch

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()


@contextmanager
def workers(number: int, prepare: Callable[[], object] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, which is stopped at once where the block ends with an error or an interrupt.

    Args:
        number: How many.
        prepare: See `ready_worker`.
    """
    # Spawned, not forked: a fork inherits torch's locks but not its threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(number, context, initializer=ready_worker, initargs=(prepare,))
    try:
        yield pool
    except BaseException:
        # Not `terminate_workers`, which is new in Python 3.14: 3.11 is supported.
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()
