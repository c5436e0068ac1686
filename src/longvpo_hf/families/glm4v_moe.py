"""GLM-4.5V and GLM-4.6V: GLM-4.1V with a mixture of experts as text model.

Adapters are on its attention, on the dense layers, and on the expert that all tokens share. The other experts of a
layer are one three-dimensional weight, no linear layers: peft reaches them by `lora_target_parameters`.
"""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.families import glm4v

FAMILY = replace(glm4v.FAMILY, model_type="glm4v_moe")
