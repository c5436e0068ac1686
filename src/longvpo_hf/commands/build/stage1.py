"""LongVPO Stage 1: from a folder of videos or a public corpus to rows that `load_dataset` opens.

    # with one vision-language model of this machine
    python dataset_scripts/stage1.py --corpus videofolder --source ./my_videos \\
        --responder Qwen/Qwen2.5-VL-3B-Instruct --num-rows 10000 --output data/stage1 --push-to-hub longvpo/stage1

    # with a model behind an OpenAI-compatible endpoint
    python dataset_scripts/stage1.py --corpus finevideo --source ./finevideo --output data/stage1 \\
        --responder endpoint --base-url http://localhost:8000/v1 --model NAME

    # with no model at all: a rehearsal of everything else
    python dataset_scripts/stage1.py --corpus videofolder --source ./my_videos \\
        --responder scripted --num-rows 20 --output ./try

The same command goes on where a killed run stopped. `--dry-run` says what a run would cost before it asks a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from longvpo_hf.commands.build import common
from longvpo_hf.errors import CorpusError, EndpointError
from longvpo_hf.intake.embeddings import DEFAULT_MODEL, VisionEmbedder
from longvpo_hf.methods.stage1 import Embedder, Stage1Settings, build_stage1
from longvpo_hf.timeline import Clip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    paper = Stage1Settings()
    parser = common.parser_of(__doc__)
    common.add_videos(parser)
    common.add_models(
        parser,
        {
            "responder": (["--responder"], "Gives both answers: the model that will be trained."),
            "writer": (["--writer", "--question-writer"], "Writes questions. Default: the responder, as in the paper."),
            "judge": (["--judge"], "Judges questions and pairs. Default: none (optional in the paper)."),
            "embedder": (
                ["--embedder"],
                "Vision model of the similarity filter, or `none`. Default: "
                f"{DEFAULT_MODEL} (the paper: DINOv2); none with --responder scripted.",
            ),
        },
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--num-rows", type=int, default=paper.num_rows)
    rows.add_argument("--min-clips", type=int, default=paper.min_clips)
    rows.add_argument("--max-clips", type=int, help="Default: as many as fill --frame-budget at 1 fps.")
    rows.add_argument("--frame-budget", type=int, default=128, help="Training frames a row should span (paper: 128).")
    rows.add_argument("--questions-per-timeline", type=int, default=paper.questions_per_timeline)
    rows.add_argument("--max-similarity", type=float, default=paper.max_similarity)
    common.add_output(parser, rows)
    args = parser.parse_args(argv)
    if not args.responder:
        parser.error("--responder is needed: a name or path, `endpoint`, or `scripted`")
    common.check_models(parser, [args.responder, args.writer, args.judge], args)
    args.embedder = args.embedder or ("none" if args.responder == "scripted" else DEFAULT_MODEL)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the whole job."""
    args = parse(argv)
    funnel = common.open_log(args)
    try:
        videos, facts = common.read_videos(args, funnel)
        clips = [clip for video in videos for clip in video.clips]
        settings = Stage1Settings(
            num_rows=args.num_rows,
            min_clips=args.min_clips,
            max_clips=args.max_clips,
            frame_budget=args.frame_budget,
            questions_per_timeline=args.questions_per_timeline,
            max_similarity=args.max_similarity,
            seed=args.seed,
        ).fitted(clips)
        if args.dry_run:
            print(estimate(clips, settings, args))
            return
        root = common.media_root(clips, args)
        models = common.Models(args, settings.max_clips or 0)
        counts = build_stage1(
            clips,
            models.seeing(args.writer or args.responder),
            models.seeing(args.responder),
            args.output,
            settings,
            embed=make_embedder(args),
            judge=models.seeing(args.judge) if args.judge else None,
            media_root=root,
            facts=facts,
            funnel=funnel,
        )
    except (CorpusError, EndpointError, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"stage1.py: {error}")
    common.finish(counts, args)


def make_embedder(args: argparse.Namespace) -> Embedder | None:
    """The similarity filter's model."""
    if args.embedder == "none":
        return None
    cache = common.media_folder(args) / "embeddings"
    return VisionEmbedder(args.embedder, device=common.device_of(args), cache=cache)


def estimate(clips: Sequence[Clip], settings: Stage1Settings, args: argparse.Namespace) -> str:
    """What a run would cost if no row were dropped."""
    mean_seconds = sum(clip.duration_seconds for clip in clips) / len(clips)
    mean_clips = (settings.min_clips + (settings.max_clips or 0)) / 2
    frames = min(common.FRAMES, max(1, round(mean_seconds * common.FPS)))
    anchors = min(len(clips), settings.num_rows)
    judged = anchors + settings.num_rows if args.judge else 0
    anchor_tokens = frames * common.TOKENS_PER_FRAME + common.TOKENS_PER_TEXT
    rest_frames = min(common.FRAMES, round((mean_clips - 1) * frames))
    tokens = (2 * anchors + judged) * anchor_tokens + settings.num_rows * (
        rest_frames * common.TOKENS_PER_FRAME + common.TOKENS_PER_TEXT
    )
    return "\n".join(
        [
            f"clips             {len(clips)} of {mean_seconds:.1f} s on average",
            f"rows              {settings.num_rows}, {settings.min_clips} to {settings.max_clips} clips each",
            f"model calls       {2 * anchors + settings.num_rows + judged}: {anchors} questions, {anchors} answers "
            f"from anchors, {settings.num_rows} from the others, {judged} verdicts",
            f"tokens            about {tokens / 1e6:.1f} million, at {common.TOKENS_PER_FRAME} per frame",
            *common.disk_lines(clips, args),
        ]
    )


if __name__ == "__main__":
    main()
