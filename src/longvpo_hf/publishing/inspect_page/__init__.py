"""A page to look at the rows of a preference dataset, or at captioned videos: `longvpo inspect`.

One HTML file that needs nothing but itself: rows with the filmstrip of their timeline, or videos as timelines of scenes
under their summaries; plots over the whole; what was dropped and why. `page.html`, `page.css` and `page.js` are how it
looks and filters.

Nothing that is in a row, a file name or a log can act on the page. It reaches the page as JSON that no browser runs, is
shown as text only, and the page's policy names its own script and style by their hashes and forbids all else. The page
is bounded (see `parts.py`), and so is memory.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from longvpo_hf.artifacts import write_text
from longvpo_hf.captions import FACTS_FILE
from longvpo_hf.errors import DatasetError
from longvpo_hf.publishing.inspect_page.captions import captions_data
from longvpo_hf.publishing.inspect_page.rows import rows_data

MAX_ROWS = 5_000


@dataclass(frozen=True, slots=True)
class InspectPage:
    """A page that was written.

    Args:
        path: The HTML file.
        num_rows: Rows, or captioned videos, it shows.
        total_rows: Rows of the dataset, or all the videos.
        things: What they are: "rows" or "videos".
    """

    path: Path
    num_rows: int
    total_rows: int
    things: str = "rows"


def write_inspect_page(
    folder: Path,
    output: Path | None = None,
    num_rows: int = 200,
    seed: int = 0,
    video_root: Path | None = None,
) -> InspectPage:
    """Writes the page of a dataset or of captions; the same folder and seed give the same page, to the byte.

    Args:
        folder: The dataset (see `hub.py`), or the captions (`builders/captioning.py`). `<folder>.log/` beside it is
            shown too, where it is there.
        output: The HTML file; None for `<folder>/inspect.html`.
        num_rows: At most so many rows or videos are shown, one drawn from each of so many equal parts of the whole.
            The more, the fewer pictures of each.
        seed: Draws them.
        video_root: Where the media of rows that were published by reference lie; None for the dataset's own folder.

    Raises:
        ValueError: If the folder holds neither, `num_rows` is out of bounds, or `video_root` is no folder.
    """
    if not 1 <= num_rows <= MAX_ROWS:
        raise DatasetError(f"num_rows must be in [1, {MAX_ROWS}] so that a browser can open the page, got {num_rows}.")
    if video_root is not None and not video_root.is_dir():
        raise DatasetError(f"video_root must be the folder that the rows' media lie in, got {video_root}.")
    folder = Path(os.path.abspath(folder))  # `.` has neither a name nor a log beside it
    path = output or folder / "inspect.html"
    if (folder / FACTS_FILE).is_file():
        data = captions_data(folder, num_rows, seed, video_root)
    else:
        data = rows_data(folder, num_rows, seed, video_root)
    write_text(path, _page(folder.name, data))
    return InspectPage(path, len(data["rows"]), data["total"], data["kind"])


#: What the page calls what it shows, and their parts.
_WORDS = {
    "rows": {"things": "rows", "Things": "Rows", "parts": "clips", "Parts": "Clips"},
    "videos": {"things": "videos", "Things": "Videos", "parts": "scenes", "Parts": "Scenes"},
}


def _page(name: str, data: Mapping[str, Any]) -> str:
    template, style, script = (_asset(name) for name in ("page.html", "page.css", "page.js"))
    parts = {
        "title": html.escape(name).encode("ascii", "xmlcharrefreplace").decode(),
        "data": _json_in_html(data),
        **_WORDS[data["kind"]],
        "style": style,
        "script": script,
        # Of all that is between the tags, the line break before it too.
        "style_hash": _content_hash(f"\n{style}"),
        "script_hash": _content_hash(f"\n{script}"),
    }
    # In one pass: a name or a row that looks like a placeholder stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _asset(name: str) -> str:
    return files("longvpo_hf.publishing.inspect_page").joinpath(name).read_text(encoding="utf-8")


def _json_in_html(data: object) -> str:
    """JSON as ASCII without `<`, `>` and `&`, so that it can end no script block and begin no comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _content_hash(content: str) -> str:
    """The hash by which the page's policy names its style or its script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
