"""Models as users give them: each is trained against itself as it was, or refused by one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2ForCausalLM

import tiny_models
import trainers
from longvpo_hf import LongVPOTrainer
from longvpo_hf.errors import ConfigError, ModelError
from longvpo_hf.frames import FrameSampler
from longvpo_hf.responders import LocalResponder

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its processor in a folder."""
    folder: Path = tmp_path_factory.mktemp("base")
    for part in tiny_models.build("internvl"):
        part.save_pretrained(folder)
    return folder


def model_of(base: Path) -> Any:
    """The model in a folder, which knows its name."""
    return type(tiny_models.build("internvl")[0]).from_pretrained(base)


def trainer_of(folder: Path, rows: Dataset, model: Any, processor: Any = None, **given: Any) -> LongVPOTrainer:
    args = trainers.settings(folder, max_steps=1, reference="full")
    return LongVPOTrainer(model, args=args, train_dataset=rows, processing_class=processor, **given)


def first_step(trainer: LongVPOTrainer) -> list[float]:
    trainer.train()
    return trainers.logged(trainer, "rewards/margins")


def merged(model: Any) -> Any:
    """With an adapter that changes it merged into its weights, which PEFT leaves frozen."""
    torch.manual_seed(0)
    return get_peft_model(model, LORA).merge_and_unload().requires_grad_(True)


CHANGED: dict[str, Callable[[Any], Any]] = {"noise": lambda model: trainers.perturbed(model, 0.5), "merged": merged}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("named", [True, False])
def test_the_reference_is_the_model_as_it_is_and_not_as_it_was_loaded(
    tmp_path: Path, dataset: Dataset, base: Path, change: str, named: bool
) -> None:
    """TRL would load it by the model's name: before the first step policy and reference would differ."""
    model = CHANGED[change](model_of(base) if named else tiny_models.build("internvl")[0])
    trainer = trainer_of(tmp_path, dataset, model, tiny_models.build("internvl")[1])
    assert first_step(trainer) == [pytest.approx(0.0, abs=1e-5)]


def test_a_second_trainer_refers_to_what_the_first_one_made(tmp_path: Path, dataset: Dataset, base: Path) -> None:
    processor = tiny_models.build("internvl")[1]
    first = trainer_of(tmp_path, dataset, model_of(base), processor)
    first.train()
    before = {name: weight.clone() for name, weight in first.model.state_dict().items()}
    second = trainer_of(tmp_path, dataset, first.model, processor)
    assert first_step(second) == [pytest.approx(0.0, abs=1e-5)]
    reference = second.ref_model.state_dict()
    assert before.keys() == reference.keys()
    assert all(torch.equal(before[name], reference[name]) for name in before)
    assert any(not torch.equal(before[name], weight) for name, weight in second.model.state_dict().items())


def test_a_folder_may_be_a_path(tmp_path: Path, dataset: Dataset, base: Path) -> None:
    found = [first_step(trainer_of(tmp_path, dataset, given)) for given in (base, str(base))]
    assert found[0] == found[1]


REFUSED: dict[str, tuple[Callable[[Any], dict[str, Any]], type[Exception], str]] = {
    "nothing": (lambda model: {"model": None}, ConfigError, "model must be a model of transformers .* got NoneType"),
    "a module": (lambda model: {"model": torch.nn.Linear(2, 2)}, ConfigError, "model must be .* got Linear"),
    "a wrapper": (lambda model: {"model": torch.nn.DataParallel(model)}, ConfigError, "model must be .* DataParallel"),
    "no head": (lambda model: {"model": model.get_decoder()}, ConfigError, "language-model head, got Qwen2Model"),
    "no pictures": (
        lambda model: {"model": Qwen2ForCausalLM(model.config.text_config)},
        ModelError,
        "models of type 'qwen2' take no pictures",
    ),
    "a reference's name": (lambda model: {"ref_model": "some/model"}, ConfigError, "ref_model must be .* got str"),
    "another kind of reference": (
        lambda model: {"ref_model": tiny_models.build("qwen2_5_vl")[0]},
        ConfigError,
        r"model \(InternVL\w+\) and ref_model \(Qwen2_5_VL\w+\) are of different kinds",
    ),
    "no processor": (
        lambda model: {"processor": None},
        ConfigError,
        "processing_class is needed: the model has no name",
    ),
    "another kind of processor": (
        lambda model: {"processor": tiny_models.build("qwen2_5_vl")[1]},
        ConfigError,
        "Qwen2_5_VLProcessor is not the processor of this model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_by_one_sentence(tmp_path: Path, dataset: Dataset, case: str) -> None:
    model, processor = tiny_models.build("internvl")
    change, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        trainer_of(tmp_path, dataset, **{"model": model, "processor": processor, **change(model)})


@pytest.mark.parametrize("frozen", ["all", "adapter"])
def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path: Path, dataset: Dataset, frozen: str) -> None:
    model, processor = tiny_models.build("internvl")
    if frozen == "adapter":
        get_peft_model(model, LORA).save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(tiny_models.build("internvl")[0], tmp_path / "adapter")
    else:
        model.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"No weight of the model is trained .* is_trainable=True"):
        trainer_of(tmp_path, dataset, model, processor).train()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoraConfig(r=2, target_modules=["nope"]), "The adapter does not fit the model: Target modules .*nope"),
        (LoraConfig(r=2, target_parameters=["nope"]), "The adapter does not fit the model: "),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["nope"]), "the model has no module 'nope'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, dataset: Dataset, adapter: LoraConfig, message: str
) -> None:
    model, processor = tiny_models.build("internvl")
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, dataset, model, processor, peft_config=adapter).train()


def test_the_placeholders_of_every_family_are_those_of_its_model_alone() -> None:
    built = {family: tiny_models.build(family) for family in tiny_models.FAMILIES}
    sampler = FrameSampler(2)
    for family, (model, processor) in built.items():
        LocalResponder(model, processor, sampler, name=family)
    with pytest.raises(ConfigError, match="is not the processor of this model"):
        LocalResponder(built["internvl"][0], built["qwen2_5_vl"][1], sampler, name="mixed")
