"""What a run leaves on disk: checkpoints that are whole and finite, and the record and card beside the weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi
from torch import nn
from transformers import PreTrainedModel
from trl import DPOTrainer

from longvpo_hf.publishing.dataset import require_private
from longvpo_hf.publishing.model_card import write_model_card
from longvpo_hf.record import ModelRecord, write_record
from longvpo_hf.training.checkpoints import seal
from longvpo_hf.training.facts import record_of
from longvpo_hf.training.models import undisturbed
from longvpo_hf.training.nonfinite import nonfinite_error, nonfinite_weight
from longvpo_hf.training.packing import is_tree_packed
from longvpo_hf.training.sampling import SampledAnswers


class SavingTrainer(DPOTrainer):
    """TRL's trainer with our checkpoints, records and cards; `LongVPOTrainer` trains."""

    #: Answers of the policy's own that later steps may use; None where none are sampled.
    _sampled: SampledAnswers | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads weights by `from_pretrained`: checkpoints of video models name them otherwise than the model in memory.

        transformers' own method matches names as they are, warns of what it did not find, and goes on with weights
        that were never loaded.
        """
        if self._sampled is not None:
            self._sampled.read(Path(resume_from_checkpoint))
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled:
            with undisturbed(target):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """TRL's, but weights that are not finite end the run before they replace a checkpoint that is; sealed."""
        self._require_finite_weights()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and folder.is_dir():
            if self._sampled is not None:
                self._sampled.write(folder)
            seal(folder)

    def _require_finite_weights(self) -> None:
        name = nonfinite_weight(self.model)
        found = torch.tensor([name is not None], device=self.accelerator.device)
        if self.accelerator.gather(found).any():
            where = f" ({name})" if name else ""
            raise nonfinite_error(f"After step {self.state.global_step} weights are not finite{where}", self.args)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """transformers', before training; also creates the branch `hub_revision`, which a push does not.

        Raises:
            DatasetError: If the repository is to be private and is there and public.
        """
        super().init_hf_repo(token, private)
        if not self.is_world_process_zero():
            return
        api = HfApi(token=token or self.args.hub_token)
        if self.args.hub_private_repo if private is None else private:
            require_private(api, self.hub_model_id, "model")
        branch = self.args.hub_revision
        if branch is not None and not branch.startswith("refs/"):
            api.create_branch(self.hub_model_id, branch=branch, exist_ok=True)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        eval_results: Sequence[EvalResult] = (),
    ) -> None:
        """Writes the record, the model card and its training curve into the output folder, in place of TRL's card.

        Args:
            model_name: Its heading; by default the output folder's name.
            dataset_name: What the model was trained on; by default the Hub datasets the rows are from.
            tags: Beside those every card of this trainer has.
            eval_results: What was measured after training: `push_to_hub(eval_results=[...])`.
        """
        if self.is_world_process_zero():
            more = [tags] if isinstance(tags, str) else list(tags or ())
            more += ["hf_jobs"] if "JOB_ID" in os.environ else []  # as TRL's card says it
            record = self._record_of(
                name=model_name, dataset_name=dataset_name, tags=[*self._tag_names, *more], eval_results=eval_results
            )
            write_model_card(Path(self.args.output_dir), record, self.state.log_history)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers', with the record beside the weights."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_record(Path(output_dir or self.args.output_dir), self._record_of(tags=self._tag_names))

    def _record_of(self, **facts: Any) -> ModelRecord:
        return record_of(
            self.model,
            self.args,
            self.state,
            self.train_dataset,
            is_packed=self.args.tree_packing and is_tree_packed(self.model),
            sharing=self.get_cp_size(),
            hub_model_id=self.hub_model_id,
            citation=self._paper["citation"],
            **facts,
        )
