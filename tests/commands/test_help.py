"""The command line itself: help without loading anything, files of options, names of options, advice."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cli import longvpo, result_of
from longvpo_hf import __version__
from longvpo_hf.building.captioning import CaptioningSettings
from longvpo_hf.commands import app as app_module
from longvpo_hf.commands.build import stage1, stage2, temporal
from longvpo_hf.commands.cli import new_app, resumable, run
from longvpo_hf.errors import ModelError
from longvpo_hf.frames import Bounds
from longvpo_hf.intake import CuttingSettings, IntakeLimits
from longvpo_hf.intake.media import MediaSettings
from longvpo_hf.methods.stage1 import Stage1Settings
from longvpo_hf.methods.stage2 import Stage2Settings
from longvpo_hf.methods.temporal import TemporalSettings
from test_package import HEAVY

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "", "build", "build stage1", "build stage2", "build temporal", "train", "eval", "probe", "probe needle",
    "probe position", "check", "inspect", "audit", "rows", "rows merge", "rows filter", "rows split", "rows sample",
    "configs", "configs copy", "configs schema", "run",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------- help


def loaded_after(program: str) -> tuple[str, list[str]]:
    """What a program prints, and which heavy modules it has loaded when it ends."""
    lines = ["import sys", "try:", f"    {program}", "except SystemExit:", "    pass"]
    program = "\n".join([*lines, f"print(*[name for name in {HEAVY} if name in sys.modules])"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    *printed, loaded = done.stdout.splitlines()
    return "\n".join(printed), loaded.split()


def test_help_loads_nothing_heavy() -> None:
    """All in one interpreter, where what any of them loads is still there at the end."""
    words = [[*command.split(), "--help"] for command in COMMANDS]
    lines = ["import contextlib", "from longvpo_hf.commands.app import app, run", f"for words in {words}:"]
    lines += ["    with contextlib.suppress(SystemExit):", "        run(app, words)"]
    printed, loaded = loaded_after("\n    ".join(lines))
    for command in COMMANDS:
        assert f"Usage: {' '.join(['longvpo', *command.split()])} " in printed
    assert loaded == []


@pytest.mark.parametrize("name", ["stage1", "stage2", "temporal"])
def test_help_of_a_script_loads_nothing_heavy(name: str) -> None:
    path = ROOT / "dataset_scripts" / f"{name}.py"
    program = f"import runpy; sys.argv = ['{name}.py', '--help']; runpy.run_path({str(path)!r}, run_name='__main__')"
    printed, loaded = loaded_after(program)
    assert f"Usage: {name}.py" in printed
    assert loaded == []


def described(command: str) -> dict[str, str]:
    """Each option of a command's help and what is said of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "2000")  # one line each
        lines = longvpo([*command.split(), "--help"]).stdout.splitlines()
    found = (re.match(r"│ (?:\*  |   )?(--[a-z-]+).*?  +(.*\S) *│$", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command not in ("", "build", "probe", "rows", "configs")]
)
def test_every_option_has_help_and_shows_its_default(command: str) -> None:
    options = described(command)
    assert options or command in ("configs copy", "configs schema")
    for option, text in options.items():
        assert "[default: " in text or "[required]" in text, f"{command} {option}: {text}"
        assert len(text.partition("[")[0]) > 10, f"{command} {option} says nothing"


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("build stage1", (Stage1Settings, CuttingSettings, MediaSettings, IntakeLimits, Bounds)),
        ("build stage2", (Stage2Settings, CuttingSettings, MediaSettings, CaptioningSettings, IntakeLimits, Bounds)),
        (
            "build temporal",
            (TemporalSettings, CuttingSettings, MediaSettings, CaptioningSettings, IntakeLimits, Bounds),
        ),
    ],
)
def test_every_setting_is_an_option_with_the_settings_default(command: str, settings: tuple[type, ...]) -> None:
    options = described(command)
    for kind in settings:
        for name, field in kind.__dataclass_fields__.items():
            assert f"[default: {field.default}]" in options[f"--{name.replace('_', '-')}"]


def test_the_version() -> None:
    assert longvpo(["--version"]).stdout.strip() == __version__


# ------------------------------------------------------------------------------------------------- options and files


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Stage1Settings]:
    """The settings that a build gets as far as its clips with."""
    seen: list[Stage1Settings] = []

    def fitted(self: Stage1Settings, clips: object) -> Stage1Settings:
        seen.append(self)
        raise ModelError("far enough")

    monkeypatch.setattr(Stage1Settings, "fitted", fitted)
    monkeypatch.setattr(stage1, "read_videos", lambda videos, funnel, executor: ([], {}))
    return seen


def test_the_command_line_overrides_the_file(tmp_path: Path, asked: list[Stage1Settings]) -> None:
    file = tmp_path / "my_build.yaml"
    given = {"num_rows": 7, "max-similarity": 0.25, "responder": "scripted", "output": str(tmp_path / "rows")}
    file.write_text(yaml.safe_dump({**given, "dry_run": True, "benchmark_videos": ["A=a", "B=b"]}), encoding="utf-8")
    assert longvpo(["build", "stage1", "--config", str(file)]).stderr == "longvpo build stage1: far enough\n"
    assert asked == [Stage1Settings(num_rows=7, max_similarity=0.25)]
    longvpo(["build", "stage1", "--num-rows", "8", "--config", str(file), "--max_rounds", "3"])
    assert asked[1:] == [Stage1Settings(num_rows=8, max_similarity=0.25, max_rounds=3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_row: 3", r"num_row.*Did you mean --num-rows\?"),
        ("num_rows: many", r'Invalid value for .num_rows. from .*my_build.yaml: unable to convert "many" into int'),
        ("cutting: magic", r'Invalid value "magic".*"scenes", "windows"'),
        ("min_clips: 1", r"2 ≤ min_clips ≤ max_clips, got min_clips=1"),
        ("num_rows: [1", r"."),
        ("- a list", r"must be a mapping"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "my_build.yaml"
    file.write_text(text, encoding="utf-8")
    words = ["--config", str(file), "--responder", "scripted", "--output", str(tmp_path / "rows")]
    for result in (longvpo(["build", "stage1", *words]), result_of(lambda: stage1.main(words))):
        assert result.exit_code == 2
        assert re.search(message, result.stderr)
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "rows.log").exists()


def test_a_file_that_is_missing_is_named() -> None:
    result = longvpo(["build", "stage1", "--config", "nowhere.yaml"])
    assert (result.exit_code, result.stderr) == (2, "longvpo build stage1: --config nowhere.yaml is not a file.\n")


def test_dashes_and_underscores_mean_the_same(tmp_path: Path, asked: list[Stage1Settings]) -> None:
    words = ["--responder", "scripted", "--output", str(tmp_path)]
    for options in (["--num-rows", "9", "--max-clips=5"], ["--num_rows", "9", "--max_clips=5"]):
        longvpo(["build", "stage1", *words, *options])
    assert asked == [Stage1Settings(num_rows=9, max_clips=5)] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bild"], 'longvpo: Unknown command "bild". Did you mean "build"?'),
        (["inspect", "x", "--row", "3"], "longvpo inspect: Unknown option: --row. Did you mean --rows?"),
        (["inspect", "x", "--rows", "0"], 'longvpo inspect: Invalid value "0" for --rows. Must be > 0.'),
        (
            ["probe", "needle", "m", "--frames", "4,x"],
            'longvpo probe needle: Invalid value "4,x" for --frames. Must be whole numbers ≥ 1 with commas',
        ),
        (["eval"], "longvpo eval: Name at least one model."),
        *(
            (["build", "stage1", "--benchmark-videos", item, "--responder", "r", "--output", "o"], "must be NAME=FILE")
            for item in ("x", "x=", "=x", " = ")
        ),
    ],
)
def test_a_mistake_is_one_line_of_advice(words: list[str], message: str) -> None:
    result = longvpo(words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["build stage1 --responder r --output o", "audit rows", "rows filter r --output o"])
def test_a_list_does_not_replace_another_of_its_name(command: str) -> None:
    result = longvpo([*command.split(), "--benchmark-videos", "A=one.txt", "--benchmark-videos", "A=two.txt"])
    assert result.exit_code == 2
    assert "--benchmark-videos names A twice, one.txt and two.txt" in result.stderr


@pytest.mark.parametrize(
    ("words", "option"),
    [
        *(
            (f"build {method} --responder org/model --output rows {option}", option.split()[0])
            for method in ("stage1", "stage2", "temporal")
            for option in ("--base-url http://localhost:1/v1", "--model m", "--api-key-env KEY", "--drop-unanswered")
        ),
        ("build stage1 --responder org/model --output rows --plain-http-key", "--plain-http-key"),
        ("audit rows --blind-model org/model --base-url http://localhost:1/v1", "--base-url"),
        ("audit rows --model m", "--model"),
        ("eval org/model --base-url http://localhost:1/v1", "--base-url"),
        ("eval org/model --api-key-env KEY", "--api-key-env"),
        ("probe needle org/model --needle-frames 2", "--needle-frames"),
        ("probe needle org/model --needle x.png --question a --answer b --number 3", "--number"),
        ("probe needle org/model --needles x.jsonl --number 3", "--number"),
        ("probe position org/model --video-frames 2", "--video-frames"),
        ("probe position org/model --questions x.jsonl --number 3", "--number"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(words: str, option: str) -> None:
    result = longvpo(words.split())
    assert result.exit_code == 2
    assert re.search(rf"{option} is (about|of) ", result.stderr), result.stderr


@pytest.mark.parametrize("command", ["inspect", "audit"])
def test_a_page_replaces_nothing_but_a_page(command: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    for name in ("train.parquet", "audit.json", "README.md", "page", "folder.html/"):
        path = rows / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            rows.mkdir(exist_ok=True)
            path.write_text("as it was", encoding="utf-8")
        result = longvpo([command, str(rows), "--output", str(path)])
        assert result.exit_code == 2
        assert f"--output must be the name of a page, e.g. page.html, got {path}." in result.stderr
        assert path.is_dir() or path.read_text(encoding="utf-8") == "as it was"


@pytest.mark.parametrize("words", ["audit x.parquet", "rows sample x.parquet --num-rows 1 --output y"])
def test_a_file_is_no_dataset(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    result = longvpo(words.split())
    assert result.exit_code == 2
    assert "x.parquet is a file: name the folder it lies in, which is the dataset." in result.stderr


def test_a_rehearsal_may_keep_the_options_of_the_run(tmp_path: Path, asked: list[Stage1Settings]) -> None:
    words = ["build", "stage1", "--output", str(tmp_path / "rows"), "--base-url", "http://localhost:1/v1"]
    result = longvpo([*words, "--model", "m", "--responder", "scripted"])
    assert (result.stderr, len(asked)) == ("longvpo build stage1: far enough\n", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--responder", "endpoint:"], "The model endpoint: needs --base-url"),
        (["--responder", "scripted", "--judge", "endpoint"], "The model endpoint needs --base-url"),
        (["--responder", "endpoint:", "--base-url", "http://localhost:1"], "The model endpoint: needs --model"),
        (["--responder", "endpoint: ", "--base-url", "http://localhost:1"], "needs --model, or write endpoint:MODEL"),
    ],
)
def test_an_endpoint_has_an_address_and_a_model(options: list[str], message: str) -> None:
    result = longvpo(["build", "stage1", "--output", "rows", *options])
    assert result.exit_code == 2
    assert message in result.stderr


# -------------------------------------------------------------------------------------------------- what commands raise


def raising(error: BaseException) -> None:
    raise error


def test_only_what_a_user_can_mend_is_advice() -> None:
    app = new_app("longvpo")
    for error in (ValueError("a defect"), OSError("a disk"), RuntimeError("torch"), KeyError("k")):
        app = new_app("longvpo")
        app.command(lambda error=error: raising(error), name="do")
        with pytest.raises(type(error)):
            run(app, ["do"])
    app = new_app("longvpo")
    app.command(lambda: raising(ModelError("no such model; name another.")), name="do")
    result = result_of(lambda: run(app, ["do"]))
    assert (result.exit_code, result.stderr) == (2, "longvpo do: no such model; name another.\n")


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupt_says_whether_the_command_goes_on(resumes: bool) -> None:
    def do() -> None:
        raise KeyboardInterrupt

    app = new_app("longvpo")
    app.command(resumable(do) if resumes else do)
    result = result_of(lambda: run(app, ["do"]))
    assert result.exit_code == 130
    assert ("The same command goes on where this one stopped." in result.stderr) == resumes


# ------------------------------------------------------------------------------------------------------------ documents


def documented() -> Iterator[tuple[str, list[str]]]:
    """The builders' and other commands of the documents and of the scripts' docstrings, as words."""
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    }
    blocks = {name: "\n".join(re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL)) for name, text in texts.items()}
    for path in (ROOT / "dataset_scripts").glob("*.py"):
        blocks[f"dataset_scripts/{path.name}"] = path.read_text(encoding="utf-8").replace("\\\\\n", "\\\n")
    for command in (stage1.build, stage2.build, temporal.build):
        blocks[command.__module__] = command.__doc__ or ""
    for name, text in blocks.items():
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if "longvpo " in line or "dataset_scripts/" in line else []
            if words[:1] == ["longvpo"]:
                yield name, words[1:]
            elif len(words) > 1 and (match := re.fullmatch(r"dataset_scripts/(\w+)\.py", words[1])):
                yield name, ["build", match[1], *words[2:]]


@pytest.mark.parametrize(
    ("document", "words"), documented(), ids=lambda value: value if isinstance(value, str) else None
)
def test_documented_commands_are_commands(document: str, words: list[str]) -> None:
    if "…" in words:
        words = words[: words.index("…")]
    app_module.app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("name", ["stage1", "stage2", "temporal"])
def test_every_option_that_a_document_names_is_one(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(--[a-z][a-z-]*)", text))
    assert named <= {"--help", *described(f"build {name}")}


@pytest.mark.parametrize("words", [["check"], ["run", "nowhere.yaml"], ["eval"]])
def test_a_command_that_is_called_from_python_leaves_the_process_as_it_was(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ), list(warnings.filters)
    assert longvpo(words).exit_code == 2
    assert (dict(os.environ), list(warnings.filters)) == before


# ------------------------------------------------------------------------- values that would be taken for others


def options_of(words: list[str]) -> list[tuple[str, str]]:
    """The options of a command, as it would parse them, with their types."""
    _, (*_, command), _ = app_module.app.parse_commands(words)
    if command.default_command is None:
        return []
    arguments = command.assemble_argument_collection()
    return [(each.name, str(each.hint)) for each in arguments if each.name.startswith("--")]


def whole_number_options(words: list[str]) -> list[str]:
    return [name for name, hint in options_of(words) if re.search(r"\bint\b", hint) and "float" not in hint]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command])
def test_no_fraction_is_rounded_to_a_whole_number(command: str) -> None:
    words = command.split()
    rng = random.Random(command)
    for option in whole_number_options(words):
        given = f"{rng.uniform(1, 9):.2f}1"
        result = longvpo([*words, option, given])
        assert result.exit_code == 2, option
        assert f"{option} must be a whole number, got {given}." in result.stderr


def test_whole_numbers_are_looked_for_everywhere() -> None:
    found = {option for command in COMMANDS for option in whole_number_options(command.split())}
    assert {"--num-rows", "--number", "--depths", "--batch-size", "--max-pixels", "--seed"} <= found


@pytest.mark.parametrize("command", [command for command in COMMANDS if command])
def test_no_empty_value_is_the_current_folder_or_the_default(command: str) -> None:
    """A shell makes `--source ""` of a variable that is not set."""
    for option, hint in options_of(command.split()):
        if "bool" not in hint:
            for empty in ("", " "):
                result = longvpo([*command.split(), option, empty])
                assert result.exit_code == 2, option
                assert f"{option} is empty: give a value, or leave the option out." in result.stderr


def test_options_are_looked_for_everywhere() -> None:
    found = {option for command in COMMANDS for option, hint in options_of(command.split()) if "bool" not in hint}
    assert {"--source", "--output", "--cache", "--config", "--data-root", "--protocol", "--drop-ids", "--fps"} <= found


@pytest.mark.parametrize("words", [["inspect", ""], ["inspect", " "], ["configs", "copy", "miniature/stage1", ""]])
def test_no_empty_path_is_the_current_folder(words: list[str]) -> None:
    assert re.search(r"(FOLDER|DESTINATION) is empty: give a value", longvpo(words).stderr)


def test_empty_values_in_a_file_of_options(tmp_path: Path, asked: list[Stage1Settings]) -> None:
    file = tmp_path / "options.yaml"
    words = ["build", "stage1", "--config", str(file), "--output", str(tmp_path / "rows"), "--responder", "scripted"]
    for option in ("source", "cache", "device", "judge"):
        file.write_text(f"{option}: ''\n", encoding="utf-8")
        assert f"--{option} in {file} is empty: give a value" in longvpo(words).stderr
    file.write_text("benchmark_videos: []\ndry_run: false\n", encoding="utf-8")
    assert longvpo(words).stderr == "longvpo build stage1: far enough\n"


def test_a_fraction_in_a_file_of_options_is_no_whole_number_either(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("number: 2.5\n")
    result = longvpo(["probe", "needle", "a/model", "--config", str(file)])
    assert result.exit_code == 2
    assert f"--number in {file} must be a whole number, got 2.5." in result.stderr
    file.write_text("number: 2.0\n")
    result = longvpo(["probe", "needle", "a/b/c", "--config", str(file)])
    assert "There is no folder a/b/c" in result.stderr
