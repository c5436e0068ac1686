"""From a corpus' videos to clips of bounded length.

Videos are cut where their corpus says scenes end; else where a detector finds that scenes change, or into equal
windows. Same sources, same settings: same clips. No file is written for a clip; `media.py` does that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longvpo_hf.errors import ConfigError, check_machine, check_types
from longvpo_hf.frames import Bounds, UnreadableVideo, VideoFile, need_ffmpeg
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake.examine import DETECTORS, content_digest, examine, scene_changes
from longvpo_hf.intake.leakage import BenchmarkVideos
from longvpo_hf.intake.records import Scene, Source
from longvpo_hf.timeline import Clip

#: A drop names so many scenes, and counts the others.
_NAMED_SCENES = 8


@dataclass(frozen=True, slots=True)
class CuttingSettings:
    """How long clips are, and where videos are cut.

    Args:
        min_clip_seconds: A scene shorter than this is joined to the next, or dropped where it has no neighbour.
        max_clip_seconds: A scene longer than this is split into equal parts. 64 s is 64 frames at 1 per second, the
            most the paper samples of a clip.
        cutting: Where a video is cut whose corpus names no scenes: `scenes` (where PySceneDetect finds that they
            change; needs the extra `scenes`) or `windows` (only where it is too long, into equal parts).
    """

    min_clip_seconds: float = 3.0
    max_clip_seconds: float = 64.0
    cutting: Literal["scenes", "windows"] = "scenes"

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.min_clip_seconds <= self.max_clip_seconds / 2 < math.inf:
            raise ConfigError(
                "Equal parts of a long scene must not be too short: 0 < min_clip_seconds ≤ max_clip_seconds / 2, got "
                f"min_clip_seconds={self.min_clip_seconds}, max_clip_seconds={self.max_clip_seconds}."
            )
        if self.cutting not in ("scenes", "windows"):
            raise ConfigError(f"cutting must be 'scenes' or 'windows', got {self.cutting!r}.")

    def described(self) -> str:
        """What is cut where, for a dataset's card."""
        bounds = f"{self.min_clip_seconds:g} to {self.max_clip_seconds:g} s"
        if self.cutting == "windows":
            return f"windows, {bounds}"
        return (
            f"scenes, {bounds}: those that the corpus names, else those that {DETECTORS} find, which are cuts and "
            "fades through black; slow dissolves are not found"
        )


def clips_of(
    sources: Iterable[Source | Dropped],
    cutting: CuttingSettings,
    benchmarks: BenchmarkVideos | None = None,
    bounds: Bounds | None = None,
    cache: Path | None = None,
) -> Iterator[Clip | Dropped]:
    """Clips of each source, in order; what is dropped stands where its clips would.

    A source is dropped that is in a benchmark, has the content of one before, cannot be decoded at its start and end,
    is a single frame or exceeds a bound. A few frames at its start or end that cannot be decoded are a drop of their
    own; the source is used without them. So is what FFmpeg does not show of a file. A caption goes to a clip that shows
    all it describes, and to no other; captions that go to none are a drop of their own. Held in memory is one source at
    a time and the hash of each before it.

    Args:
        sources: What a reader gives.
        cutting: See `CuttingSettings`.
        benchmarks: Videos that no row may show.
        bounds: What a source may ask of this machine.
        cache: Folder for what is found out about sources, shared by builds; None finds it out each time.

    Raises:
        VideoError: At once, if FFmpeg is missing.
    """
    need_ffmpeg()
    return _each(sources, cutting, benchmarks, bounds, cache)


def _each(
    sources: Iterable[Source | Dropped],
    cutting: CuttingSettings,
    benchmarks: BenchmarkVideos | None,
    bounds: Bounds | None,
    cache: Path | None,
) -> Iterator[Clip | Dropped]:
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
        try:
            sha256 = source.sha256 or content_digest(source.path, cache)
        except OSError as error:
            check_machine(error)
            yield Dropped("unreadable", path, source_id, error.strerror or str(error))
            continue
        if benchmarks is not None and (found := benchmarks.match(source, sha256)):
            yield Dropped("benchmark_video", path, source_id, found)
            continue
        digest = bytes.fromhex(sha256)[:16]
        if digest in seen:
            yield Dropped("duplicate_video", path, source_id, f"sha256 {sha256}")
            continue
        seen.add(digest)
        try:
            video = examine(path, sha256, bounds, cache, find_scenes=_detects(source, cutting))
            if video.num_frames == 1:
                yield Dropped("single_frame", path, source_id, f"one frame of {video.size[1]}×{video.size[0]}")
                continue
            if video.times.num_lost:
                yield Dropped("lost_frames", path, source_id, _lost(video))
            if video.not_shown:
                yield Dropped("not_shown", path, source_id, video.not_shown)
            yield from _clips(source, _scenes(source, video, cutting, sha256, cache), video, cutting)
        except UnreadableVideo as error:
            yield Dropped(error.reason, path, source_id, error.detail)


def _lost(video: VideoFile) -> str:
    times = video.times
    return (
        f"the first {times.first} and the last {len(times.starts_seconds) - times.stop} of its "
        f"{len(times.starts_seconds)} frames cannot be decoded"
    )


def _scenes(source: Source, video: VideoFile, cutting: CuttingSettings, sha256: str, cache: Path | None) -> list[Scene]:
    begin, end = video.begin_seconds, video.end_seconds
    if source.scenes:
        clamped = (Scene(max(s.start_seconds, begin), min(s.end_seconds, end), s.caption) for s in source.scenes)
        return sorted(clamped, key=lambda scene: (scene.start_seconds, scene.end_seconds))
    if _detects(source, cutting):
        cuts = scene_changes(video, sha256, cache)
        return [Scene(*span, "" if cuts else source.caption) for span in itertools.pairwise([begin, *cuts, end])]
    return [Scene(begin, end, source.caption)]


def _detects(source: Source, cutting: CuttingSettings) -> bool:
    """Whether scenes are looked for; of a film that the corpus has cut, the file is a scene."""
    return cutting.cutting == "scenes" and not source.scenes and not source.film


def _clips(source: Source, scenes: list[Scene], video: VideoFile, cutting: CuttingSettings) -> Iterator[Clip | Dropped]:
    for scene in scenes:
        if scene.end_seconds <= scene.start_seconds:
            detail = f"a scene from {scene.start_seconds} to {scene.end_seconds} s, cut to the video's bounds"
            yield Dropped("too_short", str(source.path), source.source_id, detail)
    real = [scene for scene in scenes if scene.end_seconds > scene.start_seconds]
    joined = _joined(real, cutting.min_clip_seconds)
    if len(joined) == 1 and not source.scenes:  # one scene after all
        joined = [Scene(joined[0].start_seconds, joined[0].end_seconds, source.caption)]
    if lost := _lost_captions(source, real, joined, cutting):
        yield Dropped("split_caption", str(source.path), source.source_id, lost)
    for scene in joined:
        seconds = scene.end_seconds - scene.start_seconds
        if seconds < cutting.min_clip_seconds:
            detail = f"[{scene.start_seconds}, {scene.end_seconds}) s of {video.end_seconds} s is under "
            yield Dropped("too_short", str(source.path), source.source_id, f"{detail}{cutting.min_clip_seconds} s")
            continue
        parts = _num_parts(scene, cutting)
        bounds = [scene.start_seconds + seconds * k / parts for k in range(parts)] + [scene.end_seconds]
        for start, end in itertools.pairwise(bounds):
            caption = scene.caption if parts == 1 else ""
            in_film = None if source.film_start_seconds is None else source.film_start_seconds + start
            yield Clip(str(source.path), start, end, caption, source.source_id, source.licence, in_film)


def _num_parts(scene: Scene, cutting: CuttingSettings) -> int:
    return math.ceil((scene.end_seconds - scene.start_seconds) / cutting.max_clip_seconds - 1e-9)


def _lost_captions(source: Source, scenes: list[Scene], joined: list[Scene], cutting: CuttingSettings) -> str:
    """Which captions describe what no clip shows by itself; empty if none does."""
    if source.caption and not source.scenes:
        num_clips = sum(_num_parts(scene, cutting) for scene in joined)
        if num_clips < 2:
            return ""
        remedy = f"; with cutting=windows a video of up to {cutting.max_clip_seconds:g} s stays whole"
        is_short = sum(scene.end_seconds - scene.start_seconds for scene in joined) <= cutting.max_clip_seconds
        return f"a caption of the whole video, of which {num_clips} clips are cut{remedy if is_short else ''}"
    kept = [scene for scene in joined if scene.caption and _num_parts(scene, cutting) == 1]
    lost = [
        scene.start_seconds
        for scene in scenes
        if scene.caption and not any(one.start_seconds <= scene.start_seconds < one.end_seconds for one in kept)
    ]
    if not lost:
        return ""
    return (
        f"{len(lost)} of {sum(bool(scene.caption) for scene in scenes)} captions, of scenes at "
        f"{', '.join(f'{start:.6g}' for start in lost[:_NAMED_SCENES])}{', …' if len(lost) > _NAMED_SCENES else ''} s, "
        "which are cut into several clips or joined to one without a caption"
    )


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
