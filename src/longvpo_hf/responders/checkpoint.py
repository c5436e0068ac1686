"""A checkpoint as a responder: a whole model or an adapter, from a folder or the Hub.

Takes a name; gives model and processor, or a `LocalResponder` with the sampler of training around them. An adapter's
processor may stand in its own folder or in its base model's. Knows nothing of questions.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.frames import FrameSampler

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from longvpo_hf.responders import LocalResponder

#: Decoded frames kept for the next question about the same clips: 3,000 frames of 448 × 448 are 1.8 GB.
_CACHE_BYTES = 4 * 1024**3


def load_checkpoint(name: str, device: torch.device | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model, in evaluation mode on its device, and processor.

    Args:
        name: Folder or name on the Hub of a model, or of a PEFT adapter, whose base model is loaded with it.
        device: Where the model runs; by default the machine's accelerator, else the CPU.

    Raises:
        OSError: If there is no such checkpoint.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
    from transformers.utils.peft_utils import find_adapter_config_file

    from longvpo_hf.families.vision import bound_frozen_forward

    adapted = find_adapter_config_file(name) is not None
    base = PeftConfig.from_pretrained(name).base_model_name_or_path if adapted else name
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype="auto").to(device)
    if adapted:
        model = PeftModel.from_pretrained(model, name)
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError):
        if not adapted:
            raise
        processor = None
    if adapted and not isinstance(processor, ProcessorMixin):  # none, or the tokenizer that others save with adapters
        processor = AutoProcessor.from_pretrained(base)
    model = model.eval().requires_grad_(False)
    # Frames go through the tower a few at a time: thousands of them at once would not fit long before the text does.
    bound_frozen_forward(model)
    return model, processor


def load_responder(
    name: str, num_frames: int, max_pixels: int | None, batch_size: int, max_new_tokens: int
) -> LocalResponder:
    """The checkpoint as a responder; see `FrameSampler` and `LocalResponder` for the settings."""
    from longvpo_hf.public import public_name
    from longvpo_hf.responders import LocalResponder

    model, processor = load_checkpoint(name)
    sampler = FrameSampler(num_frames, max_pixels=max_pixels, cache_bytes=_CACHE_BYTES)
    return LocalResponder(model, processor, sampler, max_new_tokens, batch_size, public_name(name))


def weights_digest(name: str) -> str:
    """Tells the weights of a checkpoint from others of its name; those of an adapter's base model with them.

    Of a folder it is made of the names, sizes and times of its files; of a name on the Hub it is the commit that lies
    in the Hub's cache, "" if none does.
    """
    digest, adapter = _digest_of(name)
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") if adapter.is_file() else None
    return f"{digest} on {_digest_of(base)[0]}" if base else digest


def _digest_of(name: str) -> tuple[str, Path]:
    """What tells the weights of one folder or commit from others, and where its adapter's settings would be."""
    from huggingface_hub import try_to_load_from_cache

    settings = "adapter_config.json"
    folder = Path(name)
    if folder.is_dir():
        files = sorted(folder.glob("*"))
        facts = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files if file.is_file()]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] if facts else "", folder / settings
    for file in ("config.json", settings):
        if isinstance(path := try_to_load_from_cache(name, file), str):
            return Path(path).parent.name, Path(path).with_name(settings)
    return "", folder / settings
