"""Who answers: one protocol, frames and messages in, text out.

A responder writes questions, answers or judges; which of these it does is in the messages. `LocalResponder` runs a
transformers model in this process, `EndpointResponder` one behind an OpenAI-compatible endpoint, `ScriptedResponder` a
function. Knows nothing of rows or filters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.timeline import Timeline, View

if TYPE_CHECKING:
    from longvpo_hf.responders.endpoint import EndpointResponder
    from longvpo_hf.responders.local import LocalResponder

__all__ = [
    "CutOff",
    "EndpointResponder",
    "LocalResponder",
    "NoAnswer",
    "Request",
    "Responder",
    "Result",
    "ScriptedResponder",
    "Unanswered",
    "identity",
    "json_object",
    "whole_characters",
]


#: What a transformers model's answers follow from; a checkpoint also holds its optimizer's state.
_MODEL_FILES = {".bin", ".jinja", ".json", ".model", ".safetensors", ".txt"}


@dataclass(frozen=True, slots=True)
class Request:
    """One call: what is asked, and of which view of which timeline.

    Args:
        text: The user's message.
        timeline: The timeline asked about; None for a question about no video.
        view: Which part of it is shown.
        schema: The JSON schema of the wanted answer; None for free text. Who cannot hold a model to it leaves it out,
            so the text must ask for it too, and the answer must be read with `json_object` and checked.
    """

    text: str
    timeline: Timeline | None = None
    view: View = field(default_factory=View.whole)
    schema: Mapping[str, Any] | None = field(default=None, hash=False)  # a dict has no hash; requests have


class NoAnswer(RuntimeError):
    """A request that got no answer, however often it was tried."""

    reason = "no_answer"


#: What came of one request: its answer, or why there is none (both errors have a `reason`).
Result: TypeAlias = str | UnreadableVideo | NoAnswer


class Unanswered(RuntimeError):
    """Some requests of a call have no answer. Those of the others are kept, so that nobody need ask them again.

    Args:
        results: One per request, in order.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = tuple(results)
        failures = [result for result in self.results if not isinstance(result, str)]
        super().__init__(f"{len(failures)} of {len(self.results)} requests have no answer; the first: {failures[0]}")

    def __reduce__(self) -> tuple[type[Unanswered], tuple[tuple[Result, ...]]]:
        """Lets the error leave a worker process as it is."""
        return type(self), (self.results,)


class CutOff(str):
    """An answer that reached its bound on tokens before its end, where the model's end is known."""

    __slots__ = ()


class Responder(Protocol):
    """Anything that answers requests."""

    @property
    def name(self) -> str:
        """Model and revision, as it stands in a row's provenance. See `identity` for what else tells models apart."""
        ...

    def respond(self, requests: Sequence[Request]) -> list[str]:
        """One answer per request, in order.

        Raises:
            longvpo_hf.frames.UnreadableVideo: If a request's video cannot be decoded.
            Unanswered: If some requests have no answer and the others' are known.
        """
        ...


def identity(responder: Responder) -> Any:
    """What a responder's answers follow from, as JSON: its name, and its `settings` where it has them.

    A name stands in rows and cannot tell two models in folders of one name apart, nor bounds on answers and frames;
    finished work must.
    """
    return [responder.name, getattr(responder, "settings", None)]


def weights(config: Any) -> str:
    """Which weights a transformers model was loaded with: a hash of its folder's files, or the Hub's commit."""
    folder = Path(config.name_or_path or "")
    if not (config.name_or_path and folder.is_dir()):
        return str(getattr(config, "_commit_hash", None) or "")
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _MODEL_FILES and path.is_file():
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


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


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object in an answer, without the thoughts, code fences and words around it; None where there is none.

    Of several the last counts: models draft first.
    """
    text = re.sub(r"^.*</think(ing)?>", "", text, flags=re.DOTALL)
    found: dict[str, Any] | None = None
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _JSON.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            found = {k: whole_characters(v) if isinstance(v, str) else v for k, v in value.items()} or found
        start = text.find("{", end)
    return found


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a character, which no file can hold: models leave some in escapes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


#: Answers break lines within strings, and the rest of what JSON forbids there does no harm.
_JSON = json.JSONDecoder(strict=False)


def __getattr__(name: str) -> object:
    if name == "EndpointResponder":  # needs huggingface_hub
        from longvpo_hf.responders.endpoint import EndpointResponder

        return EndpointResponder
    if name == "LocalResponder":  # needs torch and transformers
        from longvpo_hf.responders.local import LocalResponder

        return LocalResponder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
