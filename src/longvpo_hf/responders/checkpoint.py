"""A checkpoint as a responder: a whole model or an adapter, from a folder or the Hub.

An adapter's processor may be in its own folder or in its base model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ModelError
from longvpo_hf.frames import FrameSampler
from longvpo_hf.record import hub_commit, weights_digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from longvpo_hf.responders import LocalResponder

#: Decoded frames kept for the next question about the same clips: 3,000 frames of 448 × 448 are 1.8 GB.
_CACHE_BYTES = 4 * 1024**3


def load_checkpoint(
    name: str,
    device: torch.device | None = None,
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    merged: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model, in evaluation mode on its device, and processor.

    Args:
        name: Folder or name on the Hub of a model, or of a PEFT adapter, whose base model is loaded with it.
        device: Where the model runs; by default the machine's accelerator, else the CPU.
        revision: Of `name` on the Hub.
        dtype: Of the weights: a torch type, or "auto" for that of the files.
        merged: Whether an adapter is merged into its base model.

    Raises:
        ModelError: If there is no such checkpoint, or an adapter names no base model.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
    from transformers.utils.peft_utils import find_adapter_config_file

    from longvpo_hf.families.vision import bound_frozen_forward

    adapted = find_adapter_config_file(name, revision=revision) is not None
    base, base_revision = name, revision
    if adapted:
        config = PeftConfig.from_pretrained(name, revision=revision)
        base, base_revision = config.base_model_name_or_path, config.revision
        if not base:
            raise ModelError(
                f"The adapter {name} names no base model (base_model_name_or_path in adapter_config.json)."
            )
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(base, revision=base_revision, dtype=dtype)
    except OSError as error:
        raise ModelError(f"The model {base} cannot be loaded: {error}") from error
    model = model.to(device)
    if adapted:
        model = PeftModel.from_pretrained(model, name, revision=revision)
        if merged:
            model = model.merge_and_unload()
            model.config.name_or_path = name
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        if not adapted:
            raise ModelError(f"The processor of {name} cannot be loaded: {error}") from error
        processor = None
    if adapted and not isinstance(processor, ProcessorMixin):  # none, or the tokenizer that others save with adapters
        processor = AutoProcessor.from_pretrained(base, revision=base_revision)
    model = model.eval().requires_grad_(False)
    # Frames go through the tower a few at a time: thousands of them at once would not fit long before the text does.
    bound_frozen_forward(model)
    return model, processor


def load_responder(
    name: str,
    num_frames: int,
    max_pixels: int | None,
    batch_size: int,
    max_new_tokens: int | None = None,
    decoding: Decoding = GREEDY,
) -> LocalResponder:
    """The checkpoint as a responder of probes; see `FrameSampler` and `LocalResponder` for the settings.

    `max_new_tokens=None` is room for an option or a few words (16), and for reasoning where the model may (16,384).
    """
    from longvpo_hf.public import public_name
    from longvpo_hf.responders import LocalResponder
    from longvpo_hf.responders.generating import REASONING_TOKENS, SHORT_TOKENS

    model, processor = load_checkpoint(name)
    sampler = FrameSampler(num_frames, max_pixels=max_pixels, cache_bytes=_CACHE_BYTES)
    responder = LocalResponder(
        model, processor, sampler, max_new_tokens or SHORT_TOKENS, batch_size, public_name(name), decoding
    )
    if max_new_tokens is None and responder.reasons:
        responder.max_new_tokens = REASONING_TOKENS
    return responder


def checkpoint_digest(name: str) -> str:
    """Tells the weights of a checkpoint from others of its name; those of an adapter's base model with them.

    Of a folder it is the digest of its files' content, of a name on the Hub the commit in the Hub's cache, "" if there
    is none.
    """
    folder = Path(name)
    if not folder.is_dir():
        return hub_commit(name)
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") if adapter.is_file() else None
    return f"{weights_digest(folder)} on {checkpoint_digest(base)}" if base else weights_digest(folder)
