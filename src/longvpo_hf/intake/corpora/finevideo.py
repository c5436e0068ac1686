"""HuggingFaceFV/finevideo: Parquet with `mp4` bytes and a struct `json`.

Scenes are `content_metadata.scenes[].timestamps`; a scene's caption is its title and what its activities say. The id is
the stem of `original_video_filename`, a YouTube id.
"""

from __future__ import annotations

import io
from pathlib import PurePosixPath

from longvpo_hf.errors import CorpusError
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.archives import TooLarge
from longvpo_hf.intake.corpus import Corpus, sentences
from longvpo_hf.intake.record_files import read_records
from longvpo_hf.intake.records import Record, Scene, Sources

_LICENCE = "CC-BY, each video's own terms"


def read(corpus: Corpus) -> Sources:
    """A video for each row."""
    store = corpus.open_store(archives=())
    files = corpus.files("*.parquet")
    if not files:
        raise CorpusError(f"{corpus.root} holds no *.parquet; get the corpus' records, too.")

    def video(record: Record) -> Sources:
        content = record.get("mp4", bytes)
        name = record.name("json.original_video_filename")
        scenes = tuple(_scene(scene) for scene in record.items("json.content_metadata.scenes"))
        caption = record.find("json.content_metadata.description", str) or ""
        source_id = PurePosixPath(name).stem
        try:
            path = store.put(io.BytesIO(content), ".mp4")
        except TooLarge as error:
            yield Dropped("too_large", record.file, source_id, f"{record.place}: {error}")
            return
        yield corpus.stored(path, name, source_id, caption=caption, licence=_LICENCE, scenes=scenes)

    for path in files:
        yield from corpus.each(read_records(path, corpus.limits, columns=("mp4", "json")), video)


def _scene(scene: Record) -> Scene:
    activities = [item.find("description", str) or "" for item in scene.items("activities")]
    return Scene(
        scene.seconds("timestamps.start_timestamp"),
        scene.seconds("timestamps.end_timestamp"),
        sentences([scene.find("title", str) or "", *activities]),
    )
