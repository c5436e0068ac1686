"""`longvpo audit`: whether rows teach what they should."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from longvpo_hf.commands.build.models import Models, check_models, device_of
from longvpo_hf.commands.build.options import MODELS, ModelSettings
from longvpo_hf.commands.cli import check_page, flat, named_files


def audit(
    dataset: str,
    /,
    *,
    output: Path | None = None,
    evaluation: tuple[str, ...] = (),
    benchmark_videos: tuple[str, ...] = (),
    embedder: str | None = None,
    blind_model: str | None = None,
    asking: Annotated[ModelSettings, flat(MODELS)] = ModelSettings(),
    fail_on: Literal["warn", "fail"] | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Looks for shortcuts in preference rows: ways to tell the chosen answer without the video.

    Compares lengths, words and places of the evidence, clips and sources; writes a page and its JSON. A coin is right
    in half of the rows; an item warns where a judge that sees no video is right in more than 60%.

    Args:
        dataset: Folder of a dataset, or its name on the Hub.
        output: The page. None: audit.html in the folder, or in this one for a dataset of the Hub.
        evaluation: Rows that a model will be evaluated on: their videos must not be in the dataset. May be given
            several times.
        benchmark_videos: NAME=FILE: a benchmark's video ids, one a line. May be given several times.
        embedder: Vision model that tells whether other clips look like the evidence, e.g. facebook/dinov2-base. None:
            not measured.
        blind_model: Is asked 500 of the questions without the video. None: not measured.
        fail_on: Exit with status 1 if an item came to this or worse. None: never.
        as_json: Print JSON.
    """
    check_page(output)
    lists = named_files("benchmark-videos", benchmark_videos)
    from longvpo_hf.auditing import AuditSettings, Verdict, audit_rows, write_audit
    from longvpo_hf.hub import go_offline_if_unreachable

    asking.check([blind_model])
    go_offline_if_unreachable([dataset, embedder, *evaluation])
    if blind_model is not None:
        check_models(asking, seeing=[], reading=[blind_model])
    rows, total, name, folder = _rows(dataset)
    settings = AuditSettings(
        lists,
        {other: _rows(other)[0] for other in evaluation},
        _embedder(embedder, asking, folder),
        Models(asking, 1, seed=0).seeing(blind_model) if blind_model else None,
    )
    found = audit_rows(rows, total, name, settings)
    page = output or (folder or Path()) / "audit.html"
    write_audit(found, page)
    print(found.to_json() if as_json else f"{found}\n{page}")
    return int(fail_on is not None and found.verdict.is_at_least(Verdict(fail_on)))


def _rows(dataset: str) -> tuple[Iterable[Mapping[str, Any]], int, str, Path | None]:
    """The rows of a dataset, how many there are, its name, and its folder if it is on disk."""
    folder = Path(dataset)
    if (folder / "train.parquet").is_file():
        from longvpo_hf.publishing.rows import RowsFolder

        source = RowsFolder(folder, video_root=folder)
        return source.raw(), source.num_rows, folder.resolve().name, folder
    from longvpo_hf.launch.rows import training_rows

    rows = training_rows(dataset)
    return rows, len(rows), dataset, None


def _embedder(name: str | None, asking: ModelSettings, folder: Path | None) -> Any:
    if name is None:
        return None
    from dataclasses import replace

    from longvpo_hf.intake.embeddings import VisionEmbedder
    from longvpo_hf.paths import path_inside

    embed = VisionEmbedder(name, device=device_of(asking))
    if folder is None:
        return embed
    return lambda clips: embed([replace(clip, path=str(path_inside(folder, clip.path))) for clip in clips])
