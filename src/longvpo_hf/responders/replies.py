"""Reading what a model wrote: a JSON object, a yes or a no, after the reasoning that may stand before it.

Models wrap answers in more than was asked for, and break them off anywhere. Nothing here raises, and no reply makes the
reading slow.
"""

from __future__ import annotations

import json
import re
from typing import Any

from longvpo_hf.reasoning import without_reasoning

#: Beyond it a reply is no object that was asked for; the reading of one that opens brackets without end stays short.
_MOST_JSON_CHARACTERS = 100_000
#: Answers break lines within strings; what else JSON forbids there does no harm.
_JSON = json.JSONDecoder(strict=False)
#: How an object may start.
_OBJECT = re.compile(r'\{\s*["}]')


def json_object(reply: str) -> dict[str, Any] | None:
    """The JSON object in a reply, without the reasoning, code fences and words around it; None where there is none.

    Of several the last counts: models draft first.
    """
    text = without_reasoning(reply)[-_MOST_JSON_CHARACTERS:]
    found: dict[str, Any] | None = None
    end = 0
    for opening in _OBJECT.finditer(text):
        if opening.start() < end:  # inside the one before
            continue
        try:
            value, end = _JSON.raw_decode(text, opening.start())
        except RecursionError:  # no model answers in a thousand brackets within brackets
            break
        except ValueError:
            continue
        found = {k: whole_characters(v) if isinstance(v, str) else v for k, v in value.items()} or found
    return found


def yes_or_no(verdict: str) -> bool | None:
    """A judge's verdict: True for yes, False for no, None where its first word is neither."""
    word = re.search(r"[a-z]+", without_reasoning(verdict).casefold())
    return {"yes": True, "no": False}.get(word[0]) if word else None


def probability_text(yes: float, no: float) -> str:
    """The share of yes as an answer, e.g. `0.8312`; "" where the model gives neither any probability.

    Args:
        yes: Probability of the tokens that begin a yes.
        no: Of those that begin a no.
    """
    return f"{yes / (yes + no):.4f}" if yes + no > 0 else ""


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a character, which no file can hold: models leave some in escapes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
