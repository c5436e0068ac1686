"""The miniature's model around a pretrained language model: what it reads, what it learns, and what stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from longvpo_hf.errors import ModelError
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.frames import FrameSampler
from longvpo_hf.miniature import model as tiny
from longvpo_hf.miniature import pretrained
from longvpo_hf.miniature.language import SENTENCES
from longvpo_hf.miniature.pretrained import TOKENS_PER_FRAME, align, build_model, build_processor
from longvpo_hf.miniature.pretraining import TextCoder, answer_losses
from longvpo_hf.miniature.settings import AlignmentSettings
from longvpo_hf.miniature.world import MARKERS, WorldClip, write_world
from longvpo_hf.responders import LocalResponder, Request
from longvpo_hf.timeline import Timeline
from small_english import END, write_language_model

FAST = replace(AlignmentSettings.fast(), projector_steps=10, steps=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model."""
    return write_language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[WorldClip], torch.Tensor]:
    """A world, and one frame of each clip."""
    clips = write_world(tmp_path_factory.mktemp("world"), 128, seed=1)
    sampler = FrameSampler(8, fps=1)
    return clips, torch.stack([sampler(Timeline((item.clip,))).pixels for item in clips])


@pytest.fixture(scope="module")
def processor(folder: Path) -> InternVLProcessor:
    return build_processor(AutoTokenizer.from_pretrained(folder))


def built(folder: Path, processor: InternVLProcessor) -> InternVLForConditionalGeneration:
    """The model before it has learnt to see."""
    seeing = tiny.build_model(tiny.build_processor(), seed=1)
    return build_model(processor, AutoModelForCausalLM.from_pretrained(folder), seeing, seed=1)


@pytest.mark.parametrize("num_frames", [1, 3])
def test_a_video_is_four_tokens_a_frame_in_the_language_model_s_own_chat(
    processor: InternVLProcessor, num_frames: int
) -> None:
    question = SENTENCES.question(MARKERS[9])
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    video = torch.zeros(num_frames, 3, 32, 32, dtype=torch.uint8)
    encoded = processor(text=text, videos=[video], return_tensors="pt")
    shown = f"<img>{'<IMG_CONTEXT>' * TOKENS_PER_FRAME * num_frames}</img>\n"
    assert processor.tokenizer.decode(encoded["input_ids"][0]) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{shown}{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert TextCoder(processor).prompt_ids(num_frames, question) == encoded["input_ids"][0].tolist()


def test_alignment_trains_the_tokens_that_the_trainer_scores(processor: InternVLProcessor) -> None:
    """With the end of the turn and the line's end after it: otherwise a reference scores that by chance."""
    coder, encoder = TextCoder(processor), PromptEncoder(processor)
    for answer in (
        SENTENCES.answer("red"),
        SENTENCES.pair_answer("blue", "pink"),
        SENTENCES.caption(MARKERS[3], "red"),
    ):
        ids = coder.answer_ids(answer)
        assert ids == encoder.encode_answer(SENTENCES.question(MARKERS[9]), answer)
        assert processor.tokenizer.decode(ids) == f"{answer}{END}\n"
        assert len(ids) <= SENTENCES.max_answer_tokens


def test_padding_is_no_end_of_a_turn(processor: InternVLProcessor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.eos_token == END


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    plain = write_language_model(tmp_path, chat_template=None)
    with pytest.raises(ModelError, match="has no chat template: name an instruction-tuned one"):
        build_processor(AutoTokenizer.from_pretrained(plain))


def test_the_language_model_is_inside_as_it_was(folder: Path, processor: InternVLProcessor) -> None:
    model = built(folder, processor)
    alone = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(SENTENCES.question(MARKERS[5]))["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits[..., : len(alone.lm_head.weight)], alone(input_ids=ids).logits)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    seeing = tiny.build_model(tiny.build_processor(), seed=1).model.vision_tower.state_dict()
    assert all(torch.equal(weight, seeing[name]) for name, weight in model.model.vision_tower.state_dict().items())


@pytest.fixture(scope="module")
def aligned(
    folder: Path, processor: InternVLProcessor, world: tuple[list[WorldClip], torch.Tensor]
) -> tuple[InternVLForConditionalGeneration, InternVLForConditionalGeneration, object]:
    """Before and after, and how it went."""
    before, after = built(folder, processor), built(folder, processor)
    history = align(after, processor, world[1], world[0], 1, FAST)
    return before, after, history


def test_alignment_changes_projector_and_linear_layers_and_nothing_else(aligned) -> None:
    before, after = (model.state_dict() for model in aligned[:2])
    assert before.keys() == after.keys()  # adapters are merged
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if "language_model.layers" in name and "_proj.weight" in name}
    projector = {name for name in before if "multi_modal_projector" in name}
    assert linear <= changed <= linear | projector
    assert not any(parameter.requires_grad for parameter in aligned[1].parameters())
    assert len(aligned[2].losses) == FAST.steps
    assert not aligned[1].training


@pytest.mark.parametrize("is_half", [True, False])
def test_it_is_aligned_in_half_precision_where_that_is_computed(
    folder: Path,
    processor: InternVLProcessor,
    world: tuple[list[WorldClip], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    is_half: bool,
) -> None:
    """Where it is not, one step of the real one took three minutes."""
    seen = set()

    def losses(*given: Any) -> Any:
        seen.add(torch.is_autocast_enabled("cpu"))
        return answer_losses(*given)

    monkeypatch.setattr(pretrained, "is_computed", lambda dtype: is_half)
    monkeypatch.setattr(pretrained, "answer_losses", losses)
    align(built(folder, processor), processor, world[1], world[0], 1, FAST)
    assert seen == {is_half}


def test_a_seed_decides_everything(
    aligned, folder: Path, processor: InternVLProcessor, world: tuple[list[WorldClip], torch.Tensor]
) -> None:
    again, other = built(folder, processor), built(folder, processor)
    assert align(again, processor, world[1], world[0], 1, FAST) == aligned[2]
    assert align(other, processor, world[1], world[0], 2, FAST) != aligned[2]
    after = aligned[1].state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in again.state_dict().items())


def test_the_projector_learns_words_and_adapters_learn_answers(
    folder: Path, processor: InternVLProcessor, world: tuple[list[WorldClip], torch.Tensor]
) -> None:
    """From an untrained tower, in which colours are still told apart; the chance of a word is ⅛."""
    model = built(folder, processor)
    settings = replace(FAST, projector_steps=150, projector_frames=64, steps=25, videos=4, warmup_steps=3, lora_rank=8)
    history = align(model, processor, world[1], world[0], 1, replace(settings, learning_rate=1e-2))
    assert min(history.words_right) > 0.3
    assert sum(history.losses[-5:]) / 5 < 0.85 * sum(history.losses[:2]) / 2


def test_saved_it_answers_through_a_responder(
    aligned, processor: InternVLProcessor, world: tuple[list[WorldClip], torch.Tensor], tmp_path: Path
) -> None:
    aligned[1].save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    responder = LocalResponder(
        loaded, AutoProcessor.from_pretrained(tmp_path), FrameSampler(8, fps=1), max_new_tokens=6, name="pretrained"
    )
    timelines = [Timeline(tuple(item.clip for item in world[0][:number])) for number in (1, 3)]
    answers = responder.respond([Request(SENTENCES.caption_question, timeline) for timeline in timelines])
    # By hand: greedy, one token after another, from what the processor makes of the same frames.
    for timeline, answer in zip(timelines, answers, strict=True):
        ids = TextCoder(processor).prompt_ids(len(timeline.clips), SENTENCES.caption_question)
        pixels = tiny_pixels(processor, FrameSampler(8, fps=1)(timeline).pixels)
        said: list[int] = []
        with torch.no_grad():
            while len(said) < 6 and (not said or said[-1] != processor.tokenizer.eos_token_id):
                logits = aligned[1](input_ids=torch.tensor([ids + said]), pixel_values=pixels).logits
                said.append(int(logits[0, -1].argmax()))
        assert answer == processor.tokenizer.decode(said, skip_special_tokens=True).strip()


def tiny_pixels(processor: InternVLProcessor, frames: torch.Tensor) -> torch.Tensor:
    return processor.video_processor(videos=[frames], return_tensors="pt")["pixel_values_videos"].flatten(0, 1)
