"""Settings that the command line turns into options: each field is described, once."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

import pytest

from longvpo_hf.building.captioning import CaptioningSettings
from longvpo_hf.methods.stage1 import Stage1Settings
from longvpo_hf.methods.stage2 import Stage2Settings
from longvpo_hf.methods.temporal import TemporalSettings


@pytest.mark.parametrize("settings", [Stage1Settings, Stage2Settings, TemporalSettings, CaptioningSettings])
def test_every_setting_is_described(settings: Any) -> None:
    arguments = inspect.getdoc(settings).partition("Args:\n")[2]  # type: ignore[union-attr]
    described = re.findall(r"^    (\w+): \S", arguments, re.MULTILINE)
    assert described == [field.name for field in fields(settings)]
