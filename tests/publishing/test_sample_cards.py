"""The finished cards in `model_cards/samples/` are what their records give today: a change of a card is seen there.

They are those of the miniature, seed 0, in the form that a study with `push_to` publishes: its last model with what was
measured before and after, and the rows of Stage 1. After a deliberate change of the cards, run this file; after one of
the miniature, give it the folder of a finished run too:

    longvpo run miniature && python tests/publishing/test_sample_cards.py runs/miniature
"""

from __future__ import annotations

import sys
from pathlib import Path

from longvpo_hf.publishing.dataset_card import dataset_card, with_name
from longvpo_hf.publishing.model_card import model_card
from longvpo_hf.record import RECORD_FILE, DatasetRecord, ModelRecord, read_record, record_text
from longvpo_hf.studies.push import published_record

SAMPLES = Path(__file__).resolve().parents[2] / "model_cards" / "samples"
MODEL, ROWS = "my-org/longvpo-miniature", "my-org/longvpo-miniature-stage1"


def cards() -> dict[str, str]:
    """Each card's text, by its folder."""
    model, rows = read_record(SAMPLES / "model", ModelRecord), read_record(SAMPLES / "dataset", DatasetRecord)
    assert model is not None
    assert rows is not None
    return {
        "model": model_card(model, has_curve=True, has_report=True),
        "dataset": with_name(dataset_card(rows), ROWS),
    }


def take_from(run: Path) -> None:
    """Puts the records of a finished run into the samples."""
    model = published_record(run / "stage2-model", MODEL, is_merged=False)
    rows = read_record(run / "stage1-rows", DatasetRecord)
    for name, record in (("model", model), ("dataset", rows)):
        assert record is not None
        (SAMPLES / name / RECORD_FILE).write_text(record_text(record), encoding="utf-8")


def test_the_samples_are_current() -> None:
    for name, text in cards().items():
        assert text == (SAMPLES / name / "README.md").read_text(encoding="utf-8"), "run this file"


def test_the_samples_say_all_that_a_card_should() -> None:
    model, rows = cards().values()
    for heading in ("How to load it", "Training", "Evaluation", "Limits", "Licence", "Versions", "Citation"):
        assert f"\n## {heading}\n" in model
    for heading in ("How it was made", "Funnel", "Limits", "Citation", "Sources and licences"):
        assert f"\n## {heading}\n" in rows
    assert "| base model | this model | questions |" in model
    assert "| right answers about one clip of 32 | 37.0 (32.4–41.8) | " in model
    assert "**No licence is stated for any clip.**" in rows
    assert f'load_dataset("{ROWS}"' in rows


if __name__ == "__main__":
    if sys.argv[1:]:
        take_from(Path(sys.argv[1]))
    for name, text in cards().items():
        (SAMPLES / name / "README.md").write_text(text, encoding="utf-8")
