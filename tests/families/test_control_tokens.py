"""Control tokens and placeholders in texts from outside are plain text to every family's model."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

import tiny_models
from longvpo_hf.errors import ModelError
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.frames import Frames

FAMILIES = list(tiny_models.ALL)
#: Of released models, whether or not a tiny tokenizer has them.
OTHERS = ["<image>", "<video>", "<IMG_CONTEXT>", "<|vision_start|>", "</s>", "<|eot_id|>", "[INST]", "<end_of_turn>"]
WORDS = ["What", "does", "<", "|", ">", "the", "man\n", "  ", "do?", "é", "<|", "|>", "\n\n", "im_end"]


@functools.cache
def encoder_of(name: str) -> PromptEncoder:
    return PromptEncoder(tiny_models.build(name)[1])


def own_tokens(encoder: PromptEncoder) -> list[str]:
    """The tokenizer's special tokens and the processor's placeholders, found otherwise than by the encoder."""
    tokenizer = encoder.processor.tokenizer
    by_id = [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids]
    attributes = [value for name, value in vars(encoder.processor).items() if name.endswith("_token")]
    added = [str(token) for token in tokenizer.get_added_vocab()]
    return sorted({text for text in (*by_id, *attributes, *added) if isinstance(text, str) and text.strip()})


def special_ids(encoder: PromptEncoder) -> set[int]:
    return {encoder.processor.tokenizer.convert_tokens_to_ids(token) for token in own_tokens(encoder)}


def frames() -> Frames:
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8, generator=noise)
    return Frames(pixels, (0.5, 1.5, 2.5, 3.5), (0,) * 4, 4.0)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def specials_in(encoder: PromptEncoder, ids: list[int]) -> list[int]:
    special = special_ids(encoder)
    return [token for token in ids if token in special]


def decoded(encoder: PromptEncoder, ids: list[int]) -> str:
    text: str = encoder.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def random_texts(encoder: PromptEncoder, count: int) -> list[str]:
    """Every token alone, at the start, in the middle, doubled and nested; then random mixtures."""
    rng = random.Random(0)
    tokens = [*own_tokens(encoder), *OTHERS]
    alone = [text for token in tokens for text in (token, f"{token} a", f"a{token}b {token}", token[:1] + token)]
    mixed = ["".join(rng.choices([*tokens, *WORDS], k=rng.randint(1, 9))) for _ in range(count)]
    return [*alone, *(text for text in mixed if text.strip())]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_the_control_tokens_of_its_template_alone(family: str) -> None:
    encoder = encoder_of(family)
    texts = random_texts(encoder, 20)
    plain = encoder.encode(frames(), [user("a")])
    wanted = specials_in(encoder, plain.input_ids[0])
    types = (plain.mm_token_type_ids or [[]])[0]
    # As the first prompt, which the processor encodes, and as others about the same video.
    for text in texts[:: max(1, len(texts) // 12)]:
        one = encoder.encode(frames(), [user(text)])
        assert specials_in(encoder, one.input_ids[0]) == wanted, text
        assert text in decoded(encoder, one.input_ids[0])
        assert all(torch.equal(one.visual[name], plain.visual[name]) for name in plain.visual)
    many = encoder.encode(frames(), [user(text) for text in texts])
    for number, (text, ids) in enumerate(zip(texts, many.input_ids, strict=True)):
        assert specials_in(encoder, ids) == wanted, text
        assert text in decoded(encoder, ids)
        if many.mm_token_type_ids is not None:
            assert len(many.mm_token_type_ids[number]) == len(ids)
            assert [kind for kind in many.mm_token_type_ids[number] if kind] == [kind for kind in types if kind]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_has_the_end_of_turn_of_its_template_alone(family: str) -> None:
    encoder = encoder_of(family)
    prompt, (answer,) = encoder.encode_texts(user("a"), ["b"])
    wanted_prompt, wanted = specials_in(encoder, prompt), specials_in(encoder, answer)
    for text in random_texts(encoder, 20):
        prompt, (answer,) = encoder.encode_texts(user("a"), [text])
        assert specials_in(encoder, prompt) == wanted_prompt
        assert specials_in(encoder, answer) == wanted, text
        assert text.strip() in decoded(encoder, answer)
        prompt, (answer,) = encoder.encode_texts(user(text), ["b"])
        assert (specials_in(encoder, prompt), specials_in(encoder, answer)) == (wanted_prompt, wanted), text


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_about_no_video_are_plain_too(family: str) -> None:
    encoder = encoder_of(family)
    wanted = specials_in(encoder, encoder.encode(None, [user("a")]).input_ids[0])
    for text in random_texts(encoder, 5):
        ids = encoder.encode(None, [user(text)]).input_ids[0]
        assert specials_in(encoder, ids) == wanted, text
        assert text in decoded(encoder, ids)


def test_the_marks_of_transformers_cannot_be_forged() -> None:
    encoder = encoder_of("qwen3_vl")
    wanted = specials_in(encoder, encoder.encode_answer("Who?", "b"))
    for forged in ("\U000f0000<|im_end|>\U000f0001", "\U000f0001<|im_end|>", "<|im_\U000f0000end|>", "\U000f0000"):
        assert specials_in(encoder, encoder.encode_answer("Who?", f"b{forged}")) == wanted


def test_a_tokenizer_that_reads_a_control_token_from_plain_text_refuses_it_by_name() -> None:
    from longvpo_hf.miniature import model

    encoder = PromptEncoder(model.build_processor())
    with pytest.raises(ModelError, match=r"The text 'Look: <video>' holds a control token .* Remove it"):
        encoder.encode(frames(), [user("Look: <video>")])


@pytest.mark.parametrize("token", ["<|im_end|>", "<video>"])
def test_a_thought_of_the_model_stays_a_token(token: str) -> None:
    """`<think>` is a token that models write as text: answers with reasoning keep it."""
    processor: Any = tiny_models.build("internvl")[1]
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    ids = PromptEncoder(processor).encode_answer("Who?", f"<think>{token}</think>{token}")
    assert ids[0] == processor.tokenizer.convert_tokens_to_ids("<think>")
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
