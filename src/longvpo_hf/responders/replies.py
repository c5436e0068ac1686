"""Reading what a model wrote: its answer without the reasoning before it, a JSON object, a yes or a no.

Models wrap answers in more than was asked for, and break them off anywhere. Nothing here raises, and no reply makes the
reading slow.
"""

from __future__ import annotations

import json
import re
from typing import Any

#: A tag that opens or closes a model's reasoning, as Qwen, GLM, DeepSeek and InternVL write it, Seed, Magistral, Kimi.
_TAG = re.compile(
    r"<(?P<close>/)?(?:think|thinking|thought|analysis|reasoning|seed:think)>|\[(?P<bracket>/)?THINK\]|◁(?P<kimi>/)?think▷"
)
#: Beyond it a reply is no object that was asked for; the reading of one that opens brackets without end stays short.
_MOST_JSON_CHARACTERS = 100_000
#: Answers break lines within strings; what else JSON forbids there does no harm.
_JSON = json.JSONDecoder(strict=False)
#: How an object may start.
_OBJECT = re.compile(r'\{\s*["}]')


class CutOff(str):
    """An answer that reached its bound on tokens before its end, where the model's end is known."""

    __slots__ = ()


def without_reasoning(reply: str) -> str:
    """The answer in a reply: what is outside of its reasoning; "" where the reply ends inside it.

    A template may have opened the reasoning in the prompt: all before a closing tag that nothing opened is reasoning. A
    `CutOff` stays one.
    """
    parts: list[str] = []
    end, is_inside = 0, False
    for tag in _TAG.finditer(reply):
        if tag["close"] or tag["bracket"] or tag["kimi"]:
            if not is_inside:
                parts.clear()
            end, is_inside = tag.end(), False
        elif not is_inside:
            parts.append(reply[end : tag.start()])
            is_inside = True
    answer = "" if is_inside else "".join([*parts, reply[end:]]).strip()
    return CutOff(answer) if isinstance(reply, CutOff) else answer


def opened_reasoning(prompt: str) -> str:
    """The tag with which a template opens the model's reasoning at the end of a prompt; "" where it opens none.

    Put before the reply, it marks the reasoning as such, also where the reply ends inside it.
    """
    tags = list(_TAG.finditer(prompt))
    if not tags or tags[-1]["close"] or tags[-1]["bracket"] or tags[-1]["kimi"] or prompt[tags[-1].end() :].strip():
        return ""
    return tags[-1][0]


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
