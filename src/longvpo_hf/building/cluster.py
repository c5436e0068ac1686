"""Ray: the pieces of a build on any number of machines, a worker on each GPU or CPU.

Ray starts the workers and says when one is lost; a lost machine costs the pieces that it was working. What they give is
kept as everywhere, on a disk that all machines see, so that the same command goes on after any kill.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic

from tqdm.auto import tqdm

from longvpo_hf.artifacts import Fields
from longvpo_hf.building.executors import Bench, P, Worked
from longvpo_hf.errors import ConfigError, LongVPOError

#: Workers that one piece may cost: it is the piece, then, and not the machines.
_LOST_WORKERS = 3
#: How often it is said that no worker has a place.
_PATIENCE_SECONDS = 60.0


class WorkersLost(LongVPOError, RuntimeError):
    """The same piece has ended several workers."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers that Ray starts, each with models of its own.

    Args:
        address: Of the cluster; `auto` is the one that this machine is in. None starts one of this machine alone.
        num_workers: Workers; 0 takes one for each GPU, or for each CPU where they need no GPU.
        needs_gpu: Whether a worker holds a model; it then has a GPU to itself, where the cluster has any.
    """

    address: str | None = None
    num_workers: int = 0
    needs_gpu: bool = False

    joins: ClassVar[bool] = True
    is_here: ClassVar[bool] = False

    def place(self, output: Path) -> Path:
        """See `executors.Executor`."""
        return output

    def ask(self, question: Callable[[], Any]) -> Any:
        """What a function returns on one worker."""
        ray = self._connected()
        return ray.get(ray.remote(_returned).options(**self._resources(ray)).remote(question))

    @contextmanager
    def opened(self, bench: Bench[P]) -> Iterator[Worked[P]]:
        """See `executors.Executor`."""
        ray = self._connected()
        resources = self._resources(ray)
        has = ray.cluster_resources()
        number = self.num_workers or max(1, int(has.get("GPU" if resources["num_gpus"] else "CPU", 1)))
        make = ray.remote(_Worker).options(**resources).remote
        shift: _Shift[P] = _Shift(ray, partial(make, ray.put(bench)), number)
        try:
            yield shift.in_order
        finally:
            shift.end()

    def _resources(self, ray: Any) -> dict[str, float]:
        num_gpus = int(self.needs_gpu and ray.cluster_resources().get("GPU", 0) > 0)
        return {"num_cpus": 0 if num_gpus else 1, "num_gpus": num_gpus}

    def _connected(self) -> Any:
        """Ray, connected to the cluster.

        Raises:
            ConfigError: If it is not installed, or there is no cluster.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unasked
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ConfigError("--executor ray needs Ray: pip install 'longvpo-hf[ray]'.") from error
        if not ray.is_initialized():
            paths = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
            more = {} if self.address else {"include_dashboard": False}
            try:  # without an address Ray would join any cluster that was started on this machine
                ray.init(self.address or "local", runtime_env={"env_vars": paths}, log_to_driver=False, **more)
            except (ConnectionError, ValueError) as error:
                raise ConfigError(
                    f"There is no Ray cluster at {self.address} ({error}): start one, ray start."
                ) from error
        return ray


def _returned(question: Callable[[], Any]) -> Any:
    """What a function returns; Ray takes no other callables than functions of a module."""
    return question()


class _Worker:
    """A process of the cluster, with its own copy of a bench."""

    def __init__(self, bench: Bench[Any]) -> None:
        self._bench = bench

    def ready(self) -> None:
        """Returns once the worker is there."""

    def work(self, piece: Any) -> list[Fields]:
        """See `executors.Bench.work`."""
        return self._bench.work(piece)


class _Shift(Generic[P]):
    """Hands pieces to workers as they get free, and a lost worker's piece to another.

    Args:
        ray: The library.
        hire: Starts a worker, which may have to wait for its machine.
        number: How many there are to be.
    """

    def __init__(self, ray: Any, hire: Callable[[], Any], number: int) -> None:
        self._ray = ray
        self._hire = hire
        self._most = 2 * number
        #: What is awaited: of a worker that is starting, or of one with a piece.
        self._awaited: dict[Any, tuple[Any, P | None]] = {}
        self._idle: list[Any] = []
        self._lost: Counter[int] = Counter()
        for _ in range(number):
            self._start()

    def in_order(self, pieces: Iterator[P]) -> Generator[tuple[P, list[Fields] | None], None, None]:
        """See `executors.Worked`."""
        under_way: deque[P] = deque()  # or done, while one before it is not
        again: deque[P] = deque()
        given: dict[int, list[Fields]] = {}
        self._lost.clear()
        try:
            while True:
                while self._idle and (again or len(under_way) < self._most):
                    piece = again.popleft() if again else next(pieces, None)
                    if piece is None:
                        break
                    if not self._lost[piece.number]:
                        under_way.append(piece)
                    worker = self._idle.pop()
                    self._awaited[worker.work.remote(piece)] = (worker, piece)
                if not under_way and self._idle:
                    return
                self._await_one(given, again)
                while under_way and under_way[0].number in given:
                    piece = under_way.popleft()
                    yield piece, given.pop(piece.number)
        finally:
            for awaited, (worker, piece) in list(self._awaited.items()):
                if piece is not None:  # not needed any more
                    del self._awaited[awaited]
                    self._ray.kill(worker)
                    self._start()

    def end(self) -> None:
        """Ends all workers."""
        for worker in [*self._idle, *(worker for worker, _ in self._awaited.values())]:
            self._ray.kill(worker)

    def _start(self) -> None:
        worker = self._hire()
        self._awaited[worker.ready.remote()] = (worker, None)

    def _await_one(self, given: dict[int, list[Fields]], again: deque[P]) -> None:
        """Waits for a worker to be ready, to end its piece or to be lost."""
        while not (done := self._ray.wait(list(self._awaited), num_returns=1, timeout=_PATIENCE_SECONDS)[0]):
            if all(piece is None for _, piece in self._awaited.values()):
                tqdm.write("Waiting for Ray to find a place for a worker; see `ray status`.")
        worker, piece = self._awaited.pop(done[0])
        try:
            records = self._ray.get(done[0])
        except self._ray.exceptions.RayActorError as error:
            self._start()  # it may find room elsewhere
            if piece is not None:
                self._lost[piece.number] += 1
                if self._lost[piece.number] >= _LOST_WORKERS:
                    raise WorkersLost(
                        f"Piece {piece.name} has cost {_LOST_WORKERS} workers: {error}. See to their memory (ray "
                        "status, ray memory); the same command goes on."
                    ) from error
                again.append(piece)
            return
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        self._idle.append(worker)
        if piece is not None:
            given[piece.number] = records
