"""The miniature's pretraining: its shortcuts give what the processor and the model give, and it learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchcodec.decoders import VideoDecoder

from longvpo_hf.miniature.language import WORDS
from longvpo_hf.miniature.model import build_model, build_processor
from longvpo_hf.miniature.pretraining import (
    PairSampler,
    PretrainingSettings,
    TextCoder,
    answer_losses,
    ask_two,
    frame_features,
    pixel_values,
    pretrain,
)
from longvpo_hf.miniature.world import WorldClip, write_world

SHORT = PretrainingSettings(
    naming_steps=3, naming_clips=8, recall_search_steps=3, recall_videos=4, recall_steps=3, warmup_steps=2
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These matrices are too small to share: several threads only wait for one another."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[WorldClip], torch.Tensor]:
    clips = write_world(tmp_path_factory.mktemp("world"), 256, seed=1)
    frames = []
    for path in dict.fromkeys(clip.clip.path for clip in clips):
        starts = [clip.clip.start_seconds for clip in clips if clip.clip.path == path]
        centres = [start + offset for start in starts for offset in (0.25, 0.75)]
        frames.append(VideoDecoder(path).get_frames_played_at(centres).data.reshape(-1, 2, 3, 32, 32))
    return clips, torch.cat(frames)


def _texts(clip: WorldClip) -> tuple[tuple[str, str], tuple[str, str]]:
    """The question about the clip's colour and the one for its caption, each with its answer."""
    asked = f"what colour in the {clip.marker} clip ?"
    return (asked, clip.colour), (WORDS.caption_question, f"{clip.marker} , {clip.colour}")


@pytest.mark.parametrize("num_clips", [1, 2, 5])
def test_the_fast_path_gives_what_the_processor_gives(
    world: tuple[list[WorldClip], torch.Tensor], num_clips: int
) -> None:
    clips, frames = world
    processor = build_processor()
    coder = TextCoder(processor)
    video = frames[:num_clips].flatten(0, 1)
    for question, answer in _texts(clips[0]):
        messages = [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        text = processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        encoded = processor(text=text, videos=[video], return_tensors="pt")
        assert coder.prompt_ids(len(video), question) == encoded["input_ids"][0].tolist()
        assert torch.equal(pixel_values(processor, frames[:num_clips]), encoded["pixel_values"])
        whole = processor(text=processor.apply_chat_template(messages, tokenize=False), videos=[video])
        assert coder.prompt_ids(len(video), question) + coder.answer_ids(answer) == whole["input_ids"][0]


def test_the_loss_is_the_models_own(world: tuple[list[WorldClip], torch.Tensor]) -> None:
    clips, frames = world
    processor = build_processor()
    model = build_model(processor, seed=1).eval()
    coder = TextCoder(processor)
    texts = [_texts(clips[0])[0], _texts(clips[1])[1]]
    rows = [(coder.prompt_ids(2, question), coder.answer_ids(answer)) for question, answer in texts]
    with torch.no_grad():
        fast = answer_losses(model, rows, frame_features(model, processor, frames[:2]))
        assert [len(losses) for losses in fast] == [len(answer) for _, answer in rows]
        for index, (prompt, answer) in enumerate(rows):
            own = model(
                input_ids=torch.tensor([prompt + answer]),
                labels=torch.tensor([[-100] * len(prompt) + answer]),
                pixel_values=pixel_values(processor, frames[index : index + 1]),
            )
            torch.testing.assert_close(fast[index].mean(), own.loss)


def test_it_learns(world: tuple[list[WorldClip], torch.Tensor]) -> None:
    clips, frames = world
    processor = build_processor()
    model = build_model(processor, seed=1)
    history = pretrain(
        model,
        processor,
        frames,
        clips,
        seed=1,
        settings=replace(PretrainingSettings.fast(), naming_steps=30, naming_clips=32),
    )
    assert history.naming_losses[0] > np.log(len(processor.tokenizer)) - 1
    # Without a look at the frames 64 markers and 8 colours are guessed; per token of 4-token captions, 2-token colours.
    blind_loss = (0.6 * (np.log(64) + np.log(8)) + 0.4 * np.log(8)) / (0.6 * 4 + 0.4 * 2)
    assert np.mean(history.naming_losses[-5:]) < blind_loss - 0.1
    assert len(history.recall_losses) == 15
    assert not model.training


def test_a_seed_decides_everything(world: tuple[list[WorldClip], torch.Tensor]) -> None:
    clips, frames = world
    processor = build_processor()
    histories = [pretrain(build_model(processor, seed=1), processor, frames, clips, seed, SHORT) for seed in (1, 1, 2)]
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]


def test_recall_leaves_vision_as_naming_left_it(world: tuple[list[WorldClip], torch.Tensor]) -> None:
    clips, frames = world
    processor = build_processor()
    model = build_model(processor, seed=1)
    before = frame_features(model, processor, frames[:4])
    embedding = model.lm_head.weight.detach().clone()
    pretrain(model, processor, frames, clips, 1, replace(SHORT, naming_steps=0))
    assert torch.equal(frame_features(model, processor, frames[:4]), before)
    assert not torch.equal(model.lm_head.weight, embedding)


def test_recall_settles_once_it_is_found(world: tuple[list[WorldClip], torch.Tensor]) -> None:
    clips, frames = world
    processor = build_processor()
    lengths = []
    for found_loss in (100.0, 0.0):
        settings = replace(SHORT, naming_steps=0, recall_found_loss=found_loss)
        history = pretrain(build_model(processor, seed=1), processor, frames, clips, 1, settings)
        lengths.append(len(history.recall_losses))
    # Two searches, for the clip that is named and for answers about both; each ends at once, or at its bound.
    assert lengths == [2 + SHORT.recall_steps, 2 * SHORT.recall_search_steps + SHORT.recall_steps]


def test_questions_about_two_clips_are_answered_in_the_order_of_asking(
    world: tuple[list[WorldClip], torch.Tensor],
) -> None:
    clips, _ = world
    colour_of = {clip.marker: clip.colour for clip in clips[:2]}
    rng = np.random.default_rng(0)
    seen = set()
    for also_both in (False, True):
        for _ in range(40):
            for kind, asked, answer in ask_two(clips[0], clips[1], also_both, rng, WORDS):
                markers = [word for word in asked.split() if word in colour_of]
                assert answer.split() == [colour_of[marker] for marker in markers]
                assert len(markers) == {"one": 1, "both": 2}[kind]
                seen.add((also_both, *markers))
    first, second = colour_of
    one = {(also_both, marker) for also_both in (False, True) for marker in colour_of}
    assert seen == one | {(True, first, second), (True, second, first)}


@pytest.mark.parametrize("hard_share", [0.0, 1.0])
def test_pairs_differ_and_hard_pairs_share_a_word(
    world: tuple[list[WorldClip], torch.Tensor], hard_share: float
) -> None:
    clips, _ = world
    pairs = PairSampler(clips, np.random.default_rng(0))
    shared = []
    for _ in range(200):
        first, second = (clips[index] for index in pairs.draw(hard_share))
        assert first.marker != second.marker
        shared.append(first.wall == second.wall or first.frame == second.frame)
    assert np.mean(shared) == 1.0 if hard_share else 0.1 < np.mean(shared) < 0.35  # 14 of 63 by chance.


def test_frames_must_belong_to_the_clips(world: tuple[list[WorldClip], torch.Tensor]) -> None:
    clips, frames = world
    processor = build_processor()
    with pytest.raises(ValueError, match=r"256 clips.*got torch.uint8 \[255, 2, 3, 32, 32\]"):
        pretrain(build_model(processor, seed=1), processor, frames[:-1], clips, 1, SHORT)


def test_pairs_need_two_markers(world: tuple[list[WorldClip], torch.Tensor]) -> None:
    clips, frames = world
    processor = build_processor()
    with pytest.raises(ValueError, match="at least 2 markers, got 1"):
        pretrain(build_model(processor, seed=1), processor, frames[:1], clips[:1], 1, SHORT)
