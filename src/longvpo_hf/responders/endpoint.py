"""A model behind an OpenAI-compatible endpoint: vLLM, SGLang, TGI, `transformers serve`, hosted ones.

Whatever a server says ends as an answer, as a request without one, or as an `EndpointError`. What asking again may mend
(rate limits, server errors, broken connections, time-outs, garbage) is tried again for a bounded time and is never
final; a refusal of one request costs no other its answer; what no request can pass ends the call.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any, TypeVar

import httpx2
from PIL import Image
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, stop_before_delay

from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError, EndpointError
from longvpo_hf.frames import FrameSampler, UnreadableVideo
from longvpo_hf.responders import NoAnswer, OnResult, OnWait, Refused, Request, Result, Unreached, answered
from longvpo_hf.responders.chat import (
    NO_PROBABILITIES,
    SHOWN_CHARACTERS,
    Chat,
    Failure,
    Outcome,
    image_part,
    text_part,
    video_part,
)
from longvpo_hf.responders.control_tokens import parted

logger = logging.getLogger(__name__)

#: Before the second try; doubled before each further one.
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0
#: So many refusals with no answer between them are not about single requests.
_MOST_REFUSALS_IN_A_ROW = 16
#: httpx2 opens no more connections at once.
_MOST_CONCURRENT = 100
#: Of the picture that `check` shows: every vision model takes it.
_PROBE_PX = 224
_PROBE_QUESTION = "Which two colours does the picture have? Answer with their names only."
_PROBE_VERDICT = "Is the sky blue? Answer Yes or No."

_T = TypeVar("_T")


@dataclass(slots=True)
class _Call:
    """One call of `respond`: its connection, its results and where they go, and what was heard of the server."""

    session: httpx2.AsyncClient
    results: list[Result | Unreached]
    on_result: OnResult | None
    on_wait: OnWait | None
    #: When the server last answered.
    heard_seconds: float = 0.0
    #: Refusals that are not handed over yet: until the server answers something, it may be refusing everything.
    refused: list[int] = field(default_factory=list)
    #: Decodes: a sampler is of one thread at a time, and the event loop must not wait for it.
    decoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def keep(self, index: int, result: Result | Unreached) -> None:
        self.results[index] = result
        if isinstance(result, NoAnswer) and not isinstance(result, Refused):
            self.refused.append(index)
            return
        if isinstance(result, str):
            self.hand_over_refusals()
        self._hand_over(index, result)

    def hand_over_refusals(self) -> None:
        while self.refused:
            index = self.refused.pop(0)
            self._hand_over(index, self.results[index])

    def _hand_over(self, index: int, result: Result | Unreached) -> None:
        if self.on_result is not None and not isinstance(result, Unreached):
            self.on_result(index, result)


class EndpointResponder:
    """Answers with a model behind an OpenAI-compatible endpoint, greedily by default and where the server can.

    Args:
        model: The model's name there.
        base_url: Where `/chat/completions` is, e.g. `http://localhost:8000/v1`. Without secrets.
        sampler: How frames are taken of a view. Its `max_pixels` must be set: frames are sent as they are, as JPEGs of
            quality 90, and their number and size is what a request weighs.
        api_key: The key to show. None shows HF_TOKEN (or the token of `hf auth login`) to Hugging Face's router and
            nothing to others. Copies of a responder do not hold it.
        max_tokens: Bound on an answer's length.
        concurrency: Requests under way at once, 1 to 100; the frames of so many are in memory.
        patience_seconds: How long one request is tried again. Waits start at 1 s and double up to 30 s, or are what the
            server asks for (`Retry-After`), times a random factor of 1 to 1.5.
        timeout_seconds: Bound on one try, from sending to the whole answer.
        seed: Sent with each request, and seeds the waits' randomness.
        plain_http_key: Whether the key may go unencrypted to another machine, where everyone on the way can read it.
        drop_unanswered: Whether a request that fails for `patience_seconds` at a server that answers others is given up
            for good (`NoAnswer`), instead of being asked again by the next run (`Unreached`).
        decoding: How answers are decoded. Sampled ones are asked for with its seed in place of `seed`; `thinking` is
            sent as `chat_template_kwargs={"enable_thinking": …}`, which vLLM and SGLang take and others may refuse.
        as_video: Whether the frames of a request are sent as one video, in the form that vLLM takes, and not as
            pictures.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        sampler: FrameSampler,
        api_key: str | None = None,
        max_tokens: int = 128,
        concurrency: int = 8,
        patience_seconds: float = 900.0,
        timeout_seconds: float = 300.0,
        seed: int = 0,
        plain_http_key: bool = False,
        drop_unanswered: bool = False,
        decoding: Decoding = GREEDY,
        as_video: bool = False,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("concurrency", concurrency)):
            if value < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {value}.")
        if concurrency > _MOST_CONCURRENT:
            raise ConfigError(
                f"concurrency must be ≤ {_MOST_CONCURRENT}, the connections there are, got {concurrency}."
            )
        if not patience_seconds >= 0:
            raise ConfigError(f"patience_seconds must be ≥ 0, got {patience_seconds}; 0 tries once.")
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds must be > 0, got {timeout_seconds}.")
        if sampler.max_pixels is None:
            raise ConfigError("The sampler bounds what is sent: give FrameSampler max_pixels, e.g. 448 * 448.")
        self._chat = Chat(model, base_url, api_key, max_tokens, timeout_seconds, seed, plain_http_key, decoding)
        self.sampler = sampler
        self.concurrency = concurrency
        self.as_video = as_video
        self.patience_seconds = patience_seconds
        self.drop_unanswered = drop_unanswered
        self._refusals_in_a_row = 0
        self._has_answered = False

    @property
    def name(self) -> str:
        """See `Responder.name`: the model and where it is served."""
        model = self._chat.model
        # Local servers name a model by its folder, whose place on that machine is nothing that rows should tell.
        return f"{PurePath(model).name if model.startswith('/') else model}@{self._chat.host}"

    @property
    def settings(self) -> dict[str, object]:
        """See `identity`."""
        chat = self._chat
        sampler = self.sampler.__getstate__() | {"cache_bytes": 0}
        return {
            "url": chat.url,
            "max_tokens": chat.max_tokens,
            "seed": chat.seed,
            "sampler": sampler,
            "decoding": asdict(chat.decoding),
        }

    @property
    def max_new_tokens(self) -> int:
        """Bound on an answer's length; may be changed between calls."""
        return self._chat.max_tokens

    @max_new_tokens.setter
    def max_new_tokens(self, value: int) -> None:
        self._chat.max_tokens = value

    @property
    def decoding(self) -> Decoding:
        """How answers are decoded; may be changed between calls."""
        return self._chat.decoding

    @decoding.setter
    def decoding(self, value: Decoding) -> None:
        self._chat.decode(value)

    def prompt_ids(self, request: Request) -> list[int] | None:
        """Token ids of the prompt that the server makes of a request; None where it does not tell.

        Raises:
            UnreadableVideo: If the request's video cannot be decoded.
        """
        return _run(self._prompt_ids(self._parts(request)))

    async def _prompt_ids(self, parts: Sequence[Mapping[str, Any]]) -> list[int] | None:
        async with self._chat.session() as session:
            return await self._chat.prompt_ids(session, parts)

    def check(self, sees_video: bool = True, on_wait: OnWait | None = None, gives_probabilities: bool = False) -> None:
        """Asks a tiny question, so that what would fail every request is known before work starts.

        Args:
            sees_video: Whether the model will be shown frames: it is asked what it sees in a picture.
            on_wait: See `Responder.respond`; a server that is still loading its model is waited for.
            gives_probabilities: Whether it will be asked for the probability of a yes.

        Raises:
            EndpointError: If nothing answers there, the server refuses (the model, the key, images) or drops images, or
                gives no probabilities.
        """
        _run(self._check(sees_video, gives_probabilities, on_wait))

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """See `Responder.respond`. May be called where an event loop runs, which then waits.

        Raises:
            Unanswered: If some requests have no answer; it holds the others' answers. Those that are `Unreached` failed
                for `patience_seconds` at a server that answers others; see `drop_unanswered`.
            EndpointError: If the endpoint answers nothing for `patience_seconds`, or refuses all requests.
        """
        return answered(_run(self._respond(requests, on_result, on_wait))) if requests else []

    async def _respond(
        self, requests: Sequence[Request], on_result: OnResult | None, on_wait: OnWait | None
    ) -> list[Result | Unreached]:
        queue = enumerate(requests)

        async def work() -> None:
            for index, request in queue:  # one iterator for all: a request is taken when there is room for its frames
                call.keep(index, await self._answer(call, index, request))

        async with self._chat.session() as session:
            call = _Call(session, [Unreached("not asked")] * len(requests), on_result, on_wait)
            with call.decoder:
                try:
                    async with asyncio.TaskGroup() as workers:
                        for _ in range(min(self.concurrency, len(requests))):
                            workers.create_task(work())
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None
        if call.refused and not self._has_answered:  # what is wrong is wrong with all requests
            raise EndpointError(str(call.results[call.refused[0]]))
        call.hand_over_refusals()
        return call.results

    async def _answer(self, call: _Call, index: int, request: Request) -> Result | Unreached:
        """What becomes of one request, after as many tries as `patience_seconds` allow."""
        try:
            parts = await asyncio.get_running_loop().run_in_executor(call.decoder, self._parts, request)
        except UnreadableVideo as error:
            return error
        started_seconds = time.monotonic()
        chance = random.Random(f"{self._chat.seed} {index}")
        outcome, num_tries = await self._persist(call, parts, request, chance)
        if isinstance(outcome, Failure):
            return await self._given_up(call, outcome, num_tries, started_seconds)
        if isinstance(outcome, NoAnswer) and not isinstance(outcome, Refused):
            self._refusals_in_a_row += 1
            if self._refusals_in_a_row >= _MOST_REFUSALS_IN_A_ROW:
                raise EndpointError(
                    f"{outcome} The last {self._refusals_in_a_row} requests to {self._chat.base_url} were refused."
                )
            return outcome
        self._refusals_in_a_row = 0
        self._has_answered = True  # a filter's word on one request is about that one
        call.heard_seconds = time.monotonic()
        return outcome

    async def _persist(
        self, call: _Call, parts: Sequence[Mapping[str, Any]], request: Request, chance: random.Random
    ) -> tuple[Outcome, int]:
        """Asks until there is an answer or a refusal, or patience runs out; also returns the number of tries."""

        def wait_seconds(state: RetryCallState) -> float:
            backoff_seconds = min(_FIRST_WAIT_SECONDS * 2 ** min(state.attempt_number - 1, 16), _LONGEST_WAIT_SECONDS)
            return max(backoff_seconds, _failure(state).retry_after_seconds) * chance.uniform(1.0, 1.5)

        def say(state: RetryCallState) -> None:
            why, seconds = _failure(state), state.upcoming_sleep
            logger.info("%s: %s; next try in %.1f s.", self.name, why, seconds)
            if call.on_wait is not None:
                call.on_wait(f"{self.name}: {why}; next try in {seconds:.0f} s")

        tries = AsyncRetrying(
            sleep=asyncio.sleep,
            retry=retry_if_result(lambda outcome: isinstance(outcome, Failure)),
            wait=wait_seconds,
            stop=stop_before_delay(self.patience_seconds),
            before_sleep=say,
            retry_error_callback=_failure,
        )
        outcome: Outcome = await tries(self._chat.ask, call.session, parts, request.schema, request.is_verdict)
        return outcome, tries.statistics["attempt_number"]

    async def _given_up(
        self, call: _Call, failure: Failure, num_tries: int, started_seconds: float
    ) -> Unreached | NoAnswer:
        """A request that patience ran out for.

        Raises:
            EndpointError: If the server answered nothing meanwhile and does not now: it is gone, or a quota is spent.
        """
        why = f"{self.name}: {failure} (tries: {num_tries})"
        # Another request's answer shows that the server is up; where there is no other, a greeting has to.
        if call.heard_seconds >= started_seconds or isinstance(await self._hello(call), str):
            return NoAnswer(f"{why}; given up, as drop_unanswered has it") if self.drop_unanswered else Unreached(why)
        asks_to_wait = failure.retry_after_seconds >= self.patience_seconds > 0
        raise EndpointError(
            f"{why}. {self._chat.base_url} answered nothing for patience_seconds={self.patience_seconds:g}"
            + (f" and asks to wait {failure.retry_after_seconds:.0f} s" if asks_to_wait else "")
            + ". See to the server, then run the same command again: what was answered is not asked again."
        )

    async def _hello(self, call: _Call) -> Outcome:
        return await self._chat.ask(call.session, [text_part("Hello.")])

    async def _check(self, sees_video: bool, gives_probabilities: bool, on_wait: OnWait | None) -> None:
        question = text_part(_PROBE_QUESTION)
        parts = [*self._seen([_probe_picture()] * (2 if self.as_video else 1)), question] if sees_video else [question]
        async with self._chat.session() as session:
            call = _Call(session, [], None, on_wait)
            outcome = await self._chat.ask(session, parts)
            if isinstance(outcome, Failure) and outcome.is_unconnected:
                raise EndpointError(f"{self._chat}: {outcome}. Start the server, or correct base_url.")
            # Some servers answer an image that their model cannot take with status 500.
            is_refused = isinstance(outcome, NoAnswer) or (
                isinstance(outcome, Failure) and outcome.status in (500, 501)
            )
            if sees_video and is_refused and isinstance(await self._hello(call), str):
                raise EndpointError(
                    f"{self._chat} answers text but takes no images: serve a vision-language model. It said: "
                    f"{str(outcome).removeprefix(f'{self._chat}: ')}"
                )
            if isinstance(outcome, Failure):
                outcome, _ = await self._persist(call, parts, Request(""), random.Random(self._chat.seed))
            if isinstance(outcome, Failure):
                raise EndpointError(f"{self._chat}: {outcome}. See to the server, then run the same command again.")
            if isinstance(outcome, NoAnswer):
                raise EndpointError(str(outcome))
            if sees_video and not _names_colours(outcome):
                await self._check_sight(call, outcome)
            if gives_probabilities:
                asked = Request("", is_verdict=True)
                outcome, _ = await self._persist(call, [text_part(_PROBE_VERDICT)], asked, random.Random(0))
                if not isinstance(outcome, str):
                    raise EndpointError(f"{self._chat} {NO_PROBABILITIES} It said: {outcome}")

    async def _check_sight(self, call: _Call, with_picture: str) -> None:
        """Looks closer at a model that did not name the colours of a picture: some servers drop what they cannot show.

        Raises:
            EndpointError: If it says the same without the picture.
        """
        said = " ".join(with_picture.split())[:SHOWN_CHARACTERS]
        if with_picture and await self._chat.ask(call.session, [text_part(_PROBE_QUESTION)]) == with_picture:
            raise EndpointError(
                f"{self._chat} says the same of a picture as without it ({said!r}): the server drops images, or the "
                "model does not see. Serve a vision-language model, with its images switched on."
            )
        logger.warning(
            "%s did not name the colours of a yellow and blue picture; it said: %r. Does it see?", self._chat, said
        )

    def _parts(self, request: Request) -> list[dict[str, Any]]:
        """A request as the parts of a chat message, its control tokens parted: the server would parse them."""
        frames: list[Image.Image] = []
        if request.timeline is not None:
            pixels = self.sampler(request.timeline, request.view).pixels.permute(0, 2, 3, 1)  # [N, H, W, 3]
            frames = [Image.fromarray(frame.numpy()) for frame in pixels]
        return [*self._seen(frames), text_part(parted(request.text))]

    def _seen(self, frames: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Frames as parts of a chat message."""
        return [video_part(frames)] if frames and self.as_video else [image_part(frame) for frame in frames]


def _probe_picture() -> Image.Image:
    """A picture whose left half is yellow and whose right half is blue: who names both has seen it."""
    picture = Image.new("RGB", (_PROBE_PX, _PROBE_PX), (255, 230, 0))
    picture.paste((0, 0, 255), (_PROBE_PX // 2, 0, _PROBE_PX, _PROBE_PX))
    return picture


def _names_colours(answer: str) -> bool:
    return "yellow" in answer.casefold() and "blue" in answer.casefold()


def _failure(state: RetryCallState) -> Failure:
    """What came of the last try, of one that is to be tried again."""
    assert state.outcome is not None
    failure: Failure = state.outcome.result()
    return failure


def _run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine to its end: in another thread where this one's event loop is busy with the caller."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
