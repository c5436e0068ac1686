"""Paired differences: against numbers worked out by hand, and how often equal models are called different."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from scipy.stats import bootstrap

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.differences import Unit, difference, mcnemar, mean_score, score_bounds


def units(scores: str, videos: str | None = None, strata: str | None = None) -> list[Unit]:
    """One unit for each letter of `scores`, `1` right and `0` wrong; each is of a video of its own unless told."""
    names = videos or "".join(chr(0x4E00 + i) for i in range(len(scores)))
    groups = strata or " " * len(scores)
    return [
        Unit(str(i), group.strip(), video, 100.0 * int(score))
        for i, (score, video, group) in enumerate(zip(scores, names, groups, strict=True))
    ]


def test_mcnemar_by_hand() -> None:
    # 10 questions tell the models apart, one of them for the first: 2 · (C(10,0) + C(10,1)) / 2^10.
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 1024)
    # All 5 for the second: 2 / 32.
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    # Evenly split, or nothing to split: no evidence at all.
    assert mcnemar(3, 3) == mcnemar(4, 3) == mcnemar(0, 0) == 1.0


def test_a_difference_by_hand() -> None:
    """20 questions of 20 videos: both right on 8, both wrong on 2, the first alone on 1, the second alone on 9."""
    first, second = units("1" * 8 + "0" * 2 + "1" + "0" * 9), units("1" * 8 + "0" * 2 + "0" + "1" * 9)
    found = difference(first, second)
    assert found.points == pytest.approx(100 * (17 - 9) / 20)
    assert (found.only_first, found.only_second) == (1, 9)
    assert found.p_value == found.mcnemar_p == pytest.approx(22 / 1024)
    assert found.within_noise
    # Changes: +100 nine times, -100 once, 0 ten times; their mean is 40, the sum of squared deviations
    # 9 · 60² + 140² + 10 · 40² = 68000, the standard error √(68000 / 19 / 20) = 13.377.
    error = math.sqrt(68_000 / 19 / 20)
    # z: 2.5758 for 99 % of both sides, 0.8416 for 80 % of one.
    assert found.detectable_points == pytest.approx((2.5758 + 0.8416) * error, rel=1e-4)
    assert found.needed == math.ceil(20 * ((2.5758 + 0.8416) * error / 40) ** 2) == 27
    assert found.verdict == "within noise; about 27 questions would show it"
    low, high = found.interval or (0, 0)
    assert low < 40 < high
    assert high - low == pytest.approx(2 * 2.5758 * error, rel=0.15)
    # The other way round everything is the other way round.
    back = difference(second, first)
    assert (back.points, back.only_first, back.p_value) == (-found.points, 9, found.p_value)


@pytest.mark.parametrize(("scores", "per_video"), [("1" * 70 + "0" * 30, 1), (("1" * 4 + "0" * 4) * 12, 4)])
def test_bounds_of_a_score_are_those_of_videos_drawn_anew(scores: str, per_video: int) -> None:
    """Against scipy's bootstrap over the videos' means; questions of one video agree, and are one draw."""
    videos = "".join(chr(0x4E00 + i // per_video) for i in range(len(scores)))
    found = score_bounds(units(scores, videos))
    means = np.array([100.0 * int(score) for score in scores]).reshape(-1, per_video).mean(axis=1)
    expected = bootstrap((means,), np.mean, method="percentile", rng=1).confidence_interval
    assert found == pytest.approx(tuple(expected), abs=1.5)
    alone = score_bounds(units(scores))
    assert alone is not None
    assert (found[1] - found[0]) / (alone[1] - alone[0]) == pytest.approx(math.sqrt(per_video), rel=0.1)


def test_a_score_of_few_videos_or_of_equal_answers_has_no_bounds() -> None:
    assert score_bounds(units("110101010")) is None
    assert score_bounds(units("1101010100")) is not None
    assert score_bounds(units("1" * 50)) is None
    assert score_bounds([]) is None


def test_questions_of_one_video_are_one_draw() -> None:
    """The same 12 questions, of which the second model alone has 10: as 12 videos, and as 3."""
    first, second = "1" + "0" * 11, "0" + "1" * 10 + "0"
    alone = difference(units(first), units(second))
    assert alone.p_value == pytest.approx(2 * (1 + 11) / 2**11)
    together = difference(units(first, "aaaabbbbcccc"), units(second, "aaaabbbbcccc"))
    # Videos add -1 + 3, 4 and 3 questions: of 8 ways to swap 3 videos, 2 give as much.
    assert together.p_value == pytest.approx(2 / 8)
    assert together.mcnemar_p == alone.p_value
    assert together.num_videos == 3
    assert together.interval is together.detectable_points is together.needed is None, "of three videos"
    assert together.verdict == "too few videos to tell"


def test_means_of_groups_are_compared_as_means_of_groups() -> None:
    first = units("1000", strata="aabb")
    second = units("1001", strata="aabb")
    assert mean_score(first) == pytest.approx((50 + 0) / 2)
    assert mean_score(units("100", strata="abb")) == pytest.approx((100 + 0) / 2)
    assert difference(first, second).points == pytest.approx((50 + 50) / 2 - 25)
    # A group of one question weighs as much as one of three.
    assert difference(units("0000", strata="abbb"), units("1000", strata="abbb")).points == pytest.approx(50)


def test_every_swap_is_as_likely_where_models_are_equal() -> None:
    """The test against all 2^V swaps, enumerated here, for random scores, videos and strata."""
    rng = random.Random(0)
    for _ in range(30):
        number = rng.randint(1, 9)
        videos = "".join(rng.choice("abcdef") for _ in range(number))
        strata = "".join(rng.choice("xy") for _ in range(number))
        first, second = (units("".join(rng.choice("01") for _ in range(number)), videos, strata) for _ in range(2))
        measured = abs(mean_score(second) - mean_score(first))
        names = sorted(set(videos))
        hits = 0
        for swapped in itertools.product((False, True), repeat=len(names)):
            chosen = {name for name, swap in zip(names, swapped, strict=True) if swap}
            one = [b if a.video in chosen else a for a, b in zip(first, second, strict=True)]
            other = [a if a.video in chosen else b for a, b in zip(first, second, strict=True)]
            hits += abs(mean_score(other) - mean_score(one)) >= measured - 1e-9
        found = difference(first, second)
        assert found.points == pytest.approx(mean_score(second) - mean_score(first))
        if len(names) < number or len(set(strata)) > 1:
            assert found.p_value == pytest.approx(hits / 2 ** len(names))


@pytest.mark.parametrize("per_video", [1, 4])
def test_copies_of_one_checkpoint_are_called_equal(per_video: int) -> None:
    """100 draws of two runs of one model with other seeds: at least 95 are within noise."""
    rng = random.Random(per_video)
    equal = 0
    for _ in range(100):
        # Easy and hard videos: answers about one video go together.
        chances = [rng.betavariate(2, 1) for _ in range(240 // per_video) for _ in range(per_video)]
        videos = [f"v{i // per_video}" for i in range(len(chances))]
        # Some runs fail on whole videos: what an independent-question test would take for a difference.
        runs = []
        for _ in range(2):
            mood = {video: rng.choice((0.2, 1.0)) for video in set(videos)}
            runs.append(
                [
                    Unit(str(i), "", video, 100.0 * (rng.random() < chance * mood[video]))
                    for i, (chance, video) in enumerate(zip(chances, videos, strict=True))
                ]
            )
        equal += difference(*runs).within_noise
    assert equal >= 95


def test_a_real_difference_of_enough_questions_is_found() -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(20):
        chances = [rng.random() for _ in range(1000)]
        first, second = (
            [Unit(str(i), "", f"v{i // 2}", 100.0 * (rng.random() < chance * (0.9 if weak else 1)))
             for i, chance in enumerate(chances)]
            for weak in (True, False)
        )  # fmt: skip
        found += not difference(first, second).within_noise
    assert found >= 8  # 5 points of 50 with 1,000 questions: the power is about 0.6


def test_the_same_answers_are_no_difference() -> None:
    same = difference(units("1010"), units("1010"))
    assert same.p_value == 1.0
    assert same.needed is None
    assert same.verdict == "none: every answer scores the same"
    assert difference(units("10" * 5), units("01" * 5)).verdict == "within noise"


def test_other_questions_are_refused() -> None:
    asked = units("101")
    for others in (asked[:2], [*asked, Unit("9", "", "v", 0.0)], [], [*asked, asked[0]], units("101", "abc")):
        with pytest.raises(ConfigError, match="Only answers to the same questions can be compared"):
            difference(asked, others)
    with pytest.raises(ConfigError, match="asked 0 and 0"):
        difference([], [])
