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

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from longvpo_hf.artifacts import Fields, Journal
from longvpo_hf.building import prompts
from longvpo_hf.building.engine import Asker, Drop, dropped, log_folder
from longvpo_hf.building.filters import check_caption
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
from longvpo_hf.errors import ConfigError
from longvpo_hf.funnel import Funnel
from longvpo_hf.responders import Request, Responder, identity
from longvpo_hf.timeline import Timeline, View

#: Videos under way at once: scenes of one wait for each other, so these are a batch.
_VIDEOS_AT_ONCE = 64
#: Scenes of each of them per piece of work; 64 × 4 captions are what a kill can cost.
_SCENES_PER_PIECE = 4
#: More than "Scenes #100000 to #100000: " and a line break.
_LABEL_CHARACTERS = 40
#: English takes about six with the space; one more leaves room.
_CHARACTERS_PER_WORD = 7
_SENTENCE_END = re.compile(r"[.!?…][\"')\]]*(?=\s)|[。！？]")


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
        raise ConfigError(f"{output} holds something else than captions and would be replaced; name another folder.")
    settings = settings or CaptioningSettings()
    log = funnel or Funnel(log_folder(output))
    captioned = _Run(captioner, summariser, output, settings, log).videos(list(videos))
    why = "." if funnel else f"; dropped: {dropped(log.close())}. See {log_folder(output)} for each."
    if not captioned:
        raise ConfigError(f"No video got a caption{why}")
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
    write_captions(output, captioned, facts)
    return captioned


# ------------------------------------------------------------------------------------------------------------- the run


@dataclass(slots=True)
class _Video:
    """A video on its way."""

    timeline: Timeline
    captions: list[str] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    #: What stands before the next scene.
    history: tuple[Node, ...] = ()

    @property
    def is_done(self) -> bool:
        return len(self.captions) == len(self.timeline)

    def learn(self, record: Fields) -> None:
        """Takes the outcome of the next scene."""
        self.history = with_caption(self.history, len(self.captions), record["caption"])
        self.captions.append(record["caption"])
        for fields in record["summaries"]:
            summary = Summary(**{**fields, "children": tuple(fields["children"])})
            self.history = with_summary(self.history, summary)
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
        self.job = Journal(
            output.with_name(output.name + ".job"),
            [FORMAT, prompts.CAPTIONS_VERSION, asdict(settings), identity(captioner), identity(summariser)],
        )

    def videos(self, timelines: Sequence[Timeline]) -> list[CaptionedVideo]:
        """The videos that got a caption, in order."""
        from tqdm.auto import tqdm

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

    def _learn(self, video: _Video, record: Fields) -> None:
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

    def _work(self, videos: Sequence[_Video]) -> list[Fields]:
        """The next scenes of each video; a record for each, with the summaries that were made after it."""
        histories = [video.history for video in videos]
        records: list[Fields] = []
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
                histories[place] = with_caption(histories[place], scenes[place], text)
                records.append({"place": place, "caption": text, "drop": drop, "summaries": [], "failed": 0})
            self._sum_up(histories, records[-len(scenes) :])
        return records

    def _captions(
        self, videos: Sequence[_Video], scenes: Mapping[int, int], histories: Sequence[tuple[Node, ...]]
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

    def _sum_up(self, histories: list[tuple[Node, ...]], records: Sequence[Fields]) -> None:
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
                histories[record["place"]] = with_summary(histories[record["place"]], summary)


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
