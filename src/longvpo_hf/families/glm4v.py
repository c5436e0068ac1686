"""GLM-4.1V and GLM-4.6V-Flash: pairs of frames share tokens, with the whole second of their first frame after them."""

from __future__ import annotations

from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import grid_settings, paired_shapes
from longvpo_hf.families.pieces import by_grid, units_of_grid


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    # `intermediate_size` is the merger's.
    return paired_shapes(config, height_px, width_px, mlp=config.vision_config.out_hidden_size)


FAMILY = Family(
    model_type="glm4v",
    processor="Glm4vProcessor",
    video_settings=grid_settings,
    frame_shapes=_frame_shapes,
    label_tokens=4,  # "<|begin_of_image|>…<|end_of_image|>61"
    connectors=("visual.downsample", "visual.merger"),
    pieces=by_grid,
    units=units_of_grid,
    position_axes=3,
    is_sized_by_frames=True,
)
