"""One training step of stock TRL and of `LongVPOTrainer`, side by side; kept in `benchmarks/results/trainer_step_*`.

    python benchmarks/trainer_step.py --sizes 1024 4096 16384 --modes full lora checkpointing --threads 1

Four arms on the same weights, frames, pairs and threads: stock TRL `DPOTrainer` (frames as images, reference on the
whole video); ours with nothing but the anchored reference; ours with everything on; the same with four pairs of one
timeline in a step. And a control: stock on two answers of equal length, which need no padding and so no attention mask.

Measured is the step on a collated batch: `training_step` (forward, reference, loss, backward) and the optimizer's step;
collation (decoding and the processor) is timed apart. Each size, mode and arm lives in a process of its own; on a CPU
those of a size and mode take turns, so that a noisy machine is noisy to all. Before anything is timed, all arms must
give one and the same loss on the same reference view, and in every configuration the policy's log-probabilities of the
three one-pair arms must agree.

    python benchmarks/trainer_step.py --model-scale hybrid --sizes 1024 4096 --modes full lora --steps 2

is about a text model whose layers are mostly linear attention: ours without trees and with them, one pair and four.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import logging
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torchcodec.encoders import VideoEncoder
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from trl import DPOConfig, DPOTrainer

from longvpo_hf.families import TEXT_LAYERS
from longvpo_hf.frames import FrameSampler
from longvpo_hf.miniature.machine import processor_name
from longvpo_hf.planning.trace import FlopCounter
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import Clip, Timeline
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.trainer import LongVPOTrainer

RESULTS = Path(__file__).parent / "results"

MAX_CLIPS = 16
PAIRS = 4
QUESTION_TOKENS, CHOSEN_TOKENS, REJECTED_TOKENS = 16, 64, 48
BETA = 0.1
SOURCE_FPS = 2
WORDS = [f"word{number}" for number in range(256)]
OUT_OF_MEMORY = "out of memory"


# ------------------------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Scale:
    """The shape of an InternVL; its random weights are drawn from the configuration."""

    text: dict[str, Any]
    vision: dict[str, Any]
    frame_px: int
    patch_px: int
    dtype: str

    @property
    def tokens_per_frame(self) -> int:
        """Patches of a frame, four shuffled into one."""
        return (self.frame_px // self.patch_px // 2) ** 2


SCALES = {
    # Attention is narrower than the residual stream: at these widths it would else be nearly all of the work at 16k
    # tokens, while in the 8B model the linear layers are more than half of it.
    "small": Scale(
        text={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "vocab_size": 320,
        },
        vision={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2},
        frame_px=128,
        patch_px=8,
        dtype="float32",
    ),
    # Three layers of linear attention to one of full attention, as in Qwen3.5.
    "hybrid": Scale(
        text={
            "model_type": "qwen3_5_text",
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "vocab_size": 320,
        },
        vision={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2},
        frame_px=128,
        patch_px=8,
        dtype="float32",
    ),
    # The configuration of OpenGVLab/InternVL3-8B-hf.
    "8b": Scale(
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 151674,
        },
        vision={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        frame_px=448,
        patch_px=14,
        dtype="bfloat16",
    ),
}


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


ARMS = {
    "stock": Arm("stock TRL DPOTrainer", stock=True),
    "stock-equal": Arm("stock TRL, answers of equal length", stock=True, equal_answers=True),
    "anchor": Arm("ours, anchor reference only", tree=False),
    "all": Arm("ours, everything on"),
    "all-4": Arm("ours, four pairs of a timeline", pairs=PAIRS),
    "anchor-4": Arm("ours, four pairs of a timeline, anchor reference only", tree=False, pairs=PAIRS),
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


@dataclass(frozen=True)
class Targets:
    """The issue's targets, for one pair per timeline if nothing else is said."""

    device: str

    def rows(self, ratios: dict[str, Any]) -> list[tuple[str, str, float | None, bool | None]]:
        """Name, bound, what was reached and whether that is enough."""
        time_bound = 2.5 if self.device == "cuda" else 2.3
        one, four, control = (ratios.get(arm, {}) for arm in ("all", "all-4", "stock-equal"))

        def against_control(arm: dict[str, float], figure: str) -> float | None:
            return arm[figure] / control[figure] if figure in arm and figure in control else None

        wanted: list[tuple[str, Callable[[float, float], bool], float, float | None]] = [
            ("FLOPs, stock over ours", float.__ge__, 2.5, one.get("flops")),
            ("step time, stock over ours", float.__ge__, time_bound, one.get("seconds")),
            ("… stock on answers of equal length", float.__ge__, time_bound, against_control(one, "seconds")),
            ("peak memory, ours over stock", float.__le__, 0.55, one.get("peak")),
            ("… stock on answers of equal length", float.__le__, 0.55, against_control(one, "peak")),
            ("step time, anchor reference only over everything on", float.__ge__, 1.8, ratios.get("anchor_over_all")),
            ("step time per pair, four pairs of a timeline", float.__ge__, 9.0, four.get("seconds")),
            ("… stock on answers of equal length", float.__ge__, 9.0, against_control(four, "seconds")),
        ]
        return [
            (name, ("≥" if holds is float.__ge__ else "≤") + f" {bound}", value, value and holds(value, bound))
            for name, holds, bound, value in wanted
        ]


# --------------------------------------------------------------------------------------------------------- the data


def write_rows(folder: Path, frames: int, frame_px: int) -> list[dict[str, Any]]:
    """Four preference rows about one timeline of real mp4s, each about a clip of its own, its reference view."""
    num_clips = min(MAX_CLIPS, frames)
    seconds = frames // num_clips
    noise = torch.Generator().manual_seed(frames)
    clips = []
    for number in range(num_clips):
        coarse = torch.randint(0, 256, (seconds * SOURCE_FPS, 3, 8, 8), dtype=torch.uint8, generator=noise)
        pixels = torch.nn.functional.interpolate(coarse, size=(frame_px, frame_px))
        path = folder / f"clip{number}.mp4"
        VideoEncoder(pixels, frame_rate=SOURCE_FPS).to_file(str(path), extra_options={"threads": 1})
        clips.append(Clip(str(path), 0.0, float(seconds)))
    rows = []
    for pair in range(PAIRS):
        anchor = pair * num_clips // PAIRS
        question, chosen, rejected = (
            " ".join(WORDS[(pair * 50 + offset + i) % len(WORDS)] for i in range(count - used))
            # The chat template adds the end of the answer.
            for count, used, offset in (
                (QUESTION_TOKENS, 0, 0),
                (CHOSEN_TOKENS, 1, 20),
                (REJECTED_TOKENS, 1, 90),
            )
        )
        preference = VideoPreference(
            Timeline(tuple(clips)), question, chosen, rejected, evidence=(anchor,), reference=(anchor,)
        )
        rows.append(preference.to_row(lambda clip: clip.path))
    return rows


def stock_row(row: dict[str, Any], frames: int, equal_answers: bool) -> dict[str, Any]:
    """The row as TRL takes it: frames as pictures, labelled as InternVL's processor labels those of a video.

    Args:
        equal_answers: Whether the rejected answer is drawn out to the length of the chosen one.
    """
    preference = VideoPreference.from_row(row)
    decoded = FrameSampler(frames, fps=1.0)(preference.timeline)
    content: list[dict[str, str]] = []
    for number in range(1, len(decoded) + 1):
        content += [{"type": "text", "text": f"Frame{number}: "}, {"type": "image"}]
    content.append({"type": "text", "text": "\n" + preference.question})
    more = " ".join(["", *WORDS[: CHOSEN_TOKENS - REJECTED_TOKENS]]) if equal_answers else ""
    return {
        "images": [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in decoded.pixels],
        "prompt": [{"role": "user", "content": content}],
        "chosen": row["chosen"],
        "rejected": [{"role": "assistant", "content": preference.rejected + more}],
    }


# -------------------------------------------------------------------------------------------------------- the model


def build_processor(scale: Scale) -> ProcessorMixin:
    """A real InternVL processor; its tokenizer has one token per word, and one for all frame labels."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    special = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<video>", *names.values()]
    words = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        extra_special_tokens={**names, "video_token": "<video>"},
    )
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    size = {"height": scale.frame_px, "width": scale.frame_px}
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
        "{% if part['type'] == 'video' %}<video>\n{% elif part['type'] == 'image' %}<IMG_CONTEXT>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        fast,
        InternVLVideoProcessor(size=size),
        image_seq_length=scale.tokens_per_frame,
        chat_template=template,
    )


def build_model(setup: Setup, processor: ProcessorMixin, seed: int) -> InternVLForConditionalGeneration:
    """The model with random weights decided by `seed`, on the device."""
    scale = SCALES[setup.scale]
    config = InternVLConfig(
        vision_config={
            **scale.vision,
            "image_size": [scale.frame_px] * 2,
            "patch_size": [scale.patch_px] * 2,
            "layer_scale_init_value": 0.1,
        },
        text_config={
            "model_type": "qwen2",
            **scale.text,
            "max_position_embeddings": 2**18,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": processor.tokenizer.eos_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        image_token_id=processor.image_token_id,
        image_seq_length=scale.tokens_per_frame,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    with torch.device(setup.device):
        return InternVLForConditionalGeneration._from_config(config, dtype=getattr(torch, scale.dtype))


def build_trainer(setup: Setup, folder: str) -> DPOTrainer:
    """The arm's trainer, readied as `train()` would."""
    arm, mode, scale = ARMS[setup.arm], MODES[setup.mode], SCALES[setup.scale]
    processor = build_processor(scale)
    model = build_model(setup, processor, seed=0)
    models_: dict[str, Any] = {}
    if mode.lora:
        models_["peft_config"] = LoraConfig(
            r=16,
            target_modules=TEXT_LAYERS,
            # Fresh adapters change nothing: policy and reference would be one and the same.
            init_lora_weights=not setup.distinct_reference,
        )
    elif setup.distinct_reference:
        models_["ref_model"] = build_model(setup, processor, seed=1)
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


# ------------------------------------------------------------------------------------------------ inside the process


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
        before = self._reset_peak()
        cpu, started = time.process_time(), time.perf_counter()
        self._step()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": self._peak() - before}

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
        if self._device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def _reset_peak(self) -> int:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status_bytes("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else _status_bytes("VmHWM")


def _tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Tokens of a batch: of its first prompt, of all answers, and of the reference view's first prompt, if apart."""
    answers = batch["completion_mask"].sum(dim=1)
    prompt = int(batch["attention_mask"][0].sum() - answers[0])
    apart = {"reference": _tokens(batch["reference"])["prompt"]} if "reference" in batch else {}
    return {"prompt": prompt, "answers": int(answers.sum()), **apart}


def _status_bytes(name: str) -> int:
    """A figure of this process's memory, as Linux keeps it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def serve(connection: Connection, setup: Setup) -> None:
    """Answers `ready`, `first`, `step` and `profile` until told to stop."""
    _quiet(setup.threads)
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
    _quiet(setup.threads)
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
    _quiet(setup.threads)
    width, repeats = (8192, 20) if setup.device == "cuda" else (2048, 4)
    dtype = getattr(torch, SCALES[setup.scale].dtype)
    left, right = (torch.randn(width, width, dtype=dtype, device=setup.device) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        if setup.device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * width**3 / (time.perf_counter() - started))
    connection.send(best)


def _quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


# ------------------------------------------------------------------------------------------------- from the outside


class Lane:
    """A configuration's process, told what to do; silent once it ran out of memory."""

    def __init__(self, setup: Setup, target: Callable[[Connection, Setup], None] = serve) -> None:
        forked = setup.device == "cpu" and sys.platform == "linux"
        context = multiprocessing.get_context("fork" if forked else "spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, setup), daemon=True)
        self._process.start()
        theirs.close()
        self.failed: str | None = None

    def ask(self, command: str) -> Any:
        """The answer to a command; None if memory ran out, now or before."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(command)
        return self.answer()

    def answer(self) -> Any:
        """What the process sends next."""
        if self.failed is not None:
            return None
        try:
            answer = self._connection.recv()
        except EOFError:  # the kernel ended it
            answer = OUT_OF_MEMORY
        if isinstance(answer, Exception):
            raise answer
        if answer == OUT_OF_MEMORY:
            self.failed = OUT_OF_MEMORY
            return None
        return answer

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send("stop")
        self._process.join()


def one_answer(setup: Setup, target: Callable[[Connection, Setup], None]) -> Any:
    """What a process that is asked nothing sends."""
    lane = Lane(setup, target)
    answer = lane.answer()
    lane.stop()
    return answer


def check_losses(setup: Setup, arms: list[str], tolerance: float) -> dict[str, Any]:
    """The losses of the arms on the same reference view; they must agree with those of the first.

    Raises:
        RuntimeError: If they do not: what is timed would not be the same training.
    """
    same = replace(setup, reference="full", distinct_reference=True)
    found = {arm: one_answer(replace(same, arm=arm), losses) for arm in arms if not ARMS[arm].equal_answers}
    first = next(iter(found.values()))
    for arm, values in found.items():
        if first is None or values is None:  # out of memory
            continue
        expected = first if len(values) == len(first) else [sum(first) / len(first)] * len(values)
        far = [abs(value - other) / (1 + abs(other)) for value, other in zip(values, expected, strict=True)]
        if not max(far) <= tolerance:
            raise RuntimeError(
                f"{ARMS[arm].title} gives losses {values}, expected {expected} on the same reference view "
                f"({setup.size} tokens, {setup.mode}): relative difference {max(far):.2g}, bound {tolerance:g}. Timing "
                "them would compare different things."
            )
    return found


def check_log_probs(results: dict[str, Any], tolerance: float) -> None:
    """The policy's log-probabilities do not depend on the reference: those of the one-pair arms must agree.

    Raises:
        RuntimeError: If they do not.
    """
    comparable = [arm for arm in results if ARMS[arm].pairs == 1 and not ARMS[arm].equal_answers]
    values = {arm: results[arm]["log_probs"] for arm in comparable if "log_probs" in results[arm]}
    for arm, found in values.items():
        for value, expected in zip(found, next(iter(values.values())), strict=True):
            if not math.isclose(value, expected, rel_tol=tolerance):
                raise RuntimeError(f"{ARMS[arm].title}: policy log-probability {value}, expected {expected}.")


def measure(
    setups: dict[str, Setup], steps: int, budget_seconds: float, interleave: bool, profile: bool
) -> dict[str, Any]:
    """All arms of one size and mode, in turns; without `interleave` one after the other."""
    results: dict[str, Any] = {arm: {"steps": []} for arm in setups}
    groups = [list(setups)] if interleave else [[arm] for arm in setups]
    for group in groups:
        lanes = {}
        for arm in group:
            lanes[arm] = Lane(setups[arm])
            results[arm].update(lanes[arm].ask("ready") or {})
        started = time.perf_counter()
        for arm, lane in lanes.items():
            results[arm].update(lane.ask("first") or {})
        round_seconds = time.perf_counter() - started
        for _ in range(min(steps, max(2, int(budget_seconds / round_seconds)))):
            for arm, lane in lanes.items():
                step = lane.ask("step")
                if step is not None:
                    results[arm]["steps"].append(step)
        if profile and "all" in lanes:
            results["all"]["profile"] = lanes["all"].ask("profile")
        for arm, lane in lanes.items():
            if lane.failed is not None:
                results[arm] = {"failed": lane.failed}
            lane.stop()
    return results


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """Each arm against stock: times and FLOPs per pair, stock over ours; memory of a step, ours over stock."""

    def middle(arm: str, figure: str) -> float:
        return median(step[figure] for step in results[arm]["steps"])

    found: dict[str, Any] = {arm: {} for arm in results}
    whole = [arm for arm, result in results.items() if "failed" not in result]
    if "stock" in whole:
        for arm in whole:
            pairs = ARMS[arm].pairs
            for figure in ("seconds", "cpu_seconds"):
                found[arm][figure] = pairs * middle("stock", figure) / middle(arm, figure)
            found[arm]["flops"] = pairs * results["stock"]["flops"] / results[arm]["flops"]
            found[arm]["peak"] = middle(arm, "peak_bytes") / middle("stock", "peak_bytes")
            found[arm]["saved"] = results[arm]["saved_bytes"] / results["stock"]["saved_bytes"]
    if "anchor" in whole and "all" in whole:
        found["anchor_over_all"] = middle("anchor", "seconds") / middle("all", "seconds")
    found["without_over_with"] = {
        str(pairs): {
            figure: middle(without, figure) / middle(within, figure) for figure in ("cpu_seconds", "peak_bytes")
        }
        for pairs, (without, within) in WITHOUT_AND_WITH.items()
        if without in whole and within in whole
    }
    return found


# ------------------------------------------------------------------------------------------------------- the report


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    text = [
        f"# One training step on {results['settings']['device']}",
        "",
        *_SETTING.format(**results["settings"], **_shape(results)).splitlines(),
        "",
        *_tree_lines(results),
        "",
        *(_stock_lines(results) if "stock" in results["settings"]["arms"] else []),
        "## Measured",
        "",
        "Seconds: median of the steps after a warm-up step [fastest – slowest]. Peak: the median step's, above what "
        "was held before it. TFLOP: of a step, reference and backward pass included.",
        "",
        "| visual tokens | mode | arm | steps | seconds | CPU s | peak MB | saved MB | TFLOP | of peak | collation s |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in results["runs"]:
        text += [_measured_line(run, arm, results["matmul_flops_per_second"]) for arm in run["arms"]]
    text += ["", *_HOW.splitlines(), "", *_profile_lines(results), "", "## Where", ""]
    text += [
        f"- {machine['device']}, {machine['cores']} cores, {machine['platform']}; load average "
        f"{machine['load_before']} before and {machine['load_after']} after; threads: {results['settings']['threads']}",
        f"- best matrix product in {SCALES[results['settings']['scale']].dtype}: "
        f"{results['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s",
        f"- versions: {', '.join(f'{name} {number}' for name, number in results['versions'].items())}",
        f"- `{results['command']}`, {results['minutes']:.0f} minutes",
        "",
    ]
    return "\n".join(text)


def _tree_lines(results: dict[str, Any]) -> list[str]:
    """What trees alone save: the same trainer, reference and rows without them and with them."""
    text = [
        "## Trees",
        "",
        "Ours without trees over ours with them, all else equal, by the pairs in a step: CPU time, and peak memory.",
        "",
        "| visual tokens | mode | time, one pair | time, four pairs | memory, one pair | memory, four pairs |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for run in results["runs"]:
        found = [run["ratios"]["without_over_with"].get(str(pairs), {}) for pairs in WITHOUT_AND_WITH]
        cells = [_times(ratio.get(figure)) for figure in ("cpu_seconds", "peak_bytes") for ratio in found]
        text.append(f"| {run['size']} | {run['mode']} | " + " | ".join(cells) + " |")
    return text


def _stock_lines(results: dict[str, Any]) -> list[str]:
    """Each arm against stock TRL, and the targets."""
    text = [
        "## Ratios",
        "",
        "Time and FLOPs are stock over ours, **per pair** (higher is better); memory is ours over stock, **of a "
        "step**, which with four pairs per timeline holds four pairs (lower is better).",
        "",
        "| visual tokens | mode | arm | time | CPU time | FLOPs | peak memory | saved for backward |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in results["runs"]:
        for arm in run["arms"]:
            if arm == "stock":
                continue
            found = run["ratios"][arm]
            cells = [_times(found.get(name)) for name in ("seconds", "cpu_seconds", "flops", "peak", "saved")]
            text.append(f"| {run['size']} | {run['mode']} | {ARMS[arm].title} | " + " | ".join(cells) + " |")
    return [*text, "", *_target_lines(results), ""]


_SETTING = """\
An InternVL of random weights ({parameters:.3g} parameters, {dtype}, scale `{scale}`), {tokens_per_frame} visual tokens
a frame, a timeline of at most {max_clips} clips of which the anchored reference sees one; answers of {chosen_tokens}
and {rejected_tokens} tokens. Same weights, frames, pairs and threads in all arms. Each of the four pairs of a timeline
is about another clip, so their references share nothing."""

_HOW = """\
- FLOPs are torch's counter over one warm-up step, by the same formulas in all arms: attention counts as full squares
  even where a kernel is told it is causal and skips half. The share of the matrix-product peak takes those halves off.
- Stock TRL puts answers of unequal length side by side, padded; transformers then gives the attention a dense mask
  [2, 1, L, L] and no kernel skips anything. Ours attends along the trunk causally, without a mask. What that difference
  makes is seen beside "stock TRL, answers of equal length", where no mask is needed: two answers that happen to be of
  one length (measured in the first mode only). In a model of more heads a mask weighs less in time.
- TRL's fused LM head scores only the answers' tokens on a GPU, and every position elsewhere, for stock and ours alike.
  The small model's vocabulary is small, so that its head is no larger a part of it than the 8B model's is.
- Collation: decoding the mp4s and the model's processor, the first time. Stock TRL reads no videos; it is given the
  same frames, decoded by our sampler.
- Peak memory on a CPU is the resident set's highest mark, reset before each step, in a process that does nothing else;
  on a GPU what the allocator gave out. Weights, optimizer state and the batch are held before it and not counted; the
  batch of stock holds every frame twice, "anchor reference only" makes the second copy in the step. Saved for backward:
  bytes of all distinct storages that autograd keeps when the loss is reached, weights left out, whatever the
  allocator; under checkpointing without what is recomputed.
- LoRA: rank 16 on the language model's linear layers. "everything on" also freezes the vision tower there."""


def _shape(results: dict[str, Any]) -> dict[str, Any]:
    scale = SCALES[results["settings"]["scale"]]
    known = [
        result["parameters"] for run in results["runs"] for result in run["arms"].values() if "parameters" in result
    ]
    return {
        "dtype": scale.dtype,
        "tokens_per_frame": scale.tokens_per_frame,
        "max_clips": MAX_CLIPS,
        "chosen_tokens": CHOSEN_TOKENS,
        "rejected_tokens": REJECTED_TOKENS,
        "parameters": float(known[0]) if known else math.nan,
    }


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _largest(results: dict[str, Any]) -> list[dict[str, Any]]:
    size = max(run["size"] for run in results["runs"])
    return [run for run in results["runs"] if run["size"] == size]


def _target_lines(results: dict[str, Any]) -> list[str]:
    runs = _largest(results)
    tables = [Targets(results["settings"]["device"]).rows(run["ratios"]) for run in runs]
    text = [
        f"## Targets, at {runs[0]['size']} visual tokens",
        "",
        "They were set for 16k tokens. **Bold**: missed, with how far it is from the target.",
        "",
        "| | target | " + " | ".join(run["mode"] for run in runs) + " |",
        "|---|---|" + "---:|" * len(runs),
    ]
    for lines in zip(*tables, strict=True):
        name, bound = lines[0][:2]
        target = float(bound.split()[1])
        cells = [
            _times(value) if value is None or enough else f"**{value:.2f}** ({value / target - 1:+.0%})"
            for _, _, value, enough in lines
        ]
        text.append(f"| {name} | {bound} | " + " | ".join(cells) + " |")
    tokens = runs[0]["arms"].get("all", {}).get("tokens")
    ceilings = " | ".join(MODES[run["mode"]].ceiling for run in runs)
    return [
        *text,
        f"| most that one pair can reach where linear layers dominate | | {ceilings} |",
        "",
        "The last line, in forwards of one sequence: a backward pass is two more (with adapters alone one), "
        "checkpointing one forward more; stock scores two sequences and twice the reference, ours one trunk. Where "
        "attention dominates, its backward is 2.5 forwards: 2.57, and 2.44 with checkpointing. Branches and the "
        "anchor's forward come off that" + (f": a pair is {_counted(tokens)}." if tokens else "."),
    ]


def _counted(tokens: dict[str, int]) -> str:
    return (
        f"{tokens['prompt']} tokens of prompt, {tokens['answers']} of answers and {tokens['reference']} of the "
        "reference's prompt"
    )


def _measured_line(run: dict[str, Any], arm: str, peak: float) -> str:
    result = run["arms"][arm]
    head = f"| {run['size']} | {run['mode']} | {ARMS[arm].title} | "
    if "failed" in result:
        return head + f"{result['failed']} |" + " – |" * 7
    steps = result["steps"]
    seconds = [step["seconds"] for step in steps]
    middle = median(seconds)
    return head + " | ".join(
        [
            str(len(steps)),
            f"{middle:.3g} [{min(seconds):.3g} – {max(seconds):.3g}]",
            f"{median(step['cpu_seconds'] for step in steps):.3g}",
            f"{median(step['peak_bytes'] for step in steps) / 1e6:.0f}",
            f"{result['saved_bytes'] / 1e6:.0f}",
            f"{result['flops'] / 1e12:.3g}",
            f"{(result['flops'] - result['flops_causal_skips']) / middle / peak:.0%}",
            f"{result['collation_seconds']:.2f} |",
        ]
    )


def _profile_lines(results: dict[str, Any]) -> list[str]:
    for run in _largest(results):
        operators = run["arms"]["all"].get("profile")
        if operators:
            return [
                f"## Where the time of “{ARMS['all'].title}” goes ({run['size']} tokens, {run['mode']})",
                "",
                "| operator | calls | share of the step |",
                "|---|---:|---:|",
                *(f"| `{o['operator']}` | {o['calls']} | {o['share']:.1%} |" for o in operators),
            ]
    return []


# ------------------------------------------------------------------------------------------------------------- main


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="Visual tokens. Default: 1024 4096 16384, on a GPU to 131072."
    )
    parser.add_argument("--modes", nargs="+", choices=list(MODES), help=f"Default: {DEFAULT_MODES}.")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help=f"Default: {DEFAULT_ARMS}.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model-scale", choices=list(SCALES), default="small")
    parser.add_argument("--steps", type=int, default=5, help="Timed steps.")
    parser.add_argument(
        "--budget",
        type=float,
        default=60.0,
        help="Seconds of timed steps per size and mode: fewer of them where they are slow, at least two.",
    )
    parser.add_argument(
        "--output", type=Path, help="Folder and stem of the results; default benchmarks/results/trainer_step_<device>."
    )
    args = parser.parse_args()
    args.sizes = sorted(args.sizes or [1024, 4096, 16384, *([32768, 65536, 131072] if args.device == "cuda" else [])])
    args.modes = args.modes or DEFAULT_MODES[args.model_scale]
    args.arms = args.arms or DEFAULT_ARMS[args.model_scale]
    hybrid = "_hybrid" if args.model_scale == "hybrid" else ""
    args.output = args.output or RESULTS / f"trainer_step_{args.device}{hybrid}"
    tokens = SCALES[args.model_scale].tokens_per_frame
    for size in args.sizes:
        if size % (PAIRS * tokens):
            parser.error(
                f"--sizes {size}: must be a multiple of {PAIRS * tokens} ({PAIRS} clips of {tokens}-token frames)"
            )
    return args


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else processor_name()


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


@contextlib.contextmanager
def _rows_of_sizes(args: argparse.Namespace) -> Iterator[dict[int, list[dict[str, Any]]]]:
    scale = SCALES[args.model_scale]
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for size in args.sizes:
            path = Path(folder) / str(size)
            path.mkdir()
            rows[size] = write_rows(path, size // scale.tokens_per_frame, scale.frame_px)
        yield rows


def run(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Checks and measures everything asked for; `save` is given the results after each size and mode."""
    started = time.time()
    scale = SCALES[args.model_scale]
    tolerance = 1e-5 if scale.dtype == "float32" else 3e-2
    with _rows_of_sizes(args) as rows:
        smallest, largest = args.sizes[0], args.sizes[-1]

        def setup(size: int, mode: str, arm: str) -> Setup:
            return Setup(size, mode, arm, args.model_scale, args.device, args.threads, rows[size])

        results: dict[str, Any] = {
            "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "load_before": _load()},
            "versions": {n: version(n) for n in ("longvpo-hf", "torch", "transformers", "trl", "peft", "torchcodec")},
            "command": " ".join(["python", "benchmarks/trainer_step.py", *sys.argv[1:]]),
            "settings": {
                "device": args.device,
                "scale": args.model_scale,
                "threads": args.threads,
                **{name: getattr(args, name) for name in ("sizes", "modes", "arms", "steps", "budget")},
            },
            "model": asdict(scale),
            "matmul_flops_per_second": one_answer(setup(smallest, args.modes[0], "all"), matmul_peak),
            "same_loss": {
                mode: check_losses(setup(smallest, mode, "all"), args.arms, tolerance) for mode in args.modes
            },
            "runs": [],
        }
        for size in args.sizes:
            for mode in args.modes:
                first = mode == args.modes[0]  # what a mask costs does not depend on the mode
                arms = measure(
                    {arm: setup(size, mode, arm) for arm in args.arms if first or not ARMS[arm].equal_answers},
                    args.steps,
                    args.budget,
                    interleave=args.device == "cpu",
                    profile=first and size == largest,
                )
                check_log_probs(arms, tolerance)
                results["runs"].append({"size": size, "mode": mode, "arms": arms, "ratios": ratios(arms)})
                results["machine"].update(load_after=_load(), device=_device_name(args.device))
                results["minutes"] = (time.time() - started) / 60
                save(results)
    return results


def last_line(results: dict[str, Any]) -> str:
    """The ratios of the largest size, in the first mode that has them."""
    found = [run["ratios"] for run in _largest(results)]
    best = next((ratios for ratios in found if "seconds" in ratios.get("all", {})), found[0])
    time_ratio, time_ratio_4 = (best.get(arm, {}).get("seconds", math.nan) for arm in ("all", "all-4"))
    memory = best.get("all", {}).get("peak", math.nan)
    return f"trainer_step: time_ratio={time_ratio:.2f} memory_ratio={memory:.2f} time_ratio_4={time_ratio_4:.2f}"


def main() -> None:
    """Measures, and writes the results after each size and mode."""
    args = _arguments()
    _quiet(threads=1)  # here only videos are made; a pool of threads would not survive the forks

    def save(results: dict[str, Any]) -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(report(results), encoding="utf-8")

    results = run(args, save)
    print(report(results))
    print(last_line(results))


if __name__ == "__main__":
    main()
