"""How a build asks its models: in batches, each request's answer or the reason why it has none, nothing asked twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from longvpo_hf.artifacts import Fields
from longvpo_hf.building.method import Drop, spans_of
from longvpo_hf.responders import CutOff, Request, Responder, Result, Unanswered, Unreached
from longvpo_hf.responders.replies import whole_characters, without_reasoning

#: What became of a request: the answer without its reasoning (a `CutOff` where it was cut off), or why not.
Answer: TypeAlias = str | Drop


class Asker:
    """Asks models in batches; one bad video costs no other request its answer.

    What is asked with `remember` is asked once in a build, also in one that was killed and goes on.
    """

    def __init__(self) -> None:
        self._known: dict[str, Answer] = {}
        self._new: dict[str, Answer] = {}

    def __call__(
        self, responder: Responder, requests: Sequence[Request], what: str, remember: bool = False
    ) -> list[Answer]:
        """An answer or a `Drop` for each request, in order.

        Args:
            responder: Who is asked.
            requests: What is asked.
            what: Name of the progress bar.
            remember: Whether the same request gets the same answer from now on.
        """
        if not remember:
            return _respond(responder, requests, what)
        keys = [_key(responder, request) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        answers = dict(zip(new, _respond(responder, list(new.values()), what), strict=True))
        self._known.update(answers)
        self._new.update(answers)
        return [self._known[key] for key in keys]

    def take_new(self) -> Fields:
        """What was remembered since the last call, as JSON."""
        new, self._new = self._new, {}
        return {key: answer_to_json(answer) for key, answer in new.items()}

    def learn(self, stored: Fields) -> None:
        """Remembers what `take_new` gave, in this run or in one that was killed."""
        for key, value in stored.items():
            self._known.setdefault(key, answer_from_json(value))


def answer_to_json(answer: Answer) -> Any:
    """An answer as it is stored."""
    return asdict(answer) if isinstance(answer, Drop) else [answer, isinstance(answer, CutOff)]


def answer_from_json(value: Any) -> Answer:
    """The inverse of `answer_to_json`."""
    if isinstance(value, dict):
        return Drop(**value)
    text, is_cut_off = value
    return CutOff(text) if is_cut_off else str(text)


def _key(responder: Responder, request: Request) -> str:
    """The same for requests that show a model the same and ask the same."""
    shown = None if request.timeline is None else spans_of(request.view.of(request.timeline))
    schema = None if request.schema is None else dict(request.schema)
    content = [responder.name, request.text, shown, request.view.num_frames, schema]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:20]


def _respond(responder: Responder, requests: Sequence[Request], what: str) -> list[Answer]:
    from tqdm.auto import tqdm

    if not requests:
        return []
    with tqdm(total=len(requests), desc=what, unit="call", leave=False) as bar:

        def received(index: int, result: Result) -> None:
            bar.set_postfix_str("", refresh=False)
            bar.update()

        try:
            results: Sequence[Result | Unreached] = responder.respond(requests, received, bar.set_postfix_str)
        except Unanswered as error:  # what was answered is kept
            results = error.results
    return [_answer(result) if isinstance(result, str) else _drop(result) for result in results]


def _drop(result: Any) -> Drop:
    return Drop(result.reason, str(result))


def _answer(reply: str) -> str:
    """The answer in a reply, as files can hold it."""
    answer = whole_characters(without_reasoning(reply))
    return CutOff(answer) if isinstance(reply, CutOff) else answer
