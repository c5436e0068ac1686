"""A judge read by the probability of its yes against its no: local models, and an endpoint's `top_logprobs`."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import httpx2
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import tiny_models
from longvpo_hf.building.judging import YES_OR_NO, ByProbability
from longvpo_hf.errors import ConfigError, EndpointError, ModelError
from longvpo_hf.frames import FrameSampler
from longvpo_hf.responders import EndpointResponder, LocalResponder, Request, ScriptedResponder, chat, identity
from longvpo_hf.responders.local import verdict_tokens
from longvpo_hf.responders.text import TextResponder
from longvpo_hf.timeline import Clip, Timeline

TEXTS = [f"{text} {YES_OR_NO}" for text in ("Is it red?", "Is the much longer one, of the two, blue at all?", "No?")]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_models.build("internvl")


def shares_here(model: Any, tokenizer: Any, prompts: list[list[int]], **visual: Any) -> list[float]:
    """The share of yes by one plain forward pass a prompt."""
    spellings = [
        [f"{space}{word}" for space in ("", " ") for word in words] for words in (("Yes", "yes"), ("No", "no"))
    ]
    spellings[0].append("YES")
    spellings[1].append("NO")
    first = [{tokenizer.encode(word, add_special_tokens=False)[0] for word in words} for words in spellings]
    yes, no = sorted(first[0] - first[1]), sorted(first[1] - first[0])
    shares = []
    for ids in prompts:
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([ids]), **visual).logits[0, -1].double().softmax(0)
        shares.append(float(chances[yes].sum() / (chances[yes].sum() + chances[no].sum())))
    return shares


def language_model(tokenizer: Any) -> Any:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 30  # far from even chances
    return model


def test_a_language_models_shares_are_those_of_its_logits(tiny: Any) -> None:
    tokenizer = tiny[1].tokenizer
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    model = language_model(tokenizer)
    responder = TextResponder(model, tokenizer, max_new_tokens=4, batch_size=2)
    requests = [Request(text, is_verdict=True) for text in TEXTS]
    given = responder.respond([*requests, Request("What?")])
    prompts = [tokenizer.encode(f"<user>{text}<assistant>", add_special_tokens=False) for text in TEXTS]
    assert [float(text) for text in given[:3]] == pytest.approx(shares_here(model, tokenizer, prompts), abs=1e-3)
    assert len(set(given)) == 4
    assert given[3] == responder.respond([Request("What?")])[0], "other requests are answered in words"


def test_a_vision_models_shares_follow_from_what_it_sees(tiny: Any, clips: dict[str, Clip]) -> None:
    model, processor = tiny
    responder = LocalResponder(model.eval(), processor, FrameSampler(2, max_pixels=56 * 56), max_new_tokens=4)
    timelines = [Timeline((clips[name],)) for name in ("red", "blue")]
    given = responder.respond([Request(TEXTS[0], timeline, is_verdict=True) for timeline in timelines])
    for timeline, text in zip(timelines, given, strict=True):
        frames = responder.sampler(timeline)
        prompt = responder.encoder.encode(frames, [[{"role": "user", "content": TEXTS[0]}]])
        wanted = shares_here(model, processor.tokenizer, [prompt.input_ids[0]], **prompt.visual)
        assert float(text) == pytest.approx(wanted[0], abs=1e-3)


class Tokenizer:
    """Tells words apart by their first letter, or not at all."""

    name_or_path = "somebody/model"

    def __init__(self, letters: bool) -> None:
        self.letters = letters

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(text.strip()[0]) if self.letters and text[0] != " " else 0]


def test_a_model_that_cannot_be_read_so_is_refused() -> None:
    assert verdict_tokens(Tokenizer(True)) == ({ord("Y"), ord("y")}, {ord("N"), ord("n")})
    with pytest.raises(ModelError, match=r"^somebody/model begins yes and no with one token: leave judge_yes_from"):
        verdict_tokens(Tokenizer(False))
    with pytest.raises(ModelError, match="reasons before it answers"):
        verdict_tokens(Tokenizer(True), "<|assistant|>\n<think>\n")


# ------------------------------------------------------------------------------------------------------------ endpoints


def endpoint(monkeypatch: pytest.MonkeyPatch, choice: Any) -> tuple[EndpointResponder, list[dict[str, Any]]]:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        return httpx2.Response(200, content=json.dumps({"choices": [{"message": {"content": "x"}, **choice}]}))

    monkeypatch.setattr(chat, "_client", lambda is_local: httpx2.AsyncClient(transport=httpx2.MockTransport(answer)))
    return EndpointResponder("m", "http://localhost:1/v1", FrameSampler(1, max_pixels=64), patience_seconds=0), asked


def top(*tokens: tuple[Any, Any]) -> dict[str, Any]:
    likeliest = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in tokens]
    return {"logprobs": {"content": [{"token": "x", "logprob": -1, "top_logprobs": likeliest}]}}


def test_an_endpoints_shares_are_those_of_its_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [("No", math.log(0.5)), (" no", math.log(0.1)), ("Yes", math.log(0.2)), ("YES ", math.log(0.1)), ("I", -3)]
    responder, asked = endpoint(monkeypatch, top(*tokens))
    assert responder.respond([Request(TEXTS[0], is_verdict=True), Request("?")]) == ["0.3333", "x"]
    (verdict,) = [body for body in asked if "logprobs" in body]
    assert (verdict["logprobs"], verdict["top_logprobs"], verdict["max_tokens"]) == (True, 20, 1)


def test_neither_word_among_the_likeliest_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    responder, _ = endpoint(monkeypatch, top(("I", -0.1), ("The", -3.0)))
    assert ByProbability(responder, 0.5).respond([Request(TEXTS[0])]) == [""]


@pytest.mark.parametrize("choice", [{}, {"logprobs": None}, {"logprobs": {"content": []}}, top()])
def test_an_endpoint_without_probabilities_is_refused_at_the_door(
    monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any]
) -> None:
    responder, _ = endpoint(monkeypatch, choice)
    responder.check(sees_video=False)
    refused = r"^m at http://localhost:1/v1 gives no probabilities of its tokens \(top_logprobs\)"
    for ask in (
        lambda: responder.check(sees_video=False, gives_probabilities=True),
        lambda: responder.respond([Request(TEXTS[0], is_verdict=True)]),
    ):
        with pytest.raises(EndpointError, match=refused):
            ask()


def test_whatever_stands_for_probabilities_gives_a_share_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    words = ["Yes", "no", "\x1b", "", None, 3, ["yes"], {}]
    numbers = [-0.5, -1, 0, True, None, "x", float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 5.0, []]
    seen = set()
    for _ in range(300):
        tokens = [(rng.choice(words), rng.choice(numbers)) for _ in range(rng.randint(1, 5))]
        responder, _ = endpoint(monkeypatch, top(*tokens))
        (text,) = responder.respond([Request(TEXTS[0], is_verdict=True)])
        assert text == "" or 0 <= float(text) <= 1
        seen.add(text)
    assert {"", "0.0000", "1.0000"} < seen


# ------------------------------------------------------------------------------------------------------- what it is for


def test_a_verdict_is_yes_from_a_probability_on() -> None:
    shares = {TEXTS[0]: "0.2000", TEXTS[1]: "0.1000", TEXTS[2]: "No"}
    judge = ScriptedResponder(
        "judge", lambda request: shares.get(request.text, "words") if request.is_verdict else "words"
    )
    by = ByProbability(judge, 0.15)
    handed: dict[int, Any] = {}
    requests = [*map(Request, TEXTS), Request("Write a question.")]
    assert by.respond(requests, handed.__setitem__) == ["Yes (0.2000)", "No (0.1000)", "No", "words"]
    assert handed == {0: "Yes (0.2000)", 1: "No (0.1000)", 2: "No", 3: "words"}
    assert by.name == "judge"
    assert identity(by) != identity(judge)
    assert identity(by) != identity(ByProbability(judge, 0.2))
    for yes_from in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="judge_yes_from must be in"):
            ByProbability(judge, yes_from)
