"""`longvpo audit`: rows with a planted shortcut of each kind are found, clean rows pass."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import longvpo
from longvpo_hf.auditing import Audit, AuditSettings, Verdict, audit_rows, write_audit
from longvpo_hf.auditing.findings import group_accuracy, lower_bound
from longvpo_hf.errors import DatasetError
from longvpo_hf.preference import VideoPreference
from longvpo_hf.responders import ScriptedResponder
from longvpo_hf.timeline import Clip, Timeline

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "orange", "violet")
THINGS = ("cup", "boat", "lamp", "shoe", "kite", "drum", "leaf", "coin", "door", "ring")


def clean_rows(number: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose answers follow from the video alone: colour, words and place are drawn independently of the side."""
    rng = random.Random(seed)
    rows = []
    for index in range(number):
        length = rng.randint(2, 6)
        anchor = rng.randrange(length)
        clips = tuple(
            Clip(f"clips/{index}-{i}.mp4", 0.0, 5.0, source_id=f"film{index % 97}-{i if i != anchor else 'anchor'}")
            for i in range(length)
        )
        right, wrong = rng.sample(COLOURS, 2)
        thing = rng.choice(THINGS)
        more = {side: " ".join(rng.choices(THINGS, k=rng.randint(1, 6))) for side in ("chosen", "rejected")}
        rows.append(
            VideoPreference(
                Timeline(clips),
                f"What colour is the {thing} beside the {rng.choice(THINGS)}?",
                f"The {thing} is {right}, near {more['chosen']}.",
                f"The {thing} is {wrong}, near {more['rejected']}.",
                evidence=(anchor,),
                reference=(anchor,),
            ).to_row(lambda clip: clip.path)
        )
    return rows


def answer(row: dict[str, Any], side: str) -> str:
    return str(row[side][0]["content"])


def put(row: dict[str, Any], side: str, text: str) -> None:
    row[side][0]["content"] = text


def longer(row: dict[str, Any], index: int) -> None:
    put(row, "chosen", answer(row, "chosen") + " It can be seen clearly and for a long while in this part.")


def shorter(row: dict[str, Any], index: int) -> None:
    put(row, "chosen", answer(row, "chosen").split(",")[0])


def hedging(row: dict[str, Any], index: int) -> None:
    put(row, "rejected", answer(row, "rejected").replace(" is ", " seems "))


def without_its_end(row: dict[str, Any], index: int) -> None:
    put(row, "rejected", answer(row, "rejected").rstrip("."))


def same_refusal(row: dict[str, Any], index: int) -> None:
    put(row, "rejected", f"It is not visible in clip {index % 3}.")


def named_in_question(row: dict[str, Any], index: int) -> None:
    row["prompt"][-1]["content"] += f" Is it {answer(row, 'chosen').split(' is ')[1].split(',')[0]}?"


def always_red(row: dict[str, Any], index: int) -> None:
    if index % 3:
        put(row, "chosen", "It is red.")


def always_first(row: dict[str, Any], index: int) -> None:
    row["clips"].insert(0, row["clips"].pop(row["evidence"][0]))
    row["evidence"] = row["reference"] = [0]


def of_one_film(row: dict[str, Any], index: int) -> None:
    if index % 4 == 0:
        anchor = row["evidence"][0]
        other = row["clips"][anchor - 1]
        other["origin"] = {**other["origin"], "source_id": row["clips"][anchor]["origin"]["source_id"]}


def of_one_source(row: dict[str, Any], index: int) -> None:
    if index % 3 == 0:
        anchor = row["clips"][row["evidence"][0]]
        anchor["origin"] = {**anchor["origin"], "source_id": "the one", "start_seconds": 10.0 * index}


def repeated(row: dict[str, Any], index: int) -> None:
    row["id"] = f"row{index // 2}"


PLANTED: list[tuple[Callable[[dict[str, Any], int], None], str]] = [
    (longer, "length"),
    (shorter, "length"),
    (hedging, "words"),
    (without_its_end, "words"),
    (same_refusal, "repeated_answers"),
    (named_in_question, "question_words"),
    (always_red, "one_answer"),
    (always_first, "positions"),
    (of_one_film, "near_duplicates"),
    (of_one_source, "sources"),
    (repeated, "duplicates"),
]


def audited(rows: list[dict[str, Any]], **settings: Any) -> Audit:
    return audit_rows(rows, len(rows), "rows", AuditSettings(**settings))


def bad(audit: Audit) -> set[str]:
    return {finding.name for finding in audit.findings if finding.verdict.is_at_least(Verdict.WARN)}


@pytest.mark.parametrize("seed", range(5))
def test_clean_rows_pass(seed: int) -> None:
    assert bad(audited(clean_rows(seed=seed))) == set()


@pytest.mark.parametrize(("plant", "name"), PLANTED, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_shortcut_is_found(plant: Callable[[dict[str, Any], int], None], name: str, seed: int) -> None:
    rows = clean_rows(seed=seed)
    for index, row in enumerate(rows):
        plant(row, index)
    found = audited(rows)
    assert name in bad(found), str(found)
    assert found.of(name).remedy


def test_the_telling_word_is_named() -> None:
    rows = clean_rows()
    for index, row in enumerate(rows):
        hedging(row, index)
    finding = audited(rows).of("words")
    assert finding.verdict is Verdict.FAIL
    telling = dict(finding.details)
    assert "speaks for rejected" in telling["seems"]
    assert "speaks for chosen" in telling["is"]


def test_a_weak_shortcut_warns_and_a_strong_one_fails() -> None:
    verdicts = []
    for share in (0.0, 0.5, 1.0):
        rows = clean_rows()
        for index, row in enumerate(rows):
            if index < share * len(rows):
                longer(row, index)
        verdicts.append(audited(rows).of("length").verdict)
    assert verdicts == [Verdict.PASS, Verdict.WARN, Verdict.FAIL]


def test_one_source_of_many_may_give_more_rows_than_others() -> None:
    rows = clean_rows(400)
    for index, row in enumerate(rows):
        anchor = row["clips"][row["evidence"][0]]
        anchor["origin"] = {**anchor["origin"], "source_id": "the one" if index < 15 else f"film {index}"}
    finding = audited(rows).of("sources")
    assert finding.value == pytest.approx(15 / (400 / 386))  # 15 of 400 rows, of 386 sources
    assert finding.verdict is Verdict.PASS


def test_few_rows_give_no_verdict() -> None:
    rows = clean_rows(12)
    for index, row in enumerate(rows):
        longer(row, index)
    finding = audited(rows).of("length")
    assert finding.verdict is Verdict.UNKNOWN
    assert "12 groups" in finding.said


def test_rows_about_the_same_clip_count_once() -> None:
    """Two hundred copies of one clip's shortcut are one observation: nothing can be said of others."""
    rows = clean_rows(200)
    for index, row in enumerate(rows):
        longer(row, index)
        row["clips"] = [dict(rows[0]["clips"][0]), *row["clips"][1:]]
        row["evidence"] = row["reference"] = [0]
    assert audited(rows).of("length").verdict is Verdict.UNKNOWN


def test_accuracy_by_hand() -> None:
    # Group a: (1 + 0.5) / 2 = 0.75; b: 0; c: 1. Mean 1.75 / 3.
    mean, _, number = group_accuracy([1, 0.5, 0, 1], ["a", "a", "b", "c"])
    assert (mean, number) == (pytest.approx(1.75 / 3), 3)
    # Wilson by hand for 60 of 100 at z = 2.326: (0.6 + 0.02705 − 2.326·√(0.0024 + 0.00013526)) / 1.0541 = 0.4838.
    assert lower_bound(0.6, 100) == pytest.approx(0.4838, abs=1e-3)


def test_blind_model_is_asked_without_video() -> None:
    rows = clean_rows(100)
    for row in rows:
        put(row, "chosen", "red")
        put(row, "rejected", "blue")
    requests = []

    def reply(request: Any) -> str:
        requests.append(request)
        return "It is red, I think."

    finding = audited(rows, blind_model=ScriptedResponder("guesser", reply)).of("blind")
    assert finding.verdict is Verdict.FAIL
    assert "guesser" in finding.said
    assert {request.timeline for request in requests} == {None}


def test_embedder_finds_clips_that_look_alike() -> None:
    import numpy as np

    rows = clean_rows(60)
    alike = {clip["file_name"] for row in rows[:30] for clip in row["clips"]}

    def embed(clips: Any) -> Any:
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(len(clips), 64))
        for number, clip in enumerate(clips):
            if clip.path in alike:
                vectors[number] = 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    finding = audited(rows, embed=embed).of("look_alikes")
    assert finding.verdict is Verdict.FAIL
    assert finding.value == pytest.approx(0.5)


def test_benchmarks_and_evaluation_rows(tmp_path: Path) -> None:
    rows = clean_rows()
    clean = audited(rows, evaluation={"held out": clean_rows(50, seed=9)})
    assert clean.of("evaluation_rows").verdict is Verdict.FAIL  # film0-anchor … are in both
    other = clean_rows(50, seed=9)
    for row in other:
        for clip in row["clips"]:
            clip["origin"] = {**clip["origin"], "source_id": "other-" + clip["origin"]["source_id"]}
    assert audited(rows, evaluation={"held out": other}).of("evaluation_rows").verdict is Verdict.PASS
    (tmp_path / "list.txt").write_text("film7-anchor\nnone-of-these\n", encoding="utf-8")
    finding = audited(rows, benchmark_videos={"Bench": tmp_path / "list.txt"}).of("benchmarks")
    assert finding.verdict is Verdict.FAIL
    assert "1 of 2 ids" in finding.said
    assert finding.details[0][0] == "film7-anchor"


def test_rows_that_are_none_are_counted_and_never_end_it() -> None:
    rows = clean_rows(60)
    nothing = [{"id": None}, {"id": "x", "clips": 3}, {**clean_rows(1)[0], "evidence": [99]}, {"clips": [None]}]
    found = audited([*rows, *nothing])  # type: ignore[list-item]
    assert found.of("rows").value == 4
    with pytest.raises(DatasetError, match="None of the 4 rows"):
        audited(nothing)  # type: ignore[arg-type]


def test_page_shows_text_as_text(tmp_path: Path) -> None:
    rows = clean_rows(60)
    for row in rows:
        put(row, "chosen", "<script>alert(1)</script> \ud800 & more words that make it longer")
    found = audited(rows)
    write_audit(found, tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["verdict"] == "fail"


def test_command(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    from longvpo_hf.publishing.dataset import DatasetWriter
    from longvpo_hf.record import DatasetRecord

    folder = tmp_path / "rows"
    with DatasetWriter(folder) as writer:
        for preference in preferences:
            writer.add(preference)
        writer.write_record(DatasetRecord("Rows"))
    result = longvpo(["audit", str(folder), "--fail-on", "fail"])
    assert "8 rows" in result.stdout
    assert result.exit_code == int("  fail" in result.stdout)
    assert (folder / "audit.html").is_file()
