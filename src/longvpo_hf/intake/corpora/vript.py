"""Mutonix/Vript: captions of scenes, and each scene a file of its own in zips.

Records have `meta` and `data{clip_id}`; they are in `*_captions.jsonl`, in `*_caption.json`, or in zips of these
(`*_captions.zip`). Each scene is a source; its caption is the content with shot type and camera movement. The scenes of
a film follow each other in the order of their numbers, so that Stage 2 and the temporal method see the film.

`<film>_cut_meta.json` beside the scenes "includes the start time, end time, and the duration of the scene"; its fields
are not described further, and `clips[].clip_id` with `start_time` or `start` is assumed. Without it, times of a scene
count from the start of its own file.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from longvpo_hf.errors import CorpusError
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.archives import Archive, Damaged, TooLarge, archives_under
from longvpo_hf.intake.corpus import Corpus, sentences
from longvpo_hf.intake.record_files import json_record, read_records
from longvpo_hf.intake.records import BadRecord, Record, Sources

_LICENCE = "Vript licence"
_DIGITS = re.compile(r"(\d+)")


def read(corpus: Corpus) -> Sources:
    """A source for each scene, film by film."""
    archives = archives_under(corpus.root)
    captions = [archive for archive in archives if archive.name.endswith("captions.zip")]
    videos = [archive for archive in archives if archive not in captions]
    # The zips of whole films hold no scene; they have hundreds of gigabytes.
    videos = [archive for archive in videos if "clip" in archive.name] or videos
    corpus.open_store(videos)
    starts = _Starts(corpus, videos)

    def film(record: Record) -> Sources:
        for clip_id, clip in sorted(record.named("data"), key=lambda named: _order(named[0])):
            try:
                film_id = clip.name("video_id")
                camera = [clip.find(f"caption.{name}", str) or "" for name in ("shot_type", "camera_movement")]
                yield corpus.source(
                    record,
                    f"{clip_id}.mp4",
                    film_id,
                    caption=sentences([*camera, clip.text("caption.content")]),
                    licence=_LICENCE,
                    film=film_id,
                    film_start_seconds=starts.of(clip_id),
                )
            except BadRecord as error:
                yield error.dropped()

    yield from corpus.each(_records(corpus, captions), film)
    yield from corpus.take_problems()


def _records(corpus: Corpus, captions: Sequence[Archive]) -> Iterator[Record | Dropped]:
    """From jsonl where there are any; they hold what the zips of the same folder hold."""
    lines = corpus.files("*_captions.jsonl")
    for path in lines:
        yield from read_records(path, corpus.limits)
    if lines:
        return
    files = corpus.files("*_caption.json")
    for path in files:
        yield _file_record(path, corpus)
    for archive in captions:
        yield from _archived(corpus, archive, "_caption.json")
    if not files and not captions:
        missing = "*_captions.jsonl, *_caption.json or *_captions.zip"
        raise CorpusError(f"{corpus.root} holds no {missing}; get the captions, too.")


def _file_record(path: Path, corpus: Corpus) -> Record | Dropped:
    try:
        with path.open("rb") as content:
            return json_record(content, str(path), corpus.limits, path.parent)
    except BadRecord as error:
        return error.dropped()


def _archived(corpus: Corpus, archive: Archive, ending: str) -> Iterator[Record | Dropped]:
    """The JSON files of an archive whose names end so."""
    for _, member in corpus.store.members(archive):
        if member.name.endswith(ending) and not member.is_link:
            where = f"{archive.files[0]}::{member.name}"
            try:
                with member.open() as content:
                    yield json_record(content, where, corpus.limits, archive.folder)
            except BadRecord as error:
                yield error.dropped()
            except (Damaged, TooLarge) as error:
                yield Dropped("bad_record", where, "", str(error))


class _Starts:
    """When scenes start in their films, where the corpus says so."""

    def __init__(self, corpus: Corpus, archives: Sequence[Archive]) -> None:
        self._table = sqlite3.connect("")  # a temporary file
        self._table.execute("CREATE TABLE starts (clip_id TEXT PRIMARY KEY, seconds REAL)")
        for path in corpus.files("*_cut_meta.json"):
            self._add(_file_record(path, corpus))
        for archive in archives:
            if archive.is_zip:  # another would have to be read from start to end
                for record in _archived(corpus, archive, "_cut_meta.json"):
                    self._add(record)

    def of(self, clip_id: str) -> float | None:
        """Seconds from the start of the film; None if unknown."""
        found = self._table.execute("SELECT seconds FROM starts WHERE clip_id = ?", (clip_id,)).fetchone()
        return None if found is None else float(found[0])

    def _add(self, record: Record | Dropped) -> None:
        # It adds times to scenes that are complete without them: what cannot be read of it costs nothing.
        try:
            for clip in [] if isinstance(record, Dropped) else record.items("clips"):
                clip_id = PurePosixPath(clip.name("clip_id")).name.removesuffix(".mp4")
                seconds = clip.seconds("start_time" if "start_time" in clip.fields else "start")
                self._table.execute("INSERT OR REPLACE INTO starts VALUES (?, ?)", (clip_id, seconds))
        except BadRecord:
            return


def _order(name: str) -> list[tuple[int, str]]:
    """Sorts `Scene-9` before `Scene-10`."""
    parts = _DIGITS.split(name)
    numbers = [(len(part.lstrip("0")), part.lstrip("0")) for part in parts[1::2]]
    words = [(0, part) for part in parts[0::2]]
    return [part for pair in zip(words, [*numbers, (0, "")], strict=True) for part in pair]
