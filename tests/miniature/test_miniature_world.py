"""The miniature's world: the media show what the truth file says, and the truth file vouches for the media."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torchcodec.decoders import VideoDecoder

from longvpo_hf.errors import DatasetError
from longvpo_hf.miniature.world import (
    CLIPS_PER_FILE,
    FRAME_COLOURS,
    FRAME_PIXELS,
    FRAMES_PER_CLIP,
    FRAMES_PER_SECOND,
    MARKERS,
    SHAPE_COLOURS,
    TRUTH_FILE,
    WALL_COLOURS,
    WorldClip,
    read_world,
    write_world,
)


def decode(clip: WorldClip) -> torch.Tensor:
    """The clip's frames, uint8 `[frames, 3, H, W]`, each taken at the centre of the time it is shown."""
    centres = [clip.clip.start_seconds + (index + 0.5) / FRAMES_PER_SECOND for index in range(FRAMES_PER_CLIP)]
    return VideoDecoder(clip.clip.path).get_frames_played_at(centres).data


def nearest(pixel: torch.Tensor, palette: Mapping[str, tuple[int, int, int]]) -> str:
    """The name of the palette's colour that is nearest to `pixel`."""
    return min(palette, key=lambda name: float((pixel.float() - torch.tensor(palette[name])).square().sum()))


def test_decoded_frames_show_what_the_truth_says(tmp_path: Path) -> None:
    clips = write_world(tmp_path, CLIPS_PER_FILE + 16, seed=3)
    assert len(clips) == CLIPS_PER_FILE + 16
    assert len({clip.clip.path for clip in clips}) == 2
    for clip in clips[:: CLIPS_PER_FILE // 16]:
        frames = decode(clip)
        assert frames.shape == (FRAMES_PER_CLIP, 3, FRAME_PIXELS, FRAME_PIXELS)
        for frame in frames:
            assert nearest(frame[:, 1, 1], FRAME_COLOURS) == clip.frame
            assert nearest(frame[:, FRAME_PIXELS // 2, FRAME_PIXELS // 2], SHAPE_COLOURS) == clip.colour
            # The middle of an inner edge: neither the big shape nor the grey one reaches it.
            edges = [frame[:, 6, 16], frame[:, 16, 6], frame[:, 25, 16], frame[:, 16, 25]]
            assert clip.wall in {nearest(edge, WALL_COLOURS) for edge in edges}
        assert not torch.equal(frames[0], frames[1]), "nothing moves"


def test_a_marker_is_wall_and_frame(tmp_path: Path) -> None:
    clip = write_world(tmp_path, 1, seed=0)[0]
    assert clip.marker == f"{clip.wall}-{clip.frame}"
    assert clip.marker in MARKERS
    assert clip.clip.caption == ""  # nobody is told the truth by the way


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    first, again, other = (write_world(tmp_path / name, 8, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert Path(first[0].clip.path).read_bytes() == Path(again[0].clip.path).read_bytes()
    truths = [[(clip.marker, clip.colour) for clip in clips] for clips in (first, again, other)]
    assert truths[0] == truths[1] != truths[2]


def test_a_written_world_is_read_back_and_may_be_moved(tmp_path: Path) -> None:
    written = write_world(tmp_path / "here", 5, seed=1)
    assert read_world(tmp_path / "here") == written
    (tmp_path / "here").rename(tmp_path / "there")
    moved = read_world(tmp_path / "there")
    assert [(clip.marker, clip.colour) for clip in moved] == [(clip.marker, clip.colour) for clip in written]
    assert decode(moved[-1]).shape[0] == FRAMES_PER_CLIP


def test_an_unfinished_world_is_refused(tmp_path: Path) -> None:
    clips = write_world(tmp_path, 2, seed=1)
    Path(clips[0].clip.path).unlink()
    with pytest.raises(DatasetError, match=r"00000\.mp4.*write_world again"):
        read_world(tmp_path)
    (tmp_path / TRUTH_FILE).unlink()
    with pytest.raises(DatasetError, match="did not finish"):
        read_world(tmp_path)


def test_an_interrupted_rewrite_leaves_no_old_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path, 2, seed=1)

    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("longvpo_hf.miniature.world._encode", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_world(tmp_path, 2, seed=2)
    assert not (tmp_path / TRUTH_FILE).exists()


def test_an_empty_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_clips of a world must be ≥ 1, got 0"):
        write_world(tmp_path, 0, seed=1)


def test_palettes_share_no_colour() -> None:
    colours = [*WALL_COLOURS.values(), *FRAME_COLOURS.values(), *SHAPE_COLOURS.values()]
    assert len(set(colours)) == 24
