"""What a study leaves open, chosen for this machine: configurations of trainings, and with `base: auto` the base too.

The session keeps a choice in the run's folder, so that a run that goes on, also elsewhere, goes on with the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import yaml

from longvpo_hf.errors import ConfigError, LongVPOError
from longvpo_hf.shipped import find_config, shipped_configs
from longvpo_hf.studies.study import AUTO, Build, Study, Train

#: Bases that `auto` chooses among: the largest that leaves at least so many rows in the hours.
_AUTO_BASES = ("internvl3_8b", "internvl3_2b", "smolvlm2_500m")
_AUTO_FRAMES = (128, 64, 32)
#: Ours: a tenth of LongVPO's 10k Stage-1 rows; the miniature learns from 7,200. Fewer are not worth a larger base.
_FEWEST_ROWS, _MOST_ROWS = 1_000, 10_000
#: Share of the hours that is left for measuring, loading and drops.
_SPARE = 0.3
#: Forward passes over a timeline that building one row of each stage costs: its answers and a caption of each scene.
_BUILDING_PASSES = 4.0


@dataclass(frozen=True, slots=True)
class Gpus:
    """What a study runs on.

    Args:
        number: GPUs; 0 for none.
        memory_gib: Of one.
        tflops: 10¹² operations a second that one achieves, or the processor where there is none.
        is_here: Whether this machine has them.
    """

    number: int
    memory_gib: float
    tflops: float
    is_here: bool = True

    @classmethod
    @cache
    def here(cls, memory_gib: float | None = None) -> Gpus:
        """This machine's, its speed measured by a product of two matrices; with a memory to plan for, one GPU of it."""
        import torch

        from longvpo_hf.planning import DEFAULT_TFLOPS
        from longvpo_hf.planning.settings import device_memory_gib

        number = torch.cuda.device_count()
        if number == 0 and memory_gib is not None:
            return cls(1, memory_gib, DEFAULT_TFLOPS, is_here=False)
        return cls(number, memory_gib or device_memory_gib(), _measured_tflops())


def _measured_tflops() -> float:
    """What training achieves, as a share of a plain product: 0.4, as an H100's 300 of 750 in `longvpo check`."""
    import time

    import torch

    on_gpu = torch.cuda.is_available()
    size, device, dtype = (8192, "cuda", torch.bfloat16) if on_gpu else (768, "cpu", torch.float32)
    left = torch.ones(size, size, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        product = left @ left
        product[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 0.4 * 2 * size**3 / fastest / 1e12


def chosen(study: Study, gpu_memory_gib: float | None = None) -> Study:
    """The study with everything chosen that it leaves open.

    Args:
        study: As it was read.
        gpu_memory_gib: GiB of a GPU to plan for; None for this machine's.

    Raises:
        ConfigError: If no shipped configuration is of the base, or nothing fits.
    """
    is_open = any(isinstance(step, Train) and step.config is None for step in study.steps)
    if study.base != AUTO and not is_open:
        return study
    gpus = Gpus.here(gpu_memory_gib)
    if study.base == AUTO:
        study = _by_hours(study, gpus)
    steps: list[Build | Train] = []
    folder = _folder_of(study.base) if is_open else ""
    for step in study.steps:
        if isinstance(step, Build) or step.config is not None:
            steps.append(step)
            continue
        steps.append(_configured(step, folder, study.base, gpus))
    return replace(study, steps=tuple(steps))


def _configured(step: Train, folder: str, base: str, gpus: Gpus) -> Train:
    """A training with the shipped configuration of its base that fits."""
    if gpus.number == 0:
        # Without a GPU this is a try: no process that decodes ahead, each of which loads torch once more.
        cpu = {"use_cpu": True, "bf16": False, "dtype": "float32", "dataloader_num_workers": 0}
        options = {**cpu, **step.options}
        return replace(step, config=_config_name(folder, step.train, "lora"), options=options)
    for mode in ("full", "lora"):
        name = _config_name(folder, step.train, mode)
        accelerate = "one_gpu" if gpus.number == 1 else "fsdp2" if mode == "full" else "ddp"
        plan = _plan(name, base, gpus, accelerate, step.options)
        # The papers' batch of 8 rows, however many GPUs there are.
        options = {"gradient_accumulation_steps": max(1, 8 // gpus.number), **step.options}
        fitting = replace(step, config=name, accelerate_config=accelerate, num_processes=gpus.number, options=options)
        if plan.fits:
            return fitting
    if plan.frames_that_fit:
        return replace(fitting, options={"num_frames": plan.frames_that_fit, **options})
    remedies = ", ".join(remedy.setting for remedy in plan.remedies if remedy.fits) or "a smaller base"
    raise ConfigError(f"{base} does not fit into {gpus.memory_gib:.0f} GiB with {name}: try {remedies}.")


def _config_name(folder: str, recipe: str, mode: str) -> str:
    name = f"{folder}/{recipe}_{mode}"
    if name not in shipped_configs():
        raise ConfigError(f"No configuration of {folder} ships for {recipe}: name one at train: {recipe}, `config: …`.")
    return name


def _plan(name: str, base: str, gpus: Gpus, accelerate: str, options: Mapping[str, Any]) -> Any:
    from longvpo_hf.planning import Machine, Sharding, plan_file

    sharding = Sharding.fsdp2 if accelerate == "fsdp2" else Sharding.none
    machine = Machine(gpus.memory_gib, max(1, gpus.number), sharding, gpus.tflops)
    words = ["--model_name_or_path", base]
    for key, value in options.items():
        if isinstance(value, (str, int, float)):
            words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return plan_file(find_config(name), words, machine)


def _folder_of(base: str) -> str:
    """The folder of shipped configurations of a base: by its name, or by its family.

    Raises:
        ConfigError: If there is none.
    """
    bases = dict(_shipped_bases())
    for folder, name in bases.items():
        if base == name:
            return folder
    from longvpo_hf.families import model_config

    try:
        kind = model_config(base, local_files_only=True).model_type
    except (OSError, ValueError, LongVPOError):
        kind = None
    for folder in sorted(bases, key=_billions):  # the smallest of its family
        if kind is not None and _kind_of(bases[folder]) == kind:
            return folder
    raise ConfigError(
        f"{base} is no base of a shipped configuration ({', '.join(sorted(bases.values()))}): name one at each "
        "`train`, `config: …` (`longvpo configs` lists them)."
    )


def _billions(folder: str) -> float:
    """Parameters by a folder's name: `internvl3_2b`, `smolvlm2_500m`; infinite where it names none."""
    size = re.search(r"_(\d+)([bm])(?:_|$)", folder)
    return float(size[1]) / (1000 if size[2] == "m" else 1) if size else float("inf")


def _shipped_bases() -> Iterator[tuple[str, str]]:
    for name, path in shipped_configs().items():
        if name.endswith("/stage1_lora"):
            yield name.partition("/")[0], yaml.safe_load(path.read_text(encoding="utf-8"))["model_name_or_path"]


def _kind_of(base: str) -> str | None:
    from longvpo_hf.planning import find_model_config

    try:
        kind: str = find_model_config(base).model_type
    except ConfigError:
        return None
    return kind


# -------------------------------------------------------------------------------------------------------- by the hours


def _by_hours(study: Study, gpus: Gpus) -> Study:
    """Base, frames and rows, so that the study ends within its hours.

    Raises:
        ConfigError: If not even the smallest base does.
    """
    assert study.hours is not None
    bases = dict(_shipped_bases())
    usable = study.hours * (1 - _SPARE) * max(1, gpus.number)
    stages = [step.train for step in study.steps if isinstance(step, Train)]

    def rows(folder: str, frames: int) -> int:
        """Rows that are built and trained on in the hours; 0 where the base does not fit."""
        per_1000 = 0.0
        for stage in stages:
            plan = _plan(f"{folder}/{stage}_lora", bases[folder], gpus, "one_gpu", {"num_frames": frames})
            if not plan.fits:
                return 0
            building = _BUILDING_PASSES * 1000 * plan.tflop["reference"] / gpus.tflops / 3600
            per_1000 += plan.gpu_hours_per_1000_rows + building
        return min(_MOST_ROWS, int(usable / per_1000 * 10) * 100)

    # The cheapest first: a machine that is too slow for any is known after one of nine.
    cheapest = _AUTO_BASES[-1], _AUTO_FRAMES[-1]
    fewest = rows(*cheapest)
    if fewest >= _FEWEST_ROWS:
        for folder in _AUTO_BASES:
            for frames in _AUTO_FRAMES:
                found = fewest if (folder, frames) == cheapest else rows(folder, frames)
                if found >= _FEWEST_ROWS:
                    return _with(study, bases[folder], folder, frames, found)
    if gpus.number == 0:
        raise ConfigError(
            f"This machine has no GPU, and its processor is too slow to build and train {_FEWEST_ROWS:,} rows in "
            f"{study.hours:g} hours even with {bases[cheapest[0]]}: plan for a GPU with --gpu-memory 24 (GiB), or name "
            "base and rows yourself."
        )
    raise ConfigError(
        f"In {study.hours:g} hours, {gpus.number} GPU of {gpus.memory_gib:.0f} GiB at {gpus.tflops:.1f} TFLOP/s builds "
        f"and trains fewer than {_FEWEST_ROWS:,} rows even with {bases[cheapest[0]]}: give more hours, or name base "
        "and rows yourself."
    )


def _with(study: Study, base: str, folder: str, frames: int, rows: int) -> Study:
    steps: list[Build | Train] = []
    for step in study.steps:
        if isinstance(step, Build):
            options = {"num_rows": rows, "frame_budget": frames, **step.options}
            steps.append(replace(step, options=options))
        else:
            options = {"num_frames": frames, **step.options}
            config = step.config or f"{folder}/{step.train}_lora"
            steps.append(replace(step, config=config, accelerate_config="one_gpu", options=options))
    return replace(study, base=base, hours=None, steps=tuple(steps))
