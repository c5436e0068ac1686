"""`longvpo demo`: the whole method on a laptop."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Literal

from cyclopts.types import NonNegativeInt

from longvpo_hf.commands.cli import resumable
from longvpo_hf.errors import ConfigError


@resumable
def demo(
    *,
    output: Path = Path("runs/demo"),
    seed: NonNegativeInt = 0,
    fast: bool = False,
    scale: Literal["standard", "large"] = "standard",
    restart: bool = False,
) -> None:
    """Shows the whole method on real mp4 files: makes rows, trains on them, measures before and after.

    Args:
        output: Folder of the run.
        seed: Same seed, same machine: same numbers.
        fast: Few steps, to see it run; its numbers mean nothing.
        scale: `large` goes to 256 clips, in an hour on a CPU.
        restart: Delete the folder's earlier run first.
    """
    if fast and scale != "standard":
        raise ConfigError("--fast and --scale large exclude each other; give one of them.")
    # Whoever runs the demo wants its bars and its table, not the libraries' advice. Nothing here needs the network.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one for every load and save of the tiny model

    from longvpo_hf.miniature.demo import run_demo
    from longvpo_hf.miniature.report import table
    from longvpo_hf.miniature.settings import DemoSettings

    if restart:
        _delete_run(output)
    if fast:
        settings = DemoSettings.fast(seed)
    else:
        settings = DemoSettings(seed=seed) if scale == "standard" else DemoSettings.large(seed)
    metrics = run_demo(output, settings)
    print()
    print(table(metrics))
    if metrics["meaningless"]:
        print("\n--fast: these numbers mean nothing; they show that everything runs.")
    print(f"\nReport: {output / 'report.md'}")


def _delete_run(output: Path) -> None:
    """Deletes an earlier demo, and nothing that is not one."""
    if not output.exists():
        return
    if not (output / "state" / "settings.json").is_file():
        raise ConfigError(f"{output} holds no demo run; --restart will not delete it.")
    shutil.rmtree(output)
