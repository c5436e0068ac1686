"""What the scripts of this folder share: their options, the way from a corpus to cut clips, models, and the end.

Knows nothing of any one recipe.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from longvpo_hf.building.captioning import CaptioningSettings, caption_videos
from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.captions import CaptionedVideo, read_captions, read_facts
from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import FrameSampler
from longvpo_hf.funnel import Dropped, Funnel, log_folder
from longvpo_hf.intake import CORPORA, BenchmarkVideos, CuttingSettings, Source, clips_of, read_corpus
from longvpo_hf.intake.media import MediaSettings, cut_clips
from longvpo_hf.paths import shared_cache
from longvpo_hf.publishing.dataset import push_dataset
from longvpo_hf.responders import EndpointResponder, LocalResponder, Responder
from longvpo_hf.responders.chat import key_variable
from longvpo_hf.timeline import Clip, Timeline

#: A frame of a model that is asked: InternVL's tile of 448 × 448; the paper samples clips at 1 fps, at most 64 frames.
MAX_PIXELS, FPS, FRAMES = 448 * 448, 1.0, 64
#: Rough sizes for --dry-run: visual tokens of a frame of 448 × 448 in InternVL, and of a question with its answer.
TOKENS_PER_FRAME, TOKENS_PER_TEXT = 256, 200


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's own docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_videos(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Options that say where videos come from and how they are cut."""
    source = parser.add_argument_group("videos")
    source.add_argument("--corpus", required=required, choices=CORPORA)
    source.add_argument("--source", required=required, type=Path, help="Folder the corpus lies in.")
    source.add_argument("--cutting", choices=["scenes", "windows"], default="scenes",
                        help="How videos are cut whose corpus names no scenes.")  # fmt: skip
    source.add_argument("--min-clip-seconds", type=float, default=CuttingSettings().min_clip_seconds,
                        help="Shorter scenes are joined to their neighbours.")  # fmt: skip
    source.add_argument("--max-clip-seconds", type=float, default=CuttingSettings().max_clip_seconds,
                        help="Longer scenes are cut into equal parts.")  # fmt: skip
    source.add_argument("--max-height", type=int, default=MediaSettings().max_height, help="Of the cut clips, pixels.")
    source.add_argument("--benchmark-videos", action="append", default=[], metavar="NAME=FILE",
                        help="A benchmark's video ids or sha256, one a line: its videos are dropped.")  # fmt: skip


def add_captions(parser: argparse.ArgumentParser) -> None:
    """Options that say how scenes are captioned."""
    captions = parser.add_argument_group("captions of scenes")
    captions.add_argument("--captions", metavar="FOLDER", help="`corpus`: those the corpus has. A folder that an "
                          "earlier run wrote (`<output>.scenes`): its videos and captions, no corpus is read. "
                          "Default: the responder writes them.")  # fmt: skip
    captions.add_argument("--max-scenes", type=int, help="Longer videos become several timelines of consecutive "
                          "scenes. Default: --frame-budget, one frame for each scene.")  # fmt: skip
    captions.add_argument("--max-history-characters", type=int, default=CaptioningSettings().max_history_characters,
                          help="Of captions and summaries before a scene, when it is captioned.")  # fmt: skip
    captions.add_argument("--writer-max-new-tokens", type=int, default=512,
                          help="Of a question with its answer and reasoning, a summary or a verdict.")  # fmt: skip


def add_models(parser: argparse.ArgumentParser, roles: dict[str, tuple[Sequence[str], str]]) -> None:
    """Options that say who does what.

    Args:
        parser: Gets them.
        roles: Per role its flags and help; `--responder` comes first.
    """
    models = parser.add_argument_group("models: a name or path, `endpoint`, `endpoint:MODEL`, or `scripted`")
    for role, (flags, text) in roles.items():
        models.add_argument(*flags, dest=role, help=text)
    models.add_argument("--base-url", help="Address of the endpoint, e.g. http://localhost:8000/v1.")
    models.add_argument("--model", help="Name of the endpoint's model.")
    models.add_argument("--api-key-env", metavar="NAME", help="Variable that holds the endpoint's key. Without it "
                        "only api.openai.com (OPENAI_API_KEY), router.huggingface.co (HF_TOKEN) get one.")  # fmt: skip
    models.add_argument("--plain-http-key", action="store_true",
                        help="Send the key to another machine without encryption: for trusted networks.")  # fmt: skip
    models.add_argument("--patience-seconds", type=float, default=900.0, help="How long an endpoint that does not "
                        "answer is asked again before the run stops; the same command goes on.")  # fmt: skip
    models.add_argument("--concurrency", type=int, default=8, help="Requests under way at the endpoint at once.")
    models.add_argument("--batch-size", type=int, default=8, help="Requests per batch of a model of this machine.")
    models.add_argument("--max-new-tokens", type=int, default=256,
                        help="Of an answer or a caption. Answers that do not end within it are dropped.")  # fmt: skip
    models.add_argument("--device", default=None, help="Default: cuda where there is one, else cpu.")


def add_output(parser: argparse.ArgumentParser, rows: Any) -> None:
    """Options that say where rows go; `rows` is the group the script's own stand in."""
    rows.add_argument("--seed", type=int, default=0)
    rows.add_argument("--output", required=True, type=Path)
    rows.add_argument("--media", choices=["embed", "reference"], default="embed",
                      help="`reference` publishes rows only, for corpora that may not be redistributed.")  # fmt: skip
    rows.add_argument("--cache", type=Path, metavar="FOLDER", help="Cut clips and what is known of sources, for all "
                      "builds. Default: longvpo in the cache of Hugging Face ($HF_HOME).")  # fmt: skip
    rows.add_argument("--num-workers", type=int, default=0, help="Processes that cut clips; 0 cuts in this one.")
    rows.add_argument("--dry-run", action="store_true", help="Estimate calls, tokens and disk; ask no model.")
    rows.add_argument("--push-to-hub", metavar="NAMESPACE/NAME")


def check_models(parser: argparse.ArgumentParser, names: Iterable[str | None], args: argparse.Namespace) -> None:
    """Ends with a message where an endpoint is named without what it needs."""
    endpoints = [name for name in names if name and name.partition(":")[0] == "endpoint"]
    if endpoints and not args.base_url:
        parser.error("--responder endpoint needs --base-url, e.g. http://localhost:8000/v1")
    if "endpoint" in endpoints and not args.model:
        parser.error("--responder endpoint needs --model, or write endpoint:MODEL")


def read_videos(args: argparse.Namespace, funnel: Funnel) -> tuple[list[Timeline], dict[str, object]]:
    """Reads the corpus and cuts its videos: each the timeline of its clips. Files already cut are not cut again, also
    if another build of the corpus cut them."""
    lists = dict(item.split("=", 1) for item in args.benchmark_videos)
    benchmarks = BenchmarkVideos.from_files({name: Path(path) for name, path in lists.items()}) if lists else None
    cutting = CuttingSettings(args.min_clip_seconds, args.max_clip_seconds, args.cutting)
    work = media_folder(args)
    origins: list[str] = []

    def sources() -> Iterator[Source | Dropped]:
        for source in read_corpus(args.corpus, args.source, work / "extracted"):
            funnel.count("sources")
            yield source

    def spans() -> Iterator[Clip | Dropped]:
        for span in clips_of(sources(), cutting, benchmarks, cache=cache_folder(args)):
            origins.append(span.path)  # a cut clip no longer names its video
            yield span

    clips: Iterable[Clip | Dropped] = spans()
    if args.media == "embed":
        clips = cut_clips(clips, cache_folder(args), MediaSettings(args.max_height), args.num_workers)
    videos: dict[str, list[Clip]] = {}
    for index, item in enumerate(tqdm(clips, desc="clips", unit="clip")):
        if isinstance(item, Dropped):
            funnel.drop(item.reason, path=item.path, source_id=item.source_id, detail=item.detail)
        else:
            videos.setdefault(origins[index], []).append(item)
    if not videos:
        raise ConfigError(f"no clip came out of {args.source}; see {_log(args) / 'dropped.jsonl'} for why.")
    return [Timeline(tuple(members)) for members in videos.values()], {
        "corpus": args.corpus,
        "clips cut by": cutting.described(),
        "benchmarks": benchmarks.checked() if benchmarks else "no list of benchmark videos was given: not checked",
    }


def scenes_of(args: argparse.Namespace, funnel: Funnel) -> tuple[list[Timeline], dict[str, object]]:
    """Videos as timelines of at most `--max-scenes` scenes, from the corpus or from captions that are there."""
    if args.captions and args.captions != "corpus":
        folder = Path(args.captions)
        return [video.timeline for video in read_captions(folder, *video_roots(args))], {"captions": folder.name}
    videos, facts = read_videos(args, funnel)
    most = args.max_scenes or args.frame_budget
    return [part for video in videos for part in video.parts(most)], {**facts, "scenes per timeline, at most": most}


def captioned(
    args: argparse.Namespace,
    videos: Sequence[Timeline],
    models: Models,
    captioner: str,
    summariser: str,
    funnel: Funnel,
) -> tuple[list[CaptionedVideo], dict[str, object]]:
    """The videos with captions: those of a folder, the corpus' own, or new ones, kept in `<output>.scenes`."""
    if args.captions == "corpus":
        return [CaptionedVideo(video) for video in videos], {"captions by": "the corpus"}
    if args.captions:
        facts = read_facts(Path(args.captions))
        return read_captions(Path(args.captions), *video_roots(args)), {"captions by": facts["captioner"]}
    settings = CaptioningSettings(max_history_characters=args.max_history_characters)
    folder = args.output.with_name(args.output.name + ".scenes")
    seeing, reading = models.seeing(captioner), models.reading(summariser)
    return caption_videos(videos, seeing, reading, folder, settings, funnel), {"captions by": seeing.name}


def open_log(args: argparse.Namespace) -> Funnel:
    """The run's log. A dry run has one of its own: that of the rows that are there stays."""
    return Funnel(_log(args))


def _log(args: argparse.Namespace) -> Path:
    output: Path = args.output
    return log_folder(output.with_name(f"{output.name}.dry-run") if args.dry_run else output)


def cache_folder(args: argparse.Namespace) -> Path:
    """Where cut clips are, and what is known of sources: shared by all builds, since both follow from content."""
    return args.cache or shared_cache()


def video_roots(args: argparse.Namespace) -> list[Path]:
    """Where the videos of captions that are there may be, besides their own build's folders."""
    return [root for root in (args.source, args.cache) if root is not None]


def media_folder(args: argparse.Namespace) -> Path:
    """Where what is extracted and embedded lies, for this run and its resumption."""
    return args.output.with_name(args.output.name + ".media")


def media_root(clips: Iterable[Clip], args: argparse.Namespace) -> Path | None:
    """With `--media reference`, the folder that rows name their files below: the corpus, or what was extracted of its
    archives. The names of extracted files follow from their content, so whoever extracts the same corpus has the same.
    """
    if args.media == "embed":
        return None
    if args.source is None:
        raise ConfigError("--media reference needs --source: the folder below which rows name their files.")
    paths = {Path(clip.path).resolve() for clip in clips}
    for root in (args.source, media_folder(args) / "extracted"):
        if all(path.is_relative_to(root.resolve()) for path in paths):
            return root
    raise ConfigError(
        f"--media reference: some clips lie in {args.source}, others were extracted from archives, so that rows cannot "
        "name them below one folder. Unpack the archives into the corpus' folder first."
    )


def device_of(args: argparse.Namespace) -> str:
    """Where models of this machine run."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


class Models:
    """The models of a run: each loaded once, however many roles it has.

    Args:
        args: The command line.
        num_frames: Most frames one call is shown.
    """

    def __init__(self, args: argparse.Namespace, num_frames: int) -> None:
        self._args = args
        self._sampler = FrameSampler(max(FRAMES, num_frames), fps=FPS, max_pixels=MAX_PIXELS)
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._made: dict[tuple[str, int], Responder] = {}

    def seeing(self, name: str) -> Responder:
        """The model that is shown frames: answers, captions."""
        return self._responder(name, self._args.max_new_tokens)

    def reading(self, name: str) -> Responder:
        """The model that reads captions: writes questions, sums up, judges. May be a language model."""
        return self._responder(name, self._args.writer_max_new_tokens)

    def _responder(self, name: str, max_new_tokens: int) -> Responder:
        key = (name, max_new_tokens)
        if key not in self._made:
            self._made[key] = self._make(name, max_new_tokens)
        return self._made[key]

    def _make(self, name: str, max_new_tokens: int) -> Responder:
        args = self._args
        if name == "scripted":
            return rehearsal()
        kind, _, model = name.partition(":")
        if kind == "endpoint":
            return EndpointResponder(
                model or args.model, args.base_url, self._sampler, max_tokens=max_new_tokens,
                concurrency=args.concurrency, seed=args.seed, api_key=_api_key(args),
                patience_seconds=args.patience_seconds, plain_http_key=args.plain_http_key,
            )  # fmt: skip
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        from transformers.utils.peft_utils import find_adapter_config_file

        from longvpo_hf.responders.checkpoint import load_checkpoint
        from longvpo_hf.responders.text import TextResponder

        adapted = find_adapter_config_file(name) is not None
        sees = adapted or type(AutoConfig.from_pretrained(name)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if name not in self._loaded:
            if adapted:  # of a recipe's own training; merged in the base's own type, where the recipes merge in float32
                model, processor = load_checkpoint(name, torch.device(device_of(args)))
                loaded = model.merge_and_unload()
                loaded.config.name_or_path = name
            else:
                auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
                loaded = auto.from_pretrained(name, dtype="auto").eval().to(device_of(args))
                processor = AutoProcessor.from_pretrained(name)
            self._loaded[name] = (loaded, processor)
        loaded, processor = self._loaded[name]
        if not sees:
            return TextResponder(loaded, processor, max_new_tokens, args.batch_size)
        return LocalResponder(loaded, processor, self._sampler, max_new_tokens, args.batch_size)


def _api_key(args: argparse.Namespace) -> str | None:
    """The endpoint's key: of the variable that was named, or that belongs to the address."""
    variable = args.api_key_env or key_variable(args.base_url)
    return os.environ.get(variable) or None if variable else None


def disk_lines(clips: Iterable[Clip], args: argparse.Namespace) -> list[str]:
    """Lines of an estimate: what the clips take on disk."""
    disk = sum(Path(path).stat().st_size for path in {clip.path for clip in clips})
    free = shutil.disk_usage(args.output.resolve().parent).free
    return [
        f"disk              {disk / 1e9:.2f} GB of clips, once more in the dataset; {free / 1e9:.0f} GB free",
        "This assumes that no row is dropped; each dropped row costs its calls again.",
    ]


def estimate_over_scenes(
    videos: Sequence[Timeline], args: argparse.Namespace, num_rows: int, shown: str, judgements: int
) -> str:
    """What a run over captioned videos would cost: captions, questions, two answers a row, verdicts.

    Args:
        videos: The timelines.
        args: The command line.
        num_rows: Rows asked for.
        shown: What the answers are given from, in words.
        judgements: Verdicts per row.
    """
    scenes = sum(len(video) for video in videos)
    seconds = sum(video.duration_seconds for video in videos)
    captions = 0 if args.captions else scenes
    frames_of_scene = min(FRAMES, max(1.0, seconds / scenes * FPS))
    frames_of_video = min(args.frame_budget, max(1.0, seconds / len(videos) * FPS))
    tokens = captions * (frames_of_scene * TOKENS_PER_FRAME + TOKENS_PER_TEXT)
    tokens += num_rows * 2 * (frames_of_video * TOKENS_PER_FRAME + TOKENS_PER_TEXT)
    tokens += num_rows * (1 + judgements) * (scenes / len(videos) + 1) * TOKENS_PER_TEXT
    calls = captions + num_rows * (3 + judgements)
    return "\n".join(
        [
            f"videos            {len(videos)} timelines of {scenes / len(videos):.1f} scenes, "
            f"{seconds / scenes:.1f} s each on average",
            f"rows              {num_rows}",
            f"model calls       {calls}: {captions} captions (and at most as many summaries), {num_rows} questions, "
            f"{2 * num_rows} answers from {shown}, {judgements * num_rows} verdicts",
            f"tokens            at most about {tokens / 1e6:.1f} million, at {TOKENS_PER_FRAME} per frame",
            *disk_lines((clip for video in videos for clip in video.clips), args),
        ]
    )


def finish(counts: dict[str, dict[str, int]], args: argparse.Namespace) -> None:
    """Shows what came through each stage and what was dropped for which reason; pushes if that was asked for."""
    for title, numbers in counts.items():
        print(title)
        for name, number in numbers.items():
            print(f"  {number:>8} {name}")
    print(f"{counts['stages']['rows']} rows in {args.output}; look at them with: longvpo inspect {args.output}")
    if args.push_to_hub:
        commit = push_dataset(args.output, args.push_to_hub)
        print(f'pushed: load_dataset("{args.push_to_hub}", revision="{commit}")')
