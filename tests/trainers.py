"""Tiny trainers for tests, and scores by plain model calls that know nothing of collator, tree and trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

import tiny_models
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.frames import FrameSampler
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import View
from longvpo_hf.training.config import LongVPOConfig
from longvpo_hf.training.trainer import LongVPOTrainer

NUM_FRAMES = 6
MAX_PIXELS = 56 * 56


def settings(folder: Path, **more: Any) -> LongVPOConfig:
    """Two steps of two rows on the CPU, every step logged, nothing saved, β large enough for its effect to show."""
    given: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "num_frames": NUM_FRAMES,
        "fps": None,
        "max_pixels": MAX_PIXELS,
        "reference": "anchor",
        "beta": 0.5,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return LongVPOConfig(**{**given, **more})


def perturbed(model: Any, by: float = 0.05) -> Any:
    """The model with noise on its text model's weights: another model, so that policy and reference differ."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.get_decoder().parameters():
            weight += by * torch.randn(weight.shape, generator=noise)
    return model


def make(folder: Path, rows: Any, family: str = "internvl", **more: Any) -> LongVPOTrainer:
    """A trainer of a tiny model against a copy of it; `more` are settings, or arguments of the trainer."""
    model, processor = tiny_models.build(family)
    given: dict[str, Any] = {"model": model, "processing_class": processor, "ref_model": None}
    names = ("model", "processing_class", "ref_model", "peft_config", "eval_dataset", "callbacks", "args")
    given.update({name: more.pop(name) for name in names if name in more})
    needs_reference = "peft_config" not in given and not hasattr(given["model"], "peft_config")
    if given["ref_model"] is None and needs_reference and not more.get("precompute_ref_log_probs"):
        given["ref_model"] = tiny_models.build(family)[0]
    given.setdefault("args", settings(folder, **more))
    return LongVPOTrainer(train_dataset=rows, **given)


def logged(trainer: LongVPOTrainer, name: str = "loss") -> list[float]:
    """A metric's values in the order of the logs."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def batch_of(trainer: LongVPOTrainer, rows: Any) -> Any:
    """What the trainer's collator makes of rows."""
    return trainer._prepare_inputs(trainer.data_collator([rows[i] for i in range(len(rows))]))


def loss_of(trainer: LongVPOTrainer, rows: Any) -> Tensor:
    """The trainer's loss on rows as one batch, before any step."""
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch_of(trainer, rows))


def answer_log_probs(
    model: Any, processor: Any, preference: VideoPreference, view: View, answer: str, num_frames: int = NUM_FRAMES
) -> Tensor:
    """Log-probability of each token of an answer to the row's question about a view: one plain call of the model."""
    logits, labels = answer_logits(model, processor, preference, view, answer, num_frames)
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


@torch.no_grad()
def answer_logits(
    model: Any, processor: Any, preference: VideoPreference, view: View, answer: str, num_frames: int = NUM_FRAMES
) -> tuple[Tensor, Tensor]:
    """Logits `[tokens, vocabulary]` for the tokens of an answer, and the tokens, by one plain call of the model."""
    encoder = PromptEncoder(processor)
    frames = FrameSampler(num_frames, fps=None, max_pixels=MAX_PIXELS)(preference.timeline, view)
    prompt = encoder.encode(frames, [[{"role": "user", "content": preference.question}]])
    ids = torch.tensor([prompt.input_ids[0] + encoder.encode_answer(preference.question, answer)])
    more = dict(prompt.visual)
    if prompt.mm_token_type_ids is not None:
        kinds = torch.zeros_like(ids)
        kinds[0, : len(prompt.input_ids[0])] = torch.tensor(prompt.mm_token_type_ids[0])
        more["mm_token_type_ids"] = kinds
    logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]
    start = len(prompt.input_ids[0])
    return logits[start - 1 : -1].float(), ids[0, start:]


def with_head(family: str) -> Any:
    """A tiny model with TRL's fused head."""
    model = tiny_models.build(family)[0]
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model
