"""An InternVL of random weights at several scales, with its real processor, and rows about timelines made up here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from longvpo_hf.frames import FrameSampler
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import Clip, Timeline

MAX_CLIPS = 16
PAIRS = 4
QUESTION_TOKENS, CHOSEN_TOKENS, REJECTED_TOKENS = 16, 64, 48
SOURCE_FPS = 2
WORDS = [f"word{number}" for number in range(256)]


@dataclass(frozen=True)
class Scale:
    """The shape of an InternVL; its random weights are drawn from the configuration."""

    text: dict[str, Any]
    vision: dict[str, Any]
    frame_px: int
    patch_px: int
    dtype: str

    @property
    def tokens_per_frame(self) -> int:
        """Patches of a frame, four shuffled into one."""
        return (self.frame_px // self.patch_px // 2) ** 2


SCALES = {
    # Attention is narrower than the residual stream: at these widths it would else be nearly all of the work at 16k
    # tokens, while in the 8B model the linear layers are more than half of it.
    "small": Scale(
        text={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "vocab_size": 320,
        },
        vision={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2},
        frame_px=128,
        patch_px=8,
        dtype="float32",
    ),
    # Three layers of linear attention to one of full attention, as in Qwen3.5.
    "hybrid": Scale(
        text={
            "model_type": "qwen3_5_text",
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "vocab_size": 320,
        },
        vision={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2},
        frame_px=128,
        patch_px=8,
        dtype="float32",
    ),
    # The configuration of OpenGVLab/InternVL3-8B-hf.
    "8b": Scale(
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 151674,
        },
        vision={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        frame_px=448,
        patch_px=14,
        dtype="bfloat16",
    ),
}


def write_rows(folder: Path, frames: int, frame_px: int) -> list[dict[str, Any]]:
    """Four preference rows about one timeline of real mp4s, each about a clip of its own, its reference view."""
    from torchcodec.encoders import VideoEncoder

    num_clips = min(MAX_CLIPS, frames)
    seconds = frames // num_clips
    noise = torch.Generator().manual_seed(frames)
    clips = []
    for number in range(num_clips):
        coarse = torch.randint(0, 256, (seconds * SOURCE_FPS, 3, 8, 8), dtype=torch.uint8, generator=noise)
        pixels = torch.nn.functional.interpolate(coarse, size=(frame_px, frame_px))
        path = folder / f"clip{number}.mp4"
        VideoEncoder(pixels, frame_rate=SOURCE_FPS).to_file(str(path), extra_options={"threads": 1})
        clips.append(Clip(str(path), 0.0, float(seconds)))
    rows = []
    for pair in range(PAIRS):
        anchor = pair * num_clips // PAIRS
        question, chosen, rejected = (
            " ".join(WORDS[(pair * 50 + offset + i) % len(WORDS)] for i in range(count - used))
            # The chat template adds the end of the answer.
            for count, used, offset in (
                (QUESTION_TOKENS, 0, 0),
                (CHOSEN_TOKENS, 1, 20),
                (REJECTED_TOKENS, 1, 90),
            )
        )
        preference = VideoPreference(
            Timeline(tuple(clips)), question, chosen, rejected, evidence=(anchor,), reference=(anchor,)
        )
        rows.append(preference.to_row(lambda clip: clip.path))
    return rows


def stock_row(row: dict[str, Any], frames: int, equal_answers: bool) -> dict[str, Any]:
    """The row as TRL takes it: frames as pictures, labelled as InternVL's processor labels those of a video.

    Args:
        equal_answers: Whether the rejected answer is drawn out to the length of the chosen one.
    """
    preference = VideoPreference.from_row(row)
    decoded = FrameSampler(frames, fps=1.0)(preference.timeline)
    content: list[dict[str, str]] = []
    for number in range(1, len(decoded) + 1):
        content += [{"type": "text", "text": f"Frame{number}: "}, {"type": "image"}]
    content.append({"type": "text", "text": "\n" + preference.question})
    more = " ".join(["", *WORDS[: CHOSEN_TOKENS - REJECTED_TOKENS]]) if equal_answers else ""
    return {
        "images": [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in decoded.pixels],
        "prompt": [{"role": "user", "content": content}],
        "chosen": row["chosen"],
        "rejected": [{"role": "assistant", "content": preference.rejected + more}],
    }


def build_processor(scale: Scale) -> ProcessorMixin:
    """A real InternVL processor; its tokenizer has one token per word, and one for all frame labels."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    special = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<video>", *names.values()]
    words = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        extra_special_tokens={**names, "video_token": "<video>"},
    )
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    size = {"height": scale.frame_px, "width": scale.frame_px}
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
        "{% if part['type'] == 'video' %}<video>\n{% elif part['type'] == 'image' %}<IMG_CONTEXT>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        fast,
        InternVLVideoProcessor(size=size),
        image_seq_length=scale.tokens_per_frame,
        chat_template=template,
    )


def build_config(scale: Scale, processor: ProcessorMixin) -> InternVLConfig:
    """The configuration of a model that takes 262,144 tokens."""
    return InternVLConfig(
        vision_config={
            **scale.vision,
            "image_size": [scale.frame_px] * 2,
            "patch_size": [scale.patch_px] * 2,
            "layer_scale_init_value": 0.1,
        },
        text_config={
            "model_type": "qwen2",
            **scale.text,
            "max_position_embeddings": 2**18,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": processor.tokenizer.eos_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        image_token_id=processor.image_token_id,
        image_seq_length=scale.tokens_per_frame,
        tie_word_embeddings=False,
    )


def build_model(scale: Scale, device: str, processor: ProcessorMixin, seed: int) -> InternVLForConditionalGeneration:
    """The model with random weights decided by `seed`, on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        config = build_config(scale, processor)
        return InternVLForConditionalGeneration._from_config(config, dtype=getattr(torch, scale.dtype))
