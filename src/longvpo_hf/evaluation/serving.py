"""A model that a server runs, evaluated on our own frames; and whether it gets the prompts that it would get here.

Frameworks that sample frames themselves give one model scores that lie many points apart. So a server is sent the
frames that our sampler takes: vLLM as one video (`video/jpeg`, the frames one after the other), any other
OpenAI-compatible server as pictures. Where the server tells the token ids of a prompt (vLLM's `return_token_ids`, since
0.10.2), they are compared with those that the checkpoint's own processor makes here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError
from longvpo_hf.responders import EndpointResponder, Request

if TYPE_CHECKING:
    from longvpo_hf.families.encoding import PromptEncoder
    from longvpo_hf.frames import FrameSampler

#: Token ids around the first difference that are named.
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Server:
    """Where models are served.

    Args:
        kind: `vllm`, which takes frames as one video, or `openai`, any server that takes pictures.
        base_url: Its address, e.g. `http://localhost:8000/v1`.
        api_key_env: Variable of the environment that holds its key; None for none, or for api.openai.com's own.

    Raises:
        ConfigError: If the kind is unknown, or the address is missing or is none.
    """

    kind: Literal["vllm", "openai"]
    base_url: str
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("vllm", "openai"):
            raise ConfigError(f"A backend is transformers, vllm or openai, got {self.kind!r}.")
        if not self.base_url:
            raise ConfigError(f"--backend {self.kind} needs --base-url, e.g. http://localhost:8000/v1")
        from longvpo_hf.responders.chat import host_of

        host_of(self.base_url)  # an address, at least

    def responder(
        self, model: str, sampler: FrameSampler, concurrency: int, decoding: Decoding = GREEDY
    ) -> EndpointResponder:
        """The model of that name there.

        Raises:
            EndpointError: If the server does not answer, has no such model, or takes no frames.
        """
        from longvpo_hf.responders.chat import key_variable

        variable = self.api_key_env or key_variable(self.base_url)
        key = os.environ.get(variable) or None if variable else None
        found = EndpointResponder(
            model,
            self.base_url,
            sampler,
            key,
            concurrency=concurrency,
            decoding=decoding,
            as_video=self.kind == "vllm",
        )
        found.check()
        return found

    def describe(self, parity: Parity) -> str:
        """Who runs the model and how it gets the frames, for the protocol."""
        form = "one video of JPEGs" if self.kind == "vllm" else "JPEG pictures"
        name = "vllm" if self.kind == "vllm" else "an OpenAI-compatible server"
        return f"{name}, our frames as {form}, {parity}"


@dataclass(frozen=True, slots=True)
class Parity:
    """Whether a server's prompts are ours.

    Args:
        compared: Prompts whose token ids the server told.
        equal: Those that are the same here, id by id.
        first: Where and how the first of the others differs; empty where none does.
    """

    compared: int
    equal: int
    first: str = ""

    def __str__(self) -> str:
        if not self.compared:
            return "prompts not compared"
        if self.equal == self.compared:
            return f"prompts as here ({self.compared} compared)"
        return f"prompts differ from ours ({self.compared - self.equal} of {self.compared})"


def parity(responder: EndpointResponder, encoder: PromptEncoder | None, requests: Sequence[Request]) -> Parity:
    """Compares the prompts that a server makes of requests with those made here.

    Args:
        responder: The served model.
        encoder: Makes prompts of the same checkpoint; None where its processor is not at hand.
        requests: What is asked.

    Raises:
        UnreadableVideo: If a video cannot be decoded.
    """
    compared = equal = 0
    first = ""
    for number, request in enumerate(requests if encoder is not None else ()):
        theirs = responder.prompt_ids(request)
        if theirs is None:
            continue
        assert encoder is not None
        frames = None if request.timeline is None else responder.sampler(request.timeline, request.view)
        ours = encoder.encode(frames, [[{"role": "user", "content": request.text}]]).input_ids[0]
        compared += 1
        equal += ours == theirs
        if ours != theirs and not first:
            first = f"prompt {number + 1}: {_difference(ours, theirs)}"
    return Parity(compared, equal, first)


def _difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    here, there = (list(itertools.islice(ids, place, place + _NAMED)) for ids in (ours, theirs))
    return f"{len(ours)} tokens here and {len(theirs)} there; from token {place} on {here} here, {there} there"
