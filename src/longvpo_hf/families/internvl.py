"""InternVL2.5, InternVL3 and InternVL3.5, as transformers has them (repositories that end in `-hf`)."""

from __future__ import annotations

from typing import Any

from longvpo_hf.families.family import Family, FrameGrid
from longvpo_hf.families.frame_sizes import tile_settings, tile_side
from longvpo_hf.families.pieces import by_frames


def _frame_grid(config: Any, height_px: int, width_px: int) -> FrameGrid:
    image_px, side = tile_side(config.vision_config)
    patches = side**2 + 1  # and the class token
    tokens = int(config.image_seq_length)
    windows = ((patches, config.vision_config.num_hidden_layers),)
    return FrameGrid(
        frames=1, patches=patches, tokens=tokens, projected=tokens, pixels=3 * image_px**2, windows=windows
    )


FAMILY = Family(
    model_type="internvl",
    processor="InternVLProcessor",
    video_settings=tile_settings,
    frame_grid=_frame_grid,
    label_tokens=9,  # "Frame1: <img>…</img>\n"
    connectors=("multi_modal_projector",),
    pieces=by_frames,
)
