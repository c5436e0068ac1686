"""Every private name of TRL, transformers, accelerate and peft that the package uses.

When one of them moves, a test here fails with its name, before anything trains on wrong numbers. `trl` and
`transformers` are pinned to their minor versions in `pyproject.toml`; moving a pin starts with this file.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import GradientState
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, Trainer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

import tiny_models
from longvpo_hf.training.groups import SharingTrainer
from longvpo_hf.training.packing.forward import TOKEN_FIELDS
from longvpo_hf.training.saving import SavingTrainer
from longvpo_hf.training.trainer import LongVPOTrainer

#: What `LongVPOTrainer` overrides or calls, and with which arguments.
METHODS: list[tuple[type, str, list[str]]] = [
    (DPOTrainer, "_prepare_dataset", ["dataset", "processing_class", "args", "dataset_name"]),
    (DPOTrainer, "_set_signature_columns_if_needed", []),
    (DPOTrainer, "_precompute_ref_logps", ["dataset", "name", "batch_size"]),
    (DPOTrainer, "compute_ref_log_probs", ["model", "inputs"]),
    (DPOTrainer, "_compute_loss", ["model", "inputs", "return_outputs"]),
    (DPOTrainer, "log", ["logs", "start_time"]),
    (DPOTrainer, "evaluate", ["eval_dataset", "ignore_keys", "metric_key_prefix"]),
    (DPOTrainer, "_save_checkpoint", ["model", "trial"]),
    (Trainer, "_get_train_sampler", ["train_dataset"]),
    (Trainer, "_run_epoch", ["train_dataloader", "epoch"]),
    (Trainer, "_get_grad_norm", ["model", "grad_norm"]),
    (Trainer, "_get_learning_rate", []),
    (Trainer, "train", ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
    (
        Trainer,
        "evaluation_loop",
        ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
    ),
    (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
    (Trainer, "_load_best_model", []),
    (Trainer, "init_hf_repo", ["token", "private"]),
    (Trainer, "end", []),
    (Trainer, "create_accelerator_and_postprocess", []),
    (Trainer, "_prepare_context_parallel_inputs", ["model", "inputs"]),
    (Trainer, "get_cp_size", []),
    (Accelerator, "_prepare_cp", ["args"]),
    (Accelerator, "gather", ["tensor"]),
    (Accelerator, "gather_for_metrics", ["input_data", "use_gather_object"]),
    (PreTrainedModel, "get_encoder", ["modality"]),
    (PreTrainedModel, "get_decoder", []),
    (PreTrainedModel, "set_attn_implementation", ["attn_implementation"]),
    (PreTrainedModel, "_can_set_attn_implementation", []),
]

#: What their code must still say: attributes that `LongVPOTrainer` reads or sets, and how TRL uses them.
SPELLINGS: list[tuple[Any, str, str]] = [
    (DPOTrainer.__init__, "self._is_vision_dataset", "rows with clips must not count as images"),
    (DPOTrainer.__init__, "self.precompute_ref_logps = args.precompute_ref_log_probs", "set to True afterwards"),
    (DPOTrainer.__init__, "self._precompute_model_hash", "replaced by our fingerprint while precomputing"),
    (DPOTrainer.__init__, "self._metrics = {", "our metrics go there"),
    (DPOTrainer.__init__, "self._total_train_tokens = 0", "tokens_per_second"),
    (DPOTrainer.__init__, "self.loss_types = args.loss_type", "the SFT term is taken out of it"),
    (DPOTrainer.__init__, "self.loss_weights", "the SFT term is taken out of it"),
    (DPOTrainer.__init__, "self.ld_alpha", "scores by position are counted as TRL's"),
    (DPOTrainer.__init__, "self.beta", "rewards by position"),
    (DPOTrainer._precompute_ref_logps, "collate_fn=self.data_collator", "replaced by the reference views' collator"),
    (DPOTrainer._precompute_ref_logps, "(dataset._fingerprint, model_hash)", "the cache file's key"),
    (
        DPOTrainer._precompute_ref_logps,
        "dataset._get_cache_file_path(fingerprint)",
        "likeliest tokens are kept beside it",
    ),
    (DPOTrainer._precompute_ref_logps, "self.compute_ref_log_probs(model, padded_batch)", "scores our batches"),
    (DPOTrainer.compute_ref_log_probs, "model(**model_kwargs, labels=labels, fused_lm_head=True)", "ModelCall"),
    (DPOTrainer._compute_loss, "model(**model_kwargs, labels=labels, fused_lm_head=True)", "ModelCall"),
    (DPOTrainer._compute_loss, 'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]', "put there by us"),
    (DPOTrainer._compute_loss, "self.accelerator.gather(", "replaced where processes hold unequally many rows"),
    (DPOTrainer._compute_loss, "self.accelerator.gather_for_metrics(", "replaced there too"),
    (DPOTrainer._compute_loss, 'self._metrics[mode]["num_tokens"]', "kept; metrics of rows are replaced"),
    (DPOTrainer._compute_loss, "logps = per_token_logps.sum(dim=1)", "answer_scores"),
    (DPOTrainer._compute_loss, "tail_mask = comp_pos > shared_lens", "answer_scores under ld_alpha"),
    (DPOTrainer.compute_ref_log_probs, "disable_gradient_checkpointing(self.model", "leaves it alone where it is off"),
    (
        disable_gradient_checkpointing,
        "was_enabled = model.is_gradient_checkpointing",
        "leaves it alone where it is off",
    ),
    (DPOTrainer.log, "sum(val) / len(val)", "how TRL averages what we put into _metrics"),
    (DPOTrainer.log, 'f"eval_{key}"', "why evaluation_loop empties _metrics and names metrics after their dataset"),
    (Trainer._inner_training_loop, "epoch=epoch,", "_run_epoch is called by keywords"),
    (Trainer._inner_training_loop, "train_dataloader=train_dataloader,", "_run_epoch is called by keywords"),
    (Trainer._run_epoch, "self._get_grad_norm(model, grad_norm=grad_norm)", "called before each optimizer step"),
    (Trainer.evaluation_loop, '[f"{metric_key_prefix}_loss"]', "replaced by the mean over rows"),
    (Trainer.__init__, "self.init_hf_repo()", "a branch to push to is created before training"),
    (Trainer.evaluate, "self.log(output.metrics)", "our metrics of an evaluation are among them"),
    (GradientState, "def remainder", "which rows of an evaluation's last batch are repeats"),
    (GradientState, "def end_of_dataloader", "which rows of an evaluation's last batch are repeats"),
    (Accelerator.prepare, "args = self._prepare_cp(*args)", "kept from making vision towers causal"),
    (Accelerator.gather_for_metrics, "self.gather(input_data)", "one process of each group speaks for it"),
    (Trainer._set_signature_columns_if_needed, "self._signature_columns", "our columns"),
    (Accelerator.prepare_model, "self._models.append(model)", "where a precomputed-out reference is let go"),
    (add_fused_lm_head, "lm_head = self.get_output_embeddings()", "looked up in each call: gathered by us under FSDP2"),
    (add_fused_lm_head, "if isinstance(weight, DTensor)", "what it does not find where we have gathered the head"),
    (add_fused_lm_head, "shift_labels", "the tree's labels are shifted beforehand"),
]


@pytest.mark.parametrize(("owner", "name", "arguments"), METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_method(owner: type, name: str, arguments: list[str]) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone"
    parameters = inspect.signature(getattr(owner, name)).parameters
    missing = [argument for argument in arguments if argument not in parameters]
    assert not missing, f"{owner.__name__}.{name} no longer takes {missing}: {list(parameters)}"


@pytest.mark.parametrize(("where", "spelling", "why"), SPELLINGS, ids=lambda value: getattr(value, "__name__", value))
def test_spelling(where: Any, spelling: str, why: str) -> None:
    assert spelling in inspect.getsource(where), f"{where.__qualname__} no longer says {spelling!r} ({why})"


def test_overrides_are_those_named_here() -> None:
    """What the trainer overrides is in the list above, so that the list cannot fall behind."""
    members = {**vars(SavingTrainer), **vars(SharingTrainer), **vars(LongVPOTrainer)}
    ours = {name for name, value in members.items() if inspect.isfunction(value)}
    theirs = {name for name in ours if hasattr(DPOTrainer, name)}
    public = {"__init__", "save_model", "create_model_card"}
    assert theirs - public == {name for owner, name, _ in METHODS if name in members}


def test_arguments_are_those_of_trl_in_their_order() -> None:
    ours, theirs = (list(inspect.signature(trainer.__init__).parameters) for trainer in (LongVPOTrainer, DPOTrainer))
    assert ours == theirs


def test_columns_of_precomputed_scores() -> None:
    source = inspect.getsource(DataCollatorForPreference)
    assert "ref_chosen_logps" in source
    assert "ref_rejected_logps" in source


def test_fused_output() -> None:
    fields = FusedCausalLMOutput.__dataclass_fields__
    gone = [name for name in (*TOKEN_FIELDS, "loss", "aux_loss") if name not in fields]
    assert not gone, f"FusedCausalLMOutput no longer has {gone}"
    assert hasattr(trl_utils, "hash_module")


def test_attention_interfaces() -> None:
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert callable(interface.register), f"{interface.__name__}.register is gone"
    for function, argument in ((sdpa_attention_forward, "is_causal"), (sdpa_mask, "attention_mask")):
        assert argument in inspect.signature(function).parameters, f"{function.__name__} no longer takes {argument}"


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_what_is_read_of_a_model(family: str) -> None:
    model, _ = tiny_models.build(family)
    for name in ("_attn_implementation", "num_hidden_layers", "max_position_embeddings"):
        assert hasattr(model.get_decoder().config, name), f"{family}: the text config no longer has {name}"
    for name in ("_is_stateful", "base_model"):
        assert hasattr(model, name), f"{family}: the model no longer has {name}"
    assert model.get_encoder(modality="video") not in (model, model.base_model), f"{family}: no vision tower"


def test_options_of_trl_that_we_set() -> None:
    fields = DPOConfig.__dataclass_fields__
    names = ["beta", "loss_type", "loss_weights", "max_length", "precompute_ref_log_probs", "ld_alpha", "use_weighting"]
    gone = [name for name in names if name not in fields]
    assert not gone, f"DPOConfig no longer has {gone}"
