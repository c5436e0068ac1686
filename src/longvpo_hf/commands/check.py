"""`longvpo check`: what a training run needs, before anything is loaded."""

from __future__ import annotations

import os
import warnings
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt

from longvpo_hf.shipped import find_config


def check(
    config: str,
    /,
    *options: Annotated[str, Parameter(allow_leading_hyphen=True)],
    gpu_memory: PositiveFloat | None = None,
    processes: PositiveInt = 1,
    sharding: Literal["none", "fsdp2", "zero2", "zero3"] = "none",
    tflops: PositiveFloat | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Estimates tokens, memory and time of a training run before anything is loaded; says what does not fit.

    The exit status is 1 where the run does not fit.

    Args:
        config: A recipe's YAML, or the name of a shipped one (`longvpo configs`).
        options: Options of the recipe, which override the file.
        gpu_memory: GiB of one device. None: this machine's, or 80 where it has none.
        processes: Devices, one process each.
        sharding: How the processes share weights, gradients and optimizer.
        tflops: TFLOP/s that a device achieves. None: 300, 30 % of an H100's peak.
        as_json: Print JSON.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.simplefilter("ignore")
    from longvpo_hf.planning import DEFAULT_TFLOPS, Machine, Sharding, device_memory_gib, plan_file, report

    machine = Machine(
        gpu_memory_gib=gpu_memory or device_memory_gib(),
        processes=processes,
        sharding=Sharding(sharding),
        tflops=tflops or DEFAULT_TFLOPS,
    )
    plan = plan_file(find_config(config), options, machine)
    print(plan.to_json() if as_json else report(plan))
    return 0 if plan.fits else 1
