"""`LongVPOTrainer`: TRL's `DPOTrainer` for video preference rows, with the reference model scored on its own view.

Takes rows with `clips` (`preference.py`) and any transformers video-language model; overrides as little of TRL as it
can, so that its loss types, metrics and options keep working. Rows without clips train as in `DPOTrainer`. Knows
nothing of how rows are made. Every private thing of TRL that is used is named in `tests/test_contract.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from huggingface_hub import EvalResult
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, ProcessorMixin
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from .collator import Batch, TimelineSampler, VideoPreferenceCollator
from .config import LongVPOConfig
from .model_card import facts_of, write_model_card
from .preference import TRAINING_COLUMNS, undecoded
from .tree import enable_tree_packing, is_tree_packed, plain_forward, tree_forward

logger = get_logger(__name__)

_TEXT_KEYS = ("input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class LongVPOTrainer(DPOTrainer):
    """Trains a video-language model on preferences about timelines (LongVPO, Temporal Preference Optimization).

    Args:
        model: A model, or its name or path.
        args: See `LongVPOConfig`.
        train_dataset: Rows as `load_dataset` gives them.
        processing_class: The model's processor; by default loaded from the model's name.
        **kwargs: All else that `trl.DPOTrainer` takes: `ref_model`, `eval_dataset`, `peft_config`, `callbacks`, …
    """

    _tag_names = ["trl", "dpo", "longvpo"]  # noqa: RUF012  (TRL's own form)
    _name = "LongVPO"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: LongVPOConfig,
        train_dataset: Dataset | IterableDataset,
        processing_class: ProcessorMixin | None = None,
        **kwargs: Any,
    ) -> None:
        self._has_clips = "clips" in next(iter(undecoded(train_dataset)))
        if self._has_clips:
            if processing_class is None:
                from transformers import AutoProcessor

                name = model if isinstance(model, str) else model.config.name_or_path
                processing_class = AutoProcessor.from_pretrained(name, trust_remote_code=args.trust_remote_code)
            if processing_class.tokenizer.pad_token is None:
                processing_class.tokenizer.pad_token = processing_class.tokenizer.eos_token
            kwargs.setdefault(
                "data_collator",
                VideoPreferenceCollator(
                    processing_class,
                    num_frames=args.num_frames,
                    reference=args.reference,
                    reference_num_frames=args.reference_num_frames,
                    fps=args.fps,
                    max_pixels=args.max_pixels,
                    max_length=args.max_length,
                ),
            )
            train_dataset = undecoded(train_dataset)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )
        if self._has_clips:
            self._is_vision_dataset = True
            # `_compute_loss` always finds the reference's log-probabilities in the batch: it puts them there.
            self.precompute_ref_logps = True
            for scored in (self.model, self.ref_model):
                if scored is not None and args.tree_packing:
                    self._pack(scored)
        self._sft_weight = self._take_sft_weight()
        if args.freeze_vision_tower:
            _vision_tower(self.model).requires_grad_(False)

    def _pack(self, model: nn.Module) -> None:
        reason = enable_tree_packing(self.accelerator.unwrap_model(model))
        if reason is not None:
            logger.warning(f"Tree packing is off, chosen and rejected are scored as two sequences: {reason}")

    def _take_sft_weight(self) -> float:
        """Takes the SFT term out of TRL's losses: TRL averages it over the batch's tokens, the paper over its answers.

        Under WPO weighting it stays with TRL, whose weights go into every term.
        """
        if "sft" not in self.loss_types or self.use_weighting:
            return 0.0
        terms = list(zip(self.loss_types, self.loss_weights, strict=True))
        self.loss_types = [name for name, _ in terms if name != "sft"]
        self.loss_weights = [weight for name, weight in terms if name != "sft"]
        return sum(weight for name, weight in terms if name == "sft")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not self._has_clips:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return undecoded(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        if not self._has_clips:
            super()._set_signature_columns_if_needed()
        elif self._signature_columns is None:
            self._signature_columns = [*TRAINING_COLUMNS, "ref_chosen_logps", "ref_rejected_logps"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self._has_clips or self.args.pairs_per_timeline == 1 or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        timelines = [json.dumps(clips) for clips in dataset.select_columns("clips")["clips"]]
        return TimelineSampler(timelines, self.args.pairs_per_timeline, seed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads weights by `from_pretrained`: checkpoints of video models name them otherwise than the model in memory.

        transformers' own method matches names as they stand, warns of what it did not find, and goes on with weights
        that were never loaded.
        """
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool) -> Any:
        forward = _Forward(model, inputs if self._has_clips else None)
        if self._has_clips:
            if "ref_chosen_logps" not in inputs:
                chosen, rejected = self.compute_ref_log_probs(
                    _Forward(self.ref_model or model, inputs["reference"]), _texts(inputs["reference"])
                )
                inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            inputs = _texts(inputs)
        result = super()._compute_loss(forward, inputs, return_outputs)
        if not self._sft_weight:
            return result
        loss, outputs = result if return_outputs else (result, None)
        sft = _sft_loss(forward.scored.log_probs, inputs["completion_mask"])
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["loss/sft"].append(self.accelerator.gather(sft.detach()).mean().item())
        loss = loss + self._sft_weight * sft
        return (loss, outputs) if return_outputs else loss

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        eval_results: Sequence[EvalResult] = (),
    ) -> None:
        """Writes the model card and its training curve into the output folder, in place of TRL's card.

        Args:
            model_name: Its heading; by default the output folder's name.
            dataset_name: What the model was trained on; by default the Hub datasets the rows are from.
            tags: Beside those every card of this trainer has.
            eval_results: What was measured after training: `push_to_hub(eval_results=[...])`.
        """
        if self.is_world_process_zero():
            facts = facts_of(self, model_name, dataset_name, tags, eval_results)
            write_model_card(Path(self.args.output_dir), facts)


class _Forward:
    """Stands in for the model where TRL calls it: scores our batch, as a tree if it can, and keeps what TRL was given.

    Args:
        model: The model, perhaps wrapped.
        batch: The batch with its videos; None to call the model as TRL does.
    """

    def __init__(self, model: nn.Module, batch: Batch | None) -> None:
        self.model = model
        self.batch = batch
        self.scored: FusedCausalLMOutput

    def __call__(self, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return self.model(**kwargs)
        if self.batch is None:
            self.scored = self.model(**kwargs)
        elif is_tree_packed(self.model):
            self.scored = tree_forward(self.model, self.batch)
        else:
            self.scored = plain_forward(self.model, self.batch)
        return self.scored


def _sft_loss(log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Mean over chosen answers of −log π(y⁺) / |y⁺|; `log_probs` is `[2B, L-1]`, `completion_mask` `[2B, L]`."""
    chosen_mask = completion_mask[:, 1:].chunk(2)[0]
    chosen = log_probs[:, -chosen_mask.shape[1] :].chunk(2)[0]
    return -((chosen * chosen_mask).sum(1) / chosen_mask.sum(1).clamp(min=1)).mean()


def _texts(batch: Batch) -> Batch:
    return {key: batch[key] for key in _TEXT_KEYS if key in batch}


def _vision_tower(model: nn.Module) -> nn.Module:
    for name in ("vision_tower", "visual", "vision_model"):
        for path, module in model.named_modules():
            if path.rpartition(".")[2] == name:
                return module
    raise ValueError(
        f"freeze_vision_tower=True: found no vision tower in {type(model).__name__} (looked for modules named "
        "vision_tower, visual, vision_model). Freeze it yourself before training."
    )
