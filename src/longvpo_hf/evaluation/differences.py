"""Whether two models differ: paired by question, with the questions of one video kept together.

Two models that answer the same questions are compared question by question: what both get right or wrong says nothing
about their difference. Questions about one video are no independent samples, so a video is one draw (Miller 2024,
"Adding Error Bars to Evals", arXiv 2411.00640, sections 2.2 and 4).

The test swaps the two models' answers video by video: were the models equal, every such swap would be as likely as what
was measured. Where each video has one question that is right or wrong, it is McNemar's exact test.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from longvpo_hf.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: A difference counts as one below this p-value. A table holds a dozen differences or more: at the usual 0.05 every
#: other table of equal models would show one.
LEVEL = 0.01
#: How often a study of the number of questions that is named would find a difference of this size.
POWER = 0.8
#: Draws of the interval and, where there are too many videos to try every swap, of the test.
_DRAWS = 8_000
_MOST_VIDEOS_TO_TRY_ALL = 14
#: Of fewer videos the spread is not known well enough: intervals would be too narrow.
_FEWEST_VIDEOS = 10
_CHUNK = 500


class Unit(NamedTuple):
    """What a score is the mean of: a question, or what else a benchmark counts as one.

    Args:
        key: Which one, the same for all models.
        stratum: Means are taken within strata, and then over them; "" where there is one mean only.
        video: What it is about.
        score: Percent.
    """

    key: str
    stratum: str
    video: str
    score: float


@dataclass(frozen=True, slots=True)
class Difference:
    """What two models' answers to the same questions say about their difference.

    Args:
        points: Second minus first, in percentage points.
        interval: Where the difference of the models is with 99 % confidence, in points; None below 10 videos.
        p_value: Probability of a difference at least as large between equal models.
        mcnemar_p: That of McNemar's exact test, which takes all questions for independent; None where answers are not
            just right or wrong.
        only_first: Questions that the first model has more of: right where the second is wrong.
        only_second: Questions that the second has more of.
        num_units: Questions.
        num_videos: What they are about.
        detectable_points: The smallest difference that so many questions would probably show; None below 10 videos.
        needed: About how many questions, on as many per video, would probably show a difference of `points`; None
            where there is none, and below 10 videos.
    """

    points: float
    interval: tuple[float, float] | None
    p_value: float
    mcnemar_p: float | None
    only_first: int
    only_second: int
    num_units: int
    num_videos: int
    detectable_points: float | None
    needed: int | None

    @property
    def within_noise(self) -> bool:
        """Whether equal models could well have given these answers."""
        return self.p_value >= LEVEL

    @property
    def verdict(self) -> str:
        """What may be concluded, in a few words."""
        if not self.only_first and not self.only_second:
            return "none: every answer scores the same"
        if not self.within_noise:
            return "a difference"
        if self.num_videos < _FEWEST_VIDEOS:
            return "too few videos to tell"
        if self.needed is None:
            return "within noise"
        return f"within noise; about {self.needed:,} questions would show it"


def difference(first: Sequence[Unit], second: Sequence[Unit]) -> Difference:
    """Compares two models by their answers to the same questions.

    Args:
        first: Scores of the model that is compared with.
        second: Scores of the other, in any order.

    Raises:
        ConfigError: If they were not asked the same questions, or none.
    """
    import numpy as np

    units = sorted(first)
    others = {unit.key: unit for unit in second}
    same = len(others) == len(second) and {unit.key for unit in units} == others.keys()
    if not units or not same or any(unit[:3] != others[unit.key][:3] for unit in units):
        raise ConfigError(
            f"Only answers to the same questions can be compared; the models were asked {len(units)} and "
            f"{len(second)}, of which {len({unit.key for unit in units} & others.keys())} are the same."
        )
    changes = np.array([others[unit.key].score - unit.score for unit in units])  # [N]
    strata = _indices([unit.stratum for unit in units])
    videos = _indices([unit.video for unit in units])
    num_videos = int(videos.max()) + 1
    weights = 1.0 / (strata.max() + 1) / np.bincount(strata)[strata]  # of each unit in the score, [N]
    points = float(weights @ changes)
    error = _standard_error(changes, weights, strata, videos)
    z = NormalDist().inv_cdf(1 - LEVEL / 2) + NormalDist().inv_cdf(POWER)
    scores = {unit.score for unit in [*first, *second]}
    is_enough = num_videos >= _FEWEST_VIDEOS
    of_videos: NDArray[np.float64] = np.bincount(videos, weights * changes).astype(np.float64)
    only_first, only_second = int((changes < 0).sum()), int((changes > 0).sum())
    mcnemar_p = mcnemar(only_first, only_second) if scores <= {0.0, 100.0} else None
    is_mcnemar = mcnemar_p is not None and num_videos == len(units) and strata.max() == 0
    return Difference(
        points=points,
        interval=_interval(changes, strata, videos) if is_enough else None,
        p_value=mcnemar_p if mcnemar_p is not None and is_mcnemar else _swap_test(of_videos),
        mcnemar_p=mcnemar_p,
        only_first=only_first,
        only_second=only_second,
        num_units=len(units),
        num_videos=num_videos,
        detectable_points=z * error if is_enough else None,
        needed=math.ceil(len(units) * (z * error / points) ** 2) if is_enough and abs(points) > 1e-9 else None,
    )


def mean_score(units: Sequence[Unit]) -> float:
    """The mean over strata of the mean within each, in percent."""
    strata: defaultdict[str, list[float]] = defaultdict(list)
    for unit in units:
        strata[unit.stratum].append(unit.score)
    return math.fsum(math.fsum(scores) / len(scores) for scores in strata.values()) / len(strata)


def score_bounds(units: Sequence[Unit]) -> tuple[float, float] | None:
    """The 95 % bounds of a score, in percent: percentiles over videos that are drawn anew, with replacement.

    None below 10 videos, and where all units score the same, so that drawing them anew says nothing.

    Args:
        units: What it is the mean of.
    """
    import numpy as np

    if len({unit.video for unit in units}) < _FEWEST_VIDEOS or len({unit.score for unit in units}) == 1:
        return None
    videos = _indices([unit.video for unit in units])
    scores = np.array([unit.score for unit in units])  # [N]
    return _interval(scores, _indices([unit.stratum for unit in units]), videos, level=0.05)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test: how probable so uneven a split of the questions on which two models differ is, or a worse.

    Were the models equal, each such question would fall to one or the other like a fair coin.

    Args:
        only_first: Questions that only the first model has right.
        only_second: Questions that only the second has right.

    Returns:
        The two-sided p-value, 2 · Σ_{i ≤ min} C(n, i) / 2ⁿ, at most 1.
    """
    number = only_first + only_second
    tail = sum(math.comb(number, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**number)


def _indices(names: Sequence[str]) -> NDArray[np.intp]:
    """Each name's place among the different ones."""
    import numpy as np

    return np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)[1].reshape(-1)


def _standard_error(
    changes: NDArray[np.float64], weights: NDArray[np.float64], strata: NDArray[np.intp], videos: NDArray[np.intp]
) -> float:
    """Of the difference, in points: from the spread of whole videos around their stratum's mean."""
    import numpy as np

    means = np.bincount(strata, changes) / np.bincount(strata)
    spread = np.bincount(videos, weights * (changes - means[strata]))
    return float(np.sqrt(np.square(spread).sum() * len(spread) / max(1, len(spread) - 1)))


def _swap_test(changes: NDArray[np.float64]) -> float:
    """Share of all swaps of the models, video by video, that give a difference as large as the one measured.

    Args:
        changes: What each video adds to the difference, `[V]`.
    """
    import numpy as np

    changes = changes[np.abs(changes) > 1e-12]
    if not len(changes):
        return 1.0
    least = abs(changes.sum()) - 1e-9
    if len(changes) <= _MOST_VIDEOS_TO_TRY_ALL:
        swaps = (np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes))) & 1
        return float((np.abs((1 - 2 * swaps) @ changes) >= least).mean())
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(_DRAWS // _CHUNK):
        signs = 1.0 - 2.0 * rng.integers(0, 2, (_CHUNK, len(changes)), dtype=np.int8)
        hits += int((np.abs(signs @ changes) >= least).sum())
    return (hits + 1) / (_DRAWS + 1)


def _interval(
    changes: NDArray[np.float64], strata: NDArray[np.intp], videos: NDArray[np.intp], level: float = LEVEL
) -> tuple[float, float]:
    """Percentiles of the difference, or of a score, over videos that are drawn anew, with replacement."""
    import numpy as np

    shape = (int(videos.max()) + 1, int(strata.max()) + 1)
    cell = videos * shape[1] + strata
    sums = np.bincount(cell, changes, minlength=math.prod(shape)).reshape(shape)  # [V, S]
    counts = np.bincount(cell, minlength=math.prod(shape)).reshape(shape)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_DRAWS // _CHUNK):
        draws = rng.integers(0, shape[0], (_CHUNK, shape[0])) + np.arange(_CHUNK)[:, None] * shape[0]
        times = np.bincount(draws.reshape(-1), minlength=draws.size).reshape(
            draws.shape
        )  # how often each video is drawn
        times = times.astype(np.float64)
        drawn = times @ counts
        with np.errstate(invalid="ignore"):
            found.append(np.nanmean(np.where(drawn > 0, (times @ sums) / drawn, np.nan), axis=1))
    low, high = np.quantile(np.concatenate(found), [level / 2, 1 - level / 2])
    return float(low), float(high)
