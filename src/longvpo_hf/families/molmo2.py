"""Molmo2: each frame has its time in words before it, and all frames of a video attend to one another."""

from __future__ import annotations

import math
from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import tile_settings, tile_shapes, tile_side
from longvpo_hf.families.pieces import by_frames

#: Patches along a side of a token: the processor's `pooling_size` for videos, which the model's config does not have.
_POOLED = 3


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    _, side = tile_side(config.vision_config)
    return tile_shapes(config.vision_config, tokens=math.ceil(side / _POOLED) ** 2)


def _plain_only(config: Any) -> str:
    return (
        "the frames of a Molmo2 prompt attend to one another in both directions (mm_token_type_ids), and the trunk of "
        "a tree attends causally"
    )


def _written(processor: Any, text: str) -> str:
    """Its processor puts a start token before a text that does not start with it."""
    start = processor.tokenizer.bos_token or processor.tokenizer.eos_token
    return text if text.startswith(start) else start + text


FAMILY = Family(
    model_type="molmo2",
    processor="Molmo2Processor",
    video_settings=tile_settings,
    frame_shapes=_frame_shapes,
    label_tokens=7,  # "4.2 <frame_start>…<frame_end> "
    connectors=("multi_modal_projector",),
    pieces=by_frames,
    plain_only=_plain_only,
    written=_written,
    feature_token="<im_patch>",
)
