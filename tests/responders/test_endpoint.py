"""`EndpointResponder` against a scripted server, which does what servers do when they are busy, broken or forbidding,
and against a real one: `transformers serve` with a tiny vision-language model. All on the loopback interface.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import gzip
import io
import json
import logging
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import unicodedata
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import tiny_models
from longvpo_hf.errors import ConfigError, EndpointError
from longvpo_hf.frames import Frames, FrameSampler, UnreadableVideo
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.responders import (
    CutOff,
    EndpointResponder,
    NoAnswer,
    Refused,
    Request,
    Responder,
    Unanswered,
    Unreached,
    chat,
    endpoint,
)
from longvpo_hf.responders.control_tokens import holds_control_token, parted
from longvpo_hf.timeline import Clip, Timeline, View

KEY = "sk-a-secret-key"

# ------------------------------------------------------------------------------------------------ the scripted server


@dataclass(frozen=True)
class Call:
    """A request as the server got it. `number` counts from 0 in order of arrival."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    arrived_seconds: float

    @property
    def text(self) -> str:
        return str(self.body["messages"][-1]["content"][-1]["text"])

    @property
    def images(self) -> list[Image.Image]:
        urls = [part["image_url"]["url"] for part in self.body["messages"][-1]["content"][:-1]]
        assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
        return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))) for url in urls]


@dataclass(frozen=True)
class Reply:
    """What the server does: by default says `text` as a proper answer."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    byte_seconds: float = 0.0  # pause before each byte of the body
    hang_up: bool = False

    @property
    def payload(self) -> bytes:
        if self.body is not None:
            return self.body
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.text}}
        return json.dumps({"id": "1", "object": "chat.completion", "created": 1, "choices": [choice]}).encode()


Script = Callable[[Call], Reply]


class ScriptedServer:
    """A chat endpoint that follows a script, and remembers what it was asked and by how many at once."""

    def __init__(self, script: Script) -> None:
        self.calls: list[Call] = []
        self.under_way = 0
        self.most_under_way = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else 40 ms per answer

            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
                headers = {name.lower(): value for name, value in handler.headers.items()}
                with lock:
                    call = Call(len(self.calls), handler.path, headers, body, time.monotonic())
                    self.calls.append(call)
                    self.under_way += 1
                    self.most_under_way = max(self.most_under_way, self.under_way)
                try:
                    reply = script(call)
                finally:
                    with lock:
                        self.under_way -= 1
                if reply.hang_up:
                    handler.close_connection = True
                    return
                handler.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.payload)), **reply.headers}.items():
                    handler.send_header(name, value)
                handler.end_headers()
                step = 1 if reply.byte_seconds else len(reply.payload)
                for start in range(0, len(reply.payload), step or 1):
                    time.sleep(reply.byte_seconds)
                    handler.wfile.write(reply.payload[start : start + step])

            def log_message(handler, *args: object) -> None:
                pass

            def handle(handler) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client had waited long enough
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


Serve = Callable[[Script], ScriptedServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[ScriptedServer] = []

    def start(script: Script) -> ScriptedServer:
        servers.append(ScriptedServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, no proxy before the loopback interface, no token but a test's own."""
    monkeypatch.setattr(endpoint, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def sampler(num_frames: int = 4) -> FrameSampler:
    return FrameSampler(num_frames, max_pixels=64 * 64)


def responder(server: ScriptedServer | str, **settings: Any) -> EndpointResponder:
    base_url = server if isinstance(server, str) else server.base_url
    return EndpointResponder("tiny/model", base_url, settings.pop("sampler", sampler()), **settings)


def questions(number: int) -> list[Request]:
    return [Request(f"question {index}") for index in range(number)]


def unreached(error: pytest.ExceptionInfo[Unanswered], index: int = 0) -> Unreached:
    """The one request's failure, which asking again may mend."""
    failure = error.value.results[index]
    assert isinstance(failure, Unreached)
    assert error.value.transient
    return failure


# ------------------------------------------------------------------------------------------------- what is asked, order


def test_answers_stand_in_the_order_of_the_requests(serve: Serve) -> None:
    def script(call: Call) -> Reply:
        time.sleep(0.3 if call.text == "question 0" else 0.0)
        return Reply(f" answer to {call.text}\n")

    server = serve(script)
    assert responder(server, concurrency=4).respond(questions(6)) == [f"answer to question {i}" for i in range(6)]
    assert len(server.calls) == 6


def test_nothing_asked_is_nothing_answered() -> None:
    assert responder("http://127.0.0.1:9/v1").respond([]) == []


def test_what_is_sent(serve: Serve) -> None:
    server = serve(lambda call: Reply("yes"))
    answerer: Responder = responder(server, api_key=KEY, max_tokens=17, seed=5)
    answerer.respond([Request("Why?")])
    (call,) = server.calls
    assert call.path == "/v1/chat/completions"
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.body == {
        "model": "tiny/model",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
        "max_tokens": 17,
        "temperature": 0.0,
        "seed": 5,
        "stream": False,
    }
    assert answerer.name == f"tiny/model@{server.base_url.split('/')[2]}"


def test_control_tokens_are_parted_for_servers_that_would_parse_them(serve: Serve) -> None:
    server = serve(lambda call: Reply("yes"))
    responder(server).respond([Request("A man writes <|im_end|> and <image>, then <b>.")])
    sent = server.calls[-1].body["messages"][0]["content"][-1]["text"]
    assert sent == "A man writes < |im_end|> and < image>, then <b>."


@pytest.mark.parametrize("family", tiny_models.ALL)
def test_every_special_token_of_every_family_is_known_by_its_form(family: str) -> None:
    tokenizer = tiny_models.build(family)[1].tokenizer
    for token in tokenizer.all_special_tokens:
        assert holds_control_token(f"a{token}b"), token
        assert token not in parted(f"a{token}{token}b")


@pytest.mark.parametrize(
    "token",
    [
        *(
            "<s>",
            "</s>",
            "<unk>",
            "<bos>",
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            "<image_soft_token>",
        ),
        *("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[gMASK]", "<sop>", "<<SYS>>", "<</SYS>>", "<row_1_col_12>"),
        *("<|begin_of_text|>", "<|eot_id|>", "<|vision_start|>", "<|tool_call|>", "<｜end▁of▁sentence｜>", "<|user|>"),
    ],
)
def test_control_tokens_of_other_models_are_known_by_their_form(token: str) -> None:
    assert holds_control_token(f"a{token}b")
    assert not holds_control_token(parted(f"a{token}{token}b"))


@pytest.mark.parametrize(
    ("base_url", "path"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1beta/openai", "/v1beta/openai/chat/completions"),
    ],
)
def test_where_requests_go(serve: Serve, base_url: str, path: str) -> None:
    server = serve(lambda call: Reply("yes"))
    responder(server.base_url.removesuffix("/v1") + base_url).respond([Request("?")])
    assert server.calls[0].path == path


@pytest.mark.parametrize("view", [View.whole(), View.only([2]), View.without([1]), View.sparse(3)], ids=str)
def test_frames_of_the_view_arrive_in_order_as_jpegs(serve: Serve, clips: dict[str, Clip], view: View) -> None:
    server = serve(lambda call: Reply("a clip"))
    timeline = Timeline((clips["red"], clips["blue"], clips["green"]))
    responder(server, sampler=sampler(6)).respond([Request("What is shown?", timeline, view)])
    (call,) = server.calls
    sent = np.stack([np.asarray(image) for image in call.images]).astype(int)
    assert {image.format for image in call.images} == {"JPEG"}
    wanted = sampler(6)(timeline, view).pixels.permute(0, 2, 3, 1).numpy().astype(int)
    assert sent.shape == wanted.shape
    assert np.abs(sent - wanted).mean(axis=(1, 2, 3)).max() < 3  # what JPEG costs a flat colour
    assert call.text == "What is shown?"  # after the images


def test_frames_are_no_larger_than_the_sampler_allows(serve: Serve, clips: dict[str, Clip]) -> None:
    server = serve(lambda call: Reply("a clip"))
    small = FrameSampler(2, max_pixels=32 * 32)
    responder(server, sampler=small).respond([Request("?", Timeline((clips["red"],)))])
    assert [image.size for image in server.calls[0].images] == [(32, 32), (32, 32)]


# -------------------------------------------------------------------------------------------------- how many at once


def test_concurrency_is_reached_and_not_passed(serve: Serve) -> None:
    full = threading.Barrier(3)

    def script(call: Call) -> Reply:
        full.wait(10)  # breaks, and fails the call, unless three are here
        time.sleep(0.1)  # time enough for more to come
        return Reply("yes")

    server = serve(script)
    assert responder(server, concurrency=3, patience_seconds=0).respond(questions(9)) == ["yes"] * 9
    assert server.most_under_way == 3


def test_no_more_frames_are_taken_than_requests_are_under_way(serve: Serve, clips: dict[str, Clip]) -> None:
    class CountingSampler(FrameSampler):
        taken = 0

        def __call__(self, timeline: Timeline, view: View | None = None) -> Frames:
            CountingSampler.taken += 1
            return super().__call__(timeline, view)

    taken_when_answered: list[int] = []

    def script(call: Call) -> Reply:
        while CountingSampler.taken < 2:
            time.sleep(0.01)
        time.sleep(0.2)  # time enough to take more
        taken_when_answered.append(CountingSampler.taken)
        return Reply("yes")

    server = serve(script)
    requests = [Request("?", Timeline((clips["red"],)))] * 6
    responder(server, sampler=CountingSampler(2, max_pixels=64 * 64), concurrency=2).respond(requests)
    assert taken_when_answered[0] == 2
    assert all(taken <= answered + 2 for answered, taken in enumerate(taken_when_answered))
    assert CountingSampler.taken == 6


def test_works_where_an_event_loop_runs(serve: Serve) -> None:
    server = serve(lambda call: Reply(call.text.upper()))

    async def notebook() -> list[str]:
        return responder(server).respond([Request("a"), Request("b")])

    assert asyncio.run(notebook()) == ["A", "B"]


# ----------------------------------------------------------------------------------------------------- JSON schemas

SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
REFUSAL = b'{"error": "response_format: json_schema is not supported"}'


def has_schema(call: Call) -> bool:
    return "response_format" in call.body


def test_the_schema_goes_as_openai_vllm_and_sglang_read_it(serve: Serve) -> None:
    server = serve(lambda call: Reply('{"answer": "red"}'))
    asked = responder(server)
    assert asked.respond([Request("Which?", schema=SCHEMA)]) == ['{"answer": "red"}']
    asked.respond([Request("Which?")])
    with_schema, without = (call.body for call in server.calls)
    assert with_schema.pop("response_format") == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA},
    }
    assert with_schema == without


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_without_schemas_is_asked_without(serve: Serve, caplog: pytest.LogCaptureFixture, status: int) -> None:
    server = serve(lambda call: Reply(status=status, body=REFUSAL) if has_schema(call) else Reply("red"))
    asked = responder(server, concurrency=4)
    requests = [Request(f"question {index}", schema=SCHEMA) for index in range(12)]
    assert asked.respond(requests) == ["red"] * 12
    refused = sum(map(has_schema, server.calls))
    assert 1 <= refused <= 4, "those that were under way at once"
    assert len(server.calls) == 12 + refused
    assert asked.respond(requests) == ["red"] * 12
    assert sum(map(has_schema, server.calls)) == refused, "the endpoint is remembered"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "takes no JSON schema (status" in record.getMessage()
    assert "json_schema is not supported" in record.getMessage()


def test_a_refusal_that_is_not_the_schemas_stays_one(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(lambda call: Reply(status=400, body=b"prompt too long") if "long" in call.text else Reply("red"))
    asked = responder(server)
    with pytest.raises(EndpointError, match="prompt too long"):
        asked.respond([Request("a long one", schema=SCHEMA)])
    assert [has_schema(call) for call in server.calls] == [True, False]
    assert asked.respond([Request("a short one", schema=SCHEMA)]) == ["red"]
    assert has_schema(server.calls[-1]), "it may still take schemas"
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_what_may_pass_is_tried_again_with_the_schema(serve: Serve) -> None:
    server = serve(lambda call: Reply("red") if call.number else Reply(status=503))
    assert responder(server).respond([Request("?", schema=SCHEMA)]) == ["red"]
    assert [has_schema(call) for call in server.calls] == [True, True]


# ------------------------------------------------------------------------------------------------------ trying again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_what_may_pass_is_tried_again(serve: Serve, status: int) -> None:
    server = serve(lambda call: Reply("at last") if call.number == 2 else Reply(status=status, body=b"busy"))
    assert responder(server).respond([Request("?")]) == ["at last"]
    assert len(server.calls) == 3
    assert server.calls[0].body == server.calls[2].body


def test_a_server_that_answers_nothing_ends_the_call(serve: Serve) -> None:
    server = serve(lambda call: Reply(status=503, body=b"no workers"))
    waits: list[str] = []
    asked = responder(server, patience_seconds=0.1)
    with pytest.raises(EndpointError) as error:
        asked.respond([Request("?")], on_wait=waits.append)
    # Waits of at least 0.01, 0.02 and 0.04 s fit into 0.1 s; then it is asked once more whether it is there at all.
    assert 2 <= len(server.calls) <= 5
    assert [call.text for call in server.calls] == [*["?"] * (len(server.calls) - 1), "Hello."]
    assert str(error.value) == (
        f"{asked.name}: status 503: no workers (tries: {len(server.calls) - 1}). {server.base_url} answered nothing "
        "for patience_seconds=0.1. See to the server, then run the same command again: what was answered is not asked "
        "again."
    )
    assert len(waits) == len(server.calls) - 2
    assert all(re.fullmatch(r"tiny/model@\S+: status 503: no workers; next try in \d s", wait) for wait in waits), waits


def test_a_request_that_a_sound_server_fails_on_is_not_final(serve: Serve) -> None:
    """Others are answered meanwhile, or the server answers a word of ours: this request may be answered later."""
    server = serve(lambda call: Reply(status=500, body=b"") if "poison" in call.text else Reply("yes"))
    for concurrency in (1, 3):
        handed: dict[int, Any] = {}
        with pytest.raises(Unanswered, match=r"^1 of 3 requests have no answer; .*status 500 \(tries: ") as error:
            responder(server, patience_seconds=0.1, concurrency=concurrency).respond(
                [Request("a"), Request("b"), Request("poison")], handed.__setitem__
            )
        unreached(error, 2)
        assert handed == {0: "yes", 1: "yes"}, "what is not final is not handed over"


def test_retry_after_is_waited_for(serve: Serve) -> None:
    headers = {"Retry-After": "1"}
    server = serve(lambda call: Reply("yes") if call.number else Reply(status=429, headers=headers, body=b"slow down"))
    assert responder(server).respond([Request("?")]) == ["yes"]
    first, second = server.calls
    assert second.arrived_seconds - first.arrived_seconds >= 1.0


def test_a_long_retry_after_is_not_waited_for(serve: Serve) -> None:
    server = serve(lambda call: Reply(status=429, headers={"Retry-After": "86400"}, body=b"come back tomorrow"))
    with pytest.raises(EndpointError, match=r"come back tomorrow \(tries: 1\)\. .* and asks to wait 86400 s\. See to"):
        responder(server).respond([Request("?")])


def test_an_endpoint_that_answers_some_dies_and_comes_back(serve: Serve) -> None:
    """Three of ten tries are answered, then none, then all: no request is answered twice."""
    state = {"dead": False}

    def script(call: Call) -> Reply:
        if state["dead"]:
            return Reply(status=503, hang_up=call.number % 2 == 0)
        return Reply(call.text.upper()) if call.number % 10 in (2, 5, 9) else Reply(status=429)

    server = serve(script)
    known: dict[int, Any] = {}

    def keep(index: int, result: Any) -> None:
        assert index not in known
        known[index] = result
        state["dead"] = len(known) >= 20

    asked = questions(60)
    with pytest.raises(EndpointError, match="run the same command again"):
        responder(server, patience_seconds=1).respond(asked, keep)
    assert 20 <= len(known) < 60
    state["dead"] = False
    before = len(server.calls)
    missing = [index for index in range(60) if index not in known]
    answers = responder(serve(lambda call: Reply(call.text.upper()))).respond([asked[index] for index in missing])
    known.update(zip(missing, answers, strict=True))
    assert [known[index] for index in range(60)] == [request.text.upper() for request in asked]
    assert len(server.calls) == before


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0),
        ("3", 3),
        ("0.5", 0.5),
        ("-1", 0),
        ("soon", 0),
        ("nan", 0),
        ("1e999", float("inf")),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", 0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 -99999999999", 0),
    ],
)
def test_retry_after_as_servers_write_it(header: str, seconds: float) -> None:
    assert chat.retry_after_seconds(header) == seconds


def test_retry_after_may_be_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 55 < chat.retry_after_seconds(date) <= 60


def waits_seconds(server: ScriptedServer, caplog: pytest.LogCaptureFixture, seed: int) -> list[float]:
    caplog.clear()
    with caplog.at_level(logging.INFO, endpoint.__name__):
        responder(server, seed=seed).respond([Request("?")])
    return [float(record.args[2]) for record in caplog.records if isinstance(record.args, tuple)]


def test_waits_double_with_a_jitter_of_the_seed(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(lambda call: Reply("yes") if call.number % 5 == 4 else Reply(status=500))
    waits = waits_seconds(server, caplog, seed=1)
    assert [0.01 * 2**k <= wait <= 0.015 * 2**k for k, wait in enumerate(waits)] == [True] * 4
    assert waits_seconds(server, caplog, seed=1) == waits
    assert waits_seconds(server, caplog, seed=2) != waits


def test_time_outs_are_tried_again(serve: Serve) -> None:
    def script(call: Call) -> Reply:
        time.sleep(60 if call.number == 0 else 0.0)
        return Reply("in time")

    server = serve(script)
    assert responder(server, timeout_seconds=1.0).respond([Request("?")]) == ["in time"]


def test_an_answer_that_trickles_in_times_out(serve: Serve) -> None:
    server = serve(lambda call: Reply("on and on and on", byte_seconds=0.3))
    began = time.monotonic()
    with pytest.raises(EndpointError, match=r"no answer within timeout_seconds=0\.4"):
        responder(server, timeout_seconds=0.4, patience_seconds=0).respond([Request("?")])
    assert time.monotonic() - began < 15  # of the 40 that the whole answer would take


def test_broken_connections_are_tried_again(serve: Serve) -> None:
    server = serve(lambda call: Reply("yes", hang_up=call.number == 0))
    assert responder(server).respond([Request("?")]) == ["yes"]
    assert len(server.calls) == 2


def test_refused_connections_end_the_call_at_last() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match=rf"tiny/model@127\.0\.0\.1:{port}: ConnectError: .*\(tries: \d\)\. "):
        responder(f"http://127.0.0.1:{port}/v1", patience_seconds=0.05).respond([Request("?")])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Bad gateway</html>",
        b'{"choices": [{"message": {"content": "cut o',
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"choices": null}',
        b'{"choices": []}',
        b'{"choices": "all of them"}',
        b'{"choices": [[]]}',
        b'{"choices": ["the first"]}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": "a word"}]}',
        b'{"choices": [{"message": {"content": 3}}]}',
        b'{"choices": [{"message": {"content": ["a", "b"]}}]}',
        b"[" * 10_000 + b"]" * 10_000,
        b'{"choices": ' * 10_000,
        b"1" * 10_000,
        b"\x1f\x8b",
    ],
)
def test_malformed_answers_are_tried_again(serve: Serve, body: bytes) -> None:
    server = serve(lambda call: Reply(body=body) if call.number < 2 else Reply("yes"))
    waits: list[str] = []
    assert responder(server).respond([Request("?")], on_wait=waits.append) == ["yes"]
    assert len(waits) == 2
    assert all("malformed answer: " in wait for wait in waits)


def test_no_content_is_an_empty_answer(serve: Serve) -> None:
    body = b'{"choices": [{"finish_reason": "length", "message": {"role": "assistant", "content": null}}]}'
    assert responder(serve(lambda call: Reply(body=body))).respond([Request("?")]) == [""]


def test_answers_that_reached_their_bound_are_known(serve: Serve) -> None:
    def script(call: Call) -> Reply:
        choice = {"finish_reason": call.text, "message": {"role": "assistant", "content": "a red ball and"}}
        return Reply(body=json.dumps({"choices": [choice]}).encode())

    answers = responder(serve(script)).respond([Request("length"), Request("stop")])
    assert answers == ["a red ball and"] * 2
    assert [isinstance(answer, CutOff) for answer in answers] == [True, False]


@pytest.mark.parametrize("body", [b'{"content": null}', b'{"content": "", "reasoning_content": "It may be red"}'])
def test_an_answer_cut_off_in_its_reasoning_is_known(serve: Serve, body: bytes) -> None:
    reply = b'{"choices": [{"finish_reason": "length", "message": ' + body + b"}]}"
    (answer,) = responder(serve(lambda call: Reply(body=reply))).respond([Request("?")])
    assert (answer, type(answer)) == ("", CutOff)


def test_what_a_filter_withheld_is_no_answer(serve: Serve) -> None:
    def script(call: Call) -> Reply:
        choice = {"finish_reason": call.text, "message": {"role": "assistant", "content": "I"}}
        return Reply(body=json.dumps({"choices": [choice]}).encode())

    server = serve(script)
    with pytest.raises(Unanswered, match="content filter withheld") as error:
        responder(server).respond([Request("content_filter"), Request("stop")])
    assert isinstance(error.value.results[0], Refused)
    assert error.value.results[0].reason == "refused"
    assert not error.value.transient
    assert len(server.calls) == 2, "asked once"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b'{"choices": [{"message": {"content": null, "refusal": "I cannot help with that."}}]}'),
        Reply(status=400, body=b'{"error": {"code": "content_filter", "message": "The prompt was filtered."}}'),
        Reply(status=400, body=b'{"error": {"code": "content_policy_violation"}}'),
    ],
)
def test_what_a_filter_refuses_in_other_ways_is_told_from_other_refusals(serve: Serve, reply: Reply) -> None:
    """However many they are in a row: a film of battles is filtered scene by scene."""
    server = serve(lambda call: reply if "filtered" in call.text else Reply("yes"))
    handed: dict[int, Any] = {}
    with pytest.raises(Unanswered) as error:
        responder(server, concurrency=1).respond([*[Request("filtered")] * 20, Request("?")], handed.__setitem__)
    assert {type(result) for result in error.value.results[:20]} == {Refused}
    assert len(handed) == 21
    with pytest.raises(Unanswered):
        responder(server).respond([Request("filtered")])


def test_a_request_may_be_given_up_for_good(serve: Serve) -> None:
    server = serve(lambda call: Reply(status=500, body=b"") if "poison" in call.text else Reply("yes"))
    handed: dict[int, Any] = {}
    with pytest.raises(Unanswered) as error:
        responder(server, patience_seconds=0.05, drop_unanswered=True).respond(
            [Request("poison"), Request("a")], handed.__setitem__
        )
    assert not error.value.transient
    assert isinstance(handed[0], NoAnswer)
    assert handed[0].reason == "no_answer"
    with pytest.raises(
        EndpointError, match="answered nothing for patience_seconds"
    ):  # nothing is given up for an outage
        responder("http://127.0.0.1:9/v1", patience_seconds=0.05, drop_unanswered=True).respond([Request("a")])


def test_an_answer_that_the_server_broke_off_is_asked_again(serve: Serve) -> None:
    def script(call: Call) -> Reply:
        choice = {"finish_reason": "stop" if call.number else "abort", "message": {"content": f"answer {call.number}"}}
        return Reply(body=json.dumps({"choices": [choice]}).encode())

    assert responder(serve(script)).respond([Request("?")]) == ["answer 1"]


# ------------------------------------------------------------------------------------- what one failure does to others


def test_the_others_answers_are_kept(serve: Serve, clips: dict[str, Clip], tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")

    def script(call: Call) -> Reply:
        return Reply(status=500) if call.text == "poison" else Reply(call.text.upper())

    server = serve(script)
    unreadable = Request("c", Timeline((Clip(str(text), 0.0, 1.0),)))
    with pytest.raises(Unanswered, match=r"^2 of 4 requests have no answer; the first: ") as error:
        responder(server, patience_seconds=0.1, concurrency=2).respond(
            [Request("a"), Request("poison"), unreadable, Request("d", Timeline((clips["red"],)))]
        )
    first, poisoned, unread, last = error.value.results
    assert (first, last) == ("A", "D")
    assert isinstance(poisoned, Unreached)
    assert isinstance(unread, UnreadableVideo)
    assert unread.reason == "unreadable"
    assert sorted({call.text for call in server.calls} - {"Hello."}) == ["a", "d", "poison"]
    copy = pickle.loads(pickle.dumps(error.value))
    assert str(copy) == str(error.value)
    assert [str(result) for result in copy.results] == [str(result) for result in error.value.results]


def test_a_build_drops_what_is_not_answered_by_name(serve: Serve, clips: dict[str, Clip], tmp_path: Path) -> None:
    def script(call: Call) -> Reply:
        colours = [int(np.asarray(image).min()) for image in call.images]
        if call.body["model"] == "writer":  # of one clip; only the white one has no dark channel
            refusal = Reply(status=422, body=f"too white for {KEY}".encode())
            return refusal if min(colours) > 80 else Reply("Which colour is the clip?")
        return Reply(f"One of brightness {colours}.")

    server = serve(script)
    writer, answerer = (
        EndpointResponder(model, server.base_url, sampler(), api_key=KEY) for model in ("writer", "answerer")
    )
    settings = Stage1Settings(num_rows=6, max_clips=3, max_rounds=4)
    funnel = build_stage1(list(clips.values()), writer, answerer, tmp_path / "rows", settings)
    assert funnel["stages"]["rows"] == 6
    assert funnel["dropped"]["no_answer"] >= 1
    drops = [json.loads(line) for line in (tmp_path / "rows.log" / "dropped.jsonl").read_text().splitlines()]
    (unanswered, *_) = [drop for drop in drops if drop["reason"] == "no_answer"]
    assert unanswered["detail"].startswith(f"writer at {server.base_url}: status 422: too white for ***. ")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5, "rows, card, log and job"
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    asked = [call for call in server.calls if call.body["model"] == "writer"]
    assert len(asked) == 4  # each clip once


@pytest.mark.parametrize("seed", [0, 1])
def test_a_build_through_outages_makes_the_rows_of_an_undisturbed_one(
    serve: Serve, clips: dict[str, Clip], tmp_path: Path, seed: int
) -> None:
    """The server answers 30 %, dies, comes back, twice; the same command asks for what is missing only."""
    rng = random.Random(seed)
    dies_after = [rng.randint(2, 5), rng.randint(6, 9)]
    answered: list[str] = []
    state = {"weak": False}

    def script(call: Call) -> Reply:
        if state["weak"]:
            if dies_after and len(answered) >= dies_after[0]:
                return Reply(status=502, body=b"gone", hang_up=call.number % 2 == 0)
            if call.number % 10 not in (1, 4, 8):
                return Reply(status=503, body=b"busy")
        answered.append(call.text)
        colours = [int(np.asarray(image).min()) for image in call.images]
        is_writer = call.body["model"] == "writer"
        return Reply(f"Which colour of {colours} is it?" if is_writer else f"One of brightness {colours}.")

    server = serve(script)

    def build(name: str) -> bytes:
        writer, answerer = (
            EndpointResponder(model, server.base_url, sampler(), concurrency=2, patience_seconds=1)
            for model in ("writer", "answerer")
        )
        settings = Stage1Settings(num_rows=6, max_clips=3, max_rounds=4)
        build_stage1(list(clips.values()), writer, answerer, tmp_path / name, settings)
        return (tmp_path / name / "train.parquet").read_bytes()

    undisturbed = build("undisturbed")
    needed = len(answered)
    answered.clear()
    state["weak"] = True
    stops = []
    rows = b""
    while not rows:
        try:
            rows = build("disturbed")
        except EndpointError as error:
            stops.append(str(error))
            if dies_after and len(answered) >= dies_after[0]:
                dies_after.pop(0)
        assert len(stops) < 9, stops
    assert not dies_after, "it died twice"
    assert all("the same command" in stop for stop in stops)
    assert rows == undisturbed
    once = len(answered) - answered.count("Hello.")
    assert needed <= once <= needed + 2 * len(stops), "at most those in flight are answered twice"


def test_an_outage_ends_the_call(serve: Serve) -> None:
    server = serve(lambda call: Reply("yes") if call.number == 0 else Reply(status=503, body=b"gone"))
    handed: dict[int, Any] = {}
    with pytest.raises(EndpointError, match=r"status 503: gone .* answered nothing for patience_seconds=0\.1\. "):
        responder(server, patience_seconds=0.1, concurrency=1).respond(questions(100), handed.__setitem__)
    assert handed == {0: "yes"}
    assert {call.text for call in server.calls} == {"question 0", "question 1", "Hello."}


def test_failures_between_answers_are_no_outage(serve: Serve) -> None:
    server = serve(lambda call: Reply("yes") if call.number % 4 == 3 else Reply(status=503))
    assert responder(server, concurrency=1).respond(questions(5)) == ["yes"] * 5


# -------------------------------------------------------------------------------------------------- refusals, secrets


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(400, "fewer or smaller frames"), (401, "api_key"), (403, "api_key"), (404, "/v1/models"), (422, "fewer")],
)
def test_refusals_of_all_end_the_call(serve: Serve, status: int, remedy: str) -> None:
    """At once where no request can be better than another."""
    server = serve(lambda call: Reply(status=status, body=b'{"detail": "not like this"}'))
    with pytest.raises(EndpointError) as error:
        responder(server, concurrency=1).respond(questions(5))
    assert len(server.calls) == (5 if status in (400, 422) else 1)
    message = str(error.value)
    assert message.startswith(f'tiny/model at {server.base_url}: status {status}: {{"detail": "not like this"}}. ')
    assert remedy in message


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("schema", [None, {"type": "object"}])
def test_one_refused_request_costs_no_other(serve: Serve, status: int, place: int, schema: Any) -> None:
    """A prompt too long for the model or a content filter, at the first request or a later one: no run ends there."""
    server = serve(lambda call: Reply(status=status, body=b"too long") if "Q3" in call.text else Reply("yes"))
    asked = [Request(f"Q{3 if number == place else 9}", schema=schema) for number in range(5)]
    one = responder(server, concurrency=1)
    for _ in range(2):
        with pytest.raises(Unanswered, match=r"^1 of 5 requests have no answer; .*too long") as error:
            one.respond(asked)
        assert isinstance(error.value.results[place], NoAnswer)
        assert not error.value.transient
        assert [result for result in error.value.results if isinstance(result, str)] == ["yes"] * 4
    assert len([call for call in server.calls if "Q3" in call.text]) <= 4, "asked once, and once without its schema"
    with pytest.raises(EndpointError, match=r"too long.* The last 16 requests"):
        one.respond([Request("Q3")] * 40)


@pytest.mark.parametrize("status", [200, 401, 500])
@pytest.mark.parametrize("repeating", [False, True], ids=["server keeps it", "server repeats it"])
def test_the_key_is_never_shown(serve: Serve, caplog: pytest.LogCaptureFixture, status: int, repeating: bool) -> None:
    body = f"Incorrect API key provided: {KEY}. See".encode() if repeating else b"Incorrect API key"
    headers = {"X-Error-Message": f"bad key {KEY}"} if repeating else {}
    server = serve(lambda call: Reply(status=status, body=body, headers=headers))
    asked = responder(server, api_key=KEY, patience_seconds=0.5)
    with caplog.at_level(logging.DEBUG), pytest.raises((EndpointError, Unanswered)) as error:
        asked.respond([Request("?")])
    assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in "".join(traceback.format_exception(error.value))
    assert KEY not in pickle.dumps(error.value).decode("latin-1")
    assert KEY not in repr(asked) + str(asked) + asked.name
    # What the HTTP library logs of a server's own headers is not ours to change.
    logged = [record for record in caplog.records if not repeating or record.name.startswith("longvpo_hf")]
    assert logged or status == 401
    assert KEY not in "".join(record.getMessage() for record in logged)
    if repeating and status != 200:
        assert "Incorrect API key provided: ***. See" in f"{error.value}"


def test_long_refusals_are_cut(serve: Serve) -> None:
    server = serve(lambda call: Reply(status=422, body=b"x" * 100_000))
    with pytest.raises(EndpointError) as error:
        responder(server).respond([Request("?")])
    assert len(str(error.value)) < 700


@pytest.fixture
def headers_sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Of every request, whatever its address: nothing leaves this process."""
    sent: list[dict[str, str]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(dict(request.headers))
        return httpx2.Response(200, json={"choices": [{"message": {"content": "yes"}}]})

    monkeypatch.setattr(chat, "_client", lambda is_local: httpx2.AsyncClient(transport=httpx2.MockTransport(answer)))
    return sent


@pytest.mark.parametrize(
    ("base_url", "is_own"),
    [
        ("https://router.huggingface.co/v1", True),
        ("https://router.huggingface.co:443/v1", True),
        ("https://ROUTER.huggingface.co/v1", True),
        ("https://router.huggingface.co:8443/v1", False),
        ("http://router.huggingface.co/v1", False),
        ("https://router.huggingface.co.evil.example/v1", False),
        ("https://a1.eu-west-1.aws.endpoints.huggingface.cloud", False),  # a container of anybody's
        ("https://endpoints.huggingface.co/v1", False),
        ("https://someone.hf.space/v1", False),
        ("https://nothuggingface.co/v1", False),
        ("http://localhost:8000/v1", False),
    ],
)
def test_the_users_token_goes_to_hugging_faces_router_only(
    headers_sent: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, base_url: str, is_own: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", KEY)
    responder(base_url).respond([Request("?")])
    assert (KEY in json.dumps(headers_sent)) is is_own


@pytest.mark.parametrize(
    ("base_url", "may"),
    [
        ("http://localhost:8000/v1", True),
        ("http://vllm.localhost/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://[::1]:8000/v1", True),
        ("https://somebody.example/v1", True),
        ("http://somebody.example/v1", False),
        ("http://localhost.somebody.example/v1", False),
        ("http://10.0.0.5:8000/v1", False),
        ("http://0.0.0.0:8000/v1", False),
        ("http://127.0.0.1.nip.io/v1", False),
        ("http://[2001:db8::1]/v1", False),
    ],
)
def test_a_key_goes_unencrypted_to_this_machine_only(
    headers_sent: list[dict[str, str]], base_url: str, may: bool
) -> None:
    responder(base_url).respond([Request("?")])  # without a key anywhere
    if not may:
        with pytest.raises(
            ConfigError, match=r"would go unencrypted to .*https address, or plain_http_key=True"
        ) as error:
            responder(base_url, api_key=KEY)
        assert KEY not in str(error.value)
    responder(base_url, api_key=KEY, plain_http_key=not may).respond([Request("?")])
    assert [headers["authorization"] for headers in headers_sent] == ["Bearer EMPTY", f"Bearer {KEY}"]


def test_a_server_of_this_machine_is_asked_without_a_proxy(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would read the key; other servers are asked through it."""
    proxy = serve(lambda call: Reply("by proxy"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.base_url.removesuffix("/v1"))
    server = serve(lambda call: Reply("directly"))
    assert responder(server, api_key=KEY).respond([Request("?")]) == ["directly"]
    assert not proxy.calls
    assert responder("http://elsewhere.invalid/v1").respond([Request("?")]) == ["by proxy"]


def test_no_copy_and_no_dump_of_a_responder_holds_the_key(serve: Serve) -> None:
    server = serve(lambda call: Reply("yes"))
    asked = responder(server, api_key=KEY)
    copies = [copy.deepcopy(asked), pickle.loads(pickle.dumps(asked)), copy.deepcopy(pickle.loads(pickle.dumps(asked)))]
    dumps = [pickle.dumps(each) for each in (asked, copy.copy(asked), *copies)]
    dumps += [repr((asked, vars(asked), vars(asked._chat))).encode(), json.dumps(asked.settings).encode()]
    assert not [dump for dump in dumps if KEY.encode() in dump]
    for each in copies:
        with pytest.raises(EndpointError, match="keys are not copied: make it anew, with api_key"):
            each.respond([Request("?")])
    assert not server.calls
    assert asked.respond([Request("?")]) == ["yes"]
    assert copy.deepcopy(responder(server)).respond([Request("?")]) == ["yes"], "without a key a copy lacks nothing"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["elsewhere", "here"])
def test_frames_and_key_follow_no_redirect(serve: Serve, status: int, place: str) -> None:
    other = serve(lambda call: Reply("a page's text"))
    server = serve(lambda call: Reply(status=status, headers={"Location": target}, body=b"<a>moved</a>"))
    target = (other if place == "elsewhere" else server).base_url + "/chat/completions/"
    with pytest.raises(
        EndpointError, match=r"<a>moved</a>\. It redirects to http://127.*give the base_url of the server"
    ) as error:
        responder(server).respond([Request("?")])
    assert target in str(error.value)
    assert not other.calls
    assert len(server.calls) == 1


@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("status", [200, 401, 500])
def test_no_body_is_read_beyond_a_bound(serve: Serve, encoding: str | None, status: int) -> None:
    """Neither one that is that long nor one that inflates to it: 100 MB in 100 kB."""
    huge = b'{"choices": [{"message": {"content": "' + b"a" * (100 * 1000**2 if encoding else 6 * 1000**2) + b'"}}]}'
    body = {None: lambda: huge, "gzip": lambda: gzip.compress(huge), "deflate": lambda: zlib.compress(huge)}[encoding]()
    headers = {"Content-Encoding": encoding} if encoding else {}
    server = serve(lambda call: Reply(status=status, body=body, headers=headers))
    tracemalloc.start()
    try:
        said = r"malformed answer: more than 4194304 bytes" if status == 200 else rf"status {status}: .*aaa …"
        with pytest.raises(EndpointError, match=said):
            responder(server, patience_seconds=0).respond([Request("?")])
        assert tracemalloc.get_traced_memory()[1] < 40 * 1000**2
    finally:
        tracemalloc.stop()


def test_what_is_compressed_is_read_all_the_same(serve: Serve) -> None:
    body = gzip.compress(b'{"choices": [{"message": {"content": "yes"}}]}')
    server = serve(lambda call: Reply(body=body, headers={"Content-Encoding": "gzip"}))
    assert responder(server).respond([Request("?")]) == ["yes"]
    assert server.calls[0].headers["accept-encoding"] == "identity"


CONTROLS = "\x1b[31mred\x1b]0;title\x07 \x9b2J\r\x08\u202eder\u2066"


def test_no_control_character_gets_further(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def controls_of(text: str) -> set[str]:
        return {character for character in text if unicodedata.category(character) in ("Cc", "Cf")} - set("\n\t")

    assert len(controls_of(CONTROLS)) == 7, "this test wants controls"
    answer = json.dumps({"choices": [{"message": {"content": f"\ta\r\n{CONTROLS}\U0001f468\u200d\U0001f680"}}]})
    (said,) = responder(serve(lambda call: Reply(body=answer.encode()))).respond([Request("?")])
    assert said == "a\n[31mred]0;title 2Jder\U0001f468\u200d\U0001f680", "joined characters stay joined"
    for status in (200, 302, 400, 401, 500):
        headers = {"Location": "http://x/\x1b[31m".encode("unicode_escape").decode()}
        server = serve(lambda call, s=status, h=headers: Reply(status=s, headers=h, body=f"no: {CONTROLS}".encode()))  # type: ignore[misc]
        waits: list[str] = []
        with caplog.at_level(logging.INFO, endpoint.__name__), pytest.raises(EndpointError) as error:
            responder(server, patience_seconds=0.05).respond([Request("?", schema=SCHEMA)], on_wait=waits.append)
        assert not controls_of(str(error.value))
        assert not controls_of("".join(waits) + caplog.text)
        assert "no: [31mred" in str(error.value) or status == 200


def test_offline_mode_is_named_and_leaves_other_servers_alone(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, headers_sent: list[dict[str, str]]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EndpointError, match="HF_HUB_OFFLINE is set, and https://router"):
        responder("https://router.huggingface.co/v1").respond([Request("?")])
    assert not headers_sent
    assert responder("http://localhost:8000/v1").respond([Request("?")]) == ["yes"]


# ----------------------------------------------------------------------------------------------- before work starts


def test_a_server_that_answers_passes_the_check(serve: Serve) -> None:
    server = serve(lambda call: Reply("Yellow and blue."))
    responder(server).check()
    responder(server).check(sees_video=False)
    shown, blind = server.calls
    (image,) = shown.images
    assert image.size == (224, 224)
    assert [np.asarray(image)[100, x].argmin() for x in (30, 190)] == [2, 0], "little blue in yellow, no red in blue"
    assert not blind.images


def test_a_server_that_drops_images_is_refused(serve: Serve) -> None:
    server = serve(lambda call: Reply("I cannot see a picture."))
    with pytest.raises(EndpointError, match=r"says the same of a picture as without it \('I cannot see a picture.'\)"):
        responder(server).check()
    responder(server).check(sees_video=False)


def test_a_model_that_may_not_see_is_warned_of(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(lambda call: Reply("Red\x1b[2J and green." if call.images else "Which picture?"))
    with caplog.at_level(logging.WARNING):
        responder(server).check()
    assert "did not name the colours of a yellow and blue picture; it said: 'Red[2J and green.'" in caplog.text


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"The model `tiny/model` does not exist.", r"does not exist\.\. Compare the model's name with"),
        (401, b"Invalid key", "Give an api_key that this server takes"),
        (400, b"max_tokens is too large", "max_tokens is too large"),
    ],
)
def test_what_would_fail_every_request_is_known_before(serve: Serve, status: int, body: bytes, message: str) -> None:
    server = serve(lambda call: Reply(status=status, body=body))
    with pytest.raises(EndpointError, match=rf"^tiny/model at {server.base_url}: status {status}: .*{message}"):
        responder(server).check()
    assert len(server.calls) <= 2


@pytest.mark.parametrize("status", [400, 422, 500, 501])
def test_a_model_without_eyes_is_known_before(serve: Serve, status: int) -> None:
    server = serve(lambda call: Reply(status=status, body=b"no images here") if call.images else Reply("Hi"))
    with pytest.raises(
        EndpointError, match=rf"^tiny/model at {server.base_url} answers text but takes no images: serve a v"
    ):
        responder(server).check()
    assert len(server.calls) == 2
    responder(server).check(sees_video=False)


def test_a_server_that_is_not_there_is_known_at_once() -> None:
    with pytest.raises(
        EndpointError, match=r"^tiny/model at http://127.0.0.1:9/v1: ConnectError: .*Start the server, or"
    ):
        responder("http://127.0.0.1:9/v1").check()


def test_a_server_that_loads_its_model_is_waited_for(serve: Serve) -> None:
    server = serve(lambda call: Reply("Yellow and blue.") if call.number == 3 else Reply(status=503, body=b"loading"))
    waits: list[str] = []
    responder(server).check(on_wait=waits.append)
    assert len(server.calls) == 4
    assert all("status 503: loading; next try in" in wait for wait in waits)
    server = serve(lambda call: Reply(status=503, body=b"loading"))
    with pytest.raises(
        EndpointError, match=rf"^tiny/model at {server.base_url}: status 503: loading\. See to the server"
    ):
        responder(server, patience_seconds=0.05).check()


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "concurrency must be ≥ 1, got 0"),
        ({"concurrency": 101}, "concurrency must be ≤ 100, .* got 101"),
        ({"max_tokens": 0}, "max_tokens must be ≥ 1, got 0"),
        ({"patience_seconds": -1}, "patience_seconds must be ≥ 0, got -1"),
        ({"patience_seconds": float("nan")}, "patience_seconds must be ≥ 0, got nan"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be > 0, got 0.0"),
        ({"sampler": FrameSampler(8)}, "give FrameSampler max_pixels"),
        ({"api_key": f"{KEY}\n{KEY}"}, "api_key holds characters"),
        ({"api_key": f"{KEY}ß"}, "api_key holds characters"),
        ({"base_url": "localhost:8000/v1"}, "must be an http"),
        ({"base_url": f"http://user:{KEY}@localhost/v1"}, "no user, query or fragment; give localhost's key"),
        ({"base_url": f"http://localhost/v1?key={KEY}"}, "no user, query or fragment; give localhost's key"),
    ],
)
def test_settings_out_of_bounds(settings: dict[str, Any], message: str) -> None:
    base_url = settings.pop("base_url", "http://localhost:8000/v1")
    with pytest.raises(ValueError, match=message) as error:
        responder(base_url, **settings)
    assert KEY not in str(error.value)


def test_a_key_read_with_its_line_break(serve: Serve) -> None:
    server = serve(lambda call: Reply("yes"))
    responder(server, api_key=f"{KEY}\n").respond([Request("?")])
    assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"


# ----------------------------------------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-qwen2.5-vl")
    model, processor = tiny_models.build("qwen2_5_vl")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of `transformers serve` with the tiny model: a process of its own, offline, about 10 s to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model_folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + 300
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                with direct.open(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def answers_here(model_folder: Path, requests: Sequence[Request], max_tokens: int) -> list[str]:
    """What the tiny model answers in this process to the same images and text."""
    model, processor = tiny_models.build("qwen2_5_vl")
    answers = []
    for request in requests:
        assert request.timeline is not None
        pixels = sampler()(request.timeline, request.view).pixels.permute(0, 2, 3, 1)
        urls = [chat.image_part(Image.fromarray(frame.numpy()))["image_url"]["url"] for frame in pixels]
        content = [{"type": "image", "url": url} for url in urls] + [{"type": "text", "text": request.text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(chat._CONTROLS.sub("", text).strip())
    return answers


def test_a_real_server_sees_the_frames_and_answers(served: str, model_folder: Path, clips: dict[str, Clip]) -> None:
    timeline = Timeline((clips["red"], clips["blue"]))
    requests = [Request("What colour?", timeline, view) for view in (View.whole(), View.only([0]), View.only([1]))]
    asked = EndpointResponder(str(model_folder), served, sampler(), max_tokens=12, concurrency=3)
    answers = asked.respond(requests)
    assert answers == answers_here(model_folder, requests, max_tokens=12)
    assert len(set(answers)) > 1  # what is shown makes a difference
    assert asked.name == f"{model_folder.name}@{served.split('/')[2]}"  # and not where the folder is


def test_a_real_server_refuses_another_model(served: str) -> None:
    with pytest.raises(EndpointError, match=r"^another/model at http://.*: status 400: .*Server is pinned to"):
        EndpointResponder("another/model", served, sampler()).respond([Request("?")])


def test_a_real_server_that_leaves_schemas_out_answers_all_the_same(served: str, model_folder: Path) -> None:
    asked = EndpointResponder(str(model_folder), served, sampler(), max_tokens=12)
    assert asked.respond([Request("Who?", schema=SCHEMA)]) == asked.respond([Request("Who?")])
