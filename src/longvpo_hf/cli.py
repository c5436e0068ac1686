"""The `longvpo` command. Starts light: a command loads what it needs when it runs."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Preference optimisation for long video-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Scale(StrEnum):
    """How much the demo does."""

    standard = "standard"
    large = "large"


@app.callback()
def _commands() -> None:
    """Makes `longvpo` take commands even while it has one."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same machine: same numbers.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="Few steps, to see it run; its numbers mean nothing.")] = False,
    scale: Annotated[Scale, typer.Option(help="`large` goes to 256 clips and takes hours on a CPU.")] = Scale.standard,
    restart: Annotated[bool, typer.Option("--restart", help="Delete the folder's earlier run first.")] = False,
) -> None:
    """Shows the whole method on real mp4 files: makes rows, trains on them, measures before and after."""
    if fast and scale is not Scale.standard:
        raise typer.BadParameter("--fast and --scale large exclude each other; give one of them.")
    import os
    import warnings

    # Whoever runs the demo wants its bars and its table, not the libraries' advice. Nothing here needs the network.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one for every load and save of the tiny model

    from longvpo_hf.miniature.demo import DemoSettings, run_demo
    from longvpo_hf.miniature.report import table

    if restart:
        _delete_run(output)
    settings = DemoSettings.fast(seed) if fast else DemoSettings.large(seed)
    if not fast and scale is Scale.standard:
        settings = DemoSettings(seed=seed)
    try:
        metrics = run_demo(output, settings)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on where this one stopped.", err=True)
        raise typer.Exit(130) from None
    except ValueError as error:
        typer.echo(f"longvpo demo: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo()
    typer.echo(table(metrics))
    if metrics["meaningless"]:
        typer.echo("\n--fast: these numbers mean nothing; they show that everything runs.")
    typer.echo(f"\nReport: {output / 'report.md'}")


@app.command()
def inspect(
    dataset_folder: Annotated[Path, typer.Argument(help="A dataset on disk: train.parquet and its clips.")],
    rows: Annotated[int, typer.Option(min=1, help="Show at most so many, drawn evenly over the dataset.")] = 200,
    output: Annotated[Path | None, typer.Option(help="The page. Default: inspect.html in the folder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the rows; same seed, same page.")] = 0,
) -> None:
    """Writes one HTML page to look at a dataset: filmstrips, questions, answers, their origin, what was dropped."""
    from longvpo_hf.inspect_page import write_inspect_page

    try:
        page = write_inspect_page(dataset_folder, output, rows, seed)
    except (ValueError, OSError) as error:
        typer.echo(f"longvpo inspect: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"Showing {page.num_rows:,} of {page.total_rows:,} rows: {page.path}")


def _delete_run(output: Path) -> None:
    """Deletes an earlier demo, and nothing that is not one."""
    if not output.exists():
        return
    if not (output / "state" / "settings.json").is_file():
        typer.echo(f"longvpo demo: {output} holds no demo run; --restart will not delete it.", err=True)
        raise typer.Exit(2)
    shutil.rmtree(output)


def main() -> None:
    """Entry point of the `longvpo` command."""
    app()
