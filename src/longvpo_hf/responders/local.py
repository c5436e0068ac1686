"""A transformers image-text-to-text model of this process as a responder: batched, deterministic.

It answers in free text: the JSON schema of a request is left out.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError, ModelError
from longvpo_hf.families import check_config
from longvpo_hf.families.encoding import PromptEncoder, concatenate_visuals, visual_shapes
from longvpo_hf.families.positions import check_placeholders
from longvpo_hf.families.templates import may_reason, opened_by_template
from longvpo_hf.frames import FrameSampler, UnreadableVideo
from longvpo_hf.reasoning import opened_reasoning
from longvpo_hf.responders import NoAnswer, OnResult, OnWait, Request, Result, answered, weights
from longvpo_hf.responders.generating import generate, seed_of
from longvpo_hf.responders.replies import probability_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

#: Visual tensors held while requests of like length are looked for: a bound on memory, whatever is asked at once.
#: About 800 frames of 448 × 448 in float32.
_HELD_BYTES = 2 * 1024**3
#: How an answer may begin; tokenizers write the space of a word's start differently.
_YES, _NO = (("Yes", "yes", "YES", " Yes", " yes"), ("No", "no", "NO", " No", " no"))


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One request on its way: which it is, its seed, its token ids and types, the visual tensors of its video."""

    index: int
    seed: int
    ids: list[int]
    types: list[int] | None
    visual: dict[str, torch.Tensor]
    is_verdict: bool


class LocalResponder:
    """Answers with a model of this process.

    Args:
        model: An image-text-to-text model in evaluation mode, on its device.
        processor: Its processor.
        sampler: How frames are taken of a view.
        max_new_tokens: Bound on an answer's length.
        batch_size: Requests per `generate` call.
        name: See `Responder.name`; by default the model's name or path.
        decoding: How answers are decoded; by default greedily.

    Attributes:
        reasons: Whether answers may begin with reasoning, and need room for it.

    Raises:
        ModelError: If the kind of model cannot be used; if thinking is to be switched and the model's chat template
            has no switch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        sampler: FrameSampler,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        name: str | None = None,
        decoding: Decoding = GREEDY,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be ≥ 1, got {batch_size}.")
        check_config(model.config)
        check_placeholders(processor, model.config)
        self.model = model
        self.sampler = sampler
        self.decoding = decoding
        self.encoder = PromptEncoder(processor, decoding.thinking)
        self.reasons = may_reason(processor, self.encoder.switch)
        self._opened = opened_by_template(processor, self.encoder.switch)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        path = model.config.name_or_path
        # A local folder's place on this machine is nothing that rows should tell.
        self._name = name or (Path(path).name if os.path.isdir(path) else path) or type(model).__name__

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
        sampler = self.sampler.__getstate__() | {"cache_bytes": 0}
        return {
            "weights": self._weights,
            "max_new_tokens": self.max_new_tokens,
            "sampler": sampler,
            "decoding": asdict(self.decoding),
        }

    def respond(
        self, requests: Sequence[Request], on_result: OnResult | None = None, on_wait: OnWait | None = None
    ) -> list[str]:
        """See `Responder.respond`. Requests of similar length are answered together, whatever their order.

        Raises:
            Unanswered: If a request's video cannot be decoded, or its text holds a control token that the tokenizer
                cannot read as text; it holds the others' answers.
        """
        results: list[Result] = [""] * len(requests)

        def keep(index: int, result: Result) -> None:
            results[index] = result
            if on_result is not None:
                on_result(index, result)

        held: list[_Prompt] = []
        held_bytes = 0
        for index, request in enumerate(requests):
            try:
                held.append(self._encode(index, request))
                held_bytes += sum(tensor.nbytes for tensor in held[-1].visual.values())
            except UnreadableVideo as error:
                keep(index, error)
            except ModelError as error:
                keep(index, NoAnswer(str(error)))
            if held_bytes >= _HELD_BYTES or index == len(requests) - 1:
                for prompt, answer in self._answer(held):
                    keep(prompt.index, answer)
                held, held_bytes = [], 0
        return answered(results)

    def _encode(self, index: int, request: Request) -> _Prompt:
        frames = None if request.timeline is None else self.sampler(request.timeline, request.view)
        prompts = self.encoder.encode(frames, [[{"role": "user", "content": request.text}]])
        types = None if prompts.mm_token_type_ids is None else prompts.mm_token_type_ids[0]
        seed = seed_of(request, self.decoding)
        return _Prompt(index, seed, prompts.input_ids[0], types, prompts.visual, request.is_verdict)

    def _answer(self, prompts: Sequence[_Prompt]) -> Iterator[tuple[_Prompt, str]]:
        """The answers as they come, in batches of videos that fit into one call, shortest prompts first."""
        groups: dict[Hashable, list[_Prompt]] = {}
        for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
            groups.setdefault((visual_shapes(prompt.visual), prompt.is_verdict), []).append(prompt)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                yield from zip(batch, self._generate(batch), strict=True)

    def _generate(self, prompts: Sequence[_Prompt]) -> list[str]:
        tokenizer = self.encoder.processor.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        length = max(len(prompt.ids) for prompt in prompts)
        inputs = {
            "input_ids": _left_pad([prompt.ids for prompt in prompts], length, pad),
            "attention_mask": _left_pad([[1] * len(prompt.ids) for prompt in prompts], length, 0),
            **concatenate_visuals([prompt.visual for prompt in prompts]),
        }
        types = [prompt.types for prompt in prompts if prompt.types is not None]
        if types:
            inputs["mm_token_type_ids"] = _left_pad(types, length, 0)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if prompts[0].is_verdict:
            return yes_probabilities(self.model, tokenizer, inputs, self._opened)
        seeds = [prompt.seed for prompt in prompts]
        return generate(self.model, tokenizer, inputs, seeds, self.max_new_tokens, self.decoding, self._opened)


def yes_probabilities(
    model: PreTrainedModel, tokenizer: Any, inputs: Mapping[str, torch.Tensor], opened: str
) -> list[str]:
    """How probable a yes is as the answer to each prompt, as `replies.probability_text`.

    A yes is any spelling of it at the answer's start; so is a no, and all else is left out of account.

    Args:
        model: Who is asked.
        tokenizer: Its tokenizer.
        inputs: The prompts, padded on the left, as `generate` takes them.
        opened: The tag with which the template opens reasoning in every prompt; "" where it opens none.

    Raises:
        ModelError: If the tokenizer begins yes and no alike, or the template opens a reasoning before the answer.
    """
    yes, no = verdict_tokens(tokenizer, opened)
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    logits = output.logits[0].float()  # [B, V]
    margins = logits[:, sorted(yes)].logsumexp(1) - logits[:, sorted(no)].logsumexp(1)
    return [probability_text(share, 1 - share) for share in margins.sigmoid().tolist()]


def verdict_tokens(tokenizer: Any, end_of_prompt: str = "") -> tuple[set[int], set[int]]:
    """The tokens that begin a yes, and those that begin a no.

    Args:
        tokenizer: The judge's tokenizer.
        end_of_prompt: How its prompts end.

    Raises:
        ModelError: If the tokenizer begins yes and no alike, or the template opens a reasoning before the answer.
    """
    firsts = [{tokenizer.encode(word, add_special_tokens=False)[0] for word in words} for words in (_YES, _NO)]
    yes, no = firsts[0] - firsts[1], firsts[1] - firsts[0]
    reason = "" if yes and no else "begins yes and no with one token"
    if opened_reasoning(end_of_prompt):
        reason = "reasons before it answers, so that its first token is no verdict"
    if reason:
        raise ModelError(
            f"{tokenizer.name_or_path or 'The judge'} {reason}: leave judge_yes_from (--judge-yes-from) out, or name "
            "another judge."
        )
    return yes, no


def _left_pad(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([[value] * (length - len(row)) + list(row) for row in rows])
