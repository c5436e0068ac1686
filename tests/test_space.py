"""The Space in a browser: a dataset opens, its spans play, filters work, what a row says is text."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chromium import Chromium
from longvpo_hf.preference import Provenance, VideoPreference
from longvpo_hf.publishing.dataset import DatasetWriter
from longvpo_hf.record import DatasetRecord

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script> What?"


@pytest.fixture
def address(tmp_path: Path, preferences: list[VideoPreference]) -> Iterator[str]:
    """Where the Space serves ten rows: one hostile, one of another method, one without clips, one without a file."""
    rows = [replace(row, provenance=Provenance(method="one")) for row in preferences]
    rows[0] = replace(rows[0], question=HOSTILE, id="")
    rows[1] = replace(rows[1], provenance=Provenance(method="other"), id="")
    with DatasetWriter(tmp_path / "rows") as writer:
        for row in rows:
            writer.add(row)
        writer.write_record(DatasetRecord("Rows"))
    table = pq.read_table(tmp_path / "rows" / "train.parquet")
    no_clips = table.slice(0, 1).to_pylist()[0] | {"id": "no clips", "clips": []}
    other = table.slice(2, 1).to_pylist()[0]
    other["clips"][0]["file_name"] = "clips/gone.mp4"
    table = pa.concat_tables([table, pa.Table.from_pylist([no_clips, other], schema=table.schema)])
    pq.write_table(table, tmp_path / "rows" / "train.parquet")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "127.0.0.1"}
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "docs/space/app.py", str(tmp_path / "rows")],
        cwd=ROOT,
        env={**os.environ, **settings, "PYTHONPATH": paths},
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
