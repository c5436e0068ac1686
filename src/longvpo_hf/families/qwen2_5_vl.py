"""Qwen2.5-VL: pairs of frames share tokens, and most layers of its tower attend within windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import grid_settings, paired_shapes
from longvpo_hf.families.pieces import by_grid, units_of_grid


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    vision, shapes = config.vision_config, paired_shapes(config, height_px, width_px)
    whole = len(vision.fullatt_block_indexes)
    window = min(shapes.patches, (vision.window_size // vision.patch_size) ** 2)
    return replace(shapes, windows=((shapes.patches, whole), (window, vision.depth - whole)))


FAMILY = Family(
    model_type="qwen2_5_vl",
    processor="Qwen2_5_VLProcessor",
    video_settings=grid_settings,
    frame_shapes=_frame_shapes,
    label_tokens=0,
    connectors=("visual.merger",),
    pieces=by_grid,
    units=units_of_grid,
    position_axes=3,
    is_sized_by_frames=True,
)
