"""What the audit of a step's rows found: it stands between their build and the first training that takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def findings_of(folder: Path) -> list[Mapping[str, Any]]:
    """The items of an audit to look at, the worst first; see `auditing.Finding`.

    Args:
        folder: The audit's, with `audit.json`.
    """
    findings = json.loads((folder / "audit.json").read_text(encoding="utf-8"))["findings"]
    return [finding for verdict in ("fail", "warn") for finding in findings if finding["verdict"] == verdict]


def audit_in_words(folder: Path) -> str:
    """What an audit found, in a few words."""
    found = findings_of(folder)
    parts = []
    for verdict, number in (("fail", "{} fails"), ("warn", "{} to look at")):
        names = [str(finding["name"]) for finding in found if finding["verdict"] == verdict]
        if names:
            parts.append(f"{number.format(len(names))} ({', '.join(names)})")
    return f"{', '.join(parts)}; see {folder / 'audit.html'}" if parts else "nothing stands out"
