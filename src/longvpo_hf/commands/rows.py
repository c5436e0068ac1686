"""`longvpo rows`: datasets put together, filtered, split and sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group
from cyclopts.types import NonNegativeInt, PositiveInt

from longvpo_hf.commands.cli import flat, named_files, new_app
from longvpo_hf.errors import ConfigError

if TYPE_CHECKING:
    from longvpo_hf.preference import VideoPreference
    from longvpo_hf.publishing.rows import RowsFolder

app = new_app("rows", "Puts datasets together, filters, splits and samples them; media and records come along.")
_OUTPUT = Group("Output", sort_key=1)


@dataclass(frozen=True, slots=True)
class Written:
    """Where the rows go.

    Args:
        output: Folder of the dataset that is written.
        video_root: Folder of the media, for rows that come without them.
    """

    output: Path
    video_root: Path | None = None


@app.command
def merge(*datasets: str, to: Annotated[Written, flat(_OUTPUT)]) -> None:
    """Puts datasets together. A row that is in several is kept once.

    Args:
        datasets: Folders of datasets, or their names on the Hub.
        to: See `Written`.
    """
    if len(datasets) < 2:
        raise ConfigError(f"Name at least two datasets to put together, got {len(datasets)}.")
    from longvpo_hf.publishing.rows import everything

    _write(_open(datasets, to), to.output, everything, "Preference rows of several datasets", [])


@app.command(name="filter")
def filter_rows(
    dataset: str,
    /,
    *,
    to: Annotated[Written, flat(_OUTPUT)],
    max_length_ratio: float | None = None,
    max_rows_per_source: PositiveInt | None = None,
    method: tuple[str, ...] = (),
    benchmark_videos: tuple[str, ...] = (),
    drop_ids: Path | None = None,
) -> None:
    """Leaves rows out. Rows that are no preferences are left out in any case; each has its reason in `OUTPUT.log`.

    Args:
        dataset: Folder of a dataset, or its name on the Hub.
        to: See `Written`.
        max_length_ratio: Most words of the longer answer for each word of the shorter, ≥ 1. None: any.
        max_rows_per_source: Most rows that ask about one source; the first are kept. None: any number.
        method: Keep the rows of this method alone, e.g. longvpo-stage1. May be given several times.
        benchmark_videos: NAME=FILE: a benchmark's video ids, one a line; rows that show one are left out. May be given
            several times.
        drop_ids: File of ids of rows to leave out, one a line. None: no such file.
    """
    from longvpo_hf.publishing import rows as of_rows

    keeps: list[Callable[[VideoPreference], str | None]] = []
    said = []
    unfound: set[str] = set()
    if max_length_ratio is not None:
        if not max_length_ratio >= 1:
            raise ConfigError(f"--max-length-ratio must be ≥ 1, got {max_length_ratio}.")
        keeps.append(of_rows.shorter_ratio(max_length_ratio))
        said.append(f"answers whose lengths differ by at most {max_length_ratio} times")
    if method:
        keeps.append(lambda row: None if row.provenance.method in method else "other_method")
        said.append(f"rows of {', '.join(method)}")
    if benchmark_videos:
        keeps.append(_without_benchmarks(benchmark_videos))
        said.append("no videos of the benchmarks named")
    if drop_ids is not None:
        unfound = _ids_of(drop_ids)
        named = frozenset(unfound)

        def is_kept(row: VideoPreference) -> str | None:
            unfound.discard(row.id)
            return "named_to_drop" if row.id in named else None

        keeps.insert(0, is_kept)  # first: it sees every row
        said.append(f"without the {len(named)} rows that a list names")
    if max_rows_per_source is not None:  # last: it counts what the others keep
        keeps.append(of_rows.rows_per_source(max_rows_per_source))
        said.append(f"at most {max_rows_per_source} rows of a source")
    _write(
        _open([dataset], to),
        to.output,
        of_rows.all_of(*keeps),
        "",
        [f"filtered: {'; '.join(said) or 'rows that are preferences'}"],
    )
    if unfound:
        print(f"{len(unfound):,} of the {len(named):,} ids in {drop_ids} are those of no row, e.g. {min(unfound)!r}.")


@app.command
def split(
    dataset: str,
    /,
    *,
    to: Annotated[Written, flat(_OUTPUT)],
    test_share: float = 0.1,
    strict: bool = False,
    seed: NonNegativeInt = 0,
) -> None:
    """Splits a dataset into OUTPUT/train and OUTPUT/test, so that no source is asked about on both sides.

    Args:
        dataset: Folder of a dataset, or its name on the Hub.
        to: See `Written`.
        test_share: Share of the rows held out, between 0 and 1.
        strict: Leave out training rows that show a held-out source at all, e.g. as a distractor.
        seed: Draws what is held out.
    """
    if not 0 < test_share < 1:
        raise ConfigError(f"--test-share must be between 0 and 1, got {test_share}.")
    from longvpo_hf.publishing.rows import drawn, split_by_source

    sources = _open([dataset], to)
    found = split_by_source(sources[0], test_share, seed)
    said = f"split by source: {test_share:.0%} held out, seed {seed}"
    _write(sources, to.output / "test", drawn(found.test), "", [f"{said}; this is the held-out side"])
    _write(sources, to.output / "train", found.train(strict), "", [f"{said}; this is the training side"])
    if found.num_shared and not strict:
        print(
            f"{found.num_shared:,} training rows show a held-out source beside their evidence, as distractors. "
            "--strict leaves them out."
        )


@app.command
def sample(
    dataset: str,
    /,
    *,
    to: Annotated[Written, flat(_OUTPUT)],
    num_rows: PositiveInt,
    seed: NonNegativeInt = 0,
) -> None:
    """Draws some rows of a dataset at random.

    Args:
        dataset: Folder of a dataset, or its name on the Hub.
        to: See `Written`.
        num_rows: Rows to draw.
        seed: Draws them; same seed, same rows.
    """
    from longvpo_hf.publishing.rows import draw, drawn

    sources = _open([dataset], to)
    keep = drawn(draw(sources, num_rows, seed))
    _write(sources, to.output, keep, "", [f"{num_rows} rows drawn at random, seed {seed}"])


def _open(datasets: Sequence[str], to: Written) -> list[RowsFolder]:
    from longvpo_hf.hub import go_offline_if_unreachable
    from longvpo_hf.publishing.dataset import dataset_folder
    from longvpo_hf.publishing.rows import RowsFolder

    go_offline_if_unreachable(datasets)
    return [RowsFolder(dataset_folder(name), to.video_root) for name in datasets]


def _ids_of(path: Path) -> set[str]:
    if not path.is_file():
        raise ConfigError(f"--drop-ids {path} is not a file.")
    try:
        ids = set(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ConfigError(f"--drop-ids {path} is no text in UTF-8 (byte {error.start}).") from error
    if not ids:
        raise ConfigError(f"--drop-ids {path} names no row.")
    return ids


def _without_benchmarks(items: Sequence[str]) -> Callable[[VideoPreference], str | None]:
    from longvpo_hf.intake.leakage import BenchmarkVideos
    from longvpo_hf.intake.records import Source

    benchmarks = BenchmarkVideos.from_files(named_files("benchmark-videos", items))

    def keep(row: VideoPreference) -> str | None:
        names = {clip.source_id or Path(clip.path).name for clip in row.timeline.clips}
        found = any(benchmarks.match(Source(Path(name), source_id=name)) for name in sorted(names))
        return "benchmark_video" if found else None

    return keep


def _write(
    sources: Sequence[RowsFolder],
    output: Path,
    keep: Callable[[VideoPreference], str | None],
    title: str,
    said: Sequence[str],
) -> None:
    from longvpo_hf.funnel import in_one_line
    from longvpo_hf.publishing.rows import write_rows

    counts: Mapping[str, Mapping[str, int]] = write_rows(sources, output, keep, title or sources[0].record.title, said)
    stages = counts["stages"]
    print(f"{stages['rows']:,} of {stages['rows read']:,} rows in {output}; left out: {in_one_line(counts)}")
