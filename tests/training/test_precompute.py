"""Precomputed reference scores: those of the live reference, from its view alone, and never stale."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset, load_from_disk
from peft import LoraConfig

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.frames import FrameSampler
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import Clip, Timeline
from longvpo_hf.training import reference
from longvpo_hf.training.collator import SCORE_COLUMNS
from longvpo_hf.training.reference import FINGERPRINT_COLUMN

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


class Seen:
    """The timelines that were decoded, and how often a model was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timelines: list[Timeline] = []
        decode = FrameSampler.__call__

        def recorded(sampler: FrameSampler, timeline: Timeline, view: Any = None, **more: Any) -> Any:
            self.timelines.append(timeline)
            return decode(sampler, timeline, view, **more)

        monkeypatch.setattr(FrameSampler, "__call__", recorded)

    def taken(self) -> list[Timeline]:
        timelines, self.timelines = self.timelines, []
        return timelines


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


@pytest.fixture
def on_disk(tmp_path: Path, preferences: list[VideoPreference]) -> Dataset:
    """Rows in a file, as `load_dataset` gives them: they have a place for caches."""
    make_dataset(preferences[:4]).save_to_disk(str(tmp_path / "rows"))
    return load_from_disk(str(tmp_path / "rows"))


def scores_of(rows: Dataset) -> torch.Tensor:
    """`[2, rows]`."""
    return torch.tensor([rows[name] for name in SCORE_COLUMNS])


def live_scores(trainer: Any, rows: Dataset) -> torch.Tensor:
    """`[2, rows]`, in the trainer's batches: other grouping moves a score's last bit, which is 7.6e-6 at −80."""
    scores, size = [], trainer.args.per_device_train_batch_size
    for start in range(0, len(rows), size):
        batch = trainers.batch_of(trainer, rows.select(range(start, min(start + size, len(rows)))))
        model = trainer.ref_model or trainer.model
        scores.append(torch.stack(trainer.compute_ref_log_probs(model, batch["reference"])))
    return torch.cat(scores, dim=1)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_agrees_with_scoring_on_the_fly(tmp_path: Path, dataset: Dataset, family: str, peft: Any) -> None:
    more = {} if peft is None else {"peft_config": peft}
    live = trainers.make(tmp_path, dataset, family, per_device_train_batch_size=3, **more)
    ready = trainers.make(
        tmp_path, dataset, family, per_device_train_batch_size=3, precompute_ref_log_probs=True, **more
    )
    torch.testing.assert_close(scores_of(ready.train_dataset), live_scores(live, dataset), rtol=0, atol=1e-6)
    assert ready.ref_model is None
    live.train()
    ready.train()
    assert trainers.logged(ready) == pytest.approx(trainers.logged(live), rel=2e-6)
    assert len(trainers.logged(ready)) == 2


def test_only_the_reference_view_is_decoded_and_the_policy_view_later(
    tmp_path: Path, dataset: Dataset, preferences: list[VideoPreference], seen: Seen
) -> None:
    trainer = trainers.make(tmp_path, dataset, precompute_ref_log_probs=True)
    anchors = [row.reference_view.of(row.timeline) for row in preferences]
    assert set(seen.taken()) == set(anchors)
    trainer.train()
    assert set(seen.taken()) <= {row.timeline for row in preferences}


def test_shows_a_progress_bar(
    tmp_path: Path, dataset: Dataset, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    # Its default is that of transformers' log, which a command that ran before in this process has made quiet.
    trainers.make(tmp_path, dataset, precompute_ref_log_probs=True, disable_tqdm=False)
    assert "Computing reference log probs for train dataset: 100%" in capfd.readouterr().err


def test_an_explicit_reference_model_scores_and_is_let_go(tmp_path: Path, dataset: Dataset) -> None:
    other = trainers.perturbed(tiny_models.build("internvl")[0])
    live = trainers.make(tmp_path, dataset, ref_model=trainers.perturbed(tiny_models.build("internvl")[0]))
    kept = weakref.ref(other)
    ready = trainers.make(tmp_path, dataset, ref_model=other, precompute_ref_log_probs=True)
    torch.testing.assert_close(scores_of(ready.train_dataset), live_scores(live, dataset), rtol=0, atol=1e-6)
    del other
    gc.collect()
    assert kept() is None
    ready.train()


def test_evaluation_rows_are_scored_too(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    train, held_out = make_dataset(preferences[:4]), make_dataset(preferences[4:7])
    live = trainers.make(tmp_path, train, eval_dataset=held_out)
    ready = trainers.make(tmp_path, train, eval_dataset=held_out, precompute_ref_log_probs=True)
    expected = live.evaluate()
    assert ready.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    ready.train()
    # The policy has moved and no reference is kept: other rows can no longer be scored.
    with pytest.raises(ValueError, match="Provide this dataset as `eval_dataset` at initialization"):
        ready.evaluate(make_dataset(preferences[:1]))
    live.evaluate(make_dataset(preferences[:1]))


def test_streamed_rows_are_refused_clearly(tmp_path: Path, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` is not supported with IterableDataset"):
        trainers.make(tmp_path, dataset.to_iterable_dataset(), precompute_ref_log_probs=True)


# ------------------------------------------------------------------------------------------ the cache


def rescored(seen: Seen, folder: Path, rows: Dataset, **more: Any) -> int:
    """How many views a new trainer decoded to have its scores."""
    seen.taken()
    trainers.make(folder, rows, precompute_ref_log_probs=True, **more)
    return len(seen.taken())


def rebuilt_processor(**changes: Any) -> Any:
    processor = tiny_models.build("internvl")[1]
    for name, value in changes.items():
        setattr(processor, name, value)
    return processor


def test_the_cache_answers_for_what_it_was_made_for_and_for_nothing_else(
    tmp_path: Path, on_disk: Dataset, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rescored(seen, tmp_path, on_disk) > 0
    again = load_from_disk(str(tmp_path / "rows"))
    assert rescored(seen, tmp_path, again) == 0
    assert rescored(seen, tmp_path, again, beta=0.1, sft_weight=0, num_frames=6, learning_rate=1.0) == 0
    template = rebuilt_processor().chat_template
    others: list[dict[str, Any]] = [
        {"reference": "full"},
        {"num_frames": 5},
        {"reference_num_frames": 2},
        {"fps": 0.5},
        {"max_pixels": 28 * 28},
        {"ld_alpha": 0.5},
        {"ref_model": trainers.perturbed(tiny_models.build("internvl")[0])},
        {"processing_class": rebuilt_processor(chat_template=template.replace("<|im_start|>", "- "))},
    ]
    for more in others:
        assert rescored(seen, tmp_path, again, **more) > 0, more
        assert rescored(seen, tmp_path, again) == 0
    assert rescored(seen, tmp_path, again.select([0, 1])) > 0
    monkeypatch.setattr(reference, "__version__", "another")
    assert rescored(seen, tmp_path, again) > 0


@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_scores_saved_with_the_rows_are_used_again(tmp_path: Path, dataset: Dataset, seen: Seen, form: str) -> None:
    scored = trainers.make(tmp_path, dataset, precompute_ref_log_probs=True).train_dataset
    if form == "disk":
        scored.save_to_disk(str(tmp_path / "scored"))
        loaded = load_from_disk(str(tmp_path / "scored"))
    else:
        scored.to_parquet(str(tmp_path / "scored.parquet"))
        loaded = load_dataset("parquet", data_files=str(tmp_path / "scored.parquet"), split="train")
    seen.taken()
    trainer = trainers.make(tmp_path, loaded, precompute_ref_log_probs=True)
    assert seen.taken() == []
    assert torch.equal(scores_of(trainer.train_dataset), scores_of(scored))
    trainer.train()


def test_saved_scores_of_something_else_are_never_used(
    tmp_path: Path,
    dataset: Dataset,
    preferences: list[VideoPreference],
    clips: dict[str, Clip],
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scored = trainers.make(tmp_path, dataset, precompute_ref_log_probs=True).train_dataset
    false = scored.remove_columns(list(SCORE_COLUMNS))
    for name in SCORE_COLUMNS:
        false = false.add_column(name, [-1000.0] * len(false))
    with caplog.at_level(logging.WARNING):
        for more in (
            {"num_frames": 4},
            {"reference": "full"},
            {"ref_model": trainers.perturbed(tiny_models.build("internvl")[0])},
        ):
            made = trainers.make(tmp_path, false, precompute_ref_log_probs=True, **more)
            assert scores_of(made.train_dataset).min() > -500, more
    assert "8 of 8 rows of the train dataset hold reference log-probs of other rows" in caplog.text
    # One answer changed after scoring: only that row is another, and all are scored anew.
    rows = false.to_list()
    rows[0]["chosen"][0]["content"] = "something else"
    caplog.clear()
    edited = trainers.make(tmp_path, Dataset.from_list(rows), precompute_ref_log_probs=True)
    assert "1 of 8 rows" in caplog.text
    assert scores_of(edited.train_dataset).min() > -500
    # Nothing says whose these are.
    unnamed = trainers.make(tmp_path, false.remove_columns(FINGERPRINT_COLUMN), precompute_ref_log_probs=True)
    assert scores_of(unnamed.train_dataset).min() > -500
    # Without the option the reference is scored live, whatever the columns say.
    live = trainers.make(tmp_path, false, per_device_train_batch_size=3)
    live.train()
    expected = trainers.make(tmp_path, dataset, per_device_train_batch_size=3)
    expected.train()
    assert trainers.logged(live) == trainers.logged(expected)


def test_a_clip_replaced_under_its_name_is_scored_anew(
    tmp_path: Path, preferences: list[VideoPreference], clips: dict[str, Clip], seen: Seen
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(Path(clips["red"].path).read_bytes())
    row = replace(preferences[0], timeline=Timeline((Clip(str(path), 0.0, 4.0),)), evidence=(0,), reference=(0,), id="")
    scored = trainers.make(tmp_path, make_dataset([row]), precompute_ref_log_probs=True).train_dataset
    assert rescored(seen, tmp_path, scored) == 0
    path.write_bytes(Path(clips["white"].path).read_bytes() + b"\0")
    assert rescored(seen, tmp_path, scored) == 1
