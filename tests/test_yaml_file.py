"""YAML files that users write."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from cli import longvpo
from longvpo_hf.errors import ConfigError
from longvpo_hf.yaml_file import read_yaml

BAD = {
    "open": b"a: [1\n",
    "bytes": bytes(range(256)),
    "tag": b"a: !!python/object/apply:os.system ['exit 3']\n",
    "twice": b"number: 3\nseed: 1\nnumber: 4\n",
    "twice, deeper": b"a:\n- b: {c: 1, c: 2}\n",
    "deep": b"[" * 5000,
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize(
    "command",
    ["probe needle a/b/c --config", "build stage1 --config", "eval a/b/c --config", "check", "run"],
)
def test_a_file_that_is_no_yaml_or_says_a_thing_twice(tmp_path: Path, content: bytes, command: str) -> None:
    file = tmp_path / "given.yaml"
    file.write_bytes(content)
    result = longvpo([*command.split(), str(file)])
    assert result.exit_code == 2
    assert f"{file} cannot be read as YAML: " in result.stderr
    assert "cannot be read" in result.stderr.strip().splitlines()[-1], "one line"


@pytest.mark.parametrize("content", ["- 1\n", "3\n", "text\n", "3: 4\n", "{number: 1, 2: 3}\n"])
def test_options_are_a_mapping_of_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "given.yaml").write_text(content)
    result = longvpo(["probe", "needle", "a/b/c", "--config", str(tmp_path / "given.yaml")])
    assert result.exit_code == 2
    assert "must be a mapping of options to values" in result.stderr


def test_an_empty_file_of_options_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text("# nothing yet\n")
    result = longvpo(["probe", "needle", "a/b/c", "--config", str(tmp_path / "given.yaml")])
    assert "There is no folder a/b/c" in result.stderr


def test_what_is_said_once_is_read_as_yaml_reads_it(tmp_path: Path) -> None:
    rng = random.Random(5)

    def value(depth: int) -> object:
        if depth and rng.random() < 0.6:
            if rng.random() < 0.5:
                return [value(depth - 1) for _ in range(rng.randrange(4))]
            return {f"k{number}": value(depth - 1) for number in range(rng.randrange(4))}
        return rng.choice([None, True, 3, -2.5, "text", "3", "ü", "a: b", "", "no"])

    for number in range(60):
        given = value(4)
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
        assert read_yaml(file) == given
    merged = tmp_path / "merged.yaml"
    merged.write_text("base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\n")
    assert read_yaml(merged) == {"base": {"a": 1, "b": 2}, "mine": {"a": 1, "b": 3}}


def test_a_key_that_is_written_twice_anywhere_is_refused(tmp_path: Path) -> None:
    rng = random.Random(6)
    for number in range(30):
        names = [f"k{each}" for each in range(rng.randint(1, 6))]
        twice = rng.choice(names)
        order = rng.sample([*names, twice], len(names) + 1)
        file = tmp_path / f"{number}.yaml"
        indent = "  " * rng.randrange(3)
        above = "".join(f"{'  ' * level}up{level}:\n" for level in range(len(indent) // 2))
        file.write_text(above + "".join(f"{indent}{name}: {rng.random()}\n" for name in order))
        with pytest.raises(ConfigError, match=f"'{twice}' stands there twice"):
            read_yaml(file)
