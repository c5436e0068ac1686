"""The trainer's door: TRL's arguments and errors, one weight of the SFT term, and settings that cannot train."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict, Features, List, Value, Video, load_from_disk
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

import tiny_models
import trainers
from conftest import make_dataset
from longvpo_hf import LongVPOConfig, LongVPOTrainer
from longvpo_hf.errors import ConfigError, DatasetError
from longvpo_hf.preference import VideoPreference
from longvpo_hf.training import config as settings_module

# ------------------------------------------------------------------------------------------- arguments


def saved_base(folder: Path) -> str:
    model, processor = tiny_models.build("internvl")
    model.save_pretrained(folder / "tiny")
    processor.save_pretrained(folder / "tiny")
    return str(folder / "tiny")


def test_settings_are_optional_as_in_trl(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # TRL's own defaults ask for bf16, which a machine without a GPU refuses.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = LongVPOTrainer(saved_base(tmp_path), train_dataset=dataset)
    assert isinstance(trainer.args, LongVPOConfig)
    assert trainer.args.output_dir == "tiny-LongVPO"
    assert trainer.data_collator.sampler.num_frames == 128


@pytest.mark.parametrize("rows", [None, [1, 2], "rows"], ids=["none", "list", "name"])
def test_a_missing_or_wrong_dataset_gives_trls_error(tmp_path: Path, rows: Any) -> None:
    model, processor = tiny_models.build("internvl")
    raised = []
    for kind, args in ((DPOTrainer, DPOConfig), (LongVPOTrainer, LongVPOConfig)):
        given = args(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        with pytest.raises((ValueError, TypeError)) as error:
            kind(model=model, args=given, train_dataset=rows, processing_class=processor)
        raised.append(error.value)
    theirs, ours = raised
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


def test_settings_of_trl_alone_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ConfigError, match="args must be a LongVPOConfig, got DPOConfig"):
        LongVPOTrainer(tiny_models.build("internvl")[0], args=args, train_dataset=dataset)


def test_a_tokenizer_is_no_processor(dataset: Dataset, tmp_path: Path) -> None:
    tokenizer = tiny_models.build("internvl")[1].tokenizer
    with pytest.raises(ConfigError, match="need the model's processor as processing_class, got TokenizersBackend"):
        trainers.make(tmp_path, dataset, processing_class=tokenizer)


def test_an_empty_dataset_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"The train dataset has no column chosen and none rejected, got \['text'\]"):
        trainers.make(tmp_path, Dataset.from_list([{"text": "a"}]))
    with pytest.raises(DatasetError, match="The train dataset has no rows"):
        trainers.make(tmp_path, dataset.select([]))
    with pytest.raises(DatasetError, match="The small dataset has no rows"):
        trainers.make(tmp_path, dataset, eval_dataset={"large": dataset, "small": dataset.select([])})


def test_datasets_of_two_kinds_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    texts = dataset.remove_columns(["clips", "evidence", "reference"])
    with pytest.raises(DatasetError, match=r"have a column clips \(train\) and others have none \(eval\)"):
        trainers.make(tmp_path, dataset, eval_dataset=texts)
    with pytest.raises(DatasetError, match=r"\(train, a\) and others have none \(b\)"):
        trainers.make(tmp_path, dataset, eval_dataset=DatasetDict({"a": dataset, "b": texts}))


@pytest.mark.parametrize("kind", ["map", "stream", "held out"])
@pytest.mark.parametrize("form", ["video", "videos", "film", "films", "timeline"])
def test_videos_in_another_form_are_no_text(dataset: Dataset, tmp_path: Path, form: str, kind: str) -> None:
    """Caught: rows with `videos`, as TRL's have, were trained on as text alone, without a word."""
    if form == "timeline":
        rows = dataset.rename_column("clips", form)
    else:
        names = [row["clips"][0]["file_name"] for row in dataset]
        column = [[name] for name in names] if form in ("videos", "films") else names
        rows = dataset.select_columns(["prompt", "chosen", "rejected"]).add_column(form, column)
        if form in ("film", "films"):
            rows = rows.cast_column(form, List(Video()) if form == "films" else Video())
    given = rows.to_iterable_dataset() if kind == "stream" else rows
    train, more = given, {"max_steps": 1}
    if kind == "held out":
        train, more = rows.select_columns(["prompt", "chosen", "rejected"]), {"eval_dataset": given}
    with pytest.raises(DatasetError, match=rf"no column clips, but ({form}|evidence, reference)"):
        trainers.make(tmp_path, train, **more)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_no_decoder_is_opened_to_look_at_the_rows(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows = make_dataset(preferences).to_list()
    for row in rows:
        row["clips"] = [
            {"video": clip["file_name"], "start_seconds": clip["start_seconds"], "end_seconds": clip["end_seconds"]}
            for clip in row["clips"]
        ]
        del row["provenance"]
    plain = Dataset.from_list(rows)
    clip = {"video": Video(), "start_seconds": Value("float64"), "end_seconds": Value("float64")}
    decoded = plain.cast(Features({**plain.features, "clips": List(clip)}))
    given = decoded if kind == "map" else decoded.to_iterable_dataset()
    opened: list[Any] = []
    monkeypatch.setattr(Video, "decode_example", lambda self, value, **more: opened.append(value))
    trainer = trainers.make(tmp_path, given, eval_dataset={"a": given, "b": given})
    trainer.evaluate()
    trainer.train()
    assert opened == []


# ------------------------------------------------------------------------------------------------ types


def test_no_setting_takes_a_value_of_another_type(tmp_path: Path) -> None:
    """Python checks no types: `freeze_vision_tower="no"` froze the tower."""
    wrong = {"int": ("8", 8.5, True, [8]), "float": ("1", True, [1.0]), "bool": ("no", 1, 0.0, [])}
    inherited, checked = {each.name for each in dataclasses.fields(DPOConfig)}, 0
    for name, declared in LongVPOConfig.__annotations__.items():
        kind, _, optional = declared.partition(" | ")
        if name in inherited or kind not in wrong:
            continue
        for value in (*wrong[kind], *(() if optional else (None,))):
            checked += 1
            with pytest.raises(ConfigError, match=rf"^{name} must be of type {re.escape(declared)}, got "):
                config(tmp_path, **{name: value})
    assert checked > 60
    whole = config(tmp_path, sft_weight=1, fps=None, max_pixels=None, tree_packing_trial=None)
    assert (whole.sft_weight, type(whole.sft_weight)) == (1.0, float)


# ------------------------------------------------------------------------------------------------ losses


def test_the_losses_are_those_of_trl() -> None:
    """TRL names them where it refuses others, at the first step."""
    source = inspect.getsource(DPOTrainer)
    (named,) = re.findall(r"Should be one of \[(.*?)\]", re.sub(r'"\s*f?"', "", source), re.DOTALL)
    assert re.findall(r"'(\w+)'", named) == list(settings_module.LOSSES)
    for name in settings_module.LOSSES:
        assert f'loss_type == "{name}"' in source or name == "sft", name


# ------------------------------------------------------------------------------------------------ alpha


def config(folder: Path, **more: Any) -> LongVPOConfig:
    return LongVPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loss_type": ["sigmoid", "sft"]}, r"sft_weight alone \(now 1\)"),
        ({"loss_type": ["sigmoid", "sft"], "sft_weight": 0.5}, r"sft_weight alone \(now 0.5\)"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "sft_weight": 0.5}, "sft_weight alone"),
        ({"loss_type": ["sft"], "sft_weight": 0}, "leaves nothing to train on"),
        ({"loss_type": "sft", "loss_weights": [0.5]}, "leave loss_weights out"),
        ({"sft_weight": -1.0}, "sft_weight must be ≥ 0"),
        ({"sft_weight": float("nan")}, "sft_weight must be ≥ 0 and finite, got nan"),
    ],
    ids=str,
)
def test_the_sft_term_has_one_weight(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **more)


_NUMBERS = sorted(each.name for each in dataclasses.fields(LongVPOConfig) if each.type in ("float", float))


@pytest.mark.parametrize("seed", range(4))
def test_a_number_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    name, value = draw.choice(_NUMBERS), draw.choice([float("nan"), float("inf"), float("-inf")])
    with pytest.raises(ConfigError, match=f"{name} must be .*, got {value}"):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"learning_rate": -1e-6}, "learning_rate must be ≥ 0, got -1e-06"),
        ({"beta": -0.1}, "beta must be ≥ 0"),
        ({"seed": 2**32}, r"seed must be ≥ 0 and < 2\^32"),
        ({"seed": -1}, "seed must be ≥ 0"),
        ({"data_seed": 2**63}, "data_seed must be ≥ 0"),
        ({"hub_model_id": "https://some.where/me/model"}, "hub_model_id must be NAMESPACE/NAME"),
        ({"hub_model_id": "me/../model"}, "hub_model_id must be NAMESPACE/NAME"),
    ],
    ids=str,
)
def test_what_would_be_refused_late_is_refused_at_once(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sft_weight": 0.5},
        {"sft_weight": 0.0},
        {"loss_type": "sft", "sft_weight": 0.3},
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.8, 0.2], "sft_weight": 0.5},
    ],
    ids=str,
)
def test_settings_survive_being_written_and_read(tmp_path: Path, more: dict[str, Any]) -> None:
    made = config(tmp_path, **more)
    expected = (made.loss_type, made.loss_weights, made.sft_weight, made.preference_losses)
    fields = {field.name for field in dataclasses.fields(made) if field.init}
    stored = {name: value for name, value in made.to_dict().items() if name in fields}
    parser = HfArgumentParser(LongVPOConfig)
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump({"output_dir": "x", "use_cpu": True, "bf16": False, "report_to": "none", **more})
    )
    words = [
        f"--{name}={value}" for name, given in more.items() for value in [given] if not isinstance(given, list)
    ] + [word for name, given in more.items() if isinstance(given, list) for word in (f"--{name}", *map(str, given))]
    again = [
        LongVPOConfig(**json.loads(json.dumps(stored))),
        dataclasses.replace(made),
        parser.parse_yaml_file(str(tmp_path / "settings.yaml"))[0],
        parser.parse_args_into_dataclasses(["--output_dir=x", "--use_cpu", "--bf16=false", *words])[0],
    ]
    for other in again:
        assert (other.loss_type, other.loss_weights, other.sft_weight, other.preference_losses) == expected


@pytest.mark.parametrize(
    ("more", "loss", "alpha"),
    [
        ({"sft_weight": 0.5}, "1 × sigmoid + 0.5 × sft", "0.5"),
        ({"sft_weight": 0.0}, "1 × sigmoid", "0"),
        ({"sft_weight": 0.3, "loss_type": "sft"}, "0.3 × sft", "0.3"),
        ({"loss_type": ["ipo", "nca_pair"], "loss_weights": [0.8, 0.2]}, "0.8 × ipo + 0.2 × nca_pair + 1 × sft", "1"),
    ],
    ids=str,
)
def test_the_card_says_what_was_trained(
    tmp_path: Path, dataset: Dataset, more: dict[str, Any], loss: str, alpha: str
) -> None:
    trainer = trainers.make(tmp_path, dataset, **more)
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert f"| loss | {loss} |" in card
    assert f"| α (weight of the SFT term) | {alpha} |" in card
    assert trainer.args.preference_losses == dict(zip(trainer.loss_types, trainer.loss_weights, strict=True))


# ----------------------------------------------------------------------------- settings that do not train


def test_hinge_with_wpo_weights_is_refused(tmp_path: Path) -> None:
    for losses in ("hinge", ["sigmoid", "hinge"]):
        with pytest.raises(ConfigError, match="use_weighting=True does not work with loss_type 'hinge'"):
            config(tmp_path, loss_type=losses, use_weighting=True)


LOSSES = "sigmoid ipo exo_pair nca_pair robust bco_pair sppo_hard apo_zero apo_down discopop sigmoid_norm"


@pytest.mark.parametrize("loss", LOSSES.split())
def test_every_other_loss_trains_with_wpo_weights(
    tmp_path: Path, preferences: list[VideoPreference], loss: str
) -> None:
    rows = make_dataset(preferences[:2])
    trainer = trainers.make(tmp_path, rows, loss_type=loss, use_weighting=True, label_smoothing=0.1)
    trainers.loss_of(trainer, rows).backward()
    assert all(weight.grad.isfinite().all() for weight in trainer.model.parameters() if weight.grad is not None)


def smoothing_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "label_smoothing" in record.getMessage()]


def test_label_smoothing_that_no_loss_uses_is_said_once(
    tmp_path: Path, dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainers.make(tmp_path, dataset, label_smoothing=0.1, max_steps=1).train()
    (message,) = smoothing_warnings(caplog)
    assert "label_smoothing=0.1 has no effect on loss_type=['sigmoid']" in message
    assert "aot, aot_unpaired, exo_pair, robust" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainers.make(tmp_path, dataset, label_smoothing=0.1, loss_type=["sigmoid", "robust"])
        trainers.make(tmp_path, dataset)
    assert smoothing_warnings(caplog) == []


def tied() -> Any:
    model, _ = tiny_models.build("internvl")
    facts = model.config
    facts.tie_word_embeddings = facts.text_config.tie_word_embeddings = True
    model = type(model)(facts)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def adapter(**more: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0, **more)


@pytest.mark.parametrize("more", [{}, {"precompute_ref_log_probs": True}], ids=["live", "precomputed"])
def test_trainable_tokens_of_the_head_are_refused_when_the_trainer_is_made(
    tmp_path: Path, dataset: Dataset, more: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="trainable_token_indices reaches the LM head"):
        trainers.make(tmp_path, dataset, peft_config=adapter(trainable_token_indices={"lm_head": [3]}), **more)
    with pytest.raises(ConfigError, match="ties the head to its embeddings"):
        trainers.make(tmp_path, dataset, model=tied(), peft_config=adapter(trainable_token_indices=[3]), **more)


def test_trainable_tokens_of_the_embeddings_and_a_whole_head_train(
    tmp_path: Path, preferences: list[VideoPreference]
) -> None:
    rows = make_dataset(preferences[:2])
    for more, name in (
        ({"trainable_token_indices": list(range(100))}, "trainable_tokens_delta"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        trainer = trainers.make(tmp_path, rows, peft_config=adapter(**more))
        trainers.loss_of(trainer, rows).backward()
        trained = [weight for key, weight in trainer.model.named_parameters() if name in key and weight.requires_grad]
        assert trained
        assert all(weight.grad.abs().max() > 0 for weight in trained)


def test_rows_on_disk_stay_as_they_were(tmp_path: Path, dataset: Dataset) -> None:
    dataset.save_to_disk(str(tmp_path / "rows"))
    rows = load_from_disk(str(tmp_path / "rows"))
    trainers.make(tmp_path, rows)
    assert rows.column_names == dataset.column_names
