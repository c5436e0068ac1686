"""Outages, kills, torn files and two runs at once: always the rows of an undisturbed run, and nothing left over.

Kills by SIGKILL at random instants are in `test_kills.py`, `test_captioning.py` and `tests/methods/test_stage2.py`.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from longvpo_hf.artifacts import Journal, Locked, Log
from longvpo_hf.building.captioning import caption_videos
from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.errors import EndpointError
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.responders import OnResult, OnWait, Request, Responder, Result, Unreached, answered
from scenes import Scripted, rows_of, same_files, unfilmed

TESTS = Path(__file__).parents[1]
METHODS = ("stage1", "stage2", "temporal")


def build(method: str, folder: Path, model: Responder, num_rows: int = 20) -> Path:
    """A build of one method from videos without captions; gives its output."""
    timelines = [video.timeline for video in unfilmed(folder.parent / "media", [3, 5, 4, 6])]
    output = folder / "rows"
    if method == "stage1":
        pool = [clip for timeline in timelines for clip in timeline.clips]
        settings = Stage1Settings(num_rows=num_rows, max_clips=4, questions_per_timeline=2)
        build_stage1(pool, model, model, output, settings, judge=model)
        return output
    videos = caption_videos(timelines, model, model, folder / "rows.scenes")
    if method == "stage2":
        build_stage2(videos, model, model, output, Stage2Settings(num_rows=num_rows), judge=model)
    else:
        build_temporal(videos, model, model, output, TemporalSettings(num_rows=num_rows), judge=model)
    return output


# -------------------------------------------------------------------------------------------------------------- outages


@dataclass
class Unsteady:
    """A rehearsal behind a server that reaches it only now and then; counts what it answers.

    Args:
        is_up: Whether the next request reaches it.
        hands_over: Whether it hands over each result as it comes, or all of them at the end.
        poison_at: After so many answers comes one request that it never answers.
    """

    is_up: Callable[[], bool]
    hands_over: bool = True
    name: str = "scripted"
    num_answers: int = 0
    poison_at: int | None = None
    poison: Request | None = None

    def reaches(self, request: Request) -> bool:
        if self.num_answers == self.poison_at and self.poison is None:
            self.poison = request
        return request != self.poison and self.is_up()

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        results: list[Result | Unreached] = []
        for index, request in enumerate(requests):
            if not self.reaches(request):
                results.append(Unreached("status 503"))
                continue
            results.append(rehearsal().answer(request))
            self.num_answers += 1
            if on_result and self.hands_over:
                on_result(index, str(results[-1]))
        is_gone = all(isinstance(result, Unreached) for result in results) and self.poison is None
        if results and is_gone:  # as an `EndpointResponder` that hears nothing at all
            raise EndpointError("scripted answered nothing.")
        return answered(results)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_an_outage_is_never_final_and_costs_no_answer_twice(tmp_path: Path, method: str, seed: int) -> None:
    steady = Unsteady(lambda: True)
    whole = build(method, tmp_path / "whole", steady)
    rng = random.Random(seed)
    share = rng.choice([0.9, 0.97, 0.99])
    unsteady = Unsteady(lambda: rng.random() < share, hands_over=seed != 2)
    output: Path | None = None
    stops: list[str] = []
    while output is None:
        try:
            output = build(method, tmp_path / "unsteady", unsteady)
        except EndpointError as error:
            stops.append(str(error))
            complete = (tmp_path / "unsteady" / "rows").exists()
            stops += ["a dataset that is not complete"] * complete
    said = re.compile(
        r"\d+ of \d+ requests to scripted got no answer; the first( about .*mp4)?: status 503\. All other answers are "
        r"kept: the same command asks for these alone\. What gets none in 3 runs is left out; with --drop-unanswered, "
        r"now\.|scripted answered nothing\."
    )
    assert [stop for stop in stops if not said.fullmatch(stop)] == []
    assert stops
    same_files(whole, output)
    assert unsteady.num_answers == steady.num_answers


@pytest.mark.parametrize("method", METHODS)
def test_a_server_that_dies_and_comes_back(tmp_path: Path, method: str) -> None:
    """It answers 30 % of all there is, is gone for three runs, then answers the rest."""
    steady = Unsteady(lambda: True)
    whole = build(method, tmp_path / "whole", steady)
    first = steady.num_answers * 3 // 10
    dying = Unsteady(lambda: dying.num_answers < first)
    for _ in range(4):
        with pytest.raises(EndpointError, match=r"got no answer|answered nothing"):
            build(method, tmp_path / "cut", dying)
        assert dying.num_answers == first
    dying.is_up = lambda: True
    same_files(whole, build(method, tmp_path / "cut", dying))
    assert dying.num_answers == steady.num_answers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(2))
def test_a_request_that_is_never_answered_does_not_stop_every_run(tmp_path: Path, method: str, seed: int) -> None:
    """It stops two runs; the third goes on without it and counts it; whenever it is answered, nothing is lost."""
    whole = build(method, tmp_path / "whole", rehearsal())
    poisoned = Unsteady(lambda: True, poison_at=random.Random(seed).randint(0, 30))
    for _ in range(2):
        with pytest.raises(EndpointError, match=r"^1 of "):
            build(method, tmp_path / "cut", poisoned)
    for _ in range(2):
        build(method, tmp_path / "cut", poisoned)
        dropped = "".join(path.read_text() for path in sorted((tmp_path / "cut").glob("*.log/dropped.jsonl")))
        assert "status 503 (in " in dropped
        assert list((tmp_path / "cut").glob("*.job/*.log")), "what follows from it is not stored as finished"
    poisoned.poison_at = None
    poisoned.poison = None
    same_files(whole, build(method, tmp_path / "cut", poisoned))
    num_answers = poisoned.num_answers
    same_files(whole, build(method, tmp_path / "cut", poisoned))
    assert poisoned.num_answers == num_answers, "all is stored as finished"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(2))
def test_an_interrupted_batch_keeps_what_was_answered(tmp_path: Path, method: str, seed: int) -> None:
    steady = Unsteady(lambda: True)
    whole = build(method, tmp_path / "whole", steady)
    rng = random.Random(seed)

    def interrupt() -> bool:
        if rng.random() < 0.03:
            raise KeyboardInterrupt
        return True

    interrupted = Unsteady(interrupt)
    while True:
        try:
            output = build(method, tmp_path / "cut", interrupted)
            break
        except KeyboardInterrupt:
            continue
    same_files(whole, output)
    assert interrupted.num_answers == steady.num_answers


# ----------------------------------------------------------------------------------------------------------- torn files


def test_a_log_that_is_torn_anywhere_loses_its_last_line_only(tmp_path: Path) -> None:
    entries = [{"request": "a\t1", "answer": ["x\ny", False]}, {"request": "b", "answer": "ü\ud83d"}, {"n": 3}]
    path = tmp_path / "a.log"
    log = Log(path)
    for entry in entries:
        log.append(entry)
    log.close()
    content = path.read_bytes()
    ends = [match.end() - 1 for match in re.finditer(rb"[^\n]\n", content)]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        torn = Log(path)
        assert torn.entries == entries[: sum(end <= length for end in ends)]
        torn.append({"n": 4})
        torn.close()
        assert Log(path).entries == [*torn.entries, {"n": 4}]
    for place in range(
        len(content)
    ):  # and one that is changed anywhere loses one line, or two where they are run into one
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert [entry for entry in entries if entry not in Log(path).entries], place
        assert all(entry in entries for entry in Log(path).entries), place
        assert len(Log(path).entries) >= 1


def test_a_piece_that_is_torn_anywhere_is_worked_again(tmp_path: Path) -> None:
    fields = [{"answer": "ü\u2028"}, {"drop": None}]
    Journal(tmp_path, "settings").piece("a", [1], lambda log: fields)
    (path,) = tmp_path.glob("*.jsonl")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        worked: list[int] = []

        def work(log: Log, worked: list[int] = worked) -> list[dict]:
            worked.append(1)
            return fields

        journal = Journal(tmp_path, "settings")
        assert journal.piece("a", [1], work) == fields
        # Without its last line break it is whole.
        assert (len(worked), journal.num_reused) == ((1, 0) if length < len(content) - 1 else (0, 1))
        assert path.read_bytes() == content or length == len(content) - 1


@pytest.mark.parametrize("seed", range(4))
def test_torn_pieces_and_logs_of_a_build_give_the_same_rows(tmp_path: Path, seed: int) -> None:
    whole = build("stage2", tmp_path / "whole", rehearsal())
    rng = random.Random(seed)
    left = rng.randint(5, 150)

    def interrupt() -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        build("stage2", tmp_path / "cut", Unsteady(interrupt))
    for path in [path for path in (tmp_path / "cut").glob("*.job/**/*") if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content[: rng.randint(0, len(content))])
    same_files(whole, build("stage2", tmp_path / "cut", Unsteady(lambda: True)))


# ---------------------------------------------------------------------------------------------------- one writer, kills

SLOW = """
import sys, time
from pathlib import Path
sys.path[:0] = {tests!r}
from test_faults import build, rehearsal
from longvpo_hf.responders import ScriptedResponder
def answer(request):
    print("asked", flush=True)
    time.sleep(60)
build({method!r}, Path({folder!r}), ScriptedResponder("slow", answer))
"""


@pytest.mark.parametrize("method", ["stage1", "temporal"])
def test_a_second_run_is_refused_at_once_and_names_the_first(tmp_path: Path, method: str) -> None:
    folder = tmp_path / "both"
    tests = [str(TESTS / "building"), str(TESTS)]
    script = SLOW.format(tests=tests, method=method, folder=str(folder))
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"asked\n"
        name = "rows" if method == "stage1" else "rows.scenes"
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(Locked, match=rf"{name} is being written by another run \(process {first.pid} on .*\)"):
            build(method, folder, rehearsal())
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "the first run's files changed"
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    assert len(rows_of(build(method, folder, rehearsal()))) == 20


@pytest.mark.parametrize(("method", "step"), [("stage1", 1), ("stage2", 3), ("temporal", 13)])
def test_a_kill_before_any_file_operation_leaves_the_old_or_the_new_dataset(
    tmp_path: Path, method: str, step: int
) -> None:
    """See `kill_everywhere.py`: fresh outputs and datasets that are replaced."""
    tried = disturbed(method, tmp_path, step, "kill")
    assert min(tried["old"], tried["nothing"]) > 0
    assert tried["new"] > 0 or step > 1  # a kill between the last operations


@pytest.mark.parametrize(("method", "step"), [("stage1", 3), ("stage2", 7), ("temporal", 29)])
def test_a_disk_that_refuses_any_file_operation_costs_one_sentence(tmp_path: Path, method: str, step: int) -> None:
    """Full, broken, read-only and so on at each operation, and files that the kernel lets grow to a few bytes only."""
    tried = disturbed(method, tmp_path, step, "fail")
    assert min(tried["old"], tried["nothing"]) > 0


def disturbed(method: str, folder: Path, step: int, how: str) -> dict[str, int]:
    script = [sys.executable, str(TESTS / "kill_everywhere.py"), method, str(folder), str(step), how]
    result = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    tried: dict[str, int] = json.loads(result.stdout)
    assert tried["operations"] > 40
    assert tried["disturbed"] >= 2 * (tried["operations"] // step) - 2
    return tried


LOCKING = """
import os, sys
from pathlib import Path
from longvpo_hf.artifacts import Locked, locked
folder = Path(sys.argv[1])
for _ in range(150):
    try:
        with locked(folder / "out"):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
    except Locked:
        pass
"""


def test_a_lock_goes_with_its_file_and_never_has_two_holders(tmp_path: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", LOCKING, str(tmp_path)]) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_replacement_that_was_killed_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old dataset then waits under a third name for the next run."""
    output = build("stage1", tmp_path / "a", rehearsal(), 6)
    before = (output / "train.parquet").read_bytes()
    monkeypatch.setattr("longvpo_hf.artifacts.sys.platform", "other")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "rows.part":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        build("stage1", tmp_path / "a", rehearsal())
    assert not output.exists()
    monkeypatch.setattr(Path, "rename", rename)

    def refuse(request: Request) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("stage1", tmp_path / "a", Scripted(refuse, "other"))
    assert (output / "train.parquet").read_bytes() == before
    build("stage1", tmp_path / "a", rehearsal())
    assert sorted(path.name for path in output.parent.iterdir()) == ["rows", "rows.job", "rows.log"]
