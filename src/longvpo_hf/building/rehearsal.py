"""A model that is none: answers every prompt of the builders by a rule, so that a run can be rehearsed.

Takes what any responder takes; gives captions, questions, answers and verdicts of the right form and no sense. No video
is opened and nothing is learned from them; what a rehearsal shows is whether corpus, settings, disk and publishing are
in order.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import PurePath

from longvpo_hf.building import prompts
from longvpo_hf.responders import Request, ScriptedResponder
from longvpo_hf.timeline import Clip

_SCENE = re.compile(r"^Scene #(\d+): (.*)$", re.MULTILINE)
_FOCUS = re.compile(r"must be Scene #(\d+)\.")


def rehearsal() -> ScriptedResponder:
    """The responder of `--responder scripted`."""
    return ScriptedResponder("scripted", _answer)


def _answer(request: Request) -> str:
    if request.timeline is None:
        return _read(request)
    seen = request.view.of(request.timeline).clips
    few = f" in {request.view.num_frames} pictures" if request.view.num_frames else ""
    shown = "It shows " + " and ".join(_name(clip) for clip in seen) + few + "."
    if request.text == prompts.question_from_clip(seen[0].caption):
        return f"What can be seen where {_name(seen[0])} is shown?"
    if request.text.endswith(prompts.YES_OR_NO):
        return "Yes" if "several distinct things" in request.text else "No"
    return shown


def _read(request: Request) -> str:
    """Answers from text alone: a question over scenes, about captions, a verdict of three, of two, or a summary."""
    scenes = dict(_SCENE.findall(request.text))
    if request.schema == prompts.QUESTION_SCHEMA:
        focus = _FOCUS.findall(request.text)
        others = sorted((number for number in scenes if number not in focus), key=lambda n: _hash(request.text + n))
        cited = [*focus, *others][:2]
        return json.dumps(
            {
                "question": "What do " + " and ".join(_things(scenes[number]) for number in cited) + " have in common?",
                "answer": "They are things.",
                "reasoning": " and ".join(f"Scene #{number}" for number in cited) + " show them.",
            }
        )
    if request.schema == prompts.TEMPORAL_QUESTION_SCHEMA:
        kind = next(kind for kind, asked in prompts.QUESTION_TYPES.items() if f"that asks {asked}, so" in request.text)
        return json.dumps({"question": f"What is the {kind} of {_things(request.text)}?"})
    if request.schema == prompts.POST_FILTER_SCHEMA:
        return json.dumps({"better": "Yes", "ambiguous": "No", "correct": "Yes"})
    if request.text.endswith(prompts.YES_OR_NO):
        # The chosen answer is supported, the rejected one is not: the latter lacks a thing of the captions, or all.
        answer = request.text.rpartition("\nAnswer: ")[2]
        captions = request.text.partition("\nQuestion")[0]
        return "Yes" if set(_THING.findall(captions)) <= set(_THING.findall(answer)) else "No"
    return "They show " + _things(request.text) + "."


_THING = re.compile(r"thing-[0-9a-f]{8}")


def _things(text: str) -> str:
    return " and ".join(dict.fromkeys(_THING.findall(text))) or "nothing"


def _name(clip: Clip) -> str:
    span = f"{PurePath(clip.path).name} {clip.start_seconds} {clip.end_seconds}"
    return "thing-" + _hash(span)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
