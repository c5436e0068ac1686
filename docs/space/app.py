"""A page to look at any dataset of video preferences: rows with playable spans, filters, the audit.

    python docs/space/app.py [DATASET]

Of a dataset on the Hub only the rows are downloaded; the browser plays the clips from the Hub. What a row says is shown
as text, whoever wrote it.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from huggingface_hub import hf_hub_download, hf_hub_url

from longvpo_hf.auditing import audit_rows
from longvpo_hf.errors import DatasetError, LongVPOError
from longvpo_hf.paths import path_inside
from longvpo_hf.preference import VideoPreference
from longvpo_hf.publishing.rows import RowsFolder
from longvpo_hf.studies.report.sections import clock

#: Rows that are kept in memory; of larger datasets these are the first.
MAX_ROWS = 20_000
THIRDS = ("anywhere", "first third", "middle third", "last third")


@dataclass(frozen=True)
class Opened:
    """A dataset that is looked at.

    Args:
        name: A folder or a name on the Hub.
        rows: Its rows as they stand in the file.
        is_local: Whether it is a folder of this machine.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    is_local: bool

    def media(self, file_name: str) -> str:
        """The address that a browser finds a clip's file at."""
        path = path_inside(self.name, file_name)  # no row leads out of its dataset
        if self.is_local:
            if not path.is_file():
                raise DatasetError(f"{file_name} is not in {self.name}: its rows may have come without their media.")
            return f"/gradio_api/file={quote(str(path))}"
        return str(hf_hub_url(self.name, file_name, repo_type="dataset"))


@lru_cache(maxsize=4)
def open_dataset(name: str, allowed: str | None) -> Opened:
    """Opens a dataset.

    Args:
        name: A name on the Hub, or the folder that `allowed` names.
        allowed: The one folder of this machine that may be looked at; None for none.
    """
    is_local = name == allowed
    folder = Path(name if is_local else hf_hub_download(name, "train.parquet", repo_type="dataset").rpartition("/")[0])
    source = RowsFolder(folder, video_root=folder)
    rows = [row for _, row in zip(range(MAX_ROWS), source.raw(), strict=False)]
    return Opened(name, rows, is_local)


def methods_of(opened: Opened) -> list[str]:
    """The methods that the rows name, sorted; a stranger's rows may hold anything in that column."""
    found = [row.get("provenance") for row in opened.rows]
    return sorted({str(one["method"]) for one in found if isinstance(one, dict) and one.get("method")})


def matching(opened: Opened, words: str, method: str, third: str) -> list[int]:
    """Numbers of the rows that the filters let through."""
    found = []
    for number, row in enumerate(opened.rows):
        try:
            preference = VideoPreference.from_row(row)
        except (ValueError, TypeError, ArithmeticError):
            if not words and method == "all" and third == THIRDS[0]:
                found.append(number)
            continue
        text = f"{preference.question} {preference.chosen} {preference.rejected}".casefold()
        thirds = {THIRDS[1 + min(2, int(3 * preference.timeline.centre(i)))] for i in preference.evidence}
        if (
            all(word in text for word in words.casefold().split())
            and method in ("all", preference.provenance.method)
            and (third == THIRDS[0] or third in thirds)
        ):
            found.append(number)
    return found


def shown(opened: Opened, number: int) -> str:
    """One row as HTML."""
    try:
        row = VideoPreference.from_row(opened.rows[number])
    except (ValueError, TypeError, ArithmeticError) as error:
        return f"<p>Row {number} is no preference: {html.escape(str(error))}</p>"
    clips = []
    for index, clip in enumerate(row.timeline.clips):
        try:
            source = html.escape(f"{opened.media(clip.path)}#t={clip.start_seconds:g},{clip.end_seconds:g}", quote=True)
            player = f'<video controls muted preload="metadata" width="220" src="{source}"></video>'
        except LongVPOError as error:
            player = f"<p>{html.escape(str(error))}</p>"
        marks = ("★ evidence " if index in row.evidence else "") + ("◆ reference" if index in row.reference else "")
        about = f"clip {index} · {clock(clip.start_seconds)}–{clock(clip.end_seconds)} {marks}"
        clips.append(f"<figure>{player}<figcaption>{html.escape(about)}</figcaption></figure>")
    texts = "".join(
        f"<p><b>{title}</b> {html.escape(text)}</p>"
        for title, text in (("Question", row.question), ("Chosen", row.chosen), ("Rejected", row.rejected))
    )
    return f'<div class="clips">{"".join(clips)}</div>{texts}<p><small>{html.escape(row.id)}</small></p>'


def audited(opened: Opened) -> str:
    """The cheap items of the audit, as lines of text in HTML."""
    return f"<pre>{html.escape(str(audit_rows(opened.rows, len(opened.rows), opened.name)))}</pre>"


def page(dataset: str = "") -> gr.Blocks:
    """The page.

    Args:
        dataset: What is opened first. A folder may be looked at only if it is named here.
    """
    allowed = dataset if Path(dataset).is_dir() and dataset else None
    with gr.Blocks(title="Video preference rows") as blocks:
        gr.Markdown("# Video preference rows")
        with gr.Row():
            name = gr.Textbox(dataset, label="Dataset", placeholder="namespace/name on the Hub", scale=4)
            button = gr.Button("Open", scale=1)
        with gr.Row():
            words = gr.Textbox(label="Words in question or answers (Enter)")
            method = gr.Dropdown(["all"], value="all", label="Method")
            third = gr.Dropdown(list(THIRDS), value=THIRDS[0], label="Evidence stands")
        status = gr.Markdown()
        found = gr.State([])
        with gr.Tab("Rows"):
            place = gr.Number(1, minimum=1, precision=0, step=1, label="Row, of those that match")
            row = gr.HTML()
        with gr.Tab("Audit"):
            run = gr.Button("Run the audit")
            audit = gr.HTML()

        def opened_or_error(wanted: str) -> Opened:
            try:
                return open_dataset(wanted.strip(), allowed)
            except Exception as error:  # whatever the Hub or a file says is for the person who typed the name
                raise gr.Error(str(error).splitlines()[0][:300]) from error

        def opening(wanted: str) -> tuple[Any, ...]:
            opened = opened_or_error(wanted)
            return gr.Dropdown(["all", *methods_of(opened)], value="all"), *filtering(wanted, "", "all", THIRDS[0])

        def filtering(wanted: str, words: str, method: str, third: str) -> tuple[Any, ...]:
            opened = opened_or_error(wanted)
            numbers = matching(opened, words, method, third)
            said = f"{len(numbers):,} of {len(opened.rows):,} rows"
            first = shown(opened, numbers[0]) if numbers else "<p>No row matches.</p>"
            return said, numbers, gr.Number(1, maximum=max(1, len(numbers))), first

        def going(wanted: str, numbers: list[int], at: float | None) -> str:
            at = min(max(1, int(at or 1)), len(numbers))
            return shown(opened_or_error(wanted), numbers[at - 1]) if numbers else ""

        button.click(opening, name, [method, status, found, place, row])
        for changed in (words.submit, method.input, third.input):
            changed(filtering, [name, words, method, third], [status, found, place, row])
        place.input(going, [name, found, place], row)
        run.click(lambda wanted: audited(opened_or_error(wanted)), name, audit)
        if dataset:
            blocks.load(opening, name, [method, status, found, place, row])
    return blocks


CSS = """
.clips { display: flex; gap: .75rem; overflow-x: auto }
.clips figure { margin: 0 }
.clips figcaption { font-size: .8rem; padding: .25rem 0 .5rem }
"""

if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    folders = [str(Path(wanted).resolve())] if wanted and Path(wanted).is_dir() else []
    theme = gr.themes.Default(font="system-ui", font_mono="monospace")  # no font is fetched from elsewhere
    page(wanted).launch(allowed_paths=folders, css=CSS, theme=theme)
