"""LFM3-VL: pairs of frames share tokens, with their time in words before them; many layers are convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import grid_settings, rounded_shapes
from longvpo_hf.families.pieces import by_grid


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    vision = config.vision_config
    layers = len(vision.layer_types)
    shapes = rounded_shapes(
        vision, height_px, width_px, vision.spatial_merge_size, frames=vision.temporal_patch_size, layers=layers
    )
    attending = vision.layer_types.count("full_attention")
    return replace(shapes, windows=((shapes.patches, attending), (vision.conv_kernel_size**2, layers - attending)))


FAMILY = Family(
    model_type="lfm3_vl",
    processor="Lfm3VlProcessor",
    video_settings=grid_settings,
    frame_shapes=_frame_shapes,
    label_tokens=11,  # "<4.5 seconds><|vision_start|>…<|vision_end|>"
    connectors=("multi_modal_projector",),
    pieces=by_grid,
    is_sized_by_frames=True,
    adapter_layers=r".*language_model\..*((q|k|v|o|in|out)_proj|w1|w2|w3)",
)
