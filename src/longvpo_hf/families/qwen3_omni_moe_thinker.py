"""The thinker of Qwen3-Omni, which reads and answers: a mixture of experts, with the spacing of frames told as a rate.

Its audio tower is loaded and stays unused.
"""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.families import qwen3_vl

FAMILY = replace(
    qwen3_vl.FAMILY,
    model_type="qwen3_omni_moe_thinker",
    processor="Qwen3OmniMoeProcessor",
    label_tokens=0,
    fsdp_layers=("Qwen3OmniMoeVisionBlock", "Qwen3OmniMoeThinkerTextDecoderLayer"),  # it names the talker's too
    takes_frame_rate=True,
)
