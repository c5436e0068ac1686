"""ShareGPT4Video/ShareGPT4Video: `sharegpt4video_40k.jsonl` and zips.

The caption of the whole video is that of `idx` "-1"; the others describe single frames. `zip_folder` names the zip.
"""

from __future__ import annotations

from longvpo_hf.intake.corpus import Corpus
from longvpo_hf.intake.records import Record, Sources


def read(corpus: Corpus) -> Sources:
    """A video for each record."""

    def video(record: Record) -> Sources:
        video_id = record.name("video_id")
        captions = {str(item.get("idx", object)): item.text("content") for item in record.items("captions")}
        if "-1" not in captions:
            raise record.error("captions", f"has no idx '-1', the whole video's caption, but {sorted(captions)[:9]}")
        yield corpus.source(
            record,
            record.name("video_path"),
            video_id,
            caption=captions["-1"],
            licence="CC-BY-NC-4.0",
            archive=record.name("zip_folder"),
        )

    yield from corpus.each(corpus.records("*.jsonl"), video)
