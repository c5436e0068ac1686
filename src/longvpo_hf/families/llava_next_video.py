"""LLaVA-NeXT-Video: no times are written, and its own processor would cut frames to their middle square."""

from __future__ import annotations

from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import tile_shapes, tile_side
from longvpo_hf.families.pieces import by_frames, units_of_frames


def _video_settings(video_processor: Any) -> dict[str, Any] | None:
    """The whole frame is scaled to the tile, aspect not kept, instead of losing its sides."""
    tile = {name: value for name, value in dict(video_processor.crop_size or {}).items() if value is not None}
    return {"size": tile, "do_center_crop": False} if set(tile) == {"height", "width"} else None


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    _, side = tile_side(config.vision_config)
    tokens = (side // config.spatial_pool_stride) ** 2
    return tile_shapes(config.vision_config, tokens=tokens, class_tokens=1)


FAMILY = Family(
    model_type="llava_next_video",
    processor="LlavaNextVideoProcessor",
    video_settings=_video_settings,
    frame_shapes=_frame_shapes,
    label_tokens=0,
    connectors=("multi_modal_projector",),
    pieces=by_frames,
    units=units_of_frames,
    fsdp_layers=("LlamaDecoderLayer", "CLIPEncoderLayer"),  # the class names one of CLIP's text model too
)
