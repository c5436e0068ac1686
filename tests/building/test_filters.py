"""What counts as saying the same, and how drops are counted. What is dropped of rows is in `test_kills.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from longvpo_hf.building.filters import check_answer, check_caption, check_pair, check_question, normalise
from longvpo_hf.frames import Reason
from longvpo_hf.funnel import REASONS, Funnel


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Dog!", "dog"),
        ("a_b", "b"),  # the underscore parts words, and "a" is an article
        ("Ｆｕｌｌ ｗｉｄｔｈ", "full width"),
        ("STRASSE straße", "strasse strasse"),
        ("theatre another", "theatre another"),
        ("犬、です。", "犬 です"),
        ("...", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("A dog.", "the DOG", "answers_agree"),
        ("A dog.", "A cat.", None),
        ("dog", "dogs", None),
        ("!", "!", "answers_agree"),
        ("!", "?", None),
        ("A", "The", None),
    ],
)
def test_pairs(chosen: str, rejected: str, reason: str | None) -> None:
    assert check_pair(chosen, rejected) == reason


def test_empty_texts() -> None:
    assert check_question(" \n") == check_question("...") == "empty_question"
    assert check_answer("Why?", " \n") == "empty_answer"


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What is in the fifth scene?", "names_position"),
        ("What is in the 12th clip?", "names_position"),
        ("Who walks in scene no. 3?", "names_position"),
        ("What is in the opening scene?", "names_position"),
        ("Who finishes fifth?", None),
        ("In which scene does no one speak?", None),
        ("What does the man in the scene at the opening carry?", None),
    ],
)
def test_questions_that_name_a_place(question: str, reason: str | None) -> None:
    assert check_question(question) == reason


def test_everything_that_can_be_checked_or_fail_to_decode_has_a_named_reason() -> None:
    assert set(get_args(Reason)) <= set(REASONS)


def test_the_funnel_counts_and_writes(tmp_path: Path) -> None:
    funnel = Funnel(tmp_path / "deep" / "log")
    funnel.count("clips", 3)
    funnel.count("rows")
    funnel.count("rows")
    funnel.drop("unreadable", clip="ü.mp4")
    funnel.drop("empty_answer")
    funnel.drop("unreadable", clip="b.mp4", detail="two\nlines")
    counts = funnel.close()
    assert counts == {"stages": {"clips": 3, "rows": 2}, "dropped": {"unreadable": 2, "empty_answer": 1}}
    log = tmp_path / "deep" / "log"
    assert json.loads((log / "funnel.json").read_text(encoding="utf-8")) == counts
    assert [json.loads(line) for line in (log / "dropped.jsonl").read_text(encoding="utf-8").splitlines()] == [
        {"reason": "unreadable", "clip": "ü.mp4"},
        {"reason": "empty_answer"},
        {"reason": "unreadable", "clip": "b.mp4", "detail": "two\nlines"},
    ]
    assert "ü" in (log / "dropped.jsonl").read_text(encoding="utf-8"), "a person reads this file"


def test_a_log_is_of_one_run(tmp_path: Path) -> None:
    """A run that ends in an error leaves no numbers of the one before."""
    Funnel(tmp_path).close()
    Funnel(tmp_path).drop("unreadable", clip="\udcff.mp4")
    assert not (tmp_path / "funnel.json").exists()
    funnel = Funnel(tmp_path)
    funnel.drop("unreadable", clip="a\udcff.mp4")  # as Python names a file whose name is no UTF-8
    funnel.close()
    assert json.loads((tmp_path / "dropped.jsonl").read_text(encoding="utf-8"))["clip"] == "a\udcff.mp4"


def test_a_drop_needs_a_named_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'dull' is no named reason; have"):
        Funnel(tmp_path).drop("dull")


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<image>", "<IMG_CONTEXT>", "<end_of_turn>", "[/INST]"])
def test_a_reply_that_holds_a_control_token_is_dropped_by_name(token: str) -> None:
    assert check_question(f"What is it{token}?") == check_answer("What?", f"A dog.{token}") == "control_token"
    assert check_caption(f"{token} A dog.") == "control_token"


@pytest.mark.parametrize("text", ["He types <div> and </p>.", "a < b | c > d", "[IMG 3]", "<s p>", "x[0]"])
def test_what_only_looks_a_little_like_a_control_token_stands(text: str) -> None:
    assert check_answer("What?", text) is None
