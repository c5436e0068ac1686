"""The Stage-1 builder as a job: what a kill may cost, the judge, and every draft accounted for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from torchcodec.encoders import VideoEncoder

from longvpo_hf.artifacts import Journal, Log
from longvpo_hf.building.filters import check_answer, check_pair, check_question
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1, clips_for_budget
from longvpo_hf.preference import undecoded
from longvpo_hf.responders import Request, ScriptedResponder
from longvpo_hf.responders.replies import yes_or_no
from longvpo_hf.timeline import Clip
from media import unfilmed_bytes

SETTINGS = Stage1Settings(num_rows=150, max_clips=4, seed=7)


@pytest.fixture
def pool(tmp_path: Path) -> list[Clip]:
    """Clips whose media are never decoded here: bytes with the name of a video."""
    clips = []
    for number in range(40):
        path = tmp_path / "media" / f"{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(unfilmed_bytes(f"clip {number}"))
        clips.append(Clip(str(path), 0.0, 2.0 + number % 3))
    return clips


def ask(request: Request) -> str:
    return f"What is in {Path(request.timeline.clips[0].path).stem} ?"


def answer(request: Request) -> str:
    seen = request.view.of(request.timeline)
    return " ".join(Path(clip.path).stem for clip in seen.clips)


WRITER = ScriptedResponder("writer", ask)
ANSWERER = ScriptedResponder("answerer", answer)


def rows_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / "train.parquet").to_pylist()


def test_a_build_goes_on_where_it_stopped_and_ends_with_the_same_rows(pool: list[Clip], tmp_path: Path) -> None:
    build_stage1(pool, WRITER, ANSWERER, tmp_path / "whole", SETTINGS)
    asked: Counter[str] = Counter()

    def dying(request: Request) -> str:
        asked["first"] += 1
        if asked["first"] == 160:
            raise KeyboardInterrupt
        return answer(request)

    def counting(request: Request) -> str:
        asked["second"] += 1
        return answer(request)

    with pytest.raises(KeyboardInterrupt):
        build_stage1(pool, WRITER, ScriptedResponder("answerer", dying), tmp_path / "cut", SETTINGS)
    assert not (tmp_path / "cut").exists()
    build_stage1(pool, WRITER, ScriptedResponder("answerer", counting), tmp_path / "cut", SETTINGS)

    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    for name in ("funnel.json", "dropped.jsonl"):
        assert (tmp_path / "cut.log" / name).read_bytes() == (tmp_path / "whole.log" / name).read_bytes()
    # About 190 calls in all; the first of three pieces was done, and is not asked again.
    assert 0 < asked["second"] < 110


def test_a_model_that_answers_differently_each_time_leaves_one_chosen_answer_per_anchor(
    pool: list[Clip], tmp_path: Path
) -> None:
    calls: Counter[str] = Counter()

    def moody(request: Request) -> str:
        calls["n"] += 1
        if calls["n"] == 160:
            raise KeyboardInterrupt
        return f"{answer(request)} {calls['n']}"

    with pytest.raises(KeyboardInterrupt):
        build_stage1(pool, WRITER, ScriptedResponder("answerer", moody), tmp_path / "rows", SETTINGS)
    build_stage1(pool, WRITER, ScriptedResponder("answerer", moody), tmp_path / "rows", SETTINGS)
    chosen: dict[str, set[str]] = {}
    for row in rows_of(tmp_path / "rows"):
        chosen.setdefault(row["prompt"][0]["content"], set()).add(row["chosen"][0]["content"])
    assert max(len(answers) for answers in chosen.values()) == 1


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = {tests!r}
from test_kills import SETTINGS, WRITER, ScriptedResponder, answer, build_stage1
from longvpo_hf.timeline import Clip
def slow(request):
    time.sleep({seconds})
    return answer(request)
media = sorted(Path({media!r}).iterdir(), key=lambda path: int(path.stem))
pool = [Clip(str(path), 0.0, 2.0 + number % 3) for number, path in enumerate(media)]
build_stage1(pool, WRITER, ScriptedResponder("answerer", slow), Path({output!r}), SETTINGS)
"""


def test_kill_9_at_any_instant(pool: list[Clip], tmp_path: Path) -> None:
    build_stage1(pool, WRITER, ANSWERER, tmp_path / "whole", SETTINGS)
    script = SCRIPT.format(
        tests=[str(folder) for folder in Path(__file__).parents[:2]],
        media=str(tmp_path / "media"),
        output=str(tmp_path / "cut"),
        seconds=0.004,
    )
    for pieces in (1, 2):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((tmp_path / "cut.job").glob("*.jsonl"))) < pieces:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut").exists()
    build_stage1(pool, WRITER, ANSWERER, tmp_path / "cut", SETTINGS)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_other_settings_never_meet_old_pieces(pool: list[Clip], tmp_path: Path) -> None:
    build_stage1(pool, WRITER, ANSWERER, tmp_path / "rows", SETTINGS)
    louder = ScriptedResponder("answerer-2", lambda request: answer(request).upper() + "!")
    build_stage1(pool, WRITER, louder, tmp_path / "rows", SETTINGS)
    assert all(row["chosen"][0]["content"].endswith("!") for row in rows_of(tmp_path / "rows"))


def test_every_draft_is_a_row_or_a_named_drop(pool: list[Clip], tmp_path: Path) -> None:
    bad = {"3": "", "4": "I'm sorry, I can't help.", "5": "x" * 5000, "6": "What is in 6 ?"}
    odd = {"7": "", "8": "A nice clip.", "9": "What is in the first clip ?", "10": "What? " * 500}

    def asking(request: Request) -> str:
        return odd.get(Path(request.timeline.clips[0].path).stem, ask(request))

    def answering(request: Request) -> str:
        if request.text == "What is in 11 ?":
            return "same"
        if request.view.keep:  # the anchor alone
            return bad.get(answer(request), answer(request))
        return answer(request)

    answerer = ScriptedResponder("answerer", answering)
    funnel = build_stage1(pool, ScriptedResponder("writer", asking), answerer, tmp_path / "rows", SETTINGS)
    stages, dropped = funnel["stages"], funnel["dropped"]
    beyond = stages.get("drafts beyond the rows asked for", 0)
    assert stages["drafts"] == stages["rows"] + beyond + sum(dropped.values())
    assert set(dropped) == {
        "empty_answer", "refusal", "answer_too_long", "repeats_question",
        "empty_question", "no_question", "names_position", "question_too_long", "answers_agree",
    }  # fmt: skip
    logged = [json.loads(line) for line in (tmp_path / "rows.log" / "dropped.jsonl").read_text().splitlines()]
    assert Counter(entry["reason"] for entry in logged) == dropped
    assert len(rows_of(tmp_path / "rows")) == stages["rows"] == SETTINGS.num_rows


def test_the_judge_is_heard(pool: list[Clip], tmp_path: Path) -> None:
    heard: list[Request] = []

    def judge(request: Request) -> str:
        heard.append(request)
        if "several distinct things" in request.text:
            return "No." if "What is in 1 ?" in request.text else "Yes, it does."
        return "Yes" if "Answer 1: 2\n" in request.text else "no"

    funnel = build_stage1(pool, WRITER, ANSWERER, tmp_path / "rows", SETTINGS, judge=ScriptedResponder("judge", judge))
    rows = rows_of(tmp_path / "rows")
    questions = {row["prompt"][0]["content"] for row in rows}
    assert "What is in 1 ?" not in questions
    assert "What is in 2 ?" not in questions
    assert funnel["dropped"].keys() == {"not_specific", "rejected_is_right"}
    # The judge sees the anchor and nothing else.
    assert all(len(request.timeline) == 1 for request in heard)
    assert rows[0]["provenance"]["verdicts"] == ["specific", "answers_differ", "rejected_is_wrong"]
    assert "judge" in (tmp_path / "rows" / "README.md").read_text()


def test_a_judge_that_says_neither_yes_nor_no_is_named(pool: list[Clip], tmp_path: Path) -> None:
    for of_question in ("Yes", "Perhaps"):
        judge = ScriptedResponder("j", lambda r, said=of_question: said if "several distinct" in r.text else "Perhaps")
        with pytest.raises(ValueError, match=r"No row came out; dropped: malformed_verdict \d+\."):
            build_stage1(pool, WRITER, ANSWERER, tmp_path / of_question, SETTINGS, judge=judge)


def test_rows_are_never_doubled(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.mp4" for number in range(3)]
    for path in paths:
        path.write_bytes(unfilmed_bytes(path.stem))
    pool = [Clip(str(path), 0.0, 1.0) for path in paths]
    settings = Stage1Settings(num_rows=50, max_clips=2, seed=1)
    funnel = build_stage1(pool, WRITER, ANSWERER, tmp_path / "rows", settings)
    ids = [row["id"] for row in rows_of(tmp_path / "rows")]
    assert len(ids) == len(set(ids)) == 12  # 3 anchors × 2 distractors × 2 orders
    assert funnel["dropped"]["duplicate_row"] > 0


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What does the woman in the red coat carry?", None),
        ("  ", "empty_question"),
        ("A man walks.", "no_question"),
        ("What happens in the second scene?", "names_position"),
        ("What is shown at the end of the video?", "names_position"),
        ("Who wins first?", None),
        ("I cannot see the video, could you describe it?", "refusal"),
        ("Why? " * 400, "question_too_long"),
    ],
)
def test_questions(question: str, reason: str | None) -> None:
    assert check_question(question) == reason


def test_answers() -> None:
    assert check_answer("What is it?", "A dog.") is None
    assert check_answer("What is it?", "what is it") == "repeats_question"
    assert check_pair("The dog.", "a Dog") == "answers_agree"
    assert check_pair("the", "a") is None
    assert check_pair("!", "!") == "answers_agree"


def test_verdicts() -> None:
    assert [yes_or_no(text) for text in ("Yes.", " no, since", "**Yes**", "Maybe", "", "12")] == [
        True, False, True, None, None, None,
    ]  # fmt: skip


def test_clips_for_budget() -> None:
    clips = [Clip("a.mp4", 0.0, seconds) for seconds in (6.0, 8.0, 30.0)]
    assert clips_for_budget(clips, num_frames=128, fps=1.0) == 16
    assert clips_for_budget(clips, num_frames=4, fps=1.0) == 2
    many = clips * 7
    assert Stage1Settings(frame_budget=128).fitted(many).max_clips == 16
    assert Stage1Settings(frame_budget=128).fitted(clips).max_clips == 3  # of those there are
    assert Stage1Settings(frame_budget=4, min_clips=3).fitted(many).max_clips == 3
    assert Stage1Settings(max_clips=5).fitted(many).max_clips == 5


def test_a_piece_is_worked_out_once_and_whole(tmp_path: Path) -> None:
    job = Journal(tmp_path, "settings")
    assert job.piece("a", [1], lambda log: [{"x": "ü\u2028"}]) == [{"x": "ü\u2028"}]
    assert job.piece("a", [1], lambda log: pytest.fail("asked again")) == [{"x": "ü\u2028"}]
    assert job.piece("a", [2], lambda log: []) == []
    assert Journal(tmp_path, "others").piece("a", [1], lambda log: [{"x": 2}]) == [{"x": 2}]

    def dies(log: Log) -> list[dict]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        job.piece("b", [], dies)
    assert not list(tmp_path.glob("b-*"))


def test_a_dataset_built_again_is_loaded_anew_and_one_file_is_enough(tmp_path: Path) -> None:
    video = tmp_path / "one.mp4"
    VideoEncoder(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), frame_rate=4).to_file(str(video))
    pool = [Clip(str(video), 0.0, 1.0, source_id="one"), Clip(str(video), 1.0, 2.0, source_id="two")]
    settings = Stage1Settings(num_rows=2, max_clips=2, seed=1)
    answers = []
    for word in ("old", "new"):
        answerer = ScriptedResponder(
            word, lambda request, word=word: f"{word} {request.view.of(request.timeline).clips[0].start_seconds}"
        )
        build_stage1(pool, WRITER, answerer, tmp_path / "rows", settings)
        rows = undecoded(load_dataset(str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache")))
        answers.append(rows[0]["chosen"][0]["content"].split()[0])
    assert answers == ["old", "new"]


def test_no_row_at_all_is_an_error_that_says_why(pool: list[Clip], tmp_path: Path) -> None:
    silent = ScriptedResponder("silent", lambda request: "")
    with pytest.raises(ValueError, match=r"No row came out; dropped: empty_question \d+\. See"):
        build_stage1(pool, silent, ANSWERER, tmp_path / "rows", SETTINGS)
    assert not (tmp_path / "rows").exists()
    assert (tmp_path / "rows.log" / "funnel.json").exists()
