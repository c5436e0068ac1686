"""The plan of `longvpo check` against a real step of `LongVPOTrainer`; kept in `benchmarks/results/plan.*`.

    python benchmarks/plan.py

Two comparisons, both on a CPU in float32: the InternVL of `trainer_step.py` (2 million parameters, a residual stream
like a real model's) at growing lengths in all its modes; and the tests' tiny models of all families. Measured are
parameters, tokens of the collated batch, FLOPs (without the causal halves, as in a plan), bytes that autograd saves,
bytes of gradients and optimizer, and the highest resident memory of the step above what was held before it. Nothing
here applies to a GPU's time or memory.

On a CPU TRL's fused head scores every position, on a GPU only the answers', which is what a plan is about: the head's
work is left out on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _arms import ARMS, MODES, Run, Setup
from _internvl import CHOSEN_TOKENS, MAX_CLIPS, QUESTION_TOKENS, REJECTED_TOKENS, SCALES, write_rows
from _processes import one_answer, quiet
from datasets import Dataset
from torch import Tensor
from trl import ModelConfig

from longvpo_hf.miniature.machine import processor_name
from longvpo_hf.planning import Rows, make_plan
from longvpo_hf.planning.memory import FRAGMENTED, RESERVE_GIB
from longvpo_hf.planning.settings import GIB
from longvpo_hf.planning.tokens import CHAT_TOKENS, frame_shapes
from longvpo_hf.planning.trace import FlopCounter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_models
import trainers

RESULTS = Path(__file__).parent / "results" / "plan"
FIGURES = {
    "parameters": "parameters",
    "trained": "trained",
    "visual_tokens": "visual tokens",
    "gflop": "GFLOP",
    "saved_mib": "saved for backward, MiB",
    "gradients_mib": "gradients, MiB",
    "optimizer_mib": "optimizer, MiB",
    "peak_mib": "peak of the step, MiB",
}
MIB = 2**20
SIZES = (1024, 4096, 16384)
FAMILIES = tuple(tiny_models.ALL)


def internvl(connection: Connection, setup: Setup) -> None:
    """Sends what was planned and measured for one configuration of `trainer_step.py`."""
    quiet(setup.threads)
    try:
        run = GradientRun(setup)
        tokens = run.ready()["tokens"]
        estimated = estimate(run.trainer, run.batch, MODES[setup.mode].lora, _rows(setup, tokens))
        first = run.first()
        head = head_gflop(run.trainer, run.batch)
        peak = max(run.step()["peak_bytes"] for _ in range(2))
        measured = {
            **held(run.trainer),
            "visual_tokens": int(run.batch["visual_tokens"]),
            "gflop": (first["flops"] - first["flops_causal_skips"]) / 1e9 - head,
            "saved_mib": first["saved_bytes"] / MIB,
            "gradients_mib": run.gradient_bytes / MIB,
            "peak_mib": peak / MIB,
        }
        connection.send({"estimated": estimated, "measured": measured})
    except Exception:  # sent to the parent with its traceback, which raises it
        connection.send(RuntimeError(f"{setup.mode} {setup.size}:\n{traceback.format_exc()}"))


def _rows(setup: Setup, tokens: dict[str, int]) -> Rows:
    scale = SCALES[setup.scale]
    beside = tokens["prompt"] - setup.frames * scale.tokens_per_frame - QUESTION_TOKENS - CHAT_TOKENS
    return Rows(
        QUESTION_TOKENS,
        CHOSEN_TOKENS,
        REJECTED_TOKENS,
        reference_frames=tokens["reference"] // scale.tokens_per_frame,
        label_tokens=round(beside / setup.frames),
    )


class GradientRun(Run):
    """A run that records the gradients' bytes before they are freed."""

    gradient_bytes = 0

    def _step(self) -> float:
        loss = self.trainer.training_step(self.trainer.model, dict(self.batch))
        gradients = [weight.grad for weight in self.trainer.model.parameters() if weight.grad is not None]
        self.gradient_bytes = sum(gradient.nbytes for gradient in gradients)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return loss.item()


def family(name: str, folder: Path, frames: int) -> dict[str, Any]:
    """What is planned and measured for a step of the tests' tiny model of a family."""
    rows = Dataset.from_list(write_rows(folder, frames, 56)[:1])
    trainer = trainers.make(folder, rows, name, num_frames=frames, fps=1.0, per_device_train_batch_size=1)
    batch = trainers.batch_of(trainer, rows)
    answers = batch["completion_mask"].sum(1).tolist()
    prompt = int(batch["attention_mask"][0].sum()) - answers[0]
    question = len(trainer.processing_class.tokenizer(trainer.train_dataset[0]["prompt"][-1]["content"]).input_ids)
    beside = prompt - int(batch["visual_tokens"]) - question - CHAT_TOKENS
    units = frame_shapes(trainer.model.config, trainers.MAX_PIXELS, (56, 56)).units(frames)
    guessed = Rows(
        question,
        *answers,
        reference_frames=frames // min(MAX_CLIPS, frames),
        label_tokens=round(beside / units),
        source_px=(56, 56),
    )
    estimated = estimate(trainer, batch, lora=False, rows=guessed)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    counter, saved = FlopCounter(), {}
    weights = {weight.untyped_storage().data_ptr() for weight in trainer.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.training_step(trainer.model, dict(batch))
    gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
    trainer.optimizer.step()
    measured = {
        **held(trainer),
        "visual_tokens": int(batch["visual_tokens"]),
        "gflop": (counter.flops - counter.skipped) / 1e9 - head_gflop(trainer, batch),
        "saved_mib": sum(saved.values()) / MIB,
        "gradients_mib": sum(gradient.nbytes for gradient in gradients) / MIB,
    }
    return {"estimated": estimated, "measured": measured}


def estimate(trainer: Any, batch: dict[str, Any], lora: bool, rows: Rows) -> dict[str, float]:
    """The plan of a trainer."""
    model = ModelConfig(
        model_name_or_path="model", dtype="float32", use_peft=lora, lora_r=16, lora_alpha=8, lora_dropout=0.0
    )
    if lora:
        model.lora_target_modules = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    found = make_plan(trainer.model.config, model, trainer.args, rows=rows)
    tflop = {name: value for name, value in found.tflop.items() if name != "policy: LM head"}
    reference_head = 2.0 * trainer.args.per_device_train_batch_size * (rows.chosen_tokens + rows.rejected_tokens)
    text = trainer.model.config.get_text_config()
    of = {name: found.memory_gib.get(name, 0) * GIB / MIB for name in ("gradients", "optimizer")}
    activations = ("vision", "text model's activations", "LM head")
    return {
        "parameters": found.parameters.total + found.parameters.adapters,
        "trained": found.parameters.trained,
        "visual_tokens": found.tokens.visual,
        "gflop": sum(tflop.values()) * 1e3 - reference_head * text.vocab_size * text.hidden_size / 1e9,
        "saved_mib": found.saved_gib * GIB / MIB,
        "gradients_mib": of["gradients"],
        "optimizer_mib": of["optimizer"],
        "peak_mib": sum(found.memory_gib.get(name, 0) for name in activations) * GIB / MIB + of["gradients"],
    }


def head_gflop(trainer: Any, batch: dict[str, Any]) -> float:
    """The LM head's work on a CPU, where it scores every position of the packed rows."""
    text = trainer.model.config.get_text_config()
    trained = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight.requires_grad
    total = 0.0
    for part, passes in ((batch, 4 if trained else 3), (batch["reference"], 1)):
        total += 2.0 * passes * packed_tokens(part) * text.vocab_size * text.hidden_size
    return total / 1e9


def packed_tokens(batch: dict[str, Any]) -> int:
    """Tokens of the trees of a batch: trunks once, the rest of each question, and its answers with the copied token."""
    ids, answers = batch["input_ids"], batch["completion_mask"].sum(1)
    prompts = (batch["attention_mask"].sum(1) - answers).tolist()
    rows = len(prompts) // 2
    total = 0
    for video in set(batch["video_index"].tolist()):
        mine = [row for row in range(rows) if int(batch["video_index"][row]) == video]
        shortest = min(prompts[row] for row in mine) - 1
        same = (ids[mine, :shortest] == ids[mine[0], :shortest]).all(0)
        trunk = shortest if bool(same.all()) else int((~same).nonzero()[0])
        total += trunk + sum(prompts[row] - 1 - trunk + int(answers[row] + answers[rows + row]) for row in mine)
    return total


def held(trainer: Any) -> dict[str, float]:
    """Parameters, and bytes of the optimizer's moments once it has stepped."""
    weights = list(trainer.model.parameters())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "trained": sum(weight.numel() for weight in weights if weight.requires_grad),
        "optimizer_mib": sum(value.nbytes for value in states if isinstance(value, Tensor) and value.ndim) / MIB,
    }


def table(runs: dict[str, Any], figures: list[str]) -> list[str]:
    """Markdown: each figure as measured, as estimated, and the ratio."""
    lines = ["| | figure | measured | estimated | estimated / measured |", "|---|---|---:|---:|---:|"]
    for name, run in runs.items():
        for figure in figures:
            measured, estimated = run["measured"].get(figure), run["estimated"][figure]
            if measured is None:
                continue
            ratio = f"{estimated / measured:.3f}" if measured else "–"
            lines.append(f"| {name} | {FIGURES[figure]} | {measured:,.5g} | {estimated:,.5g} | {ratio} |")
            name = ""
    return lines


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    exact = ["parameters", "trained", "visual_tokens", "gradients_mib", "optimizer_mib"]
    estimated = ["gflop", "saved_mib"]
    machine = results["machine"]
    every = {**results["internvl"], **results["families"]}
    differ = [
        f"{name}: {FIGURES[figure]} (estimated / measured {run['estimated'][figure] / run['measured'][figure]:.4f})"
        for name, run in every.items()
        for figure in exact
        if figure in run["measured"] and abs(run["estimated"][figure] / run["measured"][figure] - 1) > 1e-9
    ]
    return "\n".join(
        [
            "# `longvpo check` against a real step, on a CPU",
            "",
            "Float32, without the work of the LM head on both sides (on a CPU it scores every position, on a GPU",
            "only the answers'). No GPU was used: memory here is that of tensors, not of CUDA's allocator, and step",
            "time was not compared. LLaVA-OneVision has a norm behind its tower that gets no gradient.",
            "",
            "Parameters, trained parameters, visual tokens, gradients and optimizer must be equal, to the last one: "
            + ("they are, in all of the runs below." if not differ else "**not** for " + "; ".join(differ) + "."),
            "",
            "## An InternVL of 2 million parameters (the one of trainer_step_cpu.md)",
            "",
            *table(results["internvl"], [*estimated, "peak_mib"]),
            "",
            "The peak is that of resident memory above what was held before the step, the larger of two steps. The",
            "estimate is activations, vision, head and gradients. It is too low for a CPU, most of all with adapters",
            "and checkpointing. How much of that is due to the allocator is not known, nor what a GPU's allocator",
            f"takes: for that `longvpo check` adds {FRAGMENTED:.0%} and {RESERVE_GIB} GiB, which no GPU has confirmed.",
            "",
            "## Tiny models of all families",
            "",
            "Their text model is 32 wide, so what is small beside a real model's layers (norms, rope) is large here.",
            "",
            *table(results["families"], estimated),
            "",
            "## Where",
            "",
            f"- {machine['processor']}, {machine['cores']} cores, {machine['platform']}",
            "- " + ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
            f"- `{results['command']}`",
            "",
        ]
    )


def main() -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="visual tokens of the InternVL")
    parser.add_argument("--frames", type=int, default=64, help="frames of the families' videos")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where .json and .md go")
    args = parser.parse_args()
    quiet(threads=1)
    results: dict[str, Any] = {
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {name: version(name) for name in ("longvpo-hf", "torch", "transformers", "trl", "peft")},
        "command": " ".join(["python", "benchmarks/plan.py", *sys.argv[1:]]),
        "internvl": {},
        "families": {},
    }
    scale = SCALES["small"]
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.sizes:
            folder = Path(temporary) / str(size)
            folder.mkdir()
            rows = write_rows(folder, size // scale.tokens_per_frame, scale.frame_px)
            for mode in MODES:
                for arm in ("all", "all-4") if mode == "full" else ("all",):
                    setup = Setup(size, mode, arm, "small", "cpu", 1, rows)
                    pairs = ARMS[arm].pairs
                    name = f"{size} tokens, {mode}" + (f", {pairs} pairs" if pairs > 1 else "")
                    results["internvl"][name] = _answer(setup, internvl)
                    print(name, flush=True)
        for name in FAMILIES:
            folder = Path(temporary) / name
            folder.mkdir()
            results["families"][name] = family(name, folder, args.frames)
            print(name, flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(report(results), encoding="utf-8")
    print(report(results))


def _answer(setup: Setup, target: Callable[[Connection, Setup], None]) -> Any:
    answer = one_answer(target, setup)
    if answer is None:
        raise MemoryError(f"{setup.mode} at {setup.size} tokens ran out of memory")
    return answer


if __name__ == "__main__":
    main()
