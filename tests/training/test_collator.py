"""From rows to batches: rows as the Hub holds them, what does not fit, videos that cannot be decoded, the order."""

from __future__ import annotations

import logging
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset

import tiny_models
import trainers
from conftest import make_dataset, write_clip
from longvpo_hf.families import context_tokens
from longvpo_hf.frames import FrameSampler
from longvpo_hf.preference import VideoPreference
from longvpo_hf.publishing.dataset import DatasetWriter
from longvpo_hf.record import DatasetRecord, MethodRecord
from longvpo_hf.training.collator import BAD_VIDEO_REASONS, VideoPreferenceCollator
from longvpo_hf.training.rows import TimelineSampler


def collator(family: str = "internvl", **more: Any) -> VideoPreferenceCollator:
    given = {"num_frames": 6, "fps": None, "max_pixels": 56 * 56, "reference": "anchor", **more}
    return VideoPreferenceCollator(tiny_models.build(family)[1], **given)


# ------------------------------------------------------------------------------------------- the batch


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_batch_is_as_described(preferences: list[VideoPreference], family: str) -> None:
    rows = make_dataset(preferences)
    batch = collator(family)([rows[i] for i in (0, 1, 2)])  # two about the first timeline, one about the second
    tokenizer = tiny_models.build(family)[1].tokenizer
    assert batch["video_index"].tolist() == [0, 0, 1]
    assert len(batch["videos"]) == 2
    for part in (batch, batch["reference"]):
        assert part["input_ids"].shape == part["attention_mask"].shape == part["completion_mask"].shape
        assert len(part["input_ids"]) == 6
        for row, (ids, mask) in enumerate(zip(part["input_ids"], part["completion_mask"], strict=True)):
            answer = (preferences[row].chosen, preferences[row - 3].rejected)[row // 3]
            assert tokenizer.decode(ids[mask == 1]).strip() == answer + "<|im_end|>"
    assert len(batch["reference"]["videos"]) == 3  # three anchors, three views
    assert batch["places"].tolist() == pytest.approx([1 / 6, 1 / 2, 1 / 2])
    assert (batch["rows"], batch["kept"].tolist(), batch["bad_videos"].sum()) == (3, [0, 1, 2], 0)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_visual_tokens_are_counted_once_a_timeline(preferences: list[VideoPreference], family: str) -> None:
    rows = make_dataset(preferences)
    model, _ = tiny_models.build(family)
    batch = collator(family)([rows[0], rows[1], rows[2]])
    visual = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")]
    placeholders = torch.isin(batch["input_ids"], torch.tensor([token for token in visual if token is not None]))
    assert batch["visual_tokens"] == int(placeholders[0].sum() + placeholders[2].sum()) > 0


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_control_tokens_in_rows_make_no_placeholders_and_end_no_turns(
    preferences: list[VideoPreference], family: str
) -> None:
    processor = tiny_models.build(family)[1]
    hostile = "".join(processor.tokenizer.all_special_tokens)
    plain, rows = make_dataset(preferences)[0], make_dataset(preferences)
    row = {**plain, "prompt": [{"role": "user", "content": f"{hostile} What is it? {hostile}"}]}
    row |= {name: [{"role": "assistant", "content": f"A {hostile}{name}"}] for name in ("chosen", "rejected")}
    wanted, got = (collator(family)([one, rows[1]]) for one in (plain, row))
    special = torch.tensor(processor.tokenizer.all_special_ids)
    for before, after in ((wanted, got), (wanted["reference"], got["reference"])):
        assert after["visual_tokens"] == before["visual_tokens"]
        for number in range(4):
            ids = [batch["input_ids"][number][batch["attention_mask"][number] == 1] for batch in (before, after)]
            assert torch.equal(*(one[torch.isin(one, special)] for one in ids))
            assert number % 2 or len(ids[0]) < len(ids[1])


def test_travels_to_dataloader_workers(preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences)
    here, there = collator(), pickle.loads(pickle.dumps(collator()))
    assert torch.equal(here([rows[0]])["input_ids"], there([rows[0]])["input_ids"])


# -------------------------------------------------------------------------------------- rows of the Hub


@pytest.fixture
def published(tmp_path: Path, preferences: list[VideoPreference]) -> Path:
    folder = tmp_path / "stage1"
    with DatasetWriter(folder) as writer:
        for preference in preferences:
            writer.add(preference)
        writer.write_record(DatasetRecord("Rows", (MethodRecord("longvpo-stage1"),)))
    return folder


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_rows_in_the_layout_of_the_hub_train(
    tmp_path: Path, published: Path, preferences: list[VideoPreference], streaming: bool
) -> None:
    rows = load_dataset(str(published), split="train", streaming=streaming)
    more = {"accelerator_config": {"split_batches": False}} if streaming else {"pairs_per_timeline": 2}
    trainer = trainers.make(tmp_path, rows, **more)
    trainer.train()
    losses = trainers.logged(trainer)
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    if streaming:  # in the order of the file: the same as the first rows taken from memory
        expected = trainers.make(tmp_path, make_dataset(preferences))
        assert losses[0] == pytest.approx(trainers.loss_of(expected, make_dataset(preferences[:2])).item(), abs=1e-6)


# ----------------------------------------------------------------------------------- what does not fit


def test_too_many_tokens_are_an_error_with_the_numbers(preferences: list[VideoPreference]) -> None:
    row = make_dataset(preferences)[0]
    batch = collator()([row])
    lengths = batch["attention_mask"].sum(1)
    longest, answer = int(lengths.max()), int(batch["completion_mask"].sum(1)[lengths.argmax()])
    assert collator(max_length=longest)([row])["input_ids"].shape[1] == longest
    with pytest.raises(ValueError, match=f"max_length = {longest - 1}") as error:
        collator(max_length=longest - 1)([row])
    text = str(error.value)
    for fact in (row["id"], f"{longest} tokens", "24 of 6 frames", f"{answer} of the answer", "never truncated"):
        assert fact in text
    for setting in ("num_frames (below 6)", "fps", "max_pixels", "raise max_length"):
        assert setting in text


def test_the_models_context_bounds_policy_and_reference(preferences: list[VideoPreference]) -> None:
    row = make_dataset(preferences)[0]
    batch = collator(reference="full", reference_num_frames=8)([row])
    policy, reference = (int(part["attention_mask"].sum(1).max()) for part in (batch, batch["reference"]))
    assert policy < reference
    bounded = collator(reference="full", reference_num_frames=8)
    bounded.context_tokens = policy
    with pytest.raises(ValueError, match=rf"the model's context = {policy}.*lower reference_num_frames \(below 8\)"):
        bounded([row])
    bounded.context_tokens = policy - 1
    with pytest.raises(ValueError, match=r"lower num_frames \(below 6\)"):
        bounded([row])
    bounded.context_tokens = reference
    bounded([row])


def test_the_trainer_tells_the_collator_of_the_context(tmp_path: Path, dataset: Dataset) -> None:
    model, _ = tiny_models.build("internvl")
    model.config.text_config.max_position_embeddings = 100
    trainer = trainers.make(tmp_path, dataset, model=model)
    with pytest.raises(ValueError, match="tokens exceed the model's context = 100"):
        trainer.train()
    config = model.config
    config.text_config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert context_tokens(config) == 400


def test_fewer_frames_than_clips_is_an_error(preferences: list[VideoPreference]) -> None:
    with pytest.raises(ValueError, match="num_frames=2 cannot give each of 3 clips a frame"):
        collator(num_frames=2)([make_dataset(preferences)[0]])


# ----------------------------------------------------------------------- videos that cannot be decoded


@pytest.fixture
def with_bad_rows(tmp_path: Path, dataset: Dataset) -> Dataset:
    """Row 1 lacks a file, row 2 holds no video, row 5 is shorter than it says; the others are good."""
    (tmp_path / "text.mp4").write_text("no video")
    files = {1: "gone.mp4", 2: "text.mp4", 5: str(write_clip(tmp_path / "short.mp4", (0, 0, 99), seconds=1.0))}
    rows = dataset.to_list()
    for row, file in files.items():
        rows[row]["clips"][2]["file_name"] = str(tmp_path / file)
    return Dataset.from_list(rows)


GOOD = [0, 3, 4, 6, 7]


def counted(batch: Any) -> dict[str, int]:
    counts = zip(BAD_VIDEO_REASONS, batch["bad_videos"].tolist(), strict=True)
    return {reason: number for reason, number in counts if number}


def test_bad_rows_leave_the_batch_of_the_good_ones(with_bad_rows: Dataset, dataset: Dataset) -> None:
    batch = collator(on_bad_video="skip")(list(with_bad_rows))
    assert batch["kept"].tolist() == GOOD
    assert batch["rows"] == 8
    assert counted(batch) == {"missing_file": 1, "unreadable": 1, "beyond_end": 1}
    good = collator()([dataset[i] for i in GOOD])
    for name in ("input_ids", "completion_mask", "video_index", "places", "visual_tokens"):
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(good[name]))
    assert torch.equal(batch["reference"]["input_ids"], good["reference"]["input_ids"])


def test_rows_with_a_bad_reference_view_are_bad(preferences: list[VideoPreference], tmp_path: Path) -> None:
    # The file is there when the policy's frames are decoded and gone when the reference's are.
    rows = make_dataset(preferences[:2]).to_list()
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(Path(rows[0]["clips"][0]["file_name"]).read_bytes())
    rows[0]["clips"][0]["file_name"] = str(damaged)
    made = collator(on_bad_video="skip", num_frames=3, reference_num_frames=8)
    decode = FrameSampler.__call__

    def reference_only_fails(sampler: FrameSampler, timeline: Any, view: Any = None, **more: Any) -> Any:
        if sampler.num_frames == 8 and timeline.clips[0].path == str(damaged):
            damaged.unlink(missing_ok=True)
        return decode(sampler, timeline, view, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameSampler, "__call__", reference_only_fails)
        batch = made(rows)
    assert batch["kept"].tolist() == [1]
    assert counted(batch) == {"missing_file": 1}


def test_training_goes_on_without_bad_rows(
    tmp_path: Path, with_bad_rows: Dataset, dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainers.make(tmp_path, with_bad_rows, on_bad_video="skip", per_device_train_batch_size=8, max_steps=1)
    good = dataset.select(GOOD)
    expected = trainers.make(tmp_path, good, per_device_train_batch_size=8, max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    expected.train()
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps_per_token/chosen", "visual_tokens"):
        assert trainers.logged(trainer, name) == pytest.approx(trainers.logged(expected, name), abs=1e-5), name
    for reason in ("missing_file", "unreadable", "beyond_end"):
        assert trainers.logged(trainer, f"bad_videos/{reason}") == [1]
    assert trainers.logged(trainer, "bad_videos/no_reference_score") == []
    assert not any("bad_videos" in name for entry in expected.state.log_history for name in entry)
    assert f"row {with_bad_rows[1]['id']} is left out: missing_file" in caplog.text
    assert "3 rows were left out: 1 beyond_end, 1 missing_file, 1 unreadable" in caplog.text


def test_raising_is_the_default(tmp_path: Path, with_bad_rows: Dataset) -> None:
    with pytest.raises(ValueError, match=r"row \w+: (missing_file|unreadable|beyond_end)"):
        trainers.make(tmp_path, with_bad_rows, per_device_train_batch_size=8).train()


def test_a_batch_without_a_good_row_adds_nothing(tmp_path: Path, with_bad_rows: Dataset) -> None:
    bad = with_bad_rows.select([1, 2])
    trainer = trainers.make(tmp_path, bad, on_bad_video="skip", max_steps=1, weight_decay=0.0)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert trainers.logged(trainer) == [0.0]
    assert trainers.logged(trainer, "bad_videos/missing_file") == [1]
    for name in ("rewards/margins", "logps_per_token/chosen", "rewards/accuracies/begin"):
        assert trainers.logged(trainer, name) == []
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
    # Beside good rows in one accumulated step: their part of the gradient is what it is alone.
    both = Dataset.from_list([with_bad_rows[0], with_bad_rows[1]])
    gradients = []
    for rows, steps in ((both, 2), (with_bad_rows.select([0]), 1)):
        trainer = trainers.make(tmp_path, rows, on_bad_video="skip", per_device_train_batch_size=1)
        trainer.current_gradient_accumulation_steps = steps
        for i in range(len(rows)):
            trainer.training_step(trainer.model, trainer.data_collator([rows[i]]))
        gradients.append({n: w.grad * steps for n, w in trainer.model.named_parameters() if w.grad is not None})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient)


def test_evaluation_leaves_bad_rows_out(tmp_path: Path, with_bad_rows: Dataset, dataset: Dataset) -> None:
    order = [1, 2, 0, 3, 4, 6]  # the first batch of two has no good row
    trainer = trainers.make(
        tmp_path,
        dataset,
        eval_dataset=with_bad_rows.select(order),
        on_bad_video="skip",
        per_device_eval_batch_size=2,
    )
    expected = trainers.make(tmp_path, dataset, eval_dataset=dataset.select(order[2:]), per_device_eval_batch_size=2)
    got, wanted = trainer.evaluate(), expected.evaluate()
    assert got["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-6)
    logs = trainer.state.log_history[-1], expected.state.log_history[-1]
    for name in ("eval_rewards/margins", "eval_logps_per_token/rejected", "eval_rewards/accuracies/begin"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-5), name


def test_precomputed_scores_of_bad_rows_are_none(tmp_path: Path, with_bad_rows: Dataset) -> None:
    more = {"on_bad_video": "skip", "reference": "full", "per_device_train_batch_size": 8, "max_steps": 1}
    trainer = trainers.make(tmp_path, with_bad_rows, precompute_ref_log_probs=True, **more)
    scores = trainer.train_dataset["ref_chosen_logps"]
    assert [i for i, score in enumerate(scores) if not math.isnan(score)] == GOOD
    trainer.train()
    assert math.isfinite(trainers.logged(trainer)[0])
    only = trainer.train_dataset.select([0]).to_list()
    only[0]["ref_chosen_logps"] = float("nan")
    assert counted(trainer.data_collator(only)) == {"no_reference_score": 1}


# -------------------------------------------------------------------------------------------- the order


def test_rows_of_a_timeline_stand_together_and_each_once() -> None:
    timelines = ["a", "b", "a", "c", "a", "b", "a", "a"]
    sampler = TimelineSampler(timelines, pairs_per_timeline=2, seed=3)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)  # a resumed run asks again
        assert sorted(order) == list(range(8))
        orders.append(tuple(order))
        runs, start = [], 0
        while start < 8:
            end = start
            while end < 8 and timelines[order[end]] == timelines[order[start]]:
                end += 1
            runs.append((timelines[order[start]], end - start))
            start = end
        assert Counter(name for name, length in runs if name == "b") == {"b": 1}
    assert len(set(orders)) == 4
    assert list(TimelineSampler(timelines, 2, seed=4)) != list(TimelineSampler(timelines, 2, seed=3))
