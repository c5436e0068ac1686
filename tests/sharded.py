"""Recipes as on a machine with two accelerators: `accelerate launch --config_file … sharded.py <folder> <scenario> …`.

accelerate starts FSDP and DeepSpeed on accelerators only. Here it is told that there are two of them, and given two CPU
processes with gloo: what it is told and how it finds its device are all that is replaced. Each scenario is a run of
`recipes/stage1.py` with the words of `<folder>/<scenario>.json`, one after the other. A scenario `A-then-B` begins with
the first checkpoint of `A`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from transformers import training_args

from longvpo_hf.launch import load_recipe
from longvpo_hf.training import trainer as trainer_module


def pretend() -> None:
    """From now on accelerate takes the CPU for an accelerator."""

    def prepare_backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
    training_args.is_torch_bf16_gpu_available = lambda: True


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend()
    stage1 = load_recipe("stage1")
    types: set[str] = set()
    sft_losses = trainer_module.sft_losses

    def noted(log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
        types.add(str(log_probs.dtype))
        return sft_losses(log_probs, completion_mask)

    trainer_module.sft_losses = noted
    folder = Path(sys.argv[1])
    for scenario in sys.argv[2:]:
        earlier, then, _ = scenario.partition("-then-")
        state = PartialState()
        if then and state.is_main_process:
            first = Path("checkpoint-1")
            shutil.copytree(folder / earlier / first, folder / scenario / first)
        state.wait_for_everyone()
        trainer = stage1.main(json.loads((folder / f"{scenario}.json").read_text()))
        assert trainer.accelerator.num_processes == 2
        kind = str(trainer.accelerator.distributed_type)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        if state.is_main_process:
            (folder / f"{scenario}.done.json").write_text(
                json.dumps({"type": kind, "logs": logs, "log_probs": sorted(types)})
            )
        del trainer
