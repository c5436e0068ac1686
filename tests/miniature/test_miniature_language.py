"""Both languages of the miniature's world: what is said in them is read back, and other texts are not."""

from __future__ import annotations

import json
import random

import pytest

from longvpo_hf.methods import stage2
from longvpo_hf.miniature.asking import judge, write_question
from longvpo_hf.miniature.language import SENTENCES, WORDS, Language
from longvpo_hf.miniature.temporal import _ask_about_a_marker
from longvpo_hf.miniature.world import MARKERS, SHAPE_COLOURS
from longvpo_hf.responders import Request
from longvpo_hf.responders.replies import yes_or_no

BOTH = pytest.mark.parametrize("language", [WORDS, SENTENCES], ids=["words", "sentences"])
SCENES = [("navy-gold", "red"), ("black-mint", "pink"), ("plum-ash", "blue"), ("black-mint", "cyan")]


def test_what_is_said() -> None:
    """Letter by letter: rows and models that were made before stay what they are."""
    assert WORDS.question("navy-gold") == "what colour in the navy-gold clip ?"
    assert WORDS.pair_question("navy-gold", "plum-ash") == "what colours in navy-gold then plum-ash ?"
    assert (WORDS.answer("red"), WORDS.pair_answer("red", "blue")) == ("red", "red blue")
    assert WORDS.caption("navy-gold", "red") == "navy-gold , red"
    assert WORDS.caption_question == "describe the clip ?"
    assert SENTENCES.question("navy-gold") == "What colour is the shape in the navy clip with the gold frame?"
    assert SENTENCES.pair_question("navy-gold", "plum-ash") == (
        "What colours are the shapes in the navy clip with the gold frame and in the plum clip with the ash frame?"
    )
    assert SENTENCES.answer("red") == "The shape is red."
    assert SENTENCES.pair_answer("red", "blue") == "The first shape is red and the second is blue."
    assert SENTENCES.caption("navy-ash", "orange") == "The clip is navy, its frame is ash and the shape is orange."


@BOTH
def test_all_that_is_said_is_read_back(language: Language) -> None:
    rng = random.Random(0)
    for _ in range(50):
        first, second = rng.sample(MARKERS, 2)
        colours = rng.sample(list(SHAPE_COLOURS), 2)
        scenes = list(zip((first, second), colours, strict=True))
        rng.shuffle(scenes)
        assert language.named_markers(language.question(first)) == [first]
        assert language.named_markers(language.pair_question(first, second)) == [first, second]
        assert language.answer_to(language.question(second), scenes) == language.answer(colours[1])
        asked = language.pair_question(second, first)
        assert language.answer_to(asked, scenes) == language.pair_answer(colours[1], colours[0])
        captions = [language.caption(*scene) for scene in scenes]
        assert [language.read_caption(caption) for caption in captions] == scenes
        markers = [marker for marker, _ in scenes]
        assert [language.described_marker(caption) for caption in captions] == markers
        told = "\n".join(f"- [{place} s] {caption}" for place, caption in enumerate(captions))
        assert language.described_markers(told) == markers


@BOTH
@pytest.mark.parametrize(
    ("asked", "colours"),
    [
        (["navy-gold"], ["red"]),
        (["navy-gold", "plum-ash"], ["red", "blue"]),
        (["plum-ash", "navy-gold"], ["blue", "red"]),
        (["black-mint"], None),  # twice in the video
        (["navy-gold", "black-mint"], None),
        (["black-rust"], None),  # not in it
    ],
)
def test_the_answer_to_a_question(language: Language, asked: list[str], colours: list[str] | None) -> None:
    text = language.question(*asked) if len(asked) == 1 else language.pair_question(*asked)
    say = language.answer if len(asked) == 1 else language.pair_answer
    assert language.answer_to(text, SCENES) == (say(*colours) if colours else "")


@BOTH
def test_what_is_not_said_is_not_read(language: Language) -> None:
    said = language.caption("navy-gold", "red")
    for text in ("", "what is this ?", said.replace("red", "mauve"), said.replace("gold", "brass"), f"{said} {said}"):
        assert language.read_caption(text) is None
    assert language.answer_to("what is this ?", SCENES) == ""
    for text in ("", "red", said.replace("navy", "beige"), f"so {said}"):
        assert language.described_marker(text) == ""
    assert language.described_marker(said.replace("red", "mauve")) == "navy-gold"  # the marker is all that is wanted


@BOTH
def test_the_rules_that_stand_for_language_models_speak_it(language: Language) -> None:
    captions = [language.caption(*scene) for scene in SCENES]
    prompt = stage2.question_prompt(list(enumerate(captions)), [], None, "")
    written = json.loads(write_question(Request(prompt, schema=stage2.QUESTION_SCHEMA), language))
    assert set(language.named_markers(written["question"])) == {"navy-gold", "plum-ash"}
    assert written["answer"] == language.answer_to(written["question"], SCENES) != ""
    lines = [f"Scene #{number}: {caption}" for number, caption in enumerate(captions)]
    for answer, verdict in ((written["answer"], True), (language.pair_answer("pink", "blue"), False)):
        asked = Request(stage2.support_prompt(written["question"], answer, lines))
        assert yes_or_no(judge(asked, language)) is verdict
    one = json.loads(_ask_about_a_marker(Request("\n".join(captions)), language))["question"]
    assert language.named_markers(one)[0] in {marker for marker, _ in SCENES}
    assert _ask_about_a_marker(Request("nothing is described"), language) == json.dumps({"question": None})
