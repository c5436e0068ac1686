"""Real films all the way: what ffprobe says of each, what is kept of it, its cuts, and whether any frame is wrong.

    python benchmarks/films.py FOLDER        # a folder of films; needs the ffmpeg and ffprobe programs

Frames are compared with a sequential decode of the whole film by the ffmpeg program: frames sought in random order, and
every frame of every file that is cut. A frame is wrong if another frame within 30 of the one expected is nearer to it,
each averaged over 18 × 32 fields. Cuts are compared with those of ffmpeg's scene filter (score above 0.3). Kept in
`benchmarks/results/films.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import resource
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longvpo_hf.artifacts import file_digest, write_json, write_text
from longvpo_hf.frames import UnreadableVideo, VideoFile, decoder
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake import CuttingSettings, Source, clips_of
from longvpo_hf.intake.examine import examine, scene_changes
from longvpo_hf.intake.media import MediaSettings, cut_clips
from longvpo_hf.timeline import Clip

RESULTS = Path(__file__).parent / "results"
FIELDS = (18, 32)
NUM_SOUGHT = 48
NEIGHBOURS = 30
#: Files are cut so that compression does not hide which frame is which.
CRF = 4
#: Frames that differ by less are the same: of 255 levels, from RGB to YUV and back costs 1.2 in every cut file, which
#: in slow fades is what a frame differs by from the next.
SAME_LEVELS = 1.25
SCENE_SCORE = 0.3
SAME_CUT_SECONDS = 0.25
SUFFIXES = {".mp4", ".mpg", ".avi", ".webm", ".mkv", ".mov", ".ts"}


def probed(path: Path) -> dict[str, Any]:
    """What ffprobe says of a film's video stream."""
    entries = "stream=codec_name,width,height,sample_aspect_ratio,avg_frame_rate,nb_frames,start_time,duration"
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", f"{entries}:format=format_name"]
    found = json.loads(subprocess.run([*command, "-of", "json", path], capture_output=True, check=True).stdout)
    return {**found["streams"][0], "format": found["format"]["format_name"].split(",")[0]}


def averaged(frames: Tensor) -> Tensor:
    """Frames of uint8 `[N, 3, H, W]` as `[N, 3 · 18 · 32]` averages."""
    return F.adaptive_avg_pool2d(frames.float(), FIELDS).flatten(1)


def truth(path: Path, height: int, width: int) -> Tensor:
    """All frames that the ffmpeg program decodes, in order, averaged."""
    command = ["ffmpeg", "-v", "quiet", "-noautorotate", "-i", str(path), "-map", "0:v:0", "-vsync", "0"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-"]
    # In one buffer: small tensors that are kept between large ones that are not make glibc's heap grow by every frame.
    fields = bytearray()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while len(raw := process.stdout.read(3 * height * width)) == 3 * height * width:
            picture = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(height, width, 3)
            fields += averaged(picture.permute(2, 0, 1)[None]).numpy().tobytes()
    return torch.frombuffer(fields, dtype=torch.float32).view(-1, 3 * FIELDS[0] * FIELDS[1])


def num_wrong(frames: Tensor, expected: Sequence[int], sequence: Tensor) -> int:
    """How many averaged frames are nearer to another frame of the sequence than to the expected one."""
    wrong = 0
    for frame, index in zip(frames, expected, strict=True):
        first = max(0, index - NEIGHBOURS)
        distances = (sequence[first : index + NEIGHBOURS + 1] - frame).abs().mean(1)
        wrong += bool(distances[index - first] > distances.min() + SAME_LEVELS)
    return wrong


def scene_filter(path: Path) -> list[float]:
    """When ffmpeg's scene filter says that the picture changes, in seconds after the film's first frame."""
    command = ["ffmpeg", "-hide_banner", "-i", str(path), "-vf", f"select='gt(scene,{SCENE_SCORE})',showinfo"]
    said = subprocess.run([*command, "-an", "-f", "null", "-"], capture_output=True, text=True, check=False).stderr
    return [float(seconds) for seconds in re.findall(r"pts_time:([0-9.]+)", said)]


def looked_at(path: Path, cache: Path) -> dict[str, Any]:
    """One film's row of the table."""
    stream = probed(path)
    row: dict[str, Any] = {"film": path.name, "ffprobe": stream}
    clips_and_drops = clips_of([Source(path)], CuttingSettings(), cache=cache)
    found = list(cut_clips(clips_and_drops, cache, MediaSettings(crf=CRF)))
    row["dropped"] = [f"{item.reason}: {item.detail}" for item in found if isinstance(item, Dropped)]
    clips = [item for item in found if isinstance(item, Clip)]
    row["clips"] = [[clip.origin.start_seconds, clip.origin.end_seconds] for clip in clips]
    try:
        video = examine(str(path), file_digest(path), cache=cache)
    except UnreadableVideo as error:
        return {**row, "kept": None, "error": str(error)}
    sequence = truth(path, stream["height"], stream["width"])
    row["kept"] = {
        "seconds": [video.begin_seconds, video.end_seconds],
        "frames": video.num_frames,
        "frames of ffmpeg": len(sequence),
        "size": list(video.size),
        "sought": video.times.can_seek,
    }
    numbers = random.Random(path.name).sample(range(video.num_frames), min(NUM_SOUGHT, video.num_frames))
    sought = torch.cat([averaged(video.frames_at([number], video.size)) for number in numbers])
    wrong = num_wrong(sought, numbers, sequence)
    compared = len(numbers)
    for clip in clips:
        cut = VideoFile(clip.path)
        shown = torch.cat([averaged(pixels) for _, pixels in cut.frames(0.0, cut.end_seconds, cut.fps)])
        start = clip.origin.start_seconds
        expected = [
            video.index_at(min(start + (k + 0.5) / cut.fps, clip.origin.end_seconds - 1e-5)) for k in range(len(shown))
        ]
        wrong += num_wrong(shown, expected, sequence)
        compared += len(shown)
    row["frames compared"], row["frames wrong"] = compared, wrong
    ours = [seconds - video.begin_seconds for seconds in scene_changes(video, file_digest(path), cache)]
    theirs = scene_filter(path)
    both = sum(any(abs(a - b) <= SAME_CUT_SECONDS for b in ours) for a in theirs)
    row["cuts"] = {"ours": ours, "ffmpeg": theirs, "both": both}
    return row


def table(rows: Sequence[dict[str, Any]], machine: str) -> str:
    """The rows as Markdown."""
    lines = [
        "# Real films",
        "",
        f"`python benchmarks/films.py FOLDER`, {machine}. What ffprobe says, what is kept, and",
        f"cuts: ours, those of ffmpeg's scene filter above {SCENE_SCORE}, and how many of those are ours. Compared",
        f"with a sequential decode by ffmpeg are {NUM_SOUGHT} frames sought in random order, and every",
        f"frame of the files that are cut (at crf {CRF}).",
        "",
        "| film | ffprobe | kept | clips | cuts: ours, ffmpeg, both | frames compared | wrong |",
        "|---|---|---|---:|---|---:|---:|",
    ]
    for row in rows:
        said = row["ffprobe"]
        stream = (
            f"{said['format']}, {said['codec_name']}, {said['width']} × {said['height']}, pixels "
            f"{said.get('sample_aspect_ratio', 'unstated')}, {said['avg_frame_rate']} fps, "
            f"{said.get('nb_frames', 'unstated')} frames, {float(said['duration']):.2f} s from "
            f"{float(said['start_time']):.2f}"
        )
        kept = row["kept"]
        if kept is None:
            lines.append(f"| {row['film']} | {stream} | {row['error']} | 0 | | | |")
            continue
        whole = (
            f"{kept['frames']} of {kept['frames of ffmpeg']} frames, {kept['seconds'][0]:.2f} to "
            f"{kept['seconds'][1]:.2f} s, {kept['size'][1]} × {kept['size'][0]}, "
            f"{'by seeking' if kept['sought'] else 'in order'}"
        )
        cuts = row["cuts"]
        lines.append(
            f"| {row['film']} | {stream} | {'; '.join([whole, *row['dropped']])} | {len(row['clips'])} | "
            f"{len(cuts['ours'])}, {len(cuts['ffmpeg'])}, {cuts['both']} | "
            f"{row['frames compared']} | {row['frames wrong']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Looks at every film of a folder and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        films = sorted(path for path in args.folder.iterdir() if path.suffix.lower() in SUFFIXES)
        rows = []
        for path in films:
            rows.append(looked_at(path, Path(cache)))
            print(json.dumps({name: rows[-1][name] for name in rows[-1] if name != "ffprobe"}), flush=True)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    machine = f"{platform.system()}, {decoder()}, at most {peak_mib} MiB of memory"
    write_json(RESULTS / "films.json", {"machine": machine, "films": rows})
    write_text(RESULTS / "films.md", table(rows, machine))
    wrong = sum(row.get("frames wrong", 0) for row in rows)
    print(f"films: films={len(rows)} compared={sum(row.get('frames compared', 0) for row in rows)} wrong={wrong}")


if __name__ == "__main__":
    main()
