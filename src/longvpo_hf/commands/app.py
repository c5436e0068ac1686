"""The `longvpo` command. Starts light: a command loads what it needs when it runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from longvpo_hf.evaluation.probes import Filler, ProbeQuestion
    from longvpo_hf.responders import Responder

app = typer.Typer(
    help="Preference optimisation for long video-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


probe_app = typer.Typer(help="Shows whether a model understands long videos.", no_args_is_help=True)
app.add_typer(probe_app, name="probe")


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
    scale: Annotated[Scale, typer.Option(help="`large` goes to 256 clips, in an hour on a CPU.")] = Scale.standard,
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

    from longvpo_hf.miniature.demo import run_demo
    from longvpo_hf.miniature.report import table
    from longvpo_hf.miniature.settings import DemoSettings

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
    folder: Annotated[Path, typer.Argument(help="A dataset on disk (train.parquet and its clips), or captions.")],
    rows: Annotated[int, typer.Option(min=1, help="Show at most so many rows or videos, drawn evenly.")] = 200,
    output: Annotated[Path | None, typer.Option(help="The page. Default: inspect.html in the folder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the rows; same seed, same page.")] = 0,
    video_root: Annotated[
        Path | None, typer.Option(help="Where the media lie, for rows that come without them.")
    ] = None,
) -> None:
    """Writes one HTML page to look at a dataset (filmstrips, questions, answers, what was dropped) or at captions."""
    from longvpo_hf.publishing.inspect_page import write_inspect_page

    try:
        page = write_inspect_page(folder, output, rows, seed, video_root)
    except (ValueError, OSError) as error:
        typer.echo(f"longvpo inspect: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"Showing {page.num_rows:,} of {page.total_rows:,} {page.things}: {page.path}")


_Checkpoint = Annotated[str, typer.Argument(help="A model or a LoRA adapter: a folder or a name on the Hub.")]
_World = Annotated[
    Path | None, typer.Option(help="A miniature's world, for a miniature's model: <demo>/world/evaluation.")
]
_Haystack = Annotated[Path | None, typer.Option(help="Any video, whose frames stand around the asked ones.")]
_Number = Annotated[int, typer.Option(min=1, help="Questions drawn of the world, where no others are given.")]
_MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="Larger frames are scaled down. Default: as in training, if the card says it.")
]
_BatchSize = Annotated[int, typer.Option(min=1, help="Questions in one call, as long as they fit in memory.")]
_NewTokens = Annotated[int, typer.Option(min=1, help="Bound on an answer; thinking models need more.")]
_Seed = Annotated[int, typer.Option(min=0, help="Draws questions and places.")]


@probe_app.command()
def needle(
    checkpoint: _Checkpoint,
    frames: Annotated[str, typer.Option(help="Lengths of the video, e.g. 64,256,1024.")] = "64,256,1024",
    depths: Annotated[int, typer.Option(min=1, help="Places of the needle, from begin to end.")] = 10,
    needle: Annotated[
        Path | None, typer.Option(help="A picture or video to hide, with --question and --answer.")
    ] = None,
    question: Annotated[str, typer.Option(help="What is asked about the needle.")] = "",
    answer: Annotated[str, typer.Option(help="The right answer: an option, its letter, or a text.")] = "",
    option: Annotated[list[str] | None, typer.Option(help="An option of the question; give each of them.")] = None,
    needle_frames: Annotated[int, typer.Option(min=1, help="Frames of a needle that is a video.")] = 1,
    needles: Annotated[
        Path | None, typer.Option(help="JSON lines: video, question, answer and perhaps options.")
    ] = None,
    haystack: _Haystack = None,
    world: _World = None,
    number: _Number = 10,
    max_pixels: _MaxPixels = None,
    batch_size: _BatchSize = 1,
    max_new_tokens: _NewTokens = 16,
    seed: _Seed = 0,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/needle"),
) -> None:
    """Needle in a haystack: right answers by number of frames and depth, as a heat map and JSON.

    Without a needle, clips of the miniature's world are hidden and asked about in plain English; without a haystack,
    among other clips of that world. The same command goes on where it was stopped.
    """
    with _told("longvpo probe needle"):
        lengths = [int(length) for length in frames.split(",")]
        from longvpo_hf.evaluation.probes import make_question, read_questions

        questions = None
        if needle is not None and needles is None:
            questions = [make_question(needle, question, answer, option or [], needle_frames, output / "media")]
        elif needles is not None and needle is None:
            questions = read_questions(needles, needle_frames, output / "media")
        elif needle is not None:
            raise ValueError("--needle and --needles exclude each other; give one of them.")
        questions, filler = _probed(questions, haystack, world, number, max(lengths), seed, output)

        from longvpo_hf.evaluation.needle import probe_needle

        responder, facts = _probed_model(checkpoint, max(lengths), max_pixels, batch_size, max_new_tokens)
        result = probe_needle(responder, questions, filler, lengths, depths, output, facts)
    if result["stopped"] is not None:
        typer.echo(f"Stopped at {result['stopped']['frames']} frames: {result['stopped']['reason']}")
    typer.echo(f"Heat map: {output / 'needle.png'}, numbers: {output / 'needle.json'}")


@probe_app.command()
def position(
    checkpoint: _Checkpoint,
    questions: Annotated[
        Path | None, typer.Option(help="Short videos, JSON lines: video, question, answer and perhaps options.")
    ] = None,
    video_frames: Annotated[int, typer.Option(min=1, help="Frames of each short video.")] = 8,
    frames: Annotated[int, typer.Option(min=2, help="Frames in all; the paper has 10 × 10 and 12 × 12.")] = 100,
    placements: Annotated[int, typer.Option(min=1, help="Random places for each question.")] = 4,
    haystack: _Haystack = None,
    distractors: Annotated[
        bool, typer.Option("--distractors", help="Other clips of the world instead of black frames.")
    ] = False,
    world: _World = None,
    number: _Number = 100,
    max_pixels: _MaxPixels = None,
    batch_size: _BatchSize = 1,
    max_new_tokens: _NewTokens = 16,
    seed: _Seed = 0,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/position"),
) -> None:
    """Position bias: accuracy against a short video's distance to the question, with the upper bound and the dip.

    The short video stands among black frames, or among those of --haystack. Without questions, clips of the miniature's
    world are asked about in plain English. The same command goes on where it was stopped.
    """
    with _told("longvpo probe position"):
        from longvpo_hf.evaluation.probes import BlankFiller, read_questions

        given = None if questions is None else read_questions(questions, video_frames, output / "media")
        if distractors and (haystack is not None or given is not None):
            raise ValueError("--distractors are clips of the world: give neither --haystack nor --questions with it.")
        black = haystack is None and not distractors
        asked, filler = _probed(
            given, haystack, world, number, frames, seed, output, BlankFiller(output / "media") if black else None
        )

        from longvpo_hf.evaluation.position import probe_position

        responder, facts = _probed_model(checkpoint, frames, max_pixels, batch_size, max_new_tokens)
        result = probe_position(responder, asked, filler, frames, placements, output, seed, facts)
    upper, dip = result["upper_bound"], result["dip"]
    middle = f"{dip['percent']:.1f} points {dip['band_95']}" if dip["percent"] is not None else "not measured"
    typer.echo(f"Video alone {upper['percent']:.1f} %, dip in the middle: {middle}")
    typer.echo(f"Curve: {output / 'position.png'}, numbers: {output / 'position.json'}")


def _probed(
    questions: list[ProbeQuestion] | None,
    haystack: Path | None,
    world: Path | None,
    number: int,
    num_frames: int,
    seed: int,
    output: Path,
    filler: Filler | None = None,
) -> tuple[list[ProbeQuestion], Filler]:
    """What a probe asks, and among what: as given, and else of a miniature's world."""
    from longvpo_hf.evaluation.probes import VideoFiller
    from longvpo_hf.miniature.probes import WorldFiller, clips_needed, world_questions
    from longvpo_hf.miniature.world import TRUTH_FILE, read_world, write_world

    if haystack is not None:
        filler = VideoFiller(haystack)
    if questions is not None:
        if world is not None:
            raise ValueError("--world has questions of its own; leave it out, or the other questions.")
        if filler is None:
            raise ValueError("A needle of your own needs a --haystack: any long video.")
        return questions, filler
    if world is not None:
        clips = read_world(world)
    else:
        # Of one size however many frames are asked for, so that longer videos can be added to a finished probe.
        num_clips = max(2048, clips_needed(num_frames))
        folder = output / "media" / f"world-{num_clips}-{seed}"
        clips = read_world(folder) if (folder / TRUTH_FILE).is_file() else write_world(folder, num_clips, seed)
    per_clip = {} if haystack is None else {"frames_per_clip": 1}  # a film's clips are one frame each
    questions = world_questions(clips, number, seed, plain_english=world is None, **per_clip)
    return questions, filler or WorldFiller(clips, seed)


def _probed_model(
    checkpoint: str, num_frames: int, max_pixels: int | None, batch_size: int, max_new_tokens: int
) -> tuple[Responder, dict[str, Any]]:
    """The checkpoint as a responder, and what its answers depend on."""
    from longvpo_hf.evaluation.sampling import trained_sampling
    from longvpo_hf.record import Sampling
    from longvpo_hf.responders.checkpoint import load_responder, weights_digest

    if max_pixels is None:
        max_pixels = (trained_sampling(checkpoint) or Sampling()).max_pixels
    responder = load_responder(checkpoint, num_frames, max_pixels, batch_size, max_new_tokens)
    return responder, {
        "weights": weights_digest(checkpoint),
        "max_pixels": max_pixels,
        "max_new_tokens": max_new_tokens,
    }


@contextmanager
def _told(command: str) -> Iterator[None]:
    """Errors that a user can mend, in one line."""
    from longvpo_hf.evaluation.probes import DoesNotFit

    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on where this one stopped.", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, DoesNotFit) as error:
        typer.echo(f"{command}: {error}", err=True)
        raise typer.Exit(2) from None


class Shards(StrEnum):
    """How processes share weights, gradients and optimizer."""

    none = "none"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def check(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A recipe's YAML. Options of the recipe after it override it.")],
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of one device. Default: this machine's, else 80.", show_default=False)
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Devices, one process each.")] = 1,
    sharding: Annotated[Shards, typer.Option(help="How the processes share the model.")] = Shards.none,
    tflops: Annotated[
        float | None,
        typer.Option(help="TFLOP/s a device achieves. Default: 300, 30 % of an H100's peak.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimates tokens, memory and time of a training run before anything is loaded; says what does not fit."""
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.simplefilter("ignore")
    from longvpo_hf.planning import DEFAULT_TFLOPS, Machine, Sharding, device_memory_gib, plan_file, report

    try:
        machine = Machine(
            gpu_memory_gib=gpu_memory or device_memory_gib(),
            processes=processes,
            sharding=Sharding(sharding.value),
            tflops=tflops or DEFAULT_TFLOPS,
        )
        plan = plan_file(config, context.args, machine)
    except (ValueError, OSError) as error:
        typer.echo(f"longvpo check: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(plan.to_json() if as_json else report(plan))
    if not plan.fits:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Folder or name on the Hub of a model or a LoRA adapter. Several stand side by side in the table; "
            "STAGE=MODEL gives one a name, e.g. base=… stage1=… stage2=…",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Of longvideobench, mlvu, videomme (without and with subtitles), mvbench, lvbench.")
    ] = "longvideobench,mlvu,videomme,mvbench",
    frames: Annotated[
        str | None, typer.Option(help="Numbers of frames, e.g. 64,128,512. Default: as each model was trained.")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of annotations and videos. Default: HF_HOME, as for lmms-eval.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/eval"),
    fps: Annotated[
        str | None, typer.Option(help="Most frames per second, `none` for no bound. Default: as in training.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most pixels of a frame. Default: as in training.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per call of the model.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only so many questions of each task, to try.")] = None,
    max_new_tokens: Annotated[
        str | None,
        typer.Option(
            help="Bound on an answer, N or SUITE=N,…. Default: 32, and 16384 for models that reason before they answer."
        ),
    ] = None,
    tasks_dir: Annotated[
        bool, typer.Option("--tasks-dir", help="Print the folder for lmms-eval's --include_path, and do nothing else.")
    ] = False,
) -> None:
    """Runs benchmarks of long video through lmms-eval, with the frames of training, and prints the table."""
    if tasks_dir:
        typer.echo(Path(__file__).parents[1] / "evaluation" / "tasks")
        return
    if not models:
        raise typer.BadParameter("name at least one model.")
    import os
    from importlib.util import find_spec

    os.environ.setdefault("TQDM_DISABLE", "1")  # lmms-eval's two bars for each task; the adapter's own is shown
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if find_spec("lmms_eval") is None:
        typer.echo("longvpo eval: lmms-eval is missing: pip install 'longvpo-hf[eval]'", err=True)
        raise typer.Exit(2)
    from longvpo_hf.evaluation.benchmarks import data_root as default_root
    from longvpo_hf.evaluation.preflight import benchmarks_named, bounds_named
    from longvpo_hf.evaluation.run import Contestant, table_runs
    from longvpo_hf.evaluation.run import evaluate as run_evaluation
    from longvpo_hf.evaluation.table import comparison, to_markdown

    with _told("longvpo eval"):
        benchmarks = benchmarks_named(tasks.split(","))
        results = run_evaluation(
            [Contestant.of(model) for model in models],
            benchmarks,
            data_root or default_root(),
            output,
            frames=[int(number) for number in frames.split(",")] if frames else [],
            fps=fps,
            max_pixels=max_pixels,
            batch_size=batch_size,
            limit=limit,
            max_new_tokens=bounds_named(max_new_tokens, benchmarks) if max_new_tokens else {},
        )
    if results:
        typer.echo(f"\n{to_markdown(comparison(table_runs(results)))}")
        typer.echo(f"Scores, answers and a section for the model card: {output}")


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
