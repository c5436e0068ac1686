"""What an evaluation needs, looked for before a model is loaded: annotations, videos, subtitles, a token.

Each missing thing is named with the command that brings it. Of videos the first bytes are read; nothing is decoded.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.suite import Suite
from longvpo_hf.evaluation.suites import suites
from longvpo_hf.frames import is_whole

#: Missing files of a suite that are named; the others are only counted.
_NAMED = 3
#: Broken files that are deleted by name; where there are more, a download of all went wrong.
_DELETED = 20


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that is not where it should be, or not whole.

    Args:
        what: What, of which suite, and where it was looked for.
        remedy: The command, or commands, that bring it.
    """

    what: str
    remedy: str


class NotReady(ConfigError):
    """An evaluation lacks data.

    Args:
        missing: All that it lacks.
    """

    def __init__(self, missing: Sequence[Missing]) -> None:
        self.missing = tuple(missing)
        parts = [f"- {each.what}\n{_indented(each.remedy)}" for each in self.missing]
        super().__init__("\n".join(["data of the evaluation are missing or broken:", *parts]))

    def __reduce__(self) -> tuple[type[NotReady], tuple[tuple[Missing, ...]]]:
        """Lets the error leave a worker process unchanged."""
        return type(self), (self.missing,)


def bounds_named(text: str, asked: Sequence[Suite]) -> dict[str, int]:
    """Reads bounds on answers, `4096` for all suites or `mlvu=64,videomme=4096`, by suite.

    A suite's own bound stands before one for all. As where suites are named, `videomme` is the one with subtitles too,
    unless that has its own.

    Raises:
        ConfigError: If a bound is not a number ≥ 1, names a suite that is not asked, or is given twice.
    """
    names = [suite.name for suite in asked]
    given: dict[str | None, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:([\w-]+)=)?([1-9]\d{0,8})\s*", part)
        if match is None or not any(match[1] in (None, suite.name, suite.asked_with) for suite in asked):
            raise ConfigError(
                f"A bound on answers is N or SUITE=N, with N ≥ 1 and SUITE one of {', '.join(names)}; got {part!r}."
            )
        if match[1] in given:
            raise ConfigError(
                f"{match[1] or 'All suites'} must have one bound on answers, got {given[match[1]]}, {part}."
            )
        given[match[1]] = int(match[2])
    keys = {suite.name: (suite.name, suite.asked_with or suite.name, None) for suite in asked}
    return {name: next(given[key] for key in of if key in given) for name, of in keys.items() if given.keys() & set(of)}


def check(asked: Iterable[Suite], root: Path) -> None:
    """Looks for all that the suites need.

    Raises:
        NotReady: If anything is missing.
    """
    missing = list(dict.fromkeys(each for suite in asked for each in _missing(suite, root)))
    if missing:
        raise NotReady(missing)


def _missing(suite: Suite, root: Path) -> list[Missing]:
    """What one suite lacks."""
    archives, media = root / suite.dataset, root / suite.media
    revision = f" --revision {suite.revision}" if suite.revision else ""
    download = f"hf download {suite.dataset} --repo-type dataset{revision} --local-dir {shlex.quote(str(archives))}"
    unpack = suite.unpack.format(archives=shlex.quote(str(archives)), media=shlex.quote(str(media)))
    unpack = f"{download}\nmkdir -p {shlex.quote(str(media))}\n{unpack}"
    questions = []
    for subset in suite.subsets or ("",):
        try:
            suite.rows(root, subset)
        except Exception as error:  # of datasets, huggingface_hub, the network, the disk: whichever it is, they lack
            return [_no_annotations(suite, archives, download, error)]
        questions += suite.questions(root, subset)
    missing = []
    videos = {names: suite.locate(root, *names) for names in {question.videos for question in questions}}
    absent = sorted(names[0] for names, path in videos.items() if path is None)
    if absent:
        what = f"{len(absent)} of {len(videos)} videos, in {root}: {_some(absent)}"
        missing.append(Missing(f"{suite.dataset}: {what}", unpack))
    broken = sorted({str(path) for path in videos.values() if path is not None and not is_whole(path)})
    if broken:
        # Nothing is unpacked over a file that is there.
        delete = " ".join(["rm -f --", *map(shlex.quote, broken)])
        if len(broken) > _DELETED:
            delete = f"mv {shlex.quote(str(media))} {shlex.quote(f'{media}-broken')}"
        what = f"{len(broken)} of {len(videos)} videos are files that are cut off, or no videos: {_some(broken)}"
        missing.append(Missing(f"{suite.dataset}: {what}", f"{delete}\n{unpack}"))
    subtitles = {question.subtitles for question in questions if question.subtitles}
    # Not every video has subtitles, so a single missing file is no fault; that all are missing is one.
    if subtitles and not any(suite.locate(root, name) for name in subtitles):
        where = root / suite.subtitles
        missing.append(Missing(f"{suite.name}: subtitles: {where} holds none of {len(subtitles)} .srt files", unpack))
    return missing


def _some(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _no_annotations(suite: Suite, archives: Path, download: str, error: Exception) -> Missing:
    from huggingface_hub import get_token

    reason = (str(error).strip().splitlines() or [""])[0]
    where = f"cannot be read from {archives}" if archives.is_dir() else f"neither in {archives} nor from the Hub"
    what = f"{suite.name}: annotations ({suite.dataset}): {where}: {type(error).__name__}: {reason}"
    if suite.gated and get_token() is None:
        address = f"https://huggingface.co/datasets/{suite.dataset}"
        return Missing(
            f"{what}\n  It is gated, and this machine has no token: agree at {address}, then log in.",
            f"hf auth login\n{download}",
        )
    return Missing(what, download)


def _indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.splitlines())


def suites_named(names: Iterable[str]) -> list[Suite]:
    """The suites that a user means: `videomme` is asked with and without subtitles.

    Raises:
        ConfigError: If a name is unknown.
    """
    found: list[Suite] = []
    known = {name: suite for name, suite in suites().items() if not suite.asked_with}
    for name in dict.fromkeys(name.strip() for name in names):
        if name not in known:
            raise ConfigError(f"There is no suite {name!r}; choose among {', '.join(known)}.")
        found += [known[name], *(suite for suite in suites().values() if suite.asked_with == name)]
    return found
