"""`longvpo build stage1`: anchored rows from a folder of videos or a public corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from longvpo_hf.commands.build.models import Models, check_models, device_of
from longvpo_hf.commands.build.options import (
    BOUNDS,
    FPS,
    FRAMES,
    MACHINES,
    MODELS,
    OUTPUT,
    ROWS,
    VIDEOS,
    CorpusSettings,
    JudgeSettings,
    ModelSettings,
    OutputSettings,
    Videos,
    WorkSettings,
)
from longvpo_hf.commands.build.reports import (
    TOKENS_PER_FRAME,
    TOKENS_PER_TEXT,
    Estimate,
    disk_bytes,
    disk_lines,
    finish,
)
from longvpo_hf.commands.build.videos import media_root, read_videos
from longvpo_hf.commands.cli import ConfigFile, flat, resumable, script
from longvpo_hf.frames import Bounds
from longvpo_hf.intake import CuttingSettings, IntakeLimits
from longvpo_hf.intake.media import MediaSettings
from longvpo_hf.methods.stage1 import Embedder, Stage1Settings, build_stage1
from longvpo_hf.timeline import Clip

if TYPE_CHECKING:
    from longvpo_hf.building.executors import Executor


@dataclass(frozen=True, slots=True)
class Stage1Models:
    """Who does what.

    Args:
        responder: Gives both answers: the model that will be trained.
        writer: Writes questions. None: the responder, as in the paper.
        judge: Judges questions and pairs; optional in the paper. None: nobody does.
        embedder: Vision model of the similarity filter, or `none`. None: facebook/dinov2-base (the paper: DINOv2), and
            `none` with --responder scripted.
    """

    responder: str
    writer: Annotated[str | None, Parameter(name=["--writer", "--question-writer"])] = None
    judge: str | None = None
    embedder: str | None = None


@resumable
def build(
    *,
    rows: Annotated[Stage1Settings, flat(ROWS)] = Stage1Settings(),
    corpus: Annotated[CorpusSettings, flat(VIDEOS)] = CorpusSettings(),
    cutting: Annotated[CuttingSettings, flat(VIDEOS)] = CuttingSettings(),
    media: Annotated[MediaSettings, flat(VIDEOS)] = MediaSettings(),
    roles: Annotated[Stage1Models, flat(MODELS)],
    asking: Annotated[JudgeSettings, flat(MODELS)] = JudgeSettings(),
    output: Annotated[OutputSettings, flat(OUTPUT)],
    work: Annotated[WorkSettings, flat(MACHINES)] = WorkSettings(),
    limits: Annotated[IntakeLimits, flat(BOUNDS)] = IntakeLimits(),
    bounds: Annotated[Bounds, flat(BOUNDS)] = Bounds(),
    config: ConfigFile = None,
) -> None:
    """LongVPO Stage 1: from a folder of videos or a public corpus to rows that `load_dataset` opens.

    For example:

        # with one vision-language model of this machine
        longvpo build stage1 --corpus videofolder --source ./my_videos \\
            --responder Qwen/Qwen2.5-VL-3B-Instruct \\
            --num-rows 10000 --output data/stage1 --push-to-hub longvpo/stage1

        # with a model behind an OpenAI-compatible endpoint
        longvpo build stage1 --corpus finevideo --source ./finevideo \\
            --responder endpoint --base-url http://localhost:8000/v1 --model NAME \\
            --output data/stage1

        # with no model at all: a rehearsal of everything else
        longvpo build stage1 --corpus videofolder --source ./my_videos \\
            --responder scripted --num-rows 20 --output ./try

    The same command goes on where a killed run stopped. `--dry-run` says what a run would cost before it asks a model.
    """
    names = [roles.responder, roles.writer, roles.judge]
    asking.check(names)
    executor = work.made(output.num_workers, names)
    output.check(corpus.source)
    if not output.dry_run:
        check_models(
            asking,
            seeing=[roles.responder, roles.writer, roles.judge],
            judge=roles.judge,
            embedder=_embedder_name(roles),
        )
    with output.opened(executor) as funnel:
        videos, facts = read_videos(Videos(corpus, cutting, media, output, limits, bounds), funnel, executor)
        clips = [clip for video in videos for clip in video.clips]
        rows = rows.fitted(clips)
        if output.dry_run:
            _estimate(clips, rows, roles, output).show(output)
            return
        root = media_root(clips, corpus.source, output)
        models = Models(asking, rows.max_clips or 0, rows.seed, executor)
        counts = build_stage1(
            clips,
            models.seeing(roles.writer or roles.responder),
            models.seeing(roles.responder),
            output.output,
            rows,
            embed=_embedder(roles, asking, output, executor),
            judge=models.judging(roles.judge, sees_video=True) if roles.judge else None,
            media_root=root,
            facts=facts,
            funnel=funnel,
            executor=executor,
        )
        finish("stage1", counts, output, executor)


def _embedder_name(roles: Stage1Models) -> str | None:
    """The similarity filter's model; None where the filter is left out."""
    if roles.embedder == "none" or (roles.embedder is None and roles.responder == "scripted"):
        return None
    from longvpo_hf.intake.embeddings import DEFAULT_MODEL

    return roles.embedder or DEFAULT_MODEL


def _embedder(
    roles: Stage1Models, asking: ModelSettings, output: OutputSettings, executor: Executor
) -> Embedder | None:
    name = _embedder_name(roles)
    if name is None:
        return None
    from longvpo_hf.commands.build.sharing import Embedding
    from longvpo_hf.intake.embeddings import VisionEmbedder

    embedder = VisionEmbedder(name, device=device_of(asking), cache=output.media_folder / "embeddings")
    return embedder if executor.is_here else Embedding(embedder, executor)


def _estimate(clips: Sequence[Clip], rows: Stage1Settings, roles: Stage1Models, output: OutputSettings) -> Estimate:
    """What a run would cost if no row were dropped."""
    mean_seconds = sum(clip.duration_seconds for clip in clips) / len(clips)
    mean_clips = (rows.min_clips + (rows.max_clips or 0)) / 2
    frames = min(FRAMES, max(1, round(mean_seconds * FPS)))
    anchors = min(len(clips), rows.num_rows)
    judged = anchors + rows.num_rows if roles.judge else 0
    anchor_tokens = frames * TOKENS_PER_FRAME + TOKENS_PER_TEXT
    rest_frames = min(FRAMES, round((mean_clips - 1) * frames))
    rest_tokens = rest_frames * TOKENS_PER_FRAME + TOKENS_PER_TEXT
    tokens = (2 * anchors + judged) * anchor_tokens + rows.num_rows * rest_tokens
    calls = 2 * anchors + rows.num_rows + judged
    text = "\n".join(
        [
            f"clips             {len(clips)} of {mean_seconds:.1f} s on average",
            f"rows              {rows.num_rows}, {rows.min_clips} to {rows.max_clips} clips each",
            f"model calls       {calls}: {anchors} questions, {anchors} answers "
            f"from anchors, {rows.num_rows} from the others, {judged} verdicts",
            f"tokens            about {tokens / 1e6:.1f} million, at {TOKENS_PER_FRAME} per frame",
            *disk_lines(clips, output),
        ]
    )
    return Estimate(text, rows.num_rows, calls, round(tokens), disk_bytes(clips))


main = script(build, "stage1.py")
