"""VideoLLaMA3, which LongVPO's authors also trained: each frame has its time in words before it.

Its processor leaves out tokens that hardly differ from the frame before (`use_token_compression`), at most all but one
of a frame: what a plan counts is then an upper bound.
"""

from __future__ import annotations

from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import grid_settings, rounded_shapes
from longvpo_hf.families.pieces import by_grid

#: Patches along a side of a token: the processor's `merge_size` for videos, which the model's config does not have.
_MERGE = 2


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    vision = config.vision_config
    return rounded_shapes(vision, height_px, width_px, merge=_MERGE, frames=1, layers=vision.num_hidden_layers)


FAMILY = Family(
    model_type="video_llama_3",
    processor="VideoLlama3Processor",
    video_settings=grid_settings,
    frame_shapes=_frame_shapes,
    label_tokens=8,  # "Time 4.5s:" and the comma between frames
    connectors=("projector",),
    pieces=by_grid,
    is_sized_by_frames=True,
)
