"""What is said about the miniature's world: questions, answers and captions, in one of two languages.

`WORDS` is for models that are trained from nothing: every question is a few words of a vocabulary of about a hundred,
an answer is one word or two. `SENTENCES` is for language models that know English. Both say the same things, so that
all that asks, answers, reads and judges in the world is written once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from longvpo_hf.miniature.world import FRAME_COLOURS, SHAPE_COLOURS, WALL_COLOURS, language_name

_NAMES = {"wall": WALL_COLOURS, "frame": FRAME_COLOURS, "colour": SHAPE_COLOURS}


@dataclass(frozen=True)
class Language:
    """A language, as forms with places for names of colours.

    Args:
        name: Its name, which a world keeps.
        marker: How a question names a clip, with places for `{wall}` and `{frame}`.
        ask_one: The question about a clip, which `{first}` names.
        ask_two: The question about two clips, which `{first}` and `{second}` name.
        say_one: The answer to the first, with a place for the colour `{first}`.
        say_two: The answer to the second, with places for the colours in the order of asking.
        caption_question: Asks about a single clip.
        description: The answer to that, with places for `{wall}`, `{frame}` and `{colour}`, in this order.
        max_answer_tokens: Room for the longest of these answers and its end; a model that says more is cut off.
    """

    name: str
    marker: str
    ask_one: str
    ask_two: str
    say_one: str
    say_two: str
    caption_question: str
    description: str
    max_answer_tokens: int

    # ------------------------------------------------------------------------------------------------------- saying

    def question(self, marker: str) -> str:
        """The question about the clip with this marker, as in `navy-gold`; the answer is `answer` of its colour."""
        return self.ask_one.format(first=self._named(marker))

    def pair_question(self, first: str, second: str) -> str:
        """The question about the clips with these markers; the answer is `pair_answer` of their colours."""
        return self.ask_two.format(first=self._named(first), second=self._named(second))

    def answer(self, colour: str) -> str:
        """The answer to `question`."""
        return self.say_one.format(first=colour)

    def pair_answer(self, first: str, second: str) -> str:
        """The answer to `pair_question`: the colours in the order of asking."""
        return self.say_two.format(first=first, second=second)

    def caption(self, marker: str, colour: str) -> str:
        """The answer to `caption_question`."""
        wall, frame = marker.split("-")
        return self.description.format(wall=wall, frame=frame, colour=colour)

    def answer_to(self, asked: str, scenes: Sequence[tuple[str, str]]) -> str:
        """The answer to either question, for a video whose clips have these markers and colours.

        It is empty if a marker that the question names is in no clip, or in several.
        """
        found = [[colour for marker, colour in scenes if marker == named] for named in self.named_markers(asked)]
        if not 1 <= len(found) <= 2 or any(len(colours) != 1 for colours in found):
            return ""
        colours = [colours[0] for colours in found]
        return self.answer(*colours) if len(colours) == 1 else self.pair_answer(*colours)

    # ------------------------------------------------------------------------------------------------------ reading

    def named_markers(self, asked: str) -> list[str]:
        """The markers a question names, in order."""
        return ["-".join(names) for names in self._marker_pattern.findall(asked)]

    def read_caption(self, text: str) -> tuple[str, str] | None:
        """Marker and colour of a description, None where it is not of the form of `caption`."""
        match = self._description_pattern.fullmatch(" ".join(text.split()))
        return (f"{match['wall']}-{match['frame']}", match["colour"]) if match else None

    def described_marker(self, text: str) -> str:
        """The marker with which a description begins, whatever follows; empty where it begins with none."""
        match = self._start_pattern.match(text.strip())
        return f"{match['wall']}-{match['frame']}" if match else ""

    def described_markers(self, text: str) -> list[str]:
        """The markers of all descriptions in a text, in order."""
        return ["-".join(names) for names in self._descriptions_pattern.findall(text)]

    # ----------------------------------------------------------------------------------------------------- patterns

    def _named(self, marker: str) -> str:
        wall, frame = marker.split("-")
        return self.marker.format(wall=wall, frame=frame)

    @cached_property
    def _marker_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?<!\S){_pattern(self.marker)}(?![\w-])")

    @cached_property
    def _description_pattern(self) -> re.Pattern[str]:
        return re.compile(_pattern(self.description))

    @cached_property
    def _start_pattern(self) -> re.Pattern[str]:
        start = self.description.partition("{frame}")
        return re.compile(rf"{_pattern(start[0] + start[1])}(?!\S)")

    @cached_property
    def _descriptions_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"\b{_pattern(self.description.partition('{colour}')[0])}")


def _pattern(form: str) -> str:
    """A form as a regular expression with a named group for each of its places."""
    pattern = re.escape(form)
    for place, names in _NAMES.items():
        pattern = pattern.replace(re.escape(f"{{{place}}}"), f"(?P<{place}>{'|'.join(names)})")
    return pattern


#: "what colour in the navy-gold clip ?" → "red"; "what colours in navy-gold then plum-ash ?" → "red blue". Both
#: questions have as many words: with more in the second, a model that saw few lengths of video told from the position
#: of its answer how many colours to give (seed 31), and failed in longer videos and after Stage 1.
WORDS = Language(
    name="words",
    marker="{wall}-{frame}",
    ask_one="what colour in the {first} clip ?",
    ask_two="what colours in {first} then {second} ?",
    say_one="{first}",
    say_two="{first} {second}",
    caption_question="describe the clip ?",
    description="{wall}-{frame} , {colour}",
    max_answer_tokens=4,
)
#: "What colour is the shape in the navy clip with the gold frame?" → "The shape is red."
SENTENCES = Language(
    name="sentences",
    marker="the {wall} clip with the {frame} frame",
    ask_one="What colour is the shape in {first}?",
    ask_two="What colours are the shapes in {first} and in {second}?",
    say_one="The shape is {first}.",
    say_two="The first shape is {first} and the second is {second}.",
    caption_question="Describe the clip.",
    description="The clip is {wall}, its frame is {frame} and the shape is {colour}.",
    max_answer_tokens=24,
)


def language_of(world: str | Path) -> Language:
    """The language of the models of a world that `write_world` wrote.

    Raises:
        DatasetError: If it was not written to the end.
    """
    return SENTENCES if language_name(world) == SENTENCES.name else WORDS
