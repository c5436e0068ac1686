"""`longvpo run`: a study, from videos to a measured model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveFloat

from longvpo_hf.commands.cli import quiet_libraries, resumable


@resumable
@quiet_libraries()  # each step's advice is in its log
def run(
    study: str,
    /,
    *,
    output: Path | None = None,
    videos: Path | None = None,
    seed: NonNegativeInt | None = None,
    hours: PositiveFloat | None = None,
    gpu_memory: PositiveFloat | None = None,
    dry_run: bool = False,
    until: str | None = None,
    start: Annotated[str | None, Parameter(name="--from")] = None,
    only: str | None = None,
    redo: bool = False,
) -> int:
    """Runs a study: rows, trainings and measurements, from a folder of videos to a measured model.

    For example:

        longvpo run my_study.yaml --dry-run     # what it will cost, and what is missing
        longvpo run my_study.yaml               # does it
        longvpo run my_study.yaml --until stage1
        longvpo run miniature                   # the whole method in minutes, without a GPU
        longvpo run weekend --videos ./my_videos

    The same command goes on where a killed run stopped. Steps that are done stay; a changed setting makes anew what
    follows from it, and says so first. Report: report.html in the run's folder.

    Args:
        study: A YAML file, or the name of a shipped study (`longvpo configs`).
        output: Folder of the run. None: runs/NAME, NAME being the study's.
        videos: Folder of videos. None: that of the study.
        seed: Decides every random choice. None: that of the study.
        hours: With `base: auto`, hours that the study may take. None: those of the study.
        gpu_memory: GiB of one GPU, for the plan. None: this machine's.
        dry_run: Show the plan and what is missing, and do nothing. The exit status is 1 where something is missing.
        until: The last step that runs. None: the study's last.
        start: The first step that runs. None: the study's first.
        only: The one step that runs. None: all of them.
        redo: Delete what changed settings replace, instead of keeping it in earlier/.
    """
    from longvpo_hf.hub import go_offline_if_unreachable
    from longvpo_hf.studies.session import Session

    session = Session.open(study, output, videos=videos, seed=seed, hours=hours, gpu_memory_gib=gpu_memory)
    if not session.is_miniature:
        go_offline_if_unreachable([session.study.base, *session.study.evaluate.tasks, session.study.push_to])
    selected = session.select(until, start, only)
    if dry_run:
        lacks = session.missing(selected)
        print(session.plan(selected, lacks))
        return 1 if lacks else 0
    session.run(selected, delete=redo)
    return 0
