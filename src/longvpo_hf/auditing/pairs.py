"""What an audit keeps of a row: its texts as words, and which rows hang together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from longvpo_hf.preference import VideoPreference
from longvpo_hf.publishing.rows import hang_together, source_key
from longvpo_hf.timeline import Clip

#: Longer texts are compared by their start.
_MAX_CHARACTERS = 4000
_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Pair:
    """The texts of a row.

    Args:
        id: Of the row.
        question: As words, in lower case; punctuation marks are words.
        chosen: The same of the chosen answer.
        rejected: The same of the rejected one.
        evidence: What the answer can be seen in: keys of clips.
    """

    id: str
    question: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    evidence: tuple[Hashable, ...]

    @classmethod
    def of(cls, row: VideoPreference) -> Pair:
        """The pair of a row."""
        clips = row.timeline.clips
        indices = row.evidence or range(len(clips))
        return cls(
            row.id,
            words(row.question),
            words(row.chosen),
            words(row.rejected),
            tuple(clip_key(clips[index]) for index in indices),
        )


def words(text: str) -> tuple[str, ...]:
    """The words and punctuation marks of a text in lower case."""
    return tuple(_WORDS.findall(text[:_MAX_CHARACTERS].casefold()))


def content_words(text: Sequence[str]) -> list[str]:
    """The words of a text without punctuation marks."""
    return [word for word in text if word[0].isalnum()]


def clip_key(clip: Clip) -> Hashable:
    """What two clips share if they are the same: their source and their span in it, to a tenth of a second."""
    origin = clip.origin
    return (source_key(clip), round(origin.start_seconds, 1), round(origin.end_seconds, 1))


def groups_of(pairs: Sequence[Pair]) -> list[int]:
    """A number for each pair; pairs that share evidence, directly or through others, have the same."""
    return hang_together([pair.evidence for pair in pairs])


def overlap(a: Iterable[str], b: Iterable[str]) -> float:
    """F1 of two texts as bags of words, from 0 to 1."""
    first, second = Counter(a), Counter(b)
    common = sum((first & second).values())
    return 2 * common / (first.total() + second.total()) if common else 0.0
