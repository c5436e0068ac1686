"""LLaVA-OneVision, and LLaVA-Video where it has been converted to this class."""

from __future__ import annotations

import math
from typing import Any

from longvpo_hf.families.family import Family, FrameGrid
from longvpo_hf.families.frame_sizes import tile_settings, tile_side
from longvpo_hf.families.pieces import by_frames


def _frame_grid(config: Any, height_px: int, width_px: int) -> FrameGrid:
    image_px, side = tile_side(config.vision_config)
    return FrameGrid(
        frames=1,
        patches=side**2,
        tokens=math.ceil(side / 2) ** 2,  # all patches are projected, then pooled
        projected=side**2,
        pixels=3 * image_px**2,
        windows=((side**2, config.vision_config.num_hidden_layers),),
        extra=1,  # a newline ends the video
    )


FAMILY = Family(
    model_type="llava_onevision",
    processor="LlavaOnevisionProcessor",
    video_settings=tile_settings,
    frame_grid=_frame_grid,
    label_tokens=0,
    connectors=("multi_modal_projector",),
    pieces=by_frames,
    # The class itself names layers that its models do not have, and accelerate refuses those.
    fsdp_layers=("Qwen2DecoderLayer", "SiglipEncoderLayer"),
)
