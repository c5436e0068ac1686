"""What training asks of a model before its first forward, and what a reference pass must not change in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import TrainableTokensWrapper
from torch import nn

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import family_of
from longvpo_hf.families.vision import bound_frozen_forward, vision_tower
from longvpo_hf.training.packing import enable_tree_packing, unwrapped


def check_head(model: nn.Module) -> None:
    """Refuses an adapter that TRL's fused LM head would not train.

    Raises:
        ConfigError: If tokens of the head are adapted. (TRL itself refuses other adapters of the head.)
    """
    if isinstance(unwrapped(model).get_output_embeddings(), TrainableTokensWrapper):
        raise ConfigError(
            "trainable_token_indices reaches the LM head (it names the head, or the model ties the head to its "
            "embeddings). Log-probabilities are computed from the head's own weight, so these tokens would not be "
            "trained: leave it out, or train the whole head with modules_to_save=['lm_head']."
        )


def prepare_tower(model: nn.Module, freeze: bool, is_sharded: bool) -> None:
    """Freezes the vision tower if asked to; a frozen tower then runs a bounded number of frames at a time.

    Raises:
        ConfigError: If there is no tower to freeze.
    """
    tower = vision_tower(model)
    if freeze:
        if tower is None:
            raise ConfigError(
                f"freeze_vision_tower=True: transformers finds no vision tower in {type(model).__name__} "
                "(get_encoder(modality='video')). Leave it False and set requires_grad yourself."
            )
        tower.requires_grad_(False)
    # Processes that call a sharded tower unequally often deadlock.
    if tower is not None and not is_sharded:
        bound_frozen_forward(model)


def prepare_trees(model: nn.Module) -> str | None:
    """Prepares a model for `tree_forward`, unless it belongs to a family that is trained without trees.

    Returns:
        `None` when the model is ready; otherwise the reason, in plain English, and the model is unchanged.
    """
    config = unwrapped(model).config
    return family_of(config).plain_only(config) or enable_tree_packing(model)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within, activation checkpointing is off; after it, checkpointing and `requires_grad` are as they were before.

    Leaving `disable_adapter()` or `set_adapter()`, peft makes every weight of the active adapter trainable, also one
    that was frozen. TRL switches checkpointing off for a reference pass and on again for all layers, without
    `every_n_layers` and with one more hook on the embeddings each time; where it is off already TRL leaves it alone.
    """
    weights = [(weight, weight.requires_grad) for weight in model.parameters()]
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
        for weight, requires_grad in weights:
            if weight.requires_grad != requires_grad:
                weight.requires_grad_(requires_grad)
