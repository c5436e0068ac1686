"""Processors of no known family are tried at the door on two small videos, and refused by name where one is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.minimax_m3_vl.image_processing_minimax_m3_vl import MiniMaxM3VLImageProcessor
from transformers.models.minimax_m3_vl.processing_minimax_m3_vl import MiniMaxM3VLProcessor
from transformers.models.minimax_m3_vl.video_processing_minimax_m3_vl import MiniMaxM3VLVideoProcessor

import tiny_models
from longvpo_hf.errors import ModelError
from longvpo_hf.families.encoding import PromptEncoder

QWEN_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
QWEN_TEMPLATE = tiny_models._template(
    "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
)


def qwen2_vl(video_processor: type[Qwen2VLVideoProcessor] = Qwen2VLVideoProcessor) -> Any:
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=QWEN_SIZE),
        tiny_models._qwen_tokenizer(),
        video_processor(size=QWEN_SIZE, cap_pixels_per_frame=False),
        chat_template=QWEN_TEMPLATE,
    )


def molmo2() -> Any:
    """Puts a start token before every prompt, whatever the template writes."""
    special = ["<|image|>", "<|video|>", "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>"]
    size = {"height": 56, "width": 56}
    return Molmo2Processor(
        Molmo2ImageProcessor(size=size),
        Molmo2VideoProcessor(size=size, pooling_size=[2, 2]),
        tiny_models._tokenizer([*special, "<im_end>", "<frame_end>", "<im_low>"]),
        chat_template=tiny_models._template("<|video|>", "<|image|>"),
    )


def minimax_m3_vl() -> Any:
    """Has a `size` of one tile, and scales frames to bounds of pixels."""
    kind = MiniMaxM3VLProcessor
    special = [kind.IMAGE_TOKEN, kind.VIDEO_TOKEN, kind.VISION_START_TOKEN, kind.VISION_END_TOKEN]
    return kind(
        MiniMaxM3VLImageProcessor(),
        tiny_models._tokenizer(special),
        MiniMaxM3VLVideoProcessor(),
        chat_template=tiny_models._template(kind.VIDEO_TOKEN, kind.IMAGE_TOKEN),
    )


def qwen2_5_omni() -> Any:
    """Takes two frames a second for granted, whatever `VideoMetadata` says."""
    named = {name: f"<|{name}|>" for name in ("vision_bos_token", "vision_eos_token", "audio_bos_token")}
    tokenizer = tiny_models._tokenizer(
        [],
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        audio_token="<|AUDIO|>",
        audio_eos_token="<|audio_eos|>",
        **named,
    )
    return Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(size=QWEN_SIZE),
        Qwen2VLVideoProcessor(size=QWEN_SIZE, cap_pixels_per_frame=False),
        WhisperFeatureExtractor(),
        tokenizer,
        chat_template=tiny_models._template("<|video_pad|>", "<|image_pad|>"),
    )


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (molmo2, r"Molmo2Processor .* makes other tokens of a second prompt"),
        (minimax_m3_vl, r"MiniMaxM3VLProcessor .* reads like one tile, but larger frames became more pixels"),
        (qwen2_5_omni, r"Qwen2_5OmniProcessor .* its video_second_per_grid does not follow the times"),
    ],
)
def test_processors_that_would_be_given_something_else_are_refused_by_name(build: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        PromptEncoder(build())


def test_one_that_shows_no_fault_is_taken() -> None:
    assert PromptEncoder(qwen2_vl())._video_settings["size"]["shortest_edge"] == 28 * 28


def test_a_grid_that_departs_from_the_frames_size_is_refused() -> None:
    class Halving(Qwen2VLVideoProcessor):
        def _preprocess(self, videos: list[torch.Tensor], **kwargs: Any) -> Any:
            return super()._preprocess([video[..., ::2, ::2] for video in videos], **kwargs)

    with pytest.raises(
        ModelError, match=r"frames of \(112, 112\) pixels became \[\[4, 4\]\] patches, expected \[8, 8\]"
    ):
        PromptEncoder(qwen2_vl(Halving))


def test_one_that_fails_is_refused_with_its_error() -> None:
    class Failing(Qwen2VLVideoProcessor):
        def _preprocess(self, videos: list[torch.Tensor], **kwargs: Any) -> Any:
            raise KeyError("grid")

    with pytest.raises(ModelError, match="it ended with KeyError: 'grid'"):
        PromptEncoder(qwen2_vl(Failing))
