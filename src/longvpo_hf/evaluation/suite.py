"""What a suite is: where its questions and videos are, what a row of its asks, and how its score is taken.

A row, as the suite's authors publish it, becomes a `Question`. Datasets, splits, fields, file names and prompts are
those of lmms-eval's own tasks (0.7.3). Everything is in one folder, the data root: annotations under the dataset's id,
or else in the Hub's cache; media where lmms-eval unpacks them. The suites themselves are the files of `suites/`.
"""

from __future__ import annotations

import functools
import math
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.errors import ConfigError
from longvpo_hf.paths import OutsideRoot, path_inside

if TYPE_CHECKING:
    from datasets import Dataset

    from longvpo_hf.evaluation.differences import Unit
    from longvpo_hf.evaluation.scoring import Record

#: Names the data root, for lmms-eval, which has no argument for it.
DATA_ROOT_VARIABLE = "LONGVPO_EVAL_DATA"

LETTERS = string.ascii_uppercase
#: For `Suite.unpack`: as lmms-eval does, wherever in the repository the archives are.
UNZIP = "find {archives} -name '*.zip' -exec unzip -n {{}} -d {media} \\;"
#: Archives that are zip files or tar files, whole or in parts.
UNPACK = (
    UNZIP + "\nfind {archives} -name '*.tar*' | sed 's/[.]tar.*//' | sort -u | "
    'while read -r name; do cat "$name".tar* | tar -x -C {media}; done'
)


class Row:
    """A row of annotations as somebody published it: a field is checked when it is read.

    Args:
        fields: Value of each field.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def text(self, name: str) -> str:
        """A text that holds more than blanks."""
        value = self._value(name)
        if not isinstance(value, str) or not value.strip():
            raise _wrong(name, "must be a text", value)
        return value

    def word(self, name: str) -> str:
        """A text or a number, as its text."""
        value = self._value(name)
        if (text := _as_text(value)) is None or not text.strip():
            raise _wrong(name, "must be a text or a number", value)
        return text

    def options(self, name: str) -> list[str]:
        """The options of a question, 2 to 26 texts or numbers; one may be empty."""
        value = self._value(name)
        texts = [_as_text(each) for each in value] if isinstance(value, list | tuple) else []
        options = [text for text in texts if text is not None]
        if len(options) != len(texts) or not 2 <= len(options) <= len(LETTERS):
            raise _wrong(name, f"must be a list of 2 to {len(LETTERS)} options, each a text", value)
        return options

    def letter(self, name: str, options: Sequence[str]) -> str:
        """The letter of the option that the field counts to, from 0."""
        value = self._value(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(options):
            raise _wrong(name, f"must be the number of an option, from 0 to {len(options) - 1}", value)
        return LETTERS[value]

    def has(self, name: str) -> bool:
        """Whether the field is there, and not empty."""
        return bool(self._fields.get(name))

    def _value(self, name: str) -> Any:
        try:
            return self._fields[name]
        except KeyError:
            raise ConfigError(
                f"It lacks the field {name!r}; it has {sorted(self._fields)}. Is this the dataset, at the "
                "revision that lmms-eval 0.7 uses?"
            ) from None


def _wrong(name: str, bound: str, value: object) -> ConfigError:
    return ConfigError(f"The field {name!r} {bound}, got {repr(value)[:200]}.")


def _as_text(value: object) -> str | None:
    """A text, or the text of a number; None of anything else."""
    if isinstance(value, str):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else None


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice question about a video.

    Args:
        text: Question, options and instruction, as the model is asked.
        letters: Letters of its options, e.g. `ABCD`.
        answer: The right one.
        videos: Names its video may have, under the data root; the first that exists is taken.
        group: Its group among the suite's `groups`; empty where there are none.
        subtitles: Name of its subtitles' file under the data root; the file may be missing.
        options: What the letters stand for, where the suite's own rule looks at it.
        facts: What the suite's `units` need besides, as JSON.
    """

    text: str
    letters: str
    answer: str
    videos: tuple[str, ...]
    group: str = ""
    subtitles: str = ""
    options: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if len(self.letters) < 2:
            raise ConfigError(f"A question must have at least 2 options, got {len(self.letters)}: {self.text[:200]!r}")
        if len(self.answer) != 1 or self.answer not in self.letters:
            raise ConfigError(
                f"The right answer must be one of {self.letters!r}, got {self.answer!r}: {self.text[:200]!r}"
            )


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark of models, or one way to run it.

    Args:
        name: Its name in results; its task's name in lmms-eval is this with `longvpo_` before it.
        title: Its name in print.
        dataset: Its dataset on the Hub.
        split: The split that is asked.
        read: Makes a question of a row; the second argument is the subset.
        media: Folder of its videos, under the data root.
        unpack: Command that fills `media` from the downloaded archives; `{archives}` and `{media}` are put in.
        official: Its own rule for a reply without reasoning: percent, or None where it leaves the question out; one of
            `official.py`, or a function of the suite's file.
        units: What its score is the mean of, for the given field of the records (`score`, `official`): `by_question`
            or `by_group` of `scoring.py`, or a function of the suite's file.
        headline: Field of results that holds the score by `units`, if it is not `overall`: that is then the share of
            all questions.
        config: Configuration of the dataset that is asked; None for its only one.
        revision: Branch of the dataset; None for its main one.
        subsets: Configurations of the dataset, each a task of its own; none where it is one task.
        groups: What scores are reported by, in order; groups that rows have besides follow.
        subtitles: Folder of its subtitles under the data root; empty where it is asked without.
        asked_with: The suite whose name asks for this one too.
        gated: Whether its authors ask for consent before a download.
        max_new_tokens: Bound on an answer of a model that does not reason: the longest of lmms-eval's own tasks, room
            for "The best answer is (C)" and some more.
    """

    name: str
    title: str
    dataset: str
    split: str
    read: Callable[[Row, str], Question]
    media: str
    unpack: str
    official: Callable[[str, Question], float | None]
    units: Callable[[Sequence[Record], str], list[Unit]]
    headline: str = "overall"
    config: str | None = None
    revision: str | None = None
    subsets: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    subtitles: str = ""
    asked_with: str = ""
    gated: bool = False
    max_new_tokens: int = 32

    def question(self, row: Mapping[str, Any], subset: str = "", number: int | None = None) -> Question:
        """What a row asks.

        Args:
            row: Value of each field.
            subset: The subset it is of; empty where there are none.
            number: Its number in the split, from 0, for errors; None where it is not known.

        Raises:
            ConfigError: If a field is missing or holds something of another kind, or the answer is not one of the
                options.
        """
        which = "a row" if number is None else f"row {number}"
        place = f"{self.dataset}, {subset or self.split}, {which}"
        try:
            return self.read(Row(row), subset)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None

    def questions(self, root: Path, subset: str = "") -> list[Question]:
        """What its rows ask.

        Raises:
            ConfigError: If there are no rows, or one of them is no question of the suite's; see `question`.
        """
        questions = [self.question(row, subset, number) for number, row in enumerate(self.rows(root, subset))]
        if not questions:
            raise ConfigError(f"{self.dataset}, {subset or self.split}: there are no rows, so nothing can be asked.")
        return questions

    def locate(self, root: Path, *names: str) -> Path | None:
        """The first of the files `names` that exists; rows are somebody else's text, so none may lead elsewhere.

        Args:
            root: The data root. The media folder in it may be a link, e.g. to another disk or to a snapshot in the
                Hub's cache; links within it must not lead out of it.
            names: Names under the data root, as a question has them; all are in the media folder.

        Raises:
            ConfigError: If one leads out of the media folder; the message names it.
        """
        for name in names:
            try:
                path = path_inside(root / self.media, name.removeprefix(f"{self.media}/"))
            except OutsideRoot as error:
                raise ConfigError(f"{self.name}: a row names a file outside of its media folder: {error}") from error
            if path.is_file():
                return path
        return None

    def rows(self, root: Path, subset: str = "") -> Dataset:
        """Its rows, from the folder `root / dataset` if there is one, else from the Hub or its cache."""
        return _rows(self.dataset, self.revision, self.split, root, subset or self.config or "")


def letters_of(text: str) -> str:
    """Letters of the options that a text lists, each at the start of a line: `(A) one`, `A. one`, `A) one`.

    Returns:
        `ABCD…` up to the last one in a row; "" where the text lists fewer than two.
    """
    listed = set(re.findall(r"^[^\S\n]*\(?([A-Z])[).:]", text, re.MULTILINE))
    number = next(i for i in range(len(LETTERS) + 1) if i == len(LETTERS) or LETTERS[i] not in listed)
    return LETTERS[:number] if number > 1 else ""


def data_root() -> Path:
    """The folder that holds annotations and media: `LONGVPO_EVAL_DATA`, else `HF_HOME`, as for lmms-eval."""
    for variable in (DATA_ROOT_VARIABLE, "HF_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    return Path("~/.cache/huggingface").expanduser()


@functools.lru_cache(maxsize=64)
def _rows(dataset: str, revision: str | None, split: str, root: Path, subset: str) -> Dataset:
    """Kept: the preflight and every task of a process ask for the same ones."""
    from datasets import Dataset, load_dataset

    local = root / dataset
    if local.is_dir():
        # Streamed: the cache of datasets knows a folder by its last name and its card alone, and would give the rows
        # of another root, or those the folder held before.
        return Dataset.from_list(list(load_dataset(str(local), subset or None, split=split, streaming=True)))
    return load_dataset(dataset, subset or None, split=split, revision=revision)
