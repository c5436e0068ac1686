"""What each part of the method does, in the miniature's world: one command, one table.

    python recipes/ablations.py --seeds 31 32 33
    python recipes/ablations.py --fast --work runs/ablations-fast --output runs/ablations-fast/ablations

Every arm is trained by the recipes themselves, with `configs/miniature/stage1.yaml` and what the arm changes of it, on
a base that all arms of a seed share. Kept in `benchmarks/results/ablations.{json,md}`. A killed run goes on where it
was: rows, models and scores are made once per folder. About 25 minutes a seed on one quiet core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

import stage1
import temporal
from longvpo_hf import LongVPOTrainer, Timeline, VideoPreference
from longvpo_hf.builders.anchored import AnchoredSettings, build_anchored
from longvpo_hf.builders.captioning import CaptionedVideo
from longvpo_hf.builders.temporal import TemporalSettings, build_temporal
from longvpo_hf.hub import DatasetWriter, dataset_card
from longvpo_hf.miniature.asking import Describer
from longvpo_hf.miniature.demo import Demo, DemoSettings, one_thread, processor_name
from longvpo_hf.miniature.model import MAX_ANSWER_TOKENS
from longvpo_hf.miniature.world import CAPTION_QUESTION, question, read_world
from longvpo_hf.preference import undecoded
from longvpo_hf.responders import LocalResponder, Request, ScriptedResponder

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "recipes" / "configs" / "miniature" / "stage1.yaml"

Rows = Literal["dataset", "unfiltered", "single", "single-first", "localized", "comprehensive"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: Folder of its model.
        label: What it is in the table.
        rows: What it is trained on, see `ROWS`; `dataset` are the demo's.
        options: What it changes of `CONFIG`.
        main: The recipe.
    """

    name: str
    label: str
    rows: Rows = "dataset"
    options: tuple[str, ...] = ()
    main: Callable[[Sequence[str]], LongVPOTrainer] = stage1.main


FULL = ("--reference", "full")
ALONE = ("--beta", "1.0", "--sft_weight", "0.0")

#: What is asked, and the arms that answer it. An arm may stand under several questions.
QUESTIONS: dict[str, tuple[Arm, ...]] = {
    "What the reference model sees, with DPO + SFT (β 0.1, α 1)": (
        Arm("anchored", "the anchor"),
        Arm("full-reference", "the whole timeline", options=FULL),
    ),
    "What the reference model sees, with DPO alone (β 1, α 0)": (
        Arm("dpo-anchored", "the anchor", options=ALONE),
        Arm("dpo-full-reference", "the whole timeline", options=(*FULL, *ALONE)),
    ),
    "Which loss": (
        Arm("anchored", "DPO + SFT"),
        Arm("dpo-anchored", "DPO alone", options=ALONE),
        Arm("sft", "SFT alone", options=("--loss_type", "sft")),
    ),
    "The similarity filter": (
        Arm("anchored", "on"),
        Arm("unfiltered", "off", rows="unfiltered"),
    ),
    "Questions per timeline, at equal numbers of pairs": (
        Arm("anchored", "four"),
        Arm("single", "one", rows="single"),
    ),
    "Where the anchor stands (one question per timeline)": (
        Arm("single", "everywhere alike", rows="single"),
        Arm("single-first", "always first", rows="single-first"),
    ),
    "Temporal preferences (reference on the whole timeline)": (
        Arm("localized", "localized", rows="localized", options=FULL, main=temporal.main),
        Arm("comprehensive", "comprehensive", rows="comprehensive", options=FULL, main=temporal.main),
    ),
}

ARMS = {arm.name: arm for arms in QUESTIONS.values() for arm in arms}


def settings(seed: int, fast: bool) -> DemoSettings:
    """The demo's own, without its longest evaluation."""
    if fast:
        return replace(DemoSettings.fast(seed), steps=2, lengths=(2, 8), questions_per_length=8)
    return replace(DemoSettings(seed), lengths=(1, 2, 8, 16, 32))


# ----------------------------------------------------------------------------------------------------- rows


def make_rows(demo: Demo, rows: Rows) -> Any:
    """Makes what `ROWS` names in the demo's folder, once; gives the builder's funnel."""
    if rows == "dataset":
        return demo.rows()
    return demo.phase(f"rows {rows}", lambda: ROWS[rows](demo, rows_folder(demo, rows)))


def rows_folder(demo: Demo, rows: Rows) -> Path:
    """Where rows lie; arms may have their names."""
    return demo.output / "dataset" if rows == "dataset" else demo.output / "rows" / rows


def _unfiltered(demo: Demo, output: Path) -> Any:
    return _anchored(demo, output, questions_per_timeline=4, filtered=False)


def _single(demo: Demo, output: Path) -> Any:
    return _anchored(demo, output, questions_per_timeline=1, filtered=True)


def _anchored(demo: Demo, output: Path, questions_per_timeline: int, filtered: bool) -> Any:
    """As the demo makes its rows, but for these two."""
    responder = _responder(demo)
    describer = Describer(responder)
    wanted = AnchoredSettings(
        num_rows=demo.settings.num_rows,
        max_clips=demo.settings.max_clips,
        questions_per_timeline=questions_per_timeline,
        seed=demo.settings.seed,
    )
    clips = [replace(item.clip, caption="") for item in read_world(demo.output / "world" / "stage1")]
    return build_anchored(clips, describer, responder, output, wanted, describer.embed if filtered else None)


def _single_first(demo: Demo, output: Path) -> Any:
    """The rows of `single` with the anchor moved to the begin."""
    make_rows(demo, "single")
    rows = undecoded(
        load_dataset(str(rows_folder(demo, "single")), split="train", cache_dir=str(demo.output / "cache"))
    )
    with DatasetWriter(output) as writer:
        for row in rows:
            given = VideoPreference.from_row(row)
            (anchor,) = given.evidence
            clips = given.timeline.clips
            timeline = Timeline((clips[anchor], *clips[:anchor], *clips[anchor + 1 :]))
            writer.add(replace(given, timeline=timeline, evidence=(0,), reference=(0,), id=""))
        card = dataset_card("Anchors first", "longvpo-stage1", writer.num_rows, {"stages": {}, "dropped": {}}, {})
        writer.write_card(card)
        return {"rows": writer.num_rows}


def _localized(demo: Demo, output: Path) -> Any:
    return _temporal(demo, output, "localized")


def _comprehensive(demo: Demo, output: Path) -> Any:
    return _temporal(demo, output, "comprehensive")


def _temporal(demo: Demo, output: Path, mode: Literal["localized", "comprehensive"]) -> Any:
    """Temporal preferences about timelines like those of Stage 1, captioned by the base, four questions each."""
    responder = _responder(demo)
    clips = [item.clip for item in read_world(demo.output / "world" / "stage1")]
    captions = responder.respond([Request(CAPTION_QUESTION, Timeline((clip,))) for clip in clips])
    captioned = [replace(clip, caption=caption) for clip, caption in zip(clips, captions, strict=True)]
    rng = np.random.default_rng(demo.settings.seed)
    videos = []
    for _ in range(-(-demo.settings.num_rows // 4)):
        length = int(rng.integers(2, demo.settings.max_clips + 1))
        order = (captioned[i] for i in rng.permutation(len(captioned)))
        distinct = {clip.caption.partition(" ")[0]: clip for clip in order}  # no marker twice, as the filter sees to
        members = list(distinct.values())
        videos.append(CaptionedVideo(Timeline(tuple(members[int(i)] for i in rng.permutation(len(members))[:length]))))
    writer = ScriptedResponder("template", _ask_about_a_marker)
    wanted = TemporalSettings(mode=mode, num_rows=demo.settings.num_rows, seed=demo.settings.seed)
    return build_temporal(videos, writer, responder, output, wanted)


def _ask_about_a_marker(request: Request) -> str:
    """Writes a question from captions, as a language model would: about one of the clips they tell of."""
    markers = re.findall(r"([a-z]+-[a-z]+) , ", request.text)
    if not markers:
        return json.dumps({"question": None})
    drawn = int(hashlib.sha256(request.text.encode()).hexdigest(), 16) % len(markers)
    return json.dumps({"question": question(markers[drawn])})


ROWS: dict[Rows, Callable[[Demo, Path], Any]] = {
    "unfiltered": _unfiltered,
    "single": _single,
    "single-first": _single_first,
    "localized": _localized,
    "comprehensive": _comprehensive,
}


def _responder(demo: Demo) -> LocalResponder:
    """The seed's base."""
    base = demo.output / "base"
    model, processor = AutoModelForImageTextToText.from_pretrained(base).eval(), AutoProcessor.from_pretrained(base)
    return LocalResponder(model, processor, demo.sampler, MAX_ANSWER_TOKENS, batch_size=64, name="miniature-base")


# ------------------------------------------------------------------------------------------------- training


def train(demo: Demo, arm: Arm) -> dict[str, float]:
    """Trains the arm by its recipe, into its folder; gives the last log."""

    def work() -> dict[str, float]:
        output = demo.output / arm.name
        words = ["--config", str(CONFIG), "--model_name_or_path", str(demo.output / "base")]
        words += ["--dataset_name", str(rows_folder(demo, arm.rows)), "--output_dir", str(output)]
        words += ["--max_steps", str(demo.settings.steps), "--seed", str(demo.settings.seed)]
        trainer = arm.main([*words, "--resume_from_checkpoint", "true", *arm.options])
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        logs = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry]
        names = ("loss", "loss/sft", "rewards/accuracies", "rewards/margins", "logps_per_token/chosen")
        return {name: logs[-1][name] for name in names if name in logs[-1]} if logs else {}

    return demo.phase(f"train {arm.name}", work)


def run_seed(folder: Path, seed: int, fast: bool, names: Sequence[str]) -> dict[str, Any]:
    """Accuracies of the base and of each arm at one seed."""
    demo = Demo(folder, settings(seed, fast))
    demo.worlds()
    demo.base()
    result: dict[str, Any] = {"base": demo.evaluate("base"), "arms": {}}
    for name in names:
        arm = ARMS[name]
        funnel = make_rows(demo, arm.rows)
        log = train(demo, arm)
        result["arms"][name] = {"funnel": funnel, "log": log, **demo.evaluate(name)}
    result["seconds"] = demo.seconds()
    return result


# -------------------------------------------------------------------------------------------------- results


def report(results: dict[str, Any]) -> str:
    """The results as Markdown: mean and standard deviation over the seeds."""
    seeds, machine = list(results["seeds"].values()), results["machine"]
    lengths = [str(length) for length in results["lengths"]]
    text = [
        "# Ablations in the miniature's world",
        "",
        f"Percent of right answers by number of clips, {results['questions_per_length']} questions a length, chance "
        f"12.5 %; mean and standard deviation over the seeds {', '.join(results['seeds'])}. All arms of a seed begin "
        "with the same base, see as many pairs in as many steps, and are trained by `recipes/`.",
        "",
    ]
    if results["fast"]:
        text += ["**A run with `--fast`: its numbers mean nothing.**", ""]
    header = ["| | " + " | ".join(lengths) + " |", "|---|" + "---:|" * len(lengths)]

    def line(label: str, measured: Sequence[dict[str, Any]]) -> str:
        cells = []
        for length in lengths:
            values = [each["accuracy"][length] for each in measured]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        return f"| {label} | " + " | ".join(cells) + " |"

    text += ["## Before training", "", *header, line("base", [seed["base"] for seed in seeds]), ""]
    for asked, arms in QUESTIONS.items():
        done = [arm for arm in arms if all(arm.name in seed["arms"] for seed in seeds)]
        if done:
            text += [f"## {asked}", "", *header]
            text += [line(arm.label, [seed["arms"][arm.name] for seed in seeds]) for arm in done]
            text.append("")
    return "\n".join(
        [
            *text,
            "## Where and how",
            "",
            f"- {machine['processor']}, {machine['cores']} cores, {machine['platform']}; one thread",
            f"- versions: {', '.join(f'{name} {number}' for name, number in results['versions'].items())}",
            f"- `{results['command']}`",
            "- seconds of each phase, other work running beside, stand in the JSON file",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the seeds and writes the results after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[31, 32, 33])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="Default: all.")
    parser.add_argument("--fast", action="store_true", help="Few steps, to see it run; its numbers mean nothing.")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="Folder of the runs.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "ablations",
                        help="Of the results, without .json and .md.")  # fmt: skip
    args = parser.parse_args(argv)
    used = settings(0, args.fast)
    seeds, fast = " ".join(map(str, args.seeds)), " --fast" if args.fast else ""
    results: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()},
        "versions": {n: version(n) for n in ("longvpo-hf", "torch", "transformers", "trl", "datasets", "torchcodec")},
        "command": f"python recipes/ablations.py --seeds {seeds}{fast}",
        "fast": args.fast,
        "lengths": list(used.lengths),
        "questions_per_length": used.questions_per_length,
        "seeds": {},
    }
    with one_thread():
        for seed in args.seeds:
            results["seeds"][str(seed)] = run_seed(args.work / f"seed-{seed}", seed, args.fast, args.arms)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            for suffix, text in ((".json", json.dumps(results, indent=1) + "\n"), (".md", report(results))):
                args.output.with_suffix(suffix).write_text(text, encoding="utf-8")
    print(report(results))
    return results


if __name__ == "__main__":
    main()
