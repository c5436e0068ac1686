"""What the miniature's world knows to be true of the rows that the builders made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.miniature.language import Language
from longvpo_hf.miniature.world import WorldClip
from longvpo_hf.preference import VideoPreference


def row_truth(
    scenes: Sequence[WorldClip],
    captioned: Sequence[CaptionedVideo],
    rows: Sequence[VideoPreference],
    drops_file: Path,
    language: Language,
) -> dict[str, dict[str, int]]:
    """Counts right answers among Stage-2 rows, and among all pairs before agreeing and judged ones were dropped.

    Rows and drops name their scenes by `source_id`, since media are stored by content.

    Args:
        scenes: The scenes of all videos, and what is true of them.
        captioned: The videos that were asked about.
        rows: The rows.
        drops_file: `dropped.jsonl` of the build.
        language: In which they ask and answer.

    Returns:
        `before filters` and `rows`: pairs, right chosen answers, wrong rejected answers; of rows also those whose
        evidence is exactly the scenes that are asked about.
    """
    truth = {scene.clip.source_id: (scene.marker, scene.colour) for scene in scenes}
    video_of = {clip.source_id: video.timeline.clips for video in captioned for clip in video.timeline.clips}
    drops = [json.loads(line) for line in drops_file.read_text(encoding="utf-8").splitlines()]
    # A drop names the first of its evidence, or of its video.
    pairs = [(row.timeline.clips, row.question, row.chosen, row.rejected) for row in rows]
    pairs += [
        (video_of[drop["source_id"]], drop["question"], drop["chosen"], drop["rejected"])
        for drop in drops
        if "rejected" in drop
    ]
    answers = [language.answer_to(asked, [truth[clip.source_id] for clip in clips]) for clips, asked, _, _ in pairs]
    right = [chosen == answer for answer, (_, _, chosen, _) in zip(answers, pairs, strict=True)]
    wrong = [rejected != answer for answer, (_, _, _, rejected) in zip(answers, pairs, strict=True)]
    return {
        "before filters": {"pairs": len(pairs), "chosen_right": sum(right), "rejected_wrong": sum(wrong)},
        "rows": {
            "pairs": len(rows),
            "chosen_right": sum(right[: len(rows)]),
            "rejected_wrong": sum(wrong[: len(rows)]),
            "evidence_exact": sum(_is_exact(row, truth, language) for row in rows),
        },
    }


def _is_exact(row: VideoPreference, truth: Mapping[str, tuple[str, str]], language: Language) -> bool:
    """Whether the evidence is exactly the scenes that the question asks about."""
    asked = language.named_markers(row.question)
    needed = [index for index, clip in enumerate(row.timeline.clips) if truth[clip.source_id][0] in asked]
    return sorted(row.evidence) == needed and len(needed) == len(asked)
