"""LLaVA-OneVision, and LLaVA-Video where it has been converted to this class."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import tile_settings, tile_shapes, tile_side
from longvpo_hf.families.pieces import by_frames


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    _, side = tile_side(config.vision_config)
    # All patches are projected, then pooled; a newline ends the video.
    shapes = tile_shapes(config.vision_config, tokens=math.ceil(side / 2) ** 2, projected=side**2)
    return replace(shapes, extra=1)


FAMILY = Family(
    model_type="llava_onevision",
    processor="LlavaOnevisionProcessor",
    video_settings=tile_settings,
    frame_shapes=_frame_shapes,
    label_tokens=0,
    connectors=("multi_modal_projector",),
    pieces=by_frames,
    # The class itself names layers that its models do not have, and accelerate refuses those.
    fsdp_layers=("Qwen2DecoderLayer", "SiglipEncoderLayer"),
)
