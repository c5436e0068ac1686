"""Every prompt text that a builder sends to a model. A change of wording is a new version, which stands in the rows."""

from __future__ import annotations

import re

VERSION = "stage1-1"

#: How every prompt to a judge ends.
YES_OR_NO = "Answer Yes or No."


def question_from_clip(caption: str) -> str:
    """Asks for a question that only this clip answers (LongVPO: from the anchor and its caption, if there is one)."""
    hint = f"The clip's caption: {caption}\n" if caption else ""
    return (
        "You see one short clip of a longer video. "
        f"{hint}"
        "Write one question about it that can be answered from this clip alone and from no other clip: name several "
        "distinct things that are seen in it, so that whoever watches the long video can find it, and ask for one "
        "detail. Do not say where in the video the clip is. Answer with the question only."
    )


def is_specific(question: str, caption: str) -> str:
    """Asks whether a question is specific to the clip that is shown.

    LongVPO: it must depend on several distinct visual elements of the anchor and not be answerable from other clips.
    """
    hint = f"The clip's caption: {caption}\n" if caption else ""
    return (
        f"You see one clip of a longer video.\n{hint}Question about it: {question}\n"
        "Does answering it depend on several distinct things seen in this clip, so that it could not be answered from "
        f"other clips? {YES_OR_NO}"
    )


def is_also_right(question: str, chosen: str, rejected: str) -> str:
    """Asks whether the rejected answer is right too, of the clip that holds the answer."""
    return (
        f"You see the clip a question is about.\nQuestion: {question}\nAnswer 1: {chosen}\nAnswer 2: {rejected}\n"
        f"Is answer 2 also right? {YES_OR_NO}"
    )


def yes_or_no(verdict: str) -> bool | None:
    """What a judge said: True for yes, False for no, None where it is neither or both."""
    words = re.findall(r"[a-z]+", verdict.casefold())[:1]
    return {"yes": True, "no": False}.get(words[0]) if words else None
