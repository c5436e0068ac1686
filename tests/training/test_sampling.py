"""View distillation on sampled answers: what is drawn, when it is drawn anew, and the divergence on it by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from torch import Tensor

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.errors import ConfigError
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.families.positions import visual_token_ids
from longvpo_hf.frames import FrameSampler
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import View
from longvpo_hf.training import sampling
from longvpo_hf.training.checkpoints import torn
from longvpo_hf.training.collator import VideoPreferenceCollator

ON = {"view_distillation_weight": 1.0, "view_distillation_on": "sampled", "view_distillation_max_new_tokens": 5}
ALONE = {**ON, "loss_type": "sft", "sft_weight": 0.0}
FAR = 0.5


def make(folder: Path, rows: Any, family: str = "internvl", **more: Any) -> Any:
    """A trainer whose policy is another model than its reference, and whose answers end now and then."""
    if "model" not in more and "peft_config" not in more:
        model = trainers.perturbed(tiny_models.build(family)[0], FAR)
        model.generation_config.eos_token_id = list(range(3, 60))  # a few bytes in the tiny models' vocabularies
        more["model"] = model
    return trainers.make(folder, rows, family, **{**ALONE, **more})


def answers_of(trainer: Any, rows: Any, step: int = 0, is_kept: bool = False) -> list[list[int]]:
    """What the policy draws for rows as one batch."""
    batch = trainers.batch_of(trainer, rows)
    return trainer._sampled.of(trainer.model, batch, step, trainer.accelerator, is_kept)


def plain_logits(model: Any, processor: Any, row: VideoPreference, view: View, answer: Sequence[int]) -> Tensor:
    """Logits for each token of an answer and for the one after it, by one plain call of the model."""
    frames = FrameSampler(trainers.NUM_FRAMES, fps=None, max_pixels=trainers.MAX_PIXELS)(row.timeline, view)
    prompt = PromptEncoder(processor).encode(frames, [row.prompt], [[row.chosen, row.rejected]])
    ids = torch.tensor([prompt.input_ids[0] + list(answer)])
    more = dict(prompt.visual)
    if prompt.mm_token_type_ids is not None:
        more["mm_token_type_ids"] = torch.tensor([prompt.mm_token_type_ids[0] + [0] * len(answer)])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]
    return logits[len(prompt.input_ids[0]) - 1 :].float()


def drawn_by_hand(model: Any, processor: Any, row: VideoPreference, seed: int, most: int, ends: set[int]) -> list[int]:
    """An answer drawn token by token, each from a plain call on all before it: p / e is highest at the drawn token."""
    noise, ids = torch.Generator().manual_seed(seed), []
    visual = sorted(visual_token_ids(model.config) | visual_token_ids(processor))
    while len(ids) < most and not (ids and ids[-1] in ends):
        logits = plain_logits(model, processor, row, View.whole(), ids)[-1]
        logits[visual] = -torch.inf
        ids.append(int((logits.softmax(-1) / torch.empty_like(logits).exponential_(generator=noise)).argmax()))
    return ids


# ------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "llava_onevision", "qwen3_5"])
def test_answers_are_drawn_from_the_policy_on_the_whole_timeline(
    tmp_path: Path, preferences: list[VideoPreference], family: str
) -> None:
    rows = [preferences[0], preferences[3], preferences[1]]  # two timelines, prompts of unequal length
    trainer = make(tmp_path, make_dataset(rows), family, tree_packing=False)
    trainer.model.generation_config.repetition_penalty = 50.0  # the model's own taste is no part of its distribution
    found = answers_of(trainer, make_dataset(rows), step=7)
    keys = trainers.batch_of(trainer, make_dataset(rows))["row_keys"].tolist()
    ends = set(trainer.model.generation_config.eos_token_id)
    for row, key, ids in zip(rows, keys, found, strict=True):
        seed = trainer._sampled._seed_of(key, 7)
        assert ids == drawn_by_hand(trainer.model, trainer.processing_class, row, seed, 5, ends)
    assert len({tuple(ids) for ids in found}) == 3
    assert trainer.model.generation_config.repetition_penalty == 50.0


def test_neither_batch_nor_order_but_step_and_seed_change_an_answer(
    tmp_path: Path, preferences: list[VideoPreference]
) -> None:
    rows = make_dataset(preferences[:4])
    trainer = make(tmp_path, rows)
    found = answers_of(trainer, rows)
    assert found == answers_of(trainer, rows)
    assert found[::-1] == answers_of(trainer, rows.select([3, 2, 1, 0]))
    assert [found[2]] == answers_of(trainer, rows.select([2]))
    assert found != answers_of(trainer, rows, step=1)
    assert found != answers_of(make(tmp_path, rows, seed=43), rows)


def test_an_answer_ends_with_its_end_and_never_holds_a_video(
    tmp_path: Path, preferences: list[VideoPreference]
) -> None:
    rows = make_dataset(preferences)
    trainer = make(tmp_path, rows, view_distillation_max_new_tokens=12)
    visual = trainer.data_collator.visual_token_ids
    head = trainer.model.get_output_embeddings()
    with torch.no_grad():  # placeholders would be drawn nearly always
        head.weight[sorted(visual)] = 0.0
        head.weight[sorted(visual), 0] = 100.0
    ends = set(trainer.model.generation_config.eos_token_id)
    found = answers_of(trainer, rows)
    assert not any(visual & set(ids) for ids in found)
    assert all(not ends & set(ids[:-1]) for ids in found)
    assert any(ids[-1] in ends for ids in found)
    assert all(ids[-1] in ends or len(ids) == 12 for ids in found)
    trainers.loss_of(trainer, rows)


def test_an_answer_keeps_within_the_longest_sequence(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:4])
    trainer = make(tmp_path, rows, view_distillation_max_new_tokens=2000)
    trainer.model.generation_config.eos_token_id = None
    prompts = trainers.batch_of(trainer, rows)["completion_mask"][:4].argmax(1).tolist()
    trainer = make(tmp_path, rows, view_distillation_max_new_tokens=2000, max_length=max(prompts) + 30)
    trainer.model.generation_config.eos_token_id = None
    assert [len(ids) for ids in answers_of(trainer, rows)] == [max(prompts) + 30 - prompt for prompt in prompts]


def test_nothing_but_the_answer_comes_of_it(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:2])
    adapter = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    trainer = make(tmp_path, rows, peft_config=adapter, gradient_checkpointing=True)
    model = trainer.model.train()

    def state() -> Any:
        modules = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
        weights = [(weight.requires_grad, float(weight.detach().sum())) for weight in model.parameters()]
        return modules, weights, torch.get_rng_state().tolist(), model.get_base_model().generation_config

    before = state()
    found = answers_of(trainer, rows)
    assert state() == before
    assert found == answers_of(trainer, rows)  # the dropout of adapters is off


# ------------------------------------------------------------------------------------------------- the numbers


def by_hand(
    policy: Any, teacher: Any, processor: Any, rows: Sequence[VideoPreference], answers: Sequence[list[int]]
) -> float:
    """KL(teacher ‖ student), from plain calls of both models, each on its view, on the same answers."""
    found = []
    for row, ids in zip(rows, answers, strict=True):
        student = plain_logits(policy, processor, row, View.whole(), ids)[:-1].double().log_softmax(-1)
        known = plain_logits(teacher, processor, row, View.only(row.reference), ids)[:-1].double().log_softmax(-1)
        found.append(float((known.exp() * (known - student)).sum()) / len(ids))
    return sum(found) / len(found)


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl", "llava_onevision", "qwen3_5"])
def test_the_term_is_the_divergence_on_the_sampled_answers(
    tmp_path: Path, preferences: list[VideoPreference], family: str
) -> None:
    rows = [preferences[0], preferences[3], preferences[1]]
    trainer = make(tmp_path, make_dataset(rows), family)
    answers = answers_of(trainer, make_dataset(rows))
    found = trainers.loss_of(trainer, make_dataset(rows)).item()
    teacher, processor = tiny_models.build(family)
    policy = trainers.perturbed(tiny_models.build(family)[0], FAR)
    expected = by_hand(policy, teacher, processor, rows, answers)
    assert found == pytest.approx(expected, rel=5e-4)
    assert dict(trainer._means["train"].take())["loss/view_distillation"] == pytest.approx(expected, rel=5e-4)
    on_chosen = make(tmp_path, make_dataset(rows), family, view_distillation_on="chosen")
    assert trainers.loss_of(on_chosen, make_dataset(rows)).item() != pytest.approx(expected, rel=1e-2)


def test_the_other_terms_do_not_see_the_sampled_answers(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:3])

    def metrics(**more: Any) -> dict[str, float]:
        trainer = make(tmp_path, rows, loss_type=["sigmoid", "ipo"], sft_weight=0.3, **more)
        loss = trainers.loss_of(trainer, rows).item()
        taken = dict(trainer._means["train"].take())
        assert loss == pytest.approx(taken.pop("loss"))
        term = more.get("view_distillation_weight", 1.0) * taken.pop("loss/view_distillation")
        return {**taken, "others": loss - term}

    assert metrics() == pytest.approx(metrics(view_distillation_weight=0.0), rel=1e-4, abs=1e-5)
    assert metrics(tree_packing=False) == pytest.approx(metrics(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl_moe", "qwen3_5"])
def test_packed_equals_separate(tmp_path: Path, preferences: list[VideoPreference], family: str) -> None:
    rows = make_dataset([preferences[0], preferences[1], preferences[4]])

    def gradients(tree_packing: bool) -> tuple[float, dict[str, Tensor]]:
        trainer = make(tmp_path, rows, family, tree_packing=tree_packing, sft_weight=1.0)
        loss = trainers.loss_of(trainer, rows)
        loss.backward()
        named = trainer.model.named_parameters()
        return loss.item(), {name: weight.grad for name, weight in named if weight.grad is not None}

    packed, separate = gradients(True), gradients(False)
    assert packed[0] == pytest.approx(separate[0], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in separate[1].values())
    assert packed[1].keys() == separate[1].keys()
    for name, gradient in separate[1].items():
        assert float((packed[1][name] - gradient).abs().max()) <= 1e-4 * largest, name


def test_rows_that_are_left_out_are_not_answered(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    broken = make_dataset(preferences[:3])
    rows = broken.to_list()
    for clip in rows[0]["clips"]:
        clip["file_name"] = str(tmp_path / "gone.mp4")
    broken = broken.from_list(rows)
    more: dict[str, Any] = {"on_bad_video": "skip", "view_distillation_refresh_steps": 2}
    trainer = make(tmp_path, broken, **more)
    kept = make_dataset(preferences[1:3])
    assert trainers.loss_of(trainer, broken).item() == pytest.approx(
        trainers.loss_of(make(tmp_path, kept), kept).item(), rel=1e-5
    )
    assert len(trainer._sampled._kept) == 2
    trainers.loss_of(trainer, broken.select([0]))  # a stand-in is answered, for processes that share weights
    assert len(trainer._sampled._kept) == 2


# ------------------------------------------------------------------------------------------------- over the steps


def noted(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call answers."""
    asked: list[int] = []
    sampled = sampling._sampled

    def counted(model: Any, batch: Any, rows: Sequence[int], *args: Any) -> list[list[int]]:
        asked.append(len(rows))
        return sampled(model, batch, rows, *args)

    monkeypatch.setattr(sampling, "_sampled", counted)
    return asked


@pytest.mark.parametrize(("refresh", "expected"), [(1, [2] * 6), (2, [2] * 6), (3, [2, 2, 2, 2]), (6, [2, 2])])
def test_an_answer_serves_for_so_many_steps(
    tmp_path: Path,
    preferences: list[VideoPreference],
    monkeypatch: pytest.MonkeyPatch,
    refresh: int,
    expected: list[int],
) -> None:
    trainer = make(
        tmp_path,
        make_dataset(preferences[:4]),  # two steps an epoch, in order: a row comes again two steps later
        max_steps=6,
        view_distillation_refresh_steps=refresh,
        train_sampling_strategy="sequential",
    )
    asked = noted(trainer, monkeypatch)
    trainer.train()
    assert asked == expected
    assert len(trainer._sampled._kept) == (0 if refresh == 1 else 4)


def test_a_resumed_run_goes_on_as_the_undisturbed_one(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:4])
    more: dict[str, Any] = {"max_steps": 5, "view_distillation_refresh_steps": 4}
    whole = make(tmp_path / "whole", rows, **more, save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-3"
    assert torn(checkpoint) is None
    resumed = make(tmp_path / "resumed", rows, **more)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert trainers.logged(resumed) == trainers.logged(whole)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    (checkpoint / sampling.FILE).write_text(json.dumps({}))  # it is this file that does it
    other = make(tmp_path / "other", rows, **more)
    other.train(resume_from_checkpoint=str(checkpoint))
    assert trainers.logged(other) != trainers.logged(whole)


def test_evaluation_draws_anew_and_keeps_nothing(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:3])
    trainer = make(tmp_path, rows, eval_dataset=rows, per_device_eval_batch_size=2, view_distillation_refresh_steps=9)
    answers = answers_of(trainer, rows)
    policy = trainers.perturbed(tiny_models.build("internvl")[0], FAR)
    expected = by_hand(policy, *tiny_models.build("internvl"), preferences[:3], answers)
    assert trainer.evaluate()["eval_loss/view_distillation"] == pytest.approx(expected, rel=5e-4)
    assert trainer._sampled._kept == {}


def test_streamed_rows_are_answered_too(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:4])
    trainer = make(tmp_path, rows.to_iterable_dataset(), view_distillation_refresh_steps=3)
    trainer.train()
    assert len(trainer._sampled._kept) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"view_distillation_on": "both"}, "view_distillation_on must be 'chosen' or 'sampled', got 'both'"),
        ({"view_distillation_refresh_steps": 0}, "view_distillation_refresh_steps must be ≥ 1, got 0"),
        ({"view_distillation_max_new_tokens": 0}, "view_distillation_max_new_tokens must be ≥ 1, got 0"),
        ({**ON, "precompute_ref_log_probs": True}, "the reference has to grade them when they are drawn"),
    ],
)
def test_settings_that_cannot_be_sampled_with_are_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainers.settings(tmp_path, **more)


def test_prompt_learning_is_refused(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ConfigError, match="virtual tokens"):
        make(tmp_path, make_dataset(preferences[:2]), peft_config=virtual)


def test_a_third_answer_is_put_beside_the_two(preferences: list[VideoPreference]) -> None:
    processor = tiny_models.build("qwen3_vl")[1]
    collate = VideoPreferenceCollator(processor, trainers.NUM_FRAMES, fps=None, max_pixels=trainers.MAX_PIXELS)
    batch = collate(list(make_dataset(preferences[:2])))
    long = list(range(200, 260))
    found = sampling.with_sampled(batch, [[7, 8], long], processor.tokenizer.pad_token_id)
    width = batch["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "completion_mask", "mm_token_type_ids"):
        assert torch.equal(found[name][:4, :width], batch[name])
    for row, ids in enumerate([[7, 8], long]):
        prompt = int(batch["completion_mask"][row].argmax())
        assert found["input_ids"][4 + row, : prompt + len(ids)].tolist() == [
            *batch["input_ids"][row, :prompt].tolist(),
            *ids,
        ]
        assert int(found["attention_mask"][4 + row].sum()) == prompt + len(ids)
        assert found["completion_mask"][4 + row].nonzero()[:, 0].tolist() == list(range(prompt, prompt + len(ids)))
        assert not found["mm_token_type_ids"][4 + row, prompt:].any()
