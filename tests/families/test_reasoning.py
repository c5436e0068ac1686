"""Answers with and without reasoning under templates that open it: the template's own tokens, and trees of them.

The conversations are rendered by the template itself here, and tokenized as a whole, with a tokenizer that merges line
breaks as Qwen's does.
"""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.errors import ModelError
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.preference import VideoPreference
from longvpo_hf.training.collator import VideoPreferenceCollator
from longvpo_hf.training.packing import enable_tree_packing, plain_forward, tree_forward
from longvpo_hf.training.reference import reference_fingerprints

torch.set_num_threads(1)

_OWN = """{%- for message in messages -%}<|im_start|>{{ message.role }}
{% if message.role == 'user' %}<|vision_start|><|video_pad|><|vision_end|>{{ message.content[-1].text }}{% else %}\
ANSWER{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
OPENED{% endif %}"""
_TEXT = "{% set text = message.content[0].text %}"


def own(answer: str, opened: str = "") -> str:
    return _OWN.replace("ANSWER", _TEXT + answer).replace("OPENED", opened)


TEMPLATES = {
    **{
        name: (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        for name in ("qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_vl")
    },
    # As Qwen3-VL-Thinking: no switch, reasoning opened, and closed at once where there is none.
    "always": own(
        "{% set r = text.split('</think>')[0].split('<think>')[-1] if '</think>' in text else '' %}<think>\n"
        "{{ r.strip('\n') }}\n</think>\n\n{{ text.split('</think>')[-1].lstrip('\n') }}",
        "<think>\n",
    ),
    # As GLM-4.5: a line break before the tags, and nothing between them.
    "glm": own(
        "{% set r = text.split('</think>')[0].split('<think>')[-1] if '</think>' in text else '' %}\n"
        "<think>{{ r.strip() }}</think>\n{{ text.split('</think>')[-1].strip() }}"
    ),
    # As DeepSeek-R1: opened in the prompt, and reasoning never in what was said before.
    "r1": own("{{ text.split('</think>')[-1] }}", "<think>\n"),
    # As Gemma 4: reasoning from a field of its own, and out of the text.
    "field": own(
        "{% if message.reasoning %}<|channel>thought\n{{ message.reasoning }}\n<channel|>{% endif %}"
        "{{ text.split('</think>')[-1] }}"
    ),
}
#: Those that never render reasoning of an answer.
FORGETFUL = ("r1",)
PLAIN = ["red", "A red ball.", "1. one\n2. two", "é, ü!"]
REASONED = ["<think>\nIt is round.\n</think>\n\nred", "<think>blue?\n\nNo.</think>A red ball.", "It is.</think>yes"]


#: How texts are split before merging: Qwen's rule keeps line breaks together, GPT-2's leaves the last to the next word.
QWEN, GPT_2 = r"\s*[\r\n]+|\s+(?!\S)|\s+|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", r"\s+(?!\S)|\s+|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def processor_of(template: str, splits: str = QWEN) -> Any:
    """Qwen3-VL's processor with a template, whose tokenizer merges two line breaks and knows `<think>`."""
    processor = tiny_models.build("qwen3_vl")[1]
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["<think>", "</think>"])
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    newline = "Ċ"
    # In place of the byte 0xff, so that no other id changes.
    backend["model"]["vocab"][newline * 2] = backend["model"]["vocab"].pop("ÿ")
    backend["model"]["merges"] = [[newline, newline]]
    split = {"type": "Split", "pattern": {"Regex": splits}, "behavior": "Isolated", "invert": False}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, whole]}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    processor.chat_template = template
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    return processor


def whole_ids(processor: Any, question: str, message: dict[str, Any]) -> list[int]:
    turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template([*turns, {"role": "assistant", **message}], tokenize=False)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def said(text: str, **more: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}], **more}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("mode", ["keep", "drop"])
@pytest.mark.parametrize("splits", [QWEN, GPT_2], ids=["qwen", "gpt_2"])
def test_tokens_are_the_template_s_own(name: str, mode: Any, splits: str) -> None:
    processor = processor_of(TEMPLATES[name], splits)
    encoder = PromptEncoder(processor, answer_reasoning=mode)
    for answers in (PLAIN, REASONED[:2], [PLAIN[0], REASONED[1]]):
        reasons = any("</think>" in answer for answer in answers)
        if mode == "keep" and reasons and name in FORGETFUL:
            with pytest.raises(ModelError, match=r"leaves out reasoning of the answer .* set answer_reasoning='drop'"):
                encoder.encode_texts("Who?", answers)
            continue
        prompt, completions = encoder.encode_texts("Who?", answers)
        for answer, completion in zip(answers, completions, strict=True):
            _, tag, after = answer.rpartition("</think>")
            message = said(answer)
            if mode == "drop":
                message = said(after.strip() if tag else answer)
            elif name == "field" and tag:
                reasoning = answer.removesuffix(tag + after).removeprefix("<think>").strip()
                message = said(after.strip(), reasoning=reasoning)
            assert prompt + completion == whole_ids(processor, "Who?", message), (answer, mode)
            text = processor.tokenizer.decode(completion)
            assert after.strip() in text
            assert ("<think>" in text or "channel" in text or "</think>" in text) <= (mode == "keep" and reasons), text


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_5_nothink", "always"])
def test_empty_reasoning_is_the_prompt_s(name: str) -> None:
    """As where thinking is turned off: the model is trained to answer, not to write what the template writes."""
    processor = processor_of(TEMPLATES[name])
    prompt, (one, other) = PromptEncoder(processor).encode_texts("Who?", ["red", "blue"])
    decode = processor.tokenizer.decode
    assert decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert (decode(one), decode(other)) == ("red<|im_end|>\n", "blue<|im_end|>\n")
    if name != "always":
        off = PromptEncoder(processor, thinking=False).encode(None, [[{"role": "user", "content": "Who?"}]])
        assert decode(prompt).replace("<|vision_start|><|video_pad|><|vision_end|>", "") == decode(off.input_ids[0])


def test_reasoning_that_was_opened_in_the_prompt_is_part_of_the_answer() -> None:
    """A reply to such a prompt holds the closing tag alone."""
    processor = processor_of(TEMPLATES["qwen3_5_think"])
    prompt, (kept,) = PromptEncoder(processor).encode_texts("Who?", [REASONED[2]])
    assert processor.tokenizer.decode(prompt + kept).endswith("<think>\nIt is.\n</think>\n\nyes<|im_end|>\n")
    assert processor.tokenizer.decode(kept).startswith("It is.")
    _, (dropped,) = PromptEncoder(processor, answer_reasoning="drop").encode_texts("Who?", [REASONED[2]])
    assert processor.tokenizer.decode(dropped) == "yes<|im_end|>\n"


@pytest.mark.parametrize("mode", ["keep", "drop"])
@pytest.mark.parametrize("answer", ["<think>It is", "red<think>or", "<think>red</think>", "<think>red</think>\n \n"])
def test_answers_without_an_end_are_refused(answer: str, mode: Any) -> None:
    encoder = PromptEncoder(processor_of(TEMPLATES["always"]), answer_reasoning=mode)
    with pytest.raises(ModelError, match="ends inside its reasoning, or with it"):
        encoder.encode_texts("Who?", ["blue", answer])


def test_answers_that_differ_in_reasoning_alone() -> None:
    processor = processor_of(TEMPLATES["always"])
    pair = ["<think>a</think>red", "<think>b</think>red"]
    PromptEncoder(processor).encode_texts("Who?", pair)
    with pytest.raises(ModelError, match="one and the same"):
        PromptEncoder(processor, answer_reasoning="drop").encode_texts("Who?", pair)


def test_no_part_of_an_answer_is_lost() -> None:
    """Qwen's template would leave out what stands before reasoning, and all but the first of several."""
    encoder = PromptEncoder(processor_of(TEMPLATES["qwen3_5_think"]))
    for answer in ("It is <think>hm</think>red", "<think>a</think>b<think>c</think>d"):
        with pytest.raises(ModelError, match="leaves out reasoning"):
            encoder.encode_texts("Who?", ["blue", answer])


def with_reasoning(preferences: list[VideoPreference], rng: random.Random) -> Any:
    rows = []
    for row in make_dataset(preferences):
        for name in ("chosen", "rejected"):
            text = row[name][0]["content"]
            if rng.random() < 0.5:
                row[name] = [{"role": "assistant", "content": f"<think>\n{rng.randint(0, 99)}?\n</think>\n\n{text}"}]
        rows.append(row)
    return rows


@pytest.mark.parametrize("mode", ["keep", "drop"])
@pytest.mark.parametrize("name", ["qwen3_5_think", "always", "glm", "field"])
def test_trees_equal_separate_sequences(name: str, mode: Any, preferences: list[VideoPreference]) -> None:
    processor = processor_of(TEMPLATES[name])
    rows = with_reasoning(preferences, random.Random(1))
    collator = VideoPreferenceCollator(
        processor, num_frames=4, fps=None, max_pixels=64 * 64, reference="full", answer_reasoning=mode
    )
    batch = collator(rows)
    model = trainers.with_head("qwen3_vl")
    model.resize_token_embeddings(len(processor.tokenizer))
    assert enable_tree_packing(model) is None
    with torch.no_grad():
        torch.testing.assert_close(
            tree_forward(model, batch).log_probs, plain_forward(model, batch).log_probs, rtol=0, atol=3e-5
        )
    shown = processor.tokenizer.batch_decode(
        [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    )
    reasoned = [json.dumps(row[answer]).count("<think>") for answer in ("chosen", "rejected") for row in rows]
    assert [int(any(mark in text for mark in "0123456789") and "?" in text) for text in shown] == [
        number if mode == "keep" else 0 for number in reasoned
    ]


def test_reference_scores_are_of_one_mode(preferences: list[VideoPreference], tmp_path: Path) -> None:
    rows = make_dataset(preferences)

    def fingerprints(mode: Any) -> list[str]:
        processor = tiny_models.build("internvl")[1]
        return reference_fingerprints(VideoPreferenceCollator(processor, 4, answer_reasoning=mode), rows, "m")

    assert not set(fingerprints("keep")) & set(fingerprints("drop"))
    with pytest.raises(ValueError, match="answer_reasoning must be 'keep' or 'drop', got 'no'"):
        trainers.settings(tmp_path, answer_reasoning="no")
