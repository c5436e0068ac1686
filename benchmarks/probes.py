"""Needle and position probe on the miniature's models before and after LongVPO, kept in `benchmarks/results/probes.*`.

    longvpo run miniature
    python benchmarks/probes.py --run runs/miniature

Asks about clips that no training saw, in videos of such clips and, for the position probe, also among black frames.
Goes on where it was stopped. Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from longvpo_hf.evaluation.needle import plot_needle, probe_needle
from longvpo_hf.evaluation.position import plot_position, probe_position
from longvpo_hf.evaluation.probes import BlankFiller
from longvpo_hf.miniature.language import WORDS
from longvpo_hf.miniature.machine import one_thread, processor_name
from longvpo_hf.miniature.probes import WorldFiller, world_questions
from longvpo_hf.miniature.world import read_world
from longvpo_hf.responders.checkpoint import load_responder, weights_digest

RESULTS = Path(__file__).parent / "results"
LENGTHS = (4, 8, 16, 32, 64, 128)
DEPTHS = 10
NEEDLES = 40
#: Frames in all of the position probe: Stage 1 saw up to 32, the base up to 4.
FRAMES = (32, 64)
QUESTIONS = 200
PLACEMENTS = 4
SEED = 0


def probe(run: Path, models: list[str], work: Path) -> dict[str, Any]:
    """Both probes on each model; `needle[model]` and `position[filler][frames][model]`."""
    clips = read_world(run / "world" / "evaluation")
    others = WorldFiller(clips, SEED)
    results: dict[str, Any] = {"needle": {}, "position": {}}
    for name in models:
        responder = load_responder(str(run / name), max(*LENGTHS, *FRAMES), None, 64, 4)
        facts = {"weights": weights_digest(str(run / name))}
        questions = world_questions(clips, NEEDLES, SEED, language=WORDS)
        results["needle"][name] = probe_needle(responder, questions, others, LENGTHS, DEPTHS, work / name, facts)
        questions = world_questions(clips, QUESTIONS, SEED, language=WORDS)
        for label, filler in (("clips", others), ("black", BlankFiller(work / "media"))):
            for frames in FRAMES:
                output = work / f"{name}-{label}-{frames}"
                result = probe_position(responder, questions, filler, frames, PLACEMENTS, output, SEED, facts)
                results["position"].setdefault(label, {}).setdefault(str(frames), {})[name] = result
    return results


def report(results: dict[str, Any], machine: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# The probes on the miniature's models",
        "",
        "`base` was trained on videos of one and two clips (2 and 4 frames), `model` is the same after LongVPO Stage 1",
        "on 2 to 16 clips (32 frames), `stage2-model` that one after Stage 2 on 4 to 16. The clips asked about were in",
        "no training. Chance is 12.5 %.",
        "",
        f"## Position: a clip of two frames among others, {QUESTIONS} questions at {PLACEMENTS} places each",
        "",
        "Percent of right answers by third of the video the clip stands in, and the dip (clip alone − middle), with",
        "95 % bands of a bootstrap over questions.",
        "",
        "| among | frames | model | clip alone | begin | middle | end (next to the question) | dip |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for label, by_frames in results["position"].items():
        for frames, by_model in by_frames.items():
            for name, result in by_model.items():
                thirds = " | ".join(banded(result["thirds"][third]) for third in ("begin", "middle", "end"))
                alone = banded(result["upper_bound"])
                among = {"clips": "other clips", "black": "black frames"}[label]
                lines.append(f"| {among} | {frames} | {name} | {alone} | {thirds} | {banded(result['dip'])} |")
    lines += [
        "",
        f"![Among other clips, {FRAMES[0]} frames](probes.position.clips.png)",
        f"![Among black frames, {FRAMES[0]} frames](probes.position.black.png)",
        "",
        "The base does not dip in the middle alone: it falls with the distance to the question, so the begin of the",
        "video is worse still. A band of no width means that all questions were answered alike, not that nothing is",
        "uncertain. Among black frames, which neither model saw in training, the same holds, less steeply.",
        "",
        f"## Needle: {NEEDLES} needles a cell, {DEPTHS} depths",
        "",
        "Percent of right answers: mean over the depths, and the worst depth.",
        "",
        "| frames | " + " | ".join(f"{name}: mean | {name}: worst" for name in results["needle"]) + " |",
        "|---:|" + "---:|---:|" * len(results["needle"]),
    ]
    for length in LENGTHS:
        cells = []
        for result in results["needle"].values():
            percents = {c["depth_percent"]: c["percent"] for c in result["cells"] if c["frames"] == length}
            worst = min(percents, key=lambda depth: percents[depth])
            cells.append(f"{sum(percents.values()) / len(percents):.1f} | {percents[worst]:.1f} (depth {worst:.0f} %)")
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "![Heat maps](probes.needle.png)",
        "",
        "## Where and how",
        "",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['platform']}; one thread, no accelerator",
        f"- Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items()),
        f"- commit {machine['commit']}; models of `longvpo run miniature` with seed {machine['seed']}",
        f"- `{machine['command']}`",
        "",
    ]
    return "\n".join(lines)


def banded(value: dict[str, Any]) -> str:
    """A percentage with its band."""
    low, high = value["band_95"]
    return f"{value['percent']:.1f} ({low:.0f} to {high:.0f})"


def main() -> None:
    """Runs the probes and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/miniature"), help="A finished `longvpo run miniature`.")
    parser.add_argument(
        "--models", nargs="+", default=["base", "stage1-model", "stage2-model"], help="Folders of the run."
    )
    parser.add_argument("--work", type=Path, default=Path("runs/probes"), help="Folder of the runs.")
    args = parser.parse_args()
    with one_thread():
        results = probe(args.run, args.models, args.work)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = {
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("longvpo-hf", "torch", "transformers", "trl", "torchcodec")},
        "commit": commit.stdout.strip(),
        "seed": json.loads((args.run / "metrics.json").read_text(encoding="utf-8"))["seed"],
        "command": f"python benchmarks/probes.py --models {' '.join(args.models)}",
    }
    RESULTS.mkdir(exist_ok=True)
    plot_needle(list(results["needle"].values())).savefig(RESULTS / "probes.needle.png", dpi=100)
    for label, by_frames in results["position"].items():
        plot_position(by_frames[str(FRAMES[0])]).savefig(RESULTS / f"probes.position.{label}.png", dpi=100)
        for by_model in by_frames.values():
            for result in by_model.values():
                del result["trials"]  # thousands of lines that the curve sums up
    text = json.dumps({"machine": machine, **results}, indent=1, ensure_ascii=False)
    (RESULTS / "probes.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / "probes.md").write_text(report(results, machine), encoding="utf-8")
    print(report(results, machine))
    middle = results["position"]["clips"][str(FRAMES[0])]
    print("probes: " + " ".join(f"dip_{name}={result['dip']['percent']:.1f}" for name, result in middle.items()))


if __name__ == "__main__":
    main()
