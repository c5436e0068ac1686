"""Models that cannot be used are refused at the door, by name: known ones, and those that a trial finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    HyperCLOVAXVisionV2Processor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

import tiny_models
import trainers
from cli import longvpo
from longvpo_hf import LongVPOTrainer
from longvpo_hf.errors import ModelError
from longvpo_hf.families import families, family_of
from longvpo_hf.families.encoding import PromptEncoder, _reason_in_trial, control_tokens
from longvpo_hf.families.refused import REFUSED, refusal
from longvpo_hf.frames import FrameSampler
from longvpo_hf.responders import LocalResponder
from longvpo_hf.responders.checkpoint import check_checkpoint, load_checkpoint

QWEN_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
QWEN_TEMPLATE = tiny_models._template(
    "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
)


# ------------------------------------------------------------------------------------------------- refused by name

#: A config, and what is said of it.
OUTSIDERS = {
    **{
        refused.model_type: ({"model_type": refused.model_type}, refused.reason)
        for refused in REFUSED
        if refused.model_type in ("ernie4_5_vl_moe", "llava_qwen", "qwen2_5_omni", "qwen4_exp")
    },
    "teapot": ({"model_type": "teapot"}, "has no model of type 'teapot'"),
    "nothing": ({}, "has no model of type None"),
    "own code": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}},
        "a repository's own code is never run",
    ),
    "text": ({"model_type": "qwen3"}, "models of type 'qwen3' take no pictures or videos"),
}


@pytest.fixture(params=sorted(OUTSIDERS))
def outsider(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A checkpoint's folder, whole and without one weight, and what is said of it."""
    config, reason = OUTSIDERS[request.param]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({}, folder / "model.safetensors")
    return str(folder), reason


def one_sentence(text: str, folder: str, reason: str) -> None:
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if folder in line]
    assert reason in line


def test_check_refuses_in_one_line(outsider: tuple[str, str]) -> None:
    folder, reason = outsider
    result = longvpo(["check", "internvl3_2b/stage1_lora", "--model_name_or_path", folder])
    assert result.exit_code == 2
    assert reason in result.stderr or "'qwen3' costs is not known" in result.stderr
    # Where there is no network, the first command of a process says that it goes on without.
    assert len([line for line in result.stderr.splitlines() if " cannot be reached (" not in line]) == 1


def test_eval_refuses_in_one_line_before_it_looks_for_data(outsider: tuple[str, str], tmp_path: Path) -> None:
    folder, reason = outsider
    result = longvpo(["eval", folder, "--output", str(tmp_path / "eval")])
    assert result.exit_code == 2
    one_sentence(result.stderr, folder, reason)
    assert len(result.stderr.splitlines()) == 1


def test_a_kind_that_cannot_be_used_is_said_before_weights_that_lack(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ernie4_5_vl_moe"}), encoding="utf-8")
    for folder in (tmp_path, adapter):
        with pytest.raises(ModelError, match="Models of type ernie4_5_vl_moe cannot be used"):
            check_checkpoint(str(folder))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}), encoding="utf-8")
    with pytest.raises(ModelError, match="lacks weights"):
        check_checkpoint(str(tmp_path))


def test_the_trainer_and_every_other_loader_refuse(outsider: tuple[str, str], dataset: Dataset, tmp_path: Path) -> None:
    folder, reason = outsider
    for load in (
        lambda: LongVPOTrainer(model=folder, args=trainers.settings(tmp_path), train_dataset=dataset),
        lambda: load_checkpoint(folder, torch.device("cpu")),
    ):
        with pytest.raises(ModelError) as refused:
            load()
        one_sentence(str(refused.value), folder, reason)


def test_a_checkpoint_that_is_not_there_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"The model .*nowhere cannot be loaded"):
        LongVPOTrainer(model=str(tmp_path / "nowhere"), args=trainers.settings(tmp_path), train_dataset=dataset)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.model_type)
def test_the_table_names_what_exists(refused: Any) -> None:
    assert refused.model_type not in {family.model_type for family in families()}
    assert refusal(refused.model_type) == f"Models of type {refused.model_type} cannot be used: {refused.reason}."
    with pytest.raises(ModelError, match="cannot be used"):
        family_of(refused.model_type).frame_shapes(None, 56, 56)
    if refused.processor:
        processor = getattr(transformers, refused.processor)
        assert refusal(object.__new__(processor)) == refusal(refused.model_type)
        with pytest.raises(ModelError, match=rf"^{refused.processor}: Models of type {refused.model_type} cannot"):
            PromptEncoder(object.__new__(processor))


def test_every_video_model_of_transformers_is_of_a_family_or_refused_by_name() -> None:
    takes_videos = {
        name
        for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        if name.endswith("_thinker")  # whose processor goes by the name of the whole model
        or (
            "video_processor" in getattr(transformers, processor).get_attributes()
            if (processor := PROCESSOR_MAPPING_NAMES.get(name))
            else name in VIDEO_PROCESSOR_MAPPING_NAMES
        )
    }
    known = {family.model_type for family in families()}
    assert len(takes_videos) > 35
    assert takes_videos - known == {name for name in takes_videos if refusal(name) is not None}
    assert known <= takes_videos


def test_a_model_that_is_loaded_already_is_refused_by_its_config(dataset: Dataset, tmp_path: Path) -> None:
    """With a processor that a family has too."""
    model, processor = tiny_models.build("qwen3_vl")
    model.config.model_type = "qwen4_exp"
    with pytest.raises(ModelError, match="Models of type qwen4_exp cannot be used: its layers"):
        LongVPOTrainer(model=model, processing_class=processor, args=trainers.settings(tmp_path), train_dataset=dataset)
    with pytest.raises(ModelError, match="Models of type qwen4_exp cannot be used: its layers"):
        LocalResponder(model, processor, FrameSampler(4))


# ---------------------------------------------------------------------------------------- tried, and found wrong


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-VL, as if no family were of it."""
    others = tuple(family for family in families() if family.model_type != "qwen2_vl")
    monkeypatch.setattr("longvpo_hf.families.families", lambda: others)


def qwen2_vl(
    video_processor: type[Qwen2VLVideoProcessor] = Qwen2VLVideoProcessor, kind: type[Qwen2VLProcessor] | None = None
) -> Any:
    return (kind or Qwen2VLProcessor)(
        Qwen2VLImageProcessor(size=QWEN_SIZE),
        tiny_models._qwen_tokenizer(),
        video_processor(size=QWEN_SIZE, cap_pixels_per_frame=False),
        chat_template=QWEN_TEMPLATE,
    )


@pytest.mark.usefixtures("unknown")
def test_one_that_shows_no_fault_is_taken() -> None:
    assert PromptEncoder(qwen2_vl())._video_settings["size"]["shortest_edge"] == 28 * 28


@pytest.mark.usefixtures("unknown")
def test_one_that_puts_a_start_token_before_every_prompt_is_refused() -> None:
    class Starting(Qwen2VLProcessor):
        def __call__(self, text: list[str], **kwargs: Any) -> Any:
            return super().__call__(text=["<|im_end|>" + each for each in text], **kwargs)

    with pytest.raises(ModelError, match=r"Starting .* makes other tokens of a second prompt"):
        PromptEncoder(qwen2_vl(kind=Starting))


@pytest.mark.usefixtures("unknown")
def test_one_whose_spacing_does_not_follow_the_times_is_refused() -> None:
    class Hurried(Qwen2VLProcessor):
        def __call__(self, **kwargs: Any) -> Any:
            return {**super().__call__(**kwargs), "video_second_per_grid": torch.tensor([1.0])}

    with pytest.raises(ModelError, match=r"Hurried .* its video_second_per_grid does not follow the times"):
        PromptEncoder(qwen2_vl(kind=Hurried))


def test_one_whose_tile_is_none_is_refused() -> None:
    class Growing(type(tiny_models.build("internvl")[1].video_processor)):  # type: ignore[misc]
        def _preprocess(self, videos: list[torch.Tensor], **kwargs: Any) -> Any:
            size = type(kwargs["size"])(height=videos[0].shape[-2] // 2, width=videos[0].shape[-1] // 2)
            return super()._preprocess(videos, **{**kwargs, "size": size})

    processor = tiny_models.build("internvl")[1]
    processor.video_processor.__class__ = Growing
    processor.__class__ = type("Unknown", (type(processor),), {})
    encoder = object.__new__(PromptEncoder)
    encoder.processor, encoder._family, encoder._video_settings = processor, family_of("teapot"), {}
    encoder._control_tokens, encoder.switch = control_tokens(processor.tokenizer), {}
    assert "reads like one tile, but larger frames became more pixels" in str(_reason_in_trial(encoder))


def test_hyperclovax_fills_in_the_duration_for_one_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its refusal says: a second prompt about the video finds no duration."""
    monkeypatch.setattr("longvpo_hf.families.encoding.refusal", lambda source: None)
    processor = HyperCLOVAXVisionV2Processor(
        Qwen2VLImageProcessor(size=QWEN_SIZE),
        tiny_models._qwen_tokenizer(),
        Qwen2VLVideoProcessor(size=QWEN_SIZE, cap_pixels_per_frame=False),
        chat_template=QWEN_TEMPLATE,
    )
    PromptEncoder(processor)
    processor.chat_template = QWEN_TEMPLATE.replace("<|video_pad|>", "<|video_pad|><|video_duration|>")
    with pytest.raises(ModelError, match="a trial on two small videos failed: it ended with StopIteration"):
        PromptEncoder(processor)


@pytest.mark.usefixtures("unknown")
def test_a_grid_that_departs_from_the_frames_size_is_refused() -> None:
    class Halving(Qwen2VLVideoProcessor):
        def _preprocess(self, videos: list[torch.Tensor], **kwargs: Any) -> Any:
            return super()._preprocess([video[..., ::2, ::2] for video in videos], **kwargs)

    with pytest.raises(
        ModelError, match=r"frames of \(112, 112\) pixels became \[\[4, 4\]\] patches, expected \[8, 8\]"
    ):
        PromptEncoder(qwen2_vl(Halving))


@pytest.mark.usefixtures("unknown")
def test_one_that_fails_is_refused_with_its_error() -> None:
    class Failing(Qwen2VLVideoProcessor):
        def _preprocess(self, videos: list[torch.Tensor], **kwargs: Any) -> Any:
            raise KeyError("grid")

    with pytest.raises(ModelError, match="it ended with KeyError: 'grid'"):
        PromptEncoder(qwen2_vl(Failing))
