"""The audit itself: every row is counted, the texts of some thousands are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.auditing import judges
from longvpo_hf.auditing.findings import Audit, Finding, Verdict
from longvpo_hf.auditing.pairs import Pair, groups_of, words
from longvpo_hf.auditing.videos import (
    Embedder,
    Videos,
    benchmark_overlap,
    duplicates,
    evaluation_overlap,
    evenly,
    look_alikes,
    near_duplicates,
    positions,
    sources,
)
from longvpo_hf.errors import DatasetError
from longvpo_hf.preference import VideoPreference

if TYPE_CHECKING:
    from longvpo_hf.responders import Responder

#: Rows whose texts are kept: about 50 MB of answers of 200 words.
_MAX_READ = 20_000
#: Rows whose clips an embedder looks at, and whose questions a model is asked.
_MAX_LOOKED_AT, _MAX_ASKED = 500, 500


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """What an audit compares rows with, besides each other.

    Args:
        benchmark_videos: Lists of the videos of benchmarks, by name.
        evaluation: Rows of evaluation sets, by name.
        embed: Gives a unit vector for each clip; None leaves out whether clips look alike.
        blind_model: Is asked the questions without the video; None leaves that out.
    """

    benchmark_videos: Mapping[str, Path] = field(default_factory=dict)
    evaluation: Mapping[str, Iterable[Mapping[str, Any]]] = field(default_factory=dict)
    embed: Embedder | None = None
    blind_model: Responder | None = None


def audit_folder(folder: Path) -> Audit:
    """The cheap items about a dataset on disk: those that need no model and nothing to compare with.

    Args:
        folder: See `publishing.dataset.DatasetWriter`.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(folder / "train.parquet") as file:
        rows = (row for batch in file.iter_batches(batch_size=500) for row in batch.to_pylist())
        return audit_rows(rows, file.metadata.num_rows, folder.name)


def audit_rows(
    rows: Iterable[Mapping[str, Any]], total: int, name: str, settings: AuditSettings | None = None
) -> Audit:
    """Audits rows.

    Args:
        rows: Rows of `preference.row_schema`, with undecoded media.
        total: How many there are.
        name: Of the dataset, for the report.
        settings: See `AuditSettings`.

    Raises:
        DatasetError: If none of the rows is a preference.
    """
    settings = settings or AuditSettings()
    videos = Videos()
    kept: list[VideoPreference] = []
    broken: list[str] = []
    wanted = set(evenly(total, _MAX_READ))
    for number, row in _valid(rows, broken.append):
        videos.add(row)
        if number in wanted:
            kept.append(row)
    if not kept:
        raise DatasetError(f"None of the {total} rows of {name} is a preference: {broken[0] if broken else 'no rows'}")
    pairs = [Pair.of(row) for row in kept]
    groups = groups_of(pairs)
    others = {label: Videos() for label in settings.evaluation}
    for label, found in others.items():
        for _, row in _valid(settings.evaluation[label], lambda error: None):
            found.add(row)
    findings = [
        _broken_rows(broken, total),
        judges.length(pairs, groups),
        judges.question_words(pairs, groups),
        judges.repeated_answers(pairs, groups),
        judges.one_answer(pairs, groups),
        judges.all_words(pairs, groups),
        _blind(pairs, groups, settings.blind_model),
        positions(videos),
        near_duplicates(videos),
        *(
            [look_alikes([kept[i] for i in evenly(len(kept), _MAX_LOOKED_AT)], settings.embed)]
            if settings.embed
            else []
        ),
        sources(videos),
        duplicates(videos),
        benchmark_overlap(videos, settings.benchmark_videos),
        evaluation_overlap(videos, others),
    ]
    return Audit(name, total, len(kept), tuple(findings))


def _valid(rows: Iterable[Mapping[str, Any]], on_error: Callable[[str], None]) -> Iterator[tuple[int, VideoPreference]]:
    for number, row in enumerate(rows):
        try:
            yield number, VideoPreference.from_row(row)
        except (ValueError, TypeError, ArithmeticError) as error:
            on_error(str(error))


def _broken_rows(broken: Sequence[str], total: int) -> Finding:
    said = f"{len(broken):,} of {total:,} rows cannot be trained on." if broken else "All rows are preferences."
    return Finding(
        "rows",
        "Is every row a preference?",
        Verdict.FAIL if broken else Verdict.PASS,
        said,
        "fail at the first",
        float(len(broken)),
        "`longvpo check --rows DATASET` names them; `longvpo rows filter` leaves them out.",
        tuple(("", error[:200]) for error in broken[:10]),
    )


def _blind(pairs: Sequence[Pair], groups: Sequence[int], model: Responder | None) -> Finding:
    title = "Can the questions be answered without the video?"
    if model is None:
        return Finding("blind", title, Verdict.UNKNOWN, "Not measured: name a model with --blind-model.")
    from longvpo_hf.responders import Request

    asked = evenly(len(pairs), _MAX_ASKED)
    replies = model.respond([Request(" ".join(pairs[i].question)) for i in asked])
    return judges.blind_answers(
        [pairs[i] for i in asked], [groups[i] for i in asked], [words(reply) for reply in replies], model.name
    )
