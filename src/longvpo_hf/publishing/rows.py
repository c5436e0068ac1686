"""Datasets on disk as rows again: put together, filtered, split and sampled, with their media and their record.

Rows keep their ids. Each media file is stored once in what is written, however many rows or datasets show it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from longvpo_hf.errors import ConfigError, DatasetError
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.funnel import Funnel, open_log
from longvpo_hf.paths import path_inside
from longvpo_hf.preference import TRAINING_COLUMNS, VideoPreference
from longvpo_hf.publishing.dataset import DatasetWriter, add_preview, check_folder, has_preview
from longvpo_hf.record import DatasetRecord, MethodRecord, Source, read_record
from longvpo_hf.timeline import Clip, Timeline

_ROWS_PER_READ = 500
#: Drops that only these operations have; see `funnel.REASONS` for the others.
REASONS = {
    "bad_row": "the row is no preference",
    "length_ratio": "one answer is longer than the other by more than the bound (max_length_ratio)",
    "source_full": "its source has as many rows already as the bound allows (max_rows_per_source)",
    "other_method": "the row was made by another method than those asked for",
    "named_to_drop": "its id is in the list of rows to drop",
    "not_drawn": "the row was not drawn",
    "shows_test_video": "the row shows, beside its evidence, a source that the other side asks about (strict)",
}

#: Says why a row is left out; None keeps it.
Keep = Callable[[VideoPreference], str | None]


@dataclass(frozen=True, slots=True)
class RowsFolder:
    """A dataset on disk.

    Args:
        folder: See `DatasetWriter`.
        video_root: Where the media of rows that were published without them lie.

    Raises:
        DatasetError: If the folder is no dataset, or its media are elsewhere and `video_root` does not say where.
    """

    folder: Path
    video_root: Path | None = None

    def __post_init__(self) -> None:
        path = self.folder / "train.parquet"
        if not path.is_file():
            raise DatasetError(f"{self.folder} is no preference dataset: it lacks train.parquet.")
        if self.record.by_reference and (self.video_root is None or not self.video_root.is_dir()):
            raise DatasetError(
                f"The rows of {self.folder} come without their media: name the folder of the corpus with --video-root."
            )
        try:
            with pq.ParquetFile(path) as file:
                missing = sorted(set(TRAINING_COLUMNS) - set(file.schema_arrow.names))
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{path} cannot be read as Parquet ({error}); build or download it again.") from error
        if missing:
            raise DatasetError(f"{path} lacks the columns {missing}: its rows are no video preferences.")

    @property
    def record(self) -> DatasetRecord:
        """Its record; an empty one where it has none."""
        return read_record(self.folder, DatasetRecord) or DatasetRecord(self.folder.name)

    @property
    def media_root(self) -> Path | None:
        """What `DatasetWriter` takes to write rows of the same kind: None where the media are in the dataset."""
        return self.video_root if self.record.by_reference else None

    @property
    def num_rows(self) -> int:
        """Rows in the file, whether or not they are preferences."""
        with pq.ParquetFile(self.folder / "train.parquet") as file:
            return int(file.metadata.num_rows)

    def raw(self) -> Iterator[dict[str, Any]]:
        """The rows as they stand in the file."""
        try:
            with pq.ParquetFile(self.folder / "train.parquet") as file:
                for batch in file.iter_batches(batch_size=_ROWS_PER_READ):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{self.folder / 'train.parquet'} is broken ({error}); download it again.") from error

    def rows(self, on_error: Callable[[str, str], object]) -> Iterator[VideoPreference]:
        """The rows, with the paths of their media; what is no preference goes to `on_error` with its id."""
        for row in self.raw():
            try:
                yield self._located(VideoPreference.from_row(row))
            except (ValueError, TypeError, ArithmeticError) as error:
                on_error(str(row.get("id")), str(error))

    def _located(self, row: VideoPreference) -> VideoPreference:
        root = self.media_root or self.folder
        clips = (replace(clip, path=str(path_inside(root, clip.path))) for clip in row.timeline.clips)
        return replace(row, timeline=Timeline(tuple(clips)))


def write_rows(
    inputs: Sequence[RowsFolder], output: Path, keep: Keep, title: str, reasons: Sequence[str] = ()
) -> dict[str, dict[str, int]]:
    """Writes the rows of some datasets that are kept, in order, as a dataset of its own.

    A row that is there already is left out, as is one that is no preference or whose media are missing.

    Args:
        inputs: The datasets.
        output: The folder; an earlier dataset there is replaced.
        keep: Says why a row is left out.
        title: Heading of the card.
        reasons: Sentences for the card about what was done.

    Returns:
        The funnel: rows read and written, and what was dropped for which reason.

    Raises:
        ConfigError: If the output is one of the inputs, or some inputs have their media and others do not.
        DatasetError: If no row is left.
    """
    if output.resolve() in {source.folder.resolve() for source in inputs}:
        raise ConfigError(f"--output {output} is a dataset that is read: name another folder.")
    check_folder(output)
    roots = {source.media_root for source in inputs}
    if len(roots) > 1:
        raise ConfigError("Some of these datasets have their media and others do not: they cannot be put together.")
    with open_log(output) as funnel:
        funnel.explain(REASONS)
        seen: set[str] = set()
        methods: Counter[str] = Counter()
        with DatasetWriter(output, roots.pop()) as writer:
            for row in _kept(inputs, keep, funnel, seen):
                try:
                    writer.add(row)
                except UnreadableVideo as error:
                    funnel.drop(error.reason, id=row.id, detail=error.detail)
                    continue
                methods[row.provenance.method] += 1
            if not writer.num_rows:
                raise DatasetError(f"No row is left; see {output.name}.log/dropped.jsonl for why each was left out.")
            funnel.count("rows", writer.num_rows)
            counts = funnel.close()
            record = _record(inputs, title, methods, reasons)
            writer.write_record(replace(record, funnel=counts, reasons=dict(funnel.reasons)))
    if all(has_preview(source.folder) for source in inputs):
        add_preview(output)
    return counts


def _kept(inputs: Sequence[RowsFolder], keep: Keep, funnel: Funnel, seen: set[str]) -> Iterator[VideoPreference]:
    total = sum(source.num_rows for source in inputs)
    with tqdm(total=total, desc="rows", unit="row", leave=False) as bar:
        for source in inputs:
            funnel.count("rows read", source.num_rows)
            for row in source.rows(lambda name, error: funnel.drop("bad_row", id=name, detail=error)):
                bar.update()
                reason = "duplicate_row" if row.id in seen else keep(row)
                seen.add(row.id)
                if reason is None:
                    yield row
                else:
                    funnel.drop(reason, id=row.id)


def _record(inputs: Sequence[RowsFolder], title: str, methods: Counter[str], reasons: Sequence[str]) -> DatasetRecord:
    """What the inputs' records say, together."""
    records = [source.record for source in inputs]
    known = {method.name: method for record in records for method in record.methods}
    models: dict[str, Source] = {}
    for source, record in zip(inputs, records, strict=True):
        for role, model in record.models.items():
            same = models.setdefault(role, model) == model
            if not same:
                models[f"{role} ({source.folder.name})"] = model
    facts: dict[str, object] = {
        f"rows of {source.folder.name}": f"{source.num_rows} rows, digest {record.digest or 'unknown'}"
        for source, record in zip(inputs, records, strict=True)
    }
    if len(records) == 1:
        facts = {**records[0].facts, **facts}
    return DatasetRecord(
        title,
        tuple(replace(known.get(name, MethodRecord(name)), num_rows=number) for name, number in methods.items()),
        models=models,
        settings=records[0].settings if len(records) == 1 else {},
        facts={**facts, **{f"step {number}": text for number, text in enumerate(reasons, 1)}},
        seed=records[0].seed if len(records) == 1 else None,
    )


# -------------------------------------------------------------------------------------------------------- what is kept


def everything(row: VideoPreference) -> None:
    """Keeps each row."""


def shorter_ratio(most: float) -> Keep:
    """Keeps rows whose longer answer has at most `most` times the words of the shorter."""

    def keep(row: VideoPreference) -> str | None:
        lengths = sorted(max(1, len(answer.split())) for answer in (row.chosen, row.rejected))
        return "length_ratio" if lengths[1] > most * lengths[0] else None

    return keep


def rows_per_source(most: int) -> Keep:
    """Keeps the first `most` rows of each source that holds an answer."""
    counts: Counter[str] = Counter()

    def keep(row: VideoPreference) -> str | None:
        found = answer_sources(row)
        if any(counts[source] >= most for source in found):
            return "source_full"
        counts.update(found)
        return None

    return keep


def drawn(wanted: Iterable[str], reason: str = "not_drawn") -> Keep:
    """Keeps the rows of these ids."""
    ids = frozenset(wanted)
    return lambda row: None if row.id in ids else reason


def all_of(*keeps: Keep) -> Keep:
    """Keeps what each of these keeps; the first that does not gives the reason."""
    return lambda row: next((reason for keep in keeps if (reason := keep(row)) is not None), None)


def draw(inputs: Sequence[RowsFolder], number: int, seed: int) -> list[str]:
    """Ids of `number` rows, drawn at random without repetition.

    Raises:
        ConfigError: If there are fewer.
    """
    ids = sorted({str(row.get("id")) for source in inputs for row in source.raw()})
    if number > len(ids):
        raise ConfigError(f"--num-rows must be at most the number of different rows, {len(ids)}, got {number}.")
    return random.Random(seed).sample(ids, number)


def answer_sources(row: VideoPreference) -> frozenset[str]:
    """The sources of the clips that hold the answer; of all clips where the row does not say."""
    clips = row.timeline.clips
    return frozenset(source_key(clips[index]) for index in row.evidence or range(len(clips)))


def source_key(clip: Clip) -> str:
    """The corpus' name for a clip's source, or its file where the corpus has none."""
    return clip.source_id or clip.path


def hang_together(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """A number for each row, the same for rows that share a key, directly or through others.

    Args:
        keys: Of each row, at least one.
    """
    parents: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        parents.setdefault(key, key)
        while parents[key] != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for first, *others in keys:
        for other in others:
            parents[root(other)] = root(first)
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(root(of_row[0]), len(numbers)) for of_row in keys]


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows go where, so that no source is asked about on both sides.

    Args:
        test: Ids of the rows held out.
        test_sources: The sources that they ask about.
        num_shared: Rows of the other side that show one of these sources beside their evidence.
    """

    test: frozenset[str]
    test_sources: frozenset[str]
    num_shared: int

    def train(self, strict: bool) -> Keep:
        """Keeps the rows of the training side.

        Args:
            strict: Leave out those that show a source of the test side at all.
        """

        def keep(row: VideoPreference) -> str | None:
            if row.id in self.test:
                return "not_drawn"
            shows = strict and any(source_key(clip) in self.test_sources for clip in row.timeline.clips)
            return "shows_test_video" if shows else None

        return keep


def split_by_source(source: RowsFolder, share: float, seed: int) -> Split:
    """Draws whole groups of rows for the test side: rows that share a source of their answers are one group.

    Args:
        source: The dataset.
        share: Of the rows, in (0, 1); about so many are held out, and at least one group.
        seed: Draws the groups.

    Raises:
        DatasetError: If all rows hang together, so that nothing can be held out.
    """
    rows = [
        (row.id, answer_sources(row), frozenset(map(source_key, row.timeline.clips)))
        for row in source.rows(lambda name, error: None)
    ]
    groups: dict[int, list[int]] = {}
    for number, group in enumerate(hang_together([sorted(found) for _, found, _ in rows])):
        groups.setdefault(group, []).append(number)
    if len(groups) < 2:
        raise DatasetError(
            f"All rows of {source.folder} ask about sources that hang together: no part of them can be held out."
        )
    order = list(groups)
    random.Random(seed).shuffle(order)
    test: list[int] = []
    for group in order[:-1]:
        test += groups[group]
        if len(test) >= share * len(rows):
            break
    held_out = set(test)
    test_sources = frozenset().union(*(rows[number][1] for number in test))
    shared = sum(bool(rows[number][2] & test_sources) for number in range(len(rows)) if number not in held_out)
    return Split(frozenset(rows[number][0] for number in test), test_sources, shared)
