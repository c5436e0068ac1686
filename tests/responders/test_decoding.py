"""Sampled answers, and reasoning that chat templates turn on and off.

A sampled answer follows from the seed and the question: batches, their order and the process change nothing. The chat
templates are those of released models, as TRL ships them.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError, ModelError
from longvpo_hf.families.drawing import Draws
from longvpo_hf.families.templates import may_reason, opened_by_template, thinking_switch
from longvpo_hf.frames import FrameSampler
from longvpo_hf.reasoning import CutOff, without_reasoning
from longvpo_hf.responders import LocalResponder, Request, generating
from longvpo_hf.responders.generating import seed_of
from longvpo_hf.responders.text import TextResponder
from longvpo_hf.timeline import Clip, Timeline
from media import write_video

torch.set_num_threads(1)

WARM = Decoding(temperature=1.0, top_p=0.9, decoding_seed=7)


@functools.cache
def family(name: str) -> tuple[Any, Any]:
    return tiny_models.build(name)


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    video = str(write_video(tmp_path_factory.mktemp("videos") / "video.mp4", 80, 10, size=(56, 56)))
    about = [Timeline((Clip(video, start, start + 2.0),)) for start in (0.0, 2.0, 5.0)]
    texts = ["Who?", "What is shown there? " * 5, "Why?"]
    return [Request(text, timeline) for text in texts for timeline in about] + [Request("No video.")]


def answers(name: str, requests: list[Request], decoding: Decoding, batch_size: int = 4) -> list[str]:
    model, processor = family(name)
    responder = LocalResponder(
        model, processor, FrameSampler(4), max_new_tokens=10, batch_size=batch_size, decoding=decoding
    )
    return responder.respond(requests)


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_answers_follow_from_seed_and_question(name: str, requests: list[Request]) -> None:
    together = answers(name, requests, WARM)
    assert len(set(together)) == len(together), "each question has random numbers of its own"
    assert together != answers(name, requests, GREEDY)
    assert together == [answers(name, [request], WARM, batch_size=1)[0] for request in requests]
    assert together[::-1] == answers(name, requests[::-1], WARM, batch_size=3)
    torch.manual_seed(99)  # whatever else draws random numbers in this process
    assert together[4:] == answers(name, requests[4:], WARM), "as in a run that goes on, or another process's share"
    others = answers(name, requests, Decoding(1.0, 0.9, decoding_seed=8))
    assert sum(one == other for one, other in zip(together, others, strict=True)) <= 1


def test_language_models_sample_alike() -> None:
    model, processor = family("llava_onevision")
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template

    def respond(requests: list[Request], batch_size: int, decoding: Decoding = WARM) -> list[str]:
        return TextResponder(model, tokenizer, 10, batch_size, decoding).respond(requests)

    asked = [Request(text) for text in ("Who?", "What is it about? " * 4, "Why?", "Where is it?")]
    together = respond(asked, 4)
    assert together == [respond([request], 1)[0] for request in asked] == respond(asked[::-1], 2)[::-1]
    assert together != respond(asked, 4, GREEDY)


def test_seeds_do_not_depend_on_folders() -> None:
    def seed(path: str, text: str = "Who?", start: float = 0.0, decoding: Decoding = WARM) -> int:
        return seed_of(Request(text, Timeline((Clip(path, start, 9.0),))), decoding)

    assert seed("/a/x.mp4") == seed("/b/x.mp4")
    others = [seed("/a/y.mp4"), seed("/a/x.mp4", "Whom?"), seed("/a/x.mp4", start=1.0), seed_of(Request("Who?"), WARM)]
    others.append(seed("/a/x.mp4", decoding=Decoding(1.0, 0.9, 8)))
    assert len({seed("/a/x.mp4"), *others}) == 6
    assert all(0 <= other < 2**63 for other in others)


@pytest.mark.parametrize(
    ("temperature", "top_p", "shares"),
    [
        # ln of 0.5, 0.25, 0.15, 0.1 as scores: at 1 the shares themselves, at 0.5 their squares.
        (1.0, 1.0, (0.5, 0.25, 0.15, 0.1)),
        (0.5, 1.0, tuple(p * p / 0.345 for p in (0.5, 0.25, 0.15, 0.1))),
        # 0.5 + 0.25 reach 0.7: the others are not drawn.
        (1.0, 0.7, (2 / 3, 1 / 3, 0.0, 0.0)),
        (0.01, 1.0, (1.0, 0.0, 0.0, 0.0)),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(temperature: float, top_p: float, shares: tuple[float, ...]) -> None:
    rows = 500
    scores = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(rows, 1)
    draws = Draws(Decoding(temperature, top_p), range(rows), torch.device("cpu"))
    taken = Counter(token for _ in range(20) for token in draws(torch.zeros(rows, 1), scores).argmax(-1).tolist())
    for token, share in enumerate(shares):
        bound = 4.5 * math.sqrt(share * (1 - share) / (20 * rows)) + 1e-12
        assert taken[token] / (20 * rows) == pytest.approx(share, abs=bound), taken


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or from 0.01 to 100, got -1.0"),
        ({"temperature": 1e-3}, "got 0.001"),
        ({"temperature": math.nan}, "got nan"),
        ({"temperature": math.inf}, "got inf"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be > 0 and ≤ 1, got 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "got 1.1"),
        ({"temperature": 1.0, "top_p": math.nan}, "got nan"),
        ({"temperature": 1.0, "decoding_seed": -1}, "decoding_seed must be ≥ 0"),
        ({"temperature": 1.0, "decoding_seed": 2**63}, "decoding_seed must be ≥ 0"),
        ({"top_p": 0.9}, "do nothing to greedy answers: set temperature > 0"),
        ({"decoding_seed": 3}, "do nothing to greedy answers"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoding(**settings)


# ------------------------------------------------------------------------------------------------------------- thinking


def template_of(model: str) -> str:
    return (files("trl") / "chat_templates" / f"{model}.jinja").read_text(encoding="utf-8")


class Templated:
    """A tokenizer of which only the chat template is looked at."""

    def __init__(self, template: str) -> None:
        self.tokenizer_of = tiny_models.build("qwen2_5_vl")[1].tokenizer
        self.tokenizer_of.chat_template = template

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer_of"], name)


@pytest.mark.parametrize(
    ("model", "switch", "opened", "reasons"),
    [
        # What the template does by itself, then with thinking on, then off.
        ("qwen3_5_think", "enable_thinking", ("<think>", "<think>", ""), (True, True, False)),
        ("qwen3_5_nothink", "enable_thinking", ("", "<think>", ""), (False, True, False)),
        ("qwen3", "enable_thinking", ("", "", ""), (True, True, False)),
        ("glm4moe", "enable_thinking", ("", "", ""), (True, True, False)),
        ("gemma4", "enable_thinking", ("", "", ""), (True, True, False)),
        ("nemotron_3_nano", "enable_thinking", ("<think>", "<think>", ""), (True, True, False)),
        ("deepseek_r1_distill", None, ("<think>",), (True,)),
        ("qwen3_vl", None, ("",), (False,)),
        ("qwen2_5_vl", None, ("",), (False,)),
    ],
)
def test_templates_of_released_models(
    model: str, switch: str | None, opened: tuple[str, ...], reasons: tuple[bool, ...]
) -> None:
    templated = Templated(template_of(model))
    choices: tuple[bool | None, ...] = (None, True, False) if switch else (None,)
    for thinking, tag, reasoned in zip(choices, opened, reasons, strict=True):
        told = thinking_switch(templated, thinking)
        assert told == ({} if thinking is None else {switch: thinking})
        assert opened_by_template(templated, told) == tag
        assert may_reason(templated, told) is reasoned
    for thinking in () if switch else (True, False):
        with pytest.raises(ModelError, match=f"thinking={thinking}, but the chat template of .* has no switch"):
            thinking_switch(templated, thinking)


def test_a_variable_that_changes_no_prompt_is_no_switch() -> None:
    """Of answers before, for one: the reasoning of the next stays as it is."""
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'A: <think>' }}"
    for template in (plain, plain + "{# enable_thinking #}", plain + "{% if enable_thinking is none %}x{% endif %}"):
        with pytest.raises(ModelError, match="has no switch"):
            thinking_switch(Templated(template), False)


def with_template(ending: str) -> tuple[Any, Any]:
    model, processor = tiny_models.build("qwen2_5_vl")
    processor.chat_template += "{% if add_generation_prompt %}" + ending + "{% endif %}"
    return model, processor


def test_models_are_asked_with_thinking_on_or_off(requests: list[Request]) -> None:
    model, processor = with_template("{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}")

    def ask(thinking: bool | None) -> tuple[list[str], bool]:
        responder = LocalResponder(
            model, processor, FrameSampler(4), max_new_tokens=6, decoding=Decoding(thinking=thinking)
        )
        return responder.respond(requests), responder.reasons

    on, off = ask(True), ask(False)
    assert all(reply.startswith("<think>") and without_reasoning(reply) == "" for reply in on[0])
    assert not any(reply.startswith("<think>") for reply in off[0])
    assert ask(None) == off
    assert (on[1], off[1]) == (True, False)
    model, processor = family("internvl")
    with pytest.raises(ModelError, match="thinking=False, but the chat template"):
        LocalResponder(model, processor, FrameSampler(4), decoding=Decoding(thinking=False))


@pytest.mark.parametrize("ending", ["<think>\n", "<think>\nOkay, let me look. ", "[THINK]", "<|channel>thought\n"])
def test_a_reply_cut_inside_reasoning_that_the_template_opened(ending: str, requests: list[Request]) -> None:
    model, processor = with_template(ending)
    replies = LocalResponder(model, processor, FrameSampler(4), max_new_tokens=6).respond(requests)
    for reply in replies:
        assert isinstance(without_reasoning(reply), CutOff)
        assert without_reasoning(reply) == ""


def test_a_question_that_shows_a_tag_opens_nothing(requests: list[Request]) -> None:
    model, processor = family("qwen2_5_vl")
    asked = [Request("Which tag is on the screen? <think>", requests[0].timeline)]
    (reply,) = LocalResponder(model, processor, FrameSampler(4), max_new_tokens=6).respond(asked)
    assert without_reasoning(reply) == reply


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("[THINK]A or B?[/THINK]C<|im_end|>", "[THINK]A or B?[/THINK]C"),
        ("[THINK]A or", "[THINK]A or"),
        ("It is A.[/THINK]B<|im_end|><|endoftext|>", "It is A.[/THINK]B"),
        ("B<|im_end|>", "B"),
        ("<|START_THINKING|>A?<|END_THINKING|><|im_start|>B", "<|START_THINKING|>A?<|END_THINKING|>B"),
    ],
)
def test_tags_that_are_special_tokens_stay(said: str, text: str) -> None:
    tokenizer = tiny_models.build("qwen2_5_vl")[1].tokenizer
    tags = ["[THINK]", "[/THINK]", "<|START_THINKING|>", "<|END_THINKING|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tags}, replace_extra_special_tokens=False)
    ids = torch.tensor([tokenizer(said, add_special_tokens=False)["input_ids"]])
    assert "[THINK]" not in tokenizer.decode(ids[0], skip_special_tokens=True)
    assert generating._texts(tokenizer, ids) == [text]


def test_text_without_tags_is_what_the_tokenizer_says() -> None:
    tokenizer = tiny_models.build("internvl")[1].tokenizer
    rng = random.Random(0)
    ids = torch.tensor([[rng.randrange(len(tokenizer)) for _ in range(20)] for _ in range(50)])
    assert generating._texts(tokenizer, ids) == tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_settings_tell_decodings_apart(tmp_path: Path) -> None:
    model, processor = family("internvl")
    kinds = [GREEDY, WARM, Decoding(1.0, 0.9, 8), Decoding(0.5, 0.9, 7)]
    told = [LocalResponder(model, processor, FrameSampler(4), decoding=kind).settings for kind in kinds]
    assert all(one != other for i, one in enumerate(told) for other in told[:i])
