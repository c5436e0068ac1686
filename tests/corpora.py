"""Corpora as tests write them: files, archives and records, and what a reader makes of them."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longvpo_hf.funnel import Dropped
from longvpo_hf.intake import IntakeLimits, Source, read_corpus


def read(corpus: str, root: Path, limits: IntakeLimits | None = None) -> list[Source | Dropped]:
    """All that the reader of `corpus` gives; what is unpacked goes to `cache` beside `root`."""
    return list(read_corpus(corpus, root, root.parent / "cache", limits))


def sources(found: Iterable[Source | Dropped]) -> list[Source]:
    """What was found, if nothing was dropped."""
    found = list(found)
    assert [item for item in found if isinstance(item, Dropped)] == []
    return [item for item in found if isinstance(item, Source)]


def drops(found: Iterable[Source | Dropped]) -> list[Dropped]:
    """What was dropped."""
    return [item for item in found if isinstance(item, Dropped)]


def contents(found: Iterable[Source | Dropped]) -> list[tuple[str, bytes]]:
    """Caption and bytes of each video that was found."""
    return [(item.caption, item.path.read_bytes()) for item in found if isinstance(item, Source)]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_tar(path: Path, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar of these files; given as pairs, names may be repeated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def llava_record(video: str, caption: str = "a caption", source_id: str = "id") -> dict[str, Any]:
    """A record of LLaVA-Video-178K."""
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": caption}]
    return {"id": source_id, "data_source": "0_30_s", "video": video, "conversations": turns}


def llava_list(path: Path, *records: dict[str, Any]) -> Path:
    """A file of captions of LLaVA-Video-178K."""
    return write(path, json.dumps(list(records)))
