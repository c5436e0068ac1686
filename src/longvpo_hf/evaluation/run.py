"""One evaluation: models × numbers of frames × suites, through lmms-eval.

The data are looked for before a model is loaded; scores and all answers are written into a folder. Answers are kept as
they come, so the same call continues an interrupted one.

Scores of one model at one number of frames, all in percent:

    {"model": str, "stage": str | None, "num_frames": int, "fps": float | None, "max_pixels": int | None,
     "max_new_tokens": {suite: int} (those that were set), "decoding": the fields of `Decoding`,
     "limit": int | None, "published": str | None,
     "tasks": {suite: see `scoring.summary`, and "protocol": {parser: see `Protocol`}},
     "baselines": {what was shown: the same as "tasks"}}
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.artifacts import whole_file
from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError, check_types
from longvpo_hf.evaluation import scoring
from longvpo_hf.evaluation.preflight import check
from longvpo_hf.evaluation.protocol import BASELINES, THE_VIDEO, Protocol, Published, Shown, protocols_of
from longvpo_hf.evaluation.results import add_to_checkpoint, stem_of, table_runs, write_results
from longvpo_hf.evaluation.sampling import trained_sampling
from longvpo_hf.evaluation.serving import Server
from longvpo_hf.evaluation.suite import DATA_ROOT_VARIABLE, Suite
from longvpo_hf.evaluation.task_files import task_names, tasks_folder
from longvpo_hf.families import check_kind
from longvpo_hf.frames import whole_clip
from longvpo_hf.public import public_name
from longvpo_hf.record import Sampling
from longvpo_hf.responders import Request
from longvpo_hf.responders.checkpoint import check_checkpoint
from longvpo_hf.timeline import Timeline

if TYPE_CHECKING:
    from longvpo_hf.evaluation.adapter import LongVPO


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model to be evaluated.

    Args:
        checkpoint: Folder or name on the Hub.
        stage: What it is called in the table, e.g. `base`, `stage1`; None for its own name.
    """

    checkpoint: str
    stage: str | None = None

    @classmethod
    def of(cls, text: str) -> Contestant:
        """Reads `CHECKPOINT` or `STAGE=CHECKPOINT`; a folder that is there may have an equals sign in its name."""
        match = None if Path(text).is_dir() else re.fullmatch(r"([\w.-]+)=(.+)", text)
        return cls(match[2], match[1]) if match else cls(text)

    @property
    def label(self) -> str:
        """What it is called in tables and files."""
        return self.stage or public_name(self.checkpoint)


@dataclass(frozen=True, slots=True)
class Settings:
    """How models are asked.

    Args:
        frames: Numbers of frames, each once; by default the one each model was trained with.
        fps: At most so many frames per second, "none" for no bound; by default as the model was trained, or as the
            others were, if its record does not say it.
        max_pixels: At most so many pixels per frame; by default like `fps`.
        batch_size: Questions per call of the model.
        limit: Only the first so many questions of each task; the scores then mean little.
        max_new_tokens: Bounds on answers by suite; for others see `LongVPO`.
        published: A published protocol, whose settings stand in for those that are not given.
        baselines: Whether the same questions are also asked without the video, with one frame and with its frames in
            another order.
        decoding: How answers are decoded.
        repeats: How often every question is asked; sampled answers are drawn with another seed each time.
        mixed_protocols: Whether models may stand side by side that were not measured alike.
        server: Where the models are served; None for models of this process.
    """

    frames: Sequence[int] = ()
    fps: float | str | None = None
    max_pixels: int | None = None
    batch_size: int = 1
    limit: int | None = None
    max_new_tokens: Mapping[str, int] = field(default_factory=dict)
    published: Published | None = None
    baselines: bool = False
    decoding: Decoding = GREEDY
    repeats: int = 1
    mixed_protocols: bool = False
    server: Server | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch_size", "limit", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {value}.")
        if any(type(number) is not int or number < 1 for number in self.frames):
            raise ConfigError(f"frames must be whole numbers ≥ 1, got {self.frames!r}.")
        if self.fps not in (None, "none") and not _is_rate(self.fps):
            raise ConfigError(f"fps must be a number > 0, or 'none' for no bound, got {self.fps!r}.")
        if self.repeats < 1 or (self.repeats > 1 and not self.decoding.temperature):
            raise ConfigError(
                f"repeats must be ≥ 1, and greedy answers are the same each time, got {self.repeats}: set a "
                "temperature > 0, or leave repeats out."
            )

    def completed(self, asked: Sequence[Suite]) -> Settings:
        """With the published protocol's settings where none are given."""
        if self.published is None:
            return self
        said = self.published.setting
        most = said("max_new_tokens")
        bounds = {} if most is None else dict.fromkeys([suite.name for suite in asked], most)
        return replace(
            self,
            frames=self.frames or ([] if said("num_frames") is None else [said("num_frames")]),
            fps=said("fps") if self.fps is None else self.fps,
            max_pixels=said("max_pixels") if self.max_pixels is None else self.max_pixels,
            max_new_tokens={**bounds, **self.max_new_tokens},
        )

    def samplings(self, trained: Sampling) -> list[Sampling]:
        """How a model sees videos, for each number of frames."""
        fps, max_pixels = trained.fps, trained.max_pixels
        if self.fps is not None:
            fps = None if self.fps == "none" else float(self.fps)
        if self.max_pixels is not None:
            max_pixels = self.max_pixels
        return [Sampling(number, fps, max_pixels) for number in dict.fromkeys(self.frames or [trained.num_frames])]


def evaluate(
    contestants: Sequence[Contestant],
    asked: Sequence[Suite],
    root: Path,
    output: Path,
    settings: Settings | None = None,
) -> list[dict[str, Any]]:
    """Evaluates, and writes scores, tables, a section for the model card and all answers into `output`.

    Files: see `results.write_results`, and `answers/<label>-<frames>/` with a line for each question; `cache/` keeps
    what lets an interrupted evaluation go on.

    Args:
        contestants: The models, of different labels.
        asked: What they are asked.
        root: See `suite.py`.
        output: Folder of the results.
        settings: How.

    Returns:
        Scores as the module says, one for each model and number of frames; nothing on all processes but the first.

    Raises:
        longvpo_hf.evaluation.preflight.NotReady: If data are missing.
        ModelError: If a model is missing or not whole.
        ConfigError: If two models have one label, were not measured alike, or the frames are none.
    """
    settings = (settings or Settings()).completed(asked)
    stems = {stem_of(contestant.label, 0) for contestant in contestants}
    if len(stems) < len(contestants):
        labels = [contestant.label for contestant in contestants]
        raise ConfigError(f"Models of one name cannot be told apart in a table, got {labels}; write STAGE=MODEL.")
    trained = [trained_sampling(contestant.checkpoint) for contestant in contestants]
    default = next((sampling for sampling in trained if sampling), Sampling())
    plans = [settings.samplings(sampling or default) for sampling in trained]
    alike = _Alike(settings.mixed_protocols)
    for contestant, samplings in zip(contestants, plans, strict=True):
        for sampling in samplings:
            alike.frames(contestant.label, sampling)
    for contestant in contestants if settings.server is None else ():
        check_checkpoint(contestant.checkpoint)
        check_kind(contestant.checkpoint)
    check(asked, root)
    results: list[dict[str, Any]] = []
    with _process_of_its_own(root):
        for contestant, samplings in zip(contestants, plans, strict=True):
            results += _evaluate_one(contestant, samplings, asked, root, output, settings, alike)
            if results:
                write_results(results, output, settings.mixed_protocols)
                if not settings.limit:
                    mine = [run for run in table_runs(results, output) if run.stage == contestant.label]
                    try:
                        add_to_checkpoint(contestant.checkpoint, mine)
                    except OSError as error:  # a folder that only others may write to: the results are in `output` too
                        print(f"{contestant.label}: its record cannot be given the results: {error}", file=sys.stderr)
    return results


@contextmanager
def _process_of_its_own(root: Path) -> Iterator[None]:
    """Within, lmms-eval finds the data and its own earlier answers; after it, what it sets and seeds is as it was."""
    import numpy as np
    import torch

    variables, generators = dict(os.environ), (random.getstate(), np.random.get_state())
    os.environ[DATA_ROOT_VARIABLE] = str(root.resolve())
    # Else lmms-eval gives every run a new name, under which it does not find what an interrupted one kept.
    os.environ.setdefault("LMMS_CACHE_RUN_ID", "longvpo")
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        os.environ.clear()
        os.environ.update(variables)


def _is_rate(value: Any) -> bool:
    try:
        return 0 < float(value) < math.inf
    except (TypeError, ValueError):
        return False


class _Alike:
    """Refuses a model that is not measured as the ones before it were, before it answers anything.

    Args:
        mixed: Whether nothing is refused.
    """

    def __init__(self, mixed: bool) -> None:
        self._mixed = mixed
        self._samplings: dict[int, tuple[str, Sampling]] = {}
        self._protocols: dict[tuple[int, str], tuple[str, Protocol]] = {}

    def frames(self, label: str, sampling: Sampling) -> None:
        """Raises a ConfigError where a model sees videos in another way than one before it."""
        other, first = self._samplings.setdefault(sampling.num_frames, (label, sampling))
        if first != sampling and not self._mixed:
            raise ConfigError(
                f"{label} and {other} would not be measured alike: {sampling}, and {first}. Give --fps and "
                "--max-pixels for both, or say --mixed-protocols to set them side by side all the same."
            )

    def protocol(self, label: str, num_frames: int, protocol: Protocol) -> None:
        """Raises a ConfigError where a model is measured under another protocol than one before it."""
        other, first = self._protocols.setdefault((num_frames, protocol.suite), (label, protocol))
        if first != protocol and not self._mixed:
            raise ConfigError(
                f"{protocol.suite}: {label} and {other} would not be measured alike: "
                f"{'; '.join(protocol.differences(first))}. Say --mixed-protocols to set them side by side all the "
                "same."
            )


def _evaluate_one(
    contestant: Contestant,
    samplings: Sequence[Sampling],
    asked: Sequence[Suite],
    root: Path,
    output: Path,
    settings: Settings,
    alike: _Alike,
) -> list[dict[str, Any]]:
    """One model at all numbers of frames: it is loaded once, and gone afterwards."""
    from longvpo_hf.evaluation.adapter import LongVPO

    decoding = asdict(settings.decoding)
    model = LongVPO(contestant.checkpoint, batch_size=settings.batch_size, server=settings.server, **decoding)
    results = []
    for sampling in samplings:
        protocols = _protocols(model, asked, root, sampling, settings)
        for protocol in protocols[THE_VIDEO].values():
            alike.protocol(contestant.label, sampling.num_frames, protocol["ours"])
        if model.rank == 0:
            print(f"{contestant.label}: {sampling}", file=sys.stderr)
        scores: dict[Shown, dict[str, Any]] = {}
        for shown in protocols:
            repeats = []
            for repeat in range(settings.repeats):
                model.use(sampling, _bounds(asked, settings), shown, repeat)
                repeats.append(_samples(model, asked, output / "cache", settings.limit))
            drawn = [samples for samples in repeats if samples is not None]
            if drawn:
                folder = output / "answers" / stem_of(contestant.label, sampling.num_frames)
                scores[shown] = _scores(asked, drawn, protocols[shown], folder, shown)
        if scores:
            results.append(
                {
                    "model": public_name(contestant.checkpoint),
                    "stage": contestant.stage,
                    "num_frames": sampling.num_frames,
                    "fps": sampling.fps,
                    "max_pixels": sampling.max_pixels,
                    "max_new_tokens": dict(settings.max_new_tokens),
                    "decoding": asdict(settings.decoding),
                    "limit": settings.limit,
                    "published": _followed(settings, sampling),
                    "tasks": scores.pop(THE_VIDEO),
                    "baselines": scores,
                }
            )
    del model
    gc.collect()
    return results


def _protocols(
    model: LongVPO, asked: Sequence[Suite], root: Path, sampling: Sampling, settings: Settings
) -> dict[Shown, dict[str, dict[str, Protocol]]]:
    """The protocol of each number that will be measured: by what is shown, suite and parser."""
    model.use(sampling, _bounds(asked, settings))
    backend = model.backend(_examples(asked, root) if settings.server else [])
    shown: list[Shown] = [THE_VIDEO, *(BASELINES if settings.baselines else ())]
    return {
        what: {
            suite.name: protocols_of(
                suite,
                root,
                sampling,
                limit=settings.limit,
                shown=what,
                decoding=str(settings.decoding),
                max_new_tokens=model.most_tokens(task_names(suite)[0], suite.max_new_tokens),
                repeats=settings.repeats,
                dtype=model.dtype,
                backend=backend,
            )
            for suite in asked
        }
        for what in shown
    }


def _examples(asked: Sequence[Suite], root: Path) -> list[Request]:
    """The first question of each suite, without subtitles."""
    requests = []
    for suite in asked:
        subset = suite.subsets[0] if suite.subsets else ""
        question = suite.question(suite.rows(root, subset)[0], subset)
        if (path := suite.locate(root, *question.videos)) is not None:
            requests.append(Request(question.text, Timeline((whole_clip(str(path)),))))
    return requests


def _bounds(asked: Sequence[Suite], settings: Settings) -> dict[str, int]:
    """Bounds on answers, by task."""
    bounds = settings.max_new_tokens
    return {task: bounds[suite.name] for suite in asked if suite.name in bounds for task in task_names(suite)}


def _followed(settings: Settings, sampling: Sampling) -> str | None:
    """What of a published protocol was followed."""
    if settings.published is None:
        return None
    used = {"num_frames": sampling.num_frames, "fps": sampling.fps, "max_pixels": sampling.max_pixels}
    return settings.published.describe(used)


def _scores(
    asked: Sequence[Suite],
    repeats: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]],
    protocols: Mapping[str, Mapping[str, Protocol]],
    folder: Path,
    shown: str,
) -> dict[str, Any]:
    """Scores of each suite, means over the repeats; its answers go into a file."""
    scores = {}
    for suite in asked:
        answers = [
            {"task": task, "row": sample["doc_id"], "text": sample["resps"][0][0], "repeat": repeat, **sample["score"]}
            for repeat, samples in enumerate(repeats)
            for task in task_names(suite)
            for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])  # processes share them out
        ]
        suffix = "" if shown == THE_VIDEO else f".{shown.replace(' ', '_')}"
        _write_answers(folder / f"{suite.name}{suffix}.jsonl", answers)
        drawn = [[answer for answer in answers if answer["repeat"] == repeat] for repeat in range(len(repeats))]
        summaries = [scoring.summary(suite, each) for each in drawn]  # type: ignore[arg-type]  # an answer is a record
        scores[suite.name] = {
            **scoring.averaged(suite, summaries),
            "protocol": {parser: protocol.json() for parser, protocol in protocols[suite.name].items()},
        }
    return scores


def _samples(
    model: LongVPO, asked: Sequence[Suite], cache: Path, limit: int | None
) -> Mapping[str, Sequence[Mapping[str, Any]]] | None:
    """Every answered question by task, as lmms-eval logs it; None on all processes but the first."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    with suppress(ValueError):  # its handlers are those of this program, or of an evaluation before
        logger.remove(0)  # loguru's own, which shows everything
        logger.add(_to_stderr, level="WARNING")
    results = simple_evaluate(
        model=model,
        tasks=[task for suite in asked for task in task_names(suite)],
        task_manager=TaskManager("WARNING", include_path=str(tasks_folder()), include_defaults=False),
        batch_size=model.batch_size,
        limit=limit,
        use_cache=str(cache),
        bootstrap_iters=0,
        log_samples=True,
    )
    return None if results is None else results["samples"]


def _to_stderr(message: str) -> None:
    sys.stderr.write(message)  # whatever it is by then


def _write_answers(path: Path, answers: Sequence[Mapping[str, Any]]) -> None:
    """Every answer on a line, so that a person can see what was counted as what."""
    with whole_file(path) as file:
        for line in answers:
            # What is half a character in a reply stays one, as an escape.
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
