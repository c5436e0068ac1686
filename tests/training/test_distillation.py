"""View distillation: the divergence by hand, whatever the forward, the chunks, the adapters; and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PromptTuningConfig
from torch import Tensor

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf.errors import ConfigError, ModelError
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import View
from longvpo_hf.training import distillation, scoring
from longvpo_hf.training.distillation import AnswerStates, divergences, top_tokens
from longvpo_hf.training.trainer import LongVPOTrainer

KINDS = ("forward", "reverse", "jsd")
ALONE = {"loss_type": "sft", "sft_weight": 0.0}
#: Noise that makes the divergences differ; nearby distributions have nearly the same.
FAR = 0.5


def direct(
    student: Tensor, teacher: Tensor, kind: str, temperature: float, guarded_labels: Tensor | None = None
) -> Tensor:
    """The divergence of logits `[tokens, vocabulary]`, summed over both, by the definitions."""
    weights: Any = 1.0
    if guarded_labels is not None:
        tokens = torch.arange(len(guarded_labels)), guarded_labels
        shares = [torch.softmax(logits.detach().double(), -1)[tokens] for logits in (student, teacher)]
        weights = torch.tensor([max(0.0, 1 - float(own / sure)) for own, sure in zip(*shares, strict=True)])[:, None]
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher, student))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (weights * a * (a.log() - b.log())).sum()

    if kind == "jsd":
        return kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2
    return kl(p, q) if kind == "forward" else kl(q, p)


def by_hand(
    policy: Any,
    teacher: Any,
    processor: Any,
    rows: Sequence[VideoPreference],
    kind: str,
    temperature: float,
    is_guarded: bool = False,
) -> float:
    """The term of a batch, from plain calls of both models, each on its view."""
    found = []
    for row in rows:
        student, labels = trainers.answer_logits(policy, processor, row, View.whole(), row.chosen)
        known, _ = trainers.answer_logits(teacher, processor, row, View.only(row.reference), row.chosen)
        guarded = labels if is_guarded else None
        found.append(float(direct(student, known, kind, temperature, guarded)) / len(labels))
    return sum(found) / len(found)


def make(folder: Path, rows: Any, family: str = "internvl", **more: Any) -> Any:
    """A trainer whose policy is another model than its reference."""
    if "peft_config" not in more:
        more = {"model": trainers.perturbed(tiny_models.build(family)[0], FAR), **more}
    return trainers.make(folder, rows, family, **more)


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["internvl", "qwen3_vl", "gemma4"])  # rope of one axis and of three; without trees
def test_the_term_is_the_divergence_of_plain_calls_on_both_views(
    tmp_path: Path, preferences: list[VideoPreference], family: str, kind: str
) -> None:
    rows = [preferences[0], preferences[3]]  # two timelines, answers of unequal length
    settings = {"view_distillation_divergence": kind, "view_distillation_temperature": 1.5}
    trainer = make(tmp_path, make_dataset(rows), family, view_distillation_weight=0.7, **settings, **ALONE)
    found = trainers.loss_of(trainer, make_dataset(rows)).item()
    policy = trainers.perturbed(tiny_models.build(family)[0], FAR)
    teacher, processor = tiny_models.build(family)
    expected = by_hand(policy, teacher, processor, rows, kind, 1.5)
    others = [by_hand(policy, teacher, processor, rows, other, 1.5) for other in KINDS if other != kind]
    assert all(abs(other / expected - 1) > 1e-3 for other in others)
    assert found == pytest.approx(0.7 * expected, rel=2e-4)
    assert dict(trainer._means["train"].take())["loss/view_distillation"] == pytest.approx(expected, rel=2e-4)


def test_the_term_is_added_to_the_others(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:2])

    def loss(**more: Any) -> float:
        return trainers.loss_of(make(tmp_path, rows, **more), rows).item()

    term = loss(view_distillation_weight=1.0, **ALONE)
    assert term > 1e-3
    for others in ({}, {"loss_type": ["hinge", "ipo"], "sft_weight": 0.3}, {"loss_type": "sft", "sft_weight": 2.0}):
        assert loss(view_distillation_weight=0.5, **others) == pytest.approx(loss(**others) + 0.5 * term, rel=1e-5)


def test_a_guard_weighs_tokens_by_what_the_reference_has_over_the_policy(
    tmp_path: Path, preferences: list[VideoPreference]
) -> None:
    rows = [preferences[0], preferences[3]]
    trainer = make(tmp_path, make_dataset(rows), view_distillation_weight=1.0, view_distillation_guard=True, **ALONE)
    policy = trainers.perturbed(tiny_models.build("internvl")[0], FAR)
    teacher, processor = tiny_models.build("internvl")
    plain, guarded = (by_hand(policy, teacher, processor, rows, "forward", 1.0, each) for each in (False, True))
    assert 0 < guarded < 0.8 * plain
    assert trainers.loss_of(trainer, make_dataset(rows)).item() == pytest.approx(guarded, rel=5e-4)


def test_the_same_model_on_the_same_view_teaches_nothing(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:2])
    trainer = trainers.make(tmp_path, rows, reference="full", view_distillation_weight=1.0, **ALONE)
    loss = trainers.loss_of(trainer, rows)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert (
        max(float(weight.grad.abs().max()) for weight in trainer.model.parameters() if weight.grad is not None) < 1e-5
    )


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])  # the second in one call a timeline
def test_packed_equals_separate(
    tmp_path: Path, preferences: list[VideoPreference], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_dataset([preferences[0], preferences[1], preferences[4]])

    def gradients(tree_packing: bool) -> tuple[float, dict[str, Tensor]]:
        trainer = make(tmp_path, rows, family, view_distillation_weight=1.0, tree_packing=tree_packing, **ALONE)
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        loss = trainers.loss_of(trainer, rows)
        loss.backward()
        named = trainer.model.named_parameters()
        return loss.item(), {name: weight.grad for name, weight in named if weight.grad is not None}

    monkeypatch.setattr("longvpo_hf.training.packing.forward.visual_shapes", id)  # calls of their own for each video
    packed, separate = gradients(True), gradients(False)
    assert packed[0] == pytest.approx(separate[0], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in separate[1].values())
    assert packed[1].keys() == separate[1].keys()
    for name, gradient in separate[1].items():
        assert float((packed[1][name] - gradient).abs().max()) <= 1e-4 * largest, name


@pytest.mark.parametrize("head", [[], ["lm_head"]], ids=["adapters", "and a trained head"])
def test_the_teacher_of_an_adapter_is_the_model_without_it(
    tmp_path: Path, preferences: list[VideoPreference], head: list[str]
) -> None:
    rows = preferences[:2]
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, modules_to_save=head or None)
    more = {"peft_config": adapter, "view_distillation_weight": 1.0, "view_distillation_divergence": "reverse"}
    trainer = make(tmp_path, make_dataset(rows), **more, **ALONE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if weight.requires_grad:
                weight += (0.1 if "lora" in name else 0.02) * torch.randn(weight.shape, generator=generator)
    found = trainers.loss_of(trainer, make_dataset(rows))
    teacher, processor = tiny_models.build("internvl")
    base = trainer.model.get_base_model()
    expected = by_hand(base, teacher, processor, rows, "reverse", 1.0)
    assert expected > 1e-4
    assert found.item() == pytest.approx(expected, rel=5e-4)
    found.backward()
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {name for name, weight in trainer.model.named_parameters() if weight.grad is not None} == trained


def random_states(seed: int, lengths: Sequence[int], vocabulary: int, **more: Any) -> AnswerStates:
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(length, 6, generator=generator, dtype=torch.float64) for length in lengths]
    labels = tuple(torch.randint(vocabulary, (length,), generator=generator) for length in lengths)
    weight = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64)
    scores = tuple(torch.zeros(length) for length in lengths)  # not looked at
    return AnswerStates(
        tuple(each.requires_grad_() for each in hidden), labels, scores, weight.requires_grad_(), **more
    )


@pytest.mark.parametrize("seed", range(6))
def test_chunks_and_the_whole_give_the_definition_and_its_gradient(seed: int) -> None:
    kind, temperature, lengths, vocabulary = KINDS[seed % 3], (0.5, 1.0, 3.0)[seed % 3], [3, 1, 5 + seed], 11 + seed
    guard = seed >= 3
    more = {"softcap": 2.0, "bias": torch.randn(vocabulary, dtype=torch.float64)} if seed % 2 else {}
    student, teacher = random_states(seed, lengths, vocabulary, **more), random_states(seed + 100, lengths, vocabulary)
    leaves = [*student.hidden, student.weight]

    def read(states: AnswerStates, row: int) -> Tensor:
        logits = F.linear(states.hidden[row], states.weight, states.bias)
        return logits if states.softcap is None else states.softcap * torch.tanh(logits / states.softcap)

    expected = torch.stack(
        [
            direct(read(student, row), read(teacher, row), kind, temperature, student.labels[row] if guard else None)
            / n
            for row, n in enumerate(lengths)
        ]
    )
    wanted = torch.autograd.grad(expected.sum(), leaves)
    for table in (1, 4 * vocabulary, 10**6):  # a token at a time, four, all
        found = divergences(student, teacher, kind, temperature, guard, table)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        for gradient, one in zip(torch.autograd.grad(found.sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ the likeliest tokens alone


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_tokens_and_the_rest_bound_the_divergence(kind: str, guard: bool) -> None:
    lengths, vocabulary, temperature = [3, 1, 5], 12, 1.5
    student, teacher = random_states(1, lengths, vocabulary), random_states(2, lengths, vocabulary)
    teacher = replace(teacher, labels=student.labels)
    whole = divergences(student, teacher, kind, temperature, guard)
    before = torch.zeros(3, dtype=torch.float64)
    for k in range(1, vocabulary + 3):
        top = top_tokens(teacher, k, temperature, table=4 * vocabulary)
        found = divergences(student, top, kind, temperature, guard, table=2 * vocabulary)
        assert (found >= before - 1e-6).all()  # each token more parts the rest further
        assert (found <= whole + 1e-6).all()
        before = found.detach()
        # By hand: what is missing lies within the rest.
        expected = []
        for row, hidden in enumerate(student.hidden):
            p, q = (
                (each @ s.weight.T / temperature).softmax(-1)
                for each, s in ((teacher.hidden[row], teacher), (hidden, student))
            )
            order = p.argsort(descending=True)
            p, q = (each.gather(-1, order) for each in (p, q))
            p, q = (torch.cat([each[:, :k], each[:, k:].sum(-1, keepdim=True)], -1)[:, :vocabulary] for each in (p, q))
            expected.append(float(direct(q.log(), p.log(), kind, 1.0).detach()) / lengths[row])
        if not guard:
            assert found.tolist() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    leaves = [*student.hidden, student.weight]
    for one, other in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(whole.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", [False, True])
def test_precomputed_tokens_teach_what_the_reference_does(
    tmp_path: Path, preferences: list[VideoPreference], adapter: bool
) -> None:
    rows = make_dataset(preferences[:2])
    more: dict[str, Any] = {"view_distillation_weight": 0.7, "view_distillation_temperature": 1.5}
    if adapter:
        more["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0)
    else:
        more |= {"view_distillation_guard": True, "ref_model": tiny_models.build("internvl")[0]}

    def train(**settings: Any) -> tuple[list[float], Any]:
        given = {**more, **settings}
        trainer = make(tmp_path, rows, **given)
        trainer.train()
        return trainers.logged(trainer, "loss/view_distillation"), trainer

    direct_way, _ = train()
    all_tokens, trainer = train(precompute_ref_log_probs=True, view_distillation_top_k=10**6)
    assert all_tokens == pytest.approx(direct_way, rel=1e-5)
    assert trainer.ref_model is None
    few, trainer = train(precompute_ref_log_probs=True, view_distillation_top_k=3)
    assert 0 < few[0] < direct_way[0]
    assert all(len(row) == 3 for answer in trainer.train_dataset["ref_top_tokens"] for row in answer)
    assert all(len(row) == 4 for answer in trainer.train_dataset["ref_top_logps"] for row in answer)


def test_precomputed_tokens_are_never_stale(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(preferences[:3]).save_to_disk(str(tmp_path / "rows"))
    rows, passes = load_from_disk(str(tmp_path / "rows")), []
    compute = LongVPOTrainer.compute_ref_log_probs

    def counted(*args: Any) -> Any:
        passes.append(1)
        return compute(*args)

    monkeypatch.setattr(LongVPOTrainer, "compute_ref_log_probs", counted)

    def scored(dataset: Any, **more: Any) -> tuple[Any, bool]:
        passes.clear()
        given = {
            "precompute_ref_log_probs": True,
            "view_distillation_weight": 1.0,
            "view_distillation_top_k": 3,
            **more,
        }
        trainer = trainers.make(tmp_path, dataset, per_device_train_batch_size=2, **given)
        return trainer.train_dataset, bool(passes)

    kept, anew = scored(rows)
    assert anew
    assert not scored(rows)[1]  # in the cache of the dataset on disk
    for file in tmp_path.rglob("cache-*"):
        if "ref_top_tokens" in Dataset.from_file(str(file)).column_names:
            file.unlink()  # as if killed before it was whole
    again, anew = scored(rows)
    assert anew
    assert again.to_dict() == kept.to_dict()
    assert not scored(Dataset.from_dict(kept.to_dict(), features=kept.features))[1]
    assert scored(kept, view_distillation_top_k=4)[1]
    assert scored(kept, view_distillation_temperature=2.0)[1]
    assert not scored(kept, view_distillation_weight=0.0)[1]  # the scores alone are asked for
    assert scored(kept.remove_columns("ref_top_fingerprint"))[1]


def test_rows_without_a_reference_score_have_no_tokens(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    broken = make_dataset(preferences[:3]).to_list()
    for clip in broken[0]["clips"]:
        clip["file_name"] = str(tmp_path / "gone.mp4")
    more: dict[str, Any] = {"view_distillation_weight": 1.0, "on_bad_video": "skip", **ALONE}
    more["view_distillation_top_k"] = 10**6
    rows = Dataset.from_list(broken)
    ready = make(tmp_path, rows, **more, precompute_ref_log_probs=True, ref_model=tiny_models.build("internvl")[0])
    assert [len(tokens) > 0 for tokens in ready.train_dataset["ref_top_tokens"]] == [False, True, True]
    scored = ready.train_dataset
    found = trainers.loss_of(ready, scored).item()
    assert found == pytest.approx(trainers.loss_of(make(tmp_path, rows, **more), rows).item(), rel=1e-5)
    assert trainers.loss_of(ready, scored.select([0])).item() == 0.0  # a stand-in


# ---------------------------------------------------------------------------------------- what must be noticed


def test_states_of_other_tokens_are_noticed(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_dataset(preferences[:2])
    original = scoring.answer_states

    def shifted(base: Any, calls: list[Tensor], *args: Any) -> AnswerStates:
        return original(base, [call.roll(1, dims=1) for call in calls], *args)

    monkeypatch.setattr(scoring, "answer_states", shifted)
    trainer = make(tmp_path, rows, view_distillation_weight=1.0)
    with pytest.raises(ModelError, match="do not follow from its hidden states"):
        trainers.loss_of(trainer, rows)


def test_a_head_that_scales_its_logits_is_refused(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    model, _ = tiny_models.build("internvl")
    model.config.text_config.logit_scale = 0.5  # TRL's head follows it
    trainer = trainers.make(tmp_path, make_dataset(preferences[:2]), model=model, view_distillation_weight=1.0)
    with pytest.raises(ModelError, match="its head scales logits"):
        trainers.loss_of(trainer, make_dataset(preferences[:2]))


def test_rows_that_are_left_out_teach_nothing(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = make_dataset(preferences[:3]).to_list()
    for clip in broken[0]["clips"]:
        clip["file_name"] = str(tmp_path / "gone.mp4")
    more: dict[str, Any] = {"view_distillation_weight": 1.0, "on_bad_video": "skip", **ALONE}
    found = trainers.loss_of(make(tmp_path, Dataset.from_list(broken), **more), Dataset.from_list(broken))
    kept = make_dataset(preferences[1:3])
    assert found.item() == pytest.approx(trainers.loss_of(make(tmp_path, kept, **more), kept).item(), rel=1e-5)


def test_evaluation_counts_each_row_once(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = preferences[:3]  # the second batch is not full
    more: dict[str, Any] = {"eval_dataset": make_dataset(rows), "per_device_eval_batch_size": 2, **ALONE}
    trainer = make(tmp_path, make_dataset(rows), view_distillation_weight=1.0, max_steps=1, **more)
    metrics = trainer.evaluate()
    policy = trainers.perturbed(tiny_models.build("internvl")[0], FAR)
    expected = by_hand(policy, *tiny_models.build("internvl"), rows, "forward", 1.0)
    assert metrics["eval_loss/view_distillation"] == pytest.approx(expected, rel=2e-4)
    trainer.train()
    assert trainers.logged(trainer, "grad_norm")[0] > 0


def test_without_a_weight_nothing_is_kept_or_logged(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:2])
    trainer = make(tmp_path, rows)
    trainers.loss_of(trainer, rows)
    assert trainer._distillation.teacher is None
    assert "loss/view_distillation" not in trainer._take_means("train")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"view_distillation_weight": -1.0}, "view_distillation_weight must be ≥ 0 and finite, got -1.0"),
        ({"view_distillation_weight": float("nan")}, "≥ 0 and finite, got nan"),
        ({"view_distillation_divergence": "kl"}, "'forward', 'reverse' or 'jsd', got 'kl'"),
        ({"view_distillation_temperature": 0.0}, "view_distillation_temperature must be > 0 and finite, got 0.0"),
        ({"view_distillation_top_k": 0}, "view_distillation_top_k must be ≥ 1, got 0"),
        (ALONE, "nothing to train on"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainers.settings(tmp_path, **more)


def test_rows_without_clips_and_deepspeed_are_refused(tmp_path: Path) -> None:
    settings = trainers.settings(tmp_path, view_distillation_weight=1.0)
    for has_clips, is_deepspeed in ((False, False), (True, True)):
        with pytest.raises(ConfigError, match="needs rows with clips, which have two views, and DDP or FSDP2"):
            settings.check_run(has_clips, is_deepspeed)
    settings.check_run(True, False)


def test_the_table_is_bounded() -> None:
    assert distillation._TABLE * 4 == 128 * 2**20


def test_virtual_tokens_before_the_prompt_shift_nothing(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = make_dataset(preferences[:2])
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make(tmp_path, rows, peft_config=virtual, view_distillation_weight=1.0, **ALONE)
    loss = trainers.loss_of(trainer, rows)  # the states are checked against the scores
    loss.backward()
    assert loss.item() > 0
    assert any(float(weight.grad.abs().max()) > 0 for weight in trainer.model.parameters() if weight.grad is not None)
