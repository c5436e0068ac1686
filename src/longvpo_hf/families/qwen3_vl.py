"""Qwen3-VL: pairs of frames share tokens, and each pair has its time in words before it."""

from __future__ import annotations

from longvpo_hf.families.family import Family
from longvpo_hf.families.frame_sizes import grid_settings, paired_shapes
from longvpo_hf.families.pieces import by_grid, units_of_grid

FAMILY = Family(
    model_type="qwen3_vl",
    processor="Qwen3VLProcessor",
    video_settings=grid_settings,
    frame_shapes=paired_shapes,
    label_tokens=11,  # "<4.5 seconds><|vision_start|>…<|vision_end|>"
    connectors=("visual.merger", "visual.deepstack_merger_list"),
    pieces=by_grid,
    units=units_of_grid,
    position_axes=3,
    is_sized_by_frames=True,
)
