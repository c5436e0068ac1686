"""Temporal preferences in the miniature's world: the base captions and answers, a template writes the questions."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor

from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.miniature.demo import Demo
from longvpo_hf.miniature.model import MAX_ANSWER_TOKENS
from longvpo_hf.miniature.world import CAPTION_QUESTION, question, read_world
from longvpo_hf.responders import LocalResponder, Request, ScriptedResponder
from longvpo_hf.timeline import Timeline

#: Rows per timeline, as in the demo's Stage 1.
_QUESTIONS_PER_TIMELINE = 4


def base_responder(demo: Demo) -> LocalResponder:
    """The base as a responder."""
    base = demo.output / "base"
    model, processor = AutoModelForImageTextToText.from_pretrained(base).eval(), AutoProcessor.from_pretrained(base)
    return LocalResponder(model, processor, demo.sampler, MAX_ANSWER_TOKENS, batch_size=64, name="miniature-base")


def temporal_rows(demo: Demo, output: Path, mode: Literal["localized", "comprehensive", "mixed"]) -> Any:
    """Temporal preferences about timelines like those of Stage 1, captioned by the base; returns the funnel."""
    responder = base_responder(demo)
    clips = [item.clip for item in read_world(demo.output / "world" / "stage1")]
    captions = responder.respond([Request(CAPTION_QUESTION, Timeline((clip,))) for clip in clips])
    captioned = [replace(clip, caption=caption) for clip, caption in zip(clips, captions, strict=True)]
    rng = np.random.default_rng(demo.settings.seed)
    videos = []
    for _ in range(-(-demo.settings.num_rows // _QUESTIONS_PER_TIMELINE)):
        length = int(rng.integers(2, demo.settings.max_clips + 1))
        order = [captioned[i] for i in rng.permutation(len(captioned))]
        members = list({clip.caption.partition(" ")[0]: clip for clip in order}.values())  # no marker twice
        videos.append(CaptionedVideo(Timeline(tuple(members[i] for i in rng.permutation(len(members))[:length]))))
    writer = ScriptedResponder("template", _ask_about_a_marker)
    settings = TemporalSettings(mode=mode, num_rows=demo.settings.num_rows, seed=demo.settings.seed)
    return build_temporal(videos, writer, responder, output, settings)


def _ask_about_a_marker(request: Request) -> str:
    """Writes a question about one of the captioned clips, as a language model would."""
    markers = re.findall(r"([a-z]+-[a-z]+) , ", request.text)
    if not markers:
        return json.dumps({"question": None})
    drawn = int(hashlib.sha256(request.text.encode()).hexdigest(), 16) % len(markers)
    return json.dumps({"question": question(markers[drawn])})
