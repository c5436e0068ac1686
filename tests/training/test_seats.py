"""Processes that share a timeline decode their own frames alone, and hold what they would with all of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

import tiny_models
from conftest import COLOURS, make_dataset, write_clip
from longvpo_hf.families import family_of
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.frames.video import VideoFile
from longvpo_hf.preference import VideoPreference
from longvpo_hf.timeline import Clip, Timeline
from longvpo_hf.training.collator import NO_ROW, VideoPreferenceCollator
from longvpo_hf.training.packing import enable_tree_packing, sharing
from longvpo_hf.training.packing.forward import find_visual_tokens
from longvpo_hf.training.packing.sharing import Seat, Share, share_of
from longvpo_hf.training.packing.tree import pack, trees_of, trunk_positions

FAMILIES = [name for name in tiny_models.FAMILIES if family_of(tiny_models.build(name)[0].config).units is not None]
SECONDS = (3.0, 5.0, 7.0, 8.0)


class Group:
    """Stands for a process group, as the sharing of rows asks it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @staticmethod
    def get_rank(group: Group) -> int:
        return group.rank

    @staticmethod
    def get_world_size(group: Group) -> int:
        return group.size


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("films")
    pairs = zip(COLOURS.items(), SECONDS, strict=True)
    return [Clip(str(write_clip(folder / f"{name}.mp4", rgb, seconds)), 0.0, seconds) for (name, rgb), seconds in pairs]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each call of the decoder, how many frames it was asked for."""
    counts: list[int] = []
    frames_at = VideoFile.frames_at
    monkeypatch.setattr(
        VideoFile,
        "frames_at",
        lambda file, indices, size: counts.append(len(indices)) or frames_at(file, indices, size),
    )
    return counts


def rows_about(films: list[Clip], draw: random.Random) -> list[dict[str, Any]]:
    """Rows with questions of unequal length about one timeline of clips in any order."""
    timeline = Timeline(tuple(draw.sample(films, k=draw.randint(2, 4))))
    asked = [" ".join(["which"] * draw.randint(1, 9)) for _ in range(draw.randint(1, 3))]
    rows = [
        VideoPreference(
            timeline=timeline,
            question=f"{text} {number}?",
            chosen="red",
            rejected="blue",
            evidence=(0,),
            reference=(0,),
        )
        for number, text in enumerate(asked)
    ]
    return list(make_dataset(rows))


def held(model: Any, batch: dict[str, Any], rank: int, size: int) -> Share:
    """What a process holds of a batch's packed row."""
    visual = find_visual_tokens(model, batch)
    (tree,) = trees_of(batch, visual)
    packed = pack(batch, [tree], [trunk_positions(model, batch, tree, 0)])
    seen = [visual[tree.rows[0], : tree.trunk]]
    found = share_of(packed, [batch["videos"][0]], seen, family_of(model.config), Group(rank, size))
    assert found is not None
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [2, 3])
def test_a_process_decodes_what_it_holds(
    name: str, size: int, films: list[Clip], decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "dist", Group)
    model, processor = tiny_models.build(name)
    add_fused_lm_head(model)
    assert enable_tree_packing(model) is None
    draw = random.Random(f"{name} {size}")
    frames = draw.randint(14 * size, 18 * size)
    rows = rows_about(films, draw)

    def batch_of(seat: Seat | None) -> dict[str, Any]:
        collator = VideoPreferenceCollator(
            processor, num_frames=frames, reference_num_frames=8, fps=None, max_pixels=56 * 56
        )
        collator.seat = seat
        decoded.clear()
        return collator(rows)

    whole = batch_of(None)
    assert sum(decoded) == frames + 8
    of_ranks = []
    for rank in range(size):
        batch = batch_of(Seat(rank, size, family_of(model.config)))
        of_ranks.append(sum(decoded) - 8)
        for field in ("input_ids", "attention_mask", "completion_mask", "mm_token_type_ids"):
            assert field not in whole or torch.equal(batch[field], whole[field])
        expected, found = held(model, whole, rank, size), held(model, batch, rank, size)
        assert torch.equal(found.held, expected.held)
        assert list(found.visual) == list(expected.visual)
        for tensor, wanted in zip(found.visual.values(), expected.visual.values(), strict=True):
            assert torch.equal(tensor, wanted)
        reference = zip(batch["reference"]["videos"][0].items(), whole["reference"]["videos"][0].items(), strict=True)
        assert all(torch.equal(tensor, wanted) for (_, tensor), (_, wanted) in reference)  # too short: all of it
    # Beside its own frames at most the margins, and those at which the questions' lengths move the cuts.
    assert frames <= sum(of_ranks) <= 0.9 * size * frames
    assert max(of_ranks) <= frames


@pytest.mark.parametrize("seed", range(40))
def test_whatever_tokens_come_before_and_between_frames_own_frames_are_among_those_needed(seed: int) -> None:
    """The cut as the forward pass makes it, for any trunk between the last frame and the end of the prompt."""
    draw = random.Random(seed)
    size, of_unit = draw.randint(2, 4), draw.choice([1, 2])
    number = draw.randint(4 * size, 12 * size)
    frames = number * of_unit - draw.randrange(of_unit)
    family = family_of(tiny_models.build("qwen2_5_vl" if of_unit == 2 else "internvl")[0].config)
    patches = draw.randint(1, 3)
    if of_unit == 2:
        grid = torch.tensor([[number, 2, 2 * patches]])
        visual = {"pixel_values_videos": torch.zeros(number * 4 * patches, 3), "video_grid_thw": grid}
    else:
        visual = {"pixel_values_videos": torch.zeros(number, 3, 4, 4)}
    seen = [False] * draw.randint(0, 30)
    starts = []
    for _ in range(number):
        seen += [False] * draw.randint(0, 5)
        starts.append(len(seen))
        seen += [True] * patches
    first_end = len(seen)
    seen += [False] * draw.randint(1, 200)
    trunk = draw.randint(first_end, len(seen) - 1)
    cuts = sharing._cuts(trunk, sharing._starts(sharing._units(visual, family), torch.tensor(seen[:trunk])), size)
    for rank in range(size):
        own = {
            frame
            for whose, begin, end in sharing._chunks(cuts)
            if whose == rank
            for unit, start in enumerate(starts)
            if begin <= start < end
            for frame in range(unit * of_unit, min((unit + 1) * of_unit, frames))
        }
        assert own
        assert own <= Seat(rank, size, family).frames_needed(visual, torch.tensor(seen), frames)


def test_a_video_is_bad_to_whoever_needs_the_frames_that_lack(films: list[Clip], tmp_path: Path) -> None:
    """The trainer has the others of the group leave it out too."""
    processor = tiny_models.build("internvl")[1]
    short = write_clip(tmp_path / "short.mp4", (9, 9, 9), 2.0)
    timeline = Timeline((*films, Clip(str(short), 0.0, 8.0)))  # the file ends before the clip does
    good, bad = (
        VideoPreference(timeline=seen, question="?", chosen="red", rejected="blue", evidence=(0,), reference=(0,))
        for seen in (Timeline(tuple(films)), timeline)
    )
    rows = list(make_dataset([good, bad]))
    family = family_of(tiny_models.build("internvl")[0].config)
    collator = VideoPreferenceCollator(processor, num_frames=40, fps=None)
    collator.seat = Seat(0, 2, family)  # whose chunks are the first and the last
    with pytest.raises(UnreadableVideo):
        collator(rows)
    collator.on_bad_video, collator.hands_over_errors = "skip", True
    assert collator(rows)["left_out"] == {1: "beyond_end"}
    given = collator([rows[0], rows[0]])["given"]
    again = collator.without(given, {1: "unreachable"})  # as it was for another process
    assert (again["left_out"], again["kept"].tolist(), again["rows"]) == ({1: "unreachable"}, [0], 2)
    assert again["bad_videos"].sum() == 1
    assert collator.without(given, {0: "unreachable", 1: "unreachable"})["row_keys"].tolist() == [NO_ROW]


def test_short_videos_are_decoded_whole() -> None:
    family = family_of(tiny_models.build("internvl")[0].config)
    assert Seat(0, 2, family).likely_frames(15) is None
    assert Seat(0, 2, family).likely_frames(16) == {*range(6), *range(10, 16)}
    assert Seat(1, 2, family).likely_frames(16) == {*range(2, 14)}
    alone = family_of(tiny_models.build("llava_onevision")[0].config)
    assert Seat(0, 2, alone).likely_frames(640) is None
