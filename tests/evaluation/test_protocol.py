"""Protocols: what a number depends on, two of them side by side, published ones; and results as the Hub reads them."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

import benchmark_doubles as doubles
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.pairs import compared, pairs_of, units_of
from longvpo_hf.evaluation.preflight import suites_named
from longvpo_hf.evaluation.protocol import (
    SETTINGS,
    Protocol,
    protocols_of,
    published,
    questions_digest,
)
from longvpo_hf.evaluation.results import add_to_checkpoint, write_hub_results
from longvpo_hf.evaluation.run import Settings, _Alike
from longvpo_hf.evaluation.suites import suites
from longvpo_hf.evaluation.table import EvalRun, comparison, to_markdown
from longvpo_hf.record import EvaluationRecord, ModelRecord, Sampling, Source, read_record, weights_digest, write_record

ONE = Protocol(
    suite="lvbench",
    questions="0a1b2c3d",
    limit=None,
    sampling="at most 8 frames",
    shown="the video",
    subtitles="none",
    parser="ours 1",
    decoding="greedy",
    max_new_tokens=32,
    repeats=1,
    dtype="bfloat16",
    backend="transformers",
    versions={"torch": "2.15"},
)
OTHERS: dict[str, Any] = {
    "suite": "mlvu",
    "questions": "ffffffff",
    "limit": 5,
    "sampling": "at most 8 frames, 1 a second",
    "shown": "no video",
    "subtitles": "of the frames",
    "parser": "ours 2",
    "decoding": "sampled",
    "max_new_tokens": 64,
    "repeats": 3,
    "dtype": "float32",
    "backend": "a server",
    "versions": {"torch": "2.16"},
}


def run(stage: str, value: float, protocol: Protocol | None, **more: Any) -> EvalRun:
    task: dict[str, Any] = {"overall": value, "official": value, "n": 4}
    if protocol is not None:
        task["protocol"] = {"ours": protocol.json(), "official": replace(protocol, parser="official").json()}
    return EvalRun(f"me/{stage}", stage, 8, {"lvbench": task}, **more)


# ----------------------------------------------------------------------------------------------------- one protocol


@pytest.mark.parametrize("name", [each.name for each in fields(Protocol)])
def test_every_field_is_in_the_hash_and_the_line_and_is_named_where_it_differs(name: str) -> None:
    other = replace(ONE, **{name: OTHERS[name]})
    assert other.hash != ONE.hash
    assert other.line != ONE.line
    (difference,) = other.differences(ONE)
    assert difference.startswith("torch 2.16 ≠ 2.15" if name == "versions" else f"{name} {OTHERS[name]} ≠ ")


def test_a_protocol_survives_its_file() -> None:
    again = Protocol.from_json(json.loads(json.dumps(ONE.json())))
    assert (again, again.hash) == (ONE, ONE.hash)
    assert "\n" not in ONE.line
    with pytest.raises(ConfigError, match="lacks the field 'dtype'"):
        Protocol.from_json({key: value for key, value in ONE.json().items() if key != "dtype"})


def test_questions_have_a_digest_that_any_change_changes(tmp_path: Path) -> None:
    rows = doubles.mlvu_rows()
    changes: list[list[dict[str, Any]]] = [
        rows,
        rows[:-1],
        [{**rows[0], "question": rows[0]["question"].replace("one", "two")}, *rows[1:]],
        [{**rows[0], "answer": "D"}, *rows[1:]],
        rows[::-1],
    ]
    digests = []
    for number, each in enumerate(changes):
        doubles.write_parquet(tmp_path / str(number) / "sy1998/MLVU_dev", {"test": each})
        digests.append(questions_digest("mlvu", tmp_path / str(number)))
    assert len(set(digests)) == len(changes)
    shutil.copytree(tmp_path / "0", tmp_path / "elsewhere")
    assert questions_digest("mlvu", tmp_path / "elsewhere") == digests[0]
    protocol = protocols_of(
        suites()["mlvu"], tmp_path / "0", Sampling(8, 2.0, None), limit=None, shown="the video", decoding="greedy",
        max_new_tokens=32, repeats=1, dtype="float32", backend="transformers",
    )  # fmt: skip
    assert {name: each.questions for name, each in protocol.items()} == dict.fromkeys(("ours", "official"), digests[0])
    assert "at most 8 frames, 2 a second" in protocol["ours"].line


# ------------------------------------------------------------------------------------------------- two in one table


@pytest.mark.parametrize("seed", range(8))
def test_two_protocols_side_by_side_are_refused_unless_told(seed: int) -> None:
    rng = random.Random(seed)
    names = rng.sample([name for name in OTHERS if name != "suite"], rng.randint(1, 4))
    other = replace(ONE, **{name: OTHERS[name] for name in names})
    runs = [run("base", 40.0, ONE), run("stage1", 41.0, other)]
    with pytest.raises(ConfigError, match="LVBench: Stage 1 and base were not measured alike") as caught:
        comparison(runs)
    for name in names:
        assert ("torch 2.16 ≠ 2.15" if name == "versions" else f"{name} {OTHERS[name]} ≠") in str(caught.value)
    table = comparison(runs, mixed_protocols=True)
    (row, _) = table["tables"][0]["rows"]
    assert [cell["protocol"] for cell in row["cells"]] == [ONE.hash, other.hash]
    text = to_markdown(table)
    assert f"| LVBench, ours | 40.0 measured `{ONE.hash}` | 41.0 (+1.0) measured `{other.hash}` | **several** |" in text
    for protocol in (ONE, other):
        assert f"`{protocol.hash}` ({protocol.parser}" in text


def test_numbers_of_earlier_versions_stand_beside_each_other_only() -> None:
    assert "protocol" not in to_markdown(comparison([run("base", 40.0, None), run("stage1", 41.0, None)]))
    for runs in ([run("base", 40.0, None), run("stage1", 41.0, ONE)], [run("base", 40.0, ONE), run("s", 41.0, None)]):
        with pytest.raises(ConfigError, match="that of one of them is not known"):
            comparison(runs)


def test_one_protocol_has_one_line() -> None:
    text = to_markdown(comparison([run("base", 40.0, ONE), run("stage1", 41.0, ONE)]))
    assert f"| LVBench, ours | 40.0 measured | 41.0 (+1.0) measured | `{ONE.hash}` |" in text
    assert text.count("bfloat16, transformers") == 1


def test_a_model_that_would_be_measured_otherwise_is_refused_before_it_answers() -> None:
    alike = _Alike(mixed=False)
    alike.protocol("base", 8, ONE)
    alike.protocol("stage1", 8, replace(ONE))
    alike.protocol("stage1", 16, replace(ONE, sampling="at most 16 frames"))  # stands in another table
    with pytest.raises(
        ConfigError, match="lvbench: stage2 and base would not be measured alike: dtype float32 ≠ bfloat16"
    ):
        alike.protocol("stage2", 8, replace(ONE, dtype="float32"))
    mixed = _Alike(mixed=True)
    for protocol in (ONE, replace(ONE, dtype="float32")):
        mixed.protocol("any", 8, protocol)


# ------------------------------------------------------------------------------------------------------- differences


def answers(letters: str, right: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"task": "t", "row": i, "score": 100.0 * (a == b), "answer": b, "group": "", "video": f"v{i}", "facts": {},
         **more}
        for i, (a, b) in enumerate(zip(letters, right, strict=True))
    ]  # fmt: skip


def test_a_table_says_what_its_differences_are_worth() -> None:
    right, base, tuned = "A" * 40, "A" * 20 + "B" * 20, "A" * 19 + "B" + "A" * 11 + "B" * 9
    runs = [
        run(stage, 50.0, ONE, answers={("lvbench", "the video"): answers(letters, right)})
        for stage, letters in (("base", base), ("stage1", tuned), ("stage2", tuned))
    ]
    table = comparison(runs)
    found = table["tables"][0]["differences"]
    assert [(each["first"], each["second"]) for each in found] == [
        ("base", "Stage 1"), ("base", "Stage 2"), ("Stage 1", "Stage 2"),
    ]  # fmt: skip
    # 12 questions tell them apart, 1 for the base: 2 · (1 + 12) / 2^12.
    assert found[0]["p_value"] == pytest.approx(26 / 4096)
    assert found[0]["points"] == pytest.approx(25.0)
    text = to_markdown(table)
    assert "| LVBench | Stage 1 − base | +25.0 |" in text
    assert "| 11 : 1 | 40 (40) |" in text
    assert "| a difference |" in text
    assert "| LVBench | Stage 2 − Stage 1 | +0.0 |" in text
    assert "| none: every answer scores the same |" in text
    json.dumps(table)
    assert pairs_of("abcd") == [(0, 1), (0, 2), (0, 3), (1, 2), (2, 3)]


def test_only_what_was_measured_now_and_of_all_alike_is_compared() -> None:
    stale = {("mlvu", "the video"): answers("AB", "AA"), ("lvbench", "no video"): answers("A", "A")}
    runs = [run("base", 50.0, ONE, answers={**stale, ("lvbench", "the video"): answers("AB", "AA")}),
            run("stage1", 50.0, ONE, answers={("lvbench", "the video"): answers("BA", "AA")})]  # fmt: skip
    found = comparison(runs)["tables"][0]["differences"]
    assert [(each["benchmark"], each["first"]) for each in found] == [("LVBench", "base")]
    other = run("stage2", 50.0, replace(ONE, limit=3), answers={("lvbench", "the video"): answers("AAA", "AAA")})
    found = comparison([*runs, other], mixed_protocols=True)["tables"][0]["differences"]
    assert [each["second"] for each in found] == ["Stage 1"], "the third was asked other questions"


def test_repeats_are_a_mean_of_each_question() -> None:
    suite = suites()["lvbench"]
    sampled = [line for i, letters in enumerate(("AAB", "ABB", "AAB", "AAA"))
               for line in answers(letters, "AAA", repeat=i)]  # fmt: skip
    random.Random(0).shuffle(sampled)
    assert sorted(unit.score for unit in units_of(suite, sampled)) == [25.0, 75.0, 100.0]
    found = compared(suite, answers("AAA", "AAA"), sampled)
    assert found.points == pytest.approx((0 - 25 - 75) / 3)
    assert found.mcnemar_p is None


def test_answers_to_other_questions_are_not_compared() -> None:
    suite = suites()["lvbench"]
    for others in (answers("AA", "AA"), answers("AAA", "AAB")):
        with pytest.raises(ConfigError, match="only answers to the same questions can be compared"):
            compared(suite, answers("AAA", "AAA"), others)


# --------------------------------------------------------------------------------------------------- published ones


@pytest.mark.parametrize("name", ["longvpo", "tpo", "qwen3vl", "lmms"])
def test_published_protocols_say_their_source_and_what_is_not_said(name: str) -> None:
    protocol = published(name)
    assert "http" in protocol.source or "lmms_eval/" in protocol.source
    assert {*SETTINGS, "decoding", "subtitles", "prompts", "parser", "dtype"} == set(protocol.values)
    text = protocol.describe({})
    assert protocol.source in text
    for field, value in protocol.values.items():
        if value is None:
            assert field in text.partition("Not published, and ours: ")[2]
        else:
            assert f"{field}: {value}" in text
    assert "Departs" not in text
    Settings(published=protocol).completed(suites_named(["mlvu"])).samplings(Sampling())


def test_a_published_protocol_stands_in_for_what_is_not_given() -> None:
    asked = suites_named(["mlvu"])
    plain = Settings(published=published("qwen3vl")).completed(asked)
    assert plain.samplings(Sampling(128, 1.0, 7)) == [Sampling(2048, 2.0, 229376)]
    own = Settings(published=published("qwen3vl"), frames=[64], fps="none").completed(asked)
    assert own.samplings(Sampling(128, 1.0, 7)) == [Sampling(64, None, 229376)]
    said = published("qwen3vl").describe({"num_frames": 64, "fps": None, "max_pixels": 229376})
    assert said.endswith("Departs from it: num_frames 64 instead of 2048, fps None instead of 2.")
    assert Settings(published=published("lmms")).completed(asked).samplings(Sampling()) == [Sampling(32, None, 1605632)]
    assert Settings(published=published("longvpo")).completed(asked).samplings(Sampling()) == [Sampling(512)]
    assert "Departs" not in published("lmms").describe({"num_frames": 32, "fps": None, "max_pixels": 1605632})
    with pytest.raises(
        ConfigError, match="There is no published protocol 'gpt'; choose among longvpo, tpo, qwen3vl, lmms"
    ):
        published("gpt")


# ------------------------------------------------------------------------------------------------------ for the Hub


def test_results_are_read_back_by_the_hub_s_own_library(tmp_path: Path) -> None:
    write_hub_results([run("base", 40.123, ONE), replace(run("base", 41.0, ONE), num_frames=16)], tmp_path)
    (file,) = (tmp_path / ".eval_results").iterdir()
    assert file.name == "lvbench.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text("utf-8")))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("lmms-eval/LVBench", "lvbench", 40.12), ("lmms-eval/LVBench", "lvbench", 41.0),
    ]  # fmt: skip
    official = replace(ONE, parser="official")
    assert entries[0].notes is not None
    assert entries[0].notes.endswith(f"protocol {official.hash}: {official.line}")


def test_results_go_into_a_checkpoint_s_record_once(tmp_path: Path) -> None:
    assert not add_to_checkpoint(str(tmp_path), [run("base", 40.0, ONE)]), "a folder without a record"
    assert not add_to_checkpoint("org/model", [run("base", 40.0, ONE)])
    other = EvaluationRecord("video-text-to-text", "mine/data", "Mine", "accuracy", 1.0, "Mine")
    write_record(tmp_path, ModelRecord("m", "m", Source("base"), evaluations=(other,)))
    digest = weights_digest(tmp_path)
    for value in (40.0, 42.0):
        assert add_to_checkpoint(str(tmp_path), [run("base", value, ONE)])
    record = read_record(tmp_path, ModelRecord)
    assert record is not None
    assert [each.metric_value for each in record.evaluations] == [1.0, 42.0]
    assert record.evaluations[1].metric_args == {"protocol": ONE.line, "questions": 4}
    assert (tmp_path / ".eval_results/lvbench.yaml").is_file()
    assert weights_digest(tmp_path) == digest, "answers that are kept stay valid"
