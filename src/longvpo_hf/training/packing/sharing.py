"""One packed row shared among the processes of a group: who holds which of its tokens, and how they attend.

Every process works the plan out from the batch, which all of them have, so nothing is asked. Trunks are cut at borders
of frames into 2W chunks for W processes, and process r holds chunks r and 2W - 1 - r: late chunks attend to more than
early ones, and so all work alike (contiguous parts would make the slowest up to 1.9 times the mean). Branches are held
whole: a question with its answers lies on one process. A process's tokens, and the frames that they stand for, go
through the model's own forward pass, so that vision tower, multimodal rope, MLPs and LM head are shared without a line
about any model. Attention alone communicates: the keys and values of the trunks come to everyone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from longvpo_hf.families import Family
from longvpo_hf.families.encoding import concatenate_visuals
from longvpo_hf.families.pieces import pixel_tensor
from longvpo_hf.training.packing.attention import Span, row_parts
from longvpo_hf.training.packing.exchange import Stretch, gathered
from longvpo_hf.training.packing.parts import Part, attend
from longvpo_hf.training.packing.tree import Packed

Visual = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens that a process holds next to each other, and what they see: among all trunks' tokens, and of their own.

    Args:
        start: Their first place among the process's tokens.
        stop: The place behind the last.
        trunk: Where their tree's trunk begins among the tokens of all trunks.
        before: How many of its tokens come before them.
        sees: Of branches, which token sees which, bool [tokens, tokens]; None for a part of the trunk itself.
        rows: Of branches, how many tokens each row has.
    """

    start: int
    stop: int
    trunk: int
    before: int
    sees: Tensor | None = None
    rows: tuple[int, ...] = ()


class Share:
    """What text layers need of a packed row on one process; takes the place of `Forest`.

    Not a dataclass, for the same reason.

    Args:
        held: Long [own tokens], their places in the packed row: those of trunks first, then those of branches.
        visual: The visual tensors of the frames that the own tokens stand for.
        pieces: The own tokens in order.
        stretches: Who holds the tokens of all trunks, see `exchange.gathered`.
        group: The processes that share the row.
    """

    def __init__(
        self,
        held: Tensor,
        visual: Visual,
        pieces: Sequence[_Piece],
        stretches: Sequence[Stretch],
        group: dist.ProcessGroup | None,
    ) -> None:
        self.held, self.visual, self.group = held, visual, group
        self._pieces, self._stretches = pieces, stretches
        self._of_trunks = sum(piece.stop - piece.start for piece in pieces if piece.sees is None)
        self.calls = self.windowed_calls = 0

    @property
    def tokens(self) -> int:
        """How many tokens the process holds."""
        return len(self.held)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the own tokens.

        Args:
            query: [1, heads, own tokens, width]; key and value have their own, fewer, heads.
            scale: Of the scores.

        Returns:
            [1, own tokens, heads, width].
        """
        own = slice(self._of_trunks)
        rows = torch.stack([key[0, :, own], value[0, :, own]]).permute(2, 0, 1, 3)  # [trunk tokens, 2, heads, width]
        trunk_keys, trunk_values = (of_all.transpose(0, 1)[None] for of_all in self._gathered(rows).unbind(1))
        out = []
        for piece in self._pieces:
            before = piece.trunk + piece.before
            parts = [Part(0, piece.trunk, before)] if piece.before else []
            if piece.sees is None:
                parts.append(Part(0, before, before + piece.stop - piece.start, is_causal=True))
            else:
                parts += row_parts(piece.sees, piece.rows, 1, piece.start)
            asked = query[:, :, piece.start : piece.stop]
            out.append(attend(asked, (trunk_keys, key), (trunk_values, value), parts, scale).transpose(1, 2))
        return torch.cat(out, dim=1)

    def _gathered(self, rows: Tensor) -> Tensor:
        """The rows of all trunks' tokens, from this process's: [own, 2, heads, width] to [all, 2, heads, width]."""
        assert self.group is not None
        return gathered(rows, self._stretches, self.group)


class SupposedShare(Share):
    """The first process's share of a row that `size` processes would share; what the others hold has no contents.

    Args:
        spans: The trees of the row.
        size: How many processes.
    """

    def __init__(self, spans: Sequence[Span], size: int) -> None:
        cuts = [_cuts(span.branches - span.start, [], size) for span in spans]
        held, pieces = _pieces(spans, cuts, _owners(spans, size), 0)
        super().__init__(torch.tensor(held), {}, pieces, [], None)
        self._all = sum(span.branches - span.start for span in spans)

    def _gathered(self, rows: Tensor) -> Tensor:
        times = -(-self._all // len(rows))
        return torch.cat([rows] * times)[: self._all]


def share_of(
    packed: Packed,
    visuals: Sequence[Mapping[str, Tensor]],
    visible: Sequence[Tensor],
    family: Family,
    group: dist.ProcessGroup,
) -> Share | None:
    """This process's share of a packed row.

    Args:
        packed: The row, the same on every process.
        visuals: Of each tree the visual tensors of its video, {} for none; on any device.
        visible: Of each tree which tokens of its trunk are visual, bool [trunk].
        family: The model's.
        group: The processes.

    Returns:
        None where the row is too short: some process would be left without a token, or without a frame where others
        have some, so that they would call the vision tower unequally often. Each then computes all of the row.
    """
    size, own = dist.get_world_size(group), dist.get_rank(group)
    cuts, frames = [], [0] * size
    taken: list[Mapping[str, Tensor]] = []
    for span, visual, seen in zip(packed.forest.spans, visuals, visible, strict=True):
        units = _units(visual, family)
        if visual and not units:
            return None
        starts = _starts(units, seen)
        cuts.append(_cuts(span.branches - span.start, starts, size))
        for rank, begin, end in _chunks(cuts[-1]):
            mine = [unit for unit, start in zip(units, starts, strict=True) if begin <= start < end]
            frames[rank] += len(mine)
            taken += mine if rank == own else []
    owners = _owners(packed.forest.spans, size)
    held, pieces = zip(*(_pieces(packed.forest.spans, cuts, owners, rank) for rank in range(size)), strict=True)
    if not all(map(len, held)) or (any(visuals) and not all(frames)):
        return None
    stretches = [(rank, end - begin) for of_tree in cuts for rank, begin, end in _chunks(of_tree)]
    places = torch.tensor(held[own], device=packed.input_ids.device)
    return Share(places, concatenate_visuals(taken), pieces[own], stretches, group)


@dataclass(frozen=True, slots=True)
class Seat:
    """A process's place among those that share its batches: which frames it has to decode.

    Args:
        rank: Its number in the group.
        size: How many they are.
        family: The model's.
    """

    rank: int
    size: int
    family: Family

    def likely_frames(self, frames: int) -> set[int] | None:
        """About the frames of its chunks, before anything is known of their tokens; None: all, a video is too short.

        From four units a process on, each of the 2 · size chunks has one, so that the row is cut for certain. A unit
        is at most two frames.
        """
        if self.family.units is None or frames < 8 * self.size:
            return None
        last, margin = 2 * self.size - 1, 2
        bounds = [(chunk * frames, (chunk + 1) * frames) for chunk in (self.rank, last - self.rank)]
        return {
            frame
            for begin, end in bounds
            for frame in range(begin // (2 * self.size) - margin, -(-end // (2 * self.size)) + margin)
            if 0 <= frame < frames
        }

    def frames_needed(self, visual: Mapping[str, Tensor], seen: Tensor, frames: int) -> set[int]:
        """The frames that it may hold, wherever in the rest of the prompt the trunk ends.

        Args:
            visual: The visual tensors of the video; what other processes hold may be black.
            seen: Which tokens of the longest prompt about it are visual, bool [tokens].
            frames: How many the video has.
        """
        units = _units(visual, self.family)
        if not 4 * self.size <= len(units) <= frames:
            return set(range(frames))
        starts = _starts(units, seen)
        shortest, longest = (_cuts(trunk, starts, self.size) for trunk in (int(seen.nonzero()[-1]) + 1, len(seen)))
        of_unit = -(-frames // len(units))
        return {
            frame
            for chunk in (self.rank, 2 * self.size - 1 - self.rank)
            for number, start in enumerate(starts)
            if shortest[chunk] <= start < longest[chunk + 1]
            for frame in range(number * of_unit, min((number + 1) * of_unit, frames))
        }


def _units(visual: Mapping[str, Tensor], family: Family) -> list[Visual]:
    """The visual tensors of each of a video's units; none where they cannot be told apart."""
    return (family.units(visual) or []) if visual and family.units is not None else []


def _starts(units: Sequence[Visual], seen: Tensor) -> list[int]:
    """The place in the trunk of the first token of each unit: tokens are as many as the rows of its pixels."""
    places = seen.nonzero()[:, 0].tolist()
    rows = [len(pixels) for unit in units if (pixels := pixel_tensor(unit)) is not None]
    total = sum(rows)
    return [places[before * len(places) // total] for before in accumulate(rows[:-1], initial=0)] if rows else []


def _cuts(trunk: int, starts: Sequence[int], size: int) -> list[int]:
    """Where a trunk is cut into 2 · size chunks, some of them perhaps empty: as equal as borders of frames allow."""
    wanted = [number * trunk / (2 * size) for number in range(1, 2 * size)]
    borders = [0, *starts, trunk]
    inner = [min(borders, key=lambda border: abs(border - place)) if starts else int(place) for place in wanted]
    return [0, *inner, trunk]


def _chunks(cuts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Rank, begin and end of each chunk that is not empty."""
    last = len(cuts) - 2
    every = [(min(number, last - number), *cuts[number : number + 2]) for number in range(last + 1)]
    return [(rank, begin, end) for rank, begin, end in every if begin < end]


def _owners(spans: Sequence[Span], size: int) -> list[list[int]]:
    """For each tree, which process holds the branches of each of its rows: the one with the fewest branch tokens."""
    loads = [0] * size
    owners: list[list[int]] = []
    for span in spans:
        owners.append([])
        for tokens in span.rows:
            rank = min(range(size), key=loads.__getitem__)
            loads[rank] += tokens
            owners[-1].append(rank)
    return owners


def _pieces(
    spans: Sequence[Span], cuts: Sequence[Sequence[int]], owners: Sequence[Sequence[int]], rank: int
) -> tuple[list[int], list[_Piece]]:
    """Places in the packed row of the tokens that a process holds, and the pieces that they make."""
    held: list[int] = []
    pieces: list[_Piece] = []
    bases = list(accumulate((span.branches - span.start for span in spans), initial=0))[:-1]
    for span, base, of_tree in zip(spans, bases, cuts, strict=True):
        for whose, begin, end in _chunks(of_tree):
            if whose == rank:
                pieces.append(_Piece(len(held), len(held) + end - begin, base, begin))
                held += range(span.start + begin, span.start + end)
    for span, base, of_rows in zip(spans, bases, owners, strict=True):
        stops = accumulate(span.rows)
        own = [
            (stop - size, stop) for size, stop, whose in zip(span.rows, stops, of_rows, strict=True) if whose == rank
        ]
        places = [place for start, stop in own for place in range(start, stop)]
        if places:
            index = torch.tensor(places, device=span.sees.device)
            sees, rows = span.sees[index][:, index], tuple(stop - start for start, stop in own)
            trunk = span.branches - span.start
            pieces.append(_Piece(len(held), len(held) + len(places), base, trunk, sees, rows))
            held += [span.branches + place for place in places]
    return held, pieces
