"""Who answers: one protocol, frames and messages in, text out.

A responder writes questions, answers or judges, as the messages ask. `LocalResponder` runs a transformers model in this
process, `EndpointResponder` one behind an OpenAI-compatible endpoint, `ScriptedResponder` a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from longvpo_hf.artifacts import digest
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.reasoning import CutOff
from longvpo_hf.record import hub_commit, weights_digest
from longvpo_hf.timeline import Timeline, View

if TYPE_CHECKING:
    from longvpo_hf.responders.endpoint import EndpointResponder
    from longvpo_hf.responders.local import LocalResponder

__all__ = [
    "CutOff",
    "Deferred",
    "EndpointResponder",
    "LocalResponder",
    "NoAnswer",
    "OnResult",
    "OnWait",
    "Refused",
    "Request",
    "Responder",
    "Result",
    "ScriptedResponder",
    "Unanswered",
    "Unreached",
    "answered",
    "identity",
    "one_by_one",
]


@dataclass(frozen=True, slots=True)
class Request:
    """One call: what is asked, and of which view of which timeline.

    Args:
        text: The user's message.
        timeline: The timeline asked about; None for a question about no video.
        view: Which part of it is shown.
        schema: The JSON schema of the wanted answer; None for free text. Who cannot hold a model to it leaves it out,
            so the text must ask for it too, and the answer must be read with `replies.json_object` and checked.
        is_verdict: Whether a yes or a no is wanted, and of it not the word but how probable it is: the answer is then
            `replies.probability_text`, the share of yes of what the model gives to yes and to no.
        rehearsed: Gives what a rehearsal answers, see `building.rehearsal`; None where that follows from what is shown.
    """

    text: str
    timeline: Timeline | None = None
    view: View = field(default_factory=View.whole)
    schema: Mapping[str, Any] | None = field(default=None, hash=False)  # a dict has no hash; requests have
    is_verdict: bool = False
    rehearsed: Callable[[], str] | None = field(default=None, compare=False, repr=False)


class NoAnswer(RuntimeError):
    """The model's server refuses this very request: asking again gives the same. Final."""

    reason = "no_answer"


class Refused(NoAnswer):
    """A content filter of the model's server withheld the answer. Final."""

    reason = "refused"


class Unreached(RuntimeError):
    """The model could not be asked this: its server was busy or broken, however often it was tried, and answers others.

    Asking again later may help; never final. Of a server that answers nothing at all, the call ends with an
    `EndpointError`.
    """

    reason = "no_answer"


#: What became of one request for good: its answer, or why there is none (both errors have a `reason`).
Result: TypeAlias = str | UnreadableVideo | NoAnswer
#: Called with a request's index and its result, once, as soon as that is final: in any order, while others are pending.
OnResult: TypeAlias = Callable[[int, Result], object]
#: Called with the reason, in one line, each time that a responder waits for its server to recover.
OnWait: TypeAlias = Callable[[str], object]


class Unanswered(RuntimeError):
    """Some requests of a call have no answer; the answers of the others are kept.

    Args:
        results: One per request, in order.
    """

    def __init__(self, results: Sequence[Result | Unreached]) -> None:
        self.results = tuple(results)
        failures = [result for result in self.results if not isinstance(result, str)]
        super().__init__(f"{len(failures)} of {len(self.results)} requests have no answer; the first: {failures[0]}")

    @property
    def transient(self) -> bool:
        """Whether asking again may help: some requests never reached the model."""
        return any(isinstance(result, Unreached) for result in self.results)

    def __reduce__(self) -> tuple[type[Unanswered], tuple[tuple[Result | Unreached, ...]]]:
        """Lets the error leave a worker process unchanged."""
        return type(self), (self.results,)


class Responder(Protocol):
    """Anything that answers requests."""

    @property
    def name(self) -> str:
        """Model and revision, for a row's provenance. See `identity` for what else distinguishes models."""
        ...

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """One answer per request, in order.

        Args:
            requests: What is asked.
            on_result: Gets each result as soon as it is final, so that it can be stored at once. What was only not
                reached is no result: it is in the `Unanswered` at the end.
            on_wait: Gets the reason for each wait. Models of this process never wait.

        Raises:
            Unanswered: If some requests have no answer; it holds the answers of the others.
        """
        ...


def answered(results: Sequence[Result | Unreached]) -> list[str]:
    """The results, if all of them are answers.

    Raises:
        Unanswered: If some are not.
    """
    answers = [result for result in results if isinstance(result, str)]
    if len(answers) < len(results):
        raise Unanswered(results)
    return answers


def one_by_one(
    requests: Sequence[Request], answer: Callable[[Request], str], on_result: OnResult | None = None
) -> list[str]:
    """A `Responder.respond` that answers each request by itself.

    Args:
        requests: What is asked.
        answer: Gives one answer; may raise `UnreadableVideo` or `NoAnswer`.
        on_result: See `Responder.respond`.
    """
    results: list[Result] = []
    for index, request in enumerate(requests):
        try:
            results.append(answer(request))
        except (UnreadableVideo, NoAnswer) as error:
            results.append(error)
        if on_result is not None:
            on_result(index, results[-1])
    return answered(results)


def identity(responder: Responder) -> Any:
    """What a responder's answers follow from, as JSON: its name, and its `settings` where it has them.

    Rows hold the name, which is the same for two models in folders of one name, and under other bounds on answers and
    frames; finished work must distinguish these.
    """
    return [responder.name, getattr(responder, "settings", None)]


def weights(config: Any) -> str:
    """Which weights a transformers model was loaded with: a hash of its folder's files, or the Hub's commit."""
    folder = Path(config.name_or_path or "")
    if not (config.name_or_path and folder.is_dir()):
        return hub_commit(config.name_or_path or "")
    return weights_digest(folder)


@dataclass(frozen=True, slots=True)
class ScriptedResponder:
    """Answers by a function: for tests and rehearsals.

    Args:
        name: See `Responder.name`.
        answer: Gives the answer to one request.
    """

    name: str
    answer: Callable[[Request], str]

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """See `Responder.respond`."""
        return one_by_one(requests, self.answer, on_result)


@dataclass(frozen=True, slots=True)
class Deferred:
    """A responder that is made in the process that first asks it: it can be sent to others, and a model's weights stay
    where they are.

    Args:
        make: Makes the responder; goes to the other process.
        name: See `Responder.name`.
        settings: See `identity`.
    """

    make: Callable[[], Responder]
    name: str
    settings: Any

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """See `Responder.respond`."""
        key = digest([self.name, self.settings])
        if key not in _made:
            _made[key] = self.make()
        return _made[key].respond(requests, on_result, on_wait)


#: The responders of this process that were deferred, by what they are.
_made: dict[str, Responder] = {}


def __getattr__(name: str) -> object:
    if name == "EndpointResponder":  # needs huggingface_hub
        from longvpo_hf.responders.endpoint import EndpointResponder

        return EndpointResponder
    if name == "LocalResponder":  # needs torch and transformers
        from longvpo_hf.responders.local import LocalResponder

        return LocalResponder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
