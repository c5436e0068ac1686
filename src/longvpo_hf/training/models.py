"""What training asks of a model before its first forward, and what a reference pass must not change in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from longvpo_hf.errors import ConfigError
from longvpo_hf.families import family_of
from longvpo_hf.families.vision import bound_frozen_forward, vision_tower
from longvpo_hf.training.packing import enable_tree_packing, unwrapped

#: Names of the layers of a dense MLP in the families that have one.
_OF_A_DENSE_MLP = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}


def taken(model: Any, ref_model: Any) -> tuple[Any, Any]:
    """The models that a trainer is given, with a folder as text.

    Raises:
        ConfigError: If one is no model, or they are of different kinds.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    for name, one in (("model", model), ("ref_model", ref_model)):
        inner = getattr(one, "_orig_mod", one)  # of torch.compile
        if isinstance(inner, (PreTrainedModel, PeftModel)):
            if not inner.can_generate():
                raise ConfigError(f"{name} must have a language-model head, got {type(inner).__name__}.")
        elif not (isinstance(one, str) if one is model else one is None):
            others = "its name or its folder" if one is model else "None for the model as it is before training"
            raise ConfigError(f"{name} must be a model of transformers or PEFT, or {others}, got {type(one).__name__}.")
    given = [unwrapped(one) for one in (model, ref_model) if isinstance(one, nn.Module)]
    if len(given) > 1 and not (isinstance(given[0], type(given[1])) or isinstance(given[1], type(given[0]))):
        raise ConfigError(
            f"model ({type(given[0]).__name__}) and ref_model ({type(given[1]).__name__}) are of different kinds, and "
            "both are given the same tokens and frames. Leave ref_model out for the model as it is before training."
        )
    return model, ref_model


@contextmanager
def adapters_checked() -> Iterator[None]:
    """PEFT's error about layers that the model does not have, as one about settings."""
    try:
        yield
    except NoMatchingPeftModuleError as error:
        raise ConfigError(f"The adapter does not fit the model: {error}") from error


def as_it_is(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, to be the reference of its training.

    TRL loads the reference by the model's name instead: weights that were changed since, merged adapters among them,
    would not be in it.
    """
    copied = deepcopy(model)
    # What an earlier trainer put in its place may hold on to the first model.
    copied.__dict__.pop("forward", None)
    return copied


def check_trained(model: nn.Module) -> None:
    """Refuses a model of which nothing would be trained, or not what PEFT's `modules_to_save` names.

    Raises:
        ConfigError: If no weight requires a gradient, or there is no module of such a name, which PEFT passes over.
    """
    if isinstance(model, PeftModel):
        modules = [name for name, _ in model.named_modules()]
        for wanted in getattr(model.active_peft_config, "modules_to_save", None) or ():
            if not any(name.endswith(f".{wanted}") for name in modules):
                raise ConfigError(f"modules_to_save: the model has no module {wanted!r}.")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(
            "No weight of the model is trained (requires_grad is False for all): load an adapter with "
            "PeftModel.from_pretrained(…, is_trainable=True), or call requires_grad_(True) on what is to be trained."
        )


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
