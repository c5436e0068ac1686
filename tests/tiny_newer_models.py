"""Tiny models of the families that came after those of `tiny_models.py`, which lists them."""

from __future__ import annotations

from transformers import (
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Exaone4_5_Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.lfm3_vl.configuration_lfm3_vl import Lfm3VlConfig
from transformers.models.lfm3_vl.modeling_lfm3_vl import Lfm3VlForConditionalGeneration
from transformers.models.lfm3_vl.processing_lfm3_vl import Lfm3VlProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor

import tiny_models
from tiny_models import HIDDEN

Parts = tuple[PreTrainedModel, ProcessorMixin]


def molmo2() -> Parts:
    special = ["<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>", "<im_low>"]
    tokenizer = tiny_models._tokenizer(["<|image|>", "<|video|>", "<im_patch>", *special])
    size = {"height": 56, "width": 56}
    processor = Molmo2Processor(
        Molmo2ImageProcessor(size=size),
        Molmo2VideoProcessor(size=size, do_rescale=True, do_normalize=True),  # as released, not by default
        tokenizer,
        chat_template=tiny_models._template("<|video|>", "<|image|>"),
    )
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    text = tiny_models._text_config(tokenizer, head_dim=8, additional_vocab_size=8)
    config = Molmo2Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "image_size": [56, 56],
            **attention,
        },
        adapter_config={
            "vision_feature_layer": [0, 1],
            "hidden_size": 16,
            "intermediate_size": 64,
            "text_hidden_size": HIDDEN,
            **attention,
        },
        text_config=text,
        image_patch_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
        image_start_token_id=tokenizer.convert_tokens_to_ids("<im_start>"),
        low_res_image_start_token_id=tokenizer.convert_tokens_to_ids("<low_res_im_start>"),
        image_end_token_id=tokenizer.convert_tokens_to_ids("<im_end>"),
        frame_start_token_id=tokenizer.convert_tokens_to_ids("<frame_start>"),
        frame_end_token_id=tokenizer.convert_tokens_to_ids("<frame_end>"),
    )
    return Molmo2ForConditionalGeneration(config), processor


def gemma4(bidirectional: str | None = "vision", per_layer: int = 0) -> Parts:
    tokenizer = tiny_models._tokenizer(
        ["<|video|>"],
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
    )
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(patch_size=4),
        tokenizer,
        Gemma4VideoProcessor(patch_size=4, pooling_kernel_size=2),
        chat_template=tiny_models._template("<|video|>", "<|image|>"),
    )
    config = Gemma4Config(
        text_config=tiny_models._text_config(
            tokenizer,
            head_dim=8,
            global_head_dim=8,
            hidden_size_per_layer_input=per_layer,
            vocab_size_per_layer_input=len(tokenizer),
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
            use_bidirectional_attention=bidirectional,
        ),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 512,
        },
        audio_config=None,
        boi_token_id=tokenizer.convert_tokens_to_ids("<|image>"),
        eoi_token_id=tokenizer.convert_tokens_to_ids("<image|>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
        boa_token_id=tokenizer.convert_tokens_to_ids("<|audio>"),
        eoa_token_index=tokenizer.convert_tokens_to_ids("<audio|>"),
        tie_word_embeddings=False,
    )
    return Gemma4ForConditionalGeneration(config), processor


_OF_OMNI = {
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
}
_OMNI_TEMPLATE = tiny_models._template("<|vision_bos|><|VIDEO|><|vision_eos|>", "<|vision_bos|><|IMAGE|><|vision_eos|>")


def qwen2_5_omni_thinker() -> Parts:
    tokenizer = tiny_models._tokenizer([], **_OF_OMNI)
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(size=size),
        Qwen2VLVideoProcessor(size=size),
        WhisperFeatureExtractor(),
        tokenizer,
        chat_template=_OMNI_TEMPLATE,
    )
    config = Qwen2_5OmniThinkerConfig(
        audio_config={
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": HIDDEN,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        text_config=tiny_models._text_config(
            tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        ),
        **{
            f"{name}_token_index": tokenizer.convert_tokens_to_ids(_OF_OMNI[f"{name}_token"])
            for name in ("image", "video", "audio")
        },
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_bos|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_eos|>"),
        audio_start_token_id=tokenizer.convert_tokens_to_ids("<|audio_bos|>"),
        audio_end_token_id=tokenizer.convert_tokens_to_ids("<|audio_eos|>"),
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def qwen3_omni_moe_thinker() -> Parts:
    tokenizer = tiny_models._tokenizer([], **_OF_OMNI)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64 * 16}
    processor = Qwen3OmniMoeProcessor(
        Qwen2VLImageProcessor(size=size, patch_size=16),
        Qwen2VLVideoProcessor(size=size, patch_size=16, cap_pixels_per_frame=False),
        WhisperFeatureExtractor(),
        tokenizer,
        chat_template=_OMNI_TEMPLATE,
    )
    config = Qwen3OmniMoeThinkerConfig(
        audio_config={
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "downsample_hidden_size": 8,
            "output_dim": HIDDEN,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=tiny_models._text_config(
            tokenizer,
            head_dim=8,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            decoder_sparse_step=1,
        ),
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(_OF_OMNI[f"{name}_token"])
            for name in ("image", "video", "audio")
        },
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_bos|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_eos|>"),
        audio_start_token_id=tokenizer.convert_tokens_to_ids("<|audio_bos|>"),
        audio_end_token_id=tokenizer.convert_tokens_to_ids("<|audio_eos|>"),
    )
    return Qwen3OmniMoeThinkerForConditionalGeneration(config), processor


def cosmos3_omni() -> Parts:
    processor, config = tiny_models._qwen3_vl_parts()
    return Cosmos3OmniForConditionalGeneration(Cosmos3OmniConfig(**config)), processor


def exaone4_5() -> Parts:
    tokenizer = tiny_models._qwen_tokenizer()
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = Exaone4_5_Processor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=tiny_models._template(
            "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )
    config = Exaone4_5_Config(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "out_hidden_size": HIDDEN,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        text_config=tiny_models._text_config(
            tokenizer, model_type="exaone4", layer_types=["sliding_attention", "full_attention"], sliding_window=24
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return Exaone4_5_ForConditionalGeneration(config), processor


def llava_next_video() -> Parts:
    tokenizer = tiny_models._tokenizer(["<image>", "<video>"])
    size = {"height": 56, "width": 56}
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(size={"shortest_edge": 56}, crop_size=size),
        LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size=size, image_grid_pinpoints=[[56, 56]]),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=tiny_models._template("<video>\n", "<image>\n"),
    )
    config = LlavaNextVideoConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 56,
            "patch_size": 14,
        },
        text_config=tiny_models._text_config(tokenizer, model_type="llama"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[56, 56]],
    )
    return LlavaNextVideoForConditionalGeneration(config), processor


def lfm3_vl() -> Parts:
    tokenizer = tiny_models._qwen_tokenizer()
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64 * 16}
    processor = Lfm3VlProcessor(
        Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer,
        Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=tiny_models._template("<|video_pad|>", "<|image_pad|>"),
    )
    config = Lfm3VlConfig(
        vision_config={
            "num_hidden_layers": 3,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
        },
        text_config=tiny_models._text_config(
            tokenizer, model_type="lfm3", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]
        ),
        projector_hidden_size=32,
        tie_word_embeddings=False,
        **{
            name: tokenizer.convert_tokens_to_ids(token)
            for name, token in {
                "image_token_id": "<|image_pad|>",
                "video_token_id": "<|video_pad|>",
                "vision_start_token_id": "<|vision_start|>",
                "vision_end_token_id": "<|vision_end|>",
            }.items()
        },
    )
    return Lfm3VlForConditionalGeneration(config), processor


def qwen2_vl() -> Parts:
    tokenizer = tiny_models._qwen_tokenizer()
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=tiny_models._template(
            "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": HIDDEN},
        text_config=tiny_models._text_config(
            tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        ),
        **tiny_models._qwen_ids(tokenizer),
    )
    return Qwen2VLForConditionalGeneration(config), processor


def glm4v_moe() -> Parts:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    return tiny_models._glm(
        Glm4vMoeConfig,
        Glm4vMoeForConditionalGeneration,
        Glm4vProcessor,
        Glm4vImageProcessor,
        Glm4vVideoProcessor,
        model_type="glm4v_moe_text",
        partial_rotary_factor=1.0,
        **experts,
    )
