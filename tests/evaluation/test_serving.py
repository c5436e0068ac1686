"""`longvpo eval --backend`: a served model gets our own frames, and its prompts are compared with ours.

The server is a double on the loopback interface that answers C. It knows token ids as vLLM tells them.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import benchmark_doubles as doubles
from cli import Result, longvpo
from longvpo_hf.errors import ConfigError, EndpointError
from longvpo_hf.evaluation.sampling import sampler_of
from longvpo_hf.evaluation.serving import Parity, Server, parity
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.frames import Frames, whole_clip
from longvpo_hf.record import Sampling
from longvpo_hf.responders import Request
from longvpo_hf.timeline import Timeline

Told = Literal["the same", "others", "nothing", "garbage"]


class Served:
    """A chat server of one model.

    Args:
        model: The checkpoint whose processor makes its prompts.
        told: What it tells of them.
    """

    def __init__(self, model: Path, told: Told) -> None:
        self.bodies: list[dict[str, Any]] = []
        encoder = PromptEncoder(AutoProcessor.from_pretrained(model))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
                self.bodies.append(body)
                # `check` asks what the colours of a picture are.
                text = "yellow and blue" if "colours" in body["messages"][0]["content"][-1]["text"] else "C"
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                reply: dict[str, Any] = {"choices": [choice]}
                if body.get("return_token_ids") and told != "nothing":
                    ids: list[Any] = prompt_ids(encoder, body)
                    if told == "others":
                        ids = [*ids[:-2], 3, *ids[-1:]]
                    reply["prompt_token_ids"] = ["x"] if told == "garbage" else ids
                content = json.dumps(reply).encode()
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(handler, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def frames_of(body: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Frames in a request, `[N, H, W, 3]`."""
    jpegs: list[str] = []
    for part in body["messages"][0]["content"][:-1]:
        form, _, content = part[part["type"]]["url"].partition(";base64,")
        assert form == {"video_url": "data:video/jpeg", "image_url": "data:image/jpeg"}[part["type"]]
        jpegs += content.split(",")
    return np.stack([np.array(Image.open(io.BytesIO(base64.b64decode(jpeg, validate=True)))) for jpeg in jpegs])


def prompt_ids(encoder: PromptEncoder, body: dict[str, Any]) -> list[int]:
    """The prompt of a request, as the checkpoint's own processor makes it of the frames that were sent."""
    pixels = torch.from_numpy(frames_of(body)).permute(0, 3, 1, 2)
    frames = Frames(pixels, tuple(float(i) for i in range(len(pixels))), (0,) * len(pixels), float(len(pixels)))
    text = body["messages"][0]["content"][-1]["text"]
    return encoder.encode(frames, [[{"role": "user", "content": text}]]).input_ids[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return doubles.write_data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return doubles.write_model(tmp_path_factory.mktemp("models") / "answers-c")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def served(request: pytest.FixtureRequest, model: Path) -> Iterator[Served]:
    server = Served(model, request.param)
    yield server
    server.close()


def evaluate(model: Path, root: Path, output: Path, served: Served, kind: str) -> Result:
    return longvpo(
        ["eval", str(model), "--backend", kind, "--base-url", served.base_url, "--tasks", "lvbench,mlvu",
         "--frames", "3", "--data-root", str(root), "--output", str(output)]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("served", "kind", "said"),
    [
        ("the same", "vllm", "vllm, our frames as one video of JPEGs, prompts as here (2 compared)"),
        ("others", "vllm", "vllm, our frames as one video of JPEGs, prompts differ from ours (2 of 2)"),
        ("nothing", "openai", "an OpenAI-compatible server, our frames as JPEG pictures, prompts not compared"),
    ],
    indirect=["served"],
)
def test_a_served_model_is_given_our_frames_and_says_so(
    served: Served, kind: str, said: str, model: Path, root: Path, tmp_path: Path
) -> None:
    result = evaluate(model, root, tmp_path, served, kind)
    assert result.exit_code == 0, result.output
    tasks = json.loads((tmp_path / "answers-c-3.json").read_text("utf-8"))["tasks"]
    assert tasks["lvbench"]["overall"] == 50.0  # C, as the model answers here
    assert tasks["mlvu"]["m_avg"] == pytest.approx((200 / 3 + 200) / 7)
    protocol = tasks["mlvu"]["protocol"]["ours"]
    assert (protocol["backend"], protocol["dtype"]) == (said, "as served")
    assert said in result.output
    assert ("does not get the prompts that it would get here: prompt 1: " in result.output) == ("differ" in said)
    asked = [body for body in served.bodies if body["messages"][0]["content"][-1]["text"].startswith("What year")]
    sampler = sampler_of(Sampling(3))
    for body in asked:
        types = [part["type"] for part in body["messages"][0]["content"]]
        assert types == (["video_url", "text"] if kind == "vllm" else ["image_url"] * (len(types) - 1) + ["text"])
    shown = [frames_of(body).astype(int) for body in asked]
    for name in ("v0", "v1"):  # of the two questions of LVBench
        timeline = Timeline((whole_clip(str(root / f"lvbench/{name}.mp4")),))
        ours = sampler(timeline).pixels.permute(0, 2, 3, 1).numpy().astype(int)
        # As JPEGs of quality 90 they differ by a few levels.
        assert any(each.shape == ours.shape and np.abs(each - ours).mean() < 4 for each in shown)
    # What was answered is kept.
    served.bodies.clear()
    assert evaluate(model, root, tmp_path, served, kind).exit_code == 0
    assert not [body for body in served.bodies if body["max_tokens"] == 32]


@pytest.mark.parametrize("served", ["the same", "others", "nothing", "garbage"], indirect=True)
def test_token_ids_are_compared_where_the_server_tells_them(
    served: Served, model: Path, root: Path, request: pytest.FixtureRequest
) -> None:
    responder = Server("vllm", served.base_url).responder(str(model), sampler_of(Sampling(2)), 1)
    requests = [
        Request(f"What is this{'?' * i}", Timeline((whole_clip(str(root / f"lvbench/v{i}.mp4")),))) for i in range(3)
    ]
    encoder = PromptEncoder(AutoProcessor.from_pretrained(model))
    found = parity(responder, encoder, requests)
    told = request.node.callspec.params["served"]
    if told == "the same":
        assert found == Parity(3, 3)
    elif told == "others":
        ours = encoder.encode(
            responder.sampler(requests[0].timeline), [[{"role": "user", "content": requests[0].text}]]
        )
        number, place = len(ours.input_ids[0]), len(ours.input_ids[0]) - 2
        assert (found.compared, found.equal) == (3, 0)
        assert found.first.startswith(f"prompt 1: {number} tokens here and {number} there; from token {place} on [")
    else:
        assert found == Parity(0, 0)
        assert str(found) == "prompts not compared"
    assert parity(responder, None, requests) == Parity(0, 0), "without the checkpoint's processor"


def test_a_backend_needs_an_address_that_answers(model: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--backend vllm needs --base-url"):
        Server("vllm", "")
    with pytest.raises(EndpointError):
        Server("vllm", "http://127.0.0.1:1/v1").responder("m", sampler_of(Sampling(2)), 1)
