"""Metrics are means over rows and tokens, however these are grouped, and each evaluated dataset has its own."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import View
from longvpo_hf.training.metrics import Means, RowScores, Throughput

BETA = 0.5


def expected_metrics(rows: list[VideoPreference], policy: Any, reference: Any) -> dict[str, float]:
    """Worked out row by row from plain calls of the models."""
    _, processor = tiny_models.build("internvl")
    lines: list[dict[str, float]] = []
    tokens = {"chosen": 0, "rejected": 0}
    sums = {"chosen": 0.0, "rejected": 0.0}
    for row in rows:
        line: dict[str, float] = {}
        for kind in ("chosen", "rejected"):
            answer = getattr(row, kind)
            scores = trainers.answer_log_probs(policy, processor, row, View.whole(), answer)
            seen = trainers.answer_log_probs(reference, processor, row, View.only(row.reference), answer)
            line[f"logps/{kind}"] = float(scores.sum())
            line[f"rewards/{kind}"] = BETA * float(scores.sum() - seen.sum())
            tokens[kind] += len(scores)
            sums[kind] += float(scores.sum())
            if kind == "chosen":
                line["loss/sft"] = -float(scores.mean())
        line["rewards/margins"] = line["rewards/chosen"] - line["rewards/rejected"]
        line["rewards/accuracies"] = float(line["rewards/margins"] > 0)
        line["loss"] = math.log1p(math.exp(-line["rewards/margins"])) + 0.7 * line["loss/sft"]
        lines.append(line)
    means = {name: sum(line[name] for line in lines) / len(lines) for name in lines[0]}
    means.update({f"logps_per_token/{kind}": sums[kind] / tokens[kind] for kind in tokens})
    return means


@pytest.fixture(scope="module")
def known(preferences: list[VideoPreference]) -> dict[str, float]:
    """Metrics of the first seven rows, whose answers are of unequal length."""
    policy = trainers.perturbed(tiny_models.build("internvl")[0])
    return expected_metrics(preferences[:7], policy, tiny_models.build("internvl")[0])


def make(folder: Path, preferences: list[VideoPreference], **more: Any) -> Any:
    policy = trainers.perturbed(tiny_models.build("internvl")[0])
    rows = make_dataset(preferences[:7])
    return trainers.make(folder, rows, model=policy, beta=BETA, sft_weight=0.7, learning_rate=1e-4, **more)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_an_evaluation_does_not_depend_on_the_batch_size(
    tmp_path: Path, preferences: list[VideoPreference], known: dict[str, float], size: int
) -> None:
    trainer = make(tmp_path, preferences, eval_dataset=make_dataset(preferences[:7]), per_device_eval_batch_size=size)
    metrics = trainer.evaluate()
    for name, value in known.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=2e-4), name
    for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"):
        assert math.isfinite(metrics[f"eval_{name}"])
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]


def test_metrics_of_tokens_do_not_depend_on_the_batch_size_either(
    tmp_path: Path, preferences: list[VideoPreference]
) -> None:
    rows = make_dataset(preferences[:7])
    evaluations = [
        make(tmp_path, preferences, eval_dataset=rows, per_device_eval_batch_size=size).evaluate() for size in (1, 7)
    ]
    for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"):
        one, all_at_once = (metrics[f"eval_{name}"] for metrics in evaluations)
        assert one == pytest.approx(all_at_once, abs=1e-5), name


@pytest.mark.parametrize(("size", "accumulated"), [(7, 1), (3, 3), (2, 4), (1, 7)])
def test_a_step_does_not_depend_on_how_its_rows_were_accumulated(
    tmp_path: Path, preferences: list[VideoPreference], known: dict[str, float], size: int, accumulated: int
) -> None:
    trainer = make(
        tmp_path,
        preferences,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
    )
    trainer.train()
    for name, value in known.items():
        if name != "loss":  # the training loss is a mean over batches: it is what is trained on
            assert trainers.logged(trainer, name) == pytest.approx([value], abs=2e-4), name


def test_several_datasets_have_names_of_their_own(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    named = {"first": make_dataset(preferences[:2]), "second": make_dataset(preferences[2:5])}
    trainer = make(
        tmp_path,
        preferences,
        eval_dataset=named,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_second_rewards/margins",
    )
    apart = {name: make(tmp_path, preferences, eval_dataset=rows).evaluate() for name, rows in named.items()}
    together = trainer.evaluate()
    for name, metrics in apart.items():
        for key, value in metrics.items():
            if not any(word in key for word in ("runtime", "per_second", "preparation", "epoch")):
                own = key.replace("eval_", f"eval_{name}_", 1)
                assert together[own] == pytest.approx(value, abs=1e-6), own
    assert together["eval_first_rewards/margins"] != pytest.approx(together["eval_second_rewards/margins"], abs=1e-4)
    assert not any(key.startswith("eval_rewards") for key in together)
    trainer.train()
    best = max(trainers.logged(trainer, "eval_second_rewards/margins")[1:])
    assert trainer.state.best_metric == pytest.approx(best)


def test_metrics_take_the_prefix_that_is_asked_for(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    trainer = make(tmp_path, preferences, eval_dataset=make_dataset(preferences[:2]))
    metrics = trainer.evaluate(metric_key_prefix="test")
    assert {"test_loss", "test_rewards/margins", "test_loss/sft"} <= metrics.keys()
    assert not any(key.startswith("eval_") for key in metrics)


def test_an_evaluation_leaves_the_steps_metrics_alone(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:2])
    plain = make(tmp_path, preferences, logging_steps=2)
    plain.train()
    evaluated = make(tmp_path, preferences, logging_steps=2, eval_dataset=rows, eval_strategy="steps", eval_steps=1)
    evaluated.train()
    for name in ("loss/sft", "rewards/margins", "logps/chosen"):
        assert trainers.logged(evaluated, name) == trainers.logged(plain, name)


# -------------------------------------------------------------------------------------------------- the parts


def random_scores(rng: random.Random, number: int) -> RowScores:
    noise = torch.Generator().manual_seed(rng.randrange(2**31))
    values = {name: torch.randn(number, generator=noise) for name in RowScores.__slots__}
    for name in ("chosen_tokens", "rejected_tokens"):
        values[name] = torch.randint(1, 9, (number,), generator=noise)
    values["third"] = torch.randint(-1, 3, (number,), generator=noise)
    return RowScores(**values)


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_the_same_however_rows_are_split(seed: int) -> None:
    rng = random.Random(seed)
    scores = random_scores(rng, 23)
    means = Means()
    start = 0
    while start < len(scores):
        end = start + rng.randint(1, 6)
        part = RowScores(*(getattr(scores, name)[start:end] for name in RowScores.__slots__))
        for name, (total, count) in part.sums(BETA).items():
            means.add(name, total, count)
        start = end
    expected = {name: total / count for name, (total, count) in scores.sums(BETA).items()}
    assert dict(means.take()) == pytest.approx(expected, abs=1e-5)
    assert dict(means.take()) == {}


def test_a_metric_that_no_row_has_is_absent() -> None:
    scores = random_scores(random.Random(0), 4)
    nowhere = RowScores(*(torch.full((4,), -1) if n == "third" else getattr(scores, n) for n in RowScores.__slots__))
    assert not any(name.endswith(("begin", "middle", "end")) for name in nowhere.sums(BETA))
    assert scores.first(0).sums(BETA) == {}


@pytest.mark.parametrize("numbers", [(3, 3), (1, 3), (0, 2), (2, 0), (0, 0)])
def test_unequal_rows_of_two_processes_are_gathered(numbers: tuple[int, int]) -> None:
    rng = random.Random(1)
    parts = [random_scores(rng, number) for number in numbers]
    padded: list[torch.Tensor] = []

    def first_process(tensor: torch.Tensor) -> torch.Tensor:
        padded.append(tensor)
        return tensor

    for part in parts:
        part.gathered(first_process, 3)
    assert [tensor.shape for tensor in padded] == [(3, len(RowScores.__slots__) + 1)] * 2
    everyone = parts[0].gathered(lambda tensor: torch.cat(padded), 3)
    for name in RowScores.__slots__:
        assert torch.equal(getattr(everyone, name), torch.cat([getattr(part, name).float() for part in parts])), name


def test_throughput_leaves_out_what_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("longvpo_hf.training.metrics.time.perf_counter", lambda: now[0])
    rate = Throughput()
    assert rate.take(0) is None
    rate.start(100)
    now[0] = 2.0
    assert rate.take(300) == pytest.approx(100)
    now[0] = 3.0
    assert rate.take(300) is None  # no tokens since
    rate.stop()
    now[0] = 50.0
    rate.start(300)
    now[0] = 51.0
    assert rate.take(310) == pytest.approx(10)
