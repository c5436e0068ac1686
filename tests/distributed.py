"""What two processes and one process each run, to be compared: `python distributed.py <folder> <scenario> …`.

The folder holds `rows` (eight rows), `bad_rows` (the same, some without a file) and `two_rows` (two of these), saved to
disk. The first process writes `<scenario>.<processes>.json`: the logs, and the sums of the trained weights; or, of a
scenario in `RESUMED`, the rows and losses of each step, of a whole run and of one that was resumed. A batch is four
rows over all processes. At the end it writes `broken.json`, each process's error of a run whose loss is not finite on
one of them; `unreadable.json`, each one's errors of runs in which one of them cannot decode a video; `tried.json`, what
each process does with a model whose trees, or plain sequences, are wrong on one of them; and `sharded.json`, a sharded
model's scores and gradients against a whole one's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import load_from_disk
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))

import tiny_models
import trainers
from longvpo_hf.errors import ModelError, TrainingError
from longvpo_hf.training import trainer as trainer_module
from longvpo_hf.training.collator import VideoPreferenceCollator
from longvpo_hf.training.packing import enable_tree_packing, is_tree_packed, tree_forward

REJECTED = {"view_preference_weight": 0.7}
SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dict,
    "lora": lambda: {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0)},
    "precomputed": lambda: {"precompute_ref_log_probs": True, "view_distillation_weight": 0.7, **REJECTED},
    "bad": lambda: {"on_bad_video": "skip", **REJECTED},
    "distilled": lambda: {"view_distillation_weight": 0.7},
}

#: The first with answers of the policy's own that serve the next epoch too: two processes hand them to one another.
RESUMED: dict[str, dict[str, Any]] = {
    "resumed": {
        "pairs_per_timeline": 2,
        "view_distillation_weight": 0.7,
        "view_distillation_on": "sampled",
        "view_distillation_max_new_tokens": 4,
        "view_distillation_refresh_steps": 4,
    },
    "resumed-singly": {"pairs_per_timeline": 1, **REJECTED},
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


def resumed(folder: Path, scenario: str) -> dict[str, Any]:
    """Eight steps, two an epoch, and the same resumed after the fifth, within the third epoch."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))

    def train(name: str, checkpoint: str | None, **more: Any) -> dict[str, Any]:
        trainer = trainers.make(
            folder / f"{scenario}.{processes}.{name}",
            load_from_disk(str(folder / "rows")),
            per_device_train_batch_size=4 // processes,
            ddp_backend="gloo" if processes > 1 else None,
            max_steps=8,
            **RESUMED[scenario],
            **more,
        )
        ids: list[list[str]] = []
        collate = trainer.data_collator

        def noted(rows: list[Any]) -> Any:
            ids.append([row["id"] for row in rows])
            return collate(rows)

        trainer.data_collator = noted
        trainer.train(resume_from_checkpoint=checkpoint)
        of_processes = gather_object([ids])
        return {
            "ids": [[row for part in parts for row in part] for parts in zip(*of_processes, strict=True)],
            "losses": trainers.logged(trainer),
            "folder": trainer.args.output_dir,
        }

    whole = train("whole", None, save_strategy="steps", save_steps=5)
    return {"whole": whole, "resumed": train("resumed", f"{whole['folder']}/checkpoint-5")}


def broken(folder: Path) -> str:
    """The error of a run whose loss is not a number on the last process alone."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    sft_losses = trainer_module.sft_losses
    trainer = trainers.make(
        folder / f"broken.{processes}",
        load_from_disk(str(folder / "rows")),
        ddp_backend="gloo" if processes > 1 else None,
    )
    if rank == processes - 1:
        trainer_module.sft_losses = lambda *args: sft_losses(*args) * float("nan")
    try:
        trainer.train()
    except TrainingError as error:
        return str(error)
    finally:
        trainer_module.sft_losses = sft_losses
    return "no error"


def unreadable(folder: Path) -> list[str]:
    """The errors of runs of whose rows one process has an undecodable one: in training, and in precomputing."""
    rows = load_from_disk(str(folder / "two_rows"))
    errors = []
    more: dict[str, Any]
    for more in ({}, {"precompute_ref_log_probs": True}):
        try:
            trainers.make(
                folder / "unreadable", rows, ddp_backend="gloo", per_device_train_batch_size=1, **more
            ).train()
            errors.append("no error")
        except TrainingError as error:
            errors.append(str(error))
    return errors


def number_positions_anew(model: Any) -> None:
    """Takes no positions from outside, so that trees are wrong."""

    def forget(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in kwargs.items() if name != "position_ids"}

    model.base_model.register_forward_pre_hook(forget, with_kwargs=True)


def fail(model: Any) -> None:
    model.base_model.register_forward_pre_hook(lambda *_: 1 / 0)


def tried(folder: Path, change: Callable[[Any], None]) -> dict[str, Any]:
    """Of a model of no known family that is changed on the last process alone: whether it keeps trees, or its error."""
    model = tiny_models.build("internvl")[0]
    model.config.model_type = "teapot"
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        change(model)
    trainer = trainers.make(
        folder / "tried", load_from_disk(str(folder / "rows")), model=model, ddp_backend="gloo", max_steps=1
    )
    try:
        trainer.train()
    except ModelError as error:
        return {"error": str(error)}
    return {"trees": is_tree_packed(trainer.model), "losses": trainers.logged(trainer)}


def sharded(folder: Path, family: str) -> dict[str, float]:
    """Largest differences of a model sharded by FSDP2 from a whole one, each process on rows of its own.

    By torch's `fully_shard`: accelerate starts FSDP on accelerators only.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = load_from_disk(str(folder / "rows"))
    collate = VideoPreferenceCollator(tiny_models.build(family)[1], trainers.NUM_FRAMES, fps=None, max_pixels=56 * 56)
    batch = collate([rows[2 * rank], rows[2 * rank + 1]])

    def backward(model: Any) -> torch.Tensor:
        assert enable_tree_packing(model) is None
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        if model is parted:
            mesh = init_device_mesh("cpu", (ranks,))
            for layer in model.get_decoder().layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        log_probs = tree_forward(model, batch).log_probs
        log_probs.sum().backward()
        return log_probs.detach()

    whole, parted = trainers.with_head(family), trainers.with_head(family)
    scores = (backward(parted) - backward(whole)).abs().max()
    gradients = []
    for name, weight in whole.named_parameters():
        if weight.grad is not None:
            torch.distributed.all_reduce(weight.grad)
            gradients.append((parted.get_parameter(name).grad.full_tensor() - weight.grad / ranks).abs().max())
    return {"scores": float(scores), "gradients": float(max(gradients)), "number": float(len(gradients))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    for name in sys.argv[2:]:
        result = resumed(target, name) if name in RESUMED else run(target, name)
        if os.environ.get("RANK", "0") == "0":
            size = os.environ.get("WORLD_SIZE", "1")
            (target / f"{name}.{size}.json").write_text(json.dumps(result))
    errors = gather_object([broken(target)])
    if os.environ["RANK"] == "0":
        (target / "broken.json").write_text(json.dumps(errors))
    errors = gather_object([unreadable(target)])
    if os.environ["RANK"] == "0":
        (target / "unreadable.json").write_text(json.dumps(errors))
    trials = {change.__name__: gather_object([tried(target, change)]) for change in (number_positions_anew, fail)}
    if os.environ["RANK"] == "0":
        (target / "tried.json").write_text(json.dumps(trials))
    differences = {family: sharded(target, family) for family in tiny_models.FAMILIES}
    if os.environ["RANK"] == "0":
        (target / "sharded.json").write_text(json.dumps(differences))
