"""Who answers: one protocol, frames and messages in, text out.

A responder writes questions, answers or judges; which of these it does is in the messages. `LocalResponder` runs a
transformers model in this process, `ScriptedResponder` a function. Knows nothing of rows or filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from longvpo_hf.timeline import Timeline, View

if TYPE_CHECKING:
    from .local import LocalResponder

__all__ = ["LocalResponder", "Request", "Responder", "ScriptedResponder"]


@dataclass(frozen=True, slots=True)
class Request:
    """One call: what is asked, and of which view of which timeline.

    Args:
        text: The user's message.
        timeline: The timeline asked about; None for a question about no video.
        view: Which part of it is shown.
    """

    text: str
    timeline: Timeline | None = None
    view: View = field(default_factory=View.whole)


class Responder(Protocol):
    """Anything that answers requests."""

    @property
    def name(self) -> str:
        """Model and revision, as it stands in a row's provenance."""
        ...

    def respond(self, requests: Sequence[Request]) -> list[str]:
        """One answer per request, in order.

        Raises:
            longvpo_hf.frames.UnreadableVideo: If a request's video cannot be decoded.
        """
        ...


@dataclass(frozen=True, slots=True)
class ScriptedResponder:
    """Answers by a function: for tests and rehearsals.

    Args:
        name: See `Responder.name`.
        answer: Gives the answer to one request.
    """

    name: str
    answer: Callable[[Request], str]

    def respond(self, requests: Sequence[Request]) -> list[str]:
        """See `Responder.respond`."""
        return [self.answer(request) for request in requests]


def __getattr__(name: str) -> object:
    if name == "LocalResponder":  # needs torch and transformers
        from .local import LocalResponder

        return LocalResponder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
