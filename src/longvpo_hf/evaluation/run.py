"""One evaluation: models × numbers of frames × benchmarks, through lmms-eval.

Takes checkpoints and benchmarks; looks for the data before it loads a model; gives scores, and writes them with every
answer into a folder. Answers are kept as they come, so the same call goes on where an interrupted one stopped. Knows
nothing of frames, prompts or how an answer is read.

Scores of one model at one number of frames, all in percent:

    {"model": str, "stage": str | None, "num_frames": int, "fps": float | None, "max_pixels": int | None,
     "limit": int | None, "tasks": {benchmark: see `scoring.summary`}}
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.evaluation import scoring
from longvpo_hf.evaluation.benchmarks import DATA_ROOT_VARIABLE, Benchmark
from longvpo_hf.evaluation.preflight import check
from longvpo_hf.evaluation.sampling import Sampling
from longvpo_hf.hub import markdown, public_name

if TYPE_CHECKING:
    from longvpo_hf.evaluation.adapter import LongVPO

#: What lmms-eval is given as `--include_path`.
TASKS_FOLDER = Path(__file__).parent / "tasks"
RESULTS_FILE = "results.json"


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
        """Reads `CHECKPOINT` or `STAGE=CHECKPOINT`."""
        match = re.fullmatch(r"([\w.-]+)=(.+)", text)
        return cls(match[2], match[1]) if match else cls(text)


def evaluate(
    contestants: Sequence[Contestant],
    benchmarks: Sequence[Benchmark],
    root: Path,
    output: Path,
    frames: Sequence[int] = (),
    fps: float | str | None = None,
    max_pixels: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Evaluates, and writes into `output`: `results.json`, `table.md`, `card.md`, `answers/`; in `cache/` what goes on.

    Args:
        contestants: The models.
        benchmarks: What they are asked.
        root: See `benchmarks`.
        output: Folder of the results.
        frames: Numbers of frames; by default the one each model was trained with.
        fps: At most so many frames per second, "none" for no bound; by default as the model was trained, or as the
            others were, if its card does not say it.
        max_pixels: At most so many pixels per frame; by default like `fps`.
        batch_size: Questions per call of the model.
        limit: Only the first so many questions of each task; the scores then mean little.

    Returns:
        Scores as the module says, one for each model and number of frames; nothing on all processes but the first.

    Raises:
        longvpo_hf.evaluation.preflight.NotReady: If data are missing.
    """
    check(benchmarks, root)
    os.environ[DATA_ROOT_VARIABLE] = str(root.resolve())
    # Else lmms-eval gives every run a new name, under which it does not find what an interrupted one kept.
    os.environ.setdefault("LMMS_CACHE_RUN_ID", "longvpo")
    trained = [Sampling.of_training(contestant.checkpoint) for contestant in contestants]
    default = next((sampling for sampling in trained if sampling), Sampling())
    results = []
    for contestant, sampling in zip(contestants, trained, strict=True):
        sampling = sampling or default
        if fps is not None:
            sampling = replace(sampling, fps=None if fps == "none" else float(fps))
        if max_pixels is not None:
            sampling = replace(sampling, max_pixels=max_pixels)
        samplings = [replace(sampling, num_frames=number) for number in frames or [sampling.num_frames]]
        results += _evaluate_one(contestant, samplings, benchmarks, output, batch_size, limit)
        if results:
            _write(results, output)
    return results


def _evaluate_one(
    contestant: Contestant,
    samplings: Sequence[Sampling],
    benchmarks: Sequence[Benchmark],
    output: Path,
    batch_size: int,
    limit: int | None,
) -> list[dict[str, Any]]:
    """One model at all numbers of frames: it is loaded once, and gone afterwards."""
    from longvpo_hf.evaluation.adapter import LongVPO

    name = public_name(contestant.checkpoint)
    model = LongVPO(contestant.checkpoint, batch_size=batch_size)
    results = []
    for sampling in samplings:
        model.use(sampling)
        title = f"{contestant.stage or name}, {sampling}"
        if model.rank == 0:
            print(title, file=sys.stderr)
        samples = _samples(model, benchmarks, output / "cache", limit)
        if samples is None:
            continue
        folder = output / "answers" / re.sub(r"[^\w.-]+", "_", f"{contestant.stage or name}-{sampling.num_frames}")
        tasks = {}
        for benchmark in benchmarks:
            mine = [(task, sample) for task in _tasks(benchmark) for sample in samples[task]]
            tasks[benchmark.name] = scoring.summary(
                benchmark.name, benchmark.groups, [sample["score"] for _, sample in mine]
            )
            _write_answers(folder / f"{benchmark.name}.jsonl", mine)
        results.append(
            {
                "model": name,
                "stage": contestant.stage,
                "num_frames": sampling.num_frames,
                "fps": sampling.fps,
                "max_pixels": sampling.max_pixels,
                "limit": limit,
                "tasks": tasks,
            }
        )
    del model
    gc.collect()
    return results


def _samples(
    model: LongVPO, benchmarks: Sequence[Benchmark], cache: Path, limit: int | None
) -> Mapping[str, Sequence[Mapping[str, Any]]] | None:
    """Every answered question by task, as lmms-eval logs it; None on all processes but the first."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    results = simple_evaluate(
        model=model,
        tasks=[task for benchmark in benchmarks for task in _tasks(benchmark)],
        task_manager=TaskManager("WARNING", include_path=str(TASKS_FOLDER), include_defaults=False),
        batch_size=model.batch_size,
        limit=limit,
        use_cache=str(cache),
        bootstrap_iters=0,
        log_samples=True,
    )
    return None if results is None else results["samples"]


def _tasks(benchmark: Benchmark) -> list[str]:
    """Names of a benchmark's tasks in `TASKS_FOLDER`."""
    if benchmark.name == "videomme":
        return ["longvpo_videomme_plain"]  # longvpo_videomme is the group of both
    return [f"longvpo_{benchmark.name}_{subset}" for subset in benchmark.subsets] or [f"longvpo_{benchmark.name}"]


# ------------------------------------------------------------------------------------------------------ what is written


def _write_answers(path: Path, samples: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Every answer on a line, so that a person can see what was counted as what."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for task, sample in samples:
            line = {"task": task, "row": sample["doc_id"], "text": sample["resps"][0][0], **sample["score"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write(results: Sequence[Mapping[str, Any]], output: Path) -> None:
    (output / RESULTS_FILE).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    (output / "card.md").write_text(card_section(results), encoding="utf-8")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The scores as Markdown: a line for each model and number of frames, a column for each benchmark."""
    names = list(dict.fromkeys(name for result in results for name in result["tasks"]))
    lines = [["model", "frames", *names], ["---"] * (len(names) + 2)]
    for result in results:
        scores = [_cell(result["tasks"].get(name)) for name in names]
        lines.append([markdown(result["stage"] or result["model"]), str(result["num_frames"]), *scores])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "–"
    return f"{scores.get('m_avg', scores['overall']):.1f}"


def card_section(results: Sequence[Mapping[str, Any]]) -> str:
    """The scores as a section of a model card, with what they were measured by."""
    result = results[0]
    sampling = Sampling(result["num_frames"], result["fps"], result["max_pixels"])
    limited = f"Only the first {result['limit']} questions of each task were asked.\n" if result["limit"] else ""
    return (
        f"## Evaluation\n\n{table(results)}\n\nAccuracy in percent (MLVU: M-Avg) of all questions: an answer without "
        f"a choice counts as wrong. Frames: {sampling}. Measured with `longvpo eval`, longvpo-hf "
        f"{version('longvpo-hf')}, lmms-eval {version('lmms-eval')}.\n{limited}"
    )
