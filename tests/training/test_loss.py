"""The loss: the paper's SFT term, TRL's loss types, and TRL's own behaviour on rows without clips."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from trl import DPOConfig, DPOTrainer

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import View
from longvpo_hf.training.trainer import LongVPOTrainer

BETA = 0.5


def token_log_probs(model: Any, rows: list[VideoPreference], reference: bool) -> list[tuple[Tensor, Tensor]]:
    """Per row the log-probabilities of chosen and rejected tokens, by plain calls of the model."""
    _, processor = tiny_models.build("internvl")
    views = [View.only(row.reference) if reference else View.whole() for row in rows]
    return [
        (
            trainers.answer_log_probs(model, processor, row, view, row.chosen),
            trainers.answer_log_probs(model, processor, row, view, row.rejected),
        )
        for row, view in zip(rows, views, strict=True)
    ]


def test_sft_is_the_mean_per_answer_and_not_per_token(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = [preferences[0], preferences[1], preferences[2]]
    lengths = {len(row.chosen) for row in rows}
    assert len(lengths) > 1
    chosen = [tokens[0] for tokens in token_log_probs(tiny_models.build("internvl")[0], rows, reference=False)]
    per_answer = -sum(float(tokens.sum()) / len(tokens) for tokens in chosen) / len(rows)
    per_token = -sum(float(tokens.sum()) for tokens in chosen) / sum(len(tokens) for tokens in chosen)
    assert abs(per_answer - per_token) > 1e-3  # TRL's average is another number

    def loss(**more: Any) -> float:
        trainer = trainers.make(tmp_path, make_dataset(preferences), reference="full", beta=BETA, **more)
        return trainers.loss_of(trainer, make_dataset(rows)).item()

    assert loss(sft_weight=0) == pytest.approx(math.log(2), abs=1e-7)
    assert loss(sft_weight=0.7) == pytest.approx(math.log(2) + 0.7 * per_answer, abs=2e-5)
    assert loss(sft_weight=0.7, loss_type="sft") == pytest.approx(0.7 * per_answer, abs=2e-5)
    weighted = loss(sft_weight=0.7, loss_type=["sigmoid", "hinge"], loss_weights=[0.5, 2.0])
    assert weighted == pytest.approx(0.5 * math.log(2) + 2.0 * 1.0 + 0.7 * per_answer, abs=2e-5)


def test_wpo_weights_leave_the_sft_term_alone(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    # TRL itself fails on "sft" under use_weighting: it multiplies an expanded tensor in place.
    rows = preferences[:2]
    chosen = [tokens[0] for tokens in token_log_probs(tiny_models.build("internvl")[0], rows, reference=False)]
    per_answer = -sum(float(tokens.mean()) for tokens in chosen) / len(rows)

    def loss(sft_weight: float) -> float:
        trainer = trainers.make(tmp_path, make_dataset(rows), use_weighting=True, sft_weight=sft_weight)
        return trainers.loss_of(trainer, make_dataset(rows)).item()

    assert loss(0.7) - loss(0.0) == pytest.approx(0.7 * per_answer, abs=2e-5)


def hinge(policy: Any, reference: Any) -> Tensor:
    return torch.stack([F.relu(1 - BETA * margin(p, r)) for p, r in zip(policy, reference, strict=True)]).mean()


def ipo(policy: Any, reference: Any) -> Tensor:
    return torch.stack(
        [(margin(p, r, per_token=True) - 1 / (2 * BETA)) ** 2 for p, r in zip(policy, reference, strict=True)]
    ).mean()


def sigmoid_norm(policy: Any, reference: Any) -> Tensor:
    return torch.stack(
        [-F.logsigmoid(BETA * margin(p, r, per_token=True)) for p, r in zip(policy, reference, strict=True)]
    ).mean()


def margin(policy: Any, reference: Any, per_token: bool = False) -> Tensor:
    ratios = [p.sum() - r.sum() for p, r in zip(policy, reference, strict=True)]
    if per_token:
        ratios = [ratio / len(p) for ratio, p in zip(ratios, policy, strict=True)]
    return ratios[0] - ratios[1]


@pytest.mark.parametrize("formula", [hinge, ipo, sigmoid_norm])
def test_loss_types_of_trl_give_what_their_formulas_do(
    tmp_path: Path, preferences: list[VideoPreference], formula: Callable[..., Tensor]
) -> None:
    rows = preferences[:3]
    policy = trainers.perturbed(tiny_models.build("internvl")[0])
    trainer = trainers.make(
        tmp_path, make_dataset(preferences), model=policy, loss_type=formula.__name__, sft_weight=0, beta=BETA
    )
    loss = trainers.loss_of(trainer, make_dataset(rows)).item()
    other = trainers.perturbed(tiny_models.build("internvl")[0])
    expected = formula(
        token_log_probs(other, rows, reference=False),
        token_log_probs(tiny_models.build("internvl")[0], rows, reference=True),
    ).item()
    assert abs(expected - formula(*[token_log_probs(other, rows, reference=False)] * 2).item()) > 1e-3
    assert loss == pytest.approx(expected, rel=1e-4)


ALL_LOSS_TYPES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop "
    "sigmoid_norm"
)


@pytest.mark.parametrize("more", [{}, {"ld_alpha": 0.5}, {"f_divergence_type": "js_divergence"}], ids=str)
def test_every_loss_type_of_trl_trains(tmp_path: Path, preferences: list[VideoPreference], more: Any) -> None:
    only_reverse_kl = {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"}
    names = [n for n in ALL_LOSS_TYPES.split() if "f_divergence_type" not in more or n not in only_reverse_kl]
    trainer = trainers.make(
        tmp_path, make_dataset(preferences), loss_type=names, sft_weight=0.5, label_smoothing=0.1, max_steps=1, **more
    )
    trainer.train()
    assert math.isfinite(trainers.logged(trainer)[0])
    assert trainers.logged(trainer, "grad_norm")[0] > 0


def test_length_desensitised_scores_count_the_tail_less(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    row = preferences[0]  # "red", "it is green": three letters and eleven, each with two tokens of the template
    rows, model = make_dataset([row]), tiny_models.build("internvl")[0]
    chosen, rejected = token_log_probs(model, [row], reference=False)[0]
    trainer = trainers.make(tmp_path, make_dataset(preferences), ld_alpha=0.25, max_steps=1, reference="full")
    scored = trainer.compute_ref_log_probs(trainer.ref_model, trainers.batch_of(trainer, rows)["reference"])
    assert len(chosen) < len(rejected)
    tail = rejected[: len(chosen)].sum() + 0.25 * rejected[len(chosen) :].sum()
    torch.testing.assert_close(torch.cat(scored), torch.stack([chosen.sum(), tail]), rtol=0, atol=2e-5)
    trainers.loss_of(trainer, rows)
    # The same model and view on both sides: only scores counted alike on both sides give margins of nothing.
    means = dict(trainer._means["train"].take())
    for name in ("rewards/chosen/begin", "rewards/rejected/begin"):
        assert means[name] == pytest.approx(0, abs=1e-5)


# ----------------------------------------------------------------------------- rows without clips


def text_rows() -> Dataset:
    words = ["red", "green, or so", "blue", "a longer answer than these"]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Question {i}?"}],
                "chosen": [{"role": "assistant", "content": words[i]}],
                "rejected": [{"role": "assistant", "content": words[(i + 1) % 4]}],
            }
            for i in range(4)
        ]
    )


def image_rows() -> Dataset:
    images = [Image.new("RGB", (56, 56), (60 * i, 20, 200)) for i in range(4)]
    rows = text_rows().to_list()
    return Dataset.from_list([{**row, "images": [image]} for row, image in zip(rows, images, strict=True)])


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("rows", [text_rows, image_rows])
def test_rows_without_clips_train_as_in_trl(tmp_path: Path, family: str, rows: Callable[[], Dataset]) -> None:
    plain = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "beta": 0.3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "gradient_checkpointing": False,
        "bf16": False,
        "max_length": 512,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }

    def run(trainer_class: Any, args: Any) -> list[dict[str, float]]:
        model, processor = tiny_models.build(family)
        trainer = trainer_class(
            model=model,
            ref_model=tiny_models.build(family)[0],
            args=args,
            train_dataset=rows(),
            eval_dataset=rows(),
            processing_class=processor,
        )
        trainer.train()
        timed = ("runtime", "per_second")
        logs = trainer.state.log_history
        return [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in logs]

    stock = run(DPOTrainer, DPOConfig(output_dir=str(tmp_path / "stock"), **plain))
    settings = trainers.settings(tmp_path, **plain, sft_weight=0)
    assert run(LongVPOTrainer, settings) == stock
    first, second, *_ = [entry["loss"] for entry in stock if "loss" in entry]
    assert first == pytest.approx(math.log(2))
    assert second != pytest.approx(math.log(2), abs=1e-4)


def _mixture_of_experts() -> tuple[Any, Any]:
    """A tiny Qwen3-VL-MoE with the processor of Qwen3-VL."""
    dense, processor = tiny_models.build("qwen3_vl")
    facts = dense.config.to_dict()
    text = {name: value for name, value in facts["text_config"].items() if name not in ("model_type", "architectures")}
    vision = {name: value for name, value in facts["vision_config"].items() if name != "model_type"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    tokens = {name: value for name, value in facts.items() if name.endswith("_token_id")}
    config = Qwen3VLMoeConfig(text_config={**text, **experts}, vision_config=vision, **tokens)
    torch.manual_seed(0)
    return Qwen3VLMoeForConditionalGeneration(config), processor


@pytest.mark.parametrize("tree_packing", [True, False])
def test_a_mixture_of_experts_keeps_its_load_balancing_loss(
    tmp_path: Path, preferences: list[VideoPreference], tree_packing: bool
) -> None:
    rows = make_dataset(preferences[:2])
    trainers_made = []
    for coefficient in (0.5, 0.0):
        model, processor = _mixture_of_experts()
        reference, _ = _mixture_of_experts()
        model.config.text_config.router_aux_loss_coef = coefficient
        trainers_made.append(
            trainers.make(
                tmp_path,
                rows,
                model=model,
                processing_class=processor,
                ref_model=reference,
                tree_packing=tree_packing,
                router_aux_loss_coef=coefficient,
            )
        )
    with_aux, without = (trainers.loss_of(trainer, rows) for trainer in trainers_made)
    aux = trainers_made[0]._metrics["train"]["aux_loss"][0]
    assert aux > 0.5  # balanced over 4 experts with 2 chosen it is about 2
    torch.testing.assert_close(with_aux - without, torch.tensor(0.5 * aux), rtol=1e-4, atol=1e-4)
