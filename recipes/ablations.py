"""What each part of the method does, in a small world: one command, one table.

    python recipes/ablations.py --seeds 51 52 53
    python recipes/ablations.py --seeds 71 72 73 74 75 --arms anchored sft distilled dpo-distilled sampled \\
        anchored-wrong sft-wrong distilled-wrong dpo-distilled-wrong --output benchmarks/results/distillation
    python recipes/ablations.py --world pretrained --seeds 61 62 63 --output benchmarks/results/pretrained_ablations
    python recipes/ablations.py --fast --work runs/ablations-fast --output runs/ablations-fast/ablations

Every arm is trained by the recipes themselves, with the configurations of `configs/miniature/` and what the arm changes
of them, on a base that all arms of a seed share; `--world pretrained` has the base and the configurations of
`longvpo run pretrained`. A killed run goes on where it was: rows, models and scores are made once per folder. In the
miniature's world about half an hour a seed on one quiet core, in the other 20 minutes an arm and seed, in 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import yaml

from longvpo_hf import Timeline, VideoPreference, papers
from longvpo_hf.launch import load_recipe
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.miniature.asking import Describer
from longvpo_hf.miniature.evaluation import PAIR_CHANCE_PERCENT
from longvpo_hf.miniature.machine import one_thread, processor_name
from longvpo_hf.miniature.settings import MiniatureSettings
from longvpo_hf.miniature.temporal import temporal_rows
from longvpo_hf.miniature.workshop import Workshop
from longvpo_hf.publishing.dataset import DatasetWriter
from longvpo_hf.record import DatasetRecord, MethodRecord
from longvpo_hf.training.checkpoints import last_whole_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "recipes" / "configs" / "miniature"

World = Literal["miniature", "pretrained"]
#: Whose numbers the tables speak of.
WORLDS: dict[World, str] = {
    "miniature": "the miniature's world",
    "pretrained": "the miniature's world, with a pretrained language model",
}

Rows = Literal[
    "dataset",
    "unfiltered",
    "single",
    "single-first",
    "wrong",
    "half",
    "tenth",
    "localized",
    "comprehensive",
    "stage2",
    "stage2-of-base",
]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: Folder of its model.
        label: What it is in the table.
        rows: What it is trained on, see `ROWS`; `dataset` are the demo's Stage-1 rows.
        options: What it changes of the configuration.
        recipe: Which recipe trains it, with the world's configuration of that.
        start: Folder of the model it begins with, and whose reference it has.
        replay: Whether rows of Stage 1 are mixed in.
        cpu_time_of: Arm whose CPU time it is to take: as many steps more or less as its own twin, the arm without
            "-timed" in its name, took per step. None for as many steps as all.
    """

    name: str
    label: str
    rows: Rows = "dataset"
    options: tuple[str, ...] = ()
    recipe: Literal["stage1", "stage2", "temporal"] = "stage1"
    start: str = "base"
    replay: bool = False
    cpu_time_of: str | None = None


FULL = ("--reference", "full")
ALONE = ("--beta", "1.0", "--sft_weight", "0.0")
DISTILLED = ("--view_distillation_weight", "1.0")
SFT = ("--loss_type", "sft")
#: The weight is 1 everywhere, as that of SFT; nothing was tuned. Sampled answers have no scores before they are drawn.
SAMPLED = (*DISTILLED, "--view_distillation_on", "sampled", "--precompute_ref_log_probs", "false")

#: What the chosen answer is used for; fixed, with the seeds 71 to 75, before any of them was run.
DISTILLATION = (
    Arm("anchored", "DPO + SFT"),
    Arm("sft", "SFT alone", options=SFT),
    Arm("distilled", "view distillation alone", options=(*SFT, "--sft_weight", "0.0", *DISTILLED)),
    Arm("dpo-distilled", "DPO + view distillation", options=("--sft_weight", "0.0", *DISTILLED)),
    Arm("sampled", "view distillation alone, on sampled answers", options=(*SFT, "--sft_weight", "0.0", *SAMPLED)),
)


#: The term weighs as much as DPO, as in mDPO; nothing was tuned.
VIEWS = ("--view_preference_weight", "1.0")
VIEW_PREFERENCE = (
    Arm("anchored", "DPO + SFT"),
    Arm("sft-views", "SFT + view preference", options=(*SFT, *VIEWS)),
    Arm("dpo-sft-views", "DPO + SFT + view preference", options=VIEWS),
)


def _on(rows: Rows) -> tuple[Arm, ...]:
    return tuple(replace(arm, name=f"{arm.name}-{rows}", rows=rows) for arm in DISTILLATION)


def _in_equal_time(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    first, *others = arms
    return first, *(replace(arm, name=f"{arm.name}-timed", cpu_time_of=first.name) for arm in others)


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
        Arm("sft", "SFT alone", options=SFT),
    ),
    "What the anchored reference says of each token, at equal steps": (
        *DISTILLATION,
        Arm("anchored-distilled", "DPO + SFT + view distillation", options=DISTILLED),
    ),
    "The same, with a tenth of the chosen answers wrong": _on("wrong"),
    "The same, with a tenth of the rows": _on("tenth"),
    "The same, at the CPU time of DPO + SFT": _in_equal_time(DISTILLATION),
    "The chosen answer preferred to itself without its evidence, at equal steps": (
        *VIEW_PREFERENCE,
        Arm("sft", "SFT alone", options=SFT),
        Arm("views", "view preference alone", options=(*SFT, "--sft_weight", "0.0", *VIEWS)),
        Arm("dpo-anchored", "DPO alone (β 1)", options=ALONE),
        Arm("dpo-views", "DPO + view preference (β 1)", options=(*ALONE, *VIEWS)),
    ),
    "The same preference, at the CPU time of DPO + SFT": _in_equal_time(VIEW_PREFERENCE),
    "How many rows, in as many steps": (
        Arm("anchored", "all"),
        Arm("anchored-half", "half of them", rows="half"),
        Arm("anchored-tenth", "a tenth of them", rows="tenth"),
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
        Arm("localized", "localized", rows="localized", recipe="temporal"),
        Arm("comprehensive", "comprehensive", rows="comprehensive", recipe="temporal"),
    ),
}

STAGE2 = Arm("stage2", "after Stage 1", rows="stage2", recipe="stage2", start="anchored", replay=True)
QUESTIONS["Stage 2"] = (
    Arm("anchored", "Stage 1 alone"),
    STAGE2,
    # Without Stage 1 there are no rows of it to mix in.
    Arm("stage2-from-base", "without Stage 1", rows="stage2-of-base", recipe="stage2"),
    replace(
        STAGE2,
        name="stage2-evidence",
        label="after Stage 1, reference on the evidence scenes",
        options=("--reference", "anchor"),
    ),
)

ARMS = {arm.name: arm for arms in QUESTIONS.values() for arm in arms}


def settings(world: World, seed: int, fast: bool) -> MiniatureSettings:
    """The demo's own without its longest evaluation, or those of the claim of the pretrained language model."""
    if fast:
        short = replace(MiniatureSettings.fast(seed), steps=2, stage2_steps=2, lengths=(2, 8), pair_lengths=(2, 8))
        return replace(short, questions_per_length=8, pair_questions_per_length=8)
    if world == "pretrained":
        return replace(MiniatureSettings.pretrained(seed), questions_per_length=400, pair_questions_per_length=100)
    return replace(MiniatureSettings(seed), lengths=(1, 2, 8, 16, 32), pair_lengths=(2, 8, 16))


# ----------------------------------------------------------------------------------------------------- rows


def make_rows(workshop: Workshop, rows: Rows) -> Any:
    """Makes what `ROWS` names in the workshop's folder, once; gives the builder's funnel."""
    if rows == "dataset":
        return workshop.once("rows", lambda: workshop.stage1_rows("dataset"))
    if rows in ("stage2", "stage2-of-base"):
        workshop.once("stage2-captions", lambda: workshop.captions("stage2-captions"))
        # A language model that was trained on questions about one clip alone unlearns to answer about two.
        of_base = rows == "stage2-of-base" or bool(workshop.settings.language_model)
        folder, answerer = rows_folder(workshop, rows).name, "base" if of_base else STAGE2.start
        made = workshop.once(folder, lambda: workshop.stage2_rows(folder, "stage2-captions", answerer))
        return {**made["funnel"], "truth": made["truth"]}
    return workshop.once(f"rows {rows}", lambda: ROWS[rows](workshop, rows_folder(workshop, rows)))


def rows_folder(workshop: Workshop, rows: Rows) -> Path:
    """Where rows lie; arms may have their names."""
    return workshop.folder / "dataset" if rows == "dataset" else workshop.folder / f"rows-{rows}"


def _unfiltered(workshop: Workshop, output: Path) -> Any:
    return _anchored(workshop, output, questions_per_timeline=4, filtered=False)


def _single(workshop: Workshop, output: Path) -> Any:
    return _anchored(workshop, output, questions_per_timeline=1, filtered=True)


def _anchored(workshop: Workshop, output: Path, questions_per_timeline: int, filtered: bool) -> Any:
    """As the demo makes its rows, but for these two."""
    responder = workshop.responder("base")
    describer = Describer(responder, workshop.language)
    wanted = Stage1Settings(
        num_rows=workshop.settings.num_rows,
        max_clips=workshop.settings.max_clips,
        questions_per_timeline=questions_per_timeline,
        seed=workshop.settings.seed,
    )
    clips = [item.clip for item in workshop.world("stage1")]
    return build_stage1(clips, describer, responder, output, wanted, describer.embed if filtered else None)


def _single_first(workshop: Workshop, output: Path) -> Any:
    """The rows of `single` with the anchor moved to the begin."""
    make_rows(workshop, "single")
    rows = workshop.rows("rows-single")
    moved = []
    for row in rows:
        given = VideoPreference.from_row(row)
        (anchor,) = given.evidence
        clips = given.timeline.clips
        timeline = Timeline((clips[anchor], *clips[:anchor], *clips[anchor + 1 :]))
        moved.append(replace(given, timeline=timeline, evidence=(0,), reference=(0,), id=""))
    return _write(moved, output, "Anchors first")


def _wrong(workshop: Workshop, output: Path) -> Any:
    """The demo's rows, a tenth of them with a chosen answer of another row, neither their own nor the rejected one."""
    rows, rng = _rows(workshop), random.Random(workshop.settings.seed)
    answers = sorted({row.chosen for row in rows})
    changed = set(rng.sample(range(len(rows)), round(len(rows) / 10)))
    for number in changed:
        row = rows[number]
        others = [answer for answer in answers if answer not in (row.chosen, row.rejected)]
        rows[number] = replace(row, chosen=rng.choice(others), id="")
    return _write(rows, output, "A tenth of the chosen answers wrong")


def _few(workshop: Workshop, output: Path, divisor: int) -> Any:
    rows = _rows(workshop)
    kept = random.Random(workshop.settings.seed).sample(rows, max(1, round(len(rows) / divisor)))
    return _write(kept, output, f"One of {divisor} rows")


def _rows(workshop: Workshop) -> list[VideoPreference]:
    make_rows(workshop, "dataset")
    return [VideoPreference.from_row(row) for row in workshop.rows("dataset")]


def _write(rows: Sequence[VideoPreference], output: Path, name: str) -> Any:
    with DatasetWriter(output) as writer:
        for row in rows:
            writer.add(row)
        writer.write_record(DatasetRecord(name, (MethodRecord("longvpo-stage1", citation=papers.LONGVPO),)))
        return {"rows": writer.num_rows}


ROWS: dict[Rows, Callable[[Workshop, Path], Any]] = {
    "unfiltered": _unfiltered,
    "single": _single,
    "single-first": _single_first,
    "wrong": _wrong,
    "half": partial(_few, divisor=2),
    "tenth": partial(_few, divisor=10),
    "localized": partial(temporal_rows, mode="localized"),
    "comprehensive": partial(temporal_rows, mode="comprehensive"),
}


# ------------------------------------------------------------------------------------------------- training


def train(workshop: Workshop, arm: Arm) -> dict[str, float]:
    """Trains the arm by its recipe, into its folder; gives the last log, the steps, and the CPU seconds of a step."""

    def work() -> dict[str, float]:
        output = workshop.folder / arm.name
        of_world = "pretrained_" if workshop.settings.language_model else ""
        given = yaml.safe_load((CONFIGS / f"{of_world}{arm.recipe}.yaml").read_text(encoding="utf-8"))
        given["model_name_or_path"] = str(workshop.folder / arm.start)
        given["dataset_name"] = str(rows_folder(workshop, arm.rows))
        given["output_dir"] = str(output)
        steps = workshop.settings.stage2_steps if arm.recipe == "stage2" else workshop.settings.steps
        if arm.cpu_time_of is not None:
            of_step = [train(workshop, ARMS[name])["cpu_seconds_per_step"] for name in (arm.cpu_time_of, _twin(arm))]
            steps = max(1, round(steps * of_step[0] / of_step[1]))
        given["max_steps"], given["seed"] = steps, workshop.settings.seed
        given["view_distillation_max_new_tokens"] = 2 * workshop.language.max_answer_tokens
        given["replay_name"] = str(rows_folder(workshop, "dataset")) if arm.replay else None
        config = workshop.folder / f"{arm.name}.yaml"
        config.write_text(yaml.safe_dump(given), encoding="utf-8")
        words = ["--config", str(config), "--resume_from_checkpoint", "true", *arm.options]
        begun = last_whole_checkpoint(output)
        done, started = (0 if begun is None else int(begun.name.partition("-")[2])), time.process_time()
        trainer = load_recipe(arm.recipe).main(words)
        per_step = (time.process_time() - started) / max(1, trainer.state.global_step - done)
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        logs = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry]
        names = (
            "loss",
            "loss/sft",
            "loss/view_distillation",
            "loss/view_preference",
            "rewards/accuracies",
            "rewards/margins",
            "rewards/view_accuracies",
            "logps_per_token/chosen",
        )
        last = {name: logs[-1][name] for name in names if name in logs[-1]} if logs else {}
        return {**last, "steps": trainer.state.global_step, "cpu_seconds_per_step": per_step}

    return workshop.once(f"train {arm.name}", work)


def _twin(arm: Arm) -> str:
    """The arm that is trained alike, but for as many steps as all."""
    return arm.name.removesuffix("-timed")


def run_seed(folder: Path, used: MiniatureSettings, names: Sequence[str], only_done: bool) -> dict[str, Any]:
    """Accuracies of the base and of each arm at one seed; with `only_done` of those that an earlier run finished."""
    workshop = Workshop(folder, used)
    workshop.once("worlds", workshop.worlds)
    workshop.once("base", workshop.base)
    result: dict[str, Any] = {"base": _measured(workshop, "base"), "arms": {}}
    for name in names:
        arm = ARMS[name]
        if only_done and not workshop.is_done(f"evaluate {name}"):
            continue
        if arm.cpu_time_of is not None:
            for other in (arm.cpu_time_of, _twin(arm)):
                make_rows(workshop, ARMS[other].rows)
        if arm.start != "base":
            make_rows(workshop, ARMS[arm.start].rows)
            train(workshop, ARMS[arm.start])
        funnel = make_rows(workshop, arm.rows)
        log = train(workshop, arm)
        result["arms"][name] = {"funnel": funnel, "log": log, **_measured(workshop, name)}
    result["seconds"] = workshop.seconds()
    return result


def _measured(workshop: Workshop, name: str) -> dict[str, Any]:
    measured: dict[str, Any] = workshop.once(f"evaluate {name}", lambda: workshop.evaluate(name))
    return measured


# -------------------------------------------------------------------------------------------------- results


def report(results: dict[str, Any]) -> str:
    """The results as Markdown: mean and standard deviation over the seeds."""
    seeds, machine = list(results["seeds"].values()), results["machine"]
    lengths = [str(length) for length in results["lengths"]]
    text = [
        f"# Ablations in {WORLDS[results['world']]}",
        "",
        f"Percent of right answers by number of clips, {results['questions_per_length']} questions a length, chance "
        f"12.5 %; mean and standard deviation over the seeds (of {', '.join(results['seeds'])}) that an arm was "
        "trained with. All arms of a seed begin with the same base, see as many pairs in as many steps but for those "
        "at equal CPU time, and are trained by `recipes/`.",
        "",
    ]
    if results["fast"]:
        text += ["**A run with `--fast`: its numbers mean nothing.**", ""]
    header = ["| | seeds | " + " | ".join(lengths) + " |", "|---|---:|" + "---:|" * len(lengths)]

    def line(label: str, measured: Sequence[dict[str, Any]], lengths: Sequence[str] = lengths) -> str:
        cells = []
        for length in lengths:
            values = [each["accuracy"][length] for each in measured]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        return f"| {label} | {len(measured)} | " + " | ".join(cells) + " |"

    def of(name: str) -> list[dict[str, Any]]:
        return [seed["arms"][name] for seed in seeds if name in seed["arms"]]

    text += ["## Before training", "", *header, line("base", [seed["base"] for seed in seeds]), ""]
    answered = {asked: [arm for arm in arms if of(arm.name)] for asked, arms in QUESTIONS.items()}
    compared = {arm.name for done in answered.values() if len(done) > 1 for arm in done}
    for asked, done in answered.items():
        if len(done) == 1 and done[0].name in compared:
            continue  # it stands beside others elsewhere
        if done:
            text += [f"## {asked}", "", *header, *[line(arm.label, of(arm.name)) for arm in done], ""]
    longest = settings(results["world"], 0, results["fast"]).max_clips
    for length in (length for length in lengths if int(length) >= longest):
        trained = ", the most of the training" if int(length) == longest else ", more than were trained on"
        text += [f"## Seed by seed, at {length} clips{trained}", ""]
        text += ["| arm | " + " | ".join(results["seeds"]) + " |", "|---|" + "---:|" * len(seeds)]
        for name in ("base", *ARMS):
            each = [seed["base"] if name == "base" else seed["arms"].get(name) for seed in seeds]
            if any(each):
                cells = " | ".join(f"{one['accuracy'][length]:.1f}" if one else "–" for one in each)
                text.append(f"| {name} | {cells} |")
        text.append("")
    pairs = list(seeds[0]["base"]["pairs"]["accuracy"])
    text += [f"## Questions about two clips, chance {PAIR_CHANCE_PERCENT:.1f} %", ""]
    text += ["| arm | seeds | " + " | ".join(pairs) + " |", "|---|---:|" + "---:|" * len(pairs)]
    text.append(line("base", [seed["base"]["pairs"] for seed in seeds], pairs))
    text += [line(name, [each["pairs"] for each in of(name)], pairs) for name in ARMS if of(name)]
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
            *(f"- {remark}" for remark in results["remarks"]),  # written into the JSON file by hand
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the seeds and writes the results after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=list(WORLDS), default="miniature", help="Default: miniature.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[51, 52, 53])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="Default: all.")
    parser.add_argument("--only-done", action="store_true", help="Run nothing; report what earlier runs finished.")
    parser.add_argument("--fast", action="store_true", help="Few steps, to see it run; its numbers mean nothing.")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="Folder of the runs.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "ablations",
                        help="Of the results, without .json and .md.")  # fmt: skip
    args = parser.parse_args(argv)
    if args.fast and args.world != "miniature":
        parser.error("--fast is for --world miniature: a language model that hardly learnt to see makes no rows.")
    used, earlier = settings(args.world, 0, args.fast), args.output.with_suffix(".json")
    seeds, fast = " ".join(map(str, args.seeds)), " --fast" if args.fast else ""
    world = "" if args.world == "miniature" else f" --world {args.world}"
    arms = "" if args.arms == list(ARMS) else f" --arms {' '.join(args.arms)}"
    results: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()},
        "versions": {n: version(n) for n in ("longvpo-hf", "torch", "transformers", "trl", "datasets", "torchcodec")},
        "command": f"python recipes/ablations.py{world} --seeds {seeds}{arms}{fast}",
        "world": args.world,
        "fast": args.fast,
        "lengths": list(used.lengths),
        "questions_per_length": used.questions_per_length,
        "remarks": json.loads(earlier.read_text(encoding="utf-8")).get("remarks", []) if earlier.exists() else [],
        "seeds": {},
    }
    with one_thread():
        for seed in args.seeds:
            folder = args.work / f"seed-{seed}"
            chosen = settings(args.world, seed, args.fast)
            results["seeds"][str(seed)] = run_seed(folder, chosen, args.arms, args.only_done)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            for suffix, text in ((".json", json.dumps(results, indent=1) + "\n"), (".md", report(results))):
                args.output.with_suffix(suffix).write_text(text, encoding="utf-8")
    print(report(results))
    return results


if __name__ == "__main__":
    main()
