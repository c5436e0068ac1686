"""One build by many: shards in any order, processes, a corpus that moved: the rows of one process, to the byte."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from longvpo_hf.artifacts import Locked, first_file, locked, remove_parts, write_text
from longvpo_hf.building import captioning, engine
from longvpo_hf.building.asking import Remembered
from longvpo_hf.building.executors import HERE, Executor, Merge, Processes, Shard, Unfinished
from longvpo_hf.building.method import Drop
from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.errors import ConfigError, StorageError
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.reasoning import CutOff
from longvpo_hf.responders import Request, Responder, ScriptedResponder
from scenes import Scripted, cite, rows_of, same_files, unfilmed

METHODS = ("stage1", "stage2", "temporal")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_TIMELINES_PER_PIECE", 4)


def fickle(request: Request) -> str:
    """A rehearsal of which every eighth answer is of no use, so that more rounds are needed."""
    answer = rehearsal().answer(request)
    return "" if random.Random(request.text).random() < 1 / 8 else answer


FICKLE = ScriptedResponder("fickle", fickle)


def build(
    method: str, folder: Path, executor: Executor = HERE, model: Responder = FICKLE, media: Path | None = None
) -> dict[str, dict[str, int]]:
    """A build of one method; gives its funnel."""
    videos = unfilmed(media or folder.parent / "media", [3, 5, 4, 6, 3, 4, 5, 3])
    given: dict[str, Any] = {"output": folder / "rows", "judge": model, "executor": executor}
    if method == "stage1":
        pool = [clip for video in videos for clip in video.timeline.clips]
        settings = Stage1Settings(num_rows=40, max_clips=4, questions_per_timeline=2)
        return build_stage1(pool, model, model, settings=settings, **given)
    if method == "stage2":
        given["judge"] = None  # a rehearsal's rejects what is said of these captions
        return build_stage2(videos, model, model, settings=Stage2Settings(num_rows=40), **given)
    return build_temporal(videos, model, model, settings=TemporalSettings(num_rows=40), **given)


def by_shards(method: str, folder: Path, order: Sequence[Shard], **given: Any) -> int:
    """Runs shards, in this order, until they can be merged; gives how often all of them were run."""
    for times in range(1, 20):
        for shard in order:
            build(method, folder, shard, **given)
        try:
            build(method, folder, Merge(), **given)
        except Unfinished:
            continue
        return times
    raise AssertionError("never finished")


def test_a_shard_that_was_given_another_model_is_told_and_so_is_the_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models, settings, seed and videos alike: pieces have their digest in their names."""
    made = "are there as made with another seed, other settings, models or videos"
    build("stage1", tmp_path / "a", Shard(0, 2))
    assert made not in capsys.readouterr().out
    build("stage1", tmp_path / "a", Shard(1, 2), ScriptedResponder("another", fickle))
    assert f"Of these, 0-00-00000, 0-00-00002, 0-00-00004 {made}" in capsys.readouterr().out
    with pytest.raises(Unfinished, match=r"missing: 0-00-00001, 0-00-00003 .* Of these, 0-00-00001, 0-00-00003 are"):
        build("stage1", tmp_path / "a", Merge())


@pytest.mark.parametrize("method", METHODS)
def test_shards_in_any_order_give_the_rows_of_one_process(tmp_path: Path, method: str) -> None:
    whole = build(method, tmp_path / "whole")
    for number in (8, 3) if method == "stage1" else (3,):
        chance = random.Random(number)
        order = [Shard(k, number) for k in range(number)]
        chance.shuffle(order)
        folder = tmp_path / f"shards {number}"
        assert by_shards(method, folder, [*order, chance.choice(order)]) > 1, "more than one round is tried"
        same_files(tmp_path / "whole" / "rows", folder / "rows")
        assert build(method, folder, Merge()) == whole, "every drop has the name that it has in one process"
        for name in ("funnel.json", "dropped.jsonl"):
            assert (folder / "rows.log" / name).read_bytes() == (tmp_path / "whole" / "rows.log" / name).read_bytes()


def test_a_merge_names_what_is_missing_and_says_when_a_round_is_needed(tmp_path: Path) -> None:
    for shard in (0, 2):
        counts = build("stage1", tmp_path / "a", Shard(shard, 3))
        assert counts["stages"]["pieces that others have to work"] >= 1
    said = re.escape("Some shards have not worked their pieces; missing: 0-00-00001, 0-00-00004 (piece P-RR-NNNNN")
    with pytest.raises(Unfinished, match=said):
        build("stage1", tmp_path / "a", Merge())
    assert not (tmp_path / "a" / "rows").exists()
    build("stage1", tmp_path / "a", Shard(1, 3))
    again = tmp_path / "a" / "rows.job"
    for piece in again.glob("0-01-*"):  # the last shard went on with what it could plan
        piece.unlink()
    with pytest.raises(Unfinished, match=r"^Round 2 is needed, to make up for .*; missing: 0-01-"):
        build("stage1", tmp_path / "a", Merge())


@pytest.mark.parametrize("method", METHODS)
def test_a_corpus_that_moved_is_asked_nothing_again(tmp_path: Path, method: str) -> None:
    """Neither finished pieces nor remembered answers know where the folder is, and nor do the rows."""
    build(method, tmp_path / "whole", media=tmp_path / "here" / "media")
    (tmp_path / "here").rename(tmp_path / "there")

    def refuse(request: Request) -> str:
        raise AssertionError(f"asked again: {request}")

    moved = ScriptedResponder("fickle", refuse)
    names = ("rows/train.parquet", "rows/README.md", "rows.log/funnel.json")
    before = [(tmp_path / "whole" / name).read_bytes() for name in names]
    build(method, tmp_path / "whole", model=moved, media=tmp_path / "there" / "media")
    assert [(tmp_path / "whole" / name).read_bytes() for name in names] == before


def test_a_model_that_answers_at_random_asks_one_question_of_an_anchor(tmp_path: Path) -> None:
    """Also of shards that work at the same time: what one was answered, the others take over."""
    chance = random.Random(0)

    def moody(request: Request) -> str:
        if request.text.endswith("Answer Yes or No."):
            return "No" if "Answer 2" in request.text else "Yes"
        return f"What of {chance.random()}?" if "Write one question" in request.text else f"thing {chance.random()}"

    by_shards("stage1", tmp_path / "a", [Shard(k, 8) for k in range(8)], model=ScriptedResponder("moody", moody))
    asked: dict[str, set[str]] = {}
    for row in rows_of(tmp_path / "a" / "rows"):
        anchor = row.timeline.clips[row.evidence[0]]
        key = f"{anchor.path} {anchor.start_seconds}"
        asked.setdefault(key, set()).add(f"{row.question} {row.chosen}")
    assert len(rows_of(tmp_path / "a" / "rows")) == 40 > len(asked)
    assert max(map(len, asked.values())) == 1


def test_shards_share_the_captioning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "_VIDEOS_PER_GROUP", 3)
    timelines = [video.timeline for video in unfilmed(tmp_path / "media", [3, 9, 4, 6, 2, 4, 7, 3])]
    asked: Counter[str] = Counter()

    def caption(name: str, executor: Executor = HERE) -> Any:
        def answer(request: Request) -> str:
            asked[name] += 1
            return fickle(request)

        model = ScriptedResponder("fickle", answer)
        return captioning.caption_videos(timelines, model, model, tmp_path / name / "scenes", executor=executor)

    whole = caption("one")
    with pytest.raises(Unfinished, match=r"captioning .*: 1 of 3 pieces are missing: 00001\."):
        caption("many", Shard(0, 2))
    assert not (tmp_path / "many" / "scenes").exists()
    with pytest.raises(Unfinished, match="00001"):
        caption("many", Merge())
    assert caption("many", Shard(1, 2)) == whole
    assert caption("many", Merge()) == whole
    assert asked["many"] == asked["one"]
    for name in ("scenes/captions.json", "scenes.log/dropped.jsonl", "scenes.log/funnel.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    del timelines[0]  # on the machine of one shard
    said = r"3 pieces are missing: 00000, 00002\. .* Of these, 00000, 00002 are there as made with .*this one lacks"
    with pytest.raises(Unfinished, match=said):
        caption("many", Shard(1, 2))


def test_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    build("temporal", tmp_path / "whole")
    build("temporal", tmp_path / "two", Processes(2))
    same_files(tmp_path / "whole" / "rows", tmp_path / "two" / "rows")


def test_a_shard_may_not_run_twice_at_once_and_has_a_number(tmp_path: Path) -> None:
    shard = Shard(1, 3)
    with locked(shard.place(tmp_path / "a" / "rows")), locked(tmp_path / "a" / "rows"):
        build("stage1", tmp_path / "a", Shard(0, 3))  # others may
    for number in (-1, 3):
        with pytest.raises(ConfigError, match=rf"shard must be in \[0, num_shards=3\), got {number}"):
            Shard(number, 3)
    with pytest.raises(ConfigError, match="num_workers must be ≥ 1"):
        Processes(0)
    assert issubclass(Locked, Exception)


def test_what_is_dropped_in_one_process_is_dropped_by_that_name_in_shards(tmp_path: Path) -> None:
    """Videos that give few questions: in one process nobody answers a question again, in shards some are."""
    videos, funnels = unfilmed(tmp_path / "media", [4] * 7), []
    for name, order in (("whole", [HERE]), ("shards", [Shard(1, 2), Shard(0, 2), Merge()])):
        answerer = Scripted(lambda request: random.Random(request.text + str(request.view)).choice(["", "a", "b", "c"]))
        settings = Stage2Settings(num_rows=60, max_rounds=1)
        for executor in order:
            funnel = build_stage2(videos, Scripted(cite), answerer, tmp_path / name, settings, executor=executor)
        funnels.append(funnel)
    assert funnels[0] == funnels[1]
    assert funnels[0]["dropped"]["duplicate_question"] > 10
    same_files(tmp_path / "whole", tmp_path / "shards")


def test_of_several_writers_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    assert first_file(path, b"first")
    assert not first_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert [other.name for other in path.parent.iterdir()] == ["file"]

    def refuse(*names: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("longvpo_hf.artifacts.os.link", refuse)  # a file system without links
    assert first_file(tmp_path / "other", b"first")
    assert not first_file(tmp_path / "other", b"second")
    assert (tmp_path / "other").read_bytes() == b"first"


@pytest.mark.parametrize("theirs", [None, b"theirs"])
def test_a_folder_that_another_makes_in_the_same_instant_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: bytes | None
) -> None:
    path = tmp_path / "new" / "file"
    link = os.link

    def late(*names: Any) -> None:
        try:
            link(*names)
        except FileNotFoundError:
            path.parent.mkdir()
            if theirs is not None:
                path.write_bytes(theirs)
            raise

    monkeypatch.setattr("longvpo_hf.artifacts.os.link", late)
    assert first_file(path, b"ours", parts=tmp_path) is (theirs is None)
    assert path.read_bytes() == (theirs or b"ours")
    assert [other.name for other in tmp_path.rglob("*") if other.is_file()] == ["file"]


def test_a_place_that_takes_no_file_is_told_at_once() -> None:
    """There, a lock can be had as little as while another holds it."""
    nameless = [(name, "of its own: name one") for name in ("/", ".", "", "..", "a/..")]
    for place, said in [("/proc/rows", "makes no file there"), *nameless]:
        with pytest.raises(StorageError, match=said), locked(Path(place)):
            raise AssertionError("locked")
    with pytest.raises(StorageError, match=r"^/proc/page\.html: the system makes no file there\."):
        write_text(Path("/proc/page.html"), "")


def test_parts_of_others_that_still_write_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import subprocess
    import sys

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    names = {f"a.{host}.{os.getpid()}.01.part", f"a.{host}.{ended.pid}.01.part", "a.elsewhere.1.01.part", "a.1.part"}
    old = tmp_path / "b.elsewhere.1.01.part"
    for path in [*(tmp_path / name for name in names), old]:
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names - {f"a.{host}.{ended.pid}.01.part"}


def test_remembered_answers_are_the_first_and_a_torn_one_is_asked_again(tmp_path: Path) -> None:
    answers: dict[str, str | Drop] = {"aa1": "ü\n", "aa2": Drop("refused", "filter"), "ab3": CutOff("half"), "ac4": ""}
    one, other = Remembered(tmp_path), Remembered(tmp_path)
    for key, answer in answers.items():
        assert one.get(key) is None
        assert one.keep(key, answer) == answer
        assert other.keep(key, "later") == answer == other.get(key)
    assert isinstance(other.get("ab3"), CutOff)
    (path,) = tmp_path.glob("aa/aa1.json")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert Remembered(tmp_path).get("aa1") is None
    one, other = Remembered(tmp_path), Remembered(tmp_path)
    assert one.keep("aa1", "again") == "again" == other.get("aa1")


def test_requests_are_counted_no_more_often_than_in_one_process(tmp_path: Path) -> None:
    """What is remembered is asked once by shards that follow each other, as in one process."""
    totals = []
    for name, order in (("whole", [HERE]), ("shards", [Shard(k, 4) for k in range(4)])):
        asked: Counter[Request] = Counter()

        def count(request: Request, asked: Counter[Request] = asked) -> str:
            asked[request] += 1
            return rehearsal().answer(request)

        model = ScriptedResponder("counted", count)
        if name == "whole":
            build("stage1", tmp_path / name, HERE, model)
        else:
            by_shards("stage1", tmp_path / name, order, model=model)
        totals.append(asked.total())
    assert totals[0] == totals[1]


def test_of_many_that_are_answered_at_the_same_time_all_take_the_first_answer(tmp_path: Path) -> None:
    keys = [f"{number:03}" for number in range(60)]

    def keep_all(worker: int) -> list[Any]:
        remembered = Remembered(tmp_path / "answers")
        return [remembered.keep(key, f"{worker} {key}") for key in random.Random(worker).sample(keys, len(keys))]

    with ThreadPoolExecutor(8) as threads:
        given = [dict(zip(random.Random(n).sample(keys, len(keys)), kept, strict=True))
                 for n, kept in enumerate(threads.map(keep_all, range(8)))]  # fmt: skip
    for key in keys:
        assert len({answers[key] for answers in given}) == 1
    assert not list(tmp_path.rglob("*.part"))
