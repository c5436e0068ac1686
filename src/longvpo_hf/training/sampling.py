"""Answers that the policy itself gives to a batch's questions on the whole timeline, for view distillation on them.

An answer is drawn from the policy's own distribution (temperature 1, the whole vocabulary but for placeholders of
visual tokens) by random numbers of its row, step and seed, so that neither batches nor processes nor a resumed run
change it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, ProcessorMixin

from longvpo_hf.artifacts import write_json
from longvpo_hf.decoding import Decoding
from longvpo_hf.errors import ConfigError
from longvpo_hf.families import context_tokens
from longvpo_hf.families.drawing import Draws
from longvpo_hf.families.encoding import concatenate_visuals, visual_shapes
from longvpo_hf.families.positions import visual_token_ids
from longvpo_hf.training.collator import NO_ROW, Batch
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.models import undisturbed
from longvpo_hf.training.packing import unwrapped
from longvpo_hf.training.packing.trial import evaluating

#: In a checkpoint: answers that later steps may still use.
FILE = "sampled_answers.json"
_DRAWN = Decoding(temperature=1.0)


@dataclass(frozen=True, slots=True)
class _Prompts:
    """How prompts are given to a policy.

    Args:
        pad_token_id: Pads them on the left.
        visual_token_ids: Never drawn: they would ask for frames that are not there.
        longest: Most tokens of a prompt with its answer.
    """

    pad_token_id: int
    visual_token_ids: set[int]
    longest: int

    def of(self, batch: Batch, rows: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
        """The prompts of some rows, and how many more tokens each may have."""
        lengths = batch["completion_mask"][rows].argmax(1).tolist()
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
        padded = {
            name: torch.stack(
                [
                    F.pad(batch[name][row, :length], (max(lengths) - length, 0), value=fill)
                    for row, length in zip(rows, lengths, strict=True)
                ]
            )
            for name, fill in fills.items()
            if name in batch
        }
        return padded, [self.longest - length for length in lengths]


class SampledAnswers:
    """The policy's answers, kept for some steps.

    Args:
        refresh_steps: An answer serves its row for so many optimizer steps, then the row is answered anew.
        max_new_tokens: Bound on an answer's length.
        seed: Of the run.
        max_length: Bound on a sequence's length; None for none but the model's context.
    """

    def __init__(self, refresh_steps: int, max_new_tokens: int, seed: int, max_length: int | None = None) -> None:
        self._refresh_steps = refresh_steps
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._max_length = max_length
        self._prompts: _Prompts
        #: By row the step in which it was answered, and the answer's token ids; the same on all processes.
        self._kept: dict[int, tuple[int, list[int]]] = {}

    @classmethod
    def of_run(cls, settings: LongVPOConfig) -> SampledAnswers | None:
        """Those of a run; None if it does not sample."""
        if not settings.draws_answers:
            return None
        return cls(
            settings.view_distillation_refresh_steps,
            settings.view_distillation_max_new_tokens,
            settings.seed,
            settings.max_length,
        )

    def prepare(self, model: Any, processor: ProcessorMixin) -> None:
        """Readies it for a policy.

        Raises:
            ConfigError: If virtual tokens are trained.
        """
        adapter = getattr(model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise ConfigError(
                f"view_distillation_on='sampled' does not work with virtual tokens (peft_type="
                f"{adapter.peft_type.value}): peft cannot generate with them before the video of every family. Train "
                "another adapter, such as LoRA, or set view_distillation_on='chosen'."
            )
        config = unwrapped(model).config
        bounds = [bound for bound in (self._max_length, context_tokens(config)) if bound is not None]
        visual = visual_token_ids(config) | visual_token_ids(processor)
        self._prompts = _Prompts(processor.tokenizer.pad_token_id, visual, min(bounds, default=sys.maxsize))

    def of(
        self,
        model: nn.Module,
        batch: Batch,
        step: int,
        accelerator: Accelerator,
        is_kept: bool = True,
    ) -> list[list[int]]:
        """Token ids of an answer to each row of a batch; where processes share weights, all of them call it together.

        Args:
            model: The policy, perhaps wrapped.
            batch: With `row_keys`.
            step: Optimizer steps that were made.
            accelerator: Of the run.
            is_kept: Whether answers of earlier steps are used, and these kept for later ones.
        """
        keys = batch["row_keys"].tolist()
        is_kept = is_kept and self._refresh_steps > 1
        if is_kept:
            self._kept = {
                key: (made, ids) for key, (made, ids) in self._kept.items() if step - made < self._refresh_steps
            }
        found = {row: self._kept[key][1] for row, key in enumerate(keys) if is_kept and key in self._kept}
        missing = [row for row in range(len(keys)) if row not in found]
        waiting = accelerator.gather(torch.tensor([len(missing)], device=batch["input_ids"].device)).tolist()
        if any(waiting):
            # A sharded model is run by all or none: who needs no answer gives one that is thrown away.
            asked = missing or [0]
            seeds = [self._seed_of(keys[row], step) for row in asked]
            with accelerator.autocast():
                answers = _sampled(model, batch, asked, seeds, self._max_new_tokens, accelerator, self._prompts)
            new = [(keys[row], ids) for row, ids in zip(asked, answers, strict=True) if row in missing]
            found.update(zip(missing, (ids for _, ids in new), strict=True))
            if is_kept:
                everyone = gather_object(new) if accelerator.num_processes > 1 else new
                self._kept.update({key: (step, ids) for key, ids in everyone if key != NO_ROW})
        return [found[row] for row in range(len(keys))]

    def _seed_of(self, key: int, step: int) -> int:
        content = json.dumps([self._seed, key, step])
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) >> 1

    def write(self, folder: Path) -> None:
        """Puts the kept answers beside a checkpoint's weights; nothing where none are kept."""
        if self._refresh_steps > 1:
            write_json(folder / FILE, {str(key): [made, ids] for key, (made, ids) in self._kept.items()})

    def read(self, folder: Path) -> None:
        """The inverse of `write`."""
        path = folder / FILE
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._kept = {int(key): (made, ids) for key, (made, ids) in stored.items()}


def with_sampled(batch: Batch, answers: Sequence[Sequence[int]], pad_token_id: int) -> Batch:
    """The batch with a third block of sequences: each row's prompt and its sampled answer."""
    rows = len(batch["video_index"])
    prompts = batch["completion_mask"][:rows].argmax(1).tolist()
    names = ("input_ids", "attention_mask", "completion_mask", "mm_token_type_ids")
    fills = dict(zip(names, (pad_token_id, 0, 0, 0), strict=True))
    answer_fills = dict(zip(names, (None, 1, 1, 0), strict=True))
    width = max(batch["input_ids"].shape[1], *(prompt + len(ids) for prompt, ids in zip(prompts, answers, strict=True)))
    made = dict(batch)
    for name in (name for name in names if name in batch):
        whole = batch[name]
        block = whole.new_full((rows, width), fills[name])
        for row, (prompt, ids) in enumerate(zip(prompts, answers, strict=True)):
            block[row, :prompt] = whole[row, :prompt]
            given = whole.new_tensor(ids) if answer_fills[name] is None else answer_fills[name]
            block[row, prompt : prompt + len(ids)] = given
        made[name] = torch.cat([F.pad(whole, (0, width - whole.shape[1]), value=fills[name]), block])
    return made


def _sampled(
    model: Any,
    batch: Batch,
    rows: Sequence[int],
    seeds: Sequence[int],
    max_new_tokens: int,
    accelerator: Accelerator,
    prompts: _Prompts,
) -> list[list[int]]:
    """Token ids of an answer to each of some rows, ended as the model ends them, or cut."""
    index = batch["video_index"].tolist()
    groups: dict[Hashable, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(visual_shapes(batch["videos"][index[row]]), []).append(place)
    found: dict[int, list[int]] = {}
    inner = accelerator.unwrap_model(model)
    synced = accelerator.num_processes > 1 and accelerator.distributed_type == DistributedType.FSDP
    with torch.no_grad(), undisturbed(inner), evaluating(inner), _own_distribution(inner, prompts) as ends:
        for places in groups.values():
            inputs, room = prompts.of(batch, [rows[place] for place in places])
            visual = concatenate_visuals([batch["videos"][index[rows[place]]] for place in places])
            device = inputs["input_ids"].device
            draws = Draws(_DRAWN, [seeds[place] for place in places], device)
            output = inner.generate(
                **inputs,
                **{name: value.to(device) for name, value in visual.items()},
                max_new_tokens=min(max_new_tokens, max(room)),
                logits_processor=LogitsProcessorList([draws]),
                synced_gpus=synced,
            )
            new = output[:, inputs["input_ids"].shape[1] :].tolist()
            for place, ids, most in zip(places, new, room, strict=True):
                found[place] = _ended(ids, ends)[:most]
    return [found[place] for place in range(len(rows))]


@contextmanager
def _own_distribution(model: Any, prompts: _Prompts) -> Iterator[set[int]]:
    """Within, the model generates by its distribution alone, without penalties of its settings.

    Yields:
        The tokens that end an answer.
    """
    base = unwrapped(model)
    usual = base.generation_config
    ends = usual.eos_token_id
    base.generation_config = GenerationConfig(
        bos_token_id=usual.bos_token_id,
        eos_token_id=ends,
        pad_token_id=prompts.pad_token_id,
        do_sample=False,  # what is drawn has the highest score
        use_cache=True,
        suppress_tokens=sorted(prompts.visual_token_ids) or None,
    )
    try:
        yield set() if ends is None else set(ends if isinstance(ends, list) else [ends])
    finally:
        base.generation_config = usual


def _ended(ids: Sequence[int], ends: set[int]) -> list[int]:
    """Token ids up to the first that ends an answer, and with it."""
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])
