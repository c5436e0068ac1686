"""Whether a question, an answer, a caption or a pair of answers can stand; if not, the name of the reason.

The reasons are those of `funnel.REASONS`.
"""

from __future__ import annotations

import re
import unicodedata

from longvpo_hf.responders.control_tokens import holds_control_token

#: Ten times what a long question or answer takes: beyond it the model ran on.
MAX_QUESTION_CHARACTERS = 1000
MAX_ANSWER_CHARACTERS = 4000

_REFUSAL = re.compile(
    r"\b(as an ai\b|as a language model|i('m| am) (sorry|unable)"
    r"|i (can(no|')t|cannot) (assist|help|answer|see|view|watch))",
    re.IGNORECASE,
)
_NAMES_POSITION = re.compile(
    r"\b((first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|\d+(st|nd|rd|th)|last|final|next|previous"
    r"|opening|closing) (clip|scene|segment|part of the video)"
    r"|(beginning|start|end|middle) of the (video|clip|timeline)"
    r"|(clip|scene|segment)s?\s*((number|no\.?)\s*)?(#\s*)?\d+"
    r"|at \d+:\d\d|\d+(\.\d+)? seconds? into)\b",
    re.IGNORECASE,
)


def normalise(text: str) -> str:
    """Text as compared: Unicode NFKC, lower case, no punctuation, articles or repeated spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"[^\w\s]|_", " ", text)
    words = [word for word in text.split() if word not in {"a", "an", "the"}]
    return " ".join(words)


def is_ellipsis(text: str) -> bool:
    """Whether a text is the "..." that stands for texts in the examples of prompts."""
    return re.fullmatch(r"\s*(\.{2,}|…)\s*", text) is not None


def check_question(question: str) -> str | None:
    """Reason to drop a question, or None."""
    if not normalise(question):
        return "empty_question"
    if len(question) > MAX_QUESTION_CHARACTERS:
        return "question_too_long"
    if _REFUSAL.search(question):
        return "refusal"
    if holds_control_token(question):
        return "control_token"
    if "?" not in question and "？" not in question:
        return "no_question"
    if _NAMES_POSITION.search(question):
        return "names_position"
    return None


def check_answer(question: str, answer: str) -> str | None:
    """Reason to drop an answer to `question`, or None."""
    if not answer.strip():
        return "empty_answer"
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "answer_too_long"
    if _REFUSAL.search(answer):
        return "refusal"
    if holds_control_token(answer):
        return "control_token"
    if normalise(answer) == normalise(question):
        return "repeats_question"
    return None


def check_caption(caption: str) -> str | None:
    """Reason to drop a scene's caption, or None."""
    if not normalise(caption):
        return "empty_caption"
    if _REFUSAL.search(caption):
        return "refusal"
    if holds_control_token(caption):
        return "control_token"
    return None


def check_pair(chosen: str, rejected: str) -> str | None:
    """Reason to drop a pair of answers, or None."""
    # Two answers of nothing but punctuation or articles are compared as they stand.
    if (normalise(chosen) or chosen.strip()) == (normalise(rejected) or rejected.strip()):
        return "answers_agree"
    return None
