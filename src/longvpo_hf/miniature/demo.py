"""The whole method in the miniature's world: `longvpo demo`.

Does, in phases that are each done once per output folder: writes the worlds (pretraining, Stage 1, evaluation: three
disjoint draws of mp4 files), trains the short-context base from nothing, measures it, makes Stage-1 rows with the
product's builder, trains on them with `LongVPOTrainer`, measures again, and writes a report. Takes an output folder and
settings; gives the measurements. An interrupted run goes on in the phase it was in, Stage 1 from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from longvpo_hf.builders.anchored import AnchoredSettings, build_anchored
from longvpo_hf.config import LongVPOConfig, ReferenceView
from longvpo_hf.frames import FrameSampler
from longvpo_hf.miniature.asking import Describer
from longvpo_hf.miniature.evaluation import CHANCE_PERCENT, LengthScore, make_questions, score
from longvpo_hf.miniature.model import MAX_ANSWER_TOKENS, build_model, build_processor
from longvpo_hf.miniature.pretraining import PretrainingSettings, pretrain
from longvpo_hf.miniature.world import (
    FRAMES_PER_CLIP,
    FRAMES_PER_SECOND,
    TRUTH_FILE,
    WorldClip,
    read_world,
    write_world,
)
from longvpo_hf.preference import undecoded
from longvpo_hf.responders import LocalResponder
from longvpo_hf.timeline import Timeline
from longvpo_hf.trainer import LongVPOTrainer

#: Packages whose versions the report names.
_PACKAGES = ("longvpo-hf", "torch", "transformers", "trl", "datasets", "torchcodec", "accelerate")


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """How much the demo does. The defaults are the recipe whose claim `benchmarks/results/` holds over five seeds.

    Args:
        seed: Decides worlds, weights, rows and order.
        scale: Name of the setting, as it stands in the report.
        pretraining_clips: Clips the base is trained on.
        stage1_clips: Clips Stage-1 rows are made of.
        evaluation_clips: Clips of the evaluation; no training phase sees them.
        pretraining: Recipe of the base.
        num_rows: Stage-1 rows.
        max_clips: Most clips of a Stage-1 timeline; the fewest are 2.
        steps: Stage-1 steps of 48 rows: 12 timelines with up to 4 questions each.
        lengths: Numbers of clips that are evaluated.
        questions_per_length: Questions at each of them.
        meaningless: The run is too short for its numbers to mean anything, which the report then says.
    """

    seed: int = 0
    scale: str = "standard"
    pretraining_clips: int = 8192
    stage1_clips: int = 4096
    evaluation_clips: int = 2048
    pretraining: PretrainingSettings = field(default_factory=PretrainingSettings)
    num_rows: int = 7200
    max_clips: int = 16
    steps: int = 300
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    questions_per_length: int = 400
    meaningless: bool = False

    @classmethod
    def fast(cls, seed: int = 0) -> DemoSettings:
        """The same code with few steps, to see that everything runs."""
        return cls(
            seed=seed,
            scale="fast",
            pretraining_clips=512,
            stage1_clips=256,
            evaluation_clips=256,
            pretraining=PretrainingSettings.fast(),
            num_rows=96,
            steps=4,
            questions_per_length=24,
            meaningless=True,
        )

    @classmethod
    def large(cls, seed: int = 0) -> DemoSettings:
        """Four times the length: Stage 1 on up to 64 clips, evaluation on up to 256."""
        return cls(
            seed=seed,
            scale="large",
            stage1_clips=16384,
            evaluation_clips=8192,
            num_rows=28800,
            max_clips=64,
            steps=1200,
            lengths=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        )


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train Stage 1 on the rows.

    Args:
        name: Folder of its model.
        reference: See `LongVPOConfig.reference`.
        beta: DPO's β.
        sft_weight: α.
        loss_type: Losses besides the SFT term.
    """

    name: str
    reference: ReferenceView = "anchor"
    # β 0.1 and α 1 where the paper has 0.01 and 1: the recipe was found with these, and frozen.
    beta: float = 0.1
    sft_weight: float = 1.0
    loss_type: tuple[str, ...] = ("sigmoid",)


LONGVPO = Arm("model")


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
        mine = json.dumps({"version": version("longvpo-hf"), **asdict(settings)}, indent=2)
        path = self._state / "settings.json"
        if path.exists() and path.read_text(encoding="utf-8") != mine:
            raise ValueError(
                f"{output} holds a run with other settings (see {path}); name another --output, or give --restart to "
                "delete that run and start anew."
            )
        _write(path, mine)
        self.sampler = FrameSampler(self._num_frames, fps=FRAMES_PER_SECOND)
        # Only the large setting has work for a GPU; the others give the same numbers wherever they run.
        self._on_gpu = settings.scale == "large" and torch.cuda.is_available()

    @property
    def _num_frames(self) -> int:
        return FRAMES_PER_CLIP * max(self.settings.lengths)

    def phase(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, done now or in an earlier run; results are JSON."""
        path = self._state / f"{name}.json"
        if not path.exists():
            tqdm.write(f"— {name}")
            start = time.perf_counter()
            result = work()
            seconds = round(time.perf_counter() - start, 1)
            _write(path, json.dumps({"seconds": seconds, "result": result}))
        return json.loads(path.read_text(encoding="utf-8"))["result"]

    def seconds(self) -> dict[str, float]:
        """How long each finished phase took, in order of finishing; of a resumed one, its last part."""
        paths = sorted((p for p in self._state.glob("*.json") if p.stem != "settings"), key=lambda p: p.stat().st_mtime)
        return {path.stem: json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in paths}

    def worlds(self) -> None:
        """Writes the three worlds."""
        sizes = {
            "pretraining": self.settings.pretraining_clips,
            "stage1": self.settings.stage1_clips,
            "evaluation": self.settings.evaluation_clips,
        }

        def work() -> None:
            for number, (name, num_clips) in enumerate(tqdm(sizes.items(), desc="mp4 files", unit="world")):
                if not (self.output / "world" / name / TRUTH_FILE).exists():
                    write_world(self.output / "world" / name, num_clips, seed=3 * self.settings.seed + number)

        self.phase("worlds", work)

    def _world(self, name: str) -> list[WorldClip]:
        return read_world(self.output / "world" / name)

    def base(self) -> dict[str, int]:
        """Trains the base from nothing on one and two clips, into `base/`; gives its size and steps."""

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
            with _whole(self.output / "base") as part:
                model.save_pretrained(part)
                processor.save_pretrained(part)
            return {
                "parameters": model.num_parameters(),
                "naming_steps": len(history.naming_losses),
                "recall_steps": len(history.recall_losses),
            }

        return self.phase("base", work)

    def rows(self) -> dict[str, dict[str, int]]:
        """Makes the Stage-1 rows with the product's builder, into `dataset/`; gives its funnel."""

        def work() -> dict[str, dict[str, int]]:
            responder = self._responder(self.output / "base")
            describer = Describer(responder)
            # No caption: the builder learns nothing of the world but what the base sees.
            clips = [replace(item.clip, caption="") for item in self._world("stage1")]
            settings = AnchoredSettings(
                num_rows=self.settings.num_rows,
                max_clips=self.settings.max_clips,
                questions_per_timeline=4,
                seed=self.settings.seed,
            )
            return build_anchored(clips, describer, responder, self.output / "dataset", settings, describer.embed)

        return self.phase("rows", work)

    def train(self, arm: Arm) -> dict[str, Any]:
        """Trains the base on the rows with `LongVPOTrainer`, into the arm's folder."""

        def work() -> dict[str, Any]:
            folder = self.output / "training" / arm.name
            base = self.output / "base"
            args = LongVPOConfig(
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
                max_steps=self.settings.steps,
                learning_rate=1e-3,
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
                logging_steps=min(10, self.settings.steps),
                save_steps=max(1, self.settings.steps // 6),
                save_total_limit=1,
                report_to="none",
                disable_tqdm=False,
                seed=self.settings.seed,
            )
            trainer = LongVPOTrainer(
                model=AutoModelForImageTextToText.from_pretrained(base),
                ref_model=AutoModelForImageTextToText.from_pretrained(base),
                args=args,
                train_dataset=self._load_rows(),
                processing_class=AutoProcessor.from_pretrained(base),
            )
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(_Progress)
            checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
            trainer.train(resume_from_checkpoint=checkpoint)
            with _whole(self.output / arm.name) as part:
                trainer.save_model(str(part))
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            shutil.rmtree(folder)
            return {name: [entry[name] for entry in logs] for name in ("loss", "rewards/accuracies", "rewards/margins")}

        return self.phase(f"train {arm.name}", work)

    def evaluate(self, folder: str) -> dict[str, Any]:
        """Accuracy of the model in `folder` by number of clips and position of the anchor."""

        def work() -> dict[str, Any]:
            responder = self._responder(self.output / folder)
            clips = self._world("evaluation")
            measured: dict[str, Any] = {"accuracy": {}, "interval": {}, "positions": {}}
            for length in tqdm(self.settings.lengths, desc=f"evaluating {folder}", unit="length"):
                questions = make_questions(clips, length, self.settings.questions_per_length, self.settings.seed)
                _record(measured, str(length), score(responder, questions))
            return measured

        return self.phase(f"evaluate {folder}", work)

    def _load_rows(self) -> Dataset:
        rows = load_dataset(str(self.output / "dataset"), split="train", cache_dir=str(self.output / "cache"))
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

    def sample_row(self) -> dict[str, Any]:
        """A row of the dataset with 6 to 10 clips if there is one: what the report's filmstrip shows."""
        rows = self._load_rows()
        lengths = [len(clips) for clips in rows.select_columns("clips").with_format("arrow")["clips"]]
        return rows[min(range(len(rows)), key=lambda i: abs(lengths[i] - 8))]


def run_demo(output: Path, settings: DemoSettings) -> dict[str, Any]:
    """Runs all phases and writes the report into `output`; gives what `metrics.json` holds."""
    from longvpo_hf.miniature.report import write_report

    with one_thread():
        demo = Demo(output, settings)
        demo.worlds()
        base = demo.base()
        before = demo.evaluate("base")
        funnel = demo.rows()
        training = demo.train(LONGVPO)
        after = demo.evaluate(LONGVPO.name)
        metrics = {
            "accuracy": {"before": before["accuracy"], "after": after["accuracy"]},
            "interval_95": {"before": before["interval"], "after": after["interval"]},
            "positions": {"before": before["positions"], "after": after["positions"]},
            "chance": CHANCE_PERCENT,
            "questions_per_length": settings.questions_per_length,
            "meaningless": settings.meaningless,
            "seed": settings.seed,
            "settings": asdict(settings),
            "arm": asdict(LONGVPO),
            "base": base,
            "funnel": funnel,
            "training": training,
            "seconds": demo.seconds(),
            "peak_memory_gib": _peak_memory_gib(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "machine": {"platform": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()},
        }
        _write(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        write_report(output, metrics, demo.sample_row(), demo.sampler)
    return metrics


class _Progress(ProgressCallback):
    """The Trainer's bar, with the loss beside it instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            accuracy = float(logs["rewards/accuracies"])
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", reward_accuracy=f"{accuracy:.2f}")


def _record(measured: dict[str, Any], length: str, result: LengthScore) -> None:
    measured["accuracy"][length] = round(result.overall.percent, 2)
    measured["interval"][length] = [round(bound, 2) for bound in result.overall.interval_percent]
    measured["positions"][length] = {
        position: {"accuracy": round(part.percent, 2), "questions": part.number}
        for position, part in result.by_position.items()
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """The model is so small that a second thread costs more than it brings; and one thread repeats its numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` once all is written."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _peak_memory_gib() -> float:
    """Of this process and of the largest of its dataloader workers, added: pages that both have count twice."""
    kib = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(kib / 1024**2, 2)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def processor_name() -> str:
    """Name of the CPU, for reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
