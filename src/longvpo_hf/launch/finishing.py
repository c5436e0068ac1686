"""The end of a training script: save, card, push, then benchmarks, whose data are looked for before training."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import EvalResult, HfApi
from huggingface_hub.constants import ENDPOINT

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.preflight import check, suites_named
from longvpo_hf.evaluation.suite import data_root
from longvpo_hf.launch.arguments import RecipeArguments
from longvpo_hf.record import RECORD_FILE
from longvpo_hf.training.trainer import LongVPOTrainer


def check_benchmarks(recipe: RecipeArguments) -> None:
    """Says now, and not after days of training, what the benchmarks lack.

    Raises:
        ValueError: If lmms-eval or a benchmark's data are not there, with what brings them.
    """
    if recipe.benchmarks is None:
        return
    if find_spec("lmms_eval") is None:
        raise ConfigError("benchmarks are run by lmms-eval, which is not here: pip install 'longvpo-hf[eval]'")
    check(suites_named(recipe.benchmarks.split(",")), _data(recipe))


def finish(trainer: LongVPOTrainer, recipe: RecipeArguments) -> None:
    """Saves model, processor and card into `output_dir` and pushes them if asked to; then the benchmarks.

    For the benchmarks the trainer's model leaves the device: train no further.
    """
    args = trainer.args
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.dataset_name)
    else:
        trainer.create_model_card(dataset_name=recipe.dataset_name)
    trainer.accelerator.print(
        f"{trainer._name}: model and card are in {args.output_dir}; measure it with: longvpo probe needle "
        f"{args.output_dir}, or longvpo eval {args.output_dir}"
    )
    if args.push_to_hub:
        trainer.accelerator.print(f"pushed: {ENDPOINT}/{trainer.hub_model_id}")
    if recipe.benchmarks is None:
        return
    trainer.accelerator.wait_for_everyone()
    results = _run_benchmarks(trainer, recipe)
    if trainer.is_world_process_zero():
        from longvpo_hf.evaluation.results import HUB_FOLDER

        trainer.create_model_card(dataset_name=recipe.dataset_name, eval_results=results)
        if args.push_to_hub:
            HfApi(token=args.hub_token).upload_folder(
                repo_id=trainer.hub_model_id,
                folder_path=args.output_dir,
                revision=args.hub_revision,
                allow_patterns=[RECORD_FILE, "README.md", f"{HUB_FOLDER}/*", "evaluation/*.json", "evaluation/*.md"],
                commit_message="Benchmarks",
            )


def _run_benchmarks(trainer: LongVPOTrainer, recipe: RecipeArguments) -> list[EvalResult]:
    """The saved model's scores, for its card; answers and tables go to `output_dir/evaluation`."""
    from longvpo_hf.evaluation.results import eval_results, table_runs
    from longvpo_hf.evaluation.run import Contestant, Settings, evaluate

    trainer.optimizer = trainer.lr_scheduler = None
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            model.to("cpu")
    trainer.accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    folder = Path(trainer.args.output_dir)
    results = evaluate(
        [Contestant(str(folder))],
        suites_named(str(recipe.benchmarks).split(",")),
        _data(recipe),
        folder / "evaluation",
        Settings(frames=recipe.benchmark_frames or []),
    )
    return eval_results(table_runs(results, folder / "evaluation"))


def _data(recipe: RecipeArguments) -> Path:
    return data_root() if recipe.benchmark_data is None else Path(recipe.benchmark_data)
