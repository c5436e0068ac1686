"""The claim of the method on a pretrained language model, over fresh seeds, kept in `benchmarks/results/`.

    python benchmarks/pretrained.py --seeds 61 62 63 64 65

For every seed: a world, a base (SmolLM2-135M-Instruct that learns to see one clip and two), Stage-1 rows of its own
answers, and Stage 1 by the recipe with the settings of `longvpo run pretrained`. Other ways to train on the same bases
and rows are arms of `recipes/ablations.py --world pretrained`. Results are written after every model, and what they
hold is not made again, also in another folder: the same command goes on. One process of one thread, about 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from longvpo_hf.artifacts import write_json
from longvpo_hf.launch import load_recipe
from longvpo_hf.miniature.machine import one_thread, processor_name
from longvpo_hf.miniature.settings import MiniatureSettings
from longvpo_hf.miniature.workshop import Workshop

RESULTS = Path(__file__).parent / "results"


def settings_of(seed: int) -> MiniatureSettings:
    """Those of the study, measured with more questions."""
    return replace(MiniatureSettings.pretrained(seed), questions_per_length=400, pair_questions_per_length=100)


#: The claim: what must hold for every seed, of the accuracies about one clip before and after Stage 1.
CLAIM: dict[str, Callable[[dict[str, float], dict[str, float]], bool]] = {
    "base ≥ 95 % at 1 and 2 clips": lambda b, s: min(b["1"], b["2"]) >= 95,
    "Stage 1 at least +40 points at 8 clips": lambda b, s: s["8"] - b["8"] >= 40,
    "Stage 1 at least +40 points at 16 clips": lambda b, s: s["16"] - b["16"] >= 40,
    "Stage 1 at most −1 point at 1 and 2 clips": lambda b, s: min(s[n] - b[n] for n in ("1", "2")) >= -1,
}


class Seed:
    """What is measured at one seed; `result` is what is known so far.

    Args:
        folder: Of what is made.
        seed: Decides all of it.
        result: Of an earlier run, or empty.
        keep: Called when there is more of it.
    """

    def __init__(self, folder: Path, seed: int, result: dict[str, Any], keep: Callable[[], None]) -> None:
        self._workshop = Workshop(folder, settings_of(seed))
        self.result, self._keep = result, keep

    def run(self) -> None:
        """Trains and measures, if that is not known."""
        if "claim" in self.result:
            return
        self._base()
        training = self._once("train stage1", self._train)
        self.result["stage1"] = {"training": training, **self._measure("stage1")}
        before, after = self.result["base"]["accuracy"], self.result["stage1"]["accuracy"]
        self.result["claim"] = {said: bool(holds(before, after)) for said, holds in CLAIM.items()}
        self._keep()

    def _base(self) -> None:
        self._once("worlds", self._workshop.worlds)
        made = self._once("base", self._workshop.base)
        if "base" not in self.result:
            self.result["base"] = {"made": made, **self._measure("base")}
            self._keep()
        self.result["funnel"] = self._once("rows", lambda: self._workshop.stage1_rows("rows"))

    def _measure(self, model: str) -> dict[str, Any]:
        measured: dict[str, Any] = self._once(f"evaluate {model}", lambda: self._workshop.evaluate(model))
        return measured

    def _once(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        was_done = self._workshop.is_done(name)
        found = self._workshop.once(name, work)
        if not was_done:
            self.result.setdefault("cpu_seconds", {})[name] = round(time.process_time() - started, 1)
        return found

    def _train(self) -> dict[str, list[float]]:
        folder = self._workshop.folder
        words = {
            "config": "miniature/pretrained_stage1",
            "model_name_or_path": folder / "base",
            "dataset_name": folder / "rows",
            "output_dir": folder / "stage1",
            "resume_from_checkpoint": "true",
            "seed": self._workshop.settings.seed,
        }
        trainer = load_recipe("stage1").main(
            [word for option, value in words.items() for word in (f"--{option}", str(value))]
        )
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        names = [name for name in ("loss", "rewards/accuracies", "rewards/margins") if name in logs[0]]
        return {name: [entry[name] for entry in logs] for name in names}


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine, seeds, settings = results["machine"], results["seeds"], settings_of(0)
    done = [seed for seed, result in seeds.items() if "claim" in result]
    text = [
        "# The method on a pretrained language model",
        "",
        f"{next(iter(seeds.values()))['base']['made']['language_model']} learns to see one clip and two of the "
        "miniature's world, then Stage 1 is done on rows of its own answers. Percent of right answers by number of "
        "clips; an answer is right if it is the whole sentence, to the letter. Settings and claim were fixed before "
        "these seeds were run.",
    ]
    missing = [str(seed) for seed in results["wanted"] if str(seed) not in done]
    if missing:
        text += ["", f"**Not complete: Stage 1 of seeds {', '.join(missing)} has not been run.**"]
    for place, title, lengths in (
        ("one clip", f"{settings.questions_per_length} questions a length, chance 12.5 %", settings.lengths),
        ("two clips", f"{settings.pair_questions_per_length} questions a length, chance 1.8 %", settings.pair_lengths),
    ):
        text += ["", f"## Questions about {place} ({title})", ""]
        text += ["| seed | | " + " | ".join(map(str, lengths)) + " |", "|---|---|" + "---:|" * len(lengths)]
        for seed, result in seeds.items():
            for name, label in (("base", "base"), ("stage1", "Stage 1")):
                if name in result:
                    measured = result[name] if place == "one clip" else result[name]["pairs"]
                    cells = " | ".join(f"{percent:.1f}" for percent in measured["accuracy"].values())
                    text.append(f"| {seed if name == 'base' else ''} | {label} | {cells} |")
    text += ["", "## The claim", "", "| | " + " | ".join(f"seed {seed}" for seed in done) + " |"]
    text.append("|---|" + "---|" * len(done))
    for said in CLAIM:
        cells = ["holds" if seeds[seed]["claim"][said] else "**fails**" for seed in done]
        text.append(f"| {said} | " + " | ".join(cells) + " |")
    text += [
        "",
        "## Where and how",
        "",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['platform']}",
        f"- versions: {', '.join(f'{name} {number}' for name, number in results['versions'].items())}",
        f"- `{results['command']}`",
        *(f"- {remark}" for remark in results["remarks"]),  # written into the JSON file by hand
        "- CPU seconds of each part, one thread, other work beside:",
        "",
        "| part | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---|" + "---:|" * len(seeds),
    ]
    for part in dict.fromkeys(part for result in seeds.values() for part in result["cpu_seconds"]):
        cells = [
            f"{result['cpu_seconds'][part]:.0f}" if part in result["cpu_seconds"] else "–" for result in seeds.values()
        ]
        text.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join([*text, ""])


def main() -> None:
    """Runs what is not known yet, and writes the results after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[61, 62, 63, 64, 65])
    parser.add_argument("--work", type=Path, default=Path("runs/pretrained-claim"), help="Folder of the runs.")
    parser.add_argument("--output", type=Path, default=RESULTS / "pretrained", help="Folder and stem of the results.")
    args = parser.parse_args()
    path = args.output.with_suffix(".json")
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = earlier.get("seeds", {})
    results: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()},
        "versions": {n: version(n) for n in ("longvpo-hf", "torch", "transformers", "trl", "peft", "torchcodec")},
        "command": f"python benchmarks/pretrained.py --seeds {' '.join(map(str, args.seeds))}",
        "wanted": args.seeds,
        "settings": asdict(settings_of(0)),
        "remarks": earlier.get("remarks", []),
        "seeds": known,
    }

    def keep() -> None:
        write_json(path, results)
        args.output.with_suffix(".md").write_text(report(results), encoding="utf-8")

    with one_thread():
        for seed in args.seeds:
            Seed(args.work / f"seed-{seed}", seed, known.setdefault(str(seed), {}), keep).run()
    print(report(results))


if __name__ == "__main__":
    main()
