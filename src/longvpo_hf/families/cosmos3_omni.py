"""The reasoner of Cosmos3, e.g. Cosmos3-Nano: Qwen3-VL by another name. transformers leaves its generator out."""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.families import qwen3_vl

FAMILY = replace(qwen3_vl.FAMILY, model_type="cosmos3_omni")
