"""`longvpo build temporal`: temporal preferences, localized and comprehensive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from longvpo_hf.building.captioning import CaptioningSettings
from longvpo_hf.commands.build.models import Models, check_models
from longvpo_hf.commands.build.options import (
    BOUNDS,
    CAPTIONS,
    MACHINES,
    MODELS,
    OUTPUT,
    ROWS,
    VIDEOS,
    CorpusSettings,
    OutputSettings,
    SceneSettings,
    Videos,
    WorkSettings,
    WriterSettings,
)
from longvpo_hf.commands.build.reports import estimate_over_scenes, finish
from longvpo_hf.commands.build.videos import captioned, media_root, scenes_of
from longvpo_hf.commands.cli import ConfigFile, flat, resumable, script
from longvpo_hf.frames import Bounds
from longvpo_hf.intake import CuttingSettings, IntakeLimits
from longvpo_hf.intake.media import MediaSettings
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal, most_rows


@dataclass(frozen=True, slots=True)
class TemporalScenes(SceneSettings):
    """As `SceneSettings`, with this paper's frames.

    Args:
        frame_budget: Training frames of a row (paper: 32).
    """

    frame_budget: PositiveInt = 32


@dataclass(frozen=True, slots=True)
class TemporalModels:
    """Who does what.

    Args:
        responder: Gives both answers: the model that will be trained.
        captioner: Captions the scenes (paper: CogVLM2). None: the responder.
        writer: Writes questions from captions, and sums captions up; may be a language model (paper: GPT-4o-mini).
            None: the responder.
        judge: Answers the post-filter's three questions from the captions; `none` leaves the post-filter out. None: the
            writer, as in the paper.
    """

    responder: str
    captioner: str | None = None
    writer: Annotated[str | None, Parameter(name=["--writer", "--question-writer"])] = None
    judge: str | None = None


@resumable
def build(
    *,
    rows: Annotated[TemporalSettings, flat(ROWS)] = TemporalSettings(),
    scenes: Annotated[TemporalScenes, flat(ROWS)] = TemporalScenes(),
    corpus: Annotated[CorpusSettings, flat(VIDEOS)] = CorpusSettings(),
    cutting: Annotated[CuttingSettings, flat(VIDEOS)] = CuttingSettings(),
    media: Annotated[MediaSettings, flat(VIDEOS)] = MediaSettings(),
    captioning: Annotated[CaptioningSettings, flat(CAPTIONS)] = CaptioningSettings(),
    roles: Annotated[TemporalModels, flat(MODELS)],
    asking: Annotated[WriterSettings, flat(MODELS)] = WriterSettings(),
    output: Annotated[OutputSettings, flat(OUTPUT)],
    work: Annotated[WorkSettings, flat(MACHINES)] = WorkSettings(),
    limits: Annotated[IntakeLimits, flat(BOUNDS)] = IntakeLimits(),
    bounds: Annotated[Bounds, flat(BOUNDS)] = Bounds(),
    config: ConfigFile = None,
) -> None:
    """Temporal preferences (TPO): rows about one segment of a video, about all of it, or both.

    For example:

        longvpo build temporal --mode mixed \\
            --corpus videofolder --source ./my_videos \\
            --responder lmms-lab/LLaVA-Video-7B --writer endpoint:gpt-4o-mini \\
            --base-url https://api.openai.com/v1 \\
            --num-rows 10000 --output data/temporal --push-to-hub longvpo/temporal

        # with no model at all: a rehearsal of everything else
        longvpo build temporal --mode mixed \\
            --corpus videofolder --source ./my_videos \\
            --responder scripted --num-rows 20 --output ./try

    *localized*: a question about one segment; rejected is the answer from the video without it. *comprehensive*: a
    question about the whole video; rejected is the answer from a few of its frames.

    The same command goes on where a killed run stopped. Captions stay in `<output>.scenes`: `longvpo inspect` shows
    them, `--captions` uses them again. `--dry-run` says what a run would cost before it asks a model.
    """
    judge = roles.judge or roles.writer or roles.responder
    names = [roles.responder, roles.captioner, roles.writer, judge]
    asking.check(names)
    executor = work.made(output.num_workers, names)
    output.check(corpus.source)
    if not output.dry_run:
        check_models(
            asking,
            seeing=[roles.responder, roles.captioner],
            reading=[roles.writer, judge],
            judge=judge,
        )
    with output.opened(executor) as funnel:
        source = Videos(corpus, cutting, media, output, limits, bounds)
        timelines, facts = scenes_of(source, scenes, funnel, executor)
        if output.dry_run:
            most = most_rows(timelines, rows)
            shown, judgements = "good and degraded views", int(judge != "none")
            estimate_over_scenes(timelines, scenes, output, rows.num_rows, most, shown, judgements).show(output)
            return
        root = media_root((clip for timeline in timelines for clip in timeline.clips), corpus.source, output)
        models = Models(asking, max(scenes.frame_budget, *map(len, timelines)), rows.seed, executor)
        writer = models.reading(roles.writer or roles.responder)
        captioner = models.seeing(roles.captioner or roles.responder)
        videos, by = captioned(timelines, source, scenes, captioning, captioner, writer, funnel, executor)
        counts = build_temporal(
            videos,
            writer,
            models.seeing(roles.responder),
            output.output,
            rows,
            judge=models.judging(judge) if judge != "none" else None,
            media_root=root,
            facts={**facts, **by},
            funnel=funnel,
            executor=executor,
        )
        finish("temporal", counts, output, executor)


main = script(build, "temporal.py")
