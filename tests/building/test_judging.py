"""Builds whose judge is read by probability: every method's verdicts; drops are logged with their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longvpo_hf.building.captioning import caption_videos
from longvpo_hf.building.judging import ByProbability
from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.errors import DatasetError
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.responders import Request, Responder, ScriptedResponder
from scenes import unfilmed

METHODS = ("stage1", "stage2", "temporal")


def build(method: str, folder: Path, judge: Responder) -> Path:
    timelines = [video.timeline for video in unfilmed(folder.parent / "media", [3, 5, 4, 6])]
    model, output = rehearsal(), folder / "rows"
    if method == "stage1":
        pool = [clip for timeline in timelines for clip in timeline.clips]
        build_stage1(pool, model, model, output, Stage1Settings(num_rows=20, max_clips=4), judge=judge)
        return output
    videos = caption_videos(timelines, model, model, folder / "rows.scenes")
    if method == "stage2":
        build_stage2(videos, model, model, output, Stage2Settings(num_rows=20), judge=judge)
    else:
        build_temporal(videos, model, model, output, TemporalSettings(num_rows=20), judge=judge)
    return output


def sure(request: Request, of_yes: str, of_no: str) -> str:
    """As probable as the rehearsal's word has it."""
    assert request.is_verdict
    assert request.rehearsed is not None
    return of_yes if request.rehearsed() == "Yes" else of_no


@pytest.mark.parametrize("method", METHODS)
def test_verdicts_by_probability_are_those_by_words(tmp_path: Path, method: str) -> None:
    by_words = build(method, tmp_path / "words", rehearsal())
    judge = ByProbability(ScriptedResponder("scripted", lambda request: sure(request, "0.3100", "0.2900")), 0.3)
    by_numbers = build(method, tmp_path / "numbers", judge)
    assert (by_numbers / "train.parquet").read_bytes() == (by_words / "train.parquet").read_bytes()
    assert "scripted, yes from a probability of 0.3 on" in (by_numbers / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_what_a_judge_drops_is_logged_with_its_probability(tmp_path: Path, method: str) -> None:
    judge = ByProbability(ScriptedResponder("scripted", lambda request: sure(request, "0.2900", "0.2900")), 0.3)
    with pytest.raises(DatasetError, match="No row came out"):
        build(method, tmp_path / "none", judge)
    drops = [json.loads(line) for line in (tmp_path / "none" / "rows.log" / "dropped.jsonl").read_text().splitlines()]
    judged = [drop["detail"] for drop in drops if "judge" in drop.get("detail", "")]
    assert judged
    assert all(detail.endswith("judge: No (0.2900)") for detail in judged)
