"""The documentation: its site builds without a broken link, and every command on a page is one that exists."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import longvpo_hf
from cli import longvpo
from longvpo_hf import papers
from longvpo_hf.commands.app import app
from longvpo_hf.launch.arguments import recipe_parser, refuse_unknown

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", *ROOT.glob("src/longvpo_hf/**/SKILL.md")])


def commands(page: Path) -> list[str]:
    """The commands in a page's blocks of shell, each on one line, without comments and without those cut short (…)."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in shell_lines(block)]


def shell_lines(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"\s*[^\s#]", line) and "…" not in line.partition("  #")[0]]


def cases() -> list[tuple[str, str]]:
    return [(str(page.relative_to(ROOT)), command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), cases())
def test_every_command_on_a_page_exists(page: str, command: str) -> None:
    """With its options: a renamed option on a page fails here."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables before a command
        words.pop(0)
    if words[0] in ("python", "uv"):
        words = words[2:] if words[:2] == ["uv", "run"] else words[1:]
    if words[0] == "longvpo":
        if words[1:] and not {"--help", "--version"} & set(words):
            app.parse_args(words[1:], exit_on_error=False, print_error=False)
        if words[1:2] == ["train"]:
            check_recipe([word for word in words[3:] if word != "--cpu"])
    elif re.fullmatch(r"dataset_scripts/\w+\.py", words[0]):
        app.parse_args(["build", Path(words[0]).stem, *words[1:]], exit_on_error=False, print_error=False)
    elif words[:2] == ["accelerate", "launch"]:
        place = next(number for number, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word))
        check_recipe(words[place + 1 :])
        assert (ROOT / words[place]).is_file()
        for option in ("--config_file", "--config"):
            if option in words:
                assert (ROOT / words[words.index(option) + 1]).is_file(), command
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file()


#: Commands that other tests run, as they are or with less to do.
RUN_ELSEWHERE = {
    r"pip install|make ": "CONTRIBUTING.md",
    r"longvpo run miniature": "tests/studies/test_miniature_study.py",
    r"longvpo build stage1 .*--responder scripted": "tests/commands/test_stage1_script.py",
    r"longvpo probe .*--world": "tests/evaluation/test_probes.py",
    r"longvpo check (recipes/\S+|\w+/\w+)(?!.*--rows)": "tests/planning/test_plan.py",
    r"longvpo rows split": "tests/publishing/test_rows.py",
    r"python docs/space/app\.py": "tests/test_space.py",
}
#: Commands that this file runs: see `test_commands_that_need_only_rows_are_run`.
RUN_HERE = r"longvpo (inspect|audit|rows (?!split))(?!.*--embedder)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_run_by_a_test_or_says_what_it_needs(page: Path) -> None:
    for test in RUN_ELSEWHERE.values():
        assert (ROOT / test).is_file()
    run = re.compile("|".join([RUN_HERE, *RUN_ELSEWHERE]))
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if re.match(r"\s*# needs ", block):  # of the whole block
            continue
        for line in shell_lines(block):
            assert run.match(line.strip()) or "# needs " in line, f"neither run nor marked `# needs …`: {line}"


def test_commands_that_need_only_rows_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, films: Path) -> None:
    """On a dozen rows, where the page has thousands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    for method in ("stage1", "stage2"):
        build = f"build {method} --corpus videofolder --responder scripted --num-rows 12 --output data/{method} "
        build += "--cutting windows --min-clip-seconds 1 --max-clip-seconds 2"
        assert longvpo([*build.split(), "--source", str(films)]).exit_code == 0
    for copy in ("data/temporal", "rows"):
        shutil.copytree(tmp_path / "data/stage1", tmp_path / copy)
    typed = dict.fromkeys(" ".join(command.partition("  #")[0].split()) for _, command in cases())
    found = [command for command in typed if re.match(RUN_HERE, command)]
    assert len(found) > 5
    for command in found:
        result = longvpo(shlex.split(command.replace("--num-rows 1000", "--num-rows 1"))[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"


#: Options of other programs that pages, comments and messages name, and of scripts for this repository alone.
OTHERS = {
    "accelerate, torchrun": "config-file cpu fsdp-transformer-layer-cls-to-wrap machine-rank main-process-ip no-python "
    "nproc-per-node num-processes parallelism-config-cp-size parallelism-config-dp-shard-size quiet standalone",
    "hf, uv, sbatch": "array detach find-links flavor local-dir repo-type secrets timeout wait with",
    "lmms-eval, vllm": "gen-kwargs include-path limit-mm-per-prompt log-samples model-args output-path",
    "pip, apt-get": "disable-pip-version-check hash no-deps no-install-recommends only-binary python require-hashes "
    "requirement target",
    "recipes/*.py, benchmarks/*.py": "arms estimate fast only-done seeds work",
}


def options_of(app: Any) -> set[str]:
    """All options of a command and of those below it."""
    arguments = app.assemble_argument_collection() if app.default_command else []
    own = {name for argument in arguments for name in (*argument.names, *argument.negatives)}
    return own.union(*(options_of(app[name]) for name in app if not name.startswith("-")))


def test_every_option_that_a_text_names_exists() -> None:
    """In pages, in the docstrings and errors of the package, and in shipped files; with dashes or underscores."""
    known = options_of(app) | {option for action in recipe_parser()._actions for option in action.option_strings}
    known = {option.replace("_", "-") for option in known} | {"--help", "--version"}
    known |= {f"--{name}" for names in OTHERS.values() for name in names.split()}
    shipped = [
        path for kind in ("recipes/**/*.yaml", "recipes/*.py", "dataset_scripts/*.py") for path in ROOT.glob(kind)
    ]
    unknown = {}
    for path in [*PAGES, *shipped, *ROOT.glob("src/**/*.py"), *ROOT.glob("model_cards/**/*.md")]:
        text = re.sub(r"var\(--[\w-]+\)|--[\w-]+:", "", path.read_text(encoding="utf-8"))  # of CSS
        named = {f"--{name}" for name in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*[a-z0-9])", text)}
        if missing := {option for option in named if option.replace("_", "-") not in known}:
            unknown[str(path.relative_to(ROOT))] = sorted(missing)
    assert {"--max-rounds", "--no-thinking"} <= known
    assert unknown == {}


def check_recipe(words: list[str]) -> None:
    parser = recipe_parser()
    for option in ("--config", "--accelerate_config", "--config_file"):
        if option in words:
            place = words.index(option)
            words = [*words[:place], *words[place + 2 :]]
    _, unknown = parser.parse_known_args(["--dataset_name", "x", *words])
    refuse_unknown(unknown, parser)


def test_links_of_the_repository_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        local = [link for link in links if not re.match(r"[a-z]+:", link)]
        broken += [f"{page.relative_to(ROOT)}: {link}" for link in local if not (page.parent / link).exists()]
    # The site's own first page is the readme.
    assert [line for line in broken if "index.md" not in line] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of its building fails."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_programs_find_every_page(site: Path) -> None:
    listed = re.findall(r"(?m)^- \[[^\]]+\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert len(listed) > 15
    for page in listed:
        assert (site / page / "index.html").is_file(), page


def named_in(code: str) -> set[str]:
    """The names of this package that code imports, dotted."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(code))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "longvpo_hf":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def resolved(name: str) -> Any:
    """What a dotted name stands for; raises AttributeError for none."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:length]))
            for part in parts[length:]:
                found = getattr(found, part)
            return found
    raise AttributeError(name)


def on_the_reference(site: Path) -> set[str]:
    """Dotted names that have a heading on the reference's pages."""
    pages = list((site / "api").rglob("index.html"))
    assert len(pages) == len(list(ROOT.glob("docs/api/*.md")))
    return {name for page in pages for name in re.findall(r'id="(longvpo_hf[\w.]*)"', page.read_text(encoding="utf-8"))}


def test_the_reference_has_what_is_public_and_what_pages_import(site: Path) -> None:
    """By what the names stand for: a page may import one from where it is defined, and another from its package."""
    code = [f"from longvpo_hf import {name}" for name in longvpo_hf.__all__ if name != "__version__"]
    for page in PAGES:
        code += re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for notebook in ROOT.glob("docs/notebooks/*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        code += [re.sub(r"(?m)^[%!].*$", "", source) for source in sources]
    wanted = set().union(*map(named_in, code))
    assert {
        "longvpo_hf.LongVPOTrainer",
        "longvpo_hf.preference.undecoded",
        "longvpo_hf.building.engine.build",
    } <= wanted
    # The world of the demonstration is no part of what people build on.
    wanted = {name for name in wanted if not name.startswith("longvpo_hf.miniature.")}
    shown = [resolved(name) for name in on_the_reference(site)]
    assert sorted(name for name in wanted if not any(resolved(name) is one for one in shown)) == []


def test_nothing_is_on_the_reference_that_does_not_exist(site: Path) -> None:
    """Neither on its built pages nor in their sources: a member that is gone is left out without a word."""
    shown = on_the_reference(site)
    for name in shown:
        resolved(name)
    missing = []
    for page in ROOT.glob("docs/api/*.md"):
        for name, options in re.findall(r"(?m)^::: (\S+)\n((?:    .*\n)*)", page.read_text(encoding="utf-8") + "\n"):
            members = yaml.safe_load(options)["options"].get("members", []) if options else []
            named = [f"{name}.{member}" for member in members] or [name]
            missing += [f"{page.name}: {one}" for one in named if one not in shown]
    assert missing == []


def test_get_started_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, films: Path) -> None:
    """Steps 1 and 2 of the page in an empty folder; its training is what `tests/launch` runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_videos").symlink_to(films, target_is_directory=True)
    page = ROOT / "docs/get_started.md"
    typed = [shlex.split(command) for command in commands(page)]
    for words in [words for words in typed if words[1:2] in (["build"], ["inspect"], ["audit"])][:3]:
        result = longvpo(words[1:])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "rows" / "inspect.html").is_file()
    assert (tmp_path / "rows" / "audit.html").is_file()


@pytest.mark.parametrize("script", sorted([*ROOT.glob("recipes/*.py"), *ROOT.glob("dataset_scripts/*.py")]), ids=str)
def test_scripts_carry_their_dependencies(script: Path) -> None:
    """As PEP 723 reads them; scripts for this repository alone carry none."""
    found = re.findall(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script.read_text(encoding="utf-8"))
    if script.name in ("write_configs.py", "ablations.py"):
        assert found == []
        return
    fields = tomllib.loads("\n".join(line[2:] for line in found[0][0].splitlines()))
    assert "longvpo-hf" in {re.split(r"[\[<>=]", name)[0] for name in fields["dependencies"]}
    assert fields["requires-python"] == ">=3.11"


def test_skill_and_citation_parse() -> None:
    skill = (ROOT / "src/longvpo_hf/skills/longvpo/SKILL.md").read_text(encoding="utf-8")
    head = yaml.safe_load(skill.split("---")[1])
    assert head["name"] == "longvpo"
    assert len(head["description"]) < 1024
    named = {name for name in app if not name.startswith("-")}
    assert set(head["metadata"]["commands"]) == {f"longvpo {name}" for name in named}
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == longvpo_hf.__version__
    for reference, paper in zip(cited["references"], (papers.LONGVPO, papers.TPO), strict=True):
        assert reference["title"] in paper
        assert all(
            f"{who['given-names']} {who['family-names']}" in " ".join(paper.split()) for who in reference["authors"]
        )
    for form in ROOT.glob(".github/**/*.yml"):
        assert yaml.safe_load(form.read_text(encoding="utf-8"))["name"]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six films of one colour each."""
    from conftest import write_clip

    folder = tmp_path_factory.mktemp("films")
    for number in range(6):
        write_clip(folder / f"film {number}.mp4", (40 * number, 255 - 40 * number, 90), seconds=6)
    return folder
