"""GLM-4.6V: as GLM-4.1V, but each pair of frames has the time of its first one in tenths of a second after it."""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.families import glm4v

FAMILY = replace(
    glm4v.FAMILY,
    model_type="glm46v",
    processor="Glm46VProcessor",
    label_tokens=8,  # "<|begin_of_image|>…<|end_of_image|>61.5 seconds"
)
