"""The models of a run, made ready for the batches, and what its reference model says of them.

It is scored on views of its own, with every batch or once for all rows (`precompute_ref_log_probs`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor, nn

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import context_tokens, family_of
from longvpo_hf.precision import warn_of_half_precision
from longvpo_hf.preference import TRAINING_COLUMNS
from longvpo_hf.training.collator import SCORE_COLUMNS, Batch
from longvpo_hf.training.distillation import TopTokens, ViewDistillation
from longvpo_hf.training.groups import SharingTrainer
from longvpo_hf.training.models import check_head, prepare_tower, prepare_trees, tile_mlps, undisturbed
from longvpo_hf.training.packing import disable_tree_packing, is_tree_packed, trial_on_batches
from longvpo_hf.training.reference import (
    FINGERPRINT_COLUMN,
    REJECTED_VIEW_FINGERPRINT_COLUMN,
    TOP_FINGERPRINT_COLUMN,
    TopTokenWriter,
    config_facts,
    has_rejected_view_scores,
    has_scores,
    has_top_tokens,
    reference_fingerprints,
    score_columns,
    top_token_file,
)
from longvpo_hf.training.scoring import ModelCall, texts_of
from longvpo_hf.training.view_preference import REJECTED_VIEW_COLUMN

logger = get_logger(__name__)

_WITHOUT_TREES = "Tree packing is off, chosen and rejected are scored as two sequences"


class ReferringTrainer(SharingTrainer):
    """TRL's trainer with a reference model on its own views; `LongVPOTrainer` trains."""

    #: Whether rows have clips.
    _has_clips: bool
    #: Makes the batches, or those of a pass of TRL's.
    data_collator: Any
    #: Under which TRL caches the scores of its pass.
    _precompute_model_hash: Any
    #: The term of view distillation, whose teacher the reference is.
    _distillation: ViewDistillation
    #: Writes the reference's likeliest tokens while scores are precomputed.
    _top_writer: TopTokenWriter | None = None
    _are_models_prepared = False
    _is_trial_due = False

    def _prepare_models(self) -> None:
        """Prepares the models for their first forward, which may be that of precomputing, inside TRL's `__init__`."""
        if self._are_models_prepared:
            return
        self._are_models_prepared = True
        models = [scored for scored in (self.model, self.ref_model) if scored is not None]
        models = [self.accelerator.unwrap_model(scored) for scored in models]
        warn_of_half_precision(models[0], self.accelerator.device, self.args.bf16)
        for scored in models:
            check_head(scored)
            prepare_tower(scored, self.args.freeze_vision_tower, self.is_fsdp_enabled or self.is_deepspeed_enabled)
            tile_mlps(scored, self.args.tiled_mlp_num_shards)
        if not self._has_clips:
            self._check_sharing(False, None)
            return
        if self._sampled is not None:
            self._sampled.prepare(self.model, self.processing_class)
        self._collator = self.data_collator
        self._collator.context_tokens = context_tokens(self.model.config)
        self._collator.seat = self._seat()
        self._collator.hands_over_errors = self.accelerator.num_processes > 1
        reasons = [prepare_trees(scored) for scored in models] if self.args.tree_packing else []
        self._check_sharing(True, next((reason for reason in reasons if reason is not None), None))
        for reason in sorted({reason for reason in reasons if reason is not None}):
            logger.warning(f"{_WITHOUT_TREES}: {reason}")
        is_wanted = self.args.tree_packing_trial
        is_known = bool(family_of(self.model.config).processor)
        self._is_trial_due = is_tree_packed(self.model) and (not is_known if is_wanted is None else is_wanted)

    def _try_trees(self, model: nn.Module, inputs: Batch) -> None:
        """Leaves trees, on all processes, if the first batch with a video gets other numbers than as sequences."""
        if not self._is_trial_due:
            return
        trial = trial_on_batches(model, inputs, self._is_half)
        self._is_trial_due = trial.reason is None and not trial.had_video
        if trial.reason is not None:
            logger.warning(f"{_WITHOUT_TREES}: {trial.reason}")
            for scored in (self.model, self.ref_model):
                if scored is not None:
                    disable_tree_packing(scored)

    @property
    def _is_half(self) -> bool:
        """Whether the model computes in half precision."""
        return bool(self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's pass over the dataset, on the reference views alone and under a fingerprint of all it depends on."""
        if not self.args.precompute_ref_log_probs:
            return dataset
        if not self._has_clips or isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        self._prepare_models()
        collator = self.data_collator
        depends = [self._precompute_model_hash, config_facts(self.model.config), self.ld_alpha]
        model = json.dumps([*depends, self.args.bf16, self.args.fp16], default=str)
        rows = list(dataset.select_columns([name for name in TRAINING_COLUMNS if name in dataset.column_names]))
        of_views = [] if collator.rejected is None else reference_fingerprints(collator, rows, model, True)
        wanted = [reference_fingerprints(collator, rows, model), of_views]
        broadcast_object_list(wanted, from_process=0)  # ZeRO-3 shards the model, so each process hashes another
        of_rows, of_views = wanted
        top = None
        if self._distillation.weight:
            top = [f"{fingerprint} {self._distillation.kept}" for fingerprint in of_rows]
        bare = dataset.remove_columns(score_columns(dataset))
        is_known = has_scores(dataset, of_rows, name) and (top is None or has_top_tokens(dataset, top, name))
        are_views_known = not of_views or has_rejected_view_scores(dataset, of_views, name)
        if not (is_known and are_views_known) and self.accelerator.num_processes > 1 and not bare.cache_files:
            raise ConfigError(
                f"precompute_ref_log_probs=True: {self.accelerator.num_processes} processes share the scores through "
                f"the {name} dataset's cache on disk, but it was made in memory: save_to_disk and load_from_disk it."
            )
        if not is_known:
            dataset, are_views_known = self._scored(bare, name, batch_size, of_rows, top), not of_views
        if not are_views_known:
            dataset = self._with_rejected_views(dataset, bare, name, batch_size, of_views)
        return dataset

    def _scored(
        self, bare: Dataset, name: str, batch_size: int, fingerprints: list[str], top: list[str] | None
    ) -> Dataset:
        """A dataset with scores on the reference views, and with the likeliest tokens where `top` are their hashes."""
        with self._precomputing(self.data_collator.reference_batch, top or fingerprints):
            if top is None:
                scored = super()._precompute_ref_logps(bare, name, batch_size)
            else:
                scored = self._with_top_tokens(bare, name, batch_size).add_column(TOP_FINGERPRINT_COLUMN, top)
        return scored.add_column(FINGERPRINT_COLUMN, fingerprints)

    def _with_rejected_views(
        self, dataset: Dataset, bare: Dataset, name: str, batch_size: int, fingerprints: list[str]
    ) -> Dataset:
        """The dataset with scores of the chosen answers on the rejected views; `bare` is it without scores."""
        with self._precomputing(self.data_collator.rejected_view_batch, fingerprints):
            scored = super()._precompute_ref_logps(bare, f"{name} (rejected views)", batch_size)
        of_chosen = scored.select_columns(SCORE_COLUMNS[0]).rename_column(SCORE_COLUMNS[0], REJECTED_VIEW_COLUMN)
        stale = {REJECTED_VIEW_COLUMN, REJECTED_VIEW_FINGERPRINT_COLUMN} & set(dataset.column_names)
        dataset = concatenate_datasets([dataset.remove_columns(sorted(stale)), of_chosen], axis=1)
        return dataset.add_column(REJECTED_VIEW_FINGERPRINT_COLUMN, fingerprints)

    @contextmanager
    def _precomputing(self, collate: Any, fingerprints: list[str]) -> Iterator[None]:
        """Within, TRL's pass makes its batches by `collate` and caches its scores under these hashes."""
        usual = self.data_collator, self._precompute_model_hash
        self.data_collator, self._precompute_model_hash = collate, fingerprints
        try:
            yield
        finally:
            self.data_collator, self._precompute_model_hash = usual

    def _with_top_tokens(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's pass over the dataset, and beside its scores the likeliest tokens, written as they come."""
        try:
            with top_token_file(dataset, self._precompute_model_hash, self.accelerator) as (path, self._top_writer):
                scored = super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._top_writer = None
        return concatenate_datasets([scored, Dataset.from_file(str(path))], axis=1)

    def compute_ref_log_probs(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        """The reference's log-probabilities of chosen and rejected answers, `[B]` each; NaN for rows left out.

        Args:
            model: The reference model, or the policy whose adapters TRL then turns off.
            inputs: A batch of TRL's, or of one of the collator's `reference_batch` and `rejected_view_batch`, or the
                `reference` of its batches, which may hold the rows a second time, on their rejected views.
        """
        inputs = self._agreed(inputs)
        with undisturbed(self.model):
            if "videos" not in inputs:
                return super().compute_ref_log_probs(ModelCall(model, None), inputs)
            self._try_trees(model, inputs)
            call = ModelCall(model, inputs, keeps_states=self._distillation.weight > 0, group=self._group)
            scores = super().compute_ref_log_probs(call, texts_of(inputs))
            self._distillation.teacher = call.states
            if self._top_writer is not None and call.states is not None:
                is_counted = self._group is None or self._group.rank() == 0
                top = self._distillation.top_of(call.states)
                self._top_writer.add(top, inputs["kept"].tolist(), inputs["rows"], is_counted)
        if "kept" not in inputs:
            return scores
        spread = [score.new_full((inputs["rows"],), math.nan) for score in scores]
        for whole, score in zip(spread, scores, strict=True):
            whole[inputs["kept"]] = score[: len(inputs["kept"])]
        return spread[0], spread[1]

    def _with_reference(self, model: nn.Module, inputs: Batch) -> Batch:
        """The batch with the reference's log-probabilities."""
        if SCORE_COLUMNS[0] in inputs:
            if self._distillation.weight:
                self._distillation.teacher = TopTokens.of_batch(inputs)
            return inputs
        if self.ref_model is None and not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            raise ConfigError(
                "This batch holds no reference log-probs and there is no reference model to compute them: with "
                "precompute_ref_log_probs=True pass every dataset when the trainer is made."
            )
        reference = model if self.ref_model is None else self.ref_model  # a compiled model has no truth value
        scores = self.compute_ref_log_probs(reference, inputs.get("reference", inputs))
        found = dict(zip(SCORE_COLUMNS, scores, strict=True))
        if self.args.view_preference_weight:
            rows = len(inputs["row_keys"])
            found[REJECTED_VIEW_COLUMN] = scores[0][rows:]
            found |= {name: found[name][:rows] for name in SCORE_COLUMNS}
        return {**inputs, **found}
