"""Kinds of models: a file of this package defines one `FAMILY` each, and `family_of` finds it.

Whatever differs between kinds of models is asked of the family; no other room has a list of model types. To add one,
add its file here and a tiny model in `tests/tiny_models.py`; `tests/families_page.py` writes its row of the page.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from longvpo_hf.errors import ModelError
from longvpo_hf.families.family import (
    TEXT_LAYERS,
    Family,
    FrameShapes,
    check_config,
    check_kind,
    context_tokens,
    model_config,
)
from longvpo_hf.families.frame_sizes import known_settings
from longvpo_hf.families.refused import refusal

__all__ = [
    "TEXT_LAYERS",
    "Family",
    "FrameShapes",
    "check_config",
    "check_kind",
    "context_tokens",
    "families",
    "family_of",
    "model_config",
]


@cache
def families() -> tuple[Family, ...]:
    """All families, in the order of their files."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def family_of(source: Any) -> Family:
    """The family of a model.

    Args:
        source: Its config, its processor, or its `model_type`.

    Returns:
        The family. Of a kind of model that has none, one with what is safe for all: frames keep their size where the
        processor's rule is a known one, the vision tower takes all frames at once, adapters are on `TEXT_LAYERS`, and
        `frame_shapes` raises a `ModelError` that names the model type.
    """
    model_type = source if isinstance(source, str) else getattr(source, "model_type", None)
    if isinstance(model_type, str):
        return next((family for family in families() if family.model_type == model_type), _unknown(model_type))
    for ancestor in type(source).__mro__:
        for family in families():
            if family.processor == ancestor.__name__:
                return family
    return _unknown(type(source).__name__)


def _unknown(name: str) -> Family:
    def frame_shapes(config: Any, height_px: int, width_px: int) -> FrameShapes:
        known = ", ".join(family.model_type for family in families())
        raise ModelError(refusal(name) or f"What a frame of a {name!r} costs is not known; known families: {known}.")

    return Family(
        model_type=name,
        processor="",
        video_settings=known_settings,
        frame_shapes=frame_shapes,
        label_tokens=0,
        connectors=(),
        pieces=None,
    )
