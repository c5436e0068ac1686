"""Pixels: the one place where video is decoded.

    sampler = FrameSampler(num_frames=64, fps=1.0, max_pixels=448 * 448)
    frames = sampler(timeline, View.only([3]))     # frames.pixels: uint8 [N, C, H, W], upright, of one size

Models see `FrameSampler`'s frames; building examines sources and cuts clips with `VideoFile`. What cannot be decoded,
or not be decoded rightly, is an `UnreadableVideo` with a named reason.
"""

from longvpo_hf.frames.opening import Bounds, Reason, UnreadableVideo, decoder, is_whole, need_ffmpeg
from longvpo_hf.frames.sampler import Frames, FrameSampler, spread_frames
from longvpo_hf.frames.timing import FrameTimes
from longvpo_hf.frames.video import VideoFile, whole_clip

__all__ = [
    "Bounds",
    "FrameSampler",
    "FrameTimes",
    "Frames",
    "Reason",
    "UnreadableVideo",
    "VideoFile",
    "decoder",
    "is_whole",
    "need_ffmpeg",
    "spread_frames",
    "whole_clip",
]
