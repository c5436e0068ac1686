"""Rows about timelines that are in no file, and a sampler that gives noise for their frames."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from _internvl import WORDS
from PIL import Image

from longvpo_hf.frames import Frames, FrameSampler, sampler
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import Clip, Timeline, View

#: The answers differ in length, as answers do. One token a word, and the template's end of the answer.
QUESTION_TOKENS, CHOSEN_TOKENS, REJECTED_TOKENS = 32, 128, 96
#: Clips of LongVPO's Stage 1 are at most so long, at one frame a second.
CLIP_SECONDS = 64


def need_no_ffmpeg() -> None:
    """Lets samplers be made where there is no FFmpeg: with noise for frames no file is opened."""
    sampler.need_ffmpeg = lambda: None


class NoiseSampler(FrameSampler):
    """Noise where the sampler's frames would be, squares of `side_px`; no file is opened."""

    def __init__(self, num_frames: int, side_px: int) -> None:
        super().__init__(num_frames, 1.0, side_px * side_px)
        self._side_px = side_px

    def __call__(self, timeline: Timeline, view: View | None = None, wanted: Set[int] | None = None) -> Frames:
        seconds = self.timeline_seconds(timeline, view)
        seen = (view or View.whole()).of(timeline)
        return Frames(noise(len(seconds), self._side_px), seconds, (0,) * len(seconds), seen.duration_seconds)


def noise(frames: int, side_px: int) -> torch.Tensor:
    """uint8 [frames, 3, side_px, side_px], the same each time."""
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (frames, 3, side_px, side_px), dtype=torch.uint8, generator=generator)


def anchor_frames(frames: int) -> int:
    """Frames of the clip that the reference sees."""
    return min(CLIP_SECONDS, frames // 2)


def row(frames: int) -> dict[str, Any]:
    """A preference about a timeline that gives so many frames at one a second; the reference sees the first clip."""
    seconds = anchor_frames(frames)
    clips = tuple(Clip(f"clip{number}.mp4", 0.0, float(seconds)) for number in range(frames // seconds))
    texts = [
        " ".join(WORDS[(first + place) % len(WORDS)] for place in range(tokens))
        for first, tokens in ((0, QUESTION_TOKENS), (20, CHOSEN_TOKENS - 1), (90, REJECTED_TOKENS - 1))
    ]
    preference = VideoPreference(Timeline(clips), *texts, evidence=(0,), reference=(0,))
    return preference.to_row(lambda clip: clip.path)


def stock_row(frames: int) -> dict[str, Any]:
    """The same row as TRL takes it, its frames as pictures that `with_pictures` draws."""
    mine = row(frames)
    content: list[dict[str, str]] = []
    for number in range(1, frames + 1):
        content += [{"type": "text", "text": f"Frame{number}: "}, {"type": "image", "text": ""}]
    content.append({"type": "text", "text": "\n" + mine["prompt"][-1]["content"]})
    prompt = [{"role": "user", "content": content}]
    return {"images": [], "prompt": prompt, **{name: mine[name] for name in ("chosen", "rejected")}}


def with_pictures(rows: list[dict[str, Any]], side_px: int) -> list[dict[str, Any]]:
    """Rows of `stock_row` with noise for their pictures."""
    drawn = []
    for each in rows:
        frames = sum(part["type"] == "image" for part in each["prompt"][0]["content"])
        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in noise(frames, side_px)]
        drawn.append({**each, "images": pictures})
    return drawn
