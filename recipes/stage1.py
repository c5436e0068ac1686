# /// script
# requires-python = ">=3.11"
# dependencies = ["longvpo-hf", "trackio", "kernels"]
# ///

"""LongVPO Stage 1: a short-context model learns from anchored rows, the reference scored on the anchor clip alone.

    accelerate launch --config_file recipes/accelerate/one_gpu.yaml recipes/stage1.py \\
        --config recipes/configs/internvl3_8b/stage1_lora.yaml
    accelerate launch --cpu recipes/stage1.py --config recipes/configs/miniature/stage1.yaml --max_steps 2

It trains on rows of `dataset_scripts/stage1.py` and leaves a model, or an adapter, with processor and card in
`output_dir`. `--help` lists all options; those of the command line override those of the file.
"""

from __future__ import annotations

from collections.abc import Sequence

from longvpo_hf import LongVPOTrainer
from longvpo_hf.errors import advice
from longvpo_hf.launch import (
    PositionProbe,
    check_benchmarks,
    check_probes,
    checkpoint_to_resume,
    finish,
    load_rows,
    lora,
    parse,
    quantization,
    start_from,
)
from longvpo_hf.training.warnings import EarlyWarning


def main(argv: Sequence[str] | None = None) -> LongVPOTrainer:
    """Trains, and returns the trainer."""
    recipe, model, training = parse(argv)
    check_benchmarks(recipe)
    check_probes(recipe, training)
    rows, held_out = load_rows(recipe)
    trainer = LongVPOTrainer(
        model=start_from(model, training),
        args=training,
        train_dataset=rows,
        eval_dataset=held_out,
        quantization_config=quantization(model),
        peft_config=lora(model),
        callbacks=[EarlyWarning()],
    )
    if recipe.probe_steps is not None:
        trainer.add_callback(PositionProbe(trainer, recipe))
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training))
    finish(trainer, recipe)
    return trainer


if __name__ == "__main__":
    with advice("recipes/stage1.py", "Go on with --resume_from_checkpoint true."):
        main().end()  # trackers and processes
