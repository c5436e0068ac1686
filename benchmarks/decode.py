"""Our frame access against PyAV, decord and OpenCV: uniformly spaced frames of one video, ratios of one run.

    pip install av decord opencv-python-headless        # the others; only this benchmark wants them
    python benchmarks/decode.py

For 64, 256 and 1,024 frames of a long-GOP and a short-GOP H.264 video (made here with the ffmpeg program), scaled to
224 × 224, one thread each, taken in turns. PyAV and OpenCV are tried by seeking and by one pass; their better way
counts. All must give frames of the same time stamps. Kept in `benchmarks/results/decode.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "threads;1"

RESULTS = Path(__file__).parent / "results"
SIZE = 224
FPS = 30
#: What comes back: time stamps in seconds of the frames, which are decoded and scaled to RGB.
Access = Callable[[Path, list[int], float], list[float]]


def ours(path: Path, frames: list[int], seconds: float) -> list[float]:
    """The sampler of training, opened anew as for a video met the first time."""
    import torch

    from longvpo_hf.frames import FrameSampler
    from longvpo_hf.timeline import Clip, Timeline

    torch.set_num_threads(1)
    taken = FrameSampler(len(frames), max_pixels=SIZE * SIZE, cache_bytes=0)(Timeline((Clip(str(path), 0.0, seconds),)))
    # It takes the frame that is shown at the centre of each part; what others look up by number.
    return [int(at * FPS + 1e-6) / FPS for at in taken.timeline_seconds]


def pyav_seek(path: Path, frames: list[int], seconds: float) -> list[float]:
    """PyAV, seeking to the key frame before each frame."""
    import av

    stamps = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number in frames:
            container.seek(int(number / FPS / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time >= number / FPS - 1e-6:
                    frame.reformat(SIZE, SIZE, "rgb24").to_ndarray()
                    stamps.append(frame.time)
                    break
    return stamps


def pyav_pass(path: Path, frames: list[int], seconds: float) -> list[float]:
    """PyAV, decoding all and keeping some."""
    import av

    wanted, stamps = set(frames), []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frame.reformat(SIZE, SIZE, "rgb24").to_ndarray()
                stamps.append(frame.time)
                if len(stamps) == len(frames):
                    break
    return stamps


def decord(path: Path, frames: list[int], seconds: float) -> list[float]:
    """decord's batch of frames."""
    from decord import VideoReader, cpu

    reader = VideoReader(str(path), ctx=cpu(0), width=SIZE, height=SIZE, num_threads=1)
    reader.get_batch(frames).asnumpy()
    return [float(reader.get_frame_timestamp(number)[0]) for number in frames]


def opencv_seek(path: Path, frames: list[int], seconds: float) -> list[float]:
    """OpenCV, setting the position for each frame."""
    import cv2

    video, stamps = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), []
    for number in frames:
        video.set(cv2.CAP_PROP_POS_FRAMES, number)
        _, frame = video.read()
        cv2.cvtColor(cv2.resize(frame, (SIZE, SIZE)), cv2.COLOR_BGR2RGB)
        stamps.append(video.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    return stamps


def opencv_pass(path: Path, frames: list[int], seconds: float) -> list[float]:
    """OpenCV, grabbing all frames and retrieving some."""
    import cv2

    video, stamps, position = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), [], -1
    for number in frames:
        while position < number:
            video.grab()
            position += 1
        stamps.append(video.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        _, frame = video.retrieve()
        cv2.cvtColor(cv2.resize(frame, (SIZE, SIZE)), cv2.COLOR_BGR2RGB)
    return stamps


READERS: dict[str, Access] = {
    "ours": ours,
    "PyAV, seek": pyav_seek,
    "PyAV, one pass": pyav_pass,
    "decord": decord,
    "OpenCV, seek": opencv_seek,
    "OpenCV, one pass": opencv_pass,
}


def make_video(path: Path, seconds: float, gop: int) -> None:
    """A 640 × 360 video of moving shapes."""
    source = f"testsrc2=duration={seconds}:size=640x360:rate={FPS}"
    encoding = ["-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-g", str(gop), "-threads", "1"]
    subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-y", "-f", "lavfi", "-i", source, *encoding, str(path)], check=True
    )


def measure(path: Path, seconds: float, num_frames: int, repeats: int) -> dict[str, Any]:
    """Median seconds of each reader, in turns, and whether all time stamps agree."""
    total = round(seconds * FPS)
    frames = [int((i + 0.5) * total / num_frames) for i in range(num_frames)]
    times: dict[str, list[float]] = {name: [] for name in READERS}
    disagreeing = set()
    for _ in range(repeats):
        for name, read in READERS.items():
            start = time.process_time()
            stamps = read(path, frames, seconds)
            times[name].append(time.process_time() - start)
            if max(abs(stamp - number / FPS) for stamp, number in zip(stamps, frames, strict=True)) > 0.5 / FPS:
                disagreeing.add(name)
    return {"cpu_seconds": {name: statistics.median(t) for name, t in times.items()}, "wrong": sorted(disagreeing)}


def main() -> None:
    """Measures all cells and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="Length of the videos.")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for gop in (250, FPS):
            path = Path(folder) / f"{gop}.mp4"
            make_video(path, args.seconds, gop)
            for num_frames in args.frames:
                cell = measure(path, args.seconds, num_frames, args.repeats)
                seconds = cell["cpu_seconds"]
                best = min(value for name, value in seconds.items() if name != "ours" and name not in cell["wrong"])
                cells.append({"gop": gop, "frames": num_frames, **cell, "best_other_over_ours": best / seconds["ours"]})
                print(cells[-1], flush=True)
    packages = {name: version(name) for name in ("torchcodec", "av", "decord", "opencv-python-headless")}
    machine = {"platform": platform.platform(), "cores": os.cpu_count()}
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": machine, "versions": packages, "seconds_of_video": args.seconds, "cells": cells}
    (RESULTS / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# Frame access",
        "",
        f"Uniformly spaced frames of a {args.seconds:g}-second 640 × 360, {FPS} fps H.264 video, scaled to "
        f"{SIZE} × {SIZE}; CPU seconds, median of {args.repeats}, one thread, file opened anew each time. "
        f"{machine['platform']}, {machine['cores']} cores. "
        + ", ".join(f"{name} {number}" for name, number in packages.items())
        + ".",
        "",
        "| GOP | frames | " + " | ".join(READERS) + " | best other / ours | wrong time stamps |",
        "|---:|---:|" + "---:|" * (len(READERS) + 1) + "---|",
        *[
            f"| {cell['gop']} | {cell['frames']} | "
            + " | ".join(f"{cell['cpu_seconds'][name]:.2f}" for name in READERS)
            + f" | {cell['best_other_over_ours']:.2f} | {', '.join(cell['wrong']) or 'none'} |"
            for cell in cells
        ],
        "",
        "A reader whose frames have other time stamps than asked is left out of the best. Ours keeps the aspect, the",
        "others squash to a square. Where ours is behind, it is the scaling in torchcodec's filter graph.",
        "",
    ]
    (RESULTS / "decode.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    worst = min(cell["best_other_over_ours"] for cell in cells)
    print(f"decode: worst_best_other_over_ours={worst:.2f} cells={len(cells)}")


if __name__ == "__main__":
    main()
