"""The rows of a scripted build of each method, to the byte: a change of the engine changes none of them.

Where this fails, either the engine is wrong or a method changed on purpose. Only in the second case write the new hash
here, with a new prompt version where the change is one of wording.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from longvpo_hf.building.captioning import caption_videos
from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.responders import Request, ScriptedResponder
from longvpo_hf.timeline import Clip
from scenes import unfilmed

_REHEARSED = rehearsal()


def _fickle(request: Request) -> str:
    """A rehearsal in which every ninth answer is of no use, so that drops and further tries count."""
    answer = _REHEARSED.answer(request)
    chance = hashlib.sha256(request.text.encode()).digest()[0] % 27
    return {0: "", 1: "I cannot see the video.", 2: answer[:20]}.get(chance, answer)


def _hash(output: Path, funnel: dict[str, dict[str, int]]) -> str:
    rows = pq.read_table(output / "train.parquet").to_pylist()
    assert 60 < len(rows) <= 150
    for clip in (clip for row in rows for clip in row["clips"]):
        clip["file_name"] = f"clips/{Path(clip['file_name']).name}"  # its folder is the writer's choice
    return hashlib.sha256(json.dumps([rows, funnel], sort_keys=True).encode()).hexdigest()[:16]


def _embed(clips: Sequence[Clip]) -> NDArray[np.float64]:
    """Twelve kinds of clips, any two of them at a cosine of 0.5."""
    kinds = 0.5**0.5 * np.concatenate([np.eye(12), np.ones((12, 1))], axis=1)
    return kinds[np.arange(len(clips)) % 12]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("stage1", "712ff0b80e769a2d"),
        ("stage1-embedded", "1c8323c56e1c28f6"),
        ("stage2", "d7c9a6b6221c4995"),
        ("temporal", "2b7bb09a6bf84b64"),
    ],
)
def test_a_scripted_build_gives_the_same_rows(tmp_path: Path, method: str, expected: str) -> None:
    timelines = [video.timeline for video in unfilmed(tmp_path / "media", [6, 9, 2, 14, 5, 7, 3, 11] * 4)]
    model, output = ScriptedResponder("fickle", _fickle), tmp_path / "rows"
    if method.startswith("stage1"):
        pool = [clip for timeline in timelines for clip in timeline.clips]
        settings = Stage1Settings(num_rows=150, max_clips=7, questions_per_timeline=2, seed=5)
        embed = _embed if method == "stage1-embedded" else None
        funnel = build_stage1(pool, model, model, output, settings, embed, judge=model)
        assert _hash(output, funnel) == expected
        return
    videos = caption_videos(timelines, model, model, tmp_path / "scenes")
    if method == "stage2":
        settings2 = Stage2Settings(num_rows=150, seed=5)
        funnel = build_stage2(videos, model, model, output, settings2, judge=model)
    else:
        funnel = build_temporal(videos, model, model, output, TemporalSettings(num_rows=150, seed=5), judge=model)
    assert _hash(output, funnel) == expected
