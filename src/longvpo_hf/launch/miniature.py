"""The miniature's base model and rows for a training script, made in the run's folder where they are not there yet.

The folder then holds `base/`, and rows for each recipe: `dataset/` (Stage 1), `stage2-dataset/` and `temporal/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from accelerate import PartialState

from longvpo_hf.errors import ConfigError
from longvpo_hf.launch.arguments import RecipeArguments
from longvpo_hf.miniature.demo import Demo
from longvpo_hf.miniature.machine import one_thread
from longvpo_hf.miniature.settings import LONGVPO, DemoSettings
from longvpo_hf.miniature.temporal import temporal_rows
from longvpo_hf.training.config import LongVPOConfig


def make_miniature(
    recipe: RecipeArguments, training: LongVPOConfig, rows: Literal["stage1", "stage2", "temporal"]
) -> None:
    """Makes base and rows in the folder that `miniature` names, if it names one.

    Raises:
        ValueError: If Stage-2 rows are to be made, which the Stage-1 model answers, and it is not in `model/`.
    """
    if recipe.miniature is None:
        return
    folder = Path(recipe.miniature)
    settings = DemoSettings.fast(training.seed) if recipe.miniature_fast else DemoSettings(training.seed)
    with PartialState().main_process_first(), one_thread():
        demo = Demo(folder, settings)
        demo.worlds()
        demo.base()
        if rows == "temporal":
            demo.phase("temporal rows", lambda: temporal_rows(demo, demo.output / "temporal", "mixed"))
            return
        demo.rows()
        if rows == "stage2":
            if not (folder / LONGVPO.name / "config.json").is_file():
                raise ConfigError(
                    f"{folder / LONGVPO.name} holds no Stage-1 model to answer: run recipes/stage1.py first."
                )
            demo.stage2_captions()
            demo.stage2_rows()
