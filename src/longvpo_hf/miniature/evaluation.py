"""Accuracy of a model in the miniature's world: about one clip and about two, by number of clips and by position.

An answer is right if it equals the truth, to the letter. Counts come with confidence intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.longvideo_mcq.answers import wilson_interval
from longvpo_hf.miniature.language import Language
from longvpo_hf.miniature.world import SHAPE_COLOURS, WorldClip
from longvpo_hf.responders import Request, Responder
from longvpo_hf.timeline import Timeline

CHANCE_PERCENT = 100 / len(SHAPE_COLOURS)
#: Of both colours of a pair of clips, which are never the same.
PAIR_CHANCE_PERCENT = 100 / (len(SHAPE_COLOURS) * (len(SHAPE_COLOURS) - 1))
POSITIONS = ("begin", "middle", "end")


@dataclass(frozen=True, slots=True)
class Question:
    """One evaluation question.

    Args:
        timeline: What is shown.
        asked: Indices of the clips that are asked about; no other clip has their markers.
        text: The question.
        answer: The truth.
    """

    timeline: Timeline
    asked: tuple[int, ...]
    text: str
    answer: str

    @property
    def position(self) -> str:
        """Third of the timeline in which the middle of the first clip that is asked about lies."""
        return POSITIONS[min(2, int(self.timeline.centre(self.asked[0]) * 3))]


def make_questions(
    clips: Sequence[WorldClip], num_clips: int, number: int, seed: int, language: Language
) -> list[Question]:
    """`number` questions about one clip of `num_clips`; these clips are spread evenly over the positions.

    Raises:
        ConfigError: If the pool cannot fill such a timeline.
    """
    rng = np.random.default_rng([seed, num_clips])
    places = (rng.permutation(number) + rng.random(number)) / number
    questions = []
    for place in places:
        order = rng.permutation(len(clips))
        asked = clips[order[0]]
        position = int(place * num_clips)
        timeline = _timeline(clips, order[1:].tolist(), num_clips, {position: asked})
        questions.append(
            Question(timeline, (position,), language.question(asked.marker), language.answer(asked.colour))
        )
    return questions


def make_pair_questions(
    clips: Sequence[WorldClip], num_clips: int, number: int, seed: int, language: Language
) -> list[Question]:
    """`number` questions about two clips of `num_clips`, at random positions, of different colours.

    Raises:
        ConfigError: If `num_clips` < 2, or the pool cannot fill such a timeline.
    """
    if num_clips < 2:
        raise ConfigError(f"Questions about two clips need num_clips ≥ 2, got {num_clips}.")
    rng = np.random.default_rng([seed, num_clips, 2])
    questions: list[Question] = []
    while len(questions) < number:
        order = rng.permutation(len(clips))
        first, second = (clips[index] for index in order[:2])
        if first.marker == second.marker or first.colour == second.colour:
            continue
        places = tuple(int(place) for place in rng.choice(num_clips, size=2, replace=False))
        timeline = _timeline(clips, order[2:].tolist(), num_clips, dict(zip(places, (first, second), strict=True)))
        text = language.pair_question(first.marker, second.marker)
        questions.append(Question(timeline, places, text, language.pair_answer(first.colour, second.colour)))
    return questions


def _timeline(
    clips: Sequence[WorldClip], order: Sequence[int], num_clips: int, asked: dict[int, WorldClip]
) -> Timeline:
    """A timeline with the asked clips at their positions, and clips of other markers, in this order, at all others."""
    markers = {clip.marker for clip in asked.values()}
    missing = num_clips - len(asked)
    others = [clips[index] for index in order if clips[index].marker not in markers][:missing]
    if len(others) < missing:
        raise ConfigError(
            f"A pool of {len(clips)} clips has only {len(others)} without the markers {sorted(markers)}; "
            f"timelines of {num_clips} clips need {missing}."
        )
    rest = iter(others)
    members = [asked[position] if position in asked else next(rest) for position in range(num_clips)]
    return Timeline(tuple(member.clip for member in members))


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers among a number of questions.

    Args:
        right: Number of right answers.
        number: Number of questions.
    """

    right: int
    number: int

    @property
    def percent(self) -> float:
        """Accuracy in percent."""
        return 100 * self.right / self.number

    @property
    def interval_percent(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval, in percent."""
        low, high = wilson_interval(self.right, self.number)
        return 100 * low, 100 * high


@dataclass(frozen=True, slots=True)
class LengthScore:
    """Scores at one number of clips.

    Args:
        overall: All questions.
        by_position: By third of the timeline that the anchor is in; thirds without a question are left out.
    """

    overall: Score
    by_position: dict[str, Score]


def score(responder: Responder, questions: Sequence[Question]) -> LengthScore:
    """Asks all questions, and counts right answers."""
    answers = responder.respond([Request(question.text, question.timeline) for question in questions])
    right = [answer == question.answer for answer, question in zip(answers, questions, strict=True)]
    by_position = {}
    for position in POSITIONS:
        hits = [hit for hit, question in zip(right, questions, strict=True) if question.position == position]
        if hits:
            by_position[position] = Score(sum(hits), len(hits))
    return LengthScore(Score(sum(right), len(right)), by_position)
