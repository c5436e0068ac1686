"""A build with workers that is stopped at random instants: the rows of an undisturbed one, and no process is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.intake.media import cut_clips
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.timeline import Clip
from media import write_video
from scenes import same_files

if not Path("/proc").is_dir():
    pytest.skip("looks at processes through /proc", allow_module_level=True)

NUM_CLIPS = 24
PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
if __name__ == "__main__":
    from longvpo_hf.errors import advice
    from test_signals import build
    with advice("build", "The same command goes on."):
        build(Path({videos!r}), Path({folder!r}), num_workers=2)
"""


def build(videos: Path, folder: Path, num_workers: int) -> Path:
    """Clips cut, in worker processes, and Stage-1 rows of them."""
    spans = [Clip(str(path), start / 2, start / 2 + 1) for path in sorted(videos.iterdir()) for start in range(6)]
    clips = [clip for clip in cut_clips(spans, folder / "cache", num_workers=num_workers) if isinstance(clip, Clip)]
    assert len(clips) == NUM_CLIPS
    model = rehearsal()
    build_stage1(clips, model, model, folder / "rows", Stage1Settings(num_rows=20, max_clips=3))
    return folder / "rows"


def processes_of(group: int) -> list[int]:
    """Running processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # it has just ended
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_build_that_is_stopped_at_random_instants_goes_on(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(4):
        write_video(videos / f"{number}.mp4", 40, first=40 * number)
    rng = random.Random(0)
    places = {"tests": [str(Path(__file__).parent), str(Path(__file__).parents[1])], "videos": str(videos)}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(tmp_path / "cut"), **places))
    for sent in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            [sys.executable, str(program)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        ) as run:
            have = len(list((tmp_path / "cut").rglob("*.mp4")))
            wanted = have + rng.randint(1, 8)
            while run.poll() is None and len(list((tmp_path / "cut").rglob("*.mp4"))) < wanted:
                time.sleep(0.005)
            assert run.poll() is None, "it was over before it was stopped"
            if sent == signal.SIGINT:  # as a terminal does: to all of them
                os.killpg(run.pid, sent)
            else:
                run.send_signal(sent)
            said = run.communicate(timeout=60)[1].decode()
        if sent == signal.SIGINT:
            assert run.returncode == 130
            assert "Traceback" not in said
            assert said.endswith("Interrupted. The same command goes on.\n")
        deadline = time.monotonic() + 30
        while processes_of(run.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(run.pid) == []
        assert not (tmp_path / "cut" / "rows").exists()
    same_files(build(videos, tmp_path / "whole", 0), build(videos, tmp_path / "cut", 0))
    assert len(list((tmp_path / "cut" / "cache").rglob("*.mp4"))) == NUM_CLIPS
