"""The curves of a training run as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longvpo_hf.artifacts import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: As `TrainerState.log_history`.
Logs = Sequence[Mapping[str, float]]

_POSITIONS = ("begin", "middle", "end")


def save_curves(log_history: Logs, path: Path) -> bool:
    """Writes the curves of a run as a PNG: training as lines, evaluation as dots.

    The panels are the loss with its SFT term, reward accuracy (also by position of the evidence on the timeline),
    reward margin, and log-probabilities per answer token of policy and reference. What was not logged is left out.

    Args:
        log_history: As `TrainerState.log_history`.
        path: The picture.

    Returns:
        Whether there was anything to draw; if not, nothing is written.
    """
    panels: list[tuple[str, list[tuple[str, str, str]]]] = [
        ("loss", [("loss", "loss", "-"), ("loss/sft", "SFT term", "--")]),
        (
            "reward accuracy",
            [
                ("rewards/accuracies", "all", "-"),
                *((f"rewards/accuracies/{place}", place, ":") for place in _POSITIONS),
            ],
        ),
        ("reward margin", [("rewards/margins", "margin", "-")]),
        (
            "log-probability per answer token",
            [
                ("logps_per_token/chosen", "chosen", "-"),
                ("logps_per_token/rejected", "rejected", "-"),
                ("ref_logps_per_token/chosen", "chosen, reference", "--"),
                ("ref_logps_per_token/rejected", "rejected, reference", "--"),
            ],
        ),
    ]
    drawn = [(title, curves) for title, curves in panels if any(_points(log_history, name) for name, *_ in curves)]
    if not drawn:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(drawn), 3.4), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (title, curves) in zip(axes, drawn, strict=True):
        _draw(panel, title, curves, lambda name: _points(log_history, name))
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    return True


def _points(log_history: Logs, name: str) -> list[tuple[float, float]]:
    return [
        (entry["step"], entry[name])
        for entry in log_history
        if name in entry and "step" in entry and math.isfinite(entry[name])
    ]


def _draw(
    panel: Axes,
    title: str,
    curves: Sequence[tuple[str, str, str]],
    points: Callable[[str], list[tuple[float, float]]],
) -> None:
    for number, (name, label, style) in enumerate(curves):
        for logged, form, suffix in ((name, style, ""), (f"eval_{name}", "o", ", evaluation")):
            if found := points(logged):
                panel.plot(*zip(*found, strict=True), form, color=f"C{number}", label=label + suffix, markersize=4)
    panel.set(title=title, xlabel="step")
    panel.grid(alpha=0.3)
    if len(panel.lines) > 1:
        panel.legend(fontsize=7)
