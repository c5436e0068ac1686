"""Records of checkpoints and datasets that were made before there were records, as far as their cards say it."""

from __future__ import annotations

import re
from typing import Any

from longvpo_hf.public import public_name
from longvpo_hf.record.types import DatasetRecord, MethodRecord, ModelRecord, Sampling, Source, TrainedOn

#: The line of code in which an older model card states the frames of training.
_SAMPLER = re.compile(r"FrameSampler\(num_frames=(\d{1,9}), fps=(None|[\d.]{1,9}), max_pixels=(None|\d{1,9})\)")
#: Tags of every dataset's card; beside them is the method.
_DATASET_TAGS = {"preference", "dpo", "video"}


def dataset_of_card(text: str, name: str) -> DatasetRecord | None:
    """What a dataset's card says; None if it is not a card of ours.

    Args:
        text: The card.
        name: The dataset's, for where the card has no heading.
    """
    body, data = parsed(text)
    tags = _texts(data.get("tags"))
    if not set(tags) >= _DATASET_TAGS:
        return None
    configs = data.get("configs")
    first = configs[0] if isinstance(configs, list) and configs else {}
    by_reference = isinstance(first, dict) and "metadata_filenames" not in first
    methods = tuple(MethodRecord(tag) for tag in tags if tag not in _DATASET_TAGS)
    return DatasetRecord(_title(body, name), methods, by_reference=by_reference)


def model_of_card(text: str, name: str) -> ModelRecord | None:
    """What a model's card says; None if it is not a card of ours.

    Args:
        text: The card.
        name: What the model is loaded by.
    """
    body, data = parsed(text)
    sampling = _sampling(body)
    if sampling is None and "longvpo" not in _texts(data.get("tags")):
        return None
    return ModelRecord(
        _title(body, name),
        public_name(name),
        next(map(Source.of, _texts(data.get("base_model"))), Source("")),
        sampling,
        tuple(TrainedOn(Source.of(dataset)) for dataset in _texts(data.get("datasets"))),
        licence={key: text for key in ("license", "license_name") for text in _texts(data.get(key))[:1]},
    )


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The text of a card and the fields of its YAML; no fields where it cannot be read."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text, ignore_metadata_errors=True)
        return card.text, card.data.to_dict()
    except Exception:  # a stranger's YAML of any form: the Hub's parser fails in many ways
        return text, {}


def _title(text: str, name: str) -> str:
    return next((line[2:] for line in text.splitlines() if line.startswith("# ")), name)[:200]


def _sampling(text: str) -> Sampling | None:
    match = _SAMPLER.search(text)
    if match is None:
        return None
    num_frames, fps, max_pixels = match.groups()
    try:
        return Sampling(
            int(num_frames), None if fps == "None" else float(fps), None if max_pixels == "None" else int(max_pixels)
        )
    except ValueError:
        return None


def _texts(value: Any) -> list[str]:
    """A field of a card's YAML, which may be a text or a list of texts, or anything else."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and len(text) < 200]
