"""What the package has to know about a kind of model: `Family`, and what families share.

Light to import: a family is plain facts and functions over configs and tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.errors import ModelError
from longvpo_hf.families.refused import refusal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

#: Layers that LoRA adapts unless told otherwise: every linear layer of the text model that maps hidden states to hidden
#: states, those of linear attention too, and none of the vision tower's. Gates of one number a head or a token are left
#: out. transformers calls the text model `language_model`, in SmolVLM `text_model`.
TEXT_LAYERS = r".*(language_model|text_model)\..*((q|k|v|o|gate|up|down|out)_proj|in_proj_(qkvz|qkv|z))"

_SEES_NOTHING = (
    "models of type {!r} take no pictures or videos beside text. Choose a video-language model; docs/families.md lists "
    "those that were run."
)


def _can_be_packed(config: Any) -> None:
    """No reason against trees; whether a model takes them is then tried on its text model."""


def _as_rendered(processor: Any, text: str) -> str:
    return text


@dataclass(frozen=True, slots=True)
class FrameShapes:
    """What frames become on their way through a model. A unit is the frames that share tokens: one, or a pair.

    Args:
        frames: Frames of a unit.
        pixels: Elements of a unit in the pixel tensor.
        patches: Tokens of a unit in the vision tower.
        hidden: Width of a patch's hidden state in the tower.
        mlp: Width inside the tower's MLP.
        windows: Pairs of (patches that a layer's attention spans, number of such layers), of all layers.
        projected: Rows of a unit in the projector's input.
        tokens: Tokens of a unit in the text model.
        extra: Tokens of a video besides those of its units.
    """

    frames: int
    pixels: int
    patches: int
    hidden: int
    mlp: int
    windows: tuple[tuple[int, int], ...]
    projected: int
    tokens: int
    extra: int = 0

    def units(self, frames: int) -> int:
        """Units of a video of so many frames; an odd last frame makes a unit of its own."""
        return -(-frames // self.frames)

    def visual_tokens(self, frames: int) -> int:
        """Tokens of the text model that a video of so many frames becomes."""
        return self.units(frames) * self.tokens + self.extra


#: Settings for a video processor that keep the size of frames; None where it would change them in another way.
VideoSettings = Callable[[Any], dict[str, Any] | None]
#: Shapes from a model's config and a frame's height and width in pixels.
FrameShapesOf = Callable[[Any, int, int], FrameShapes]
#: From the tensors of a tower's call, by argument, and the most pixel elements of a piece: the tensors of each piece.
#: None where this call cannot be cut.
Pieces = Callable[[Mapping[Any, "Tensor"], int], list[dict[Any, "Tensor"]] | None]
#: From the processor's tensors of a video, by name: those of each of its units, in the order of their tokens, so that a
#: call of the model may be given some of them. None where these tensors cannot be parted.
Units = Callable[[Mapping[str, "Tensor"]], list[dict[str, "Tensor"]] | None]
#: Why models of a config are trained without trees, in plain English; None where nothing is known against them.
PlainOnly = Callable[[Any], str | None]
#: From a processor and a prompt that its chat template rendered: the text that it tokenizes.
Written = Callable[[Any, str], str]


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of model, as transformers' `model_type` names it.

    Args:
        model_type: `config.model_type`.
        processor: Class name of its processor.
        video_settings: See `VideoSettings`.
        frame_shapes: See `FrameShapesOf`; an upper bound for families that leave out tokens which repeat.
        label_tokens: Text tokens that the processor writes around each unit of frames, with tokenizers like Qwen's.
        connectors: Modules between vision tower and text model, by their name in the base model; they may lie inside
            the tower.
        pieces: How a call of the vision tower is cut into frames. None: the tower takes all frames at once.
        units: How a video is parted among processes that share it; see `Units`. None: a model call takes all of it.
        position_axes: 3 where the model counts positions in time, height and width (multimodal rope, from
            `mm_token_type_ids`), else 1.
        is_sized_by_frames: Whether a frame's size decides how many tokens it becomes; else every frame is scaled to
            one tile.
        adapter_layers: Regular expression of the layers that LoRA adapts by default, matched as peft does.
        fsdp_layers: Class names of the layers that FSDP wraps. Empty where the model itself names them rightly.
        plain_only: See `PlainOnly`.
        written: See `Written`.
        feature_token: Token that stands for a visual feature, where it is not the processor's own placeholder.
        takes_frame_rate: Whether its processor has to be given the frames' rate (`fps`), from which it derives times.
    """

    model_type: str
    processor: str
    video_settings: VideoSettings
    frame_shapes: FrameShapesOf
    label_tokens: int
    connectors: tuple[str, ...]
    pieces: Pieces | None
    units: Units | None = None
    position_axes: int = 1
    is_sized_by_frames: bool = False
    adapter_layers: str = TEXT_LAYERS
    fsdp_layers: tuple[str, ...] = ()
    plain_only: PlainOnly = _can_be_packed
    written: Written = _as_rendered
    feature_token: str | None = None
    takes_frame_rate: bool = False


def context_tokens(config: PreTrainedConfig) -> int | None:
    """How many tokens the text model was made for, with its rope scaling; None where its config does not say."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor", 1.0)
    original = rope.get("original_max_position_embeddings", positions)
    return max(positions, int(original * factor))


def model_config(name: str, revision: str = "main", local_files_only: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint, or of the base of an adapter.

    Args:
        name: Folder or name on the Hub.
        revision: Branch, tag or commit of a name on the Hub.
        local_files_only: Look at nothing but folders and this machine's Hub cache.

    Raises:
        OSError: If there is no such checkpoint.
        ModelError: If its kind of model cannot be used, or transformers does not know it.
    """
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    adapter = find_adapter_config_file(name, revision=revision, local_files_only=local_files_only)
    if adapter is not None:
        settings = json.loads(Path(adapter).read_text(encoding="utf-8"))
        name, revision = settings["base_model_name_or_path"], settings.get("revision") or "main"
    where = {"revision": revision, "local_files_only": local_files_only}
    model_type = PreTrainedConfig.get_config_dict(name, **where)[0].get("model_type")
    reason = refusal(model_type)
    if reason is not None:
        raise ModelError(f"{name}: {reason}")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
    except ValueError as error:
        raise ModelError(
            f"{name}: transformers {version('transformers')} has no model of type {model_type!r}, and a repository's "
            "own code is never run. Choose one that docs/families.md lists, in a repository that transformers can load."
        ) from error
    return config


def check_config(config: PreTrainedConfig) -> None:
    """Looks at the config of a model that is loaded already.

    Raises:
        ModelError: If its kind of model cannot be used, or it sees nothing.
    """
    reason = refusal(config)
    if reason is not None:
        raise ModelError(f"{reason} docs/families.md lists models that can be.")
    if config.get_text_config() is config:
        raise ModelError(_SEES_NOTHING.format(config.model_type))


def check_kind(name: str, revision: str | None = None) -> None:
    """Looks at the config of a checkpoint alone, before anything large of it is loaded.

    Args:
        name: Folder or name on the Hub of a model, or of an adapter.
        revision: Branch, tag or commit of a name on the Hub.

    Raises:
        ModelError: If there is no such checkpoint, its kind of model cannot be used, or it sees nothing.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        config = model_config(name, revision or "main")
    except OSError as error:
        raise ModelError(f"The model {name} cannot be loaded: {error}") from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(f"{name}: {_SEES_NOTHING.format(config.model_type)}")
