"""What a report shows of measurements: every model beside the others, differences with their certainty."""

from __future__ import annotations

import json
from pathlib import Path

from longvpo_hf.studies.report.measured import _benchmarks, _needle, _position
from longvpo_hf.studies.report.sections import clock, percent


def test_benchmarks_stand_side_by_side_with_paired_differences(tmp_path: Path) -> None:
    rights = {"before": [1] * 30 + [0] * 30, "after Stage 1": [1] * 50 + [0] * 10}
    folders = {}
    for label, right in rights.items():
        folder = folders[label] = tmp_path / label
        answers = folder / "answers" / "model-64"
        answers.mkdir(parents=True)
        score = 100 * sum(right) / len(right)
        task = {"overall": score, "n": 60, "unparsed": 0.0, "groups": {}}
        found = {"model": label, "stage": None, "num_frames": 64, "tasks": {"lvbench": task}}
        (folder / "model-64.json").write_text(json.dumps(found), encoding="utf-8")
        shared = {"task": "t", "answer": "A", "group": "", "facts": {}}
        lines = [
            json.dumps({**shared, "row": n, "video": f"v{n}", "score": 100.0 * hit}) for n, hit in enumerate(right)
        ]
        (answers / "lvbench.jsonl").write_text("\n".join(lines), encoding="utf-8")
    section = _benchmarks(folders)
    scores = section.tables[0]
    assert list(scores.header) == ["benchmark", "base, measured", "Stage 1, measured"]
    assert scores.lines[0][1:] == ("50.0", "83.3")
    ((suite, compared, points, interval, p_value, conclusion),) = section.tables[1].lines
    assert (suite, compared, points, conclusion) == ("LVBench", "Stage 1 − base", "+33.3", "a difference")
    low, high = (float(bound) for bound in interval.split(" … "))
    assert 0 < low < 33.3 < high
    assert float(p_value) < 0.001


def test_needles_have_the_certainty_of_their_number_and_not_of_their_depths(tmp_path: Path) -> None:
    cell = {"frames": 64, "number": 10, "unparsed": 0, "interval_95": [0, 0]}
    cells = [{**cell, "depth_percent": depth, "right": 5, "percent": 50.0} for depth in (0.0, 50.0, 100.0)]
    result = {"model": "m", "filler": "black", "questions": 10, "frames": [64], "depths_percent": [0.0, 50.0, 100.0]}
    (tmp_path / "needle.json").write_text(json.dumps({**result, "cells": cells, "stopped": None}), encoding="utf-8")
    section = _needle({"before": tmp_path})
    # 5 of 10, Wilson by hand: centre 0.5, half 1.96·√(0.025 + 0.0096)/1.384 = 0.263.
    assert section.tables[0].lines == [("before", "50.0 (24–76)")]


def test_positions_are_given_with_their_bands(tmp_path: Path) -> None:
    part = {"number": 4, "percent": 50.0, "band_95": [25.0, 75.0]}
    nothing = {"number": 0, "percent": None, "band_95": None}
    curve = [{"from_share": 0.0, "to_share": 0.1, **part}]
    thirds = {"begin": part, "middle": nothing, "end": part}
    result = {"upper_bound": part, "thirds": thirds, "dip": {"percent": None, "band_95": None}, "curve": curve}
    more = {"filler": "black frames", "frames": 16, "longest_distance_frames": 14}
    (tmp_path / "position.json").write_text(json.dumps({**result, **more}), encoding="utf-8")
    section = _position({"before": tmp_path, "after Stage 1": tmp_path})
    assert section.tables[0].lines[1] == ("after Stage 1", "50.0 (25–75)", "50.0 (25–75)", "–", "50.0 (25–75)", "–")
    assert section.pictures[0].png.startswith(b"\x89PNG")


def test_numbers_and_places_as_people_read_them() -> None:
    assert percent(8.333, (1.4, 35.4)) == "8.3 (1–35)"
    assert [clock(seconds) for seconds in (0, 4, 65.5, 59.96, 7384)] == ["0:00", "0:04", "1:05.5", "1:00", "2:03:04"]
