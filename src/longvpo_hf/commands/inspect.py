"""`longvpo inspect`: one HTML page to look at rows or captions."""

from __future__ import annotations

from pathlib import Path

from cyclopts.types import NonNegativeInt, PositiveInt

from longvpo_hf.commands.cli import check_page


def inspect(
    folder: Path,
    /,
    *,
    rows: PositiveInt = 200,
    output: Path | None = None,
    seed: NonNegativeInt = 0,
    video_root: Path | None = None,
) -> None:
    """Writes one HTML page to look at a dataset or at captions.

    Of a dataset it shows filmstrips, questions, answers, and what was dropped.

    Args:
        folder: A dataset on disk (train.parquet and its clips), or captions.
        rows: Show at most this many rows or videos, drawn evenly.
        output: The page. None: inspect.html in the folder.
        seed: Draws the rows; same seed, same page.
        video_root: Folder of the media, for rows that come without them.
    """
    check_page(output)
    from longvpo_hf.publishing.inspect_page import write_inspect_page

    page = write_inspect_page(folder, output, rows, seed, video_root)
    print(f"Showing {page.num_rows:,} of {page.total_rows:,} {page.things}: {page.path}")
