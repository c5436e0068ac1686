"""The log of a build beside its output: the funnel, and some drops of each reason."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from longvpo_hf.errors import DatasetError
from longvpo_hf.funnel import REASONS
from longvpo_hf.public import public_name
from longvpo_hf.publishing.inspect_page.parts import CAPTION_CHARACTERS, ENTRIES, cut

_DROPS_PER_REASON = 25
_FILE = re.compile(r"(/|~/|[A-Za-z]:\\).*\.\w{2,5}")


def read_log(folder: Path, seed: int) -> dict[str, Any]:
    """The funnel, and some drops of each reason; what is missing or cannot be read stands in `notices`."""
    notices: list[str] = []
    totals: Counter[str] = Counter()
    kept: dict[str, list[dict[str, str]]] = {}
    num_broken = 0
    rng = random.Random(seed)
    if (folder / "dropped.jsonl").is_file():
        with (folder / "dropped.jsonl").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                drop = _drop(line)
                if drop is None:
                    num_broken += bool(line.strip())
                    continue
                reason, fields = drop
                totals[reason] += 1
                some = kept.setdefault(reason, [])
                if len(some) < _DROPS_PER_REASON:  # reservoir sampling: each drop is as likely to be shown
                    some.append(fields)
                elif (place := rng.randrange(totals[reason])) < _DROPS_PER_REASON:
                    some[place] = fields
    if num_broken:
        notices.append(f"Lines of {folder.name}/dropped.jsonl that could not be read and are not shown: {num_broken}.")
    funnel: dict[str, dict[str, int]] = {}
    if (folder / "funnel.json").is_file():
        try:
            funnel = _funnel((folder / "funnel.json").read_text(encoding="utf-8", errors="replace"))
        except ValueError as error:
            notices.append(f"{folder.name}/funnel.json could not be read: {cut(error, CAPTION_CHARACTERS)}")
    numbers = funnel.get("dropped") or dict(totals.most_common())
    reasons = [
        {
            "name": cut(reason, CAPTION_CHARACTERS),
            "about": REASONS.get(reason, ""),
            "total": numbers.get(reason, totals[reason]),
            "drops": kept.get(reason, []),
        }
        for reason in {**numbers, **totals}
    ]
    return {"log": folder.name, "stages": funnel.get("stages", {}), "reasons": reasons, "notices": notices}


def _drop(line: str) -> tuple[str, dict[str, str]] | None:
    """Reason and fields of a line of `dropped.jsonl`; paths lose the folders of the machine they lie on."""
    try:
        drop = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(drop, dict) or not isinstance(drop.get("reason"), str):
        return None
    paths = [value for value in drop.values() if isinstance(value, str) and _FILE.fullmatch(value)]
    fields = {}
    for name, value in list(drop.items())[:ENTRIES]:
        text = value if isinstance(value, str) else json.dumps(value)
        for path in paths:
            text = text.replace(path, public_name(path))
        if name != "reason":
            fields[cut(name, CAPTION_CHARACTERS)] = cut(text, CAPTION_CHARACTERS)
    return drop["reason"], fields


def _funnel(text: str) -> dict[str, dict[str, int]]:
    funnel = json.loads(text)
    for part in ("stages", "dropped"):
        numbers = funnel.get(part) if isinstance(funnel, dict) else None
        if not isinstance(numbers, dict) or not all(type(number) is int for number in numbers.values()):
            raise DatasetError(f"{part!r} must name whole numbers, got {numbers!r}.")
    return {part: funnel[part] for part in ("stages", "dropped")}
