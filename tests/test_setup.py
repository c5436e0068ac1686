"""scripts/setup.sh on machines that lack something, with every outside command replaced by a script that writes a log.

The PATH holds nothing but those scripts and a handful of real tools, so no network, package manager or installed FFmpeg
of the machine running the tests is ever seen.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REAL_TOOLS = ("sh", "cat", "chmod", "cksum", "dirname", "grep", "ls", "mkdir", "rm", "touch")
COPIED = ("pyproject.toml", "constraints.txt", "scripts/uv.txt", "scripts/setup.sh", "src/longvpo_hf/__init__.py")

# What `.venv/bin/python` answers; the script is told apart by the text of the program it is given.
VENV_PYTHON = """\
case "${2:-}$(cat)" in
    *version_info*) exit 0 ;;
    *ctypes*) [ -e "$STATE/ffmpeg" ] ;;
    *VideoDecoder*) [ ! -e "$STATE/torchcodec-broken" ] ;;
    *) echo "unexpected program" >&2; exit 99 ;;
esac
"""
UV = """\
case "$1" in
    --version) echo "uv 1.2.3" ;;
    venv)
        [ ! -e "$STATE/no-python" ] || { echo "error: No interpreter found" >&2; exit 2; }
        mkdir -p .venv/bin && cat "$STATE/venv-python" >.venv/bin/python && chmod +x .venv/bin/python ;;
    pip) [ ! -e "$STATE/no-index" ] || { echo "error: no index" >&2; exit 2; } ;;
esac
"""
APT_GET = """\
case "$*" in
    install*ffmpeg) touch "$STATE/ffmpeg" ;;
    install*python3-venv) touch "$STATE/venv-module" ;;
esac
"""
# A Python without uv: `-m venv` and `-m pip` work as the state says.
PYTHON3 = """\
case "$*" in
    "-m venv .venv-uv")
        [ -e "$STATE/venv-module" ] || { echo "ensurepip is not available" >&2; mkdir -p .venv-uv; exit 1; }
        mkdir -p .venv-uv/bin && cat "$STATE/venv-uv-python" >.venv-uv/bin/python && chmod +x .venv-uv/bin/python ;;
    "-m pip --version") [ -e "$STATE/pip" ] ;;
    "-m pip install --target .venv-uv --quiet --only-binary :all: --require-hashes --requirement scripts/uv.txt")
        mkdir -p .venv-uv/bin && cat "$STATE/uv" >.venv-uv/bin/uv && chmod +x .venv-uv/bin/uv ;;
    *) echo "error: externally-managed-environment" >&2; exit 1 ;;
esac
"""
VENV_UV_PYTHON = """\
cat "$STATE/uv" >.venv-uv/bin/uv && chmod +x .venv-uv/bin/uv
"""


@dataclass
class Machine:
    """A folder with a checkout, a PATH of its own, and a log of what was called."""

    folder: Path

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    def script(self, path: Path, name: str, body: str) -> None:
        text = f'#!/bin/sh\nSTATE={self.folder}/state\necho "{name} $*" >>{self.folder}/log\n{body}'
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def has(self, name: str, body: str = "") -> None:
        """Puts a command on the PATH."""
        self.script(self.folder / "bin" / name, name, body)

    def lacks(self, name: str) -> None:
        (self.folder / "bin" / name).unlink()

    def state(self, name: str) -> None:
        (self.folder / "state" / name).touch()

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the set-up; the log starts empty."""
        (self.folder / "log").write_text("", encoding="utf-8")
        return subprocess.run(
            [str(self.folder / "bin" / "sh"), "scripts/setup.sh"],
            cwd=self.checkout,
            env={"PATH": str(self.folder / "bin"), "HOME": str(self.folder), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return (self.folder / "log").read_text(encoding="utf-8").splitlines()

    def installed(self) -> bool:
        return any(call.startswith("uv pip install") for call in self.calls)


def make_machine(folder: Path, *, root: bool, ffmpeg: bool) -> Machine:
    machine = Machine(folder)
    for name in ("bin", "state", "checkout"):
        (folder / name).mkdir()
    for name in COPIED:
        target = machine.checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    for tool in REAL_TOOLS:
        found = shutil.which(tool)
        assert found is not None, f"the test machine has no {tool}"
        os.symlink(found, folder / "bin" / tool)
    machine.has("id", f"echo {0 if root else 1000}")
    machine.has("uv", UV)
    machine.script(folder / "state" / "uv", ".venv-uv/bin/uv", UV)
    machine.script(folder / "state" / "venv-python", ".venv/bin/python", VENV_PYTHON)
    machine.script(folder / "state" / "venv-uv-python", ".venv-uv/bin/python", VENV_UV_PYTHON)
    if ffmpeg:
        machine.state("ffmpeg")
    return machine


@pytest.fixture
def user(tmp_path: Path) -> Machine:
    """Somebody who is not root, with uv and FFmpeg."""
    return make_machine(tmp_path, root=False, ffmpeg=True)


def commands_to_type(result: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^    (\S.*)$", result.stderr, flags=re.MULTILINE)


def test_complete_machine_is_set_up_once(user: Machine) -> None:
    first = user.setup()
    assert first.returncode == 0, first.stderr
    assert user.installed()
    dependencies, package = (call for call in user.calls if call.startswith("uv pip install"))
    assert "--require-hashes --only-binary :all:" in dependencies
    assert dependencies.endswith("--requirement constraints.txt")
    assert package.endswith("--no-deps --build-constraint constraints.txt --editable .")
    assert "done. Try: uv run longvpo run miniature" in first.stdout

    second = user.setup()
    assert second.returncode == 0, second.stderr
    assert second.stdout == ""
    # Nothing but questions about what is there: no installation, no new environment.
    assert {call.split()[0] for call in user.calls} == {"uv", ".venv/bin/python"}
    assert [call for call in user.calls if call.startswith("uv")] == ["uv --version"]


@pytest.mark.parametrize("name", COPIED)
def test_change_of_an_input_installs_again(user: Machine, name: str) -> None:
    assert user.setup().returncode == 0
    path = user.checkout / name
    text = path.read_text(encoding="utf-8")
    if name.endswith("__init__.py"):  # only its version counts
        path.write_text(text + "\n# more\n", encoding="utf-8")
        assert user.setup().returncode == 0
        assert not user.installed()
        changed = re.sub(r'^__version__ = ".*"', '__version__ = "9.9.9"', text, flags=re.MULTILINE)
    else:
        changed = text + "\n# more\n"
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    assert user.setup().returncode == 0
    assert user.installed()


def test_moved_checkout_installs_again(user: Machine) -> None:
    assert user.setup().returncode == 0
    moved = user.folder / "elsewhere"
    user.checkout.rename(moved)
    user.checkout.symlink_to(moved)  # the real path counts: the scripts in .venv/bin name it
    assert user.setup().returncode == 0
    assert user.installed()


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        ("apt-get", "sudo apt-get update && sudo apt-get install -y --no-install-recommends ffmpeg"),
        ("dnf", "sudo dnf install -y ffmpeg-free"),
        ("brew", "brew install ffmpeg"),
        ("conda", "conda install -y -c conda-forge ffmpeg"),
    ],
)
def test_missing_ffmpeg_without_root_names_one_command(tmp_path: Path, manager: str, command: str) -> None:
    machine = make_machine(tmp_path, root=False, ffmpeg=False)
    machine.has(manager)
    result = machine.setup()
    assert result.returncode == 1
    assert commands_to_type(result) == [command]
    assert "FFmpeg's shared libraries (version 4 to 9) are missing" in result.stderr
    assert not machine.installed()
    assert not any(call.startswith(manager) for call in machine.calls), "only the person may call it"


def test_missing_ffmpeg_without_any_manager_says_what_is_missing(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, root=False, ffmpeg=False)
    result = machine.setup()
    assert result.returncode == 1
    assert result.stderr.count("FFmpeg's shared libraries") == 1
    assert commands_to_type(result) == []


def test_missing_ffmpeg_as_root_on_debian_is_installed(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, root=True, ffmpeg=False)
    machine.has("apt-get", APT_GET)
    result = machine.setup()
    assert result.returncode == 0, result.stderr
    assert [call for call in machine.calls if call.startswith("apt-get")] == [
        "apt-get update",
        "apt-get install -y --no-install-recommends ffmpeg",
    ]
    assert machine.installed()


def test_missing_ffmpeg_as_root_where_apt_fails_names_the_command(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, root=True, ffmpeg=False)
    machine.has("apt-get", "exit 100\n")
    result = machine.setup()
    assert result.returncode == 1
    assert commands_to_type(result) == ["apt-get update && apt-get install -y --no-install-recommends ffmpeg"]


def test_ffmpeg_removed_later_is_noticed(user: Machine) -> None:
    assert user.setup().returncode == 0
    (user.folder / "state" / "ffmpeg").unlink()
    user.has("dnf")
    result = user.setup()
    assert commands_to_type(result) == ["sudo dnf install -y ffmpeg-free"]


def test_conda_s_ffmpeg_is_used_through_conda_s_python(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, root=False, ffmpeg=False)
    conda = tmp_path / "conda"
    conda.joinpath("lib").mkdir(parents=True)
    conda.joinpath("lib", "libavcodec.so.61").touch()
    # The environment's own Python finds the libraries beside it.
    machine.has("uv", f'case "$*" in *{conda}/bin/python*) touch "$STATE/ffmpeg" ;; esac\n{UV}')
    result = machine.setup(CONDA_PREFIX=str(conda))
    assert result.returncode == 0, result.stderr
    assert f"uv venv --quiet --clear --python {conda}/bin/python .venv" in machine.calls
    assert machine.installed()


@pytest.mark.parametrize("uv_state", ["absent", "broken"])
def test_uv_comes_through_a_small_venv(user: Machine, uv_state: str) -> None:
    if uv_state == "absent":
        user.lacks("uv")
    else:
        user.has("uv", "echo 'no such version' >&2; exit 127\n")  # a version manager's empty shim
    user.has("python3", PYTHON3)
    user.state("venv-module")
    result = user.setup()
    assert result.returncode == 0, result.stderr
    assert any(call.startswith(".venv-uv/bin/uv pip install") for call in user.calls)
    assert not any(call.startswith("python3 -m pip install") for call in user.calls), (
        "the machine's own Python is left alone"
    )
    assert "done. Try: .venv/bin/longvpo run miniature" in result.stdout
    assert user.setup().stdout == "", "the second run finds the bootstrapped uv"


def test_uv_comes_through_pip_where_there_is_no_venv_module(user: Machine) -> None:
    user.lacks("uv")
    user.has("python3", PYTHON3)
    user.state("pip")
    result = user.setup()
    assert result.returncode == 0, result.stderr
    (install,) = (call for call in user.calls if call.startswith("python3 -m pip install"))
    assert install.endswith(
        "--target .venv-uv --quiet --only-binary :all: --require-hashes --requirement scripts/uv.txt"
    )


def test_neither_venv_nor_pip_names_one_command(user: Machine) -> None:
    user.lacks("uv")
    user.has("python3", PYTHON3)
    user.has("apt-get", APT_GET)
    result = user.setup()
    assert result.returncode == 1
    assert commands_to_type(result) == [
        "sudo apt-get update && sudo apt-get install -y --no-install-recommends python3-venv"
    ]
    assert not any(call.startswith("apt-get") for call in user.calls)


def test_neither_venv_nor_pip_is_repaired_as_root_on_debian(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, root=True, ffmpeg=True)
    machine.lacks("uv")
    machine.has("python3", PYTHON3)
    machine.has("apt-get", APT_GET)
    result = machine.setup()
    assert result.returncode == 0, result.stderr
    assert "apt-get install -y --no-install-recommends python3-venv" in machine.calls


def test_no_python_at_all_names_one_command(user: Machine) -> None:
    user.lacks("uv")
    user.has("dnf")
    result = user.setup()
    assert result.returncode == 1
    assert commands_to_type(result) == ["sudo dnf install -y python3-pip"]


def test_python_too_old_and_none_to_fetch_is_said(user: Machine) -> None:
    user.state("no-python")
    result = user.setup()
    assert result.returncode == 1
    assert "no Python >=3.11,<3.15 was found" in result.stderr
    assert commands_to_type(result) == ["uv python install 3.12"]
    assert not user.installed()


def test_failed_installation_is_tried_again_next_time(user: Machine) -> None:
    user.state("no-index")
    result = user.setup()
    assert result.returncode == 1
    assert "the dependencies could not be installed" in result.stderr
    (user.folder / "state" / "no-index").unlink()
    assert user.setup().returncode == 0
    assert user.installed()


def test_failed_change_does_not_leave_the_old_stamp(user: Machine) -> None:
    assert user.setup().returncode == 0
    constraints = user.checkout / "constraints.txt"
    before = constraints.read_text(encoding="utf-8")
    constraints.write_text(before + "more==1\n", encoding="utf-8")
    user.state("no-index")
    assert user.setup().returncode == 1
    # Back to the first state: .venv may now hold a part of the second.
    constraints.write_text(before, encoding="utf-8")
    (user.folder / "state" / "no-index").unlink()
    assert user.setup().returncode == 0
    assert user.installed()


def test_torchcodec_that_does_not_work_is_said(user: Machine) -> None:
    user.state("torchcodec-broken")
    result = user.setup()
    assert result.returncode == 1
    assert "torchcodec cannot write and read a video" in result.stderr
