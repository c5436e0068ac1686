"""The position probe as a callback of the trainer: long context, measured while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.position import probe_position
from longvpo_hf.evaluation.probes import BlankFiller, Filler, ProbeQuestion, VideoFiller, read_questions
from longvpo_hf.frames import FrameSampler
from longvpo_hf.launch.arguments import RecipeArguments
from longvpo_hf.responders import LocalResponder
from longvpo_hf.responders.generating import REASONING_TOKENS, SHORT_TOKENS
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.trainer import LongVPOTrainer


class PositionProbe(TrainerCallback):
    """The position probe before the first step, every `probe_steps` and after the last, into `output_dir/probe`.

    The log has `probe/alone` (the short videos alone), `probe/begin`, `probe/middle`, `probe/end` (by where they stand
    in the long one) and `probe/dip`, in percent. Of several processes the first asks, and the others wait.

    Args:
        trainer: Whose model is probed.
        recipe: The `probe_…` arguments.

    Raises:
        ValueError: If the model is sharded: then no process has all of it to answer with.
    """

    def __init__(self, trainer: LongVPOTrainer, recipe: RecipeArguments) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError(
                "probe_steps asks a model that is whole on one device, and this one is sharded: leave it out, and run "
                "`longvpo probe position` on the checkpoints."
            )
        self._trainer = trainer
        self._recipe = recipe
        self._folder = Path(trainer.args.output_dir) / "probe"
        with trainer.accelerator.main_process_first():
            self._questions, self._filler = _asked(recipe, _media(trainer.args))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probes the model as it was."""
        if state.global_step == 0:
            self._probe(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probes the model where it is time."""
        if state.global_step % self._recipe.probe_steps == 0 or state.global_step == state.max_steps:
            self._probe(state.global_step)

    def _probe(self, step: int) -> None:
        trainer, recipe = self._trainer, self._recipe
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.eval()
        if trainer.is_world_process_zero():
            sampler = FrameSampler(recipe.probe_frames, max_pixels=trainer.args.max_pixels)
            responder = LocalResponder(model, trainer.processing_class, sampler, SHORT_TOKENS, batch_size=1)
            if responder.reasons:
                responder.max_new_tokens = REASONING_TOKENS
            result = probe_position(
                responder,
                self._questions,
                self._filler,
                recipe.probe_frames,
                recipe.probe_placements,
                self._folder / f"step-{step}",
                facts={
                    "step": step,
                    "max_pixels": trainer.args.max_pixels,
                    "max_new_tokens": responder.max_new_tokens,
                    "dtype": str(model.dtype).removeprefix("torch."),
                },
            )
            scores = {"alone": result["upper_bound"], **result["thirds"], "dip": result["dip"]}
            is_due = trainer.control.should_log
            trainer.log(
                {f"probe/{name}": part["percent"] for name, part in scores.items() if part["percent"] is not None}
            )
            trainer.control.should_log = is_due  # what was logged here is not the step's own log
        trainer.accelerator.wait_for_everyone()
        trainer.leave_out_time()
        model.train()


def check_probes(recipe: RecipeArguments, training: LongVPOConfig) -> None:
    """Reads what probes will ask, if there are any, before a model is loaded and rows are scored.

    Raises:
        LongVPOError: If it is missing, or cannot be asked.
    """
    if recipe.probe_steps is not None:
        with training.main_process_first(desc="what probes ask"):
            _asked(recipe, _media(training))


def _media(training: LongVPOConfig) -> Path:
    # Beside the probes' own folder, because that is pushed with the model; names with `_` are not.
    return Path(training.output_dir) / "_probe_media"


def _asked(recipe: RecipeArguments, media: Path) -> tuple[list[ProbeQuestion], Filler]:
    """What is asked, and among what it is laid: the user's own, a miniature's world, or a synthetic world."""
    if recipe.probe_questions is not None:
        questions = read_questions(Path(recipe.probe_questions), recipe.probe_video_frames, media)
        haystack = recipe.probe_haystack
        return questions, BlankFiller(media) if haystack is None else VideoFiller(Path(haystack))
    from longvpo_hf.miniature.language import language_of
    from longvpo_hf.miniature.probes import WorldFiller, clips_needed, world_questions
    from longvpo_hf.miniature.world import TRUTH_FILE, read_world, write_world

    folder = media / "world" if recipe.probe_world is None else Path(recipe.probe_world)
    if recipe.probe_world is None and not (folder / TRUTH_FILE).is_file():
        write_world(folder, clips_needed(recipe.probe_frames), seed=0)
    clips = read_world(folder)
    language = None if recipe.probe_world is None else language_of(folder)
    asked = world_questions(clips, recipe.probe_number, 0, language=language)
    return asked, WorldFiller(clips, seed=0)
