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
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from longvpo_hf.auditing import audit_rows
from longvpo_hf.errors import DatasetError, LongVPOError
from longvpo_hf.paths import leads_out, path_inside
from longvpo_hf.paths import shown as shown_text
from longvpo_hf.preference import VideoPreference
from longvpo_hf.publishing.inspect_page.parts import clips_to_show
from longvpo_hf.publishing.rows import RowsFolder
from longvpo_hf.record import DatasetRecord, read_record
from longvpo_hf.studies.report.sections import clock
from longvpo_hf.timeline import Clip

#: Rows that are kept in memory; of larger datasets these are the first.
MAX_ROWS = 20_000
#: Players of one row: a browser opens the media of all of them.
MAX_CLIPS = 32
THIRDS = ("anywhere", "first third", "middle third", "last third")


@dataclass(frozen=True)
class Opened:
    """A dataset that is looked at.

    Args:
        name: A folder or a name on the Hub.
        rows: Its rows as they stand in the file.
        is_local: Whether it is a folder of this machine.
        by_reference: Whether its rows come without their media.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    is_local: bool
    by_reference: bool

    def media(self, file_name: str) -> str:
        """The address that a browser finds a clip's file at.

        Raises:
            DatasetError: If there is none; says why.
        """
        if leads_out(file_name):  # no row leads out of its dataset
            raise DatasetError(f"{shown_text(file_name)} is no file of a dataset.")
        if self.by_reference:
            raise DatasetError(f"{file_name} is in the corpus: these rows come without their media.")
        if not self.is_local:
            return str(hf_hub_url(self.name, file_name, repo_type="dataset"))
        path = path_inside(self.name, file_name)
        if not path.is_file():
            raise DatasetError(f"{file_name} is not in {self.name}.")
        return f"/gradio_api/file={quote(str(path))}"


@lru_cache(maxsize=4)
def open_dataset(name: str, allowed: str | None) -> Opened:
    """Opens a dataset.

    Args:
        name: A name on the Hub, or the folder that `allowed` names.
        allowed: The one folder of this machine that may be looked at; None for none.
    """
    is_local = name == allowed
    record = read_record(name, DatasetRecord) or DatasetRecord(name)  # of the Hub's, into the cache beside the rows
    folder = Path(name if is_local else hf_hub_download(name, "train.parquet", repo_type="dataset").rpartition("/")[0])
    source = RowsFolder(folder, video_root=folder)
    rows = [row for _, row in zip(range(MAX_ROWS), source.raw(), strict=False)]
    return Opened(name, rows, is_local, record.by_reference)


def why_not(name: str, error: Exception) -> str:
    """Why a dataset cannot be opened, for the person who typed its name."""
    if isinstance(error, EntryNotFoundError):
        return f"{name} has no train.parquet: it is no dataset of this form."
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f"The Hub has no dataset {name!r} that this page may read. Its name is namespace/name."
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


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
        return _in_html(opened, VideoPreference.from_row(opened.rows[number]))
    except (ValueError, TypeError, ArithmeticError) as error:  # also of times that no clock shows
        return f"<p>Row {number} is no preference: {html.escape(str(error)[:1000])}</p>"


def _in_html(opened: Opened, row: VideoPreference) -> str:
    clips = []
    for index in clips_to_show(len(row.timeline), row.evidence, row.reference, MAX_CLIPS):
        clip = row.timeline.clips[index]
        try:
            source = html.escape(f"{opened.media(clip.path)}#t={clip.start_seconds:g},{clip.end_seconds:g}", quote=True)
            player = f'<video controls muted preload="metadata" width="220" src="{source}"></video>'
        except LongVPOError as error:
            player = f"<p>{html.escape(str(error))}</p>"
        marks = ("★ evidence " if index in row.evidence else "") + ("◆ reference" if index in row.reference else "")
        about = f"clip {index} · {clock(clip.start_seconds)}–{clock(clip.end_seconds)} {marks}"
        origin = html.escape(_from(clip))
        clips.append(f"<figure>{player}<figcaption>{html.escape(about)}<br><bdi>{origin}</bdi></figcaption></figure>")
    total = len(row.timeline)
    some = f"<p>{len(clips)} of {total} clips, evidence and reference first.</p>" if len(clips) < total else ""
    reference = "its own clips" if row.reference else "the whole timeline"
    facts = [row.id, row.provenance.method or "no method", f"the reference model sees {reference}"]
    texts = [*((message.role, message.content) for message in row.context), ("Question", row.question)]
    texts += [("Chosen", row.chosen), ("Rejected", row.rejected)]
    return "".join(
        [
            f'<div class="clips">{"".join(clips)}</div>{some}',
            *(f"<p><b>{html.escape(title)}</b> <bdi>{html.escape(text)}</bdi></p>" for title, text in texts),
            f"<p><small><bdi>{html.escape(' · '.join(facts))}</bdi></small></p>",
        ]
    )


def _from(clip: Clip) -> str:
    """Where in its source a clip is from; empty where its row does not say."""
    _, start, end = clip.origin
    return f"{clip.source_id} {clock(start)}–{clock(end)}" if clip.source_id else ""


def audited(opened: Opened) -> str:
    """The cheap items of the audit, as lines of text in HTML."""
    return f"<pre class='audit'>{html.escape(str(audit_rows(opened.rows, len(opened.rows), opened.name)))}</pre>"


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
        status = gr.HTML()
        current = gr.State("")  # the dataset on show: another name may have been typed meanwhile
        found = gr.State([])
        with gr.Tab("Rows"):
            place = gr.Number(1, minimum=1, precision=0, step=1, label="Row, of those that match")
            row = gr.HTML()
        with gr.Tab("Audit"):
            run = gr.Button("Run the audit")
            audit = gr.HTML()

        def opening(wanted: str) -> tuple[Any, ...]:
            """Reads a dataset anew: it may be another one since it was opened last."""
            wanted = wanted.strip()
            open_dataset.cache_clear()
            try:
                opened = open_dataset(wanted, allowed)
            except Exception as error:  # whatever the Hub or a file says is for the person who typed the name
                said = why_not(wanted, error) if wanted else "Type the name of a dataset."
                return "", "", gr.Dropdown(["all"], value="all"), THIRDS[0], html.escape(said), [], gr.Number(1), "", ""
            methods = gr.Dropdown(["all", *methods_of(opened)], value="all")
            return wanted, "", methods, THIRDS[0], *filtering(wanted, "", "all", THIRDS[0]), ""

        def filtering(wanted: str, words: str, method: str, third: str) -> tuple[Any, ...]:
            if not wanted:
                return "", [], gr.Number(1), ""
            opened = open_dataset(wanted, allowed)
            numbers = matching(opened, words, method, third)
            said = f"{len(numbers):,} of {len(opened.rows):,} rows"
            if len(opened.rows) == MAX_ROWS:
                said += f"; only the first {MAX_ROWS:,} are looked at"
            first = shown(opened, numbers[0]) if numbers else "<p>No row matches.</p>"
            return said, numbers, gr.Number(1, maximum=max(1, len(numbers))), first

        def going(wanted: str, numbers: list[int], at: float | None) -> str:
            at = min(max(1, int(at or 1)), len(numbers))
            return shown(open_dataset(wanted, allowed), numbers[at - 1]) if wanted and numbers else ""

        def auditing(wanted: str) -> str:
            return audited(open_dataset(wanted, allowed)) if wanted else "<p>Open a dataset first.</p>"

        everything = [current, words, method, third, status, found, place, row, audit]
        for opens in (button.click, name.submit):
            opens(opening, name, everything)
        for changed in (words.submit, method.input, third.input):
            changed(filtering, [current, words, method, third], [status, found, place, row])
        place.input(going, [current, found, place], row)
        run.click(auditing, current, audit)
        if dataset:
            blocks.load(opening, name, everything)
    return blocks


CSS = """
.clips { display: flex; gap: .75rem; overflow-x: auto }
.clips figure { margin: 0; flex: 0 0 220px; overflow-wrap: anywhere }
.audit, bdi { white-space: pre-wrap; overflow-wrap: anywhere }
.clips figcaption { font-size: .8rem; padding: .25rem 0 .5rem }
"""

if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    folders = [str(Path(wanted).resolve())] if wanted and Path(wanted).is_dir() else []
    theme = gr.themes.Default(font="system-ui", font_mono="monospace")  # no font is fetched from elsewhere
    page(wanted).launch(allowed_paths=folders, css=CSS, theme=theme)
