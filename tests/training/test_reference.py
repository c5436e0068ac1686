"""What the reference model is scored on, and by whom: the views, the models, and errors that name the row."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import tiny_models
import trainers
from conftest import make_dataset, write_clip
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import Clip, Timeline, View

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def reference_scores(trainer: Any, rows: Dataset) -> torch.Tensor:
    """`[2, rows]`: the reference's log-probabilities of chosen and rejected answers, as the loss gets them."""
    batch = trainers.batch_of(trainer, rows)
    return torch.stack(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch["reference"]))


def expected_scores(rows: list[VideoPreference], views: list[View], model: Any, processor: Any) -> torch.Tensor:
    return torch.tensor(
        [
            [
                trainers.answer_log_probs(model, processor, row, view, getattr(row, answer)).sum()
                for row, view in zip(rows, views, strict=True)
            ]
            for answer in ("chosen", "rejected")
        ]
    )


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_same_view_for_both_starts_at_ln_2(tmp_path: Path, preferences: list[VideoPreference], family: str) -> None:
    trainer = trainers.make(tmp_path, make_dataset(preferences), family, reference="full", sft_weight=0)
    assert trainers.loss_of(trainer, make_dataset(preferences[:3])).item() == torch.tensor(2.0).log().item()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_anchored_reference_gives_the_number_worked_out_by_hand(
    tmp_path: Path, preferences: list[VideoPreference], family: str
) -> None:
    rows = preferences[:2]
    trainer = trainers.make(tmp_path, make_dataset(preferences), family, beta=0.5, sft_weight=0.3)
    model, processor = tiny_models.build(family)
    dpo, sft = [], []
    for row in rows:
        anchor = View.only(row.reference)
        policy = [trainers.answer_log_probs(model, processor, row, View.whole(), a) for a in (row.chosen, row.rejected)]
        seen = [trainers.answer_log_probs(model, processor, row, anchor, a) for a in (row.chosen, row.rejected)]
        margin = (policy[0].sum() - seen[0].sum()) - (policy[1].sum() - seen[1].sum())
        dpo.append(math.log1p(math.exp(-0.5 * margin)))  # −log σ(β · margin)
        sft.append(-policy[0].mean().item())
    by_hand = sum(dpo) / 2 + 0.3 * sum(sft) / 2
    assert abs(sum(dpo) / 2 - math.log(2)) > 1e-3  # another view is no ordinary DPO
    assert trainers.loss_of(trainer, make_dataset(rows)).item() == pytest.approx(by_hand, abs=2e-5)


def test_each_view_is_the_one_asked_for(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = [replace(preferences[0], reference=(), id=""), replace(preferences[1], reference=(0, 2), id="")]
    whole = View.whole()
    views = {
        "row": [whole, View.only([0, 2])],
        "anchor": [View.only(rows[0].evidence), View.only([0, 2])],
        "full": [whole, whole],
    }
    model, processor = tiny_models.build("internvl")
    seen = []
    for reference, expected in views.items():
        trainer = trainers.make(tmp_path, make_dataset(rows), reference=reference)
        scores = reference_scores(trainer, make_dataset(rows))
        torch.testing.assert_close(scores, expected_scores(rows, expected, model, processor), rtol=0, atol=2e-5)
        seen.append(scores)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert not torch.allclose(seen[1], seen[2], atol=1e-3)


def test_the_reference_never_sees_a_distractor(
    tmp_path: Path, preferences: list[VideoPreference], clips: dict[str, Clip]
) -> None:
    row = preferences[0]
    anchor = row.reference[0]

    def shown(place: int, clip: Clip) -> Dataset:
        members = list(row.timeline.clips)
        members[place] = clip
        return make_dataset([replace(row, timeline=Timeline(tuple(members)), id="")])

    trainer = trainers.make(tmp_path, make_dataset([row]))
    before = reference_scores(trainer, make_dataset([row]))
    others = [place for place in range(3) if place != anchor]
    for place in others:
        assert torch.equal(reference_scores(trainer, shown(place, clips["white"])), before)
        policy = trainers.batch_of(trainer, shown(place, clips["white"]))["videos"][0]["pixel_values"]
        assert not torch.equal(policy, trainers.batch_of(trainer, make_dataset([row]))["videos"][0]["pixel_values"])
    moved = (reference_scores(trainer, shown(anchor, clips["white"])) - before).abs().max()
    assert moved > 1e-3


def test_reference_frames_have_a_budget_of_their_own(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    trainer = trainers.make(tmp_path, make_dataset(preferences), reference_num_frames=2)
    batch = trainer.data_collator([make_dataset(preferences)[0]])
    assert len(batch["videos"][0]["pixel_values"]) == trainers.NUM_FRAMES
    assert len(batch["reference"]["videos"][0]["pixel_values"]) == 2


def test_an_explicit_reference_model_is_the_one_that_scores(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = preferences[:2]
    other = trainers.perturbed(tiny_models.build("internvl")[0])
    trainer = trainers.make(tmp_path, make_dataset(rows), ref_model=other)
    views = [View.only(row.reference) for row in rows]
    _, processor = tiny_models.build("internvl")
    expected = expected_scores(rows, views, trainers.perturbed(tiny_models.build("internvl")[0]), processor)
    torch.testing.assert_close(reference_scores(trainer, make_dataset(rows)), expected, rtol=0, atol=2e-5)


def test_a_new_adapter_has_the_base_model_as_reference(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = preferences[:2]
    trainer = trainers.make(tmp_path, make_dataset(preferences), peft_config=LORA, learning_rate=0.1)
    assert trainer.ref_model is None
    before = reference_scores(trainer, make_dataset(rows))
    policy = trainers.loss_of(trainer, make_dataset(rows)).item()
    trainer.train()
    assert trainers.loss_of(trainer, make_dataset(rows)).item() != pytest.approx(policy, abs=1e-3)
    assert torch.equal(reference_scores(trainer, make_dataset(rows)), before)
    model, processor = tiny_models.build("internvl")
    expected = expected_scores(rows, [View.only(row.reference) for row in rows], model, processor)
    torch.testing.assert_close(before, expected, rtol=0, atol=2e-5)


def test_a_trained_adapter_has_its_own_start_as_reference(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = preferences[:2]

    def adapted() -> Any:
        model = get_peft_model(tiny_models.build("internvl")[0], LORA)
        noise = torch.Generator().manual_seed(2)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape, generator=noise) * 0.2
        return model

    trainer = trainers.make(tmp_path, make_dataset(preferences), model=adapted(), learning_rate=0.1)
    assert "ref" in trainer.model.peft_config
    trainer.train()
    _, processor = tiny_models.build("internvl")
    views = [View.only(row.reference) for row in rows]
    expected = expected_scores(rows, views, adapted(), processor)
    base = expected_scores(rows, views, tiny_models.build("internvl")[0], processor)
    assert not torch.allclose(expected, base, atol=1e-2)
    torch.testing.assert_close(reference_scores(trainer, make_dataset(rows)), expected, rtol=0, atol=2e-5)


# ----------------------------------------------------------------------------------------- bad rows


def damaged(rows: Dataset, **columns: Any) -> Dataset:
    """The first row alone, with other values."""
    return Dataset.from_list([{**rows[0], **columns}])


def with_clip(rows: Dataset, **values: Any) -> Dataset:
    first, *others = rows[0]["clips"]
    return damaged(rows, clips=[{**first, **values}, *others])


def test_a_bad_row_is_named(tmp_path: Path, dataset: Dataset) -> None:
    name = dataset[0]["id"]
    trainer = trainers.make(tmp_path, dataset)
    (tmp_path / "text.mp4").write_text("this is no video")
    short = write_clip(tmp_path / "short.mp4", (9, 9, 9), seconds=1.0)
    bad = {
        rf"reference \(row {name}\) must be in \[0, 3\), got 3": damaged(dataset, reference=[3]),
        rf"evidence \(row {name}\) must be in \[0, 3\), got -1": damaged(dataset, evidence=[-1]),
        rf"chosen of a preference is empty \(row {name}\)": damaged(
            dataset, chosen=[{"role": "assistant", "content": " "}]
        ),
        rf"row {name}: missing_file: .*gone.mp4": with_clip(dataset, file_name=str(tmp_path / "gone.mp4")),
        rf"row {name}: unreadable: .*text.mp4": with_clip(dataset, file_name=str(tmp_path / "text.mp4")),
        rf"row {name}: beyond_end: .*short.mp4.*the video ends at 1.0 s": with_clip(dataset, file_name=str(short)),
        rf"row {name}: clips must be a list of at least one clip, got": damaged(dataset, clips=[]),
        rf"row {name}: reference='anchor' needs .* evidence clips, and it names none": damaged(
            dataset, reference=[], evidence=[]
        ),
    }
    for message, rows in bad.items():
        with pytest.raises(ValueError, match=message):
            trainer.data_collator([rows[0]])


def test_a_bad_row_is_named_from_a_dataloader_worker_too(tmp_path: Path, dataset: Dataset) -> None:
    rows = with_clip(dataset, file_name=str(tmp_path / "gone.mp4"))
    trainer = trainers.make(tmp_path, rows, dataloader_num_workers=1)
    with pytest.raises((UnreadableVideo, RuntimeError), match=f"row {dataset[0]['id']}: missing_file"):
        trainer.train()
