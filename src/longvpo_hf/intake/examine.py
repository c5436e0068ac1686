"""Each source is examined once, when it comes in: whether it decodes, when its frames are shown, where its scenes
change.

What is found is kept by the content of the file in a cache that all builds share, so that the next build of a corpus
decodes nothing to know it.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from longvpo_hf.artifacts import Fields, digest, file_digest, write_text
from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import Bounds, FrameTimes, VideoFile, decoder

#: Part of what is kept; changes with what is looked for.
_VERSION = 2
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


def examine(path: str, sha256: str, bounds: Bounds | None = None, cache: Path | None = None) -> VideoFile:
    """A source file, known to decode at its start or end and to be within bounds.

    Args:
        path: The file.
        sha256: Hash of its content.
        bounds: What it may ask of this machine.
        cache: Folder of what was found before; None keeps nothing.

    Raises:
        UnreadableVideo: If it cannot be used; that is not kept, so that the next run looks again.
    """
    kept = _Kept(cache, "times", sha256)
    found = kept.read()
    if found is not None:
        video = _as_found(path, bounds, found)
        video.check_declared()
        return video
    video = VideoFile(path, bounds)
    video.probe()
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
    try:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector, ContentDetector
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Finding scenes needs PySceneDetect: pip install 'longvpo-hf[scenes]', or cut equal windows with "
            "cutting=windows."
        ) from error
    detectors = (ContentDetector(min_scene_len=1), AdaptiveDetector(min_scene_len=1))
    height = min(_DETECTION_HEIGHT_PX, video.size[0])
    size = (height, max(1, round(video.size[1] * height / video.size[0])))
    shown: list[float] = []
    found: set[float] = set()
    for seconds, pixels in video.shown(_MAX_DETECTION_FPS, size):
        shown.append(seconds)
        image = pixels[[2, 1, 0]].permute(1, 2, 0).contiguous().numpy()
        # The detectors count frames; what they are told of the rate decides nothing.
        number = FrameTimecode(len(shown) - 1, _MAX_DETECTION_FPS)
        for detector in detectors:
            found |= {shown[change.frame_num] for change in detector.process_frame(number, image)}
    changes = [video.begin_seconds]
    for change in sorted(found):
        if change - changes[-1] >= _MIN_SCENE_SECONDS:
            changes.append(change)
    return changes[1:]


def content_digest(path: str | Path) -> str:
    """The SHA-256 of a file; computed once per process while the file stays the same."""
    status = os.stat(path)
    return _digest(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _digest(path: str, size: int, changed_ns: int) -> str:
    return file_digest(path)


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
