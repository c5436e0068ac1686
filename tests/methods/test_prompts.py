"""Every prompt text, word for word, with the version that stands in the rows made with it.

Where this fails: raise the version beside the text, and write the new hash here.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from types import ModuleType

import pytest

from longvpo_hf.building import captioning
from longvpo_hf.building.judging import YES_OR_NO
from longvpo_hf.methods import stage1, stage2, temporal

LINES = ["Scene #0: A dog runs.", "Scene #4: A cat sleeps."]
SCENES = [(0, "A dog runs."), (4, "A cat sleeps.")]

#: Where texts are, and the texts themselves: every function with every branch it has.
TEXTS: dict[ModuleType, dict[str, list[str]]] = {
    stage1: {
        "question_prompt": [stage1.question_prompt("A dog runs."), stage1.question_prompt("")],
        "specific_prompt": [
            stage1.specific_prompt("Who runs?", "A dog runs."),
            stage1.specific_prompt("Who runs?", ""),
        ],
        "also_right_prompt": [stage1.also_right_prompt("Who runs?", "A dog.", "A cat.")],
    },
    captioning: {
        "caption_prompt": [captioning.caption_prompt([], 85), captioning.caption_prompt(LINES, 85)],
        "summary_prompt": [captioning.summary_prompt(LINES, 114)],
    },
    stage2: {
        "question_prompt": [
            stage2.question_prompt(SCENES, [], None, ""),
            stage2.question_prompt(SCENES, ["Scenes #0 to #9: Animals."], 4, stage2.try_again([*stage2._BETTER])),
        ],
        "support_prompt": [stage2.support_prompt("Who runs?", "A dog.", LINES)],
        "QUESTION_SCHEMA": [json.dumps(stage2.QUESTION_SCHEMA)],
    },
    temporal: {
        "question_prompt": [
            temporal.question_prompt(LINES, kind, is_segment)
            for kind in temporal.QUESTION_TYPES
            for is_segment in (True, False)
        ],
        "post_filter_prompt": [temporal.post_filter_prompt(LINES, "Who runs?", "A dog.", "A cat.")],
        "QUESTION_TYPES": [json.dumps(temporal.QUESTION_TYPES)],
        "QUESTION_SCHEMA": [json.dumps(temporal.QUESTION_SCHEMA)],
        "POST_FILTER_SCHEMA": [json.dumps(temporal.POST_FILTER_SCHEMA)],
    },
}

#: Version of a text, and its sha256.
HASHES = {
    "stage1-1 question_prompt": "38e77dd7b8b50389",
    "stage1-1 specific_prompt": "9b9e31db83342c5c",
    "stage1-1 also_right_prompt": "36614fbe0b655a14",
    "captions-1 caption_prompt": "602494d136a23148",
    "captions-1 summary_prompt": "505e7812a7f6c0af",
    "stage2-2 question_prompt": "21737870ba13a310",
    "stage2-2 support_prompt": "318f6c9fe1c4820b",
    "stage2-2 QUESTION_SCHEMA": "855540d425c4f6bf",
    "temporal-1 question_prompt": "6b2c439f5ed3623f",
    "temporal-1 post_filter_prompt": "f83cd0c62698abff",
    "temporal-1 QUESTION_TYPES": "7f6639e36d201c33",
    "temporal-1 QUESTION_SCHEMA": "3a274d1f51666e50",
    "temporal-1 POST_FILTER_SCHEMA": "e0f8224b6b3db1d2",
}


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def test_a_change_of_wording_is_a_new_version() -> None:
    found = {
        f"{module.PROMPT_VERSION} {name}": digest(texts)
        for module, by_name in TEXTS.items()
        for name, texts in by_name.items()
    }
    assert found == HASHES, "a prompt's wording changed without its version, or its hash is not written here yet"


@pytest.mark.parametrize("module", TEXTS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_prompt_is_under_a_version(module: ModuleType) -> None:
    public = {
        name
        for name, value in vars(module).items()
        if (name.endswith("_prompt") and inspect.isfunction(value) and value.__module__ == module.__name__)
        or name.endswith(("_SCHEMA", "_TYPES"))
    }
    assert public == set(TEXTS[module])


def test_no_two_files_share_a_version() -> None:
    assert len({module.PROMPT_VERSION for module in TEXTS}) == len(TEXTS)


def test_no_prompt_has_a_gap() -> None:
    """No doubled space, no word run into the next, no field left unfilled."""
    for by_name in TEXTS.values():
        for name, texts in by_name.items():
            for text in texts if name.islower() else []:
                assert "  " not in text
                assert "None" not in text
                assert not text.startswith((" ", "\n"))
                assert not text.endswith((" ", "\n"))


def test_judges_are_asked_for_yes_or_no() -> None:
    for texts in (
        TEXTS[stage1]["specific_prompt"],
        TEXTS[stage1]["also_right_prompt"],
        TEXTS[stage2]["support_prompt"],
    ):
        assert all(text.endswith(YES_OR_NO) for text in texts)
