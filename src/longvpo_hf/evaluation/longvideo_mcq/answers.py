"""What a reply means: which option it names, whether it is right, and how sure a share of right replies is.

Pure Python, so that probes, the metric `longvideo_mcq` and whoever counts right answers share it; `evaluate` copies the
file together with the metric's. A letter is found by the rules of the benchmarks (`evaluation/scoring.py`), which are
lmms-eval 0.7's (`_task_utils/mcq_extract.py`) with a few guards, but without importing lmms-eval, which takes half a
minute; tests/test_mcq.py holds the two equal where lmms-eval is installed.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase

_TRACES = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<analysis>", "</analysis>"))
# No option: a capital inside of a word ("Cannot be determined") and the article of an option's text ("(B) A man").
_WORD = re.compile(r"[A-Za-z]{2,}|[A-Za-z](?=['’][A-Za-z])")
_ARTICLE = re.compile(r"(\([A-H]\)|\b[A-H][.:)])(\s+)A\b")
# Marks around an answer that are no part of it; others are: "-5", ".5", "C++".
_AROUND = " \"'`*_()[]{}<>“”‘’«»"
_CLOSING = _AROUND + ".,;:!?…。，！？"
_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def letter_of(reply: str, letters: Sequence[str]) -> str:
    """The option that a reply names, one of `letters`, or "" where it names none.

    Of the forms a reply names options in, the surest counts, and of that the last: a lone letter at the begin, at the
    end, after "the answer is", then "(A)", "A.", "A:", "A)", "A ", and failing all of these the letter anywhere. A
    thinking trace is left out; one that does not end holds no answer.
    """
    text = _WORD.sub(lambda word: word.group().lower(), _after_traces(reply))
    text = _ARTICLE.sub(r"\1\2a", text).strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    lone, text = text.strip(), f" {text} "
    found: list[tuple[int, int, int]] = []  # how sure, where, and minus which letter: the first of equals wins
    for rank, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        found += [
            (rank, text.rfind(form.format(letter)), -number)
            for number, letter in enumerate(letters)
            if form.format(letter) in text
        ]
    for phrase in _PHRASES:
        start = text.lower().find(phrase)
        if start >= 0:
            places = [(text.find(letter, start + len(phrase)), -number) for number, letter in enumerate(letters)]
            found += [(7, place, number) for place, number in places if place >= 0]
    for number, letter in enumerate(letters):
        if lone.startswith(letter) and not lone[1:2].isalpha():
            found.append((10, 0, -number))
        if lone.endswith(letter) and not lone[-2:-1].isalpha():
            found.append((9, len(text) - 1, -number))
    if not found:
        found = [(0, text.rfind(letter), -number) for number, letter in enumerate(letters) if letter in text]
    return letters[-max(found)[2]] if found else ""


def is_right(reply: str, answer: str, letters: Sequence[str] = ()) -> bool:
    """Whether a reply is the answer.

    Args:
        reply: What the model said.
        answer: The truth: one of `letters`, or a text.
        letters: The letters of the options. Without any the reply must be the answer's text, but for capitals, blanks
            and marks around it.
    """
    if letters:
        return letter_of(reply, letters) == answer
    said = _plain(_after_traces(reply))
    return bool(said) and said == _plain(answer)


def wilson_interval(right: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share of right answers, in [0, 1].

    Raises:
        ValueError: If not 0 ≤ `right` ≤ `number`, or `number` is 0.
    """
    if not 0 <= right <= number or number < 1:
        raise ValueError(f"An interval needs 0 ≤ right ≤ number and number ≥ 1, got {right} of {number}.")
    z, p = 1.959964, right / number
    centre = (p + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(p * (1 - p) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return max(0.0, centre - half), min(1.0, centre + half)


def _after_traces(reply: str) -> str:
    """What follows the thinking traces; nothing where one does not end."""
    for begin, end in _TRACES:
        reply = re.sub(f"{begin}.*?{end}", "", reply, flags=re.DOTALL)
        if begin not in reply:
            reply = reply.rpartition(end)[2]  # of a trace that began in the prompt
    return "" if any(begin in reply for begin, _ in _TRACES) else reply


def _plain(text: str) -> str:
    text = " ".join(text.casefold().split())
    return text.lstrip(_AROUND).rstrip(_CLOSING) or text
