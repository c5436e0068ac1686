"""One request to an OpenAI-compatible chat server, and what its reply means, whatever it is.

The address, the key and who may see it, the bound on what is read, and which replies are answers, refusals, troubles
that may pass, and ends of the whole call.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import logging
import math
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar
from ipaddress import ip_address
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import get_token
from huggingface_hub.constants import is_offline_mode
from PIL import Image

from longvpo_hf.decoding import Decoding
from longvpo_hf.errors import ConfigError, EndpointError
from longvpo_hf.reasoning import CutOff
from longvpo_hf.responders import NoAnswer, Refused
from longvpo_hf.responders.replies import probability_text, whole_characters

logger = logging.getLogger(__name__)

#: Of 100. Visibly the frame itself, at about a tenth of its bytes.
_JPEG_QUALITY = 90
_CONNECT_SECONDS = 30.0
#: Room for an answer of 100,000 tokens with every field that servers add.
_MOST_ANSWER_BYTES = 4 * 1024**2
#: What is read of a reply that is no answer.
_MOST_ERROR_BYTES = 64 * 1024
SHOWN_CHARACTERS = 300
#: Of the likeliest first tokens of a verdict, with their probabilities: the most that OpenAI and vLLM give.
_TOP_TOKENS = 20
NO_PROBABILITIES = (
    "gives no probabilities of its tokens (top_logprobs), so a judge there is read by its words: leave judge_yes_from "
    "(--judge-yes-from) out, or name another judge."
)
#: Sent when there is no key, as vLLM's documentation does.
_NO_KEY = "EMPTY"
#: The one host that gets the user's Hugging Face token unasked. Anybody's containers run under
#: endpoints.huggingface.cloud and hf.space: a key for those is given by name.
_HUGGING_FACE_HOSTS = ("router.huggingface.co",)
_OWN_TOKEN = "HF_TOKEN goes unasked to router.huggingface.co only."
_REMEDIES = {
    401: f"Give an api_key that this server takes; {_OWN_TOKEN}",
    402: "See to the credits of the account.",
    403: f"Give an api_key that may use this model; {_OWN_TOKEN}",
    404: "Compare the model's name with those the server lists under /v1/models, and base_url with its address.",
}
#: Statuses of a server that refuses this request, and perhaps no other.
_REFUSALS = (400, 413, 422)
#: How servers name in an error's body what a filter of theirs refused: Azure and OpenAI, DashScope.
_FILTERS = ("content_filter", "content_policy_violation", "data_inspection_failed")
_REMEDY = "If the prompt is too long for it, take fewer or smaller frames (FrameSampler) or lower max_tokens."
#: Statuses that asking again may mend, besides those from 500 on: what OpenAI's own client tries again, and 425.
_TRANSIENT = (408, 409, 425, 429)
#: Reasons for a message's end that are the server's trouble: of vLLM, OpenRouter and DeepSeek.
_ABORTED = ("abort", "error", "insufficient_system_resource")
#: Characters that move a terminal's cursor, colour it or turn the direction of writing: no answer needs them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without an answer that may have one the next time.

    Args:
        why: The reason, fit to be shown.
        retry_after_seconds: What the server asks to wait.
        status: The server's status; 0 where it sent none.
        is_unconnected: Whether no connection came about.
    """

    why: str
    retry_after_seconds: float = 0.0
    status: int = 0
    is_unconnected: bool = False

    def __str__(self) -> str:
        return self.why


#: What comes of one request.
Outcome: TypeAlias = str | NoAnswer | Failure


class Key:
    """A key that can be sent and not shown: its `repr` and its copies, pickled ones too, do not hold it.

    Args:
        value: The key; None for none.
        is_copy: Whether this stands for a key that was not copied.
    """

    __slots__ = ("_is_copy", "_value")

    def __init__(self, value: str | None, is_copy: bool = False) -> None:
        value = (value or "").strip()  # a key that was read from a file may end in a line break
        if not (value.isascii() and value.isprintable()) or " " in value:
            raise ConfigError("api_key holds characters that cannot stand in a header; is it a key?")
        self._value = value
        self._is_copy = is_copy

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Key(***)" if self else "Key()"

    def __reduce__(self) -> tuple[type[Key], tuple[None, bool]]:
        return Key, (None, self._is_copy or bool(self))

    def sent(self) -> str:
        """The key, to be sent; "" for none.

        Raises:
            EndpointError: If this is a copy.
        """
        if self._is_copy:
            raise EndpointError("This is a copy of a responder, and keys are not copied: make it anew, with api_key.")
        return self._value

    def hidden(self, text: str) -> str:
        """A text of the server's without the key, which some repeat."""
        return text.replace(self._value, "***") if self else text


class Chat:
    """A model at a chat server. The arguments are those of `EndpointResponder`.

    Attributes:
        host: Host and port, fit to be shown.
        url: Where requests go; a server named without a path has them under `/v1`.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None,
        max_tokens: int,
        timeout_seconds: float,
        seed: int,
        plain_http_key: bool,
        decoding: Decoding,
    ) -> None:
        self.host = host_of(base_url)
        parts = urlsplit(base_url)
        self.url = parts._replace(path=(parts.path.rstrip("/") or "/v1") + "/chat/completions").geturl()
        self._key = Key(api_key)
        if self._key and not plain_http_key and not _is_private(base_url):
            raise ConfigError(
                f"The api_key would go unencrypted to {self.host}: give an https address, or plain_http_key=True."
            )
        self.model = model
        self.base_url = base_url
        self.max_tokens = max_tokens
        self.timeout_seconds = timeout_seconds
        self.seed = seed
        self.decode(decoding)
        self._takes_schemas = True

    def __str__(self) -> str:
        return f"{self.model} at {self.base_url}"

    def decode(self, decoding: Decoding) -> None:
        """From now on, asks for answers that are decoded so; sampled ones with their own seed."""
        self.decoding = decoding
        if decoding.temperature:
            self.seed = decoding.decoding_seed

    def session(self) -> httpx2.AsyncClient:
        """A connection, to be used in `async with`.

        Raises:
            EndpointError: If there can be none.
        """
        if is_offline_mode() and is_hugging_face(self.base_url):
            raise EndpointError(f"HF_HUB_OFFLINE is set, and {self.base_url} is Hugging Face's: unset it.")
        try:
            return _client(is_local=_is_local(self.base_url))
        except (ValueError, ImportError) as error:
            raise EndpointError(f"The environment's proxy settings cannot be used: {error}") from None

    async def ask(
        self,
        session: httpx2.AsyncClient,
        parts: Sequence[Mapping[str, Any]],
        schema: Mapping[str, Any] | None = None,
        is_verdict: bool = False,
    ) -> Outcome:
        """What comes of sending a request once.

        Args:
            session: See `session`.
            parts: The parts of the user's message; see `text_part`, `image_part`.
            schema: See `Request.schema`; left out for a server that takes none.
            is_verdict: See `Request.is_verdict`.

        Raises:
            EndpointError: If no request can have an answer.
        """
        if not self._takes_schemas:
            schema = None
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*parts]}],
            "max_tokens": self.max_tokens,
            "temperature": self.decoding.temperature,
            "seed": self.seed,
            "stream": False,
        }
        if self.decoding.top_p < 1:
            body["top_p"] = self.decoding.top_p
        if self.decoding.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.decoding.thinking}
        if schema is not None:
            # As OpenAI, vLLM and SGLang read it.
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}
        if is_verdict:
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP_TOKENS}
        key = self._key if self._key or not is_hugging_face(self.base_url) else Key(get_token())
        try:
            async with asyncio.timeout(self.timeout_seconds):
                status, headers, content = await self._post(session, body, key)
        except TimeoutError:
            return Failure(f"no answer within timeout_seconds={self.timeout_seconds}")
        except httpx2.RequestError as error:
            why = f"{type(error).__name__}: {_shown(key, str(error))}".removesuffix(": ")
            return Failure(why, is_unconnected=isinstance(error, httpx2.ConnectError))
        if 200 <= status < 300:
            if len(content) > _MOST_ANSWER_BYTES:
                return Failure(f"malformed answer: more than {_MOST_ANSWER_BYTES} bytes", status=status)
            return self._read(key, content, is_verdict)
        if schema is not None and status in (400, 422):
            outcome = await self.ask(session, parts)
            if isinstance(outcome, str) and self._takes_schemas:  # so the schema was why
                self._takes_schemas = False
                said = _shown(key, content.decode(errors="replace"))
                logger.warning(
                    "%s takes no JSON schema (status %d: %s); asked without from now on.", self, status, said
                )
            return outcome
        return self._refused(key, status, headers, content)

    async def prompt_ids(self, session: httpx2.AsyncClient, parts: Sequence[Mapping[str, Any]]) -> list[int] | None:
        """Token ids of the prompt that the server makes of a request; None where it does not tell.

        vLLM tells them since 0.10.2 (`return_token_ids`), with the tokens of pictures and videos.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*parts]}],
            "max_tokens": 1,
            "temperature": 0.0,
            "return_token_ids": True,
        }
        key = self._key if self._key or not is_hugging_face(self.base_url) else Key(get_token())
        try:
            async with asyncio.timeout(self.timeout_seconds):
                status, _, content = await self._post(session, body, key)
            reply = json.loads(content) if status == 200 and len(content) <= _MOST_ANSWER_BYTES else None
        except (TimeoutError, httpx2.RequestError, ValueError, RecursionError):
            return None
        ids = _at(reply, "prompt_token_ids")
        return ids if isinstance(ids, list) and ids and all(type(each) is int for each in ids) else None

    async def _post(
        self, session: httpx2.AsyncClient, body: Mapping[str, Any], key: Key
    ) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body of the server's reply: of a body that is too long little more than the bound."""
        headers = {"Authorization": f"Bearer {key.sent() or _NO_KEY}", "Accept-Encoding": "identity"}
        async with session.stream("POST", self.url, json=body, headers=headers) as response:
            most_bytes = _MOST_ANSWER_BYTES if response.is_success else _MOST_ERROR_BYTES
            content = bytearray()
            async for chunk in response.aiter_bytes():  # httpx2 inflates what is compressed a MiB at a time
                content += chunk
                if len(content) > most_bytes:
                    break
            return response.status_code, response.headers, bytes(content)

    def _read(self, key: Key, content: bytes, is_verdict: bool) -> Outcome:
        """The answer in a reply of any shape."""
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError) as error:
            return Failure(f"malformed answer: {_shown(key, str(error))}")
        choice = _at(reply, "choices", 0)
        message = _at(choice, "message")
        if not isinstance(message, dict):
            said = _shown(key, content.decode(errors="replace"))
            return Failure(f"malformed answer: no choices[0].message in {said}")
        reason = _at(choice, "finish_reason")
        if reason == "content_filter":
            return Refused(f"{self}: a content filter withheld the answer.")
        if reason in _ABORTED:
            return Failure(f"the server broke off its answer (finish_reason={reason})")
        if is_verdict:
            return self._probability(choice)
        text = message.get("content")
        if not text and isinstance(message.get("refusal"), str) and message["refusal"]:  # as OpenAI says it
            return Refused(f"{self}: it refused: {_shown(key, message['refusal'])}")
        if not isinstance(text, str | None):
            return Failure("malformed answer: choices[0].message.content is no text")
        # A model that says nothing (it was cut off while reasoning, it refused) has null there: an empty answer.
        text = _CONTROLS.sub("", whole_characters(text or "")).strip()
        return CutOff(text) if reason == "length" else text

    def _probability(self, choice: Any) -> str:
        """How probable a yes is, by the first token of an answer.

        Raises:
            EndpointError: If the server gives no probabilities.
        """
        likeliest = _at(choice, "logprobs", "content", 0, "top_logprobs")
        if not isinstance(likeliest, list) or not likeliest:
            raise EndpointError(f"{self} {NO_PROBABILITIES}")
        shares = {"yes": 0.0, "no": 0.0}
        for one in likeliest:
            word, logarithm = _at(one, "token"), _at(one, "logprob")
            # Of type, because True is a number too; the bounds leave out NaN and what is no logarithm of a probability.
            if isinstance(word, str) and type(logarithm) in (int, float) and -1e4 <= logarithm <= 0:
                word = word.strip().casefold()
                if word in shares:
                    shares[word] += math.exp(logarithm)
        return probability_text(shares["yes"], shares["no"])

    def _refused(self, key: Key, status: int, headers: httpx2.Headers, content: bytes) -> NoAnswer | Failure:
        said = f"status {status}: {_shown(key, content.decode(errors='replace'))}".removesuffix(": ")
        if status in _TRANSIENT or status >= 500 or status < 200:
            return Failure(said, retry_after_seconds(headers.get("retry-after", "")), status)
        if status < 400:
            target = _shown(key, headers.get("location", "nowhere"))
            raise EndpointError(
                f"{self}: {said}. It redirects to {target}, where neither frames nor the key are sent: give the "
                "base_url of the server itself."
            )
        why = f"{self}: {said}. {_REMEDIES.get(status, _REMEDY)}"
        if status in _REFUSALS:
            is_filtered = any(name.encode() in content for name in _FILTERS)
            return Refused(f"{self}: {said}.") if is_filtered else NoAnswer(why)
        raise EndpointError(why)


def text_part(text: str) -> dict[str, Any]:
    """A text in a message."""
    return {"type": "text", "text": whole_characters(text)}


def image_part(image: Image.Image) -> dict[str, Any]:
    """A picture in a message: a JPEG in a data URL."""
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_jpeg(image)}"}}


def video_part(frames: Sequence[Image.Image]) -> dict[str, Any]:
    """Frames in a message as one video, as vLLM reads it: JPEGs with commas between them."""
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(map(_jpeg, frames))}"}}


def _jpeg(image: Image.Image) -> str:
    """A picture as a JPEG in base64."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode("ascii")


def key_variable(base_url: str) -> str | None:
    """The environment's variable whose key belongs to an address: OPENAI_API_KEY is OpenAI's own, and no one else's."""
    return "OPENAI_API_KEY" if urlsplit(base_url).hostname == "api.openai.com" else None


def is_hugging_face(base_url: str) -> bool:
    """Whether an address is Hugging Face's own router of models, where the user's token goes unasked."""
    parts = urlsplit(base_url)
    return parts.scheme == "https" and parts.hostname in _HUGGING_FACE_HOSTS and parts.port in (None, 443)


def retry_after_seconds(header: str) -> float:
    """What a `Retry-After` asks for, in seconds or as a date; 0 if it asks for nothing."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # no date, one without a zone, one beyond the calendar
        return 0.0


class _NoCookies(CookieJar):
    """Keeps nothing, and reads nothing: `http.cookiejar` prints a traceback about some dates."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """Keeps nothing."""


def _client(is_local: bool, transport: httpx2.AsyncBaseTransport | None = None) -> httpx2.AsyncClient:
    # Not huggingface_hub's: it follows redirects, and HF_HUB_OFFLINE keeps it from asking local servers too.
    # A server of this machine is asked without the environment's proxy, which would read the key.
    # `timeout_seconds` bounds what comes after the connection.
    timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)
    return httpx2.AsyncClient(
        follow_redirects=False,
        timeout=timeout,
        cookies=_NoCookies(),
        verify=_trusted(),
        trust_env=not is_local,
        transport=transport,
    )


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Whose certificates are trusted; kept, as reading them takes a quarter of a second."""
    return httpx2.create_ssl_context()


def host_of(base_url: str) -> str:
    """Host and port of a URL that is fit to be shown."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("base_url must be an http(s) address such as http://localhost:8000/v1.")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"base_url must hold no user, query or fragment; give {parts.hostname}'s key as api_key.")
    try:
        _ = parts.port
        httpx2.URL(base_url)
    except (ValueError, httpx2.InvalidURL) as error:
        raise ConfigError(f"base_url must be an http(s) address such as http://localhost:8000/v1: {error}") from None
    return parts.netloc


def _is_private(base_url: str) -> bool:
    """Whether nobody on the way reads what is sent: it is encrypted, or never leaves this machine."""
    return urlsplit(base_url).scheme == "https" or _is_local(base_url)


def _is_local(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _at(value: Any, *path: str | int) -> Any:
    """The value at a path in JSON of any shape; None where there is none."""
    for step in path:
        if isinstance(step, int) and isinstance(value, list) and len(value) > step:
            value = value[step]
        elif isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        else:
            return None
    return value


def _shown(key: Key, text: str) -> str:
    """A text of the server's as it may stand in a message: short, on one line, without the key and controls."""
    text = " ".join(_CONTROLS.sub(" ", key.hidden(whole_characters(text))).split())
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"
