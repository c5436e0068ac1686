"""How models of this process write: greedily or sampled, and how what they wrote becomes text.

Sampled answers follow from the seed and the question alone: each has random numbers of its own, which neither its batch
nor its process changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from longvpo_hf.decoding import Decoding
from longvpo_hf.families.drawing import Draws
from longvpo_hf.reasoning import TAG, CutOff
from longvpo_hf.responders import Request

#: For models that reason before they answer. Their authors allow 32,768 and more; questions with options take a tenth
#: of that, and what is cut off is counted as such.
REASONING_TOKENS = 16_384
#: For a letter or a few words.
SHORT_TOKENS = 16


def seed_of(request: Request, decoding: Decoding) -> int:
    """Seeds the random numbers of one answer: the same for the same question about the same video."""
    clips = () if request.timeline is None else request.view.of(request.timeline).clips
    # Not their folders: the same question is answered alike on every machine.
    shown = [[Path(clip.path).name, clip.start_seconds, clip.end_seconds] for clip in clips]
    content = json.dumps([decoding.decoding_seed, request.text, shown, request.view.num_frames])
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) >> 1


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    inputs: Mapping[str, torch.Tensor],
    seeds: Sequence[int],
    max_new_tokens: int,
    decoding: Decoding,
    opened: str,
) -> list[str]:
    """Answers to prompts that are padded on the left.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        inputs: Of `generate`, with `input_ids` `[B, N]`.
        seeds: One for each prompt; see `seed_of`.
        max_new_tokens: Bound on an answer's length.
        decoding: How they are decoded.
        opened: The tag with which the template opens reasoning in every prompt; "" where it opens none.

    Returns:
        Texts, each after `opened`; a `CutOff` for each that has as many tokens as it may and no end.
    """
    processors = LogitsProcessorList([Draws(decoding, seeds, model.device)] if decoding.temperature else [])
    with torch.inference_mode():
        # Greedy either way: what is drawn has the highest score.
        output = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=processors,
        )
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = [f"{opened}{text}".strip() for text in _texts(tokenizer, new)]
    ends = model.generation_config.eos_token_id
    if ends is None or new.shape[1] < max_new_tokens:
        return texts
    ended = torch.isin(new, torch.as_tensor(ends, device=new.device)).any(1).tolist()
    return [text if end else CutOff(text) for text, end in zip(texts, ended, strict=True)]


def _texts(tokenizer: Any, tokens: torch.Tensor) -> list[str]:
    """Tokens `[B, N]` as text without special tokens, but with tags around reasoning that are special tokens."""
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    special = re.compile(
        "|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True))) or r"(?!)"
    )
    for index, whole in enumerate(tokenizer.batch_decode(tokens, skip_special_tokens=False)):
        tags = [tag[0] for tag in TAG.finditer(whole)]
        if tags != [tag[0] for tag in TAG.finditer(texts[index])]:
            parts = [special.sub("", part) for part in TAG.sub("\0", whole).split("\0")]
            texts[index] = "".join(part + tag for part, tag in zip(parts, [*tags, ""], strict=True))
    return texts
