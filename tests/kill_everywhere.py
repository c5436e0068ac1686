"""Disturbs a build at each of its file operations, runs it again, and looks at what is there after both.

    python tests/kill_everywhere.py stage2 FOLDER 1 kill
    python tests/kill_everywhere.py stage2 FOLDER 1 fail

`kill` ends the process before the operation; `fail` lets the system refuse it (disk full, no rights and so on, in
turn), and then lets files grow to a few bytes only, where the kernel itself refuses more. An audit hook counts the
operations. Each build is a fork of this process, so that a kill costs no start of Python. A kill loses nothing that has
left the process, so nothing waits for the disk. Prints what it tried, as JSON; a violated promise ends it with an
`AssertionError`.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import os
import resource
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

from longvpo_hf.building.captioning import caption_videos
from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.errors import advice
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.timeline import Timeline
from scenes import unfilmed

KILLED, ADVISED = 9, 2
GO_ON = "The same command goes on."
#: What the system may say to an operation, and how it is told.
REFUSALS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EDQUOT)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_OPERATIONS = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile", "ctypes.dlopen")


@functools.cache
def media(folder: Path) -> list[Timeline]:
    """Two videos; made before the first fork, so that no limit is on them."""
    return [video.timeline for video in unfilmed(folder / "media", [3, 3])]


def build(method: str, folder: Path, output: Path, num_rows: int) -> None:
    """A small build of one method, with its captions."""
    model = rehearsal()
    timelines = media(folder)
    if method == "stage1":
        pool = [clip for timeline in timelines for clip in timeline.clips]
        build_stage1(pool, model, model, output, Stage1Settings(num_rows=num_rows, max_clips=2))
        return
    videos = caption_videos(timelines, model, model, output.with_name(output.name + ".scenes"))
    if method == "stage2":
        build_stage2(videos, model, model, output, Stage2Settings(num_rows=num_rows))
    else:
        build_temporal(videos, model, model, output, TemporalSettings(num_rows=num_rows))


@dataclass(frozen=True)
class Ended:
    """How a fork ended: its status, how many file operations it came to, and what it said."""

    status: int
    operations: int = 0
    said: str = ""


def forked(
    work: Callable[[], None], at: int | None = None, refusal: int | None = None, most_bytes: int | None = None
) -> Ended:
    """Runs something in a fork.

    Args:
        work: What is run.
        at: Number of the file operation that is disturbed: the process is killed before it.
        refusal: What the system says to that operation instead.
        most_bytes: How long a file may get.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status, number, said = 1, 0, io.StringIO()

        def end(status: int) -> None:
            os.write(writer, json.dumps([number, said.getvalue()[:2000]]).encode())
            os._exit(status)

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal number
            if event in _OPERATIONS or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
                number += 1
                if number == at and refusal is None:
                    end(KILLED)
                if number == at and refusal is not None and event != "ctypes.dlopen":
                    raise OSError(refusal, os.strerror(refusal), str(args[0]))

        sys.stderr = said
        try:
            if most_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            sys.addaudithook(count)
            with advice("build", GO_ON):
                work()
            status = 0
        except SystemExit as error:
            status = int(str(error.code))
        except BaseException:
            traceback.print_exc(file=said)
        finally:
            end(status)
    os.close(writer)
    _, ended = os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        return Ended(os.waitstatus_to_exitcode(ended), *json.loads(pipe.read() or "[]"))


def digest_of(folder: Path) -> str:
    """Names and contents of all files of a folder; empty where there is none."""
    if not folder.exists():
        return ""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def main(method: str, folder: Path, step: int, how: str) -> None:
    """Disturbs a build of `method` at every `step`th operation: one that starts afresh, and one over a dataset."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    build(method, folder, folder / "first" / "rows", 1)  # imports what each fork would import again
    old, new = folder / "old" / "rows", folder / "new" / "rows"
    for output, num_rows in ((old, 2), (new, 3)):
        undisturbed = forked(lambda o=output, n=num_rows: build(method, folder, o, n))  # type: ignore[misc]
        assert undisturbed.status == 0, undisturbed.said
    datasets = {"": "nothing", digest_of(old): "old", digest_of(new): "new"}
    assert len(datasets) == 3
    tried = Counter(operations=undisturbed.operations, disturbed=0, old=0, new=0, nothing=0)
    for has_old in (False, True):

        def look(disturb: Callable[[Callable[[], None]], Ended], name: str, has_old: bool = has_old) -> None:
            """Disturbs a build, runs it again, and looks."""
            output = folder / f"{'over' if has_old else 'fresh'}-{name}" / "rows"
            output.parent.mkdir()
            if has_old:
                shutil.copytree(old, output)
            ended = disturb(lambda: build(method, folder, output, 3))
            at = f"{output.parent.name}: {ended.said}"
            found = datasets.get(digest_of(output))
            assert found is not None, f"neither the old nor the new dataset, {at}"
            assert found != ("nothing" if has_old else "old"), f"{found}, {at}"
            if how == "kill":
                assert ended.status == KILLED, f"status {ended.status}, {at}"
            elif ended.status == 0:  # what was refused had another way, or was of no matter
                assert found == "new", at
                tried["no matter"] += 1
            else:
                assert ended.status == ADVISED, f"status {ended.status}, {at}"
                assert ended.said.startswith("build: /"), f"no file is named: {at}"
                assert ended.said.endswith(f". {GO_ON}\n"), at
                assert ended.said.count("\n") == 1, at
            again = forked(lambda: build(method, folder, output, 3))
            assert again.status == 0, f"the next run failed: {again.said}, after {at}"
            assert datasets.get(digest_of(output)) == "new", f"the next run gave other rows, after {at}"
            logs = output.parent.glob("*.job/*.log")
            left = [*logs, *(path for path in output.parent.rglob("*") if path.suffix in (".part", ".lock"))]
            assert left == [], f"left {left}, after {at}"
            tried["disturbed"] += 1
            tried[found] += 1
            shutil.rmtree(output.parent)

        for at in range(1, undisturbed.operations + 1, step):
            refusal = None if how == "kill" else REFUSALS[at // step % len(REFUSALS)]
            look(lambda work, at=at, refusal=refusal: forked(work, at, refusal), str(at))  # type: ignore[misc]
        for most_bytes in (0, 1, 100, 400, 1000, 2500, 6000) if how == "fail" else ():
            look(lambda work, most=most_bytes: forked(work, most_bytes=most), f"bytes-{most_bytes}")  # type: ignore[misc]
    print(json.dumps(tried))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
