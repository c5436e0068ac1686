"""Temporal preferences (TPO): rows about one segment of a video, about all of it, or both.

    python dataset_scripts/temporal.py --mode mixed --corpus videofolder --source ./my_videos \\
        --responder lmms-lab/LLaVA-Video-7B --writer endpoint:gpt-4o-mini --base-url https://api.openai.com/v1 \\
        --num-rows 10000 --output data/temporal --push-to-hub longvpo/temporal

    # with no model at all: a rehearsal of everything else
    python dataset_scripts/temporal.py --mode mixed --corpus videofolder --source ./my_videos \\
        --responder scripted --num-rows 20 --output ./try

*localized*: a question about one segment; rejected is the answer from the video without it. *comprehensive*: a question
about the whole video; rejected is the answer from a few of its frames. The same command goes on where a killed run
stopped. Captions stay in `<output>.scenes`: `longvpo inspect` shows them, `--captions` uses them again. `--dry-run`
says what a run would cost before it asks a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from longvpo_hf.commands.build import common
from longvpo_hf.errors import CorpusError, EndpointError
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    paper = TemporalSettings()
    parser = common.parser_of(__doc__)
    common.add_videos(parser, required=False)
    common.add_captions(parser)
    common.add_models(
        parser,
        {
            "responder": (["--responder"], "Gives both answers: the model that will be trained."),
            "captioner": (["--captioner"], "Captions the scenes (paper: CogVLM2). Default: the responder."),
            "writer": (
                ["--writer", "--question-writer"],
                "Writes questions from captions, and sums captions up; may be a language model (paper: GPT-4o-mini). "
                "Default: the responder.",
            ),
            "judge": (
                ["--judge"],
                "Answers the post-filter's three questions from the captions. Default: the writer, as in the paper; "
                "`none` leaves the post-filter out.",
            ),
        },
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--mode", choices=["localized", "comprehensive", "mixed"], default=paper.mode)
    rows.add_argument("--num-rows", type=int, default=paper.num_rows)
    rows.add_argument("--localized-share", type=float, default=paper.localized_share,
                      help="With --mode mixed, the share of localized rows.")  # fmt: skip
    rows.add_argument("--frame-budget", type=int, default=32, help="Training frames of a row (paper: 32).")
    rows.add_argument("--chosen-from", choices=["segment", "whole"], default=paper.chosen_from,
                      help="View of a localized row's chosen answer.")  # fmt: skip
    rows.add_argument("--sparse-frames", type=int, default=paper.sparse_frames,
                      help="Frames a comprehensive row's rejected answer is given from.")  # fmt: skip
    common.add_output(parser, rows)
    args = parser.parse_args(argv)
    if not args.responder:
        parser.error("--responder is needed: a name or path, `endpoint`, or `scripted`")
    if not (args.captions and args.captions != "corpus") and not (args.corpus and args.source):
        parser.error("--corpus and --source are needed, or --captions with the folder of an earlier run")
    common.check_models(parser, [args.responder, args.captioner, args.writer, args.judge], args)
    args.judge = args.judge or args.writer or args.responder
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the whole job."""
    args = parse(argv)
    funnel = common.open_log(args)
    try:
        settings = TemporalSettings(
            mode=args.mode,
            num_rows=args.num_rows,
            localized_share=args.localized_share,
            chosen_from=args.chosen_from,
            sparse_frames=args.sparse_frames,
            seed=args.seed,
        )
        timelines, facts = common.scenes_of(args, funnel)
        if args.dry_run:
            print(
                common.estimate_over_scenes(
                    timelines, args, settings.num_rows, "good and degraded views", int(args.judge != "none")
                )
            )
            return
        root = common.media_root((clip for timeline in timelines for clip in timeline.clips), args)
        models = common.Models(args, max(args.frame_budget, *map(len, timelines)))
        writer = args.writer or args.responder
        videos, by = common.captioned(args, timelines, models, args.captioner or args.responder, writer, funnel)
        counts = build_temporal(
            videos,
            models.reading(writer),
            models.seeing(args.responder),
            args.output,
            settings,
            judge=models.reading(args.judge) if args.judge != "none" else None,
            media_root=root,
            facts={**facts, **by},
            funnel=funnel,
        )
    except (CorpusError, EndpointError, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"temporal.py: {error}")
    common.finish(counts, args)


if __name__ == "__main__":
    main()
