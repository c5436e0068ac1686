"""Cutting and embedding by many: each worker fills the caches that all share, and what follows finds them full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from longvpo_hf.artifacts import Fields, Journal, Log
from longvpo_hf.building.executors import Executor, Shard, Unfinished, carry_out
from longvpo_hf.commands.build.options import Videos
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake import Source, clips_of
from longvpo_hf.intake.media import check_clips, cut_clips
from longvpo_hf.paths import below
from longvpo_hf.timeline import Clip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from longvpo_hf.intake.embeddings import ClipPiece, VisionEmbedder
    from longvpo_hf.intake.report import CorpusSurvey

#: Videos that one worker cuts before another may.
_VIDEOS_PER_PIECE = 16
#: A message names so many files, and counts the others.
_NAMED = 8


@dataclass(frozen=True, slots=True)
class _Sources:
    """Some videos of a corpus."""

    number: int
    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """How the file of its mark starts."""
        return f"cut-{self.number:05d}"


class _Cutting:
    """Cuts videos into the cache of clips, or checks them, and marks those that are done."""

    def __init__(self, videos: Videos, num_workers: int) -> None:
        self._videos = videos
        self._num_workers = num_workers
        how = asdict(videos.media) if videos.output.media == "embed" else "checked"
        follows_from = ["cut", asdict(videos.cutting), how, asdict(videos.bounds)]
        self.folder = videos.output.beside(".job")
        self._journal = Journal(self.folder, follows_from)

    def work(self, piece: _Sources) -> list[Fields]:
        """Nothing: what it makes is in the cache."""

        def cut(log: Log) -> Sequence[Fields]:
            videos, cache = self._videos, self._videos.output.cache_folder
            spans = clips_of(piece.sources, videos.cutting, None, videos.bounds, cache)
            if videos.output.media == "embed":
                clips = cut_clips(spans, cache, videos.media, self._num_workers, videos.bounds)
            else:
                clips = check_clips(spans, cache, self._num_workers, videos.bounds)
            for _ in clips:
                pass
            return []

        return self._journal.piece(piece.name, self._inputs(piece), cut)

    def finished(self, piece: _Sources) -> list[Fields] | None:
        """Nothing, if all of it is in the cache."""
        return self._journal.finished(piece.name, self._inputs(piece))

    def _inputs(self, piece: _Sources) -> list[Any]:
        root = str(self._videos.corpus.source)
        return [{**asdict(source), "path": below(root, str(source.path))} for source in piece.sources]


def cut_by(executor: Executor, videos: Videos, survey: CorpusSurvey) -> None:
    """Has the videos of a corpus cut.

    Raises:
        Unfinished: If some are for other shards to cut; with what this corpus lacks.
    """
    found = list(survey)
    sources = [item for item in found if isinstance(item, Source)]
    starts = range(0, len(sources), _VIDEOS_PER_PIECE)
    pieces = [_Sources(n, tuple(sources[start : start + _VIDEOS_PER_PIECE])) for n, start in enumerate(starts)]
    num_workers = videos.output.num_workers if isinstance(executor, Shard) else 0  # a worker starts no further ones
    bench = _Cutting(videos, num_workers)
    try:
        carry_out(executor, bench, pieces, f"cutting {_VIDEOS_PER_PIECE} videos at a time", bench.folder)
    except Unfinished as error:
        lacking = [f"{item.path} ({item.reason})" for item in found if isinstance(item, Dropped)]
        if not lacking:
            raise
        more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        raise Unfinished(f"{error} The corpus here is without {', '.join(lacking[:_NAMED])}{more}.") from error


@dataclass(frozen=True, slots=True)
class Embedding:
    """Embeds clips: an `Embedder` whose pieces are worked by many.

    Args:
        embedder: Embeds a piece into its cache.
        executor: Who works the pieces.
    """

    embedder: VisionEmbedder
    executor: Executor

    def __call__(self, clips: Sequence[Clip]) -> NDArray[np.float32]:
        """See `VisionEmbedder`.

        Raises:
            Unfinished: If some pieces are for other shards to embed.
        """
        carry_out(self.executor, self, self.embedder.plan(clips), "embedding 256 clips at a time")
        return self.embedder(clips)

    def work(self, piece: ClipPiece) -> list[Fields]:
        """Nothing: the vectors are in the cache."""
        self.embedder.embed(piece)
        return []

    def finished(self, piece: ClipPiece) -> list[Fields] | None:
        """Nothing, if they are there."""
        return [] if self.embedder.has(piece) else None
