"""View preference: the loss by hand, whatever the forward or adapter; which view is rejected, and what is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PromptTuningConfig
from torch import Tensor

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.errors import ConfigError, DatasetError
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import Clip, Timeline, View
from longvpo_hf.training.collator import VideoPreferenceCollator
from longvpo_hf.training.packing import number_of_calls, require_equal_calls
from longvpo_hf.training.reference import reference_fingerprints
from longvpo_hf.training.trainer import LongVPOTrainer
from longvpo_hf.training.view_preference import rejected_view

ALONE = {"loss_type": "sft", "sft_weight": 0.0}
WEIGHED: dict[str, Any] = {"view_preference_weight": 1.0}
FAR = 0.5
#: Large, so that what tiny models make of other views shows in the loss.
BETA = 20.0


def of_two(rows: Sequence[VideoPreference]) -> list[VideoPreference]:
    """The rows with a second clip of evidence, whose order may then matter."""
    return [
        replace(row, evidence=tuple(sorted({*row.evidence, (row.evidence[0] + 1) % len(row.timeline)})), id="")
        for row in rows
    ]


def by_hand(
    policy: Any,
    teacher: Any,
    processor: Any,
    rows: Sequence[VideoPreference],
    rejected: Sequence[View],
    ld_alpha: float = 1.0,
) -> list[float]:
    """The margin of each row, from plain calls of both models on three views."""
    margins = []
    for row, view in zip(rows, rejected, strict=True):
        encoder = VideoPreferenceCollator(processor, 2).encoder
        shared = len(encoder.encode_answer(row.question, row.rejected))

        def score(model: Any, seen: View, row: VideoPreference = row, shared: int = shared) -> float:
            log_probs = trainers.answer_log_probs(model, processor, row, seen, row.chosen)
            return float(log_probs[:shared].sum() + ld_alpha * log_probs[shared:].sum())

        whole = score(policy, View.whole()) - score(teacher, View.only(row.reference))
        margins.append(BETA * (whole - score(policy, view) + score(teacher, view)))
    return margins


def loss_of_margins(margins: Sequence[float]) -> float:
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)


def make(folder: Path, rows: Any, family: str = "internvl", **more: Any) -> Any:
    """A trainer whose policy is another model than its reference."""
    more = {"beta": BETA, **more}
    if "peft_config" not in more:
        more = {"model": trainers.perturbed(tiny_models.build(family)[0], FAR), **more}
    return trainers.make(folder, rows, family, **more)


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("family", "kind"), [("internvl", None), ("qwen3_vl", "reversed")])  # one default
def test_the_term_is_that_of_plain_calls_on_three_views(
    tmp_path: Path, preferences: list[VideoPreference], family: str, kind: str | None
) -> None:
    rows = of_two([preferences[0], preferences[3]])  # two timelines, answers of unequal length
    # By hand: without evidence, one clip is left of three; reversed, all.
    wanted = {"reversed": [View.ordered((2, 1, 0))] * 2}.get(kind or "", [View.only([2]), View.only([1])])
    settings = {} if kind is None else {"view_preference_rejected": kind}
    trainer = make(tmp_path, make_dataset(rows), family, view_preference_weight=0.7, **settings, **ALONE)
    found = trainers.loss_of(trainer, make_dataset(rows)).item()
    policy = trainers.perturbed(tiny_models.build(family)[0], FAR)
    margins = by_hand(policy, *tiny_models.build(family), rows, wanted)
    wrong = by_hand(policy, *tiny_models.build(family), rows, [View.only([0])] * 2)
    assert abs(loss_of_margins(margins) - loss_of_margins(wrong)) > 1e-3
    assert found == pytest.approx(0.7 * loss_of_margins(margins), rel=2e-4)
    means = dict(trainer._means["train"].take())
    assert means["loss/view_preference"] == pytest.approx(loss_of_margins(margins), rel=2e-4)
    assert means["rewards/view_margins"] == pytest.approx(sum(margins) / 2, abs=1e-3)
    assert means["rewards/view_accuracies"] == sum(margin > 0 for margin in margins) / 2
    assert means["rewards/rejected_view"] == pytest.approx(
        means["rewards/chosen"] - means["rewards/view_margins"], abs=1e-4
    )


def test_the_same_model_on_the_same_views_starts_at_ln_2(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:2])
    trainer = trainers.make(tmp_path, rows, reference="full", **WEIGHED, **ALONE)
    loss = trainers.loss_of(trainer, rows)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    loss.backward()  # and is not at its end there
    assert max(float(weight.grad.abs().max()) for weight in trainer.model.parameters() if weight.grad is not None) > 0


def test_the_term_is_added_to_the_others(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:2])

    def loss(**more: Any) -> float:
        return trainers.loss_of(make(tmp_path, rows, **more), rows).item()

    term = loss(**WEIGHED, **ALONE)
    sampled = {
        "view_distillation_weight": 0.5,
        "view_distillation_on": "sampled",
        "view_distillation_max_new_tokens": 3,
    }
    others: list[dict[str, Any]] = [
        {},
        {"loss_type": ["hinge", "ipo"], "sft_weight": 0.3},
        {"view_distillation_weight": 0.5},
        sampled,
    ]
    for other in others:
        assert loss(view_preference_weight=0.5, **other) == pytest.approx(loss(**other) + 0.5 * term, rel=1e-5)


def test_tokens_weigh_alike_on_both_views(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    row = replace(preferences[0], chosen="it is red, and not so dark", rejected="blue", id="")
    trainer = make(tmp_path, make_dataset([row]), ld_alpha=0.3, per_device_train_batch_size=1, **WEIGHED, **ALONE)
    policy = trainers.perturbed(tiny_models.build("internvl")[0], FAR)
    models = (policy, *tiny_models.build("internvl"))
    expected, whole = (loss_of_margins(by_hand(*models, [row], [View.only([1, 2])], alpha)) for alpha in (0.3, 1.0))
    assert abs(expected - whole) > 1e-3
    assert trainers.loss_of(trainer, make_dataset([row])).item() == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])  # the second in one call a number of frames
def test_packed_equals_separate(tmp_path: Path, preferences: list[VideoPreference], family: str) -> None:
    rows = make_dataset([preferences[0], preferences[1], preferences[4]])

    def gradients(tree_packing: bool) -> tuple[float, dict[str, Tensor]]:
        trainer = make(tmp_path, rows, family, tree_packing=tree_packing, **WEIGHED)
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
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


@pytest.mark.parametrize("adapter", [LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0), None])
def test_the_reference_of_an_adapter_is_the_model_without_it(
    tmp_path: Path, preferences: list[VideoPreference], adapter: Any
) -> None:
    rows = preferences[:2]
    adapter = adapter or PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make(tmp_path, make_dataset(rows), peft_config=adapter, **WEIGHED, **ALONE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    found = trainers.loss_of(trainer, make_dataset(rows))
    found.backward()
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {name for name, weight in trainer.model.named_parameters() if weight.grad is not None} == trained
    if isinstance(adapter, LoraConfig):
        rejected = [View.only([1, 2]), View.only([0, 2])]
        base = trainer.model.get_base_model()
        expected = loss_of_margins(by_hand(base, *tiny_models.build("internvl"), rows, rejected))
        assert found.item() == pytest.approx(expected, rel=5e-4)
        assert abs(expected - math.log(2)) > 1e-3


# ------------------------------------------------------------------------------------------------ which view


def timeline_of(number: int, same: bool = False) -> Timeline:
    return Timeline(tuple(Clip("a.mp4" if same else f"{place}.mp4", 0.0, 4.0) for place in range(number)))


def row_of(number: int, evidence: Sequence[int], same: bool = False) -> VideoPreference:
    return VideoPreference(timeline_of(number, same), "What?", "a", "b", evidence=tuple(evidence))


@pytest.mark.parametrize("seed", range(20))
def test_the_rejected_view_lacks_the_evidence_or_its_order(seed: int) -> None:
    rng = random.Random(seed)
    number = rng.randint(3, 9)
    row = row_of(number, rng.sample(range(number), rng.randint(2, number - 1)))
    names = [clip.path for clip in row.timeline.clips]
    evidence = [f"{place}.mp4" for place in sorted(row.evidence)]

    def seen(kind: Any) -> list[str]:
        return [clip.path for clip in rejected_view(row, kind).of(row.timeline).clips]

    assert seen("no_evidence") == [name for name in names if name not in evidence]
    assert seen("reversed") == names[::-1]
    shuffled = seen("shuffled")
    assert sorted(shuffled) == sorted(names)
    assert [name for name in shuffled if name in evidence] != evidence
    assert seen("shuffled") == shuffled  # follows from the row alone


def test_rows_are_shuffled_each_in_its_own_way() -> None:
    rows = [replace(row_of(6, (1, 4)), question=f"{number}?", id="") for number in range(20)]
    orders = {rejected_view(row, "shuffled").keep for row in rows}
    assert len(orders) > 15


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (row_of(3, ()), "no_evidence", "needs evidence clips, and the row names none"),
        (row_of(2, (0, 1)), "no_evidence", "needs clips beside the evidence, and all 2 are evidence"),
        (row_of(3, (1,)), "reversed", "at least 2 evidence clips, whose order may matter, and the row names 1"),
        (row_of(3, ()), "shuffled", "and the row names 0"),
        (row_of(2, (0, 1), same=True), "reversed", "needs clips that differ"),
        (row_of(2, (0, 1), same=True), "shuffled", "needs clips that differ"),
    ],
)
def test_a_row_without_such_a_view_is_refused(row: VideoPreference, kind: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        rejected_view(row, kind)
    assert row.id in str(raised.value)


def test_rows_without_such_a_view_are_found_before_training(
    tmp_path: Path, preferences: list[VideoPreference], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*preferences[:2], replace(preferences[2], evidence=(), id=""), replace(preferences[3], evidence=(0, 1, 2))]
    with pytest.raises(DatasetError, match=r"2 of 4 rows cannot be trained on:\s+2 no_rejected_view"):
        trainers.make(tmp_path, make_dataset(rows), **WEIGHED)
    trainer = trainers.make(tmp_path, make_dataset(rows), on_bad_row="skip", **WEIGHED)
    assert trainer.train_dataset["id"] == [row.id for row in preferences[:2]]
    assert "2 no_rejected_view" in caplog.text
    assert len(trainers.make(tmp_path, make_dataset(rows)).train_dataset) == 4  # without the term they are rows


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"view_preference_weight": -1.0}, "view_preference_weight must be ≥ 0 and finite, got -1.0"),
        ({"view_preference_weight": float("nan")}, "≥ 0 and finite, got nan"),
        ({"view_preference_rejected": "black"}, "'no_evidence', 'reversed' or 'shuffled', got 'black'"),
        (ALONE, "nothing to train on"),
    ],
)
def test_preferences_that_cannot_be_are_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainers.settings(tmp_path, **more)


def test_a_preference_of_views_needs_clips(tmp_path: Path) -> None:
    settings = trainers.settings(tmp_path, **WEIGHED)
    with pytest.raises(ConfigError, match="view_preference_weight=1 needs rows with clips"):
        settings.check_run(False, False)
    settings.check_run(True, True)


def test_processes_that_share_weights_call_the_model_equally_often(preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:1]).to_list()
    for family, calls in (("internvl", 1), ("llava_onevision", 2)):
        processor = tiny_models.build(family)[1]
        collate = VideoPreferenceCollator(processor, 6, fps=1.0, max_pixels=56 * 56, rejected="no_evidence")
        batch = collate([{**rows[0], "clips": [{**clip, "end_seconds": 1.0} for clip in rows[0]["clips"]]}])
        assert number_of_calls(batch) == calls  # three frames, and two without the evidence
    require_equal_calls((2, 2), (1, 1))
    with pytest.raises(ConfigError, match="call the model 1 to 2 times on their batches, and deadlock"):
        require_equal_calls((2, 2), (1, 2))


# ------------------------------------------------------------------------------------------- scores beforehand


@pytest.mark.parametrize("is_adapter", [False, True])
def test_precomputed_scores_prefer_as_the_reference_does(
    tmp_path: Path, preferences: list[VideoPreference], is_adapter: bool
) -> None:
    rows = make_dataset(of_two(preferences[:2]))
    more: dict[str, Any] = {**WEIGHED, "view_preference_rejected": "shuffled", "view_distillation_weight": 0.5}
    more["view_distillation_top_k"] = 10**6
    if is_adapter:
        more["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0)
    else:
        more["ref_model"] = tiny_models.build("internvl")[0]

    def train(**settings: Any) -> Any:
        trainer = make(tmp_path, rows, **{**more, **settings})
        trainer.train()
        return trainer

    live, ready = train(), train(precompute_ref_log_probs=True)
    assert ready.ref_model is None
    for name in ("loss", "loss/view_preference", "rewards/rejected_view", "loss/view_distillation"):
        assert trainers.logged(ready, name) == pytest.approx(trainers.logged(live, name), rel=1e-5, abs=1e-5)
    assert len(trainers.logged(ready, "rewards/view_accuracies")) == 2


def test_precomputed_scores_of_views_are_never_stale(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(of_two(preferences[:3])).save_to_disk(str(tmp_path / "rows"))
    rows, passes = load_from_disk(str(tmp_path / "rows")), []
    compute = LongVPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(LongVPOTrainer, "compute_ref_log_probs", lambda *args: passes.append(1) or compute(*args))

    def scored(dataset: Any, **more: Any) -> tuple[Any, int]:
        passes.clear()
        given = {"precompute_ref_log_probs": True, **WEIGHED, "per_device_train_batch_size": 3, **more}
        return trainers.make(tmp_path, dataset, **given).train_dataset, len(passes)

    kept, batches = scored(rows)
    assert batches == 2  # of reference views, and of rejected ones
    assert scored(rows)[1] == 0  # in the cache of the dataset on disk
    saved = Dataset.from_dict(kept.to_dict(), features=kept.features)
    assert scored(saved)[1] == 0
    other, batches = scored(saved, view_preference_rejected="reversed")
    assert batches == 1  # of the rejected views alone
    assert other["ref_chosen_logps"] == kept["ref_chosen_logps"]
    assert other["ref_rejected_view_logps"] != kept["ref_rejected_view_logps"]
    assert scored(saved, num_frames=3, reference_num_frames=trainers.NUM_FRAMES)[1] == 1
    assert scored(saved, view_preference_weight=0.0)[1] == 0
    assert scored(saved.remove_columns("ref_rejected_view_fingerprint"))[1] == 1
    assert scored(saved.remove_columns("ref_fingerprint"))[1] == 2


def test_hashes_of_rejected_views_follow_the_view(preferences: list[VideoPreference]) -> None:
    rows = make_dataset(of_two(preferences[:2])).to_list()
    processor = tiny_models.build("internvl")[1]
    collators = [
        VideoPreferenceCollator(processor, 6, rejected=kind) for kind in ("no_evidence", "reversed", "shuffled")
    ]
    hashes = [tuple(reference_fingerprints(collator, rows, "m", True)) for collator in collators]
    hashes.append(tuple(reference_fingerprints(collators[0], rows, "m")))
    hashes.append(
        tuple(reference_fingerprints(VideoPreferenceCollator(processor, 5, rejected="reversed"), rows, "m", True))
    )
    assert len(set(hashes)) == len(hashes)


# --------------------------------------------------------------------------------------------- rows that do not count


def test_rows_that_are_left_out_prefer_nothing(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    broken = make_dataset(preferences[:3]).to_list()
    for clip in broken[0]["clips"]:
        clip["file_name"] = str(tmp_path / "gone.mp4")
    rows, kept = Dataset.from_list(broken), make_dataset(preferences[1:3])
    more: dict[str, Any] = {**WEIGHED, "on_bad_video": "skip", **ALONE}
    expected = trainers.loss_of(make(tmp_path, kept, **more), kept).item()
    live = make(tmp_path, rows, **more)
    assert trainers.loss_of(live, rows).item() == pytest.approx(expected, rel=1e-5)
    more |= {"precompute_ref_log_probs": True, "ref_model": tiny_models.build("internvl")[0]}
    ready = make(tmp_path, rows, **more)
    assert [math.isnan(score) for score in ready.train_dataset["ref_rejected_view_logps"]] == [True, False, False]
    assert trainers.loss_of(ready, ready.train_dataset).item() == pytest.approx(expected, rel=1e-5)
    for trainer, dataset in ((live, rows), (ready, ready.train_dataset)):
        loss = trainers.loss_of(trainer, dataset.select([0]))  # a stand-in
        loss.backward()
        assert loss.item() == 0.0


def test_an_evaluation_prefers_each_row_once(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = preferences[:3]  # the second batch is not full
    more: dict[str, Any] = {"eval_dataset": make_dataset(rows), "per_device_eval_batch_size": 2, **ALONE}
    trainer = make(tmp_path, make_dataset(rows), **WEIGHED, max_steps=1, **more)
    metrics = trainer.evaluate()
    policy = trainers.perturbed(tiny_models.build("internvl")[0], FAR)
    rejected = [View.without(row.evidence) for row in rows]
    margins = by_hand(policy, *tiny_models.build("internvl"), rows, rejected)
    assert metrics["eval_loss/view_preference"] == pytest.approx(loss_of_margins(margins), rel=5e-4)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss/view_preference"], rel=1e-2)  # TRL's is of batches
    trainer.train()
    assert trainers.logged(trainer, "grad_norm")[0] > 0


def test_without_a_weight_no_view_is_rejected(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:2])
    trainer = make(tmp_path, rows)
    assert len(trainers.batch_of(trainer, rows)["video_index"]) == 2
    trainers.loss_of(trainer, rows)
    assert not [name for name in trainer._take_means("train") if "view" in name]


def test_a_policy_learns_to_need_its_evidence(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:4])
    more: dict[str, Any] = {**WEIGHED, **ALONE, "max_steps": 5, "per_device_train_batch_size": 4}
    trainer = trainers.make(tmp_path, rows, reference="full", **more)
    trainer.train()
    losses = trainers.logged(trainer, "loss/view_preference")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0] - 1e-3
    assert trainers.logged(trainer, "rewards/view_accuracies")[-1] == 1.0
