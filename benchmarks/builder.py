"""What the Stage-1 builder costs besides the models: rows per second with an instant responder, and memory by rows.

    python benchmarks/builder.py
    python benchmarks/builder.py --scaling

Clips are cut and embedded beforehand (here: 2,000 small files and random 768-wide vectors), so what is measured is
drawing, filtering, the job's files, the rows and their media. Each size runs in a process of its own. Kept in
`benchmarks/results/builder.{json,md}`.

`--scaling` measures what more workers give: pieces per second of one and of two processes whose responder sleeps, as
one that waits for a server does, after the first piece of each. Kept in `benchmarks/results/builder_scaling.{json,md}`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longvpo_hf.responders import Request
    from longvpo_hf.timeline import Clip

RESULTS = Path(__file__).parent / "results"
POOL = 2000
DIM = 768


def pool(folder: Path, number: int) -> list[Clip]:
    """Clips whose files are whole mp4s without tracks, of 100 kB, as a cut clip of some seconds."""
    from longvpo_hf.timeline import Clip

    clips = []
    for index in range(number):
        path = folder / f"{index}.mp4"
        content = index.to_bytes(4, "big") * 25_000
        path.write_bytes((8 + len(content)).to_bytes(4, "big") + b"free" + content)
        clips.append(Clip(str(path), 0.0, 8.0))
    return clips


@dataclass(frozen=True)
class Sleeping:
    """Answers after so many seconds a request, one after the other, as a server that is at its bound."""

    seconds: float
    name: str = "sleeping"

    def respond(self, requests: list[Request], *callbacks: Any) -> list[str]:
        """See `Responder.respond`."""
        from longvpo_hf.building.rehearsal import rehearsal

        time.sleep(self.seconds * len(requests))
        return rehearsal().respond(requests, *callbacks)


def scaling(num_rows: int, seconds: float) -> list[dict[str, Any]]:
    """Pieces per second of one and two worker processes, after the first piece of each."""
    from longvpo_hf.building.executors import Processes
    from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1

    runs = []
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            model = Sleeping(seconds)
            settings = Stage1Settings(num_rows=num_rows, max_clips=8)
            start = time.perf_counter()
            clips = pool(Path(folder), 500)
            build_stage1(clips, model, model, Path(folder) / "rows", settings, executor=Processes(number))
            wall = time.perf_counter() - start
            ended = sorted(path.stat().st_mtime for path in Path(folder, "rows.job").glob("*.jsonl"))
            rows = hashlib.sha256((Path(folder) / "rows" / "train.parquet").read_bytes()).hexdigest()[:16]
        pieces_per_s = (len(ended) - number) / (ended[-1] - ended[number - 1])
        runs.append(
            {
                "workers": number,
                "pieces": len(ended),
                "wall_seconds": round(wall, 1),
                "pieces_per_s": round(pieces_per_s, 3),
                "times_one": round(pieces_per_s / runs[0]["pieces_per_s"], 2) if runs else 1.0,
                "rows_sha256": rows,
            }
        )
    return runs


def measure(num_rows: int) -> dict[str, Any]:
    """Builds `num_rows` rows in this process."""
    import numpy as np

    from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1

    class Instant:
        name = "instant"
        seconds = 0.0

        def respond(self, requests: list[Request], *callbacks: Any) -> list[str]:
            start = time.perf_counter()
            answers = [f"Who is in {len(request.view.indices(len(request.timeline)))} clips?" for request in requests]
            if requests and requests[0].text.startswith("Who"):
                answers = [f"{number} {Path(r.timeline.clips[0].path).stem}" for number, r in enumerate(requests)]
            self.seconds += time.perf_counter() - start
            return answers

    with tempfile.TemporaryDirectory() as folder:
        clips = pool(Path(folder), POOL)
        vectors = np.random.default_rng(0).standard_normal((POOL, DIM)).astype(np.float32)
        responder = Instant()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        cpu = time.process_time()
        funnel = build_stage1(
            clips, responder, responder, Path(folder) / "rows", Stage1Settings(num_rows=num_rows), lambda _: vectors
        )
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {
            "rows": funnel["stages"]["rows"],
            "wall_seconds": round(wall, 2),
            "cpu_seconds": round(cpu, 2),
            "rows_per_s": round(num_rows / wall, 1),
            "rows_per_cpu_s": round(num_rows / cpu, 1),
            "overhead_share": round((wall - responder.seconds) / wall, 3),
            "peak_growth_mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
        }


def write_scaling(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes what `scaling` measured."""
    machine = {"platform": platform.platform(), "cores": os.cpu_count()}
    content = json.dumps({"machine": machine, "runs": runs}, indent=1)
    (RESULTS / "builder_scaling.json").write_text(content + "\n", encoding="utf-8")
    columns = list(runs[0])
    lines = [
        "# The Stage-1 builder with more workers",
        "",
        "`python benchmarks/builder.py --scaling`: 1,280 rows in pieces of 64 timelines, a responder that sleeps 5 ms "
        f"a request, worker processes; {machine['platform']}, {machine['cores']} cores, other work on the machine. "
        "`pieces_per_s` after the first piece of each worker; the wall time has the start of the processes too.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---:|" * len(columns),
        *["| " + " | ".join(str(run[column]) for column in columns) + " |" for run in runs],
        "",
        "Target: two workers at least 1.8 times one, and the same rows.",
        "",
    ]
    (RESULTS / "builder_scaling.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return runs


def main() -> None:
    """Measures each size and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 20000])
    parser.add_argument("--scaling", action="store_true", help="what a second worker gives")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    if args.scaling:
        print(f"builder: times_one={write_scaling(scaling(1280, 0.005))[-1]['times_one']}")
        return
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    runs = []
    for size in args.sizes:
        command = [sys.executable, __file__, "--measure", str(size)]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    machine = {"platform": platform.platform(), "cores": os.cpu_count()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "builder.json").write_text(json.dumps({"machine": machine, "pool": POOL, "runs": runs}, indent=1) + "\n")
    columns = list(runs[0])
    lines = [
        "# The Stage-1 builder without its models",
        "",
        f"`python benchmarks/builder.py --sizes {' '.join(map(str, args.sizes))}`; pool of {POOL} clips, {DIM}-wide "
        f"vectors, one thread; {machine['platform']}, {machine['cores']} cores, other work on the machine.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---:|" * len(columns),
        *["| " + " | ".join(str(run[column]) for column in columns) + " |" for run in runs],
        "",
        "`peak_growth_mib`: how far the process's peak memory rose during the build. Target: ≥ 50 rows/s per core, and "
        "memory that does not grow with the rows.",
        "",
    ]
    (RESULTS / "builder.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    last = runs[-1]
    print(f"builder: rows_per_s={last['rows_per_s']} overhead_share={last['overhead_share']}")


if __name__ == "__main__":
    main()
