"""Captioned videos for tests of builders over scenes, and scripted models that tell what they were shown.

Scenes are numbered through over all videos of a test: scene n shows frames 3 n to 3 n + 2 of `media.py`, and its
caption is "thing n appears". Light to import: child processes that are killed import it, too.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.preference import VideoPreference
from longvpo_hf.responders import OnResult, OnWait, Request, one_by_one
from longvpo_hf.timeline import Clip, Timeline
from media import unfilmed_bytes

FRAMES_PER_SCENE = 3
SCENE_SECONDS = 0.3
_SHOWN = re.compile(r"^Scene #(\d+): (.*)$", re.MULTILINE)
_FOCUS = re.compile(r"One of them must be Scene #(\d+)")
_THING = re.compile(r"thing (\d+) appears")
_RMTREE = shutil.rmtree


def filmed(folder: Path, lengths: Sequence[int]) -> list[CaptionedVideo]:
    """Videos of so many scenes each, one file per video, that can be decoded."""
    from media import write_video

    assert sum(lengths) * FRAMES_PER_SCENE <= 216, "media.py has 216 colours"
    videos, first = [], 0
    for number, length in enumerate(lengths):
        path = write_video(folder / f"{number}.mp4", length * FRAMES_PER_SCENE, 10, first=first * FRAMES_PER_SCENE)
        videos.append(captioned(path, range(first, first + length)))
        first += length
    return videos


def unfilmed(folder: Path, lengths: Sequence[int]) -> list[CaptionedVideo]:
    """Videos that are never decoded: bytes with the name of a video."""
    folder.mkdir(parents=True, exist_ok=True)
    videos, first = [], 0
    for number, length in enumerate(lengths):
        path = folder / f"{number}.mp4"
        path.write_bytes(unfilmed_bytes(f"video {number}"))
        videos.append(captioned(path, range(first, first + length)))
        first += length
    return videos


def captioned(path: Path, things: Sequence[int], source: str = "") -> CaptionedVideo:
    """A video whose scenes show these things, one after the other."""
    clips = [
        Clip(str(path), SCENE_SECONDS * i, SCENE_SECONDS * (i + 1), f"thing {n} appears", source or path.stem, "mit")
        for i, n in enumerate(things)
    ]
    return CaptionedVideo(Timeline(tuple(clips)))


def things(timeline: Timeline, scenes: Sequence[int] | None = None) -> list[int]:
    """Which things the scenes of a timeline show, by their captions."""
    clips = timeline.clips if scenes is None else [timeline.clips[scene] for scene in scenes]
    return [int(_THING.findall(clip.caption)[0]) for clip in clips]


def frames_of(request: Request, budget: int | None = None) -> list[int]:
    """Which frames a request shows, by decoding them."""
    from longvpo_hf.frames import FrameSampler
    from media import indices_of

    assert request.timeline is not None
    budget = budget or FRAMES_PER_SCENE * len(request.view.of(request.timeline))
    return indices_of(FrameSampler(budget)(request.timeline, request.view).pixels)


def seen(request: Request) -> list[int]:
    """Which things a request shows, by the frames that are decoded for it; each must be shown with all its frames."""
    shown = [frame // FRAMES_PER_SCENE for frame in frames_of(request)]
    assert shown == [thing for thing in shown[::FRAMES_PER_SCENE] for _ in range(FRAMES_PER_SCENE)]
    return shown[::FRAMES_PER_SCENE]


def told(request: Request) -> list[int]:
    """The same by the clips of the view, nothing decoded."""
    assert request.timeline is not None
    return things(request.view.of(request.timeline))


@dataclass
class Scripted:
    """Answers by a function and remembers what it was asked."""

    answer: Callable[[Request], str]
    name: str = "scripted"
    requests: list[Request] = field(default_factory=list)

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """See `Responder.respond`."""
        self.requests += requests
        return one_by_one(requests, self.answer, on_result)


def cite(request: Request) -> str:
    """Writes a Stage-2 question as it should be: about two to four of the scenes that are shown, by chance."""
    assert request.timeline is None, "the question writer sees no frame"
    shown = {int(scene): caption for scene, caption in _SHOWN.findall(request.text)}
    focus = [int(scene) for scene in _FOCUS.findall(request.text)]
    rng = random.Random(request.text)
    others = [scene for scene in shown if scene not in focus]
    number = min(rng.randint(2, 4) - len(focus), len(others))
    return about({scene: shown[scene] for scene in sorted(focus + rng.sample(others, number))})


def about(scenes: dict[int, str]) -> str:
    """A Stage-2 question about scenes with their captions, in JSON."""
    named = " and ".join(caption.removesuffix(" appears") for caption in scenes.values())
    return json.dumps(
        {
            "question": f"What do {named} share?",
            "answer": "A colour.",
            "reasoning": " ".join(f"Scene #{scene} shows one of them." for scene in scenes),
        }
    )


def ask_of_type(request: Request) -> str:
    """Writes a temporal question: about the first and the last thing it is told of."""
    assert request.timeline is None, "the question writer sees no frame"
    named = _THING.findall(request.text)
    kind = request.text.partition("that asks ")[2].partition(", so that")[0]
    return json.dumps({"question": f"Between thing {named[0]} and thing {named[-1]}: {kind}?"})


def answer_by_clips(request: Request) -> str:
    """Says which things it was shown, and in how many frames if that is bounded."""
    return f"saw {told(request)} {request.view.num_frames or ''}".strip()


def rows_of(output: Path) -> list[VideoPreference]:
    """The rows of a dataset, as they stand in its file."""
    return [VideoPreference.from_row(row) for row in pq.read_table(output / "train.parquet").to_pylist()]


def rows_as_loaded(output: Path) -> list[VideoPreference]:
    """The rows as a trainer reads them."""
    from datasets import load_dataset

    from longvpo_hf.preference import undecoded

    # A cache of its own: `datasets` tells folders apart by their last name alone.
    cache = str(output.with_name(output.name + ".cache"))
    dataset = undecoded(load_dataset(str(output), split="train", cache_dir=cache))
    return [VideoPreference.from_row(row) for row in dataset]


def dropped_of(output: Path) -> list[dict[str, Any]]:
    """What a build dropped, as it logged it."""
    lines = (output.with_name(output.name + ".log") / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def check_funnel(output: Path, funnel: dict[str, dict[str, int]]) -> None:
    """Every draft is a row or a named drop, and the log says the same."""
    stages, dropped = funnel["stages"], funnel["dropped"]
    of_drafts = sum(number for reason, number in dropped.items() if reason != "too_few_captions")
    assert stages["drafts"] == stages["rows"] + of_drafts + stages.get("drafts beyond the rows asked for", 0)
    assert Counter(drop["reason"] for drop in dropped_of(output)) == dropped
    log = output.with_name(output.name + ".log")
    assert json.loads((log / "funnel.json").read_text()) == funnel
    if stages["rows"]:
        assert len(rows_of(output)) == stages["rows"]


def stop_at(name: str) -> Callable[..., None]:
    """`shutil.rmtree` of a process that is stopped when it has removed the first file of that name."""

    def rmtree(path: Path, **more: Any) -> None:
        if (path / name).exists():
            (path / name).unlink()
            raise KeyboardInterrupt
        _RMTREE(path, **more)

    return rmtree


def same_files(first: Path, second: Path) -> None:
    """Two builds gave the same rows, card, funnel and drops, byte for byte."""
    for name in ("train.parquet", "README.md"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name in ("funnel.json", "dropped.jsonl"):
        logs = [folder.with_name(folder.name + ".log") / name for folder in (first, second)]
        assert logs[0].read_bytes() == logs[1].read_bytes(), name
