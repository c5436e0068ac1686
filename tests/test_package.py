"""The package as a whole: what it exports, which way its imports point, what its wheel and its pins hold.

The walls are checked on the syntax tree, so an import inside a function or under `TYPE_CHECKING` counts like any other.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import longvpo_hf
from conftest import COLOURS, write_clip
from longvpo_hf.miniature.model import build_model, build_processor

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"

# ------------------------------------------------------------------------------------------------ what is exported

EXPORTS = {
    "Clip": "longvpo_hf.timeline",
    "LongVPOConfig": "longvpo_hf.training.config",
    "LongVPOTrainer": "longvpo_hf.training.trainer",
    "Timeline": "longvpo_hf.timeline",
    "VideoPreference": "longvpo_hf.preference",
    "VideoPreferenceCollator": "longvpo_hf.training.collator",
    "View": "longvpo_hf.timeline",
}


def run_python(program: str, *, cwd: Path, pythonpath: Path | None = None) -> str:
    """What a fresh interpreter prints; an error in it fails the test with its traceback."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_all_is_exactly_this() -> None:
    assert sorted(longvpo_hf.__all__) == sorted([*EXPORTS, "__version__"])
    assert set(longvpo_hf.__all__) <= set(dir(longvpo_hf))


@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_export_is_the_module_s_own(name: str) -> None:
    exported = getattr(longvpo_hf, name)
    assert exported is getattr(importlib.import_module(EXPORTS[name]), name)
    assert exported.__module__ == EXPORTS[name]


def test_unknown_attribute_fails_as_in_any_module() -> None:
    with pytest.raises(AttributeError, match=r"^module 'longvpo_hf' has no attribute 'LongVPO'$"):
        _ = longvpo_hf.LongVPO
    with pytest.raises(ImportError, match=r"^cannot import name 'LongVPO' from 'longvpo_hf' \("):
        exec("from longvpo_hf import LongVPO")


#: What is slow to import: 40 milliseconds (tqdm) to 2 seconds (torch).
HEAVY = (
    *("torch", "torchvision", "torchcodec", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub"),
    *("numpy", "pyarrow", "PIL", "matplotlib", "tqdm", "httpx2"),
)


def heavy_modules_after(program: str, cwd: Path) -> str:
    """Which modules of `HEAVY` a program has loaded when it ends."""
    program = f"import sys; {program}; print([name for name in {HEAVY} if name in sys.modules])"
    return run_python(program, cwd=cwd, pythonpath=SOURCE)


def test_import_is_light(tmp_path: Path) -> None:
    for program in ("longvpo_hf.__all__, dir(longvpo_hf)", "longvpo_hf.Timeline, longvpo_hf.View"):
        assert heavy_modules_after(f"import longvpo_hf; {program}", tmp_path).strip() == "[]"


@pytest.mark.parametrize(
    "module",
    ["commands.app", "methods.stage1", "methods.stage2", "methods.temporal", "building.captioning", "intake.cutting",
     "intake.media"],
)  # fmt: skip
def test_settings_import_lightly(module: str, tmp_path: Path) -> None:
    """The command line reads its options from the settings in these modules, and shows help at once."""
    assert heavy_modules_after(f"import longvpo_hf.{module}", tmp_path).strip() == "[]"


def test_version_is_the_installed_one() -> None:
    assert longvpo_hf.__version__ == importlib.metadata.version("longvpo-hf")


def test_changelog_names_the_version() -> None:
    assert f"## [{longvpo_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- which way imports point


def imported_modules(path: Path, package_root: Path) -> Iterator[str]:
    """Every module a file imports, in full: `from .frames import x` in the collator gives longvpo_hf.frames.x."""
    package = path.relative_to(package_root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def within(module: str, *names: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


#: The rooms of the package from the ground up: a file imports from its own room and from those its room stands on.
_GROUND = (
    "timeline",
    "errors",
    "paths",
    "public",
    "processes",
    "papers",
    "shipped",
    "hub",
    "artifacts",
    "record",
    "funnel",
    "reasoning",
    "decoding",
    "precision",
)
_ROWS = (*_GROUND, "preference", "captions", "frames")
STANDS_ON: dict[str, tuple[str, ...]] = {
    "timeline": (),
    "errors": (),
    "public": (),
    "papers": (),
    "processes": (),
    "shipped": ("errors",),
    "yaml_file": ("errors",),
    "hub": (),
    "artifacts": ("errors",),
    "record": ("artifacts", "public", "errors"),
    "funnel": ("artifacts", "errors"),
    "paths": ("errors",),
    "reasoning": (),
    "decoding": ("errors",),
    "precision": (),
    "preference": ("timeline", "errors", "artifacts"),
    "captions": ("timeline", "artifacts", "errors", "paths"),
    "frames": ("timeline", "artifacts", "errors"),
    "intake": _ROWS,
    "families": _ROWS,
    "responders": (*_ROWS, "families"),
    "publishing": _ROWS,
    "building": (*_ROWS, "responders", "publishing", "intake"),
    "methods": (*_ROWS, "responders", "building"),
    "training": (*_ROWS, "families", "publishing"),
    "planning": (*_ROWS, "families", "training", "yaml_file"),
    "auditing": (*_ROWS, "intake", "responders", "publishing"),
    "evaluation": (*_ROWS, "families", "responders", "publishing"),
}
#: What stands on top may import everything below; nothing below imports it.
ON_TOP = ("miniature", "launch", "studies", "commands", "model_cards")
DECODERS = ("torchcodec", "torchvision.io", "av", "cv2", "decord", "imageio", "moviepy")


def room_of(module: str) -> str:
    """`longvpo_hf.training.config` is in the room `training`; "" for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "longvpo_hf" and len(parts) > 1 else ""


def walls_broken_by(module: str, imported: list[str]) -> list[str]:
    """One line for each import of `module` (its dotted name) that goes through a wall."""
    standard = (*sys.stdlib_module_names, "__future__")
    room = room_of(module)
    broken = []
    for name in imported:
        other = room_of(name)
        if other and other != room and other != "__version__" and room not in ON_TOP:
            assert room in STANDS_ON, (
                f"{module} is in no room that tests/test_package.py knows: name what {room} stands on"
            )
            if other not in STANDS_ON[room]:
                broken.append(f"{module} imports {name}: {room} stands on {', '.join(STANDS_ON[room]) or 'nothing'}")
        if room != "frames" and within(name, *DECODERS) and not within(name, "torchcodec.encoders"):
            broken.append(f"{module} imports {name}: only frames.py decodes")
        if room == "timeline" and not within(name, *standard):
            broken.append(f"{module} imports {name}: timelines are pure Python")
    return broken


def product_files() -> list[Path]:
    return sorted((SOURCE / "longvpo_hf").rglob("*.py"))


def module_name(path: Path, package_root: Path) -> str:
    parts = path.relative_to(package_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_import_goes_through_a_wall(path: Path) -> None:
    imported = list(imported_modules(path, SOURCE))
    if path == SOURCE / "longvpo_hf" / "__init__.py":
        assert {name.rpartition(".")[0] for name in imported if within(name, "longvpo_hf")} == set(EXPORTS.values())
        return
    assert walls_broken_by(module_name(path, SOURCE), imported) == []


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("methods/stage1.py", "from longvpo_hf.training.config import LongVPOConfig", "methods stands on"),
        ("methods/stage1.py", "from ..training import trainer", "methods stands on"),
        ("building/__init__.py", "from ..training import collator", "building stands on"),
        ("building/engine.py", "from longvpo_hf.methods import stage1", "building stands on"),
        ("training/trainer.py", "from longvpo_hf import building", "training stands on"),
        ("training/collator.py", "def f():\n    import longvpo_hf.responders.local", "training stands on"),
        ("training/trainer.py", "import importlib\nimportlib.import_module('longvpo_hf.intake')", "training stands on"),
        ("training/collator.py", "from torchcodec.decoders import VideoDecoder", "only frames.py decodes"),
        ("intake/local.py", "import torchcodec", "only frames.py decodes"),
        ("intake/local.py", "from torchvision.io import read_video", "only frames.py decodes"),
        ("evaluation/needle.py", "from torchcodec.encoders import VideoEncoder\nimport cv2", "only frames.py decodes"),
        ("training/trainer.py", "from ..miniature.world import World", "training stands on"),
        ("timeline.py", "import numpy", "pure Python"),
        ("timeline.py", "from .preference import VideoPreference", "timeline stands on nothing"),
        ("preference.py", "from .frames import sample", "preference stands on"),
        ("frames.py", "from .training.collator import x", "frames stands on"),
    ],
)
def test_each_wall_can_be_run_into(tmp_path: Path, file: str, line: str, reason: str) -> None:
    path = tmp_path / "longvpo_hf" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import math\n{line}\n", encoding="utf-8")
    broken = walls_broken_by(module_name(path, tmp_path), list(imported_modules(path, tmp_path)))
    assert any(reason in line for line in broken)


def script_files() -> list[Path]:
    return sorted(path for folder in ("recipes", "dataset_scripts") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", script_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_outside_the_package_keep_to_the_walls(path: Path) -> None:
    """They do not decode, and import nothing of their own folders: what they share is in the package."""
    siblings = {path.stem for path in script_files()} | {"recipes", "dataset_scripts"}
    imported = list(imported_modules(path, ROOT))
    assert [name for name in imported if within(name, *DECODERS) and not within(name, "torchcodec.encoders")] == []
    assert [name for name in imported if name.partition(".")[0] in siblings] == []


# ------------------------------------------------------------------------------------------------- pins and addresses

PIN = re.compile(r"^([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9][0-9a-z.]*)(?: ; (.+?))? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")
CONSTRAINTS = ROOT / "constraints.txt"


def pins_here() -> dict[str, str]:
    """Name -> version of the constraints that hold on this machine."""
    environment = default_environment()
    pins: dict[str, str] = {}
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.startswith((" ", "#")):
            continue
        requirement = Requirement(line.removesuffix(" \\"))
        if requirement.marker is None or requirement.marker.evaluate(dict(environment)):
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"constraints.txt pins {name} twice for this machine"
            (specifier,) = requirement.specifier
            pins[name] = specifier.version
    return pins


@pytest.mark.parametrize("path", ["constraints.txt", "scripts/uv.txt"])
def test_every_constraint_is_an_exact_pin_with_its_hashes(path: str) -> None:
    *lines, seal = (ROOT / path).read_text(encoding="utf-8").splitlines(keepends=True)
    kinds = ["pin" if PIN.match(line) else "hash" if HASH.match(line) else line for line in lines]
    assert [kind for kind in kinds if kind not in ("pin", "hash")] == []
    followed = [after for before, after in itertools.pairwise([*kinds, "pin"]) if before == "pin"]
    assert set(followed) == {"hash"}, "a pin without a hash"
    # `make lock` writes it: a hash that somebody changed by hand, or in a merge, is noticed here.
    assert seal == f"# sealed {hashlib.sha256(''.join(lines).encode()).hexdigest()}\n"


def test_constraints_are_what_is_installed() -> None:
    pins = pins_here()
    assert len(pins) > 50
    installed = {
        canonicalize_name(distribution.metadata["Name"]): distribution.version
        for distribution in importlib.metadata.distributions()
    }
    # A local part such as +cpu is another build than the one pinned, and counts as different. Packages that somebody
    # added (deepspeed, a tracker) are not ours to pin.
    different = {name: (installed[name], pin) for name, pin in pins.items() if installed.get(name, pin) != pin}
    assert different == {}, "package: (installed, pinned); repeat the resolution in CONTRIBUTING.md or make .venv anew"
    assert set(pins) - set(installed) == set(), "pinned and not installed: run make setup"


def test_every_direct_dependency_is_pinned() -> None:
    requirements = [Requirement(text) for text in importlib.metadata.requires("longvpo-hf") or []]
    pins = pins_here()
    assert {canonicalize_name(requirement.name) for requirement in requirements} <= set(pins)
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), requirement


# Written so that this file does not hold what it looks for.
REGISTRY = re.compile(
    r"pypi\.(?:org|python\.org)|files\.pythonhosted\.|download\.pytorch\.org|pypi\.nvidia\.|https?://\S+/simple\b|"
    r"--(?:extra-)?index-url|\[\[tool\.uv\.index\]",
    re.IGNORECASE,
)
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:home|root|Users|work|mnt|opt(?!/homebrew))/\w")


def committed_files() -> list[Path]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize(
    ("pattern", "what"),
    [(REGISTRY, "a registry's address"), (MACHINE_PATH, "a machine's path")],
    ids=["registry", "machine-path"],
)
def test_committed_files_name_no(pattern: re.Pattern[str], what: str) -> None:
    files = committed_files()
    assert ROOT / "pyproject.toml" in files
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and videos
        for number, line in enumerate(text.splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == [], f"these lines hold {what}"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (REGISTRY, "https://" + "pypi." + "org/project/longvpo-hf"),
        (REGISTRY, "index = https://" + "mirror.example/simple"),
        (REGISTRY, "pip install --index" + "-url x"),
        (MACHINE_PATH, 'path = "' + "/ho" + 'me/someone/video.mp4"'),
        (MACHINE_PATH, "see " + "/wo" + "rk/data"),
    ],
)
def test_the_patterns_find(pattern: re.Pattern[str], text: str) -> None:
    assert pattern.search(text)


@pytest.mark.parametrize(
    "text", ["https://arxiv.org/abs/2602.02341", "a/wo" + "rk/b", "~/wo" + "rk/c", "/opt/homebrew/lib"]
)
def test_the_patterns_leave_alone(text: str) -> None:
    assert not REGISTRY.search(text)
    assert not MACHINE_PATH.search(text)


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their bare names: of two that share one, the second is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_lock_file_is_committed() -> None:
    assert [path.name for path in committed_files() if path.name == "uv.lock"] == []


# --------------------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the hatchling of this environment: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    result = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    assert path.name == f"longvpo_hf-{longvpo_hf.__version__}-py3-none-any.whl"
    return path


def test_wheel_holds_the_whole_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"longvpo_hf-{longvpo_hf.__version__}.dist-info/entry_points.txt").decode()
    sources = {str(path.relative_to(SOURCE)) for path in product_files()}
    assert sources <= names
    assert {"longvpo_hf/py.typed", "longvpo_hf/skills/longvpo/SKILL.md"} <= names
    assert {f"longvpo_hf/publishing/inspect_page/page.{kind}" for kind in ("html", "css", "js")} <= names
    assert "longvpo = longvpo_hf.commands.app:main" in entry_points
    assert {name.split("/")[0] for name in names} == {
        "longvpo_hf",
        f"longvpo_hf-{longvpo_hf.__version__}.dist-info",
    }


def test_the_wheel_alone_builds_trains_and_finds_its_tasks(wheel: Path, tmp_path: Path) -> None:
    """Every command that a user types after `pip install`, in a folder far from any checkout."""
    # A pure-Python wheel without a .data folder is installed by unpacking it; unlike pip's --target this needs no pip.
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if ".data/" in name]
        archive.extractall(target)
    videos = tmp_path / "videos"
    for number, colour in enumerate(COLOURS.values()):
        write_clip(videos / f"{number}.mp4", colour)

    def longvpo(*commands: list[str], then: str = "") -> str:
        lines = ["import sys", "from longvpo_hf.commands.app import main"]
        for words in commands:  # in one interpreter: torch is loaded once
            lines += [
                f"sys.argv = ['longvpo', *{words}]",
                "try: main()",
                "except SystemExit as e: assert not e.code, e",
            ]
        # The editable installation of this environment is still there, but behind PYTHONPATH.
        return run_python("\n".join([*lines, then]), cwd=tmp_path, pythonpath=target)

    processor = build_processor()
    for part in (processor, build_model(processor, seed=0)):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "study.yaml").write_text(
        "base: base\nvideos: {corpus: videofolder, source: videos, responder: scripted}\n"
        "steps:\n- {build: stage1, num_rows: 4, max_clips: 3}\n"
        "- {train: stage1, config: miniature/stage1, max_steps: 1}\n",
        encoding="utf-8",
    )
    longvpo(["run", "study.yaml", "--output", "m"])
    assert (tmp_path / "m" / "stage1-rows" / "train.parquet").is_file()
    assert (tmp_path / "m" / "stage1-model" / "model.safetensors").is_file()
    assert (tmp_path / "m" / "report.html").is_file()
    said = longvpo(
        ["check", "--rows", "m/stage1-rows"],
        ["configs"],
        ["run", "miniature", "--dry-run"],
        ["eval", "--tasks-dir"],
        then="from longvpo_hf import LongVPOTrainer; print(sys.modules[LongVPOTrainer.__module__].__file__)",
    )
    assert "rows can be trained on" in said
    assert "internvl3_8b/stage1_lora" in said
    assert "Nothing is missing" in said
    tasks, trainer = said.splitlines()[-2:]
    assert (Path(tasks) / "longvpo.yaml").is_file()
    assert trainer == str(target / "longvpo_hf" / "training" / "trainer.py")


@pytest.mark.skipif(
    not os.environ.get("LONGVPO_TEST_EMPTY_VENV"),
    reason="installs some 6 GB from the package index: run `make wheel`, which sets LONGVPO_TEST_EMPTY_VENV=1",
)
def test_trainer_imports_from_the_wheel_in_an_empty_venv(wheel: Path, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    for command in (
        ["uv", "venv", "--python", sys.executable, str(tmp_path / "venv")],
        ["uv", "pip", "install", "--python", str(python), "--constraint", str(CONSTRAINTS), str(wheel)],
        [str(python), "-I", "-c", "from longvpo_hf import *; print(LongVPOTrainer.__mro__[1])"],
        [str(tmp_path / "venv" / "bin" / "longvpo"), "--help"],
    ):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
