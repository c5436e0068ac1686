"""The layout of a preference dataset in a folder and on the Hub, which `load_dataset` opens map-style and streaming.

    longvpo.json     how the rows came about, see `record.DatasetRecord`
    README.md        the dataset card, made of the record; its YAML names the files below
    train.parquet    the rows, see `preference.row_schema`
    clips/ab/*.mp4   the media, named by content, in folders of the first two digits of their names

Each media file is stored once, however many rows show it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from longvpo_hf.artifacts import file_digest, whole_file, whole_folder, write_text
from longvpo_hf.errors import DatasetError
from longvpo_hf.frames import UnreadableVideo, is_whole
from longvpo_hf.paths import OutsideRoot, is_inside, path_inside
from longvpo_hf.preference import VideoPreference, row_schema
from longvpo_hf.public import public_name
from longvpo_hf.publishing.dataset_card import dataset_card, with_name
from longvpo_hf.record import (
    RECORD_FILE,
    DatasetRecord,
    LicenceRecord,
    installed_versions,
    read_record,
    write_record,
)
from longvpo_hf.timeline import Clip

#: The Hub refuses a commit that puts more files than this into one folder.
MAX_FILES_PER_FOLDER = 10_000

_ROWS_PER_WRITE = 1000
#: Names of source videos that the record lists for each licence; the rows name all of them.
_SOURCES_NAMED = 20


class DatasetWriter:
    """Writes rows and their media into a folder, as a context manager: it appears whole at the end or not at all.

    Args:
        folder: The dataset's folder. An earlier dataset there is replaced; anything else is an error.
        media_root: None copies the media. A folder leaves them out, for corpora that may not be redistributed: rows
            then name each clip's file relative to this folder, where `formats.from_reference` finds them again.

    Raises:
        DatasetError: On entry, if the folder is neither empty nor a dataset.
    """

    def __init__(self, folder: Path, media_root: Path | None = None) -> None:
        self.folder = folder
        self._media_root = media_root
        self._open = ExitStack()
        self._names: dict[str, str] = {}
        self._rows: list[dict[str, Any]] = []
        self._clips: set[Clip] = set()
        self._content = hashlib.sha256()
        self.num_rows = 0

    def __enter__(self) -> DatasetWriter:
        check_folder(self.folder)
        self._part = self._open.enter_context(whole_folder(self.folder))
        if not self._media_root:
            (self._part / "clips").mkdir()
        self._parquet = pq.ParquetWriter(self._part / "train.parquet", row_schema())
        return self

    def add(self, preference: VideoPreference) -> None:
        """Adds one row, and the media of its clips that no earlier row had.

        Raises:
            UnreadableVideo: If a media file is missing, or is not a video.
        """
        self._rows.append(preference.to_row(self._store))
        self._content.update(preference.id.encode())
        self._clips.update(preference.timeline.clips)
        self.num_rows += 1
        if len(self._rows) >= _ROWS_PER_WRITE:
            self._flush()

    def write_record(self, record: DatasetRecord) -> None:
        """Writes the record, and the card that is rendered from it.

        Args:
            record: How the rows were made. Counts, licences, digest and versions are filled in from the rows added so
                far.
        """
        complete = replace(
            record,
            num_rows=self.num_rows,
            num_clips=len(self._clips),
            licences=_licences(self._clips),
            by_reference=self._media_root is not None,
            digest=self._content.hexdigest()[:16],
            versions=installed_versions(),
        )
        write_record(self._part, complete)
        write_text(self._part / "README.md", dataset_card(complete))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._finish(is_complete=kind is None)
        except BaseException as refused:  # the disk is full, say: what is written so far goes
            self._open.__exit__(type(refused), refused, refused.__traceback__)
            raise
        self._open.__exit__(kind, error, trace)

    def _finish(self, is_complete: bool) -> None:
        if is_complete:
            self._flush()
        self._parquet.close()
        media = [] if self._media_root else list((self._part / "clips").glob("*/*"))
        if len(media) == 1:
            # `datasets` chooses its builder by the more frequent kind of file, and Parquet in a draw: a second copy
            # makes this a dataset of videos.
            shutil.copyfile(media[0], media[0].with_stem(f"{media[0].stem}-again"))

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, schema=row_schema()))
            self._rows.clear()

    def _store(self, clip: Clip) -> str:
        if clip.path not in self._names:
            source = Path(clip.path)
            check_media(clip, self._media_root)
            if self._media_root is not None:
                self._names[clip.path] = _relative(source, self._media_root)
                return self._names[clip.path]
            digest = file_digest(source)[:20]
            name = f"clips/{digest[:2]}/{digest}{source.suffix.lower() or '.mp4'}"
            (self._part / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, self._part / name)
            self._names[clip.path] = name
        return self._names[clip.path]


def check_media(clip: Clip, media_root: Path | None) -> None:
    """Makes sure that a dataset can hold a clip's file.

    Args:
        clip: The clip.
        media_root: See `DatasetWriter`.

    Raises:
        UnreadableVideo: If the file is missing, or is to be published and is not a video.
    """
    source = Path(clip.path)
    if not source.is_file():
        raise UnreadableVideo("missing_file", clip, "no such file")
    if media_root is None and not is_whole(source):  # whatever names the file, only video is published
        raise UnreadableVideo("unreadable", clip, "it is not a whole video of a known container")


#: The column that names the files of `preview`, in the form that `load_dataset` turns into videos.
_PREVIEW = "preview_file_name"


def has_preview(folder: Path) -> bool:
    """Whether a dataset has the column that `add_preview` adds."""
    return _PREVIEW in pq.read_schema(folder / "train.parquet").names


def add_preview(folder: Path) -> None:
    """Adds a column that the Hub's viewer plays: `preview`, the first clip of each row that holds the answer.

    No file is added: the column names media that are there.

    Args:
        folder: A dataset with its media, see `DatasetWriter`.
    """
    path = folder / "train.parquet"
    with pq.ParquetFile(path) as file, whole_file(path) as written:
        column = pa.field(_PREVIEW, pa.string())
        schema = file.schema_arrow
        schema = schema if column.name in schema.names else schema.append(column)
        with pq.ParquetWriter(written, schema) as writer:
            for batch in file.iter_batches(batch_size=_ROWS_PER_WRITE):
                rows = batch.to_pylist()
                for row in rows:
                    first = min(row["evidence"] or [0])
                    row[column.name] = row["clips"][first]["file_name"]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def prepare_push(repo_id: str, *, private: bool | None = None, revision: str | None = None) -> HfApi:
    """Makes sure that `push_dataset` may write to a repository; creates it, and its branch, if they do not exist.

    Call it before a build, so that a missing token costs no work. The arguments are those of `push_dataset`.

    Raises:
        DatasetError: If the name is not one of the Hub's, the token may not write there, or it is to be private and is
            there and public.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if private:
            require_private(api, repo_id, "dataset")
        api.auth_check(repo_id, repo_type="dataset", write=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:  # the last: offline, no network
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DatasetError(
            f"The dataset {repo_id} cannot be written to ({reason}). Log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write to the namespace, and name the dataset namespace/name."
        ) from error
    return api


def require_private(api: HfApi, repo_id: str, repo_type: str) -> None:
    """Refuses a public repository where a private one was asked for: the Hub makes only a new one private.

    Raises:
        DatasetError: If it is public.
    """
    if not api.repo_info(repo_id, repo_type=repo_type).private:
        raise DatasetError(
            f"The {repo_type} {repo_id} is there already and is public; only one that is new is made private. Change "
            "its visibility in its settings on the Hub, name another, or push without asking for a private one."
        )


def push_dataset(folder: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Publishes a folder that `DatasetWriter` wrote, in one commit that replaces an earlier dataset entirely.

    The dataset's name is put into the card. After a push that broke off, call this again; no media are uploaded twice.

    Args:
        folder: See `DatasetWriter`.
        repo_id: Name on the Hub, `namespace/name`; created if it does not exist.
        private: Whether a new repository is private; None leaves it to the namespace's setting.
        revision: Branch to push to; created if it does not exist. None: `main`.

    Returns:
        The commit's id, for `load_dataset(repo_id, revision=...)`.

    Raises:
        DatasetError: If a file of the folder is missing, media that a row names among them, a folder holds more files
            than the Hub takes, or the repository cannot be written to.
        ValueError: If the Hub refuses the card.
    """
    card = folder / "README.md"
    for path in (card, folder / "train.parquet"):
        if not path.is_file():
            raise DatasetError(f"{folder} lacks {path.name}: it is not a dataset that DatasetWriter finished.")
    record = read_record(folder, DatasetRecord)
    named = set() if record is not None and record.by_reference else _media_of(folder / "train.parquet")
    missing = sorted(name for name in named if not _is_media(folder, name))
    if missing:
        raise DatasetError(
            f"{len(missing)} media files that the rows of {folder / 'train.parquet'} name are missing, e.g. "
            f"{missing[0]!r}. Build the dataset again."
        )
    for path in (folder / "clips").rglob("*"):
        if not is_inside(folder, path):
            raise DatasetError(f"{path} is a link to {path.resolve()}, which would be published; remove it.")
    for parent, number in Counter(name.rpartition("/")[0] for name in named).items():
        if number > MAX_FILES_PER_FOLDER:
            raise DatasetError(
                f"{folder / parent} holds {number} media files and the Hub takes at most {MAX_FILES_PER_FOLDER} a "
                "folder. Run the build again: it reuses its finished work and spreads the files over more folders."
            )
    api = prepare_push(repo_id, private=private, revision=revision)
    write_text(card, with_name(card.read_text(encoding="utf-8"), repo_id))
    commit = api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder,
        revision=revision,
        commit_message="Upload preference rows and their clips",
        allow_patterns=[RECORD_FILE, "README.md", "train.parquet", "clips/*"],  # nothing else, e.g. inspect.html
        delete_patterns=[RECORD_FILE, "*.parquet", "clips/*"],
    )
    return str(commit.oid)


def dataset_folder(name: str) -> Path:
    """The folder of a dataset: the one that is named, or a snapshot of the Hub's.

    Raises:
        DatasetError: If there is no such folder, and the Hub has no such dataset.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise DatasetError(f"{name} is a file: name the folder it lies in, which is the dataset.")
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, OSError, httpx2.TransportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DatasetError(
            f"{name} is neither a folder nor a dataset that can be had from the Hub ({reason})."
        ) from error


def check_folder(folder: Path) -> None:
    """Refuses to write a dataset over anything but a dataset, and into one.

    Raises:
        DatasetError: If the folder is neither empty nor a dataset, or lies in one, or this runs in it.
    """
    here, place = Path.cwd(), Path(os.path.abspath(folder))
    for parent in place.parents:
        if (parent / "train.parquet").is_file():
            raise DatasetError(
                f"{folder} lies in the dataset {parent}, and would be a part of it; name another folder."
            )
    if place in (here, *here.parents):
        raise DatasetError(f"{folder} is or holds the folder that this runs in, and would be replaced; name another.")
    if (folder / "train.parquet").is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise DatasetError(f"{folder} is neither empty nor a dataset, and would be replaced; name another folder.")


def _relative(path: Path, root: Path) -> str:
    """The path as rows name it: relative to `root`, with forward slashes.

    Raises:
        DatasetError: If it is outside `root`.
    """
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise DatasetError(f"{path} is outside media_root={root}, the folder that all media must be in.") from None


def _media_of(parquet: Path) -> set[str]:
    """Every media file that the rows name."""
    names: set[str] = set()
    with pq.ParquetFile(parquet) as file:
        for batch in file.iter_batches(columns=["clips"]):
            clips = batch.column("clips").flatten()
            names.update(clips.field("file_name").to_pylist())
    return names


def _is_media(folder: Path, name: str) -> bool:
    """Whether a name that rows give is that of a file in the dataset's folder."""
    try:
        return path_inside(folder, name).is_file()
    except OutsideRoot:
        return False


def _licences(clips: Iterable[Clip]) -> tuple[LicenceRecord, ...]:
    numbers: Counter[str] = Counter()
    sources: defaultdict[str, set[str]] = defaultdict(set)
    for clip in clips:
        numbers[clip.licence] += 1
        sources[clip.licence].update([clip.source_id] if clip.source_id else [])
    return tuple(
        LicenceRecord(
            licence, number, len(sources[licence]), tuple(map(public_name, sorted(sources[licence])[:_SOURCES_NAMED]))
        )
        for licence, number in sorted(numbers.items())
    )
