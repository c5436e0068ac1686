"""What is read out of replies: answers without reasoning, JSON objects, yes or no."""

from __future__ import annotations

import random
from typing import Any

import pytest

from longvpo_hf.reasoning import CutOff, without_reasoning
from longvpo_hf.responders.replies import json_object, whole_characters, yes_or_no


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("red", "red"),
        ("<think>blue?</think>\n red ", "red"),
        ("The template opened it.</think>red", "red"),
        ("<thinking>blue?</thinking>red", "red"),
        ("<analysis>blue?</analysis>red", "red"),
        ("[THINK]blue?[/THINK]red", "red"),
        ("◁think▷blue?◁/think▷red", "red"),
        ("<seed:think>blue?</seed:think>red", "red"),
        ("It is <think>blue? no</think>red", "It is red"),
        ("<think>one<think>two</think>three</think>four", "four"),
        ("<think>one</think>two<think>three</think>four", "twofour"),
        ("<think>It must be blue", ""),
        ("red<think>or blue", ""),
        ("<think>one</think>two<think>three", ""),
        ("one</think>two</think>three", "three"),
        ("</think>", ""),
        ("I think it is red", "I think it is red"),
        ("", ""),
    ],
)
def test_an_answer_is_what_is_outside_of_the_reasoning(reply: str, answer: str) -> None:
    assert without_reasoning(reply) == answer
    cut = without_reasoning(CutOff(reply))
    assert (cut, type(cut)) == (answer, CutOff)


def test_any_order_of_tags_is_read_in_time_that_grows_with_the_length() -> None:
    rng = random.Random(0)
    crumbs = ["<think>", "</think>", "<analysis>", "[/THINK]", "◁think▷", "red", " ", "{", "\ud83d", "<", "\n"]
    for _ in range(2000):
        reply = "".join(rng.choices(crumbs, k=rng.randint(0, 12)))
        answer = without_reasoning(reply)
        assert without_reasoning(answer) == answer
        assert "think" not in answer
    for endless in ("<think>", "</think>", '{"a":', "{", "<think></think>", "[THINK"):
        without_reasoning(endless * 100_000)
        assert json_object(endless * 100_000) is None
        assert yes_or_no(endless * 100_000) is None


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("Yes.", True),
        ("**No**, since", False),
        ("<think>No, wait. Yes?</think>\nNo", False),
        ("<think>\nyes\n</think>\n\nYes", True),
        ("Maybe yes", None),
        ("", None),
        ("<think>No", None),
    ],
)
def test_yes_or_no(verdict: str, said: bool | None) -> None:
    assert yes_or_no(verdict) is said


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        (' \n```json\n{"a": {"b": [1, 2]}}\n```\n', {"a": {"b": [1, 2]}}),
        ('Sure! Here it is:\n{"a": "x}y{"}\nI hope that {this} helps.', {"a": "x}y{"}),
        ('<think>Maybe {"a": 0}? No.</think>\n{"a": 1}', {"a": 1}),
        ('The template opened it. {"a": 0}</think>{"a": 1}', {"a": 1}),
        ('First {"a": 1}, or better {"a": 2}. {}', {"a": 2}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        ('{"a": 1, "b": ', None),
        ('{"a": "\\ud83d", "b": "\\ud83d\\ude00"}', {"a": "\ufffd", "b": "\U0001f600"}),
        ("no object", None),
        ("", None),
        ("[1, 2]", None),
        ("{'a': 1}", None),
        ("<think>{}", None),
        ('{"a":' * 3000, None),
    ],
)
def test_the_object_in_an_answer(text: str, found: dict[str, Any] | None) -> None:
    assert json_object(text) == found


def test_halves_of_characters_are_replaced() -> None:
    assert whole_characters("a\ud83db\ude00c\U0001f600") == "a\ufffdb\ufffdc\U0001f600"
