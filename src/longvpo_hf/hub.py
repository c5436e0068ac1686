"""The layout of a preference dataset on disk and on the Hub.

Takes rows; gives a folder that `load_dataset` opens, map-style and streaming, with each media file stored once however
many rows show it:

    README.md        the dataset card; its YAML names the files below
    train.parquet    the rows, see `preference.SCHEMA`
    clips/*.mp4      the media, named by content

Knows nothing of how rows are made or trained on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .filters import REASONS
from .frames import UnreadableVideo
from .preference import SCHEMA, VideoPreference
from .timeline import Clip

_ROWS_PER_WRITE = 1000


class DatasetWriter:
    """Writes rows and their media into a folder, as a context manager: it appears whole at the end or not at all.

    Args:
        folder: Where the dataset will stand; an earlier one there is replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._part = folder.with_name(folder.name + ".part")
        self._names: dict[str, str] = {}
        self._rows: list[dict[str, Any]] = []
        self.num_rows = 0

    def __enter__(self) -> DatasetWriter:
        shutil.rmtree(self._part, ignore_errors=True)
        (self._part / "clips").mkdir(parents=True)
        self._parquet = pq.ParquetWriter(self._part / "train.parquet", SCHEMA)
        return self

    def add(self, preference: VideoPreference) -> None:
        """Adds one row, and its clips' media where they are not there yet.

        Raises:
            UnreadableVideo: If a media file is missing.
        """
        self._rows.append(preference.to_row(self._store))
        self.num_rows += 1
        if len(self._rows) >= _ROWS_PER_WRITE:
            self._flush()

    def write_card(self, text: str) -> None:
        """Writes the dataset card."""
        (self._part / "README.md").write_text(text, encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._parquet.close()
        if kind is not None:
            shutil.rmtree(self._part, ignore_errors=True)
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._part.rename(self.folder)

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
            self._rows.clear()

    def _store(self, clip: Clip) -> str:
        if clip.path not in self._names:
            source = Path(clip.path)
            if not source.is_file():
                raise UnreadableVideo("missing_file", clip, "no such file")
            with source.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:20]
            name = f"clips/{digest}{source.suffix.lower() or '.mp4'}"
            shutil.copyfile(source, self._part / name)
            self._names[clip.path] = name
        return self._names[clip.path]


def dataset_card(
    title: str, recipe: str, num_rows: int, funnel: Mapping[str, Mapping[str, int]], facts: Mapping[str, object]
) -> str:
    """Text of a dataset card: the YAML that makes `load_dataset` work, the funnel and the facts of the build.

    Args:
        title: Heading.
        recipe: Name of the recipe, also a tag.
        num_rows: Rows in the dataset.
        funnel: As `filters.Funnel.close` gives it.
        facts: Named facts, e.g. models, seed, thresholds; shown as a table.
    """

    def cell(value: object) -> str:
        return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

    lines = [
        "---",
        "task_categories: [video-text-to-text]",
        f"tags: [preference, dpo, video, {recipe}]",
        "configs:",
        "- config_name: default",
        "  metadata_filenames: [train.parquet]",
        "  data_files:",
        "  - split: train",
        '    path: [train.parquet, "clips/**"]',
        "---",
        "",
        f"# {title}",
        "",
        f"{num_rows} video preference rows: a timeline of clips, a question, a chosen and a rejected answer.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'rows = load_dataset("path/or/name/of/this/dataset", split="train")',
        "```",
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        *[f"| {cell(name)} | {cell(value)} |" for name, value in facts.items()],
        "",
        "## Funnel",
        "",
        "| stage | number |",
        "|---|---|",
        *[f"| {cell(name)} | {number} |" for name, number in funnel["stages"].items()],
        *[
            f"| dropped: {cell(name)} ({cell(REASONS[name])}) | {number} |"
            for name, number in funnel["dropped"].items()
        ],
        "",
    ]
    return "\n".join(lines)
