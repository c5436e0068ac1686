"""Processes that are given one batch together and share its timelines: `ParallelismConfig(cp_size=W)` of accelerate.

accelerate makes the mesh, gives each group of W processes one batch and has FSDP2 shard weights over all of them. Its
own way to part a sequence stays out: it is causal attention alone, and would cut the batch's tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather, gather_object, recursively_apply
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from longvpo_hf.errors import ConfigError, TrainingError
from longvpo_hf.families import family_of
from longvpo_hf.training.collator import VideoPreferenceCollator
from longvpo_hf.training.packing import is_tree_packed, reason_not_shared
from longvpo_hf.training.packing.sharing import Seat
from longvpo_hf.training.saving import SavingTrainer


class SharingTrainer(SavingTrainer):
    """TRL's trainer on processes that share their batches, if accelerate is told so."""

    #: The processes that share this one's batches; None: it has its own.
    _group: ProcessGroup | None = None
    #: Of rows with clips.
    _collator: VideoPreferenceCollator

    def create_accelerator_and_postprocess(self) -> None:
        """transformers', but under FSDP2 log-probabilities leave the model in the type they were computed in.

        accelerate has FSDP2 cast a model's outputs to the type it computes in. A log-probability of -6 in bfloat16 is
        off by up to 0.016, and a margin sums those of two whole answers.
        """
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.mixed_precision_policy is not None:
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        self._group = _share_batches(self.accelerator)

    def _seat(self) -> Seat | None:
        """This process's place in its group."""
        if self._group is None:
            return None
        family = family_of(self.accelerator.unwrap_model(self.model).config)
        return Seat(self._group.rank(), self._group.size(), family)

    def _agreed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch, once every process has its own; without the rows that another one of its group left out.

        Args:
            batch: The collator's; nothing is asked where it does not hand over errors.

        Raises:
            TrainingError: On every process, if one of them cannot make its batch; with its error.
        """
        if "error" not in batch:
            return batch
        while True:
            kept = zlib.crc32(str(batch["kept"].tolist()).encode()) if "kept" in batch else 0
            own = torch.tensor([[bool(batch["error"]), kept]], device=self.accelerator.device)
            everyone = gather(own)  # not the accelerator's own, for which one process speaks for its group
            if everyone[:, 0].any():
                said = {rank: error for rank, error in enumerate(gather_object([batch["error"]])) if error}
                rank, error = next(iter(said.items()))
                others = f" Processes {', '.join(map(str, said))} ended so." if len(said) > 1 else ""
                raise TrainingError(f"Process {rank} of {len(everyone)} cannot make its batch: {error}{others}")
            if self._group is None:
                return batch
            size, number = self._group.size(), self.accelerator.process_index // self._group.size()
            of_groups = everyone[:, 1].view(-1, size)
            differ = (of_groups != of_groups[:, :1]).any(1).tolist()
            if not any(differ):
                return batch
            left_out: list[dict[int, str]] = gather_object([batch["left_out"]])
            if differ[number]:  # the first process's reason counts, as the first one speaks for the group
                known = dict(item for of in reversed(left_out[number * size :][:size]) for item in of.items())
                batch = self._prepare_inputs(self._collator.without(batch["given"], known))

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], AbstractContextManager[None]], dict[str, Any]]:
        """The batch as it is: transformers' would cut its tensors into equal parts."""
        return nullcontext, inputs

    def _check_sharing(self, has_clips: bool, without_trees: str | None) -> None:
        """Refuses runs that share batches and cannot.

        Args:
            has_clips: Whether rows have clips.
            without_trees: Why the model does not take trees, if it does not.

        Raises:
            ConfigError: Without clips, without trees, with answers that are sampled, or with a model whose timelines
                cannot be shared.
        """
        if self._group is None:
            return
        if not has_clips:
            reason: str | None = "rows without clips are trained by TRL's own forward pass"
        elif self.args.draws_answers:
            reason = "view_distillation_on='sampled' draws answers, and each process sees some of the frames alone"
        elif not is_tree_packed(self.model):
            reason = without_trees or "tree_packing is off"
        else:
            reason = reason_not_shared(self.model)
        if reason is not None:
            raise ConfigError(
                f"parallelism_config_cp_size={self._group.size()}: processes cannot share a timeline here: "
                f"{reason.rstrip('.')}. Leave it out, so that each process has timelines of its own, e.g. by "
                f"recipes/accelerate/fsdp2.yaml."
            )


def _share_batches(accelerator: Accelerator) -> ProcessGroup | None:
    """The group of this process; from now on one process of each group speaks for it where numbers are gathered."""
    parallelism = accelerator.parallelism_config
    if parallelism is None or not parallelism.cp_enabled:
        return None
    # Its hooks make every module called `self_attn` causal, those of vision towers too.
    accelerator._prepare_cp = _as_they_are
    gather, size, processes = accelerator.gather, parallelism.cp_size, accelerator.num_processes

    def gather_from_groups(tensor: Any) -> Any:
        return recursively_apply(lambda whole: _first_of_each(whole, size, processes), gather(tensor))

    accelerator.gather = gather_from_groups
    return accelerator.torch_device_mesh["cp"].get_group()


def _as_they_are(*args: Any) -> tuple[Any, ...]:
    return args


def _first_of_each(whole: Tensor, size: int, processes: int) -> Tensor:
    """Of rows of all processes, [processes · n, …], those of the first of each group of `size` neighbours."""
    number = len(whole) // processes
    return whole.unflatten(0, (processes // size, size, number))[:, 0].flatten(0, 1)
