"""Names from data: inside the named folder, or refused."""

from __future__ import annotations

import os
import random
import unicodedata
from pathlib import Path

import pytest

from longvpo_hf.paths import OutsideRoot, leads_out, path_inside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with files, and links that stay in it and leave it."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.mp4").write_bytes(b"a")
    (tmp_path / "secret.mp4").write_bytes(b"s")
    (root / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "up").symlink_to(tmp_path)
    (root / "in.mp4").symlink_to(root / "sub" / "a.mp4")
    return root


@pytest.mark.parametrize(
    "name", ["sub/a.mp4", "./sub/a.mp4", "sub\\a.mp4", "in.mp4", "not/there.mp4", "a:30.mp4", "12:30"]
)
def test_names_inside(root: Path, name: str) -> None:
    assert path_inside(root, name) == root / Path(name.replace("\\", "/"))


OUTSIDE = [
    *("../secret.mp4", "sub/../../secret.mp4", "sub/../sub/a.mp4", "..\\secret.mp4", "sub\\..\\..\\secret.mp4", ".."),
    *(
        "/etc/passwd",
        "\\etc\\passwd",
        "C:\\a.mp4",
        "\\\\server\\share\\a.mp4",
        "out.mp4",
        "up/secret.mp4",
        "up\\secret.mp4",
    ),
    *("", " ", "a\0.mp4", "\ud800.mp4", "\udce9.mp4"),
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out(root: Path, name: str) -> None:
    with pytest.raises(OutsideRoot, match=r"it must name a file inside .*root\."):
        path_inside(root, name)


def test_an_absolute_path_is_taken_only_where_it_may_be(root: Path) -> None:
    inside, outside = root / "sub" / "a.mp4", root.parent / "secret.mp4"
    assert path_inside(root, str(inside), allow_absolute=True) == inside
    for name, allowed in ((inside, False), (outside, True), (root / "out.mp4", True)):
        with pytest.raises(OutsideRoot):
            path_inside(root, str(name), allow_absolute=allowed)


def test_a_relative_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    assert path_inside("root", "sub/a.mp4") == root / "sub" / "a.mp4"


def test_accents_composed_or_not(root: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café.mp4") for form in ("NFC", "NFD"))
    assert composed != decomposed
    (root / decomposed).write_bytes(b"d")
    assert path_inside(root, composed) == root / decomposed
    (root / composed).write_bytes(b"c")  # the name as it is spelled comes first
    assert path_inside(root, composed) == root / composed


def test_a_backslash_in_the_name_of_a_file_that_has_one(root: Path) -> None:
    (root / "sub\\a.mp4").write_bytes(b"odd")
    assert path_inside(root, "sub\\a.mp4").read_bytes() == b"odd"


def test_a_snapshot_of_the_hub_is_inside(tmp_path: Path) -> None:
    repo, other = tmp_path / "datasets--a--b", tmp_path / "datasets--c--d"
    for folder in (repo, other):
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / "01").write_bytes(b"x")
    root = repo / "snapshots" / "4567" / "videos"
    root.mkdir(parents=True)
    (root / "kept.mp4").symlink_to("../../../blobs/01")
    (root / "out.mp4").symlink_to(other / "blobs" / "01")
    assert path_inside(root, "kept.mp4") == root / "kept.mp4"
    with pytest.raises(OutsideRoot):
        path_inside(root, "out.mp4")


def test_a_folder_that_is_only_called_snapshots_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "key").write_bytes(b"x")
    root = tmp_path / "snapshots" / "2026-01-01"
    root.mkdir(parents=True)
    (root / "a.mp4").symlink_to("../../blobs/key")
    with pytest.raises(OutsideRoot):
        path_inside(root, "a.mp4")


@pytest.mark.parametrize("name", ["x" * 100_000, "y/" * 50_000, "../" * 50_000])
def test_long_names_end_in_an_error_of_bounded_length(root: Path, name: str) -> None:
    with pytest.raises(OutsideRoot) as raised:
        path_inside(root, name)
    assert len(str(raised.value)) < 1_000


def test_no_random_name_leads_out(root: Path) -> None:
    """Whatever is put together of the pieces of paths, what comes back lies in the folder."""
    random_ = random.Random(0)
    pieces = [
        "..",
        ".",
        "/",
        "\\",
        "sub",
        "up",
        "out.mp4",
        "a.mp4",
        "C:",
        "~",
        "\0",
        " ",
        "é",
        "\ud800",
        "//",
        "root",
        "secret.mp4",
    ]
    accepted = 0
    for _ in range(3_000):
        name = "".join(random_.choices(pieces, k=random_.randint(1, 7)))
        try:
            path = path_inside(root, name, allow_absolute=random_.random() < 0.5)
        except OutsideRoot:
            continue
        accepted += 1
        assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)), name
    assert accepted > 100


def test_leads_out_needs_no_files() -> None:
    assert [leads_out(name) for name in ("a/b.mp4", "../b.mp4", "/b.mp4", "a\\..\\b.mp4")] == [False, True, True, True]
