"""Frames through every family's own processor: its own ids, the frames' real times and pixel budget."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaNextVideoVideoProcessor
from transformers.video_utils import VideoMetadata

import tiny_models
from longvpo_hf.families import family_of
from longvpo_hf.families.encoding import PromptEncoder, concatenate_visuals, visual_shapes
from longvpo_hf.families.frame_sizes import grid_settings as grid_settings_of
from longvpo_hf.families.positions import prompt_positions
from longvpo_hf.frames import Frames

torch.set_num_threads(1)

FAMILIES = list(tiny_models.ALL)
GRIDDED = [name for name in FAMILIES if family_of(name).video_settings is grid_settings_of]
#: Families that scale every frame to one tile.
TILED = [name for name in FAMILIES if not family_of(name).is_sized_by_frames]
NEAR_BOUND_SECONDS = (0.5, 1.5, 4.25, 4.75, 9.0, 61.5)  # not uniform, and past a minute
QUESTIONS = ["What is it?", "  two spaces", "\n\nlines", "", "Wer weiß?", "Frame3: >img<", "<imend>?", ":"]


@functools.cache
def family(name: str) -> tuple[Any, Any]:
    """Model and processor, shared: no test changes them."""
    return tiny_models.build(name)


def make_frames(
    seconds: tuple[float, ...] = NEAR_BOUND_SECONDS, size: tuple[int, int] = (56, 56), duration: float = 70.0
) -> Frames:
    noise = torch.Generator().manual_seed(len(seconds))
    pixels = torch.randint(0, 256, (len(seconds), 3, *size), dtype=torch.uint8, generator=noise)
    return Frames(pixels, seconds, (0,) * len(seconds), duration)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def own(processor: Any, videos: Frames | list[Frames], conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
    """The processor's own output for one or more videos, told the frames' times by a clock of milliseconds."""
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    videos = [videos] if isinstance(videos, Frames) else videos
    metadata = [
        VideoMetadata(
            total_num_frames=round(frames.duration_seconds * 1000),
            fps=1000,
            duration=frames.duration_seconds,
            frames_indices=[round(seconds * 1000) for seconds in frames.timeline_seconds],
        )
        for frames in videos
    ]
    return processor(
        text=[text] * len(videos),
        videos=[frames.pixels for frames in videos],
        video_metadata=metadata,
        do_sample_frames=False,
        return_tensors="pt",
        add_special_tokens=False,
        **kwargs,
    )


def rendered(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What a person would write for the processor: the video first in the first user message."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return [
        {
            "role": message["role"],
            "content": [{"type": "video"}] * (i == first) + [{"type": "text", "text": message["content"]}],
        }
        for i, message in enumerate(messages)
    ]


# ------------------------------------------------------------------------------------ the processor's own output


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_every_prompt_is_what_the_processor_itself_makes_of_it(name: str, count: int) -> None:
    _, processor = family(name)
    frames = make_frames(NEAR_BOUND_SECONDS[:count])
    conversations = [[user(question)] for question in QUESTIONS]
    conversations += [[{"role": "system", "content": "Be brief."}, user("Who?")]]
    conversations += [[user("Who?"), {"role": "assistant", "content": "Me."}, user("And then?")]]
    encoded = PromptEncoder(processor).encode(frames, conversations)
    padded = frames
    if count == 1 and refuses_a_single_frame(name):  # two equal ones at one time are the same to it
        padded = Frames(frames.pixels.repeat(2, 1, 1, 1), frames.timeline_seconds * 2, (0, 0), frames.duration_seconds)
    for i, conversation in enumerate(conversations):
        expected = own(processor, padded, rendered(conversation), **own_settings(name, frames))
        assert encoded.input_ids[i] == expected["input_ids"][0].tolist()
        if "mm_token_type_ids" in expected:
            assert encoded.mm_token_type_ids is not None
            assert encoded.mm_token_type_ids[i] == expected["mm_token_type_ids"][0].tolist()
        for key, value in encoded.visual.items():
            assert torch.equal(value, expected[key]), key
    visual = set(expected) - {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert set(encoded.visual) == visual
    if "mm_token_type_ids" not in expected:
        assert encoded.mm_token_type_ids is None


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_that_repeat_are_what_the_processor_makes_of_them(name: str) -> None:
    """VideoLLaMA3's leaves out tokens that do not change."""
    _, processor = family(name)
    frames = make_frames()
    frames.pixels[2:5] = frames.pixels[1]
    encoded = PromptEncoder(processor).encode(frames, [[user("Who?")], [user("What?")]])
    for question, ids in zip(("Who?", "What?"), encoded.input_ids, strict=True):
        expected = own(processor, frames, rendered([user(question)]), **own_settings(name, frames))
        assert ids == expected["input_ids"][0].tolist()
    moving = PromptEncoder(processor).encode(make_frames(), [[user("Who?")]])
    assert (len(encoded.input_ids[0]) < len(moving.input_ids[0])) == (name == "video_llama_3")


def refuses_a_single_frame(name: str) -> bool:
    _, processor = family(name)
    try:
        own(processor, make_frames((0.5,)), rendered([user("?")]))
    except ValueError:
        return True
    return False


def own_settings(name: str, frames: Frames) -> dict[str, Any]:
    """Sizes that leave 56 × 56 as it is, up to the family's grid or tile, and the frames' rate where it is told."""
    if name == "llava_next_video":
        return {"size": {"height": 56, "width": 56}, "do_center_crop": False}
    if name not in GRIDDED:
        return {}
    settings: dict[str, Any] = {"size": {"shortest_edge": 28 * 28, "longest_edge": 10**9}}
    if "cap_pixels_per_frame" in family(name)[1].video_processor.valid_kwargs.__annotations__:
        settings["cap_pixels_per_frame"] = False
    if family_of(name).takes_frame_rate:
        settings["fps"] = len(frames.timeline_seconds) / frames.duration_seconds
    return settings


def grid_px(name: str) -> int:
    """What a frame's sides are rounded to: patch × merge."""
    video_processor = family(name)[1].video_processor
    return video_processor.patch_size * video_processor.merge_size


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_a_template_may_write_before_the_video_and_put_it_last(name: str) -> None:
    _, processor = family(name)
    template = processor.chat_template
    text_then_video = template.replace(
        "message['content'] %}{% if part", "message['content'] | reverse %}{% if part"
    ).replace("<|im_start|>{{ message['role'] }}", "Watch now:{{ message['role'] }}")
    assert text_then_video.count("reverse") == text_then_video.count("Watch now") == 1
    frames = make_frames()
    try:
        processor.chat_template = text_then_video
        encoded = PromptEncoder(processor).encode(frames, [[user(question)] for question in QUESTIONS])
        for question, ids in zip(QUESTIONS, encoded.input_ids, strict=True):
            expected = own(processor, frames, rendered([user(question)]), **own_settings(name, frames))
            assert ids == expected["input_ids"][0].tolist()
    finally:
        processor.chat_template = template
    text = processor.tokenizer.decode(encoded.input_ids[0])
    assert text.startswith("Watch now:user\nWhat is it?")
    assert processor.tokenizer.decode(encoded.input_ids[4]).startswith("Watch now:user\nWer weiß?")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_video_is_processed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = family(name)
    calls = []
    preprocess = type(processor.video_processor)._preprocess

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return preprocess(self, *args, **kwargs)

    monkeypatch.setattr(type(processor.video_processor), "_preprocess", counted)
    PromptEncoder(processor).encode(make_frames(), [[user(question)] for question in QUESTIONS])
    assert len(calls) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_without_a_video(name: str) -> None:
    _, processor = family(name)
    encoded = PromptEncoder(processor).encode(None, [[user("Who?")], [user("What?")]])
    assert encoded.visual == {}
    texts = [processor.tokenizer.decode(ids) for ids in encoded.input_ids]
    head, tail = turn(name)
    assert texts == [f"{head}{question}{tail}" for question in ("Who?", "What?")]
    if encoded.mm_token_type_ids is not None:
        assert encoded.mm_token_type_ids == [[0] * len(ids) for ids in encoded.input_ids]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_answer_are_the_conversation(name: str) -> None:
    _, processor = family(name)
    encoder = PromptEncoder(processor)
    ids = encoder.encode(make_frames(), [[user("Who?")]]).input_ids[0]
    ids += encoder.encode_answer("Who?", "It's me, Zoë.")
    space, end = (" ", "<end_of_utterance>\n") if name == "smolvlm" else ("", "<|im_end|>\n")
    assert processor.tokenizer.decode(ids).endswith(f"Who?{turn(name)[1]}{space}It's me, Zoë.{end}")


def test_the_end_of_smolvlms_answer_is_that_of_its_template_for_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = family("smolvlm")
    monkeypatch.setattr(processor, "chat_template", "{{ 'of texts only' }}")
    answer = PromptEncoder(processor).encode_answer("Who?", "Me.")
    assert processor.tokenizer.decode(answer) == " Me.<end_of_utterance>\n"


def turn(name: str) -> tuple[str, str]:
    """What stands before and after a question without a video."""
    if name == "smolvlm":
        return "<|im_start|>User: ", "<end_of_utterance>\nAssistant:"
    start = "<|im_end|>" if name == "molmo2" else ""  # its processor puts one before every prompt
    return f"{start}<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


# -------------------------------------------------------------------------------------------------------- times


def seconds_written(name: str, frames: Frames) -> list[str]:
    """The times a family wrote into the prompt."""
    _, processor = family(name)
    encoded = PromptEncoder(processor).encode(frames, [[user("When?")]])
    text = processor.tokenizer.decode(encoded.input_ids[0])
    return re.findall(r"<(\d+\.\d) seconds>|Frame from (\d\d:\d\d):", text)


def test_qwen3_writes_the_mean_time_of_each_pair_of_frames() -> None:
    times = [seconds for seconds, _ in seconds_written("qwen3_vl", make_frames())]
    # (0.5 + 1.5) / 2, (4.25 + 4.75) / 2, (9 + 61.5) / 2 = 35.25, to a tenth: Python rounds the half to even
    assert times == ["1.0", "4.5", "35.2"]
    odd = [seconds for seconds, _ in seconds_written("qwen3_vl", make_frames(NEAR_BOUND_SECONDS[:3]))]
    assert odd == ["1.0", "4.2"]  # the last frame stands for its pair: 4.25
    assert [seconds for seconds, _ in seconds_written("qwen3_vl", make_frames((3.3,)))] == ["3.3"]


def test_video_llama_3_writes_tenths_of_a_second_before_each_frame() -> None:
    _, processor = family("video_llama_3")
    text = processor.tokenizer.decode(PromptEncoder(processor).encode(make_frames(), [[user("?")]]).input_ids[0])
    assert re.findall(r"Time (\d+\.\d)s:<", text) == [
        "0.5",
        "1.5",
        "4.2",
        "4.8",
        "9.0",
        "61.5",
    ]  # 4.25 and 4.75 to even


def test_lfm3_writes_the_mean_time_of_each_pair_of_frames() -> None:
    assert [seconds for seconds, _ in seconds_written("lfm3_vl", make_frames())] == ["1.0", "4.5", "35.2"]


@pytest.mark.parametrize(
    ("name", "expected"), [("glm4v", ["0", "4", "9"]), ("glm46v", ["0.5 seconds", "4.2 seconds", "9.0 seconds"])]
)
def test_glm_writes_the_time_of_the_first_of_each_pair_after_it(name: str, expected: list[str]) -> None:
    _, processor = family(name)
    text = processor.tokenizer.decode(PromptEncoder(processor).encode(make_frames(), [[user("?")]]).input_ids[0])
    assert re.findall(r"<\|end_of_image\|>([^<]+)<", text) == expected


def test_molmo2_writes_tenths_of_a_second_before_each_frame() -> None:
    _, processor = family("molmo2")
    text = processor.tokenizer.decode(PromptEncoder(processor).encode(make_frames(), [[user("?")]]).input_ids[0])
    assert re.findall(r"(\d+\.\d) <frame_start>", text) == ["0.5", "1.5", "4.2", "4.8", "9.0", "61.5"]


def test_gemma_4_writes_whole_seconds_before_each_frame() -> None:
    _, processor = family("gemma4")
    text = processor.tokenizer.decode(PromptEncoder(processor).encode(make_frames(), [[user("?")]]).input_ids[0])
    assert re.findall(r"(\d\d:\d\d) <\|image>", text) == ["00:00", "00:01", "00:04", "00:04", "00:09", "01:01"]


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_times_reach_the_positions_of_qwens_that_speak(name: str) -> None:
    model, processor = family(name)
    encoded = PromptEncoder(processor).encode(make_frames((0.5, 1.5, 2.5, 3.5), duration=4.0), [[user("When?")]])
    assert encoded.visual["video_second_per_grid"].tolist() == [2.0]
    positions = prompt_positions(model, {"input_ids": torch.tensor(encoded.input_ids)}, encoded.visual)
    times = positions[0][torch.tensor(encoded.input_ids[0]) == processor.video_token_id]
    # 25 positions a second (position_id_per_seconds) and 2 s between grid steps
    assert (times - times[0]).tolist() == [0] * 4 + [50] * 4


def test_smolvlm_writes_whole_seconds_and_the_duration() -> None:
    frames = make_frames()
    assert [clock for _, clock in seconds_written("smolvlm", frames)] == [
        "00:00", "00:01", "00:04", "00:04", "00:09", "01:01",
    ]  # fmt: skip
    _, processor = family("smolvlm")
    ids = PromptEncoder(processor).encode(frames, [[user("When?")]]).input_ids[0]
    assert "series of 6 frames from a 0:01:10 [H:MM:SS] video" in processor.tokenizer.decode(ids)


@pytest.mark.parametrize(("count", "expected"), [(1, 140.0), (2, 70.0), (5, 28.0), (6, 70 / 3)])
def test_qwen2_5_has_the_mean_spacing_of_two_frames(count: int, expected: float) -> None:
    _, processor = family("qwen2_5_vl")
    visual = PromptEncoder(processor).encode(make_frames(NEAR_BOUND_SECONDS[:count]), [[user("When?")]]).visual
    # 70 s of `count` frames, 2 frames a grid step
    assert visual["second_per_grid_ts"].tolist() == pytest.approx([expected])
    assert visual["video_grid_thw"][0, 0] == (count + 1) // 2


def test_times_reach_the_positions_of_qwen2_5() -> None:
    model, processor = family("qwen2_5_vl")
    frames = make_frames((0.5, 1.5, 2.5, 3.5), duration=4.0)
    encoded = PromptEncoder(processor).encode(frames, [[user("When?")]])
    types = torch.tensor(encoded.mm_token_type_ids)
    positions, _ = model.base_model.get_rope_index(torch.tensor(encoded.input_ids), types, **grids(encoded.visual))
    times = positions[0, 0][types[0] == 2]
    # 2 positions a second (tokens_per_second) and 2 s between grid steps: the second pair of frames is 4 later
    assert (times - times[0]).tolist() == [0] * 4 + [4] * 4


def grids(visual: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: visual[name] for name in ("video_grid_thw", "second_per_grid_ts")}


# ------------------------------------------------------------------------------------------------- pixel budget


@pytest.mark.parametrize("name", GRIDDED)
@pytest.mark.parametrize(("count", "size"), [(1, (20, 20)), (3, (100, 200)), (40, (96, 160)), (2, (448, 448))])
def test_a_patch_grid_only_rounds_the_frames(name: str, count: int, size: tuple[int, int]) -> None:
    _, processor = family(name)
    grid, patch = grid_px(name), processor.video_processor.patch_size
    frames = make_frames(tuple(i + 0.5 for i in range(count)), size, duration=float(count))
    t, h, w = PromptEncoder(processor).encode(frames, [[user("?")]]).visual["video_grid_thw"][0].tolist()
    assert t == -(-count // processor.video_processor.temporal_patch_size)
    assert [h * patch, w * patch] == [max(1, round(side / grid)) * grid for side in size]


def test_the_processors_own_bounds_would_have_changed_the_size() -> None:
    """The frames above are such that the test before this one can fail."""
    for name in GRIDDED:
        _, processor = family(name)
        frames = make_frames(tuple(i + 0.5 for i in range(40)), (96, 160), duration=40.0)
        theirs = own(processor, frames, rendered([user("?")]))["video_grid_thw"][0, 1:].prod()
        ours = PromptEncoder(processor).encode(frames, [[user("?")]]).visual["video_grid_thw"][0, 1:].prod()
        assert theirs != ours


@pytest.mark.parametrize("name", TILED)
def test_a_fixed_tile_is_the_processors_own(name: str) -> None:
    _, processor = family(name)
    visual = PromptEncoder(processor).encode(make_frames(size=(40, 120)), [[user("?")]]).visual
    pixels = visual.get("pixel_values", visual.get("pixel_values_videos"))
    assert pixels is not None
    assert pixels.shape[-4:] == (6, 3, 56, 56) or pixels.shape == (6, 4 * 4, 3 * 14 * 14)  # frames, or their patches


# ---------------------------------------------------------------------------------------------- several videos


@pytest.mark.parametrize("name", FAMILIES)
def test_videos_of_equal_shapes_go_into_one_call(name: str) -> None:
    _, processor = family(name)
    encoder = PromptEncoder(processor)
    counts = (2, 4, 2)
    visuals = [encoder.encode(make_frames(NEAR_BOUND_SECONDS[:count]), [[user("?")]]).visual for count in counts]
    assert visual_shapes(visuals[0]) == visual_shapes(visuals[2])
    together = concatenate_visuals([visuals[0], visuals[2]])
    both = [make_frames(NEAR_BOUND_SECONDS[:count]) for count in counts[::2]]
    expected = own(processor, both, rendered([user("?")]), padding=True, **own_settings(name, both[0]))
    for key, value in together.items():
        assert torch.equal(value, expected[key]), key
    # [videos, frames, …] needs equal numbers of frames; flat patches and tiles do not.
    by_frames = any(tensor.ndim == 5 for tensor in visuals[0].values())
    assert (visual_shapes(visuals[0]) != visual_shapes(visuals[1])) == by_frames
    assert concatenate_visuals([]) == {}


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def own_processor() -> Any:
    """One that a test may change."""
    return tiny_models.build("llava_onevision")[1]


def test_a_processor_without_video_is_named_with_all_it_lacks(own_processor: Any) -> None:
    own_processor.video_processor = None
    own_processor.video_token = None
    own_processor.chat_template = None
    with pytest.raises(
        ValueError, match=r"LlavaOnevisionProcessor .* lacks a video_processor .*; a video_token; a chat"
    ):
        PromptEncoder(own_processor)


def test_a_template_that_forgets_the_video_is_refused(own_processor: Any) -> None:
    own_processor.chat_template = own_processor.chat_template.replace("<video>\n", "")
    with pytest.raises(
        ValueError,
        match=r"lacks a chat template that writes '<video>' once for a video: it writes '<\|im_start\|>user\\n\?",
    ):
        PromptEncoder(own_processor)


def test_a_video_processor_that_crops_is_refused(own_processor: Any) -> None:
    own_processor.video_processor = LlavaNextVideoVideoProcessor()
    with pytest.raises(ValueError, match=r"LlavaNextVideoVideoProcessor has size=.*do_center_crop=True"):
        PromptEncoder(own_processor)


def test_a_processor_that_writes_no_video_tokens_is_refused(own_processor: Any) -> None:
    from transformers import ProcessorMixin

    class Foreign(type(own_processor)):  # type: ignore[misc]
        replace_video_token = ProcessorMixin.replace_video_token

    own_processor.__class__ = Foreign
    with pytest.raises(
        ValueError, match=r"^Foreign cannot be given frames and questions: it lacks replace_video_token"
    ):
        PromptEncoder(own_processor)


def test_a_template_that_rewrites_the_prompt_is_refused(own_processor: Any) -> None:
    own_processor.chat_template = "{{ messages | length }}" + own_processor.chat_template
    with pytest.raises(ValueError, match="renders a prompt differently once an answer follows"):
        PromptEncoder(own_processor).encode_answer("Who?", "Me.")


def test_a_prompt_about_a_video_needs_a_user() -> None:
    encoder = PromptEncoder(family("internvl")[1])
    with pytest.raises(ValueError, match=r"needs a user message, got roles \['system'\]"):
        encoder.encode(make_frames(), [[{"role": "system", "content": "Hi"}]])
