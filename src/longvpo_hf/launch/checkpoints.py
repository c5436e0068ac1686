"""The checkpoint that training starts from, and the one that a killed run resumes from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from transformers.utils import find_adapter_config_file
from trl import ModelConfig

from longvpo_hf.artifacts import whole_folder, write_json
from longvpo_hf.errors import ConfigError
from longvpo_hf.publishing.model_card import write_model_card
from longvpo_hf.record import ModelRecord, RecordError, read_record
from longvpo_hf.responders.checkpoint import check_checkpoint, load_checkpoint
from longvpo_hf.training.checkpoints import last_whole_checkpoint, torn
from longvpo_hf.training.config import LongVPOConfig

logger = get_logger(__name__)

_MERGED_FROM = "merged_from.json"


def start_from(model: ModelConfig, training: LongVPOConfig) -> str:
    """The checkpoint that policy and reference start from, as `from_pretrained` takes it.

    A LoRA adapter is merged into its base first, and the whole is written to `<output_dir>-base`: the reference is then
    the adapted model, not the bare base, and an adapter trained on top names a base that is really its own.

    Raises:
        ModelError: If there is no such checkpoint, or it is not whole.
    """
    name = str(model.model_name_or_path)
    if model.model_revision in (None, "main"):
        check_checkpoint(name)
    config_file = find_adapter_config_file(name, revision=model.model_revision)
    if config_file is None:
        return name
    folder = Path(f"{str(training.output_dir).rstrip('/')}-base")
    with PartialState().main_process_first():
        digest = _digest(Path(config_file).parent)
        if not _holds(folder, digest):
            _merge(name, model, folder, digest)
    # What is in the folder has no revision of its own.
    training.model_init_kwargs = {**(training.model_init_kwargs or {}), "revision": "main"}
    return str(folder)


def _digest(folder: Path) -> str:
    """Of an adapter: its settings and weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("adapter_*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _holds(folder: Path, digest: str) -> bool:
    stamp = folder / _MERGED_FROM
    return stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8"))["adapter"] == digest


def _merge(name: str, model: ModelConfig, folder: Path, digest: str) -> None:
    logger.info(f"Merging the adapter {name} into its base model: {folder}")
    # In float32: half precision would round what the adapter adds.
    merged, processor = load_checkpoint(
        name, torch.device("cpu"), revision=model.model_revision, dtype=torch.float32, merged=True
    )
    kept = merged.config.dtype if model.dtype in (None, "auto") else getattr(torch, model.dtype)
    with whole_folder(folder) as part:
        merged.to(kept).save_pretrained(part)
        processor.save_pretrained(part)
        write_json(part / _MERGED_FROM, {"adapter": digest})
        if (record := _record_of(name, model.model_revision)) is not None:
            # The next training's card knows by it whose licence applies, and what was trained on before.
            write_model_card(part, replace(record.merged(), name=folder.name, load_from=f"path/to/{folder.name}"))


def _record_of(name: str, revision: str | None) -> ModelRecord | None:
    try:
        return read_record(name, ModelRecord, revision)
    except RecordError as error:  # of no use to the training itself
        logger.warning(str(error))
        return None


def checkpoint_to_resume(training: LongVPOConfig) -> str | None:
    """The checkpoint that training resumes from; None to start anew.

    `resume_from_checkpoint=true` means the last whole one in `output_dir`, if there is any: a killed run may leave a
    checkpoint that was not written to its end.

    Raises:
        ConfigError: If the checkpoint that is asked for is not whole, or if `output_dir` holds checkpoints and
            `resume_from_checkpoint` does not say what to do with them.
    """
    asked = training.resume_from_checkpoint
    if asked is not None and str(asked).lower() not in ("true", "false"):
        reason = torn(Path(asked))
        if reason is not None:
            raise ConfigError(
                f"resume_from_checkpoint={asked}: {reason}; name a whole checkpoint, or true for the last."
            )
        return str(asked)
    whole = last_whole_checkpoint(training.output_dir)
    if whole is None:
        return None
    if str(asked).lower() != "true":
        raise ConfigError(
            f"{training.output_dir} holds checkpoints of an earlier run: go on with --resume_from_checkpoint true, "
            "name another --output_dir, or delete them."
        )
    return str(whole)
