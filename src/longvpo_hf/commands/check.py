"""`longvpo check`: what a training run needs, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt

from longvpo_hf.commands.cli import quiet_libraries
from longvpo_hf.errors import ConfigError
from longvpo_hf.shipped import find_config


@quiet_libraries()
def check(
    config: str | None = None,
    /,
    *options: Annotated[str, Parameter(allow_leading_hyphen=True)],
    rows: str | None = None,
    gpu_memory: PositiveFloat | None = None,
    processes: PositiveInt = 1,
    sharding: Literal["none", "fsdp2", "zero2", "zero3"] = "none",
    context_parallel: PositiveInt = 1,
    tflops: PositiveFloat | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Estimates tokens, memory and time of a training run before anything is loaded; says what does not fit.

    With `--rows`, all rows of a dataset are looked over too. The exit status is 1 where the run does not fit, or a row
    cannot be trained on.

    Args:
        config: A recipe's YAML, or the name of a shipped one (`longvpo configs`). May be left out with `--rows`, whose
            rows are then checked without a model.
        options: Options of the recipe, which override the file.
        rows: A dataset on the Hub or a folder, whose rows are checked with the recipe's model and settings.
        gpu_memory: GiB of one device. None: this machine's, or 80 where it has none.
        processes: Devices, one process each.
        sharding: How the processes share weights, gradients and optimizer.
        context_parallel: How many of the processes share each timeline.
        tflops: TFLOP/s that a device achieves. None: 300, 30 % of an H100's peak.
        as_json: Print JSON.
    """
    if config is None and rows is None:
        raise ConfigError("Nothing to check: name a recipe's YAML, a shipped configuration, or a dataset with --rows.")
    from longvpo_hf.hub import go_offline_if_unreachable

    go_offline_if_unreachable(
        [rows, *([""] if config else [])]
    )  # a configuration names a base, which may be on the Hub
    fits, found = True, {}
    if config is not None:
        from longvpo_hf.launch.arguments import refuse_unknown_settings
        from longvpo_hf.planning import DEFAULT_TFLOPS, Machine, Sharding, device_memory_gib, plan_file, report

        machine = Machine(
            gpu_memory_gib=gpu_memory or device_memory_gib(),
            processes=processes,
            sharding=Sharding(sharding),
            tflops=tflops or DEFAULT_TFLOPS,
            context_parallel=context_parallel,
        )
        file = find_config(config)
        refuse_unknown_settings(file, options)  # a plan reads those of model and training alone
        plan = plan_file(file, options, machine)
        fits, found = plan.fits, json.loads(plan.to_json())
        if not as_json:
            print(report(plan))
    if rows is not None:
        from longvpo_hf.launch.rows import check_dataset

        checked = check_dataset(rows, config, options)
        fits, found = fits and not checked.problems, {**found, "rows": asdict(checked)}
        if not as_json:
            print(checked)
    if as_json:
        print(json.dumps(found, indent=2))
    return 0 if fits else 1
