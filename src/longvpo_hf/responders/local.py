"""A transformers image-text-to-text model of this process as a responder: batched, greedy, deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from longvpo_hf.frames import FrameSampler
from longvpo_hf.processing import PromptEncoder, concatenate_visuals

from . import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class LocalResponder:
    """Answers with a model of this process, greedily.

    Args:
        model: An image-text-to-text model in evaluation mode, on its device.
        processor: Its processor.
        sampler: How frames are taken of a view.
        max_new_tokens: Bound on an answer's length.
        batch_size: Requests per `generate` call.
        name: See `Responder.name`; by default the model's name or path.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        sampler: FrameSampler,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        name: str | None = None,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.encoder = PromptEncoder(processor)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self._name = name or model.config.name_or_path or type(model).__name__

    @property
    def name(self) -> str:
        """See `Responder.name`."""
        return self._name

    def respond(self, requests: Sequence[Request]) -> list[str]:
        """See `Responder.respond`. Requests of like length are answered together, whatever their order."""
        if not requests:
            return []
        tokenizer = self.encoder.processor.tokenizer
        encoded = [self._encode(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: len(encoded[i][0]))
        answers = [""] * len(requests)
        while order:
            batch = order[: self.batch_size]
            visuals = [encoded[i][2] for i in batch if encoded[i][2]]
            visual = concatenate_visuals(visuals) if visuals else {}
            if visual is None:  # videos of unlike shape: one at a time
                batch, visual = batch[:1], visuals[0]
            order = order[len(batch) :]
            longest = max(len(encoded[i][0]) for i in batch)
            padded = {
                "input_ids": _left_pad([encoded[i][0] for i in batch], longest, tokenizer.pad_token_id),
                "attention_mask": _left_pad([[1] * len(encoded[i][0]) for i in batch], longest, 0),
            }
            if encoded[batch[0]][1] is not None:
                padded["mm_token_type_ids"] = _left_pad([encoded[i][1] or [] for i in batch], longest, 0)
            inputs = {key: value.to(self.model.device) for key, value in {**padded, **visual}.items()}
            with torch.inference_mode():
                output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text.strip()
        return answers

    def _encode(self, request: Request) -> tuple[list[int], list[int] | None, dict[str, torch.Tensor]]:
        frames = None if request.timeline is None else self.sampler(request.timeline, request.view)
        prompts = self.encoder.encode(frames, [[{"role": "user", "content": request.text}]])
        types = None if prompts.mm_token_type_ids is None else prompts.mm_token_type_ids[0]
        return prompts.input_ids[0], types, prompts.visual


def _left_pad(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([[value] * (length - len(row)) + list(row) for row in rows])
