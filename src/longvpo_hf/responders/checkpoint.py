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
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

    from longvpo_hf.responders import LocalResponder

#: How long the Hub is waited for before any work.
_HUB_SECONDS = 10.0
#: Decoded frames kept for the next question about the same clips: 3,000 frames of 448 × 448 are 1.8 GB.
_CACHE_BYTES = 4 * 1024**3


def load_checkpoint(
    name: str,
    device: torch.device | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    merged: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model, in evaluation mode on its device, and processor.

    Args:
        name: Folder or name on the Hub of a model, or of a PEFT adapter, whose base model is loaded with it.
        device: Where the model runs; by default the machine's accelerator, else the CPU.
        revision: Of `name` on the Hub.
        dtype: Of the weights: a torch type, or "auto" for that of the files; by default that of the files too, but
            float32 on a CPU that does not compute in it (`precision.computable`).
        merged: Whether an adapter is merged into its base model.

    Raises:
        ModelError: If there is no such checkpoint, an adapter names no base model, or its kind of model cannot be used.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForImageTextToText
    from transformers.utils.peft_utils import find_adapter_config_file

    from longvpo_hf.families import check_kind
    from longvpo_hf.families.vision import bound_frozen_forward
    from longvpo_hf.precision import computable

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
    check_kind(base, base_revision)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(base, revision=base_revision, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        raise ModelError(f"The model {base} cannot be loaded: {error}") from error
    model = model.to(device)
    if dtype is None:
        model = computable(model)
    if adapted:
        model = PeftModel.from_pretrained(model, name, revision=revision)
        if merged:
            model = model.merge_and_unload()
            model.config.name_or_path = name
    processor = _processor(name, revision, base, base_revision)
    model = model.eval().requires_grad_(False)
    # Frames go through the tower a few at a time: thousands of them at once would not fit long before the text does.
    bound_frozen_forward(model)
    return model, processor


def processor_of(name: str) -> Any:
    """The processor of a model, or its tokenizer where it reads text; that of its base model where an adapter has none.

    Raises:
        ModelError: If there is none.
    """
    base = _base_of(name) or name
    return _processor(name, None, base, None)


def _processor(name: str, revision: str | None, base: str, base_revision: str | None) -> Any:
    from transformers import AutoProcessor, ProcessorMixin

    processor = None
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        if base == name:
            raise ModelError(f"The processor of {name} cannot be loaded: {_first_line(error)}") from error
    if base != name and not isinstance(processor, ProcessorMixin):  # none, or the tokenizer that others save with one
        processor = AutoProcessor.from_pretrained(base, revision=base_revision)
    return processor


def check_checkpoint(name: str) -> bool:
    """Makes sure, in seconds and before any work, that a checkpoint can be loaded; of a folder, that it is whole.

    Nothing large is downloaded: of a name on the Hub it is made sure that it is there and has weights.

    Args:
        name: Folder or name on the Hub of a model, or of a PEFT adapter, whose base model is looked at too.

    Returns:
        Whether the model is shown frames; else it reads text.

    Raises:
        ModelError: If there is no such checkpoint, or a part of it is missing; in one sentence, with what to do.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if not name.strip():
        raise ModelError(f"{name!r} is neither a folder nor a name on the Hub (OWNER/NAME).")
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
            raise ModelError(
                f"There is no folder {name}: name a folder with a model, or a model on the Hub (OWNER/NAME)."
            )
        _check_on_hub(name)
    base = _base_of(name)
    # Of an adapter the base comes first: with a kind that cannot be used, no weights need be fetched.
    try:
        sees_frames = base is not None and check_checkpoint(base)
    except ModelError as error:
        where = "" if Path(str(base)).is_absolute() else f" (a folder is looked for in {Path.cwd()})"
        raise ModelError(f"The base model of the adapter {name} is {base}{where}. {error}") from error
    if folder.is_dir():
        _check_folder(folder)
    return sees_frames if base is not None else _kind(name) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _kind(name: str) -> type[PreTrainedConfig]:
    """The class of a checkpoint's config.

    Raises:
        ModelError: If it has none that can be read, or its kind of model cannot be used.
    """
    from longvpo_hf.families import model_config

    try:
        return type(model_config(name))
    except OSError as error:
        raise ModelError(f"The model {name} cannot be loaded: {_first_line(error)}") from error


def _check_folder(folder: Path) -> None:
    """Makes sure that a folder holds a model or an adapter with all its weights."""
    from safetensors import SafetensorError, safe_open

    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        inside = sorted(path.name for path in folder.glob("checkpoint-*"))
        hint = f"; did you mean {folder / inside[-1]}?" if inside else ""
        raise ModelError(f"{folder} holds no model: it has neither config.json nor adapter_config.json{hint}")
    if not (folder / "adapter_config.json").is_file():
        _kind(str(folder))  # of a kind that cannot be used, no weights need be fetched
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    named = set()
    for index in folder.glob("*.index.json"):
        try:
            named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is not whole: copy or save the model again.") from error
    missing = sorted(named - {path.name for path in weights})
    if missing or not weights:
        raise ModelError(f"{folder} lacks weights ({', '.join(missing[:3]) or 'all of them'}): copy or save it again.")
    for path in weights:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="np"):  # looks whether the file is as long as its header says
                    pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not whole ({error}): copy or save the model again.") from error


def _check_on_hub(name: str) -> None:
    """Makes sure that a name on the Hub has a model, in the Hub's cache or there."""
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        _check_folder(Path(snapshot_download(name, local_files_only=True)))
        return
    except (ModelError, LocalEntryNotFoundError, OSError) as error:  # not, or not all of it
        if is_offline_mode():
            raise ModelError(
                f"{name} is neither a folder nor a model in the Hub's cache, and the Hub is not asked (HF_HUB_OFFLINE, "
                "or no network): name a folder, or download the model where there is a network (hf download)."
            ) from error
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a name on the Hub (OWNER/NAME).") from error
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except GatedRepoError as error:
        raise ModelError(
            f"{name} may be used only after its terms were accepted: do so at https://huggingface.co/{name}, and log "
            "in with `hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"There is no folder {name}, and the Hub gives no such model: {_first_line(error)}") from error
    except (httpx2.HTTPError, OSError) as error:
        raise ModelError(
            f"{name} is neither a folder nor a model in the Hub's cache, and the Hub cannot be reached "
            f"({_first_line(error)}): name a folder, or see to the network."
        ) from error


def _base_of(name: str) -> str | None:
    """The base model that an adapter names; None for a model of its own."""
    from peft import PeftConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name) is None:
        return None
    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ModelError(f"The adapter {name} names no base model (base_model_name_or_path in adapter_config.json).")
    return str(base)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
    # A base on the Hub that is not in the cache is told apart by its name alone.
    return f"{weights_digest(folder)} on {checkpoint_digest(base) or base}" if base else weights_digest(folder)
