"""How the miniature's base model writes questions and tells clips apart, without the world's truth.

Does: asks the model to describe a clip, as in its pretraining ("navy-gold , red"), and makes of the marker it names a
question ("what colour in the navy-gold clip ?") and an embedding (same marker, same vector). Takes a responder; gives a
question writer and an embedder for the Stage-1 builder. Knows nothing of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longvpo_hf.miniature.world import CAPTION_QUESTION, MARKERS, question
from longvpo_hf.responders import Request, Responder
from longvpo_hf.timeline import Clip, Timeline

_MARKER_INDEX = {marker: index for index, marker in enumerate(MARKERS)}


class Describer:
    """Describes each clip once through a responder.

    Args:
        responder: Answers about one clip.
    """

    def __init__(self, responder: Responder) -> None:
        self._responder = responder
        self._markers: dict[Clip, str] = {}

    @property
    def name(self) -> str:
        """See `Responder.name`."""
        return f"{self._responder.name} + template"

    def respond(self, requests: Sequence[Request]) -> list[str]:
        """A question about each request's one clip, or nothing where the model names no marker. See `Responder`."""
        clips = [request.timeline.clips[0] if request.timeline else None for request in requests]
        self._describe([clip for clip in clips if clip])
        markers = [self._markers[clip] if clip else "" for clip in clips]
        return [question(marker) if marker else "" for marker in markers]

    def embed(self, clips: Sequence[Clip]) -> NDArray[np.float64]:
        """One-hot of the marker the model names, `[num_clips, number of markers + 1]`; the last is "names none"."""
        self._describe(clips)
        vectors = np.zeros((len(clips), len(MARKERS) + 1))
        for row, clip in enumerate(clips):
            vectors[row, _MARKER_INDEX.get(self._markers[clip], len(MARKERS))] = 1.0
        return vectors

    def _describe(self, clips: Sequence[Clip]) -> None:
        new = [clip for clip in dict.fromkeys(clips) if clip not in self._markers]
        captions = self._responder.respond([Request(CAPTION_QUESTION, Timeline((clip,))) for clip in new])
        for clip, caption in zip(new, captions, strict=True):
            marker = caption.split()[0] if caption.split() else ""
            self._markers[clip] = marker if marker in _MARKER_INDEX else ""
