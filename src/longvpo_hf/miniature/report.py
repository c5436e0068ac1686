"""The demo's report: tables, plots and filmstrips, from the demo's measurements and a row of each of its datasets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longvpo_hf.artifacts import whole_file, write_text
from longvpo_hf.frames import FrameSampler
from longvpo_hf.miniature.evaluation import POSITIONS
from longvpo_hf.preference import VideoPreference

#: The models that are compared, as the metrics name them, with label and colour.
MODELS = {
    "before": ("before: short-context base", "#8a8f98"),
    "stage1": ("after Stage 1", "#1f6feb"),
    "stage2": ("after Stage 2", "#1a7f37"),
}
_MARK = "#c0392b"


def write_report(
    output: Path, metrics: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], sampler: FrameSampler
) -> None:
    """Writes `report.md`, its plots and the rows' filmstrips into `output`.

    Args:
        output: The folder of the run.
        metrics: The content of `metrics.json`.
        rows: A row of each dataset, by the name of its filmstrip.
        sampler: Takes their frames.
    """
    strips = {name: _plot_filmstrip(VideoPreference.from_row(row), sampler) for name, row in rows.items()}
    pictures = {"accuracy": _plot_accuracy(metrics), "positions": _plot_positions(metrics), **strips}
    for name, picture in pictures.items():
        with whole_file(output / f"{name}.png") as file:
            picture.savefig(file, format="png", dpi=150)
    write_text(output / "report.md", _text(metrics))


def table(metrics: Mapping[str, Any]) -> str:
    """Accuracy of every model by number of clips, about one clip and about two, as Markdown."""
    pairs = metrics["pairs"]
    return "\n".join(
        [
            f"About one clip ({metrics['questions_per_length']} questions a length, chance {metrics['chance']:g} %):",
            "",
            *_table(metrics["accuracy"], metrics["interval_95"]),
            "",
            f"About two clips ({pairs['questions_per_length']} questions a length, chance {pairs['chance']:.1f} %):",
            "",
            *_table(pairs["accuracy"], pairs["interval_95"]),
            "",
            "Percent of right answers, 95 % interval.",
        ]
    )


def _table(accuracy: Mapping[str, Any], interval: Mapping[str, Any]) -> list[str]:
    def cell(model: str, length: str) -> str:
        low, high = interval[model][length]
        return f"{accuracy[model][length]:.1f} ({low:.0f}–{high:.0f})"

    lines = ["| clips | before | Stage 1 | Stage 2 |", "|---:|---:|---:|---:|"]
    return lines + [
        f"| {length} | " + " | ".join(cell(model, length) for model in MODELS) + " |" for length in accuracy["before"]
    ]


def _position_table(metrics: Mapping[str, Any]) -> str:
    lines = [
        "| clips | " + " | ".join(f"{position}: before → Stage 1 → Stage 2" for position in POSITIONS) + " |",
        "|---:|" + "---:|" * len(POSITIONS),
    ]
    positions = metrics["positions"]
    for length, before in positions["before"].items():
        cells = [
            " → ".join(f"{positions[model][length][place]['accuracy']:.1f}" for model in MODELS)
            + f" (n={before[place]['questions']})"
            if place in before
            else "–"
            for place in POSITIONS
        ]
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def truth_table(truth: Mapping[str, Mapping[str, int]]) -> str:
    """How right Stage-2 rows are by the world's truth, as Markdown."""
    lines = [
        "| Stage-2 pairs | number | chosen right | rejected wrong | evidence exactly the scenes needed |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, counts in truth.items():
        shares = [
            f"{100 * counts[share] / counts['pairs']:.1f} %" if share in counts and counts["pairs"] else "–"
            for share in ("chosen_right", "rejected_wrong", "evidence_exact")
        ]
        lines.append(f"| {name} | {counts['pairs']} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def _funnel(funnel: Mapping[str, Mapping[str, int]]) -> str:
    stages = ", ".join(f"{name} {number}" for name, number in funnel["stages"].items())
    return f"{stages}; dropped: " + (
        ", ".join(f"{name} {number}" for name, number in funnel["dropped"].items()) or "none"
    )


def _text(metrics: Mapping[str, Any]) -> str:
    settings, arms, captions = metrics["settings"], metrics["arms"], metrics["stage2_captions"]
    warning = (
        "> **`--fast`: these numbers mean nothing.** The run is far too short; it shows that everything works.\n\n"
        if metrics["meaningless"]
        else ""
    )
    seconds = metrics["seconds"]
    times = "\n".join(f"| {name} | {value:.1f} |" for name, value in seconds.items())
    versions = ", ".join(f"{name} {value}" for name, value in metrics["versions"].items())
    machine, memory = metrics["machine"], metrics["peak_memory_gib"]
    base, trained = metrics["base"], settings["max_clips"]
    shortest, longest = settings["stage2_scenes"]
    steps = {"stage1": settings["steps"], "stage2": settings["stage2_steps"]}
    trainings = "\n".join(
        f"- Stage {name[-1]}: {steps[name]} steps of 48 rows, learning rate {arm['learning_rate']:g}, "
        f"reference `{arm['reference']}`, β {arm['beta']}, α {arm['sft_weight']}"
        for name, arm in arms.items()
    )
    return f"""# LongVPO in miniature

{warning}A tiny video-language model was trained from nothing on videos of one and two clips (before, `base/`). Stage 1
of LongVPO trained it on preference rows of 2 to {trained} clips about one of them (`model/`), Stage 2 trained that on
rows of {shortest} to {longest} consecutive scenes about two of them (`stage2-model/`). All rows are made of the model's
own answers, without any label. Asked are the colours of the shapes in one clip or in two, which the question names by
their markers; an answer must match to the letter. No training phase saw the clips of this evaluation.

{table(metrics)}

![Accuracy against length](accuracy.png)

## By where the asked clip stands

{_position_table(metrics)}

![Accuracy by position](positions.png)

## Are the Stage-2 rows right?

{truth_table(metrics["stage2_truth"])}

Measured with the world's truth, which no step of building or training sees. Before filters: every pair of answers that
was given. The filters drop pairs that agree, and pairs of which a judge, who reads the model's own captions, does not
find the chosen answer supported or finds the rejected one right. Of {captions["scenes"]} captions,
{100 * captions["captions_right"] / captions["scenes"]:.1f} % are right.

## A row of each stage

![A Stage-1 row: its clips, the anchor marked](stage1-row.png)

![A Stage-2 row: its scenes, the evidence marked](stage2-row.png)

## What it does not show

Which part of the loss does the work: training on the chosen answers alone, or with the reference scored on another
view, is measured over seeds in `benchmarks/results/` of the repository. Nor that the model learns what comes before
what: questions about the order of two clips were tried, and not learnt. Lengths beyond {max(trained, longest)} clips
were not trained on, and gain less.

## How it was made

- seed {metrics["seed"]}, scale {settings["scale"]}; the same seed on the same machine gives the same numbers
- base: {base["parameters"]} parameters; {base["naming_steps"]} steps on one clip, {base["recall_steps"]} on one and
  two, from {settings["pretraining_clips"]} clips
- Stage-1 rows: {_funnel(metrics["funnels"]["stage1"])}
- Stage-2 rows: {_funnel(metrics["funnels"]["stage2"])}
{trainings}
- versions: {versions}
- machine: {machine["processor"]}, {machine["cores"]} cores, {machine["platform"]}
{f"- peak memory: {memory:.2f} GiB, of all processes together" if memory else "- peak memory: not measured here"}

| phase | seconds |
|---|---:|
{times}
| all | {sum(seconds.values()):.1f} |
"""


def _plot_accuracy(metrics: Mapping[str, Any]) -> Figure:
    settings, pairs = metrics["settings"], metrics["pairs"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    one, two = figure.subplots(1, 2, sharey=True)
    _plot_lengths(one, metrics["accuracy"], metrics["interval_95"], metrics["chance"])
    _plot_lengths(two, pairs["accuracy"], pairs["interval_95"], pairs["chance"])
    for axes, stage, trained in (
        (one, "stage1", (2, settings["max_clips"])),
        (two, "stage2", settings["stage2_scenes"]),
    ):
        label = f"lengths in Stage {stage[-1]} ({trained[0]}–{trained[1]})"
        axes.axvspan(*trained, color=MODELS[stage][1], alpha=0.06, label=label)
        axes.legend(loc="lower left", fontsize=8)
    one.set(title="Questions about one clip", ylabel="right answers (%)")
    two.set(title="Questions about two clips")
    figure.suptitle(_titled("Answers about long videos", metrics))
    return figure


def _plot_lengths(axes: Axes, accuracy: Mapping[str, Any], interval: Mapping[str, Any], chance: float) -> None:
    lengths = [int(length) for length in accuracy["before"]]
    for model, (label, colour) in MODELS.items():
        bounds = np.array(list(interval[model].values()))
        axes.fill_between(lengths, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.2, linewidth=0)
        axes.plot(lengths, list(accuracy[model].values()), "o-", color=colour, label=label, markersize=4)
    axes.axhline(chance, color=_MARK, linestyle=":", label=f"chance ({chance:.3g} %)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(xlabel="clips in the video", ylim=(0, 103))
    axes.grid(alpha=0.3)


def _plot_positions(metrics: Mapping[str, Any]) -> Figure:
    lengths = [length for length, parts in metrics["positions"]["before"].items() if len(parts) == len(POSITIONS)]
    figure = Figure(figsize=(1.9 * len(lengths) + 0.8, 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    places = np.arange(len(POSITIONS))
    for axes, length in zip(all_axes, lengths, strict=True):
        for shift, (model, (label, colour)) in zip((-0.28, 0.0, 0.28), MODELS.items(), strict=True):
            parts = metrics["positions"][model][length]
            heights = [parts[position]["accuracy"] for position in POSITIONS]
            axes.bar(places + shift, heights, width=0.26, color=colour, label=label)
        axes.axhline(metrics["chance"], color=_MARK, linestyle=":")
        axes.set_xticks(places, POSITIONS, fontsize=8)
        axes.set_title(f"{length} clips", fontsize=10)
        axes.set_ylim(0, 103)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].set_ylabel("right answers (%)")
    all_axes[0].legend(fontsize=7, loc="lower left")
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
    marked = "anchor" if len(preference.evidence) == 1 else "evidence"
    for index, axes in enumerate(all_axes):
        if index >= num_clips:
            axes.axis("off")
            continue
        axes.imshow(frames.pixels[frames.clip_indices.index(index)].permute(1, 2, 0).numpy())
        axes.set_xticks([])
        axes.set_yticks([])
        is_evidence = index in preference.evidence
        for spine in axes.spines.values():
            spine.set(color=_MARK if is_evidence else "#cccccc", linewidth=4 if is_evidence else 1)
        start = preference.timeline.starts_timeline_seconds[index]
        axes.set_xlabel(marked if is_evidence else f"{start:g} s", fontsize=8, color=_MARK if is_evidence else "black")
    figure.suptitle(
        f"{preference.question}\nchosen: {preference.chosen}    rejected: {preference.rejected}", fontsize=10, wrap=True
    )
    return figure
