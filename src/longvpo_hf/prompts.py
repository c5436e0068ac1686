"""Every prompt text that a builder sends to a model. A change of wording is a new version, which stands in the rows."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Version of the texts of each recipe.
STAGE1_VERSION = "stage1-1"

#: Version of the texts of recursive captioning.
CAPTIONS_VERSION = "captions-1"

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


def caption_scene(history: Sequence[str], max_words: int) -> str:
    """Asks for the caption of the scene that is shown (LongVPO, Stage 2: from its frames and the captions before it).

    Args:
        history: What came before, in order, a line each; empty for the first scene.
        max_words: How long the caption may be.
    """
    told = "What came before it:\n" + "\n".join(history) + "\n\n" if history else ""
    return (
        f"You see one scene of a longer video. {told}"
        f"Describe this scene in at most {max_words} words: who and what is seen, what they do and what changes. Name "
        "people, things and places that were there before as they were named before, and tell nothing again that only "
        "happened before. Answer with the description only."
    )


def summarise_captions(descriptions: Sequence[str], max_words: int) -> str:
    """Asks for a summary of what happens in neighbouring scenes, so that a later one can be described with it.

    Args:
        descriptions: Their captions or summaries, in order, a line each.
        max_words: How long the summary may be.
    """
    lines = "\n".join(descriptions)
    return (
        f"These are descriptions of neighbouring scenes of one video, in order:\n{lines}\n\n"
        f"Sum them up in at most {max_words} words, in order of time: who and what appears, what they do and what "
        "changes. Keep the names of people, things and places. Answer with the summary only."
    )


def yes_or_no(verdict: str) -> bool | None:
    """What a judge said: True for yes, False for no, None where it is neither or both."""
    words = re.findall(r"[a-z]+", verdict.casefold())[:1]
    return {"yes": True, "no": False}.get(words[0]) if words else None
