"""Everything that the miniature makes by itself: worlds, the base, rows whose writer is a template, and measurements.

Training is not among it: the recipes do that. What is made lies in one folder, in parts that are made once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from longvpo_hf.artifacts import whole_folder, write_json
from longvpo_hf.building.captioning import caption_videos
from longvpo_hf.captions import read_captions_as_written
from longvpo_hf.frames import FrameSampler
from longvpo_hf.funnel import log_folder
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.miniature import pretrained
from longvpo_hf.miniature.asking import Captioner, Describer, judge, write_question
from longvpo_hf.miniature.evaluation import Score, make_pair_questions, make_questions, score
from longvpo_hf.miniature.language import SENTENCES, WORDS, Language
from longvpo_hf.miniature.language_models import find_language_model
from longvpo_hf.miniature.model import build_model, build_processor
from longvpo_hf.miniature.pretraining import pretrain
from longvpo_hf.miniature.settings import MiniatureSettings
from longvpo_hf.miniature.truth import row_truth
from longvpo_hf.miniature.world import (
    CLIP_SECONDS,
    TRUTH_FILE,
    WorldClip,
    read_world,
    write_world,
)
from longvpo_hf.precision import is_computed
from longvpo_hf.preference import VideoPreference, undecoded
from longvpo_hf.responders import LocalResponder, ScriptedResponder
from longvpo_hf.timeline import Timeline


class Workshop:
    """Makes the parts of a miniature.

    Args:
        folder: Where they are.
        settings: See `MiniatureSettings`.
    """

    def __init__(self, folder: Path, settings: MiniatureSettings) -> None:
        self.folder = folder
        self.settings = settings
        self.language: Language = SENTENCES if settings.language_model else WORDS
        self.sampler = FrameSampler(settings.num_frames, fps=settings.frames_per_clip / CLIP_SECONDS)
        # Only the large setting has work for a GPU; the others give the same numbers wherever they run.
        self.on_gpu = settings.scale == "large" and torch.cuda.is_available()

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, JSON, made now or in an earlier run: for programs that make many parts in one process.

        A study has steps instead, see `longvpo_hf.studies`.
        """
        path = self.folder / "once" / f"{name}.json"
        if not path.exists():
            tqdm.write(f"— {name}")
            start = time.perf_counter()
            result = work()
            write_json(path, {"seconds": round(time.perf_counter() - start, 1), "result": result})
        return json.loads(path.read_text(encoding="utf-8"))["result"]

    def is_done(self, name: str) -> bool:
        """Whether `once` has the result of that name."""
        return (self.folder / "once" / f"{name}.json").exists()

    def seconds(self) -> dict[str, float]:
        """Seconds of everything that `once` made, in order of finishing; of a resumed part, of its last run."""
        paths = sorted((self.folder / "once").glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in paths}

    def worlds(self) -> None:
        """Writes the worlds of pretraining, both stages and evaluation into `world/`; those that are there stay."""
        sizes = {
            "pretraining": self.settings.pretraining_clips,
            "stage1": self.settings.stage1_clips,
            "stage2": self.settings.stage2_clips,
            "evaluation": self.settings.evaluation_clips,
        }
        for number, (name, num_clips) in enumerate(tqdm(sizes.items(), desc="mp4 files", unit="world")):
            if not (self.folder / "world" / name / TRUTH_FILE).exists():
                seed = 4 * self.settings.seed + number
                write_world(self.folder / "world" / name, num_clips, seed, self.language.name)

    def world(self, name: str) -> list[WorldClip]:
        """The clips of one of the worlds."""
        return read_world(self.folder / "world" / name)

    def base(self) -> dict[str, Any]:
        """Makes the base, which has seen one and two clips, in `base/`; returns its size and steps.

        It is trained from nothing, or made of a pretrained language model; then also where that came from, and how
        many of the words of held-out frames the projector says.
        """
        settings = self.settings
        # First: a model that is not in reach is known before the work.
        found = find_language_model(settings.language_model) if settings.language_model else None
        clips = self.world("pretraining")
        frames = torch.stack(
            [
                self.sampler(Timeline((item.clip,))).pixels
                for item in tqdm(clips, desc="decoding", unit="clip", leave=False)
            ]
        )
        processor = build_processor()
        model = build_model(processor, settings.seed)
        # Of a model that only lends its vision tower, naming is all that is needed.
        schedule = settings.pretraining if found is None else settings.pretraining.naming_only()
        history = pretrain(model, processor, frames, clips, settings.seed, schedule)
        steps = {"naming_steps": len(history.naming_losses), "recall_steps": len(history.recall_losses)}
        more: dict[str, Any] = {}
        if found is not None:
            processor = pretrained.build_processor(found.tokenizer)
            model = pretrained.build_model(processor, found.model, model, settings.seed)
            aligned = pretrained.align(model, processor, frames, clips, settings.seed, settings.alignment)
            steps["alignment_steps"] = len(aligned.losses)
            more = {"language_model": found.source, "words_right": [round(share, 4) for share in aligned.words_right]}
        with whole_folder(self.folder / "base") as part:
            model.save_pretrained(part)
            processor.save_pretrained(part)
        return {"parameters": model.num_parameters(), **steps, **more}

    def stage1_rows(self, rows: str, model: str = "base") -> dict[str, dict[str, int]]:
        """Makes Stage-1 rows in folder `rows`, asked about and answered by the one in `model`; returns the funnel."""
        responder = self.responder(model)
        describer = Describer(responder, self.language)
        clips = [item.clip for item in self.world("stage1")]
        settings = Stage1Settings(
            num_rows=self.settings.num_rows,
            max_clips=self.settings.max_clips,
            questions_per_timeline=4,
            seed=self.settings.seed,
        )
        return build_stage1(clips, describer, responder, self.folder / rows, settings, describer.embed)

    def captions(self, scenes: str, captioner: str = "base") -> dict[str, int]:
        """Captions the scenes of the long videos with the model in folder `captioner`, into folder `scenes`."""
        videos = _videos(self.world("stage2"), *self.settings.stage2_scenes, self.settings.seed)
        captioned = caption_videos(
            videos,
            Captioner(self.responder(captioner), self.language),
            ScriptedResponder("rule", lambda request: ""),  # Histories this short are never summed up.
            self.folder / scenes,
        )
        truth = {
            scene.clip.source_id: self.language.caption(scene.marker, scene.colour) for scene in self.world("stage2")
        }
        clips = [clip for video in captioned for clip in video.timeline.clips]
        right = sum(clip.caption == truth[clip.source_id] for clip in clips)
        return {"videos": len(captioned), "scenes": len(clips), "captions_right": right}

    def stage2_rows(self, rows: str, scenes: str, answerer: str) -> dict[str, Any]:
        """Makes Stage-2 rows in folder `rows` about captioned scenes, answered by the model in folder `answerer`.

        Returns:
            The funnel, and how right the rows are, see `row_truth`.
        """
        captions = read_captions_as_written(self.folder / scenes)
        funnel = build_stage2(
            captions,
            ScriptedResponder("rule over captions", lambda request: write_question(request, self.language)),
            self.responder(answerer),
            self.folder / rows,
            Stage2Settings(num_rows=self.settings.stage2_rows, seed=self.settings.seed),
            judge=ScriptedResponder("rule over captions", lambda request: judge(request, self.language))
            if self.settings.stage2_judge
            else None,
        )
        made = [VideoPreference.from_row(row) for row in self.rows(rows)]
        drops = log_folder(self.folder / rows) / "dropped.jsonl"
        return {"funnel": funnel, "truth": row_truth(self.world("stage2"), captions, made, drops, self.language)}

    def evaluate(self, model: str) -> dict[str, Any]:
        """Accuracy of the model in a folder about one clip, by number of clips and its position, and about two."""
        responder = self.responder(model)
        clips = self.world("evaluation")
        measured: dict[str, Any] = {"accuracy": {}, "interval": {}, "positions": {}}
        pairs: dict[str, Any] = {"accuracy": {}, "interval": {}}
        for length in tqdm(self.settings.lengths, desc=f"evaluating {model}", unit="length"):
            questions = make_questions(
                clips, length, self.settings.questions_per_length, self.settings.seed, self.language
            )
            result = score(responder, questions)
            _record(measured, str(length), result.overall)
            measured["positions"][str(length)] = {
                position: {"accuracy": round(part.percent, 2), "questions": part.number}
                for position, part in result.by_position.items()
            }
        for length in tqdm(self.settings.pair_lengths, desc=f"evaluating {model}: pairs", unit="length"):
            number = self.settings.pair_questions_per_length
            questions = make_pair_questions(clips, length, number, self.settings.seed, self.language)
            _record(pairs, str(length), score(responder, questions).overall)
        return {**measured, "pairs": pairs}

    def rows(self, folder: str) -> Dataset:
        """The rows in a folder, undecoded."""
        return undecoded(load_dataset(str(self.folder / folder), split="train", cache_dir=str(self.folder / "cache")))

    def responder(self, folder: str) -> LocalResponder:
        """The model in a folder as a responder."""
        path = self.folder / folder
        # The larger model in half the time, where that is computed.
        is_half = self.language is not WORDS and (self.on_gpu or is_computed(torch.bfloat16))
        dtype = torch.bfloat16 if is_half else torch.float32
        return LocalResponder(
            AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval().to("cuda" if self.on_gpu else "cpu"),
            AutoProcessor.from_pretrained(path),
            self.sampler,
            max_new_tokens=self.language.max_answer_tokens,
            batch_size=64 if self.language is WORDS else 16,  # of the larger model's memory
            name=f"miniature-{path.name}",
        )


def _videos(scenes: Sequence[WorldClip], shortest: int, longest: int, seed: int) -> list[Timeline]:
    """Long videos: runs of consecutive scenes of the world's files, of `shortest` to `longest` scenes each."""
    rng = np.random.default_rng(seed)
    videos = []
    for _, in_file in groupby(scenes, key=lambda scene: scene.clip.path):
        clips = [scene.clip for scene in in_file]
        while len(clips) >= shortest:
            length = int(rng.integers(shortest, longest + 1))
            videos.append(Timeline(tuple(clips[:length])))
            clips = clips[length:]
    return videos


def _record(measured: dict[str, Any], length: str, result: Score) -> None:
    measured["accuracy"][length] = round(result.percent, 2)
    measured["interval"][length] = [round(bound, 2) for bound in result.interval_percent]
