"""Clips, timelines and views: spans on two named clocks, and errors that say value, bound and remedy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longvpo_hf.timeline import Clip, Origin, Timeline, View, clip_indices


def make_timeline(*durations_seconds: float) -> Timeline:
    return Timeline(tuple(Clip(f"{i}.mp4", 10.0 * i, 10.0 * i + d) for i, d in enumerate(durations_seconds)))


def test_a_clip_is_a_span_of_source_seconds() -> None:
    assert Clip("a.mp4", 1.5, 4.0).duration_seconds == 2.5


def test_a_clip_cut_into_a_file_of_its_own_knows_where_in_the_source_it_was() -> None:
    assert Clip("a.mp4", 1.5, 4.0, source_id="film").origin == Origin("film", 1.5, 4.0)
    cut = Clip("cut.mp4", 0.5, 2.0, source_id="film", source_start_seconds=63.0)
    assert cut.origin == Origin("film", 63.0, 64.5)
    assert Clip("a.mp4", 1.5, 4.0, source_start_seconds=1.5) == Clip("a.mp4", 1.5, 4.0)


@pytest.mark.parametrize(
    ("path", "start", "end", "message"),
    [
        ("", 0.0, 1.0, "needs the path of its source file, got ''"),
        ("a.mp4", -0.1, 1.0, r"start_seconds of a clip must be finite and ≥ 0, got -0.1 \(a.mp4\)"),
        ("a.mp4", 0.0, math.inf, r"end_seconds of a clip must be finite and ≥ 0, got inf \(a.mp4\)"),
        ("a.mp4", math.nan, 1.0, "start_seconds of a clip must be finite and ≥ 0, got nan"),
        ("a.mp4", 2.0, 2.0, r"end_seconds must be > start_seconds = 2.0, got 2.0 \(a.mp4\)"),
        ("a.mp4", 2.0, 1.0, "end_seconds must be > start_seconds = 2.0, got 1.0"),
    ],
)
def test_a_clip_that_is_none_is_refused(path: str, start: float, end: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clip(path, start, end)


def test_the_timeline_has_its_own_clock() -> None:
    timeline = make_timeline(2.0, 0.5, 3.5)
    assert len(timeline) == 3
    assert timeline.duration_seconds == 6.0
    assert timeline.starts_timeline_seconds == (0.0, 2.0, 2.5)
    # middles at 1, 2.25 and 4.25 of 6 seconds
    assert [timeline.centre(i) for i in range(3)] == pytest.approx([1 / 6, 2.25 / 6, 4.25 / 6])


def test_a_timeline_needs_a_clip() -> None:
    with pytest.raises(ValueError, match="needs at least one clip, got none"):
        Timeline(())
    with pytest.raises(ValueError, match=r"clip index must be in \[0, 2\), got 2"):
        make_timeline(1.0, 1.0).centre(2)


@pytest.mark.parametrize(
    ("view", "seen", "text"),
    [
        (View.whole(), (0, 1, 2, 3), "whole"),
        (View.only([3, 1, 1]), (1, 3), "only(1,3)"),
        (View.without([0, 2]), (1, 3), "without(0,2)"),
        (View.without([]), (0, 1, 2, 3), "whole"),
        (View.sparse(8), (0, 1, 2, 3), "sparse(8)"),
    ],
)
def test_views(view: View, seen: tuple[int, ...], text: str) -> None:
    timeline = make_timeline(1, 2, 3, 4)
    assert view.indices(4) == seen
    assert view.of(timeline).clips == tuple(timeline.clips[i] for i in seen)
    assert str(view) == text


def test_only_and_without_part_a_timeline() -> None:
    """Whatever is asked: each clip is in exactly one of the two, in timeline order."""
    rng = random.Random(0)
    for _ in range(100):
        length = rng.randrange(2, 12)
        named = rng.sample(range(length), rng.randrange(1, length))
        kept, rest = View.only(named).indices(length), View.without(named).indices(length)
        assert sorted(kept + rest) == list(range(length))
        assert list(kept) == sorted(named)
        assert list(rest) == sorted(rest)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View(keep=(0,), drop=(1,)), r"either keeps or drops clips, got keep=\(0,\) and drop=\(1,\)"),
        (lambda: View.only([]), r"must keep at least one clip, got keep=\(\). Use View.whole"),
        (lambda: View.sparse(0), "num_frames of a view must be ≥ 1, got 0"),
        (lambda: View.only([4]).indices(4), r"clip of a view must be in \[0, 4\), got 4"),
        (lambda: View.without([-1]).indices(4), r"clip of a view must be in \[0, 4\), got -1"),
        (lambda: View.without([0, 1]).indices(2), r"without clips \(0, 1\) leaves nothing of a timeline of 2 clips"),
        (lambda: clip_indices([0, 7], "evidence", 3), r"evidence must be in \[0, 3\), got 7"),
    ],
)
def test_a_view_that_shows_nothing_or_what_is_not_there(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


#: As callers without a type checker have them: what they give is checked when the program runs.
any_clip: Any = Clip
any_timeline: Any = Timeline
any_view: Any = View


def test_what_is_equal_is_equal_whoever_made_it() -> None:
    """Numbers of NumPy, whole seconds, lists, generators and `pathlib` make the same clips, timelines and views."""
    clip = Clip("a.mp4", 1.0, 3.0, source_start_seconds=4.0)
    for made in (
        any_clip(Path("a.mp4"), 1, 3, source_start_seconds=4),
        any_clip("a.mp4", np.float32(1), np.int64(3), source_start_seconds=np.float64(4)),
    ):
        assert made == clip
        assert hash(made) == hash(clip)
        assert [type(value) for value in (made.path, made.start_seconds, made.end_seconds)] == [str, float, float]
    timeline = Timeline((clip, clip))
    for clips in ([clip, clip], iter([clip, clip]), (clip for _ in range(2))):
        assert any_timeline(clips) == timeline
        assert len(timeline.clips) == 2
    view = View.only((0, 2))
    for named in ([2, 0], np.array([0, 2]), range(0, 3, 2)):
        assert View.only(named) == view
        assert str(View.only(named)) == "only(0,2)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: any_clip(None, 0, 1), "needs the path of its source file, got None"),
        (lambda: any_clip(b"a.mp4", 0, 1), "needs the path .* got b'a.mp4'"),
        (lambda: any_clip("a.mp4", "0", 1), "start_seconds of a clip must be .* got '0'"),
        (lambda: any_clip("a.mp4", 0, None), "end_seconds of a clip must be .* got None"),
        (lambda: any_timeline("a.mp4"), "made of clips, got 'a'"),
        (lambda: any_timeline(Clip("a.mp4", 0, 1)), "must be a tuple of clips, got Clip"),
        (lambda: any_view.only([0.0]), "clip of a view must be a whole number, got 0.0"),
        (lambda: any_view(keep=3), "clip of a view must be whole numbers, got 3"),
        (lambda: clip_indices([True], "evidence"), "evidence must be a whole number, got True"),
    ],
)
def test_what_is_no_clip_time_or_index_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
