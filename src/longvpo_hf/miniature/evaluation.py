"""Accuracy of a model in the miniature's world, by number of clips and by where the anchor stands.

Takes clips no training phase saw and a responder; gives counts of right answers with confidence intervals. An answer is
right if it is the anchor's colour, to the letter. Knows nothing of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longvpo_hf.miniature.world import SHAPE_COLOURS, WorldClip
from longvpo_hf.responders import Request, Responder
from longvpo_hf.timeline import Timeline

CHANCE_PERCENT = 100 / len(SHAPE_COLOURS)
POSITIONS = ("begin", "middle", "end")


@dataclass(frozen=True, slots=True)
class Question:
    """One evaluation question.

    Args:
        timeline: What is shown.
        anchor: Index of the clip that is asked about; no other clip has its marker.
        text: The question.
        answer: The truth.
    """

    timeline: Timeline
    anchor: int
    text: str
    answer: str

    @property
    def position(self) -> str:
        """Third of the timeline in which the anchor's middle lies."""
        return POSITIONS[min(2, int(self.timeline.centre(self.anchor) * 3))]


def make_questions(clips: Sequence[WorldClip], num_clips: int, number: int, seed: int) -> list[Question]:
    """`number` questions about timelines of `num_clips` clips, the anchors spread evenly over the positions.

    Raises:
        ValueError: If the pool cannot fill such a timeline.
    """
    rng = np.random.default_rng([seed, num_clips])
    places = (rng.permutation(number) + rng.random(number)) / number
    questions = []
    for place in places:
        order = rng.permutation(len(clips))
        asked = clips[order[0]]
        others = [clips[i] for i in order[1:] if clips[i].marker != asked.marker][: num_clips - 1]
        if len(others) < num_clips - 1:
            raise ValueError(
                f"A pool of {len(clips)} clips has only {len(others)} without the marker {asked.marker}; "
                f"timelines of {num_clips} clips need {num_clips - 1}."
            )
        anchor = int(place * num_clips)
        members = [*others[:anchor], asked, *others[anchor:]]
        questions.append(
            Question(Timeline(tuple(member.clip for member in members)), anchor, asked.question, asked.colour)
        )
    return questions


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of a number of questions.

    Args:
        right: How many were right.
        number: Of how many.
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
        z, p, n = 1.959964, self.right / self.number, self.number
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return 100 * (centre - half), 100 * (centre + half)


@dataclass(frozen=True, slots=True)
class LengthScore:
    """Scores at one number of clips.

    Args:
        overall: All questions.
        by_position: By third of the timeline the anchor stands in; thirds without a question are left out.
    """

    overall: Score
    by_position: dict[str, Score]


def score(responder: Responder, questions: Sequence[Question]) -> LengthScore:
    """Asks all questions."""
    answers = responder.respond([Request(question.text, question.timeline) for question in questions])
    right = [answer == question.answer for answer, question in zip(answers, questions, strict=True)]
    by_position = {}
    for position in POSITIONS:
        hits = [hit for hit, question in zip(right, questions, strict=True) if question.position == position]
        if hits:
            by_position[position] = Score(sum(hits), len(hits))
    return LengthScore(Score(sum(right), len(right)), by_position)
