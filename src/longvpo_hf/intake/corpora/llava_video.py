"""lmms-lab/LLaVA-Video-178K: lists of records in json (or jsonl), videos in tars or unpacked beside them.

Captions are the answers of `*cap*` files (split caption), the only files whose answer describes the video; a folder
without one is read for its videos alone. The id is the record's `id`.
"""

from __future__ import annotations

from longvpo_hf.intake.corpus import Corpus
from longvpo_hf.intake.records import Record, Sources

_PATTERNS = ("*.json", "*.jsonl")


def read(corpus: Corpus) -> Sources:
    """A video for each record."""
    files = corpus.files(*_PATTERNS)
    captions = [path for path in files if "cap" in path.stem.split("_")]

    def video(record: Record) -> Sources:
        source_id = record.name("id")
        caption = _answer(record) if captions else ""
        yield corpus.source(record, record.name("video"), source_id, caption=caption)

    yield from corpus.each(corpus.records(*_PATTERNS, paths=captions or files), video)


def _answer(record: Record) -> str:
    for turn in record.items("conversations"):
        if turn.text("from") == "gpt":
            return turn.text("value")
    raise record.error("conversations", "has no turn of 'gpt'")
