"""The claim of `longvpo demo`, over fresh seeds and with controls; kept in `benchmarks/results/miniature.{json,md}`.

    python benchmarks/miniature.py --seeds 21 22 23 24 25 --control-seeds 21 22

Runs the demo's own phases with its own settings for every seed; for the control seeds also trains the other arms on the
same base and the same rows. Goes on where it was stopped. Takes about 8 minutes a seed and 4 an arm on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from longvpo_hf.miniature.demo import LONGVPO, Arm, Demo, DemoSettings, one_thread, processor_name

RESULTS = Path(__file__).parent / "results"

CONTROLS = (
    Arm("sft-only", loss_type=("sft",)),
    Arm("full-reference", reference="full"),
    Arm("dpo-alone-anchor", beta=1.0, sft_weight=0.0),
    Arm("dpo-alone-full", reference="full", beta=1.0, sft_weight=0.0),
)

#: The claim: what must hold for every seed, in the issue's words and as a test of accuracies before and after.
CLAIM = {
    "base ≥ 97 % on 1 and 2 clips": lambda b, a: min(b["1"], b["2"]) >= 97,
    "base falls clearly with length (64 clips ≤ half of 1 clip)": lambda b, a: b["64"] <= b["1"] / 2,
    "after ≥ 95 % at 8 clips": lambda b, a: a["8"] >= 95,
    "at least +30 points at 16 clips": lambda b, a: a["16"] - b["16"] >= 30,
    "at least +20 points at 32 clips": lambda b, a: a["32"] - b["32"] >= 20,
    "at most −2 points at 1 and 2 clips": lambda b, a: min(a["1"] - b["1"], a["2"] - b["2"]) >= -2,
}


def run_seed(folder: Path, seed: int, arms: tuple[Arm, ...]) -> dict[str, Any]:
    """Accuracies of the base and of each arm at one seed."""
    demo = Demo(folder, DemoSettings(seed=seed))
    demo.worlds()
    demo.base()
    before = demo.evaluate("base")
    funnel = demo.rows()
    result: dict[str, Any] = {"funnel": funnel, "before": before, "arms": {}}
    for arm in (LONGVPO, *arms):
        training = demo.train(arm)
        result["arms"][arm.name] = {"settings": asdict(arm), "training": training, **demo.evaluate(arm.name)}
    b, a = before["accuracy"], result["arms"][LONGVPO.name]["accuracy"]
    result["claim"] = {name: bool(holds(b, a)) for name, holds in CLAIM.items()}
    result["seconds"] = demo.seconds()
    return result


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings, machine = DemoSettings(), results["machine"]
    lengths = [str(length) for length in settings.lengths]
    header = ["| seed | | " + " | ".join(lengths) + " |", "|---|---|" + "---:|" * len(lengths)]

    def line(seed: object, name: str, accuracy: dict[str, float]) -> str:
        return f"| {seed} | {name} | " + " | ".join(f"{accuracy[length]:.1f}" for length in lengths) + " |"

    seeds = results["seeds"]
    text = [
        "# The miniature over seeds",
        "",
        "Percent of right answers by number of clips; "
        f"{settings.questions_per_length} questions a length, chance 12.5 %. The settings were fixed beforehand.",
        "",
        *header,
    ]
    for seed, result in seeds.items():
        text.append(line(seed, "base", result["before"]["accuracy"]))
        text.append(line("", "Stage 1", result["arms"][LONGVPO.name]["accuracy"]))
    text += ["", "## The claim", "", "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"]
    text.append("|---|" + "---|" * len(seeds))
    for name in CLAIM:
        cells = ["holds" if result["claim"][name] else "**fails**" for result in seeds.values()]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    controlled = {seed: result for seed, result in seeds.items() if len(result["arms"]) > 1}
    if controlled:
        names = list(next(iter(controlled.values()))["arms"])
        text += ["", f"## Controls: same base, same rows (seeds {', '.join(controlled)})", "", *header]
        for name in names:
            label = "anchored reference, DPO + SFT" if name == LONGVPO.name else name
            for seed, result in controlled.items():
                text.append(line(seed, label, result["arms"][name]["accuracy"]))
            if len(controlled) > 1:
                means = {n: mean(r["arms"][name]["accuracy"][n] for r in controlled.values()) for n in lengths}
                text.append(line("mean", label, means))
    text += [
        "",
        "## Where and how",
        "",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['platform']}",
        f"- versions: {', '.join(f'{name} {number}' for name, number in results['versions'].items())}",
        f"- `{results['command']}`",
        "",
        "| seed | " + " | ".join(next(iter(seeds.values()))["seconds"]) + " |",
        "|---|" + "---:|" * len(next(iter(seeds.values()))["seconds"]),
    ]
    phases = list(next(iter(seeds.values()))["seconds"])
    for seed, result in seeds.items():
        text.append(f"| {seed} | " + " | ".join(str(result["seconds"].get(phase, "–")) for phase in phases) + " |")
    text += ["", "Seconds of each phase; other work ran on the machine at the same time, so they are upper bounds.", ""]
    return "\n".join(text)


def main() -> None:
    """Runs the seeds and writes the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23, 24, 25])
    parser.add_argument("--control-seeds", type=int, nargs="*", default=[21, 22])
    parser.add_argument("--work", type=Path, default=Path("runs/miniature"), help="Folder of the runs.")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()},
        "versions": {n: version(n) for n in ("longvpo-hf", "torch", "transformers", "trl", "datasets", "torchcodec")},
        "command": "python benchmarks/miniature.py --seeds {} --control-seeds {}".format(
            " ".join(map(str, args.seeds)), " ".join(map(str, args.control_seeds))
        ),
        "settings": asdict(DemoSettings()),
        "seeds": {},
    }
    with one_thread():
        # First all seeds, then the controls: the claim is known early.
        plan = [(seed, ()) for seed in args.seeds] + [(seed, CONTROLS) for seed in args.control_seeds]
        for seed, arms in plan:
            results["seeds"][str(seed)] = run_seed(args.work / f"seed-{seed}", seed, arms)
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / "miniature.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (RESULTS / "miniature.md").write_text(report(results), encoding="utf-8")
    print(report(results))
    failed = [(s, name) for s, result in results["seeds"].items() for name, ok in result["claim"].items() if not ok]
    print(f"miniature: seeds={len(results['seeds'])} claims_failed={len(failed)}")


if __name__ == "__main__":
    main()
