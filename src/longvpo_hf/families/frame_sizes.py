"""The two ways in which video processors size a frame: to one fixed tile, or to a grid of patches.

Frames come in the size that training chose (`max_pixels`), so a processor must neither crop them nor scale them to
bounds of its own.
"""

from __future__ import annotations

from typing import Any

from longvpo_hf.families.family import FrameShapes

#: More pixels than any video has, for processors that insist on a bound.
_UNBOUNDED_PIXELS = 2**53


def tile_settings(video_processor: Any) -> dict[str, Any] | None:
    """For processors that scale every frame to `size`, a height and a width: that is their own rule, so nothing."""
    return {} if set(_size(video_processor)) == {"height", "width"} and not _crops(video_processor) else None


def grid_settings(video_processor: Any) -> dict[str, Any] | None:
    """For processors that round a frame's sides to whole patches and bound its pixels: the rounding alone is left.

    The bounds are on the pixels of a frame (Qwen2.5-VL) or of all frames together (Qwen3-VL).
    """
    patch_px, merge = (getattr(video_processor, name, None) for name in ("patch_size", "merge_size"))
    if set(_size(video_processor)) != {"shortest_edge", "longest_edge"} or not patch_px or not merge:
        return None
    if _crops(video_processor):
        return None
    settings: dict[str, Any] = {"size": {"shortest_edge": (patch_px * merge) ** 2, "longest_edge": _UNBOUNDED_PIXELS}}
    if "cap_pixels_per_frame" in video_processor.valid_kwargs.__annotations__:
        settings["cap_pixels_per_frame"] = False
    return settings


def known_settings(video_processor: Any) -> dict[str, Any] | None:
    """Whichever of the two applies, for families that are not known."""
    tile = tile_settings(video_processor)
    return grid_settings(video_processor) if tile is None else tile


def tile_side(vision_config: Any) -> tuple[int, int]:
    """Pixels and patches along a side of the square tile that every frame is scaled to."""
    image, patch = vision_config.image_size, vision_config.patch_size
    image_px, patch_px = (size[0] if isinstance(size, (list, tuple)) else size for size in (image, patch))
    return image_px, image_px // patch_px


def tile_shapes(vision_config: Any, tokens: int, projected: int | None = None, class_tokens: int = 0) -> FrameShapes:
    """Frames scaled to the tower's square tile, each of so many tokens; every layer attends to one frame.

    Args:
        vision_config: The tower's config.
        tokens: Tokens of a frame in the text model.
        projected: Rows of a frame in the projector's input, where they are not the tokens.
        class_tokens: Tokens of a frame in the tower besides its patches.
    """
    image_px, side = tile_side(vision_config)
    patches = side**2 + class_tokens
    return FrameShapes(
        frames=1,
        pixels=3 * image_px**2,
        patches=patches,
        hidden=vision_config.hidden_size,
        mlp=vision_config.intermediate_size,
        windows=((patches, vision_config.num_hidden_layers),),
        projected=tokens if projected is None else projected,
        tokens=tokens,
    )


def rounded_shapes(
    vision_config: Any, height_px: int, width_px: int, merge: int, frames: int, layers: int, mlp: int | None = None
) -> FrameShapes:
    """Frames whose sides are rounded to whole merged patches; every layer attends to one unit.

    Args:
        vision_config: The tower's config.
        height_px: Height of a frame.
        width_px: Width of a frame.
        merge: Patches along a side of a token.
        frames: Frames of a unit.
        layers: Layers of the tower.
        mlp: Width inside the tower's MLP, where it is not the config's `intermediate_size`.
    """
    patch_px = vision_config.patch_size
    rows, columns = (max(1, round(side / (patch_px * merge))) * merge for side in (height_px, width_px))
    patches = rows * columns
    tokens = patches // merge**2
    return FrameShapes(
        frames=frames,
        pixels=patches * 3 * frames * patch_px**2,
        patches=patches,
        hidden=vision_config.hidden_size,
        mlp=vision_config.intermediate_size if mlp is None else mlp,
        windows=((patches, layers),),
        projected=tokens,
        tokens=tokens,
    )


def paired_shapes(config: Any, height_px: int, width_px: int, mlp: int | None = None) -> FrameShapes:
    """`rounded_shapes` of models whose tower's config has the Qwens' names."""
    vision = config.vision_config
    return rounded_shapes(
        vision, height_px, width_px, vision.spatial_merge_size, vision.temporal_patch_size, vision.depth, mlp
    )


def _size(video_processor: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(video_processor.size or {}).items() if value is not None}


def _crops(video_processor: Any) -> bool:
    return bool(getattr(video_processor, "do_center_crop", None))
