"""Suites' own rules for scoring a reply, so that a number compares with those in papers.

The rules are those of lmms-eval 0.7.3's tasks, which papers of long video quote: `_task_utils/mcq_extract.py` for
Video-MME, MLVU, LVBench, VideoEval-Pro and CG-Bench, `parse_multi_choice_response` of `longvideobench/utils.py` (its
authors' own) and `mcq_acc` of `mvbench/utils.py`; a suite with a rule that no other has keeps it in its file. They
misread some replies ("A dog" as A); `answers.letter_of` reads them as they are meant.

A rule takes a reply without its reasoning, and the question, and gives percent; None leaves the question out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longvpo_hf.evaluation.suite import Question

_FOUR, _FOURTEEN = "ABCD", "ABCDEFGHIJKLMN"
_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is"),
    *("The correct option is", "Best answer:", "Best option:"),
)
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def by_rank(reply: str, question: Question) -> float:
    """The surest form of an answer decides, among the question's own letters (VideoEval-Pro)."""
    return 100.0 * (_ranked(reply, question.letters) == question.answer)


def by_rank_of_four(reply: str, question: Question) -> float:
    """As `by_rank`, but A to D are looked for, whatever the options (Video-MME, MLVU, LVBench)."""
    return 100.0 * (_ranked(reply, _FOUR) == question.answer)


def by_rank_of_fourteen(reply: str, question: Question) -> float:
    """As `by_rank`, but A to N are looked for, whatever the options (CG-Bench)."""
    return 100.0 * (_ranked(reply, _FOURTEEN) == question.answer)


def by_first_capital(reply: str, question: Question) -> float:
    """The first capital from A to E; without any, the chance that the random draw of LongVideoBench has."""
    letter = _first_capital(reply)
    return 100.0 / len(question.letters) if letter is None else 100.0 * (letter == question.answer)


def by_first_word(reply: str, question: Question) -> float | None:
    """The letter of an option's line, or else the first that is a word (MVBench); it leaves empty replies out."""
    return 100.0 * (_mvbench(reply) == question.answer) if reply else None


def _ranked(reply: str, letters: str) -> str:
    """`extract_mcq_answer`: the surest form of an answer, of that the last place, of equals the first letter."""
    if not reply.strip():
        return ""
    text = reply.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text, stripped = f" {text} ", text.strip()
    found: list[tuple[int, int, int]] = []  # how sure, where, and minus which letter
    for number, letter in enumerate(letters):
        for rank, form in (
            (6, f"({letter})"),
            (5, f"{letter}."),
            (4, f"{letter}:"),
            (3, f"{letter})"),
            (2, f"{letter} "),
        ):
            if form in text:
                found.append((rank, text.rfind(form), -number))
        for phrase in _PHRASES:
            start = text.lower().find(phrase)
            place = text.find(letter, start + len(phrase)) if start >= 0 else -1
            if place >= 0:
                found.append((7, place, -number))
        if stripped.startswith(letter) and not stripped[1:2].isalpha():
            found.append((10, 0, -number))
        if stripped.endswith(letter) and not stripped[-2:-1].isalpha():
            found.append((9, len(text) - 1, -number))
    if not found:
        found = [(0, text.rfind(letter), -number) for number, letter in enumerate(letters) if letter in text]
    return letters[-max(found)[2]] if found else ""


def _first_capital(reply: str) -> str | None:
    """`parse_multi_choice_response`: the first capital from A to E; None where it would draw one at random."""
    text = reply.strip()
    for prefix in _PREFIXES:
        text = text.replace(prefix, "")
    match = re.search("[ABCDE]", text)
    return match[0] if match else None


def _mvbench(reply: str) -> str:
    """`mcq_acc`: the letter that starts an option's line ("A. red"), or else the first letter that is a word."""
    if match := re.match(r"([A-E])\.\s*\S.*$", reply.strip(), re.IGNORECASE):
        return match[1].upper()
    text = reply.replace("\n", " ").replace("\t", " ").strip()
    has_number = re.search(r"(\d)(\,)(\d)", text) is not None
    plain = text
    for mark in _PUNCTUATION:
        is_beside_blank = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if is_beside_blank or has_number else " ")
    # The flag was passed as the most replacements to make: re.UNICODE is 32.
    plain = re.sub(r"(?!<=\d)(\.)(?!\d)", "", plain, count=32)
    plain = plain.strip("'").strip('"').strip(")").strip("(").strip().lower()
    match = re.search(r"\b([A-E])\b", plain, re.IGNORECASE)
    return match[1].upper() if match else plain
