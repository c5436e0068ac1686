"""Clips as vectors, for the similarity filter: the mean of a vision model's features over a few frames.

Any vision model of transformers that has an image processor will do (the paper: DINOv2). Finished vectors are kept, so
that a run which broke off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from longvpo_hf.artifacts import whole_file
from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import FrameSampler
from longvpo_hf.paths import below, common_folder
from longvpo_hf.precision import computable
from longvpo_hf.timeline import Clip, Timeline

#: LongVPO's similarity filter uses DINOv2; the paper names no size.
DEFAULT_MODEL = "facebook/dinov2-base"
_CLIPS_PER_PIECE = 256


@dataclass(frozen=True, slots=True)
class ClipPiece:
    """Some clips that are embedded together.

    Args:
        number: Its place among the pieces.
        clips: The clips.
        root: Folder below which what is kept names their files.
    """

    number: int
    clips: tuple[Clip, ...]
    root: str

    @property
    def name(self) -> str:
        """As messages name it."""
        return f"{self.number:05d}"


class VisionEmbedder:
    """Embeds clips.

    Args:
        model: Name or path of a vision model, or the model itself (then `processor` too).
        processor: Its image processor; loaded by the model's name where not given.
        num_frames: Frames per clip whose features are averaged. The paper gives no number; four see all of a clip.
        batch_clips: Clips per forward pass.
        device: Where the model runs.
        cache: Folder in which finished vectors are kept; None keeps none.
    """

    def __init__(
        self,
        model: str | PreTrainedModel = DEFAULT_MODEL,
        processor: Any = None,
        num_frames: int = 4,
        batch_clips: int = 16,
        device: str = "cpu",
        cache: Path | None = None,
    ) -> None:
        if isinstance(model, str):
            processor = processor or AutoImageProcessor.from_pretrained(model)
            model = computable(AutoModel.from_pretrained(model).to(device))
        self.name = str(model.config.name_or_path or type(model).__name__)
        if processor is None:
            raise ConfigError("A model given as an object needs its image processor: pass processor=….")
        self.model = model.eval().to(device)
        self.processor = processor
        self.sampler = FrameSampler(num_frames, cache_bytes=0)
        self.batch_clips = batch_clips
        self.device = device
        self.cache = cache

    def __call__(self, clips: Sequence[Clip]) -> NDArray[np.float32]:
        """Unit vectors, float32 `[len(clips), dim]`.

        Raises:
            longvpo_hf.frames.UnreadableVideo: If a clip cannot be decoded; see `intake.media.check_clips`.
        """
        pieces = self.plan(clips)
        vectors = []
        with tqdm(total=len(clips), desc="embedding", unit="clip") as bar:
            for piece in pieces:
                vectors.append(self.embed(piece))
                bar.update(len(piece.clips))
        return np.concatenate(vectors)

    def plan(self, clips: Sequence[Clip]) -> list[ClipPiece]:
        """The clips in pieces, which any number of machines may embed that share the cache."""
        root = common_folder(clip.path for clip in clips)
        starts = range(0, len(clips), _CLIPS_PER_PIECE)
        return [ClipPiece(n, tuple(clips[start : start + _CLIPS_PER_PIECE]), root) for n, start in enumerate(starts)]

    def embed(self, piece: ClipPiece) -> NDArray[np.float32]:
        """Unit vectors of a piece, `[clips, dim]`, from the cache if they are there."""
        path = self._path(piece)
        if path is None:
            return self._embed(piece.clips)
        if not path.exists():
            vectors = self._embed(piece.clips)
            with whole_file(path) as file:
                np.save(file, vectors, allow_pickle=False)
            return vectors
        stored: NDArray[np.float32] = np.load(path, allow_pickle=False)
        return stored

    def has(self, piece: ClipPiece) -> bool:
        """Whether a piece is in the cache."""
        path = self._path(piece)
        return path is not None and path.exists()

    def _path(self, piece: ClipPiece) -> Path | None:
        if self.cache is None:
            return None
        spans = [[below(piece.root, clip.path), clip.start_seconds, clip.end_seconds] for clip in piece.clips]
        follows_from = [self.name, self.sampler.num_frames, spans]
        return self.cache / f"{hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()[:16]}.npy"

    @torch.inference_mode()
    def _embed(self, clips: Sequence[Clip]) -> NDArray[np.float32]:
        vectors = []
        for start in range(0, len(clips), self.batch_clips):
            frames = [self.sampler(Timeline((clip,))).pixels for clip in clips[start : start + self.batch_clips]]
            images = [image for pixels in frames for image in pixels]
            inputs = self.processor(images=images, return_tensors="pt").to(self.device)
            output = self.model(**inputs)
            features = output.pooler_output if output.pooler_output is not None else output.last_hidden_state[:, 0]
            means = [part.mean(0) for part in torch.split(features.float(), [len(pixels) for pixels in frames])]
            vectors.append(torch.nn.functional.normalize(torch.stack(means), dim=1).cpu().numpy())
        return np.concatenate(vectors)
