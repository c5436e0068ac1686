"""Children end with their parent: after SIGTERM, SIGKILL and Ctrl-C, in pools that cut clips and in dataloaders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

if not Path("/proc").is_dir():
    pytest.skip("looks at processes through /proc", allow_module_level=True)

POOL = """
import time
from pathlib import Path
from longvpo_hf.processes import workers

def work(path):
    import os
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    import sys
    with workers(2) as pool:
        for number in range(4):
            pool.submit(work, f"{sys.argv[1]}/{number}")
        time.sleep(60)
"""

LOADER = """
import os, sys, time
from pathlib import Path
from torch.utils.data import DataLoader
from longvpo_hf.processes import end_with_parent

def collate(rows):
    end_with_parent()
    Path(f"{sys.argv[1]}/{rows[0]}").write_text(str(os.getpid()))
    return rows

if __name__ == "__main__":
    loader = DataLoader(range(4), batch_size=1, num_workers=2, collate_fn=collate, persistent_workers=True)
    for batch in loader:
        pass
    time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # dead; nobody has asked for its exit status yet


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Programs started within heed Ctrl-C; those of a shell's background job, as of `nohup`, would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("program", [POOL, LOADER], ids=["pool", "dataloader"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda sent: sent.name)
def test_no_child_outlives_its_parent(tmp_path: Path, program: str, sent: signal.Signals) -> None:
    script = tmp_path / "program.py"
    script.write_text(program)
    pids = tmp_path / "pids"
    pids.mkdir()
    parent = subprocess.Popen(
        [sys.executable, str(script), str(pids)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
            assert parent.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)  # the last number is being written
        children = {int(path.read_text()) for path in pids.iterdir()}
        assert len(children) >= 1
        assert all(is_running(child) for child in children)
        if sent == signal.SIGINT:  # as a terminal does: to all of them
            os.killpg(parent.pid, sent)
        else:
            parent.send_signal(sent)
        parent.wait(timeout=30)
        deadline = time.monotonic() + 30
        while any(is_running(child) for child in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [child for child in children if is_running(child)] == []
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)


def test_an_error_does_not_wait_for_work_of_no_use_any_more(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(POOL.rstrip().removesuffix("time.sleep(60)") + "raise ValueError('seen')\n")
    (tmp_path / "pids").mkdir()
    # Each of the four pieces takes a minute: the time-out is what can fail.
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "pids")], capture_output=True, text=True, timeout=50, check=False
    )
    assert "ValueError: seen" in ended.stderr
