"""Reasoning in what a model writes, told from its answer by the tags around it.

Templates open reasoning in the prompt or leave that to the model, and close it where it is to be empty; replies end
inside it when they reach their bound. Pure Python: builders, responders, training and evaluation share it.
"""

from __future__ import annotations

import re
from typing import Literal

#: What opens and closes a model's reasoning, as Qwen, GLM, DeepSeek and InternVL write it, Seed, Magistral, Kimi,
#: Cohere, Gemma and gpt-oss.
OPENING = (
    r"<(?:think|thinking|thought|analysis|reasoning|seed:think)>|\[THINK\]|◁think▷|<\|START_THINKING\|>"
    r"|<\|channel>thought|<\|channel\|>(?:analysis|commentary)[^<]{0,20}<\|message\|>"
)
CLOSING = (
    r"</(?:think|thinking|thought|analysis|reasoning|seed:think)>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>"
    r"|<channel\|>|<\|channel\|>final[^<]{0,20}(?:<\|constrain\|>\w*)?<\|message\|>"
)
TAG = re.compile(f"(?P<close>{CLOSING})|{OPENING}", re.IGNORECASE)

AnswerReasoning = Literal["keep", "drop"]
"""What training does with reasoning in the rows' answers."""


class CutOff(str):
    """An answer that reached its bound on tokens before its end, or a reply that ends inside its reasoning."""

    __slots__ = ()


def without_reasoning(reply: str) -> str:
    """The answer in a reply: what is outside of its reasoning; an empty `CutOff` where the reply ends inside it.

    A template may have opened the reasoning in the prompt: all before a closing tag that nothing opened is reasoning. A
    `CutOff` stays one.
    """
    parts: list[str] = []
    end, is_inside = 0, False
    for tag in TAG.finditer(reply):
        if tag["close"]:
            if not is_inside:
                parts.clear()
            end, is_inside = tag.end(), False
        elif not is_inside:
            parts.append(reply[end : tag.start()])
            is_inside = True
    if is_inside:
        return CutOff("")
    answer = "".join([*parts, reply[end:]]).strip()
    return CutOff(answer) if isinstance(reply, CutOff) else answer


def opened_reasoning(prompt: str) -> str:
    """The tag that opens reasoning in a text and is not closed there; "" where there is none."""
    tags = list(TAG.finditer(prompt))
    return tags[-1][0] if tags and not tags[-1]["close"] else ""


def parts_of(reply: str) -> list[str]:
    """What stands before, between and after the tags around reasoning, but for nothing and blanks."""
    return [part for text in TAG.sub("\0", reply).split("\0") if (part := text.strip())]
