"""The miniature's vision-language model: a real InternVL of transformers, small enough to train on a laptop CPU.

An untrained `InternVLForConditionalGeneration` has about 0.9 million parameters; its `InternVLProcessor` has a video
processor, a word-level tokenizer and a chat template. Both save and load with the plain Auto classes, offline.

One frame is one token: the vision tower's 16 patches are shuffled into one, and the tokenizer's normalizer drops the
`Frame3: ` labels and the tokens between two frames that InternVLProcessor writes. The labels would be words for
positions that short training never saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from longvpo_hf.miniature.language import WORDS
from longvpo_hf.miniature.world import FRAME_PIXELS, MARKERS, SHAPE_COLOURS

_PAD, _EOS, _UNKNOWN = "<pad>", "<eos>", "<unk>"
_USER, _ASSISTANT = "<user>", "<assistant>"
VIDEO_START, VIDEO_END, FRAME, VIDEO = "<img>", "</img>", "<IMG_CONTEXT>", "<video>"
_SPECIAL = (_PAD, _EOS, _UNKNOWN, _USER, _ASSISTANT, VIDEO_START, VIDEO_END, FRAME, VIDEO)

# Every piece ends in a space: words are split at spaces, so none of them becomes a token.
_CHAT_TEMPLATE = """
{%- for message in messages -%}
    {{- '<user> ' if message['role'] == 'user' else '<assistant> ' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] + ' ' -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '<video> ' if part['type'] == 'video' else part['text'] + ' ' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<eos> ' if message['role'] == 'assistant' -}}
{%- endfor -%}
{{- '<assistant> ' if add_generation_prompt -}}
"""


def build_processor() -> InternVLProcessor:
    """The processor: `<user> <img> frames </img> question <assistant> answer <eos>`, a token per word and per frame."""
    return processor_of(_build_tokenizer(), _CHAT_TEMPLATE, tokens_per_frame=1)


def processor_of(tokenizer: PreTrainedTokenizerFast, chat_template: str, tokens_per_frame: int) -> InternVLProcessor:
    """The processor of the world's frames around a tokenizer of `tokenizer_of` and a chat template."""
    size = {"height": FRAME_PIXELS, "width": FRAME_PIXELS}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=tokens_per_frame,
        chat_template=chat_template,
    )


def build_model(processor: InternVLProcessor, seed: int) -> InternVLForConditionalGeneration:
    """The untrained model for the vocabulary of `processor`; `seed` decides its weights."""
    tokenizer = processor.tokenizer
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=FRAME_PIXELS,
            patch_size=8,
            layer_scale_init_value=1.0,  # InternVL's 0.1 makes two layers almost the identity.
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=256,
            initializer_range=0.05,
            tie_word_embeddings=True,
            # Low: distances beyond the short clips it was trained on are new to it, so accuracy falls with length.
            rope_parameters={"rope_type": "default", "rope_theta": 200.0},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=processor.image_token_id,
        image_seq_length=1,
        downsample_ratio=0.25,  # 4×4 patches become one token.
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=WORDS.max_answer_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _build_tokenizer() -> PreTrainedTokenizerFast:
    texts = (
        *MARKERS,
        *SHAPE_COLOURS,
        WORDS.caption_question,
        WORDS.caption(MARKERS[0], next(iter(SHAPE_COLOURS))),
        WORDS.question(MARKERS[0]),
        WORDS.pair_question(*MARKERS[:2]),
    )
    words = dict.fromkeys((*_SPECIAL, *(word for text in texts for word in text.split())))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer_of(tokenizer, _SPECIAL, pad_token=_PAD, eos_token=_EOS, unk_token=_UNKNOWN)


def tokenizer_of(tokenizer: Tokenizer, special: Sequence[str], **roles: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer that reads videos without labels, made of `tokenizer`, which it changes.

    Args:
        tokenizer: Any.
        special: Tokens that are added, unless it has them.
        roles: Which tokens are `pad_token`, `eos_token` and so on.
    """
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    labels = normalizers.Replace(Regex(r"Frame\d+: "), "")
    between = normalizers.Replace(f"{VIDEO_END}\n{VIDEO_START}", "")
    tokenizer.normalizer = normalizers.Sequence([labels, between, *own])
    # `normalized`: matched after normalizing. Otherwise the text is split at them first, into pieces.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        extra_special_tokens={
            "start_image_token": VIDEO_START,
            "end_image_token": VIDEO_END,
            "context_image_token": FRAME,
            "video_token": VIDEO,
        },
        **roles,
    )
