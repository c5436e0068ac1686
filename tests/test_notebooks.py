"""Every notebook runs from top to bottom on a machine without a GPU or the Hub, and is committed without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted(ROOT.glob("docs/notebooks/*.ipynb"))}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_without_outputs(name: str) -> None:
    nbformat.validate(NOTEBOOKS[name])
    assert all(cell.get("outputs", []) == [] for cell in NOTEBOOKS[name].cells), "clear the outputs before you commit"


def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel, which loads torch once; each begins without names, in an empty folder."""
    assert len(NOTEBOOKS) == 3
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebooks = {name: nbformat.from_dict(notebook) for name, notebook in NOTEBOOKS.items()}
    cells = []
    for name, notebook in notebooks.items():
        (tmp_path / name).mkdir()
        cells += [nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path / name}"), *notebook.cells]
    NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=240, kernel_name="python3").execute()
    for name, notebook in notebooks.items():
        last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
        assert last["outputs"], name
