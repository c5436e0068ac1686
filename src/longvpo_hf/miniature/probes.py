"""Questions and distractors of the miniature's world for the needle and the position probe.

The miniature's models are asked in the language they were trained in; any other model is asked in plain English, with
eight options.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.longvideo_mcq.answers import LETTERS
from longvpo_hf.evaluation.probes import ProbeQuestion
from longvpo_hf.miniature.language import Language
from longvpo_hf.miniature.settings import FRAMES_PER_CLIP
from longvpo_hf.miniature.world import MARKERS, SHAPE_COLOURS, WorldClip
from longvpo_hf.timeline import Clip


def world_questions(
    clips: Sequence[WorldClip],
    number: int,
    seed: int,
    *,
    language: Language | None,
    frames_per_clip: int = FRAMES_PER_CLIP,
) -> list[ProbeQuestion]:
    """A question about each of `number` clips, drawn at random.

    Args:
        clips: The world's clips.
        number: Number of questions.
        seed: Draws the clips.
        language: That of the miniature's model that is asked; None for any other model, asked in plain English with
            options.
        frames_per_clip: 1 where the clips come among other things than clips of a world.

    Raises:
        ConfigError: If there are too few clips.
    """
    if not 1 <= number <= len(clips):
        raise ConfigError(f"A world of {len(clips)} clips gives 1 to {len(clips)} questions, got {number}.")
    drawn = [clips[i] for i in np.random.default_rng([seed, 2]).permutation(len(clips))[:number]]
    if language is None:
        return [_in_plain_english(item, frames_per_clip) for item in drawn]
    asked = [(language.question(item.marker), language.answer(item.colour)) for item in drawn]
    return [
        ProbeQuestion((item.clip,), *texts, frames_per_clip=frames_per_clip)
        for item, texts in zip(drawn, asked, strict=True)
    ]


def _in_plain_english(item: WorldClip, frames_per_clip: int) -> ProbeQuestion:
    colours = tuple(SHAPE_COLOURS)
    letters = LETTERS[: len(colours)]
    options = [f"{letter}. {colour}" for letter, colour in zip(letters, colours, strict=True)]
    text = "\n".join(
        [
            f"One scene of this video shows a coloured shape on a {item.wall} wall inside a frame of {item.frame}. "
            "What colour is the shape in that scene?",
            *options,
            "Answer with the option's letter only.",
        ]
    )
    return ProbeQuestion((item.clip,), text, letters[colours.index(item.colour)], letters, frames_per_clip)


class WorldFiller:
    """Other clips of the world, none with the marker that the question names.

    Args:
        clips: The world's clips.
        seed: Decides their order, which differs between questions. Longer videos start with the clips of shorter ones.
    """

    def __init__(self, clips: Sequence[WorldClip], seed: int) -> None:
        self._clips = clips
        self._seed = seed
        self._index = {item.clip: index for index, item in enumerate(clips)}

    @property
    def name(self) -> str:
        """See `Filler.name`."""
        return f"other clips of the miniature's world (of {len(self._clips)}, seed {self._seed})"

    def clips(self, question: ProbeQuestion, number: int) -> Sequence[Clip]:
        """See `Filler.clips`."""
        index = self._index[question.clips[0]]
        marker = self._clips[index].marker
        order = np.random.default_rng([self._seed, index]).permutation(len(self._clips))
        others = [self._clips[i].clip for i in order if self._clips[i].marker != marker][:number]
        if len(others) < number:
            raise ConfigError(
                f"A world of {len(self._clips)} clips has {len(others)} without the marker {marker}, and {number} are "
                "asked for; give fewer frames or a larger world."
            )
        return others


def clips_needed(num_frames: int) -> int:
    """A number of clips that fills a video of so many frames, whatever the question."""
    # On average, one clip in as many as there are markers has the question's; three times as many are practically sure.
    return -(-num_frames // FRAMES_PER_CLIP) * (len(MARKERS) + 3) // len(MARKERS) + 64
