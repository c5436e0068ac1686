"""Gemma 4: each frame has its time in words before it, and becomes at most 70 tokens, whatever its size."""

from __future__ import annotations

import math
from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.pieces import by_frames

#: Most tokens of a frame: the video processor's `max_soft_tokens`, which the model's config does not have.
_MOST_TOKENS = 70


def _video_settings(video_processor: Any) -> dict[str, Any] | None:
    """Frames are scaled to the most whole tokens that fit, aspect kept: its own rule, so nothing is set."""
    return {} if getattr(video_processor, "max_soft_tokens", None) == _MOST_TOKENS else None


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    vision = config.vision_config
    token_px = vision.patch_size * vision.pooling_kernel_size
    scale = math.sqrt(_MOST_TOKENS * token_px**2 / (height_px * width_px))
    # A side that is shorter than a token becomes one, and the other as long as the aspect, within the bound.
    rows, columns = (math.floor(scale * side / token_px) for side in (height_px, width_px))
    if rows == 0:
        rows, columns = 1, min(width_px // height_px, _MOST_TOKENS)
    if columns == 0:
        rows, columns = min(height_px // width_px, _MOST_TOKENS), 1
    patches = _MOST_TOKENS * vision.pooling_kernel_size**2  # padded up to the bound
    return FrameShapes(
        frames=1,
        pixels=patches * 3 * vision.patch_size**2,
        patches=patches,
        hidden=vision.hidden_size,
        mlp=vision.intermediate_size,
        windows=((patches, vision.num_hidden_layers),),
        projected=rows * columns,
        tokens=rows * columns,
    )


def _plain_only(config: Any) -> str | None:
    text = config.get_text_config()
    if text.use_bidirectional_attention is None:
        return None
    return (
        f"tokens of a Gemma 4 frame attend to one another in both directions "
        f"(use_bidirectional_attention={text.use_bidirectional_attention!r}), and the trunk of a tree attends causally"
    )


FAMILY = Family(
    model_type="gemma4",
    processor="Gemma4Processor",
    video_settings=_video_settings,
    frame_shapes=_frame_shapes,
    label_tokens=9,  # "00:04 <|image>…<image|> ", each digit a token
    connectors=("embed_vision",),
    pieces=by_frames,
    is_sized_by_frames=True,
    # Its layers' own inputs too, which the smaller models have.
    adapter_layers=r".*language_model\..*((q|k|v|o|gate|up|down)_proj|per_layer_(input_gate|projection|model_projection))",
    fsdp_layers=("Gemma4TextDecoderLayer", "Gemma4VisionEncoderLayer"),  # the class names those of its audio tower too
    plain_only=_plain_only,
)
