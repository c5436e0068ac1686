"""SmolVLM2: each frame has its time in words before it."""

from __future__ import annotations

from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import tile_shapes, tile_side
from longvpo_hf.families.pieces import by_frames, units_of_frames


def _video_settings(video_processor: Any) -> dict[str, Any] | None:
    """Frames are scaled to `size`, then to a square tile of `max_image_size`: its own rule, so nothing is set."""
    size = {name for name, value in dict(video_processor.size or {}).items() if value is not None}
    is_square = size == {"longest_edge"} and bool(getattr(video_processor, "max_image_size", None))
    return {} if is_square and not getattr(video_processor, "do_center_crop", None) else None


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    _, side = tile_side(config.vision_config)
    return tile_shapes(config.vision_config, tokens=(side // int(config.scale_factor)) ** 2)


FAMILY = Family(
    model_type="smolvlm",
    processor="SmolVLMProcessor",
    video_settings=_video_settings,
    frame_shapes=_frame_shapes,
    label_tokens=14,  # "Frame from 00:04:<fake_token_around_image><global-img>…<fake_token_around_image>"
    connectors=("connector",),
    pieces=by_frames,
    units=units_of_frames,
)
