"""Qwen3.5 with a mixture of experts as text model, e.g. Qwen3.5-35B-A3B.

Adapters are on its attention, linear or not, and on the expert that all tokens share. The experts of a layer are one
three-dimensional weight, no linear layers: peft reaches them by `lora_target_parameters`.
"""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.families import qwen3_5

FAMILY = replace(qwen3_5.FAMILY, model_type="qwen3_5_moe")
