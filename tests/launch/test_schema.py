"""The schemas of YAML files take every shipped file, and refuse what the parsers refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from cli import longvpo
from longvpo_hf.shipped import shipped_accelerate_configs, shipped_configs
from longvpo_hf.studies.study import shipped_studies

_SHIPPED = {"recipe": shipped_configs, "study": shipped_studies}


@pytest.mark.parametrize("of", ["recipe", "study"])
def test_schema(of: str) -> None:
    printed = longvpo(["configs", "schema", of])
    assert printed.exit_code == 0
    schema = json.loads(printed.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    shipped = _SHIPPED[of]()
    for name, path in shipped.items():  # by which editors find it
        (reference,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", path.read_text(encoding="utf-8"), re.M)
        assert (path.parent / reference).read_text(encoding="utf-8") == printed.stdout, (
            f"{name}: longvpo configs schema {of} > {path.parent / reference}"
        )
    contents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in shipped.values()]
    assert len(contents) > 4
    for content in contents:
        assert [error.message for error in validator.iter_errors(content)] == []
    assert not validator.is_valid({**contents[0], "lerning_rate": 1})
    wrong = {"num_frames": "many"} if of == "recipe" else {"steps": [{"build": 3}]}
    assert not validator.is_valid({**contents[0], **wrong})


@pytest.mark.parametrize("name", ["internvl3_8b/stage1_lora", "miniature", "fsdp2"])
def test_a_copy_has_its_schema_beside_it(name: str, tmp_path: Path) -> None:
    assert longvpo(["configs", "copy", name, str(tmp_path / "mine.yaml")]).exit_code == 0
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    found = re.findall(r"\$schema=(\S+)", text)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", *found}
    original = {**shipped_configs(), **shipped_accelerate_configs(), **shipped_studies()}[name]
    assert yaml.safe_load(text) == yaml.safe_load(original.read_text(encoding="utf-8"))
    assert len(found) == (name != "fsdp2")
