"""Checkpoints of a run that are whole: sealed with sizes and digests of their files, checked before a run resumes.

A seal is written when all files are on disk. Weights may have a hundred gigabytes, and reading them at every save would
take minutes, so the digest of a file above 64 MiB is that of samples (`artifacts.sampled_digest`): whatever a kill, a
full disk or a power cut leaves is seen for certain, and a bit that flips later in a file of so many with the
probability that it is among those read.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from longvpo_hf.artifacts import sampled_digest, sync, write_json
from longvpo_hf.errors import StorageError

logger = logging.getLogger(__name__)

#: Sizes in bytes and digests of a checkpoint's files, by name; written last.
SEAL_FILE = "checkpoint_files.json"
_STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d{1,18})")


def seal(folder: Path) -> None:
    """Notes which files a finished checkpoint consists of.

    Raises:
        StorageError: If one of them is not whole: on a full disk `torch.save` may lose a file's end and say nothing.
    """
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for path in files.values():
        sync(path)
    reason = _broken_file(folder, [path for path in files.values() if path.suffix != ".json"])
    if reason is not None:
        raise StorageError(f"{folder}: {reason}, though it was just written. See whether the disk is full or broken.")
    sizes = {name: path.stat().st_size for name, path in files.items()}
    write_json(
        folder / SEAL_FILE, {"files": sizes, "sha256": {name: sampled_digest(path) for name, path in files.items()}}
    )


def torn(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it is whole.

    A sealed one has all its files in their sizes, with their digests. Of one without a seal (an older one, or of a run
    that was killed between the two) every file whose form shows its end is looked at: JSON, safetensors, and the
    archives of `torch.save`.
    """
    if not (folder / _STATE_FILE).is_file():
        return f"it has no {_STATE_FILE}, which is written after the weights"
    try:
        return _broken_seal(folder) if (folder / SEAL_FILE).is_file() else _broken_file(folder, _files(folder))
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
        sealed = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        sizes = {str(name): int(size) for name, size in sealed["files"].items()}
        digests = {str(name): str(digest) for name, digest in sealed.get("sha256", {}).items()}  # older seals have none
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL_FILE} cannot be read"
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            return f"{name} has {'no file' if found is None else f'{found} bytes'} and was written with {size}"
        if name in digests and sampled_digest(folder / name) != digests[name]:
            return f"{name} has other bytes than were written"
    return None


def _broken_file(folder: Path, files: list[Path]) -> str | None:
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
