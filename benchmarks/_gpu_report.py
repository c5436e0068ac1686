"""What `gpu.py` measured, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

Records = Sequence[Mapping[str, Any]]


def report(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    parts = results["parts"]
    text = ["# What a GPU tells", ""]
    if results["device"] == "cpu":
        text += ["**A rehearsal on a CPU, in small: nothing here is a measurement.**", ""]
    for name, part in parts.items():
        lines = _TABLES[name](part["records"], parts)
        ended = "still running" if part["seconds"] is None else f"{part['seconds']:.0f} s"
        text += [f"## {part['title']} (`{name}`, {ended})", ""]
        if part["failed"]:
            text += ["Not whole:", "", "```", part["failed"].strip(), "```", ""]
        text += [*lines, ""]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    machine = ", ".join(f"{value}" for value in results["machine"].values())
    return "\n".join(
        [
            *text,
            "## Where",
            "",
            f"- {machine}",
            f"- {versions}",
            f"- `{results['command']}`, {results['minutes']:.1f} min",
            "",
        ]
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return ["Nothing is known yet."]
    return [
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows),
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _device(records: Records, parts: Mapping[str, Any]) -> list[str]:
    return [f"- {name}: {_cell(value)}" for record in records for name, value in record.items()]


def _equality(records: Records, parts: Mapping[str, Any]) -> list[str]:
    rows = []
    for record in records:
        if "float32" not in record:
            said = record.get("failed") or f"trained without trees: {record['without_trees']}"
            rows.append([record["family"], said, *[None] * 6])
            continue
        pairs = [record[name][what] for name in ("float32", "bfloat16", "bfloat16_plain") for what in _WHAT]
        rows.append([record["family"], record["is_equal"], *pairs])
    columns = ["family", "equal"]
    columns += [f"{way}, {what}" for way in ("fp32", "bf16", "bf16 plain") for what in ("log-probs", "gradients")]
    return [
        "Norms of differences over norms: in fp32 of packed from plain; in bf16 of each from plain in fp32.",
        "",
        *_table(columns, rows),
    ]


_WHAT = ("log_probs", "gradients")


def _kernels(records: Records, parts: Mapping[str, Any]) -> list[str]:
    names = ("trunk_kernels", "branch_kernels", "is_fused", "seconds", "tflops", "peak_gib", "largest_elements")
    rows = [
        [record["trunk"], record["dtype"], record.get("failed"), *(record.get(name) for name in names)]
        for record in records
    ]
    columns = ["trunk", "type", "failed", "trunk by", "branches by", "fused, no mask", "s", "TFLOP/s", "GiB", "largest"]
    return [
        "One layer, forward and backward. Fused: a flash kernel without a mask for the trunk, one that holds no scores "
        "for the branches, and no tensor beyond the queries and the branches' mask. fp32 is for tests.",
        "",
        *_table(columns, rows),
    ]


def _hybrid(records: Records, parts: Mapping[str, Any]) -> list[str]:
    rows = []
    for record in records:
        numbers = [record.get(way, {}).get(what) for way in ("packed", "plain") for what in _WHAT]
        told = record.get("failed", record.get("is_equal"))
        rows.append([record["tokens"], record["kernels"], record.get("dtype"), told, *numbers])
    columns = ["tokens", "run by", "type", "equal"]
    columns += [f"{way}, {what}" for way in ("packed", "plain") for what in ("log-probs", "gradients")]
    return ["Against float32 by PyTorch on the CPU.", "", *_table(columns, rows)]


def timed(records: Records) -> dict[int, dict[str, Any]]:
    """Steps by visual tokens: median seconds and highest peak of those after the first, or of the first alone.

    Args:
        records: Of a `StepMeter`.
    """
    found: dict[int, dict[str, Any]] = {}
    for size in sorted({record["visual_tokens"] for record in records}):
        mine = [record for record in records if record["visual_tokens"] == size and "seconds" in record]
        failed = [record["failed"] for record in records if record["visual_tokens"] == size and "failed" in record]
        if not mine:
            found[size] = {"failed": failed[0]}
            continue
        later = [record for record in mine if not record.get("is_first")] or mine
        found[size] = {
            "seconds": median(record["seconds"] for record in later),
            "steps": len(later),
            "is_warm": not later[0].get("is_first"),
            "tflop": next((record["tflop"] for record in mine if "tflop" in record), None),
            **{
                name: max(record[name] for record in later) for name in ("peak_gib", "reserved_gib") if name in later[0]
            },
        }
    return found


def _steps(name: str) -> Callable[[Records, Mapping[str, Any]], list[str]]:
    """A table of steps: ours and stock TRL beside each other, and beside the plan."""

    def table(records: Records, parts: Mapping[str, Any]) -> list[str]:
        plans = {} if name == "stock" else _plans(parts, is_offloaded=name == "offload")
        peak = next((record["matmul_tflops"] for record in parts["device"]["records"]), None)
        others = timed(parts["stock"]["records"]) if name == "step" and "stock" in parts else {}
        rows = []
        for size, step in timed(records).items():
            if "failed" in step:
                rows.append([size, step["failed"], *[None] * 8])
                continue
            plan, other = plans.get(size, {}), others.get(size, {})
            rate = step["tflop"] / step["seconds"] if step["tflop"] else None
            share = rate / peak if rate and peak else None
            at_rate = plan["tflop"] / rate if plan and rate else None
            over = other["seconds"] / step["seconds"] if "seconds" in other else None
            numbers = [step["peak_gib"], step.get("reserved_gib"), plan.get("tensors_gib"), plan.get("total_gib")]
            rows.append(
                [size, "" if step["is_warm"] else "first step", step["seconds"], at_rate, share, *numbers, over]
            )
        columns = [
            "visual tokens",
            "",
            "s a step",
            "s, the plan's work at this rate",
            "share of matmul peak",
            "peak GiB",
        ]
        columns += ["reserved GiB", "plan: tensors", "plan: in all", "stock TRL over this, time"]
        return _table(columns, rows)

    return table


def _plans(parts: Mapping[str, Any], is_offloaded: bool) -> dict[int, Mapping[str, Any]]:
    records = parts["estimates"]["records"] if "estimates" in parts else []
    return {record["visual_tokens"]: record for record in records if record["is_offloaded"] == is_offloaded}


def _estimates(records: Records, parts: Mapping[str, Any]) -> list[str]:
    names = ("visual_tokens", "is_offloaded", "tensors_gib", "total_gib", "tflop")
    columns = ["visual tokens", "offloaded", "tensors GiB", "in all GiB", "TFLOP"]
    return _table(columns, [[record[name] or "" for name in names] for record in records])


def _tower(records: Records, parts: Mapping[str, Any]) -> list[str]:
    names = ("frames", "way", "failed", "seconds", "peak_gib", "difference")
    return _table(
        ["frames", "", "failed", "s", "peak GiB", "relative difference"], [[r.get(n) for n in names] for r in records]
    )


def _decoding(records: Records, parts: Mapping[str, Any]) -> list[str]:
    return _table(["frames", "by", "s"], [[record["frames"], record["by"], record["seconds"]] for record in records])


_TABLES: dict[str, Callable[[Records, Mapping[str, Any]], list[str]]] = {
    "device": _device,
    "estimates": _estimates,
    "equality": _equality,
    "kernels": _kernels,
    "step": _steps("step"),
    "stock": _steps("stock"),
    "hybrid": _hybrid,
    "tower": _tower,
    "decoding": _decoding,
    "offload": _steps("offload"),
}
