"""Options of the builders that are no settings of a method: corpus, captions, models, output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt

from longvpo_hf.artifacts import locked
from longvpo_hf.commands.cli import decoded, named_files
from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import Bounds
from longvpo_hf.funnel import Funnel, log_folder
from longvpo_hf.intake import CORPORA, CuttingSettings, IntakeLimits
from longvpo_hf.intake.media import MediaSettings
from longvpo_hf.paths import shared_cache
from longvpo_hf.public import is_hub_name

if TYPE_CHECKING:
    from longvpo_hf.building.executors import Executor

    Corpus = str
else:
    Corpus = Literal[CORPORA]

#: Frames that a model sees of a clip: InternVL's tile of 448 × 448; the paper samples clips at 1 fps, ≤ 64 frames.
MAX_PIXELS, FPS, FRAMES = 448 * 448, 1.0, 64

ROWS, VIDEOS, CAPTIONS, MODELS, OUTPUT, MACHINES, BOUNDS = (
    Group("Rows", sort_key=0),
    Group("Videos", sort_key=1),
    Group("Captions of scenes", sort_key=2),
    Group(
        "Models",
        sort_key=3,
        help="A model is a name or path, `endpoint`, `endpoint:MODEL`, or `scripted`, which rehearses a run.",
    ),
    Group("Output", sort_key=4),
    Group("Machines", sort_key=5, help="Whoever works, the rows are the same: see docs/scaling.md."),
    Group(
        "Bounds",
        sort_key=6,
        help="What a corpus may ask of this machine. What exceeds one is dropped by name; raise it if you trust it.",
    ),
)


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """Where videos come from.

    Args:
        corpus: Which corpus the videos are from.
        source: Folder of the corpus.
        benchmark_videos: NAME=FILE: a benchmark's video ids or sha256, one a line; its videos are dropped. May be given
            several times.
    """

    corpus: Corpus | None = None
    source: Path | None = None
    benchmark_videos: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named_files("benchmark-videos", self.benchmark_videos)


@dataclass(frozen=True, slots=True)
class SceneSettings:
    """How videos become timelines of captioned scenes.

    Args:
        captions: `corpus`: those that the corpus has. A folder that an earlier run wrote (`<output>.scenes`): its
            videos and captions, and no corpus is read. None: the captioner writes them.
        max_scenes: Longer videos become several timelines of consecutive scenes. None: as --frame-budget, one frame for
            each scene.
        frame_budget: Training frames of a row (paper: 128).
    """

    captions: str | None = None
    max_scenes: PositiveInt | None = None
    frame_budget: PositiveInt = 128

    @property
    def folder(self) -> Path | None:
        """The folder of captions that are there already, if one is given."""
        return Path(self.captions) if self.captions not in (None, "corpus") else None


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How models are asked, whatever their role.

    Args:
        base_url: Address of the endpoint, e.g. http://localhost:8000/v1.
        model: Name of the endpoint's model.
        api_key_env: Variable that holds the endpoint's key. None: only api.openai.com (OPENAI_API_KEY) and
            router.huggingface.co (HF_TOKEN) get one.
        plain_http_key: Send the key to another machine without encryption: for trusted networks.
        patience_seconds: How long an endpoint that does not answer is asked again before the run stops; the same
            command goes on.
        drop_unanswered: Drop what the endpoint answers not once in --patience-seconds while it answers other requests.
            Else the run stops there, and the third one that does goes on without it.
        concurrency: Requests under way at the endpoint at once.
        batch_size: Requests per batch of a model of this machine.
        max_new_tokens: Of an answer or a caption, with the reasoning before it: models that reason need thousands.
            Answers that do not end within it are dropped.
        device: Where models of this machine run. None: cuda where there is one, else cpu.
        decoding: How models answer, those of this machine and the endpoint's.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    plain_http_key: bool = False
    patience_seconds: NonNegativeFloat = 900.0
    drop_unanswered: bool = False
    concurrency: PositiveInt = 8
    batch_size: PositiveInt = 8
    max_new_tokens: PositiveInt = 256
    device: str | None = None
    decoding: Annotated[Decoding, decoded(MODELS)] = GREEDY

    def check(self, names: Iterable[str | None]) -> None:
        """Refuses an endpoint among the models without what it needs, and what it needs where none of them is one."""
        names = list(names)
        endpoints = [name for name in names if name and name.partition(":")[0] == "endpoint"]
        if endpoints and not self.base_url:
            raise ConfigError(f"The model {endpoints[0]} needs --base-url, e.g. http://localhost:8000/v1")
        unnamed = [name for name in endpoints if not name.partition(":")[2].strip()]
        if unnamed and not self.model:
            raise ConfigError(f"The model {unnamed[0]} needs --model, or write endpoint:MODEL")
        if endpoints or "scripted" in names:  # a rehearsal may keep the options of the run
            return
        for option in ("base_url", "model", "api_key_env", "plain_http_key", "drop_unanswered"):
            if getattr(self, option):
                raise ConfigError(
                    f"--{option.replace('_', '-')} is about an endpoint, and no model is one: write `endpoint` in "
                    "place of the model that it answers for, or leave the option out."
                )


@dataclass(frozen=True, slots=True)
class JudgeSettings(ModelSettings):
    """How models are asked where one of them may judge.

    Args:
        judge_yes_from: Read the judge by the probability of its yes against its no: yes from this one on, e.g. 0.5. For
            small models, whose words are often the same whatever they are asked. None: by its words.
    """

    judge_yes_from: float | None = None

    def __post_init__(self) -> None:
        if self.judge_yes_from is not None and not 0 < self.judge_yes_from < 1:
            raise ConfigError(f"--judge-yes-from must be in (0, 1), got {self.judge_yes_from}, e.g. 0.5")


@dataclass(frozen=True, slots=True)
class WriterSettings(JudgeSettings):
    """How models are asked where one of them writes questions from captions.

    Args:
        writer_max_new_tokens: Of a question with its answer and reasoning, a summary or a verdict.
    """

    writer_max_new_tokens: PositiveInt = 512


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """Where rows go.

    Args:
        output: Folder of the dataset.
        media: `embed` publishes the clips; `reference` publishes rows only, for corpora that may not be redistributed.
        cache: Folder of cut clips and of what is known about sources, shared by all builds. None: longvpo in the cache
            of Hugging Face ($HF_HOME).
        preview: Add a column `preview`, the first clip that holds the answer: the Hub's viewer plays it. The clips of a
            row, which are in a list, it does not show.
        num_workers: Processes that cut clips; 0 cuts in this one. With --executor processes or ray, those that do all
            of the work.
        dry_run: Estimate calls, tokens and disk; ask no model.
        push_to_hub: NAMESPACE/NAME of a dataset on the Hub to push to. None: nothing is pushed.
        private: Whether a dataset that is new there is private. None: as the namespace's setting has it.
        revision: Branch to push to. None: main.
    """

    output: Path
    media: Literal["embed", "reference"] = "embed"
    cache: Path | None = None
    preview: bool = False
    num_workers: NonNegativeInt = 0
    dry_run: bool = False
    push_to_hub: str | None = None
    private: bool | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.push_to_hub is None and (self.private is not None or self.revision is not None):
            raise ConfigError("--private and --revision are about a push: name the dataset with --push-to-hub.")
        if self.preview and self.media == "reference":
            raise ConfigError("--preview shows clips, and --media reference leaves them out: choose one of them.")

    @property
    def log(self) -> Path:
        """Where the run logs. A dry run has a log of its own: that of the rows that are there stays."""
        return log_folder(self.beside(".dry-run") if self.dry_run else self.output)

    @property
    def media_folder(self) -> Path:
        """Where what is extracted and embedded is kept, for this run and for one that resumes it."""
        return self.beside(".media")

    @property
    def cache_folder(self) -> Path:
        """Where cut clips are, and what is known about sources: both follow from content alone."""
        return self.cache or shared_cache()

    def check(self, source: Path | None) -> None:
        """Makes sure, before any work, that the rows can be written and pushed where they should go.

        Args:
            source: Folder of the corpus.

        Raises:
            ConfigError: If they would lie among the videos, or the dataset's name is not a valid one on the Hub.
            DatasetError: If they cannot.
        """
        from longvpo_hf.publishing.dataset import check_folder

        for option, folder in (("output", self.output), ("cache", self.cache_folder)):
            if source is not None and source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
                raise ConfigError(
                    f"--{option} {folder} lies within --source {source}: the clips that are cut there would be taken "
                    "for more videos. Name a folder elsewhere."
                )
        check_folder(self.output)
        if self.push_to_hub is None:
            return
        if not is_hub_name(self.push_to_hub):
            raise ConfigError(f"--push-to-hub must be NAMESPACE/NAME, got {self.push_to_hub!r}.")
        if not self.dry_run:
            from longvpo_hf.hub import go_offline_if_unreachable
            from longvpo_hf.publishing.dataset import prepare_push

            go_offline_if_unreachable([""])
            prepare_push(self.push_to_hub, private=self.private, revision=self.revision)

    @contextmanager
    def opened(self, executor: Executor) -> Iterator[Funnel]:
        """The run's log, while no other run may write the output, nor cut or caption for it; shards of one build may.

        Raises:
            artifacts.Locked: At once, if another run does.
        """
        from longvpo_hf.building.executors import Unfinished

        place = executor.place(self.output)
        with locked(place):  # before the log is opened: that of the other run stays
            try:
                yield Funnel(self.log if self.dry_run else log_folder(place))
            except Unfinished as error:
                if executor.joins:
                    raise
                print(f"{str(executor).capitalize()} has done its part. {error}")

    def beside(self, suffix: str) -> Path:
        """A folder next to the output's."""
        return self.output.with_name(self.output.name + suffix)


@dataclass(frozen=True, slots=True)
class WorkSettings:
    """Who makes the rows.

    Args:
        executor: `local`: this process. `processes`: --num-workers processes of this machine, each with --concurrency
            requests under way; for endpoints. `ray`: workers of a Ray cluster (extra `ray`), one on each GPU where a
            model is loaded, else one on each CPU, or --num-workers. All machines see --source, --output and --cache.
        address: Of the Ray cluster; `auto` is the one that this machine is in. None: one of this machine alone.
        num_shards: Runs of this command that share the work, on one machine or many, e.g. of a scheduler's array. All
            of them see --output and --cache.
        shard: Which of them this is, from 0. It writes no dataset.
        merge: Write the dataset of what the shards have made, or name what is missing.
    """

    executor: Literal["local", "processes", "ray"] = "local"
    address: str | None = None
    num_shards: PositiveInt | None = None
    shard: NonNegativeInt | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        if (self.num_shards is None) != (self.shard is None) and not self.merge:
            raise ConfigError("--num-shards and --shard belong together: how many runs there are, and which one it is.")
        if self.merge and self.shard is not None:
            raise ConfigError("--merge writes what all shards have made: leave out --shard.")
        if self.executor != "local" and (self.merge or self.shard is not None):
            raise ConfigError(f"--executor {self.executor} starts its own workers: leave out --shard and --merge.")
        if self.address is not None and self.executor != "ray":
            raise ConfigError("--address is that of a Ray cluster: add --executor ray.")

    def made(self, num_workers: int, names: Iterable[str | None]) -> Executor:
        """The executor.

        Args:
            num_workers: Processes of this machine.
            names: Of the models; None is left alone.

        Raises:
            ConfigError: If it cannot run these models.
        """
        from longvpo_hf.building.executors import HERE, Merge, Processes, Shard

        if self.merge:
            return Merge()
        if self.shard is not None and self.num_shards is not None:
            return Shard(self.shard, self.num_shards)
        if self.executor == "local":
            return HERE
        local = [name for name in names if name and not is_asked_elsewhere(name)]
        if self.executor == "ray":
            from longvpo_hf.building.cluster import Cluster

            return Cluster(self.address, num_workers, needs_gpu=bool(local))
        if local:
            raise ConfigError(
                f"--executor processes would load {local[0]} once in each process: use an endpoint, or a shard for "
                "each GPU (CUDA_VISIBLE_DEVICES)."
            )
        if num_workers < 1:
            raise ConfigError(f"--executor processes needs --num-workers ≥ 1, got {num_workers}.")
        return Processes(num_workers)


def is_asked_elsewhere(name: str) -> bool:
    """Whether a name stands for something other than a model that is loaded here."""
    return name in ("none", "scripted") or name.partition(":")[0] == "endpoint"


@dataclass(frozen=True, slots=True)
class Videos:
    """All that decides which clips a run has."""

    corpus: CorpusSettings
    cutting: CuttingSettings
    media: MediaSettings
    output: OutputSettings
    limits: IntakeLimits
    bounds: Bounds

    @property
    def roots(self) -> list[Path]:
        """Where the videos of captions that are there may be, besides their own build's folders."""
        return [root for root in (self.corpus.source, self.output.cache) if root is not None]
