"""PerceptionLM: a vision tower of timm, which `pip install timm` brings; no times are written."""

from __future__ import annotations

from typing import Any

from longvpo_hf.families.family import Family, FrameShapes
from longvpo_hf.families.frame_sizes import tile_settings
from longvpo_hf.families.pieces import by_frames, units_of_frames

#: Of timm's `vit_pe_lang_*_patch14_448`, unless `model_args` says otherwise.
_PATCH_PX, _MLP_RATIO = 14, 4.0


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    tower = config.vision_config.model_args
    image_px = tower["img_size"][0]
    side = image_px // tower.get("patch_size", _PATCH_PX)
    patches = side**2 + bool(config.vision_use_cls_token)
    return FrameShapes(
        frames=1,
        pixels=3 * image_px**2,
        patches=patches,
        hidden=tower["embed_dim"],
        mlp=int(tower["embed_dim"] * tower.get("mlp_ratio", _MLP_RATIO)),
        windows=((patches, tower["depth"]),),
        projected=side**2,  # all patches are projected, then pooled
        tokens=(side // config.projector_pooling_ratio) ** 2,
    )


FAMILY = Family(
    model_type="perception_lm",
    processor="PerceptionLMProcessor",
    video_settings=tile_settings,
    frame_shapes=_frame_shapes,
    label_tokens=0,
    connectors=("multi_modal_projector",),
    pieces=by_frames,
    units=units_of_frames,
)
