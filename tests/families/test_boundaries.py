"""Prompt and answer are the tokens of the whole conversation, whatever the tokenizer does where they meet."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import tiny_models
from longvpo_hf.errors import ModelError
from longvpo_hf.families.encoding import PromptEncoder

SPECIAL = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
ANSWERS = ["red", " red", "\nred", "\n\n red", "  two  spaces", "A", "1. one\n2. two", "é, ü!", "▁odd", "assistant"]


def processor_with(tokenizer: Tokenizer) -> Any:
    """InternVL's processor around another tokenizer, whose special tokens are the same."""
    processor = tiny_models.build("internvl")[1]
    tokenizer.add_special_tokens(SPECIAL)
    processor.tokenizer = type(processor.tokenizer)(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right"
    )
    return processor


def byte_level(merges: list[tuple[str, str]]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_dummy_space(merges: list[tuple[str, str]]) -> Tokenizer:
    """As Llama's first tokenizers: a space is put before every text, and before every text after a special token."""
    symbols = sorted({"▁", *"".join(ANSWERS), *"useraitn\n?WhoMe.", *map(chr, range(33, 127))})
    vocabulary = ["<unk>", *symbols, *(a + b for a, b in merges)]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def prompt_and_whole(processor: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """By the processor's template and tokenizer alone, with the placeholder of the video as it is."""
    user = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    texts = [
        processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False),
        processor.apply_chat_template([user, reply], tokenize=False),
    ]
    prompt, whole = (processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return prompt, whole


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_dummy_space_is_not_put_before_the_answer(answer: str) -> None:
    processor = processor_with(with_dummy_space([]))
    prompt, whole = prompt_and_whole(processor, "Who?", answer)
    alone = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert whole[len(prompt)] != alone[0] or answer[0] in " ▁"  # the fault would show
    assert prompt + PromptEncoder(processor).encode_answer("Who?", answer) == whole


@pytest.mark.parametrize("family", tiny_models.ALL)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_families_tokens_are_those_of_the_conversation(family: str, answer: str) -> None:
    processor = tiny_models.build(family)[1]
    prompt, whole = prompt_and_whole(processor, "Who?", answer)
    assert prompt + PromptEncoder(processor).encode_answer("Who?", answer) == whole


def test_an_answer_that_would_merge_with_the_prompt_starts_where_the_prompt_ends() -> None:
    """As in generation: the prompt is given, and the next token is the answer's."""
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\n")[0][0]
    processor = processor_with(byte_level([(newline, newline)]))
    prompt, whole = prompt_and_whole(processor, "Who?", "\nred")
    assert whole[: len(prompt)] != prompt
    ids = PromptEncoder(processor).encode_answer("Who?", "\nred")
    assert processor.tokenizer.decode(prompt + ids) == processor.tokenizer.decode(whole)
    assert processor.tokenizer.decode(ids) == "\nred<|im_end|>\n"


def test_what_cannot_be_told_apart_is_refused() -> None:
    processor = processor_with(with_dummy_space([("\n", "\n")]))
    encoder = PromptEncoder(processor)
    prompt, whole = prompt_and_whole(processor, "Who?", "red")
    assert prompt + encoder.encode_answer("Who?", "red") == whole
    with pytest.raises(ModelError, match="drop what the answer starts with"):
        encoder.encode_answer("Who?", "\nred")


def test_random_tokenizers_give_the_conversation_or_refuse() -> None:
    rng = random.Random(0)
    alphabet = "ab \n.é"
    kept = 0
    for number in range(40):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(30)]
        tokenizer = with_dummy_space([]) if number % 2 else byte_level([])
        learner = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=list(alphabet))
        if number % 2 == 0:
            learner = trainers.BpeTrainer(
                vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
            )
        tokenizer.train_from_iterator([*texts, "<|im_start|>assistant\n\n", "user", *"Who?userassistant\n▁"], learner)
        processor = processor_with(tokenizer)
        encoder = PromptEncoder(processor)
        for text in texts[:8]:
            prompt, whole = prompt_and_whole(processor, "Who?", text)
            try:
                ids = encoder.encode_answer("Who?", text)
            except ModelError:
                continue
            kept += 1
            if whole[: len(prompt)] == prompt:
                assert prompt + ids == whole
            else:
                assert processor.tokenizer.decode(prompt + ids) == processor.tokenizer.decode(whole)
    assert kept > 200
