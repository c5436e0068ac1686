"""However `datasets` hands rows on, they are the same rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_from_disk

import trainers
from longvpo_hf.preference import VideoPreference, undecoded
from longvpo_hf.publishing.dataset import DatasetWriter
from longvpo_hf.record import DatasetRecord, MethodRecord


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, preferences: list[VideoPreference]) -> Path:
    """Rows as a builder writes them."""
    folder: Path = tmp_path_factory.mktemp("rows")
    with DatasetWriter(folder) as writer:
        for row in preferences[:4]:
            writer.add(row)
        writer.write_record(DatasetRecord("Rows", (MethodRecord("test"),)))
    return folder


def saved(rows: Dataset, folder: Path) -> Dataset:
    rows.save_to_disk(str(folder / "saved"))
    return load_from_disk(str(folder / "saved"))


FORMS: dict[str, Callable[[Dataset, Path], Any]] = {
    "torch": lambda rows, folder: rows.with_format("torch"),
    "numpy": lambda rows, folder: rows.with_format("numpy"),
    "pandas": lambda rows, folder: rows.with_format("pandas"),
    "arrow": lambda rows, folder: rows.with_format("arrow"),
    "undecoded, torch": lambda rows, folder: undecoded(rows).with_format("torch"),
    "mapped": lambda rows, folder: rows.map(lambda row: {**row, "note": "mine"}),
    "filtered": lambda rows, folder: rows.filter(lambda row: True),
    "saved": saved,
    "of a list": lambda rows, folder: Dataset.from_list([dict(row) for row in rows]),
    "of pandas": lambda rows, folder: Dataset.from_pandas(undecoded(rows).to_pandas()),
    "without ids": lambda rows, folder: rows.remove_columns(["id", "provenance"]),
}
STREAMS: dict[str, Callable[[IterableDataset], Any]] = {
    "mapped": lambda rows: rows.map(lambda row: {"note": "mine"}),
    "filtered": lambda rows: rows.filter(lambda row: True),
    "batched": lambda rows: rows.map(lambda rows: rows, batched=True),
    "torch": lambda rows: rows.with_format("torch"),
    "mapped, torch": lambda rows: rows.map(lambda row: {"note": "mine"}).with_format("torch"),
    "numpy": lambda rows: rows.with_format("numpy"),
    "arrow": lambda rows: rows.with_format("arrow"),
    "joined": lambda rows: concatenate_datasets([rows.take(2), rows.skip(2)]),
}


def losses(folder: Path, rows: Any, **settings: Any) -> list[float]:
    trainer = trainers.make(folder, rows, pairs_per_timeline=2, **settings)
    trainer.train()
    return trainers.logged(trainer)


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[float], list[float]]:
    """Losses of rows as they are loaded, of these with scores computed beforehand, and of a stream."""
    rows = load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))
    stream = load_dataset(str(folder), split="train", streaming=True)
    run = tmp_path_factory.mktemp("runs")
    return losses(run, rows), losses(run, rows, precompute_ref_log_probs=True), losses(run, stream)


@pytest.mark.parametrize("form", FORMS)
def test_a_dataset_trains_alike_in_every_form(folder: Path, tmp_path: Path, expected: Any, form: str) -> None:
    rows = load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))
    assert losses(tmp_path, FORMS[form](rows, tmp_path)) == expected[0]
    assert losses(tmp_path, FORMS[form](rows, tmp_path), precompute_ref_log_probs=True) == expected[1]


@pytest.mark.parametrize("form", STREAMS)
def test_a_stream_trains_alike_in_every_form(folder: Path, tmp_path: Path, expected: Any, form: str) -> None:
    stream = load_dataset(str(folder), split="train", streaming=True)
    assert losses(tmp_path, STREAMS[form](stream)) == expected[2]
