"""Recursive captioning (LongVPO, Stage 2): a scene is captioned from its frames and the captions before it.

Takes videos as timelines of their scenes, who captions and who sums up; gives the same timelines with a caption for
each scene and a tree of summaries, and writes them as a folder that question writers, people (`longvpo inspect`) and
later builds share:

    scenes.parquet   one row per video: its scenes, each with its place, caption and summary path; its summaries
    captions.json    settings, models, version of the prompts, what came out

What stands before a scene's own prompt has a bound in characters, whatever the models answer. Where it is outgrown,
neighbouring captions are summed up, then neighbouring summaries: one for three scenes at most by default, never more
than one for each, so cost grows linearly. A killed run goes on where it was when it is called again. Knows nothing of
questions or rows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from longvpo_hf import prompts
from longvpo_hf.builders.job import Job, Record
from longvpo_hf.builders.recipe import Asker, Drop, dropped, log_folder
from longvpo_hf.filters import Funnel, check_caption
from longvpo_hf.hub import put_in_place
from longvpo_hf.responders import Request, Responder, identity
from longvpo_hf.timeline import Clip, Timeline, View, check_indices

SCENES_FILE = "scenes.parquet"
FACTS_FILE = "captions.json"
#: Stands in `captions.json`; another number is another layout.
FORMAT = "longvpo-captions-1"

#: Videos under way at once: scenes of one wait for each other, so these are a batch.
_VIDEOS_AT_ONCE = 64
#: Scenes of each of them per piece of work; 64 × 4 captions are what a kill can cost.
_SCENES_PER_PIECE = 4
#: More than "Scenes #100000 to #100000: " and a line break.
_LABEL_CHARACTERS = 40
#: English takes about six with the space; one more leaves room.
_CHARACTERS_PER_WORD = 7
_SENTENCE_END = re.compile(r"[.!?…][\"')\]]*(?=\s)|[。！？]")
_ROWS_PER_WRITE = 500

_SCHEMA = pa.schema(
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


@dataclass(frozen=True, slots=True)
class CaptioningSettings:
    """How long captions, summaries and what stands before a scene may be.

    The paper names none of these. Characters are bounded, not tokens, so that the artefact does not depend on a
    tokenizer; four are about one token of English.

    Args:
        max_history_characters: Most characters of captions and summaries before a scene's own prompt: about 1,500
            tokens, little beside the frames of a scene.
        max_caption_characters: Longer captions are cut where a sentence or a word ends.
        max_summary_characters: Longer summaries are cut likewise.
        captions_per_summary: At most so many neighbours are summed up at once.
    """

    max_history_characters: int = 6000
    max_caption_characters: int = 600
    max_summary_characters: int = 800
    captions_per_summary: int = 8

    def __post_init__(self) -> None:
        for name in ("max_caption_characters", "max_summary_characters"):
            if getattr(self, name) < _LABEL_CHARACTERS:
                raise ValueError(f"{name} must be ≥ {_LABEL_CHARACTERS}, got {getattr(self, name)}.")
        if self.captions_per_summary < 2:
            raise ValueError(f"captions_per_summary must be ≥ 2, got {self.captions_per_summary}.")
        # Then what is left to sum up, a summary of it and the newest caption fit together.
        least = 3 * (max(self.max_caption_characters, self.max_summary_characters) + _LABEL_CHARACTERS)
        if self.max_history_characters < least:
            raise ValueError(
                f"max_history_characters must be ≥ {least}, three of the longest captions or summaries with their "
                f"labels, got {self.max_history_characters}; raise it, or lower max_caption_characters and "
                "max_summary_characters."
            )


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
            raise ValueError(f"level of a summary must be ≥ 1, got {self.level}.")
        if not 0 <= self.first_scene < self.last_scene:
            raise ValueError(
                "A summary covers two scenes or more: 0 ≤ first_scene < last_scene, "
                f"got first_scene={self.first_scene}, last_scene={self.last_scene}."
            )
        if len(self.children) < 2:
            raise ValueError(f"A summary sums up two texts or more, got children={self.children}.")

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
        check_indices((scene,), len(self.timeline), "scene")
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

    def _roots(self) -> tuple[_Node, ...]:
        nodes: tuple[_Node, ...] = ()
        for scene, clip in enumerate(self.timeline.clips):
            nodes = _with_caption(nodes, scene, clip.caption)
        for summary in self.summaries:
            nodes = _replaced(nodes, summary)
        return nodes


class _Node(NamedTuple):
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


def caption_videos(
    videos: Iterable[Timeline],
    captioner: Responder,
    summariser: Responder,
    output: Path,
    settings: CaptioningSettings | None = None,
    funnel: Funnel | None = None,
) -> list[CaptionedVideo]:
    """Captions every scene of every video and writes the result to a folder.

    Finished work lies in `<output>.job` beside it. Called again with the same arguments, an interrupted run goes on and
    ends with the same captions. A scene that cannot be decoded, or whose caption is empty or a refusal, keeps an empty
    caption and is logged by name; so is a video without any caption, which is left out.

    Args:
        videos: Timelines of scenes. Captions that their clips have already are replaced.
        captioner: Sees a scene's frames and reads what came before it.
        summariser: Reads captions and summaries; sees nothing.
        output: The folder; an earlier one there is replaced. See the module.
        settings: See `CaptioningSettings`.
        funnel: One that counts on after this; None logs to `<output>.log`.

    Returns:
        The videos in the order they came, as `read_captions` gives them.

    Raises:
        ValueError: If `output` holds something else, or no video got a caption.
    """
    if output.exists() and any(output.iterdir()) and not (output / FACTS_FILE).is_file():
        raise ValueError(f"{output} holds something else than captions and would be replaced; name another folder.")
    settings = settings or CaptioningSettings()
    log = funnel or Funnel(log_folder(output))
    captioned = _Run(captioner, summariser, output, settings, log).videos(list(videos))
    why = "." if funnel else f"; dropped: {dropped(log.close())}. See {log_folder(output)} for each."
    if not captioned:
        raise ValueError(f"No video got a caption{why}")
    facts = {
        "format": FORMAT,
        "captioner": captioner.name,
        "summariser": summariser.name,
        "prompt_version": prompts.CAPTIONS_VERSION,
        "settings": asdict(settings),
        "videos": len(captioned),
        "scenes": sum(len(video.timeline) for video in captioned),
        "captions": sum(len(video.captioned_scenes) for video in captioned),
        "summaries": sum(len(video.summaries) for video in captioned),
    }
    _write(output, captioned, facts)
    return captioned


def read_captions(folder: Path) -> list[CaptionedVideo]:
    """What `caption_videos` wrote to a folder.

    Raises:
        ValueError: If it holds no captions, or some that are broken; the error names the file and what is wrong.
    """
    read_facts(folder)
    path = folder / SCENES_FILE
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} lacks {SCENES_FILE}; caption the videos again.") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); caption the videos again.") from error
    if not table.schema.equals(_SCHEMA):
        raise ValueError(f"{path} has the columns {table.schema.names} of other types than captions have.")
    videos = []
    for number, row in enumerate(table.to_pylist()):
        try:
            videos.append(_from_row(row))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, video {number}: {error}") from error
    return videos


def read_facts(folder: Path) -> dict[str, Any]:
    """What `captions.json` of such a folder says: models, settings, version of the prompts, counts.

    Raises:
        ValueError: If there is none, or it is of another format.
    """
    path = folder / FACTS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no captions: it lacks {FACTS_FILE}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); caption the videos again.") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else facts
        raise ValueError(f"{path}: format must be {FORMAT!r}, got {found!r}; caption the videos again.")
    return facts


# ------------------------------------------------------------------------------------------------------------- the run


@dataclass(slots=True)
class _Video:
    """A video on its way."""

    timeline: Timeline
    captions: list[str] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    #: What stands before the next scene.
    history: tuple[_Node, ...] = ()

    @property
    def is_done(self) -> bool:
        return len(self.captions) == len(self.timeline)

    def learn(self, record: Record) -> None:
        """Takes the outcome of the next scene."""
        self.history = _with_caption(self.history, len(self.captions), record["caption"])
        self.captions.append(record["caption"])
        for fields in record["summaries"]:
            summary = Summary(**{**fields, "children": tuple(fields["children"])})
            self.history = _replaced(self.history, summary)
            self.summaries.append(summary)

    def captioned(self) -> CaptionedVideo:
        clips = zip(self.timeline.clips, self.captions, strict=True)
        return CaptionedVideo(
            Timeline(tuple(replace(clip, caption=caption) for clip, caption in clips)), tuple(self.summaries)
        )


class _Run:
    """One run's models, settings and finished work."""

    def __init__(
        self, captioner: Responder, summariser: Responder, output: Path, settings: CaptioningSettings, funnel: Funnel
    ) -> None:
        self.captioner = captioner
        self.summariser = summariser
        self.settings = settings
        self.funnel = funnel
        self.ask = Asker()
        self.job = Job(
            output.with_name(output.name + ".job"),
            [FORMAT, prompts.CAPTIONS_VERSION, asdict(settings), identity(captioner), identity(summariser)],
        )

    def videos(self, timelines: Sequence[Timeline]) -> list[CaptionedVideo]:
        """The videos that got a caption, in order."""
        videos = [_Video(timeline) for timeline in timelines]
        self.funnel.count("videos", len(videos))
        self.funnel.count("scenes", sum(len(timeline) for timeline in timelines))
        waiting = iter(videos)
        active: list[_Video] = []
        piece_index = 0
        with tqdm(total=sum(len(timeline) for timeline in timelines), desc="captions", unit="scene") as bar:
            while True:
                active = [video for video in active if not video.is_done]
                active += islice(waiting, _VIDEOS_AT_ONCE - len(active))
                if not active:
                    break
                inputs = [self._inputs(video) for video in active]
                # Pieces are worked out from what is known at their begin, and then learnt like those of an earlier run.
                for record in self.job.piece(f"{piece_index:06d}", inputs, partial(self._work, active)):
                    self._learn(active[record["place"]], record)
                    bar.update()
                piece_index += 1
        captioned = []
        for video in videos:
            if any(video.captions):
                captioned.append(video.captioned())
            else:
                clip = video.timeline.clips[0]
                self.funnel.drop("no_captions", path=clip.path, source_id=clip.source_id, scenes=len(video.timeline))
        self.funnel.count("captioned videos", len(captioned))
        return captioned

    def _inputs(self, video: _Video) -> list[Any]:
        """All that the next scenes of a video follow from."""
        begin = len(video.captions)
        scenes = video.timeline.clips[begin : begin + _SCENES_PER_PIECE]
        places = [[clip.path, clip.start_seconds, clip.end_seconds] for clip in scenes]
        return [begin, places, [node.line for node in video.history]]

    def _learn(self, video: _Video, record: Record) -> None:
        scene = len(video.captions)
        clip = video.timeline.clips[scene]
        if record["drop"] is None:
            self.funnel.count("captions")
        else:
            self.funnel.drop(
                **record["drop"],
                scene=scene,
                path=clip.path,
                source_id=clip.source_id,
                start_seconds=clip.start_seconds,
            )
        for stage, number in (("summaries", len(record["summaries"])), ("summaries cut together", record["failed"])):
            if number:
                self.funnel.count(stage, number)
        video.learn(record)

    def _work(self, videos: Sequence[_Video]) -> list[Record]:
        """The next scenes of each video; a record for each, with the summaries that were made after it."""
        histories = [video.history for video in videos]
        records: list[Record] = []
        for step in range(_SCENES_PER_PIECE):
            scenes = {
                place: len(video.captions) + step
                for place, video in enumerate(videos)
                if len(video.captions) + step < len(video.timeline)
            }
            if not scenes:
                break
            for place, caption in self._captions(videos, scenes, histories).items():
                text = "" if isinstance(caption, Drop) else caption
                drop = asdict(caption) if isinstance(caption, Drop) else None
                histories[place] = _with_caption(histories[place], scenes[place], text)
                records.append({"place": place, "caption": text, "drop": drop, "summaries": [], "failed": 0})
            self._sum_up(histories, records[-len(scenes) :])
        return records

    def _captions(
        self, videos: Sequence[_Video], scenes: Mapping[int, int], histories: Sequence[tuple[_Node, ...]]
    ) -> dict[int, str | Drop]:
        most = self.settings.max_caption_characters
        requests = [
            Request(
                prompts.caption_scene([node.line for node in histories[place]], most // _CHARACTERS_PER_WORD),
                videos[place].timeline,
                View.only([scene]),
            )
            for place, scene in scenes.items()
        ]
        answers = self.ask(self.captioner, requests, "captions")
        return {place: _checked(answer, most) for place, answer in zip(scenes, answers, strict=True)}

    def _sum_up(self, histories: list[tuple[_Node, ...]], records: Sequence[Record]) -> None:
        """Makes every history fit again, and notes in the records how."""
        most = self.settings.max_summary_characters
        while True:
            outgrown = [
                (record, nodes)
                for record in records
                if (nodes := _to_sum_up(histories[record["place"]], self.settings))
            ]
            if not outgrown:
                return
            requests = [
                Request(prompts.summarise_captions([node.line for node in nodes], most // _CHARACTERS_PER_WORD))
                for _, nodes in outgrown
            ]
            answers = self.ask(self.summariser, requests, "summaries")
            for (record, nodes), answer in zip(outgrown, answers, strict=True):
                text = _checked(answer, most)
                if isinstance(text, Drop):  # a history must stay within its bound: then the begin of each has to do
                    text = _cut(" ".join(_cut(node.text, max(1, most // len(nodes))) for node in nodes), most)
                    record["failed"] += 1
                summary = Summary(
                    1 + max(node.level for node in nodes),
                    nodes[0].first,
                    nodes[-1].last,
                    text,
                    tuple(node.id for node in nodes),
                )
                record["summaries"].append(asdict(summary))
                histories[record["place"]] = _replaced(histories[record["place"]], summary)


# --------------------------------------------------------------------------------------------------------- the history


def _with_caption(history: tuple[_Node, ...], scene: int, caption: str) -> tuple[_Node, ...]:
    return (*history, _Node(0, scene, scene, caption)) if caption else history


def _to_sum_up(history: tuple[_Node, ...], settings: CaptioningSettings) -> tuple[_Node, ...]:
    """What has to be summed up next for the history to fit, none if it does.

    Levels fall along a history. The lowest ones that hold half of `captions_per_summary` texts give their oldest: so
    few summaries are made, and each text is summed up about as often as any other. The newest caption always stays:
    the next scene goes on from it.
    """
    if _length(history) <= settings.max_history_characters:
        return ()
    older = history[:-1]
    nodes: list[_Node] = []
    for level in sorted({node.level for node in older}):
        nodes = [node for node in older if node.level <= level]
        if len(nodes) >= max(2, settings.captions_per_summary // 2):
            break
    nodes = nodes[: settings.captions_per_summary]
    while _length(nodes) > settings.max_history_characters:
        nodes.pop()
    return tuple(nodes)


def _replaced(history: tuple[_Node, ...], summary: Summary) -> tuple[_Node, ...]:
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
        raise ValueError(
            f"Summary {summary.id} of level {summary.level} must sum up neighbours that no other summary "
            f"does, got children={summary.children}."
        )
    node = _Node(summary.level, summary.first_scene, summary.last_scene, summary.text)
    return (*history[:start], node, *history[start + len(nodes) :])


def _length(nodes: Sequence[_Node]) -> int:
    """Characters of the nodes' lines and the breaks between them."""
    return sum(len(node.line) + 1 for node in nodes)


def _checked(answer: str | Drop, most: int) -> str | Drop:
    """The answer on one line and cut, so that it cannot pose as several scenes; or why it cannot stand."""
    if isinstance(answer, Drop):
        return answer
    text = " ".join(answer.split())
    reason = check_caption(text)
    return Drop(reason, text) if reason else _cut(text, most)


def _cut(text: str, most: int) -> str:
    """At most so many characters: up to the last sentence that ends in the second half, else the last word."""
    if len(text) <= most:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text[: most + 1]) if most // 2 <= match.end() <= most]
    end = ends[-1] if ends else text.rfind(" ", most // 2, most + 1)
    return text[: end if end > 0 else most].rstrip()


# ---------------------------------------------------------------------------------------------------------- the folder


def _write(folder: Path, videos: Sequence[CaptionedVideo], facts: Mapping[str, Any]) -> None:
    """The folder appears whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with pq.ParquetWriter(part / SCENES_FILE, _SCHEMA) as writer:
        for start in range(0, len(videos), _ROWS_PER_WRITE):
            rows = [_to_row(video) for video in videos[start : start + _ROWS_PER_WRITE]]
            writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    (part / FACTS_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    put_in_place(part, folder)


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
            raise ValueError(f"scene {number} has the id {scene['id']}; ids count from 0.")
        clips.append(Clip(**{name: value for name, value in scene.items() if name not in ("id", "summary_path")}))
    summaries = []
    for fields in row["summaries"]:
        summary = Summary(
            fields["level"], fields["first_scene"], fields["last_scene"], fields["text"], tuple(fields["children"])
        )
        summaries.append(summary)
    return CaptionedVideo(Timeline(tuple(clips)), tuple(summaries))
