"""Clips as files of their own: cut once, shared by all rows, cheap to read at random ever after.

Takes clips of any source files; gives the same clips, each now the whole of a short mp4 (H.264, yuv420p, a key frame
per second, bounded height, even sizes), and a `Dropped` for each that cannot be decoded. A file is named by the hash of
its source's content, the span and the encoding, and appears whole or not at all: a run that broke off goes on where it
was, and any number of processes make the same files. Knows nothing of corpora, rows or models.

Times: a file begins at 0, and what it shows at t is what its source shows at `start_seconds` + t, to within half a
frame. Its rate is the source's, constant. A source of variable rate is resampled to its average rate (1 per second at
least): at each instant the file shows what the source showed to within half a frame of that rate, but frames that were
closer together are left out, and longer ones repeated. Rotation is applied, sound and 10-bit depth are lost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import UnreadableVideo, VideoFile
from longvpo_hf.funnel import Dropped
from longvpo_hf.processes import workers
from longvpo_hf.timeline import Clip

#: Part of each name; changes with the way files are made.
_VERSION = 2
_KEY_FRAME_SECONDS = 1.0
_MIN_FPS = 1.0
#: Clips of one source that one task cuts: they share its decoder.
_CLIPS_PER_TASK = 32
#: Folder of files that are being written.
_PARTS = "parts"


@dataclass(frozen=True, slots=True)
class MediaSettings:
    """How clip files are encoded.

    Args:
        max_height: Frames higher than this, in pixels, are scaled down, keeping their aspect.
        crf: x264's quality, 0 (lossless) to 51; x264's own default is 23.
    """

    max_height: int = 480
    crf: int = 23

    def __post_init__(self) -> None:
        if self.max_height < 2:
            raise ConfigError(f"max_height must be ≥ 2 pixels, got {self.max_height}.")
        if not 0 <= self.crf <= 51:
            raise ConfigError(f"crf must be in [0, 51], got {self.crf}.")


def cut_clips(
    clips: Iterable[Clip | Dropped], folder: Path, settings: MediaSettings | None = None, num_workers: int = 0
) -> Iterator[Clip | Dropped]:
    """Cuts clips into files; gives them in order, what was dropped passed through.

    Args:
        clips: Clips of source files; those of one file should follow each other, and are then read in one go.
        folder: Where the files are; those that are there already are not cut again. One run at a time.
        settings: See `MediaSettings`.
        num_workers: Processes that cut; 0 cuts in this one. The files are the same.
    """
    # What a killed run left here is of no use: files are written from their begin.
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    (folder / _PARTS).mkdir(parents=True)
    settings = settings or MediaSettings()
    tasks = _tasks(clips)
    if num_workers < 1:
        for task in tasks:
            yield from _cut(task, folder, settings)
        return
    with workers(num_workers) as pool:
        waiting: deque[Future[list[Clip | Dropped]]] = deque()
        for task in tasks:
            waiting.append(pool.submit(_cut, task, folder, settings))
            if len(waiting) > 2 * num_workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _tasks(clips: Iterable[Clip | Dropped]) -> Iterator[list[Clip | Dropped]]:
    """Runs of clips of one file, of bounded length."""
    for _, run in itertools.groupby(clips, key=lambda clip: clip.path):
        while task := list(itertools.islice(run, _CLIPS_PER_TASK)):
            yield task


def _cut(clips: list[Clip | Dropped], folder: Path, settings: MediaSettings) -> list[Clip | Dropped]:
    """One task: clips of one source file."""
    source = _Source(clips[0].path)
    return [clip if isinstance(clip, Dropped) else source.cut(clip, folder, settings) for clip in clips]


class _Source:
    """A source file, hashed and opened when a clip of it first needs that."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._sha256 = ""
        self._video: VideoFile | None = None

    def cut(self, clip: Clip, folder: Path, settings: MediaSettings) -> Clip | Dropped:
        try:
            path = folder / f"{self._name(clip, settings)}.mp4"
            if not path.is_file():
                self._video = self._video or VideoFile(self._path)
                _write(self._video, clip, path, settings)
        except UnreadableVideo as error:
            span = f"[{clip.start_seconds}, {clip.end_seconds}) s: "
            return Dropped(error.reason, clip.path, clip.source_id, span + error.detail)
        return replace(
            clip,
            path=str(path),
            start_seconds=0.0,
            end_seconds=clip.duration_seconds,
            source_start_seconds=clip.origin.start_seconds,
        )

    def _name(self, clip: Clip, settings: MediaSettings) -> str:
        if not self._sha256:
            try:
                with open(self._path, "rb") as file:
                    self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                raise UnreadableVideo("missing_file", clip, "no such file") from None
        span = [clip.start_seconds, clip.end_seconds]
        facts = json.dumps([_VERSION, self._sha256, span, asdict(settings)], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _write(video: VideoFile, clip: Clip, path: Path, settings: MediaSettings) -> None:
    from torchcodec.encoders import Encoder

    video.check_span(clip)
    size = _even_size(video.size, settings.max_height)
    fps = max(video.rate(clip.start_seconds, clip.end_seconds), _MIN_FPS)
    encoder = Encoder()
    stream = encoder.add_video(
        height=size[0],
        width=size[1],
        frame_rate=fps,
        codec="libx264",
        pixel_format="yuv420p",
        crf=settings.crf,
        # Without frames that lean on later ones, in one thread and without x264's lookahead, with which some files came
        # out otherwise in another process: the same bytes wherever and whenever it is made.
        extra_options={
            "g": max(1, round(fps * _KEY_FRAME_SECONDS)),
            "bf": 0,
            "threads": 1,
            "x264-params": "mbtree=0:rc-lookahead=0",
        },
    )
    part = path.parent / _PARTS / f"{os.getpid()}-{path.name}"
    try:
        with encoder.open_file(part):
            for _, pixels in video.frames(clip.start_seconds, clip.end_seconds, fps, size):
                stream.add_frames(pixels)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _even_size(size: tuple[int, int], max_height: int) -> tuple[int, int]:
    """Height and width as yuv420p needs them: even, no higher than `max_height`, of the aspect of `size`."""
    height, width = size
    scale = min(1.0, max_height / height)
    return max(2, int(height * scale) // 2 * 2), max(2, int(width * scale) // 2 * 2)
