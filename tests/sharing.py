"""Shared rows against one process: `python sharing.py <result.json> <processes> …`, once for each number of processes.

The processes are forks of this one, over gloo, so that what takes long to import is imported once. The result holds, by
number of processes and case, the largest differences from one process: of log-probabilities, of the loss, and of
gradients relative to the largest one, once they are averaged over the processes; which places of the packed row each
process held, None where all held the whole; and the bytes that autograd kept for the backward pass, as a share of one
process's.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "training"))

from test_packing import BATCHES, make_batch, ready_model

from longvpo_hf.training.distillation import answer_states, check_states, divergences, hidden_states_of
from longvpo_hf.training.packing import forward, plain_forward, tree_forward, unwrapped
from longvpo_hf.training.packing.sharing import Share


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    family: str
    rows: str
    frames: tuple[int, ...] = (8, 6)
    checkpointing: bool = False
    lora: bool = False
    dtype: torch.dtype = torch.float32
    distilled: bool = False
    balanced: bool = False

    def __str__(self) -> str:
        kind = ("lora" if self.lora else "full") + ", distilled" * self.distilled + ", balanced" * self.balanced
        width = str(self.dtype).removeprefix("torch.")
        return f"{self.family}, {self.rows}, {self.frames}, {kind}, {self.checkpointing}, {width}"


ROPES = ("internvl", "qwen2_5_vl", "qwen3_vl")  # on one axis, on three, and with DeepStack
OTHERS = ("glm4v", "llava_next_video", "qwen3_vl_moe", "smolvlm")
SHARED: dict[int, list[Case]] = {
    2: [
        *(Case(family, rows) for family in ROPES for rows in BATCHES),
        *(Case(family, "two timelines", checkpointing=True, lora=lora) for family in ROPES for lora in (False, True)),
        *(Case(family, "four pairs", dtype=torch.float64) for family in ROPES),
        *(Case(family, "one pair") for family in OTHERS),
        Case("internvl", "one pair", (48,), checkpointing=True),
        Case("internvl", "two timelines", dtype=torch.float64, distilled=True),
        Case("qwen3_vl", "four pairs", checkpointing=True, distilled=True),
        Case("qwen3_vl_moe", "two timelines", checkpointing=True, balanced=True),
        Case("glm4v_moe", "four pairs", balanced=True),
    ],
    3: [
        Case("internvl", "two timelines"),
        Case("qwen2_5_vl", "four pairs", (12,)),
        Case("qwen3_vl", "one pair", (12,), True),
    ],
    4: [
        Case("internvl", "four pairs", dtype=torch.float64),
        Case("qwen2_5_vl", "two timelines", (20, 16), True),
        Case("qwen3_vl", "one pair", (16,), dtype=torch.float64),
    ],
}
#: Rows that every process computes whole: fewer frames than processes, or a video that ends in a token of its own.
WHOLE = {
    2: [
        Case("internvl", "one pair", (1,), distilled=True),
        Case("qwen2_5_vl", "one pair", (2,)),
        Case("qwen3_vl_moe", "one pair", (2,), balanced=True),
        Case("llava_onevision", "one pair"),
    ],
    3: [Case("qwen3_vl", "four pairs", (4,))],
    4: [],
}


@functools.cache
def model_of(family: str, checkpointing: bool, lora: bool, dtype: torch.dtype) -> Any:
    model = ready_model(family)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*(q_proj|v_proj|up_proj)", lora_dropout=0.0))
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    model.to(dtype)
    model.train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batch_of(case: Case) -> dict[str, Any]:
    rows, _ = BATCHES[case.rows]
    batch = make_batch(case.family, rows, case.frames)
    videos = [
        {name: value.to(case.dtype) if value.is_floating_point() else value for name, value in video.items()}
        for video in batch["videos"]
    ]
    return {**batch, "videos": videos}


def run(
    model: Any, call: Callable[[], Any], distilled: dict[str, Any] | None
) -> tuple[Any, dict[str, torch.Tensor], int]:
    """Output, gradients of a loss that weighs every token differently, and bytes kept between the passes.

    Of a batch that is distilled, from the states of its own answers in another order, the loss has that term too.
    """
    model.zero_grad()
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        hidden_states_of(unwrapped(model)) as calls,
    ):
        output = call()
    log_probs = output.log_probs
    loss = (log_probs * torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)).sum()
    if output.aux_loss is not None:
        loss = loss + 5 * output.aux_loss
    if distilled is not None:
        states = answer_states(unwrapped(model), calls, output, distilled)
        check_states(states, is_half=False)
        teacher = replace(states, hidden=tuple(hidden.flip(0).detach() for hidden in states.hidden))
        loss = loss + 10 * divergences(states, teacher, "forward", 1.0).sum()
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return output, {name: gradient.clone() for name, gradient in gradients.items()}, sum(kept.values())


def compared(case: Case) -> dict[str, Any]:
    """See the module; the differences are those of the first process, which alone computes what one would."""
    model, batch = model_of(case.family, case.checkpointing, case.lora, case.dtype), batch_of(case)
    shares: list[Share | None] = []
    share_of = forward.share_of

    def noted(*args: Any) -> Share | None:
        shares.append(share_of(*args))
        return shares[-1]

    forward.share_of = noted
    distilled = batch if case.distilled else None
    more = {"output_router_logits": True} if case.balanced else {}
    got, gradients, kept = run(model, lambda: tree_forward(model, batch, dist.group.WORLD, **more), distilled)
    with torch.no_grad():
        without = tree_forward(model, batch, dist.group.WORLD, **more)
    forward.share_of = share_of
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    found = {"held": [None if share is None else share.held.tolist() for share in shares], "bytes": kept}
    return found if dist.get_rank() else {**found, **differences(case, model, batch, (got, without), gradients)}


def differences(case: Case, model: Any, batch: Any, got: Any, gradients: dict[str, torch.Tensor]) -> dict[str, Any]:
    more = {"output_router_logits": True} if case.balanced else {}
    one, expected, kept = run(model, lambda: tree_forward(model, batch, **more), batch if case.distilled else None)
    with torch.no_grad():  # two sequences a row, which round otherwise
        exact = one if case.dtype == torch.float64 else plain_forward(model, batch, **more)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    apart = {name: float((gradients[name] - expected[name]).abs().max()) / largest for name in expected}
    head = apart.pop("lm_head.weight", 0.0)
    with torch.no_grad():
        return {
            "weights": [*gradients] == [*expected],
            "scores": max(float((scored.log_probs - exact.log_probs).abs().max()) for scored in got),
            "fields": max(
                float((got[0][name].double() - one[name].double()).abs().max()) for name in ("entropy", "is_top1")
            ),
            "loss": float((got[0].loss - exact.loss).abs()),
            "gradients": max(apart.values()),
            "head": head,
            "bytes of one": kept,
        }


def _process(rank: int, size: int, cases: list[Case], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    found = {str(case): compared(case) for case in cases}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def processes(size: int, cases: list[Case]) -> list[dict[str, Any]]:
    """What each of so many processes found, by case."""
    with tempfile.TemporaryDirectory() as folder:
        forks = multiprocessing.get_context("fork")
        started = [forks.Process(target=_process, args=(rank, size, cases, folder)) for rank in range(size)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        assert not any(process.exitcode for process in started), [process.exitcode for process in started]
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for cases in (*SHARED.values(), *WHOLE.values()):  # before the processes part
        for case in cases:
            model_of(case.family, case.checkpointing, case.lora, case.dtype)
    results = {size: processes(size, SHARED[size] + WHOLE[size]) for size in map(int, sys.argv[2:])}
    Path(sys.argv[1]).write_text(json.dumps(results))
