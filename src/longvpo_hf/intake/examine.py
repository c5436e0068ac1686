"""Each source is examined once, when it comes in: whether it decodes, when its frames are shown, where its scenes
change.

What is found is kept by the content of the file in a cache that all builds share, so that the next build of a corpus
decodes nothing to know it.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from longvpo_hf.artifacts import Fields, digest, file_digest, write_text
from longvpo_hf.errors import ConfigError, StorageError, storage_error
from longvpo_hf.frames import Bounds, FrameTimes, VideoFile, decoder

if TYPE_CHECKING:
    import torch

#: Part of what is kept; changes with what is looked for.
_VERSION = 3
#: Where a source is cut: where one of two of PySceneDetect's detectors, with its own thresholds, finds that the scene
#: changes, on every frame but at most 30 a second. On 13 real films ContentDetector finds all 14 hard cuts, 5 of 6
#: fades through black and nothing else. AdaptiveDetector finds the same cuts and no fade, but also cuts between scenes
#: that look alike, which the other's fixed threshold misses. On fewer frames, motion looks like cuts. See
#: benchmarks/results/films.md.
DETECTORS = "PySceneDetect's ContentDetector and AdaptiveDetector"
_MAX_DETECTION_FPS = 30.0
_DETECTION_HEIGHT_PX = 90
#: A fade changes several frames in a row, and is one cut.
_MIN_SCENE_SECONDS = 0.5
#: The coarsest clock of a file system in use ticks every 2 s (FAT); the rest is for servers whose clock differs.
_SETTLED_NS = 10 * 10**9


def examine(
    path: str, sha256: str, bounds: Bounds | None = None, cache: Path | None = None, find_scenes: bool = False
) -> VideoFile:
    """A source file, known to decode at its start or end and to be within bounds.

    Args:
        path: The file.
        sha256: Hash of its content.
        bounds: What it may ask of this machine.
        cache: Folder of what was found before; None keeps nothing.
        find_scenes: Whether `scene_changes` is asked next. Of a file that is decoded from start to end to know its
            times, that decode then finds the scenes too.

    Raises:
        UnreadableVideo: If it cannot be used; that is not kept, so that the next run looks again.
        ConfigError: If PySceneDetect is needed and missing.
    """
    kept = _Kept(cache, "times", sha256)
    found = kept.read()
    if found is not None:
        video = _as_found(path, bounds, found)
        video.check_declared()
        return video
    detector = _SceneDetector() if find_scenes and cache is not None else None
    video = VideoFile(path, bounds, watch=detector.watch if detector else None)
    video.probe()
    if detector is not None and detector.num_watched:
        _Kept(cache, "cuts", sha256).write({"seconds": detector.changes(video, video.times.given)})
    times = asdict(video.times)
    if video.times.can_seek:  # a scan, which decodes nothing, finds these again
        del times["starts_seconds"], times["key_frames"], times["given"]
    kept.write(times)
    return video


def as_examined(path: str, sha256: str, bounds: Bounds | None = None, cache: Path | None = None) -> VideoFile:
    """A source file as `examine` found it; as it opens, if that was never asked.

    Raises:
        UnreadableVideo: If it is no video or exceeds a bound.
    """
    found = _Kept(cache, "times", sha256).read()
    return VideoFile(path, bounds) if found is None else _as_found(path, bounds, found)


def _as_found(path: str, bounds: Bounds | None, found: Fields) -> VideoFile:
    if "starts_seconds" in found:
        fields: Fields = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return VideoFile(path, bounds, FrameTimes(**fields))
    video = VideoFile(path, bounds)
    video.times = replace(video.times, first=found["first"], stop=found["stop"])
    return video


def scene_changes(video: VideoFile, sha256: str, cache: Path | None = None) -> list[float]:
    """Instants at which a new scene begins, in source seconds: at cuts and in fades through black, not in dissolves.

    Frames that cannot be decoded are passed over.
    """
    kept = _Kept(cache, "cuts", sha256)
    found = kept.read()
    if found is None:
        found = {"seconds": _changes(video)}
        kept.write(found)
    return list(found["seconds"])


def _changes(video: VideoFile) -> list[float]:
    detector = _SceneDetector()
    for number, pixels in video.shown(_MAX_DETECTION_FPS, _DETECTION_HEIGHT_PX):
        detector.look(number, pixels)
    return detector.changes(video)


class _SceneDetector:
    """Finds where scenes change in frames that it is shown in order.

    Attributes:
        num_watched: How many frames went by, looked at or not.

    Raises:
        ConfigError: If PySceneDetect is missing.
    """

    def __init__(self) -> None:
        try:
            from scenedetect import FrameTimecode
            from scenedetect.detectors import AdaptiveDetector, ContentDetector
        except ModuleNotFoundError as error:
            raise ConfigError(
                "Finding scenes needs PySceneDetect: pip install 'longvpo-hf[scenes]', or cut equal windows with "
                "cutting=windows."
            ) from error
        self._detectors = (ContentDetector(min_scene_len=1), AdaptiveDetector(min_scene_len=1))
        self._timecode = FrameTimecode
        self._looked_at: list[int] = []
        self._found: set[int] = set()
        self._wait_seconds = 0.0
        self.num_watched = 0

    def look(self, number: int, pixels: torch.Tensor) -> None:
        """Looks at a frame, uint8 `[C, H, W]`."""
        self._looked_at.append(number)
        image = pixels[[2, 1, 0]].permute(1, 2, 0).contiguous().numpy()
        # The detectors count frames; what they are told of the rate decides nothing.
        counted = self._timecode(len(self._looked_at) - 1, _MAX_DETECTION_FPS)
        for detector in self._detectors:
            self._found |= {self._looked_at[change.frame_num] for change in detector.process_frame(counted, image)}

    def watch(self, seconds: float, pixels: Callable[[int], torch.Tensor]) -> None:
        """Sees the next frame go by, as `VideoFile` shows it, and looks at it unless one has just been looked at."""
        if self._wait_seconds <= 0:
            self.look(self.num_watched, pixels(_DETECTION_HEIGHT_PX))
            self._wait_seconds = 0.9 / _MAX_DETECTION_FPS  # durations are rounded
        self._wait_seconds -= seconds if seconds > 0 else 1.0
        self.num_watched += 1

    def changes(self, video: VideoFile, numbers: Sequence[int] = ()) -> list[float]:
        """When scenes change, in source seconds.

        Args:
            video: What the frames are of.
            numbers: The number in the file of each that went by; empty if they are the same.
        """
        changes = [video.begin_seconds]
        for number in sorted(self._found):
            seconds = video.times.start(numbers[number] if numbers else number)
            if seconds - changes[-1] >= _MIN_SCENE_SECONDS:
                changes.append(seconds)
        return changes[1:]


def content_digest(path: str | Path, cache: Path | None = None) -> str:
    """The SHA-256 of a file; read once by all builds that share a cache, while the file stays the same.

    A file is the same while its path, inode, size and both times of change are. One that changed less than 10 s before
    it was read is read again by the next process: it may change once more without its times showing it.

    Args:
        path: The file.
        cache: Folder of what was found before; None remembers in this process alone.

    Raises:
        OSError: If the file cannot be read.
        StorageError: If the cache cannot be written.
    """
    return _digest(str(path), _facts(path), cache)


def _facts(path: str | Path) -> tuple[int, ...]:
    """What changes with a file's content."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.lru_cache(maxsize=1024)
def _digest(path: str, facts: tuple[int, ...], cache: Path | None) -> str:
    if cache is None:
        return file_digest(path)
    key = digest(["file", os.path.abspath(path)])
    kept = cache / "hashed" / key[:2] / f"{key}.json"
    try:
        found, seal = json.loads(kept.read_text(encoding="utf-8"))
        if seal == digest(found) and found[:-1] == list(facts):
            return str(found[-1])
    except (OSError, ValueError, TypeError):
        pass
    begun_ns = time.time_ns()
    sha256 = file_digest(path)
    if max(facts[2:]) + _SETTLED_NS < begun_ns and _facts(path) == facts:
        found = [*facts, sha256]
        try:
            write_text(kept, json.dumps([found, digest(found)]))
        except OSError as error:  # which says nothing about the source
            raise storage_error(error) or StorageError(f"{kept}: {error}. Name another --cache.") from error
    return sha256


class _Kept:
    """What was found out about a content, in a file of the cache; any number of builds may read and write it.

    Args:
        cache: The cache; None keeps nothing.
        name: Of what is looked for.
        sha256: Of the content.
    """

    def __init__(self, cache: Path | None, name: str, sha256: str) -> None:
        key = digest([_VERSION, decoder(), sha256])
        self._path = None if cache is None else cache / "examined" / sha256[:2] / f"{name}-{key}.json"

    def read(self) -> Fields | None:
        try:
            return None if self._path is None else json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, found: Fields) -> None:
        if self._path is not None:
            write_text(self._path, json.dumps(found))
