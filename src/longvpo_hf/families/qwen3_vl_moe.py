"""Qwen3-VL with a mixture of experts as text model, e.g. Qwen3-VL-30B-A3B.

Adapters are on its attention alone: the experts of a layer are one three-dimensional weight, no linear layers. peft
reaches them by `lora_target_parameters`.
"""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.families import qwen3_vl

FAMILY = replace(qwen3_vl.FAMILY, model_type="qwen3_vl_moe")
