"""Captioned videos as the page shows them: timelines of scenes under their summaries.

Captions are read whole; they are small beside what they describe.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from longvpo_hf.captions import CaptionedVideo, locate_video, read_captions_as_written, read_facts, video_roots
from longvpo_hf.public import public_name
from longvpo_hf.publishing.inspect_page.log import read_log
from longvpo_hf.publishing.inspect_page.parts import (
    CAPTION_CHARACTERS,
    ENTRIES,
    PICTURES,
    PICTURES_PER_ROW,
    Pictures,
    clips_to_show,
    cut,
    sample,
    shown_clip,
    spans,
)
from longvpo_hf.publishing.inspect_page.plots import caption_plots

_SCENES = 20_000  # about 10 MB with their captions and summaries
_SUMMARY_CHARACTERS = 1_000


def captions_data(folder: Path, num_videos: int, seed: int, video_root: Path | None) -> dict[str, Any]:
    """Captions as the page's script takes them."""
    facts, videos = read_facts(folder), read_captions_as_written(folder)
    wanted = sample(len(videos), num_videos, seed)
    roots = video_roots(folder) if video_root is None else video_roots(folder, video_root)
    pictures = Pictures(partial(locate_video, roots=roots))
    per_video = max(1, min(PICTURES_PER_ROW, PICTURES // max(1, len(wanted))))
    most_scenes = max(per_video, _SCENES // max(1, len(wanted)))
    rows = [
        {"number": number, **_shown_video(videos[number], pictures, per_video, most_scenes)}
        for number in tqdm(wanted, desc="inspect", unit="video", leave=False)
    ]
    return {
        "kind": "videos",
        "name": folder.name,
        "total": len(videos),
        "seed": seed,
        "invalid": 0,
        "plots": caption_plots(videos),
        "facts": [
            f"{name} {cut(public_name(str(facts[key])), CAPTION_CHARACTERS)}"
            for name, key in (("captions by", "captioner"), ("summaries by", "summariser"))
            if key in facts
        ],
        "rows": rows,
        "pictures": pictures.encoded,
        **read_log(folder.with_name(folder.name + ".log"), seed),
    }


def _shown_video(video: CaptionedVideo, pictures: Pictures, max_pictures: int, max_scenes: int) -> dict[str, Any]:
    timeline, starts = video.timeline, video.timeline.starts_timeline_seconds
    shown = clips_to_show(len(timeline), (), (), max_scenes)
    pictured = {shown[i] for i in clips_to_show(len(shown), (), (), max_pictures)}
    first = timeline.clips[0]
    scenes = []
    for index in shown:
        clip = timeline.clips[index]
        scenes.append(
            {
                "index": index,
                "span": spans(timeline, [index])[0],
                **shown_clip(clip, starts[index], pictures if index in pictured else None),
                "file": cut(public_name(clip.path), CAPTION_CHARACTERS),
                "path": [summary.id for summary in video.summary_path(index)],
            }
        )
    widest = sorted(video.summaries, key=lambda summary: -summary.level)[:max_scenes]
    return {
        "id": cut(public_name(first.source_id or first.path), CAPTION_CHARACTERS),
        "num_clips": len(timeline),
        "num_captions": len(video.captioned_scenes),
        "seconds": round(timeline.duration_seconds, 3),
        "history": [cut(line, _SUMMARY_CHARACTERS) for line in video.history[:ENTRIES]],
        "scenes": scenes,
        "summaries": [
            {
                "level": summary.level,
                "first": summary.first_scene,
                "last": summary.last_scene,
                "span": spans(timeline, range(summary.first_scene, summary.last_scene + 1))[0],
                "text": cut(summary.text, _SUMMARY_CHARACTERS),
            }
            for summary in sorted(widest, key=lambda summary: summary.first_scene)
        ],
    }
