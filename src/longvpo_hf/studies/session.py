"""A study in its folder: its steps, what they cost and lack, and how they run; what `longvpo run` is made of."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from longvpo_hf.artifacts import digest, locked, make_folder, write_json
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.preflight import Missing
from longvpo_hf.public import public_name
from longvpo_hf.studies import planning
from longvpo_hf.studies.ledger import STATE, Ledger
from longvpo_hf.studies.running import Selection, run_steps
from longvpo_hf.studies.steps import Step, steps_of
from longvpo_hf.studies.study import AUTO, MINIATURE, Study, content_of, find_study, study_of

if TYPE_CHECKING:
    from longvpo_hf.studies.choosing import Gpus


@dataclass(frozen=True, slots=True)
class Session:
    """A study and its run.

    Args:
        study: The study, with all that it leaves open chosen.
        run_folder: Folder of the run.
        steps: Its steps.
        ledger: What is done of them.
        command: What was typed, for the report.
        gpu_memory_gib: Of a GPU to plan for; None for this machine's.
        asked: The study as it was read.
    """

    study: Study
    run_folder: Path
    steps: tuple[Step, ...]
    ledger: Ledger
    command: str
    gpu_memory_gib: float | None = None
    asked: Study | None = None

    @classmethod
    def open(
        cls,
        name: str,
        output: Path | None = None,
        *,
        videos: Path | None = None,
        seed: int | None = None,
        hours: float | None = None,
        gpu_memory_gib: float | None = None,
    ) -> Self:
        """A study by its file or its shipped name; see `longvpo run` for the rest.

        Raises:
            ConfigError: If something of it is not known.
        """
        study = find_study(name)
        if videos is not None:
            study = replace(study, videos={**study.videos, "source": str(videos)})
        if seed is not None:
            study = replace(study, seed=seed)
        if hours is not None:
            study = replace(study, hours=hours)
        run_folder = output or Path("runs") / study.name
        asked = study
        if study.base != MINIATURE:
            study = _kept_choice(asked, run_folder) or _chosen(asked, gpu_memory_gib)
        steps = steps_of(study, _base_identity(study.base), _videos_identity)
        command = shlex.join(["longvpo", *sys.argv[1:]])
        return cls(study, run_folder, tuple(steps), Ledger(run_folder, steps), command, gpu_memory_gib, asked)

    @property
    def slots(self) -> int:
        """How many steps may run at once: the miniature's need one core each, all others the machine's GPU or cores."""
        return min(2, os.cpu_count() or 1) if self.is_miniature and not self.language_model else 1

    def select(self, until: str | None, start: str | None, only: str | None) -> list[Step]:
        """The steps that `--until`, `--from` and `--only` leave."""
        return Selection(until, start, only).of(self.steps)

    @property
    def is_miniature(self) -> bool:
        """Whether world and base are made by the study itself."""
        return self.study.base == MINIATURE

    @property
    def language_model(self) -> str:
        """The pretrained language model in a miniature's base; empty where there is none."""
        from longvpo_hf.miniature.study import settings_of

        return settings_of(self.study).language_model if self.is_miniature else ""

    @property
    def base_name(self) -> str:
        """The base, for people."""
        if self.language_model:
            return f"a base with {public_name(self.language_model)} inside"
        return "a base trained from nothing" if self.is_miniature else public_name(self.study.base)

    @property
    def notices(self) -> list[str]:
        """What a reader of the report must know first."""
        if self.is_miniature:
            from longvpo_hf.miniature.study import settings_of

            if settings_of(self.study).meaningless:
                return ["These numbers mean nothing: the run is far too short, and shows that everything works."]
        return []

    @property
    def described(self) -> str:
        """The study in a line."""
        trained = [f"{step.name} with {self.config_of(step)}" for step in self.steps if step.kind == "train"]
        return f"{self.study.name}, from {self.base_name}, in {self.run_folder}: {'; '.join(trained) or 'no training'}"

    @property
    def gpus(self) -> Gpus:
        """What the study is planned for: this machine, or a GPU of the memory that was named."""
        from longvpo_hf.studies.choosing import Gpus

        return Gpus.here(self.gpu_memory_gib)

    @property
    def has_gpu(self) -> bool:
        """Whether the study is planned for a GPU."""
        return not self.is_miniature and self.gpus.number > 0

    @property
    def machine(self) -> str:
        """What hours are of, for people."""
        if self.is_miniature or self.gpus.is_here:
            return "this machine"
        return f"a GPU of {self.gpus.memory_gib:g} GiB at {self.gpus.tflops:g} TFLOP/s"

    def config_of(self, step: Step) -> str:
        """The configuration of a training."""
        place = step.program.index("train")
        return str(step.program[place + 2])

    def hours_of(self, step: Step) -> float | None:
        """Hours that a step was planned to take on this machine; None where no plan was made."""
        return planning.known_hours(self, step)

    def known_costs(self) -> dict[str, planning.Cost]:
        """What each step will cost; made once."""
        return planning.costs(self, lambda line: print(line, file=sys.stderr, flush=True))

    def missing(self, selected: Sequence[Step]) -> list[Missing]:
        """What the steps need and this machine lacks."""
        return planning.missing(self, selected)

    def plan(self, selected: Sequence[Step], lacks: Sequence[Missing]) -> str:
        """Steps, costs and what is missing, for people."""
        return planning.in_words(self, selected, self.known_costs(), lacks)

    def run(self, selected: Sequence[Step], *, delete: bool = False) -> None:
        """Does what is not done; the report follows it.

        Raises:
            LongVPOError: If something is missing, or a step fails.
        """
        from longvpo_hf.studies.report import Report

        make_folder(self.run_folder)
        with locked(self.run_folder):
            self.known_costs()
            if lacks := self.missing(selected):
                parts = [f"- {item.what}\n    {item.remedy}" for item in lacks]
                raise ConfigError("\n".join(["before anything runs, this is missing:", *parts]))
            if self.asked is not None:
                choice = {"asked": content_of(self.asked), "chosen": content_of(self.study)}
                write_json(self.run_folder / STATE / _CHOICE, choice)
            self._say_what_changed(selected, delete)
            report = Report(self)
            try:
                run_steps(self.ledger, selected, slots=self.slots, delete=delete, on_change=report.write)
            finally:
                report.write(())
        print(f"Report: {report.page}")

    def _say_what_changed(self, selected: Sequence[Step], delete: bool) -> None:
        changed = [step.name for step in selected if self.ledger.state(step.name) == "changed"]
        if not changed:
            return
        print("Settings changed since these steps were done; they are made anew:")
        for name in changed:
            print(f"  {name}: {self.ledger.why(name)}")
        kept = "deleted" if delete else f"kept in {self.run_folder / 'earlier'}"
        print(f"What they made before is {kept}.", flush=True)


#: What was chosen for a study, in the run's folder.
_CHOICE = "choice.json"


def _kept_choice(asked: Study, run_folder: Path) -> Study | None:
    """What an earlier run chose for the same study; None if there is none."""
    try:
        kept = json.loads((run_folder / STATE / _CHOICE).read_text(encoding="utf-8"))
        return study_of(kept["chosen"]) if kept["asked"] == json.loads(json.dumps(content_of(asked))) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _chosen(asked: Study, gpu_memory_gib: float | None) -> Study:
    from longvpo_hf.studies.choosing import chosen

    if asked.base == AUTO:
        print("Choosing base, frames and rows by their plans: about a minute …", file=sys.stderr, flush=True)
    return chosen(asked, gpu_memory_gib)


def _base_identity(base: str) -> str:
    """Tells a base from others: of a folder by its files, of the Hub by its name."""
    if base == MINIATURE:
        return ""
    if Path(base).is_dir():
        from longvpo_hf.responders.checkpoint import checkpoint_digest

        return checkpoint_digest(base)
    return base


def _videos_identity(source: str) -> str:
    """Tells a folder's files from others by names, sizes and times; builders tell them apart by content."""
    root = Path(source)
    if not root.is_dir():
        return source
    found = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file():
                facts = path.stat()
                found.append([path.relative_to(root).as_posix(), facts.st_size, facts.st_mtime_ns])
    return digest(found)
