"""The demo's report: a table, two plots and a filmstrip.

Takes the demo's measurements and a row of its dataset; writes `report.md`, `accuracy.png`, `positions.png` and
`filmstrip.png`. Knows nothing of how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from longvpo_hf.frames import FrameSampler
from longvpo_hf.miniature.evaluation import POSITIONS
from longvpo_hf.preference import VideoPreference

_BEFORE, _AFTER, _CHANCE = "#8a8f98", "#1f6feb", "#c0392b"


def write_report(output: Path, metrics: Mapping[str, Any], row: Mapping[str, Any], sampler: FrameSampler) -> None:
    """Writes the report's files into `output`.

    Args:
        output: The folder of the run.
        metrics: What `metrics.json` holds.
        row: A row of the dataset, for the filmstrip.
        sampler: Takes its frames.
    """
    _plot_accuracy(metrics).savefig(output / "accuracy.png", dpi=150)
    _plot_positions(metrics).savefig(output / "positions.png", dpi=150)
    _plot_filmstrip(VideoPreference.from_row(row), sampler).savefig(output / "filmstrip.png", dpi=150)
    (output / "report.md").write_text(_text(metrics), encoding="utf-8")


def table(metrics: Mapping[str, Any]) -> str:
    """Accuracy before and after by number of clips, as Markdown."""
    before, after = metrics["accuracy"]["before"], metrics["accuracy"]["after"]
    lines = ["| clips | before | after | change |", "|---:|---:|---:|---:|"]
    lines += [
        f"| {length} | {_with_interval(metrics, 'before', length)} | {_with_interval(metrics, 'after', length)} "
        f"| {after[length] - before[length]:+.1f} |"
        for length in before
    ]
    questions = metrics["questions_per_length"]
    lines += ["", f"Percent of {questions} questions per length, 95 % interval; chance {metrics['chance']:g} %."]
    return "\n".join(lines)


def _with_interval(metrics: Mapping[str, Any], when: str, length: str) -> str:
    low, high = metrics["interval_95"][when][length]
    return f"{metrics['accuracy'][when][length]:.1f} ({low:.0f}–{high:.0f})"


def _position_table(metrics: Mapping[str, Any]) -> str:
    lines = [
        "| clips | " + " | ".join(f"{position}: before → after" for position in POSITIONS) + " |",
        "|---:|" + "---:|" * len(POSITIONS),
    ]
    for length, before in metrics["positions"]["before"].items():
        after = metrics["positions"]["after"][length]
        cells = [
            f"{before[place]['accuracy']:.1f} → {after[place]['accuracy']:.1f} (n={before[place]['questions']})"
            if place in before
            else "–"
            for place in POSITIONS
        ]
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(metrics: Mapping[str, Any]) -> str:
    settings, arm = metrics["settings"], metrics["arm"]
    warning = (
        "> **`--fast`: these numbers mean nothing.** The run is far too short; it shows that everything works.\n\n"
        if metrics["meaningless"]
        else ""
    )
    funnel = metrics["funnel"]
    stages = ", ".join(f"{name} {number}" for name, number in funnel["stages"].items())
    drops = ", ".join(f"{name} {number}" for name, number in funnel["dropped"].items()) or "none"
    seconds = metrics["seconds"]
    times = "\n".join(f"| {name} | {value:.1f} |" for name, value in seconds.items())
    versions = ", ".join(f"{name} {value}" for name, value in metrics["versions"].items())
    machine = metrics["machine"]
    base, trained = metrics["base"], settings["max_clips"]
    pool = settings["pretraining_clips"]
    return f"""# LongVPO in miniature

{warning}A tiny video-language model was trained from nothing on videos of one and two clips (before, `base/`). Stage 1
of LongVPO then trained it on preference rows of 2 to {trained} clips that were made from its own answers, without any
label (after, `model/`). Asked is the colour of the shape in one clip, which the question names by its marker; the
answer must match to the letter. No training phase saw the clips of this evaluation.

{table(metrics)}

![Accuracy against length](accuracy.png)

## By where the asked clip stands

{_position_table(metrics)}

![Accuracy by position](positions.png)

## One row

![A row: its clips, the anchor marked](filmstrip.png)

## What it does not show

Here the SFT term on the chosen answers does nearly all of the work: training on it alone, or with the reference scored
on the whole video, gives accuracies that cannot be told from these (controls over seeds: `benchmarks/results/` of the
repository). Lengths beyond {trained} clips were not trained on, and gain less.

## How it was made

- seed {metrics["seed"]}, scale {metrics["settings"]["scale"]}; the same seed on the same machine gives the same numbers
- base: {base["parameters"]} parameters; {base["naming_steps"]} steps on one clip, {base["recall_steps"]} on one and
  two, from {pool} clips
- rows: {stages}; dropped: {drops}
- Stage 1: {settings["steps"]} steps of 48 rows, learning rate 1e-3
- loss: reference `{arm["reference"]}`, β {arm["beta"]}, α {arm["sft_weight"]}
- versions: {versions}
- machine: {machine["processor"]}, {machine["cores"]} cores, {machine["platform"]}
- peak memory: {metrics["peak_memory_gib"]} GiB

| phase | seconds |
|---|---:|
{times}
| all | {sum(seconds.values()):.1f} |
"""


def _plot_accuracy(metrics: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lengths = [int(length) for length in metrics["accuracy"]["before"]]
    for when, colour, label in (("before", _BEFORE, "before: short-context base"), ("after", _AFTER, "after: Stage 1")):
        accuracy = np.array(list(metrics["accuracy"][when].values()))
        bounds = np.array(list(metrics["interval_95"][when].values()))
        axes.fill_between(lengths, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.2, linewidth=0)
        axes.plot(lengths, accuracy, "o-", color=colour, label=label)
    axes.axhline(metrics["chance"], color=_CHANCE, linestyle=":", label=f"chance ({metrics['chance']:g} %)")
    trained = metrics["settings"]["max_clips"]
    axes.axvspan(2, trained, color=_AFTER, alpha=0.05, label=f"lengths in Stage 1 (2–{trained})")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(xlabel="clips in the video", ylabel="right answers (%)", ylim=(0, 103))
    axes.set_title(_titled("Answers about one clip of a long video", metrics))
    axes.legend(loc="lower left", fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _plot_positions(metrics: Mapping[str, Any]) -> Figure:
    lengths = [length for length, parts in metrics["positions"]["before"].items() if len(parts) == len(POSITIONS)]
    figure = Figure(figsize=(1.9 * len(lengths) + 0.8, 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    places = np.arange(len(POSITIONS))
    for axes, length in zip(all_axes, lengths, strict=True):
        for when, colour, shift in (("before", _BEFORE, -0.2), ("after", _AFTER, 0.2)):
            parts = metrics["positions"][when][length]
            heights = [parts[position]["accuracy"] for position in POSITIONS]
            axes.bar(places + shift, heights, width=0.38, color=colour, label=when)
        axes.axhline(metrics["chance"], color=_CHANCE, linestyle=":")
        axes.set_xticks(places, POSITIONS, fontsize=8)
        axes.set_title(f"{length} clips", fontsize=10)
        axes.set_ylim(0, 103)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].set_ylabel("right answers (%)")
    all_axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle(_titled("Where in the video the asked clip stands", metrics))
    return figure


def _titled(title: str, metrics: Mapping[str, Any]) -> str:
    return f"{title} (--fast: means nothing)" if metrics["meaningless"] else title


def _plot_filmstrip(preference: VideoPreference, sampler: FrameSampler) -> Figure:
    frames = sampler(preference.timeline)
    num_clips = len(preference.timeline)
    columns = min(num_clips, 8)
    lines = -(-num_clips // columns)
    figure = Figure(figsize=(1.25 * columns, 1.55 * lines + 1.0), layout="constrained")
    all_axes = figure.subplots(lines, columns, squeeze=False).flat
    for index, axes in enumerate(all_axes):
        if index >= num_clips:
            axes.axis("off")
            continue
        axes.imshow(frames.pixels[frames.clip_indices.index(index)].permute(1, 2, 0).numpy())
        axes.set_xticks([])
        axes.set_yticks([])
        anchor = index in preference.evidence
        for spine in axes.spines.values():
            spine.set(color=_CHANCE if anchor else "#cccccc", linewidth=4 if anchor else 1)
        start = preference.timeline.starts_timeline_seconds[index]
        axes.set_xlabel("anchor" if anchor else f"{start:g} s", fontsize=8, color=_CHANCE if anchor else "black")
    figure.suptitle(
        f"{preference.question}\nchosen: {preference.chosen}    rejected: {preference.rejected}", fontsize=10, wrap=True
    )
    return figure
