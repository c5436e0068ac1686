"""Who works the pieces of a build: this process, processes beside it, or one of many shards that any scheduler starts.

Whoever works them, a build gives the same rows: the plan, the pieces and the join know nothing of it. Pieces are of
several kinds (videos to cut, clips to embed, scenes to caption, rows); each kind has its *bench*, which does one piece
and keeps what it gave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from longvpo_hf.artifacts import Fields
from longvpo_hf.errors import ConfigError, LongVPOError
from longvpo_hf.processes import workers


class Numbered(Protocol):
    """A piece of work of any kind."""

    @property
    def number(self) -> int:
        """Its place in the plan: shards divide the pieces by it."""
        ...

    @property
    def name(self) -> str:
        """What messages call it."""
        ...


P = TypeVar("P", bound=Numbered)
P_contra = TypeVar("P_contra", bound=Numbered, contravariant=True)


class Bench(Protocol[P_contra]):
    """Works pieces of one kind, each once, whoever has one; can be sent to other processes."""

    def work(self, piece: P_contra) -> list[Fields]:
        """What a piece gives, now or because it is there already."""
        ...

    def finished(self, piece: P_contra) -> list[Fields] | None:
        """What a piece gave, if it is there."""
        ...


#: Takes pieces in the plan's order; gives each, in order, with its records, or None for one that others have to work.
Worked: TypeAlias = Callable[[Iterator[P]], Generator[tuple[P, list[Fields] | None], None, None]]


#: A message names so many pieces, and counts the others.
_NAMED = 8


class Unfinished(LongVPOError, RuntimeError):
    """A dataset cannot be written yet: what shards are to work is missing."""


class Executor(Protocol):
    """Chooses who works."""

    @property
    def joins(self) -> bool:
        """Whether the dataset is written at the end: a shard leaves that to others."""
        ...

    @property
    def is_here(self) -> bool:
        """Whether all work is done on this machine, which then needs no plan of who cuts and embeds."""
        ...

    def place(self, output: Path) -> Path:
        """The output that it locks and logs for: shards of one build have one each."""
        ...

    def opened(self, bench: Bench[P]) -> AbstractContextManager[Worked[P]]:
        """Readies the workers, until the block ends."""
        ...


@dataclass(frozen=True, slots=True)
class Here:
    """This process works each piece when it is needed."""

    joins: ClassVar[bool] = True
    is_here: ClassVar[bool] = True

    def place(self, output: Path) -> Path:
        """See `Executor`."""
        return output

    def opened(self, bench: Bench[P]) -> AbstractContextManager[Worked[P]]:
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

    joins: ClassVar[bool] = False
    is_here: ClassVar[bool] = False

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

    def opened(self, bench: Bench[P]) -> AbstractContextManager[Worked[P]]:
        """See `Executor`."""
        return nullcontext(
            lambda pieces: (
                (piece, bench.work(piece) if self.has(piece.number) else bench.finished(piece)) for piece in pieces
            )
        )


@dataclass(frozen=True, slots=True)
class Merge:
    """Nobody works: the pieces that shards have left are joined."""

    joins: ClassVar[bool] = True
    is_here: ClassVar[bool] = False

    def place(self, output: Path) -> Path:
        """See `Executor`."""
        return output

    def opened(self, bench: Bench[P]) -> AbstractContextManager[Worked[P]]:
        """See `Executor`."""
        return nullcontext(lambda pieces: ((piece, bench.finished(piece)) for piece in pieces))


@dataclass(frozen=True, slots=True)
class Processes:
    """Processes of this machine, each with models of its own: for endpoints, whose requests are then many at once.

    Args:
        number: How many; each has its own `concurrency` of requests under way.
    """

    number: int

    joins: ClassVar[bool] = True
    is_here: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ConfigError(f"num_workers must be ≥ 1 for pieces in processes, got {self.number}.")

    def place(self, output: Path) -> Path:
        """See `Executor`."""
        return output

    @contextmanager
    def opened(self, bench: Bench[P]) -> Iterator[Worked[P]]:
        """See `Executor`."""
        with workers(self.number, partial(_take, bench)) as pool:
            yield partial(in_order, lambda piece: pool.submit(_work, piece), 2 * self.number)


def in_order(
    submit: Callable[[P], Future[list[Fields]]], most: int, pieces: Iterator[P]
) -> Generator[tuple[P, list[Fields] | None], None, None]:
    """Keeps so many pieces under way and gives them in order; drops those that are not started once no more are asked
    for."""
    waiting: deque[tuple[P, Future[list[Fields]]]] = deque()
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


def named(pieces: Sequence[Numbered]) -> str:
    """Pieces as a message names them."""
    more = f" and {len(pieces) - _NAMED} more" if len(pieces) > _NAMED else ""
    return ", ".join(piece.name for piece in pieces[:_NAMED]) + more


def made_otherwise(absent: Sequence[Numbered], folder: Path) -> str:
    """Says so where pieces of these numbers are there that follow from something else; empty where none are."""
    found = [piece for piece in absent if any(folder.glob(f"{piece.name}-*.jsonl"))]
    if not found:
        return ""
    return (
        f"Of these, {named(found)} are there as made with another seed, other settings, models or videos (of a corpus "
        "with files which this one lacks, for example), or by another version: shards of one output must be given the "
        "same. An earlier run of yours may have made them."
    )


def carry_out(
    executor: Executor, bench: Bench[P], pieces: Sequence[P], what: str, folder: Path | None = None
) -> list[list[Fields]]:
    """What all pieces give.

    Args:
        executor: Who works them.
        bench: Works one.
        pieces: The plan.
        what: What the pieces are, for a message.
        folder: Where finished pieces are kept by their names; None where they are found in another way.

    Raises:
        Unfinished: If some are not there, and others have to work them.
    """
    with executor.opened(bench) as worked:
        given = list(worked(iter(pieces)))
    absent = [piece for piece, records in given if records is None]
    if absent:
        message = (
            f"{what}: {len(absent)} of {len(pieces)} pieces are missing: {named(absent)}. When all shards have done "
            "theirs, run them again; the next step follows."
        )
        otherwise = "" if folder is None else made_otherwise(absent, folder)
        raise Unfinished(" ".join(filter(None, [message, otherwise])))
    return [records for _, records in given if records is not None]


#: The bench of a worker process.
_bench: Bench[Any] | None = None


def _take(bench: Bench[Any]) -> None:
    global _bench
    _bench = bench


def _work(piece: Numbered) -> list[Fields]:
    assert _bench is not None
    return _bench.work(piece)
