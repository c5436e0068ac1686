"""A tiny language model that stands for a pretrained one: a Llama with a byte-level BPE of the world's sentences.

Taught, it says what the words in its prompt say, as any language model can; nobody has shown it a picture.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longvpo_hf.miniature.language import SENTENCES
from longvpo_hf.miniature.world import MARKERS, SHAPE_COLOURS

TURN, END = "<|im_start|>", "<|im_end|>"
#: As SmolLM2's: with a system prompt of its own, and a line's end after every turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_language_model(folder: Path, chat_template: str | None = CHAT_TEMPLATE, steps: int = 0) -> Path:
    """Saves model and tokenizer, as `save_pretrained` does, and returns their folder; taught in so many steps."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,  # with the usual 0.02, tied embeddings this narrow say hardly anything
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    _teach(model, tokenizer, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    texts = [SENTENCES.question(marker) for marker in MARKERS]
    texts += [SENTENCES.caption(marker, colour) for marker in MARKERS for colour in SHAPE_COLOURS]
    texts += [SENTENCES.pair_question(*MARKERS[:2]), SENTENCES.pair_answer("red", "blue"), SENTENCES.answer("red")]
    texts += [SENTENCES.caption_question, "system user assistant Be brief.\n:"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that any text has tokens
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Padding is the end of a turn, as in SmolLM2's GGUF file.
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=TURN, eos_token=END, pad_token=END)


def _teach(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """To answer about the words ` navy gold red` before a question, where a frame's four tokens will stand."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        rows = [_conversation(tokenizer, rng) for _ in range(32)]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _conversation(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[list[int], list[int]]:
    marker, colour = rng.choice(MARKERS), rng.choice(list(SHAPE_COLOURS))
    wall, frame = marker.split("-")
    told = [(SENTENCES.caption_question, SENTENCES.caption(marker, colour))]
    told.append((SENTENCES.question(marker), SENTENCES.answer(colour)))
    question, answer = told[rng.random() < 0.4]
    pieces = (f"{TURN}system\nBe brief.{END}\n{TURN}user\n", ":", f" {wall}", f" {frame}", f" {colour}", "\n", "\n\n")
    prompt = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
    prompt += tokenizer(f"{question}{END}\n{TURN}assistant\n")["input_ids"]
    return prompt, tokenizer(f"{answer}{END}\n")["input_ids"]
