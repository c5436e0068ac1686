"""Temporal preferences in the miniature's world: the base captions and answers, a template writes the questions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.miniature.language import Language
from longvpo_hf.miniature.workshop import Workshop
from longvpo_hf.responders import Request, ScriptedResponder
from longvpo_hf.timeline import Timeline

#: Rows per timeline, as in the miniature's Stage 1.
_QUESTIONS_PER_TIMELINE = 4


def temporal_rows(workshop: Workshop, output: Path, mode: Literal["localized", "comprehensive", "mixed"]) -> Any:
    """Temporal preferences about timelines like those of Stage 1, captioned by the base; returns the funnel."""
    responder, language = workshop.responder("base"), workshop.language
    clips = [item.clip for item in workshop.world("stage1")]
    captions = responder.respond([Request(language.caption_question, Timeline((clip,))) for clip in clips])
    captioned = [replace(clip, caption=caption) for clip, caption in zip(clips, captions, strict=True)]
    rng = np.random.default_rng(workshop.settings.seed)
    videos = []
    for _ in range(-(-workshop.settings.num_rows // _QUESTIONS_PER_TIMELINE)):
        length = int(rng.integers(2, workshop.settings.max_clips + 1))
        order = [captioned[i] for i in rng.permutation(len(captioned))]
        members = list({_key(clip.caption, language): clip for clip in order}.values())  # no marker twice
        videos.append(CaptionedVideo(Timeline(tuple(members[i] for i in rng.permutation(len(members))[:length]))))
    writer = ScriptedResponder("template", lambda request: _ask_about_a_marker(request, language))
    settings = TemporalSettings(mode=mode, num_rows=workshop.settings.num_rows, seed=workshop.settings.seed)
    return build_temporal(videos, writer, responder, output, settings)


def _key(caption: str, language: Language) -> str:
    """What two clips of the same marker share; the first word of a caption that names none."""
    return language.described_marker(caption) or caption.partition(" ")[0]


def _ask_about_a_marker(request: Request, language: Language) -> str:
    """Writes a question about one of the captioned clips, as a language model would."""
    markers = language.described_markers(request.text)
    if not markers:
        return json.dumps({"question": None})
    drawn = int(hashlib.sha256(request.text.encode()).hexdigest(), 16) % len(markers)
    return json.dumps({"question": language.question(markers[drawn])})
