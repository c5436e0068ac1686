# /// script
# requires-python = ">=3.11"
# dependencies = ["longvpo-hf", "trackio", "kernels"]
# ///

"""Temporal Preference Optimization: answers from the whole video are preferred over answers from part of it.

    accelerate launch --config_file recipes/accelerate/one_gpu.yaml recipes/temporal.py \\
        --config recipes/configs/qwen2_5_vl_7b/temporal_lora.yaml

It trains on rows of `dataset_scripts/temporal.py` and leaves a model, or an adapter, with processor and card in
`output_dir`.
Where the configuration says nothing the paper's values for LLaVA-Video-7B hold (arXiv 2501.13919).
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
from longvpo_hf.methods.temporal import TRAINING
from longvpo_hf.training.warnings import EarlyWarning

#: The paper's values, where they differ from LongVPO's.
PAPER = {name: value for name, (value, _) in TRAINING.items()}


def main(argv: Sequence[str] | None = None) -> LongVPOTrainer:
    """Trains, and returns the trainer."""
    recipe, model, training = parse(argv, PAPER)
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
    with advice("recipes/temporal.py", "Go on with --resume_from_checkpoint true."):
        main().end()  # trackers and processes
