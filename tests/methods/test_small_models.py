"""Small models as writers and judges: what they do is named rightly, and said before it has cost every row.

The replies are those of a model of 135 million parameters (SmolLM2-135M-Instruct), whole or with their loops shortened.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from longvpo_hf.building.filters import check_question
from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.methods import stage2
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.responders import CutOff
from scenes import Scripted, answer_by_clips, ask_of_type, cite, dropped_of, told, unfilmed

ANSWERER = Scripted(answer_by_clips)
LOOP = CutOff("The answer to the question is:\n\n" + "The reason for the answer is:\n\n" * 25)
LOOP_IN_JSON = CutOff('The answer is:\n\n{\n  "question": "' + "What is the answer to the question: " * 30)
ECHO = "The question writer did not give the JSON object that was asked for."
ECHO_IN_JSON = CutOff(f'{ECHO}\n\nThe answer is:\n\n{{"question": "{ECHO}", "answer": "The JSON object is: "{ECHO}')
EXAMPLE = '{"question": "...", "answer": "...", "reasoning": "..."}'
WITHOUT_SCENES = (
    'The JSON object is:\n\n{\n  "question": "What is the only thing that can be described as a car without a license '
    'plate?",\n  "answer": "A license plate",\n  "reasoning": "A license plate"\n}'
)
WITHOUT_REASONING = 'The answer is:\n{"question": "The answer is: 2023", "answer": "The answer is: 2023"}\n\nThe reason'


@pytest.fixture
def videos(tmp_path: Path) -> list[CaptionedVideo]:
    return unfilmed(tmp_path / "media", [5] * 12)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (LOOP, "cut_off"),
        (LOOP_IN_JSON, "cut_off"),
        (ECHO_IN_JSON, "cut_off"),
        (ECHO, "malformed_question"),
        (WITHOUT_REASONING, "malformed_question"),
        (WITHOUT_SCENES, "too_few_scenes"),
        (EXAMPLE, "copied_example"),
        (f"Here it is:\n```json\n{EXAMPLE}\n```", "copied_example"),
        (EXAMPLE.replace("...", "…"), "copied_example"),
    ],
)
def test_what_a_small_writer_of_stage2_does_has_its_name(
    videos: list[CaptionedVideo], tmp_path: Path, reply: str, reason: str
) -> None:
    writer, settings = Scripted(lambda request: reply), Stage2Settings(num_rows=2, max_rounds=1)
    with pytest.raises(ValueError, match=f"No row came out; dropped: {reason} 2"):
        build_stage2(videos, writer, ANSWERER, tmp_path / "rows", settings)
    assert len(writer.requests) == 2 * settings.max_tries


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (LOOP, "cut_off"),
        (LOOP_IN_JSON, "cut_off"),
        ('{"question": "..."}', "copied_example"),
        (ECHO, "malformed_question"),
    ],
)
def test_what_a_small_writer_of_temporal_questions_does_has_its_name(
    videos: list[CaptionedVideo], tmp_path: Path, reply: str, reason: str
) -> None:
    settings = TemporalSettings(num_rows=2, max_rounds=1)
    with pytest.raises(ValueError, match=f"No row came out; dropped: {reason} 2"):
        build_temporal(videos, Scripted(lambda request: reply), ANSWERER, tmp_path / "rows", settings)


@pytest.mark.parametrize("reply", [LOOP, CutOff("What is in the clip? What is in the")])
def test_a_question_that_was_cut_off_is_none(videos: list[CaptionedVideo], tmp_path: Path, reply: str) -> None:
    pool = [clip for video in videos for clip in video.timeline.clips]
    settings = Stage1Settings(num_rows=2, max_clips=2, max_rounds=1)
    with pytest.raises(ValueError, match="No row came out; dropped: cut_off 2"):
        build_stage1(pool, Scripted(lambda request: reply), ANSWERER, tmp_path / "rows", settings)


def test_a_whole_object_in_a_reply_that_was_cut_off_counts(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    writer = Scripted(lambda request: CutOff(f"{cite(request)}\n\nThe answer is:\n\nThe answer is:"))
    build_stage2(videos, writer, ANSWERER, tmp_path / "rows", Stage2Settings(num_rows=4))
    assert not dropped_of(tmp_path / "rows")


def test_verdicts_that_were_cut_off_have_their_name(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    judge = Scripted(lambda request: CutOff("The descriptions say that"))
    with pytest.raises(ValueError, match="No row came out; dropped: cut_off 2"):
        build_stage2(
            videos, Scripted(cite), ANSWERER, tmp_path / "a", Stage2Settings(num_rows=2, max_rounds=1), judge=judge
        )
    with pytest.raises(ValueError, match="No row came out; dropped: cut_off 2"):
        build_temporal(
            videos, Scripted(ask_of_type), ANSWERER, tmp_path / "b", TemporalSettings(num_rows=2, max_rounds=1), judge
        )


# -------------------------------------------------------------------------------------------------------- further tries


def reasons_of_the_writer() -> set[str]:
    """Why a question is refused, by the code that refuses it."""
    source = Path(stage2.__file__).read_text(encoding="utf-8")
    reading = source[source.index("def _read(") : source.index("def _cited(")]
    of_questions = {check_question(text) for text in ("", "?" * 2000, "I cannot see it?", "Tell.", "In scene 3?")}
    of_questions |= {check_question("Why " * 300 + "?")}
    named = re.findall(r'Drop\("(\w+)"|"(cut_off|malformed_question|names_position)"', reading)
    return {name for pair in named for name in pair if name} | {str(reason) for reason in of_questions}


def test_there_is_an_order_for_every_refusal() -> None:
    assert reasons_of_the_writer() == set(stage2._BETTER)


def test_no_order_can_be_echoed_as_an_answer(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    """Repeated as it is, or as each text of the object, it is refused; and it holds no complaint to go on with."""
    for reason, order in stage2._BETTER.items():
        again = stage2.try_again([reason, reason])
        assert again.startswith("\nWrite version 3. ")
        assert order.split()[0] in {"Give", "Keep", "Put", "Cite", "Leave", "End", "Ask", "Go"}, "an imperative"
        for echo in (again, order):
            assert check_question(echo) == "no_question"
            assert not re.search(r'[{}"?]', echo)
            for reply in (echo, json.dumps(dict.fromkeys(("question", "answer", "reasoning"), echo))):
                drop = stage2._read(stage2.Draft(videos[0].timeline), reply, range(5), None)
                assert isinstance(drop, stage2.Drop)


# --------------------------------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize(
    ("verdict", "filter_name", "reason"),
    [
        ("No.", "supported", "unsupported"),
        ("Yes", "rejected_is_wrong", "rejected_is_right"),
        ("Hm", "supported", "mal"),
    ],
)
def test_a_judge_that_says_the_same_of_everything_is_reported_while_rows_can_be_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verdict: str, filter_name: str, reason: str
) -> None:
    videos = unfilmed(tmp_path / "media", [5] * 80)
    seen: list[int] = []

    def judge(request: object) -> str:
        seen.append("has dropped" in "".join(capsys.readouterr()))
        return verdict

    with pytest.raises(ValueError, match="No row came out"):
        build_stage2(
            videos,
            Scripted(cite),
            ANSWERER,
            tmp_path / "rows",
            Stage2Settings(num_rows=160, partial_share=1.0, max_rounds=1),
            judge=Scripted(judge, "judge@1"),
        )
    assert sum(seen) == 1, "once"
    assert seen.index(1) <= 160, "after the first piece of work, not at the end"
    assert len(seen) > seen.index(1) + 64


def test_what_is_reported_of_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = unfilmed(tmp_path / "media", [5] * 40)
    judge = Scripted(lambda request: "Yes" if told_thing(request.text) % 100 == 0 else "No", "judge@1")
    funnel = build_stage2(
        videos,
        Scripted(cite),
        Scripted(lambda request: f"{told(request)}"),
        tmp_path / "rows",
        Stage2Settings(num_rows=40, partial_share=1.0, max_rounds=1),
        judge=judge,
    )
    number = funnel["dropped"]["unsupported"]
    assert (
        f"The filter 'supported' has dropped {number} of 40 drafts (unsupported {number}). The judge judge@1 may be "
        "saying the same of everything: look at its words in dropped.jsonl, then read it by probability "
        "(--judge-yes-from 0.5), or name a stronger judge or none."
    ) in "".join(capsys.readouterr())


def told_thing(text: str) -> int:
    """The first thing that an answer names."""
    return int(re.findall(r"Answer: \[(\d+)", text)[0])


def test_a_judge_that_drops_some_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = unfilmed(tmp_path / "media", [5] * 40)
    judge = Scripted(lambda request: "Yes" if told_thing(request.text) % 5 == 0 else "No")
    answerer = Scripted(lambda request: f"{told(request)}")
    build_stage2(
        videos, Scripted(cite), answerer, tmp_path / "rows", Stage2Settings(num_rows=40, max_rounds=1), judge=judge
    )
    assert "has dropped" not in "".join(capsys.readouterr())
