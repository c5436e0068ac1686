"""What every family promises, tried on its tiny model. A new family passes all of it, with no word about it here."""

from __future__ import annotations

import functools
import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.utils import add_fused_lm_head

import tiny_models
import tiny_newer_models
import trainers
from longvpo_hf.errors import ModelError
from longvpo_hf.families import TEXT_LAYERS, families, family_of, vision
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.families.pieces import by_grid
from longvpo_hf.families.positions import prompt_positions, visual_token_ids
from longvpo_hf.families.vision import bound_frozen_forward, vision_tower
from longvpo_hf.frames import Frames, FrameSampler
from longvpo_hf.responders import LocalResponder, Request
from longvpo_hf.timeline import Clip, Timeline, View
from longvpo_hf.training.models import prepare_trees
from longvpo_hf.training.packing import is_tree_packed, plain_forward, tree_forward
from media import write_video

torch.set_num_threads(1)

NAMES = list(tiny_models.ALL)
UNEVEN_SECONDS = (0.5, 1.5, 4.25, 4.75, 9.0, 61.5, 62.0, 80.0)
#: An odd weight that belongs neither to the tower nor to a connector: LLaVA-OneVision's newline.
SINGLE_WEIGHTS = {"model.image_newline"}
#: Parts that no video goes through.
UNUSED_PARTS = ("model.audio_tower.",)
#: Families that are trained without trees, with a word of the reason.
PLAIN_ONLY = {"gemma4": "both directions", "lfm3_vl": "conv", "molmo2": "both directions"}

Row = tuple[int, str, str, str]  # video, question, chosen, rejected
ONE_QUESTION: list[Row] = [(0, "What is it?", "A dog.", "A black cat!")]
THREE_QUESTIONS: list[Row] = [*ONE_QUESTION, (0, "Who?", "Me", "You"), (0, "What then?", "Nothing, it ends.", "x")]
TWO_TIMELINES: list[Row] = [(1, "Where?", "here", "over there"), *THREE_QUESTIONS[:2], (1, "Who?", "Me", "You")]


@functools.cache
def shared(name: str) -> tuple[Any, Any]:
    """Model and processor, for tests that change neither."""
    return tiny_models.build(name)


def make_frames(count: int, size: tuple[int, int] = (56, 56), is_still: bool = False) -> Frames:
    """Noise at uneven times; the second and third frame are the same where it is still."""
    noise = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=noise)
    if is_still and count > 2:
        pixels[2] = pixels[1]
    return Frames(pixels, UNEVEN_SECONDS[:count], (0,) * count, 90.0)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def inputs_of(encoded: Any) -> dict[str, Tensor]:
    types = encoded.mm_token_type_ids
    more = {} if types is None else {"mm_token_type_ids": torch.tensor(types[:1])}
    ids = torch.tensor(encoded.input_ids[:1])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


# ------------------------------------------------------------------------------------------------ finding a family


def test_every_family_has_a_tiny_model() -> None:
    assert sorted(family.model_type for family in families()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_and_a_model_type_lead_to_the_family(name: str) -> None:
    assert family_of(shared(name)[0].config) is family_of(name)
    assert family_of(name).model_type == name


@pytest.mark.parametrize("name", NAMES)
def test_a_processor_or_a_class_derived_from_it_leads_to_what_the_family_says_of_it(name: str) -> None:
    processor = shared(name)[1]
    derived = type("Derived", (type(processor),), {})
    for found in (family_of(processor), family_of(object.__new__(derived))):
        assert found.processor == type(processor).__name__ == family_of(name).processor
        assert found.video_settings is family_of(name).video_settings  # of all families that share the processor


def test_an_unknown_family_gets_what_is_safe_and_its_costs_are_refused_by_name() -> None:
    unknown = family_of("teapot")
    assert (unknown.model_type, unknown.pieces, unknown.adapter_layers) == ("teapot", None, TEXT_LAYERS)
    with pytest.raises(ModelError, match=r"a frame of a 'teapot' costs is not known; known families: .*internvl"):
        unknown.frame_shapes(None, 56, 56)
    for name in NAMES:  # known rules keep frames' sizes for processors of no family too
        video_processor = shared(name)[1].video_processor
        assert unknown.video_settings(video_processor) in (None, family_of(name).video_settings(video_processor))


# ------------------------------------------------------------------------------------------- what the plan must know


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("count", "size"), [(1, (56, 56)), (2, (100, 200)), (5, (40, 120)), (6, (20, 20))])
def test_shapes_are_those_of_the_processors_output(name: str, count: int, size: tuple[int, int]) -> None:
    model, processor = shared(name)
    shapes = family_of(name).frame_shapes(model.config, *size)
    encoded = PromptEncoder(processor).encode(make_frames(count, size), [user("Who?")])
    visual = visual_token_ids(processor)
    assert sum(token in visual for token in encoded.input_ids[0]) == shapes.visual_tokens(count)
    pixels = next(tensor for key, tensor in encoded.visual.items() if key.startswith("pixel_values"))
    assert pixels.numel() == shapes.units(count) * shapes.pixels


@pytest.mark.parametrize("name", NAMES)
def test_a_frames_size_decides_its_tokens_where_the_family_says_so(name: str) -> None:
    family, config = family_of(name), shared(name)[0].config
    tokens = {family.frame_shapes(config, *size).tokens for size in ((112, 112), (448, 448), (100, 448))}
    assert (len(tokens) > 1) == family.is_sized_by_frames


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_those_of_the_tower(name: str) -> None:
    model = shared(name)[0]
    tower = vision_tower(model)
    assert tower is not None
    shapes = family_of(name).frame_shapes(model.config, 56, 56)
    layers = max((part for part in tower.modules() if isinstance(part, nn.ModuleList)), key=len)
    assert sum(number for _, number in shapes.windows) == len(layers)
    widths = {(part.in_features, part.out_features) for part in layers.modules() if isinstance(part, nn.Linear)}
    assert {(shapes.hidden, shapes.mlp), (shapes.mlp, shapes.hidden)} <= widths


@pytest.mark.parametrize("name", NAMES)
def test_tower_connectors_and_text_model_are_all_of_the_model(name: str) -> None:
    model = shared(name)[0]
    parts = [vision_tower(model), model.get_decoder(), model.get_output_embeddings()]
    parts += [model.base_model.get_submodule(connector) for connector in family_of(name).connectors]
    held = {id(weight) for part in parts for weight in part.parameters()}
    left = {key for key, weight in model.named_parameters() if id(weight) not in held}
    assert {key for key in left if not key.startswith(UNUSED_PARTS)} <= SINGLE_WEIGHTS


# ---------------------------------------------------------------------------------------------- layers, and positions


@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_on_every_linear_layer_of_the_text_model_and_no_other(name: str) -> None:
    model = shared(name)[0]
    pattern = re.compile(family_of(name).adapter_layers)
    linear = {key: part for key, part in model.named_modules() if isinstance(part, nn.Linear)}
    text = {id(part) for part in model.get_decoder().modules()}
    gates = model.config.get_text_config().num_attention_heads  # a number a head, or one
    expected = {key for key, part in linear.items() if id(part) in text and part.out_features > gates}
    assert {key for key in linear if pattern.fullmatch(key)} == expected
    assert expected


@pytest.mark.parametrize("name", NAMES)
def test_fsdp_finds_the_layers_it_wraps(name: str) -> None:
    model = shared(name)[0]
    named = list(family_of(name).fsdp_layers) or None
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=named
    )
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert policy is not None
    wrapped = {id(part) for part in model.modules() if policy(part)}
    assert {id(layer) for layer in model.get_decoder().layers} <= wrapped
    tower = vision_tower(model)
    assert tower is not None
    assert any(id(part) in wrapped for part in tower.modules())
    if name == "llava_onevision":  # it names layers itself that its models do not have
        plugin.transformer_cls_names_to_wrap = None
        with pytest.raises(ValueError, match="Could not find the transformer layer class"):
            fsdp2_prepare_auto_wrap_policy(plugin, model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 5])
def test_positions_are_those_that_the_text_model_gets(name: str, count: int) -> None:
    model, processor = shared(name)
    encoded = PromptEncoder(processor).encode(make_frames(count), [user("Who?")])
    inputs = inputs_of(encoded)
    positions = prompt_positions(model, inputs, encoded.visual)
    tokens = inputs["input_ids"].shape[1]
    assert positions.shape == (family_of(name).position_axes, tokens)
    assert prompt_positions(model, inputs, None).tolist() == [list(range(tokens))] * len(positions)
    given: list[Tensor | None] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs.get("position_ids")), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs, **encoded.visual, use_cache=False)
    hook.remove()
    if len(positions) == 1:
        assert given[0] is None or torch.equal(given[0], positions)
    else:
        assert given[0] is not None
        assert torch.equal(given[0][-3:, 0], positions)


# ------------------------------------------------------------------------------------------ the tower, and every frame


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 5])
def test_a_frozen_tower_in_pieces_sees_what_the_whole_sees(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_models.build(name)
    encoder = PromptEncoder(processor)
    encoded = encoder.encode(make_frames(count, (56, 84)), [user("Who?")])
    calls: list[int] = []
    tower: Any = vision_tower(model)
    inner = tower.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)).numel())
        return inner(*args, **kwargs)

    tower.forward = counted

    def logits() -> Tensor:
        return model(**inputs_of(encoded), **encoded.visual).logits.detach()

    whole = logits()
    assert len(calls) == 1
    shapes = family_of(name).frame_shapes(model.config, 56, 84)
    units = shapes.units(count)
    for limit in (1, 2 * shapes.pixels, 3 * shapes.pixels):
        monkeypatch.setattr(vision, "CHUNK_ELEMENTS", limit)
        bound_frozen_forward(model)
        calls.clear()
        assert torch.equal(logits(), whole)  # trained, it is one call
        assert len(calls) == 1
        tower.requires_grad_(False)
        calls.clear()
        torch.testing.assert_close(logits(), whole, rtol=0, atol=1e-5)
        assert sum(calls) == units * shapes.pixels
        assert len(calls) == -(-units // max(1, limit // shapes.pixels))
        tower.requires_grad_(True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 3])
def test_the_model_sees_every_frame(name: str, count: int) -> None:
    model, processor = shared(name)
    frames = make_frames(count)

    def logits(pixels: Tensor) -> Tensor:
        seen = Frames(pixels, frames.timeline_seconds, frames.clip_indices, frames.duration_seconds)
        encoded = PromptEncoder(processor).encode(seen, [user("Who?")])
        with torch.no_grad():
            return model(**inputs_of(encoded), **encoded.visual).logits[0, -1]

    plain = logits(frames.pixels)
    assert plain.isfinite().all()
    for i in range(count):
        changed = frames.pixels.clone()
        changed[i] = 255 - changed[i]
        assert (logits(changed) - plain).abs().max() > 1e-4, f"frame {i} changes nothing"


# --------------------------------------------------------------------------------------------------- tree, and training


def make_batch(processor: Any, rows: Sequence[Row], counts: Sequence[int]) -> dict[str, Any]:
    """A batch as the collator makes it, of videos with these numbers of frames."""
    encoder = PromptEncoder(processor)
    prompts = [
        encoder.encode(make_frames(counts[video], is_still=True), [user(question)]) for video, question, *_ in rows
    ]
    sequences = [
        (prompt, encoder.encode_answer(row[1], row[column]))
        for column in (2, 3)
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    width = max(len(prompt.input_ids[0]) + len(answer) for prompt, answer in sequences)

    def padded(values: Sequence[int]) -> Tensor:
        return F.pad(torch.tensor(values), (0, width - len(values)))

    batch: dict[str, Any] = {
        "input_ids": torch.stack([padded([*prompt.input_ids[0], *answer]) for prompt, answer in sequences]),
        "attention_mask": torch.stack([padded([1] * (len(p.input_ids[0]) + len(a))) for p, a in sequences]),
        "completion_mask": torch.stack([padded([0] * len(p.input_ids[0]) + [1] * len(a)) for p, a in sequences]),
        "videos": [encoder.encode(make_frames(count, is_still=True), [user("")]).visual for count in counts],
        "video_index": torch.tensor([video for video, *_ in rows]),
    }
    if prompts[0].mm_token_type_ids is not None:
        batch["mm_token_type_ids"] = torch.stack([padded(prompt.mm_token_type_ids[0]) for prompt, _ in sequences])
    return batch


def separate_forwards(model: Any, batch: dict[str, Any]) -> Tensor:
    """Log-probs [2B, L - 1] by one unpadded sequence after another, with plain calls of the model."""
    found = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        video = batch["videos"][batch["video_index"][row % len(batch["video_index"])]]
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        inputs = {name: batch[name][row : row + 1, :length] for name in names if name in batch}
        logits = model(**inputs, **video).logits[0, :-1].float()
        scores = logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])[:, 0]
        found.append(F.pad(scores * batch["completion_mask"][row, 1:length], (0, batch["input_ids"].shape[1] - length)))
    return torch.stack(found)


def gradients(model: Any, log_probs: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every token differently."""
    model.zero_grad()
    (log_probs * torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_forwards_agree(
    model: Any, processor: Any, rows: Sequence[Row], counts: Sequence[int], lora: bool, packs: bool = True
) -> None:
    """Log-probabilities and all gradients of plain and separate forwards, and of trees where the model takes them.

    All under activation checkpointing.
    """
    add_fused_lm_head(model)
    if lora:
        layers = family_of(model.config).adapter_layers
        model = get_peft_model(model, LoraConfig(r=2, target_modules=layers, lora_dropout=0.0))
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(weight, std=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    batch = make_batch(processor, rows, counts)
    separate = separate_forwards(model, batch)
    assert separate.abs().max() > 1
    expected = gradients(model, separate)
    if not lora:
        parts = {"tower": vision_tower(model), "text": model.get_decoder()}
        parts |= {name: model.base_model.get_submodule(name) for name in family_of(model.config).connectors}
        for name, part in parts.items():
            assert any(weight.grad is not None and weight.grad.any() for weight in part.parameters()), name
    reason = prepare_trees(model)
    assert (reason is None) == packs, reason
    forwards = (plain_forward, tree_forward) if reason is None else (plain_forward,)
    floor = 0.01 * max(float(gradient.abs().max()) for gradient in expected.values())
    for forward in forwards:
        log_probs = forward(model, batch).log_probs
        torch.testing.assert_close(log_probs, separate, rtol=0, atol=1e-5)
        found = gradients(model, log_probs)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            scale = max(float(gradient.abs().max()), floor)
            assert float((found[key] - gradient).abs().max()) <= 1e-5 * scale, key


@pytest.mark.parametrize(
    ("rows", "counts", "lora"),
    [(ONE_QUESTION, [5], False), (THREE_QUESTIONS, [4], True), (TWO_TIMELINES, [2, 5], False)],
    ids=["one question", "three questions, lora", "two timelines"],
)
@pytest.mark.parametrize("name", NAMES)
def test_tree_plain_and_separate_forwards_agree(name: str, rows: list[Row], counts: list[int], lora: bool) -> None:
    assert_forwards_agree(*tiny_models.build(name), rows, counts, lora, packs=name not in PLAIN_ONLY)


@pytest.mark.parametrize("name", sorted(PLAIN_ONLY))
def test_what_is_trained_without_trees_says_why_and_trains(
    name: str, tmp_path: Path, dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = trainers.make(tmp_path, dataset, name, max_steps=1)
    (said,) = [record.message for record in caplog.records if "Tree packing is off" in record.message]
    assert PLAIN_ONLY[name] in said
    assert not is_tree_packed(trainer.model)


def test_gemma_4_without_attention_in_both_directions_agrees_too() -> None:
    """As the smaller models: causal, with inputs of their own for each layer."""
    torch.manual_seed(0)
    model, processor = tiny_newer_models.gemma4(bidirectional=None, per_layer=8)
    assert family_of("gemma4").plain_only(model.config) is None
    linear = {key for key, part in model.get_decoder().named_modules() if isinstance(part, nn.Linear)}
    pattern = re.compile(family_of("gemma4").adapter_layers)
    assert all(pattern.fullmatch(f"model.language_model.{key}") for key in linear)
    assert_forwards_agree(model, processor, TWO_TIMELINES, [2, 5], lora=True)


def test_internvl_3_5_with_its_qwen3_text_model_agrees_too() -> None:
    torch.manual_seed(0)
    model, processor = tiny_models._internvl("qwen3")
    linear = {key for key, part in model.get_decoder().named_modules() if isinstance(part, nn.Linear)}
    pattern = re.compile(family_of(model.config).adapter_layers)
    assert all(pattern.fullmatch(f"model.language_model.{key}") for key in linear)
    assert_forwards_agree(model, processor, TWO_TIMELINES, [2, 5], lora=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_adapter_is_saved_and_a_whole_model_reloads(name: str, tmp_path: Path, dataset: Dataset) -> None:
    adapter = LoraConfig(r=2, target_modules=family_of(name).adapter_layers, lora_dropout=0.0)
    trainer = trainers.make(tmp_path, dataset, name, peft_config=adapter, freeze_vision_tower=True, max_steps=1)
    before = {key: weight.clone() for key, weight in trainer.model.named_parameters()}
    trainer.train()
    assert all(0 < loss < 10 for loss in trainers.logged(trainer))
    moved = {key for key, weight in trainer.model.named_parameters() if not torch.equal(weight, before[key])}
    assert moved
    assert all("lora_" in key for key in moved)
    whole = trainer.model.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    trainer.processing_class.save_pretrained(tmp_path / "whole")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "whole")
    frames = make_frames(3)
    encoded = [PromptEncoder(p).encode(frames, [user("Who?")]) for p in (processor, trainer.processing_class)]
    assert encoded[0].input_ids == encoded[1].input_ids
    with torch.no_grad():
        reloaded, kept = (
            m.eval()(**inputs_of(e), **e.visual).logits for m, e in zip((model, whole), encoded, strict=True)
        )
    torch.testing.assert_close(reloaded, kept, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", tiny_models.FAMILIES)  # gradients of all are above
def test_full_training_moves_tower_connectors_and_text_model(name: str, tmp_path: Path, dataset: Dataset) -> None:
    trainer = trainers.make(tmp_path, dataset, name, max_steps=1)
    model = trainer.model
    parts = {"tower": vision_tower(model), "text": model.get_decoder()}
    parts |= {connector: model.base_model.get_submodule(connector) for connector in family_of(name).connectors}
    before = {part: [weight.clone() for weight in module.parameters()] for part, module in parts.items() if module}
    trainer.train()
    for part, weights in before.items():
        now = list(parts[part].parameters())
        assert any(not torch.equal(*pair) for pair in zip(weights, now, strict=True)), part


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_answered_as_one_by_one(name: str, tmp_path: Path) -> None:
    model, processor = shared(name)
    clip = Clip(str(write_video(tmp_path / "a.mp4", 40, 10, size=(56, 56))), 0.0, 4.0)
    views = [View.sparse(count) for count in (4, 2, 4, 4)]
    requests = [Request("Who? " * (i + 1), Timeline((clip,)), view) for i, view in enumerate(views)]
    responder = LocalResponder(model, processor, FrameSampler(4), max_new_tokens=8)
    single = [responder.respond([request])[0] for request in requests]
    assert len(set(single)) > 1
    assert responder.respond(requests) == single


# ------------------------------------------------------------------------------------------------ cutting grids by hand


def test_grids_are_cut_in_time_and_joined_up_to_the_bound() -> None:
    grids = torch.tensor([[3, 2, 4], [1, 2, 2], [1, 2, 2], [2, 4, 4]])  # 24, 4, 4 and 32 patches
    pixels = torch.arange(64.0)[:, None].expand(64, 5)
    cut = by_grid({0: pixels, "grid_thw": grids, "merge_sizes": torch.tensor([2, 1, 1, 2])}, max_elements=16 * 5)
    assert cut is not None
    assert [piece["grid_thw"].tolist() for piece in cut] == [
        [[2, 2, 4]],
        [[1, 2, 4], [1, 2, 2], [1, 2, 2]],
        [[1, 4, 4]],
        [[1, 4, 4]],
    ]
    assert [piece["merge_sizes"].tolist() for piece in cut] == [[2], [2, 1, 1], [2], [2]]
    assert torch.equal(torch.cat([piece[0] for piece in cut]), pixels)
    assert by_grid({0: pixels, "grid_thw": grids, "cu_seqlens": torch.arange(7)}, max_elements=80) is None
    assert by_grid({0: pixels}, max_elements=80) is None


@pytest.mark.parametrize("seed", range(20))
def test_random_grids_lose_nothing_and_keep_the_bound(seed: int) -> None:
    draw = random.Random(seed)
    grids = [[draw.randrange(1, 9), draw.randrange(1, 5), draw.randrange(1, 5)] for _ in range(draw.randrange(1, 7))]
    patches = sum(time * height * width for time, height, width in grids)
    limit = draw.randrange(1, 60)
    cut = by_grid({"pixels": torch.arange(float(patches))[:, None], "grid_thw": torch.tensor(grids)}, limit)
    assert cut is not None
    assert torch.cat([piece["pixels"] for piece in cut])[:, 0].tolist() == list(range(patches))
    units = [[height, width] for time, height, width in grids for _ in range(time)]
    found = [(time, side) for piece in cut for time, *side in piece["grid_thw"].tolist()]
    assert [side for time, side in found for _ in range(time)] == units
    for piece in cut:
        assert len(piece["pixels"]) == int(piece["grid_thw"].prod(1).sum())
        assert len(piece["pixels"]) <= limit or piece["grid_thw"][:, 0].tolist() == [1]
