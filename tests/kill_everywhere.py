"""Kills a build before each of its file operations, runs it again, and looks at what is there after both.

    python tests/kill_everywhere.py stage2 FOLDER

An audit hook counts the operations. Each build is a fork of this process, so that a kill costs no start of Python. A
kill loses nothing that has left the process, so nothing waits for the disk. Prints what it tried, as JSON; a violated
promise ends it with an `AssertionError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

from longvpo_hf.building.captioning import caption_videos
from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from scenes import unfilmed

KILLED = 9
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile", "ctypes.dlopen")


def build(method: str, folder: Path, output: Path, num_rows: int) -> None:
    """A small build of one method, with its captions."""
    model = rehearsal()
    timelines = [video.timeline for video in unfilmed(folder / "media", [3, 3])]
    if method == "stage1":
        pool = [clip for timeline in timelines for clip in timeline.clips]
        build_stage1(pool, model, model, output, Stage1Settings(num_rows=num_rows, max_clips=2))
        return
    videos = caption_videos(timelines, model, model, output.with_name(output.name + ".scenes"))
    if method == "stage2":
        build_stage2(videos, model, model, output, Stage2Settings(num_rows=num_rows))
    else:
        build_temporal(videos, model, model, output, TemporalSettings(num_rows=num_rows))


def forked(work: Callable[[], None], kill_at: int | None = None) -> tuple[int, int]:
    """Runs something in a fork, killed before its `kill_at`th file operation; its status, and how many it came to."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status, number = 1, 0

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal number
            if event in _OPERATIONS or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
                number += 1
                if number == kill_at:
                    os.write(writer, str(number).encode())
                    os._exit(KILLED)

        try:
            sys.addaudithook(count)
            work()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os.write(writer, str(number).encode())
            os._exit(status)
    os.close(writer)
    _, ended = os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        return os.waitstatus_to_exitcode(ended), int(pipe.read() or 0)


def digest_of(folder: Path) -> str:
    """Names and contents of all files of a folder; empty where there is none."""
    if not folder.exists():
        return ""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def main(method: str, folder: Path, step: int) -> None:
    """Kills a build of `method` before every `step`th operation: one that starts afresh, and one over a dataset."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    build(method, folder, folder / "first" / "rows", 1)  # imports what each fork would import again
    old, new = folder / "old" / "rows", folder / "new" / "rows"
    for output, num_rows in ((old, 2), (new, 3)):
        status, num_operations = forked(lambda o=output, n=num_rows: build(method, folder, o, n))  # type: ignore[misc]
        assert status == 0, f"the undisturbed build failed with {status}"
    datasets = {"": "nothing", digest_of(old): "old", digest_of(new): "new"}
    assert len(datasets) == 3
    tried = {"operations": num_operations, "kills": 0, "old": 0, "new": 0, "nothing": 0}
    for has_old in (False, True):
        kill_at = 1
        while True:
            output = folder / f"{'over' if has_old else 'fresh'}-{kill_at}" / "rows"
            output.parent.mkdir()
            if has_old:
                shutil.copytree(old, output)

            def work(output: Path = output) -> None:
                build(method, folder, output, 3)

            status, _ = forked(work, kill_at)
            if status == 0:  # it has no such operation
                break
            assert status == KILLED, f"kill at {kill_at}: status {status}"
            found = datasets.get(digest_of(output))
            assert found is not None, f"kill at {kill_at}: neither the old nor the new dataset"
            assert found != ("nothing" if has_old else "old"), f"kill at {kill_at}: {found}"
            status, _ = forked(work)
            assert status == 0, f"kill at {kill_at}: the next run failed"
            assert datasets.get(digest_of(output)) == "new", f"kill at {kill_at}: the next run gave other rows"
            left = [str(path) for path in output.parent.rglob("*") if path.name.endswith(".part")]
            assert left == [], f"kill at {kill_at}: left {left}"
            logs = list(output.with_name("rows.job").glob("*.log"))
            assert logs == [], f"kill at {kill_at}: left {logs}"
            tried["kills"] += 1
            tried[found] += 1
            shutil.rmtree(output.parent)
            kill_at += step
    print(json.dumps(tried))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
