"""Rows that other people publish, as rows that `LongVPOTrainer` takes: one function for each form.

Each takes a dataset as `load_dataset` gives it and the folder its videos are in, and returns a `datasets.Dataset` with
the columns of `preference.row_schema`. Each video becomes one clip that spans its file. What others publish names
neither evidence nor a reference view, so policy and reference see the whole timeline (`LongVPOConfig(reference="row")`,
the default).

- `from_trl`: TRL preference rows with a `video` or `videos` column. Rows with `images` go straight to the trainer,
  which trains them as TRL does.
- `from_longvpo`: `MCG-NJU/LongVPO-Training-Data`, configs `stage1` and `stage2`.
- `from_longva_tpo`: `ruili0/LongVA-TPO-10k`.
- `from_reference`: rows of this package that were published without their media (`--media reference`); evidence and
  reference view are kept.

A row that is not as expected, or whose video is missing or cannot be read, is an error that names row and field, or
with `missing="drop"` is left out and counted in the log. No file name leads out of the folder given.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

from tqdm.auto import tqdm

from longvpo_hf.artifacts import file_with
from longvpo_hf.errors import ConfigError, DatasetError
from longvpo_hf.frames import UnreadableVideo, whole_clip
from longvpo_hf.intake.records import short_repr
from longvpo_hf.paths import OutsideRoot, path_inside
from longvpo_hf.preference import Message, Provenance, VideoPreference, row_schema
from longvpo_hf.timeline import Clip, Timeline

if TYPE_CHECKING:
    from datasets import Dataset

#: What happens to a row that cannot be used.
Missing: TypeAlias = Literal["raise", "drop"]

#: LLaVA's way to say in the question where the video is, also one for each frame. Processors put their own there.
_PLACEHOLDERS = ("<video>", "<image>")
#: Placeholders that a text begins with, and those that one begins with that is read from its end.
_BEFORE, _AFTER = (
    re.compile(rf"\s*(?:(?:{'|'.join(placeholders)})\s*)+")
    for placeholders in (_PLACEHOLDERS, [placeholder[::-1] for placeholder in _PLACEHOLDERS])
)
_DROPS_SHOWN = 5

logger = logging.getLogger(__name__)
T = TypeVar("T")


def from_trl(
    dataset: Dataset, video_root: str | Path, cache_dir: str | Path | None = None, missing: Missing = "raise"
) -> Dataset:
    """TRL preference rows about videos.

    Args:
        dataset: Rows with `chosen` and `rejected`, perhaps `prompt` (else the turns that both begin with), as text or
            as messages whose content is text or a list of parts, of which only the text is read; and either `video` or
            `videos` (several are laid end to end), as file names or of type `Video`.
        video_root: Folder that file names are relative to, and that all files must be in.
        cache_dir: Where videos that are stored in the dataset itself are written, once per content; by default
            `longvpo_hf/videos` in the cache folder of `datasets`' home, `HF_HOME`.
        missing: Whether a row that cannot be used, mostly for want of its video, raises an error or is left out.

    Raises:
        DatasetError: If a row is not as described, its answers have several turns, or it names a file that is missing,
            not a video, or outside `video_root`; the message names the row and the field. With `missing="drop"`, if no
            row is left.
    """
    _check_split(dataset)
    columns = [name for name in ("video", "videos") if name in dataset.column_names]
    if len(columns) != 1:
        raise DatasetError(
            f"TRL rows about videos have one of the columns video and videos, got columns {dataset.column_names}. "
            "Rows about images need no conversion: give them to the trainer unchanged."
        )
    dataset = dataset.with_format(None)  # rows are read as plain Python
    media = _Media(Path(video_root), None if cache_dir is None else Path(cache_dir))

    def read(row: Mapping[str, Any], where: str) -> VideoPreference:
        prompt, chosen, rejected = _split(row, where)
        *context, question = prompt if isinstance(prompt, list) else [prompt]
        return _preference(
            media.clips(row[columns[0]], f"{where}: {columns[0]}"),
            context=tuple(_message(message, f"{where}: prompt[{i}]") for i, message in enumerate(context)),
            question=_text([question] if isinstance(prompt, list) else prompt, "user", f"{where}: prompt"),
            chosen=_text(chosen, "assistant", f"{where}: chosen"),
            rejected=_text(rejected, "assistant", f"{where}: rejected"),
            method="trl",
            where=where,
        )

    return _dataset(_undecoded(dataset, columns[0]), read, missing)


def from_longvpo(dataset: Dataset, video_root: str | Path, missing: Missing = "raise") -> Dataset:
    """Rows of `MCG-NJU/LongVPO-Training-Data`, config `stage1` or `stage2`.

    They do not name the anchor clip, so Stage 1 trains with the reference on the whole timeline here, unlike in the
    paper.

    Args:
        dataset: Rows with text columns `video` (a file name, or a list of them, laid end to end), `task_type`,
            `question`, `chosen` and `rejected`.
        video_root: Folder that `video` is relative to, and that all files must be in.
        missing: See `from_trl`.

    Raises:
        DatasetError: See `from_trl`.
    """
    columns = ("video", "task_type", "question", "chosen", "rejected")
    return _from_flat(dataset, video_root, columns, "longvpo", missing)


def from_longva_tpo(dataset: Dataset, video_root: str | Path, missing: Missing = "raise") -> Dataset:
    """Rows of `ruili0/LongVA-TPO-10k`, e.g. `load_dataset("csv", data_files="dataset.csv", split="train")`.

    Args:
        dataset: Rows with text columns `video` (a file name), `question`, `chosen` and `rejected`.
        video_root: Folder that the dataset's archives were unpacked into: `video` is relative to it, and all files must
            be in it.
        missing: See `from_trl`.

    Raises:
        DatasetError: See `from_trl`.
    """
    columns = ("video", "question", "chosen", "rejected")
    return _from_flat(dataset, video_root, columns, "temporal-longva", missing)


def from_reference(dataset: Dataset, video_root: str | Path, missing: Missing = "raise") -> Dataset:
    """Rows that were published without media, with the files of a corpus that is there.

    Args:
        dataset: Rows of `preference.row_schema` whose clips name files relative to the corpus' folder.
        video_root: That folder: all files must be in it.
        missing: See `from_trl`. The files are looked for, not opened.

    Raises:
        DatasetError: If a file leads out of `video_root` or is not there; the message names the row and the field. With
            `missing="drop"`, if no row is left.
    """
    _check_split(dataset)
    if not hasattr(dataset, "select"):
        raise DatasetError("Rows without media are looked over before any is used, so they cannot be streamed.")
    dataset = dataset.with_format(None)
    media = _Media(Path(video_root))

    def check(row: Mapping[str, Any], number: int) -> int:
        where = f"row {row['id']}, field clips"
        if not isinstance(row["clips"], list) or not row["clips"]:
            raise DatasetError(f"{where} must be a list of clips, got {short_repr(row['clips'])}.")
        for index, clip in enumerate(row["clips"]):
            name = clip.get("file_name") if isinstance(clip, Mapping) else None
            if not isinstance(name, str):
                raise DatasetError(f"{where}[{index}].file_name must be a file's name, got {short_repr(name)}.")
            if not media.inside(name, f"{where}[{index}].file_name").is_file():
                raise DatasetError(f"{where}[{index}].file_name: {name} is not in video_root={video_root}.")
        return number

    rows = dataset.select_columns(["id", "clips"])
    usable = list(_each(rows, check, missing))

    def located(row: dict[str, Any]) -> dict[str, Any]:
        found = [{**clip, "file_name": str(media.inside(clip["file_name"], "clips"))} for clip in row["clips"]]
        return {"clips": found}

    return dataset.select(usable).map(located, desc="Locating clips")


def _from_flat(
    dataset: Dataset, video_root: str | Path, columns: tuple[str, ...], method: str, missing: Missing
) -> Dataset:
    _check_split(dataset)
    lacking = [name for name in columns if name not in dataset.column_names]
    if lacking:
        raise DatasetError(f"Rows need the columns {list(columns)}, got {dataset.column_names}: {lacking} are missing.")
    dataset = dataset.with_format(None)
    media = _Media(Path(video_root))

    def read(row: Mapping[str, Any], where: str) -> VideoPreference:
        for name in columns[1:]:
            if not isinstance(row[name], str):
                raise DatasetError(f"{where}: {name} must be text, got {short_repr(row[name])}.")
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

    return _dataset(dataset, read, missing)


def _preference(
    clips: tuple[Clip, ...],
    *,
    question: str,
    chosen: str,
    rejected: str,
    method: str,
    where: str,
    context: tuple[Message, ...] = (),
) -> VideoPreference:
    provenance = Provenance(method=method)
    try:
        return VideoPreference(Timeline(clips), question, chosen, rejected, provenance=provenance, context=context)
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from error


def _dataset(
    rows: Iterable[Mapping[str, Any]], read: Callable[[Mapping[str, Any], str], VideoPreference], missing: Missing
) -> Dataset:
    """Every row as `read` makes it of one and its name."""
    from datasets import Dataset, Features

    def made(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        return read(row, f"row {number}").to_row(lambda clip: clip.path)

    used = list(_each(rows, made, missing))
    if not used:
        raise DatasetError("There are no rows, so there is nothing to train on.")
    return Dataset.from_list(used, features=Features.from_arrow_schema(row_schema()))


def _check_split(dataset: Any) -> None:
    """Refuses all splits at once, as `load_dataset` gives them where none is named."""
    if isinstance(dataset, Mapping):
        raise DatasetError(
            f"Give one split, such as load_dataset(..., split='train'), got the splits {', '.join(map(str, dataset))}."
        )


def _each(
    rows: Iterable[Mapping[str, Any]], make: Callable[[Mapping[str, Any], int], T], missing: Missing
) -> Iterator[T]:
    """What `make` makes of each row and its number; a row that it refuses is raised or, with a count, left out."""
    if missing not in get_args(Missing):
        raise ConfigError(f"missing must be 'raise' or 'drop', got {missing!r}.")
    total, dropped = 0, []
    for number, row in enumerate(tqdm(rows, desc="reading videos", unit="row", leave=False)):
        total += 1
        try:
            yield make(row, number)
        except DatasetError as error:
            if missing == "raise":
                raise
            dropped.append(str(error))
    if dropped:
        some = "".join(f"\n  {error}" for error in dropped[:_DROPS_SHOWN])
        more = f"\n  … and {len(dropped) - _DROPS_SHOWN} more" if len(dropped) > _DROPS_SHOWN else ""
        if len(dropped) == total:
            raise DatasetError(f"None of {total} rows can be used:{some}{more}")
        logger.warning("%d of %d rows were left out:%s%s", len(dropped), total, some, more)


# ---------------------------------------------------------------------------------------------------------- texts


def _split(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected; the prompt may be what both answers' messages begin with."""
    for name in ("chosen", "rejected"):
        if not row.get(name) or not isinstance(row[name], str | list):
            raise DatasetError(f"{where}: {name} must be text or messages, got {short_repr(row.get(name))}.")
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt"):
        return row["prompt"], chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DatasetError(f"{where}: prompt must be text or messages, got {short_repr(row.get('prompt'))}.")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == 0:
        raise DatasetError(f"{where}: without a prompt, chosen and rejected must begin with the same messages.")
    return chosen[:same], chosen[same:], rejected[same:]


def _message(message: Any, where: str) -> Message:
    """A message before the question."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ("system", "user", "assistant"):
        raise DatasetError(f"{where} must be a message of the system, the user or the assistant, got role {role!r}.")
    return Message(role, _text([message], role, where))


def _text(messages: Any, role: str, where: str) -> str:
    """The text of a prompt or an answer."""
    if isinstance(messages, str):
        return _without_placeholder(messages) if role == "user" else messages
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], Mapping):
        raise DatasetError(
            f"{where} must be text or one message of the {role}, got {short_repr(messages)}: a row has one answer; put "
            "earlier turns into its prompt."
        )
    if messages[0].get("role") != role:
        raise DatasetError(f"{where} must be a message of the {role}, got role {short_repr(messages[0].get('role'))}.")
    content = messages[0].get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        texts = [part for part in parts if isinstance(part, str)]
        content = "\n".join(texts) if texts and len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise DatasetError(f"{where} must have text as its content, got {short_repr(messages[0].get('content'))}.")
    return _without_placeholder(content) if role == "user" else content


def _without_placeholder(question: str) -> str:
    """A question without the placeholders it begins and ends with, and the space around them."""
    for found in (_BEFORE, _AFTER):
        match = found.match(question)
        question = question[match.end() if match else 0 :][::-1]
    return question


# --------------------------------------------------------------------------------------------------------- videos


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
    """The videos that rows name; each file is opened once.

    Args:
        root: Folder that file names are relative to.
        cache: Where videos that are stored as bytes are written, see `file_with`.
    """

    def __init__(self, root: Path, cache: Path | None = None) -> None:
        if not root.is_dir():
            raise DatasetError(f"video_root must be the folder the videos are in, and {root} is none.")
        self._root = root
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
        stored = value.get("bytes") if isinstance(value, Mapping) else None
        named = value.get("path") if isinstance(value, Mapping) else None
        if isinstance(stored, bytes) and stored:
            name = named if isinstance(named, str) else ""
            path = file_with(stored, name, self._cache)
        elif isinstance(named, str) and named:
            name, path = named, self.inside(named, where, allow_absolute=True)
        elif isinstance(value, str) and value:
            name, path = value, self.inside(value, where)
        else:
            raise DatasetError(f"{where} must be a video or the name of its file, got {short_repr(value)}.")
        key = str(path)
        if key not in self._clips:
            try:
                found = whole_clip(key)
            except UnreadableVideo as error:
                raise DatasetError(f"{where}: {error}") from error
            source_id = PurePosixPath(name).name if os.path.isabs(name) else name
            self._clips[key] = Clip(key, found.start_seconds, found.end_seconds, source_id=source_id)
        return self._clips[key]

    def inside(self, name: str, where: str, *, allow_absolute: bool = False) -> Path:
        """The file that `name` names.

        Args:
            name: The name.
            where: Names the row and the field in an error.
            allow_absolute: Whether it may be an absolute path, as `datasets` makes of the files of a folder it loads.
        """
        try:
            return path_inside(self._root, name, allow_absolute=allow_absolute)
        except OutsideRoot as error:
            raise DatasetError(
                f"{where} must name a file inside video_root={self._root}, got {short_repr(name)}, which leads "
                f"elsewhere: {error}"
            ) from error
