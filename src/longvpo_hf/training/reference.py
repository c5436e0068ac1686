"""Precomputed scores of the reference model, kept with the rows, and the fingerprints that say what they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from datasets import Dataset

from longvpo_hf import __version__
from longvpo_hf.preference import VideoPreference
from longvpo_hf.training.collator import SCORE_COLUMNS, VideoPreferenceCollator

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

logger = get_logger(__name__)

#: Column beside `SCORE_COLUMNS`: a hash of everything a row's scores depend on.
FINGERPRINT_COLUMN = "ref_fingerprint"


def reference_fingerprints(
    collator: VideoPreferenceCollator, rows: Sequence[Mapping[str, Any]], model: str
) -> list[str]:
    """A hash, for each row, of everything its reference scores depend on.

    That is its question and answers; name, size in bytes and span of the clips of its reference view; the frame budget
    and whether reasoning is dropped; the processor with its tokenizer and chat template; this package's version.

    Args:
        collator: Chooses the reference view and its frames.
        rows: Preference rows.
        model: Stands for the reference model, and whatever else the scores depend on.
    """
    sampler = collator.reference_sampler
    settings: dict[str, Any] = {
        "frames": [sampler.num_frames, sampler.fps, sampler.max_pixels],
        "processor": _processor_hash(collator.encoder.processor),
        "version": __version__,
        "model": model,
    }
    if collator.encoder.answer_reasoning != "keep":
        settings["answer_reasoning"] = collator.encoder.answer_reasoning
    sizes: dict[str, int] = {}
    hashes = []
    for row in rows:
        preference = VideoPreference.from_row(row)
        clips = collator.reference_view(preference).of(preference.timeline).clips
        for clip in clips:
            if clip.path not in sizes:
                sizes[clip.path] = os.path.getsize(clip.path) if os.path.isfile(clip.path) else -1
        content = {
            **settings,
            "texts": [*preference.context, preference.question, preference.chosen, preference.rejected],
            "clips": [
                [os.path.basename(clip.path), sizes[clip.path], clip.start_seconds, clip.end_seconds] for clip in clips
            ],
        }
        hashes.append(hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24])
    return hashes


def has_scores(dataset: Dataset, fingerprints: Sequence[str], name: str) -> bool:
    """Whether a dataset holds reference scores with these fingerprints; the log says why it does not.

    Args:
        dataset: Rows, perhaps with `SCORE_COLUMNS` and `FINGERPRINT_COLUMN`.
        fingerprints: Those of the run at hand, in row order.
        name: What the log calls the dataset.
    """
    columns = score_columns(dataset)
    if len(columns) <= len(SCORE_COLUMNS):
        if columns:
            logger.warning(f"The {name} dataset's {', '.join(columns)} do not say what they belong to: computed anew.")
        return False
    stale = sum(mine != stored for mine, stored in zip(fingerprints, dataset[FINGERPRINT_COLUMN], strict=True))
    if stale:
        logger.warning(
            f"{stale} of {len(fingerprints)} rows of the {name} dataset hold reference log-probs of other rows, views, "
            "frame budgets, processors or models (ref_fingerprint differs): all are computed anew."
        )
        return False
    logger.info(f"All {len(fingerprints)} rows of the {name} dataset hold reference log-probs of this run's settings.")
    return True


def score_columns(dataset: Dataset) -> list[str]:
    """The columns of reference scores that a dataset has."""
    return [column for column in (*SCORE_COLUMNS, FINGERPRINT_COLUMN) if column in dataset.column_names]


def config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """A model's config without what does not change a score: where it came from and who wrote it."""
    facts = config.to_dict()
    return {name: value for name, value in facts.items() if name not in ("_name_or_path", "transformers_version")}


def _processor_hash(processor: ProcessorMixin) -> str:
    """A hash of everything the processor writes when it is saved: settings, tokenizer, chat template."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
