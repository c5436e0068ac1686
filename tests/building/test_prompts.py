"""Every prompt text, word for word, with the version that stands in the rows made with it.

Where this fails: raise the version of the method that sends the text, and write the new hash here.
"""

from __future__ import annotations

import hashlib
import inspect
import json

from longvpo_hf.building import prompts

LINES = ["Scene #0: A dog runs.", "Scene #4: A cat sleeps."]
SCENES = [(0, "A dog runs."), (4, "A cat sleeps.")]

#: Version, and the texts that are sent under it: every function with every branch it has.
TEXTS = {
    prompts.STAGE1_VERSION: {
        "question_from_clip": [prompts.question_from_clip("A dog runs."), prompts.question_from_clip("")],
        "is_specific": [prompts.is_specific("Who runs?", "A dog runs."), prompts.is_specific("Who runs?", "")],
        "is_also_right": [prompts.is_also_right("Who runs?", "A dog.", "A cat.")],
    },
    prompts.CAPTIONS_VERSION: {
        "caption_scene": [prompts.caption_scene([], 85), prompts.caption_scene(LINES, 85)],
        "summarise_captions": [prompts.summarise_captions(LINES, 114)],
    },
    prompts.STAGE2_VERSION: {
        "question_over_scenes": [
            prompts.question_over_scenes(SCENES, [], None, ""),
            prompts.question_over_scenes(SCENES, ["Scenes #0 to #9: Animals."], 4, "it names no scene"),
        ],
        "is_supported": [prompts.is_supported("Who runs?", "A dog.", LINES)],
        "QUESTION_SCHEMA": [json.dumps(prompts.QUESTION_SCHEMA)],
    },
    prompts.TEMPORAL_VERSION: {
        "temporal_question": [
            prompts.temporal_question(LINES, kind, is_segment)
            for kind in prompts.QUESTION_TYPES
            for is_segment in (True, False)
        ],
        "post_filter": [prompts.post_filter(LINES, "Who runs?", "A dog.", "A cat.")],
        "QUESTION_TYPES": [json.dumps(prompts.QUESTION_TYPES)],
        "TEMPORAL_QUESTION_SCHEMA": [json.dumps(prompts.TEMPORAL_QUESTION_SCHEMA)],
        "POST_FILTER_SCHEMA": [json.dumps(prompts.POST_FILTER_SCHEMA)],
    },
}

#: Version of a text, and its sha256.
HASHES = {
    "stage1-1 question_from_clip": "38e77dd7b8b50389",
    "stage1-1 is_specific": "9b9e31db83342c5c",
    "stage1-1 is_also_right": "36614fbe0b655a14",
    "captions-1 caption_scene": "602494d136a23148",
    "captions-1 summarise_captions": "505e7812a7f6c0af",
    "stage2-1 question_over_scenes": "5254c77c5c410545",
    "stage2-1 is_supported": "318f6c9fe1c4820b",
    "stage2-1 QUESTION_SCHEMA": "855540d425c4f6bf",
    "temporal-1 temporal_question": "6b2c439f5ed3623f",
    "temporal-1 post_filter": "f83cd0c62698abff",
    "temporal-1 QUESTION_TYPES": "7f6639e36d201c33",
    "temporal-1 TEMPORAL_QUESTION_SCHEMA": "3a274d1f51666e50",
    "temporal-1 POST_FILTER_SCHEMA": "e0f8224b6b3db1d2",
}


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def test_a_change_of_wording_is_a_new_version() -> None:
    found = {
        f"{version} {name}": digest(texts) for version, by_name in TEXTS.items() for name, texts in by_name.items()
    }
    assert found == HASHES, "a prompt's wording changed without its version, or its hash is not written here yet"


def test_every_prompt_is_under_a_version() -> None:
    named = {name for by_name in TEXTS.values() for name in by_name}
    public = {
        name
        for name, value in vars(prompts).items()
        if not name.startswith("_")
        and (name.isupper() or (inspect.isfunction(value) and value.__module__ == prompts.__name__))
    }
    not_texts = {"YES_OR_NO", *(name for name in public if name.endswith("_VERSION"))}
    assert public - not_texts == named
    assert len(TEXTS) == len({name for name in public if name.endswith("_VERSION")}), "two methods share a version"


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
    for texts in (TEXTS[prompts.STAGE1_VERSION]["is_specific"], TEXTS[prompts.STAGE2_VERSION]["is_supported"]):
        assert all(text.endswith(prompts.YES_OR_NO) for text in texts)
