"""LongVPO Stage 2: from long videos to rows that ask about several of their scenes at once.

    # the Stage-1 model captions scenes and answers; a language model writes the questions
    python dataset_scripts/stage2.py --corpus vript --source ./vript --responder ./stage1 \\
        --writer Qwen/Qwen2.5-32B-Instruct --num-rows 6000 --output data/stage2 --push-to-hub longvpo/stage2

    # the paper's second iteration: Stage 2 once more, by its own result
    python dataset_scripts/stage2.py --corpus vript --source ./vript --iterate-from my-org/my-stage2-model \\
        --writer Qwen/Qwen2.5-32B-Instruct --output data/stage2-iteration2

    # with no model at all: a rehearsal of everything else
    python dataset_scripts/stage2.py --corpus videofolder --source ./my_videos \\
        --responder scripted --num-rows 20 --output ./try

The same command goes on where a killed run stopped. Captions stay in `<output>.scenes`: `longvpo inspect` shows them,
`--captions` uses them again. `--dry-run` says what a run would cost before it asks a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from longvpo_hf.commands.build import common
from longvpo_hf.errors import CorpusError, EndpointError
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    paper = Stage2Settings()
    parser = common.parser_of(__doc__)
    common.add_videos(parser, required=False)
    common.add_captions(parser)
    common.add_models(
        parser,
        {
            "responder": (["--responder"], "Gives both answers: the model that will be trained (the Stage-1 model)."),
            "iterate_from": (["--iterate-from"], "In place of --responder, the second iteration: a Stage-2 model."),
            "captioner": (["--captioner"], "Captions the scenes. Default: the responder, as in the paper."),
            "writer": (
                ["--writer", "--question-writer"],
                "Writes questions from captions, and sums captions up; may be a language model (paper: Qwen2.5-32B). "
                "Default: the responder.",
            ),
            "judge": (["--judge"], "Judges answers by the captions; may be a language model. Default: none."),
        },
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--num-rows", type=int, default=paper.num_rows)
    rows.add_argument("--frame-budget", type=int, default=128, help="Training frames of a row (paper: 128).")
    rows.add_argument("--chosen-from", choices=["evidence", "whole"], default=paper.chosen_from,
                      help="View of the chosen answer: the cited scenes, or the whole video.")  # fmt: skip
    rows.add_argument("--reference", choices=["whole", "evidence"], default=paper.reference,
                      help="View the reference model will be scored on.")  # fmt: skip
    rows.add_argument("--partial-share", type=float, default=paper.partial_share,
                      help="Of rejected answers, those from a part of the evidence; the others see none.")  # fmt: skip
    rows.add_argument("--max-tries", type=int, default=paper.max_tries, help="Of a question that is refused.")
    common.add_output(parser, rows)
    args = parser.parse_args(argv)
    if bool(args.responder) == bool(args.iterate_from):
        parser.error("give --responder, or --iterate-from for the second iteration")
    args.responder = args.responder or args.iterate_from
    if not (args.captions and args.captions != "corpus") and not (args.corpus and args.source):
        parser.error("--corpus and --source are needed, or --captions with the folder of an earlier run")
    common.check_models(parser, [args.responder, args.captioner, args.writer, args.judge], args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the whole job."""
    args = parse(argv)
    funnel = common.open_log(args)
    try:
        settings = Stage2Settings(
            num_rows=args.num_rows,
            chosen_from=args.chosen_from,
            reference=args.reference,
            partial_share=args.partial_share,
            max_tries=args.max_tries,
            seed=args.seed,
        )
        timelines, facts = common.scenes_of(args, funnel)
        if args.dry_run:
            answers = f"{args.chosen_from} and from a part or the rest"
            print(common.estimate_over_scenes(timelines, args, settings.num_rows, answers, 2 if args.judge else 0))
            return
        root = common.media_root((clip for timeline in timelines for clip in timeline.clips), args)
        models = common.Models(args, max(args.frame_budget, *map(len, timelines)))
        writer = args.writer or args.responder
        videos, by = common.captioned(args, timelines, models, args.captioner or args.responder, writer, funnel)
        if args.iterate_from:
            by["iteration"] = f"2, from {models.seeing(args.responder).name}"
        counts = build_stage2(
            videos,
            models.reading(writer),
            models.seeing(args.responder),
            args.output,
            settings,
            judge=models.reading(args.judge) if args.judge else None,
            media_root=root,
            facts={**facts, **by},
            funnel=funnel,
        )
    except (CorpusError, EndpointError, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"stage2.py: {error}")
    common.finish(counts, args)


if __name__ == "__main__":
    main()
