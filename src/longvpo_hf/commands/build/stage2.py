"""`longvpo build stage2`: rows over several scenes of long videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

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
from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import Bounds
from longvpo_hf.intake import CuttingSettings, IntakeLimits
from longvpo_hf.intake.media import MediaSettings
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2, most_rows


@dataclass(frozen=True, slots=True)
class Stage2Models:
    """Who does what.

    Args:
        responder: Gives both answers: the model that will be trained (the Stage-1 model).
        iterate_from: In place of --responder, for the second iteration: a Stage-2 model.
        captioner: Captions the scenes. None: the responder, as in the paper.
        writer: Writes questions from captions, and sums captions up; may be a language model (paper: Qwen2.5-32B).
            None: the responder.
        judge: Judges answers by the captions; may be a language model. None: nobody does.
    """

    responder: str | None = None
    iterate_from: str | None = None
    captioner: str | None = None
    writer: Annotated[str | None, Parameter(name=["--writer", "--question-writer"])] = None
    judge: str | None = None

    @property
    def answerer(self) -> str:
        """Who answers.

        Raises:
            ConfigError: If nobody or two are named.
        """
        if bool(self.responder) == bool(self.iterate_from):
            raise ConfigError("give --responder, or --iterate-from for the second iteration")
        return self.responder or str(self.iterate_from)


@resumable
def build(
    *,
    rows: Annotated[Stage2Settings, flat(ROWS)] = Stage2Settings(),
    scenes: Annotated[SceneSettings, flat(ROWS)] = SceneSettings(),
    corpus: Annotated[CorpusSettings, flat(VIDEOS)] = CorpusSettings(),
    cutting: Annotated[CuttingSettings, flat(VIDEOS)] = CuttingSettings(),
    media: Annotated[MediaSettings, flat(VIDEOS)] = MediaSettings(),
    captioning: Annotated[CaptioningSettings, flat(CAPTIONS)] = CaptioningSettings(),
    roles: Annotated[Stage2Models, flat(MODELS)] = Stage2Models(),
    asking: Annotated[WriterSettings, flat(MODELS)] = WriterSettings(),
    output: Annotated[OutputSettings, flat(OUTPUT)],
    work: Annotated[WorkSettings, flat(MACHINES)] = WorkSettings(),
    limits: Annotated[IntakeLimits, flat(BOUNDS)] = IntakeLimits(),
    bounds: Annotated[Bounds, flat(BOUNDS)] = Bounds(),
    config: ConfigFile = None,
) -> None:
    """LongVPO Stage 2: from long videos to rows that ask about several of their scenes at once.

    For example:

        # the Stage-1 model captions scenes and answers;
        # a language model writes the questions
        longvpo build stage2 --corpus vript --source ./vript --responder ./stage1 \\
            --writer Qwen/Qwen2.5-32B-Instruct \\
            --num-rows 6000 --output data/stage2 --push-to-hub longvpo/stage2

        # the paper's second iteration: Stage 2 once more, by its own result
        longvpo build stage2 --corpus vript --source ./vript \\
            --iterate-from my-org/my-stage2-model \\
            --writer Qwen/Qwen2.5-32B-Instruct --output data/stage2-iteration2

        # with no model at all: a rehearsal of everything else
        longvpo build stage2 --corpus videofolder --source ./my_videos \\
            --responder scripted --num-rows 20 --output ./try

    The same command goes on where a killed run stopped. Captions stay in `<output>.scenes`: `longvpo inspect` shows
    them, `--captions` uses them again. `--dry-run` says what a run would cost before it asks a model.
    """
    names = [roles.answerer, roles.captioner, roles.writer, roles.judge]
    asking.check(names)
    executor = work.made(output.num_workers, names)
    output.check(corpus.source)
    if not output.dry_run:
        check_models(
            asking,
            seeing=[roles.answerer, roles.captioner],
            reading=[roles.writer, roles.judge],
            judge=roles.judge,
        )
    with output.opened(executor) as funnel:
        source = Videos(corpus, cutting, media, output, limits, bounds)
        timelines, facts = scenes_of(source, scenes, funnel, executor)
        if output.dry_run:
            most = most_rows(timelines, rows, captioning.max_caption_characters)
            shown = f"{rows.chosen_from} and from a part or the rest"
            estimate_over_scenes(timelines, scenes, output, rows.num_rows, most, shown, 2 if roles.judge else 0).show(
                output
            )
            return
        root = media_root((clip for timeline in timelines for clip in timeline.clips), corpus.source, output)
        models = Models(asking, max(scenes.frame_budget, *map(len, timelines)), rows.seed, executor)
        writer = models.reading(roles.writer or roles.answerer)
        captioner = models.seeing(roles.captioner or roles.answerer)
        videos, by = captioned(timelines, source, scenes, captioning, captioner, writer, funnel, executor)
        if roles.iterate_from:
            by["iteration"] = f"2, from {models.seeing(roles.iterate_from).name}"
        counts = build_stage2(
            videos,
            writer,
            models.seeing(roles.answerer),
            output.output,
            rows,
            judge=models.judging(roles.judge) if roles.judge else None,
            media_root=root,
            facts={**facts, **by},
            funnel=funnel,
            executor=executor,
        )
        finish("stage2", counts, output, executor)


main = script(build, "stage2.py")
