"""One reader per public corpus, and one for a folder of videos.

Each takes the folder the corpus was downloaded to and a cache folder; gives its videos in a fixed order, one `Source`
at a time, with caption, scenes, id and licence where the corpus has them, and a `Dropped` for each that is not there or
may not be opened. A record that does not look as expected is a `CorpusError`. Nothing is decoded here.

The shapes are those the corpora's own pages describe; where a page is silent the docstring says what is assumed.
"""

from __future__ import annotations

import io
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from longvpo_hf.errors import CorpusError
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.records import RECORD_SUFFIXES, Record, Scene, Source, json_record, read_records
from longvpo_hf.intake.store import Archive, VideoStore, archives_under, is_video, leaves_root, stays_within

Sources = Iterator[Source | Dropped]
Reader = Callable[[Path, Path], Sources]

#: Rows of FineVideo held at once: each holds a video.
_VIDEO_ROWS = 4


def read_videofolder(root: Path, cache: Path) -> Sources:
    """A folder of video files, in any layout, in the order of their paths.

    A file `metadata.jsonl`, `.json`, `.csv` or `.parquet` in it may say more: `file_name` (under the folder), and where
    they are known `caption`, `source_id`, `licence`. Without a `source_id` the path under the folder is the id.
    """
    if not root.is_dir():
        raise CorpusError(f"{root} is no folder; give the folder that holds the videos.")
    said = _Said(root)
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        if not stays_within(path, root):
            yield Dropped("outside_root", str(path), name, f"a link to {path.resolve()}")
        elif is_video(name) and any("\ud800" <= character <= "\udfff" for character in name):
            yield Dropped("bad_name", str(path), name, "rename it to UTF-8: a row could not hold the name")
        elif is_video(name):
            caption, source_id, licence = said.take(name)
            yield Source(path, caption, source_id or name, licence)
    yield from said.rest(root)


def read_finevideo(root: Path, cache: Path) -> Sources:
    """HuggingFaceFV/finevideo: Parquet with `mp4` bytes and a struct `json`.

    Scenes are `content_metadata.scenes[].timestamps`; a scene's caption is its title and what its activities say. The
    id is the stem of `original_video_filename`, a YouTube id.
    """
    store = VideoStore(root, cache, archives=())
    for path in _files(root, "*.parquet"):
        for record in read_records(path, _VIDEO_ROWS):
            file = store.put(io.BytesIO(record.get("mp4", bytes)), ".mp4")
            name = record.text("json.original_video_filename")
            scenes = tuple(_finevideo_scene(scene) for scene in record.items("json.content_metadata.scenes"))
            yield Source(
                file,
                record.find("json.content_metadata.description", str) or "",
                PurePosixPath(name).stem,
                "CC-BY, each video's own terms",
                scenes,
                store.sha256(file),
                name,
            )


def read_pe_video(root: Path, cache: Path) -> Sources:
    """facebook/PE-Video: WebDataset tars of `KEY.mp4` and `KEY.json`.

    The caption is the record's `human_caption` or else its `model_caption`; the id is the key's last part.
    """
    store = VideoStore(root, cache)
    if not store.archives:
        raise CorpusError(f"{root} holds no tar; PE-Video is made of tars of KEY.mp4 and KEY.json.")
    for archive in store.archives:
        key, video, record = "", None, None
        for member in archive.members():
            # WebDataset: files of one sample follow each other and share their name up to its first dot.
            folder, base = PurePosixPath(member.name).parent, PurePosixPath(member.name).name
            now = str(folder / base.split(".")[0])
            if now != key:
                yield from _pe_video_sample(store, archive, key, video, record)
                key, video, record = now, None, None
            if is_video(base):
                video = store.extracted(archive, member)
            elif base.endswith(".json") and not member.is_link:
                with member.open() as content:
                    record = json_record(content.read(), f"{archive.files[0]}::{member.name}")
        yield from _pe_video_sample(store, archive, key, video, record)


def read_llava_video(root: Path, cache: Path) -> Sources:
    """lmms-lab/LLaVA-Video-178K: lists of records in json (or jsonl), videos in tars or extracted beside them.

    Captions are the answers of `*cap*` files (split caption), the only files whose answer describes the video; a folder
    without one is read for its videos alone. The id is the record's `id`.
    """
    store = VideoStore(root, cache)
    records = [path for path in _files(root, "*.json", "*.jsonl") if path.name[0] != "."]
    captions = [path for path in records if "cap" in path.stem.split("_")]
    for path in captions or records:
        for record in read_records(path):
            source_id = record.text("id")
            caption = _llava_answer(record) if captions else ""
            name = record.text("video")
            yield _source(store, store.locate(name, source_id), name, caption, source_id, "")


def read_vript(root: Path, cache: Path) -> Sources:
    """Mutonix/Vript: caption records of `meta` and `data{clip_id}`, scenes cut into clips in zips.

    Records lie in `*_captions.jsonl`, in `*_caption.json`, or in zips of these (`*_captions.zip`). Each clip is a
    source; its caption is the content with shot type and camera movement, its id the video's.
    """
    archives = archives_under(root)
    captions = [archive for archive in archives if archive.name.endswith("captions.zip")]
    store = VideoStore(root, cache, [archive for archive in archives if archive not in captions])
    for record in _vript_records(root, captions):
        for clip_id, clip in record.named("data"):
            video_id = clip.text("video_id")
            camera = [clip.find(f"caption.{name}", str) or "" for name in ("shot_type", "camera_movement")]
            caption = _sentences([*camera, clip.text("caption.content")])
            name = f"{clip_id}.mp4"
            yield _source(store, store.locate(name, video_id), name, caption, video_id, "Vript licence")


def read_sharegpt4video(root: Path, cache: Path) -> Sources:
    """ShareGPT4Video/ShareGPT4Video: `sharegpt4video_40k.jsonl` and zips.

    The caption of the whole video is that of `idx` "-1"; the others describe single frames. `zip_folder` names the zip.
    """
    store = VideoStore(root, cache)
    for path in _files(root, "*.jsonl"):
        for record in read_records(path):
            video_id = record.text("video_id")
            captions = {str(item.get("idx", object)): item.text("content") for item in record.items("captions")}
            if "-1" not in captions:
                raise record.error("captions", f"has no idx '-1', the whole video's caption, but {sorted(captions)}")
            name = record.text("video_path")
            place = store.locate(name, video_id, record.text("zip_folder"))
            yield _source(store, place, name, captions["-1"], video_id, "CC-BY-NC-4.0")


def read_longva_tpo(root: Path, cache: Path) -> Sources:
    """ruili0/LongVA-TPO-10k: `dataset.csv`, whose column `video` names the video, and a tar in parts.

    Its rows are preferences, several of one video, none a caption: each video is given once for each run of rows.
    """
    store = VideoStore(root, cache)
    before = ""
    for record in read_records(root / "dataset.csv"):
        name = record.text("video")
        if name != before:
            source_id = PurePosixPath(name).stem
            yield _source(store, store.locate(name, source_id), name, "", source_id, "MIT")
        before = name


#: Readers by the name that a user gives.
READERS: Mapping[str, Reader] = {
    "videofolder": read_videofolder,
    "finevideo": read_finevideo,
    "pe-video": read_pe_video,
    "llava-video": read_llava_video,
    "vript": read_vript,
    "sharegpt4video": read_sharegpt4video,
    "longva-tpo": read_longva_tpo,
}


def _source(
    store: VideoStore, place: Path | Dropped, name: str, caption: str, source_id: str, licence: str
) -> Source | Dropped:
    if isinstance(place, Dropped):
        return place
    return Source(place, caption, source_id, licence, sha256=store.sha256(place), name=PurePosixPath(name).name)


def _files(root: Path, *patterns: str) -> list[Path]:
    """The record files under a folder, in order."""
    if not root.is_dir():
        raise CorpusError(f"{root} is no folder; give the folder that the corpus was downloaded to.")
    found = sorted({path for pattern in patterns for path in root.rglob(pattern)})
    if not found:
        raise CorpusError(f"{root} holds no {' or '.join(patterns)}; get the corpus' records, too.")
    return found


def _walk(root: Path) -> Iterator[Path]:
    """Every file under a folder in the order of names, folder by folder; links to folders are given, not followed."""
    with os.scandir(root) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


class _Said:
    """What the metadata file of a folder says of its videos, kept on disk: it may be larger than memory."""

    def __init__(self, root: Path) -> None:
        self._table = sqlite3.connect("")  # a temporary file
        self._table.execute("CREATE TABLE said (name TEXT PRIMARY KEY, caption, source_id, licence, taken)")
        for suffix in RECORD_SUFFIXES:
            if (path := root / f"metadata{suffix}").exists():
                self._table.executemany("INSERT OR REPLACE INTO said VALUES (?, ?, ?, ?, 0)", self._rows(path))

    @staticmethod
    def _rows(path: Path) -> Iterator[tuple[str, ...]]:
        for record in read_records(path):
            optional = (record.find(name, str) or "" for name in ("caption", "source_id", "licence"))
            yield (PurePosixPath(record.text("file_name")).as_posix(), *optional)

    def take(self, name: str) -> tuple[str, str, str]:
        """Caption, id and licence of the file `name`."""
        said = self._table.execute("SELECT caption, source_id, licence FROM said WHERE name = ?", (name,)).fetchone()
        self._table.execute("UPDATE said SET taken = 1 WHERE name = ?", (name,))
        return said or ("", "", "")

    def rest(self, root: Path) -> Iterator[Dropped]:
        """What was said of files that are not there."""
        for name, source_id in self._table.execute("SELECT name, source_id FROM said WHERE NOT taken ORDER BY name"):
            if leaves_root(name):
                yield Dropped("outside_root", name, source_id, "the record's name leads out of the folder")
            else:
                yield Dropped("missing_file", str(root / name), source_id or name, "the metadata names it")


def _finevideo_scene(scene: Record) -> Scene:
    activities = [item.find("description", str) or "" for item in scene.items("activities")]
    return Scene(
        scene.seconds("timestamps.start_timestamp"),
        scene.seconds("timestamps.end_timestamp"),
        _sentences([scene.find("title", str) or "", *activities]),
    )


def _sentences(texts: list[str]) -> str:
    stripped = (text.strip().rstrip(".") for text in texts)
    return " ".join(f"{text}." for text in stripped if text)


def _pe_video_sample(
    store: VideoStore, archive: Archive, key: str, video: Path | Dropped | None, record: Record | None
) -> Sources:
    if video is None and record is None:
        return
    name = PurePosixPath(key).name
    if record is None:
        raise CorpusError(f"{archive.files[0]}, sample {key}: {key}.json is missing beside its video.")
    caption = record.find("human_caption", str) or record.find("model_caption", str)
    if not caption:
        raise record.error("human_caption", "is missing, and model_caption, too")
    if video is None:
        yield Dropped("missing_file", f"{archive.files[0]}::{key}", name, "the sample has no video")
    else:
        yield _source(store, video, f"{name}.mp4", caption.strip(), name, "")


def _llava_answer(record: Record) -> str:
    for turn in record.items("conversations"):
        if turn.text("from") == "gpt":
            return turn.text("value")
    raise record.error("conversations", "has no turn of 'gpt'")


def _vript_records(root: Path, captions: list[Archive]) -> Iterator[Record]:
    """From jsonl where there are any; they hold what the zips of the same folder hold."""
    lines = sorted(root.rglob("*_captions.jsonl"))
    for path in lines:
        yield from read_records(path)
    if lines:
        return
    files = sorted(root.rglob("*_caption.json"))
    for path in files:
        yield json_record(path.read_bytes(), str(path))
    for archive in captions:
        for member in archive.members():
            if member.name.endswith("_caption.json") and not member.is_link:
                with member.open() as content:
                    yield json_record(content.read(), f"{archive.files[0]}::{member.name}")
    if not files and not captions:
        raise CorpusError(f"{root} holds no *_captions.jsonl, *_caption.json or *_captions.zip; get the captions, too.")
