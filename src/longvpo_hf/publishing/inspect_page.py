"""A page to look at the rows of a preference dataset, or at captioned videos: `longvpo inspect`.

Takes a dataset folder (`hub.py`) or a folder of captions (`builders/captioning.py`), and the log of its build beside
it, where there is one; gives one HTML file that needs nothing but itself: rows with the filmstrip of their timeline, or
videos as timelines of scenes under their summaries; plots over the whole, what was dropped and why. How it looks and
filters is `inspect_page.html`'s. Knows nothing of how rows are made or trained on.

Nothing that stands in a row, a file name or a log can act on the page. It reaches the page as JSON that no browser
runs, is shown as text only, and the page's policy names its own script and style by their hashes and forbids all else.
The page is bounded (see the constants below), and so is memory: only the rows shown are kept, of the others numbers.
(Captions are read whole; they are small beside what they describe.)
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from longvpo_hf.artifacts import write_text
from longvpo_hf.captions import FACTS_FILE, CaptionedVideo, read_captions, read_facts
from longvpo_hf.errors import DatasetError
from longvpo_hf.frames import FrameSampler, UnreadableVideo
from longvpo_hf.funnel import REASONS
from longvpo_hf.preference import TRAINING_COLUMNS, VideoPreference
from longvpo_hf.public import public_name
from longvpo_hf.timeline import Clip, Timeline

MAX_ROWS = 5_000

# What bounds the page: at these numbers about 25 MB of pictures.
_PICTURES = 4_800
_PICTURES_PER_ROW = 64
_PICTURE_PIXELS = 160 * 90
_JPEG_QUALITY = 70
_TEXT_CHARACTERS = 4_000
_CAPTION_CHARACTERS = 400
_SCENES = 20_000  # about 10 MB with their captions and summaries
_SUMMARY_CHARACTERS = 1_000
_ENTRIES = 50  # verdicts of a row, fields of a drop
_DROPS_PER_REASON = 25

_ROWS_PER_READ = 500
_FILE = re.compile(r"(/|~/|[A-Za-z]:\\).*\.\w{2,5}")
_BINS = 12
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclass(frozen=True, slots=True)
class InspectPage:
    """A page that was written.

    Args:
        path: The HTML file.
        num_rows: Rows, or captioned videos, it shows.
        total_rows: Rows of the dataset, or all the videos.
        things: What they are: "rows" or "videos".
    """

    path: Path
    num_rows: int
    total_rows: int
    things: str = "rows"


def write_inspect_page(
    folder: Path,
    output: Path | None = None,
    num_rows: int = 200,
    seed: int = 0,
    video_root: Path | None = None,
) -> InspectPage:
    """Writes the page of a dataset or of captions; the same folder and seed give the same page, to the byte.

    Args:
        folder: The dataset (see `hub.py`), or the captions (`builders/captioning.py`). `<folder>.log/` beside it is
            shown too, where it is there.
        output: The HTML file; None for `<folder>/inspect.html`.
        num_rows: At most so many rows or videos are shown, one drawn from each of so many equal parts of the whole.
            The more, the fewer pictures of each.
        seed: Draws them.
        video_root: Where the media of rows that were published by reference lie; None for the dataset's own folder.

    Raises:
        ValueError: If the folder holds neither, `num_rows` is out of bounds, or `video_root` is no folder.
    """
    if not 1 <= num_rows <= MAX_ROWS:
        raise DatasetError(f"num_rows must be in [1, {MAX_ROWS}] so that a browser can open the page, got {num_rows}.")
    if video_root is not None and not video_root.is_dir():
        raise DatasetError(f"video_root must be the folder that the rows' media lie in, got {video_root}.")
    folder = Path(os.path.abspath(folder))  # `.` has neither a name nor a log beside it
    path = output or folder / "inspect.html"
    if (folder / FACTS_FILE).is_file():
        data = _captions_data(folder, num_rows, seed, video_root)
    else:
        data = _rows_data(folder, num_rows, seed, video_root)
    write_text(path, _page(folder.name, data))
    return InspectPage(path, len(data["rows"]), data["total"], data["kind"])


# ------------------------------------------------------------------------------------------------------------ the rows


def _rows_data(folder: Path, num_rows: int, seed: int, video_root: Path | None) -> dict[str, Any]:
    """A dataset as the page's script takes it."""
    with _open_rows(folder / "train.parquet") as file:
        total = file.metadata.num_rows
        wanted = set(_sample(total, num_rows, seed))
        summary = _Summary()
        pictures = _Pictures(partial(_inside, folder) if video_root is None else partial(_inside_really, video_root))
        per_row = max(1, min(_PICTURES_PER_ROW, _PICTURES // max(1, len(wanted))))
        rows: list[dict[str, Any]] = []
        for number, row in enumerate(tqdm(_rows(file), total=total, desc="inspect", unit="row", leave=False)):
            try:
                preference = VideoPreference.from_row(row)
            except ValueError as error:
                summary.num_invalid += 1
                if number in wanted:
                    rows.append({"number": number, "id": _cut(row["id"]), "error": _cut(error)})
                continue
            summary.add(preference)
            if number in wanted:
                rows.append({"number": number, **_shown_row(preference, pictures, per_row)})
    log = _read_log(folder.with_name(folder.name + ".log"), seed)
    files = [clip["file"] for row in rows for clip in row.get("clips", [])]
    if video_root is None and files and not any(file.startswith("clips/") for file in files):
        log["notices"].append("These rows come without their media. Name the folder it lies in with --video-root.")
    return {
        "kind": "rows",
        "name": folder.name,
        "total": total,
        "seed": seed,
        "invalid": summary.num_invalid,
        "plots": summary.plots(),
        "facts": [],
        "rows": rows,
        "pictures": pictures.encoded,
        **log,
    }


def _open_rows(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise DatasetError(f"{path.parent} is no preference dataset: it lacks {path.name}. Name the folder of a build.")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({error}); build or download it again.") from error
    missing = sorted(set(TRAINING_COLUMNS) - set(file.schema_arrow.names))
    if missing:
        file.close()
        raise DatasetError(f"{path} lacks the columns {missing}: its rows are no video preferences.")
    return file


def _rows(file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    try:
        for batch in file.iter_batches(batch_size=_ROWS_PER_READ):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"train.parquet is broken ({error}); build or download it again.") from error


def _sample(total: int, wanted: int, seed: int) -> list[int]:
    """Ascending row numbers, one drawn from each of `wanted` equal parts of `[0, total)`."""
    rng = random.Random(seed)
    parts = min(total, wanted)
    return [rng.randrange(i * total // parts, (i + 1) * total // parts) for i in range(parts)]


def _shown_row(preference: VideoPreference, pictures: _Pictures, max_clips: int) -> dict[str, Any]:
    """A row as the page's script takes it."""
    timeline, origin = preference.timeline, preference.provenance
    shown = _clips_to_show(len(timeline), preference.evidence, preference.reference, max_clips)
    similarities, starts = origin.similarities, timeline.starts_timeline_seconds
    clips = []
    for index in shown:
        clip, start = timeline.clips[index], starts[index]
        picture, problem = pictures.of(clip)
        similarity = similarities[index] if index < len(similarities) else None
        clips.append(
            {
                "index": index,
                "start": round(start, 3),
                "end": round(start + clip.duration_seconds, 3),
                "source_start": round(clip.start_seconds, 3),
                "source_end": round(clip.end_seconds, 3),
                "file": _cut(clip.path, _CAPTION_CHARACTERS),
                "source": _cut(public_name(clip.source_id), _CAPTION_CHARACTERS),
                "licence": _cut(clip.licence, _CAPTION_CHARACTERS),
                "caption": _cut(clip.caption, _CAPTION_CHARACTERS),
                "similarity": None if similarity is None or not math.isfinite(similarity) else round(similarity, 4),
                "picture": picture,
                "problem": problem,
            }
        )
    facts = {
        "method": origin.method,
        "chosen answer seen from": origin.chosen_view,
        "rejected answer seen from": origin.rejected_view,
        "question by": public_name(origin.question_model or ""),
        "answers by": public_name(origin.answer_model or ""),
        "kind of question": origin.question_type,
        "reasoning": origin.reasoning,
        "prompt version": origin.prompt_version,
        "seed": origin.seed,
    }
    return {
        "id": _cut(preference.id),
        "question": _cut(preference.question),
        "chosen": _cut(preference.chosen),
        "rejected": _cut(preference.rejected),
        "num_clips": len(timeline),
        "seconds": round(timeline.duration_seconds, 3),
        "evidence": list(preference.evidence),
        "reference": list(preference.reference),
        "evidence_spans": _spans(timeline, preference.evidence),
        "reference_spans": _spans(timeline, preference.reference or range(len(timeline))),
        "thirds": sorted({min(2, int(3 * timeline.centre(index))) for index in preference.evidence}),
        "clips": clips,
        "verdicts": [_cut(verdict, _CAPTION_CHARACTERS) for verdict in origin.verdicts[:_ENTRIES]],
        "facts": {name: _cut(value) for name, value in facts.items() if value not in (None, "")},
    }


def _clips_to_show(num_clips: int, evidence: Sequence[int], reference: Sequence[int], most: int) -> list[int]:
    """Ascending indices of at most `most` clips: first evidence, then reference, then others, each spread evenly."""
    shown: set[int] = set()
    for group in (evidence, reference, range(num_clips)):
        left = sorted(set(group) - shown)
        number = min(len(left), most - len(shown))
        shown.update(left[(2 * i + 1) * len(left) // (2 * number)] for i in range(number))
    return sorted(shown)


def _spans(timeline: Timeline, indices: Iterable[int]) -> list[list[float]]:
    """Where clips lie on the timeline, as [begin, end) from 0 to 1; neighbours make one span."""
    edges = [*timeline.starts_timeline_seconds, timeline.duration_seconds]
    spans: list[list[float]] = []
    last = None
    for index in sorted(set(indices)):
        end = round(edges[index + 1] / edges[-1], 4)
        if last is not None and index == last + 1:
            spans[-1][1] = end
        else:
            spans.append([round(edges[index] / edges[-1], 4), end])
        last = index
    return spans


class _Pictures:
    """One small JPEG per clip, made once however many rows show it.

    Args:
        locate: Where a clip's file lies; None if it may not be opened.
    """

    def __init__(self, locate: Callable[[str], Path | None]) -> None:
        self.encoded: list[str] = []
        self._locate = locate
        self._sampler = FrameSampler(num_frames=1, max_pixels=_PICTURE_PIXELS, cache_bytes=0)
        self._known: dict[tuple[str, float, float], tuple[int | None, str]] = {}

    def of(self, clip: Clip) -> tuple[int | None, str]:
        """Which of `encoded` shows the clip's middle; or None and the reason."""
        key = (clip.path, clip.start_seconds, clip.end_seconds)
        if key not in self._known:
            self._known[key] = self._take(clip)
        return self._known[key]

    def _take(self, clip: Clip) -> tuple[int | None, str]:
        path = self._locate(clip.path)
        if path is None:
            return None, "outside: the file is not in the folder of the media, so it was not opened"
        try:
            frames = self._sampler(Timeline((replace(clip, path=str(path)),)))
        except UnreadableVideo as error:
            detail = error.detail.replace(f"{path.parent}{os.sep}", "")
            return None, _cut(f"{error.reason}: {detail}", _CAPTION_CHARACTERS)
        buffer = io.BytesIO()
        image = Image.fromarray(frames.pixels[0].permute(1, 2, 0).numpy())
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
        self.encoded.append(base64.b64encode(buffer.getvalue()).decode())
        return len(self.encoded) - 1, ""


def _inside(folder: Path, name: str) -> Path | None:
    """A file of a dataset's folder by its name. Snapshots of the Hub are links to elsewhere, and are followed."""
    path = PurePosixPath(name)
    return None if path.is_absolute() or ".." in path.parts else folder / name


def _inside_really(root: Path, name: str) -> Path | None:
    """A file below a folder of the user's, wherever links lead, as `adapters.from_reference` has it."""
    path = _inside(root, name)
    return path if path and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)) else None


def _cut(text: object, most: int = _TEXT_CHARACTERS) -> str:
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


# ----------------------------------------------------------------------------------------------------------- the plots


class _Summary:
    """Numbers over all rows. Keeps eight bytes per row."""

    def __init__(self) -> None:
        self.num_invalid = 0
        self._tenths = [0] * 10
        self._num_clips: Counter[int] = Counter()
        self._seconds = array("d")
        self._similarities: Counter[int] = Counter()  # by twentieths

    def add(self, preference: VideoPreference) -> None:
        timeline = preference.timeline
        for index in preference.evidence:
            self._tenths[min(9, int(10 * timeline.centre(index)))] += 1
        self._num_clips[len(timeline)] += 1
        self._seconds.append(timeline.duration_seconds)
        for index, value in enumerate(preference.provenance.similarities):
            if index not in preference.evidence and value is not None and math.isfinite(value):
                self._similarities[max(-20, min(19, math.floor(round(20 * value, 6))))] += 1

    def plots(self) -> list[dict[str, Any]]:
        """Histograms, without those of which there is nothing to show. `edges` are the bounds between `counts`."""
        longest = max(self._seconds, default=0.0)
        unit, scale = next((u, s) for u, s in _UNITS if longest > 3 * s or s == 1)
        low = min([0, *self._similarities])
        plots = [
            {
                "title": "Where the evidence stands",
                "axis": "middle of the clip, % of the timeline",
                "of": "evidence clips",
                "edges": [str(10 * i) for i in range(11)],
                "counts": self._tenths,
                "expected": sum(self._tenths) / 10,
            },
            {
                "title": "Clips per row",
                "axis": "clips",
                "of": "rows",
                **_histogram(self._num_clips, whole=True),
            },
            {
                "title": "Length of a timeline",
                "axis": unit,
                "of": "rows",
                **_histogram(Counter(round(seconds / scale, 2) for seconds in self._seconds)),
            },
            {
                "title": "How like the anchor the others are",
                "axis": "cosine of a clip's embedding with the anchor's",
                "of": "clips that are no evidence",
                "edges": [f"{i / 20:g}" for i in range(low, 21)],
                "counts": [self._similarities[i] for i in range(low, 20)],
            },
        ]
        return [plot for plot in plots if any(plot["counts"])]


def _histogram(numbers: Mapping[Any, int], whole: bool = False) -> dict[str, Any]:
    """About `_BINS` equal parts with round bounds; one value, or whole numbers in a small range, stand as `labels`."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    if low == high:
        return {"labels": [f"{low:g}"], "counts": [numbers.get(low, 0)]}
    if whole and high - low < 2 * _BINS:
        values = range(int(low), int(high) + 1)
        return {"labels": [str(value) for value in values], "counts": [numbers.get(value, 0) for value in values]}
    power = 10.0 ** math.floor(math.log10((high - low) / _BINS))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * _BINS >= high - low)
    counts: Counter[int] = Counter()
    for value, number in numbers.items():
        counts[math.floor(round(value / step, 6))] += number
    first, last = min(counts, default=0), max(counts, default=0)
    return {
        "edges": [f"{i * step:.10g}" for i in range(first, last + 2)],
        "counts": [counts[i] for i in range(first, last + 1)],
    }


# -------------------------------------------------------------------------------------------------- captioned videos


def _captions_data(folder: Path, num_videos: int, seed: int, video_root: Path | None) -> dict[str, Any]:
    """Captions as the page's script takes them."""
    facts, videos = read_facts(folder), read_captions(folder)
    wanted = _sample(len(videos), num_videos, seed)
    # Captions name files of this machine as they were captioned.
    pictures = _Pictures(lambda name: Path(video_root or "", name))
    per_video = max(1, min(_PICTURES_PER_ROW, _PICTURES // max(1, len(wanted))))
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
        "plots": _caption_plots(videos),
        "facts": [
            f"{name} {_cut(public_name(str(facts[key])), _CAPTION_CHARACTERS)}"
            for name, key in (("captions by", "captioner"), ("summaries by", "summariser"))
            if key in facts
        ],
        "rows": rows,
        "pictures": pictures.encoded,
        **_read_log(folder.with_name(folder.name + ".log"), seed),
    }


def _shown_video(video: CaptionedVideo, pictures: _Pictures, max_pictures: int, max_scenes: int) -> dict[str, Any]:
    timeline, starts = video.timeline, video.timeline.starts_timeline_seconds
    shown = _clips_to_show(len(timeline), (), (), max_scenes)
    pictured = {shown[i] for i in _clips_to_show(len(shown), (), (), max_pictures)}
    first = timeline.clips[0]
    scenes = []
    for index in shown:
        clip = timeline.clips[index]
        picture, problem = pictures.of(clip) if index in pictured else (None, "")
        scenes.append(
            {
                "index": index,
                "span": _spans(timeline, [index])[0],
                "start": round(starts[index], 3),
                "end": round(starts[index] + clip.duration_seconds, 3),
                "source_start": round(clip.start_seconds, 3),
                "source_end": round(clip.end_seconds, 3),
                "file": _cut(public_name(clip.path), _CAPTION_CHARACTERS),
                "source": _cut(public_name(clip.source_id), _CAPTION_CHARACTERS),
                "licence": _cut(clip.licence, _CAPTION_CHARACTERS),
                "caption": _cut(clip.caption, _CAPTION_CHARACTERS),
                "path": [summary.id for summary in video.summary_path(index)],
                "picture": picture,
                "problem": problem,
            }
        )
    widest = sorted(video.summaries, key=lambda summary: -summary.level)[:max_scenes]
    return {
        "id": _cut(public_name(first.source_id or first.path), _CAPTION_CHARACTERS),
        "num_clips": len(timeline),
        "num_captions": len(video.captioned_scenes),
        "seconds": round(timeline.duration_seconds, 3),
        "history": [_cut(line, _SUMMARY_CHARACTERS) for line in video.history[:_ENTRIES]],
        "scenes": scenes,
        "summaries": [
            {
                "level": summary.level,
                "first": summary.first_scene,
                "last": summary.last_scene,
                "span": _spans(timeline, range(summary.first_scene, summary.last_scene + 1))[0],
                "text": _cut(summary.text, _SUMMARY_CHARACTERS),
            }
            for summary in sorted(widest, key=lambda summary: summary.first_scene)
        ],
    }


def _caption_plots(videos: Sequence[CaptionedVideo]) -> list[dict[str, Any]]:
    """Histograms of all videos and their scenes."""
    scenes = [clip for video in videos for clip in video.timeline.clips]
    levels = [len(video.summary_path(scene)) for video in videos for scene in video.captioned_scenes]
    plots: list[tuple[str, str, str, Sequence[float]]] = [
        ("Scenes per video", "scenes", "videos", [len(video.timeline) for video in videos]),
        ("Length of a scene", "seconds", "scenes", [round(clip.duration_seconds, 2) for clip in scenes]),
        ("Length of a caption", "characters", "captions", [len(clip.caption) for clip in scenes if clip.caption]),
        ("Summaries over a scene", "summaries", "captioned scenes", levels),
    ]
    return [
        {"title": title, "axis": axis, "of": of, **_histogram(Counter(numbers), whole=axis != "seconds")}
        for title, axis, of, numbers in plots
    ]


# ------------------------------------------------------------------------------------------------- the log of the build


def _read_log(folder: Path, seed: int) -> dict[str, Any]:
    """The funnel, and some drops of each reason; what is missing or cannot be read stands in `notices`."""
    notices: list[str] = []
    totals: Counter[str] = Counter()
    kept: dict[str, list[dict[str, str]]] = {}
    num_broken = 0
    rng = random.Random(seed)
    if (folder / "dropped.jsonl").is_file():
        with (folder / "dropped.jsonl").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                drop = _drop(line)
                if drop is None:
                    num_broken += bool(line.strip())
                    continue
                reason, fields = drop
                totals[reason] += 1
                some = kept.setdefault(reason, [])
                if len(some) < _DROPS_PER_REASON:  # reservoir sampling: each drop is as likely to be shown
                    some.append(fields)
                elif (place := rng.randrange(totals[reason])) < _DROPS_PER_REASON:
                    some[place] = fields
    if num_broken:
        notices.append(f"Lines of {folder.name}/dropped.jsonl that could not be read and are not shown: {num_broken}.")
    funnel: dict[str, dict[str, int]] = {}
    if (folder / "funnel.json").is_file():
        try:
            funnel = _funnel((folder / "funnel.json").read_text(encoding="utf-8", errors="replace"))
        except ValueError as error:
            notices.append(f"{folder.name}/funnel.json could not be read: {_cut(error, _CAPTION_CHARACTERS)}")
    numbers = funnel.get("dropped") or dict(totals.most_common())
    reasons = [
        {
            "name": _cut(reason, _CAPTION_CHARACTERS),
            "about": REASONS.get(reason, ""),
            "total": numbers.get(reason, totals[reason]),
            "drops": kept.get(reason, []),
        }
        for reason in {**numbers, **totals}
    ]
    return {"log": folder.name, "stages": funnel.get("stages", {}), "reasons": reasons, "notices": notices}


def _drop(line: str) -> tuple[str, dict[str, str]] | None:
    """Reason and fields of a line of `dropped.jsonl`; paths lose the folders of the machine they lie on."""
    try:
        drop = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(drop, dict) or not isinstance(drop.get("reason"), str):
        return None
    paths = [value for value in drop.values() if isinstance(value, str) and _FILE.fullmatch(value)]
    fields = {}
    for name, value in list(drop.items())[:_ENTRIES]:
        text = value if isinstance(value, str) else json.dumps(value)
        for path in paths:
            text = text.replace(path, public_name(path))
        if name != "reason":
            fields[_cut(name, _CAPTION_CHARACTERS)] = _cut(text, _CAPTION_CHARACTERS)
    return drop["reason"], fields


def _funnel(text: str) -> dict[str, dict[str, int]]:
    funnel = json.loads(text)
    for part in ("stages", "dropped"):
        numbers = funnel.get(part) if isinstance(funnel, dict) else None
        if not isinstance(numbers, dict) or not all(type(number) is int for number in numbers.values()):
            raise DatasetError(f"{part!r} must name whole numbers, got {numbers!r}.")
    return {part: funnel[part] for part in ("stages", "dropped")}


# ------------------------------------------------------------------------------------------------------------ the page


#: What the page calls what it shows, and their parts.
_WORDS = {
    "rows": {"things": "rows", "Things": "Rows", "parts": "clips", "Parts": "Clips"},
    "videos": {"things": "videos", "Things": "Videos", "parts": "scenes", "Parts": "Scenes"},
}


def _page(name: str, data: Mapping[str, Any]) -> str:
    template = files("longvpo_hf.publishing").joinpath("inspect_page.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(name).encode("ascii", "xmlcharrefreplace").decode(),
        "data": _json_in_html(data),
        **_WORDS[data["kind"]],
        **{f"{tag}_hash": _content_hash(template, tag) for tag in ("style", "script")},
    }
    # In one pass: a name or a row that looks like a placeholder stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _json_in_html(data: object) -> str:
    """JSON as ASCII without `<`, `>` and `&`, so that it can end no script block and begin no comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _content_hash(template: str, tag: str) -> str:
    """The hash by which the page's policy names the template's `<style>` or `<script>`."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", template, flags=re.DOTALL)
    assert match is not None, f"inspect_page.html has no <{tag}>"
    return f"sha256-{base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()}"
