"""How a build asks its models: in batches, each request's answer or the reason why it has none, nothing asked twice.

An answer is on disk as soon as it is there, see `artifacts.Log`. That a model was not reached is no answer: the build
stops, and asks again when it is called again. Only a request that got none in several runs, of a server that answers
others, is gone without; the work that follows from it is never stored as finished, so that the next run asks once more.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from longvpo_hf.artifacts import Log, digest, first_file
from longvpo_hf.building.method import Drop, spans_of
from longvpo_hf.errors import EndpointError
from longvpo_hf.reasoning import CutOff, without_reasoning
from longvpo_hf.responders import Request, Responder, Result, Unanswered, Unreached
from longvpo_hf.responders.replies import whole_characters

#: What became of a request: the answer without its reasoning (a `CutOff` where it was cut off), or why there is none.
Answer: TypeAlias = str | Drop
#: Runs that stop because one request gets no answer; the last of them goes on without it.
_RUNS_WITHOUT_ANSWER = 3


class GivenUp(Drop):
    """A request that got no answer in several runs: a drop of this run, which the next one asks for again."""

    __slots__ = ()


class Remembered:
    """Answers that are the same in the whole build, whoever asks: of several answers to a request, the first stays.

    Each is a small file, so that processes and machines that work different pieces have the same one. A power cut may
    cost the last seconds of them; a torn one is asked for again.

    Args:
        folder: Where they are, in folders of the first two digits of their keys; made with the first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        #: Read or kept here before: what is kept never changes. Those that were given up are of this run alone.
        self._known: dict[str, Answer] = {}

    def get(self, key: str) -> Answer | None:
        """The answer to a request; None if nobody has asked."""
        if key not in self._known:
            try:
                value, seal = json.loads(self._path(key).read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                return None
            if seal != digest(value):
                return None
            self._known[key] = answer_from_json(value)
        return self._known[key]

    def keep(self, key: str, answer: Answer) -> Answer:
        """Keeps an answer, unless there is one; returns the one that is kept."""
        if isinstance(answer, GivenUp):
            return self._known.setdefault(key, answer)
        value = answer_to_json(answer)
        content = json.dumps([value, digest(value)]).encode()
        if first_file(self._path(key), content, lasting=False, parts=self._folder.parent):
            self._known[key] = answer
            return answer
        first = self.get(key)
        if first is None:  # a torn one
            self._path(key).unlink(missing_ok=True)
            return self.keep(key, answer)
        return first

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


class Asker:
    """Asks models for one piece of work; one bad video costs no other request its answer.

    Args:
        log: Gets each answer at once, and holds those that a killed run got for the same piece.
        remembered: Answers of the whole build.
        root: Folder below which requests are told apart by their files, see `paths.below`.
    """

    def __init__(self, log: Log, remembered: Remembered, root: str = "") -> None:
        self._log = log
        self._remembered = remembered
        self._root = root
        self._logged = {
            entry["request"]: answer_from_json(entry["answer"]) for entry in log.entries if "answer" in entry
        }
        self._runs_without = Counter(entry["request"] for entry in log.entries if "unreached" in entry)
        self._given_up: dict[str, GivenUp] = {}
        self._times: Counter[str] = Counter()

    def __call__(
        self, responder: Responder, requests: Sequence[Request], what: str, remember: bool = False
    ) -> list[Answer]:
        """An answer or a `Drop` for each request, in order.

        Args:
            responder: Who is asked.
            requests: What is asked.
            what: Name of the progress bar.
            remember: Whether the same request gets the same answer in the whole build, from now on.

        Raises:
            EndpointError: If the model was not reached. What it answered is kept.
        """
        names = [self._name(_key(responder, request, self._root), remember) for request in requests]
        found = {name: self._remembered.get(name) for name in set(names)} if remember else {}
        missing = {
            name: request
            for name, request in zip(names, requests, strict=True)
            if found.get(name) is None and self._answer(name) is None
        }
        self._ask(responder, missing, what)
        answers: dict[str, Answer] = {}
        for name in dict.fromkeys(names):
            answer = found.get(name)
            if answer is None and (answer := self._answer(name)) is not None and remember:
                answer = self._remembered.keep(name, answer)
            if answer is not None:
                answers[name] = answer
        given = [answers[name] for name in names if name in answers]
        if any(isinstance(answer, GivenUp) for answer in given):
            self._log.is_final = False
        return given

    def _name(self, key: str, remember: bool) -> str:
        """What the request's answer is kept under: where nothing is remembered, each time the same is asked counts."""
        if remember:
            return key
        self._times[key] += 1
        return f"{key}-{self._times[key]}"

    def _answer(self, name: str) -> Answer | None:
        """What this piece was answered."""
        return self._logged.get(name, self._given_up.get(name))

    def _ask(self, responder: Responder, requests: Mapping[str, Request], what: str) -> None:
        """Asks, and logs what becomes of each request as soon as that is final."""
        if not requests:
            return
        from tqdm.auto import tqdm

        names = list(requests)
        with tqdm(total=len(names), desc=what, unit="call", leave=False) as bar:

            def received(index: int, result: Result) -> None:
                bar.set_postfix_str("", refresh=False)
                bar.update()
                self._keep(names[index], result)

            try:
                results: Sequence[Result | Unreached] = responder.respond(
                    list(requests.values()), received, bar.set_postfix_str
                )
            except Unanswered as error:
                results = error.results
        for name, result in zip(names, results, strict=True):
            if not isinstance(result, Unreached) and name not in self._logged:  # of a responder that hands nothing over
                self._keep(name, result)
        unreached = {name: result for name, result in zip(names, results, strict=True) if isinstance(result, Unreached)}
        self._go_without(unreached)
        waiting = [name for name in unreached if name not in self._given_up]
        if waiting:
            timeline = requests[waiting[0]].timeline
            about = f" about {timeline.clips[0].path}" if timeline else ""
            raise EndpointError(
                f"{len(waiting)} of {len(names)} requests to {responder.name} got no answer; the first{about}: "
                f"{str(unreached[waiting[0]]).rstrip('.')}. All other answers are kept: the same command asks for "
                f"these alone. What gets none in {_RUNS_WITHOUT_ANSWER} runs is left out; with --drop-unanswered, now."
            )

    def _go_without(self, unreached: Mapping[str, Unreached]) -> None:
        """Notes which requests got no answer in this run, and gives up those that got none in several."""
        from tqdm.auto import tqdm

        for name, failure in unreached.items():
            self._runs_without[name] += 1
            self._log.append({"request": name, "unreached": str(failure)})
            if self._runs_without[name] >= _RUNS_WITHOUT_ANSWER:
                runs = f"{self._runs_without[name]} runs"
                self._given_up[name] = GivenUp("no_answer", f"{failure} (in {runs}; the next run asks again)")
                tqdm.write(
                    f"A request got no answer in {runs}, while others did: {failure}. The build goes on without it, "
                    "and the same command will ask again; --drop-unanswered leaves it out for good."
                )

    def _keep(self, name: str, result: Result) -> None:
        answer = _answer(result) if isinstance(result, str) else Drop(result.reason, str(result))
        self._logged[name] = answer
        self._log.append({"request": name, "answer": answer_to_json(answer)})


def answer_to_json(answer: Answer) -> Any:
    """An answer as it is stored."""
    return asdict(answer) if isinstance(answer, Drop) else [answer, isinstance(answer, CutOff)]


def answer_from_json(value: Any) -> Answer:
    """The inverse of `answer_to_json`."""
    if isinstance(value, dict):
        return Drop(**value)
    text, is_cut_off = value
    return CutOff(text) if is_cut_off else str(text)


def _key(responder: Responder, request: Request, root: str) -> str:
    """The same for requests that show a model the same and ask the same."""
    shown = None if request.timeline is None else spans_of(request.view.of(request.timeline), root)
    schema = None if request.schema is None else dict(request.schema)
    content = [responder.name, request.text, shown, request.view.num_frames, schema]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:20]


def _answer(reply: str) -> str:
    """The answer in a reply, as files can hold it."""
    answer = without_reasoning(reply)
    text = whole_characters(answer)
    return CutOff(text) if isinstance(answer, CutOff) else text
