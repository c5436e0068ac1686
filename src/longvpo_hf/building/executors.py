"""Who works the pieces of a build: this process, processes beside it, or one of many shards that any scheduler starts.

Whoever works them, a build gives the same rows: the plan, the pieces and the join know nothing of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias

from longvpo_hf.artifacts import Fields
from longvpo_hf.building.pieces import Bench, Piece
from longvpo_hf.errors import ConfigError, LongVPOError
from longvpo_hf.processes import workers

#: Takes the pieces of a round; gives each, in order, with its records, or None for one that others are to work.
Worked: TypeAlias = Callable[[Iterator[Piece]], Generator[tuple[Piece, list[Fields] | None], None, None]]


class Unfinished(LongVPOError, RuntimeError):
    """A dataset cannot be written yet: what shards are to work is missing."""


class Executor(Protocol):
    """Chooses who works."""

    @property
    def joins(self) -> bool:
        """Whether the dataset is written at the end: a shard leaves that to others."""
        ...

    def place(self, output: Path) -> Path:
        """The output that it locks and logs for: shards of one build have one each."""
        ...

    def opened(self, bench: Bench) -> AbstractContextManager[Worked]:
        """Readies the workers, until the block ends."""
        ...


@dataclass(frozen=True, slots=True)
class Here:
    """This process works each piece when it is needed."""

    joins = True

    def place(self, output: Path) -> Path:
        """See `Executor`."""
        return output

    def opened(self, bench: Bench) -> AbstractContextManager[Worked]:
        """See `Executor`."""
        return nullcontext(lambda pieces: ((piece, bench.work(piece)) for piece in pieces))


HERE = Here()


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several runs that share an output on a disk that all of them see: it works every `num_shards`th piece.

    Args:
        number: Which one, from 0.
        num_shards: How many there are.
    """

    number: int
    num_shards: int

    joins = False

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.num_shards:
            raise ConfigError(f"shard must be in [0, num_shards={self.num_shards}), got {self.number}.")

    def __str__(self) -> str:
        """As messages name it."""
        return f"shard {self.number} of {self.num_shards}"

    def has(self, number: int) -> bool:
        """Whether the piece of this number is its own."""
        return number % self.num_shards == self.number

    def place(self, output: Path) -> Path:
        """See `Executor`."""
        return output.with_name(f"{output.name}.shard-{self.number}-of-{self.num_shards}")

    def opened(self, bench: Bench) -> AbstractContextManager[Worked]:
        """See `Executor`."""
        return nullcontext(
            lambda pieces: (
                (piece, bench.work(piece) if self.has(piece.number) else bench.finished(piece)) for piece in pieces
            )
        )


@dataclass(frozen=True, slots=True)
class Merge:
    """Nobody works: the pieces that shards have left are joined."""

    joins = True

    def place(self, output: Path) -> Path:
        """See `Executor`."""
        return output

    def opened(self, bench: Bench) -> AbstractContextManager[Worked]:
        """See `Executor`."""
        return nullcontext(lambda pieces: ((piece, bench.finished(piece)) for piece in pieces))


@dataclass(frozen=True, slots=True)
class Processes:
    """Processes of this machine, each with models of its own: for endpoints, whose requests are then many at once.

    Args:
        number: How many; each has its own `concurrency` of requests under way.
    """

    number: int

    joins = True

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ConfigError(f"num_workers must be ≥ 1 for pieces in processes, got {self.number}.")

    def place(self, output: Path) -> Path:
        """See `Executor`."""
        return output

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Worked]:
        """See `Executor`."""
        with workers(self.number, partial(_take, bench)) as pool:
            yield partial(in_order, lambda piece: pool.submit(_work, piece), 2 * self.number)


def in_order(
    submit: Callable[[Piece], Future[list[Fields]]], most: int, pieces: Iterator[Piece]
) -> Generator[tuple[Piece, list[Fields] | None], None, None]:
    """Keeps so many pieces under way and gives them in order; drops those that are not started once no more are asked
    for."""
    waiting: deque[tuple[Piece, Future[list[Fields]]]] = deque()
    try:
        for piece in pieces:
            waiting.append((piece, submit(piece)))
            if len(waiting) >= most:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


#: The bench of a worker process.
_bench: Bench | None = None


def _take(bench: Bench) -> None:
    global _bench
    _bench = bench


def _work(piece: Piece) -> list[Fields]:
    assert _bench is not None
    return _bench.work(piece)
