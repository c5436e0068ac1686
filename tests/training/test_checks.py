"""All rows are looked over before training, and what is wrong is said at once; several turns train as in TRL."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.errors import DatasetError
from longvpo_hf.families import context_tokens
from longvpo_hf.miniature.model import build_processor
from longvpo_hf.preference import RowError, VideoPreference
from longvpo_hf.training import checks
from longvpo_hf.training.checks import RowCheck, check_rows
from longvpo_hf.training.collator import VideoPreferenceCollator

Row = dict[str, Any]


def rows_of(preferences: list[VideoPreference], number: int) -> list[Row]:
    return [preferences[i % len(preferences)].to_row(lambda clip: clip.path) for i in range(number)]


def collator(family: str = "internvl", **more: Any) -> VideoPreferenceCollator:
    given = {"num_frames": 6, "fps": None, "max_pixels": 56 * 56, "reference": "anchor", **more}
    made = VideoPreferenceCollator(tiny_models.build(family)[1], **given)
    made.context_tokens = context_tokens(tiny_models.build(family)[0].config)
    return made


def said(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


#: How to spoil a row, and the kind of problem that it is.
FAULTS: list[tuple[str, Callable[[Row], Row]]] = [
    ("no_clips", lambda row: {**row, "clips": []}),
    ("no_clips", lambda row: {**row, "clips": None}),
    ("messages", lambda row: {**row, "prompt": []}),
    ("messages", lambda row: {**row, "prompt": [*row["prompt"], *row["chosen"]]}),
    ("messages", lambda row: {**row, "prompt": [*said("x", "tool"), *row["prompt"]]}),
    ("messages", lambda row: {**row, "chosen": [*row["chosen"], *row["prompt"], *row["chosen"]]}),
    ("empty_text", lambda row: {**row, "chosen": said(" \n")}),
    ("empty_text", lambda row: {**row, "prompt": said("", "user")}),
    ("same_answers", lambda row: {**row, "rejected": row["chosen"]}),
    ("malformed", lambda row: {**row, "evidence": [99]}),
    ("malformed", lambda row: {**row, "clips": [{**row["clips"][0], "end_seconds": -1.0}], "evidence": [0]}),
    ("no_anchor", lambda row: {**row, "evidence": [], "reference": []}),
    ("too_many_clips", lambda row: {**row, "clips": row["clips"][:1] * 7, "evidence": [0], "reference": [0]}),
    ("too_long", lambda row: {**row, "rejected": said("word " * 5000)}),
]


@pytest.mark.parametrize(("kind", "spoil"), FAULTS)
def test_each_fault_is_found_and_named(
    preferences: list[VideoPreference], kind: str, spoil: Callable[[Row], Row]
) -> None:
    rows = rows_of(preferences, 3)
    rows[1] = spoil(rows[1])
    check = check_rows(Dataset.from_list(rows), collator(max_length=4000), tiny_models.build("internvl")[0].config)
    assert [(problem.kind, problem.rows) for problem in check.problems] == [(kind, (1,))]
    assert f"1 {kind} (" in str(check)
    assert "\n    row 1: " in str(check)


def test_control_tokens_are_text_unless_the_tokenizer_has_them_as_words(preferences: list[VideoPreference]) -> None:
    rows = rows_of(preferences, 3)
    rows[1] = {**rows[1], "chosen": said("<|im_end|> <IMG_CONTEXT> <video>")}
    assert not check_rows(Dataset.from_list(rows), collator()).problems
    of_words = VideoPreferenceCollator(build_processor(), num_frames=6, fps=None, max_pixels=None, reference="anchor")
    (problem,) = check_rows(Dataset.from_list(rows), of_words).problems
    assert (problem.kind, problem.rows) == ("chat_template", (1,))
    assert "holds a control token" in str(problem)
    assert "Remove it from the text" in str(problem)


def test_all_problems_are_said_at_once(preferences: list[VideoPreference]) -> None:
    rng = random.Random(5)
    rows, expected = rows_of(preferences, 120), {}
    for number in rng.sample(range(120), 50):
        kind, spoil = rng.choice(FAULTS)
        rows[number] = spoil(rows[number])
        expected[number] = kind
    check = check_rows(Dataset.from_list(rows), collator(max_length=4000), tiny_models.build("internvl")[0].config)
    assert check.num_rows == 120
    assert {row: problem.kind for problem in check.problems for row in problem.rows} == expected
    assert check.bad_rows == tuple(sorted(expected))
    assert all(list(problem.rows) == sorted(problem.rows) for problem in check.problems)
    counts = [len(problem.rows) for problem in check.problems]
    assert counts == sorted(counts, reverse=True)
    assert all(len(problem.examples) == min(3, len(problem.rows)) for problem in check.problems)
    assert str(check).startswith("50 of 120 rows cannot be trained on:\n")
    assert len(str(check)) < 30_000


def test_without_a_model_only_the_rows_themselves_are_checked(preferences: list[VideoPreference]) -> None:
    rows = rows_of(preferences, 2)
    good = {**rows[0], "rejected": said("word " * 5000)}
    assert check_rows(Dataset.from_list([good])) == RowCheck(1, ())
    assert str(check_rows(Dataset.from_list([good]))) == "All 1 rows can be trained on."
    check = check_rows(Dataset.from_list([good, {**rows[1], "rejected": rows[1]["chosen"]}]))
    assert check.bad_rows == (1,)


@pytest.mark.parametrize("family", tiny_models.ALL)
def test_a_row_that_fits_is_never_called_too_long(preferences: list[VideoPreference], family: str) -> None:
    """The bound is a lower one: against the length of the sequence that the collator really makes."""
    rows = rows_of(preferences, 4)
    model, _ = tiny_models.build(family)
    free = collator(family, reference="full")
    longest = free(rows)["attention_mask"].sum(1).max().item()
    for allowed, is_refused in ((longest, False), (20, True)):
        bounded = collator(family, reference="full", max_length=allowed)
        check = check_rows(Dataset.from_list(rows), bounded, model.config)
        assert bool(check.problems) is is_refused, str(check)
        assert {problem.kind for problem in check.problems} <= {"too_long"}


def test_texts_that_hold_nothing_new_are_not_tokenized(
    preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = collator(max_length=4000), []
    encode = made.encoder.encode_texts
    monkeypatch.setattr(made.encoder, "encode_texts", lambda *texts: calls.append(texts) or encode(*texts))
    rows = rows_of(preferences, len(preferences)) * 20
    assert not check_rows(Dataset.from_list(rows), made).problems
    assert 0 < len(calls) <= 2 * len(preferences)


def test_no_video_is_opened(preferences: list[VideoPreference]) -> None:
    rows = rows_of(preferences, 2)
    for row in rows:
        for clip in row["clips"]:
            clip["file_name"] = "gone.mp4"
    assert not check_rows(Dataset.from_list(rows), collator()).problems


def test_an_error_of_a_row_leaves_a_worker_process_unchanged() -> None:
    error = pickle.loads(pickle.dumps(RowError("no_clips", "row r: no clips")))
    assert (error.kind, str(error)) == ("no_clips", "row r: no clips")


# --------------------------------------------------------------------------------------------------------- the trainer


def spoiled(preferences: list[VideoPreference]) -> Dataset:
    rows = rows_of(preferences, 6)
    rows[2] = {**rows[2], "rejected": rows[2]["chosen"]}
    rows[4] = {**rows[4], "chosen": said(" ")}
    rows[5] = {**rows[5], "rejected": rows[5]["chosen"]}
    return Dataset.from_list(rows)


def test_the_trainer_raises_with_all_of_them(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    with pytest.raises(DatasetError) as raised:
        trainers.make(tmp_path, spoiled(preferences))
    message = str(raised.value)
    assert message.startswith("The training dataset: 3 of 6 rows cannot be trained on:\n  2 same_answers (")
    assert "\n  1 empty_text (" in message
    assert "on_bad_row='skip'" in message


def test_the_trainer_skips_them_where_asked(
    tmp_path: Path, preferences: list[VideoPreference], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = trainers.make(tmp_path, spoiled(preferences), on_bad_row="skip")
    assert "on_bad_row='skip': the training dataset is used without some rows. 3 of 6 rows" in caplog.text
    good = [preferences[i % len(preferences)].id for i in (0, 1, 3)]
    assert [row["id"] for row in trainer.train_dataset] == good
    trainer.train()
    assert trainer.state.global_step == 2


def test_rows_to_evaluate_on_are_looked_over_too(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    good = make_dataset(preferences)
    with pytest.raises(DatasetError, match=r"^The evaluation dataset: 3 of 6"):
        trainers.make(tmp_path, good, eval_dataset=spoiled(preferences))
    with pytest.raises(DatasetError, match=r"^The long dataset: 3 of 6"):
        trainers.make(tmp_path, good, eval_dataset={"short": good, "long": spoiled(preferences)})


def test_a_dataset_without_a_good_row_is_refused(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    row = rows_of(preferences, 1)[0]
    with pytest.raises(DatasetError, match="2 of 2 rows"):
        trainers.make(tmp_path, Dataset.from_list([{**row, "rejected": row["chosen"]}] * 2), on_bad_row="skip")


def test_the_start_of_a_stream_is_looked_over_before_training(
    tmp_path: Path, preferences: list[VideoPreference]
) -> None:
    with pytest.raises(DatasetError) as raised:
        trainers.make(tmp_path, spoiled(preferences).to_iterable_dataset())
    message = str(raised.value)
    assert message.startswith("The start of the training stream: 3 of 6 rows cannot be trained on:\n  2 same_answers (")
    assert "on_bad_row='skip'" in message


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_streamed_evaluation_set_gives_the_metrics_of_one_in_memory(
    tmp_path: Path, preferences: list[VideoPreference], batch_size: int
) -> None:
    rows = make_dataset(preferences)
    found = []
    for held_out in (rows.select(range(7)), rows.select(range(7)).to_iterable_dataset()):
        trainer = trainers.make(tmp_path, rows, eval_dataset=held_out, per_device_eval_batch_size=batch_size)
        measured = trainer.evaluate()
        found.append({name: value for name, value in measured.items() if "runtime" not in name and "per_s" not in name})
    assert found[1] == pytest.approx(found[0])


def test_each_row_of_a_stream_is_looked_at_when_it_comes(
    tmp_path: Path,
    preferences: list[VideoPreference],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checks, "_FIRST_ROWS", 2)
    stream = spoiled(preferences).to_iterable_dataset()
    trainer = trainers.make(tmp_path, stream, max_steps=3)
    with pytest.raises(DatasetError, match=r"^row '.*' of the training stream: same_answers \("):
        trainer.train()
    trainer = trainers.make(tmp_path, stream, on_bad_row="skip", max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 3
    assert "on_bad_row='skip': without row" in caplog.text
    good = [preferences[i % len(preferences)].id for i in (0, 1, 3)]
    assert [row["id"] for row in trainer.train_dataset] == good


# ---------------------------------------------------------------------------------------------------------- many turns

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A film."},
]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_conversation_is_tokenized_as_its_template_renders_it(
    preferences: list[VideoPreference], family: str
) -> None:
    processor = tiny_models.build(family)[1]
    row = rows_of(preferences, 1)[0]
    row["prompt"] = [*TURNS, *row["prompt"]]
    batch = collator(family)([row])
    # The template itself, with the video in the first message of the user, as TRL puts media.
    shown = copy.deepcopy([*row["prompt"], row["chosen"][0]])
    for message in shown:
        message["content"] = [{"type": "text", "text": message["content"]}]
    shown[1]["content"].insert(0, {"type": "video"})
    before, after = processor.apply_chat_template(shown, tokenize=False).split(processor.video_token)
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.startswith(before)
    assert text.endswith(after)
    answer = processor.tokenizer.decode(batch["input_ids"][0][batch["completion_mask"][0].bool()])
    assert row["chosen"][0]["content"] in answer
    assert "A film." not in answer, "earlier turns of the assistant are not trained on"
    assert "What is it?" not in answer


def test_rows_with_and_without_turns_train_together(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = rows_of(preferences, 4)
    for row in rows[:2]:
        row["prompt"] = [*TURNS, *row["prompt"]]
    losses = []
    for packed in (True, False):
        trainer = trainers.make(tmp_path, Dataset.from_list(rows), tree_packing=packed)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.isfinite(torch.tensor(losses[0])))
