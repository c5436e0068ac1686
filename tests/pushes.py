"""What builds push, without a Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

#: Options that name where rows go.
WHERE = ("--push-to-hub", "someone/rows", "--private", "--revision", "trial")
#: What `watch_pushes` notes of a build with these options: asked before its work, and pushed after it.
ASKED = ("asked", "someone/rows", True, "trial")


def pushed(folder: Path) -> tuple[Any, ...]:
    """What is noted of the push of a folder."""
    return ("pushed", folder, *ASKED[1:])


def watch_pushes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A list to which each push is added, and each question whether one may push."""
    seen: list[tuple[Any, ...]] = []

    def prepare(repo_id: str, *, private: bool | None = None, revision: str | None = None) -> None:
        seen.append(("asked", repo_id, private, revision))

    def push(folder: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
        assert (folder / "train.parquet").is_file()
        seen.append(("pushed", folder, repo_id, private, revision))
        return "c0ffee"

    monkeypatch.setattr("longvpo_hf.hub.go_offline_if_unreachable", lambda names: None)
    monkeypatch.setattr("longvpo_hf.publishing.dataset.prepare_push", prepare)
    monkeypatch.setattr("longvpo_hf.publishing.dataset.push_dataset", push)
    return seen
