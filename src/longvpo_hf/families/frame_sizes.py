"""The two ways in which video processors size a frame: to one fixed tile, or to a grid of patches.

Frames come in the size that training chose (`max_pixels`), so a processor must neither crop them nor scale them to
bounds of its own.
"""

from __future__ import annotations

from typing import Any

from longvpo_hf.families.family import FrameGrid

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


def rounded_grid(vision_config: Any, height_px: int, width_px: int) -> FrameGrid:
    """Frames whose sides are rounded to whole merged patches; every layer of the tower attends to one unit."""
    patch_px, merge, frames = (
        getattr(vision_config, name) for name in ("patch_size", "spatial_merge_size", "temporal_patch_size")
    )
    rows, columns = (max(1, round(side / (patch_px * merge))) * merge for side in (height_px, width_px))
    patches = rows * columns
    tokens = patches // merge**2
    return FrameGrid(
        frames=frames,
        patches=patches,
        tokens=tokens,
        projected=tokens,
        pixels=patches * 3 * frames * patch_px**2,
        windows=((patches, vision_config.depth),),
    )


def _size(video_processor: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(video_processor.size or {}).items() if value is not None}


def _crops(video_processor: Any) -> bool:
    return bool(getattr(video_processor, "do_center_crop", None))
