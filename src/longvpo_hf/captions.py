"""Captions of videos as a folder: the contract between who captions scenes and who asks questions about them.

scenes.parquet   one row per video: its scenes, each with its place, caption and summary path; its summaries
captions.json    settings, models, version of the prompts, counts
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longvpo_hf.artifacts import whole_folder, write_json
from longvpo_hf.errors import DatasetError
from longvpo_hf.paths import OutsideRoot, path_inside, shared_cache, shown
from longvpo_hf.timeline import Clip, Timeline, clip_indices

if TYPE_CHECKING:
    import pyarrow as pa

SCENES_FILE = "scenes.parquet"
FACTS_FILE = "captions.json"
#: Stands in `captions.json`; another number is another layout.
FORMAT = "longvpo-captions-1"

_ROWS_PER_WRITE = 500


@cache
def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        {
            "scenes": pa.list_(
                pa.struct(
                    {
                        "id": pa.int32(),
                        "path": pa.string(),
                        "start_seconds": pa.float64(),
                        "end_seconds": pa.float64(),
                        "caption": pa.string(),
                        "summary_path": pa.list_(pa.string()),
                        "source_id": pa.string(),
                        "licence": pa.string(),
                        "source_start_seconds": pa.float64(),
                    }
                )
            ),
            "summaries": pa.list_(
                pa.struct(
                    {
                        "id": pa.string(),
                        "level": pa.int32(),
                        "first_scene": pa.int32(),
                        "last_scene": pa.int32(),
                        "text": pa.string(),
                        "children": pa.list_(pa.string()),
                    }
                )
            ),
        }
    )


def _schema_without_origin() -> pa.Schema:
    """Of folders that were written before clips knew where in their source they are from."""
    import pyarrow as pa

    scenes = list(_schema().field("scenes").type.value_type)[:-1]
    return pa.schema({"scenes": pa.list_(pa.struct(scenes)), "summaries": _schema().field("summaries").type})


@dataclass(frozen=True, slots=True)
class Summary:
    """What happens in neighbouring scenes: a node of a video's summary tree.

    Args:
        level: 1 for a summary of captions; one more than the highest level among what it sums up.
        first_scene: First scene it covers.
        last_scene: Last scene it covers.
        text: The summary.
        children: Ids of what it sums up, in order: `4` is the caption of scene 4, `0-7` the summary of scenes 0 to 7.
    """

    level: int
    first_scene: int
    last_scene: int
    text: str
    children: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.level < 1:
            raise DatasetError(f"level of a summary must be ≥ 1, got {self.level}.")
        if not 0 <= self.first_scene < self.last_scene:
            raise DatasetError(
                "A summary covers two scenes or more: 0 ≤ first_scene < last_scene, "
                f"got first_scene={self.first_scene}, last_scene={self.last_scene}."
            )
        if len(self.children) < 2:
            raise DatasetError(f"A summary sums up two texts or more, got children={self.children}.")

    @property
    def id(self) -> str:
        """Its scenes, e.g. `0-7`; no two summaries of a video cover the same."""
        return f"{self.first_scene}-{self.last_scene}"


@dataclass(frozen=True, slots=True)
class CaptionedVideo:
    """A video's scenes with their captions, and the tree of summaries over them.

    Args:
        timeline: The scenes in order; `caption` of a clip is the scene's caption, empty where it got none.
        summaries: In the order they were made: children before those that sum them up.

    Raises:
        ValueError: If the summaries are no tree over captioned scenes.
    """

    timeline: Timeline
    summaries: tuple[Summary, ...] = ()

    def __post_init__(self) -> None:
        self._roots()

    @property
    def captioned_scenes(self) -> tuple[int, ...]:
        """Scenes that have a caption; the others are part of the video but cannot be cited."""
        return tuple(scene for scene, clip in enumerate(self.timeline.clips) if clip.caption)

    def summary_path(self, scene: int) -> tuple[Summary, ...]:
        """The summaries that hold a scene's caption, from the widest down."""
        clip_indices((scene,), "scene", len(self.timeline))
        path: list[Summary] = []
        child = str(scene)
        for summary in self.summaries:
            if child in summary.children:
                path.insert(0, summary)
                child = summary.id
        return tuple(path)

    @property
    def history(self) -> tuple[str, ...]:
        """The whole video within `max_history_characters`: a line for each summary or caption that no other sums up."""
        return tuple(node.line for node in self._roots())

    def _roots(self) -> tuple[Node, ...]:
        nodes: tuple[Node, ...] = ()
        for scene, clip in enumerate(self.timeline.clips):
            nodes = with_caption(nodes, scene, clip.caption)
        for summary in self.summaries:
            nodes = with_summary(nodes, summary)
        return nodes


class Node(NamedTuple):
    """A caption (level 0) or a summary where it stands in the history."""

    level: int
    first: int
    last: int
    text: str

    @property
    def id(self) -> str:
        return str(self.first) if self.level == 0 else f"{self.first}-{self.last}"

    @property
    def line(self) -> str:
        label = f"Scene #{self.first}" if self.level == 0 else f"Scenes #{self.first} to #{self.last}"
        return f"{label}: {self.text}"


def with_caption(history: tuple[Node, ...], scene: int, caption: str) -> tuple[Node, ...]:
    return (*history, Node(0, scene, scene, caption)) if caption else history


def with_summary(history: tuple[Node, ...], summary: Summary) -> tuple[Node, ...]:
    """The history with a summary in place of what it sums up.

    Raises:
        ValueError: If these are no neighbours of it, or the summary's scenes or level are not theirs.
    """
    ids = [node.id for node in history]
    start = ids.index(summary.children[0]) if summary.children[0] in ids else 0
    nodes = history[start : start + len(summary.children)]
    wanted = (summary.children, summary.first_scene, summary.last_scene, summary.level)
    found = tuple(node.id for node in nodes)
    if not nodes or wanted != (found, nodes[0].first, nodes[-1].last, 1 + max(node.level for node in nodes)):
        raise DatasetError(
            f"Summary {summary.id} of level {summary.level} must sum up neighbours that no other summary "
            f"does, got children={summary.children}."
        )
    node = Node(summary.level, summary.first_scene, summary.last_scene, summary.text)
    return (*history[:start], node, *history[start + len(nodes) :])


def read_captions(folder: Path, *roots: Path) -> list[CaptionedVideo]:
    """What `caption_videos` wrote to a folder.

    The folder may be a stranger's, and names files of which rows are made and published. So these must be where builds
    put their clips, in the cache that all share or in `<name>.media` beside `<name>.scenes`, or in a folder named here.

    Args:
        folder: The folder of captions.
        roots: Where else its videos may be.

    Raises:
        DatasetError: If it holds no captions, or some that are broken or of files elsewhere; the error names the file
            and what is wrong.
    """
    allowed = video_roots(folder, *roots)
    videos = []
    for number, video in enumerate(read_captions_as_written(folder)):
        try:
            clips = [replace(clip, path=str(locate_video(clip.path, allowed))) for clip in video.timeline.clips]
        except OutsideRoot as error:
            raise DatasetError(f"{folder / SCENES_FILE}, video {number}: {error}") from error
        videos.append(CaptionedVideo(Timeline(tuple(clips)), video.summaries))
    return videos


def read_captions_as_written(folder: Path) -> list[CaptionedVideo]:
    """The same with the names of files as they were written: for a folder of one's own, or without opening the files.

    Raises:
        DatasetError: If it holds no captions, or some that are broken; the error names the file and what is wrong.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    read_facts(folder)
    path = folder / SCENES_FILE
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise DatasetError(f"{folder} lacks {SCENES_FILE}; caption the videos again.") from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({error}); caption the videos again.") from error
    if not (table.schema.equals(_schema()) or table.schema.equals(_schema_without_origin())):
        raise DatasetError(f"{path} has the columns {table.schema.names} of other types than captions have.")
    videos = []
    for number, row in enumerate(table.to_pylist()):
        try:
            videos.append(_from_row(row))
        except (ValueError, TypeError, KeyError) as error:
            raise DatasetError(f"{path}, video {number}: {error}") from error
    return videos


def video_roots(folder: Path, *roots: Path) -> tuple[Path, ...]:
    """The folders that the videos of a folder of captions may be in; see `read_captions`."""
    media = folder.with_name(folder.name.removesuffix(".scenes") + ".media")
    return (*roots, media, folder, shared_cache())


def locate_video(path: str, roots: Sequence[Path]) -> Path:
    """The file that captions name, if it is in one of these folders.

    Raises:
        OutsideRoot: If it is in none of them.
    """
    # Older captions name files from the folder that the build was started in.
    for name in dict.fromkeys((path, os.path.abspath(path) if path and "\0" not in path else path)):
        for root in roots:
            try:
                found = path_inside(root, name, allow_absolute=True)
            except OutsideRoot:
                continue
            if found.is_file() or os.path.isabs(name):
                return found
    raise OutsideRoot(
        f"{shown(path)} is not in {' or '.join(map(str, roots))}; name the folder of its videos, --source."
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """What `captions.json` of such a folder says: models, settings, version of the prompts, counts.

    Raises:
        ValueError: If there is none, or it is of another format.
    """
    path = folder / FACTS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{folder} holds no captions: it lacks {FACTS_FILE}.") from None
    except ValueError as error:
        raise DatasetError(f"{path} is no JSON ({error}); caption the videos again.") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else facts
        raise DatasetError(f"{path}: format must be {FORMAT!r}, got {found!r}; caption the videos again.")
    return facts


def write_captions(folder: Path, videos: Sequence[CaptionedVideo], facts: Mapping[str, Any]) -> None:
    """Writes videos and facts to a folder, which appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole_folder(folder) as part:
        with pq.ParquetWriter(part / SCENES_FILE, _schema()) as writer:
            for start in range(0, len(videos), _ROWS_PER_WRITE):
                rows = [_to_row(video) for video in videos[start : start + _ROWS_PER_WRITE]]
                writer.write_table(pa.Table.from_pylist(rows, schema=_schema()))
        write_json(part / FACTS_FILE, facts)


def _to_row(video: CaptionedVideo) -> dict[str, Any]:
    return {
        "scenes": [
            {**asdict(clip), "id": scene, "summary_path": [summary.id for summary in video.summary_path(scene)]}
            for scene, clip in enumerate(video.timeline.clips)
        ],
        "summaries": [{**asdict(summary), "id": summary.id} for summary in video.summaries],
    }


def _from_row(row: Mapping[str, Any]) -> CaptionedVideo:
    clips = []
    for number, scene in enumerate(row["scenes"]):
        if scene["id"] != number:
            raise DatasetError(f"scene {number} has the id {scene['id']}; ids count from 0.")
        clips.append(Clip(**{name: value for name, value in scene.items() if name not in ("id", "summary_path")}))
    summaries = []
    for node in row["summaries"]:
        summary = Summary(node["level"], node["first_scene"], node["last_scene"], node["text"], tuple(node["children"]))
        summaries.append(summary)
    return CaptionedVideo(Timeline(tuple(clips)), tuple(summaries))
