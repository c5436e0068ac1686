"""The thinker of Qwen2.5-Omni, which reads and answers: as Qwen2.5-VL, with the spacing of frames told as a rate.

Its audio tower is loaded and stays unused.
"""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.families import qwen2_5_vl

FAMILY = replace(
    qwen2_5_vl.FAMILY,
    model_type="qwen2_5_omni_thinker",
    processor="Qwen2_5OmniProcessor",
    takes_frame_rate=True,
)
