"""The miniature's own measure in a report: right answers by number of clips and by place, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longvpo_hf.miniature.evaluation import CHANCE_PERCENT, PAIR_CHANCE_PERCENT, POSITIONS
from longvpo_hf.miniature.study import settings_of
from longvpo_hf.studies.report.sections import Picture, Section, Table, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from longvpo_hf.miniature.settings import MiniatureSettings
    from longvpo_hf.studies.study import Study

#: Before, after the first training, after the second, …
_COLOURS = ("#8a8f98", "#1f6feb", "#1a7f37", "#8e44ad", "#b8430c")
_MARK = "#c0392b"

#: Without and with a pretrained language model inside.
_BASES = (
    "A tiny video-language model was trained from nothing on videos of one and two clips.",
    "A pretrained language model learnt to see on videos of one and two clips.",
)
#: By the model's label, what `Workshop.evaluate` gives.
Results = Mapping[str, Mapping[str, Any]]


def lengths_section(results: Results, study: Study) -> Section:
    """What was measured of each model, as tables and plots."""
    settings = settings_of(study)
    tables = [
        _table(
            f"Right answers about one clip, in percent with 95 % bounds ({settings.questions_per_length} questions a "
            f"length, chance {CHANCE_PERCENT:g} %)",
            results,
        ),
        _table(
            f"Right answers about two clips ({settings.pair_questions_per_length} questions a length, chance "
            f"{PAIR_CHANCE_PERCENT:.1f} %)",
            {label: result["pairs"] for label, result in results.items()},
        ),
        _position_table(results),
    ]
    pictures = [
        Picture.of("accuracy", "Right answers against the number of clips", _plot_accuracy(results, settings)),
        Picture.of("positions", "Right answers by the place of the clip that is asked about", _plot_positions(results)),
    ]
    return Section(
        "Longer videos, before and after",
        [
            f"{_BASES[bool(settings.language_model)]} All rows are made of "
            "the models' own answers, without any label. Asked are the colours of the shapes in one clip or in two, "
            "which the question names by their markers; an answer must match to the letter. No training saw the clips "
            "of this evaluation. The same seed on the same machine gives the same numbers.",
            "What it does not show: which part of the loss does the work (benchmarks/results/ of the repository "
            "measures that over seeds), nor that the model learns what comes before what. Lengths beyond those in "
            "training gain less.",
        ],
        tables=tables,
        pictures=pictures,
    )


def base_section(made: Mapping[str, Any]) -> Section:
    """Where a base with a pretrained language model comes from, and what of the world's truth it was told.

    Args:
        made: What `Workshop.base` gives.
    """
    wall, frame, colour = (f"{100 * share:.1f}" for share in made["words_right"])
    return Section(
        "The base",
        [
            f"The language model is {made['language_model']}, with its own tokenizer and chat template; the vision "
            f"tower was trained from nothing for {made['naming_steps']} steps on naming clips.",
            "What is between them was told the world's truth about single clips: the projector learnt to say each "
            "frame in the embeddings of its wall's, its frame's and its shape's colour words (of frames held out, the "
            f"nearest word is right for {wall}, {frame} and {colour} %), and adapters, merged since, were trained for "
            f"{made['alignment_steps']} steps to answer about one clip and two. Nothing taught it longer videos.",
        ],
    )


def truth_table(truth: Mapping[str, Mapping[str, int]]) -> Table:
    """How right Stage-2 rows are by the miniature's truth."""
    lines = []
    for name, counts in truth.items():
        shares = [
            f"{100 * counts[share] / counts['pairs']:.1f} %" if share in counts and counts["pairs"] else "–"
            for share in ("chosen_right", "rejected_wrong", "evidence_exact")
        ]
        lines.append((name, str(counts["pairs"]), *shares))
    header = ("pairs", "number", "chosen right", "rejected wrong", "evidence exactly the scenes needed")
    return Table("Pairs against the truth", header, lines)


def _table(caption: str, results: Results) -> Table:
    lengths = list(next(iter(results.values()))["accuracy"])
    lines = [
        (length, *(percent(result["accuracy"][length], result["interval"][length]) for result in results.values()))
        for length in lengths
    ]
    return Table(caption, ("clips", *results), lines)


def _position_table(results: Results) -> Table:
    first = next(iter(results.values()))["positions"]
    lines = [
        (
            length,
            *(
                " → ".join(f"{result['positions'][length][place]['accuracy']:.1f}" for result in results.values())
                if place in parts
                else "–"
                for place in POSITIONS
            ),
        )
        for length, parts in first.items()
    ]
    return Table(f"By where the asked clip stands: {' → '.join(results)}", ("clips", *POSITIONS), lines)


def _plot_accuracy(results: Results, settings: MiniatureSettings) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    one, two = figure.subplots(1, 2, sharey=True)
    _plot_lengths(one, results, CHANCE_PERCENT)
    _plot_lengths(two, {label: result["pairs"] for label, result in results.items()}, PAIR_CHANCE_PERCENT)
    for axes, stage, trained in ((one, 1, (2, settings.max_clips)), (two, 2, settings.stage2_scenes)):
        label = f"lengths in Stage {stage} ({trained[0]}–{trained[1]})"
        axes.axvspan(*trained, color=_COLOURS[stage], alpha=0.06, label=label)
        axes.legend(fontsize=8)
    one.set(title="Questions about one clip", ylabel="right answers (%)")
    two.set(title="Questions about two clips")
    return figure


def _plot_lengths(axes: Axes, results: Results, chance: float) -> None:
    import numpy as np

    for number, (label, result) in enumerate(results.items()):
        lengths = [int(length) for length in result["accuracy"]]
        bounds = np.array(list(result["interval"].values()))
        colour = _COLOURS[number % len(_COLOURS)]
        axes.fill_between(lengths, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.2, linewidth=0)
        axes.plot(lengths, list(result["accuracy"].values()), "o-", color=colour, label=label, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.axhline(chance, color=_MARK, linestyle=":", label=f"chance ({chance:.3g} %)")
    axes.set(xlabel="clips in the video", ylim=(0, 103))
    axes.grid(alpha=0.3)


def _plot_positions(results: Results) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    first = next(iter(results.values()))["positions"]
    lengths = [length for length, parts in first.items() if len(parts) == len(POSITIONS)]
    figure = Figure(figsize=(1.9 * max(2, len(lengths)) + 0.8, 3.4), layout="constrained")
    all_axes = figure.subplots(1, max(1, len(lengths)), sharey=True, squeeze=False)[0]
    places, width = np.arange(len(POSITIONS)), 0.8 / len(results)
    for axes, length in zip(all_axes, lengths, strict=False):
        for number, (label, result) in enumerate(results.items()):
            heights = [result["positions"][length][position]["accuracy"] for position in POSITIONS]
            shift = (number - (len(results) - 1) / 2) * width
            axes.bar(places + shift, heights, width=width, color=_COLOURS[number % len(_COLOURS)], label=label)
        axes.axhline(CHANCE_PERCENT, color=_MARK, linestyle=":")
        axes.set_xticks(places, POSITIONS, fontsize=8)
        axes.set_title(f"{length} clips", fontsize=10)
        axes.set_ylim(0, 103)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].set_ylabel("right answers (%)")
    all_axes[0].legend(fontsize=7, loc="lower left")
    figure.suptitle("Where in the video the asked clip stands")
    return figure
