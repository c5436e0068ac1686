"""Position bias (LongVPO, Fig. 1): how far from the question may a short video be, and still be understood?

Each short video's frames are inserted, in one block, at random places among a filler's, and its question is asked. The
result is accuracy by distance to the question with bootstrap confidence bands, next to the upper bound (the same
questions about the video alone), and one number for the dip: upper bound − middle third. It is written as
`position.json` and the curve `position.png`; a killed run continues where it was. A distance of d frames means that d
filler frames are between the video's last frame and the question.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from longvpo_hf.artifacts import whole_file, write_json
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.probes import (
    DoesNotFit,
    Filler,
    Journal,
    ProbeQuestion,
    as_it_is,
    ask,
    protocol_of,
    settings_of,
)
from longvpo_hf.responders import Request, Responder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Distances are summed up in so many equal parts, and in thirds.
_NUM_BINS = 10
_THIRDS = ("end", "middle", "begin")  # by distance to the question, which comes after the video
_RESAMPLES = 2000
#: Requests asked, and kept, at a time.
_CHUNK = 32
_COLOURS = ("#8a8f98", "#1f6feb", "#c0392b", "#2e8b57", "#8e44ad")


def probe_position(
    responder: Responder,
    questions: Sequence[ProbeQuestion],
    filler: Filler,
    num_frames: int,
    placements: int,
    output: Path,
    seed: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Asks every question without any filler, and at `placements` random places.

    Args:
        responder: Answers; its sampler must grant `num_frames`.
        questions: About short videos.
        filler: What surrounds them.
        num_frames: Frames of the whole video, the short one's among them.
        placements: Random places for each question; over all questions they are spread evenly.
        output: Folder of the results.
        seed: Draws the places and the resamples.
        facts: More of what the results depend on; see `settings_of`.

    Returns:
        What `position.json` holds.

    Raises:
        ValueError: If there are no questions, a video has no room in `num_frames`, or the folder holds another probe.
        DoesNotFit: If so many frames do not fit in memory.
    """
    if not questions or placements < 1:
        raise ConfigError(
            f"The position probe needs questions and placements ≥ 1, got {len(questions)} and {placements}."
        )
    for question in questions:
        if num_frames <= question.num_frames or num_frames % question.frames_per_clip:
            raise ConfigError(
                f"{num_frames} frames have no room for a video of {question.num_frames} frames in clips of "
                f"{question.frames_per_clip}; give more frames, in steps of a clip."
            )
    more = {**(facts or {}), "frames": num_frames, "placements": placements, "seed": seed}
    settings = settings_of("position", responder, questions, filler, more)
    journal = Journal(output / "position.journal.jsonl", settings)
    shares = _places(len(questions), placements, seed)
    trials = [(number, placement) for placement in range(-1, placements) for number in range(len(questions))]
    missing = [trial for trial in trials if str(trial) not in journal]
    with tqdm(
        total=len(trials), initial=len(trials) - len(missing), desc=f"places, {responder.name}", unit="question"
    ) as bar:
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            requests, distances = [], []
            for number, placement in chunk:
                share = None if placement < 0 else shares[number, placement]
                request, distance = _request(questions[number], filler, num_frames, share)
                requests.append(request)
                distances.append(distance)
            try:
                verdicts = ask(responder, [questions[number] for number, _ in chunk], requests)
            except DoesNotFit as error:
                raise DoesNotFit(f"{num_frames} frames do not fit in memory ({error}); give fewer.") from error
            for trial, distance, verdict in zip(chunk, distances, verdicts, strict=True):
                journal[str(trial)] = [distance, int(verdict.right), int(verdict.parsed), int(verdict.cut_off)]
            bar.update(len(chunk))
    values = np.array([journal[str(trial)] for trial in trials], dtype=float)
    table = values.reshape(placements + 1, len(questions), 4).transpose(1, 0, 2)  # [question, placement, value]
    longest = max(num_frames - question.num_frames for question in questions)
    result = {
        **settings,
        **summary(table[:, 0, 1], table[:, 1:, 0] / longest, table[:, 1:, 1], seed),
        "longest_distance_frames": longest,
        "protocol": protocol_of(settings, str(num_frames), placements).json(),
        "unparsed_percent": round(100 * float(1 - table[:, :, 2].mean()), 2),
        "cut_off_percent": round(100 * float(table[:, :, 3].mean()), 2),
        "alone": [int(right) for right in table[:, 0, 1]],
        "trials": [
            {"question": number, "distance_frames": int(table[number, place, 0]), "right": int(table[number, place, 1])}
            for number in range(len(questions))
            for place in range(1, placements + 1)
        ],
    }
    write_json(output / "position.json", result)
    with whole_file(output / "position.png") as file:
        plot_position({responder.name: result}).savefig(file, format="png", dpi=150)
    return result


def _places(num_questions: int, placements: int, seed: int) -> NDArray[np.float64]:
    """Shares of the filler that stand before each question's video: in [0, 1), spread evenly, `[Q, placements]`."""
    rng = np.random.default_rng(seed)
    number = num_questions * placements
    return ((rng.permutation(number) + rng.random(number)) / number).reshape(num_questions, placements)


def _request(question: ProbeQuestion, filler: Filler, num_frames: int, share: float | None) -> tuple[Request, int]:
    """The request about the video at a place (None: alone), and its distance to the question in frames."""
    if share is None:
        return question.laid_among((), 0), 0
    others = filler.clips(question, num_frames // question.frames_per_clip - len(question.clips))
    place = int(share * (len(others) + 1))
    return question.laid_among(others, place), (len(others) - place) * question.frames_per_clip


def summary(
    alone: NDArray[np.float64], distances: NDArray[np.float64], right: NDArray[np.float64], seed: int
) -> dict[str, Any]:
    """Upper bound, curve, thirds and dip, each in percent with its 95 % band.

    Bands are percentiles of a bootstrap over questions: all answers to a question are drawn together.

    Args:
        alone: Whether each question was answered right about its video alone, `[Q]`.
        distances: Distance of each placement to the question, as a share of the longest, `[Q, P]`.
        right: Whether it was answered right there, `[Q, P]`.
        seed: Draws the resamples.
    """
    num_questions = len(alone)
    draws = np.random.default_rng([seed, 1]).multinomial(
        num_questions, np.full(num_questions, 1 / num_questions), size=_RESAMPLES
    )
    weights = np.vstack([np.ones(num_questions), draws])  # the first row is what was measured

    def shares(hits: NDArray[np.float64], numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            return 100 * (weights @ hits) / (weights @ numbers)

    def within(low: float, high: float) -> tuple[NDArray[np.float64], int]:
        inside = (distances >= low) & ((distances < high) | (high == 1))
        return shares((right * inside).sum(axis=1), inside.sum(axis=1).astype(float)), int(inside.sum())

    upper = shares(alone, np.ones(num_questions))
    curve = []
    for part in range(_NUM_BINS):
        low, high = part / _NUM_BINS, (part + 1) / _NUM_BINS
        values, number = within(low, high)
        curve.append({"from_share": low, "to_share": high, "number": number, **_banded(values)})
    thirds = {name: within(part / 3, (part + 1) / 3) for part, name in enumerate(_THIRDS)}
    return {
        "upper_bound": {"number": num_questions, **_banded(upper)},
        "curve": curve,
        "thirds": {name: {"number": number, **_banded(values)} for name, (values, number) in thirds.items()},
        "dip": _banded(upper - thirds["middle"][0]),
    }


def _banded(values: NDArray[np.float64]) -> dict[str, Any]:
    """The measured value, which comes first, and the band of the resampled ones; None where nothing was measured."""
    if np.isnan(values[0]):
        return {"percent": None, "band_95": None}
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"percent": round(float(values[0]), 2), "band_95": [round(float(low), 2), round(float(high), 2)]}


def plot_position(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The curves of one or more results, by the label each gets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, result), colour in zip(results.items(), itertools.cycle(_COLOURS), strict=False):
        label = as_it_is(name)
        longest = result["longest_distance_frames"]
        parts = [part for part in result["curve"] if part["percent"] is not None]
        middles = [longest * (part["from_share"] + part["to_share"]) / 2 for part in parts]
        lows, highs = zip(*[part["band_95"] for part in parts], strict=True)
        axes.fill_between(middles, lows, highs, color=colour, alpha=0.2, linewidth=0)
        dip, band = result["dip"]["percent"], result["dip"]["band_95"]
        dipped = "no answer in the middle" if dip is None else f"dip {dip:.0f} points ({band[0]:.0f} to {band[1]:.0f})"
        axes.plot(
            middles,
            [part["percent"] for part in parts],
            "o-",
            color=colour,
            label=f"{label}: {dipped}",
        )
        upper = result["upper_bound"]["percent"]
        axes.axhline(upper, color=colour, linestyle="--", linewidth=1, label=f"{label}: video alone, {upper:.0f} %")
    first = next(iter(results.values()))
    longest = first["longest_distance_frames"]
    axes.axvspan(longest / 3, 2 * longest / 3, color="black", alpha=0.04, linewidth=0, label="middle third")
    axes.set(xlabel="distance to the question (frames)", ylabel="right answers (%)", ylim=(0, 104), xlim=(0, longest))
    title = f"A short video among {first['filler']}, {first['frames']} frames in all"
    axes.set_title(as_it_is(title), fontsize=10)
    axes.legend(fontsize=8, loc="best")
    axes.grid(alpha=0.3)
    return figure
