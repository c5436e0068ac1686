"""The schemas of YAML files take every shipped file, and refuse what the parsers refuse."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml

from cli import longvpo
from longvpo_hf.shipped import shipped_configs
from longvpo_hf.studies.study import shipped_studies

_SHIPPED = {"recipe": shipped_configs, "study": shipped_studies}


@pytest.mark.parametrize("of", ["recipe", "study"])
def test_schema(of: str) -> None:
    printed = longvpo(["configs", "schema", of])
    assert printed.exit_code == 0
    schema = json.loads(printed.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    contents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in _SHIPPED[of]().values()]
    assert len(contents) > 4
    for content in contents:
        assert [error.message for error in validator.iter_errors(content)] == []
    assert not validator.is_valid({**contents[0], "lerning_rate": 1})
    wrong = {"num_frames": "many"} if of == "recipe" else {"steps": [{"build": 3}]}
    assert not validator.is_valid({**contents[0], **wrong})
