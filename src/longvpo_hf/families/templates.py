"""What a chat template does about reasoning: its switch, and whether it opens the reasoning of every answer itself.

A template is asked by rendering with it, never by its name: those of one family differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from longvpo_hf.errors import ModelError
from longvpo_hf.reasoning import CLOSING, OPENING, TAG, opened_reasoning

#: Variables that templates read as the switch: of Qwen, GLM, Gemma and most others; of DeepSeek, Granite and Kimi.
_SWITCHES = ("enable_thinking", "thinking")
_QUESTION = "What is shown?"
_EMPTY = re.compile(rf"\s*(?:{OPENING})\s*(?:{CLOSING})\s*", re.IGNORECASE)
_REASONING_AT_END = re.compile(rf"(?:{OPENING})\s*(?:(?:{CLOSING})\s*)?$", re.IGNORECASE)


def thinking_switch(templated: Any, thinking: bool | None) -> dict[str, bool]:
    """The template's variable that turns reasoning on or off, with its value; {} for `None`.

    Args:
        templated: A processor or tokenizer with a chat template.
        thinking: On, off, or as the template does by itself.

    Raises:
        ModelError: If the template has no such switch.
    """
    if thinking is None:
        return {}
    for name in _SWITCHES:
        if name in str(templated.chat_template):
            on, off = (_rendered(templated, {name: value}, generation=True) for value in (True, False))
            if on != off:
                return {name: thinking}
    raise ModelError(
        f"thinking={thinking}, but the chat template of {_named(templated)} has no switch for it: it reads none of "
        f"{', '.join(_SWITCHES)} in a prompt. Leave the setting out, or choose a model whose template has one."
    )


def opened_by_template(templated: Any, switch: Mapping[str, bool]) -> str:
    """The tag with which the template opens the reasoning of every answer; "" where it opens none."""
    return opened_reasoning(_generation_prompt(templated, switch))


def may_reason(templated: Any, switch: Mapping[str, bool]) -> bool:
    """Whether answers may hold reasoning: the template knows of its tags, and the prompt does not turn it off."""
    if False in switch.values():
        return False
    prompt = _generation_prompt(templated, switch)
    is_closed = bool(TAG.search(prompt)) and not opened_reasoning(prompt)
    return bool(TAG.search(str(templated.chat_template))) and not is_closed


def prompt_before(asked: str, wholes: Sequence[str]) -> list[str]:
    """Where a prompt may end that answers follow, the best first; nowhere if the template then writes it otherwise.

    Templates that open the reasoning in the prompt close it where an answer has none, or write none at all. Empty
    reasoning before all answers is the prompt's, as it is where thinking is turned off.

    Args:
        asked: The prompt as it is before a model answers.
        wholes: The conversation with each answer.
    """
    base = _REASONING_AT_END.sub("", asked)
    if not all(whole.startswith(base) for whole in wholes):
        return []
    ends = [base]
    if asked != base and all(whole.startswith(asked) for whole in wholes):
        ends = [asked, asked.rstrip(), base]
    empty = {match[0] if (match := _EMPTY.match(whole, len(base))) else "" for whole in wholes}
    if len(empty) == 1 and "" not in empty:
        block = empty.pop()
        ends = [base + block, base + block.rstrip(), *ends]  # line breaks may merge with those of an answer
    return ends


def _generation_prompt(templated: Any, switch: Mapping[str, bool]) -> str:
    """What the template writes after a question, before the answer."""
    question, whole = (_rendered(templated, switch, generation) for generation in (False, True))
    return whole.removeprefix(question) if whole.startswith(question) else whole.rpartition(_QUESTION)[2]


def _rendered(templated: Any, switch: Mapping[str, bool], generation: bool) -> str:
    # Templates of language models take texts, those of others take parts.
    content = [{"type": "text", "text": _QUESTION}] if hasattr(templated, "tokenizer") else _QUESTION
    turns = [{"role": "user", "content": content}]
    text: str = templated.apply_chat_template(turns, add_generation_prompt=generation, tokenize=False, **switch)
    return text


def _named(templated: Any) -> str:
    return getattr(getattr(templated, "tokenizer", templated), "name_or_path", "") or type(templated).__name__
