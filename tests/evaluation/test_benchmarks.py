"""The benchmarks run: their smallest sizes, no time asserted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARMS = ["stock", "stock-equal", "anchor", "all", "all-4"]


def test_trainer_step_compares_the_same_training_and_writes_its_results(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "trainer_step.py"), "--output", str(tmp_path / "step")]
    command += ["--sizes", "256", "--modes", "full", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    number = r"\d+\.\d\d"
    last = f"trainer_step: time_ratio={number} memory_ratio={number} time_ratio_4={number}"
    assert re.fullmatch(last, done.stdout.splitlines()[-1])

    results = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert list(results["same_loss"]["full"]) == ["stock", "anchor", "all", "all-4"]
    (run,) = results["runs"]
    assert (run["size"], run["mode"], list(run["arms"])) == (256, "full", ARMS)
    for arm in run["arms"].values():
        assert len(arm["steps"]) == 1
        assert min(arm["flops"], arm["saved_bytes"], arm["collation_seconds"], *arm["steps"][0].values()) > 0
    ratios = run["ratios"]
    assert 1 < ratios["anchor"]["flops"] < ratios["all"]["flops"] < ratios["all-4"]["flops"]
    assert ratios["all"]["saved"] < 1
    report = (tmp_path / "step.md").read_text(encoding="utf-8")
    assert report.startswith("# One training step on cpu")
    assert "## Targets, at 256 visual tokens" in report


def test_trainer_step_compares_trees_on_a_hybrid_model(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "trainer_step.py"), "--output", str(tmp_path / "step")]
    command += ["--model-scale", "hybrid", "--sizes", "256", "--modes", "lora", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    (run,) = results["runs"]
    assert list(run["arms"]) == ["anchor", "all", "anchor-4", "all-4"]
    work = {arm: found["flops"] for arm, found in run["arms"].items()}
    assert work["all"] < work["anchor"]
    assert work["all-4"] < work["anchor-4"]
    assert sorted(run["ratios"]["without_over_with"]) == ["1", "4"]
    report = (tmp_path / "step.md").read_text(encoding="utf-8")
    assert "| 256 | lora |" in report
    assert "## Targets" not in report
