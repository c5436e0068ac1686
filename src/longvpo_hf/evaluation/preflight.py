"""What an evaluation needs, looked for before a model is loaded: annotations, videos, subtitles, a token.

Each missing thing is named with the command that brings it. Only names are looked at: nothing is decoded.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.benchmarks import BENCHMARKS, Benchmark, locate

#: Missing files of a benchmark that are named; the others are only counted.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that is not where it should be.

    Args:
        what: What, of which benchmark, and where it was looked for.
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
        super().__init__("\n".join(["data of the evaluation are missing:", *parts]))

    def __reduce__(self) -> tuple[type[NotReady], tuple[tuple[Missing, ...]]]:
        """Lets the error leave a worker process unchanged."""
        return type(self), (self.missing,)


def bounds_named(text: str, benchmarks: Sequence[Benchmark]) -> dict[str, int]:
    """Reads bounds on answers, `4096` for all benchmarks or `mlvu=64,videomme=4096`, by benchmark.

    Raises:
        ConfigError: If a bound is not a number ≥ 1, or names a benchmark that is not asked.
    """
    names = [benchmark.name for benchmark in benchmarks]
    bounds: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:([\w-]+)=)?([1-9]\d{0,8})\s*", part)
        # As where benchmarks are named, `videomme` is the one with subtitles too.
        meant = [name for name in names if match and match[1] in (None, name, name.removesuffix("_subtitles"))]
        if match is None or not meant:
            raise ConfigError(
                f"A bound on answers is N or SUITE=N, with N ≥ 1 and SUITE one of {', '.join(names)}; got {part!r}."
            )
        bounds |= dict.fromkeys(meant, int(match[2]))
    return bounds


def check(benchmarks: Iterable[Benchmark], root: Path) -> None:
    """Looks for all that `benchmarks` need.

    Raises:
        NotReady: If anything is missing.
    """
    missing = list(dict.fromkeys(each for benchmark in benchmarks for each in _missing(benchmark, root)))
    if missing:
        raise NotReady(missing)


def _missing(benchmark: Benchmark, root: Path) -> list[Missing]:
    """What one benchmark lacks."""
    archives, media = root / benchmark.dataset, root / benchmark.media
    revision = f" --revision {benchmark.revision}" if benchmark.revision else ""
    download = f"hf download {benchmark.dataset} --repo-type dataset{revision} --local-dir {shlex.quote(str(archives))}"
    unpack = benchmark.unpack.format(archives=shlex.quote(str(archives)), media=shlex.quote(str(media)))
    unpack = f"{download}\nmkdir -p {shlex.quote(str(media))}\n{unpack}"
    questions = []
    for subset in benchmark.subsets or ("",):
        try:
            rows = benchmark.rows(root, subset)
        except Exception as error:  # of datasets, huggingface_hub, the network, the disk: whichever it is, they lack
            return [_no_annotations(benchmark, archives, download, error)]
        questions += [benchmark.question(row, subset) for row in rows]
    missing = []
    videos = {question.videos for question in questions}
    absent = sorted(names[0] for names in videos if locate(root, *names) is None)
    if absent:
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        named = ", ".join(absent[:_NAMED])
        missing.append(
            Missing(f"{benchmark.dataset}: {len(absent)} of {len(videos)} videos, in {root}: {named}{more}", unpack)
        )
    subtitles = {question.subtitles for question in questions if question.subtitles}
    # Not every video has subtitles, so a single missing file is no fault; that all are missing is one.
    if subtitles and not any(locate(root, name) for name in subtitles):
        where = root / benchmark.subtitles
        missing.append(
            Missing(f"{benchmark.name}: subtitles: {where} holds none of {len(subtitles)} .srt files", unpack)
        )
    return missing


def _no_annotations(benchmark: Benchmark, archives: Path, download: str, error: Exception) -> Missing:
    from huggingface_hub import get_token

    reason = (str(error).strip().splitlines() or [""])[0]
    where = f"cannot be read from {archives}" if archives.is_dir() else f"neither in {archives} nor from the Hub"
    what = f"{benchmark.name}: annotations ({benchmark.dataset}): {where}: {type(error).__name__}: {reason}"
    if benchmark.gated and get_token() is None:
        address = f"https://huggingface.co/datasets/{benchmark.dataset}"
        return Missing(
            f"{what}\n  It is gated, and this machine has no token: agree at {address}, then log in.",
            f"hf auth login\n{download}",
        )
    return Missing(what, download)


def _indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.splitlines())


def benchmarks_named(names: Iterable[str]) -> list[Benchmark]:
    """The benchmarks that a user means: `videomme` is asked with and without subtitles.

    Raises:
        ValueError: If a name is unknown.
    """
    benchmarks = []
    for name in dict.fromkeys(names):
        if name not in BENCHMARKS or name == "videomme_subtitles":
            known = ", ".join(each for each in BENCHMARKS if each != "videomme_subtitles")
            raise ConfigError(f"There is no benchmark {name!r}; choose among {known}.")
        benchmarks.append(BENCHMARKS[name])
        if name == "videomme":
            benchmarks.append(BENCHMARKS["videomme_subtitles"])
    return benchmarks
