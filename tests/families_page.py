"""The tables of `docs/families.md`, measured on the tiny models: `python tests/families_page.py` writes them anew.

What they say of a family is what its processor and model did with two small videos here. That the rest of what the page
promises holds for it too is `tests/families/test_family_contract.py`.
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import tiny_models
from longvpo_hf.families import Family, families
from longvpo_hf.families.encoding import PromptEncoder
from longvpo_hf.families.positions import visual_token_ids
from longvpo_hf.families.refused import REFUSED
from longvpo_hf.frames import Frames
from longvpo_hf.training.models import prepare_trees

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
#: Not evenly spaced, and past a minute; two pairs.
SECONDS = (0.5, 1.25, 61.5, 62.0)
SIZES = ((112, 112), (112, 224), (448, 448))
_START, _END = "<!-- {}: python tests/families_page.py writes this -->\n", "<!-- end of {} -->"


def updated(page: str) -> str:
    """The page with tables as they are measured now."""
    for name, table in (("families", families_table()), ("refused", refused_table())):
        start, end = _START.format(name), _END.format(name)
        before, rest = page.split(start)
        page = f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
    return page


def families_table() -> str:
    """A row for each family."""
    told = f"what a prompt tells of frames at {', '.join(f'{second:g}' for second in SECONDS)} s"
    rows = [("family", "models", "processor", "frames that share tokens", "size of a frame", told, "trees")]
    for family in families():
        model, processor = tiny_models.build(family.model_type)
        reason = prepare_trees(model)
        rows.append(
            (
                f"`{family.model_type}`",
                _summary(family),
                f"`{type(processor).__name__}`",
                str(_frames_of_a_unit(processor)),
                _size(processor),
                _times(processor),
                "yes" if reason is None else f"no: {reason.rstrip('.')}",
            )
        )
    return _table(rows)


def refused_table() -> str:
    """A row for each kind of model that is refused by name."""
    return _table([("model type", "why"), *((f"`{refused.model_type}`", refused.reason) for refused in REFUSED)])


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _summary(family: Family) -> str:
    """The first paragraph of the family's file."""
    text = sys.modules[f"longvpo_hf.families.{family.model_type}"].__doc__ or ""
    return " ".join(text.strip().split("\n\n")[0].split()).rstrip(".")


def _encoded(processor: Any, size: tuple[int, int], seconds: tuple[float, ...] = SECONDS) -> Any:
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(seconds), 3, *size), dtype=torch.uint8, generator=noise)
    frames = Frames(pixels, seconds, (0,) * len(seconds), 64.0)
    return PromptEncoder(processor).encode(frames, [[{"role": "user", "content": ""}]])


def _visual(processor: Any, encoded: Any) -> tuple[int, int]:
    """Visual tokens of a prompt, and elements of the pixels behind them."""
    tokens = visual_token_ids(processor)
    pixels = next(tensor for name, tensor in encoded.visual.items() if name.startswith("pixel_values"))
    return sum(token in tokens for token in encoded.input_ids[0]), pixels.numel()


def _frames_of_a_unit(processor: Any) -> int:
    counts = [_visual(processor, _encoded(processor, SIZES[0], SECONDS[:count]))[0] for count in (2, 3, 4)]
    return 2 if counts[1] == counts[2] else 1


def _size(processor: Any) -> str:
    tokens, pixels = zip(*(_visual(processor, _encoded(processor, size)) for size in SIZES), strict=True)
    if len(set(tokens)) == 1:
        return "the tile, aspect not kept"
    if len(set(pixels)) == 1:
        return f"at most {processor.video_processor.max_soft_tokens} tokens, aspect kept"
    side = processor.video_processor.patch_size * processor.video_processor.merge_size
    return f"its own, sides rounded to {side}"


def _times(processor: Any) -> str:
    """What a prompt says around its frames (▢), without control tokens; or the spacing that goes beside it."""
    encoded = _encoded(processor, SIZES[0])
    spacing = [float(value) for name, value in encoded.visual.items() if "second" in name]
    if spacing:
        return f"one spacing for all pairs: {spacing[0]:g} s"
    visual, added = visual_token_ids(processor), processor.tokenizer.added_tokens_decoder
    ids = encoded.input_ids[0]
    parts: list[str] = []
    for is_visual, run in groupby(ids, lambda token: token in visual):
        texts = [token for token in run if not (token in added and added[token].special)]
        parts.append("▢" if is_visual else processor.tokenizer.decode(texts))
    text = " ".join("".join(parts).split())
    text = re.sub(r"^user ?|^User: ?| ?assistant$| ?Assistant:$", "", text)
    return f"`{text}`" if re.search(r"\d", text) else "nothing, but for their order"


def main() -> None:
    """Writes the tables anew."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
