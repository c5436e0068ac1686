"""The finished cards in `model_cards/samples/` are what their records give today: a change of a card is seen there.

They are those of the miniature's Stage 1, seed 0. After a deliberate change, run this file.
"""

from __future__ import annotations

from pathlib import Path

from longvpo_hf.publishing.dataset_card import dataset_card
from longvpo_hf.publishing.model_card import write_model_card
from longvpo_hf.record import DatasetRecord, ModelRecord, read_record

SAMPLES = Path(__file__).resolve().parents[2] / "model_cards" / "samples"


def model_card(folder: Path) -> str:
    record = read_record(SAMPLES / "model", ModelRecord)
    assert record is not None
    write_model_card(folder, record)
    return (folder / "README.md").read_text(encoding="utf-8")


def rows_card() -> str:
    record = read_record(SAMPLES / "dataset", DatasetRecord)
    assert record is not None
    return dataset_card(record)


def test_the_samples_are_current(tmp_path: Path) -> None:
    assert model_card(tmp_path) == (SAMPLES / "model" / "README.md").read_text(encoding="utf-8")
    assert rows_card() == (SAMPLES / "dataset" / "README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (SAMPLES / "model" / "README.md").write_text(model_card(Path(folder)), encoding="utf-8")
    (SAMPLES / "dataset" / "README.md").write_text(rows_card(), encoding="utf-8")
