"""The JSON schemas of the YAML files, by which editors complete and check them as they are typed."""

from __future__ import annotations

import json
import types
from argparse import Action, ArgumentParser
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from longvpo_hf.launch.arguments import recipe_parser

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def recipe_schema() -> dict[str, Any]:
    """Of a recipe's `--config`: its own options, TRL's and those of transformers."""
    parser: ArgumentParser = recipe_parser()
    properties = {action.dest: _option(action) for action in parser._actions if action.dest != "help"}
    # TRL's own: variables of the environment, set before the rest is read.
    properties["env"] = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
    return {
        "$schema": _DRAFT,
        "title": "A recipe of longvpo-hf",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def study_schema() -> dict[str, Any]:
    """Of a study, see `studies.study.Study`."""
    from longvpo_hf.studies.study import Study

    return {"$schema": _DRAFT, "title": "A study of longvpo-hf", **_dataclass(Study)}


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as JSON text."""
    return json.dumps(schema, indent=1, default=str) + "\n"


def _option(action: Action) -> dict[str, Any]:
    """An option of the command line as YAML may give it."""
    found: dict[str, Any] = {}
    if action.help and action.help != "==SUPPRESS==":
        found["description"] = " ".join(action.help.split()).replace("%%", "%")
    if action.choices is not None:
        found["enum"] = [*action.choices, None]
    elif action.nargs in ("*", "+"):
        found["type"] = ["array", "string", "number", "null"]
    elif action.type is float:
        found["type"] = ["number", "string", "null"]  # YAML reads 5e-7 as a text; TRL's parser takes it
    elif action.type is int:
        found["type"] = ["integer", "null"]
    return found


def _dataclass(kind: Any) -> dict[str, Any]:
    """A settings dataclass; further keys are allowed where it takes `options` of others."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    required = [field.name for field in fields(kind) if field.default is field.default_factory]  # both are MISSING
    return {
        "type": "object",
        "description": (kind.__doc__ or "").split("\n")[0],
        "properties": {name: _type(hints[name]) for name in names if name != "options"},
        "required": required,
        "additionalProperties": "options" in names,
    }


def _type(kind: Any) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(one) for one in arguments]}
    if is_dataclass(kind):
        found = _dataclass(kind)
        # A step's first key says which it is; a probe may be its name alone.
        return {"anyOf": [found, {"type": "string"}]} if "probe" in found["required"] else found
    if origin is tuple:
        return {"type": "array", "items": _type(arguments[0])}
    if origin is Mapping:
        return {"type": "object"}
    return {"type": _KINDS[kind]}
