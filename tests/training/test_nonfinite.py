"""A loss, gradient or weight that is not finite ends the run before anything is saved, or the step is skipped."""

from __future__ import annotations

import logging
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

import trainers
from conftest import make_dataset
from longvpo_hf.errors import LongVPOError, TrainingError
from longvpo_hf.preference import VideoPreference
from longvpo_hf.training import trainer as trainer_module


class Fault(TrainerCallback):
    """Breaks one weight before the optimizer step or after it: its gradient, or itself."""

    def __init__(self, step: int, what: str, value: float = math.nan, number: int = 1) -> None:
        self.steps = range(step, step + number)
        self.what = what
        self.value = value
        self.hook: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.hook is not None:
            self.hook.remove()
        weight = model.get_parameter("lm_head.weight")
        if self.what == "gradient" and state.global_step + 1 in self.steps:
            self.hook = weight.register_hook(lambda gradient: torch.full_like(gradient, self.value))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.what == "weight" and state.global_step in self.steps:
            with torch.no_grad():
                model.get_parameter("lm_head.weight")[0, 0] = self.value


def broken_loss(monkeypatch: pytest.MonkeyPatch, calls: list[int], value: float = math.nan) -> None:
    """The SFT term is not a number in these batches, counted from 1."""
    sft_losses, seen = trainer_module.sft_losses, [0]

    def broken(*args: Any) -> torch.Tensor:
        seen[0] += 1
        return sft_losses(*args) * (value if seen[0] in calls else 1.0)

    monkeypatch.setattr(trainer_module, "sft_losses", broken)


def make(folder: Path, rows: Dataset, **more: Any) -> Any:
    saved = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "save_only_model": True}
    return trainers.make(folder, rows, **{"max_steps": 5, "optim": "adamw_torch", **saved, **more})


@pytest.fixture
def few(preferences: list[VideoPreference]) -> Dataset:
    return make_dataset(preferences[:4])


def checkpoints(trainer: Any) -> list[str]:
    return sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def assert_ended(trainer: Any, step: int) -> str:
    """The run ends at this step with the checkpoint of the one before; returns the error's message."""
    with pytest.raises(TrainingError) as raised:
        trainer.train()
    assert isinstance(raised.value, LongVPOError)
    assert checkpoints(trainer) == [f"checkpoint-{step - 1}"]
    saved = load_file(Path(trainer.args.output_dir) / f"checkpoint-{step - 1}" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in saved.values())
    return str(raised.value)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_gradient_ends_the_run(tmp_path: Path, few: Dataset, value: float) -> None:
    trainer = make(tmp_path, few, callbacks=[Fault(3, "gradient", value)])
    message = assert_ended(trainer, 3)
    assert f"its gradient norm {value}" in message
    assert "checkpoint-2" in message
    assert "Lower learning_rate (now 0.001)" in message
    assert "set max_nonfinite_steps=1" in message
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())  # the step was not taken
    last = trainer.state.log_history[-1]
    assert last["step"] == 3
    assert not math.isfinite(last["grad_norm"])


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loss_ends_the_run_and_is_logged_as_it_is(
    tmp_path: Path, few: Dataset, monkeypatch: pytest.MonkeyPatch, value: float, accumulated: int
) -> None:
    broken_loss(monkeypatch, [2 * accumulated], value)
    trainer = make(
        tmp_path,
        few,
        per_device_train_batch_size=2 // accumulated,
        gradient_accumulation_steps=accumulated,
        logging_steps=10,
    )
    message = assert_ended(trainer, 2)
    assert f"The loss of step 2 is {value}" in message
    assert [entry["step"] for entry in trainer.state.log_history] == [2]
    assert not math.isfinite(trainers.logged(trainer)[0])


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path, few: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_loss(monkeypatch, [1])
    trainer = trainers.make(tmp_path, few, max_grad_norm=0.0)
    with pytest.raises(TrainingError, match=r"there is no checkpoint\. .*set max_grad_norm=1.0 \(now 0\)"):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_weights_are_looked_at_before_they_replace_a_checkpoint(tmp_path: Path, few: Dataset, value: float) -> None:
    trainer = make(tmp_path, few, callbacks=[Fault(3, "weight", value)])
    assert "After step 3 weights are not finite (lm_head.weight)" in assert_ended(trainer, 3)


def test_weights_of_the_last_step_are_looked_at_without_a_checkpoint(tmp_path: Path, few: Dataset) -> None:
    trainer = trainers.make(tmp_path, few, max_steps=2, callbacks=[Fault(2, "weight")])
    with pytest.raises(TrainingError, match="After step 2 weights are not finite"):
        trainer.train()


def test_a_learning_rate_that_ruins_the_model_ends_the_run(tmp_path: Path, few: Dataset) -> None:
    trainer = make(tmp_path, few, learning_rate=1e30, max_steps=20)
    with pytest.raises(TrainingError, match=r"Lower learning_rate \(now 1e\+30\)"):
        trainer.train()
    (name,) = checkpoints(trainer)
    saved = load_file(Path(trainer.args.output_dir) / name / "model.safetensors")
    assert all(weight.isfinite().all() for weight in saved.values())


def test_a_tolerated_gradient_changes_nothing(tmp_path: Path, few: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    weights: list[dict[str, torch.Tensor]] = []

    class Noted(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})

    callbacks = [Fault(2, "gradient", number=2), Noted()]
    trainer = make(tmp_path, few, callbacks=callbacks, max_nonfinite_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert sum("does not change the weights" in record.getMessage() for record in caplog.records) == 2
    moved = [any(not torch.equal(before[name], after[name]) for name in before) for before, after in pairwise(weights)]
    assert moved == [False, False, True, True]
    assert all(math.isfinite(loss) for loss in trainers.logged(trainer))
    assert checkpoints(trainer) == ["checkpoint-5"]


def test_only_steps_in_a_row_are_counted(tmp_path: Path, few: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_loss(monkeypatch, [1, 3, 4])
    trainer = make(tmp_path, few, max_nonfinite_steps=1)
    message = assert_ended(trainer, 4)
    assert "as often as max_nonfinite_steps=1 allows" in message
    losses = trainers.logged(trainer)
    assert [math.isnan(loss) for loss in losses] == [True, False, True, True]  # a NaN, not 0 or a mean of others


def test_random_faults_are_skipped_or_end_the_run(
    tmp_path: Path, few: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    for number in range(4):
        with monkeypatch.context() as patch:
            bad = sorted(rng.sample(range(1, 7), 3))
            tolerated = rng.randint(0, 2)
            broken_loss(patch, bad, rng.choice([math.nan, math.inf]))
            trainer = trainers.make(tmp_path / str(number), few, max_steps=6, max_nonfinite_steps=tolerated)
            runs = [sum(step - back in bad for back in range(tolerated + 1)) for step in range(1, 7)]
            ends = next((step for step, run in enumerate(runs, 1) if run == tolerated + 1), None)
            if ends is None:
                trainer.train()
            else:
                with pytest.raises(TrainingError, match=f"The loss of step {ends} is"):
                    trainer.train()
            logged = trainers.logged(trainer)
            assert len(logged) == (ends or 6)
            assert [not math.isfinite(loss) for loss in logged] == [step in bad for step in range(1, len(logged) + 1)]
            assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_text_rows_end_the_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ("red", "green, or so")
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Question {i}?"}],
                "chosen": [{"role": "assistant", "content": answers[0]}],
                "rejected": [{"role": "assistant", "content": answers[1]}],
            }
            for i in range(4)
        ]
    )
    broken_loss(monkeypatch, [2])
    assert "The loss of step 2 is nan" in assert_ended(make(tmp_path, rows, max_length=512), 2)


def test_in_fp16_only_the_loss_counts(tmp_path: Path, few: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients overflow there now and then, and the loss scaler skips those steps. A CPU has no such scaler."""
    trainer = trainers.make(tmp_path, few, max_steps=1)
    trainer.train()
    trainer.args.fp16 = True
    trainers.loss_of(trainer, few).backward()
    trainer.model.get_parameter("lm_head.weight").grad[0, 0] = math.inf
    assert not math.isfinite(trainer._get_grad_norm(trainer.model))
    assert trainer.model.get_parameter("lm_head.weight").grad is not None  # the scaler counts on it
    broken_loss(monkeypatch, [1])
    trainers.loss_of(trainer, few)
    with pytest.raises(TrainingError, match="use bf16 instead of fp16"):
        trainer._get_grad_norm(trainer.model)


def test_the_setting_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_nonfinite_steps must be ≥ 0, got -1"):
        trainers.settings(tmp_path, max_nonfinite_steps=-1)
