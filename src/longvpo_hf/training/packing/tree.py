"""How rows of a batch are laid out as trees: what they share, where each token goes and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longvpo_hf.families.positions import prompt_positions, visual_token_ids
from longvpo_hf.training.packing.attention import Forest, Span, visibility

Batch = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tree:
    """Which rows share a trunk, and how long it is: prompts[row] tokens of a row are its prompt, `trunk` are common."""

    rows: list[int]
    trunk: int
    prompts: dict[int, int]


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed row of T tokens.

    Args:
        input_ids: [1, T].
        position_ids: [1, T], or [3, 1, T] for multimodal rope.
        shift_labels: [1, T], the token that each position is to predict; -100 where none.
        source: [A·B, L - 1], the place in the packed row that predicts a row's next token; -1 where none.
        counts: [1, T], how many of the batch's sequences a token stands for.
        forest: What attention needs.
    """

    input_ids: Tensor
    position_ids: Tensor
    shift_labels: Tensor
    source: Tensor
    counts: Tensor
    forest: Forest


def trees_of(batch: Batch, visual_tokens: Tensor) -> list[Tree]:
    """The trees of a batch: one for each video, more where prompts differ before the video ends.

    Args:
        visual_tokens: Bool [A·B, L], see `find_visual_tokens`.
    """
    groups = _same_video(batch["video_index"].tolist())
    return [tree for rows in groups for tree in _trunks(batch, rows, visual_tokens)]


def _same_video(index: Sequence[int]) -> list[list[int]]:
    """Rows grouped by the video they show, in order of appearance; a row without video is alone."""
    groups: dict[int, list[int]] = {}
    for row, video in enumerate(index):
        groups.setdefault(video if video >= 0 else -1 - row, []).append(row)
    return list(groups.values())


def _trunks(batch: Batch, rows: list[int], visual_tokens: Tensor) -> list[Tree]:
    """The tree of rows that show one video; a tree for each row where their prompts part before the video ends.

    The trunk leaves at least the last prompt token to the branches.
    """
    input_ids, pairs = batch["input_ids"], len(batch["video_index"])
    prompts = {row: _prompt_length(batch, range(row, len(input_ids), pairs)) for row in rows}
    shortest = min(prompts.values())
    ids = input_ids[rows, :shortest]
    common = int((ids == ids[:1]).all(dim=0).long().cumprod(dim=0).sum())
    trunk = min(common, shortest - 1)
    if not any(bool(visual_tokens[row, trunk : prompts[row]].any()) for row in rows):
        return [Tree(rows, trunk, prompts)]
    if len(rows) == 1:
        raise ValueError(
            f"The prompt of row {rows[0]} ends in a visual token: it must end in text, such as the answer's header."
        )
    return [tree for row in rows for tree in _trunks(batch, [row], visual_tokens)]


def _prompt_length(batch: Batch, sequences: Sequence[int]) -> int:
    """How many tokens the prompt of a row has; its answers are these sequences of the batch, chosen and rejected first.

    Raises:
        ValueError: If they do not start with the same prompt of at least one token.
    """
    lengths = []
    for sequence in sequences:
        answer = batch["completion_mask"][sequence].nonzero()
        lengths.append(int(answer[0]) if len(answer) else int(batch["attention_mask"][sequence].sum()))
    chosen, *others = sequences
    ids, length = batch["input_ids"], lengths[0]
    for name, other, found in zip(("rejected", "sampled"), others, lengths[1:], strict=False):
        if length < 1 or length != found or not torch.equal(ids[chosen, :length], ids[other, :length]):
            raise ValueError(
                f"Rows {chosen} (chosen) and {other} ({name}) must start with the same prompt of at least 1 token, "
                f"got prompts of {length} and {found} tokens: tokenize the prompt apart from the answers."
            )
    return length


def pack(
    batch: Batch, trees: Sequence[Tree], trunk_positions: Sequence[Tensor], with_last_tokens: bool = False
) -> Packed:
    """Lays trees behind one another in one row.

    Args:
        with_last_tokens: Whether the last token of each answer, which predicts nothing, has a place too.
        trunk_positions: For each tree [axes, trunk + 1]: positions of its trunk and of the first token after it.
    """
    input_ids, completion_mask = batch["input_ids"], batch["completion_mask"]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    pairs, device = len(batch["video_index"]), input_ids.device
    of_row = len(lengths) // pairs  # answers
    source = torch.full_like(input_ids[:, 1:], -1)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    labels: list[Tensor] = []
    counts: list[Tensor] = []
    spans: list[Span] = []
    placed = 0

    def add(row: int, start: int, end: int, at: Tensor, sequences: int, answers: bool = False) -> int:
        nonlocal placed
        ids.append(input_ids[row, start:end])
        positions.append(at)
        if answers:
            wanted = slice(start + 1, end + 1)
            labels.append(input_ids[row, wanted].masked_fill(completion_mask[row, wanted] == 0, -100))
            source[row, start:end] = torch.arange(placed, placed + end - start, device=device)
        else:
            labels.append(torch.full_like(input_ids[row, start:end], -100))
        counts.append(torch.full_like(input_ids[row, start:end], sequences))
        placed += end - start
        return end - start

    for tree, trunk in zip(trees, trunk_positions, strict=True):
        tree_start = placed
        add(tree.rows[0], 0, tree.trunk, trunk[:, :-1], sequences=of_row * len(tree.rows))
        branches, questions, answers, sizes = placed, [], [], []
        for row in tree.rows:
            last = tree.prompts[row] - 1
            parent_end = trunk[:, -1:]
            added = [add(row, tree.trunk, last, _restart(parent_end, last - tree.trunk), sequences=of_row)]
            parent_end = parent_end + last - tree.trunk
            for answer in range(row, len(lengths), pairs):
                size = max(lengths[answer] - 1 - last, 0)
                added.append(add(answer, last, last + size, _restart(parent_end, size), sequences=1, answers=True))
                if with_last_tokens:
                    added[-1] += add(answer, last + size, last + size + 1, parent_end + size, sequences=1)
            sizes.append(sum(added))
            questions += [row] * sizes[-1]
            answers += [kind for kind, size in enumerate(added) for _ in range(size)]
        sees = visibility(torch.tensor(questions, device=device), torch.tensor(answers, device=device))
        spans.append(Span(tree_start, branches, placed, sees, tuple(sizes)))

    axes = torch.cat(positions, dim=1)
    return Packed(
        input_ids=torch.cat(ids)[None],
        position_ids=axes if len(axes) == 1 else axes[:, None],
        shift_labels=torch.cat(labels)[None],
        source=source,
        counts=torch.cat(counts)[None],
        forest=Forest(spans),
    )


def _restart(first: Tensor, size: int) -> Tensor:
    """Positions [axes, size] of a branch whose first token is at `first` [axes, 1], whatever is laid before it."""
    return first + torch.arange(size, device=first.device)


def trunk_positions(base: PreTrainedModel, batch: Batch, tree: Tree, video: int) -> Tensor:
    """Positions [axes, trunk + 1] of a trunk and of the text token after it, as the backbone counts them.

    `video` is -1 for a tree without one.
    """
    names = [name for name in ("input_ids", "mm_token_type_ids") if name in batch]
    inputs = {name: batch[name][tree.rows[0] : tree.rows[0] + 1, : tree.trunk + 1] for name in names}
    return prompt_positions(base, inputs, batch["videos"][video] if video >= 0 else None)


def find_visual_tokens(base: PreTrainedModel, batch: Batch) -> Tensor:
    """Bool [A·B, L], true on placeholders of visual features."""
    if "mm_token_type_ids" in batch:
        return batch["mm_token_type_ids"] != 0
    ids = torch.tensor(sorted(visual_token_ids(base.config)), dtype=torch.long, device=batch["input_ids"].device)
    return torch.isin(batch["input_ids"], ids)
