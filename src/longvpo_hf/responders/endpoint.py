"""A model behind an OpenAI-compatible endpoint as a responder: vLLM, SGLang, TGI, `transformers serve`, hosted ones.

Takes requests; gives their answers in order, or says which have none and why (`Unanswered`). A request's frames go as
JPEG data URLs in order of time, then its text. Several requests are under way at once; what may pass (rate limits,
server errors, broken connections, time-outs, answers that are none) is tried again. One request that the server refuses
(a prompt too long, a content filter) gets no answer, and costs no other its own; what no request can pass (a wrong key,
an unknown model, refusals only) ends the call. A server that cannot hold its model to a JSON schema is asked without.
Knows nothing of what is asked, and never shows the key.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import random
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import (
    ChatCompletionOutput,
    ChatCompletionOutputMessage,
    get_async_session,
    get_token,
    hf_raise_for_status,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from PIL import Image

from longvpo_hf.errors import ConfigError, EndpointError
from longvpo_hf.frames import FrameSampler, UnreadableVideo
from longvpo_hf.responders import CutOff, NoAnswer, OnResult, OnWait, Request, Result, Unreached, answered

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: Of 100. Visibly the frame itself, at about a tenth of its bytes.
_JPEG_QUALITY = 90
#: Before the second try; doubled before each further one.
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
#: A server that asks for more (a day's quota is spent) gets no further try.
_LONGEST_RETRY_AFTER_SECONDS = 600.0
#: So many requests given up with none answered between them are not bad luck: the server is gone.
_OUTAGE_REQUESTS = 16
#: httpx2 opens no more connections at once.
_MOST_CONCURRENT = 100
_SHOWN_CHARACTERS = 300
#: Sent when there is no key, as vLLM's documentation does.
_NO_KEY = "EMPTY"
_REMEDIES = {
    401: "Give an api_key that this server takes; HF_TOKEN goes to Hugging Face's own servers only.",
    403: "Give an api_key that may use this model; HF_TOKEN goes to Hugging Face's own servers only.",
    404: "Compare the model's name with those the server lists under /v1/models, and base_url with its address.",
}
#: Statuses of a server that refuses this request, and perhaps no other.
_REFUSALS = (400, 413, 422)
_REMEDY = "If the prompt is too long for it, take fewer or smaller frames (FrameSampler) or lower max_tokens."


@dataclass(frozen=True, slots=True)
class _Failure:
    """A try without an answer, that may go better the next time unless the request was refused."""

    why: str
    retry_after_seconds: float = 0.0
    is_refusal: bool = False


_GivenUp = TypeVar("_GivenUp", NoAnswer, Unreached)


class EndpointResponder:
    """Answers with a model behind an OpenAI-compatible endpoint, greedily where the server can.

    Args:
        model: The model's name there.
        base_url: Where `/chat/completions` stands, e.g. `http://localhost:8000/v1`. Without secrets.
        sampler: How frames are taken of a view. Its `max_pixels` must be set: frames are sent as they are, as JPEGs of
            quality 90, and their number and size is what a request weighs.
        api_key: The key to show. None shows HF_TOKEN (or the token of `hf auth login`) to Hugging Face's own servers
            and nothing to others.
        max_tokens: Bound on an answer's length.
        concurrency: Requests under way at once, 1 to 100; the frames of so many are in memory.
        max_retries: Further tries after a failed one. Waits start at 1 s and double up to 60 s, or are what the server
            asks for (`Retry-After`), times a random factor of 1 to 1.5.
        timeout_seconds: Bound on one try, from sending to the whole answer.
        seed: Sent with each request, and seeds the waits' randomness.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        sampler: FrameSampler,
        api_key: str | None = None,
        max_tokens: int = 128,
        concurrency: int = 8,
        max_retries: int = 5,
        timeout_seconds: float = 300.0,
        seed: int = 0,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("concurrency", concurrency)):
            if value < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {value}.")
        if concurrency > _MOST_CONCURRENT:
            raise ConfigError(
                f"concurrency must be ≤ {_MOST_CONCURRENT}, the connections there are, got {concurrency}."
            )
        if max_retries < 0:
            raise ConfigError(f"max_retries must be ≥ 0, got {max_retries}; 0 tries once.")
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds must be > 0, got {timeout_seconds}.")
        if sampler.max_pixels is None:
            raise ConfigError("The sampler bounds what is sent: give FrameSampler max_pixels, e.g. 448 * 448.")
        self._host = _host(base_url)
        self._url = _chat_url(base_url)
        self._api_key = _checked_key(api_key if api_key is not None else _own_token(base_url))
        self.model = model
        self.base_url = base_url
        self.sampler = sampler
        self.max_tokens = max_tokens
        self.concurrency = concurrency
        self.max_retries = max_retries
        self.timeout_seconds = timeout_seconds
        self.seed = seed
        self._given_up_in_a_row = 0
        self._takes_schemas = True
        self._has_answered = False

    @property
    def name(self) -> str:
        """See `Responder.name`: the model and where it is served."""
        # Local servers name a model by its folder, whose place on that machine is nothing that rows should tell.
        model = PurePath(self.model).name if self.model.startswith("/") else self.model
        return f"{model}@{self._host}"

    @property
    def settings(self) -> dict[str, object]:
        """See `identity`."""
        sampler = self.sampler.__getstate__() | {"cache_bytes": 0}
        return {"url": self._url, "max_tokens": self.max_tokens, "seed": self.seed, "sampler": sampler}

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """See `Responder.respond`. May be called where an event loop runs, which then waits.

        Raises:
            Unanswered: If some requests have no answer; it holds the others' answers.
            EndpointError: If the endpoint refuses all requests, or has not answered for long.
        """
        return answered(_run(self._respond(requests, on_result, on_wait)))

    async def _respond(
        self, requests: Sequence[Request], on_result: OnResult | None, on_wait: OnWait | None
    ) -> list[Result | Unreached]:
        results: list[Result | Unreached] = [Unreached("not asked")] * len(requests)
        refusals: list[str] = []
        queue = enumerate(requests)

        async def work() -> None:
            for index, request in queue:  # one iterator for all: a request is taken when there is room for its frames
                results[index] = result = await self._answer(session, decoder, index, request, refusals, on_wait)
                if on_result is not None and not isinstance(result, Unreached):
                    on_result(index, result)

        # One thread decodes: a sampler is of one thread at a time, and the event loop must not wait for it.
        with ThreadPoolExecutor(1) as decoder:
            async with get_async_session() as session:
                try:
                    async with asyncio.TaskGroup() as workers:
                        for _ in range(min(self.concurrency, len(requests))):
                            workers.create_task(work())
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None
        if refusals and not self._has_answered:  # what is wrong is wrong with all requests
            raise EndpointError(refusals[0])
        return results

    async def _answer(
        self,
        session: httpx2.AsyncClient,
        decoder: ThreadPoolExecutor,
        index: int,
        request: Request,
        refusals: list[str],
        on_wait: OnWait | None,
    ) -> Result | Unreached:
        """One request's answer, after as many tries as it takes or there are; a refusal is noted in `refusals`."""
        try:
            parts = await asyncio.get_running_loop().run_in_executor(decoder, self._parts, request)
        except UnreadableVideo as error:
            return error
        chance = random.Random(f"{self.seed} {index}")
        tries = 0
        while True:
            outcome = await self._try(session, parts, request.schema if self._takes_schemas else None)
            tries += 1
            if isinstance(outcome, str):
                self._given_up_in_a_row = 0
                self._has_answered = True
                return outcome
            if outcome.is_refusal:
                refusals.append(outcome.why)
                return self._given_up(NoAnswer(outcome.why))
            if tries > self.max_retries or outcome.retry_after_seconds > _LONGEST_RETRY_AFTER_SECONDS:
                return self._given_up(Unreached(f"{self.name}: {outcome.why} (tries: {tries})"))
            backoff_seconds = min(_FIRST_WAIT_SECONDS * 2 ** min(tries - 1, 16), _LONGEST_WAIT_SECONDS)
            wait_seconds = max(backoff_seconds, outcome.retry_after_seconds) * chance.uniform(1.0, 1.5)
            if on_wait is not None:
                on_wait(f"{self.name}: {outcome.why}; next try in {wait_seconds:.0f} s")
            logger.info("%s: %s; next try in %.1f s.", self.name, outcome.why, wait_seconds)
            await asyncio.sleep(wait_seconds)

    def _given_up(self, why: _GivenUp) -> _GivenUp:
        self._given_up_in_a_row += 1
        if self._given_up_in_a_row >= _OUTAGE_REQUESTS:
            raise EndpointError(
                f"{str(why).rstrip('.')}. The last {self._given_up_in_a_row} requests to {self.base_url} got no "
                "answer, each after all its tries. See to the server, then ask again."
            )
        return why

    async def _try(
        self, session: httpx2.AsyncClient, parts: list[dict[str, Any]], schema: Mapping[str, Any] | None
    ) -> str | _Failure:
        """The answer's text, or why there is none yet.

        Raises:
            EndpointError: If there will be none.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "seed": self.seed,
            "stream": False,
        }
        if schema is not None:
            # As OpenAI, vLLM and SGLang read it. huggingface_hub's own client would send its servers' former
            # `{"type": "json_object", "value": schema}` to every base_url, of which the others drop the schema without
            # a word; so the request is posted here, with that package's session, errors and answer types.
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}
        try:
            async with asyncio.timeout(self.timeout_seconds):
                headers = {"Authorization": f"Bearer {self._api_key or _NO_KEY}"}
                response = await session.post(self._url, json=body, headers=headers)
            hf_raise_for_status(response)
            output = ChatCompletionOutput.parse_obj_as_instance(response.content)
        except TimeoutError:
            return _Failure(f"no answer within timeout_seconds={self.timeout_seconds}")
        except HfHubHTTPError as error:
            if schema is not None and error.response.status_code in (400, 422):
                return await self._try_without_schema(session, parts, error.response)
            return self._refused(error.response)
        except httpx2.RequestError as error:
            return _Failure(f"{type(error).__name__}: {self._shown(str(error))}")
        except OfflineModeIsEnabled:
            raise EndpointError(
                f"HF_HUB_OFFLINE is set: huggingface_hub then asks nobody, {self.base_url} neither. Unset it."
            ) from None
        except ValueError as error:  # of reading the answer: not JSON, or not an object
            return _Failure(f"malformed answer: {self._shown(str(error))}")
        choices: Any = output.choices  # of any shape: huggingface_hub does not check it, and fills in None
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        if not isinstance(message, ChatCompletionOutputMessage):
            return _Failure("malformed answer: no choices[0].message")
        content: Any = message.content
        if not isinstance(content, str | None):
            return _Failure("malformed answer: choices[0].message.content is no text")
        # A model that says nothing (it was cut off while thinking, it refused) has null there: an empty answer.
        text = (content or "").strip()
        return CutOff(text) if text and getattr(choices[0], "finish_reason", None) == "length" else text

    async def _try_without_schema(
        self, session: httpx2.AsyncClient, parts: list[dict[str, Any]], refusal: httpx2.Response
    ) -> str | _Failure:
        """A try of a request that was refused with its schema. If it is answered, the schema was why."""
        outcome = await self._try(session, parts, None)
        if isinstance(outcome, str) and self._takes_schemas:
            self._takes_schemas = False
            logger.warning(
                "%s takes no JSON schema (status %d: %s); asked without from now on.",
                self.name,
                refusal.status_code,
                self._shown(refusal.text),
            )
        return outcome

    def _refused(self, response: httpx2.Response) -> _Failure:
        status = response.status_code
        said = f"status {status}: {self._shown(response.text)}".removesuffix(": ")
        if status in (408, 429) or status >= 500:
            return _Failure(said, _retry_after_seconds(response.headers.get("retry-after", "")))
        why = f"{self.model} at {self.base_url}: {said}. {_REMEDIES.get(status, _REMEDY)}"
        if status in _REFUSALS:
            return _Failure(why, is_refusal=True)
        raise EndpointError(why)

    def _shown(self, text: str) -> str:
        """What may stand in an error: short, on one line and without the key, which some servers repeat."""
        if self._api_key:
            text = text.replace(self._api_key, "***")
        text = " ".join(text.split())
        return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"

    def _parts(self, request: Request) -> list[dict[str, Any]]:
        """A request as the parts of a chat message."""
        parts: list[dict[str, Any]] = []
        if request.timeline is not None:
            frames = self.sampler(request.timeline, request.view)
            parts += [{"type": "image_url", "image_url": {"url": _jpeg_url(pixels)}} for pixels in frames.pixels]
        return [*parts, {"type": "text", "text": request.text}]


def _run(coroutine: Coroutine[Any, Any, list[Result | Unreached]]) -> list[Result | Unreached]:
    """Runs a coroutine to its end: in another thread where this one's event loop is busy with the caller."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _jpeg_url(pixels: torch.Tensor) -> str:
    """A frame, uint8 `[3, H, W]`, as a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _host(base_url: str) -> str:
    """Host and port of a URL that is fit to be shown."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("base_url must be an http(s) address such as http://localhost:8000/v1.")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"base_url must hold no user, query or fragment; give {parts.hostname}'s key as api_key.")
    _ = parts.port  # raises where it is no number
    return parts.netloc


def _chat_url(base_url: str) -> str:
    """Where requests go; a server named without a path has them under `/v1`."""
    parts = urlsplit(base_url)
    return parts._replace(path=(parts.path.rstrip("/") or "/v1") + "/chat/completions").geturl()


def is_hugging_face(base_url: str) -> bool:
    """Whether an address is Hugging Face's own, so that the user's token goes there and no other key does."""
    parts = urlsplit(base_url)
    return parts.scheme == "https" and f".{parts.hostname}".endswith(
        (".huggingface.co", ".endpoints.huggingface.cloud")
    )


def _own_token(base_url: str) -> str | None:
    """The user's Hugging Face token, if the address is Hugging Face's."""
    return get_token() if is_hugging_face(base_url) else None


def _checked_key(key: str | None) -> str | None:
    """The key without the line break that a file may end in."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError("api_key holds characters that cannot stand in a header; is it a key?")
    return key or None


def _retry_after_seconds(header: str) -> float:
    """What a `Retry-After` asks for, in seconds or as a date; 0 if it asks for nothing."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a zone
        return 0.0
