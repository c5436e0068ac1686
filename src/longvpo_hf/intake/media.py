"""Clips as files of their own: cut once, shared by all rows and all builds, cheap to read at random ever after.

A clip becomes the whole of a short mp4 in one form: H.264, yuv420p, a key frame per second, no frame that leans on a
later one, upright, square pixels, one even size of bounded height, times from 0 at a constant rate. A file is named by
the hash of its source's content, the span and the encoding, and appears whole or not at all: a run that broke off goes
on where it was, and any number of processes and builds make the same files.

What a file shows at t is what its source shows at `start_seconds` + t, to within half a frame. Its rate is that of the
span: every frame of the span is shown; where the rate varies, the longer ones are repeated. Sound and 10-bit depth are
lost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from longvpo_hf.artifacts import PART, whole_file, write_text
from longvpo_hf.errors import ConfigError, check_machine, check_types
from longvpo_hf.frames import Bounds, UnreadableVideo, VideoFile, decoder, is_whole, need_ffmpeg
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.examine import as_examined, content_digest
from longvpo_hf.processes import workers
from longvpo_hf.timeline import Clip

#: Part of each name; changes with the way files are made.
_VERSION = 4
_KEY_FRAME_SECONDS = 1.0
_MIN_FPS = 1.0
#: Of x264. On five real films, beside its default at the same crf: 2.3 to 3.4 times as fast, files of the same size to
#: within 6 %, 0.4 to 0.7 dB less PSNR.
_PRESET = "veryfast"
#: Clips of one source that one task cuts: they share its decoder, and a file that is decoded in order is decoded once.
_CLIPS_PER_TASK = 256
#: After so long nobody is still writing a part of a file.
_STALE_SECONDS = 24 * 3600


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
        check_types(self)
        if self.max_height < 2:
            raise ConfigError(f"max_height must be ≥ 2 pixels, got {self.max_height}.")
        if not 0 <= self.crf <= 51:
            raise ConfigError(f"crf must be in [0, 51], got {self.crf}.")


def cut_clips(
    clips: Iterable[Clip | Dropped],
    cache: Path,
    settings: MediaSettings | None = None,
    num_workers: int = 0,
    bounds: Bounds | None = None,
) -> Iterator[Clip | Dropped]:
    """Cuts clips into files; gives them in order, what was dropped passed through.

    Args:
        clips: Clips of source files; those of one file should follow each other, and are then read in one go.
        cache: Folder for `clips/ab/<name>.mp4` and for what is found out about sources. Any number of builds may share
            it, also at the same time; what is there is not cut again.
        settings: See `MediaSettings`.
        num_workers: Processes that cut; 0 cuts in this one. The files are the same.
        bounds: What a source may ask of this machine.

    Raises:
        VideoError: At once, if FFmpeg is missing.
    """
    need_ffmpeg()
    return _each(_tasks(clips), _Task(cache, settings or MediaSettings(), bounds), num_workers)


def check_clips(
    clips: Iterable[Clip | Dropped], cache: Path, num_workers: int = 0, bounds: Bounds | None = None
) -> Iterator[Clip | Dropped]:
    """Clips that rows will name where they are, unchanged: those of which every frame has been decoded; else a drop.

    Args:
        clips: See `cut_clips`.
        cache: Folder that remembers what was checked, of the content of a file.
        num_workers: Processes that decode; 0 decodes in this one.
        bounds: What a source may ask of this machine.

    Raises:
        VideoError: At once, if FFmpeg is missing.
    """
    need_ffmpeg()
    return _each(_tasks(clips), _Task(cache, None, bounds), num_workers)


def _each(tasks: Iterable[list[Clip | Dropped]], task_of: _Task, num_workers: int) -> Iterator[Clip | Dropped]:
    if num_workers < 1:
        for task in tasks:
            yield from task_of(task)
        return
    with workers(num_workers) as pool:
        waiting: deque[Future[list[Clip | Dropped]]] = deque()
        for task in tasks:
            waiting.append(pool.submit(task_of, task))
            if len(waiting) > 2 * num_workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _tasks(clips: Iterable[Clip | Dropped]) -> Iterator[list[Clip | Dropped]]:
    """Runs of clips of one file, of bounded length."""
    for _, run in itertools.groupby(clips, key=lambda clip: clip.path):
        while task := list(itertools.islice(run, _CLIPS_PER_TASK)):
            yield task


@dataclass(frozen=True, slots=True)
class _Task:
    """Cuts the clips of one source file, or, without settings, checks them; what goes to the worker processes."""

    cache: Path
    settings: MediaSettings | None
    bounds: Bounds | None

    def __call__(self, clips: list[Clip | Dropped]) -> list[Clip | Dropped]:
        video: VideoFile | UnreadableVideo | None = None
        done: list[Clip | Dropped] = []
        for clip in clips:
            if isinstance(clip, Dropped):
                done.append(clip)
                continue
            try:
                content = self._content(clip)
                path = self._path(clip, content)
                if not (is_whole(path) if self.settings else path.exists()):
                    video = video or self._open(clip.path, content)
                    if isinstance(video, UnreadableVideo):
                        raise video
                    if self.settings:
                        _write(video, clip, path, self.settings)
                    else:
                        video.check_frames(clip)
                        write_text(path, "")
                done.append(_as_file(clip, path) if self.settings else clip)
            except UnreadableVideo as error:
                span = f"[{clip.start_seconds}, {clip.end_seconds}) s: "
                done.append(Dropped(error.reason, clip.path, clip.source_id, span + error.detail))
        return done

    def _open(self, path: str, content: str) -> VideoFile | UnreadableVideo:
        try:
            return as_examined(path, content, self.bounds, self.cache)
        except UnreadableVideo as error:  # once for all its clips: finding out may take a decode of the whole file
            return error

    def _content(self, clip: Clip) -> str:
        try:
            return content_digest(clip.path, self.cache)
        except FileNotFoundError:
            raise UnreadableVideo("missing_file", clip, "no such file") from None
        except OSError as error:
            check_machine(error)
            raise UnreadableVideo("unreadable", clip, error.strerror or str(error)) from error

    def _path(self, clip: Clip, content: str) -> Path:
        """The file of a clip; of one that was checked, an empty one that says so."""
        how = asdict(self.settings) if self.settings else ["checked", decoder()]
        span = [clip.start_seconds, clip.end_seconds]
        facts = json.dumps([_VERSION, content, span, how], sort_keys=True)
        name = hashlib.sha256(facts.encode()).hexdigest()[:32]
        if self.settings:
            return self.cache / "clips" / name[:2] / f"{name}.mp4"
        return self.cache / "checked" / name[:2] / name


def _as_file(clip: Clip, path: Path) -> Clip:
    start = clip.origin.start_seconds
    return replace(
        clip, path=str(path), start_seconds=0.0, end_seconds=clip.duration_seconds, source_start_seconds=start
    )


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
        preset=_PRESET,
        # Without frames that lean on later ones, in one thread and without x264's lookahead, with which some files came
        # out otherwise in another process: the same bytes wherever and whenever it is made.
        extra_options={
            "g": max(1, round(fps * _KEY_FRAME_SECONDS)),
            "bf": 0,
            "threads": 1,
            "x264-params": "mbtree=0:rc-lookahead=0",
        },
    )
    for part in path.parent.glob(f"{path.name}.*{PART}"):  # of a killed run
        if time.time() - part.stat().st_mtime > _STALE_SECONDS:
            part.unlink(missing_ok=True)
    with whole_file(path) as file, encoder.open_file_like(file, format="mp4"):
        for _, pixels in video.frames(clip.start_seconds, clip.end_seconds, fps, size):
            stream.add_frames(pixels)


def _even_size(size: tuple[int, int], max_height: int) -> tuple[int, int]:
    """Height and width as yuv420p needs them: even, no higher than `max_height`, of the aspect of `size`."""
    height, width = size
    scale = min(1.0, max_height / height)
    return max(2, int(height * scale) // 2 * 2), max(2, int(width * scale) // 2 * 2)
