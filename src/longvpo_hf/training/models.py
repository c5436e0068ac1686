"""What training asks of a model before its first forward, and what a reference pass must not change in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import family_of
from longvpo_hf.families.vision import bound_frozen_forward, vision_tower
from longvpo_hf.training.packing import enable_tree_packing, unwrapped

#: Names of the layers of a dense MLP in the families that have one.
_OF_A_DENSE_MLP = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}


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


def tile_mlps(model: nn.Module, num_shards: int) -> None:
    """Has each dense MLP of the text layers take so many parts of its tokens one after the other.

    With gradients a part's inner activations are worked out again in the backward pass, so that those of one part live
    at a time. A tile is an MLP of its tokens alone: nothing else changes but the order in which gradients are summed.

    Raises:
        ConfigError: If no text layer has an MLP that can be parted.
    """
    if num_shards == 1:
        return
    mlps = dense_mlps(model)
    if not mlps:
        raise ConfigError(
            f"tiled_mlp_num_shards={num_shards}: the text layers of {type(unwrapped(model)).__name__} have no dense "
            "MLP of a known form. Leave it at 1."
        )
    for mlp in mlps:
        mlp.forward = partial(_in_tiles, mlp.forward, num_shards)


def dense_mlps(model: nn.Module) -> list[Any]:
    """The MLPs of the text layers whose tokens do not meet: experts, which a router gives tokens to, are none."""
    decoder: nn.Module = unwrapped(model).get_decoder()
    named = [(part, {name for name, _ in part.named_children()}) for part in decoder.modules()]
    return [part for part, children in named if "down_proj" in children and children <= _OF_A_DENSE_MLP]


def _in_tiles(forward: Callable[[Tensor], Tensor], num_shards: int, hidden: Tensor) -> Tensor:
    tiles = hidden.split(-(-hidden.shape[-2] // num_shards), dim=-2)
    if torch.is_grad_enabled():
        tiles = [checkpoint(forward, tile, use_reentrant=False) for tile in tiles]
    else:
        tiles = [forward(tile) for tile in tiles]
    return torch.cat(tiles, dim=-2)


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
