"""The rules that stand for language models read the builders' own prompts, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from longvpo_hf.building.captioning import caption_prompt
from longvpo_hf.methods import stage2
from longvpo_hf.miniature.asking import Captioner, Describer, judge, write_question
from longvpo_hf.miniature.language import WORDS
from longvpo_hf.miniature.world import MARKERS
from longvpo_hf.responders import Request, ScriptedResponder
from longvpo_hf.responders.replies import json_object, yes_or_no
from longvpo_hf.timeline import Clip, Timeline, View

CAPTIONS = ("navy-gold , red", "plum-ash , red", "black-mint , blue", "navy-rose , pink", "black-mint , cyan", "what ?")


def asked(captions: Sequence[str], focus: int | None = None, refused: str = "") -> dict[str, str] | None:
    prompt = stage2.question_prompt(list(enumerate(captions)), [], focus, refused)
    return json_object(write_question(Request(prompt, schema=stage2.QUESTION_SCHEMA), WORDS))


@pytest.mark.parametrize("focus", [None, 0, 1, 3])
def test_questions_are_about_two_scenes_that_can_be_told_from_the_others(focus: int | None) -> None:
    scenes = [(words[0], words[2]) for words in (caption.split() for caption in CAPTIONS[:-1])]
    for refused in ("", "a reason", "another"):
        written = asked(CAPTIONS, focus, refused)
        assert written is not None
        cited = [int(word.removeprefix("#")) for word in written["reasoning"].split() if word.startswith("#")]
        assert WORDS.named_markers(written["question"]) == [scenes[scene][0] for scene in cited]
        assert set(cited) <= {0, 1, 3}  # 2 and 4 share a marker, 5 is no description
        assert set(cited) != {0, 1}  # of the same colour
        assert focus is None or focus in cited
        assert written["answer"] == WORDS.answer_to(written["question"], scenes) != ""


@pytest.mark.parametrize(("captions", "focus"), [(CAPTIONS, 4), (CAPTIONS, 5), (CAPTIONS[:2], None), (("",), None)])
def test_nothing_is_asked_where_nothing_can_be(captions: Sequence[str], focus: int | None) -> None:
    assert not asked(captions, focus)


def test_captions_with_quotes_do_not_break_the_answer() -> None:
    assert asked([*CAPTIONS, 'a "{" in it'])


@pytest.mark.parametrize(
    ("answer", "verdict"), [("red blue", True), ("blue red", False), ("red", False), ("red blue .", False)]
)
def test_the_judge_goes_by_the_captions(answer: str, verdict: bool) -> None:
    lines = ["Scene #3: plum-ash , blue", "Scene #7: navy-gold , red"]
    prompt = stage2.support_prompt(WORDS.pair_question("navy-gold", "plum-ash"), answer, lines)
    assert yes_or_no(judge(Request(prompt), WORDS)) is verdict


def test_the_captioner_asks_what_its_model_was_taught() -> None:
    got: list[Request] = []

    def answer(request: Request) -> str:
        got.append(request)
        return "navy-gold , red"

    clips = tuple(Clip("a.mp4", second, second + 1) for second in range(3))
    request = Request(caption_prompt(["Scene #0: x"], 80), Timeline(clips), View.only([1]))
    assert Captioner(ScriptedResponder("model", answer), WORDS).respond([request]) == ["navy-gold , red"]
    assert got == [replace(request, text=WORDS.caption_question)]


def test_the_describer_asks_about_the_marker_it_was_told() -> None:
    told = {0.0: f"{MARKERS[9]} , red", 1.0: "red", 2.0: f"{MARKERS[9]} , blue"}
    responder = ScriptedResponder("model", lambda request: told[request.timeline.clips[0].start_seconds])
    describer = Describer(responder, WORDS)
    clips = [Clip("a.mp4", second, second + 1) for second in told]
    questions = describer.respond([Request(json.dumps("any"), Timeline((clip,))) for clip in clips])
    assert questions == [f"what colour in the {MARKERS[9]} clip ?", "", f"what colour in the {MARKERS[9]} clip ?"]
    vectors = describer.embed(clips)
    assert (vectors[0] == vectors[2]).all()
    assert vectors[0] @ vectors[1] == 0
