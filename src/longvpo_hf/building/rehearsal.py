"""A stand-in model: well-formed answers without meaning, so that a run can be rehearsed before a model is paid for.

No video is opened. Whoever writes a prompt also says how a rehearsal answers it (`Request.rehearsed`); what asks for
nothing but a description is answered here.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePath

from longvpo_hf.responders import Request, ScriptedResponder
from longvpo_hf.timeline import Clip

_THING = re.compile(r"thing-[0-9a-f]{8}")


def rehearsal() -> ScriptedResponder:
    """The responder of `--responder scripted`."""
    return ScriptedResponder("scripted", _answer)


def _answer(request: Request) -> str:
    if request.rehearsed is not None:
        return request.rehearsed()
    if request.timeline is None:
        return "They show " + things_in(request.text) + "."
    few = f" in {request.view.num_frames} pictures" if request.view.num_frames else ""
    return "It shows " + " and ".join(map(thing_of, request.view.of(request.timeline).clips)) + few + "."


def thing_of(clip: Clip) -> str:
    """What a rehearsal sees in a clip: `thing-` and eight digits that tell it from other clips."""
    return "thing-" + digits_of(f"{PurePath(clip.path).name} {clip.start_seconds} {clip.end_seconds}")


def things_in(text: str) -> str:
    """The things that a text names, each once: "thing-01234567 and thing-89abcdef", or "nothing"."""
    return " and ".join(dict.fromkeys(_THING.findall(text))) or "nothing"


def all_things_in(text: str, other: str) -> bool:
    """Whether a text names all the things that another does."""
    return set(_THING.findall(other)) <= set(_THING.findall(text))


def digits_of(text: str) -> str:
    """Eight hexadecimal digits that follow from a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
