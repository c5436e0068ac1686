"""Early warnings on made-up and on real log histories, and the picture of the curves."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState

import trainers
from longvpo_hf.publishing.curves import save_curves
from longvpo_hf.training.warnings import EXPLODED_MARGIN, WINDOW, EarlyWarning, find_signs

STEPS = 30
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MINIATURE = [RESULTS / "miniature.json", RESULTS / "miniature-stage1.json"]

Curve = Callable[[float], float]


def history(**curves: Curve) -> list[dict[str, float]]:
    """A log every 10 steps; each curve is a function of the share of the run. What is not given goes well."""
    healthy: dict[str, Curve] = {
        "loss": lambda x: 1.7 - x,
        "loss/sft": lambda x: 1.0 - 0.3 * x,
        "rewards/accuracies": lambda x: 0.5 + 0.4 * x,
        "rewards/margins": lambda x: 2 * x,
        "logps_per_token/chosen": lambda x: -1.0 + 0.3 * x,
        "logps_per_token/rejected": lambda x: -1.0 - 0.2 * x,
        "grad_norm": lambda x: 1.0,
    }
    named = {**healthy, **{name.replace("__", "/"): curve for name, curve in curves.items()}}
    shares = [number / (STEPS - 1) for number in range(STEPS)]
    return [{"step": 10 * (i + 1), **{name: curve(x) for name, curve in named.items()}} for i, x in enumerate(shares)]


def names(*args: Any, **kwargs: Any) -> list[str]:
    return [sign.name for sign in find_signs(*args, **kwargs)]


def test_a_healthy_run_shows_nothing_at_any_moment() -> None:
    logs = history()
    for seen in range(STEPS + 1):
        assert names(logs[:seen], seen / STEPS) == []


def test_the_chosen_answer_falling_while_the_margin_grows() -> None:
    (sign,) = find_signs(history(logps_per_token__chosen=lambda x: -1.0 - 0.5 * x))
    assert sign.name == "chosen_falls"
    assert "-1.03 → -1.47" in sign.message  # means of the first and of the last five
    assert "sft_weight" in sign.message
    slightly = history(logps_per_token__chosen=lambda x: -1.0 - 0.1 * x)
    assert names(slightly) == []
    without_margin = history(logps_per_token__chosen=lambda x: -1.0 - 0.5 * x, rewards__margins=lambda x: 1.0 - x)
    assert names(without_margin) == []


def test_whole_answers_serve_where_tokens_are_not_logged() -> None:
    logs = [
        {name: value for name, value in entry.items() if not name.startswith("logps_per_token")}
        for entry in history(logps__chosen=lambda x: -80.0 - 20 * x)
    ]
    assert names(logs) == ["chosen_falls"]
    assert names([{**entry, "logps/chosen": -80.0 - 0.01 * entry["step"]} for entry in logs]) == []


def test_the_margin_exploding() -> None:
    (sign,) = find_signs(history(rewards__margins=lambda x: 60 * x))
    assert sign.name == "margin_explodes"
    assert "learning_rate" in sign.message
    assert names(history(rewards__margins=lambda x: min(60 * x, EXPLODED_MARGIN - 1))) == []
    assert names(history(rewards__margins=lambda x: EXPLODED_MARGIN + 1)) == []  # large, and not growing


def test_accuracy_stuck_at_chance_only_once_half_the_run_is_done() -> None:
    logs = history(rewards__accuracies=lambda x: 0.5 + 0.02 * math.cos(20 * x))
    assert names(logs, 0.4) == []
    (sign,) = find_signs(logs, 0.6)
    assert sign.name == "accuracy_stuck"
    assert "after 60% of the run" in sign.message
    assert names(logs, 0.6, has_preference_loss=False) == []


def test_accuracy_falling() -> None:
    (sign,) = find_signs(history(rewards__accuracies=lambda x: 0.9 - 0.25 * x))
    assert sign.name == "accuracy_falls"
    assert "from 0.88 to 0.67" in sign.message


def test_the_sft_term_rising() -> None:
    (sign,) = find_signs(history(loss__sft=lambda x: 0.6 + 0.4 * (x - 0.5) ** 2 * 4))
    assert sign.name == "sft_rises"
    assert names(history(loss__sft=lambda x: 1.0 + 0.05 * x)) == []


@pytest.mark.parametrize("name", ["loss", "grad_norm", "logps/chosen"])
def test_what_is_not_finite_is_said_at_once(name: str) -> None:
    logs = history()[:2]
    logs[1][name] = float("nan")
    (sign,) = find_signs(logs, 0.01)
    assert sign.name == "not_finite"
    assert sign.message.startswith(f"{name} is nan at step 20")


def test_evaluation_is_passed_over() -> None:
    logs = [entry for pair in zip(history(), history(), strict=True) for entry in pair]
    for entry in logs[1::2]:
        for name in [name for name in entry if name != "step"]:
            entry[f"eval_{name}"] = entry.pop(name) * -100
    assert names(logs) == []


def test_no_false_alarm_on_any_real_run_of_the_miniature() -> None:
    runs = [run for file in MINIATURE for run in json.loads(file.read_text(encoding="utf-8"))["seeds"].items()]
    seen = 0
    for seed, run in runs:
        for arm, result in run["arms"].items():
            curves = result["training"]
            logs = [
                {"step": 10 * (i + 1), **{name: values[i] for name, values in curves.items()}}
                for i in range(len(curves["loss"]))
            ]
            has_preference = result["settings"]["loss_type"] != ["sft"]
            for length in range(1, len(logs) + 1):
                assert names(logs[:length], length / len(logs), has_preference) == [], (seed, arm, length)
            seen += 1
    assert seen >= 20


# ---------------------------------------------------------------------------------------------------- the callback


def warnings_of(logs: list[dict[str, float]], caplog: pytest.LogCaptureFixture, first: bool = True, **args: Any) -> Any:
    """What the callback logs while a history grows."""
    state = TrainerState(max_steps=10 * STEPS, is_world_process_zero=first)
    callback = EarlyWarning()
    with caplog.at_level(logging.WARNING, logger="longvpo_hf.training.warnings"):
        for entry in logs:
            state.global_step = int(entry["step"])
            state.log_history.append(entry)
            callback.on_log(type("Arguments", (), args)(), state, TrainerControl())
    return [record.getMessage() for record in caplog.records]


def test_each_sign_is_told_once_with_its_step(caplog: pytest.LogCaptureFixture) -> None:
    told = warnings_of(history(rewards__margins=lambda x: 60 * x), caplog, loss_type=["sigmoid", "sft"])
    assert len(told) == 1
    step = int(told[0].split("step ")[1].split(":")[0])
    assert step >= 10 * 2 * WINDOW
    assert "rewards/margins is 2" in told[0]  # said as soon as it was beyond 20


def test_sft_alone_and_other_processes_are_left_in_peace(caplog: pytest.LogCaptureFixture) -> None:
    bad = history(rewards__margins=lambda x: 60 * x)
    assert warnings_of(bad, caplog, loss_type=["sft"]) == []
    assert warnings_of(bad, caplog, first=False, loss_type=["sigmoid"]) == []


def test_a_trainer_takes_it_and_its_curves_are_drawn(
    dataset: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A learning rate that ruins the model: each of 12 steps is logged.
    trainer = trainers.make(
        tmp_path, dataset, callbacks=[EarlyWarning()], learning_rate=3.0, max_steps=12, reference="full"
    )
    with caplog.at_level(logging.WARNING, logger="longvpo_hf.training.warnings"):
        trainer.train()
    assert any(record.getMessage().startswith("Early warning at step ") for record in caplog.records)
    card = (Path(trainer.args.output_dir) / "README.md").exists()
    trainer.create_model_card()
    folder = Path(trainer.args.output_dir)
    assert not card
    assert "(training_curve.png)" in (folder / "README.md").read_text(encoding="utf-8")
    assert Image.open(folder / "training_curve.png").size[0] == 1600  # four panels


# ------------------------------------------------------------------------------------------------------- the curves


def test_only_what_was_logged_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    assert not save_curves([], path)
    assert not save_curves([{"step": 1, "epoch": 1.0}], path)
    assert not path.exists()
    assert save_curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 0.5}], path)
    assert Image.open(path).size == (400, 340)
    assert save_curves(history(), path)
    assert Image.open(path).size == (1600, 340)


def test_places_on_the_timeline_and_evaluations_show(tmp_path: Path) -> None:
    plain, placed, evaluated = (tmp_path / f"{name}.png" for name in ("plain", "placed", "evaluated"))
    save_curves(history(), plain)
    save_curves(history(rewards__accuracies__middle=lambda x: 0.2), placed)
    save_curves([*history(), {"step": 100, "eval_rewards/accuracies": 0.1}], evaluated)
    pictures = {path.read_bytes() for path in (plain, placed, evaluated)}
    assert len(pictures) == 3
    save_curves(history(), placed)
    assert placed.read_bytes() == plain.read_bytes()  # the same log, the same picture
