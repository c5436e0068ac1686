"""`longvpo.json`: read from a folder or from the Hub, and written so that nothing of this machine leaves with it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from longvpo_hf.artifacts import write_text
from longvpo_hf.public import is_hub_name
from longvpo_hf.record.codec import from_json, loads, to_json
from longvpo_hf.record.old_cards import dataset_of_card, model_of_card
from longvpo_hf.record.types import FORMAT, DatasetRecord, ModelRecord, RecordError

logger = logging.getLogger(__name__)

RECORD_FILE = "longvpo.json"

_MAX_BYTES = 4 * 1024**2
_PACKAGES = ("longvpo-hf", "trl", "transformers", "torch", "datasets", "peft", "torchcodec")
#: What a transformers model's answers follow from; a checkpoint also holds its optimizer's state.
_MODEL_FILES = {".bin", ".jinja", ".json", ".model", ".safetensors", ".txt"}
#: What is written beside weights about how they came about: it names folders and times.
_ABOUT_TRAINING = {RECORD_FILE, "training_args.bin", "trainer_state.json", "checkpoint_files.json"}
_ADAPTER_FILE = "adapter_config.json"
#: A file's times are no finer than the system's clock ticks.
_SETTLED_NS = 2_000_000_000

Record = TypeVar("Record", DatasetRecord, ModelRecord)

_KINDS: dict[type[Any], str] = {DatasetRecord: "dataset", ModelRecord: "model"}


def write_record(folder: Path, record: DatasetRecord | ModelRecord) -> None:
    """Writes `longvpo.json` into a folder. Paths of this machine lose their folders, tokens are left out."""
    write_text(folder / RECORD_FILE, record_text(record))


def record_text(record: DatasetRecord | ModelRecord) -> str:
    """What `longvpo.json` holds."""
    content: dict[str, Any] = {"format": record.format, "kind": _KINDS[type(record)], **to_json(record)}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_record(name: str | Path, kind: type[Record], revision: str | None = None) -> Record | None:
    """The record of a dataset or model; of one that was made before there were records, what its card says.

    Args:
        name: A folder, or a name on the Hub.
        kind: `DatasetRecord` or `ModelRecord`.
        revision: On the Hub; None for the newest.

    Returns:
        None where there is neither a record nor a card, or the Hub cannot be reached.

    Raises:
        RecordError: If the record is broken, too large, of the other kind, or one of its fields cannot be what it says.
    """
    if (path := _file_of(name, RECORD_FILE, kind, revision)) is not None:
        return _read(path, kind)
    if (path := _file_of(name, "README.md", kind, revision)) is not None and path.stat().st_size <= _MAX_BYTES:
        record: Record | None = _read_card(path, str(name), _KINDS[kind])
        return record
    return None


def installed_versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of packages, as far as they are installed; by default those that decide what rows and weights are."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def weights_digest(folder: Path) -> str:
    """Tells the weights and the processor in a folder from others: 16 hexadecimal digits of its files' content.

    Equal trainings in two folders have equal digests: what is beside the weights about the training does not count,
    nor does the order of names in an adapter's configuration or where its base model lies.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _MODEL_FILES and path.name not in _ABOUT_TRAINING and path.is_file():
            digest.update(path.name.encode() + _content_digest(path))
    return digest.hexdigest()[:16]


def _content_digest(path: Path) -> bytes:
    stat = path.stat()
    changed = max(stat.st_mtime_ns, stat.st_ctime_ns)
    if time.time_ns() - changed < _SETTLED_NS:  # another write may leave the same times
        return _read_digest(path)
    return _known_digest(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _known_digest(path: Path, *_: int) -> bytes:
    """A study's report asks for those of all its models every few seconds, and a model may have many gigabytes."""
    return _read_digest(path)


def _read_digest(path: Path) -> bytes:
    if path.name == _ADAPTER_FILE:
        with suppress(ValueError):
            return hashlib.sha256(_adapter_in_order(path.read_bytes())).digest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _adapter_in_order(content: bytes) -> bytes:
    """An adapter's configuration with its names in order: peft writes sets, in another order in each process.

    Raises:
        ValueError: If it is not JSON.
    """

    def in_order(value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return sorted(value)
        return {name: in_order(item) for name, item in value.items()} if isinstance(value, dict) else value

    config = in_order(json.loads(content))
    if isinstance(config, dict):
        config.pop("base_model_name_or_path", None)
    return json.dumps(config, sort_keys=True).encode()


def hub_commit(name: str, revision: str | None = None) -> str:
    """The commit that a model of this name was loaded at, as the Hub's cache has it; empty where it has none.

    Args:
        name: On the Hub.
        revision: What was asked for: a branch, a tag or a commit.
    """
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        path = try_to_load_from_cache(name, file, revision=revision) if is_hub_name(name) else None
        if isinstance(path, str):
            return Path(path).parent.name
    return ""


def _file_of(name: str | Path, file: str, kind: type[Any], revision: str | None) -> Path | None:
    """A file of a folder or of a repository on the Hub; None if there is none, or the Hub cannot be reached."""
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    if not is_hub_name(str(name)):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(str(name), file, repo_type=_KINDS[kind], revision=revision))
    except (HfHubHTTPError, OSError):  # also: not there, and offline
        return None


def _read(path: Path, kind: type[Record]) -> Record:
    remedy = "Restore it, or delete it to go on without what it says."
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise RecordError(f"it has {size} bytes, and a record at most {_MAX_BYTES}")
        content = loads(path.read_text(encoding="utf-8"))
        found = content.pop("kind", None) if isinstance(content, dict) else None
        if found != _KINDS[kind]:
            raise RecordError(f"its kind must be {_KINDS[kind]!r}, got {ascii(found)[:80]}")
        record: Record = from_json(kind, content)
    except (ValueError, OSError) as error:
        raise RecordError(f"{path} is not a record that can be read: {error}. {remedy}") from error
    if record.format > FORMAT:
        logger.warning(f"{path} has format {record.format}, newer than {FORMAT}: fields not known here are kept.")
    return record


@functools.cache
def _read_card(path: Path, name: str, kind: str) -> Any:
    """What the card of an older checkpoint or dataset says; read and said once."""
    text = path.read_text(encoding="utf-8", errors="replace")
    record = (dataset_of_card if kind == "dataset" else model_of_card)(text, name)
    if record is not None:
        logger.warning(f"{name} has no {RECORD_FILE}: what is known of it was read from its card.")
    return record
