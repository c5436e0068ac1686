"""Which videos are in benchmarks, so that nobody trains on what is evaluated.

Takes lists of benchmark videos, files of one id or sha256 per line that the user gives; says whether a source is among
them, and in words what was compared. Knows nothing of corpora's shapes or of video.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from longvpo_hf.errors import CorpusError
from longvpo_hf.intake.records import Source
from longvpo_hf.intake.store import is_video

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class BenchmarkVideos:
    """The videos of benchmarks, by id and by hash of their content.

    Args:
        ids: Ids (file names without folder and suffix) by benchmark.
        sha256: Hashes of files by benchmark.
    """

    ids: Mapping[str, frozenset[str]]
    sha256: Mapping[str, frozenset[str]]

    @classmethod
    def from_files(cls, lists: Mapping[str, Path]) -> BenchmarkVideos:
        """Reads one list per benchmark, e.g. `{"Video-MME": Path("videomme.txt")}`.

        A line is an id (a YouTube id, say), a file name, or the sha256 of a file; empty lines and lines that begin with
        `# ` are passed over.

        Raises:
            CorpusError: If a file is missing or names no video.
        """
        ids: dict[str, frozenset[str]] = {}
        sha256: dict[str, frozenset[str]] = {}
        for benchmark, path in lists.items():
            if not path.is_file():
                raise CorpusError(f"{path}, the list of the videos of {benchmark}, is missing.")
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            lines = [line for line in lines if line and not line.startswith("# ")]
            if not lines:
                raise CorpusError(f"{path} names no video of {benchmark}; one id or sha256 per line is expected.")
            sha256[benchmark] = frozenset(line.lower() for line in lines if _SHA256.fullmatch(line))
            ids[benchmark] = frozenset(_stem(line) for line in lines if not _SHA256.fullmatch(line))
        return cls(ids, sha256)

    def match(self, source: Source, sha256: str = "") -> str | None:
        """Which benchmark the source is in, and how that was found; None where it is in none.

        Args:
            source: Compared by its id and by its file's name.
            sha256: Hash of its file; empty compares none.
        """
        names = {_stem(source.source_id), source.source_id, _stem(source.name or source.path.name)}
        for benchmark, ids in self.ids.items():
            if found := sorted(names & ids):
                return f"{benchmark} has the id {found[0]}"
            if sha256 in self.sha256[benchmark]:
                return f"{benchmark} has a video of the same content, sha256 {sha256}"
        return None

    def checked(self) -> str:
        """What is compared, as a sentence for a dataset card."""
        lists = ", ".join(f"{name} ({len(self.ids[name])} ids, {len(self.sha256[name])} hashes)" for name in self.ids)
        return (
            f"Compared with the videos of {lists}, as given: by the source's id, its file's name and the sha256 of its "
            "file, each exactly. Another encoding or a part of a benchmark's video under another name is not found."
        )


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return path.stem if is_video(path.name) else path.name
