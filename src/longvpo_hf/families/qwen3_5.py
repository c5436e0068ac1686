"""Qwen3.5: frames and their times as Qwen3-VL; most layers of its text model are linear attention."""

from __future__ import annotations

from dataclasses import replace

from longvpo_hf.families import qwen3_vl

FAMILY = replace(qwen3_vl.FAMILY, model_type="qwen3_5", connectors=("visual.merger",))
