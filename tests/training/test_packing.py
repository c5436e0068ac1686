"""The tree-packed forward: equal to separate sequences, cheaper than them, and refused where it would be wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from trl.trainer.utils import _ChunkedLogProbFunction, add_fused_lm_head

import tiny_models
from longvpo_hf.families.encoding import concatenate_visuals
from longvpo_hf.training.packing import (
    attention,
    enable_tree_packing,
    is_tree_packed,
    plain_forward,
    tree,
    tree_forward,
    unwrapped,
)
from longvpo_hf.training.packing.attention import ATTENTION, Forest, Span, tree_attention
from longvpo_hf.training.packing.parts import Part

torch.set_num_threads(1)

TOLERANCE = 1e-5
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

Row = tuple[int, str, str, str]  # video (-1: none), question, chosen, rejected
ONE_PAIR: list[Row] = [(0, "What is it?", "A dog.", "A black cat!")]
FOUR_PAIRS: list[Row] = [
    (0, "What is it?", "A dog.", "A black cat!"),
    (0, "Who?", "Me", "You"),
    (0, "What then?", "Nothing much, it ends.", "x"),
    (0, "What is it?", "Yes", "No way"),
]
TWO_TIMELINES: list[Row] = [
    (1, "What is it?", "A dog.", "A black cat!"),
    (0, "Who?", "Me", "You"),
    (-1, "Say hi", "hi there", "ho"),
    (1, "Where?", "here", "over there"),
]
BATCHES = {"one pair": (ONE_PAIR, [4]), "four pairs": (FOUR_PAIRS, [4]), "two timelines": (TWO_TIMELINES, [2, 4])}


# ------------------------------------------------------------------------------------------- machinery


def model_with_head(family: str) -> Any:
    model, _ = tiny_models.build(family)
    add_fused_lm_head(model, outputs=FIELDS)
    return model


def ready_model(family: str) -> Any:
    model = model_with_head(family)
    assert enable_tree_packing(model) is None
    return model


@functools.cache
def shared_model(family: str) -> Any:
    """For tests that leave the model as it is, gradients apart."""
    return ready_model(family)


@functools.cache
def shared_processor(family: str) -> Any:
    return tiny_models.build(family)[1]


def make_batch(family: str, rows: Sequence[Row], frames: Sequence[int]) -> dict[str, Any]:
    """A batch as the collator makes it, of random videos with these numbers of frames."""
    processor = shared_processor(family)
    noise = torch.Generator().manual_seed(0)
    films = [torch.randint(0, 256, (count, 3, 56, 56), dtype=torch.uint8, generator=noise) for count in frames]
    videos: list[dict[str, Tensor]] = [{} for _ in films]
    sequences: list[list[dict[str, Tensor]]] = [[], []]
    for video, question, *answers in rows:
        encoded = tiny_models.encode(processor, question, films[video] if video >= 0 else None)
        prompt = encoded.pop("input_ids")[0]
        encoded.pop("attention_mask")
        types = encoded.pop("mm_token_type_ids", None)
        if video >= 0:
            videos[video] = encoded
        for column, answer in zip(sequences, answers, strict=True):
            completion = torch.tensor(processor.tokenizer(answer)["input_ids"] + [processor.tokenizer.eos_token_id])
            ids = torch.cat([prompt, completion])
            sequence = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            sequence["completion_mask"] = (torch.arange(len(ids)) >= len(prompt)).long()
            if types is not None:
                sequence["mm_token_type_ids"] = F.pad(types[0], (0, len(completion)))
            column.append(sequence)
    flat = [*sequences[0], *sequences[1]]
    width = max(len(sequence["input_ids"]) for sequence in flat)
    fill = {"input_ids": processor.tokenizer.pad_token_id}
    batch = {
        name: torch.stack([F.pad(item[name], (0, width - len(item[name])), value=fill.get(name, 0)) for item in flat])
        for name in flat[0]
    }
    return {**batch, "videos": videos, "video_index": torch.tensor([video for video, *_ in rows])}


def separate_forwards(model: Any, batch: dict[str, Any]) -> Tensor:
    """Log-probs [2B, L - 1] by one unpadded sequence after another: knows nothing of either forward under test."""
    pairs = len(batch["video_index"])
    log_probs = []
    for row in range(2 * pairs):
        length = int(batch["attention_mask"][row].sum())
        video = int(batch["video_index"][row % pairs])
        inputs = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in batch:
            inputs["mm_token_type_ids"] = batch["mm_token_type_ids"][row : row + 1, :length]
        logits = model(**inputs, **(batch["videos"][video] if video >= 0 else {})).logits[0, :-1].float()
        token = logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])[:, 0]
        token = token * batch["completion_mask"][row, 1:length]
        log_probs.append(F.pad(token, (0, batch["input_ids"].shape[1] - length)))
    return torch.stack(log_probs)


def gradients(model: Any, log_probs: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every token differently."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, log_probs.numel(), device=log_probs.device).view_as(log_probs)
    (log_probs * weights).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    floor = 0.01 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), floor)
        difference = float((got[name] - gradient).abs().max())
        assert difference <= TOLERANCE * scale, f"{name}: {difference:.2g} of {scale:.2g}"


def assert_equal_forwards(model: Any, batch: dict[str, Any]) -> None:
    """Tree, plain and separate forwards agree in every field and every gradient."""
    separate = separate_forwards(model, batch)
    expected = gradients(model, separate)
    plain, packed = plain_forward(model, batch), tree_forward(model, batch)
    assert packed.log_probs.shape == batch["completion_mask"][:, 1:].shape
    assert torch.equal(packed.label_mask, batch["completion_mask"][:, 1:] == 1)
    torch.testing.assert_close(packed.log_probs, separate, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(packed.loss, plain.loss, rtol=0, atol=TOLERANCE)
    for name in FIELDS:
        torch.testing.assert_close(packed[name], plain[name], rtol=0, atol=TOLERANCE)
    assert_equal_gradients(gradients(model, plain.log_probs), expected)
    assert_equal_gradients(gradients(model, packed.log_probs), expected)


def assert_equal_log_probs(model: Any, batch: dict[str, Any], reference: dict[str, Any] | None = None) -> None:
    with torch.no_grad():
        expected = plain_forward(model, reference or batch).log_probs
        torch.testing.assert_close(tree_forward(model, batch).log_probs, expected, rtol=0, atol=TOLERANCE)


# -------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("square", [1, 1000], ids=["long rows", "short rows"])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_tree_equals_separate_sequences(family: str, rows: str, square: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches of several short rows attend to one another in one square, long rows each in their own."""
    monkeypatch.setattr(attention, "_SQUARE", square)
    assert_equal_forwards(shared_model(family), make_batch(family, *BATCHES[rows]))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_tree_equals_separate_sequences_under_gradient_checkpointing(family: str, lora: bool) -> None:
    model = ready_model(family)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*(q_proj|v_proj|up_proj)", lora_dropout=0.0))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_forwards(model.train(), make_batch(family, TWO_TIMELINES, [2, 4]))
    assert model.get_decoder().layers[0].gradient_checkpointing


def test_enabling_a_peft_model() -> None:
    model = get_peft_model(model_with_head("internvl"), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    assert not is_tree_packed(model)
    assert enable_tree_packing(model) is None
    assert enable_tree_packing(model) is None
    assert is_tree_packed(model)
    assert_equal_forwards(model, make_batch("internvl", FOUR_PAIRS, [4]))


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_rows_without_video(family: str) -> None:
    batch = make_batch(family, [(-1, "Say hi", "hi there", "ho"), (-1, "Say no", "no", "never")], [])
    assert_equal_forwards(shared_model(family), batch)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_prompts_that_part_before_the_video_become_trees_of_their_own(family: str) -> None:
    batch = make_batch(family, FOUR_PAIRS, [4])
    batch["input_ids"][[1, 5], 0] = 7  # the first token of the second pair's prompt
    assert_equal_forwards(shared_model(family), batch)


def test_answers_of_several_turns_are_scored_only_where_the_mask_says() -> None:
    batch = make_batch("internvl", FOUR_PAIRS, [4])
    first = int(batch["completion_mask"][0].nonzero()[0])
    batch["completion_mask"][0, first + 2 : first + 4] = 0
    assert_equal_forwards(shared_model("internvl"), batch)


def test_half_precision() -> None:
    model = shared_model("qwen3_vl")
    batch = make_batch("qwen3_vl", TWO_TIMELINES, [2, 4])
    with torch.no_grad():
        exact = plain_forward(model, batch).log_probs
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, packed = plain_forward(model, batch).log_probs, tree_forward(model, batch).log_probs
    own_error = float((plain - exact).abs().max())
    assert 0 < float((packed - exact).abs().max()) <= 2 * own_error
    half = ready_model("internvl").to(torch.bfloat16)
    assert tree_forward(half, make_batch("internvl", FOUR_PAIRS, [4])).log_probs.isfinite().all()


def test_under_data_parallel_training(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, batch = shared_model("internvl"), make_batch("internvl", TWO_TIMELINES, [2, 4])
        expected = gradients(model, plain_forward(model, batch).log_probs)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        got = gradients(wrapped, tree_forward(wrapped, batch).log_probs)
        assert_equal_gradients({name.removeprefix("module."): grad for name, grad in got.items()}, expected)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------- the power of the equality


def _positions_run_on() -> Callable[[Tensor, int], Tensor]:
    restart, ends = tree._restart, []

    def patched(first: Tensor, size: int) -> Tensor:
        begin = ends[-1] if ends else first
        ends.append(begin + size)
        return restart(begin, size)

    return patched


def _rejected_sees_chosen() -> Callable[[Tensor, Tensor], Tensor]:
    sees = tree.visibility
    return lambda question, answer: sees(question, torch.zeros_like(answer))


def _questions_see_each_other() -> Callable[..., Span]:
    return lambda start, branches, end, sees, rows: Span(start, branches, end, torch.ones_like(sees).tril())


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("_restart", _positions_run_on),
        ("visibility", _rejected_sees_chosen),
        ("Span", _questions_see_each_other),
    ],
    ids=["positions run on", "rejected sees chosen", "questions see each other"],
)
@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_a_broken_tree_is_noticed(
    monkeypatch: pytest.MonkeyPatch, family: str, name: str, mutation: Callable[[], Any]
) -> None:
    model, batch = shared_model(family), make_batch(family, FOUR_PAIRS, [4])
    assert_equal_log_probs(model, batch)
    monkeypatch.setattr(tree, name, mutation())
    with pytest.raises(AssertionError, match="not close"):
        assert_equal_log_probs(model, batch)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_blank_video_is_noticed(family: str) -> None:
    batch = make_batch(family, FOUR_PAIRS, [4])
    blank = [
        {name: value * 0 if name.startswith("pixel") else value for name, value in video.items()}
        for video in batch["videos"]
    ]
    with pytest.raises(AssertionError, match="not close"):
        assert_equal_log_probs(shared_model(family), {**batch, "videos": blank}, reference=batch)


# ----------------------------------------------------------------------------------------------- thrift


def test_each_video_is_encoded_once_and_no_mask_is_square(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = shared_model("internvl"), make_batch("internvl", TWO_TIMELINES, [2, 4])
    frames, trunks, branches = [], [], []
    sdpa, in_parts = F.scaled_dot_product_attention, attention.attend

    def recorded(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        trunks.append((query.shape[2], key.shape[2], kwargs["attn_mask"], kwargs.get("is_causal", False)))
        return sdpa(query, key, value, *args, **kwargs)

    def recorded_parts(query: Tensor, keys: Any, values: Any, parts: Sequence[Part], scale: float) -> Tensor:
        branches.append((query.shape[2], keys[0].shape[2], parts))
        return in_parts(query, keys, values, parts, scale)

    count = model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: frames.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    tower = model.model.vision_tower.register_forward_hook(lambda *_: trunks.clear())
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(attention, "attend", recorded_parts)
    monkeypatch.setattr(attention, "_SQUARE", 1)
    tree_forward(model, batch)
    count.remove()
    tower.remove()
    assert frames == [2 + 4]
    layers, trees = model.config.text_config.num_hidden_layers, 3
    assert len(trunks) == len(branches) == layers * trees
    assert all(mask is None and queries == keys and is_causal for queries, keys, mask, is_causal in trunks)
    assert sum(len(parts) - 1 for *_, parts in branches) == layers * len(TWO_TIMELINES)
    for queries, keys, parts in branches:
        assert (parts[0].start, parts[0].stop, parts[0].sees) == (0, keys - queries, None)
        sizes = [part.stop - part.start for part in parts[1:]]
        assert sum(sizes) == queries  # a square for each row, and none beside them
        assert [tuple(part.sees.shape) for part in parts[1:]] == [(size, size) for size in sizes]


def test_the_head_is_given_what_predicts_an_answer_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton does not run, TRL's projects every token of the videos onto the vocabulary."""
    model = shared_model("internvl")
    batch = make_batch("internvl", *BATCHES["two timelines"])
    given, apply = [], _ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        _ChunkedLogProbFunction, "apply", lambda states, *rest: given.append(states) or apply(states, *rest)
    )
    scored = tree_forward(model, batch)
    assert [len(states) for states in given] == [int(batch["completion_mask"][:, 1:].sum())]
    assert torch.equal(scored.label_mask, batch["completion_mask"][:, 1:] == 1)


def test_a_tree_is_as_long_as_its_parts() -> None:
    batch = make_batch("internvl", ONE_PAIR, [4])
    answers = batch["completion_mask"].sum(dim=1)
    prompt = int(batch["attention_mask"][0].sum() - answers[0])
    planted = tree.trees_of(batch, torch.zeros_like(batch["input_ids"], dtype=torch.bool))
    packed = tree.pack(batch, planted, [torch.arange(prompt)[None]])
    assert packed.input_ids.shape == (1, prompt - 1 + int(answers.sum()))


# ---------------------------------------------------------------------------------- without a tree


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_an_enabled_model_is_otherwise_the_same(family: str, tmp_path: Any) -> None:
    ordinary, _ = tiny_models.build(family)
    enabled = shared_model(family)
    batch = make_batch(family, FOUR_PAIRS, [4])
    pixels = concatenate_visuals(batch["videos"] * 4)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {name: batch[name][:4] for name in names if name in batch}
    with torch.no_grad():
        assert torch.equal(ordinary(**inputs, **pixels).logits, enabled(**inputs, **pixels).logits)
    single = {name: value[:1, :40] for name, value in inputs.items()}
    single["input_ids"] = single["input_ids"].clamp(max=200)  # no visual placeholders
    if "mm_token_type_ids" in single:
        single["mm_token_type_ids"] = torch.zeros_like(single["mm_token_type_ids"])
    written = [model.generate(**single, max_new_tokens=5, do_sample=False) for model in (ordinary, enabled)]
    assert torch.equal(*written)
    enabled.config.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


# ----------------------------------------------------------------------------------------------- guards


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        **more,
    }


def _attending_by(implementation: str) -> Any:
    model, _ = tiny_models.build("internvl")
    model.model.language_model.config._attn_implementation_internal = implementation
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Llama4ForCausalLM(Llama4TextConfig(**_text(layer_types=["chunked_attention", "full_attention"]))),
            ["Llama4ForCausalLM", "layer_types", "chunked_attention"],
        ),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)),
            ["MambaForCausalLM", "linear_attention"],
        ),
        (
            lambda: RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)),
            ["RwkvForCausalLM", "_is_stateful"],
        ),
        (lambda: _attending_by("eager"), ["InternVLForConditionalGeneration", "'eager'", "sdpa"]),
        (lambda: _attending_by("flash_attention_2"), ["InternVLForConditionalGeneration", "'flash_attention_2'"]),
        (
            lambda: get_peft_model(
                tiny_models.build("internvl")[0], PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            ),
            ["InternVLForConditionalGeneration", "PROMPT_TUNING"],
        ),
    ],
    ids=["chunked attention", "mamba", "rwkv", "eager", "flash", "prompt learning"],
)
def test_models_that_cannot_be_packed_are_left_as_they_were(make: Callable[[], Any], words: list[str]) -> None:
    model = make()
    decoder = unwrapped(model).get_decoder()
    before = decoder.config._attn_implementation
    reason = enable_tree_packing(model)
    assert reason is not None
    assert not [word for word in words if word not in reason], reason
    assert decoder.config._attn_implementation == before


def _swallow_the_tree(model: Any) -> None:
    attention = model.get_decoder().layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, longvpo_tree=None, **kwargs: forward(*args, **kwargs)


def test_a_layer_that_swallows_the_tree_is_found_when_enabling() -> None:
    model, _ = tiny_models.build("internvl")
    _swallow_the_tree(model)
    reason = enable_tree_packing(model)
    assert reason is not None
    assert "1 attention layers of InternVLForConditionalGeneration" in reason
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_a_layer_that_mixes_tokens_outside_attention_is_found_when_enabling() -> None:
    model, _ = tiny_models.build("internvl")
    model.get_decoder().layers[1].mlp.register_forward_hook(lambda _, args, output: output + output.roll(1, dims=1))
    reason = enable_tree_packing(model)
    assert reason is not None
    assert "something besides attention mixes its tokens" in reason


def test_a_layer_that_swallows_the_tree_later_raises() -> None:
    model = ready_model("internvl")
    _swallow_the_tree(model)
    with pytest.raises(RuntimeError, match=r"1 attention layers of InternVL.* follow a tree .*, expected 2"):
        tree_forward(model, make_batch("internvl", ONE_PAIR, [4]))


def test_an_attention_implementation_changed_afterwards_raises() -> None:
    model = ready_model("internvl")
    model.set_attn_implementation("eager")
    assert not is_tree_packed(model)
    with pytest.raises(RuntimeError, match="attends by 'eager'"):
        tree_forward(model, make_batch("internvl", ONE_PAIR, [4]))


def test_a_model_with_masks_of_its_own_raises() -> None:
    attention = shared_model("internvl").get_decoder().layers[0].self_attn
    tokens = torch.zeros(1, 2, 3, 8)
    forest = Forest([Span(0, 1, 3, torch.ones(2, 2, dtype=torch.bool))])
    with pytest.raises(RuntimeError, match=r"a mask of shape \(1, 1, 3, 3\)"):
        tree_attention(attention, tokens, tokens, tokens, torch.ones(1, 1, 3, 3), longvpo_tree=forest)
    with pytest.raises(RuntimeError, match=r"softcap=4\.0"):
        tree_attention(attention, tokens, tokens, tokens, None, softcap=4.0, longvpo_tree=forest)
    with pytest.raises(RuntimeError, match="for a tree of 3 tokens"):
        tree_attention(attention, tokens[:, :, :2], tokens, tokens, None, longvpo_tree=forest)


def test_a_model_without_the_fused_head_raises() -> None:
    model, _ = tiny_models.build("internvl")
    assert enable_tree_packing(model) is None
    with pytest.raises(RuntimeError, match="add_fused_lm_head"):
        tree_forward(model, make_batch("internvl", ONE_PAIR, [4]))


def test_batches_that_cannot_be_packed_raise() -> None:
    model, batch = shared_model("qwen2_5_vl"), make_batch("qwen2_5_vl", ONE_PAIR, [4])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][1, 0] = 7
    with pytest.raises(ValueError, match="must start with the same prompt"):
        tree_forward(model, other)
    last = int(batch["completion_mask"][0].nonzero()[0]) - 1
    other = {**batch, "mm_token_type_ids": batch["mm_token_type_ids"].clone()}
    other["mm_token_type_ids"][:, last] = 2
    with pytest.raises(ValueError, match="ends in a visual token"):
        tree_forward(model, other)
    other = {name: value for name, value in batch.items() if name != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        tree_forward(model, other)


def test_data_parallel_in_one_process_is_refused() -> None:
    wrapped = torch.nn.DataParallel(shared_model("internvl"))
    with pytest.raises(ValueError, match="accelerate launch"):
        tree_forward(wrapped, make_batch("internvl", ONE_PAIR, [4]))
