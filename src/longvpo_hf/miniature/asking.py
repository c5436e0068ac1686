"""Who asks in the miniature, without the world's truth: templates over what the model itself sees in a clip.

The model is asked to describe a clip in the language it was trained in (see `miniature.language`). Of that comes, for
Stage 1, a question and an embedding (same marker, same vector); for Stage 2, captions, and rules that play the language
model which reads these in the builder's prompts, asks about two scenes and judges answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from longvpo_hf.miniature.language import Language
from longvpo_hf.miniature.world import MARKERS
from longvpo_hf.responders import OnResult, OnWait, Request, Responder, one_by_one
from longvpo_hf.timeline import Clip, Timeline

_MARKER_INDEX = {marker: index for index, marker in enumerate(MARKERS)}
#: What the rules read in the texts of `methods.stage2.question_prompt` and `support_prompt`.
_SCENE = re.compile(r"^Scene #(\d+): (.*)$", re.MULTILINE)
_FOCUS = re.compile(r"must be Scene #(\d+)\.")
_JUDGED = re.compile(r"^Question about it: (?P<question>.*)\nAnswer: (?P<answer>.*)$", re.MULTILINE)


class Describer:
    """Describes each clip once through a responder.

    Args:
        responder: Answers about one clip.
        language: The language it speaks.
    """

    def __init__(self, responder: Responder, language: Language) -> None:
        self._responder = responder
        self._language = language
        self._markers: dict[Clip, str] = {}

    @property
    def name(self) -> str:
        """See `Responder.name`."""
        return f"{self._responder.name} + template"

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """A question about each request's one clip, or nothing where the model names no marker. See `Responder`."""
        clips = [request.timeline.clips[0] if request.timeline else None for request in requests]
        self._describe([clip for clip in clips if clip])
        markers = iter([self._markers[clip] if clip else "" for clip in clips])
        return one_by_one(
            requests, lambda _: self._language.question(marker) if (marker := next(markers)) else "", on_result
        )

    def embed(self, clips: Sequence[Clip]) -> NDArray[np.float64]:
        """One-hot of the marker the model names, `[num_clips, number of markers + 1]`; the last is "names none"."""
        self._describe(clips)
        vectors = np.zeros((len(clips), len(MARKERS) + 1))
        for row, clip in enumerate(clips):
            vectors[row, _MARKER_INDEX.get(self._markers[clip], len(MARKERS))] = 1.0
        return vectors

    def _describe(self, clips: Sequence[Clip]) -> None:
        new = [clip for clip in dict.fromkeys(clips) if clip not in self._markers]
        asked = self._language.caption_question
        captions = self._responder.respond([Request(asked, Timeline((clip,))) for clip in new])
        for clip, caption in zip(new, captions, strict=True):
            self._markers[clip] = self._language.described_marker(caption)


class Captioner:
    """Captions a scene in its pretraining's words, whatever the prompt says.

    Args:
        responder: Answers about one scene.
        language: The language it speaks.
    """

    def __init__(self, responder: Responder, language: Language) -> None:
        self._responder = responder
        self._language = language

    @property
    def name(self) -> str:
        """See `Responder.name`."""
        return self._responder.name

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """See `Responder.respond`."""
        asked = [replace(request, text=self._language.caption_question) for request in requests]
        return self._responder.respond(asked, on_result, on_wait)


def write_question(request: Request, language: Language) -> str:
    """Stands for the LLM that writes Stage-2 questions: sees the captions in the builder's prompt and nothing else.

    Asks about two scenes whose markers no other caption has and whose colours differ; `{}` where there are none.
    """
    text = request.text
    captions = {int(number): language.read_caption(caption) for number, caption in _SCENE.findall(text)}
    markers = [words[0] for words in captions.values() if words]
    scenes = {number: words for number, words in captions.items() if words and markers.count(words[0]) == 1}
    focus = _FOCUS.search(text)
    candidates = [
        (first, second)
        for first in scenes
        for second in scenes
        if scenes[first][1] != scenes[second][1] and (focus is None or int(focus[1]) in (first, second))
    ]
    if not candidates:
        return "{}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
    first, second = candidates[rng.integers(len(candidates))]
    asked = language.pair_question(scenes[first][0], scenes[second][0])
    reasoning = " ".join(
        f"Scene #{number} is {scenes[number][0]} with {scenes[number][1]}." for number in (first, second)
    )
    return json.dumps(
        {
            "question": asked,
            "answer": language.answer_to(asked, [scenes[first], scenes[second]]),
            "reasoning": reasoning,
        }
    )


def judge(request: Request, language: Language) -> str:
    """Stands for the LLM that says whether captions support an answer: sees the builder's prompt and nothing else."""
    captions = [words for _, caption in _SCENE.findall(request.text) if (words := language.read_caption(caption))]
    match = _JUDGED.search(request.text)
    return "Yes" if match and match["answer"] == language.answer_to(match["question"], captions) else "No"
