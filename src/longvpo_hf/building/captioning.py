"""Recursive captioning (LongVPO, Stage 2): a scene is captioned from its frames and the captions before it.

Videos come as timelines of their scenes and leave with a caption for each scene and a tree of summaries, as a folder
(`captions.py`) that question writers, people (`longvpo inspect`) and later builds share.

What comes before a scene's own prompt is bounded in characters, whatever the models answer. When it grows beyond that,
neighbouring captions are summed up, then neighbouring summaries: by default one for three scenes at most, never more
than one for each, so that the cost grows linearly. A killed run goes on where it was when it is called again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from longvpo_hf.artifacts import Fields, Journal, Log
from longvpo_hf.building.asking import Answer, Asker, Remembered
from longvpo_hf.building.executors import HERE, Executor, carry_out
from longvpo_hf.building.filters import check_caption
from longvpo_hf.building.method import Drop, spans_of
from longvpo_hf.captions import (
    FACTS_FILE,
    FORMAT,
    CaptionedVideo,
    Node,
    Summary,
    with_caption,
    with_summary,
    write_captions,
)
from longvpo_hf.errors import ConfigError, check_types
from longvpo_hf.funnel import Funnel, in_one_line, log_folder, open_log
from longvpo_hf.paths import common_folder
from longvpo_hf.reasoning import CutOff
from longvpo_hf.responders import Request, Responder, identity
from longvpo_hf.timeline import Timeline, View

#: Version of the prompt texts below; a change of wording is a new version.
PROMPT_VERSION = "captions-1"

#: Videos under way at once: scenes of one wait for each other, so these are a batch.
_VIDEOS_AT_ONCE = 64
#: Videos that one worker captions: as some end, others of them take their place.
_VIDEOS_PER_GROUP = 128
#: Scenes of each of them per piece of work; 64 × 4 captions are what a kill can cost.
_SCENES_PER_PIECE = 4
#: More than "Scenes #100000 to #100000: " and a line break.
_LABEL_CHARACTERS = 40
#: English takes about six with the space; one more leaves room.
_CHARACTERS_PER_WORD = 7
_SENTENCE_END = re.compile(r"[.!?…][\"')\]]*(?=\s)|[。！？]")


@dataclass(frozen=True, slots=True)
class CaptioningSettings:
    """How long captions, summaries and what comes before a scene may be.

    The paper names none of these. Characters are bounded, not tokens, so that the captions do not depend on a
    tokenizer; four are about one token of English.

    Args:
        max_history_characters: Most characters of captions and summaries before a scene's own prompt: about 1,500
            tokens, little beside the frames of a scene.
        max_caption_characters: Longer captions are cut where a sentence or a word ends.
        max_summary_characters: Longer summaries are cut where a sentence or a word ends.
        captions_per_summary: Most neighbours that are summed up at once.
    """

    max_history_characters: int = 6000
    max_caption_characters: int = 600
    max_summary_characters: int = 800
    captions_per_summary: int = 8

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_caption_characters", "max_summary_characters"):
            if getattr(self, name) < _LABEL_CHARACTERS:
                raise ConfigError(f"{name} must be ≥ {_LABEL_CHARACTERS}, got {getattr(self, name)}.")
        if self.captions_per_summary < 2:
            raise ConfigError(f"captions_per_summary must be ≥ 2, got {self.captions_per_summary}.")
        # Then what is left to sum up, a summary of it and the newest caption fit together.
        least = 3 * (max(self.max_caption_characters, self.max_summary_characters) + _LABEL_CHARACTERS)
        if self.max_history_characters < least:
            raise ConfigError(
                f"max_history_characters must be ≥ {least}, three of the longest captions or summaries with their "
                f"labels, got {self.max_history_characters}; raise it, or lower max_caption_characters and "
                "max_summary_characters."
            )


def caption_prompt(history: Sequence[str], max_words: int) -> str:
    """Asks for the caption of the scene that is shown (LongVPO, Stage 2: from its frames and the captions before it).

    Args:
        history: What came before, in order, a line each; empty for the first scene.
        max_words: How long the caption may be.
    """
    told = "What came before it:\n" + "\n".join(history) + "\n\n" if history else ""
    return (
        f"You see one scene of a longer video. {told}"
        f"Describe this scene in at most {max_words} words: who and what is seen, what they do and what changes. Name "
        "people, things and places that were there before as they were named before, and tell nothing again that only "
        "happened before. Answer with the description only."
    )


def summary_prompt(descriptions: Sequence[str], max_words: int) -> str:
    """Asks for a summary of what happens in neighbouring scenes, so that a later one can be described with it.

    Args:
        descriptions: Their captions or summaries, in order, a line each.
        max_words: How long the summary may be.
    """
    lines = "\n".join(descriptions)
    return (
        f"These are descriptions of neighbouring scenes of one video, in order:\n{lines}\n\n"
        f"Sum them up in at most {max_words} words, in order of time: who and what appears, what they do and what "
        "changes. Keep the names of people, things and places. Answer with the summary only."
    )


def caption_videos(
    videos: Iterable[Timeline],
    captioner: Responder,
    summariser: Responder,
    output: Path,
    settings: CaptioningSettings | None = None,
    funnel: Funnel | None = None,
    executor: Executor = HERE,
) -> list[CaptionedVideo]:
    """Captions every scene of every video and writes the result to a folder.

    Finished work is kept in `<output>.job` beside it. Called again with the same arguments, an interrupted run goes on
    and ends with the same captions. A scene that cannot be decoded, or whose caption is empty or a refusal, keeps an
    empty caption and is logged by name; so is a video without any caption, which is left out.

    Args:
        videos: Timelines of scenes. Captions that their clips have already are replaced.
        captioner: Sees a scene's frames and reads what came before it.
        summariser: Reads captions and summaries; sees nothing.
        output: The folder; an earlier one there is replaced.
        settings: See `CaptioningSettings`.
        funnel: One that goes on counting after this; None logs to `<output>.log`.
        executor: Who captions. A shard writes no folder.

    Returns:
        The videos in the order they came, as `read_captions` gives them.

    Raises:
        ConfigError: If `output` is a folder of another kind, or no video got a caption.
        Unfinished: If some videos are for other shards to caption.
    """
    if output.exists() and any(output.iterdir()) and not (output / FACTS_FILE).is_file():
        raise ConfigError(f"{output} is not a captions folder and would be replaced; name another folder.")
    settings = settings or CaptioningSettings()
    timelines = list(videos)
    root = common_folder(clip.path for timeline in timelines for clip in timeline.clips)
    with open_log(executor.place(output), funnel) as log:
        bench = _Bench(captioner, summariser, output.with_name(output.name + ".job"), settings, root)
        captioned = _account(timelines, _captions_of(timelines, bench, executor), log)
        counts = None if funnel else log.close()
        if not captioned:
            why = f"; dropped: {in_one_line(counts)}. See {log_folder(output)} for each." if counts else "."
            raise ConfigError(f"No video got a caption{why}")
        facts = {
            "format": FORMAT,
            "captioner": captioner.name,
            "summariser": summariser.name,
            "prompt_version": PROMPT_VERSION,
            "settings": asdict(settings),
            "videos": len(captioned),
            "scenes": sum(len(video.timeline) for video in captioned),
            "captions": sum(len(video.captioned_scenes) for video in captioned),
            "summaries": sum(len(video.summaries) for video in captioned),
        }
        if executor.joins:
            write_captions(output, captioned, facts)
    return captioned


# ------------------------------------------------------------------------------------------------------------- the run


@dataclass(slots=True)
class _Caption:
    """What became of one scene.

    Args:
        video: Place of its video among those of the piece.
        text: Its caption; empty where it got none.
        drop: Why it got none.
        summaries: Those made once it was captioned, so that the history fits again.
        num_cut: How many of them were cut together from what they sum up, for want of an answer.
    """

    video: int
    text: str
    drop: Drop | None
    summaries: list[Summary] = field(default_factory=list)
    num_cut: int = 0

    def to_fields(self) -> Fields:
        """What a piece of work stores of it."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> _Caption:
        """The inverse of `to_fields`."""
        summaries = [Summary(**{**summary, "children": tuple(summary["children"])}) for summary in fields["summaries"]]
        drop = fields["drop"]
        return cls(**{**fields, "drop": None if drop is None else Drop(**drop), "summaries": summaries})


@dataclass(slots=True)
class _Video:
    """A video that is being captioned."""

    timeline: Timeline
    captions: list[str] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    #: What comes before the next scene.
    history: tuple[Node, ...] = ()

    @property
    def is_done(self) -> bool:
        return len(self.captions) == len(self.timeline)

    def add(self, caption: _Caption) -> None:
        """Adds what became of the next scene."""
        self.history = with_caption(self.history, len(self.captions), caption.text)
        self.captions.append(caption.text)
        for summary in caption.summaries:
            self.history = with_summary(self.history, summary)
            self.summaries.append(summary)

    def captioned(self) -> CaptionedVideo:
        clips = zip(self.timeline.clips, self.captions, strict=True)
        return CaptionedVideo(
            Timeline(tuple(replace(clip, caption=caption) for clip, caption in clips)), tuple(self.summaries)
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """A piece of work: videos that are captioned together, so that models are asked for many scenes at once."""

    number: int
    timelines: tuple[Timeline, ...]

    @property
    def name(self) -> str:
        """How its files' names start."""
        return f"{self.number:05d}"


def _captions_of(timelines: Sequence[Timeline], bench: _Bench, executor: Executor) -> list[list[_Caption]]:
    """The captions of every video, in order."""
    starts = range(0, len(timelines), _VIDEOS_PER_GROUP)
    groups = [
        _Group(number, tuple(timelines[start : start + _VIDEOS_PER_GROUP])) for number, start in enumerate(starts)
    ]
    what = f"captioning {_VIDEOS_PER_GROUP} videos at a time"
    given = carry_out(executor, bench, groups, what, bench.folder)
    return [[_Caption.from_fields(fields) for fields in video["captions"]] for group in given for video in group]


def _account(
    timelines: Sequence[Timeline], captions: Sequence[Sequence[_Caption]], funnel: Funnel
) -> list[CaptionedVideo]:
    """The videos that got a caption, in order; counts what they went through."""
    funnel.count("videos", len(timelines))
    funnel.count("scenes", sum(len(timeline) for timeline in timelines))
    captioned = []
    for timeline, scenes in zip(timelines, captions, strict=True):
        video = _Video(timeline)
        for caption in scenes:
            _count(video, caption, funnel)
            video.add(caption)
        if any(video.captions):
            captioned.append(video.captioned())
        else:
            clip = timeline.clips[0]
            funnel.drop("no_captions", path=clip.path, source_id=clip.source_id, scenes=len(timeline))
    funnel.count("captioned videos", len(captioned))
    return captioned


def _count(video: _Video, caption: _Caption, funnel: Funnel) -> None:
    """Counts what became of a video's next scene."""
    scene = len(video.captions)
    clip = video.timeline.clips[scene]
    if caption.drop is None:
        funnel.count("captions")
    else:
        funnel.drop(
            caption.drop.reason,
            detail=caption.drop.detail,
            scene=scene,
            path=clip.path,
            source_id=clip.source_id,
            start_seconds=clip.start_seconds,
        )
    for stage, number in (("summaries", len(caption.summaries)), ("summaries cut together", caption.num_cut)):
        if number:
            funnel.count(stage, number)


class _Bench:
    """Captions groups of videos: the models, settings and finished work."""

    def __init__(
        self, captioner: Responder, summariser: Responder, folder: Path, settings: CaptioningSettings, root: str
    ) -> None:
        self.captioner = captioner
        self.summariser = summariser
        self.settings = settings
        self.folder = folder
        self._root = root
        self._journal = Journal(
            folder, [FORMAT, PROMPT_VERSION, asdict(settings), identity(captioner), identity(summariser)]
        )
        self._remembered = Remembered(folder)  # nothing is

    def work(self, piece: _Group) -> list[Fields]:
        """The captions of each video of a group."""
        from tqdm.auto import tqdm

        total = sum(len(timeline) for timeline in piece.timelines)
        with tqdm(total=total, desc="captions", unit="scene") as bar:

            def next_scenes(name: str, videos: Sequence[_Video]) -> list[Fields]:
                captions = self._journal.piece(name, self._inputs(videos), partial(self._work, videos))
                bar.update(len(captions))
                return captions

            records = self._through(piece, next_scenes)
        assert records is not None
        return records

    def finished(self, piece: _Group) -> list[Fields] | None:
        """The same, if all of it is there."""
        return self._through(piece, lambda name, videos: self._journal.finished(name, self._inputs(videos)))

    def _through(
        self, group: _Group, next_scenes: Callable[[str, Sequence[_Video]], list[Fields] | None]
    ) -> list[Fields] | None:
        """Goes through the scenes of a group, some of each video at a time."""
        videos = [_Video(timeline) for timeline in group.timelines]
        captions: dict[int, list[Fields]] = {id(video): [] for video in videos}
        waiting = iter(videos)
        active: list[_Video] = []
        for step in itertools.count():
            active = [video for video in active if not video.is_done]
            active += itertools.islice(waiting, _VIDEOS_AT_ONCE - len(active))
            if not active:
                break
            given = next_scenes(f"{group.name}-{step:06d}", active)
            if given is None:
                return None
            for fields in given:
                caption = _Caption.from_fields(fields)
                active[caption.video].add(caption)
                captions[id(active[caption.video])].append(fields)
        return [{"captions": captions[id(video)]} for video in videos]

    def _inputs(self, videos: Sequence[_Video]) -> list[Any]:
        """All that the next scenes of some videos follow from."""
        inputs = []
        for video in videos:
            start = len(video.captions)
            scenes = Timeline(video.timeline.clips[start : start + _SCENES_PER_PIECE])
            inputs.append([start, spans_of(scenes, self._root), [node.line for node in video.history]])
        return inputs

    def _work(self, videos: Sequence[_Video], log: Log) -> list[Fields]:
        """Captions the next scenes of each video, one after the other; the first of all videos are asked at once."""
        ask = Asker(log, self._remembered, self._root)
        histories = [video.history for video in videos]
        captions: list[_Caption] = []
        for step in range(_SCENES_PER_PIECE):
            scenes = {
                place: len(video.captions) + step
                for place, video in enumerate(videos)
                if len(video.captions) + step < len(video.timeline)
            }
            if not scenes:
                break
            new = self._captions(videos, scenes, histories, ask)
            for caption in new:
                place = caption.video
                histories[place] = with_caption(histories[place], scenes[place], caption.text)
            self._sum_up(histories, new, ask)
            captions += new
        return [caption.to_fields() for caption in captions]

    def _captions(
        self, videos: Sequence[_Video], scenes: Mapping[int, int], histories: Sequence[tuple[Node, ...]], ask: Asker
    ) -> list[_Caption]:
        """Captions one scene of each video; `scenes` has its index by the video's place."""
        most = self.settings.max_caption_characters
        requests = [
            Request(
                caption_prompt([node.line for node in histories[place]], most // _CHARACTERS_PER_WORD),
                videos[place].timeline,
                View.only([scene]),
            )
            for place, scene in scenes.items()
        ]
        captions = []
        for place, answer in zip(scenes, ask(self.captioner, requests, "captions"), strict=True):
            text = _checked(answer, most)
            captions.append(_Caption(place, "", text) if isinstance(text, Drop) else _Caption(place, text, None))
        return captions

    def _sum_up(self, histories: list[tuple[Node, ...]], captions: Sequence[_Caption], ask: Asker) -> None:
        """Makes every history fit again, and adds to the captions the summaries that this took."""
        most = self.settings.max_summary_characters
        while True:
            outgrown = [
                (caption, nodes)
                for caption in captions
                if (nodes := _to_sum_up(histories[caption.video], self.settings))
            ]
            if not outgrown:
                return
            requests = [
                Request(summary_prompt([node.line for node in nodes], most // _CHARACTERS_PER_WORD))
                for _, nodes in outgrown
            ]
            answers = ask(self.summariser, requests, "summaries")
            for (caption, nodes), answer in zip(outgrown, answers, strict=True):
                text = _checked(answer, most)
                if isinstance(text, Drop):  # the history must fit nevertheless: the start of each text has to do
                    text = _cut(" ".join(_cut(node.text, max(1, most // len(nodes))) for node in nodes), most)
                    caption.num_cut += 1
                summary = Summary(
                    1 + max(node.level for node in nodes),
                    nodes[0].first,
                    nodes[-1].last,
                    text,
                    tuple(node.id for node in nodes),
                )
                caption.summaries.append(summary)
                histories[caption.video] = with_summary(histories[caption.video], summary)


# --------------------------------------------------------------------------------------------------------- the history


def _to_sum_up(history: tuple[Node, ...], settings: CaptioningSettings) -> tuple[Node, ...]:
    """What has to be summed up next for the history to fit, none if it does.

    Levels fall along a history. The lowest ones that hold half of `captions_per_summary` texts give their oldest: so
    few summaries are made, and each text is summed up about as often as any other. The newest caption always stays:
    the next scene goes on from it.
    """
    if _length(history) <= settings.max_history_characters:
        return ()
    older = history[:-1]
    nodes: list[Node] = []
    for level in sorted({node.level for node in older}):
        nodes = [node for node in older if node.level <= level]
        if len(nodes) >= max(2, settings.captions_per_summary // 2):
            break
    nodes = nodes[: settings.captions_per_summary]
    while _length(nodes) > settings.max_history_characters:
        nodes.pop()
    return tuple(nodes)


def _length(nodes: Sequence[Node]) -> int:
    """Characters of the nodes' lines and the breaks between them."""
    return sum(len(node.line) + 1 for node in nodes)


def _checked(answer: Answer, most: int) -> Answer:
    """The answer on one line and cut, so that it cannot pose as several scenes; or why it cannot stand."""
    if isinstance(answer, Drop):
        return answer
    text = " ".join(answer.split())
    reason = "cut_off" if not text and isinstance(answer, CutOff) else check_caption(text)
    return Drop(reason, text) if reason else _cut(text, most)


def _cut(text: str, most: int) -> str:
    """At most so many characters: up to the last sentence that ends in the second half, else the last word."""
    if len(text) <= most:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text[: most + 1]) if most // 2 <= match.end() <= most]
    end = ends[-1] if ends else text.rfind(" ", most // 2, most + 1)
    return text[: end if end > 0 else most].rstrip()
