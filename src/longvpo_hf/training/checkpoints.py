"""Checkpoints of a run that are whole: sealed with the sizes of their files, and checked before a run resumes."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from longvpo_hf.artifacts import write_json

logger = logging.getLogger(__name__)

#: Sizes of a checkpoint's files in bytes, by name; written last.
SEAL_FILE = "checkpoint_files.json"
_STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d{1,18})")


def seal(folder: Path) -> None:
    """Notes which files a finished checkpoint consists of."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    write_json(folder / SEAL_FILE, {"files": files})


def torn(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it is whole.

    A sealed one has all its files in their sizes. Of one without a seal (an older one, or a run that was killed between
    the two) every file whose form shows its end is looked at: JSON, safetensors, and the archives of `torch.save`.
    """
    if not (folder / _STATE_FILE).is_file():
        return f"it has no {_STATE_FILE}, which is written after the weights"
    try:
        return _broken_seal(folder) if (folder / SEAL_FILE).is_file() else _broken_file(folder)
    except OSError as error:
        return f"it cannot be read ({error})"


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint of the most steps in a run's folder; None if there is none.

    Torn ones are passed over, and named in the log.
    """
    folders = {
        int(match[1]): path for path in Path(output_dir).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    }
    for _, folder in sorted(folders.items(), reverse=True):
        reason = torn(folder)
        if reason is None:
            return folder
        logger.warning(f"{folder} is not whole and is passed over: {reason}.")
    return None


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL_FILE]


def _broken_seal(folder: Path) -> str | None:
    try:
        files = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))["files"]
        sizes = {str(name): int(size) for name, size in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL_FILE} cannot be read"
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            return f"{name} has {'no file' if found is None else f'{found} bytes'} and was written with {size}"
    return None


def _broken_file(folder: Path) -> str | None:
    files = _files(folder)
    for path in files:
        try:
            if path.suffix == ".json":
                _check_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np"):  # checks that the file is as long as its header says
                    pass
            elif path.suffix in (".bin", ".pt", ".pth"):
                with zipfile.ZipFile(path):  # its directory is at the end
                    pass
        except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.relative_to(folder)} is not whole ({error})"
    return None


def _check_json(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name.endswith(".index.json"):
        missing = {name for name in content["weight_map"].values() if not (path.parent / name).is_file()}
        if missing:
            raise ValueError(f"the weights {min(missing)} are missing")
