"""The layout of a preference dataset on disk and on the Hub.

Takes rows; gives a folder that `load_dataset` opens, map-style and streaming, with each media file stored once however
many rows show it:

    README.md        the dataset card; its YAML names the files below
    train.parquet    the rows, see `preference.row_schema`
    clips/ab/*.mp4   the media, named by content, in folders of the first two digits of their names

`push_dataset` publishes such a folder. Knows nothing of how rows are made or trained on; model cards are
`model_card.py`'s, which shares what makes names from outside safe in a card.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from longvpo_hf.artifacts import file_digest, whole_folder
from longvpo_hf.errors import DatasetError
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.funnel import REASONS
from longvpo_hf.preference import VideoPreference, row_schema
from longvpo_hf.public import markdown, public_name
from longvpo_hf.timeline import Clip

#: The Hub refuses a commit that puts more files than this into one folder.
MAX_FILES_PER_FOLDER = 10_000

_ROWS_PER_WRITE = 1000
_BY_REFERENCE = """\
## Media

These rows come without their media, which may not be redistributed. Get the corpus yourself, then:

```python
from longvpo_hf.intake.formats import from_reference

rows = from_reference(rows, video_root="where/the/corpus/lies")
```
"""
#: Stands in a card until `push_dataset` knows the dataset's name.
_UNNAMED = "path/or/name/of/this/dataset"
#: Names of sources that a card lists per licence; the rows name all of them.
_SOURCES_SHOWN = 20
#: Licences under the Hub's own ids; others are "other" there, and stand in the card as their corpus calls them.
_HUB_LICENCES = re.compile(r"apache-2\.0|mit|cc0-1\.0|cc-by(-nc)?(-nd|-sa)?-[234]\.0")

LONGVPO_CITATION = """\
@inproceedings{huang2025longvpo,
    title     = {{LongVPO: From Anchored Cues to Self-Reasoning for Long-Form Video Preference Optimization}},
    author    = {Zhenpeng Huang and Jiaqi Li and Zihan Jia and Xinhao Li and Desen Meng and Lingxue Song and Xi Chen and
                 Liang Li and Limin Wang},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2025},
    url       = {https://arxiv.org/abs/2602.02341}
}"""

TEMPORAL_CITATION = """\
@article{li2025temporal,
    title   = {{Temporal Preference Optimization for Long-Form Video Understanding}},
    author  = {Rui Li and Xiaohan Wang and Yuhui Zhang and Orr Zohar and Zeyu Wang and Serena Yeung-Levy},
    journal = {arXiv preprint arXiv:2501.13919},
    year    = {2025},
    url     = {https://arxiv.org/abs/2501.13919}
}"""


class DatasetWriter:
    """Writes rows and their media into a folder, as a context manager: it appears whole at the end or not at all.

    Args:
        folder: Where the dataset will stand; an earlier one there is replaced, anything else is an error.
        media_root: Leaves the media out, for corpora that may not be redistributed: rows then name each clip's file
            relative to this folder, and `adapters.from_reference` finds them there again. None copies the media.
    """

    def __init__(self, folder: Path, media_root: Path | None = None) -> None:
        self.folder = folder
        self._media_root = media_root
        self._open = ExitStack()
        self._names: dict[str, str] = {}
        self._rows: list[dict[str, Any]] = []
        self._clips: set[Clip] = set()
        self._content = hashlib.sha256()
        self.num_rows = 0

    def __enter__(self) -> DatasetWriter:
        if not _may_be_replaced(self.folder):
            raise DatasetError(
                f"{self.folder} holds something else than a dataset and would be replaced; name another folder."
            )
        self._part = self._open.enter_context(whole_folder(self.folder))
        if not self._media_root:
            (self._part / "clips").mkdir()
        self._parquet = pq.ParquetWriter(self._part / "train.parquet", row_schema())
        return self

    def add(self, preference: VideoPreference) -> None:
        """Adds one row, and its clips' media where they are not there yet.

        Raises:
            UnreadableVideo: If a media file is missing.
        """
        self._rows.append(preference.to_row(self._store))
        self._content.update(preference.id.encode())
        self._clips.update(preference.timeline.clips)
        self.num_rows += 1
        if len(self._rows) >= _ROWS_PER_WRITE:
            self._flush()

    def write_card(self, text: str) -> None:
        """Writes the dataset card, with licence and sources of the clips of the rows that were added before."""
        card = DatasetCard(text)
        if self._media_root is not None:
            card.data["configs"] = [
                {"config_name": "default", "data_files": [{"split": "train", "path": "train.parquet"}]}
            ]
            card.text = f"{card.text.rstrip()}\n\n{_BY_REFERENCE}"
        licence = _licence_ids(clip.licence for clip in self._clips)
        if licence is not None:
            card.data["license"] = licence
        # `datasets` tells local folders apart by their last name alone: without a version of its own, a dataset that
        # was built again would give the rows of the one before, from the cache.
        card.data["configs"][0]["version"] = f"0.0.{int(self._content.hexdigest()[:7], 16)}"
        card.text = f"{card.text.rstrip()}\n\n{_sources(self._clips)}"
        card.save(self._part / "README.md")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._parquet.close()
        media = [] if self._media_root else list((self._part / "clips").glob("*/*"))
        if len(media) == 1:
            # `datasets` chooses its builder by the more numerous kind of file, Parquet in a draw: a second copy makes
            # this a dataset of videos.
            shutil.copyfile(media[0], media[0].with_stem(f"{media[0].stem}-again"))
        self._open.__exit__(kind, error, trace)

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, schema=row_schema()))
            self._rows.clear()

    def _store(self, clip: Clip) -> str:
        if clip.path not in self._names:
            source = Path(clip.path)
            if not source.is_file():
                raise UnreadableVideo("missing_file", clip, "no such file")
            if self._media_root is not None:
                self._names[clip.path] = _relative(source, self._media_root)
                return self._names[clip.path]
            digest = file_digest(source)[:20]
            name = f"clips/{digest[:2]}/{digest}{source.suffix.lower() or '.mp4'}"
            (self._part / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, self._part / name)
            self._names[clip.path] = name
        return self._names[clip.path]


def dataset_card(
    title: str,
    recipe: str,
    num_rows: int,
    funnel: Mapping[str, Mapping[str, int]],
    facts: Mapping[str, object],
    reasons: Mapping[str, str] = REASONS,
    citations: str | None = None,
) -> str:
    """Text of a dataset card: the YAML that makes `load_dataset` work, the funnel, the facts of the build, the paper.

    `DatasetWriter.write_card` adds what it knows of the clips.

    Args:
        title: Heading.
        recipe: Name of the recipe, also a tag.
        num_rows: Rows in the dataset.
        funnel: As `filters.Funnel.close` gives it.
        facts: Named facts, e.g. models, seed, thresholds; shown as a table. Local paths lose their folders.
        reasons: What the names of drops mean, see `Funnel.reasons`.
        citations: BibTeX of the methods; None takes the one of `recipe`.
    """
    data = DatasetCardData(
        task_categories=["video-text-to-text"],
        tags=["preference", "dpo", "video", recipe],
        configs=[
            {
                "config_name": "default",
                "metadata_filenames": ["train.parquet"],
                "data_files": [{"split": "train", "path": ["train.parquet", "clips/**"]}],
            }
        ],
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {markdown(title)}",
        "",
        f"{num_rows} video preference rows: a timeline of clips, a question, a chosen and a rejected answer.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'rows = load_dataset("{_UNNAMED}", split="train")',
        "```",
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        *[f"| {markdown(name)} | {markdown(public_name(str(value)))} |" for name, value in facts.items()],
        "",
        "## Funnel",
        "",
        "| stage | number |",
        "|---|---|",
        *[f"| {markdown(name)} | {number} |" for name, number in funnel["stages"].items()],
        *[
            f"| dropped: {markdown(name)} ({markdown(reasons.get(name, ''))}) | {number} |"
            for name, number in funnel["dropped"].items()
        ],
        "",
        "## Citation",
        "",
        "```bibtex",
        citation(recipe) if citations is None else citations,
        "```",
        "",
    ]
    return "\n".join(lines)


def prepare_push(repo_id: str, *, private: bool | None = None) -> HfApi:
    """Makes sure that `push_dataset` may write to a repository, which is made where there is none.

    Call it before a build, so that a missing token costs nothing.

    Raises:
        DatasetError: If the name is not one of the Hub's, or the token may not write there.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.auth_check(repo_id, repo_type="dataset", write=True)
    except (HfHubHTTPError, HFValidationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DatasetError(
            f"The dataset {repo_id} cannot be written to ({reason}). Log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write to the namespace, and name the dataset namespace/name."
        ) from error
    return api


def push_dataset(folder: Path, repo_id: str, *, private: bool | None = None) -> str:
    """Publishes a folder that `DatasetWriter` wrote, in one commit that leaves nothing of an earlier one.

    The card in the folder is given the dataset's name. A push that broke off is repeated by the same call, which
    uploads no media twice.

    Args:
        folder: See `DatasetWriter`.
        repo_id: Name on the Hub, `namespace/name`; made where there is none yet.
        private: Whether a new repository is private; None leaves it to the namespace's setting.

    Returns:
        The commit's id, for `load_dataset(repo_id, revision=...)`.

    Raises:
        DatasetError: If a file of the folder is missing, media that a row names among them, a folder holds more files
            than the Hub takes, or the repository cannot be written to.
        ValueError: If the Hub refuses the card.
    """
    card = folder / "README.md"
    for path in (card, folder / "train.parquet"):
        if not path.is_file():
            raise DatasetError(f"{folder} lacks {path.name}: it is no dataset of DatasetWriter, or one without a card.")
    by_reference = "metadata_filenames" not in DatasetCard.load(card).data["configs"][0]
    named = set() if by_reference else _media_of(folder / "train.parquet")
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise DatasetError(
            f"{len(missing)} media files that rows of {folder / 'train.parquet'} name are not in {folder}, e.g. "
            f"{missing[0]!r}. Build the dataset again."
        )
    for parent, number in Counter(name.rpartition("/")[0] for name in named).items():
        if number > MAX_FILES_PER_FOLDER:
            raise DatasetError(
                f"{folder / parent} holds {number} media files and the Hub takes at most {MAX_FILES_PER_FOLDER} a "
                "folder. Run the build again: it reuses its finished work and spreads the files over more folders."
            )
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace(f'"{_UNNAMED}"', f'"{repo_id}"'), encoding="utf-8")
    api = prepare_push(repo_id, private=private)
    commit = api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder,
        commit_message="Upload preference rows and their clips",
        allow_patterns=["README.md", "train.parquet", "clips/*"],  # not what else lies there, e.g. inspect.html
        delete_patterns=["*.parquet", "clips/*"],
    )
    return str(commit.oid)


def citation(recipe: str) -> str:
    """BibTeX of the paper a recipe is from."""
    return TEMPORAL_CITATION if recipe.startswith("temporal") else LONGVPO_CITATION


def _may_be_replaced(folder: Path) -> bool:
    if (folder / "train.parquet").is_file() or not folder.exists():
        return True
    return folder.is_dir() and not any(folder.iterdir())


def _licence_ids(licences: Iterable[str]) -> str | list[str] | None:
    """Licences as the Hub's YAML names them."""
    named = {re.sub(r"[\s_]+", "-", licence.strip().lower()) for licence in licences}
    if named <= {""}:
        return None
    ids = sorted({name if _HUB_LICENCES.fullmatch(name) else "other" if name else "unknown" for name in named})
    return ids[0] if len(ids) == 1 else ids


def _sources(clips: Iterable[Clip]) -> str:
    """The card's section on where the clips are from."""
    numbers: dict[str, int] = {}
    sources: dict[str, set[str]] = {}
    for clip in clips:
        numbers[clip.licence] = numbers.get(clip.licence, 0) + 1
        sources.setdefault(clip.licence, set()).update([clip.source_id] if clip.source_id else [])
    lines = ["## Sources and licences", "", "Each clip of a row names its own.", ""]
    lines += ["| licence | clips | source videos | names |", "|---|---|---|---|"]
    for licence, number in sorted(numbers.items()):
        names = sorted(sources[licence])
        shown = ", ".join(markdown(public_name(name)) for name in names[:_SOURCES_SHOWN])
        more = f", … and {len(names) - _SOURCES_SHOWN} more" if len(names) > _SOURCES_SHOWN else ""
        lines.append(
            f"| {markdown(licence) or 'not stated'} | {number} | {len(names) or 'not named'} | {shown}{more} |"
        )
    return "\n".join([*lines, ""])


def _relative(path: Path, root: Path) -> str:
    """The path as rows name it: relative, with forward slashes.

    Raises:
        ValueError: If it lies outside of `root`.
    """
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise DatasetError(f"{path} lies outside of media_root={root}; rows name media below it only.") from None


def _media_of(parquet: Path) -> set[str]:
    """Every media file that the rows name."""
    names: set[str] = set()
    with pq.ParquetFile(parquet) as file:
        for batch in file.iter_batches(columns=["clips"]):
            clips = batch.column("clips").flatten()
            names.update(clips.field("file_name").to_pylist())
    return names
