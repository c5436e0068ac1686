"""Everything that only a GPU can tell, in one command of at most nine minutes; kept in `benchmarks/results/gpu.*`.

    python benchmarks/gpu.py                       # on one GPU of 80 GB
    python benchmarks/gpu.py --only equality step

It needs no network, no weights and no video: models are drawn at random, frames are noise. The most telling parts come
first, each in a process of its own with a time of its own; what is known is written at once, so a crash, a lack of
memory or the end of the time costs one part. Ends with status 1 if a part failed or found something wrong.

On a machine without a GPU all parts run in small, which tries the program and measures nothing; its report is printed,
and kept only where `--output` says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Asks the driver, not CUDA, whether there is a GPU: this process must not touch CUDA, since its children are forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import _gpu_exact
import _gpu_steps
import torch
from _gpu_report import report
from _parts import Part, Record, run_parts
from _processes import quiet

RESULTS = Path(__file__).parent / "results" / "gpu"
MINUTES = 9.0

PARTS = (
    Part("device", "What was measured on", _gpu_steps.device, 60),
    Part("estimates", "What `longvpo check` says", _gpu_steps.estimates, 240, is_beside=True),
    Part("equality", "Packed equals plain, tiny models of all families", _gpu_exact.equality, 80),
    Part("kernels", "Kernels of attention along a tree", _gpu_exact.kernels, 30),
    Part("step", "Steps of the one-GPU recipe", _gpu_steps.steps, 200),
    Part("stock", "Steps of stock TRL", _gpu_steps.stock, 100),
    Part("hybrid", "Linear attention along a tree", _gpu_exact.hybrid, 40),
    Part("tower", "A frozen vision tower in pieces", _gpu_steps.tower, 30),
    Part("decoding", "Decoding on CPU and GPU", _gpu_steps.decoding, 40),
    Part("offload", "Steps with offloaded activations", _gpu_steps.offloaded, 120),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the results as they become known."""
    args = _arguments(argv)
    quiet(threads=torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = args.output or (RESULTS if device == "cuda" else None)
    results = _measure([part for part in PARTS if part.name in {"device", *args.only}], device, args.minutes, output)
    print(report(results))
    wrong = [name for name, part in results["parts"].items() if part["failed"] or any(map(is_wrong, part["records"]))]
    print(f"gpu: device={device} parts={len(results['parts'])} wrong={','.join(wrong) or 'none'}")
    if wrong:
        raise SystemExit(1)


def is_wrong(record: Record) -> bool:
    """Whether a record says that something is not as it must be; kernels in float32 are as they are."""
    if "is_fused" in record and record["dtype"] == "float32":
        return False
    return (
        not record.get("is_equal", True)
        or not record.get("is_fused", True)
        or ("family" in record and "failed" in record)
    )


def _measure(parts: Sequence[Part], device: str, minutes: float, output: Path | None) -> dict[str, Any]:
    results: dict[str, Any] = {
        "device": device,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": _versions(),
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "parts": {},
    }
    started = time.monotonic()

    def found(part: Part) -> dict[str, Any]:
        empty = {"title": part.title, "records": [], "seconds": None, "failed": None}
        known: dict[str, Any] = results["parts"].setdefault(part.name, empty)
        return known

    def write() -> None:
        results["minutes"] = (time.monotonic() - started) / 60
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            output.with_suffix(".md").write_text(report(results), encoding="utf-8")

    def save(part: Part, record: Record) -> None:
        found(part)["records"].append(record)
        write()

    def finish(part: Part, seconds: float, failed: str | None) -> None:
        found(part).update(seconds=seconds, failed=failed)
        print(f"{part.name}: {seconds:.0f} s{f', {failed}' if failed else ''}", flush=True)
        write()

    first, *others = parts
    run_parts([first], device, 60 * minutes, save, finish)
    method = "fork"
    if found(first)["failed"]:  # a fork of a process that touched CUDA cannot use it
        method = "spawn"
        results["parts"].clear()
        run_parts([first], device, 60 * minutes, save, finish, method)
    left = 60 * minutes - (time.monotonic() - started)
    run_parts(others, device, left, save, finish, method)
    return results


def _versions() -> dict[str, str]:
    names = ("longvpo-hf", "torch", "transformers", "trl", "peft", "accelerate", "torchcodec", "flash-linear-attention")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--output", type=Path, help=f"folder and stem of the results; on a GPU {RESULTS}")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be > 0, got {args.minutes:g}")
    return args


if __name__ == "__main__":
    main()
