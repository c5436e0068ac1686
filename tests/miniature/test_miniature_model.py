"""The miniature's model: a plain transformers model and processor, and one token per frame."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, InternVLForConditionalGeneration, InternVLProcessor

from longvpo_hf.miniature.language import WORDS
from longvpo_hf.miniature.model import build_model, build_processor
from longvpo_hf.miniature.world import MARKERS, SHAPE_COLOURS

QUESTION = f"what colour in the {MARKERS[9]} clip ?"
MESSAGES = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def processor() -> InternVLProcessor:
    return build_processor()


@pytest.fixture(scope="module")
def model(processor: InternVLProcessor) -> InternVLForConditionalGeneration:
    return build_model(processor, seed=1).eval()


def video(num_frames: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_frames, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def inputs(processor: InternVLProcessor, num_frames: int) -> dict[str, torch.Tensor]:
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return dict(processor(text=text, videos=[video(num_frames)], return_tensors="pt"))


def test_it_is_tiny(model: InternVLForConditionalGeneration) -> None:
    assert 850_000 < sum(parameter.numel() for parameter in model.parameters()) < 950_000


@pytest.mark.parametrize("num_frames", [1, 2, 12])
def test_a_frame_is_one_token_and_carries_no_label(processor: InternVLProcessor, num_frames: int) -> None:
    encoded = inputs(processor, num_frames)
    tokens = processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    frames = ["<IMG_CONTEXT>"] * num_frames
    assert tokens == ["<user>", "<img>", *frames, "</img>", *QUESTION.split(), "<assistant>"]
    assert encoded["pixel_values"].shape == (num_frames, 3, 32, 32)


def test_every_text_of_the_world_is_in_the_vocabulary(processor: InternVLProcessor) -> None:
    texts = [f"what colour in the {marker} clip ?" for marker in MARKERS]
    texts += [WORDS.caption_question, *(WORDS.caption(MARKERS[0], colour) for colour in SHAPE_COLOURS), *MARKERS]
    for text in texts:
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.unk_token_id not in ids
        assert processor.decode(ids) == text
        assert len(ids) == len(text.split())
    assert len(WORDS.caption(MARKERS[0], "red").split()) + 1 == WORDS.max_answer_tokens


@pytest.mark.parametrize("answer", ["red", [{"type": "text", "text": "red"}]])
def test_the_template_ends_an_answer_with_eos(processor: InternVLProcessor, answer: object) -> None:
    tokenizer = processor.tokenizer
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template([*MESSAGES, {"role": "assistant", "content": answer}], tokenize=False)
    prompt_ids, whole_ids = tokenizer(prompt)["input_ids"], tokenizer(whole)["input_ids"]
    assert whole_ids == [*prompt_ids, tokenizer.convert_tokens_to_ids("red"), tokenizer.eos_token_id]


def test_saved_and_loaded_with_auto_classes_it_is_the_same(
    model: InternVLForConditionalGeneration, processor: InternVLProcessor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded_model = AutoModelForImageTextToText.from_pretrained(tmp_path, local_files_only=True).eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    before, after = inputs(processor, 6), inputs(loaded_processor, 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        torch.testing.assert_close(loaded_model(**after).logits, model(**before).logits, rtol=0, atol=0)
    generated = loaded_model.generate(**after)
    assert generated.shape[1] - after["input_ids"].shape[1] <= WORDS.max_answer_tokens
    assert torch.equal(generated, model.generate(**before))


def test_a_seed_decides_the_weights_and_leaves_the_global_generator(processor: InternVLProcessor) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (build_model(processor, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
