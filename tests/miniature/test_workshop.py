"""What the miniature's measures are made of: questions, places, intervals."""

from __future__ import annotations

import pytest

from longvpo_hf.miniature.evaluation import Score, make_pair_questions, make_questions
from longvpo_hf.miniature.language import WORDS
from longvpo_hf.miniature.world import WorldClip, write_world


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[WorldClip]:
    """A world."""
    return write_world(tmp_path_factory.mktemp("world"), 256, seed=3)


def test_questions_are_answerable_and_anchors_spread(clips: list[WorldClip]) -> None:
    by_clip = {item.clip: item for item in clips}
    questions = make_questions(clips, num_clips=8, number=40, seed=1, language=WORDS)
    anchors = [question.asked[0] for question in questions]
    assert {anchors.count(place) for place in range(8)} == {5}
    for question in questions:
        asked = by_clip[question.timeline.clips[question.asked[0]]]
        others = [by_clip[clip] for i, clip in enumerate(question.timeline.clips) if i != question.asked[0]]
        assert question.answer == asked.colour
        assert asked.marker in question.text
        assert asked.marker not in {other.marker for other in others}


def test_pair_questions_are_answerable_and_ask_in_either_order(clips: list[WorldClip]) -> None:
    by_clip = {item.clip: item for item in clips}
    questions = make_pair_questions(clips, num_clips=8, number=60, seed=1, language=WORDS)
    assert 15 < sum(question.asked[0] < question.asked[1] for question in questions) < 45
    assert {place for question in questions for place in question.asked} == set(range(8))
    for question in questions:
        first, second = (by_clip[question.timeline.clips[place]] for place in question.asked)
        markers = [by_clip[clip].marker for clip in question.timeline.clips]
        assert markers.count(first.marker) == markers.count(second.marker) == 1
        assert question.text.index(first.marker) < question.text.index(second.marker)
        assert question.answer == f"{first.colour} {second.colour}"
        assert first.colour != second.colour
    with pytest.raises(ValueError, match="need num_clips ≥ 2, got 1"):
        make_pair_questions(clips, num_clips=1, number=1, seed=1, language=WORDS)


def test_interval_is_wilsons() -> None:
    # By hand: p = 0.9, n = 10, z = 1.96 -> centre (0.9 + 0.19207) / 1.38415 = 0.78898, half 0.19318.
    low, high = Score(9, 10).interval_percent
    assert low == pytest.approx(59.58, abs=0.01)
    assert high == pytest.approx(98.21, abs=0.01)
