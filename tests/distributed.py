"""What two processes and one process each run, to be compared: `python distributed.py <folder> <scenario> …`.

The folder holds `rows` (eight rows) and `bad_rows` (the same, some without a file), saved to disk. The first process
writes `<scenario>.<processes>.json`: the logs, and the trained weights' sums. A batch of four rows over all processes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parent))

import trainers

SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dict,
    "lora": lambda: {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0)},
    "precomputed": lambda: {"precompute_ref_log_probs": True},
    "bad": lambda: {"on_bad_video": "skip"},
}


def run(folder: Path, scenario: str) -> dict[str, Any]:
    """Two steps of four rows and evaluations of all eight and of seven; the logs and every weight's sum."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = load_from_disk(str(folder / ("bad_rows" if scenario == "bad" else "rows")))
    trainer = trainers.make(
        folder / f"{scenario}.{processes}",
        rows,
        eval_dataset={"even": rows, "odd": rows.select(range(7))},
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=4 // processes,
        ddp_backend="gloo" if processes > 1 else None,
        pairs_per_timeline=2,  # then no two processes show the same timeline
        optim="sgd",
        **SCENARIOS[scenario](),
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    trainer.evaluate()
    weights = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {
        "logs": trainer.state.log_history,
        "weights": {name: float(weight.detach().double().sum()) for name, weight in weights if weight.requires_grad},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    for name in sys.argv[2:]:
        result = run(target, name)
        if os.environ.get("RANK", "0") == "0":
            size = os.environ.get("WORLD_SIZE", "1")
            (target / f"{name}.{size}.json").write_text(json.dumps(result))
