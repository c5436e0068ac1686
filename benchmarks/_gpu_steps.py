"""Parts of `gpu.py` about cost: steps of the one-GPU recipe beside stock TRL and the plan, vision tower, decoding."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _noise
import torch
from _internvl import SCALES, Scale, build_config, build_model, build_processor
from _parts import Record, World
from _processes import OUT_OF_MEMORY, best_matmul, peak_bytes, reset_peak, wait_for_device
from datasets import Dataset
from torch import Tensor
from transformers import InternVLForConditionalGeneration, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

from longvpo_hf.families import family_of, vision
from longvpo_hf.families.vision import bound_frozen_forward, vision_tower
from longvpo_hf.miniature.machine import processor_name
from longvpo_hf.planning.memory import memory_gib
from longvpo_hf.planning.run import Run
from longvpo_hf.planning.settings import GIB, Machine, Rows, read_config
from longvpo_hf.planning.trace import FlopCounter
from longvpo_hf.planning.work import tflop
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.trainer import LongVPOTrainer

Save = Callable[[Record], None]

RECIPE = Path(__file__).parents[1] / "recipes/configs/internvl3_8b/stage1_lora.yaml"
#: Visual tokens of each step: the first of a length warms up, the longest are timed once.
STEPS = (16384, 16384, 16384, 32768, 32768, 65536, 65536, 131072)
STOCK_STEPS = (16384, 16384, 32768, 32768, 65536)
OFFLOADED_STEPS = (16384, 16384, 65536, 65536, 131072)
SMALL_STEPS = (128, 128, 256)


def scale_of(world: World) -> Scale:
    """The shape of the model: InternVL3-8B's, on a CPU a small one."""
    return SCALES["small" if world.is_small else "8b"]


def device(world: World, save: Save) -> None:
    """What is measured on, and the best matrix product, which shares of the peak refer to."""
    width, repeats = (512, 2) if world.is_small else (8192, 20)
    found = {"matmul_tflops": best_matmul(world.device, torch.bfloat16, width, repeats) / 1e12}
    if world.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_gib": properties.total_memory / GIB, "cuda": torch.version.cuda}
    else:
        found |= {"name": processor_name()}
    save({**found, "cores": os.cpu_count()})


# ------------------------------------------------------------------------------------------------------------ steps


def steps(world: World, save: Save) -> None:
    """Steps of the one-GPU recipe."""
    _our_steps(world, save, SMALL_STEPS if world.is_small else STEPS)


def offloaded(world: World, save: Save) -> None:
    """The same, with activations that wait in main memory."""
    if world.is_small:  # TRL's own needs an accelerator
        import trl.trainer.dpo_trainer as theirs

        theirs.get_act_offloading_ctx_manager = lambda model: torch.autograd.graph.saved_tensors_hooks(
            torch.clone, torch.clone
        )
    _our_steps(world, save, SMALL_STEPS if world.is_small else OFFLOADED_STEPS, "--activation_offloading", "true")


def stock(world: World, save: Save) -> None:
    """Stock TRL on the same rows and settings, up to the length that it survives."""
    scale, sizes = scale_of(world), SMALL_STEPS if world.is_small else STOCK_STEPS
    frames = _frames(scale, sizes)
    processor = build_processor(scale)
    with tempfile.TemporaryDirectory() as folder:
        recipe, settings = _recipe(folder, scale, frames)
        names = ("output_dir", "beta", "bf16", "learning_rate", "max_steps", "gradient_checkpointing", "use_cpu")
        names += ("per_device_train_batch_size", "train_sampling_strategy", "logging_steps", "max_length")
        arguments = {name: getattr(settings, name) for name in names}
        weights = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, settings.sft_weight]}
        config = DPOConfig(**arguments, **weights, save_strategy="no", report_to="none", disable_tqdm=True)
        model = build_model(scale, world.device, processor, seed=0)
        trainer = DPOTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list([_noise.stock_row(number) for number in frames]),
            processing_class=processor,
            peft_config=_adapter(recipe, model),
        )
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: collate(_noise.with_pictures(rows, scale.frame_px))
        _train(trainer, world, save, sizes)


def _our_steps(world: World, save: Save, sizes: Sequence[int], *overrides: str) -> None:
    _noise.need_no_ffmpeg()
    scale = scale_of(world)
    frames = _frames(scale, sizes)
    processor = build_processor(scale)
    with tempfile.TemporaryDirectory() as folder:
        recipe, settings = _recipe(folder, scale, frames, *overrides)
        model = build_model(scale, world.device, processor, seed=0)
        trainer = LongVPOTrainer(
            model,
            args=settings,
            train_dataset=Dataset.from_list([_noise.row(number) for number in frames]),
            processing_class=processor,
            peft_config=_adapter(recipe, model),
        )
        sampler = _noise.NoiseSampler(max(frames), scale.frame_px)
        trainer.data_collator.sampler = trainer.data_collator.reference_sampler = sampler
        _train(trainer, world, save, sizes)


def _frames(scale: Scale, sizes: Sequence[int]) -> list[int]:
    return [size // scale.tokens_per_frame for size in sizes]


def _recipe(folder: str, scale: Scale, frames: Sequence[int], *overrides: str) -> tuple[ModelConfig, LongVPOConfig]:
    """The shipped recipe of one GPU, for as many steps as there are timelines, one timeline a step."""
    given = {
        "output_dir": folder,
        "num_frames": max(frames),
        "max_pixels": scale.frame_px**2,
        "max_steps": len(frames),
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": "true",
    }
    return read_config(RECIPE, [*(f"--{name}={value}" for name, value in given.items()), *overrides])


def _adapter(recipe: ModelConfig, model: Any) -> Any:
    recipe.lora_target_modules = family_of(model.config).adapter_layers
    return get_peft_config(recipe)


def _train(trainer: DPOTrainer, world: World, save: Save, sizes: Sequence[int]) -> None:
    meter = StepMeter(world, save, sizes)
    trainer.add_callback(meter)
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        save({"visual_tokens": meter.size, "failed": OUT_OF_MEMORY})
    except RuntimeError as error:
        if "not enough memory" not in str(error):  # PyTorch's words for a CPU
            raise
        save({"visual_tokens": meter.size, "failed": OUT_OF_MEMORY})


class StepMeter(TrainerCallback):
    """Measures each step of a training, and ends it where the next step would not be done in time.

    The first step of a length counts operations, which takes a little time; it is only timed where it is the last one.
    """

    def __init__(self, world: World, save: Save, sizes: Sequence[int]) -> None:
        self._world, self._save, self._sizes = world, save, sizes
        self._place = 0
        self._counter: FlopCounter | None = None
        self._started = 0.0

    @property
    def size(self) -> int:
        """Visual tokens of the step at hand."""
        return self._sizes[self._place]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers'."""
        if self._sizes.index(self.size) == self._place:
            self._counter = FlopCounter()
            self._counter.__enter__()
        reset_peak(self._world.device)
        wait_for_device(self._world.device)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers'."""
        wait_for_device(self._world.device)
        seconds = time.perf_counter() - self._started
        record: Record = {"visual_tokens": self.size, "seconds": seconds, "peak_gib": self._peak_gib()}
        if self._world.device == "cuda":
            record["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            record |= {"is_first": True, "tflop": (self._counter.flops - self._counter.skipped) / 1e12}
            self._counter = None
        self._save(record)
        self._place += 1
        if self._place < len(self._sizes):
            # Between linear and quadratic, as half of a long step is attention.
            expected = seconds * (self.size / self._sizes[self._place - 1]) ** 1.7
            if expected > self._world.seconds_left:
                self._save({"visual_tokens": self.size, "failed": "no time was left"})
                control.should_training_stop = True

    def _peak_gib(self) -> float:
        return peak_bytes(self._world.device) / GIB


def estimates(world: World, save: Save) -> None:
    """What `longvpo check` says of the same steps."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the settings would open the device, which others measure
    scale = scale_of(world)
    config = build_config(scale, build_processor(scale))
    sizes = sorted(set(SMALL_STEPS[:1] if world.is_small else STEPS))
    for offloading in ("false",) if world.is_small else ("false", "true"):
        for size in sizes:
            (frames,) = _frames(scale, [size])
            overrides = ("--activation_offloading", offloading, "--use_cpu", "true")
            recipe, settings = _recipe("unused", scale, [frames], *overrides)
            rows = Rows(
                _noise.QUESTION_TOKENS,
                _noise.CHOSEN_TOKENS,
                _noise.REJECTED_TOKENS,
                reference_frames=_noise.anchor_frames(frames),
                label_tokens=3,  # of this processor: the label, and the marks around the frame
                source_px=(scale.frame_px, scale.frame_px),
            )
            plan = Run(config, recipe, settings, Machine(), rows)  # without what else a plan looks for, which is slow
            memory, work = memory_gib(plan, frames), sum(tflop(plan).values())
            tensors = sum(value for name, value in memory.items() if name != "CUDA, work space, fragments")
            found = {"tensors_gib": tensors, "total_gib": sum(memory.values()), "tflop": work}
            save({"visual_tokens": size, "is_offloaded": offloading == "true", **found})


# -------------------------------------------------------------------------------------------------- the vision tower


def tower(world: World, save: Save) -> None:
    """A frozen vision tower: all frames at once, and in pieces."""
    scale = scale_of(world)
    processor = build_processor(scale)
    config = build_config(scale, processor)
    config.text_config.num_hidden_layers = 1
    frames = 8 if world.is_small else 256
    if world.is_small:
        vision.CHUNK_ELEMENTS = 4 * 3 * scale.frame_px**2
    with torch.device(world.device):
        model = InternVLForConditionalGeneration._from_config(config, dtype=getattr(torch, scale.dtype))
    part: Any = vision_tower(model)
    part.requires_grad_(False)
    pixels = torch.randn(frames, 3, scale.frame_px, scale.frame_px, device=world.device, dtype=model.dtype)
    outputs: dict[str, Tensor] = {}
    for way in ("at once", "in pieces"):
        if way == "in pieces":
            bound_frozen_forward(model)
        try:
            outputs[way], record = _tower_call(world.device, part, pixels)
        except torch.OutOfMemoryError:
            record = {"failed": OUT_OF_MEMORY}
        save({"way": way, "frames": frames, **record})
    if len(outputs) == 2:
        whole = outputs["at once"].float()
        difference = float((outputs["in pieces"].float() - whole).norm() / whole.norm())
        save({"way": "difference", "frames": frames, "difference": difference})


def _tower_call(device_name: str, part: Any, pixels: Tensor) -> tuple[Tensor, Record]:
    with torch.no_grad():
        part(pixels)  # warms up
        before = reset_peak(device_name)
        wait_for_device(device_name)
        started = time.perf_counter()
        output = part(pixels).last_hidden_state
        wait_for_device(device_name)
    seconds = time.perf_counter() - started
    return output, {"seconds": seconds, "peak_gib": (peak_bytes(device_name) - before) / GIB}


# ---------------------------------------------------------------------------------------------------------- decoding


def decoding(world: World, save: Save) -> None:
    """Frames of a film on the CPU, as the sampler takes them, and on the GPU's own decoder."""
    from torchcodec.decoders import VideoDecoder

    from longvpo_hf.frames import FrameSampler
    from longvpo_hf.timeline import Clip, Timeline

    seconds, counts = (4, (4,)) if world.is_small else (300, (64, 256))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/film.mp4"
        source = f"testsrc2=duration={seconds}:size=1280x720:rate=30"
        encoding = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-g", "60"]
        subprocess.run(["ffmpeg", "-loglevel", "error", "-y", "-f", "lavfi", "-i", source, *encoding, path], check=True)
        for count in counts:
            started = time.perf_counter()
            timeline = Timeline((Clip(path, 0.0, float(seconds)),))
            FrameSampler(count, None, 448 * 448, cache_bytes=0)(timeline)
            save({"frames": count, "by": "sampler, CPU", "seconds": time.perf_counter() - started})
            places = [int((place + 0.5) * seconds * 30 / count) for place in range(count)]
            for by in ("cpu", world.device) if world.device != "cpu" else ("cpu",):
                started = time.perf_counter()
                decoder = VideoDecoder(path, device=by, seek_mode="exact")
                decoder.get_frames_at(places)
                wait_for_device(by)
                save({"frames": count, "by": f"torchcodec, {by}", "seconds": time.perf_counter() - started})
