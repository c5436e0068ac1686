"""10,000 replies that no one should send: each ends as an answer, an unanswered request or an `EndpointError`.

Most go through a transport in this process, as httpx2 hands them over; some hundreds are bytes on a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import socket
import threading
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from longvpo_hf.errors import EndpointError
from longvpo_hf.frames import FrameSampler
from longvpo_hf.responders import EndpointResponder, NoAnswer, Request, Unanswered, Unreached, chat, endpoint

KEY = "sk-a-secret-key"
NUM_REPLIES = 10_000
REQUESTS_PER_CALL = 20
DEEP = "[" * 10_000 + "]" * 10_000
BOMB = gzip.compress(b"a" * 10 * 1000**2)

# --------------------------------------------------------------------------------------------------- what a server says


#: Statuses that leave the call running, and those that may end it.
PASSING = (200, 200, 200, 200, 201, 204, 400, 408, 413, 422, 429, 500, 502, 503, 529)
ENDING = (302, 307, 308, 401, 403, 404)


def status(rng: random.Random) -> int:
    return rng.choice([*PASSING, *ENDING]) if rng.random() < 0.9 else rng.randint(200, 999)


def scalar(rng: random.Random) -> Any:
    return rng.choice(
        [
            *(None, True, False, 0, -1, 1e308, float("nan"), float("inf"), 10**400, "", "yes", "\x1b[31mred", "\ud83d"),
            *(KEY, "content_filter", "length", "stop", "abort", "\u202e", "\x00", "choices", "a" * 5000, "</think>"),
        ]
    )


def value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value of any shape, often with the names that an answer has."""
    if depth > 4 or rng.random() < 0.3:
        return scalar(rng)
    if rng.random() < 0.4:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    names = [
        "choices",
        "message",
        "content",
        "finish_reason",
        "error",
        "usage",
        "index",
        "reasoning_content",
        "",
        "\x1b",
    ]
    return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randint(0, 4))}


def answer(rng: random.Random) -> Any:
    """Something close to an answer: any part may be replaced."""
    message: Any = {"role": "assistant", "content": rng.choice(["yes", " \x1b[2Jno\r\n", "", None, "<think>"])}
    if rng.random() < 0.2:
        message = value(rng, 2) if rng.random() < 0.5 else {**message, "content": value(rng, 2)}
    choice: Any = {"index": 0, "finish_reason": "stop", "message": message}
    if rng.random() < 0.3:
        choice = (
            value(rng, 1) if rng.random() < 0.3 else {**choice, "finish_reason": rng.choice(["length", scalar(rng)])}
        )
    choices: Any = value(rng) if rng.random() < 0.1 else [choice] * rng.randint(0, 2)
    return {"id": value(rng, 3), "choices": choices, "usage": value(rng, 3)}


def body(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.55:
        return json.dumps(answer(rng)).encode()
    if kind < 0.75:
        return json.dumps(value(rng)).encode()
    if kind < 0.8:
        return rng.choice(
            [DEEP, '{"choices": ' * 10_000, '{"choices": [{"message": {"content": ' + DEEP + "}}]}"]
        ).encode()
    if kind < 0.9:
        whole = json.dumps(answer(rng)).encode()
        return whole[: rng.randint(0, len(whole))]
    if kind < 0.95:
        return rng.randbytes(rng.randint(0, 200))
    return f"<html>\x1b]0;owned\x07 {KEY} Bad gateway \x9b31m</html>".encode(rng.choice(["utf-8", "latin-1"]))


DATES = (
    "Wed, 21 Oct 99999999999 07:28:00 GMT",
    "Wed, 21 Oct 0000 07:28:00 GMT",
    "Wed, 99 Oct 2015 99:99:99 GMT",
    "Wed, 21 Oct 2015 07:28:00 -99999999999",
    "Fri, 31 Dec 9999 23:59:59 +0000",
)


def headers(rng: random.Random) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if rng.random() < 0.4:
        numbers = ["0", "0.001", "-5", "1e999", "nan", "9" * 400, "٣", "1_000", "soon", "", " 7 ", "0x10"]
        found.append(("Retry-After", rng.choice([*numbers, *DATES])))
    if rng.random() < 0.3:
        targets = [
            "https://elsewhere.example/",
            "//elsewhere.example",
            "/v1",
            "http://[::1",
            "ftp://x",
            "http://x:99999/",
        ]
        targets += ["javascript:alert(1)", "", "http://\xff/", "http://a b/", "?" * 3000, "http://user:pw@x/"]
        found.append(("Location", rng.choice(targets)))
    if rng.random() < 0.2:
        found.append(
            ("Content-Type", rng.choice(["text/html; charset=nonsense", "application/json; charset=utf-7", ";;;"]))
        )
    if rng.random() < 0.2:
        cookies = [
            "a=b; Max-Age=" + "9" * 400,
            "a=b; Expires=" + rng.choice(DATES),
            ";;;=",
            "a=b; Domain=.huggingface.co",
        ]
        found.append(("Set-Cookie", rng.choice(cookies)))
    if rng.random() < 0.1:
        found.append(
            (rng.choice(["X-Error-Message", "WWW-Authenticate", "Date", "Age", "Link"]), rng.choice([KEY, *DATES]))
        )
    return found


def encoded(rng: random.Random, content: bytes) -> tuple[bytes, list[tuple[str, str]]]:
    """A body as some servers compress it, and as none does."""
    if rng.random() < 0.8:
        return content, []
    encoding = rng.choice(
        ["gzip", "deflate", "br", "zstd", "identity", "nonsense", "gzip, gzip", ", ".join(["gzip"] * 50)]
    )
    if rng.random() < 0.6:
        content = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding, bytes)(content)
    if rng.random() < 0.1:
        content = BOMB
    return content, [("Content-Encoding", encoding)]


class Server(httpx2.AsyncBaseTransport):
    """Says what chance says, and sometimes nothing: errors are those of httpx2's own transport."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.num_replies = 0
        self.lets_calls_run = False

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        rng = self.rng
        self.num_replies += 1
        await request.aread()
        if rng.random() < 0.05:
            errors = (
                httpx2.ConnectError,
                httpx2.ReadError,
                httpx2.RemoteProtocolError,
                httpx2.ProxyError,
                httpx2.PoolTimeout,
            )
            raise rng.choice(errors)(rng.choice(["", "gone \x1b[31m", KEY]), request=request)
        if rng.random() < 0.001:
            await asyncio.sleep(60)
        content, more = encoded(rng, body(rng))
        listed = [(name.encode(), text.encode("utf-8", "replace")) for name, text in [*headers(rng), *more]]
        code = rng.choice(PASSING) if self.lets_calls_run else status(rng)
        return httpx2.Response(code, headers=listed, stream=Chunks(rng, content))


class Chunks(httpx2.AsyncByteStream):
    """A body in a few pieces, after some of which the connection may break."""

    def __init__(self, rng: random.Random, content: bytes) -> None:
        self.rng = rng
        self.content = content

    async def __aiter__(self) -> Any:
        step = max(1, len(self.content) // self.rng.randint(1, 4))
        for start in range(0, len(self.content), step):
            yield self.content[start : start + step]
            if self.rng.random() < 0.01:
                raise httpx2.ReadError("broken off")


# --------------------------------------------------------------------------------------------------- what becomes of it


def controls_of(text: str) -> set[str]:
    return {character for character in text if unicodedata.category(character) == "Cc"} - set("\n\t")


def ask(responder: EndpointResponder, rng: random.Random) -> Counter[str]:
    """One call, whose every end must be one of the three; they are counted."""
    schema = {"type": "object"} if rng.random() < 0.3 else None
    requests = [Request(f"question {number} \ud83d", schema=schema) for number in range(REQUESTS_PER_CALL)]
    handed: dict[int, Any] = {}
    waits: list[str] = []

    def keep(index: int, result: Any) -> None:
        assert index not in handed, "one result per request"
        assert isinstance(result, str | NoAnswer), "only what is final"
        handed[index] = result

    results: list[Any] = []
    transient = False
    try:
        results = list(responder.respond(requests, keep, waits.append))
    except Unanswered as error:
        results, transient = list(error.results), error.transient
    except EndpointError as error:
        results = [*handed.values(), error]
    if not any(isinstance(result, EndpointError) for result in results):
        assert len(results) == len(requests)
        assert transient == any(isinstance(result, Unreached) for result in results)
        final = {index: result for index, result in enumerate(results) if not isinstance(result, Unreached)}
        assert final == handed
    for text in [*map(str, results), *waits]:
        assert not controls_of(text)
        text.encode()  # no half of a character
    for result in results:
        assert isinstance(result, str) or KEY not in str(result)
    assert all(KEY not in wait for wait in waits)
    return Counter(type(result).__name__ for result in results)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")
    return {"api_key": KEY, "timeout_seconds": 0.5, "sampler": FrameSampler(1, max_pixels=64)}


def test_whatever_a_server_says_ends_as_one_of_three(
    impatient: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    server = Server(rng)
    client = chat._client
    monkeypatch.setattr(chat, "_client", lambda is_local: client(is_local, server))
    ends: Counter[str] = Counter()
    while server.num_replies < NUM_REPLIES:
        server.lets_calls_run = rng.random() < 0.3
        patience_seconds = rng.choice([0.0, 0.02])
        responder = EndpointResponder(
            "a/model", "https://somebody.example/v1", patience_seconds=patience_seconds, **impatient
        )
        ends += ask(responder, rng)
        if rng.random() < 0.1:
            with contextlib.suppress(EndpointError):
                responder.check()
    assert set(ends) == {"str", "CutOff", "NoAnswer", "Refused", "Unreached", "EndpointError"}, "each end was seen"
    assert min(ends.values()) >= 10, ends


# ---------------------------------------------------------------------------------------------------- bytes on a socket


def raw_reply(rng: random.Random) -> bytes:
    """Bytes that may be HTTP."""
    content, more = (json.dumps(answer(rng)).encode(), []) if rng.random() < 0.5 else encoded(rng, body(rng))
    line, fields = "HTTP/1.1 200 OK", [("Content-Length", str(len(content))), ("Connection", "close")]
    if rng.random() < 0.5:
        line = rng.choice(["HTTP/1.1 200 \x9b31mFine", "HTTP/1.1 99999 x", "HTTP/9.9 200 OK", "SSH-2.0-x", "", "\x00"])
        fields = [*headers(rng), *more, ("Content-Length", rng.choice(["7", "0", "-1", "9" * 30, "x"]))]
    if rng.random() < 0.1:
        fields.append(("Transfer-Encoding", "chunked"))
    if rng.random() < 0.1:
        fields += [("X", "\x00\x1b"), ("Y" * 70_000, "z")]
    head = "\r\n".join([line, *(f"{name}: {text}" for name, text in fields)]) + "\r\n\r\n"
    whole = head.encode("latin-1", "replace") + content
    return whole[: rng.randint(0, len(whole))] if rng.random() < 0.1 else whole


@pytest.fixture
def raw_server() -> Iterator[str]:
    rng = random.Random(1)
    listener = socket.create_server(("127.0.0.1", 0))

    def reply(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            head = b""
            while b"\r\n\r\n" not in head and (more := connection.recv(65536)):
                head += more
            connection.sendall(raw_reply(rng))

    def serve() -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                threading.Thread(target=reply, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.close()


def test_bytes_that_are_no_http_end_as_one_of_three(impatient: dict[str, Any], raw_server: str) -> None:
    rng = random.Random(2)
    ends: Counter[str] = Counter()
    for _ in range(20):
        ends += ask(EndpointResponder("a/model", raw_server, patience_seconds=0.02, **impatient), rng)
    assert {"str", "EndpointError"} <= set(ends), ends
