"""How many frames a checkpoint is evaluated on: those it was trained with, unless something else is asked for.

Takes a checkpoint's name; gives the settings of a `FrameSampler`. They stand in the model card that `LongVPOTrainer`
writes with every checkpoint, as the code that a reader copies. Loads no model.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import FrameSampler

_CARD = re.compile(r"FrameSampler\(num_frames=(\d+), fps=(None|[\d.]+), max_pixels=(None|\d+)\)")
#: Decoded frames kept for the next question about the same video: 512 frames of 448 × 448 are 0.3 GB.
_CACHE_BYTES = 1024**3


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of a `FrameSampler`; by default those of `LongVPOConfig`.

    Args:
        num_frames: At most so many frames per video.
        fps: At most so many frames per second; None for no such bound.
        max_pixels: At most so many pixels per frame; None keeps the source's size.
    """

    num_frames: int = 128
    fps: float | None = 1.0
    max_pixels: int | None = 448 * 448

    def __post_init__(self) -> None:
        self.sampler()

    @classmethod
    def of_training(cls, name: str) -> Sampling | None:
        """What the card of a checkpoint says it was trained with; None where there is no card, or it does not say so.

        Args:
            name: Folder, or name on the Hub.
        """
        match = _CARD.search(_card(name))
        return cls(*(ast.literal_eval(value) for value in match.groups())) if match else None

    def sampler(self) -> FrameSampler:
        """A sampler with these settings.

        Raises:
            ValueError: If one of them is out of bounds.
        """
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"fps must be > 0, or None for no bound, got {self.fps}.")
        return FrameSampler(self.num_frames, self.fps, self.max_pixels, _CACHE_BYTES)

    def __str__(self) -> str:
        rate = "" if self.fps is None else f", {self.fps:g} a second"
        pixels = "" if self.max_pixels is None else f", {self.max_pixels} pixels each"
        return f"at most {self.num_frames} frames{rate}{pixels}"


def _card(name: str) -> str:
    """Text of a checkpoint's card; empty where there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(name, "README.md")
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, "README.md"))
        except (HfHubHTTPError, HFValidationError, OSError):
            return ""
    return path.read_text(encoding="utf-8") if path.is_file() else ""
