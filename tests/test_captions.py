"""A folder of captions may be a stranger's: the files that it names are those of its build, or it is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longvpo_hf.captions import (
    FORMAT,
    CaptionedVideo,
    read_captions,
    read_captions_as_written,
    write_captions,
)
from longvpo_hf.errors import DatasetError
from longvpo_hf.paths import shared_cache
from longvpo_hf.timeline import Clip, Timeline


def write(folder: Path, *paths: str | Path) -> Path:
    clips = tuple(Clip(str(path), 0.0, 1.0, f"scene {number}") for number, path in enumerate(paths))
    write_captions(folder, [CaptionedVideo(Timeline(clips))], {"format": FORMAT})
    return folder


def named(videos: list[CaptionedVideo]) -> list[str]:
    return [clip.path for video in videos for clip in video.timeline.clips]


def video(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"video")
    return path


def test_files_of_the_build_are_taken(tmp_path: Path) -> None:
    paths = [video(tmp_path / "rows.media" / "clips" / "a.mp4"), video(tmp_path / "rows.scenes" / "b.mp4")]
    paths.append(video(shared_cache() / "clips" / "ab" / "c.mp4"))
    assert named(read_captions(write(tmp_path / "rows.scenes", *paths))) == [str(path) for path in paths]


def test_a_folder_that_is_named_may_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "corpus" / "a.mp4")
    monkeypatch.chdir(tmp_path)
    for name in (path, "a.mp4", Path("corpus/a.mp4")):  # absolute, from the folder, from where the build was started
        folder = write(tmp_path / "rows.scenes", name)
        assert named(read_captions(folder, tmp_path / "corpus")) == [str(path)]
        if name != "a.mp4":
            with pytest.raises(
                DatasetError, match=r"video 0: .* is not in .*; name the folder of its videos, --source"
            ):
                read_captions(folder)


@pytest.mark.parametrize(
    "name",
    ["{}/secret.mp4", "../secret.mp4", "link.mp4", "up/secret.mp4", "/etc/passwd", "{}/corpus/../secret.mp4", "no.mp4"],
)
def test_files_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    secret = video(tmp_path / "secret.mp4")
    for root in (tmp_path / "corpus", tmp_path / "rows.media", tmp_path / "rows.scenes"):
        root.mkdir()
        (root / "link.mp4").symlink_to(secret)
        (root / "up").symlink_to(tmp_path)
    folder = write(tmp_path / "more.scenes", name.format(tmp_path))
    os.rename(folder / "scenes.parquet", tmp_path / "rows.scenes" / "scenes.parquet")
    os.rename(folder / "captions.json", tmp_path / "rows.scenes" / "captions.json")
    with pytest.raises(DatasetError, match=r"scenes\.parquet, video 0: .* is not in"):
        read_captions(tmp_path / "rows.scenes", tmp_path / "corpus")
    assert len(read_captions_as_written(tmp_path / "rows.scenes")) == 1
