"""The miniature for the recipes: its base model and its rows, made where they are not yet there.

Takes the folder of a miniature's run; gives in it `base/`, and rows for each recipe: `dataset/` (Stage 1),
`stage2-dataset/` and `temporal/`. Everything in it is the demo's own, but for the temporal rows, whose questions a
template writes from the base's captions.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from parts import RecipeArguments
from transformers import AutoModelForImageTextToText, AutoProcessor

from longvpo_hf import LongVPOConfig, Timeline
from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.errors import ConfigError
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.miniature.demo import LONGVPO, Demo, DemoSettings, one_thread
from longvpo_hf.miniature.model import MAX_ANSWER_TOKENS
from longvpo_hf.miniature.world import CAPTION_QUESTION, question, read_world
from longvpo_hf.responders import LocalResponder, Request, ScriptedResponder

#: Rows per timeline, as in the demo's Stage 1.
_QUESTIONS_PER_TIMELINE = 4


def make_miniature(
    recipe: RecipeArguments, training: LongVPOConfig, rows: Literal["stage1", "stage2", "temporal"]
) -> None:
    """Makes base and rows in the folder that `miniature` names, if it names one.

    Raises:
        ValueError: If Stage-2 rows are to be made, which the Stage-1 model answers, and it is not in `model/`.
    """
    if recipe.miniature is None:
        return
    folder = Path(recipe.miniature)
    settings = DemoSettings.fast(training.seed) if recipe.miniature_fast else DemoSettings(training.seed)
    with PartialState().main_process_first(), one_thread():
        demo = Demo(folder, settings)
        demo.worlds()
        demo.base()
        if rows == "temporal":
            demo.phase("temporal rows", lambda: temporal_rows(demo, demo.output / "temporal", "mixed"))
            return
        demo.rows()
        if rows == "stage2":
            if not (folder / LONGVPO.name / "config.json").is_file():
                raise ConfigError(
                    f"{folder / LONGVPO.name} holds no Stage-1 model to answer: run recipes/stage1.py first."
                )
            demo.stage2_captions()
            demo.stage2_rows()


def base_responder(demo: Demo) -> LocalResponder:
    """The base, which answers."""
    base = demo.output / "base"
    model, processor = AutoModelForImageTextToText.from_pretrained(base).eval(), AutoProcessor.from_pretrained(base)
    return LocalResponder(model, processor, demo.sampler, MAX_ANSWER_TOKENS, batch_size=64, name="miniature-base")


def temporal_rows(demo: Demo, output: Path, mode: Literal["localized", "comprehensive", "mixed"]) -> Any:
    """Temporal preferences about timelines like those of Stage 1, captioned by the base; gives the builder's funnel."""
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
    """Writes a question from captions, as a language model would: about one of the clips they tell of."""
    markers = re.findall(r"([a-z]+-[a-z]+) , ", request.text)
    if not markers:
        return json.dumps({"question": None})
    drawn = int(hashlib.sha256(request.text.encode()).hexdigest(), 16) % len(markers)
    return json.dumps({"question": question(markers[drawn])})
