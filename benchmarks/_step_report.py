"""What `trainer_step.py` measured, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from _arms import ARMS, MODES, WITHOUT_AND_WITH
from _internvl import CHOSEN_TOKENS, MAX_CLIPS, REJECTED_TOKENS, SCALES


@dataclass(frozen=True)
class Targets:
    """The issue's targets, for one pair per timeline if nothing else is said."""

    device: str

    def rows(self, ratios: dict[str, Any]) -> list[tuple[str, str, float | None, bool | None]]:
        """Name, bound, what was reached and whether that is enough."""
        time_bound = 2.5 if self.device == "cuda" else 2.3
        one, four, control = (ratios.get(arm, {}) for arm in ("all", "all-4", "stock-equal"))

        def against_control(arm: dict[str, float], figure: str) -> float | None:
            return arm[figure] / control[figure] if figure in arm and figure in control else None

        wanted: list[tuple[str, Callable[[float, float], bool], float, float | None]] = [
            ("FLOPs, stock over ours", float.__ge__, 2.5, one.get("flops")),
            ("step time, stock over ours", float.__ge__, time_bound, one.get("seconds")),
            ("… stock on answers of equal length", float.__ge__, time_bound, against_control(one, "seconds")),
            ("peak memory, ours over stock", float.__le__, 0.55, one.get("peak")),
            ("… stock on answers of equal length", float.__le__, 0.55, against_control(one, "peak")),
            ("step time, anchor reference only over everything on", float.__ge__, 1.8, ratios.get("anchor_over_all")),
            ("step time per pair, four pairs of a timeline", float.__ge__, 9.0, four.get("seconds")),
            ("… stock on answers of equal length", float.__ge__, 9.0, against_control(four, "seconds")),
        ]
        return [
            (name, ("≥" if holds is float.__ge__ else "≤") + f" {bound}", value, value and holds(value, bound))
            for name, holds, bound, value in wanted
        ]


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    text = [
        f"# One training step on {results['settings']['device']}",
        "",
        *_SETTING.format(**results["settings"], **_shape(results)).splitlines(),
        "",
        *_tree_lines(results),
        *_added_lines(results),
        *(_stock_lines(results) if "stock" in results["settings"]["arms"] else []),
        "## Measured",
        "",
        "Seconds: median of the steps after a warm-up step [fastest – slowest]. Peak: the median step's, above what "
        "was held before it. TFLOP: of a step, reference and backward pass included.",
        "",
        "| visual tokens | mode | arm | steps | seconds | CPU s | peak MB | saved MB | TFLOP | of peak | collation s |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in results["runs"]:
        text += [_measured_line(run, arm, results["matmul_flops_per_second"]) for arm in run["arms"]]
    text += ["", *_HOW.splitlines(), "", *_profile_lines(results), "", "## Where", ""]
    text += [
        f"- {machine['device']}, {machine['cores']} cores, {machine['platform']}; load average "
        f"{machine['load_before']} before and {machine['load_after']} after; threads: {results['settings']['threads']}",
        f"- best matrix product in {SCALES[results['settings']['scale']].dtype}: "
        f"{results['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s",
        f"- versions: {', '.join(f'{name} {number}' for name, number in results['versions'].items())}",
        f"- `{results['command']}`, {results['minutes']:.0f} minutes",
        "",
    ]
    return "\n".join(text)


def _tree_lines(results: dict[str, Any]) -> list[str]:
    """What trees alone save: the same trainer, reference and rows without them and with them."""
    if not any(run["ratios"]["without_over_with"] for run in results["runs"]):
        return []
    text = [
        "## Trees",
        "",
        "Ours without trees over ours with them, all else equal, by the pairs in a step: CPU time, and peak memory.",
        "",
        "| visual tokens | mode | time, one pair | time, four pairs | memory, one pair | memory, four pairs |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for run in results["runs"]:
        found = [run["ratios"]["without_over_with"].get(str(pairs), {}) for pairs in WITHOUT_AND_WITH]
        cells = [_times(ratio.get(figure)) for figure in ("cpu_seconds", "peak_bytes") for ratio in found]
        text.append(f"| {run['size']} | {run['mode']} | " + " | ".join(cells) + " |")
    return [*text, ""]


def _added_lines(results: dict[str, Any]) -> list[str]:
    """What further terms cost beside DPO + SFT."""
    runs = [run for run in results["runs"] if run["ratios"].get("added_over_all")]
    if not runs:
        return []
    text = [
        "## Further terms of the loss",
        "",
        "A step with the term over one without, DPO + SFT in both.",
        "",
        "| visual tokens | mode | term | CPU time | peak memory | FLOPs |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for run in runs:
        for arm, found in run["ratios"]["added_over_all"].items():
            cells = " | ".join(_times(found[figure]) for figure in ("cpu_seconds", "peak_bytes", "flops"))
            text.append(f"| {run['size']} | {run['mode']} | {ARMS[arm].added} | {cells} |")
    return [*text, ""]


def _stock_lines(results: dict[str, Any]) -> list[str]:
    """Each arm against stock TRL, and the targets."""
    text = [
        "## Ratios",
        "",
        "Time and FLOPs are stock over ours, **per pair** (higher is better); memory is ours over stock, **of a "
        "step**, which with four pairs per timeline holds four pairs (lower is better).",
        "",
        "| visual tokens | mode | arm | time | CPU time | FLOPs | peak memory | saved for backward |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in results["runs"]:
        for arm in run["arms"]:
            if arm == "stock":
                continue
            found = run["ratios"][arm]
            cells = [_times(found.get(name)) for name in ("seconds", "cpu_seconds", "flops", "peak", "saved")]
            text.append(f"| {run['size']} | {run['mode']} | {ARMS[arm].title} | " + " | ".join(cells) + " |")
    return [*text, "", *_target_lines(results), ""]


_SETTING = """\
An InternVL of random weights ({parameters:.3g} parameters, {dtype}, scale `{scale}`), {tokens_per_frame} visual tokens
a frame, a timeline of at most {max_clips} clips of which the anchored reference sees one; answers of {chosen_tokens}
and {rejected_tokens} tokens. Same weights, frames, pairs and threads in all arms. Each of the four pairs of a timeline
is about another clip, so their references share nothing."""

_HOW = """\
- FLOPs are torch's counter over one warm-up step, by the same formulas in all arms: attention counts as full squares
  even where a kernel is told it is causal and skips half. The share of the matrix-product peak takes those halves off.
- Stock TRL puts answers of unequal length side by side, padded; transformers then gives the attention a dense mask
  [2, 1, L, L] and no kernel skips anything. Ours attends along the trunk causally, without a mask. What that difference
  makes is seen beside "stock TRL, answers of equal length", where no mask is needed: two answers that happen to be of
  one length (measured in the first mode only). In a model of more heads a mask weighs less in time.
- TRL's fused LM head scores only the answers' tokens on a GPU, and every position elsewhere, for stock and ours alike.
  The small model's vocabulary is small, so that its head is no larger a part of it than the 8B model's is.
- Collation: decoding the mp4s and the model's processor, the first time. Stock TRL reads no videos; it is given the
  same frames, decoded by our sampler.
- Peak memory on a CPU is the resident set's highest mark, reset before each step, in a process that does nothing else;
  on a GPU what the allocator gave out. Weights, optimizer state and the batch are held before it and not counted; the
  batch of stock holds every frame twice, "anchor reference only" makes the second copy in the step. Saved for backward:
  bytes of all distinct storages that autograd keeps when the loss is reached, weights left out, whatever the
  allocator; under checkpointing without what is recomputed.
- LoRA: rank 16 on the language model's linear layers. "everything on" also freezes the vision tower there."""


def _shape(results: dict[str, Any]) -> dict[str, Any]:
    scale = SCALES[results["settings"]["scale"]]
    known = [
        result["parameters"] for run in results["runs"] for result in run["arms"].values() if "parameters" in result
    ]
    return {
        "dtype": scale.dtype,
        "tokens_per_frame": scale.tokens_per_frame,
        "max_clips": MAX_CLIPS,
        "chosen_tokens": CHOSEN_TOKENS,
        "rejected_tokens": REJECTED_TOKENS,
        "parameters": float(known[0]) if known else math.nan,
    }


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def largest(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of the largest size."""
    size = max(run["size"] for run in results["runs"])
    return [run for run in results["runs"] if run["size"] == size]


def _target_lines(results: dict[str, Any]) -> list[str]:
    runs = largest(results)
    tables = [Targets(results["settings"]["device"]).rows(run["ratios"]) for run in runs]
    text = [
        f"## Targets, at {runs[0]['size']} visual tokens",
        "",
        "They were set for 16k tokens. **Bold**: missed, with how far it is from the target.",
        "",
        "| | target | " + " | ".join(run["mode"] for run in runs) + " |",
        "|---|---|" + "---:|" * len(runs),
    ]
    for lines in zip(*tables, strict=True):
        name, bound = lines[0][:2]
        target = float(bound.split()[1])
        cells = [
            _times(value) if value is None or enough else f"**{value:.2f}** ({value / target - 1:+.0%})"
            for _, _, value, enough in lines
        ]
        text.append(f"| {name} | {bound} | " + " | ".join(cells) + " |")
    tokens = runs[0]["arms"].get("all", {}).get("tokens")
    ceilings = " | ".join(MODES[run["mode"]].ceiling for run in runs)
    return [
        *text,
        f"| most that one pair can reach where linear layers dominate | | {ceilings} |",
        "",
        "The last line, in forwards of one sequence: a backward pass is two more (with adapters alone one), "
        "checkpointing one forward more; stock scores two sequences and twice the reference, ours one trunk. Where "
        "attention dominates, its backward is 2.5 forwards: 2.57, and 2.44 with checkpointing. Branches and the "
        "anchor's forward come off that" + (f": a pair is {_counted(tokens)}." if tokens else "."),
    ]


def _counted(tokens: dict[str, int]) -> str:
    return (
        f"{tokens['prompt']} tokens of prompt, {tokens['answers']} of answers and {tokens['reference']} of the "
        "reference's prompt"
    )


def _measured_line(run: dict[str, Any], arm: str, peak: float) -> str:
    result = run["arms"][arm]
    head = f"| {run['size']} | {run['mode']} | {ARMS[arm].title} | "
    if "failed" in result:
        return head + f"{result['failed']} |" + " – |" * 7
    steps = result["steps"]
    seconds = [step["seconds"] for step in steps]
    middle = median(seconds)
    return head + " | ".join(
        [
            str(len(steps)),
            f"{middle:.3g} [{min(seconds):.3g} – {max(seconds):.3g}]",
            f"{median(step['cpu_seconds'] for step in steps):.3g}",
            f"{median(step['peak_bytes'] for step in steps) / 1e6:.0f}",
            f"{result['saved_bytes'] / 1e6:.0f}",
            f"{result['flops'] / 1e12:.3g}",
            f"{(result['flops'] - result['flops_causal_skips']) / middle / peak:.0%}",
            f"{result['collation_seconds']:.2f} |",
        ]
    )


def _profile_lines(results: dict[str, Any]) -> list[str]:
    for run in largest(results):
        operators = run["arms"]["all"].get("profile")
        if operators:
            return [
                f"## Where the time of “{ARMS['all'].title}” goes ({run['size']} tokens, {run['mode']})",
                "",
                "| operator | calls | share of the step |",
                "|---|---:|---:|",
                *(f"| `{o['operator']}` | {o['calls']} | {o['share']:.1%} |" for o in operators),
            ]
    return []
