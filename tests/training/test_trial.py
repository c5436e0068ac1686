"""A model of no known family is tried on its first batch: trees that give other numbers are left, with a warning."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_family_contract import ONE_QUESTION, THREE_QUESTIONS, TWO_TIMELINES, make_batch
from trl.trainer.utils import add_fused_lm_head

import tiny_models
import trainers
from longvpo_hf.errors import ModelError
from longvpo_hf.families.positions import visual_token_ids
from longvpo_hf.training import referring
from longvpo_hf.training.packing import enable_tree_packing, is_tree_packed, trial

torch.set_num_threads(1)

BATCHES = [(ONE_QUESTION, [5]), (THREE_QUESTIONS, [4]), (TWO_TIMELINES, [2, 5])]
WITHOUT = "Tree packing is off, chosen and rejected are scored as two sequences"


def teapot(change: Callable[[Any], None] | None = None) -> Any:
    """A model whose family nobody knows; its processor is InternVL's."""
    model, _ = tiny_models.build("internvl")
    model.config.model_type = "teapot"
    if change is not None:
        change(model)
    return model


def embed_places(model: Any) -> None:
    """Adds to every token what stands for its place in the row, before the text model."""

    def add(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None:
            places = torch.arange(embeds.shape[1], dtype=embeds.dtype)[:, None]
            kwargs["inputs_embeds"] = embeds + 0.3 * torch.sin(places * torch.arange(1, embeds.shape[2] + 1) / 40)
        return args, kwargs

    model.get_decoder().register_forward_pre_hook(add, with_kwargs=True)


def mix_neighbours(model: Any) -> None:
    """Mixes every token's features with those of the token before, behind the text model."""

    def mix(_: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + 0.3 * output.last_hidden_state.roll(1, dims=1)
        return output

    model.base_model.register_forward_hook(mix)


def number_positions_anew(model: Any) -> None:
    """Takes no positions from outside."""

    def forget(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in kwargs.items() if name != "position_ids"}

    model.base_model.register_forward_pre_hook(forget, with_kwargs=True)


def fail_on_trees(model: Any) -> None:
    def fail(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if "longvpo_tree" in kwargs:
            raise KeyError("token_kinds")

    model.base_model.register_forward_pre_hook(fail, with_kwargs=True)


def fail(model: Any) -> None:
    model.base_model.register_forward_pre_hook(lambda *_: 1 / 0)


def blow_up(model: Any) -> None:
    model.get_output_embeddings().weight.data[0, 0] = float("nan")


def train(folder: Path, rows: Dataset, change: Callable[[Any], None] | None, **more: Any) -> Any:
    torch.manual_seed(3)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    trainer = trainers.make(folder, rows, model=teapot(change), peft_config=adapter, disable_dropout=False, **more)
    trainer.train()
    return trainer


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if WITHOUT in record.message]


@pytest.mark.parametrize(
    ("change", "precomputed"),
    [(embed_places, False), (mix_neighbours, False), (mix_neighbours, True), (number_positions_anew, False)],
)
def test_a_family_that_is_wrong_under_trees_trains_without_them(
    change: Callable[[Any], None], precomputed: bool, tmp_path: Path, dataset: Dataset, caplog: Any
) -> None:
    if precomputed:
        dataset.save_to_disk(tmp_path / "rows")
    with caplog.at_level(logging.WARNING):
        found = train(tmp_path, dataset, change, precompute_ref_log_probs=precomputed)
    (warning,) = warnings_of(caplog)
    assert "gave other log-probabilities for a tree of the first batch" in warning
    assert "bound 0.001" in warning
    assert not is_tree_packed(found.model)
    assert not found._record_of().training.tree_packing
    expected = train(tmp_path, dataset, change, precompute_ref_log_probs=precomputed, tree_packing=False)
    assert trainers.logged(found) == trainers.logged(expected)


def test_a_family_that_is_right_keeps_its_trees_and_its_random_state(
    tmp_path: Path, dataset: Dataset, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    trial_on_batches = referring.trial_on_batches
    monkeypatch.setattr(referring, "trial_on_batches", lambda *given: calls.append(given) or trial_on_batches(*given))
    found = train(tmp_path, dataset, None)
    assert len(calls) == 1
    assert is_tree_packed(found.model)
    assert not warnings_of(caplog)
    untried = train(tmp_path, dataset, None, tree_packing_trial=False)
    assert len(calls) == 1
    assert trainers.logged(found) == trainers.logged(untried)


@pytest.mark.parametrize(("wanted", "trials"), [(None, 0), (True, 1)])
def test_a_known_family_is_tried_where_it_is_wanted(
    wanted: bool | None, trials: int, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(referring, "trial_on_batches", lambda *given: calls.append(given) or trial.Trial(True, None))
    trainers.make(tmp_path, dataset, "qwen3_vl", max_steps=1, tree_packing_trial=wanted).train()
    assert len(calls) == trials


def test_a_tree_that_fails_is_left_with_its_error_in_the_log(tmp_path: Path, dataset: Dataset, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        found = train(tmp_path, dataset, fail_on_trees)
    (warning,) = warnings_of(caplog)
    assert "failed on a tree of the first batch (KeyError: 'token_kinds')" in warning
    assert all(0 < loss < 10 for loss in trainers.logged(found))


@pytest.mark.parametrize(("change", "words"), [(fail, "ZeroDivisionError"), (blow_up, "not finite")])
def test_where_the_plain_way_fails_too_the_run_ends_by_name(
    change: Callable[[Any], None], words: str, tmp_path: Path, dataset: Dataset
) -> None:
    with pytest.raises(ModelError, match=rf"InternVLForConditionalGeneration cannot be trained: .*{words}"):
        train(tmp_path, dataset, change)


def test_a_batch_without_a_video_leaves_the_trial_to_the_next(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the first rows' videos cannot be read."""
    calls: list[Any] = []
    found = iter([trial.Trial(False, None), trial.Trial(True, None)])
    monkeypatch.setattr(referring, "trial_on_batches", lambda *given: calls.append(given) or next(found))
    train(tmp_path, dataset, None, reference="full")
    assert len(calls) == 2


def test_what_a_trial_says_of_its_batch(dataset: Dataset) -> None:
    model, processor = teapot(), tiny_models.build("internvl")[1]
    add_fused_lm_head(model)
    assert enable_tree_packing(model) is None
    batch = make_batch(processor, *BATCHES[0])
    assert trial.trial_on_batches(model, batch, False) == trial.Trial(True, None)
    without = {**batch, "videos": [], "video_index": torch.full_like(batch["video_index"], -1)}
    visual = visual_token_ids(processor)
    for token in visual:  # as a batch of texts alone
        without["input_ids"] = torch.where(without["input_ids"] == token, 5, without["input_ids"])
    assert trial.trial_on_batches(model, without, False) == trial.Trial(False, None)


@pytest.mark.parametrize("rows", range(len(BATCHES)))
@pytest.mark.parametrize("name", ["internvl", "qwen3_vl", "qwen3_5", "qwen3_vl_moe", "smolvlm"])
def test_in_half_precision_right_trees_stay_within_the_bound(name: str, rows: int) -> None:
    model, processor = tiny_models.build(name)
    add_fused_lm_head(model)
    assert enable_tree_packing(model) is None
    batch = make_batch(processor, *BATCHES[rows])
    with torch.autocast("cpu", torch.bfloat16):
        assert trial.reason_on_batch(model, batch, True) is None


@pytest.mark.parametrize("change", [embed_places, mix_neighbours, number_positions_anew])
def test_in_half_precision_wrong_trees_are_found(change: Callable[[Any], None]) -> None:
    model, processor = teapot(change), tiny_models.build("internvl")[1]
    add_fused_lm_head(model)
    assert enable_tree_packing(model) is None
    for rows in BATCHES:
        with torch.autocast("cpu", torch.bfloat16):
            reason = trial.reason_on_batch(model, make_batch(processor, *rows), True)
        assert "gave other log-probabilities for a tree of the first batch" in str(reason)


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_one_wrong_token_among_many_is_found(seed: int, is_half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = teapot(), tiny_models.build("internvl")[1]
    add_fused_lm_head(model)
    assert enable_tree_packing(model) is None
    draw, tree_forward = random.Random(seed), trial.tree_forward

    def one_off(*given: Any) -> Any:
        output = tree_forward(*given)
        places = output.label_mask.nonzero().tolist()
        row, place = draw.choice(places)
        root_mean_square = float(output.log_probs[output.label_mask.bool()].square().mean().sqrt())
        # With more than 25 answer tokens this is below the bound on their norm in float32.
        output.log_probs[row, place] += draw.choice([-1, 1]) * root_mean_square * (0.1 if is_half else 0.002)
        return output

    monkeypatch.setattr(trial, "tree_forward", one_off)
    batch = make_batch(processor, *BATCHES[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        reason = trial.reason_on_batch(model, batch, is_half)
    assert "gave other log-probabilities for a tree of the first batch" in str(reason)


@pytest.mark.parametrize("seed", range(10))
def test_the_rows_that_are_tried_show_one_video(seed: int) -> None:
    draw = random.Random(seed)
    index = [draw.randrange(-1, 3) for _ in range(draw.randrange(1, 6))]
    lengths = [draw.randrange(1, 9) for _ in range(2 * len(index))]
    ids = torch.arange(len(lengths))[:, None].expand(-1, 9)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask, "video_index": torch.tensor(index)}
    found = trial._rows({**batch, "videos": [{"number": torch.tensor(i)} for i in range(3)]})
    second = [row for row in range(1, len(index)) if index[row] == index[0] >= 0][:1]
    rows = [0, *second]
    assert found["input_ids"][:, 0].tolist() == rows + [row + len(index) for row in rows]
    assert found["attention_mask"].sum(1).tolist() == [lengths[row] for row in found["input_ids"][:, 0].tolist()]
    assert bool(found["attention_mask"].any(0).all())
    assert found["video_index"].tolist() == [min(index[0], 0)] * len(rows)
    assert [int(video["number"]) for video in found["videos"]] == ([index[0]] if index[0] >= 0 else [])
