"""The card of a dataset, rendered from its record. What comes from outside is escaped wherever it is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from huggingface_hub import DatasetCardData

from longvpo_hf.public import markdown, public_text
from longvpo_hf.record import DatasetRecord, LicenceRecord

#: In the code of a card until `with_name` puts the name there.
UNNAMED = "path/or/name/of/this/dataset"
_LOADED = re.compile(r'^rows = load_dataset\("[^"\n]*", split="train"\)$', re.MULTILINE)

_BY_REFERENCE = """\
## Media

These rows come without their media, which may not be redistributed. Get the corpus yourself, then:

```python
from longvpo_hf.intake.formats import from_reference

rows = from_reference(rows, video_root="folder/of/the/corpus")
```
"""
#: Of the methods here.
_LIMITS = """\
## Limits

Questions and answers were written and filtered by models, which err; no person checked each row. Look at some with
`longvpo inspect`, and for ways to tell the chosen answer without the video with `longvpo audit`. The rejected answer is
one given from less of the video, and may be right.
"""
#: Licences under the Hub's own ids; others are "other" there, and on the card as their corpus calls them.
_HUB_LICENCES = re.compile(r"apache-2\.0|mit|cc0-1\.0|cc-by(-nc)?(-nd|-sa)?-[234]\.0")


def dataset_card(record: DatasetRecord) -> str:
    """Text of a dataset's card: the YAML that makes `load_dataset` work, the build, the funnel, sources and papers."""
    parts = [
        f"---\n{_metadata(record).to_yaml()}\n---\n",
        f"# {markdown(record.title)}\n",
        f"{record.num_rows} video preference rows: a timeline of clips, a question, a chosen and a rejected answer.\n",
        f"""```python
from datasets import load_dataset

rows = load_dataset("{UNNAMED}", split="train")
```
""",
        "## How it was made\n",
        _table(["", ""], ([markdown(name), markdown(public_text(str(value)))] for name, value in record.facts.items())),
        "## Funnel\n",
        _table(["stage", "number"], _funnel(record)),
        "## Citation\n",
        *(f"```bibtex\n{fenced(entry)}\n```\n" for entry in _citations(record)),
        *([_BY_REFERENCE] if record.by_reference else []),
        *([_LIMITS] if written_by_models(method.name for method in record.methods) else []),
        "## Sources and licences\n",
        "Each clip of a row names its own.\n",
        *_without_licence(record),
        _table(["licence", "clips", "source videos", "names"], map(_licence, record.licences)),
    ]
    return "\n".join(parts)


def written_by_models(methods: Iterable[str]) -> list[str]:
    """Those of the methods whose questions and answers models write: the ones of this package."""
    return sorted({name for name in methods if name.startswith(("longvpo-", "temporal-"))})


def with_name(card: str, repo_id: str) -> str:
    """A card with the dataset's name on the Hub in its code, whatever name was there."""
    return _LOADED.sub(lambda _: f'rows = load_dataset("{repo_id}", split="train")', card, count=1)


def _metadata(record: DatasetRecord) -> DatasetCardData:
    """The card's YAML. The version is the rows' own: `datasets` tells local folders apart by their last name alone, and
    would give the rows of an earlier dataset of that name from its cache."""
    if record.by_reference:
        files: dict[str, Any] = {"data_files": [{"split": "train", "path": "train.parquet"}]}
    else:
        files = {
            "metadata_filenames": ["train.parquet"],
            "data_files": [{"split": "train", "path": ["train.parquet", "clips/**"]}],
        }
    version = {"version": f"0.0.{int(record.digest[:7], 16)}"} if record.digest else {}
    return DatasetCardData(
        task_categories=["video-text-to-text"],
        tags=["preference", "dpo", "video", *dict.fromkeys(method.name for method in record.methods)],
        configs=[{"config_name": "default", **files, **version}],
        license=_licence_ids(licence.licence for licence in record.licences),
    )


def _funnel(record: DatasetRecord) -> Iterable[list[str]]:
    for name, number in record.funnel.get("stages", {}).items():
        yield [markdown(name), str(number)]
    for name, number in record.funnel.get("dropped", {}).items():
        yield [f"dropped: {markdown(name)} ({markdown(record.reasons.get(name, ''))})", str(number)]


def _citations(record: DatasetRecord) -> list[str]:
    return [entry for entry in dict.fromkeys(method.citation for method in record.methods) if entry]


def _without_licence(record: DatasetRecord) -> list[str]:
    """What a reader must know of clips whose corpus states no licence."""
    number = sum(licence.num_clips for licence in record.licences if not licence.licence)
    if not number:
        return []
    which = "any clip" if len(record.licences) == 1 else f"{number} clips"
    return [f"**No licence is stated for {which}.** Ask whom the videos belong to before you pass them on.\n"]


def _licence(licence: LicenceRecord) -> list[str]:
    more = licence.num_sources - len(licence.sources)
    names = ", ".join(map(markdown, licence.sources)) + (f", … and {more} more" if more else "")
    return [
        markdown(licence.licence) or "not stated",
        str(licence.num_clips),
        str(licence.num_sources or "not named"),
        names,
    ]


def _licence_ids(licences: Iterable[str]) -> str | list[str] | None:
    """Licences as the Hub's YAML names them."""
    named = {re.sub(r"[\s_]+", "-", licence.strip().lower()) for licence in licences}
    if named <= {""}:
        return None
    ids = sorted({name if _HUB_LICENCES.fullmatch(name) else "other" if name else "unknown" for name in named})
    return ids[0] if len(ids) == 1 else ids


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" if any(cells) else "| | |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:], ""])


def fenced(text: str) -> str:
    """Text that cannot leave the code block it is shown in."""
    return text.replace("```", "'''")
