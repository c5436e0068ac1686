"""What the system says of its disks is one sentence of advice, whichever library says it; defects are not."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli import longvpo
from longvpo_hf.errors import DatasetError, StorageError, advice, check_machine, storage_error
from longvpo_hf.frames.opening import Source
from longvpo_hf.timeline import Clip

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EFBIG, errno.ENOTDIR)


@pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])
def test_a_refusal_is_one_sentence_with_its_remedy(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, advice("longvpo build stage1", "The same command goes on."):
        raise OSError(code, os.strerror(code), "/somewhere/train.parquet")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"longvpo build stage1: /somewhere/train.parquet: {os.strerror(code)}. ")
    assert said.endswith(". The same command goes on.\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("where", ["/proc/no/such", "FILE/a", "FILE/a/b"])
@pytest.mark.parametrize(
    "command",
    [
        "build stage1 --corpus videofolder --source FOLDER --responder scripted --output OUT/out",
        "configs copy internvl3_8b/stage1_full OUT/my.yaml",
        "run miniature --output OUT/run",
    ],
    ids=lambda command: command.partition(" ")[0],
)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_place_where_no_folder_can_be_is_refused(command: str, where: str, tmp_path: Path) -> None:
    """Caught: `FileNotFoundError` and `FileExistsError` of `mkdir`, no refusals of a disk, were tracebacks."""
    (tmp_path / "file").touch()
    (tmp_path / "videos").mkdir()
    for name, value in {"OUT": where, "FILE": str(tmp_path / "file"), "FOLDER": str(tmp_path / "videos")}.items():
        command = command.replace(name, value)
    result = longvpo(command.split())
    assert result.exit_code == 2
    assert "ame another place." in result.stderr


def test_what_caused_an_error_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("while generating the dataset")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SystemExit), advice("x"):
        raise error
    assert "No space left on device. Free some space" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "no"), ValueError("x"), OSError("x"), ConnectionError(111, "x")]
)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert storage_error(error) is None
    with pytest.raises(type(error)), advice("x"):
        raise error


def test_what_is_advice_already_stays() -> None:
    error = DatasetError("No space left on device, says a row's text.")
    assert storage_error(error) is None


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
from longvpo_hf.errors import advice
with advice("x", "Go on."):
    exec(sys.argv[1])
"""
#: Writers that the kernel stops in the middle of a file; each has exceptions of its own.
WRITERS = {
    "python": "open('f', 'wb').write(b'0' * 9999)",
    "numpy": "import numpy; numpy.save('f.npy', numpy.zeros(9999))",
    "parquet": "import pyarrow, pyarrow.parquet as pq; pq.write_table(pyarrow.table({'a': list(range(9999))}), 'f')",
    "torch": "import torch; torch.save(torch.zeros(9999), 'f.pt')",
    "safetensors": "import safetensors.torch, torch; safetensors.torch.save_file({'a': torch.zeros(9999)}, 'f')",
    "sqlite": "import sqlite3; d = sqlite3.connect('f'); d.execute('create table t (a)'); "
    "d.execute('insert into t values (zeroblob(99999))'); d.commit()",
    "copy": "import shutil, sys; shutil.copyfile(sys.executable, 'f')",
    "datasets": "from datasets import Dataset; Dataset.from_list([{'a': 'b' * 9999}] * 9).save_to_disk('d')",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_library_that_writes_is_understood(tmp_path: Path, writer: str) -> None:
    command = [sys.executable, "-c", LIMITED, WRITERS[writer]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().endswith(" Go on."), result.stderr


# -------------------------------------------------------------------------------------------- what is read, not written


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process may open no further file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_video_is_not_dropped_because_the_machine_is_out_of_files(clips: dict[str, Clip]) -> None:
    with pytest.raises(StorageError, match=r"Too many open files\. Raise the limit"), no_more_files():
        Source(clips["red"].path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ESTALE])
def test_what_is_of_the_machine_is_told_from_what_is_of_a_file(code: int) -> None:
    for error in (OSError(code, os.strerror(code)), RuntimeError(f"Could not open input file: {os.strerror(code)}")):
        with pytest.raises(StorageError):
            check_machine(error)
    for of_a_file in (OSError(errno.EIO, "x"), FileNotFoundError(2, "x"), ValueError("moov atom not found")):
        check_machine(of_a_file)
