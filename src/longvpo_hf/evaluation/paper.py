"""The paper's own numbers (LongVPO, arXiv 2602.02341), to stand beside measured ones.

Data alone, in percent, as the paper's result tables have them; those of InternVL3-8B are from the model card its
authors published. All were measured with `PAPER_FRAMES` frames. Names of benchmarks are those of results
(`evaluation/suites/`); for MLVU the number is its M-Avg.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

#: Frames of each video in the paper's evaluation.
PAPER_FRAMES = 512

#: Suites in the order of the paper's table.
PAPER_ORDER = ("lvbench", "longvideobench", "mlvu", "videomme", "videomme_subtitles", "mvbench")


@dataclass(frozen=True, slots=True)
class PaperModel:
    """One line of the paper's tables.

    Args:
        stage: `base`, `stage1`, `stage2`, or what else the paper says of it.
        note: What distinguishes it from others of its stage; empty where there are none.
        scores: Percent by benchmark; a benchmark the paper does not give is left out.
    """

    stage: str
    note: str
    scores: Mapping[str, float]


def _line(stage: str, note: str, *scores: float) -> PaperModel:
    return PaperModel(stage, note, dict(zip(PAPER_ORDER, scores, strict=False)))


#: Lines by base model, the base first.
PAPER: Mapping[str, tuple[PaperModel, ...]] = {
    "InternVL2.5-8B": (
        _line("base", "", 45.2, 62.7, 67.6, 61.1, 65.3, 72.0),
        _line("stage1", "128 training frames", 49.4, 65.4, 73.5, 64.2, 70.1, 72.9),
        _line("stage2", "128 training frames", 50.1, 66.6, 74.1, 64.6, 70.3, 73.1),
        _line("stage1", "256 training frames", 49.6, 66.0, 74.8, 65.0, 71.2, 72.9),
    ),
    "InternVideo2.5-8B": (
        _line("base", "", 47.4, 63.2, 72.8, 63.3, 71.1, 75.7),
        _line("stage2", "iteration 2, 256 training frames", 51.0, 67.2, 74.7, 66.1, 73.1, 75.1),
    ),
    "Video-LLaMA3-7B": (
        _line("base", "", 45.3, 59.8, 73.0, 66.2, 70.3),
        _line("LongVPO", "stage not said", 49.8, 63.4, 74.6, 67.2, 71.4),
    ),
    "InternVL3-8B": (
        _line("base", "", 48.8, 62.3, 71.4, 66.5, 72.5, 75.4),
        _line("stage1", "", 52.4, 66.8, 75.1, 68.1, 74.0, 75.1),
        _line("stage2", "", 53.6, 66.0, 76.4, 68.9, 74.0, 75.0),
    ),
}


def paper_model(name: str) -> str | None:
    """The key of `PAPER` that a model's name is one of, e.g. of `OpenGVLab/InternVL3-8B-hf`; None for all others."""
    plain = _plain(name).replace("chat", "")
    return next((key for key in PAPER if _plain(key) in plain), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
