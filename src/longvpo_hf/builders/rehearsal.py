"""A model that is none: answers every prompt of the Stage-1 builder by a rule, so that a run can be rehearsed.

Takes what any responder takes; gives questions, answers and verdicts of the right form and no sense. No video is opened
and nothing is learned from them; what a rehearsal shows is whether corpus, settings, disk and publishing are in order.
"""

from __future__ import annotations

import hashlib
from pathlib import PurePath

from longvpo_hf import prompts
from longvpo_hf.responders import Request, ScriptedResponder
from longvpo_hf.timeline import Clip


def rehearsal() -> ScriptedResponder:
    """The responder of `--responder scripted`."""
    return ScriptedResponder("scripted", _answer)


def _answer(request: Request) -> str:
    if request.timeline is None:
        return ""
    seen = request.view.of(request.timeline).clips
    if request.text == prompts.question_from_clip(seen[0].caption):
        return f"What can be seen where {_name(seen[0])} is shown?"
    if request.text.endswith(prompts.YES_OR_NO):
        return "Yes" if "several distinct things" in request.text else "No"
    return "It shows " + " and ".join(_name(clip) for clip in seen) + "."


def _name(clip: Clip) -> str:
    span = f"{PurePath(clip.path).name} {clip.start_seconds} {clip.end_seconds}"
    return "thing-" + hashlib.sha256(span.encode()).hexdigest()[:8]
