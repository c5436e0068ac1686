"""The hash of a source is read once for all builds that share a cache, and never that of an older content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from longvpo_hf.errors import StorageError
from longvpo_hf.intake import Source, clips_of, examine
from longvpo_hf.intake.cutting import CuttingSettings
from longvpo_hf.intake.examine import content_digest


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were hashed, in order. Files are taken to be old enough, whenever they changed."""
    monkeypatch.setattr(examine, "_SETTLED_NS", -(10**12))
    names: list[str] = []

    def file_digest(path: str) -> str:
        names.append(Path(path).name)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    monkeypatch.setattr(examine, "file_digest", file_digest)
    return names


def in_a_new_process(path: Path, cache: Path) -> str:
    examine._digest.cache_clear()
    return content_digest(path, cache)


def test_a_source_is_hashed_once_by_all_builds_of_a_cache(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
        for _ in range(3):
            expected = hashlib.sha256(name.encode()).hexdigest()
            assert in_a_new_process(tmp_path / name, tmp_path / "cache") == expected
    assert read == ["a", "b"]
    monkeypatch.chdir(tmp_path)
    assert in_a_new_process(Path("a"), tmp_path / "cache") == hashlib.sha256(b"a").hexdigest()
    assert read == ["a", "b"], "a path is the same from whichever folder it is named"
    in_a_new_process(tmp_path / "a", tmp_path / "other cache")
    assert read == ["a", "b", "a"]


def in_place(path: Path) -> None:
    path.write_bytes(b"new")


def by_renaming(path: Path) -> None:
    path.with_name("new").write_bytes(b"new")
    path.with_name("new").replace(path)


def longer(path: Path) -> None:
    path.write_bytes(b"newer")


@pytest.mark.parametrize("change", [in_place, by_renaming, longer])
def test_a_source_that_changed_is_hashed_again(tmp_path: Path, read: list[str], change: Callable[[Path], None]) -> None:
    """Also where the new content has the size and the time of the old one, as copies with their times have."""
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    in_a_new_process(path, tmp_path / "cache")
    change(path)
    os.utime(path, ns=times)
    for _ in range(2):
        assert in_a_new_process(path, tmp_path / "cache") == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(read) == 2


def test_what_may_change_within_a_tick_of_the_clock_is_not_kept(tmp_path: Path, read: list[str]) -> None:
    path, cache = tmp_path / "v.mp4", tmp_path / "cache"
    path.write_bytes(b"old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examine, "_SETTLED_NS", 10 * 10**9)
        in_a_new_process(path, cache)
    assert not cache.exists()
    digest_of = examine.file_digest

    def changed_meanwhile(path: str) -> str:
        found = digest_of(path)
        Path(path).write_bytes(b"new content")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examine, "file_digest", changed_meanwhile)
        in_a_new_process(path, cache)
    assert not cache.exists()
    assert in_a_new_process(path, cache) == hashlib.sha256(b"new content").hexdigest()


def test_a_torn_or_altered_hash_is_read_again(tmp_path: Path, read: list[str]) -> None:
    path, cache = tmp_path / "v.mp4", tmp_path / "cache"
    path.write_bytes(b"content")
    expected = in_a_new_process(path, cache)
    (kept,) = cache.rglob("*.json")
    whole = kept.read_bytes()
    other = hashlib.sha256(b"other").hexdigest().encode()
    broken = [whole[:length] for length in range(0, len(whole), 7)]
    broken += [whole.replace(expected.encode(), other), b"{}", b"[{}, 1]", b"null", json.dumps([[], ""]).encode()]
    for content in broken:
        kept.write_bytes(content)
        assert in_a_new_process(path, cache) == expected
        assert kept.read_bytes() == whole
    assert len(read) == 1 + len(broken)


def test_a_cache_that_cannot_be_written_drops_no_source(tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "v.mp4").write_bytes(b"content")
    (tmp_path / "cache").write_bytes(b"a file")
    examine._digest.cache_clear()
    source = Source(tmp_path / "v.mp4", "v")
    with pytest.raises(StorageError, match="cache"):
        list(clips_of([source], CuttingSettings(), cache=tmp_path / "cache"))
