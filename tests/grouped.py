"""Whole trainings by processes that share their batches, and by one: `python grouped.py <folder>`.

The folder holds `rows` (eight rows), saved to disk. Each scenario writes `<scenario>.json`: the logs of two steps and
of an evaluation of seven rows, the sums of the trained weights, and how many of the packed rows that were
scored were shared. The processes are forks of this one, over gloo, told what `recipes/accelerate/cp8.yaml` tells them;
accelerate takes the CPU for accelerators (`sharded.pretend`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import gather_object
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import load_from_disk
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parent))

import sharded
import tiny_models
import trainers
from longvpo_hf.errors import TrainingError
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.shipped import shipped
from longvpo_hf.timeline import Timeline
from longvpo_hf.training.packing import forward
from longvpo_hf.training.trainer import LongVPOTrainer


@dataclass(frozen=True)
class Scenario:
    """A run: groups of processes, how many in each, and settings; resumed after its first step, or not.

    Its rows may be a stream, and its last process may get no answer from where a video is, in runs of their own.
    """

    groups: int = 1
    size: int = 1
    family: str = "internvl"
    resumed: bool = False
    streamed: bool = False
    unreachable: bool = False
    more: dict[str, Any] = field(default_factory=dict)


_LORA: dict[str, Any] = {"peft_config": "lora", "freeze_vision_tower": True, "precompute_ref_log_probs": True}
_LORA |= {"view_distillation_weight": 0.7}  # by the reference's likeliest tokens
_VIEWS: dict[str, Any] = {"view_distillation_weight": 0.7, "view_preference_weight": 0.5}
_BALANCED: dict[str, Any] = {"router_aux_loss_coef": 0.5}
SCENARIOS = {
    "full": Scenario(unreachable=True, more=_VIEWS),
    "full, 2 x 2": Scenario(groups=2, size=2, resumed=True, unreachable=True, more=_VIEWS),
    "experts": Scenario(streamed=True, family="qwen3_vl_moe", more=_BALANCED),
    "experts, 2": Scenario(size=2, resumed=True, streamed=True, family="qwen3_vl_moe", more=_BALANCED),
    "lora": Scenario(family="qwen3_vl", more=_LORA),
    "lora, 2": Scenario(size=2, resumed=True, family="qwen3_vl", more=_LORA),
}


def run(folder: Path, name: str, scenario: Scenario) -> None:
    """See the module."""
    shares: list[bool] = []
    share_of = forward.share_of

    def noted(*args: Any) -> Any:
        share = share_of(*args)
        shares.append(share is not None)
        return share

    forward.share_of = noted
    rows = load_from_disk(str(folder / "rows"))
    more = dict(scenario.more)
    if "precompute_ref_log_probs" in more:  # TRL then loads the reference itself
        more["model"] = str(folder / scenario.family)
    if "peft_config" in more:
        more["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    make = partial(
        trainers.make,
        folder / name,
        rows.to_iterable_dataset() if scenario.streamed else rows,
        family=scenario.family,
        eval_dataset=rows.select(range(7)),
        per_device_train_batch_size=4 // scenario.groups,
        per_device_eval_batch_size=4 // scenario.groups,
        ddp_backend="gloo" if scenario.size > 1 else None,
        use_cpu=scenario.size == 1,
        gradient_checkpointing=True,
        pairs_per_timeline=2,
        optim="adamw_torch",
        **({"save_strategy": "steps", "save_steps": 1} if scenario.resumed else {}),
        **more,
    )
    if scenario.resumed:
        make().train()
    trainer = make()
    assert trainer.get_total_train_batch_size(trainer.args) == 4
    trainer.train(str(folder / name / "run" / "checkpoint-1") if scenario.resumed else None)
    trainer.evaluate()
    weights = {
        name: float(getattr(weight, "full_tensor", lambda whole=weight: whole)().detach().double().sum())
        for name, weight in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        if weight.requires_grad
    }
    gone = [clip["file_name"] for clip in rows[2]["clips"]]
    without = unreachable(make, gone, scenario.size) if scenario.unreachable else {}
    if trainer.accelerator.is_main_process:
        result = {
            "unreachable": without,
            "logs": trainer.state.log_history,
            "weights": weights,
            "shared": [sum(shares), len(shares)],
            "kind": str(trainer.accelerator.distributed_type),
            "processes": trainer._record_of().training.num_processes,
        }
        (folder / f"{name}.json").write_text(json.dumps(result))


def unreachable(make: Callable[..., LongVPOTrainer], gone: list[str], size: int) -> dict[str, Any]:
    """Runs in which a timeline is not reached by the last process of each group: they end so, or skip it.

    Args:
        make: Makes a trainer.
        gone: The files of the timeline.
        size: Of a group.

    Returns:
        Each process's error, and the logs.
    """
    found: dict[str, Any] = {}
    for policy in ("raise", "skip") if size > 1 else ("skip",):
        trainer = make(on_bad_video=policy, save_strategy="no")
        look = trainer.data_collator._look

        def without(seen: Timeline, *args: Any, look: Callable[..., Any] = look) -> Any:
            if gone == [clip.path for clip in seen.clips]:
                raise UnreadableVideo("unreachable", seen.clips[0], "no answer in time")
            return look(seen, *args)

        if trainer.accelerator.process_index % size == size - 1:
            trainer.data_collator._look = without
        error = ""
        try:
            trainer.train()
        except (TrainingError, UnreadableVideo) as ended:
            error = str(ended)
        found[policy] = {"errors": gather_object([error]), "logs": trainer.state.log_history}
    return found


def _process(folder: Path, name: str, rank: int, port: int, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    scenario = SCENARIOS[name]
    processes = scenario.groups * scenario.size
    if processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({key: str(value) for key, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(environment)
        sharded.pretend()
    run(folder, name, scenario)
    if processes > 1:
        torch.distributed.destroy_process_group()


def environment_of(scenario: Scenario) -> dict[str, str]:
    """What `accelerate launch --config_file recipes/accelerate/cp8.yaml` tells its processes."""
    words = ["--config_file", str(shipped("recipes/accelerate/cp8.yaml")), "--mixed_precision", "no"]
    words += [
        "--num_processes",
        str(scenario.groups * scenario.size),
        "--parallelism_config_cp_size",
        str(scenario.size),
    ]
    words += ["--parallelism_config_dp_shard_size", str(scenario.groups), "stage1.py"]
    given, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = prepare_multi_gpu_env(given)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE", "FSDP", "PARALLELISM"))}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in tiny_models.build("qwen3_vl"):
        part.save_pretrained(Path(sys.argv[1]) / "qwen3_vl")
    forks = multiprocessing.get_context("fork")
    for name in sys.argv[2:] or SCENARIOS:
        scenario, port = SCENARIOS[name], free_port()
        given = (Path(sys.argv[1]), name)
        environment = environment_of(scenario)
        ranks = range(scenario.groups * scenario.size)
        started = [forks.Process(target=_process, args=(*given, rank, port, environment)) for rank in ranks]
        for process in started:
            process.start()
        for process in started:
            process.join()
        assert not any(process.exitcode for process in started), (name, [process.exitcode for process in started])
