"""A transformers language model of this process as a responder: reads and writes text, sees no video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ModelError
from longvpo_hf.families.templates import opened_by_template, thinking_switch
from longvpo_hf.paths import shown
from longvpo_hf.responders import NoAnswer, OnResult, OnWait, Request, Result, answered, weights
from longvpo_hf.responders.generating import generate, seed_of
from longvpo_hf.responders.local import yes_probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextResponder:
    """Answers with a language model of this process: a writer of questions from captions, or a judge of them.

    Args:
        model: A causal language model in evaluation mode, on its device.
        tokenizer: Its tokenizer, with a chat template.
        max_new_tokens: Bound on an answer's length.
        batch_size: Requests per `generate` call.
        decoding: How answers are decoded; by default greedily.

    Raises:
        ModelError: If the tokenizer has no chat template, or that has no switch where thinking is to be switched.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = 512,
        batch_size: int = 8,
        decoding: Decoding = GREEDY,
    ) -> None:
        if batch_size < 1:
            raise ModelError(f"batch_size must be ≥ 1, got {batch_size}.")
        if tokenizer.chat_template is None:
            raise ModelError(f"{tokenizer.name_or_path} has no chat template; choose a model that was taught to chat.")
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.decoding = decoding
        self._switch = thinking_switch(tokenizer, decoding.thinking)
        self._opened = opened_by_template(tokenizer, self._switch)
        path = model.config.name_or_path
        # A local folder's place on this machine is nothing that rows should tell.
        self._name = (Path(path).name if os.path.isdir(path) else path) or type(model).__name__

    @property
    def name(self) -> str:
        """See `Responder.name`."""
        return self._name

    @cached_property
    def _weights(self) -> str:
        return weights(self.model.config)

    @property
    def settings(self) -> dict[str, object]:
        """See `identity`. Reads the model's files."""
        return {
            "weights": self._weights,
            "max_new_tokens": self.max_new_tokens,
            "decoding": asdict(self.decoding),
        }

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """See `Responder.respond`. Requests of similar length are answered together, whatever their order.

        Raises:
            ModelError: If a request shows a video.
            Unanswered: If a text holds a control token that the tokenizer cannot read as text; it holds the others'
                answers.
        """
        if any(request.timeline is not None for request in requests):
            raise ModelError(f"{self.name} is a language model and sees no video; ask a vision-language model.")
        results: list[Result] = [""] * len(requests)

        def keep(index: int, result: Result) -> None:
            results[index] = result
            if on_result is not None:
                on_result(index, result)

        prompts: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            try:
                prompts[index] = self._encode(request.text)
            except ValueError as error:  # a control token in the text, of a tokenizer that has it as a word too
                keep(index, NoAnswer(f"{self.name} cannot be asked {shown(request.text)}: {error}"))
        for is_verdict in (False, True):
            alike = [index for index in prompts if requests[index].is_verdict is is_verdict]
            alike.sort(key=lambda index: len(prompts[index]))
            for start in range(0, len(alike), self.batch_size):
                batch = alike[start : start + self.batch_size]
                seeds = [seed_of(requests[index], self.decoding) for index in batch]
                answers = self._generate([prompts[index] for index in batch], seeds, is_verdict)
                for index, answer in zip(batch, answers, strict=True):
                    keep(index, answer)
        return answered(results)

    def _encode(self, text: str) -> list[int]:
        """The prompt's ids. Control tokens in the text are plain text, see `families.encoding`."""
        encoded = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=True,
            sanitize_control_tokens=True,
            **self._switch,
        )
        ids: list[int] = encoded["input_ids"]
        return ids

    def _generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], is_verdict: bool) -> list[str]:
        tokenizer = self.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(self.model.device)
        if is_verdict:
            return yes_probabilities(self.model, tokenizer, inputs, self._opened)
        return generate(self.model, tokenizer, inputs, seeds, self.max_new_tokens, self.decoding, self._opened)
