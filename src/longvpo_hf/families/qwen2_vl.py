"""Qwen2-VL: pairs of frames share tokens, as in Qwen2.5-VL, and nothing tells their times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longvpo_hf.families import qwen2_5_vl
from longvpo_hf.families.family import FrameShapes
from longvpo_hf.families.frame_sizes import paired_shapes


def _frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
    width = config.vision_config.embed_dim  # its `hidden_size` is the text model's
    shapes = paired_shapes(config, height_px, width_px, mlp=int(width * config.vision_config.mlp_ratio))
    return replace(shapes, hidden=width)


FAMILY = replace(qwen2_5_vl.FAMILY, model_type="qwen2_vl", processor="Qwen2VLProcessor", frame_shapes=_frame_shapes)
