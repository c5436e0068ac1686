"""Every prompt text that a builder sends to a model. A change of wording is a new version, which stands in the rows."""

from __future__ import annotations

VERSION = "stage1-1"


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
