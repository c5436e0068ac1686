"""Tiny offline models with their real processors, built from configs: one of every family.

`build(family)` returns a freshly initialised model (float32, eval mode, seeded) and a real processor with a byte-level
tokenizer and a chat template; nothing is downloaded. Frames are uint8 [T, 3, H, W], as the frame sampler returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3ImageProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import VideoMetadata

HIDDEN = 32
"""Width of every tiny text model: 4 heads of 8 over 2 key-value heads, so that grouped queries are always exercised."""

_TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
    "initializer_range": 0.2,  # large enough that attention matters and a wrong mask shows
}
_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'video' %}VIDEO{% elif part['type'] == 'image' %}IMAGE\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build(family: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A tiny model of `family` (a key of `ALL`) in eval mode, and its processor."""
    torch.manual_seed(0)
    model, processor = ALL[family]()
    return model.eval(), processor


def encode(
    processor: ProcessorMixin, question: str, frames: torch.Tensor | None, fps: float = 1.0
) -> dict[str, torch.Tensor]:
    """The processor's tensors for one user turn, ending in the header of the assistant's.

    Args:
        frames: uint8 [T, 3, H, W], sampled at `fps`; `None` for a turn without video.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    videos: dict[str, Any] = {}
    if frames is not None:
        content.insert(0, {"type": "video"})
        metadata = VideoMetadata(
            total_num_frames=len(frames), fps=fps, duration=len(frames) / fps, frames_indices=list(range(len(frames)))
        )
        videos = {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    encoded = processor(text=[text], return_tensors="pt", **videos)
    return {
        key: torch.as_tensor(value)
        for key, value in encoded.items()
        if key not in ("video_metadata", "num_patches", "rows", "cols")
    }


def _tokenizer(special: Sequence[str], **named: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="right",
        extra_special_tokens=named,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    return fast


def _template(video: str, image: str) -> str:
    return _TEMPLATE.replace("VIDEO", video).replace("IMAGE", image)


def _text_config(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {**_TEXT, **ids, "vocab_size": len(tokenizer), **more}


def _internvl(text_model: str = "qwen2") -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer(
        [],
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    size = {"height": 56, "width": 56}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=_template("<video>\n", "<IMG_CONTEXT>\n"),
    )
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "use_mean_pooling": False,
        },
        text_config=_text_config(tokenizer, model_type=text_model),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config), processor


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _qwen_tokenizer()
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=_template(
            "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": HIDDEN,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        text_config=_text_config(
            tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        ),
        **_qwen_ids(tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    processor, config = _qwen3_vl_parts()
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)), processor


def _qwen3_vl_moe() -> tuple[PreTrainedModel, ProcessorMixin]:
    processor, config = _qwen3_vl_parts()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    config["text_config"] |= experts
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config)), processor


def _qwen3_vl_parts() -> tuple[ProcessorMixin, dict[str, Any]]:
    tokenizer = _qwen_tokenizer()
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64 * 16}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer,
        Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=_template(
            "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )
    config = dict(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=_text_config(
            tokenizer,
            head_dim=8,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        ),
        **_qwen_ids(tokenizer),
    )
    return processor, config


def _qwen3_5() -> tuple[PreTrainedModel, ProcessorMixin]:
    processor, config = _qwen3_5_parts()
    return _remembering(Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config))), processor


def _qwen3_5_moe() -> tuple[PreTrainedModel, ProcessorMixin]:
    processor, config = _qwen3_5_parts()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config["text_config"] |= {**experts, "shared_expert_intermediate_size": 16}
    return _remembering(Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**config))), processor


def _remembering(model: Any) -> Any:
    """The model, with states of linear attention that last for tens of tokens, so that a lost one shows."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.uniform_(0.01, 0.1).log_()
    return model


def _qwen3_5_parts() -> tuple[ProcessorMixin, dict[str, Any]]:
    processor, config = _qwen3_vl_parts()
    del config["vision_config"]["deepstack_visual_indexes"]
    config["text_config"] |= {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    config["text_config"]["rope_parameters"]["partial_rotary_factor"] = 1.0
    config["text_config"]["initializer_range"] = 0.1
    return processor, config


def _llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer(["<image>", "<video>"])
    size = {"height": 56, "width": 56}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[56, 56]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_template("<video>\n", "<image>\n"),
    )
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config=_text_config(tokenizer, model_type="qwen2"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[56, 56]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    # Its processor spells the number of frames with a package that is not ours to install: digits will do.
    processing_smolvlm.num2words = str  # type: ignore[assignment]
    tokenizer = _tokenizer(
        [],
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
        video_token="<video>",
    )
    side = {"longest_edge": 56}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size=side, max_image_size=side),
        tokenizer,
        SmolVLMVideoProcessor(size=side, max_image_size=side),
        image_seq_len=4,
        chat_template=processing_smolvlm.DEFAULT_CHAT_TEMPLATE,  # for a video it takes no other
    )
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 56,
            "patch_size": 14,
        },
        text_config=_text_config(tokenizer, model_type="llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return SmolVLMForConditionalGeneration(config), processor


def _video_llama_3() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer(["<|image_pad|>", "<|video_pad|>"])
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56 * 16}
    processor = VideoLlama3Processor(
        VideoLlama3ImageProcessor(size=size),
        tokenizer,
        VideoLlama3VideoProcessor(size=size),
        chat_template=_template("<|video_pad|>", "<|image_pad|>"),
    )
    config = VideoLlama3Config(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "patch_size": 14,
        },
        text_config=_text_config(tokenizer, model_type="qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return VideoLlama3ForConditionalGeneration(config), processor


def _glm(
    config_class: Any,
    model_class: Any,
    processor_class: Any,
    image_processor: Any,
    video_processor: Any,
    model_type: str = "glm4v_text",
    **more: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    marks = [f"<|{side}_of_{kind}|>" for kind in ("image", "video") for side in ("begin", "end")]
    tokenizer = _tokenizer(["<|image|>", "<|video|>", *marks])
    names = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    tokens = ("<|image|>", "<|video|>", *marks)
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56 * 16}
    processor = processor_class(
        image_processor(size=size),
        tokenizer,
        video_processor(size=size),
        chat_template=_template("<|begin_of_video|><|video|><|end_of_video|>", "<|begin_of_image|><|image|>"),
    )
    config = config_class(
        vision_config={
            "model_type": model_type.replace("text", "vision"),
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": HIDDEN,
            "image_size": 56,
        },
        text_config=_text_config(
            tokenizer,
            model_type=model_type,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            **more,
        ),
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in zip(names, tokens, strict=True)
        },
    )
    return model_class(config), processor


def _glm4v() -> tuple[PreTrainedModel, ProcessorMixin]:
    return _glm(Glm4vConfig, Glm4vForConditionalGeneration, Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor)


def _glm46v() -> tuple[PreTrainedModel, ProcessorMixin]:
    return _glm(
        Glm46VConfig, Glm46VForConditionalGeneration, Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor
    )


def _perception_lm() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = _tokenizer([], image_token="<|image|>", video_token="<|video|>")
    processor = PerceptionLMProcessor(
        PerceptionLMVideoProcessor(size={"height": 56, "width": 56}),
        PerceptionLMImageProcessor(tile_size=56),
        tokenizer,
        patch_size=14,
        chat_template=_template("<|video|>", "<|image|>"),
    )
    tower = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": [56, 56], "ref_feat_shape": [4, 4]}
    released = {"global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1}
    config = PerceptionLMConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_lang_large_patch14_448",
            "do_pooling": False,
            "model_args": {**tower, **released},
        },
        text_config=_text_config(tokenizer, model_type="llama"),
        projector_pooling_ratio=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
    )
    return PerceptionLMForConditionalGeneration(config), processor


Builder = Callable[[], tuple[PreTrainedModel, ProcessorMixin]]


def _newer(name: str) -> Builder:
    """One of `tiny_newer_models.py`, which imports this module."""

    def build_newer() -> tuple[PreTrainedModel, ProcessorMixin]:
        found: tuple[PreTrainedModel, ProcessorMixin] = getattr(import_module("tiny_newer_models"), name)()
        return found

    return build_newer


#: Those whose processors and towers differ most: every room's tests run on them.
FAMILIES: dict[str, Builder] = {
    "internvl": _internvl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_onevision": _llava_onevision,
}
#: All families; `tests/families` and `tests/planning` run on them.
ALL: dict[str, Builder] = {
    **FAMILIES,
    "cosmos3_omni": _newer("cosmos3_omni"),
    "exaone4_5": _newer("exaone4_5"),
    "gemma4": _newer("gemma4"),
    "glm46v": _glm46v,
    "glm4v": _glm4v,
    "glm4v_moe": _newer("glm4v_moe"),
    "lfm3_vl": _newer("lfm3_vl"),
    "llava_next_video": _newer("llava_next_video"),
    "molmo2": _newer("molmo2"),
    "perception_lm": _perception_lm,
    "qwen2_5_omni_thinker": _newer("qwen2_5_omni_thinker"),
    "qwen2_vl": _newer("qwen2_vl"),
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_omni_moe_thinker": _newer("qwen3_omni_moe_thinker"),
    "qwen3_vl_moe": _qwen3_vl_moe,
    "smolvlm": _smolvlm,
    "video_llama_3": _video_llama_3,
}
