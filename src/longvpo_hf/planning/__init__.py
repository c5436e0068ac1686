"""What a training run will need, before anything is loaded: `longvpo check`.

from longvpo_hf.planning import Machine, plan_file, report

plan = plan_file(Path("recipes/configs/internvl3_8b/stage1_lora.yaml"), machine=Machine(gpu_memory_gib=80))
plan.fits, plan.total_gib, plan.tokens.visual
print(report(plan))
"""

from longvpo_hf.planning.bases import find_model_config
from longvpo_hf.planning.plan import Plan, make_plan, plan_file
from longvpo_hf.planning.remedies import Remedy
from longvpo_hf.planning.report import report
from longvpo_hf.planning.run import Parameters
from longvpo_hf.planning.settings import (
    DEFAULT_GPU_MEMORY_GIB,
    DEFAULT_TFLOPS,
    Machine,
    Rows,
    Sharding,
    device_memory_gib,
    read_config,
)
from longvpo_hf.planning.tokens import Tokens

__all__ = [
    "DEFAULT_GPU_MEMORY_GIB",
    "DEFAULT_TFLOPS",
    "Machine",
    "Parameters",
    "Plan",
    "Remedy",
    "Rows",
    "Sharding",
    "Tokens",
    "device_memory_gib",
    "find_model_config",
    "make_plan",
    "plan_file",
    "read_config",
    "report",
]
