"""A plan as plain text."""

from __future__ import annotations

from longvpo_hf.planning.plan import Plan


def report(plan: Plan) -> str:
    """The plan as `longvpo check` prints it."""
    sections = [_head(plan), _parameters(plan), _tokens(plan), _memory(plan), _verdict(plan), _work(plan)]
    return "\n\n".join("\n".join(section) for section in [*sections, [f"- {note}" for note in plan.notes]])


def _head(plan: Plan) -> list[str]:
    machine = plan.machine
    sharing = "" if machine.processes == 1 else f", {machine.processes} processes ({machine.sharding.value})"
    if machine.context_parallel > 1:
        sharing += f" in groups of {machine.context_parallel} that share a batch"
    return [f"{plan.model}: estimates, nothing was loaded or run on a device{sharing}"]


def _parameters(plan: Plan) -> list[str]:
    total, vision = plan.parameters.total / 1e9, plan.parameters.vision / 1e9
    return [
        "Parameters",
        _line("all", f"{total:.3f} billion ({vision:.3f} of them in the vision tower)"),
        _line("trained", f"{plan.parameters.trained / 1e6:,.1f} million"),
    ]


def _tokens(plan: Plan) -> list[str]:
    tokens = plan.tokens
    return [
        "Tokens",
        _line("frames of a timeline", f"{tokens.frames} × {tokens.visual_per_frame:.1f} = {tokens.visual:,} visual"),
        _line("prompt", f"{tokens.prompt:,}"),
        _line("a device's batch, packed", f"{tokens.packed:,}"),
        _line(f"reference ({tokens.reference_frames} frames)", f"{tokens.reference:,}"),
    ]


def _memory(plan: Plan) -> list[str]:
    lines = [
        "Memory of a device, GiB",
        *(_line(name, f"{gib:7.1f}") for name, gib in plan.memory_gib.items()),
        _line("together", f"{plan.total_gib:7.1f} of {plan.machine.gpu_memory_gib:g}"),
    ]
    return [*lines, _line("in the host's memory, each", f"{plan.host_gib:7.1f}")] if plan.host_gib else lines


def _verdict(plan: Plan) -> list[str]:
    lines = [f"{'FITS' if plan.fits else 'DOES NOT FIT'}. Frames that fit, all else unchanged: {plan.frames_that_fit}."]
    if plan.remedies:
        lines += ["", "What to change, each with what the device would then hold, GiB"]
        lines += [
            _line(remedy.setting, f"{remedy.gib:7.1f}  {'fits' if remedy.fits else 'does not fit'}", width=52)
            for remedy in plan.remedies
        ]
    return lines


def _work(plan: Plan) -> list[str]:
    return [
        f"Work of a device's batch, TFLOP; at {plan.machine.tflops:g} TFLOP/s",
        *(_line(name, f"{value:9.1f}") for name, value in plan.tflop.items()),
        _line("seconds", f"{plan.seconds:9.1f}"),
        _line("GPU-hours per 1,000 rows", f"{plan.gpu_hours_per_1000_rows:9.2f}"),
    ]


def _line(name: str, value: str, width: int = 30) -> str:
    return f"  {name:<{width}} {value}"
