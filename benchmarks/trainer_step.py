"""One training step of stock TRL and of `LongVPOTrainer`, side by side; kept in `benchmarks/results/trainer_step_*`.

    python benchmarks/trainer_step.py --sizes 1024 4096 16384 --modes full lora checkpointing --threads 1

Four arms on the same weights, frames, pairs and threads: stock TRL `DPOTrainer` (frames as images, reference on the
whole video); ours with nothing but the anchored reference; ours with everything on; the same with four pairs of one
timeline in a step. And a control: stock on two answers of equal length, which need no padding and so no attention mask.

Measured is the step on a collated batch: `training_step` (forward, reference, loss, backward) and the optimizer's step;
collation (decoding and the processor) is timed apart. Each size, mode and arm lives in a process of its own; on a CPU
those of a size and mode take turns, so that a noisy machine is noisy to all. Before anything is timed, all arms must
give one and the same loss on the same reference view, and in every configuration the policy's log-probabilities of the
three one-pair arms must agree.

    python benchmarks/trainer_step.py --model-scale hybrid --sizes 1024 4096 --modes full lora --steps 2

is about a text model whose layers are mostly linear attention: ours without trees and with them, one pair and four.

    python benchmarks/trainer_step.py --arms all distilled sampled views --sizes 1024 4096 --modes full lora \\
        --threads 1 --budget 12 --output benchmarks/results/view_terms_cpu

is about further terms beside DPO + SFT: view distillation on the chosen answer, and on one of as many tokens that is
sampled; the chosen answer preferred to itself on a view without its evidence.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _arms import ARMS, DEFAULT_ARMS, DEFAULT_MODES, MODES, WITHOUT_AND_WITH, Setup, losses, matmul_peak, serve
from _internvl import PAIRS, SCALES, write_rows
from _processes import Lane, one_answer, quiet
from _step_report import largest, report

from longvpo_hf.miniature.machine import processor_name

RESULTS = Path(__file__).parent / "results"


def check_losses(setup: Setup, arms: list[str], tolerance: float) -> dict[str, Any]:
    """The losses of the arms on the same reference view; they must agree with those of the first.

    Raises:
        RuntimeError: If they do not: what is timed would not be the same training.
    """
    same = replace(setup, reference="full", distinct_reference=True)
    found = {
        arm: one_answer(losses, replace(same, arm=arm))
        for arm in arms
        if not (ARMS[arm].equal_answers or ARMS[arm].added)
    }
    first = next(iter(found.values()))
    for arm, values in found.items():
        if first is None or values is None:  # out of memory
            continue
        expected = first if len(values) == len(first) else [sum(first) / len(first)] * len(values)
        far = [abs(value - other) / (1 + abs(other)) for value, other in zip(values, expected, strict=True)]
        if not max(far) <= tolerance:
            raise RuntimeError(
                f"{ARMS[arm].title} gives losses {values}, expected {expected} on the same reference view "
                f"({setup.size} tokens, {setup.mode}): relative difference {max(far):.2g}, bound {tolerance:g}. Timing "
                "them would compare different things."
            )
    return found


def check_log_probs(results: dict[str, Any], tolerance: float) -> None:
    """The policy's log-probabilities do not depend on the reference: those of the one-pair arms must agree.

    Raises:
        RuntimeError: If they do not.
    """
    comparable = [arm for arm in results if ARMS[arm].pairs == 1 and not ARMS[arm].equal_answers]
    values = {arm: results[arm]["log_probs"] for arm in comparable if "log_probs" in results[arm]}
    for arm, found in values.items():
        for value, expected in zip(found, next(iter(values.values())), strict=True):
            if not math.isclose(value, expected, rel_tol=tolerance):
                raise RuntimeError(f"{ARMS[arm].title}: policy log-probability {value}, expected {expected}.")


def measure(
    setups: dict[str, Setup], steps: int, budget_seconds: float, interleave: bool, profile: bool
) -> dict[str, Any]:
    """All arms of one size and mode, in turns; without `interleave` one after the other."""
    results: dict[str, Any] = {arm: {"steps": []} for arm in setups}
    groups = [list(setups)] if interleave else [[arm] for arm in setups]
    for group in groups:
        lanes = {}
        for arm in group:
            lanes[arm] = Lane(serve, setups[arm])
            results[arm].update(lanes[arm].ask("ready") or {})
        started = time.perf_counter()
        for arm, lane in lanes.items():
            results[arm].update(lane.ask("first") or {})
        round_seconds = time.perf_counter() - started
        for _ in range(min(steps, max(2, int(budget_seconds / round_seconds)))):
            for arm, lane in lanes.items():
                step = lane.ask("step")
                if step is not None:
                    results[arm]["steps"].append(step)
        if profile and "all" in lanes:
            results["all"]["profile"] = lanes["all"].ask("profile")
        for arm, lane in lanes.items():
            if lane.failed is not None:
                results[arm] = {"failed": lane.failed}
            lane.stop()
    return results


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """Each arm against stock: times and FLOPs per pair, stock over ours; memory of a step, ours over stock."""

    def middle(arm: str, figure: str) -> float:
        return median(step[figure] for step in results[arm]["steps"])

    found: dict[str, Any] = {arm: {} for arm in results}
    whole = [arm for arm, result in results.items() if "failed" not in result]
    if "stock" in whole:
        for arm in whole:
            pairs = ARMS[arm].pairs
            for figure in ("seconds", "cpu_seconds"):
                found[arm][figure] = pairs * middle("stock", figure) / middle(arm, figure)
            found[arm]["flops"] = pairs * results["stock"]["flops"] / results[arm]["flops"]
            found[arm]["peak"] = middle(arm, "peak_bytes") / middle("stock", "peak_bytes")
            found[arm]["saved"] = results[arm]["saved_bytes"] / results["stock"]["saved_bytes"]
    if "anchor" in whole and "all" in whole:
        found["anchor_over_all"] = middle("anchor", "seconds") / middle("all", "seconds")
    found["added_over_all"] = {
        arm: {figure: middle(arm, figure) / middle("all", figure) for figure in ("cpu_seconds", "peak_bytes")}
        | {"flops": results[arm]["flops"] / results["all"]["flops"]}
        for arm in whole
        if ARMS[arm].added and "all" in whole
    }
    found["without_over_with"] = {
        str(pairs): {
            figure: middle(without, figure) / middle(within, figure) for figure in ("cpu_seconds", "peak_bytes")
        }
        for pairs, (without, within) in WITHOUT_AND_WITH.items()
        if without in whole and within in whole
    }
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="Visual tokens. Default: 1024 4096 16384, on a GPU to 131072."
    )
    parser.add_argument("--modes", nargs="+", choices=list(MODES), help=f"Default: {DEFAULT_MODES}.")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help=f"Default: {DEFAULT_ARMS}.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model-scale", choices=list(SCALES), default="small")
    parser.add_argument("--steps", type=int, default=5, help="Timed steps.")
    parser.add_argument(
        "--budget",
        type=float,
        default=60.0,
        help="Seconds of timed steps per size and mode: fewer of them where they are slow, at least two.",
    )
    parser.add_argument(
        "--output", type=Path, help="Folder and stem of the results; default benchmarks/results/trainer_step_<device>."
    )
    args = parser.parse_args()
    args.sizes = sorted(args.sizes or [1024, 4096, 16384, *([32768, 65536, 131072] if args.device == "cuda" else [])])
    args.modes = args.modes or DEFAULT_MODES[args.model_scale]
    args.arms = args.arms or DEFAULT_ARMS[args.model_scale]
    hybrid = "_hybrid" if args.model_scale == "hybrid" else ""
    args.output = args.output or RESULTS / f"trainer_step_{args.device}{hybrid}"
    tokens = SCALES[args.model_scale].tokens_per_frame
    for size in args.sizes:
        if size % (PAIRS * tokens):
            parser.error(
                f"--sizes {size}: must be a multiple of {PAIRS * tokens} ({PAIRS} clips of {tokens}-token frames)"
            )
    return args


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else processor_name()


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


@contextlib.contextmanager
def _rows_of_sizes(args: argparse.Namespace) -> Iterator[dict[int, list[dict[str, Any]]]]:
    scale = SCALES[args.model_scale]
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for size in args.sizes:
            path = Path(folder) / str(size)
            path.mkdir()
            rows[size] = write_rows(path, size // scale.tokens_per_frame, scale.frame_px)
        yield rows


def run(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Checks and measures everything asked for; `save` is given the results after each size and mode."""
    started = time.time()
    scale = SCALES[args.model_scale]
    tolerance = 1e-5 if scale.dtype == "float32" else 3e-2
    with _rows_of_sizes(args) as rows:
        smallest, largest = args.sizes[0], args.sizes[-1]

        def setup(size: int, mode: str, arm: str) -> Setup:
            return Setup(size, mode, arm, args.model_scale, args.device, args.threads, rows[size])

        results: dict[str, Any] = {
            "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "load_before": _load()},
            "versions": {n: version(n) for n in ("longvpo-hf", "torch", "transformers", "trl", "peft", "torchcodec")},
            "command": " ".join(["python", "benchmarks/trainer_step.py", *sys.argv[1:]]),
            "settings": {
                "device": args.device,
                "scale": args.model_scale,
                "threads": args.threads,
                **{name: getattr(args, name) for name in ("sizes", "modes", "arms", "steps", "budget")},
            },
            "model": asdict(scale),
            "matmul_flops_per_second": one_answer(matmul_peak, setup(smallest, args.modes[0], "all")),
            "same_loss": {
                mode: check_losses(setup(smallest, mode, "all"), args.arms, tolerance) for mode in args.modes
            },
            "runs": [],
        }
        for size in args.sizes:
            for mode in args.modes:
                first = mode == args.modes[0]  # what a mask costs does not depend on the mode
                arms = measure(
                    {arm: setup(size, mode, arm) for arm in args.arms if first or not ARMS[arm].equal_answers},
                    args.steps,
                    args.budget,
                    interleave=args.device == "cpu",
                    profile=first and size == largest,
                )
                check_log_probs(arms, tolerance)
                results["runs"].append({"size": size, "mode": mode, "arms": arms, "ratios": ratios(arms)})
                results["machine"].update(load_after=_load(), device=_device_name(args.device))
                results["minutes"] = (time.time() - started) / 60
                save(results)
    return results


def last_line(results: dict[str, Any]) -> str:
    """The ratios of the largest size, in the first mode that has them."""
    found = [run["ratios"] for run in largest(results)]
    best = next((ratios for ratios in found if "seconds" in ratios.get("all", {})), found[0])
    time_ratio, time_ratio_4 = (best.get(arm, {}).get("seconds", math.nan) for arm in ("all", "all-4"))
    memory = best.get("all", {}).get("peak", math.nan)
    return f"trainer_step: time_ratio={time_ratio:.2f} memory_ratio={memory:.2f} time_ratio_4={time_ratio_4:.2f}"


def main() -> None:
    """Measures, and writes the results after each size and mode."""
    args = _arguments()
    quiet(threads=1)  # here only videos are made; a pool of threads would not survive the forks

    def save(results: dict[str, Any]) -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(report(results), encoding="utf-8")

    results = run(args, save)
    print(report(results))
    print(last_line(results))


if __name__ == "__main__":
    main()
