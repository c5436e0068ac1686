"""`benchmarks/gpu.py` runs in small without a GPU, and one part's end costs no other part anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _parts
from _gpu_report import timed

BENCHMARKS = Path(_parts.__file__).parent

#: The command, in a process that first tries whether a kernel which holds all scores is noticed.
REHEARSAL = """
import json, runpy, sys, torch
sys.path.insert(0, sys.argv[1])
import _gpu_exact
from torch.nn.attention import SDPBackend, sdpa_kernel
with sdpa_kernel(SDPBackend.MATH):
    print(json.dumps(_gpu_exact.kernels_of("cpu", 1024, torch.float32, 4, 2, 32)))
folder, sys.argv = sys.argv[1], ["gpu.py", "--output", sys.argv[2]]
runpy.run_path(folder + "/gpu.py", run_name="__main__")
"""


def test_all_parts_run_in_small(tmp_path: Path) -> None:
    output = tmp_path / "results" / "gpu"
    command = [sys.executable, "-c", REHEARSAL, str(BENCHMARKS), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, last = done.stdout.splitlines()
    by_math = json.loads(first)
    assert not by_math["is_fused"]
    assert by_math["largest_elements"] >= 4 * 1024**2  # heads × trunk × trunk
    assert last == "gpu: device=cpu parts=10 wrong=none"

    parts = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["parts"]
    records = {name: part["records"] for name, part in parts.items()}
    assert all(record["is_equal"] for record in records["equality"] + records["hybrid"])
    assert {record["dtype"] for record in records["kernels"] if record["is_fused"]} == {"bfloat16", "float32"}
    for name in ("step", "stock", "offload"):
        assert [record["visual_tokens"] for record in records[name]] == [128, 128, 256]
        assert [record.get("is_first", False) for record in records[name]] == [True, False, True]
        assert all(record["seconds"] > 0 and record["peak_gib"] > 0 for record in records[name])
    work = {name: [record["tflop"] for record in records[name] if "tflop" in record] for name in ("step", "stock")}
    assert all(ours < theirs for ours, theirs in zip(work["step"], work["stock"], strict=True))
    (estimate,) = records["estimates"]
    assert estimate["tflop"] == pytest.approx(work["step"][0], rel=0.25)
    assert [record.get("difference") for record in records["tower"]][-1] < 1e-5
    report = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "A rehearsal on a CPU" in report
    assert report.count("\n## ") == len(parts) + 1


# ------------------------------------------------------------------------------------------------------------- parts


def finishes(world: _parts.World, save: Callable[[_parts.Record], None]) -> None:
    save({"found": 1})
    save({"found": 2})


def raises(world: _parts.World, save: Callable[[_parts.Record], None]) -> None:
    save({"found": 1})
    raise ValueError("no such number")


def runs_out_of_memory(world: _parts.World, save: Callable[[_parts.Record], None]) -> None:
    save({"found": 1})
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")


def is_killed(world: _parts.World, save: Callable[[_parts.Record], None]) -> None:
    save({"found": 1})
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(world: _parts.World, save: Callable[[_parts.Record], None]) -> None:
    save({"found": 1})
    time.sleep(600)


def lacks_a_package(world: _parts.World, save: Callable[[_parts.Record], None]) -> None:
    import no_such_package  # noqa: F401


def run(parts: list[_parts.Part], seconds: float = 60.0) -> tuple[dict[str, list[Any]], dict[str, str | None]]:
    """Records and failures by part."""
    records: dict[str, list[Any]] = {part.name: [] for part in parts}
    failures: dict[str, str | None] = {}

    def finish(part: _parts.Part, _: float, failed: str | None) -> None:
        assert part.name not in failures
        failures[part.name] = failed

    _parts.run_parts(parts, "cpu", seconds, lambda part, record: records[part.name].append(record["found"]), finish)
    return records, failures


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (raises, "ValueError: no such number"),
        (runs_out_of_memory, "out of memory: CUDA out of memory. Tried to allocate 2 GiB."),
        (is_killed, "its process ended with status -9"),
        (hangs, "not finished in 1 s"),
    ],
)
@pytest.mark.parametrize("is_beside", [False, True])
def test_a_part_that_ends_badly_costs_only_itself(measure: Any, words: str, is_beside: bool) -> None:
    bad = _parts.Part("bad", "", measure, 1 if measure is hangs else 60, is_beside)
    records, failures = run([bad, _parts.Part("good", "", finishes, 60)])
    assert records == {"bad": [1], "good": [1, 2]}
    assert failures["good"] is None
    assert words in str(failures["bad"])


def test_a_missing_package_is_named() -> None:
    assert run([_parts.Part("bad", "", lacks_a_package, 60)])[1] == {
        "bad": "not run here: No module named 'no_such_package'"
    }


def test_all_parts_together_keep_to_the_time() -> None:
    parts = [_parts.Part(name, "", measure, 60) for name, measure in (("long", hangs), ("late", finishes))]
    records, failures = run(parts, seconds=1)
    assert records == {"long": [1], "late": []}
    assert failures == {"long": "not finished in 1 s", "late": "not run: the 0.0 minutes were over"}


def test_the_first_step_of_a_length_warms_up_unless_it_is_the_only_one() -> None:
    def step(size: int, seconds: float, **more: Any) -> dict[str, Any]:
        return {"visual_tokens": size, "seconds": seconds, "peak_gib": seconds, **more}

    records = [
        step(10, 9.0, is_first=True, tflop=3.0),
        step(10, 1.0),
        step(10, 2.0),
        step(20, 5.0, is_first=True, tflop=7.0),
        {"visual_tokens": 40, "failed": "out of memory"},
    ]
    found = timed(records)
    assert found[10] == {"seconds": 1.5, "steps": 2, "is_warm": True, "tflop": 3.0, "peak_gib": 2.0}
    assert found[20] == {"seconds": 5.0, "steps": 1, "is_warm": False, "tflop": 7.0, "peak_gib": 5.0}
    assert found[40] == {"failed": "out of memory"}
