"""Settings that make a run fit, or bring it nearer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from longvpo_hf.planning.memory import frames_that_fit, memory_gib
from longvpo_hf.planning.run import Run, checkpointing
from longvpo_hf.planning.settings import Sharding
from longvpo_hf.training.models import dense_mlps


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of settings.

    Args:
        setting: The change, as a line of the configuration.
        gib: What a device would then hold, GiB.
        fits: Whether the run would then fit memory and context.
    """

    setting: str
    gib: float
    fits: bool


#: The setting's line, and what changes in the trainer's and in the model's settings.
_Change = tuple[str, dict[str, Any], dict[str, Any]]


def fits(run: Run, gib: float) -> bool:
    """Whether a run that holds so many GiB fits memory and context."""
    return gib <= run.machine.gpu_memory_gib and not run.batch.tokens().are_too_many


def find_remedies(run: Run) -> tuple[Remedy, ...]:
    """Changes that lower the memory of a run that does not fit: each alone, then all together; then fewer frames."""
    gib = sum(memory_gib(run, run.training.num_frames).values())
    # A context that is too short is no matter of memory: fewer frames alone help.
    changes = _changes(run) if gib > run.machine.gpu_memory_gib else []
    remedies = [_remedy(run, *change) for change in changes]
    if len(changes) > 1:
        training = {name: value for _, settings, _ in changes for name, value in settings.items()}
        model = {name: value for _, _, settings in changes for name, value in settings.items()}
        remedies.append(_remedy(run, "all of these", training, model))
    frames = frames_that_fit(run)
    if 0 < frames < run.training.num_frames:
        remedies.append(_remedy(run, f"num_frames: {frames}", {"num_frames": frames}, {}))
    return tuple(remedy for remedy in remedies if remedy.gib < gib)


def _changes(run: Run) -> list[_Change]:
    training, model = run.training, run.model
    changes: list[tuple[bool, _Change]] = [
        (not training.gradient_checkpointing, _of_training("gradient_checkpointing", True)),
        (
            training.gradient_checkpointing and checkpointing(training)[0] > 1,
            _of_training(
                "gradient_checkpointing_kwargs", {**(training.gradient_checkpointing_kwargs or {}), "every_n_layers": 1}
            ),
        ),
        (run.is_tower_trained, _of_training("freeze_vision_tower", True)),
        (
            model.dtype == "float32" and run.machine.sharding == Sharding.none,
            ("dtype: bfloat16", {}, {"dtype": "bfloat16"}),
        ),
        (not model.use_peft, ("use_peft: true (LoRA)", {}, {"use_peft": True})),
        (
            not model.use_peft and not training.precompute_ref_log_probs,
            _of_training("precompute_ref_log_probs", True),
        ),
        (training.per_device_train_batch_size > 1, _of_training("per_device_train_batch_size", 1)),
        (not training.activation_offloading, _of_training("activation_offloading", True)),
        (
            training.tiled_mlp_num_shards == 1 and bool(dense_mlps(run.built)),
            _of_training("tiled_mlp_num_shards", 8),
        ),
    ]
    return [change for applies, change in changes if applies]


def _of_training(name: str, value: Any) -> _Change:
    return f"{name}: {json.dumps(value)}", {name: value}, {}


def _remedy(run: Run, setting: str, training: dict[str, Any], model: dict[str, Any]) -> Remedy:
    other = run.with_changes(training, model)
    gib = sum(memory_gib(other, other.training.num_frames).values())
    return Remedy(setting, gib, fits(other, gib))
