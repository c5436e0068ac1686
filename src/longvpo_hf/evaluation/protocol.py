"""The protocol of a number: all that it depends on besides the model, in one line, with a hash.

Two numbers may be compared if their protocols are one. Scores of one model on one benchmark lie 5 to 25 points apart
between frameworks, for the frames alone (QwenLM/Qwen3-VL issues 1772 and 2057); so a table refuses to set two protocols
side by side, and names what differs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from longvpo_hf.artifacts import file_digest
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.longvideo_mcq import answers
from longvpo_hf.evaluation.suite import Suite
from longvpo_hf.evaluation.suites import suites
from longvpo_hf.record import Sampling, installed_versions

#: Those whose versions decide a number.
PACKAGES = ("longvpo-hf", "lmms-eval", "transformers", "torch", "torchcodec")
#: What of a video the model sees: all of it, or what a baseline leaves of it.
Shown: TypeAlias = Literal["the video", "no video", "one frame", "shuffled frames"]
THE_VIDEO: Shown = "the video"
BASELINES: tuple[Shown, ...] = ("no video", "one frame", "shuffled frames")
#: Of published protocols: what `longvpo eval` can be told.
SETTINGS = ("num_frames", "fps", "max_pixels", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class Protocol:
    """What a number of one suite depends on besides the model.

    Args:
        suite: Name of the suite.
        questions: Digest of all that is asked: texts, options and answers.
        limit: Only the first so many questions of each task were asked; None for all.
        sampling: Frames, as `Sampling` has them in words.
        shown: What of the video the model sees, one of `Shown`.
        subtitles: Which subtitles stand in the prompt.
        parser: How replies were read.
        decoding: How replies were written: greedy, or sampled and how.
        max_new_tokens: Bound on a reply.
        repeats: Times that every question was asked.
        dtype: Type of the weights.
        backend: Who ran the model, and how it got the frames.
        versions: Of the packages that took part.
    """

    suite: str
    questions: str
    limit: int | None
    sampling: str
    shown: str
    subtitles: str
    parser: str
    decoding: str
    max_new_tokens: int
    repeats: int
    dtype: str
    backend: str
    versions: Mapping[str, str] = field(hash=False)

    @property
    def hash(self) -> str:
        """Tells this protocol from others: 8 hexadecimal digits."""
        return hashlib.sha256(repr(sorted(asdict(self).items(), key=str)).encode()).hexdigest()[:8]

    @property
    def line(self) -> str:
        """The protocol in one line."""
        asked = f"the first {self.limit} questions of each task" if self.limit else "all questions"
        times = f", {self.repeats} times" if self.repeats > 1 else ""
        versions = ", ".join(f"{package} {number}" for package, number in self.versions.items())
        return (
            f"{self.suite}: {self.sampling}; shown: {self.shown}; subtitles: {self.subtitles}; {asked}{times}, "
            f"prompts {self.questions}; read by {self.parser}; {self.decoding}, at most {self.max_new_tokens} tokens; "
            f"{self.dtype}, {self.backend}; {versions}"
        )

    def json(self) -> dict[str, Any]:
        """The protocol as results hold it."""
        return {**asdict(self), "hash": self.hash}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Protocol:
        """The protocol in a result.

        Raises:
            ConfigError: If a field is missing.
        """
        try:
            return cls(**{each.name: value[each.name] for each in fields(cls)})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"A result's protocol lacks the field {error}.") from None

    def differences(self, other: Protocol) -> list[str]:
        """The fields in which two protocols differ, with both values."""
        mine, theirs = _flat(self), _flat(other)
        return [
            f"{name} {mine.get(name)} ≠ {theirs.get(name)}"
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        ]


def _flat(protocol: Protocol) -> dict[str, Any]:
    values = asdict(protocol)
    return {**values.pop("versions"), **values}


def parsers() -> dict[str, str]:
    """Each parser by its name in tables, with its version."""
    return {
        "ours": f"ours {file_digest(answers.__file__)[:8]}",
        "official": f"official, lmms-eval {_installed().get('lmms-eval', '?')}",
    }


def protocols_of(
    suite: Suite,
    root: Path,
    sampling: Sampling,
    *,
    limit: int | None,
    shown: str,
    decoding: str,
    max_new_tokens: int,
    repeats: int,
    dtype: str,
    backend: str,
) -> dict[str, Protocol]:
    """The protocol of a suite's numbers, for each parser; see `Protocol` for the arguments."""
    return {
        name: Protocol(
            suite=suite.name,
            questions=questions_digest(suite.name, root),
            limit=limit,
            sampling=str(sampling),
            shown=shown,
            subtitles="of the frames" if suite.subtitles else "none",
            parser=parser,
            decoding=decoding,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            dtype=dtype,
            backend=backend,
            versions=_installed(),
        )
        for name, parser in parsers().items()
    }


@functools.cache
def questions_digest(name: str, root: Path) -> str:
    """Tells what a suite asks from other prompts, options, answers and versions of the dataset: 8 digits."""
    suite, found = suites()[name], hashlib.sha256()
    for subset in suite.subsets or ("",):
        for question in suite.questions(root, subset):
            found.update(f"{question.text}\0{question.letters}\0{question.answer}\0".encode("utf-8", "replace"))
    return found.hexdigest()[:8]


@functools.cache
def _installed() -> dict[str, str]:
    return installed_versions(PACKAGES)


# ----------------------------------------------------------------------------------------------------- published ones


@dataclass(frozen=True, slots=True)
class Published:
    """How published numbers were measured, as far as their authors say it.

    Args:
        name: Its name in `protocols.yaml`.
        title: Whose numbers.
        source: Where it is said.
        values: The fields; None for what is not published.
    """

    name: str
    title: str
    source: str
    values: Mapping[str, Any]

    def setting(self, name: str) -> Any:
        """One of `SETTINGS`; None where it is not published."""
        return self.values[name]

    def describe(self, used: Mapping[str, Any]) -> str:
        """What of it was followed, in one line.

        Args:
            used: The settings that were measured with, by name; those that equal no published value depart from it.
        """
        unknown = [name for name, value in self.values.items() if value is None]
        departs = [
            f"{name} {used[name]} instead of {self.values[name]}"
            for name in SETTINGS
            if name in used and self.values[name] is not None and str(used[name]).lower() != str(self.values[name])
        ]
        said = "; ".join(f"{name}: {value}" for name, value in self.values.items() if value is not None)
        return (
            f"protocol {self.name}: {self.title} ({self.source}). Published: {said or 'nothing'}."
            + (f" Not published, and ours: {', '.join(unknown)}." if unknown else "")
            + (f" Departs from it: {', '.join(departs)}." if departs else "")
        )


def published(name: str) -> Published:
    """A published protocol by its name.

    Raises:
        ConfigError: If there is none of that name.
    """
    known = _published()
    if name not in known:
        raise ConfigError(f"There is no published protocol {name!r}; choose among {', '.join(known)}.")
    return known[name]


@functools.cache
def _published() -> dict[str, Published]:
    import yaml

    content = yaml.safe_load(Path(__file__).with_name("protocols.yaml").read_text(encoding="utf-8"))
    return {
        name: Published(name, entry.pop("title"), entry.pop("source"), entry)
        for name, entry in ((name, dict(entry)) for name, entry in content.items())
    }
