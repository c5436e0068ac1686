"""`LongVPOTrainer`: TRL's `DPOTrainer` for video preference rows, with the reference model scored on its own view.

Takes rows with `clips` (`preference.py`) and any transformers video-language model; overrides as little of TRL as it
can, so that its loss types, metrics and options keep working. Rows without clips train as in `DPOTrainer`. Knows
nothing of how rows are made. Every private thing of TRL that is used is named in `tests/test_contract.py`.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from huggingface_hub import EvalResult
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils.data import Sampler
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import context_tokens
from longvpo_hf.families.vision import bound_frozen_forward, vision_tower
from longvpo_hf.preference import TRAINING_COLUMNS, undecoded
from longvpo_hf.publishing.model_card import write_model_card
from longvpo_hf.training.collator import (
    BAD_VIDEO_REASONS,
    FINGERPRINT_COLUMN,
    SCORE_COLUMNS,
    Batch,
    TimelineSampler,
    VideoPreferenceCollator,
)
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.facts import facts_of
from longvpo_hf.training.packing import enable_tree_packing, is_tree_packed, plain_forward, tree_forward, unwrapped

logger = get_logger(__name__)

_TEXT_KEYS = ("input_ids", "attention_mask", "completion_mask", *SCORE_COLUMNS)

#: Thirds of the timeline, by where the middle of a row's evidence lies.
POSITIONS = ("begin", "middle", "end")


class LongVPOTrainer(DPOTrainer):
    """Trains a video-language model on preferences about timelines (LongVPO, Temporal Preference Optimization).

    Args:
        model: A model, or its name or path.
        args: See `LongVPOConfig`.
        train_dataset: Rows as `load_dataset` gives them.
        processing_class: The model's processor; by default loaded from the model's name.
        **kwargs: All else that `trl.DPOTrainer` takes: `ref_model`, `eval_dataset`, `peft_config`, `callbacks`, …

    With `precompute_ref_log_probs=True` the reference model scores all rows once, before training, on their reference
    views alone, and is then let go. `trainer.train_dataset` holds the scores as `ref_chosen_logps` and
    `ref_rejected_logps`, with `ref_fingerprint` beside: a hash of all they depend on (the row's texts, the clips of its
    reference view, frame budget, processor, model). Save that dataset (`save_to_disk`, `to_parquet`) to score no more:
    where all fingerprints are those of the run at hand the scores are kept, else all rows are scored anew and the log
    says so. Rows of a dataset on disk are also found in its cache. Without the option, such columns are ignored.

    Metrics besides TRL's: `rewards/{chosen,rejected,accuracies}/{begin,middle,end}` by where on the timeline the row's
    evidence lies; `logps_per_token/{chosen,rejected}` and `ref_logps_per_token/{chosen,rejected}`; `visual_tokens` of
    the policy's timelines, each once, per optimizer step (in evaluation: per batch); `tokens_per_second` of
    `num_tokens`, which counts both sequences of a pair, loading and logging included; `loss/sft`; and
    `bad_videos/<reason>` so far.
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
        self._is_ready = False
        self._sums: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
        self._bad_videos: Counter[str] = Counter()
        self._step_visual_tokens = 0.0
        self._clock: tuple[float, float] | None = None  # seconds and tokens at the start of what the next log is about
        self._is_empty_batch = False
        if self._has_clips:
            if processing_class is None:
                from transformers import AutoProcessor

                name = model if isinstance(model, str) else model.config.name_or_path
                processing_class = AutoProcessor.from_pretrained(name, trust_remote_code=args.trust_remote_code)
            if processing_class.tokenizer.pad_token is None:
                processing_class.tokenizer.pad_token = processing_class.tokenizer.eos_token
            kwargs["data_collator"] = kwargs.get("data_collator") or VideoPreferenceCollator(
                processing_class,
                num_frames=args.num_frames,
                reference=args.reference,
                reference_num_frames=args.reference_num_frames,
                fps=args.fps,
                max_pixels=args.max_pixels,
                max_length=args.max_length,
                on_bad_video=args.on_bad_video,
                precomputed=args.precompute_ref_log_probs,
            )
            train_dataset = undecoded(train_dataset)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )
        self._sft_weight = self._take_sft_weight()
        self._ready()
        if self._has_clips:
            # `_compute_loss` always finds the reference's log-probabilities in the batch: it puts them there.
            self.precompute_ref_logps = True
            if args.precompute_ref_log_probs and self.ref_model is not None:
                self.accelerator._models = [kept for kept in self.accelerator._models if kept is not self.ref_model]
                self.ref_model = None

    def _ready(self) -> None:
        """Readies the models for their first forward, which may be that of precomputing, inside TRL's `__init__`."""
        if self._is_ready:
            return
        self._is_ready = True
        models = [scored for scored in (self.model, self.ref_model) if scored is not None]
        models = [self.accelerator.unwrap_model(scored) for scored in models]
        for scored in models:
            tower = vision_tower(scored)
            if self.args.freeze_vision_tower:
                if tower is None:
                    raise ConfigError(
                        f"freeze_vision_tower=True: transformers finds no vision tower in {type(scored).__name__} "
                        "(get_encoder(modality='video')). Leave it False and set requires_grad yourself."
                    )
                tower.requires_grad_(False)
            # Processes that call a sharded tower unequally often wait for one another for ever.
            if tower is not None and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
                bound_frozen_forward(scored)
        if not self._has_clips:
            return
        self.data_collator.context_tokens = context_tokens(self.model.config)
        for scored in models:
            reason = enable_tree_packing(scored) if self.args.tree_packing else None
            if reason is not None:
                logger.warning(f"Tree packing is off, chosen and rejected are scored as two sequences: {reason}")

    def _take_sft_weight(self) -> float:
        """Takes the SFT term out of TRL's losses: TRL averages it over the batch's tokens, the paper over its answers.

        It has no WPO weights (`use_weighting`), with which TRL's own term fails.
        """
        terms = list(zip(self.loss_types, self.loss_weights, strict=True))
        self.loss_types = [name for name, _ in terms if name != "sft"]
        self.loss_weights = [weight for name, weight in terms if name != "sft"]
        return sum(weight for name, weight in terms if name == "sft")

    def create_accelerator_and_postprocess(self) -> None:
        """transformers', but under FSDP2 log-probabilities leave the model as they are.

        accelerate has FSDP2 cast what a model gives to the type it computes in. A log-probability of -6 in bfloat16 is
        off by up to 0.016, and a margin sums those of two whole answers.
        """
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.mixed_precision_policy is not None:
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not self._has_clips:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return undecoded(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        if not self._has_clips:
            super()._set_signature_columns_if_needed()
        elif self._signature_columns is None:
            self._signature_columns = [*TRAINING_COLUMNS, *SCORE_COLUMNS]

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

    # ------------------------------------------------------------------------------------- the reference

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's pass over the dataset, on the reference views alone and under a fingerprint of all it depends on."""
        if self._has_clips and not self.args.precompute_ref_log_probs:
            return dataset
        if not self._has_clips or isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        self._ready()
        collator, model_hash = self.data_collator, self._precompute_model_hash
        depends = [model_hash, _config_facts(self.model.config), self.ld_alpha, self.args.bf16, self.args.fp16]
        rows = list(dataset.select_columns(list(TRAINING_COLUMNS)))
        wanted = [collator.reference_fingerprints(rows, json.dumps(depends, default=str))]
        broadcast_object_list(wanted, from_process=0)  # ZeRO-3 shards the model, so each process hashes another
        columns = [column for column in (*SCORE_COLUMNS, FINGERPRINT_COLUMN) if column in dataset.column_names]
        if len(columns) == len(SCORE_COLUMNS) + 1:
            stale = sum(mine != held for mine, held in zip(wanted[0], dataset[FINGERPRINT_COLUMN], strict=True))
            if stale == 0:
                logger.info(
                    f"All {len(rows)} rows of the {name} dataset hold reference log-probs of this run's settings."
                )
                return dataset
            logger.warning(
                f"{stale} of {len(rows)} rows of the {name} dataset hold reference log-probs of other rows, views, "
                "frame budgets, processors or models (ref_fingerprint differs): all are computed anew."
            )
        elif columns:
            logger.warning(f"The {name} dataset's {', '.join(columns)} do not say what they belong to: computed anew.")
        dataset = dataset.remove_columns(columns)
        if self.accelerator.num_processes > 1 and not dataset.cache_files:
            raise ConfigError(
                f"precompute_ref_log_probs=True: {self.accelerator.num_processes} processes share the scores through "
                f"the {name} dataset's cache on disk, but it was made in memory: save_to_disk and load_from_disk it."
            )
        self.data_collator = collator.reference_batch
        self._precompute_model_hash = wanted[0]
        try:
            scored = super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self.data_collator, self._precompute_model_hash = collator, model_hash
        return scored.add_column(FINGERPRINT_COLUMN, wanted[0])

    def compute_ref_log_probs(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        """The reference's log-probabilities of chosen and rejected answers, `[B]` each; NaN for rows left out.

        Args:
            model: The reference model, or the policy whose adapters TRL then turns off.
            inputs: A batch of TRL's, or of the collator's `reference_batch`, or the `reference` of its batches.
        """
        if "videos" not in inputs:
            return super().compute_ref_log_probs(model, inputs)
        scores = super().compute_ref_log_probs(_Forward(model, inputs), _texts(inputs))
        if "kept" not in inputs:
            return scores
        chosen, rejected = (_spread(score, inputs["kept"], inputs["rows"]) for score in scores)
        return chosen, rejected

    def _with_reference(self, model: nn.Module, inputs: Batch) -> Batch:
        """The batch with the reference's log-probabilities."""
        if SCORE_COLUMNS[0] in inputs:
            return inputs
        if self.ref_model is None and not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            raise ConfigError(
                "This batch holds no reference log-probs and there is no reference model to compute them: with "
                "precompute_ref_log_probs=True pass every dataset when the trainer is made."
            )
        scores = self.compute_ref_log_probs(self.ref_model or model, inputs["reference"])
        return {**inputs, **dict(zip(SCORE_COLUMNS, scores, strict=True))}

    # ------------------------------------------------------------------------------------------ the loss

    def _compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool) -> Any:
        if not self._has_clips:
            forward = _Forward(model, None)
            return self._add_sft(super()._compute_loss(forward, inputs, return_outputs), forward, inputs)
        mode = "train" if self.model.training else "eval"
        if mode == "train" and self._clock is None:
            self._clock = (time.perf_counter(), self._total_train_tokens)
        rows_left = self._count(mode, inputs)
        self._is_empty_batch = not any(rows_left)
        before = {name: list(values) for name, values in self._metrics[mode].items()} if self._is_empty_batch else {}
        forward = _Forward(model, inputs)
        inputs = self._with_reference(model, inputs)
        with self._ragged(inputs, rows_left):
            result = super()._compute_loss(forward, _texts(inputs), return_outputs)
            loss = self._add_sft(result, forward, inputs)
        self._record(mode, forward, inputs)
        if self._is_empty_batch:
            self._metrics[mode] = defaultdict(list, before)
        if len(set(rows_left)) > 1 or self._is_empty_batch:
            # Processes are averaged: so weighed, the average is the mean over all rows that are left.
            loss = loss * (len(rows_left) * len(inputs["kept"]) / max(sum(rows_left), 1))
        return loss

    def _add_sft(self, result: Any, forward: _Forward, inputs: Batch) -> Any:
        if not self._sft_weight:
            return result
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        sft = _sft_loss(forward.scored.log_probs, inputs["completion_mask"])
        mode = "train" if self.model.training else "eval"
        per_row = sft.detach().expand(len(inputs["completion_mask"]) // 2)
        self._metrics[mode]["loss/sft"].append(self.accelerator.gather(per_row).mean().item())
        loss = loss + self._sft_weight * sft
        return (loss, outputs) if isinstance(result, tuple) else loss

    @contextmanager
    def _ragged(self, inputs: Batch, rows_left: list[int]) -> Iterator[None]:
        """Within, TRL's metrics gather the rows that are left, though processes may hold unequally many, or none."""
        if all(left == inputs["rows"] for left in rows_left):
            yield
            return
        gather, kept, rows = self.accelerator.gather, inputs["kept"], inputs["rows"]
        present = torch.cat([torch.arange(rows) < left for left in rows_left])

        def gather_rows(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0:
                return gather(tensor if len(kept) else torch.zeros_like(tensor))
            places = torch.arange(len(kept), device=tensor.device)
            return gather(_spread(tensor, places, rows))[present.to(tensor.device)]

        self.accelerator.gather = gather_rows
        try:
            yield
        finally:
            del self.accelerator.gather

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """TRL's, but for a batch without any row left there is no loss."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        return (None if self._is_empty_batch else loss), logits, labels

    # --------------------------------------------------------------------------------------- the metrics

    def _count(self, mode: str, inputs: Batch) -> list[int]:
        """Counts bad videos and visual tokens over all processes; gives how many rows each of them has left."""
        local = [len(inputs["kept"]), inputs["visual_tokens"] if len(inputs["kept"]) else 0]
        counts = torch.cat([torch.tensor(local, device=inputs["bad_videos"].device), inputs["bad_videos"]])
        left, visual, *bad = zip(*self.accelerator.gather(counts[None]).tolist(), strict=True)
        for reason, number in zip(BAD_VIDEO_REASONS, bad, strict=True):
            if any(number):
                self._bad_videos[reason] += sum(number)
        for reason, total in self._bad_videos.items():
            self._metrics[mode][f"bad_videos/{reason}"] = [total]
        self._step_visual_tokens += sum(visual)
        if mode == "eval" or self.accelerator.gradient_state.sync_gradients:
            self._add(mode, "visual_tokens", self._step_visual_tokens)
            self._step_visual_tokens = 0.0
        return list(left)

    def _record(self, mode: str, forward: _Forward, inputs: Batch) -> None:
        """Sums what the logs report of rows and tokens; sums, so that no grouping into batches weighs one more."""
        mask = inputs["completion_mask"]
        scores = _answer_scores(forward.scored.log_probs.detach(), mask, self.ld_alpha).chunk(2)
        columns = torch.stack(
            [*scores, *(inputs[name] for name in SCORE_COLUMNS), *mask.sum(1).chunk(2), inputs["places"]], dim=1
        ).float()
        padded = _spread(columns[: len(inputs["kept"])], inputs["kept"], inputs["rows"])
        # In evaluation the last batch is filled up with rows seen before, which are dropped. In training the loss holds
        # them too.
        gathered = (self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics)(padded)
        for chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens, place in gathered.tolist():
            if chosen_tokens != chosen_tokens:  # NaN: the row was left out
                continue
            self._add(mode, "logps_per_token/chosen", chosen, chosen_tokens)
            self._add(mode, "logps_per_token/rejected", rejected, rejected_tokens)
            self._add(mode, "ref_logps_per_token/chosen", ref_chosen, chosen_tokens)
            self._add(mode, "ref_logps_per_token/rejected", ref_rejected, rejected_tokens)
            if place == place:
                position = POSITIONS[min(2, int(place * 3))]
                rewards = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
                self._add(mode, f"rewards/chosen/{position}", rewards[0])
                self._add(mode, f"rewards/rejected/{position}", rewards[1])
                self._add(mode, f"rewards/accuracies/{position}", float(rewards[0] > rewards[1]))

    def _add(self, mode: str, name: str, value: float, count: float = 1.0) -> None:
        total = self._sums[mode].setdefault(name, [0.0, 0.0])
        total[0] += value
        total[1] += count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the metrics named in the class."""
        mode = "train" if self.model.training else "eval"
        for name, (total, count) in self._sums[mode].items():
            self._metrics[mode][name] = [total / count]
        self._sums[mode].clear()
        if mode == "train" and self._clock is not None:
            seconds, tokens = time.perf_counter(), self._total_train_tokens
            if tokens > self._clock[1]:
                self._metrics[mode]["tokens_per_second"] = [(tokens - self._clock[1]) / (seconds - self._clock[0])]
            self._clock = (seconds, tokens)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's; its time does not count for `tokens_per_second`."""
        metrics = super().evaluate(*args, **kwargs)
        self._clock = None
        return metrics

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; says at the end how many rows were left out for bad videos, and why."""
        output = super().train(*args, **kwargs)
        if self._bad_videos:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(self._bad_videos.items()))
            logger.warning(f"on_bad_video='skip': {self._bad_videos.total()} rows were left out: {reasons}.")
        return output

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
            if self.batch is not None:
                raise ConfigError(
                    "The logits of video rows are not computed: leave compute_metrics=None, or set "
                    "prediction_loss_only=True. The trainer's own metrics are in the logs."
                )
            return self.model(**kwargs)
        with _head_of_all_processes(self.model):
            if self.batch is None:
                self.scored = self.model(**kwargs)
                return self.scored
            # What TRL asks of a mixture of experts, for its load-balancing loss; the inputs are our batch's own.
            asked = {name: kwargs[name] for name in ("output_router_logits",) if name in kwargs}
            forward = tree_forward if is_tree_packed(self.model) else plain_forward
            self.scored = forward(self.model, self.batch, **asked)
            return self.scored


@contextmanager
def _head_of_all_processes(model: nn.Module) -> Iterator[None]:
    """Within, the gradient of an LM head that FSDP2 shards is the mean over processes, as that of all other weights.

    TRL's fused head multiplies by the weight itself, so FSDP never sees the head run and reduces nothing: by TRL's own
    `full_tensor()` each process's part of the weight is trained by that process's rows alone. A tied head is whole by
    then, as FSDP gathers it with the embeddings.
    """
    base = unwrapped(model)
    get_head = base.get_output_embeddings

    def head() -> Any:
        sharded = get_head()
        if not isinstance(getattr(sharded, "weight", None), DTensor):
            return sharded
        return SimpleNamespace(weight=_gathered(sharded.weight), bias=_gathered(sharded.bias))

    base.get_output_embeddings = head
    try:
        yield
    finally:
        del base.get_output_embeddings


def _gathered(weight: DTensor | None) -> Tensor | None:
    if weight is None:
        return None
    whole = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    if whole.requires_grad:
        processes = weight.device_mesh.size()
        whole.register_hook(lambda gradient: gradient / processes)
    return whole


def _sft_loss(log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Mean over chosen answers of −log π(y⁺) / |y⁺|; `log_probs` is `[2B, L-1]`, `completion_mask` `[2B, L]`."""
    chosen_mask = completion_mask[:, 1:].chunk(2)[0]
    chosen = log_probs[:, -chosen_mask.shape[1] :].chunk(2)[0]
    return -((chosen * chosen_mask).sum(1) / chosen_mask.sum(1).clamp(min=1)).mean()


def _texts(batch: Batch) -> Batch:
    return {key: batch[key] for key in _TEXT_KEYS if key in batch}


def _answer_scores(log_probs: Tensor, completion_mask: Tensor, ld_alpha: float | None) -> Tensor:
    """Log-probability of each sequence's answer, `[2B]`, as TRL counts it: under LD-DPO tokens beyond the shorter
    answer's length weigh `ld_alpha`. `log_probs` is `[2B, L-1]` and 0 outside answers, `completion_mask` `[2B, L]`."""
    mask = completion_mask[:, 1:]
    log_probs = log_probs[:, -mask.shape[1] :]
    if ld_alpha is None:
        return log_probs.sum(1)
    shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    return (log_probs * torch.where(mask.cumsum(1) <= shared[:, None], 1.0, ld_alpha)).sum(1)


def _spread(values: Tensor, places: Tensor, rows: int) -> Tensor:
    """`values` of the rows `places` among all `rows`; NaN for the others, and beyond `places`."""
    spread = values.new_full((rows, *values.shape[1:]), float("nan"))
    spread[places] = values[: len(places)]
    return spread


def _config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """The config without what does not change a score: where it came from and who wrote it."""
    facts = config.to_dict()
    return {name: value for name, value in facts.items() if name not in ("_name_or_path", "transformers_version")}
