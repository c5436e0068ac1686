"""Drafts over captioned videos, and what models that see no frame read of them, for methods that ask about scenes.

A real long video is a timeline of its scenes, see `captions.CaptionedVideo`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from longvpo_hf.building.method import Draft, what_rows_follow_from
from longvpo_hf.errors import ConfigError
from longvpo_hf.responders import Responder, identity

if TYPE_CHECKING:
    from longvpo_hf.captions import CaptionedVideo
    from longvpo_hf.funnel import Funnel

#: Fewest characters of a line that still says something.
_LINE_CHARACTERS = 40


def with_captions(videos: Sequence[CaptionedVideo], at_least: int, funnel: Funnel) -> list[CaptionedVideo]:
    """The videos with so many captioned scenes; the others are dropped.

    Raises:
        ConfigError: If none is left.
    """
    usable = []
    for video in videos:
        if len(video.captioned_scenes) >= at_least:
            usable.append(video)
        else:
            clip = video.timeline.clips[0]
            funnel.drop("too_few_captions", path=clip.path, source_id=clip.source_id, scenes=len(video.timeline))
    funnel.count("videos with captions", len(usable))
    if not usable:
        funnel.close()
        raise ConfigError(
            f"None of {len(videos)} videos has {at_least} captioned scenes or more. Lower the length of a scene, or "
            "look at the captions with longvpo inspect."
        )
    return usable


def follows_from(
    settings: Any, videos: Sequence[CaptionedVideo], question_writer: Responder, judge: Responder | None
) -> list[Any]:
    """What rows over captioned videos follow from besides their drafts; see `engine.build`."""
    summed_up = [video.history for video in videos if video.summaries]
    return [what_rows_follow_from(settings), identity(question_writer), identity(judge) if judge else "", summed_up]


class Rotation:
    """Drafts that go round the videos, each time in another order; a draft's `number` counts the times.

    Args:
        videos: The captioned videos.
        seed: Decides the orders.
        first: Number of the first time.
        step: From one time's number to the next: with as many rotations as this, no two give the same draft.
    """

    def __init__(self, videos: Sequence[CaptionedVideo], seed: int, first: int = 0, step: int = 1) -> None:
        self._videos = videos
        self._seed = seed
        self._first = first
        self._step = step
        self._drawn = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def order(self, number: int) -> Sequence[int]:
        """In which order the videos come the given time."""
        import numpy as np

        if self._order[0] != number:
            drawn = np.random.default_rng([self._seed, number]).permutation(len(self._videos))
            self._order = (number, drawn.tolist())
        return self._order[1]

    def __call__(self, round_index: int, missing: int) -> Iterator[list[Draft]]:
        """As many drafts as rows are missing, going on where the round before stopped."""
        drawn, self._drawn = self._drawn, self._drawn + missing  # at once: who takes all drafts may not ask for more
        for place in range(drawn, drawn + missing):
            times, position = divmod(place, len(self._videos))
            number = self._first + self._step * times
            yield [Draft(self._videos[self.order(number)[position]].timeline, number=number)]


def evidence_captions(draft: Draft) -> list[str]:
    """Captions of the evidence, or of all scenes where no scene stands out, a line each."""
    scenes = draft.evidence or range(len(draft.timeline))
    captions = ((scene, draft.timeline.clips[scene].caption) for scene in scenes)
    return [f"Scene #{scene}: {caption}" for scene, caption in captions if caption]


def within(lines: Sequence[str], most: int) -> list[str]:
    """The lines, cut so that together they have at most so many characters; a spread of them where they are many."""
    if sum(len(line) + 1 for line in lines) <= most:
        return list(lines)
    number = max(1, min(len(lines), most // _LINE_CHARACTERS))
    spread = [lines[(2 * place + 1) * len(lines) // (2 * number)] for place in range(number)]
    return [line[: most // number - 1] for line in spread]
