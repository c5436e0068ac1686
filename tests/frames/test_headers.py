"""Containers are told by their first bytes, and headers that a stranger wrote are read within bounds."""

from __future__ import annotations

import io
import random
import time
from pathlib import Path

import pytest

from longvpo_hf.frames.headers import CONTAINERS, container_of, described, read_header
from media import write_video

MADE = {
    "v.mp4": "mp4",
    "v.mov": "mp4",
    "v.3gp": "mp4",
    "v.mkv": "matroska",
    "v.webm": "matroska",
    "v.avi": "avi",
    "v.ts": "mpegts",
    "v.m2ts": "mpegts",
    "v.mpg": "mpeg",
    "v.flv": "flv",
    "v.wmv": "asf",
    "v.ogv": "ogg",
}
CODECS = {"v.webm": "libvpx", "v.wmv": "wmv2", "v.ogv": "libtheora", "v.mpg": "mpeg2video"}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("films")
    made = {}
    for name in MADE:
        options = ["-c:v", CODECS.get(name, "libx264")]
        options += ["-mpegts_m2ts_mode", "1"] if name == "v.m2ts" else []
        options += ["-f", "mpegts"] if name == "v.m2ts" else []
        options += ["-s", "176x144"] if name == "v.3gp" else []
        made[name] = write_video(folder / name, 30, 25, size=(64, 96), options=options).read_bytes()
    return made


def test_each_container_is_known(films: dict[str, bytes]) -> None:
    assert {name: container_of(content[:4096]) for name, content in films.items()} == MADE
    assert set(MADE.values()) == set(CONTAINERS)


def test_a_capture_may_start_within_a_packet(films: dict[str, bytes]) -> None:
    assert container_of(films["v.ts"][77 : 77 + 4096]) == "mpegts"


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"", "an empty file"),
        (bytes(100), "zeros"),
        (b"GIF89a", "a GIF"),
        (b"\xff\xd8\xff\xe0", "a picture"),
        (b"<!DOCTYPE html><html>", r"a web page \(a failed download\?\)"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer: `git lfs pull` gets the file"),
        (b" \r\n#EXTM3U\n", "a playlist or manifest"),
        (b"G" * 4096, None),  # FFmpeg decides; nothing that names another file
        (b"something else", "no video of a known container"),
    ],
)
def test_what_is_no_video_is_described(head: bytes, what: str | None) -> None:
    if what is None:
        assert container_of(head) == "mpegts"
        return
    assert container_of(head) is None
    assert pytest.importorskip("re").match(what, described(head))


def test_sizes_are_read_without_ffmpeg(films: dict[str, bytes]) -> None:
    for name in ("v.mp4", "v.mov", "v.mkv", "v.webm", "v.avi"):
        header = read_header(io.BytesIO(films[name]))
        assert header is not None
        assert header.track(0).size_px == (64, 96), name
        assert header.missing_bytes == 0


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_what_is_cut_off_is_counted(films: dict[str, bytes], name: str) -> None:
    header = read_header(io.BytesIO(films[name][:-500]))
    assert header is not None
    assert header.missing_bytes == 500


@pytest.mark.parametrize("name", MADE)
def test_no_bytes_make_reading_fail_or_last(films: dict[str, bytes], name: str) -> None:
    rng = random.Random(name)
    content = films[name]
    start = time.process_time()
    for _ in range(60):
        spoilt = bytearray(content)
        for _ in range(rng.choice((1, 4, 64))):
            at = rng.randrange(min(len(spoilt), 2000))
            spoilt[at : at + rng.randrange(1, 9)] = rng.choice((rng.randbytes(4), bytes(4), b"\xff" * 8))
        del spoilt[rng.randrange(8, len(spoilt)) :]
        read_header(io.BytesIO(bytes(spoilt)))
    assert time.process_time() - start < 20  # for loops without end; it takes a second


def test_thousands_of_boxes_are_not_all_looked_at() -> None:
    def box(kind: bytes, content: bytes) -> bytes:
        return (8 + len(content)).to_bytes(4, "big") + kind + content

    track = box(b"trak", box(b"free", b"") * 3000)
    content = box(b"ftyp", b"isom") + box(b"moov", track * 3000)

    class Counted(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.reads += 1
            return super().read(size)

    file = Counted(content)
    assert read_header(file) is not None
    assert file.reads < 200_000


def test_a_path_is_not_needed(tmp_path: Path, films: dict[str, bytes]) -> None:
    path = tmp_path / "v"
    path.write_bytes(films["v.mkv"])
    with path.open("rb") as file:
        assert read_header(file) == read_header(io.BytesIO(films["v.mkv"]))
