"""Writes `recipes/configs/`: one file for each base, recipe and way to train.

    python recipes/write_configs.py              writes the files
    python recipes/write_configs.py --estimate   first estimates their costs anew, as `longvpo check` does: minutes

The files follow from the tables below (bases, recipes, modes) and from `costs.json`, their estimated costs: change a
number here, not in a file. A test compares the files with these tables and loads each. The miniature's files are of
another kind and written by hand. Each file names the JSON schema by which editors complete it, which is written too.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from longvpo_hf.families import family_of
from longvpo_hf.launch.schema import recipe_schema, schema_text
from longvpo_hf.methods import stage1, stage2, temporal

CONFIGS = Path(__file__).parent / "configs"
COSTS = Path(__file__).parent / "costs.json"
SCHEMA = CONFIGS / "recipe.schema.json"


@dataclass(frozen=True)
class Base:
    """A model to start from.

    Args:
        title: As people call it.
        name: Its transformers-native repository.
        family: Its `model_type`.
        num_frames: Most frames of a LongVPO timeline.
        about: What a user has to know about the repository.
        modes: Ways to train it that fit their machine.
    """

    title: str
    name: str
    family: str
    num_frames: int = 128
    about: str = ""
    modes: tuple[str, ...] = ("lora", "full")


_QWEN3_5 = (
    "Two frames share their tokens. Three of four layers are linear attention: install flash-linear-attention and "
    "causal-conv1d for its kernels on a GPU."
)

BASES = {
    "internvl2_5_8b": Base(
        "InternVL2.5-8B",
        "OpenGVLab/InternVL2_5-8B-MPO-hf",
        "internvl",
        about="The paper's base. InternVL2_5-8B itself exists with remote code only, which is never run here; this is "
        "the native repository there is, of the same model after a preference optimisation on images (MPO).",
    ),
    "internvl3_8b": Base(
        "InternVL3-8B", "OpenGVLab/InternVL3-8B-hf", "internvl", about="The base of the authors' release."
    ),
    "internvl3_2b": Base("InternVL3-2B", "OpenGVLab/InternVL3-2B-hf", "internvl"),
    "qwen2_5_vl_7b": Base(
        "Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", about="Two frames share their tokens."
    ),
    "qwen2_5_vl_3b": Base(
        "Qwen2.5-VL-3B", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", about="Two frames share their tokens."
    ),
    "qwen3_vl_8b": Base("Qwen3-VL-8B", "Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", about="Two frames share their tokens."),
    "llava_video_7b": Base(
        "LLaVA-Video-7B",
        "Isotr0py/LLaVA-Video-7B-Qwen2-hf",
        "llava_onevision",
        about="The authors' lmms-lab/LLaVA-Video-7B-Qwen2 is no transformers repository; this conversion to "
        "LlavaOnevisionForConditionalGeneration is a community's. LLaVA-Video's own code ends each row of a frame with "
        "a newline token and tells the times in words; this class does neither. What that costs was not measured.",
    ),
    "smolvlm2_500m": Base(
        "SmolVLM2-500M",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "smolvlm",
        num_frames=64,
        about="64 frames, because its context is 8,192 tokens and each frame also has its time in words. Its processor "
        "needs `pip install num2words`.",
    ),
    "qwen3_5_4b": Base("Qwen3.5-4B", "Qwen/Qwen3.5-4B", "qwen3_5", about=_QWEN3_5),
    "qwen3_5_9b": Base("Qwen3.5-9B", "Qwen/Qwen3.5-9B", "qwen3_5", about=_QWEN3_5),
    "qwen3_vl_30b_a3b": Base(
        "Qwen3-VL-30B-A3B",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "qwen3_vl_moe",
        about="Two frames share their tokens. Each token goes through 8 of 128 experts. LoRA adapts the attention "
        "alone; `lora_target_parameters` reaches the experts (docs/families.md). There is no configuration for the "
        "whole model: it needs 83 GiB of each of 8 GPUs.",
        modes=("lora",),
    ),
    "glm4_6v_flash": Base(
        "GLM-4.6V-Flash",
        "zai-org/GLM-4.6V-Flash",
        "glm4v",
        about="Two frames share their tokens. A model of GLM-4.1V's kind with GLM-4.6V's processor.",
    ),
    "video_llama3_7b": Base(
        "VideoLLaMA3-7B",
        "lkhl/VideoLLaMA3-7B-Image-HF",
        "video_llama_3",
        num_frames=120,
        about="A base of the paper, which reports for it: LVBench 45.3 → 49.8, LongVideoBench 59.8 → 63.4, MLVU 73.0 → "
        "74.6, Video-MME 66.2 → 67.2 without and 70.3 → 71.4 with subtitles. The paper's weights, "
        "DAMO-NLP-SG/VideoLLaMA3-7B, exist with remote code only, which is never run here; this is the one native "
        "repository of its size that was found, of the same model before its last stage of training, on videos. 120 "
        "frames, because its context is 32,768 tokens and each frame also has its time in words; tokens that repeat "
        "are left out, so a video may have fewer.",
    ),
    "internvl3_5_8b": Base("InternVL3.5-8B", "OpenGVLab/InternVL3_5-8B-HF", "internvl"),
    "molmo2_8b": Base(
        "Molmo2-8B",
        "allenai/Molmo2-8B",
        "molmo2",
        about="Frames attend to one another in both directions, so it is trained without trees: chosen and rejected "
        "are two sequences, each with its own copy of the video.",
    ),
}

#: LongVPO on every base; TPO on the base of its paper that transformers can load, and on one more.
RECIPES: dict[str, tuple[str, ...]] = dict.fromkeys(BASES, ("stage1", "stage2"))
RECIPES["llava_video_7b"] += ("temporal",)
RECIPES["qwen2_5_vl_7b"] += ("temporal",)

TITLES = {
    "stage1": "LongVPO Stage 1",
    "stage2": "LongVPO Stage 2",
    "temporal": "Temporal Preference Optimization",
}
#: Launch configurations of a mode, each with its number of GPUs.
LAUNCHES = {"lora": {"one_gpu": 1}, "full": {"fsdp2": 8, "zero3": 8}}
MODES = {"lora": "LoRA on one GPU", "full": "the whole model on 8 GPUs, FSDP2 or ZeRO-3"}

_METHODS = {"stage1": stage1.TRAINING, "stage2": stage2.TRAINING, "temporal": temporal.TRAINING}
LOSS = {
    recipe: [(name, str(training[name][0]), training[name][1]) for name in ("reference", "beta", "sft_weight")]
    for recipe, training in _METHODS.items()
}

#: By file (`internvl3_8b/stage1_lora`), launch configuration, and what.
Costs = dict[str, dict[str, dict[str, float]]]
#: A setting, its value, and where the value is from.
Line = tuple[str, str, str]


def write(folder: Path = CONFIGS) -> None:
    """Writes all files."""
    for (base, recipe, mode), text in texts().items():
        path = folder / base / f"{recipe}_{mode}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def texts() -> dict[tuple[str, str, str], str]:
    """The text of every file, by base, recipe and mode."""
    costs = json.loads(COSTS.read_text(encoding="utf-8"))
    return {(name, recipe, mode): _text(name, recipe, mode, costs) for name, recipe, mode in _names()}


def _names() -> list[tuple[str, str, str]]:
    return [(name, recipe, mode) for name in BASES for recipe in RECIPES[name] for mode in BASES[name].modes]


def _text(name: str, recipe: str, mode: str, costs: Costs) -> str:
    base = BASES[name]
    groups = [
        _model(name, base, recipe, mode),
        [*LOSS[recipe], _tower(recipe, mode)],
        _frames(base, recipe),
        _optimizer(recipe, mode),
        _memory(mode),
        _LOGS,
    ]
    body = "\n\n".join("\n".join(_line(*line) for line in group) for group in groups)
    return f"{_header(name, base, recipe, mode, costs)}\n\n{body}\n"


def _line(name: str, value: str, source: str) -> str:
    setting = f"{name}: {value}"
    return f"{setting:<30}  # {source}" if source else setting


def _header(name: str, base: Base, recipe: str, mode: str, costs: Costs) -> str:
    config = f"recipes/configs/{name}/{recipe}_{mode}.yaml"
    lines = [f"{base.title}, {TITLES[recipe]}, {MODES[mode]}.", ""]
    for accelerate in LAUNCHES[mode]:
        layers = ",".join(family_of(base.family).fsdp_layers) if accelerate == "fsdp2" else ""
        lines += [
            f"    accelerate launch --config_file recipes/accelerate/{accelerate}.yaml \\",
            *([f"        --fsdp_transformer_layer_cls_to_wrap {layers} \\"] if layers else []),
            f"        recipes/{recipe}.py --config {config}",
        ]
    lines += ["", *_wrapped(_costs(name, recipe, mode, costs))]
    if base.about:
        lines += ["", *_wrapped(base.about)]
    lines += ["", "Written by recipes/write_configs.py.", f"yaml-language-server: $schema=../{SCHEMA.name}"]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _costs(name: str, recipe: str, mode: str, costs: Costs) -> str:
    launches = costs[f"{name}/{recipe}_{mode}"]
    memory = ", ".join(f"{accelerate} {cost['gib']:.0f} GiB" for accelerate, cost in launches.items())
    first = next(iter(launches.values()))
    return (
        f"A full timeline has {first['frames']:.0f} frames, {first['tokens']:,.0f} visual tokens. Memory of a GPU: "
        f"{memory}. Time: {first['hours']:.1f} GPU-hours per 1,000 rows at 300 TFLOP/s. Estimates of `longvpo check`; "
        "not run."
    )


def estimate() -> Costs:
    """The costs of each file, by its name and launch configuration; the files must have been written."""
    from longvpo_hf.planning import Machine, Sharding, plan_file

    costs: Costs = {}
    for name, recipe, mode in _names():
        file = f"{name}/{recipe}_{mode}"
        for accelerate, processes in LAUNCHES[mode].items():
            sharding = Sharding.none if processes == 1 else Sharding(accelerate)
            plan = plan_file(CONFIGS / f"{file}.yaml", machine=Machine(processes=processes, sharding=sharding))
            costs.setdefault(file, {})[accelerate] = {
                "gib": round(plan.total_gib, 1),
                "hours": round(plan.gpu_hours_per_1000_rows, 2),
                "frames": plan.tokens.frames,
                "tokens": plan.tokens.visual,
            }
            print(file, accelerate, costs[file][accelerate], flush=True)
    return costs


def _model(name: str, base: Base, recipe: str, mode: str) -> list[Line]:
    start = (base.name, "") if recipe != "stage2" else (f"runs/{name}/stage1_{mode}", "an adapter is merged first")
    return [
        ("model_name_or_path", *start),
        ("dataset_name", f"data/{recipe}", f"of dataset_scripts/{recipe}.py; or a dataset on the Hub"),
        ("output_dir", f"runs/{name}/{recipe}_{mode}", ""),
        ("dtype", "bfloat16", "of the frozen base; the adapter is float32")
        if mode == "lora"
        else ("dtype", "float32", "master weights: steps this small are lost in bfloat16"),
    ]


def _tower(recipe: str, mode: str) -> Line:
    if recipe == "temporal":
        return ("freeze_vision_tower", "true", "TPO")
    if mode == "lora":
        return ("freeze_vision_tower", "true", "the adapter is on the text model; LongVPO trains the whole model")
    return ("freeze_vision_tower", "false", "LongVPO trains the whole model; true saves memory")


def _frames(base: Base, recipe: str) -> list[Line]:
    if recipe == "temporal":
        frames = ("num_frames", "32", "TPO")
        rate = ("fps", "null", "ours: 32 frames of the whole video, however long")
    else:
        paper = "LongVPO: 128, 256 or 512" if base.num_frames >= 128 else "LongVPO: 128 or more"
        frames = ("num_frames", f"{base.num_frames}", paper)
        rate = ("fps", "1.0", "LongVPO samples clips at 1 fps")
    return [frames, rate, ("max_pixels", "200704", "ours: 448 × 448, InternVL's tile")]


def _optimizer(recipe: str, mode: str) -> list[Line]:
    paper, rows, rate, warmup = ("TPO", 64, 3e-7, "0.1") if recipe == "temporal" else ("LongVPO", 8, 5e-7, "0.01")
    processes = 1 if mode == "lora" else 8
    whole = "TPO, LLaVA-Video (LongVA: 4e-6)" if recipe == "temporal" else "LongVPO"
    return [
        ("learning_rate", _number(rate), whole)
        if mode == "full"
        else ("learning_rate", _number(10 * rate), f"ours, not tuned: ten times the {_number(rate)} of {paper}"),
        ("lr_scheduler_type", "cosine", paper),
        ("warmup_steps", warmup, f"{paper}: a share of the steps"),
        ("num_train_epochs", "1", paper),
        ("per_device_train_batch_size", "1", ""),
        ("gradient_accumulation_steps", f"{rows // processes}", f"{paper}: {rows} rows, on {processes} GPU"),
        *(_LORA if mode == "lora" else []),
    ]


_LORA: list[Line] = [
    ("use_peft", "true", "on the linear layers of the text model"),
    ("lora_r", "32", "ours, not tuned"),
    ("lora_alpha", "64", "ours, not tuned"),
    ("lora_dropout", "0.0", "TRL's DPO switches dropout off in any case"),
]


_LOGS: list[Line] = [
    ("logging_steps", "10", ""),
    ("save_steps", "100", ""),
    ("save_total_limit", "2", ""),
    ("report_to", "none", "trackio, wandb, tensorboard, …"),
]


def _memory(mode: str) -> list[Line]:
    lines = [
        ("gradient_checkpointing", "true", ""),
        ("activation_offloading", "false", "true: activations wait in main memory"),
        ("dataloader_num_workers", "4", ""),
    ]
    scored = ("precompute_ref_log_probs", "true", "scored once, then the reference leaves the memory")
    return [*lines, scored] if mode == "full" else lines


def _number(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _wrapped(text: str, width: int = 116) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) + 1 > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def main() -> None:
    """Writes the files and their schema, with new estimates if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", action="store_true")
    if parser.parse_args().estimate:
        COSTS.write_text(json.dumps(estimate(), indent=1) + "\n", encoding="utf-8")
    write()
    SCHEMA.write_text(schema_text(recipe_schema()), encoding="utf-8")


if __name__ == "__main__":
    main()
