"""Where a model's tokens stand: the positions that its rope gets, and which tokens are visual."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import family_of

#: What `get_rope_index` calls a visual tensor by another name than the processor does.
_OTHER_NAMES = {"video_second_per_grid": "second_per_grids"}


def prompt_positions(model: Any, inputs: Mapping[str, Tensor], visual: Mapping[str, Tensor] | None) -> Tensor:
    """Positions [axes, tokens] of one prompt, as the model's backbone counts them.

    Args:
        model: A transformers model. Families of multimodal rope (`Family.position_axes` = 3: time, height, width) have
            a `get_rope_index`; the others count tokens, on one axis.
        inputs: `input_ids` [1, tokens] and, where the processor returns them, `mm_token_type_ids` [1, tokens].
        visual: The processor's visual tensors of the prompt's video. None: the prompt has no video.

    Raises:
        ValueError: If a prompt of multimodal rope has a video and no `mm_token_type_ids` where the model wants them.
    """
    input_ids = inputs["input_ids"]
    plain = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None:
        return plain
    if visual is None:
        return plain.expand(3, -1)
    wanted = inspect.signature(rope_index).parameters
    if "mm_token_type_ids" in wanted and "mm_token_type_ids" not in inputs:
        raise ValueError(
            f"{type(model).__name__} computes its positions from `mm_token_type_ids`, which the batch lacks: keep what "
            f"the processor returns under that name."
        )
    known = {**visual, **inputs, "attention_mask": torch.ones_like(input_ids)}
    known |= {theirs: known[name] for name, theirs in _OTHER_NAMES.items() if name in known}
    positions, _ = rope_index(**{name: value.to(input_ids.device) for name, value in known.items() if name in wanted})
    return positions[:, 0]


def visual_token_ids(source: Any) -> set[int]:
    """Ids of the placeholders of visual features.

    Args:
        source: A processor, or a model's config.
    """
    feature, tokenizer = family_of(source).feature_token, getattr(source, "tokenizer", None)
    if feature is not None and tokenizer is not None:
        return {tokenizer.convert_tokens_to_ids(feature)}
    ids = (getattr(source, name, None) for name in ("image_token_id", "video_token_id"))
    return {token for token in ids if token is not None}


def check_placeholders(processor: Any, config: Any) -> None:
    """Refuses a processor of another kind of model, whose placeholders the model takes for text: it would see nothing.

    Raises:
        ConfigError: If none of the processor's placeholders is one of the model's.
    """
    theirs, known = visual_token_ids(processor), visual_token_ids(config)
    if family_of(config).feature_token is None and theirs and known and not theirs & known:
        raise ConfigError(
            f"{type(processor).__name__} is not the processor of this model (of type {config.model_type!r}): frames "
            f"would stand at the tokens {sorted(theirs)}, and the model looks for them at {sorted(known)}. Load the "
            "processor of the same checkpoint."
        )
