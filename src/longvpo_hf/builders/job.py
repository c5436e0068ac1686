"""A run as a job: finished work on disk, so that a killed run goes on where it was.

Takes a folder, what the run's results follow from, and pieces of work; gives each piece's records, worked out once. A
piece is one file that appears whole or not at all, under the hash of all it follows from: a change of settings, clips
or models asks for other files and never meets stale ones. Knows nothing of what the records are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Job:
    """Finished pieces of work under one folder.

    Args:
        folder: Where the pieces lie; made if absent.
        follows_from: All that every piece's result follows from besides its own inputs, e.g. settings and model names;
            JSON.
    """

    def __init__(self, folder: Path, follows_from: Any) -> None:
        self.folder = folder
        self._base = _hash(follows_from)
        #: Pieces that an earlier run had finished.
        self.num_reused = 0
        folder.mkdir(parents=True, exist_ok=True)

    def piece(self, name: str, inputs: Any, work: Callable[[], list[Record]]) -> list[Record]:
        """The records of `work`, done now or in an earlier run.

        Args:
            name: Stands first in the file's name, for whoever looks into the folder.
            inputs: What this piece's result follows from; JSON.
            work: Gives the records; JSON.
        """
        path = self.folder / f"{name}-{_hash([self._base, inputs])}.jsonl"
        if path.exists():
            self.num_reused += 1
            with path.open(encoding="utf-8") as file:
                return [json.loads(line) for line in file]
        records = work()
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        part.replace(path)
        return records


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
