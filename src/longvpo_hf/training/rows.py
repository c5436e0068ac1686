"""The rows of a run: whether they have clips, and the order in which they come."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler

from longvpo_hf.errors import DatasetError
from longvpo_hf.preference import undecoded


def have_clips(train: Any, evaluation: Any) -> bool:
    """Whether the rows have clips. Reads no row where a dataset names its columns: reading one decodes its videos.

    Args:
        train: A dataset; anything else is left to TRL, which says what is wrong with it.
        evaluation: A dataset, several by name, or None.

    Raises:
        DatasetError: If a dataset has no rows or no answers, only some have clips, or one has videos in another form.
    """
    named = evaluation if isinstance(evaluation, Mapping) else {"eval": evaluation}
    have = {}
    for name, dataset in {"train": train, **named}.items():
        if not isinstance(dataset, (Dataset, IterableDataset)):
            continue
        if isinstance(dataset, Dataset) and not len(dataset):
            raise DatasetError(f"The {name} dataset has no rows: give one that has, or leave it out.")
        columns = list(next(iter(undecoded(dataset)), {})) if dataset.column_names is None else dataset.column_names
        have[name] = "clips" in columns
        if not have[name]:
            _refuse_videos(name, columns, dataset.features or {})
            # TRL also takes answers as tokens, in columns whose names begin so.
            lacking = [word for word in ("chosen", "rejected") if not any(each.startswith(word) for each in columns)]
            if lacking:
                raise DatasetError(
                    f"The {name} dataset has no column {' and none '.join(lacking)}, got {list(columns)}: rows of "
                    "preferences have prompt, chosen and rejected."
                )
    if len(set(have.values())) > 1:
        with_clips, without = (", ".join(name for name in have if have[name] is kind) for kind in (True, False))
        raise DatasetError(
            f"Some datasets have a column clips ({with_clips}) and others have none ({without}): train and evaluate "
            "on rows of one kind."
        )
    return any(have.values())


def _refuse_videos(name: str, columns: Sequence[str], features: Mapping[str, Any]) -> None:
    """Refuses rows without clips whose columns are of videos: they would be trained on as text alone.

    Raises:
        DatasetError: With the columns.
    """
    videos = [column for column in columns if column in ("video", "videos") or "Video(" in str(features.get(column))]
    ours = [column for column in ("evidence", "reference") if column in columns]
    if videos or len(ours) == 2:
        raise DatasetError(
            f"The {name} dataset has no column clips, but {', '.join(videos or ours)}: it would be trained on as text "
            "alone. TRL's rows with videos become rows with clips by longvpo_hf.intake.formats.from_trl, or with "
            "`dataset_form: trl` in a recipe."
        )


class TimelineSampler(Sampler[int]):
    """Shuffles rows, keeping up to `pairs_per_timeline` rows of one timeline next to each other.

    The order follows from `seed` and the epoch alone, so every process draws the same and a resumed run goes on as the
    interrupted one would have.

    Args:
        timelines: What tells each row's timeline from the others, in row order.
        pairs_per_timeline: Maximum number of rows of a timeline that are kept together.
        seed: Decides the order.
    """

    def __init__(self, timelines: Sequence[Hashable], pairs_per_timeline: int, seed: int) -> None:
        self._rows: dict[Hashable, list[int]] = {}
        for i, timeline in enumerate(timelines):
            self._rows.setdefault(timeline, []).append(i)
        self._num_rows = len(timelines)
        self._pairs_per_timeline = pairs_per_timeline
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed}/{self._epoch}")
        groups = []
        for rows in self._rows.values():
            shuffled = rng.sample(rows, len(rows))
            size = self._pairs_per_timeline
            groups += [shuffled[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(groups)
        return iter([row for group in groups for row in group])


def set_sampler_epoch(dataloader: Any, epoch: int) -> None:
    """Chooses the epoch of a dataloader's sampler, through however many wrappers.

    accelerate's own `set_epoch` looks two wrappers deep. A resumed run with several processes has three (batches that
    are skipped, each process's share, the batches themselves), and its sampler would repeat the first epoch's order.
    """
    part = dataloader
    while part is not None:
        if part is not dataloader and hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        inner = getattr(part, "batch_sampler", None)
        part = getattr(part, "sampler", None) if inner is None else inner
