"""How many frames a checkpoint is evaluated on: those it was trained with, unless something else is asked for."""

from __future__ import annotations

from longvpo_hf.frames import FrameSampler
from longvpo_hf.record import ModelRecord, Sampling, read_record

#: Decoded frames kept for the next question about the same video: 512 frames of 448 × 448 are 0.3 GB.
_CACHE_BYTES = 1024**3


def trained_sampling(checkpoint: str) -> Sampling | None:
    """What the record of a checkpoint says it was trained with; None where there is none, or it does not say so.

    Args:
        checkpoint: Folder, or name on the Hub.

    Raises:
        RecordError: If its record is broken.
    """
    record = read_record(checkpoint, ModelRecord)
    return None if record is None else record.sampling


def sampler_of(sampling: Sampling) -> FrameSampler:
    """A sampler with these settings."""
    return FrameSampler(sampling.num_frames, sampling.fps, sampling.max_pixels, _CACHE_BYTES)
