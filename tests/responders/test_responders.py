"""Who answers: batches give what single requests give, in the order asked, for every family."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from longvpo_hf.frames import FrameSampler, UnreadableVideo
from longvpo_hf.miniature.model import build_processor
from longvpo_hf.reasoning import without_reasoning
from longvpo_hf.responders import (
    CutOff,
    LocalResponder,
    NoAnswer,
    Request,
    Responder,
    ScriptedResponder,
    Unanswered,
    Unreached,
    identity,
    local,
    weights,
)
from longvpo_hf.timeline import Clip, Timeline, View
from media import write_video

torch.set_num_threads(1)


@functools.cache
def family(name: str) -> tuple[Any, Any]:
    return tiny_models.build(name)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_video(tmp_path_factory.mktemp("videos") / "video.mp4", 80, 10, size=(56, 56)))


def respond(name: str, requests: Sequence[Request], **settings: Any) -> list[str]:
    model, processor = family(name)
    return LocalResponder(model, processor, FrameSampler(4), max_new_tokens=12, **settings).respond(requests)


def make_requests(video: str) -> list[Request]:
    """Questions of unlike length about timelines of unlike length, views, and one about no video."""
    timeline = Timeline(tuple(Clip(video, float(i), i + 1.0) for i in range(4)))
    other = Timeline((Clip(video, 5.0, 7.0),))
    return [
        Request("What is it? " * 9, timeline),
        Request("Who?", other),
        Request("Who?", timeline),
        Request("No video here."),
        Request("And a longer question, to be padded less?", timeline, View.only([1, 2])),
        Request("Who?", timeline, View.without([0])),
        Request("Who?", timeline, View.sparse(4)),
        Request("x", Timeline((Clip(video, 0.0, 8.0),)), View.sparse(2)),
        Request("x", Timeline((Clip(video, 0.0, 8.0),)), View.sparse(3)),
    ]


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_batches_answer_as_single_requests_do(name: str, video: str) -> None:
    requests = make_requests(video)
    single = [respond(name, [request], batch_size=1)[0] for request in requests]
    assert len(set(single)) >= 6, f"these tests see little in {single}"
    assert single[2] == single[6], "at most 4 frames are what 4 frames are"
    assert respond(name, requests, batch_size=4) == single
    assert respond(name, requests[::-1], batch_size=len(requests)) == single[::-1]


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_padding_on_the_wrong_side_would_show(name: str, video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: these models are not indifferent to where the padding stands."""
    requests = make_requests(video)[:3]
    right = respond(name, requests, batch_size=3)

    def pad_right(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
        return torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])

    monkeypatch.setattr(local, "_left_pad", pad_right)
    assert respond(name, requests, batch_size=3) != right


def test_little_is_held_at_once_and_nothing_changes(video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests(video)
    expected = respond("internvl", requests, batch_size=4)
    held = []
    answer = LocalResponder._answer

    def counted(self: LocalResponder, prompts: Sequence[Any]) -> Any:
        held.append(sum(tensor.nbytes for prompt in prompts for tensor in prompt.visual.values()))
        return answer(self, prompts)

    frame_bytes = 3 * 56 * 56 * 4
    monkeypatch.setattr(LocalResponder, "_answer", counted)
    monkeypatch.setattr(local, "_HELD_BYTES", 6 * frame_bytes)
    assert respond("internvl", requests, batch_size=4) == expected
    assert max(held) < (6 + 4) * frame_bytes
    assert len(held) >= 4


def test_a_tokenizer_without_a_padding_token(video: str) -> None:
    model, processor = tiny_models.build("internvl")
    processor.tokenizer.pad_token = None
    answers = LocalResponder(model, processor, FrameSampler(4), max_new_tokens=12).respond(make_requests(video))
    assert answers == respond("internvl", make_requests(video))


def test_unreadable_videos_cost_nobody_else_an_answer(video: str, tmp_path: Path) -> None:
    good, missing = make_requests(video), Request("Who?", Timeline((Clip(str(tmp_path / "no.mp4"), 0.0, 1.0),)))
    with pytest.raises(Unanswered, match=r"^2 of 11 requests have no answer; the first: missing_file") as error:
        respond("internvl", [missing, *good, missing])
    first, *others, last = error.value.results
    assert others == respond("internvl", good)
    assert isinstance(first, UnreadableVideo)
    assert isinstance(last, UnreadableVideo)


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_control_tokens_in_a_text_cost_nobody_an_answer(name: str, video: str) -> None:
    tokens = "".join(family(name)[1].tokenizer.all_special_tokens)
    plain, timeline = Request("Who?", Timeline((Clip(video, 0.0, 2.0),))), Timeline((Clip(video, 5.0, 7.0),))
    hostile = [Request(f"Describe {tokens}", timeline), Request(tokens), Request(f"{tokens}\n{tokens}?", timeline)]
    answers = respond(name, [hostile[0], plain, *hostile[1:]])
    assert len(answers) == 4
    assert answers[1] == respond(name, [plain])[0]


def test_a_text_that_a_tokenizer_cannot_read_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of whole words has its control tokens as words too."""
    model, _ = family("internvl")
    processor = build_processor()
    monkeypatch.setattr(model.config, "image_token_id", processor.image_token_id)
    responder = LocalResponder(model, processor, FrameSampler(4), max_new_tokens=2)
    with pytest.raises(Unanswered) as error:
        responder.respond([Request("Is it <video>"), Request("a")])
    refused, answer = error.value.results
    assert isinstance(refused, NoAnswer)
    assert "holds a control token" in str(refused)
    assert isinstance(answer, str)
    assert not error.value.transient


def test_answers_that_reached_their_bound_are_known(video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the model's own end: told of each token whether it is one, and of none where no end is known."""
    model, processor = family("internvl")
    (request, *_) = make_requests(video)
    responder = LocalResponder(model, processor, FrameSampler(4), max_new_tokens=4)
    said: list[torch.Tensor] = []
    generate = model.generate

    def noted(**inputs: Any) -> torch.Tensor:
        said.append(generate(**inputs)[:, inputs["input_ids"].shape[1] :])
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", noted)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    (unknown,) = responder.respond([request])
    tokens = said[-1][0].tolist()
    assert len(tokens) == 4
    assert not isinstance(unknown, CutOff)
    other = next(token for token in range(len(processor.tokenizer)) if token not in tokens)
    for ends, cut_off in (([other], True), ([other, tokens[-1]], False), ([tokens[0]], False)):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        (answer,) = responder.respond([request])
        assert isinstance(answer, CutOff) is cut_off, ends
        assert answer == unknown or not cut_off


@pytest.mark.parametrize(
    ("ending", "opened"),
    [("<think>\n", "<think>"), ("<think>\n\n</think>\n\n", ""), ("", ""), ("</think><thinking>", "<thinking>")],
)
def test_reasoning_that_the_template_opened_is_told_from_answers(video: str, ending: str, opened: str) -> None:
    model, processor = tiny_models.build("qwen2_5_vl")
    processor.chat_template += "{% if add_generation_prompt %}" + ending + "{% endif %}"
    requests = make_requests(video)[:4]
    replies = LocalResponder(model, processor, FrameSampler(4), max_new_tokens=12).respond(requests)
    assert all(reply.startswith(opened) for reply in replies)
    assert all(reply.startswith("<think") for reply in replies) is bool(opened)
    assert all(without_reasoning(reply) == ("" if opened else reply) for reply in replies)


def test_names_and_settings(video: str) -> None:
    model, processor = family("internvl")
    assert LocalResponder(model, processor, FrameSampler(1)).name == "InternVLForConditionalGeneration"
    assert LocalResponder(model, processor, FrameSampler(1), name="a@1").name == "a@1"
    assert respond("internvl", []) == []
    with pytest.raises(ValueError, match="batch_size must be ≥ 1, got 0"):
        respond("internvl", [], batch_size=0)


def test_what_answers_follow_from(video: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in folders of one name are told apart by their files, and so are bounds; how a batch is cut is not."""
    model, processor = tiny_models.build("internvl")
    folders = [tmp_path / parent / "stage1" for parent in "abc"]
    for number, folder in enumerate(folders):
        if number == 2:
            next(model.parameters()).data.add_(1.0)
        model.save_pretrained(folder)
        (folder / "optimizer.pt").write_bytes(bytes([number]))

    def of(folder: Path, num_frames: int = 4, **settings: Any) -> Any:
        model.config.name_or_path = str(folder)
        responder = LocalResponder(model, processor, FrameSampler(num_frames, cache_bytes=number), **settings)
        assert responder.name == "stage1"
        return json.loads(json.dumps(identity(responder)))

    first = of(folders[0])
    assert first == of(folders[1]) == of(folders[0], batch_size=2)
    others = [of(folders[2]), of(folders[0], max_new_tokens=9), of(folders[0], num_frames=5)]
    assert all(first != other for other in others)
    # Of a model on the Hub it is the commit that lies in the Hub's cache.
    model.config.name_or_path = "org/model"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert weights(model.config) == ""
    cached = tmp_path / "hub" / "models--org--model"
    for commit in ("a" * 40, "b" * 40):
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("b" * 40)
    assert weights(model.config) == "b" * 40
    assert identity(ScriptedResponder("script", str)) == ["script", None]


def test_a_scripted_responder_is_a_responder() -> None:
    responder: Responder = ScriptedResponder("script", lambda request: request.text.upper())
    assert responder.name == "script"
    assert responder.respond([Request("a"), Request("b")]) == ["A", "B"]


def test_each_result_is_handed_over_as_it_comes(video: str, tmp_path: Path) -> None:
    missing = Request("Who?", Timeline((Clip(str(tmp_path / "no.mp4"), 0.0, 1.0),)))
    requests = [missing, *make_requests(video)]
    model, processor = family("internvl")
    responder = LocalResponder(model, processor, FrameSampler(4), max_new_tokens=12, batch_size=2)
    handed: dict[int, Any] = {}
    batches: list[int] = []
    generate = responder._generate
    responder._generate = lambda prompts: batches.append(len(handed)) or generate(prompts)  # type: ignore[method-assign]

    def keep(index: int, result: Any) -> None:
        assert index not in handed
        handed[index] = result

    with pytest.raises(Unanswered) as error:
        responder.respond(requests, keep)
    assert [handed[index] for index in range(len(requests))] == list(error.value.results)
    assert not error.value.transient, "a video that cannot be read will not be read the next time"
    assert batches == sorted(set(batches)), "each batch was handed over before the next was asked"


def test_a_scripted_responder_names_what_it_cannot_answer() -> None:
    refused = NoAnswer("no such thing")

    def answer(request: Request) -> str:
        if request.text == "b":
            raise refused
        return request.text.upper()

    handed: list[Any] = []
    with pytest.raises(Unanswered, match=r"^1 of 3 requests have no answer; the first: no such thing$") as error:
        ScriptedResponder("script", answer).respond(
            [Request(text) for text in "abc"], lambda *each: handed.append(each)
        )
    assert error.value.results == ("A", refused, "C")
    assert handed == [(0, "A"), (1, refused), (2, "C")]
    assert not error.value.transient
    assert Unanswered(["A", Unreached("down"), refused]).transient


def test_requests_with_a_schema_can_be_keys() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert {Request("?", schema=schema): 1}[Request("?", schema=dict(schema))] == 1
    assert Request("?", schema=schema) != Request("?")
