"""Needle in a haystack: is the question about a few frames still answered among many, wherever they stand?

Questions (the needles) are put into a filler (the haystack); right answers by number of frames and depth are written as
`needle.json` and the heat map `needle.png`. Depth 0 % is the start of the video, 100 % its end, right before
the question. Lengths are probed from the shortest on; at the first that does not fit in memory the probe ends and says
so in both files. A killed run continues: the output folder keeps each finished cell.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from longvpo_hf.artifacts import whole_file, write_json
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.longvideo_mcq.answers import wilson_interval
from longvpo_hf.evaluation.probes import (
    DoesNotFit,
    Filler,
    Journal,
    ProbeQuestion,
    as_it_is,
    ask,
    protocol_of,
    settings_of,
)
from longvpo_hf.responders import Request, Responder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def probe_needle(
    responder: Responder,
    questions: Sequence[ProbeQuestion],
    filler: Filler,
    frames: Sequence[int],
    num_depths: int,
    output: Path,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Asks every question at every depth of every length.

    Args:
        responder: Answers; its sampler must grant as many frames as the longest video has.
        questions: The needles.
        filler: The haystack.
        frames: Lengths: frames of the whole video, the needle's among them.
        num_depths: Number of depths, spread evenly from start to end; one is the middle.
        output: Folder of the results.
        facts: More of what they depend on; see `settings_of`.

    Returns:
        What `needle.json` holds.

    Raises:
        ValueError: If there are no questions, a length is too short for a needle or no whole number of clips, or the
            folder holds another probe.
    """
    _check(questions, filler, frames, num_depths)
    settings = settings_of("needle", responder, questions, filler, facts or {})
    journal = Journal(output / "needle.journal.jsonl", settings)
    depths = [place / (num_depths - 1) if num_depths > 1 else 0.5 for place in range(num_depths)]
    lengths = sorted(set(frames))
    cells: list[dict[str, Any]] = []
    stopped: dict[str, Any] | None = None
    with tqdm(total=len(lengths) * len(depths), desc=f"needles, {responder.name}", unit="cell") as bar:
        for length in lengths:
            try:
                for depth in depths:
                    cells.append(_cell(responder, questions, filler, length, depth, journal))
                    bar.set_postfix(frames=length, right=f"{cells[-1]['percent']:.0f} %")
                    bar.update()
            except DoesNotFit as error:
                stopped = {"frames": length, "reason": f"does not fit in memory: {error}"}
                tqdm.write(f"{length} frames do not fit in memory ({error}); the probe ends here.")
                break
    result = {
        **settings,
        "frames": lengths,
        "depths_percent": [round(100 * depth, 2) for depth in depths],
        "stopped": stopped,
        "protocol": protocol_of(settings, " / ".join(map(str, lengths))).json(),
        "cells": cells,
    }
    write_json(output / "needle.json", result)
    with whole_file(output / "needle.png") as file:
        plot_needle([result]).savefig(file, format="png", dpi=150)
    return result


def _check(questions: Sequence[ProbeQuestion], filler: Filler, frames: Sequence[int], num_depths: int) -> None:
    """Raises ValueError for what would fail later, perhaps after hours of shorter videos."""
    if not questions or not frames or num_depths < 1:
        raise ConfigError(
            f"The needle probe needs questions, lengths and depths, got {len(questions)} questions, frames={frames}, "
            f"depths={num_depths}."
        )
    for question in questions:
        for length in frames:
            if length <= question.num_frames or length % question.frames_per_clip:
                raise ConfigError(
                    f"A video of {length} frames has no room for a needle of {question.num_frames} frames in clips of "
                    f"{question.frames_per_clip}; give lengths that are larger, in steps of a clip."
                )
            _request(question, filler, length, 0.5)


def _cell(
    responder: Responder,
    questions: Sequence[ProbeQuestion],
    filler: Filler,
    length: int,
    depth: float,
    journal: Journal,
) -> dict[str, Any]:
    key = f"{length} frames, depth {depth:.6f}"
    if key not in journal:
        requests = [_request(question, filler, length, depth) for question in questions]
        verdicts = ask(responder, questions, requests)
        journal[key] = [
            sum(verdict.right for verdict in verdicts),
            sum(not verdict.parsed for verdict in verdicts),
            sum(verdict.cut_off for verdict in verdicts),
        ]
    right, unparsed, cut_off = journal[key]
    number = len(questions)
    return {
        "frames": length,
        "depth_percent": round(100 * depth, 2),
        "right": right,
        "number": number,
        "unparsed": unparsed,
        "cut_off": cut_off,
        "percent": round(100 * right / number, 2),
        "interval_95": [round(100 * bound, 2) for bound in wilson_interval(right, number)],
    }


def found_at(result: Mapping[str, Any], frames: int) -> tuple[float, tuple[float, float], int] | None:
    """Needles found at one length over all depths: percent, its 95 % bounds, and how many needles there are.

    The same needles are hidden at every depth, so that as many answers as needles are independent.

    Args:
        result: What `probe_needle` gives.
        frames: The length; None comes back where it was not probed.
    """
    cells = [cell for cell in result["cells"] if cell["frames"] == frames]
    if not cells:
        return None
    number = cells[0]["number"]
    share = sum(cell["right"] for cell in cells) / sum(cell["number"] for cell in cells)
    low, high = wilson_interval(round(share * number), number)
    return 100 * share, (100 * low, 100 * high), number


def _request(question: ProbeQuestion, filler: Filler, length: int, depth: float) -> Request:
    others = filler.clips(question, length // question.frames_per_clip - len(question.clips))
    return question.laid_among(others, round(depth * len(others)))


def plot_needle(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Heat maps of one or more models, side by side. Each cell says its percentage; what was not run is hatched."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    widest = max(len(result["frames"]) for result in results)
    tallest = max(len(result["depths_percent"]) for result in results)
    width_inches = (1.3 + max(2.6, 0.75 * widest)) * len(results) + 1.2
    figure = Figure(figsize=(width_inches, 2.1 + 0.36 * tallest), layout="constrained")
    all_axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(all_axes, results, strict=True):
        lengths, depths = result["frames"], result["depths_percent"]
        percents = np.full((len(depths), len(lengths)), np.nan)
        for cell in result["cells"]:
            percents[depths.index(cell["depth_percent"]), lengths.index(cell["frames"])] = cell["percent"]
        image = axes.imshow(percents, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for row, column in np.ndindex(percents.shape):
            if np.isnan(percents[row, column]):
                # A length that broke off at some depth counts as one that did not fit.
                square = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(square, 1, 1, facecolor="#dddddd", edgecolor="#888888", hatch="///", lw=0))
            else:
                # The map is dark at both ends.
                ink = "black" if 15 < percents[row, column] < 90 else "white"
                axes.text(column, row, f"{percents[row, column]:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0f}" for depth in depths])
        axes.set(xlabel="frames of the video", ylabel="depth of the needle (%)", title=as_it_is(result["model"]))
        if result["stopped"] is not None:
            axes.set_xlabel(
                f"frames of the video\n{result['stopped']['frames']} frames did not fit in memory (hatched)"
            )
    figure.colorbar(image, ax=list(all_axes), label="right answers (%)")
    first = results[0]
    asked = "1 needle" if first["questions"] == 1 else f"{first['questions']} needles a cell"
    title = f"Needles among {first['filler']}; {asked}"
    figure.suptitle(as_it_is(textwrap.fill(title, round(13 * width_inches))), fontsize=9)
    return figure
