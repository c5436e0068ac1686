"""`longvpo eval` and the model `longvpo` of lmms-eval, end to end on tiny doubles of the real benchmarks.

The model answers C to everything, its adapter B, so every score below is counted by hand from the rows of
`benchmark_doubles`. lmms-eval runs as it is, in this process, since importing it takes ten seconds.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoProcessor

import benchmark_doubles as doubles
import tiny_models
from cli import Result, longvpo
from longvpo_hf.decoding import Decoding
from longvpo_hf.errors import ConfigError, ModelError
from longvpo_hf.evaluation import adapter, preflight
from longvpo_hf.evaluation.longvideo_mcq.answers import is_cut_off
from longvpo_hf.evaluation.preflight import bounds_named, suites_named
from longvpo_hf.evaluation.run import Contestant
from longvpo_hf.evaluation.sampling import sampler_of, trained_sampling
from longvpo_hf.evaluation.suites import suites
from longvpo_hf.evaluation.task_files import task_names, tasks_folder
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.publishing.model_card import write_model_card
from longvpo_hf.record import ModelRecord, Sampling, Source, read_record
from longvpo_hf.responders import LocalResponder, Request
from longvpo_hf.training.config import LongVPOConfig

ALL = "longvideobench,mlvu,videomme,mvbench,lvbench"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return doubles.write_data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return doubles.write_model(tmp_path_factory.mktemp("models") / "answers-c")


@pytest.fixture(scope="module")
def lora(model: Path) -> Path:
    return doubles.write_adapter(model, model.parent / "answers-b")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Request]]:
    """The requests of every call that was answered."""
    calls: list[list[Request]] = []
    respond = LocalResponder.respond

    def spied(self: LocalResponder, requests: Sequence[Request]) -> list[str]:
        answers = respond(self, requests)
        calls.append(list(requests))
        return answers

    monkeypatch.setattr(LocalResponder, "respond", spied)
    return calls


def longvpo_eval(*arguments: object) -> Result:
    """The command; whoever calls it from Python finds the process as it was, though lmms-eval seeds every generator."""

    def state() -> list[Any]:
        generators = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
        names = ("LONGVPO_EVAL_DATA", "LMMS_CACHE_RUN_ID", "TQDM_DISABLE", "TRANSFORMERS_VERBOSITY")
        return [*(os.environ.get(name) for name in names), str(warnings.filters), *generators]

    before = state()
    result = longvpo(["eval", *map(str, arguments)])
    assert state() == before
    return result


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------------- the command


def test_scores_of_a_model_and_its_adapter(
    root: Path, model: Path, lora: Path, tmp_path: Path, asked: list[list[Request]]
) -> None:
    result = longvpo_eval(
        f"base={model}", f"stage1={lora}", "--tasks", ALL, "--data-root", root, "--frames", "3", "--output", tmp_path,
        "--batch-size", "4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    base, stage1 = (json.loads((tmp_path / f"{stage}-3.json").read_text("utf-8")) for stage in ("base", "stage1"))
    assert {key: value for key, value in base.items() if key != "tasks"} == {
        "model": "answers-c",
        "stage": "base",
        "num_frames": 3,
        "fps": 1.0,
        "max_pixels": 448 * 448,
        "max_new_tokens": {},
        "decoding": {"temperature": 0.0, "top_p": 1.0, "decoding_seed": 0, "thinking": None},
        "limit": None,
        "published": None,
        "baselines": {},
    }
    protocols = {name: task.pop("protocol") for name, task in base["tasks"].items()}
    assert protocols == {name: task.pop("protocol") for name, task in stage1["tasks"].items()}
    protocol = protocols["videomme_subtitles"]["official"]
    assert protocol["hash"] in result.output
    assert (protocol["sampling"], protocol["subtitles"]) == (
        "at most 3 frames, 1 a second, 200704 pixels each",
        "of the frames",
    )
    assert (protocol["dtype"], protocol["decoding"], protocol["max_new_tokens"]) == ("float32", "greedy", 32)
    assert stage1["model"] == "answers-b"

    def score(value: float, n: int) -> dict[str, Any]:
        return {"score": pytest.approx(value), "n": n}

    third = 100 / 3
    # The models say a letter and no more: both parsers read it, and LongVideoBench's own draws nothing.
    plain = {"overall": 50.0, "official": 50.0, "n": 4, "unparsed": 0.0, "cut_off": 0.0}
    videomme = {"short": score(50, 2), "medium": score(100, 1), "long": score(0, 1)}
    c_tasks = {name: score(100, 1) for name in ("ego", "order")}
    b_tasks = {name: score(100, 1) for name in ("plotQA", "topic_reasoning")}
    none = {name: score(0, 1) for name in ("topic_reasoning", "anomaly_reco", "ego", "plotQA", "order", "count")}
    assert base["tasks"] == {
        "longvideobench": {
            **plain,
            "groups": {"15s": score(100, 1), "60s": score(100, 1), "600s": score(0, 1), "3600s": score(0, 1)},
        },
        "mlvu": {
            "overall": pytest.approx(100 * 4 / 9),
            "official": pytest.approx((2 * third + 200) / 7),
            "n": 9,
            "unparsed": 0.0,
            "cut_off": 0.0,
            "groups": {**none, **c_tasks, "needle": score(2 * third, 3)},
            "m_avg": pytest.approx((2 * third + 200) / 7),
        },
        "videomme": {**plain, "groups": videomme},
        "videomme_subtitles": {**plain, "groups": videomme},
        "mvbench": {
            # Of each subset two questions: C is no option of the first, and right of the second in every other one.
            "overall": pytest.approx(25.0),
            "official": pytest.approx(25.0),
            "n": 40,
            "unparsed": 50.0,
            "cut_off": 0.0,
            "groups": {name: score(0 if i % 2 else 50, 2) for i, name in enumerate(doubles.MVBENCH_FOLDERS)},
        },
        "lvbench": {"overall": 50.0, "official": 50.0, "n": 2, "unparsed": 0.0, "cut_off": 0.0, "groups": {}},
    }
    assert stage1["tasks"]["mlvu"]["groups"] == {**none, **b_tasks, "needle": score(0, 3)}
    assert stage1["tasks"]["mlvu"]["m_avg"] == pytest.approx(200 / 7)
    assert stage1["tasks"]["mvbench"]["overall"] == 50.0
    assert stage1["tasks"]["mvbench"]["unparsed"] == 0.0
    assert stage1["tasks"]["lvbench"]["overall"] == 0.0

    for parser in ("ours", "official"):
        assert f"| LongVideoBench, {parser} | 50.0 measured | 25.0 (-25.0) measured |" in result.output
    assert "Video-MME, with subtitles, ours | 50.0 measured | 25.0 (-25.0) measured" in (
        tmp_path / "card.md"
    ).read_text("utf-8")
    assert json.loads((tmp_path / "table.json").read_text("utf-8"))["tables"][0]["num_frames"] == 3
    index = yaml.safe_load((tmp_path / "stage1.model-index.yaml").read_text("utf-8"))["model-index"]
    assert [model["name"] for model in index] == ["stage1"]
    assert 50.0 in [metric["value"] for result in index[0]["results"] for metric in result["metrics"]]
    assert (tmp_path / "hub/stage1/.eval_results/mlvu.yaml").is_file()
    assert (
        "| MLVU (M-Avg) | Stage 1 − base | -9.5 | – | 1 | 2 : 4 | 9 (3) | – | too few videos to tell |" in result.output
    )
    answers = lines(tmp_path / "answers/base-3/mvbench.jsonl")
    assert answers[:2] == [
        {"task": "longvpo_mvbench_action_antonym", "row": row, "text": "C", "repeat": 0, "score": value,
         "official": value, "choice": choice, "cut_off": False,
         "answer": answer, "group": "action_antonym", "facts": {}, "video": f"mvbench_video/ssv2_video_mp4/v{row}.mp4"}
        for row, value, choice, answer in [(0, 0.0, "", "B"), (1, 100.0, "C", "C")]
    ]  # fmt: skip

    # Each model saw every question once, from frames of 1 s apart at most.
    requests = [request for call in asked for request in call]
    assert len(requests) == 2 * (4 + 9 + 4 + 4 + 40 + 2)
    # v2 lasts 6 s: 3 frames at 1, 3 and 5 s, when `line 1`, nothing and `line 5` are shown. Others have no subtitles.
    texts = {
        (request.timeline.clips[0].path.rsplit("/")[-1], request.text.partition("\nSelect the best answer")[0])
        for request in requests
        if request.timeline and request.text.startswith("This video's subtitles")
    }
    head = "This video's subtitles are listed below: \n"
    no_subtitles = {(f"v{i}.mp4", f"{head}No subtitles available") for i in (0, 1)}
    assert texts == {("v2.mp4", f"{head}line 1\nline 5"), *no_subtitles}


def test_an_interrupted_run_goes_on_where_it_stopped(
    root: Path, model: Path, tmp_path: Path, asked: list[list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_WINDOW_BATCHES", 2)
    video = root / "mlvu/v2.mp4"  # of the questions 2, 5 and 8
    content = video.read_bytes()
    arguments = (model, "--tasks", "mlvu", "--data-root", root, "--frames", "2", "--output", tmp_path)
    video.unlink()  # other benchmarks link to the same file
    video.write_bytes(b"no video")
    try:
        # Known before a model is loaded; where it is broken later, errors surface: no empty answer stands in for one.
        told = longvpo_eval(*arguments)
        assert f"1 of 3 videos are files that are cut off, or no videos: {video}\n" in told.output
        assert f"rm -f -- {video}\n" in told.output
        monkeypatch.setattr(preflight, "is_whole", lambda _: True)
        stopped = longvpo_eval(*arguments)
    finally:
        video.write_bytes(content)
    assert told.exit_code == stopped.exit_code == 2
    assert "longvpo eval: unreadable: " in stopped.output
    assert "v2.mp4" in stopped.output
    assert not list(tmp_path.glob("*.json"))
    assert [len(call) for call in asked] == [2]
    asked.clear()
    assert longvpo_eval(*arguments).exit_code == 0
    assert [len(call) for call in asked] == [2, 2, 2, 1]  # the first two are kept
    asked.clear()
    result = longvpo_eval(*arguments)
    assert result.exit_code == 0
    assert asked == []  # all from the cache
    scores = json.loads((tmp_path / "answers-c-2.json").read_text("utf-8"))
    assert scores["stage"] is None
    assert scores["tasks"]["mlvu"]["m_avg"] == pytest.approx((200 / 3 + 200) / 7)
    # A file that looks like one and cannot be decoded is told in the same way, and what was answered before it is kept.
    monkeypatch.setattr(adapter, "_WINDOW_BATCHES", 4)
    broken = bytearray(content)
    begin = broken.index(b"mdat") + 4
    end = begin - 8 + int.from_bytes(broken[begin - 8 : begin - 4], "big")
    broken[begin:end] = random.Random(0).randbytes(end - begin)
    video.unlink()
    video.write_bytes(bytes(broken))
    try:
        stopped = longvpo_eval(*arguments, "--max-pixels", "1024")
    finally:
        video.write_bytes(content)
    assert stopped.exit_code == 2, stopped.exception
    assert "longvpo eval: unreadable: " in stopped.output
    assert "v2.mp4" in stopped.output
    assert longvpo_eval(*arguments, "--max-pixels", "1024").exit_code == 0
    assert [len(call) for call in asked] == [2, 4, 3]
    asked.clear()
    # Another sampling has answers of its own.
    assert longvpo_eval(*arguments, "--fps", "none").exit_code == 0
    assert sum(map(len, asked)) == 9


def test_further_suites_are_scored_as_their_authors_do(
    root: Path, model: Path, tmp_path: Path, asked: list[list[Request]]
) -> None:
    """C to every question: counted by hand from the rows."""
    names = "mlvu_test,timescope,longtimescope,videomme_v2,videoevalpro,cgbench,tvbench"
    arguments = (model, "--tasks", names, "--data-root", root, "--frames", "1", "--output", tmp_path)
    assert longvpo_eval(*arguments, "--limit", "1").exit_code == 0
    tasks = json.loads((tmp_path / "answers-c-1.json").read_text("utf-8"))["tasks"]
    assert {name: task["n"] for name, task in tasks.items()} == {
        **dict.fromkeys(names.split(","), 1),
        "tvbench": 10,
    }
    result = longvpo_eval(*arguments)
    assert result.exit_code == 0, result.output
    tasks = json.loads((tmp_path / "answers-c-1.json").read_text("utf-8"))["tasks"]
    assert tasks["mlvu_test"]["m_avg"] == tasks["mlvu_test"]["official"] == pytest.approx((100 + 50) / 2)
    for name in ("timescope", "longtimescope"):
        assert tasks[name]["overall"] == tasks[name]["official"] == pytest.approx(100 * 2 / 3)
        assert list(tasks[name]["groups"]) == ["60", "10800"]
    # Three of four ways to ask one thing are 9/16; of four steps the first two, of which one is of a pair, 4/12.
    assert tasks["videomme_v2"]["group_score"] == pytest.approx((100 * 9 / 16 + 100 * 4 / 12) / 2)
    assert tasks["videomme_v2"]["overall"] == pytest.approx(100 * 6 / 8)
    assert tasks["videoevalpro"]["overall"] == tasks["cgbench"]["overall"] == tasks["tvbench"]["overall"] == 50.0
    assert tasks["videoevalpro"]["groups"]["Local Perception"] == {"score": 100.0, "n": 1}
    assert "| Video-MME-v2 (group score), ours | 44.8 measured |" in result.output
    assert "| TimeScope: 10800 | 100.0 measured |" in result.output
    # What was answered is kept: nothing is asked again, also not what the run with a limit had asked.
    assert sum(map(len, asked)) == 3 + 3 + 3 + 8 + 2 + 2 + 10
    asked.clear()
    assert longvpo_eval(*arguments).exit_code == 0
    assert asked == []


def test_baselines_ask_the_same_questions_of_less(
    root: Path, model: Path, tmp_path: Path, asked: list[list[Request]]
) -> None:
    result = longvpo_eval(
        model, "--tasks", "lvbench,videomme", "--data-root", root, "--frames", "4", "--fps", "none",
        "--output", tmp_path, "--baselines", "--limit", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "answers-c-4.json").read_text("utf-8"))
    assert list(scores["baselines"]) == ["no video", "one frame", "shuffled frames"]
    hashes = {scores["tasks"]["lvbench"]["protocol"]["ours"]["hash"]}
    for shown, tasks in scores["baselines"].items():
        assert tasks["lvbench"]["protocol"]["ours"]["shown"] == shown
        assert tasks["lvbench"]["overall"] == 50.0
        hashes.add(tasks["lvbench"]["protocol"]["ours"]["hash"])
        assert f"| LVBench, ours: {shown} | 50.0 measured |" in result.output
        assert f"| LVBench | answers-c − answers-c with {shown} | +0.0 |" in result.output
    assert len(hashes) == 4
    sampler = sampler_of(Sampling(4, None))
    by_text: dict[str, list[Request]] = {}
    for request in (request for call in asked for request in call):
        by_text.setdefault(request.text, []).append(request)
    assert {len(requests) % 4 for requests in by_text.values()} == {0}, "each question four times"
    whole, *others = [request for text, requests in by_text.items() if "year" in text for request in requests[::2]]
    (nothing,) = [request for request in others if request.timeline is None]
    (single,) = [request for request in others if request.view.num_frames == 1]
    (shuffled,) = [request for request in others if request.timeline and len(request.timeline) == 4]
    assert nothing.text == single.text == shuffled.text == whole.text
    frames = [sampler(each.timeline, each.view) for each in (whole, shuffled) if each.timeline]
    assert frames[0].timeline_seconds == pytest.approx(frames[1].timeline_seconds)
    first, second = ([hash(frame.numpy().tobytes()) for frame in each.pixels] for each in frames)
    assert first != second
    assert sorted(first) == sorted(second)
    assert single.timeline is not None
    assert len(sampler(single.timeline, single.view)) == 1


@pytest.mark.usefixtures("no_model")
def test_models_that_see_videos_otherwise_are_refused_before_they_answer(root: Path, tmp_path: Path) -> None:
    for number in range(2):
        sampling = Sampling(8, 1.0 + number)
        write_model_card(tmp_path / f"m{number}", ModelRecord("trained", "me/trained", Source("base"), sampling))
        (tmp_path / f"m{number}" / "config.json").write_text('{"model_type": "internvl"}', encoding="utf-8")
    arguments = (tmp_path / "m0", tmp_path / "m1", "--tasks", "lvbench", "--data-root", root, "--output", tmp_path)
    result = longvpo_eval(*arguments)
    assert result.exit_code == 2
    assert "m1 and m0 would not be measured alike: at most 8 frames, 2 a second" in result.output
    assert "m0 lacks weights" in longvpo_eval(*arguments, "--fps", "1").output, "asked alike, they are looked at"


def test_a_checkpoint_with_a_record_gets_its_results(root: Path, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "trained")
    write_model_card(folder, ModelRecord("trained", "me/trained", Source("base"), Sampling(2)))
    arguments = (folder, "--tasks", "lvbench", "--data-root", root, "--output", tmp_path / "out")
    assert longvpo_eval(*arguments, "--limit", "1").exit_code == 0
    assert not (folder / ".eval_results").exists(), "of a few questions"
    assert longvpo_eval(*arguments).exit_code == 0
    record = read_record(folder, ModelRecord)
    assert record is not None
    assert [(each.metric_name, each.metric_value) for each in record.evaluations] == [("LVBench, 2 frames", 50.0)]
    assert "greedy, at most 32 tokens" in str(record.evaluations[0].metric_args)
    assert "| LVBench, 2 frames | 50.0 |" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / ".eval_results/lvbench.yaml").is_file()


def test_a_published_protocol_is_followed_and_said(root: Path, model: Path, tmp_path: Path) -> None:
    result = longvpo_eval(
        model, "--tasks", "lvbench", "--data-root", root, "--output", tmp_path, "--protocol", "lmms", "--frames", "2"
    )
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "answers-c-2.json").read_text("utf-8"))
    assert (scores["num_frames"], scores["fps"], scores["max_pixels"]) == (2, None, 1605632)
    said = (
        "Departs from it: num\\_frames 2 instead of 32."
        if "num\\_frames" in result.output
        else "num_frames 2 instead of 32"
    )
    for text in (result.output, (tmp_path / "card.md").read_text("utf-8")):
        assert said in text
    assert longvpo_eval(model, "--protocol", "gpt", "--data-root", root).exit_code == 2


def test_sampled_answers_are_drawn_several_times(
    root: Path, model: Path, tmp_path: Path, asked: list[list[Request]]
) -> None:
    arguments = (model, "--tasks", "mlvu", "--data-root", root, "--frames", "1", "--output", tmp_path)
    refused = longvpo_eval(*arguments, "--repeats", "3")
    assert refused.exit_code == 2
    assert "greedy answers are the same each time, got 3: set a temperature > 0" in refused.output
    sampled = (*arguments, "--temperature", "4", "--decoding-seed", "7", "--max-new-tokens", "4")
    result = longvpo_eval(*sampled, "--repeats", "3")
    assert result.exit_code == 0, result.output
    assert sum(map(len, asked)) == 27
    written = lines(tmp_path / "answers/answers-c-1/mlvu.jsonl")
    texts = [[line["text"] for line in written if line["repeat"] == repeat] for repeat in range(3)]
    assert len({tuple(each) for each in texts}) == 3, "other answers each time"
    task = json.loads((tmp_path / "answers-c-1.json").read_text("utf-8"))["tasks"]["mlvu"]
    scores = task["repeats"]["ours"]["scores"]
    assert (len(scores), task["n"]) == (3, 9)
    assert task["m_avg"] == pytest.approx(float(np.mean(scores)))
    assert task["repeats"]["ours"]["spread"] == pytest.approx(float(np.std(scores, ddof=1)))
    assert task["protocol"]["ours"]["repeats"] == 3
    assert f"{task['m_avg']:.1f} ± {task['repeats']['ours']['spread']:.1f} measured" in result.output
    # The first of them is what one draw gives, and is not drawn again.
    asked.clear()
    assert longvpo_eval(*sampled).exit_code == 0
    assert asked == []
    assert [line["text"] for line in lines(tmp_path / "answers/answers-c-1/mlvu.jsonl")] == texts[0]


def test_a_limit_asks_less(root: Path, model: Path, tmp_path: Path) -> None:
    result = longvpo_eval(
        model, "--tasks", "mlvu", "--data-root", root, "--frames", "1", "--output", tmp_path, "--limit", "4"
    )
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "answers-c-1.json").read_text("utf-8"))["tasks"]["mlvu"]
    # needle C, C, A and ego C; the tasks that were not asked stand nowhere and count for nothing
    assert scores["groups"].keys() == {"needle", "ego"}
    assert scores["m_avg"] == pytest.approx((200 / 3 + 100) / 2)
    for name in ("card.md", "table.md"):
        assert "Only the first 4 questions" in (tmp_path / name).read_text("utf-8")
    assert not list(tmp_path.glob("*.model-index.yaml")), "they could not say it"


def test_two_models_of_one_name_are_refused(root: Path, model: Path, tmp_path: Path) -> None:
    result = longvpo_eval(model, model, "--data-root", root, "--output", tmp_path)
    assert result.exit_code == 2
    assert "write STAGE=MODEL" in result.output
    # Their files would have one name.
    result = longvpo_eval("org/a", "org_a=org/b", "--data-root", root, "--output", tmp_path)
    assert result.exit_code == 2
    assert "write STAGE=MODEL" in result.output


def test_a_number_of_frames_named_twice_is_asked_once(root: Path, model: Path, tmp_path: Path) -> None:
    result = longvpo_eval(
        model, "--tasks", "lvbench", "--data-root", root, "--frames", "2,2", "--output", tmp_path, "--limit", "1"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "answers-c-2.json").is_file()


def test_tasks_dir_is_what_lmms_eval_includes() -> None:
    result = longvpo_eval("--tasks-dir")
    assert result.exit_code == 0
    assert Path(result.output.strip()) == tasks_folder()
    assert (tasks_folder() / "longvpo.yaml").is_file()


# ---------------------------------------------------------------------------------------------------- lmms-eval itself


def test_lmms_eval_runs_the_group_of_all(
    root: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmms_eval.__main__ import cli_evaluate

    monkeypatch.setenv("LONGVPO_EVAL_DATA", str(root))
    arguments = ["--model", "longvpo", "--model_args", f"pretrained={lora},num_frames=3,fps=none", "--batch_size", "4"]
    arguments += ["--tasks", "longvpo", "--include_path", str(tasks_folder()), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *arguments])
    cli_evaluate()
    (file,) = tmp_path.rglob("*_results.json")
    scores = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert scores["longvpo_mvbench"]["score,none"] == 50.0
    assert scores["longvpo_mvbench"]["official,none"] == 50.0
    assert scores["longvpo_mvbench"]["unparsed,none"] == scores["longvpo_mvbench"]["cut_off,none"] == 0.0
    assert scores["longvpo_mlvu"]["m_avg,none"] == pytest.approx(200 / 7)
    assert scores["longvpo_mlvu"]["score_plotQA,none"] == 100.0
    assert [scores["longvpo_longvideobench"][f"score_{group}s,none"] for group in (15, 60, 600, 3600)] == [0, 0, 0, 100]
    assert scores["longvpo_videomme_subtitles"]["score_short,none"] == 50.0
    assert scores["longvpo_videomme_plain"]["score_medium,none"] == 0.0
    assert scores["longvpo_lvbench"]["score,none"] == 0.0
    # Questions about one video are no independent samples: its standard error is that of 3 videos, not of 9 questions.
    stderrs = [scores["longvpo_mlvu"][f"score_stderr_{kind},none"] for kind in ("clt", "clustered")]
    assert all(isinstance(stderr, float) for stderr in stderrs)
    assert stderrs[0] != stderrs[1]
    capsys.readouterr()


def test_every_task_file_is_a_task_or_a_group() -> None:
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=str(tasks_folder()), include_defaults=False)
    names = {path.stem for path in tasks_folder().rglob("*.yaml")}
    assert set(manager.all_tasks) == names
    assert all(name.startswith("longvpo") for name in names)
    assert {task for suite in suites().values() for task in task_names(suite)} < names


def test_two_processes_share_the_questions(root: Path, model: Path, tmp_path: Path) -> None:
    """And draw the answers that one process draws, in batches of another size."""
    sampled = ["--tasks", "mlvu", "--data-root", str(root), "--frames", "2", "--max-new-tokens", "4"]
    sampled += ["--temperature", "4", "--decoding-seed", "5"]
    alone = longvpo_eval(f"one={model}", *sampled, "--batch-size", "4", "--output", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2", "--no-python"]
    command += [str(Path(sys.executable).parent / "longvpo"), "eval", f"one={model}", *sampled]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Percent of right answers") == 1  # one process prints
    written = lines(tmp_path / "answers/one-2/mlvu.jsonl")
    assert written == lines(tmp_path / "alone/answers/one-2/mlvu.jsonl")
    assert len({line["text"] for line in written}) == 3, "drawn, one for each of the three questions"
    scores = json.loads((tmp_path / "one-2.json").read_text("utf-8"))
    assert scores == json.loads((tmp_path / "alone/one-2.json").read_text("utf-8"))
    assert scores["decoding"] == {"temperature": 4.0, "top_p": 1.0, "decoding_seed": 5, "thinking": None}
    assert scores["tasks"]["mlvu"]["protocol"]["ours"]["decoding"] == "sampled at temperature 4, seed 5"
    assert scores["tasks"]["mlvu"]["n"] == 9
    audits = [lines(path) for path in sorted((tmp_path / "cache/runs/longvpo").glob("rank_*.audit.jsonl"))]
    assert sorted(len({line["doc_id"] for line in audit}) for audit in audits) == [4, 5]


# ----------------------------------------------------------------------------------------------------------- the model


class Echo(LocalResponder):
    """Answers with the question."""

    def respond(self, requests: Sequence[Request], *callbacks: Any) -> list[str]:
        return [request.text for request in requests]


@pytest.fixture
def echo(model: Path, monkeypatch: pytest.MonkeyPatch) -> adapter.LongVPO:
    monkeypatch.setattr(adapter, "LocalResponder", Echo)
    return adapter.LongVPO(str(model), num_frames=4, batch_size="2")


def instance(content: Sequence[dict[str, Any]], **settings: Any) -> Any:
    """A request of lmms-eval's about the one row of a task."""
    from lmms_eval.api.instance import Instance

    def messages(_: object) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(content)}]

    arguments = ("", messages, settings, 0, "task", "test")
    return Instance("generate_until", arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})


def answers(model: adapter.LongVPO, *instances: Any) -> list[str]:
    model.task_dict = {"task": {"test": [{}]}}
    return list(model.generate_until(instances))


def test_answers_come_in_order_whatever_their_settings(echo: adapter.LongVPO) -> None:
    numbers = range(40)
    instances = [
        instance([{"type": "text", "text": f"{i}\n\nmore"}], max_new_tokens=8 + i % 3 // 2, until=["\n\n"])
        for i in numbers
    ]
    assert answers(echo, *instances) == [str(i) for i in numbers]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_answers_about_videos_of_any_length(root: Path, tmp_path: Path, family: str) -> None:
    built, processor = tiny_models.build(family)
    built.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = adapter.LongVPO(str(tmp_path), num_frames=24, fps="none", batch_size=3)  # v0 has 20 frames
    content = [
        [{"type": "video", "url": str(root / f"videos/v{i}.mp4")}, {"type": "text", "text": f"What{'?' * i}"}]
        for i in (0, 1, 2, 0)
    ]
    together = answers(loaded, *[instance(each, max_new_tokens=3) for each in content])
    assert together == [answers(loaded, instance(each, max_new_tokens=3))[0] for each in content]
    assert together[0] == together[3]
    # Fewer frames than there are shows the model other tensors of another shape, in the same call.
    loaded.use(Sampling(24, fps=1.0))
    assert len(answers(loaded, *[instance(each, max_new_tokens=3) for each in content])) == 4


def test_an_adapter_s_own_processor_goes_before_its_base_s(model: Path, lora: Path, tmp_path: Path) -> None:
    def template(folder: Path) -> str:
        return adapter.LongVPO(str(folder))._responder.encoder.processor.chat_template

    processor = AutoProcessor.from_pretrained(model)
    assert template(lora) == processor.chat_template  # the folder holds none
    tokenizer = shutil.copytree(lora, tmp_path / "with-tokenizer")
    processor.tokenizer.save_pretrained(tokenizer)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text("utf-8"))
    del settings["processor_class"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    assert template(tokenizer) == processor.chat_template
    own = shutil.copytree(lora, tmp_path / "with-processor")
    processor.chat_template = f"Be brief. {processor.chat_template}"
    processor.save_pretrained(own)
    assert template(own) == processor.chat_template


def test_bounds_on_answers(echo: adapter.LongVPO, model: Path) -> None:
    """The task's own, or what the user says, of one task or of all."""
    asked = instance([{"type": "text", "text": "?"}], max_new_tokens=32)
    assert echo.bound(asked) == 32
    plain = repr(echo)
    echo.use(echo.sampling, {"task": 99})
    assert echo.bound(asked) == 99
    assert repr(echo) != plain, "answers under another bound are others"
    assert adapter.LongVPO(str(model), max_new_tokens=77).bound(asked) == 77


def test_models_that_reason_have_room_for_it(model: Path, tmp_path: Path) -> None:
    asked = instance([{"type": "text", "text": "?"}], max_new_tokens=32)
    shutil.copytree(model, tmp_path / "reasons")
    processor = AutoProcessor.from_pretrained(model)
    processor.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    processor.save_pretrained(tmp_path / "reasons")
    reasoning = adapter.LongVPO(str(tmp_path / "reasons"), num_frames=2)
    assert reasoning.bound(asked) == 16_384
    reasoning.use(reasoning.sampling, {"task": 4})
    (reply,) = answers(reasoning, asked)
    assert reply.startswith("<think>"), "the template opened the reasoning"
    assert is_cut_off(reply)


def test_decoding_as_lmms_eval_gives_it(model: Path) -> None:
    """Its `--model_args` are texts and numbers; other answers have another name in its cache."""
    plain = adapter.LongVPO(str(model))
    sampled = adapter.LongVPO(str(model), temperature="0.7", top_p=0.9, decoding_seed="3", thinking="none")
    assert sampled._responder.decoding == Decoding(0.7, 0.9, 3)
    assert repr(sampled) != repr(plain)
    assert "temperature" not in repr(plain)
    with pytest.raises(ConfigError, match="thinking must be true, false or none, got 'maybe'"):
        adapter.LongVPO(str(model), thinking="maybe")
    with pytest.raises(ModelError, match=r"thinking=True, but the chat template of .* has no switch"):
        adapter.LongVPO(str(model), thinking="True")


def test_stops_are_looked_for_in_the_answer() -> None:
    assert adapter._until("<think>\n\nA?\n\n</think>B\n\nC", ["\n\n"]) == "<think>\n\nA?\n\n</think>B"
    assert adapter._until("B.\n\nC", ["\n\n", "."]) == "B"
    assert adapter._until("<think>A\n\nB", "\n\n") == "<think>A\n\nB"


def test_bounds_as_users_write_them() -> None:
    asked = suites_named(["mlvu", "videomme"])
    assert bounds_named("64", asked) == {"mlvu": 64, "videomme": 64, "videomme_subtitles": 64}
    assert bounds_named("mlvu=8, videomme=4096", asked) == {"mlvu": 8, "videomme": 4096, "videomme_subtitles": 4096}
    for text in ("64,mlvu=8,videomme_subtitles=16", "videomme_subtitles=16,mlvu=8,64"):
        assert bounds_named(text, asked) == {"mlvu": 8, "videomme": 64, "videomme_subtitles": 16}
    assert bounds_named("videomme_subtitles=16,videomme=8", asked) == {"videomme": 8, "videomme_subtitles": 16}
    for twice in ("64,65", "mlvu=3,mlvu=3", "mlvu=3, 8, mlvu=4"):
        with pytest.raises(ConfigError, match="must have one bound on answers, got"):
            bounds_named(twice, asked)
    for wrong in ("0", "-1", "x", "lvbench=9", "mlvu=", "9" * 5000, ""):
        with pytest.raises(ConfigError, match="A bound on answers is N or SUITE=N"):
            bounds_named(wrong, asked)


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}])
def test_what_is_not_greedy_is_refused(echo: adapter.LongVPO, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="samples where its model_args say so"):
        answers(echo, instance([{"type": "text", "text": "?"}], **settings))


def test_pictures_are_refused(echo: adapter.LongVPO) -> None:
    with pytest.raises(ValueError, match="takes videos and text, got image"):
        answers(echo, instance([{"type": "image", "url": "x.png"}, {"type": "text", "text": "?"}]))


def test_a_broken_video_is_an_error_and_no_answer(echo: adapter.LongVPO, tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match="missing_file"):
        answers(echo, instance([{"type": "video", "url": str(tmp_path / "gone.mp4")}, {"type": "text", "text": "?"}]))


def test_only_the_device_that_is_named_is_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # From this "accelerator" no weights come back.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
    loaded = adapter.LongVPO(str(model), device="cpu")
    assert {weight.device.type for weight in loaded._responder.model.parameters()} == {"cpu"}


def test_a_batch_size_that_is_no_number_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="must be a whole number, got 'auto'"):
        adapter.LongVPO(str(model), batch_size="auto")


# ---------------------------------------------------------------------------------------------------------- its frames


def test_defaults_are_those_of_training() -> None:
    fields = LongVPOConfig.__dataclass_fields__
    assert Sampling() == Sampling(*(fields[name].default for name in ("num_frames", "fps", "max_pixels")))


@pytest.mark.parametrize("sampling", [Sampling(256, 2.0, 336 * 336), Sampling(8, None, None)])
def test_a_checkpoint_is_seen_as_its_record_says(model: Path, tmp_path: Path, sampling: Sampling) -> None:
    assert trained_sampling(str(model)) is None
    folder = tmp_path / "trained"
    write_model_card(folder, ModelRecord("trained", "me/trained", Source("base"), sampling))
    assert trained_sampling(str(folder)) == sampling
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    trained = adapter.LongVPO(str(folder))
    assert trained.sampling == sampling
    assert trained._responder.sampler.num_frames == sampling.num_frames
    explicit = adapter.LongVPO(str(folder), num_frames=3, fps=0.5, max_pixels="none")
    assert explicit.sampling == Sampling(3, 0.5, None)


@pytest.mark.parametrize("name", ["no-such/model", "no/such/folder", "./gone"])
def test_no_card_says_nothing(name: str) -> None:
    assert trained_sampling(name) is None


def test_frame_times_are_known_without_decoding(root: Path) -> None:
    from longvpo_hf.frames import whole_clip
    from longvpo_hf.timeline import Timeline

    timeline = Timeline((whole_clip(str(root / "videos/v2.mp4")), whole_clip(str(root / "videos/v0.mp4"))))
    sampler = sampler_of(Sampling(5))
    assert sampler.timeline_seconds(timeline) == sampler(timeline).timeline_seconds


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sweeps call theirs: `lr=1e-5` was a model 1e-5 with the stage lr."""
    monkeypatch.chdir(tmp_path)
    assert Contestant.of("lr=1e-5") == Contestant("1e-5", "lr")
    (tmp_path / "lr=1e-5").mkdir()
    assert Contestant.of("lr=1e-5") == Contestant("lr=1e-5")
    assert Contestant.of("base=lr=1e-5") == Contestant("lr=1e-5", "base")


# ------------------------------------------------------------------------------------------------------- the preflight


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was loaded before the data were looked for")

    monkeypatch.setattr(adapter, "load_checkpoint", never)


@pytest.mark.usefixtures("no_model")
def test_missing_data_are_told_with_the_command_that_brings_them(
    tmp_path: Path, root: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film, root = root / "mlvu/v0.mp4", tmp_path / "my data"
    root.mkdir()
    doubles.write_parquet(root / "sy1998/MLVU_dev", {"test": doubles.mlvu_rows()})
    doubles.write_parquet(root / "lmms-eval/Video-MME", {"test": doubles.videomme_rows()})
    (root / "videomme/data").mkdir(parents=True)
    for number in range(3):
        shutil.copyfile(film, root / f"videomme/data/v{number}.mp4")
    (root / "mlvu").mkdir()
    shutil.copyfile(film, root / "mlvu/v1.mp4")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = longvpo_eval(model, "--tasks", "longvideobench,mlvu,videomme", "--data-root", root, "--output", tmp_path)
    assert result.exit_code == 2
    assert "data of the evaluation are missing" in result.output
    # Annotations that are nowhere, of a benchmark that wants a token, which is nowhere either.
    assert f"- longvideobench: annotations (longvideobench/LongVideoBench): neither in {root}" in result.output
    assert "agree at https://huggingface.co/datasets/longvideobench/LongVideoBench" in result.output
    assert "hf auth login\n" in result.output
    download = "hf download longvideobench/LongVideoBench --repo-type dataset --local-dir"
    assert f"{download} '{root}/longvideobench/LongVideoBench'" in result.output
    # Two of three videos.
    assert f"- sy1998/MLVU_dev: 2 of 3 videos, in {root}: mlvu/v0.mp4, mlvu/v2.mp4\n" in result.output
    assert f"find '{root}/sy1998/MLVU_dev' -name '*.zip' -exec unzip -n {{}} -d '{root}/mlvu' \\;" in result.output
    # All videos, and no subtitles.
    assert "Video-MME: 0 of" not in result.output
    assert f"- videomme_subtitles: subtitles: {root}/videomme/subtitle holds none of 3 .srt files" in result.output


def test_the_commands_unpack_archives_wherever_they_are(tmp_path: Path) -> None:
    archives, media = tmp_path / "my archives", tmp_path / "my media"
    (archives / "deep").mkdir(parents=True)
    media.mkdir()
    for number, folder in enumerate((archives, archives / "deep")):
        with zipfile.ZipFile(folder / f"part {number}.zip", "w") as archive:
            archive.writestr(f"v{number}.mp4", "a video")
    command = suites()["mlvu"].unpack.format(archives=shlex.quote(str(archives)), media=shlex.quote(str(media)))
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    assert sorted(path.name for path in media.iterdir()) == ["v0.mp4", "v1.mp4"]


@pytest.mark.usefixtures("no_model")
def test_annotations_that_are_there_and_cannot_be_read_are_told(root: Path, tmp_path: Path, model: Path) -> None:
    (tmp_path / "lmms-eval/LVBench/data").mkdir(parents=True)  # a download that was interrupted
    result = longvpo_eval(model, "--tasks", "lvbench", "--data-root", tmp_path, "--output", tmp_path)
    assert result.exit_code == 2
    assert f"annotations (lmms-eval/LVBench): cannot be read from {tmp_path}/lmms-eval/LVBench: " in result.output


@pytest.mark.usefixtures("no_model")
def test_an_unknown_benchmark_is_told(root: Path, model: Path, tmp_path: Path) -> None:
    result = longvpo_eval(model, "--tasks", "mmlu", "--data-root", root, "--output", tmp_path)
    assert result.exit_code == 2
    assert "There is no suite 'mmlu'; choose among lvbench, longvideobench, mlvu, videomme, mvbench" in result.output


@pytest.mark.usefixtures("no_model")
def test_files_that_are_no_whole_videos_are_told_before_a_model_is_loaded(
    root: Path, tmp_path: Path, model: Path
) -> None:
    """What a download leaves that broke off, a page of a server, a pointer of Git LFS, and random cuts of a film."""
    film, rng = (root / "mlvu/v0.mp4").read_bytes(), random.Random(0)
    kinds = [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", film[:-1]]
    kinds += [film[: rng.randrange(len(film))] for _ in range(6)]
    data, few = tmp_path / "data", []
    doubles.write_parquet(data / "sy1998/MLVU_dev", {"test": doubles.mlvu_rows()})
    (data / "mlvu").mkdir()
    for content in kinds:
        for number in range(3):
            (data / f"mlvu/v{number}.mp4").write_bytes(content if number == 1 else film)
        told = longvpo_eval(model, "--tasks", "mlvu", "--data-root", data, "--output", tmp_path / "out")
        assert told.exit_code == 2
        assert (
            f"sy1998/MLVU_dev: 1 of 3 videos are files that are cut off, or no videos: {data}/mlvu/v1.mp4"
            in told.output
        )
        few.append(f"rm -f -- {data}/mlvu/v1.mp4\n" in told.output)
    assert all(few)
    many = [{**doubles.mlvu_rows()[0], "video_name": f"v{number}.mp4"} for number in range(50)]
    data = tmp_path / "all"
    (data / "mlvu").mkdir(parents=True)
    doubles.write_parquet(data / "sy1998/MLVU_dev", {"test": many})
    for row in many:
        (data / "mlvu" / row["video_name"]).write_bytes(kinds[2])
    with pytest.raises(preflight.NotReady, match=r"50 of 50 videos are .* and 47 more\n +mv .*/mlvu .*/mlvu-broken\n"):
        preflight.check(suites_named(["mlvu"]), data)


def test_nothing_is_missing_where_all_is_there(root: Path) -> None:
    preflight.check(suites().values(), root)


def test_lmms_eval_is_told_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.tasks import TaskManager, get_task_dict

    monkeypatch.setenv("LONGVPO_EVAL_DATA", str(tmp_path))
    manager = TaskManager("ERROR", include_path=str(tasks_folder()), include_defaults=False)
    with pytest.raises(preflight.NotReady, match="hf download lmms-eval/LVBench --repo-type dataset --local-dir"):
        get_task_dict(["longvpo_lvbench"], manager, "chat")
