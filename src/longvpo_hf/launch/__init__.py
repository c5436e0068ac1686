"""What training scripts share: arguments, rows, the model to start from, resuming, probes, and the end of a run.

`recipes/*.py` show how these go together.
"""

from longvpo_hf.launch.arguments import RecipeArguments, lora, parse, quantization
from longvpo_hf.launch.checkpoints import checkpoint_to_resume, start_from
from longvpo_hf.launch.finishing import check_benchmarks, finish
from longvpo_hf.launch.probing import PositionProbe, check_probes
from longvpo_hf.launch.recipes import load_recipe
from longvpo_hf.launch.rows import load_rows

__all__ = [
    "PositionProbe",
    "RecipeArguments",
    "check_benchmarks",
    "check_probes",
    "checkpoint_to_resume",
    "finish",
    "load_recipe",
    "load_rows",
    "lora",
    "parse",
    "quantization",
    "start_from",
]
