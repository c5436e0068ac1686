"""`LongVPOTrainer`: TRL's `DPOTrainer` for video preference rows, with the reference model scored on its own view.

It works with rows that have `clips` (`preference.py`) and any transformers video-language model, and overrides as
little of TRL as possible, so that its loss types, metrics and options keep working. Every private name of TRL and
transformers that it uses is listed in `tests/training/test_contract.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import get_config_model_id

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import check_config, check_kind
from longvpo_hf.preference import TRAINING_COLUMNS, undecoded
from longvpo_hf.training.checks import look_over
from longvpo_hf.training.collator import (
    BAD_VIDEO_REASONS,
    SCORE_COLUMNS,
    TOP_COLUMNS,
    Batch,
    VideoPreferenceCollator,
)
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.distillation import ViewDistillation
from longvpo_hf.training.metrics import REPLACED, Means, Throughput
from longvpo_hf.training.models import adapters_checked, as_it_is, check_trained, taken
from longvpo_hf.training.nonfinite import NonFiniteSteps, nonfinite_error
from longvpo_hf.training.packing import number_of_calls, require_equal_calls
from longvpo_hf.training.referring import ReferringTrainer
from longvpo_hf.training.rows import TimelineSampler, have_clips, set_sampler_epoch
from longvpo_hf.training.sampling import SampledAnswers, with_sampled
from longvpo_hf.training.scoring import (
    ModelCall,
    answer_scores,
    gather_of_unequal_rows,
    rejected_view_scores,
    row_scores,
    sft_losses,
    texts_of,
)
from longvpo_hf.training.view_preference import REJECTED_VIEW_COLUMN, view_preference_losses

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, EvalPrediction, TrainerCallback
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

logger = get_logger(__name__)

#: Losses of TRL's that `label_smoothing` changes.
_SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}


class LongVPOTrainer(ReferringTrainer):
    """Trains a video-language model on preferences about timelines (LongVPO, Temporal Preference Optimization).

        trainer = LongVPOTrainer(model="OpenGVLab/InternVL3-2B-hf", args=LongVPOConfig("stage1"), train_dataset=rows)
        trainer.train()

    Rows without `clips` train as in `DPOTrainer`.

    Args:
        model: A model, or its name or path.
        ref_model: The reference model; by default the model as it is before training. Of a model that was changed since
            it was loaded, ZeRO-3, and FSDP with `precompute_ref_log_probs`, need it given.
        args: See `LongVPOConfig`; by default its defaults, with an output folder named after the model.
        data_collator: By default `VideoPreferenceCollator` with the settings of `args`.
        train_dataset: Rows as `load_dataset` gives them.
        eval_dataset: Rows to evaluate on, or several datasets by name. Metrics of the dataset `NAME` are called
            `eval_NAME_…`.
        processing_class: The model's processor; by default loaded from the model's name.
        compute_metrics: As in TRL; must be None for rows with clips, whose logits are not computed.
        callbacks: As in TRL, e.g. `EarlyWarning()`.
        optimizers: As in TRL.
        quantization_config: As in TRL.
        peft_config: As in TRL.

    Raises:
        ConfigError: If settings contradict each other, or the model cannot be trained with them.
        ModelError: When training starts, if a model of no known family cannot score its first batch.
        DatasetError: If a dataset has no rows, or some datasets have clips and others have none.
        ModelError: If there is no such model, its kind cannot be used, or its processor cannot be given frames.

    With `precompute_ref_log_probs=True` the reference model scores all rows once, before training, on their reference
    views alone, and is then dropped. `trainer.train_dataset` holds the scores as `ref_chosen_logps` and
    `ref_rejected_logps`, with `ref_fingerprint` beside: a hash of everything they depend on (the row's texts, the clips
    of its reference view, frame budget, processor, model). Save that dataset (`save_to_disk`, `to_parquet`) to score
    only once: if all fingerprints are those of the run at hand the scores are kept, else all rows are scored anew and
    the log says so. Rows of a dataset on disk are also found in its cache. Without the option, such columns are
    ignored. Where rows are distilled, `ref_top_tokens`, `ref_top_logps` and `ref_token_logps` hold what the reference
    finds likeliest for each token of the chosen answer, with `ref_top_fingerprint` beside; where views are rejected,
    `ref_rejected_view_logps` holds the score of the chosen answer there, with `ref_rejected_view_fingerprint`.

    Metrics are means over all rows (or tokens) since the last log, or of an evaluation, at every batch size and number
    of processes: TRL's, and `rewards/{chosen,rejected,accuracies}/{begin,middle,end}` by where on the timeline the
    evidence of the row lies; `logps_per_token/{chosen,rejected}` and `ref_logps_per_token/{chosen,rejected}`;
    `loss/sft` and `loss/view_distillation`; `loss/view_preference` and
    `rewards/{rejected_view,view_accuracies,view_margins}`. The log also has `visual_tokens` of the policy's timelines
    and rejected views, each once, per optimizer step (in evaluation: per batch); `tokens_per_second` of `num_tokens`,
    which counts both sequences of a pair, loading and logging included; and `bad_videos/<reason>` so far.
    """

    _tag_names = ["trl", "dpo", "longvpo"]  # noqa: RUF012  (TRL's own form)
    _name = "LongVPO"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: LongVPOConfig | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        model, ref_model = taken(model, ref_model)
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = LongVPOConfig(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(args, LongVPOConfig):
            raise ConfigError(
                f"args must be a LongVPOConfig, got {type(args).__name__}: LongVPOConfig takes all of its settings too."
            )
        self._has_clips = have_clips(train_dataset, eval_dataset)
        self._means = {"train": Means(), "eval": Means()}
        self._bad_videos: Counter[str] = Counter()
        self._step_visual_tokens = 0.0
        self._throughput = Throughput()
        self._nonfinite = NonFiniteSteps(args.max_nonfinite_steps)
        self._distillation = ViewDistillation(args)
        self._sampled = SampledAnswers.of_run(args)
        if self._has_clips:
            revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
            if not isinstance(model, str):
                check_config(model.config)
            if processing_class is None and not name:
                raise ConfigError("processing_class is needed: the model has no name to load its processor by.")
            if isinstance(model, str) or processing_class is None:
                check_kind(name, revision)
            if processing_class is None:
                processing_class = AutoProcessor.from_pretrained(
                    name, revision=revision, trust_remote_code=args.trust_remote_code
                )
            data_collator = data_collator or VideoPreferenceCollator.of(processing_class, args)
            train_dataset, eval_dataset = look_over(model, args, data_collator, train_dataset, eval_dataset)
        if (
            ref_model is None
            and isinstance(model, PreTrainedModel)
            and peft_config is None
            and not args.precompute_ref_log_probs
            and not is_deepspeed_zero3_enabled()
        ):
            ref_model = as_it_is(model)
        sets = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
        if any(isinstance(rows, IterableDataset) for rows in sets):
            # As TRL does for streamed training rows: accelerate would cut every tensor of a batch along its rows.
            args.accelerator_config.dispatch_batches = False
        with adapters_checked():
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        self._take_losses()
        self._prepare_models()
        args.check_run(self._has_clips, self.is_deepspeed_enabled)
        # `_compute_loss` finds the reference's log-probabilities in the batch: `_with_reference` puts them there.
        self.precompute_ref_logps = True
        if self._has_clips and args.precompute_ref_log_probs and self.ref_model is not None:
            self.accelerator._models = [kept for kept in self.accelerator._models if kept is not self.ref_model]
            self.ref_model = None

    def _take_losses(self) -> None:
        """Keeps the SFT term out of TRL's losses: TRL averages it over the batch's tokens, the paper over its answers.

        It has no WPO weights (`use_weighting`), with which TRL's own term fails.
        """
        losses = self.args.preference_losses
        self.loss_types, self.loss_weights = list(losses), list(losses.values())
        if self.args.label_smoothing and not _SMOOTHED_LOSSES & losses.keys():
            logger.warning(
                f"label_smoothing={self.args.label_smoothing:g} has no effect on loss_type={self.args.loss_type}: only "
                f"{', '.join(sorted(_SMOOTHED_LOSSES))} use it."
            )

    # --------------------------------------------------------------------------------------------- the rows

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not self._has_clips:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return undecoded(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        if not self._has_clips:
            super()._set_signature_columns_if_needed()
        elif self._signature_columns is None:
            top = TOP_COLUMNS if self._distillation.weight else ()
            views = (REJECTED_VIEW_COLUMN,) if self.args.view_preference_weight else ()
            self._signature_columns = [*TRAINING_COLUMNS, *SCORE_COLUMNS, *top, *views]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        is_shuffled = self.args.train_sampling_strategy == "random"
        if not (self._has_clips and is_shuffled and isinstance(dataset, Dataset)) or self.args.pairs_per_timeline == 1:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        timelines = [
            # Media that a dataset stores itself are bytes.
            json.dumps(clips, default=lambda content: hashlib.sha256(content).hexdigest())
            for clips in dataset.select_columns("clips")["clips"]
        ]
        return TimelineSampler(timelines, self.args.pairs_per_timeline, seed)

    def _run_epoch(self, **arguments: Any) -> None:
        set_sampler_epoch(arguments["train_dataloader"], arguments["epoch"])
        super()._run_epoch(**arguments)

    # --------------------------------------------------------------------------------------------- the loss

    def _compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        if self._has_clips:
            return self._loss_of_videos(mode, model, inputs, return_outputs)
        call = ModelCall(model, None)
        result = super()._compute_loss(call, self._with_reference(model, inputs), return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        if self.args.sft_weight:
            sft = sft_losses(call.scored.log_probs, inputs["completion_mask"])
            gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
            everyone = gather(sft.detach())
            self._means[mode].add("loss/sft", everyone.sum().item(), len(everyone))
            loss = loss + self.args.sft_weight * sft.mean()
        if mode == "train":
            self._nonfinite.add_loss(self.accelerator.gather(loss.detach()).mean().item())
        return (loss, outputs) if return_outputs else loss

    def _loss_of_videos(self, mode: str, model: nn.Module, inputs: Batch, return_outputs: bool) -> Any:
        if mode == "train":
            self._throughput.start(self._total_train_tokens)
        inputs = self._agreed(inputs)
        self._try_trees(model, inputs)
        rows_left = self._count(mode, inputs)
        counted = self._counted_rows(mode, inputs)
        inputs = self._with_reference(model, self._with_sampled(mode, model, inputs))
        rows = counted if len(counted) else None  # TRL computes a loss in any case; without rows it is thrown away
        if rows is None and self.args.view_preference_weight:
            rows = torch.arange(len(inputs["row_keys"]), device=counted.device)  # not those about rejected views
        call = ModelCall(model, inputs, rows, self._distillation.weight > 0, self._group)
        texts = texts_of(inputs, rows)
        metrics = self._metrics[mode]
        self._metrics[mode] = defaultdict(list)
        with gather_of_unequal_rows(self.accelerator, has_rows=len(counted) > 0):
            loss = super()._compute_loss(call, texts, return_outputs)
        theirs, self._metrics[mode] = self._metrics[mode], metrics
        sft = sft_losses(call.scored.log_probs, texts["completion_mask"])
        if self.args.sft_weight:
            loss = loss + self.args.sft_weight * sft.mean()
        distilled = torch.zeros_like(sft)
        if call.states is not None:
            with self.accelerator.autocast():
                distilled = self._distillation.losses(call.states, rows, self._is_half)
            loss = loss + self._distillation.weight * distilled.mean()
        on_rejected = torch.full_like(sft, math.nan)
        if self.args.view_preference_weight and rows is not None:
            on_rejected = rejected_view_scores(call, rows, self.ld_alpha)
            loss = loss + self.args.view_preference_weight * self._view_preference(call, texts, on_rejected).mean()
        places = inputs["places"] if rows is None else inputs["places"][rows]
        scores = row_scores(call.scored, texts, self.ld_alpha, places, sft, distilled, on_rejected, loss)
        scores = scores.first(len(counted))
        everyone = scores.gathered(self.accelerator.gather, inputs["rows"])
        for name, values in theirs.items():
            if name == "num_tokens":
                metrics[name] = values
            elif name not in REPLACED and len(everyone):
                metrics[name] += values
        for name, (total, count) in everyone.sums(self.beta).items():
            self._means[mode].add(name, total, count)
        if mode == "train":
            self._nonfinite.add_loss(everyone.loss.mean().item() if len(everyone) else 0.0)
            if len(set(rows_left)) > 1 or not any(rows_left):
                # Processes are averaged: with these weights the average is the mean over all remaining rows.
                loss = loss * (len(rows_left) * len(counted) / max(sum(rows_left), 1))
        return loss

    def _view_preference(self, call: ModelCall, texts: Batch, on_rejected: Tensor) -> Tensor:
        """The term of each row, `[B]`, from the policy's scores of the chosen answers, and those on rejected views."""
        chosen = answer_scores(call.scored.log_probs, texts["completion_mask"], self.ld_alpha).chunk(2)[0]
        ratios = chosen - texts["ref_chosen_logps"], on_rejected - texts[REJECTED_VIEW_COLUMN]
        return view_preference_losses(*(self.beta * ratio for ratio in ratios))

    def _with_sampled(self, mode: str, model: nn.Module, inputs: Batch) -> Batch:
        """The batch with answers of the policy's own, for it and its reference, if it is distilled on such."""
        if self._sampled is None:
            return inputs
        step, is_kept = self.state.global_step, mode == "train"
        answers = self._sampled.of(model, inputs, step, self.accelerator, is_kept)
        answers *= len(inputs["video_index"]) // len(answers)  # the rows come again, about their rejected views
        pad = self.processing_class.tokenizer.pad_token_id
        reference = with_sampled(inputs["reference"], answers, pad)
        return {**with_sampled(inputs, answers, pad), "reference": reference}

    def _counted_rows(self, mode: str, inputs: Batch) -> Tensor:
        """Which of the batch's rows count: those kept; in evaluation without the repeats that fill the last batch."""
        kept = inputs["kept"]
        places = torch.arange(len(kept), device=kept.device)
        gradients = self.accelerator.gradient_state
        if mode == "train" or not gradients.end_of_dataloader or gradients.remainder <= 0:
            return places
        return places[
            kept + self.accelerator.process_index // self.get_cp_size() * inputs["rows"] < gradients.remainder
        ]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """transformers', called before each optimizer step: a step that is not finite ends the run, or is skipped."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss, norm = self._nonfinite.take_loss(), 0.0 if grad_norm is None else float(grad_norm)
        # In fp16 gradients overflow now and then; the loss scaler skips those steps itself.
        is_finite = math.isfinite(loss) and (self.args.fp16 or math.isfinite(norm))
        step = self.state.global_step + 1
        seen = f"The loss of step {step} is {loss:g} and its gradient norm {norm:g}"
        if self._nonfinite.ends_run(is_finite):
            self.state.global_step = step
            self.log({"loss": loss, "grad_norm": norm, "learning_rate": self._get_learning_rate()})
            raise nonfinite_error(seen, self.args)
        if not is_finite:
            logger.warning(f"{seen}: it does not change the weights (max_nonfinite_steps).")
            if not self.args.fp16:
                model.zero_grad()
        return grad_norm

    # ------------------------------------------------------------------------------------------ the metrics

    def _count(self, mode: str, inputs: Batch) -> list[int]:
        """Counts bad videos and visual tokens over all processes; returns how many rows each of them has left."""
        calls = [number_of_calls(batch) for batch in (inputs, inputs.get("reference", inputs))]
        local = [*calls, len(inputs["kept"]), inputs["visual_tokens"] if len(inputs["kept"]) else 0]
        counts = torch.cat([torch.tensor(local, device=inputs["bad_videos"].device), inputs["bad_videos"]])
        policy, reference, left, visual, *bad = zip(*self.accelerator.gather(counts[None]).tolist(), strict=True)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            require_equal_calls(policy, reference)
        for reason, number in zip(BAD_VIDEO_REASONS, bad, strict=True):
            if any(number):
                self._bad_videos[reason] += sum(number)
        for reason, total in self._bad_videos.items():
            self._metrics[mode][f"bad_videos/{reason}"] = [total]
        self._step_visual_tokens += sum(visual)
        if mode == "eval" or self.accelerator.gradient_state.sync_gradients:
            self._means[mode].add("visual_tokens", self._step_visual_tokens)
            self._step_visual_tokens = 0.0
        return list(left)

    def _take_means(self, mode: str) -> dict[str, float]:
        """Our metrics since they were last taken, `loss` among them."""
        means = dict(self._means[mode].take())
        if not self.args.sft_weight:
            means.pop("loss/sft", None)
        if not self._distillation.weight:
            means.pop("loss/view_distillation", None)
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the metrics named in the class."""
        if self.model.training:
            for name, mean in self._take_means("train").items():
                if name != "loss":
                    self._metrics["train"][name] = [mean]
            rate = self._throughput.take(self._total_train_tokens)
            if rate is not None:
                self._metrics["train"]["tokens_per_second"] = [rate]
            if "loss" in logs and self._nonfinite.take_log():
                logs["loss"] = math.nan
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """transformers', with all metrics, TRL's too, under the name of the dataset that is evaluated."""
        self._means["eval"] = Means()
        self._metrics["eval"].clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
        self._metrics["eval"].clear()
        if self._has_clips:
            output.metrics.pop(f"{metric_key_prefix}_loss", None)  # weighs batches alike; absent if no row is left
        metrics.update(self._take_means("eval"))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """TRL's; its time does not count for `tokens_per_second`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.leave_out_time()
        return metrics

    def leave_out_time(self) -> None:
        """Leaves the time until the next batch out of `tokens_per_second`; for callbacks that do work of their own."""
        self._throughput.stop()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """TRL's; the log says at the end how many rows were left out because of bad videos, and why.

        Raises:
            TrainingError: If the loss, a gradient or a weight is not finite; see `LongVPOConfig.max_nonfinite_steps`.
            ConfigError: If no weight requires a gradient.
        """
        check_trained(self.model)
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self._bad_videos:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(self._bad_videos.items()))
            logger.warning(f"on_bad_video='skip': {self._bad_videos.total()} rows were left out: {reasons}.")
        self._require_finite_weights()
        return output
