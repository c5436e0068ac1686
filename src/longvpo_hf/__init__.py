"""Preference optimisation for long video-language models: LongVPO and temporal preferences on TRL.

Takes no time to import: every public name is loaded from its module when it is first used, so that a script which only
handles timelines never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longvpo_hf.preference import VideoPreference
    from longvpo_hf.timeline import Clip, Timeline, View
    from longvpo_hf.training.collator import VideoPreferenceCollator
    from longvpo_hf.training.config import LongVPOConfig
    from longvpo_hf.training.trainer import LongVPOTrainer

__version__ = "0.1.0"

__all__ = [
    "Clip",
    "LongVPOConfig",
    "LongVPOTrainer",
    "Timeline",
    "VideoPreference",
    "VideoPreferenceCollator",
    "View",
    "__version__",
]

_MODULE_OF = {
    "Clip": "longvpo_hf.timeline",
    "LongVPOConfig": "longvpo_hf.training.config",
    "LongVPOTrainer": "longvpo_hf.training.trainer",
    "Timeline": "longvpo_hf.timeline",
    "VideoPreference": "longvpo_hf.preference",
    "VideoPreferenceCollator": "longvpo_hf.training.collator",
    "View": "longvpo_hf.timeline",
}


if not TYPE_CHECKING:  # a type checker shall still see unknown names as errors

    def __getattr__(name: str) -> object:
        module_name = _MODULE_OF.get(name)
        if module_name is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module_name), name)
        globals()[name] = value  # the next use does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
