"""From a corpus to the timelines of a build: clips cut into files, scenes with captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longvpo_hf.building.captioning import CaptioningSettings, caption_videos
from longvpo_hf.captions import CaptionedVideo, read_captions, read_facts
from longvpo_hf.commands.build.options import OutputSettings, SceneSettings, Videos
from longvpo_hf.commands.cli import named_files
from longvpo_hf.errors import ConfigError
from longvpo_hf.funnel import Dropped, Funnel
from longvpo_hf.intake import BenchmarkVideos, Source, clips_of
from longvpo_hf.intake.media import check_clips, cut_clips
from longvpo_hf.intake.report import CorpusSurvey
from longvpo_hf.timeline import Clip, Timeline

if TYPE_CHECKING:
    from longvpo_hf.building.executors import Executor
    from longvpo_hf.responders import Responder


#: A dry run looks at so many videos, and takes the others to be like them: to cut all of a corpus may take days.
_LOOKED_AT = 12


def read_videos(videos: Videos, funnel: Funnel, executor: Executor) -> tuple[list[Timeline], dict[str, object]]:
    """Reads the corpus and cuts its videos: each becomes the timeline of its clips.

    Files that are cut already are not cut again, also where another build of the corpus cut them. A dry run looks at a
    dozen videos, evenly chosen; each then stands for as many of the others, by being there as often.

    Args:
        videos: See `Videos`.
        funnel: Counts the sources and what is dropped.
        executor: Who cuts.

    Returns:
        The timelines, and what the card says of how they came about.

    Raises:
        ConfigError: If no corpus is named, or no clip came out of it.
        CorpusError: If the corpus is not as its reader expects.
        Unfinished: If other shards have videos to cut.
    """
    from tqdm.auto import tqdm

    corpus, cutting, output = videos.corpus, videos.cutting, videos.output
    if corpus.corpus is None or corpus.source is None:
        raise ConfigError("--corpus and --source are needed: which corpus, and its folder.")
    name, source = corpus.corpus, corpus.source
    lists = named_files("benchmark-videos", corpus.benchmark_videos)
    benchmarks = BenchmarkVideos.from_files(lists) if lists else None
    origins: list[str] = []
    survey = CorpusSurvey(name, source, output.media_folder / "extracted", videos.limits, benchmarks)
    every = max(1, -(-survey.report.num_films // _LOOKED_AT)) if output.dry_run else 1
    if output.dry_run:
        print("\n".join(survey.report.lines()))
    if every > 1:
        print(f"looked at         one of {every} videos; the others are taken to be like it")
    if not executor.is_here and not output.dry_run:
        from longvpo_hf.commands.build.sharing import cut_by

        cut_by(executor, videos, survey)

    def sources() -> Iterator[Source | Dropped]:
        film, number = "", -1
        for item in survey:
            if isinstance(item, Source):
                number += not item.film or item.film != film
                film = item.film
                if number % every:
                    continue
            funnel.count("sources")
            yield item

    def spans() -> Iterator[Clip | Dropped]:
        for span in clips_of(sources(), cutting, benchmarks, videos.bounds, output.cache_folder):
            origins.append(span.path)  # a cut clip no longer names its video
            yield span

    clips: Iterable[Clip | Dropped] = spans()
    if output.media == "embed":
        clips = cut_clips(clips, output.cache_folder, videos.media, output.num_workers, videos.bounds)
    else:
        clips = check_clips(clips, output.cache_folder, output.num_workers, videos.bounds)
    members: dict[str, list[Clip]] = {}
    num_dropped = 0
    for index, clip in enumerate(tqdm(clips, desc="clips", unit="clip")):
        if isinstance(clip, Dropped):
            num_dropped += 1
            funnel.drop(clip.reason, path=clip.path, source_id=clip.source_id, detail=clip.detail)
        else:
            # Scenes that are files of their own are one video again.
            members.setdefault(survey.video_of(origins[index]), []).append(clip)
    if not members:
        why = f"see {output.log / 'dropped.jsonl'} for why." if num_dropped else "it holds no video."
        raise ConfigError(f"no clip came out of {source}: {why}")
    return [Timeline(tuple(clips)) for clips in members.values() for _ in range(every)], {
        "corpus": name,
        "clips cut by": cutting.described(),
        "benchmarks": benchmarks.checked() if benchmarks else "no list of benchmark videos was given: not checked",
    }


def scenes_of(
    videos: Videos, scenes: SceneSettings, funnel: Funnel, executor: Executor
) -> tuple[list[Timeline], dict[str, object]]:
    """Videos as timelines of at most `max_scenes` scenes, from the corpus or from captions that are there.

    Raises:
        ConfigError: If neither is given.
    """
    if scenes.folder is not None:
        return [video.timeline for video in read_captions(scenes.folder, *videos.roots)], {
            "captions": scenes.folder.name
        }
    if videos.corpus.corpus is None or videos.corpus.source is None:
        raise ConfigError("--corpus and --source are needed, or --captions with the folder of an earlier run")
    whole, facts = read_videos(videos, funnel, executor)
    most = scenes.max_scenes or scenes.frame_budget
    return [part for video in whole for part in video.parts(most)], {**facts, "scenes per timeline, at most": most}


def captioned(
    timelines: Sequence[Timeline],
    videos: Videos,
    scenes: SceneSettings,
    captioning: CaptioningSettings,
    captioner: Responder,
    summariser: Responder,
    funnel: Funnel,
    executor: Executor,
) -> tuple[list[CaptionedVideo], dict[str, object]]:
    """The videos with captions: those of a folder, the corpus' own, or new ones, kept in `<output>.scenes`.

    Returns:
        The videos, and what the card says of who captioned them.
    """
    if scenes.folder is not None:
        return read_captions(scenes.folder, *videos.roots), {"captions by": read_facts(scenes.folder)["captioner"]}
    if scenes.captions == "corpus":
        return [CaptionedVideo(timeline) for timeline in timelines], {"captions by": "the corpus"}
    folder = videos.output.beside(".scenes")
    written = caption_videos(timelines, captioner, summariser, folder, captioning, funnel, executor)
    return written, {"captions by": captioner.name}


def media_root(clips: Iterable[Clip], source: Path | None, output: OutputSettings) -> Path | None:
    """With `--media reference`, the folder that rows name their files below: the corpus, or what was extracted of its
    archives. The names of extracted files follow from their content, so whoever extracts the same corpus has the same.

    Raises:
        ConfigError: If no one folder holds all clips.
    """
    if output.media == "embed":
        return None
    if source is None:
        raise ConfigError("--media reference needs --source: the folder below which rows name their files.")
    paths = {Path(clip.path).resolve() for clip in clips}
    for root in (source, output.media_folder / "extracted"):
        if all(path.is_relative_to(root.resolve()) for path in paths):
            return root
    raise ConfigError(
        f"--media reference: some clips are in {source}, others were extracted from archives, so that rows cannot "
        "name them below one folder. Unpack the archives into the corpus' folder first."
    )
