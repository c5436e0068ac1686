"""LongVPO end to end in the miniature's world: `longvpo demo`.

The phases write the worlds (pretraining, Stage 1, Stage 2, evaluation: four disjoint draws of mp4 files), train the
short-context base from nothing and measure it; then, for Stage 1 and for Stage 2, they make rows with the builders of
this package, train on them with `LongVPOTrainer` and measure again. Each phase is done once per output folder: an
interrupted run goes on in the phase it was in, a training from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, ProgressCallback

from longvpo_hf.artifacts import whole_folder, write_json
from longvpo_hf.building.captioning import caption_videos
from longvpo_hf.captions import read_captions_as_written
from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import FrameSampler
from longvpo_hf.funnel import log_folder
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.miniature.asking import Captioner, Describer, judge, write_question
from longvpo_hf.miniature.evaluation import (
    CHANCE_PERCENT,
    PAIR_CHANCE_PERCENT,
    Score,
    make_pair_questions,
    make_questions,
    score,
)
from longvpo_hf.miniature.machine import PeakMemory, one_thread, processor_name
from longvpo_hf.miniature.model import MAX_ANSWER_TOKENS, build_model, build_processor
from longvpo_hf.miniature.pretraining import pretrain
from longvpo_hf.miniature.settings import LONGVPO, STAGE2, Arm, DemoSettings
from longvpo_hf.miniature.truth import row_truth
from longvpo_hf.miniature.world import (
    FRAMES_PER_CLIP,
    FRAMES_PER_SECOND,
    TRUTH_FILE,
    WorldClip,
    read_world,
    write_world,
)
from longvpo_hf.preference import VideoPreference, undecoded
from longvpo_hf.responders import LocalResponder, ScriptedResponder
from longvpo_hf.timeline import Timeline
from longvpo_hf.training.checkpoints import last_whole_checkpoint
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.trainer import LongVPOTrainer

#: Packages whose versions the report names.
_PACKAGES = ("longvpo-hf", "torch", "transformers", "trl", "datasets", "torchcodec", "accelerate")


class Demo:
    """The phases, each of which is done once per output folder.

    Args:
        output: Folder of the run.
        settings: See `DemoSettings`.

    Raises:
        ValueError: If the folder holds a run with other settings.
    """

    def __init__(self, output: Path, settings: DemoSettings) -> None:
        self.output = output
        self.settings = settings
        self._state = output / "state"
        self._state.mkdir(parents=True, exist_ok=True)
        mine = {"version": version("longvpo-hf"), **asdict(settings)}
        path = self._state / "settings.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(mine)):
            raise ConfigError(
                f"{output} holds a run with other settings (see {path}); name another --output, or give --restart to "
                "delete that run and start anew."
            )
        write_json(path, mine)
        self.sampler = FrameSampler(self._num_frames, fps=FRAMES_PER_SECOND)
        # Only the large setting has work for a GPU; the others give the same numbers wherever they run.
        self._on_gpu = settings.scale == "large" and torch.cuda.is_available()

    @property
    def _num_frames(self) -> int:
        return FRAMES_PER_CLIP * max(self.settings.lengths)

    def phase(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, done now or in an earlier run; results are JSON."""
        path = self._state / f"{name}.json"
        if not self.is_done(name):
            tqdm.write(f"— {name}")
            start = time.perf_counter()
            result = work()
            seconds = round(time.perf_counter() - start, 1)
            write_json(path, {"seconds": seconds, "result": result})
        return json.loads(path.read_text(encoding="utf-8"))["result"]

    def is_done(self, name: str) -> bool:
        """Whether `phase` has the result of that name."""
        return (self._state / f"{name}.json").exists()

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished phase, in order of finishing; of a resumed one, of its last part."""
        paths = sorted((p for p in self._state.glob("*.json") if p.stem != "settings"), key=lambda p: p.stat().st_mtime)
        return {path.stem: json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in paths}

    def worlds(self) -> None:
        """Writes the four worlds."""
        sizes = {
            "pretraining": self.settings.pretraining_clips,
            "stage1": self.settings.stage1_clips,
            "stage2": self.settings.stage2_clips,
            "evaluation": self.settings.evaluation_clips,
        }

        def work() -> None:
            for number, (name, num_clips) in enumerate(tqdm(sizes.items(), desc="mp4 files", unit="world")):
                if not (self.output / "world" / name / TRUTH_FILE).exists():
                    write_world(self.output / "world" / name, num_clips, seed=4 * self.settings.seed + number)

        self.phase("worlds", work)

    def _world(self, name: str) -> list[WorldClip]:
        return read_world(self.output / "world" / name)

    def base(self) -> dict[str, int]:
        """Trains the base from nothing on one and two clips, into `base/`; returns its size and steps."""

        def work() -> dict[str, int]:
            clips = self._world("pretraining")
            frames = torch.stack(
                [
                    self.sampler(Timeline((item.clip,))).pixels
                    for item in tqdm(clips, desc="decoding", unit="clip", leave=False)
                ]
            )
            processor = build_processor()
            model = build_model(processor, self.settings.seed)
            history = pretrain(model, processor, frames, clips, self.settings.seed, self.settings.pretraining)
            with whole_folder(self.output / "base") as part:
                model.save_pretrained(part)
                processor.save_pretrained(part)
            return {
                "parameters": model.num_parameters(),
                "naming_steps": len(history.naming_losses),
                "recall_steps": len(history.recall_losses),
            }

        return self.phase("base", work)

    def rows(self) -> dict[str, dict[str, int]]:
        """Makes the Stage-1 rows, into `dataset/`; returns the funnel."""

        def work() -> dict[str, dict[str, int]]:
            responder = self._responder(self.output / "base")
            describer = Describer(responder)
            # Without captions, the builder knows of the world only what the model sees.
            clips = [replace(item.clip, caption="") for item in self._world("stage1")]
            settings = Stage1Settings(
                num_rows=self.settings.num_rows,
                max_clips=self.settings.max_clips,
                questions_per_timeline=4,
                seed=self.settings.seed,
            )
            return build_stage1(clips, describer, responder, self.output / "dataset", settings, describer.embed)

        return self.phase("rows", work)

    def stage2_captions(self, captioner: str = "base") -> dict[str, int]:
        """Captions the scenes of the long videos with the model in folder `captioner`, into `stage2-captions/`."""

        def work() -> dict[str, int]:
            videos = _videos(self._world("stage2"), *self.settings.stage2_scenes, self.settings.seed)
            captioned = caption_videos(
                videos,
                Captioner(self._responder(self.output / captioner)),
                ScriptedResponder("rule", lambda request: ""),  # Histories this short are never summed up.
                self.output / "stage2-captions",
            )
            truth = {scene.clip.source_id: scene.caption for scene in self._world("stage2")}
            scenes = [clip for video in captioned for clip in video.timeline.clips]
            right = sum(clip.caption == truth[clip.source_id] for clip in scenes)
            return {"videos": len(captioned), "scenes": len(scenes), "captions_right": right}

        return self.phase("stage2-captions", work)

    def stage2_rows(self, answerer: str = "model", folder: str = "stage2-dataset") -> dict[str, Any]:
        """Makes Stage-2 rows, answered by the model in folder `answerer`.

        Returns:
            The funnel, and how right the rows are, see `row_truth`.
        """

        def work() -> dict[str, Any]:
            funnel = build_stage2(
                read_captions_as_written(self.output / "stage2-captions"),
                ScriptedResponder("rule over captions", write_question),
                self._responder(self.output / answerer),
                self.output / folder,
                Stage2Settings(num_rows=self.settings.stage2_rows, seed=self.settings.seed),
                judge=ScriptedResponder("rule over captions", judge) if self.settings.stage2_judge else None,
            )
            return {"funnel": funnel, "truth": self._truth_of(folder)}

        return self.phase(folder, work)

    def train(self, arm: Arm, steps: int | None = None) -> dict[str, Any]:
        """Trains with `LongVPOTrainer` into the arm's folder.

        Args:
            arm: See `Arm`.
            steps: Steps of 48 rows; None for those of Stage 1.
        """

        def work() -> dict[str, Any]:
            folder = self.output / "training" / arm.name
            start = self.output / arm.start
            args = self._training_arguments(arm, folder, self.settings.steps if steps is None else steps)
            trainer = LongVPOTrainer(
                model=AutoModelForImageTextToText.from_pretrained(start),
                ref_model=AutoModelForImageTextToText.from_pretrained(start),
                args=args,
                train_dataset=self._training_rows(arm),
                processing_class=AutoProcessor.from_pretrained(start),
            )
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(_Progress)
            checkpoint = last_whole_checkpoint(folder)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            with whole_folder(self.output / arm.name) as part:
                trainer.save_model(str(part))
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            shutil.rmtree(folder)
            return {name: [entry[name] for entry in logs] for name in ("loss", "rewards/accuracies", "rewards/margins")}

        return self.phase(f"train {arm.name}", work)

    def _training_arguments(self, arm: Arm, folder: Path, max_steps: int) -> LongVPOConfig:
        return LongVPOConfig(
            output_dir=str(folder),
            num_frames=self._num_frames,
            fps=FRAMES_PER_SECOND,
            max_pixels=None,
            reference=arm.reference,
            beta=arm.beta,
            sft_weight=arm.sft_weight,
            loss_type=list(arm.loss_type),
            freeze_vision_tower=True,
            pairs_per_timeline=4,
            per_device_train_batch_size=48,
            max_steps=max_steps,
            learning_rate=arm.learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=20,
            adam_beta2=0.98,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not self._on_gpu,
            dataloader_num_workers=1,
            dataloader_prefetch_factor=4,
            dataloader_persistent_workers=True,
            logging_steps=min(10, max_steps),
            save_steps=max(1, max_steps // 6),
            save_total_limit=1,
            report_to="none",
            disable_tqdm=False,
            seed=self.settings.seed,
        )

    def evaluate(self, folder: str) -> dict[str, Any]:
        """Accuracy of the model in `folder` about one clip, by number of clips and its position, and about two."""

        def work() -> dict[str, Any]:
            responder = self._responder(self.output / folder)
            clips = self._world("evaluation")
            measured: dict[str, Any] = {"accuracy": {}, "interval": {}, "positions": {}}
            pairs: dict[str, Any] = {"accuracy": {}, "interval": {}}
            for length in tqdm(self.settings.lengths, desc=f"evaluating {folder}", unit="length"):
                questions = make_questions(clips, length, self.settings.questions_per_length, self.settings.seed)
                result = score(responder, questions)
                _record(measured, str(length), result.overall)
                measured["positions"][str(length)] = {
                    position: {"accuracy": round(part.percent, 2), "questions": part.number}
                    for position, part in result.by_position.items()
                }
            for length in tqdm(self.settings.pair_lengths, desc=f"evaluating {folder}: pairs", unit="length"):
                number = self.settings.pair_questions_per_length
                questions = make_pair_questions(clips, length, number, self.settings.seed)
                _record(pairs, str(length), score(responder, questions).overall)
            return {**measured, "pairs": pairs}

        return self.phase(f"evaluate {folder}", work)

    def _truth_of(self, folder: str) -> dict[str, dict[str, int]]:
        return row_truth(
            self._world("stage2"),
            read_captions_as_written(self.output / "stage2-captions"),
            [VideoPreference.from_row(row) for row in self._load_rows(folder)],
            log_folder(self.output / folder) / "dropped.jsonl",
        )

    def _training_rows(self, arm: Arm) -> Dataset:
        rows = self._load_rows(arm.rows)
        if not arm.replay:
            return rows
        earlier = self._load_rows(arm.replay)
        return concatenate_datasets([rows, earlier.select(range(min(len(earlier), len(rows) // 2)))])

    def _load_rows(self, folder: str) -> Dataset:
        rows = load_dataset(str(self.output / folder), split="train", cache_dir=str(self.output / "cache"))
        return undecoded(rows)

    def _responder(self, folder: Path) -> LocalResponder:
        return LocalResponder(
            AutoModelForImageTextToText.from_pretrained(folder).eval().to("cuda" if self._on_gpu else "cpu"),
            AutoProcessor.from_pretrained(folder),
            self.sampler,
            max_new_tokens=MAX_ANSWER_TOKENS,
            batch_size=64,
            name=f"miniature-{folder.name}",
        )

    def sample_row(self, folder: str) -> dict[str, Any]:
        """A row of the dataset with 6 to 10 clips if there is one: what the report's filmstrip shows."""
        rows = self._load_rows(folder)
        lengths = [len(clips) for clips in rows.select_columns("clips").with_format("arrow")["clips"]]
        return rows[min(range(len(rows)), key=lambda i: abs(lengths[i] - 8))]


def run_demo(output: Path, settings: DemoSettings) -> dict[str, Any]:
    """Runs all phases and writes the report into `output`; returns the content of `metrics.json`."""
    from longvpo_hf.miniature.report import write_report

    with one_thread(), PeakMemory() as memory:
        demo = Demo(output, settings)
        demo.worlds()
        base = demo.base()
        measured = {"before": demo.evaluate("base")}
        stage1_funnel = demo.rows()
        training = {"stage1": demo.train(LONGVPO)}
        measured["stage1"] = demo.evaluate(LONGVPO.name)
        captions = demo.stage2_captions()
        stage2 = demo.stage2_rows()
        training["stage2"] = demo.train(STAGE2, settings.stage2_steps)
        measured["stage2"] = demo.evaluate(STAGE2.name)
        metrics = {
            "accuracy": {model: result["accuracy"] for model, result in measured.items()},
            "interval_95": {model: result["interval"] for model, result in measured.items()},
            "positions": {model: result["positions"] for model, result in measured.items()},
            "chance": CHANCE_PERCENT,
            "questions_per_length": settings.questions_per_length,
            "pairs": {
                "accuracy": {model: result["pairs"]["accuracy"] for model, result in measured.items()},
                "interval_95": {model: result["pairs"]["interval"] for model, result in measured.items()},
                "chance": PAIR_CHANCE_PERCENT,
                "questions_per_length": settings.pair_questions_per_length,
            },
            "meaningless": settings.meaningless,
            "seed": settings.seed,
            "settings": asdict(settings),
            "arms": {"stage1": asdict(LONGVPO), "stage2": asdict(STAGE2)},
            "base": base,
            "funnels": {"stage1": stage1_funnel, "stage2": stage2["funnel"]},
            "stage2_captions": captions,
            "stage2_truth": stage2["truth"],
            "training": training,
            "seconds": demo.seconds(),
            "peak_memory_gib": memory.peak_gib,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "machine": {"platform": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()},
        }
        write_json(output / "metrics.json", metrics)
        rows = {"stage1-row": demo.sample_row(LONGVPO.rows), "stage2-row": demo.sample_row(STAGE2.rows)}
        write_report(output, metrics, rows, demo.sampler)
    return metrics


def _videos(scenes: Sequence[WorldClip], shortest: int, longest: int, seed: int) -> list[Timeline]:
    """Long videos: runs of consecutive scenes of the world's files, of `shortest` to `longest` scenes each."""
    rng = np.random.default_rng(seed)
    videos = []
    for _, in_file in groupby(scenes, key=lambda scene: scene.clip.path):
        # Without captions, the builder knows of the world only what the model sees.
        clips = [replace(scene.clip, caption="") for scene in in_file]
        while len(clips) >= shortest:
            length = int(rng.integers(shortest, longest + 1))
            videos.append(Timeline(tuple(clips[:length])))
            clips = clips[length:]
    return videos


class _Progress(ProgressCallback):
    """The Trainer's bar, with the loss beside it instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            accuracy = float(logs["rewards/accuracies"])
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", reward_accuracy=f"{accuracy:.2f}")


def _record(measured: dict[str, Any], length: str, result: Score) -> None:
    measured["accuracy"][length] = round(result.percent, 2)
    measured["interval"][length] = [round(bound, 2) for bound in result.interval_percent]
