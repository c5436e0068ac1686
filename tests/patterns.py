"""A regular expression matched step by step, to count the steps: as `re` backtracks, without its shortcuts."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator
from re import _constants as c  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

Then = Callable[[int], bool]


class TooManySteps(Exception):
    """More steps than allowed."""


class Counting:
    """Searches a text for a pattern and counts.

    Args:
        pattern: The pattern; of bytes, its texts are Latin-1.
        allowed: So many steps; one more raises `TooManySteps`.
    """

    def __init__(self, pattern: re.Pattern[Any], allowed: int) -> None:
        source = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
        self.ignores_case = bool(pattern.flags & re.IGNORECASE)
        self.dot_all = bool(pattern.flags & re.DOTALL)
        self.multiline = bool(pattern.flags & re.MULTILINE)
        self.tree = list(_parser.parse(source, pattern.flags & ~re.UNICODE & ~re.LOCALE & ~re.DEBUG))
        self.allowed = allowed
        self.steps = 0
        self.text = ""
        self.groups: dict[int | None, str] = {}

    def search(self, text: str, anchored: bool = False) -> int:
        """The steps of finding all matches, or of matching the whole text where `anchored`."""
        self.text, self.steps, place = text, 0, 0
        if anchored:
            self._match(self.tree, 0, 0, lambda end: end == len(text))
            return self.steps
        while place <= len(text):
            place = max(place + 1, self.end(text, place) or 0)
        return self.steps

    def end(self, text: str, place: int) -> int | None:
        """Where a match that starts at `place` ends; None where none does."""
        self.text = text
        ends: list[int] = []
        self._match(self.tree, 0, place, lambda end: ends.append(end) is None)
        return ends[0] if ends else None

    def _step(self, number: int = 1) -> None:
        self.steps += number
        if self.steps > self.allowed:
            raise TooManySteps

    def _match(self, items: Any, index: int, place: int, then: Then) -> bool:
        while index < len(items):
            self._step()
            op, value = items[index]
            if is_single(op):
                if place >= len(self.text) or not self._holds(op, value, self.text[place]):
                    return False
                place += 1
            elif op is c.AT:
                if not self._at(value, place):
                    return False
            elif op in (c.ASSERT, c.ASSERT_NOT):
                if self._looks(value, place) is (op is c.ASSERT_NOT):
                    return False
            else:
                rest = functools.partial(self._match, items, index + 1, then=then)
                return self._branches(op, value, place, rest)
            index += 1
        return then(place)

    def _branches(self, op: Any, value: Any, place: int, then: Then) -> bool:
        if op is c.SUBPATTERN:

            def close(end: int) -> bool:
                self.groups[value[0]] = self.text[place:end]
                return then(end)

            return self._match(list(value[-1]), 0, place, close)
        if op is c.GROUPREF:
            group = self.groups.get(value, "\0")
            self._step(len(group))
            return self.text.startswith(group, place) and then(place + len(group))
        if op is c.BRANCH:
            return any(self._match(list(branch), 0, place, then) for branch in value[1])
        if op is c.ATOMIC_GROUP:
            return self._possessive(list(value), place, 1, 1, then)
        least, most, body = value[0], value[1], list(value[2])
        if op is c.POSSESSIVE_REPEAT:
            return self._possessive(body, place, least, most, then)
        assert op in (c.MAX_REPEAT, c.MIN_REPEAT), op
        if len(body) == 1 and is_single(body[0][0]):
            return self._run(body[0], place, least, most, op is c.MAX_REPEAT, then)
        return self._repeat(body, place, 0, (least, most, op is c.MAX_REPEAT), then)

    def _run(self, item: Any, place: int, least: int, most: int, is_greedy: bool, then: Then) -> bool:
        length = 0
        while place + length < len(self.text) and length < most and self._holds(*item, self.text[place + length]):
            self._step()
            length += 1
            if not is_greedy and length > least and then(place + length - 1):
                return True
        lengths = range(length, least - 1, -1) if is_greedy else range(max(length, least), length + 1)
        return any(then(place + each) for each in lengths if self._step() is None)

    def _repeat(self, body: Any, place: int, done: int, bounds: tuple[int, int, bool], then: Then) -> bool:
        least, most, is_greedy = bounds

        def again(end: int) -> bool:
            return end > place and self._repeat(body, end, done + 1, bounds, then)

        if not is_greedy and done >= least and then(place):
            return True
        if done < most and self._match(body, 0, place, again):
            return True
        return is_greedy and done >= least and then(place)

    def _possessive(self, body: Any, place: int, least: int, most: int, then: Then) -> bool:
        done = 0
        while done < most:
            ends: list[int] = []
            if not self._match(body, 0, place, lambda end, ends=ends: ends.append(end) is None):  # type: ignore[misc]
                break
            done += 1
            if ends[0] == place:
                break
            place = ends[0]
        return done >= least and then(place)

    def _looks(self, value: Any, place: int) -> bool:
        direction, body = value
        if direction > 0:
            return self._match(list(body), 0, place, lambda end: True)
        width = body.getwidth()[0]
        return place >= width and self._match(list(body), 0, place - width, lambda end: end == place)

    def _at(self, where: Any, place: int) -> bool:
        text = self.text
        if where in (c.AT_BEGINNING, c.AT_BEGINNING_STRING):
            return place == 0 or (self.multiline and where is c.AT_BEGINNING and text[place - 1] == "\n")
        if where in (c.AT_END, c.AT_END_STRING):
            return (
                place == len(text)
                or (where is c.AT_END and text[place:] == "\n")
                or (self.multiline and where is c.AT_END and text[place] == "\n")
            )
        before = place > 0 and is_word(text[place - 1])
        return (before != (place < len(text) and is_word(text[place]))) is (where is c.AT_BOUNDARY)

    def _holds(self, op: Any, value: Any, character: str) -> bool:
        if self.ignores_case:
            return any(self._is(op, value, each) for each in {character, character.lower(), character.upper()[:1]})
        return self._is(op, value, character)

    def _is(self, op: Any, value: Any, character: str) -> bool:
        if op is c.ANY:
            return self.dot_all or character != "\n"
        if op in (c.LITERAL, c.NOT_LITERAL):
            return (ord(character) == value) is (op is c.LITERAL)
        is_negated = value[0][0] is c.NEGATE
        return any(in_class(*item, character) for item in value if item[0] is not c.NEGATE) is not is_negated


def is_single(op: Any) -> bool:
    return op in (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN)


def is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def in_class(op: Any, value: Any, character: str) -> bool:
    if op is c.LITERAL:
        return ord(character) == value
    if op is c.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    kind = str(value).rpartition("_")[2]
    holds = {"DIGIT": unicodedata.category(character) == "Nd", "SPACE": character.isspace(), "WORD": is_word(character)}
    return holds[kind] is not ("NOT" in str(value))


def samples(items: Any) -> Iterator[str]:
    """Texts that parts of a pattern match: what an attacker would repeat."""
    items = list(items)
    for index, (op, value) in enumerate(items):
        yield from (sample(items[: index + 1]), sample(items[index : index + 1]), sample(items[index:]))
        if op is c.SUBPATTERN:
            yield from samples(value[-1])
        elif op is c.BRANCH:
            for branch in value[1]:
                yield from samples(branch)
        elif op in (c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT):
            yield from samples(value[2])


def sample(items: Any) -> str:
    """A text that the items of a pattern match, whatever stands around them."""
    text = ""
    for op, value in items:
        if op is c.LITERAL:
            text += chr(value)
        elif op is c.SUBPATTERN:
            text += sample(value[-1])
        elif op is c.ATOMIC_GROUP:
            text += sample(value)
        elif op is c.BRANCH:
            text += sample(value[1][0])
        elif op in (c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT):
            text += sample(value[2]) * max(1, value[0])
        elif op in (c.ANY, c.IN, c.NOT_LITERAL):
            text += (
                next((each for each in " a1A-_.:/\n'\"<" if Counting(re.compile(""), 10)._is(op, value, each)), "é")
                if op is not c.IN or value[0][0] is c.NEGATE or value[0][0] is c.CATEGORY
                else first_of(value)
            )
    return text


def first_of(value: Any) -> str:
    op, of = value[0]
    return chr(of) if op is c.LITERAL else chr(of[0])
