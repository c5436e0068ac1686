"""How tokens are drawn, in answering and in training: by random numbers of each answer's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, TopPLogitsWarper

from longvpo_hf.decoding import Decoding


class Draws(LogitsProcessor):
    """Scores whose highest is a draw from the sampled distribution: p / e is highest at a token with probability p.

    e are exponential random numbers, of each row by its own generator (vLLM draws seeded requests in this way).
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int], device: torch.device) -> None:
        self._temperature = decoding.temperature
        self._nucleus = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `[B, V]` of the next tokens."""
        logits: Any = scores.float() / self._temperature
        if self._nucleus is not None:
            logits = self._nucleus(input_ids, logits)
        noise = torch.empty_like(logits)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        drawn: Any = logits.log_softmax(-1) - noise.log()
        return drawn
