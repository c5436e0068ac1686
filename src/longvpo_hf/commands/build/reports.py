"""What a build says at its start and end: an estimate of its cost, and what came of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longvpo_hf.artifacts import write_json
from longvpo_hf.commands.build.options import FPS, FRAMES, OutputSettings, SceneSettings
from longvpo_hf.timeline import Clip, Timeline

if TYPE_CHECKING:
    from longvpo_hf.building.executors import Executor

#: Rough sizes for --dry-run: visual tokens of a frame of 448 × 448 in InternVL, and of a question with its answer.
TOKENS_PER_FRAME, TOKENS_PER_TEXT = 256, 200


#: Where a dry run leaves its estimate, in its log: for programs.
ESTIMATE_FILE = "estimate.json"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a build would cost if no row were dropped.

    Args:
        text: For people.
        rows: Rows that would come out.
        calls: Requests to models.
        tokens: Of all requests, roughly.
        disk_bytes: Of the clips, which lie in the cache and once more in the dataset.
    """

    text: str
    rows: int
    calls: int
    tokens: int
    disk_bytes: int

    def show(self, output: OutputSettings) -> None:
        """Prints it, and leaves it in the log of the dry run."""
        print(self.text)
        write_json(output.log / ESTIMATE_FILE, asdict(self))


def disk_bytes(clips: Sequence[Clip]) -> int:
    """Bytes of the files of clips; of clips that are there several times, that often: see `read_videos`."""
    files = sum(Path(path).stat().st_size for path in {clip.path for clip in clips})
    return files * len(clips) // max(1, len(set(clips)))


def disk_lines(clips: Sequence[Clip], output: OutputSettings) -> list[str]:
    """Lines of an estimate: what the clips take on disk."""
    disk = disk_bytes(clips)
    free = shutil.disk_usage(output.output.resolve().parent).free
    return [
        f"disk              {disk / 1e9:.2f} GB of clips, once more in the dataset; {free / 1e9:.0f} GB free",
        "This assumes that no row is dropped; each dropped row costs its calls again.",
    ]


def estimate_over_scenes(
    timelines: Sequence[Timeline],
    scenes: SceneSettings,
    output: OutputSettings,
    num_rows: int,
    most_rows: int | None,
    shown: str,
    judgements: int,
) -> Estimate:
    """What a run over captioned videos would cost: captions, questions, two answers a row, verdicts.

    Args:
        timelines: The videos.
        scenes: Whether they are captioned, and the frames of a row.
        output: Where rows go.
        num_rows: Rows asked for.
        most_rows: Most that these videos can give; None where that is not known.
        shown: What the answers are given from, in words.
        judgements: Verdicts per row.
    """
    asked, num_rows = num_rows, num_rows if most_rows is None else min(num_rows, most_rows)
    bound = f" at most, not {asked}: more different questions cannot be asked about these videos"
    num_scenes = sum(len(timeline) for timeline in timelines)
    seconds = sum(timeline.duration_seconds for timeline in timelines)
    captions = 0 if scenes.captions else num_scenes
    frames_of_scene = min(FRAMES, max(1.0, seconds / num_scenes * FPS))
    frames_of_video = min(scenes.frame_budget, max(1.0, seconds / len(timelines) * FPS))
    tokens = captions * (frames_of_scene * TOKENS_PER_FRAME + TOKENS_PER_TEXT)
    tokens += num_rows * 2 * (frames_of_video * TOKENS_PER_FRAME + TOKENS_PER_TEXT)
    tokens += num_rows * (1 + judgements) * (num_scenes / len(timelines) + 1) * TOKENS_PER_TEXT
    calls = captions + num_rows * (3 + judgements)
    clips = [clip for timeline in timelines for clip in timeline.clips]
    text = "\n".join(
        [
            f"videos            {len(timelines)} timelines of {num_scenes / len(timelines):.1f} scenes, "
            f"{seconds / num_scenes:.1f} s each on average",
            f"rows              {num_rows}{bound if num_rows < asked else ''}",
            f"model calls       {calls}: {captions} captions (and at most as many summaries), {num_rows} questions, "
            f"{2 * num_rows} answers from {shown}, {judgements * num_rows} verdicts",
            f"tokens            at most about {tokens / 1e6:.1f} million, at {TOKENS_PER_FRAME} per frame",
            *disk_lines(clips, output),
        ]
    )
    return Estimate(text, num_rows, calls, round(tokens), disk_bytes(clips))


def finish(method: str, counts: Mapping[str, Mapping[str, int]], output: OutputSettings, executor: Executor) -> None:
    """Shows what came through each stage and what was dropped for which reason; pushes if that was asked for."""
    for title, numbers in counts.items():
        print(title if numbers else f"{title}: nothing")
        for name, number in numbers.items():
            print(f"  {number:>8} {name}")
    if not executor.joins:
        print(f"{str(executor).capitalize()} has done its part. When all have, write the dataset with --merge.")
        return
    print(f"{counts['stages']['rows']} rows in {output.output}; look at them with: longvpo inspect {output.output}")
    print(f"Train on them: longvpo train {method} --config NAME --dataset_name {output.output}; names: longvpo configs")
    if output.preview:
        from longvpo_hf.publishing.dataset import add_preview

        add_preview(output.output)
    _audit(output)
    if output.push_to_hub:
        from longvpo_hf.publishing.dataset import push_dataset

        commit = push_dataset(output.output, output.push_to_hub, private=output.private, revision=output.revision)
        print(f'pushed: load_dataset("{output.push_to_hub}", revision="{commit}")')


def _audit(output: OutputSettings) -> None:
    """The cheap items of an audit: written into the run's log, shown where they warn."""
    from longvpo_hf.auditing import Verdict, audit_folder, write_audit

    found = audit_folder(output.output)
    write_audit(found, output.log / "audit.html")
    worst = [finding for finding in found.findings if finding.verdict.is_at_least(Verdict.WARN)]
    items = "1 item" if len(worst) == 1 else f"{len(worst)} items"
    print(f"audit: {items} to look at in {output.log / 'audit.html'}" if worst else "audit: nothing stands out")
    for finding in worst:
        print(f"  {finding.verdict!s:<8}{finding.name}: {finding.said}")
