"""Settings that the command line reads: each says what it is."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from longvpo_hf.building.captioning import CaptioningSettings
from longvpo_hf.methods.stage1 import Stage1Settings
from longvpo_hf.methods.stage2 import Stage2Settings
from longvpo_hf.methods.temporal import TemporalSettings


@pytest.mark.parametrize("settings", [Stage1Settings, Stage2Settings, TemporalSettings, CaptioningSettings])
def test_every_setting_has_its_help(settings: Any) -> None:
    for field in fields(settings):
        text = field.metadata["help"]
        assert text.endswith("."), field.name
        assert "  " not in text
