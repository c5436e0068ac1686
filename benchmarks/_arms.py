"""The trainers that `trainer_step.py` compares, each at work in a process of its own."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from _internvl import CHOSEN_TOKENS, PAIRS, SCALES, build_model, build_processor, stock_row
from _processes import OUT_OF_MEMORY, best_matmul, peak_bytes, quiet, reset_peak, wait_for_device
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from longvpo_hf.families import TEXT_LAYERS
from longvpo_hf.planning.trace import FlopCounter
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.trainer import LongVPOTrainer

BETA = 0.1


@dataclass(frozen=True)
class Mode:
    """What is trained, and how.

    Args:
        lora: Rank-16 adapters on the language model's linear layers, reference by switching them off; else all weights,
            with a reference model in memory.
        checkpointing: Non-reentrant gradient checkpointing.
        ceiling: Work of stock TRL over ours if the trunk were all there is and the linear layers all of the work. In
            forwards of one sequence (a backward is two, of adapters one, checkpointing one more forward): stock does
            two sequences and two of the reference, ours one, and a reference too short to count.
    """

    lora: bool
    checkpointing: bool
    ceiling: str


MODES = {
    "full": Mode(lora=False, checkpointing=False, ceiling="(2·3 + 2) / 3 = 2.67"),
    "lora": Mode(lora=True, checkpointing=False, ceiling="(2·2 + 2) / 2 = 3.00"),
    "checkpointing": Mode(lora=False, checkpointing=True, ceiling="(2·4 + 2) / 4 = 2.50"),
    "lora-checkpointing": Mode(lora=True, checkpointing=True, ceiling="(2·3 + 2) / 3 = 2.67"),
}

#: Full fine-tuning of the 8B model with its reference leaves one GPU no room for a video.
DEFAULT_MODES = {
    "small": ["full", "lora", "checkpointing"],
    "hybrid": ["full", "lora"],
    "8b": ["lora", "lora-checkpointing"],
}


@dataclass(frozen=True)
class Arm:
    """One of the trainers compared."""

    title: str
    stock: bool = False
    equal_answers: bool = False
    tree: bool = True
    pairs: int = 1
    added: str = ""
    """A term that the loss of the other arms lacks, for the table."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those of that term."""


ARMS = {
    "stock": Arm("stock TRL DPOTrainer", stock=True),
    "stock-equal": Arm("stock TRL, answers of equal length", stock=True, equal_answers=True),
    "anchor": Arm("ours, anchor reference only", tree=False),
    "all": Arm("ours, everything on"),
    "all-4": Arm("ours, four pairs of a timeline", pairs=PAIRS),
    "anchor-4": Arm("ours, four pairs of a timeline, anchor reference only", tree=False, pairs=PAIRS),
    "distilled": Arm(
        "ours, everything on, with view distillation",
        added="view distillation on the chosen answer",
        settings={"view_distillation_weight": 1.0},
    ),
    "sampled": Arm(
        "ours, everything on, with view distillation on sampled answers",
        added="view distillation on the sampled answer",
        settings={
            "view_distillation_weight": 1.0,
            "view_distillation_on": "sampled",
            "view_distillation_max_new_tokens": CHOSEN_TOKENS,
        },
    ),
    "views": Arm(
        "ours, everything on, with view preference",
        added="view preference",
        settings={"view_preference_weight": 1.0},
    ),
}

_STOCK_ARMS = ["stock", "stock-equal", "anchor", "all", "all-4"]
DEFAULT_ARMS = {"small": _STOCK_ARMS, "8b": _STOCK_ARMS, "hybrid": ["anchor", "all", "anchor-4", "all-4"]}
#: Arms without trees and with them, by the pairs in a step.
WITHOUT_AND_WITH = {1: ("anchor", "all"), PAIRS: ("anchor-4", "all-4")}


@dataclass(frozen=True)
class Setup:
    """One configuration: everything its process needs to know."""

    size: int
    mode: str
    arm: str
    scale: str
    device: str
    threads: int
    rows: list[dict[str, Any]] = field(repr=False)
    reference: str = "anchor"
    distinct_reference: bool = False
    """A reference that is not the policy: only then does the loss tell whether it was scored rightly."""

    @property
    def frames(self) -> int:
        """Frames of the timeline."""
        return self.size // SCALES[self.scale].tokens_per_frame


def build_trainer(setup: Setup, folder: str) -> DPOTrainer:
    """The arm's trainer, readied as `train()` would."""
    arm, mode, scale = ARMS[setup.arm], MODES[setup.mode], SCALES[setup.scale]
    processor = build_processor(scale)
    model = build_model(scale, setup.device, processor, seed=0)
    models_: dict[str, Any] = {}
    if mode.lora:
        models_["peft_config"] = LoraConfig(
            r=16,
            target_modules=TEXT_LAYERS,
            # Fresh adapters change nothing: policy and reference would be one and the same.
            init_lora_weights=not setup.distinct_reference,
        )
    elif setup.distinct_reference:
        models_["ref_model"] = build_model(scale, setup.device, processor, seed=1)
    else:
        models_["ref_model"] = copy.deepcopy(model)
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": arm.pairs,
        "beta": BETA,
        "max_length": None,
        "bf16": scale.dtype == "bfloat16",
        "use_cpu": setup.device == "cpu",
        "gradient_checkpointing": mode.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if mode.checkpointing else None,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if arm.stock:
        config = DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], **arguments)
        rows = [{"images": [], **{name: setup.rows[0][name] for name in ("prompt", "chosen", "rejected")}}]
        trainer = DPOTrainer(
            model, args=config, train_dataset=Dataset.from_list(rows), processing_class=processor, **models_
        )
    else:
        config = LongVPOConfig(
            num_frames=setup.frames,
            fps=1.0,
            reference=setup.reference,
            tree_packing=arm.tree,
            pairs_per_timeline=arm.pairs,
            freeze_vision_tower=mode.lora,
            **arm.settings,
            **arguments,
        )
        rows = Dataset.from_list(setup.rows[: arm.pairs])
        trainer = LongVPOTrainer(model, args=config, train_dataset=rows, processing_class=processor, **models_)
    if mode.checkpointing:
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def collate(setup: Setup, trainer: DPOTrainer, pairs: slice) -> tuple[dict[str, Any], float]:
    """The batch of these rows, and the seconds it took to decode and process."""
    started = time.perf_counter()
    rows = setup.rows[pairs]
    if ARMS[setup.arm].stock:
        rows = [stock_row(row, setup.frames, ARMS[setup.arm].equal_answers) for row in rows]
    batch = dict(trainer.data_collator(rows))
    return batch, time.perf_counter() - started


class Run:
    """One configuration at work in its own process."""

    def __init__(self, setup: Setup) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._device = setup.device
        self.trainer = build_trainer(setup, self._folder.name)
        self.batch, self._collation = collate(setup, self.trainer, slice(ARMS[setup.arm].pairs))
        self._policy_bytes = {p.untyped_storage().data_ptr() for p in self.trainer.model.parameters()}

    def ready(self) -> dict[str, Any]:
        """What is known before a step."""
        return {
            "collation_seconds": self._collation,
            "tokens": _tokens(self.batch),
            "parameters": sum(p.numel() for p in self.trainer.model.parameters()),
        }

    def first(self) -> dict[str, Any]:
        """The warm-up step: its work, the bytes it saves for the backward pass, and its log-probabilities."""
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._policy_bytes:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        counter = FlopCounter()
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._step()
        ours = isinstance(self.trainer, LongVPOTrainer)
        logged = self.trainer._take_means("train") if ours else self.trainer._metrics["train"]
        metrics = {name: value if ours else value[-1] for name, value in logged.items()}
        return {
            "loss": loss,
            "log_probs": [metrics[f"logps/{answer}"] for answer in ("chosen", "rejected")],
            "flops": counter.flops,
            "flops_causal_skips": counter.skipped,
            "saved_bytes": sum(saved.values()),
        }

    def step(self) -> dict[str, float]:
        """A timed step, and its peak of memory above what was held before it."""
        before = reset_peak(self._device)
        cpu, started = time.process_time(), time.perf_counter()
        self._step()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes(self._device) - before}

    def profile(self) -> list[dict[str, Any]]:
        """The operators that take most of a step, by time in themselves."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            self._step()
        which = "self_device_time_total" if self._device == "cuda" else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, which))
        total = sum(getattr(event, which) for event in events)
        return [
            {"operator": event.key, "calls": event.count, "share": getattr(event, which) / total}
            for event in events[:10]
        ]

    def _step(self) -> float:
        loss = self.trainer.training_step(self.trainer.model, dict(self.batch))
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        wait_for_device(self._device)
        return loss.item()


def _tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Tokens of a batch: of its first prompt, of all answers, and of the reference view's first prompt, if apart."""
    answers = batch["completion_mask"].sum(dim=1)
    prompt = int(batch["attention_mask"][0].sum() - answers[0])
    apart = {"reference": _tokens(batch["reference"])["prompt"]} if "reference" in batch else {}
    return {"prompt": prompt, "answers": int(answers.sum()), **apart}


def serve(connection: Connection, setup: Setup) -> None:
    """Answers `ready`, `first`, `step` and `profile` until told to stop."""
    quiet(setup.threads)
    try:
        run = Run(setup)
        for command in iter(connection.recv, "stop"):
            connection.send(getattr(run, command)())
    except torch.OutOfMemoryError:
        connection.send(OUT_OF_MEMORY)
    except Exception:  # told to the parent with its traceback, which raises it
        connection.send(RuntimeError(f"{setup}:\n{traceback.format_exc()}"))


def losses(connection: Connection, setup: Setup) -> None:
    """The mean loss of the arm's rows, as many at a time as it takes, before any step."""
    quiet(setup.threads)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            trainer = build_trainer(setup, folder)
            trainer.model.train()
            size = ARMS[setup.arm].pairs
            found = []
            for start in range(0, PAIRS, size):
                batch, _ = collate(setup, trainer, slice(start, start + size))
                found.append(trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item())
        connection.send(found)
    except Exception:  # as above
        connection.send(RuntimeError(f"{setup}:\n{traceback.format_exc()}"))


def matmul_peak(connection: Connection, setup: Setup) -> None:
    """FLOP/s of the best of a few square matrix products in the model's precision."""
    quiet(setup.threads)
    width, repeats = (8192, 20) if setup.device == "cuda" else (2048, 4)
    connection.send(best_matmul(setup.device, getattr(torch, SCALES[setup.scale].dtype), width, repeats))
