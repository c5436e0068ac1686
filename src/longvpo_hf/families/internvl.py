"""InternVL2.5, InternVL3 and InternVL3.5, as transformers has them (repositories that end in `-hf`)."""

from __future__ import annotations

from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import tile_settings, tile_shapes
from longvpo_hf.families.pieces import by_frames, units_of_frames


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    return tile_shapes(config.vision_config, tokens=int(config.image_seq_length), class_tokens=1)


FAMILY = Family(
    model_type="internvl",
    processor="InternVLProcessor",
    video_settings=tile_settings,
    frame_shapes=_frame_shapes,
    label_tokens=9,  # "Frame1: <img>…</img>\n"
    connectors=("multi_modal_projector",),
    pieces=by_frames,
    units=units_of_frames,
)
