"""Rows that other people publish, as rows that `LongVPOTrainer` takes: one function for each form.

Takes a dataset as `load_dataset` gives it, and the folder its videos lie in; gives a `datasets.Dataset` with the
columns of `preference.row_schema`. Each video becomes one clip that spans its file. What others publish names neither
evidence nor a reference view, so policy and reference see the whole timeline (`LongVPOConfig(reference="row")`, the
default).

- `from_trl`: TRL preference rows with a `video` or `videos` column. Rows with `images` go straight to the trainer,
  which trains them as TRL does.
- `from_longvpo`: `MCG-NJU/LongVPO-Training-Data`, configs `stage1` and `stage2`.
- `from_longva_tpo`: `ruili0/LongVA-TPO-10k`.
- `from_reference`: rows of this package that were published without their media (`--media reference`); evidence and
  reference view are kept.

A file name in a dataset is somebody else's text: none may lead out of the folder given. A record that is not as
expected is an error that names row and field. Knows nothing of models or of how rows are made.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from longvpo_hf.artifacts import whole_file
from longvpo_hf.errors import DatasetError
from longvpo_hf.frames import UnreadableVideo, whole_clip
from longvpo_hf.preference import Provenance, VideoPreference, row_schema
from longvpo_hf.timeline import Clip, Timeline

if TYPE_CHECKING:
    from datasets import Dataset

#: LLaVA's way to say in the question where the video stands. Processors put their own there.
_PLACEHOLDER = re.compile(r"^\s*<(?:video|image)>\s*|\s*<(?:video|image)>\s*$")


def from_trl(dataset: Dataset, video_root: str | Path, cache_dir: str | Path | None = None) -> Dataset:
    """TRL preference rows about videos.

    Args:
        dataset: Rows with `chosen` and `rejected`, perhaps `prompt` (else the turns that both begin with), as text or
            as messages whose content is text or a list of parts, of which only the text is read; and either `video` or
            `videos` (several are laid end to end), as file names or of type `Video`.
        video_root: Folder that file names are relative to, and no file may lie outside of.
        cache_dir: Where videos that are stored in the dataset itself are written, once per content; by default
            `longvpo_hf/videos` in the cache folder of `datasets`' home, `HF_HOME`.

    Raises:
        ValueError: If a row is not as described, has more than one question and one answer, or names a file that is
            missing, no video, or outside of `video_root`; the message names the row and the field.
    """
    columns = [name for name in ("video", "videos") if name in dataset.column_names]
    if len(columns) != 1:
        raise DatasetError(
            f"TRL rows about videos have one of the columns video and videos, got columns {dataset.column_names}. "
            "Rows about images need no adapter: give them to the trainer as they are."
        )
    media = _Media(Path(video_root), Path(cache_dir) if cache_dir is not None else _default_cache())

    def read(row: Mapping[str, Any], where: str) -> VideoPreference:
        prompt, chosen, rejected = _split(row, where)
        return _preference(
            media.clips(row[columns[0]], f"{where}: {columns[0]}"),
            question=_text(prompt, "user", f"{where}: prompt"),
            chosen=_text(chosen, "assistant", f"{where}: chosen"),
            rejected=_text(rejected, "assistant", f"{where}: rejected"),
            method="trl",
            where=where,
        )

    return _dataset(_undecoded(dataset, columns[0]), read)


def from_longvpo(dataset: Dataset, video_root: str | Path) -> Dataset:
    """Rows of `MCG-NJU/LongVPO-Training-Data`, config `stage1` or `stage2`.

    They do not name the anchor clip, so Stage 1 trains with the reference on the whole timeline here, unlike in the
    paper.

    Args:
        dataset: Rows with text columns `video` (a file name, or a list of them, laid end to end), `task_type`,
            `question`, `chosen` and `rejected`.
        video_root: Folder that `video` is relative to, and no file may lie outside of.

    Raises:
        ValueError: See `from_trl`.
    """
    return _from_flat(dataset, video_root, ("video", "task_type", "question", "chosen", "rejected"), "longvpo")


def from_longva_tpo(dataset: Dataset, video_root: str | Path) -> Dataset:
    """Rows of `ruili0/LongVA-TPO-10k`, e.g. `load_dataset("csv", data_files="dataset.csv", split="train")`.

    Args:
        dataset: Rows with text columns `video` (a file name), `question`, `chosen` and `rejected`.
        video_root: Folder that the dataset's archives were unpacked into: `video` is relative to it, and no file may
            lie outside of it.

    Raises:
        ValueError: See `from_trl`.
    """
    return _from_flat(dataset, video_root, ("video", "question", "chosen", "rejected"), "temporal-longva")


def from_reference(dataset: Dataset, video_root: str | Path) -> Dataset:
    """Rows that were published without media, with the files of a corpus that is there.

    Args:
        dataset: Rows of `preference.row_schema` whose clips name files relative to the corpus' folder.
        video_root: That folder: no file may lie outside of it.

    Raises:
        ValueError: If a file leads out of `video_root` or is not there; the message names the row and the field.
    """
    media = _Media(Path(video_root), None)
    for row in dataset.select_columns(["id", "clips"]):
        for number, clip in enumerate(row["clips"]):
            where = f"row {row['id']}, field clips[{number}].file_name"
            if not media.inside(clip["file_name"], where).is_file():
                raise DatasetError(f"{where}: {clip['file_name']} is not in video_root={video_root}.")

    def located(row: dict[str, Any]) -> dict[str, Any]:
        found = [{**clip, "file_name": str(media.inside(clip["file_name"], "clips"))} for clip in row["clips"]]
        return {"clips": found}

    return dataset.map(located, desc="Locating clips")


def _from_flat(dataset: Dataset, video_root: str | Path, columns: tuple[str, ...], method: str) -> Dataset:
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        raise DatasetError(f"Rows need the columns {list(columns)}, got {dataset.column_names}: {missing} are missing.")
    media = _Media(Path(video_root), None)

    def read(row: Mapping[str, Any], where: str) -> VideoPreference:
        for name in columns[1:]:
            if not isinstance(row[name], str):
                raise DatasetError(f"{where}: {name} must be text, got {row[name]!r}.")
        if "task_type" in columns and not row["task_type"].strip():
            raise DatasetError(f"{where}: task_type is empty.")
        return _preference(
            media.clips(row["video"], f"{where}: video"),
            question=_without_placeholder(row["question"]),
            chosen=row["chosen"],
            rejected=row["rejected"],
            method="-".join([method, *([row["task_type"]] if "task_type" in columns else [])]),
            where=where,
        )

    return _dataset(dataset, read)


def _preference(
    clips: tuple[Clip, ...], *, question: str, chosen: str, rejected: str, method: str, where: str
) -> VideoPreference:
    try:
        return VideoPreference(Timeline(clips), question, chosen, rejected, provenance=Provenance(method=method))
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from error


def _dataset(rows: Iterable[Mapping[str, Any]], read: Callable[[Mapping[str, Any], str], VideoPreference]) -> Dataset:
    """Every row as `read` makes it of one and its name."""
    from datasets import Dataset, Features

    made = [
        read(row, f"row {number}").to_row(lambda clip: clip.path)
        for number, row in enumerate(tqdm(rows, desc="reading videos", unit="row", leave=False))
    ]
    return Dataset.from_list(made, features=Features.from_arrow_schema(row_schema()))


# ---------------------------------------------------------------------------------------------------------- texts


def _split(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected; the prompt may be what both answers' messages begin with."""
    for name in ("chosen", "rejected"):
        if not row.get(name):
            raise DatasetError(f"{where}: {name} must be text or messages, got {row.get(name)!r}.")
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt"):
        return row["prompt"], chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DatasetError(f"{where}: prompt must be text or messages, got {row.get('prompt')!r}.")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == 0:
        raise DatasetError(f"{where}: without a prompt, chosen and rejected must begin with the same messages.")
    return chosen[:same], chosen[same:], rejected[same:]


def _text(messages: Any, role: str, where: str) -> str:
    """The text of a prompt or an answer."""
    if isinstance(messages, str):
        return _without_placeholder(messages) if role == "user" else messages
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], Mapping):
        raise DatasetError(
            f"{where} must be text or one message of the {role}, got {messages!r}. Rows hold one question and one "
            "answer; put a system prompt into the chat template."
        )
    if messages[0].get("role") != role:
        raise DatasetError(f"{where} must be a message of the {role}, got role {messages[0].get('role')!r}.")
    content = messages[0].get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        texts = [part for part in parts if isinstance(part, str)]
        content = "\n".join(texts) if texts and len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise DatasetError(f"{where} must have text as its content, got {messages[0].get('content')!r}.")
    return _without_placeholder(content) if role == "user" else content


def _without_placeholder(question: str) -> str:
    return _PLACEHOLDER.sub("", question)


# --------------------------------------------------------------------------------------------------------- videos


def _default_cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "longvpo_hf" / "videos"


def _undecoded(dataset: Dataset, column: str) -> Dataset:
    """The dataset with its videos as `{"path", "bytes"}` or file names: else every row opens a decoder for each."""
    from datasets import List, Video

    feature = dataset.features[column]
    if isinstance(feature, Video):
        return dataset.cast_column(column, Video(decode=False))
    if isinstance(feature, List) and isinstance(feature.feature, Video):
        return dataset.cast_column(column, List(Video(decode=False)))
    return dataset


class _Media:
    """Finds the videos that rows name; each file is opened once.

    Args:
        root: Folder that file names are relative to.
        cache: Where videos that are stored as bytes are written; None where there are none.
    """

    def __init__(self, root: Path, cache: Path | None) -> None:
        if not root.is_dir():
            raise DatasetError(f"video_root must be the folder the videos lie in, and {root} is none.")
        self._root = root.resolve()
        self._cache = cache
        self._clips: dict[str, Clip] = {}

    def clips(self, value: Any, where: str) -> tuple[Clip, ...]:
        """A clip for each video of a row's field."""
        if not isinstance(value, list):
            return (self._clip(value, where),)
        if not value:
            raise DatasetError(f"{where} must name at least one video, got [].")
        return tuple(self._clip(one, f"{where}[{i}]") for i, one in enumerate(value))

    def _clip(self, value: Any, where: str) -> Clip:
        if isinstance(value, Mapping) and value.get("bytes") is not None and self._cache is not None:
            name, path = value.get("path") or "", self._stored(self._cache, value["bytes"], value.get("path") or "")
        elif isinstance(value, Mapping) and value.get("path"):
            name, path = value["path"], self.inside(value["path"], where, absolute=True)
        elif isinstance(value, str) and value:
            name, path = value, self.inside(value, where)
        else:
            raise DatasetError(f"{where} must be a video or the name of its file, got {value!r}.")
        key = str(path)
        if key not in self._clips:
            try:
                found = whole_clip(key)
            except UnreadableVideo as error:
                raise DatasetError(f"{where}: {error}") from error
            source_id = PurePosixPath(name).name if os.path.isabs(name) else name
            self._clips[key] = Clip(key, found.start_seconds, found.end_seconds, source_id=source_id)
        return self._clips[key]

    def inside(self, name: str, where: str, *, absolute: bool = False) -> Path:
        """The file that `name` names.

        Args:
            absolute: Whether it may be an absolute path, as `datasets` makes of the files of a folder it loads.
        """
        is_absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
        if ".." not in re.split(r"[/\\]", name) and "\0" not in name and (absolute or not is_absolute):
            path = Path(os.path.realpath(self._root / name))  # where symlinks lead
            if path.is_relative_to(self._root):
                return path
        raise DatasetError(
            f"{where} must name a file inside of video_root={self._root}, got {name!r}, which leads elsewhere."
        )

    def _stored(self, cache: Path, content: bytes, name: str) -> Path:
        """The file of a video that the dataset itself holds, named by content."""
        suffix = re.fullmatch(r"\.[a-z0-9]{1,5}", PurePosixPath(name).suffix.lower())
        path = cache / f"{hashlib.sha256(content).hexdigest()[:20]}{suffix.group() if suffix else '.mp4'}"
        if not path.exists():
            with whole_file(path) as file:
                file.write(content)
        return path
