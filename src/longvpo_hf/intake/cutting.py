"""From a corpus' videos to clips of bounded length.

Takes `Source`s; gives `Clip`s of the source files, and a `Dropped` for each video or scene that yields none. Videos
are cut where their corpus says scenes end; else those that are too long where a detector finds cuts, or into equal
windows. Same sources, same settings: same clips. Nothing is written; `media.py` makes files of the clips. Knows nothing
of models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from longvpo_hf.artifacts import file_digest
from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import UnreadableVideo, VideoFile
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.leakage import BenchmarkVideos
from longvpo_hf.intake.records import Scene, Source
from longvpo_hf.timeline import Clip

#: What the detector is shown. Cuts are found to 1 / 8 s; its own default looks at every frame, at full decoding cost.
_DETECTION_FPS = 8.0
_DETECTION_HEIGHT = 90


@dataclass(frozen=True, slots=True)
class CuttingSettings:
    """How long clips are, and where long videos are cut.

    Args:
        min_clip_seconds: A scene shorter than this is joined to the next, or dropped where it has no neighbour.
        max_clip_seconds: A scene longer than this is split into equal parts. 64 s is 64 frames at 1 per second, the
            most the paper samples of a clip.
        cutting: Where a long video is cut whose corpus names no scenes: `scenes` (PySceneDetect's adaptive detector;
            needs the extra `scenes`) or `windows` (equal parts).
    """

    min_clip_seconds: float = 3.0
    max_clip_seconds: float = 64.0
    cutting: Literal["scenes", "windows"] = "scenes"

    def __post_init__(self) -> None:
        if not 0 < self.min_clip_seconds <= self.max_clip_seconds / 2 < math.inf:
            raise ConfigError(
                "Equal parts of a long scene must not be too short: 0 < min_clip_seconds ≤ max_clip_seconds / 2, got "
                f"min_clip_seconds={self.min_clip_seconds}, max_clip_seconds={self.max_clip_seconds}."
            )
        if self.cutting not in ("scenes", "windows"):
            raise ConfigError(f"cutting must be 'scenes' or 'windows', got {self.cutting!r}.")


def clips_of(
    sources: Iterable[Source | Dropped],
    cutting: CuttingSettings,
    benchmarks: BenchmarkVideos | None = None,
    every_scene: bool = False,
) -> Iterator[Clip | Dropped]:
    """Clips of each source, in order; what is dropped stands where its clips would.

    A source is dropped that is in a benchmark, has the content of one before, cannot be decoded at its begin, middle or
    end, or is a single frame. A caption goes to a clip that shows all it describes, and to no other. Held in memory is
    one source at a time and the hash of each before it.
    """
    seen: set[bytes] = set()
    for source in sources:
        if isinstance(source, Dropped):
            yield source
            continue
        path, source_id = str(source.path), source.source_id
        if benchmarks is not None and (found := benchmarks.match(source)):
            yield Dropped("benchmark_video", path, source_id, found)
            continue
        if not source.path.is_file():
            yield Dropped("missing_file", path, source_id, "no such file")
            continue
        sha256 = source.sha256 or file_digest(source.path)
        if benchmarks is not None and (found := benchmarks.match(source, sha256)):
            yield Dropped("benchmark_video", path, source_id, found)
            continue
        digest = bytes.fromhex(sha256)[:16]
        if digest in seen:
            yield Dropped("duplicate_video", path, source_id, f"sha256 {sha256}")
            continue
        seen.add(digest)
        try:
            video = VideoFile(path)
            video.probe()
            if video.num_frames == 1:
                yield Dropped("single_frame", path, source_id, f"one frame of {video.size[1]}×{video.size[0]}")
                continue
            yield from _clips(source, _scenes(source, video, cutting, every_scene), video, cutting)
        except UnreadableVideo as error:
            yield Dropped(error.reason, path, source_id, error.detail)


def _scenes(source: Source, video: VideoFile, cutting: CuttingSettings, every_scene: bool) -> list[Scene]:
    begin, end = max(video.begin_seconds, 0.0), video.end_seconds
    if source.scenes:
        clamped = (Scene(max(s.start_seconds, begin), min(s.end_seconds, end), s.caption) for s in source.scenes)
        return sorted(clamped, key=lambda scene: (scene.start_seconds, scene.end_seconds))
    if cutting.cutting == "scenes" and (every_scene or end - begin > cutting.max_clip_seconds):
        cuts = _detected_cuts(video, begin, end)
        return [Scene(*span, "" if cuts else source.caption) for span in itertools.pairwise([begin, *cuts, end])]
    return [Scene(begin, end, source.caption)]


def _clips(source: Source, scenes: list[Scene], video: VideoFile, cutting: CuttingSettings) -> Iterator[Clip | Dropped]:
    for scene in scenes:
        if scene.end_seconds <= scene.start_seconds:
            detail = f"a scene from {scene.start_seconds} to {scene.end_seconds} s, cut to the video's bounds"
            yield Dropped("too_short", str(source.path), source.source_id, detail)
    real = [scene for scene in scenes if scene.end_seconds > scene.start_seconds]
    for scene in _joined(real, cutting.min_clip_seconds):
        seconds = scene.end_seconds - scene.start_seconds
        if seconds < cutting.min_clip_seconds:
            detail = f"[{scene.start_seconds}, {scene.end_seconds}) s of {video.end_seconds} s is under "
            yield Dropped("too_short", str(source.path), source.source_id, f"{detail}{cutting.min_clip_seconds} s")
            continue
        parts = math.ceil(seconds / cutting.max_clip_seconds - 1e-9)
        bounds = [scene.start_seconds + seconds * k / parts for k in range(parts)] + [scene.end_seconds]
        for start, end in itertools.pairwise(bounds):
            caption = scene.caption if parts == 1 else ""
            yield Clip(str(source.path), start, end, caption, source.source_id, source.licence)


def _joined(scenes: list[Scene], min_seconds: float) -> list[Scene]:
    """Scenes of which one too short is joined to the next, the last to the one before, where less than `min_seconds`
    lie between them."""
    joined: list[Scene] = []
    for scene in scenes:
        before = joined[-1] if joined else None
        if (
            before is not None
            and before.end_seconds - before.start_seconds < min_seconds
            and abs(scene.start_seconds - before.end_seconds) < min_seconds
        ):
            joined[-1] = _both(before, scene)
        else:
            joined.append(scene)
    if (
        len(joined) > 1
        and joined[-1].end_seconds - joined[-1].start_seconds < min_seconds
        and abs(joined[-1].start_seconds - joined[-2].end_seconds) < min_seconds
    ):
        joined[-2:] = [_both(joined[-2], joined[-1])]
    return joined


def _both(first: Scene, second: Scene) -> Scene:
    # One without a caption leaves the pair without: the other's would describe only a part.
    caption = f"{first.caption} {second.caption}" if first.caption and second.caption else ""
    return Scene(first.start_seconds, max(first.end_seconds, second.end_seconds), caption)


def _detected_cuts(video: VideoFile, begin: float, end: float) -> list[float]:
    """Instants at which a new scene begins, from frames that `frames.py` decodes."""
    try:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Finding scenes needs PySceneDetect: pip install 'longvpo-hf[scenes]', or cut equal windows with "
            "cutting=windows."
        ) from error
    # The adaptive one: at a few frames per second, motion alone changes more than a fixed threshold allows.
    detector = AdaptiveDetector(min_scene_len=1)
    fps = min(_DETECTION_FPS, video.fps)
    height = min(_DETECTION_HEIGHT, video.size[0])
    size = (height, max(1, round(video.size[1] * height / video.size[0])))
    cuts: list[float] = []
    index = 0
    for _, pixels in video.frames(begin, end, fps, size):
        for image in pixels[:, [2, 1, 0]].permute(0, 2, 3, 1).contiguous().numpy():
            found = detector.process_frame(FrameTimecode(index, _DETECTION_FPS), image)
            cuts += [begin + cut.frame_num / fps for cut in found]
            index += 1
    return [cut for cut in cuts if begin < cut < end]
