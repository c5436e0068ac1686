"""The rows of a dataset as the page shows them. Only the rows that are shown are kept; of the others, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from longvpo_hf.errors import DatasetError
from longvpo_hf.paths import path_inside
from longvpo_hf.preference import TRAINING_COLUMNS, VideoPreference
from longvpo_hf.public import public_name
from longvpo_hf.publishing.inspect_page.log import read_log
from longvpo_hf.publishing.inspect_page.parts import (
    CAPTION_CHARACTERS,
    ENTRIES,
    PICTURES,
    PICTURES_PER_ROW,
    Pictures,
    clips_to_show,
    cut,
    sample,
    shown_clip,
    spans,
)
from longvpo_hf.publishing.inspect_page.plots import Summary

_ROWS_PER_READ = 500
#: What a row of other types, impossible numbers or wrong nesting ends in, wherever that shows.
_NO_PREFERENCE = (ValueError, TypeError, ArithmeticError, AttributeError, LookupError)


class _Unreadable(DatasetError):
    """A row that Parquet holds and Python cannot: text that is no text, a date of the year 300,000."""


def rows_data(folder: Path, num_rows: int, seed: int, video_root: Path | None) -> dict[str, Any]:
    """A dataset as the page's script takes it."""
    with _open_rows(folder / "train.parquet") as file:
        total = file.metadata.num_rows
        wanted = set(sample(total, num_rows, seed))
        summary = Summary()
        pictures = Pictures(partial(path_inside, video_root or folder))
        per_row = max(1, min(PICTURES_PER_ROW, PICTURES // max(1, len(wanted))))
        rows: list[dict[str, Any]] = []
        for number, row in enumerate(tqdm(_rows(file), total=total, desc="inspect", unit="row", leave=False)):
            try:
                if isinstance(row, _Unreadable):
                    raise row
                preference = _preference(row)
                shown = _shown_row(preference, row, pictures, per_row) if number in wanted else {}
            except _NO_PREFERENCE as error:
                summary.num_invalid += 1
                if number in wanted:
                    name = "" if isinstance(row, _Unreadable) else cut(row["id"])
                    rows.append({"number": number, "id": name, "error": cut(error)})
                continue
            summary.add(preference)
            if number in wanted:
                rows.append({"number": number, **shown})
    log = read_log(folder.with_name(folder.name + ".log"), seed)
    files = [clip["file"] for row in rows for clip in row.get("clips", [])]
    if video_root is None and files and not any(file.startswith("clips/") for file in files):
        log["notices"].append("These rows come without their media. Name the folder it lies in with --video-root.")
    return {
        "kind": "rows",
        "name": folder.name,
        "total": total,
        "seed": seed,
        "invalid": summary.num_invalid,
        "plots": summary.plots(),
        "facts": [],
        "rows": rows,
        "pictures": pictures.encoded,
        **log,
    }


def _open_rows(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise DatasetError(f"{path.parent} is no preference dataset: it lacks {path.name}. Name the folder of a build.")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({error}); build or download it again.") from error
    missing = sorted(set(TRAINING_COLUMNS) - set(file.schema_arrow.names))
    if missing:
        file.close()
        raise DatasetError(f"{path} lacks the columns {missing}: its rows are no video preferences.")
    return file


def _rows(file: pq.ParquetFile) -> Iterator[dict[str, Any] | _Unreadable]:
    try:
        for batch in file.iter_batches(batch_size=_ROWS_PER_READ):
            try:
                yield from batch.to_pylist()
            except (ValueError, OverflowError):  # before the first: the list is made whole
                yield from (_row(batch, index) for index in range(batch.num_rows))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"train.parquet is broken ({error}); build or download it again.") from error


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | _Unreadable:
    try:
        row: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return _Unreadable(f"the row cannot be read: {error}")
    return row


def _preference(row: Mapping[str, Any]) -> VideoPreference:
    """A row, checked.

    Raises:
        ValueError: If it is not a preference, or its timeline is longer than a number can say.
    """
    preference = VideoPreference.from_row(row)
    if not math.isfinite(preference.timeline.duration_seconds):
        raise DatasetError(f"row {preference.id}: the clips of its timeline are too long to add up.")
    return preference


def _shown_row(
    preference: VideoPreference, row: Mapping[str, Any], pictures: Pictures, max_clips: int
) -> dict[str, Any]:
    """A row as the page's script takes it."""
    timeline, origin = preference.timeline, preference.provenance
    shown = clips_to_show(len(timeline), preference.evidence, preference.reference, max_clips)
    similarities, starts = origin.similarities, timeline.starts_timeline_seconds
    clips = []
    for index in shown:
        has_origin = row["clips"][index].get("origin") is not None
        similarity = similarities[index] if index < len(similarities) else None
        clips.append(
            {
                "index": index,
                **shown_clip(timeline.clips[index], starts[index], pictures, has_origin),
                "file": cut(timeline.clips[index].path, CAPTION_CHARACTERS),
                "similarity": None if similarity is None or not math.isfinite(similarity) else round(similarity, 4),
            }
        )
    facts = {
        "method": origin.method,
        "chosen answer seen from": origin.chosen_view,
        "rejected answer seen from": origin.rejected_view,
        "question by": public_name(origin.question_model or ""),
        "answers by": public_name(origin.answer_model or ""),
        "before the question": "\n".join(f"{role}: {text}" for role, text in preference.context),
        "kind of question": origin.question_type,
        "reasoning": origin.reasoning,
        "prompt version": origin.prompt_version,
        "seed": origin.seed,
    }
    return {
        "id": cut(preference.id),
        "question": cut(preference.question),
        "chosen": cut(preference.chosen),
        "rejected": cut(preference.rejected),
        "num_clips": len(timeline),
        "seconds": round(timeline.duration_seconds, 3),
        "evidence": list(preference.evidence),
        "reference": list(preference.reference),
        "evidence_spans": spans(timeline, preference.evidence),
        "reference_spans": spans(timeline, preference.reference or range(len(timeline))),
        "thirds": sorted({min(2, int(3 * timeline.centre(index))) for index in preference.evidence}),
        "clips": clips,
        "verdicts": [cut(verdict, CAPTION_CHARACTERS) for verdict in origin.verdicts[:ENTRIES]],
        "facts": {name: cut(value) for name, value in facts.items() if value not in (None, "")},
    }
