"""The Space in a browser: a dataset opens, its spans play, filters work, what a row says is text."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chromium import Chromium
from hub_double import HubDouble, Repository
from longvpo_hf.preference import Message, Provenance, VideoPreference
from longvpo_hf.publishing.dataset import DatasetWriter
from longvpo_hf.record import DatasetRecord
from longvpo_hf.timeline import Clip, Timeline

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script> What?"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubDouble]:
    with HubDouble() as hub:
        yield hub


@pytest.fixture(scope="module")
def address(
    tmp_path_factory: pytest.TempPathFactory, preferences: list[VideoPreference], hub: HubDouble
) -> Iterator[str]:
    """Where the Space serves the Hub's double, and a folder.

    Of the folder's ten rows one is hostile, one of another method, one without clips and one without a file.
    """
    folder = tmp_path_factory.mktemp("space")
    rows = [replace(row, provenance=Provenance(method="one")) for row in preferences]
    rows[0] = replace(rows[0], question=HOSTILE, id="")
    rows[1] = replace(rows[1], provenance=Provenance(method="other"), id="")
    table = pq.read_table(write(folder / "rows", rows) / "train.parquet")
    no_clips = table.slice(0, 1).to_pylist()[0] | {"id": "no clips", "clips": []}
    other = table.slice(2, 1).to_pylist()[0]
    other["clips"][0]["file_name"] = "clips/gone.mp4"
    table = pa.concat_tables([table, pa.Table.from_pylist([no_clips, other], schema=table.schema)])
    pq.write_table(table, folder / "rows" / "train.parquet")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "docs/space/app.py", str(folder / "rows")],
        cwd=ROOT,
        env={**hub.environment(folder / "hf"), **settings, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            assert process.poll() is None, "the Space has ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.kill()
        process.wait()


def write(folder: Path, rows: Sequence[VideoPreference], media_root: Path | None = None) -> Path:
    with DatasetWriter(folder, media_root) as writer:
        for row in rows:
            writer.add(row)
        writer.write_record(DatasetRecord("Rows"))
    return folder


def test_space(address: str, tmp_path: Path) -> None:
    with Chromium(tmp_path / "profile") as browser:
        browser.size(1200, 900)
        browser.call("Page.navigate", url=address)
        browser.wait("document.querySelectorAll('video').length == 3")
        browser.wait("[...document.querySelectorAll('video')].every(video => video.duration == 4)")
        assert "#t=0,4" in browser.run("document.querySelector('video').src")
        text = browser.run("document.body.innerText")
        assert "10 of 10 rows" in text
        assert HOSTILE in text
        assert "clip 0 · 0:00–0:04 ★ evidence ◆ reference" in text
        assert browser.run("document.title") == "Video preference rows"
        browser.screenshot(tmp_path / "space.png")
        for place, said in ((9, "clips must be a list of at least one clip"), (10, "clips/gone.mp4 is not in")):
            browser.run("document.querySelector('input[type=number]').select()")
            browser.type(str(place))
            browser.wait(f"document.body.innerText.includes({said!r})")
        browser.run("document.querySelectorAll('input, textarea')[1].focus()")
        browser.type("which one")
        browser.press("Enter")
        browser.wait("document.body.innerText.includes('4 of 10 rows')")
        outside = f"{address}gradio_api/file=/etc/passwd"
        assert browser.run(f"fetch('{outside}').then(answer => answer.status)") == 403


def publish(hub: HubDouble, name: str, folder: Path) -> None:
    repository = hub.repositories.setdefault(("dataset", f"someone/{name}"), Repository(private=False))
    files = [path for path in folder.rglob("*") if path.is_file()]
    repository.commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})


class Visitor:
    """Somebody who looks at datasets of the Hub."""

    def __init__(self, browser: Chromium) -> None:
        self._browser = browser

    def opens(self, name: str, then: str) -> str:
        """The page's text once it says `then`."""
        self._browser.run("(field => { field.focus(); field.select() })(document.querySelector('textarea, input'))")
        self._browser.type(name)
        self._browser.run("[...document.querySelectorAll('button')].find(one => one.innerText == 'Open').click()")
        return self.sees(then)

    def goes_to(self, row: int, then: str) -> str:
        self._browser.run("document.querySelector('input[type=number]').select()")
        self._browser.type(str(row))
        return self.sees(then)

    def sees(self, text: str) -> str:
        self._browser.wait(f"document.body.innerText.includes({text!r})")
        found: str = self._browser.run("document.body.innerText")
        return found


def test_datasets_of_the_hub(
    address: str, hub: HubDouble, preferences: list[VideoPreference], clips: dict[str, Clip], tmp_path: Path
) -> None:
    cut = replace(clips["red"], source_id="film.mp4", source_start_seconds=65.0)
    of_film = Timeline((cut, clips["green"], clips["blue"]))
    stage2 = replace(
        preferences[0],
        timeline=of_film,
        evidence=(0, 2),
        reference=(),
        provenance=Provenance(method="longvpo-stage2"),
        context=(Message("system", "Look closely."),),
        id="",
    )
    temporal = replace(stage2, evidence=(1,), provenance=Provenance(method="temporal-localized"), id="")
    publish(hub, "scenes", write(tmp_path / "scenes", [stage2, temporal]))
    root = Path(clips["red"].path).parent
    publish(hub, "reference", write(tmp_path / "reference", preferences, media_root=root))
    bare = write(tmp_path / "bare", preferences)
    table = pq.read_table(bare / "train.parquet")
    rows = table.to_pylist()
    for row in rows:
        row["provenance"] = None
    rows[0]["prompt"][0]["content"] = "Without provenance?"
    rows[1]["clips"][0]["file_name"] = "../../key.mp4"
    rows[2]["clips"] *= 20
    rows[2]["evidence"], rows[2]["reference"] = [59], [58]
    rows[3]["clips"][0]["end_seconds"] = 1e308
    rows[4]["prompt"][0]["content"] = "w" * 500
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), bare / "train.parquet")
    publish(hub, "bare", bare)
    publish(hub, "other", root)  # films, and no rows
    with Chromium(tmp_path / "profile") as browser:
        browser.size(1200, 900)
        browser.call("Page.navigate", url=address)
        browser.wait("document.querySelectorAll('video').length > 0")
        visitor = Visitor(browser)

        text = visitor.opens("someone/scenes", "2 of 2 rows")
        assert "clip 0 · 0:00–0:04 ★ evidence\nfilm.mp4 1:05–1:09" in text
        assert "clip 1 · 0:00–0:04\n" in text
        assert "system Look closely." in text
        assert "longvpo-stage2 · the reference model sees the whole timeline" in text
        browser.wait("document.querySelector('video')?.src.startsWith('" + hub.url + "')")
        browser.wait("[...document.querySelectorAll('video')].every(video => video.duration == 4)")
        assert "clip 1 · 0:00–0:04 ★ evidence" in visitor.goes_to(2, "temporal-localized")

        text = visitor.opens("someone/reference", "these rows come without their media")
        assert "red.mp4 is in the corpus" in text
        assert browser.run("document.querySelectorAll('video').length") == 0

        assert "no method" in visitor.opens("someone/bare", "Without provenance?")
        text = visitor.goes_to(2, "'../../key.mp4' is no file of a dataset.")
        assert str(ROOT) not in text, "nothing of the machine that serves it"
        text = visitor.goes_to(3, "32 of 60 clips, evidence and reference first.")
        assert "clip 58 · 0:00–0:04 ◆ reference" in text
        assert browser.run("document.querySelectorAll('video').length") == 32
        assert min(browser.run("[...document.querySelectorAll('video')].map(one => one.clientWidth)")) > 200
        visitor.goes_to(4, "Row 3 is no preference")
        visitor.goes_to(5, "wwww")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "long words stay on the page"

        # What cannot be opened says why, and leaves nothing of the dataset before it on show.
        for name, said in {
            "someone/absent": "The Hub has no dataset 'someone/absent' that this page may read.",
            "no name <b>at</b> all": "The Hub has no dataset 'no name <b>at</b> all' that this page may read.",
            "someone/other": "someone/other has no train.parquet",
            str(root): "that this page may read",
        }.items():
            text = visitor.opens(name, said)
            assert "wwww" not in text
        # Opened again, it is read again.
        publish(hub, "scenes", write(tmp_path / "more", [stage2, temporal, preferences[0]]))
        visitor.opens("someone/scenes", "3 of 3 rows")
