"""Evaluation: benchmarks through lmms-eval, probes of long context, and the paper's table.

Loads nothing. lmms-eval finds the model `longvpo` through `lmms_eval_models`, an entry point of this package, and the
tasks through `--include_path $(longvpo eval --tasks-dir)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def lmms_eval_models() -> ModelManifest:
    """What lmms-eval learns of the model `longvpo`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("longvpo", chat_class_path="longvpo_hf.evaluation.adapter.LongVPO")
