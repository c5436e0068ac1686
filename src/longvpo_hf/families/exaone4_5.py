"""EXAONE 4.5: a tower like Qwen2.5-VL's, positions on one axis, and layers with a sliding window in its text model."""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.families import qwen2_5_vl

FAMILY = replace(
    qwen2_5_vl.FAMILY,
    model_type="exaone4_5",
    processor="Exaone4_5_Processor",
    position_axes=1,
    fsdp_layers=("Exaone4_5_VisionBlock", "Exaone4DecoderLayer"),  # it names a layer that its models do not have
)
