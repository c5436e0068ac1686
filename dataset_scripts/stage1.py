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
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from longvpo_hf.builders.anchored import AnchoredSettings, Embedder, build_anchored, clips_for_budget, log_folder
from longvpo_hf.builders.rehearsal import rehearsal
from longvpo_hf.corpora import CORPORA, BenchmarkVideos, CorpusError, Cutting, Source, clips_of, read_corpus
from longvpo_hf.embeddings import DEFAULT_MODEL, VisionEmbedder
from longvpo_hf.filters import Dropped, Funnel
from longvpo_hf.frames import FrameSampler
from longvpo_hf.hub import push_dataset
from longvpo_hf.media import MediaSettings, cut_clips
from longvpo_hf.responders import EndpointResponder, LocalResponder, Responder
from longvpo_hf.responders.endpoint import EndpointError
from longvpo_hf.timeline import Clip

#: A frame of a model that is asked: InternVL's tile of 448 × 448; the paper samples clips at 1 fps, at most 64 frames.
_MAX_PIXELS, _FPS, _FRAMES = 448 * 448, 1.0, 64
#: Rough sizes for --dry-run: visual tokens of a frame of 448 × 448 in InternVL, and of a question with its answer.
_TOKENS_PER_FRAME, _TOKENS_PER_TEXT = 256, 200


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    paper = AnchoredSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("videos")
    source.add_argument("--corpus", required=True, choices=CORPORA)
    source.add_argument("--source", required=True, type=Path, help="Folder the corpus lies in.")
    source.add_argument("--cutting", choices=["scenes", "windows"], default="scenes", help="How long videos are cut.")
    source.add_argument("--min-clip-seconds", type=float, default=Cutting().min_seconds)
    source.add_argument("--max-clip-seconds", type=float, default=Cutting().max_seconds)
    source.add_argument("--max-height", type=int, default=MediaSettings().max_height, help="Of the cut clips, pixels.")
    source.add_argument("--benchmark-videos", action="append", default=[], metavar="NAME=FILE",
                        help="A benchmark's video ids or sha256, one a line: its videos are dropped.")  # fmt: skip
    models = parser.add_argument_group("models: a name or path, `endpoint`, `endpoint:MODEL`, or `scripted`")
    models.add_argument("--responder", required=True, help="Gives both answers: the model that will be trained.")
    models.add_argument("--question-writer", help="Default: the responder, as in the paper.")
    models.add_argument("--judge", help="Judges questions and pairs. Default: none (optional in the paper).")
    models.add_argument("--embedder", help="Vision model of the similarity filter, or `none`. Default: "
                        f"{DEFAULT_MODEL} (the paper: DINOv2); none with --responder scripted.")  # fmt: skip
    models.add_argument("--base-url", help="Address of the endpoint, e.g. http://localhost:8000/v1.")
    models.add_argument("--model", help="Name of the endpoint's model.")
    models.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME",
                        help="Variable that holds the endpoint's key; Hugging Face's own take HF_TOKEN.")  # fmt: skip
    models.add_argument("--concurrency", type=int, default=8, help="Requests under way at the endpoint at once.")
    models.add_argument("--batch-size", type=int, default=8, help="Requests per batch of a model of this machine.")
    models.add_argument("--max-new-tokens", type=int, default=128)
    models.add_argument("--device", default=None, help="Default: cuda where there is one, else cpu.")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--num-rows", type=int, default=paper.num_rows)
    rows.add_argument("--min-clips", type=int, default=paper.min_clips)
    rows.add_argument("--max-clips", type=int, help="Default: as many as fill --frame-budget at 1 fps.")
    rows.add_argument("--frame-budget", type=int, default=128, help="Training frames a row should span (paper: 128).")
    rows.add_argument("--questions-per-timeline", type=int, default=paper.questions_per_timeline)
    rows.add_argument("--max-similarity", type=float, default=paper.max_similarity)
    rows.add_argument("--seed", type=int, default=paper.seed)
    rows.add_argument("--output", required=True, type=Path)
    rows.add_argument("--media", choices=["embed", "reference"], default="embed",
                      help="`reference` publishes rows only, for corpora that may not be redistributed.")  # fmt: skip
    rows.add_argument("--num-workers", type=int, default=0, help="Processes that cut clips; 0 cuts in this one.")
    rows.add_argument("--dry-run", action="store_true", help="Estimate calls, tokens and disk; ask no model.")
    rows.add_argument("--push-to-hub", metavar="NAMESPACE/NAME")
    args = parser.parse_args(argv)
    named = [args.responder, args.question_writer, args.judge]
    if any(name and name.partition(":")[0] == "endpoint" for name in named) and not args.base_url:
        parser.error("--responder endpoint needs --base-url, e.g. http://localhost:8000/v1")
    if "endpoint" in named and not args.model:
        parser.error("--responder endpoint needs --model, or write endpoint:MODEL")
    args.embedder = args.embedder or ("none" if args.responder == "scripted" else DEFAULT_MODEL)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the whole job."""
    args = parse(argv)
    funnel = Funnel(log_folder(args.output))
    try:
        clips, facts = prepare_clips(args, funnel)
        settings = AnchoredSettings(
            num_rows=args.num_rows,
            min_clips=args.min_clips,
            max_clips=args.max_clips or default_max_clips(clips, args),
            questions_per_timeline=args.questions_per_timeline,
            max_similarity=args.max_similarity,
            seed=args.seed,
        )
        if args.dry_run:
            print(estimate(clips, settings, args))
            return
        root = media_root(clips, args) if args.media == "reference" else None
        responders = make_responders(args)
        counts = build_anchored(
            clips,
            responders.writer,
            responders.answerer,
            args.output,
            settings,
            embed=make_embedder(args),
            judge=responders.judge,
            media_root=root,
            facts=facts,
            funnel=funnel,
        )
    except (CorpusError, EndpointError, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"stage1.py: {error}")
    print_funnel(counts)
    print(f"{counts['stages']['rows']} rows in {args.output}; look at them with: longvpo inspect {args.output}")
    if args.push_to_hub:
        commit = push_dataset(args.output, args.push_to_hub)
        print(f'pushed: load_dataset("{args.push_to_hub}", revision="{commit}")')


def prepare_clips(args: argparse.Namespace, funnel: Funnel) -> tuple[list[Clip], dict[str, object]]:
    """Reads the corpus and cuts its videos; counts what came through. Files already cut are not cut again."""
    lists = dict(item.split("=", 1) for item in args.benchmark_videos)
    benchmarks = BenchmarkVideos.from_files({name: Path(path) for name, path in lists.items()}) if lists else None
    cutting = Cutting(args.min_clip_seconds, args.max_clip_seconds, args.cutting)
    work = media_folder(args)

    def sources() -> Iterator[Source | Dropped]:
        for source in read_corpus(args.corpus, args.source, work / "extracted"):
            funnel.count("sources")
            yield source

    spans = clips_of(sources(), cutting, benchmarks)
    if args.media == "embed":
        spans = cut_clips(spans, work / "clips", MediaSettings(args.max_height), args.num_workers)
    clips = []
    for item in tqdm(spans, desc="clips", unit="clip"):
        if isinstance(item, Dropped):
            funnel.drop(item.reason, path=item.path, source_id=item.source_id, detail=item.detail)
        else:
            clips.append(item)
    if not clips:
        raise ValueError(f"no clip came out of {args.source}; see {log_folder(args.output) / 'dropped.jsonl'} for why.")
    return clips, {
        "corpus": args.corpus,
        "clips cut by": f"{cutting.method}, {cutting.min_seconds:g} to {cutting.max_seconds:g} s",
        "benchmarks": benchmarks.checked() if benchmarks else "no list of benchmark videos was given: not checked",
    }


def media_folder(args: argparse.Namespace) -> Path:
    """Where what is extracted, cut and embedded lies, for this run and its resumption."""
    return args.output.with_name(args.output.name + ".media")


def media_root(clips: Sequence[Clip], args: argparse.Namespace) -> Path:
    """The folder that rows without media name their files below: the corpus, or what was extracted of its archives.

    The names of extracted files follow from their content, so whoever extracts the same corpus has the same.
    """
    for root in (args.source, media_folder(args) / "extracted"):
        if all(Path(clip.path).resolve().is_relative_to(root.resolve()) for clip in clips):
            return root
    raise ValueError(
        f"--media reference: some clips lie in {args.source}, others were extracted from archives, so that rows cannot "
        "name them below one folder. Unpack the archives into the corpus' folder first."
    )


def default_max_clips(clips: Sequence[Clip], args: argparse.Namespace) -> int:
    """As many clips as fill the training budget, of those there are."""
    return max(args.min_clips, min(len(clips), clips_for_budget(clips, args.frame_budget, _FPS)))


@dataclass(frozen=True)
class Responders:
    """Who does what; one model may do all."""

    writer: Responder
    answerer: Responder
    judge: Responder | None


def make_responders(args: argparse.Namespace) -> Responders:
    """Loads each model once, however many roles it has."""
    made: dict[str, Responder] = {}

    def make(name: str) -> Responder:
        if name not in made:
            made[name] = _responder(name, args)
        return made[name]

    answerer = make(args.responder)
    return Responders(make(args.question_writer or args.responder), answerer, make(args.judge) if args.judge else None)


def _responder(name: str, args: argparse.Namespace) -> Responder:
    sampler = FrameSampler(_FRAMES, fps=_FPS, max_pixels=_MAX_PIXELS)
    if name == "scripted":
        return rehearsal()
    kind, _, model = name.partition(":")
    if kind == "endpoint":
        return EndpointResponder(
            model or args.model, args.base_url, sampler, max_tokens=args.max_new_tokens,
            concurrency=args.concurrency, seed=args.seed, api_key=os.environ.get(args.api_key_env),
        )  # fmt: skip
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval().to(_device(args))
    return LocalResponder(loaded, AutoProcessor.from_pretrained(name), sampler, args.max_new_tokens, args.batch_size)


def make_embedder(args: argparse.Namespace) -> Embedder | None:
    """The similarity filter's model."""
    if args.embedder == "none":
        return None
    return VisionEmbedder(args.embedder, device=_device(args), cache=media_folder(args) / "embeddings")


def _device(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def estimate(clips: Sequence[Clip], settings: AnchoredSettings, args: argparse.Namespace) -> str:
    """What a run would cost if no row were dropped; each dropped row costs its calls again."""
    mean_seconds = sum(clip.duration_seconds for clip in clips) / len(clips)
    mean_clips = (settings.min_clips + settings.max_clips) / 2
    frames = min(_FRAMES, max(1, round(mean_seconds * _FPS)))
    anchors = min(len(clips), settings.num_rows)
    judged = anchors + settings.num_rows if args.judge else 0
    anchor_tokens = frames * _TOKENS_PER_FRAME + _TOKENS_PER_TEXT
    rest_frames = min(_FRAMES, round((mean_clips - 1) * frames))
    tokens = (2 * anchors + judged) * anchor_tokens + settings.num_rows * (
        rest_frames * _TOKENS_PER_FRAME + _TOKENS_PER_TEXT
    )
    disk = sum(Path(path).stat().st_size for path in {clip.path for clip in clips})
    free = shutil.disk_usage(args.output.resolve().parent).free
    return "\n".join(
        [
            f"clips             {len(clips)} of {mean_seconds:.1f} s on average",
            f"rows              {settings.num_rows}, {settings.min_clips} to {settings.max_clips} clips each",
            f"model calls       {2 * anchors + settings.num_rows + judged}: {anchors} questions, {anchors} answers "
            f"from anchors, {settings.num_rows} from the others, {judged} verdicts",
            f"tokens            about {tokens / 1e6:.1f} million, at {_TOKENS_PER_FRAME} per frame",
            f"disk              {disk / 1e9:.2f} GB of clips, once more in the dataset; {free / 1e9:.0f} GB free",
            "This assumes that no row is dropped; each dropped row costs its calls again.",
        ]
    )


def print_funnel(counts: dict[str, dict[str, int]]) -> None:
    """Shows what came through each stage, and what was dropped for which reason."""
    for title, numbers in counts.items():
        print(title)
        for name, number in numbers.items():
            print(f"  {number:>8} {name}")


if __name__ == "__main__":
    main()
