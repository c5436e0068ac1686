"""Settings that the command line turns into options: each field is described, once, and holds what it says it does."""

from __future__ import annotations

import inspect
import random
import re
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from longvpo_hf.building.captioning import CaptioningSettings
from longvpo_hf.decoding import Decoding
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.run import Settings
from longvpo_hf.intake.cutting import CuttingSettings
from longvpo_hf.intake.media import MediaSettings
from longvpo_hf.methods.stage1 import Stage1Settings
from longvpo_hf.methods.stage2 import Stage2Settings
from longvpo_hf.methods.temporal import TemporalSettings


@pytest.mark.parametrize("settings", [Stage1Settings, Stage2Settings, TemporalSettings, CaptioningSettings])
def test_every_setting_is_described(settings: Any) -> None:
    arguments = inspect.getdoc(settings).partition("Args:\n")[2]  # type: ignore[union-attr]
    described = re.findall(r"^    (\w+): \S", arguments, re.MULTILINE)
    assert described == [field.name for field in fields(settings)]


OF_BUILDS = (Stage1Settings, Stage2Settings, TemporalSettings, CaptioningSettings, CuttingSettings, MediaSettings)
#: What Python would take for a number or a truth, or compare with one, and what it would not.
WRONG: dict[Any, tuple[Any, ...]] = {
    int: ("8", 8.5, True, [8], 1e3, b"8", {}),
    float: ("0.5", True, [0.5], b"1", {}),
    bool: ("no", "true", 1, 0, 0.0, [], {}),
}


@pytest.mark.parametrize("settings", [*OF_BUILDS, Decoding, Settings])
def test_no_setting_takes_a_value_of_another_type(settings: Any) -> None:
    """Python checks no types: 8.5 rows and `thinking="no"` were accepted."""
    rng, checked = random.Random(0), 0
    for name, hint in get_type_hints(settings).items():
        kinds = [kind for kind in WRONG if hint in (kind, kind | None)]
        for kind in kinds:
            given = (None,) if hint is kind else ()
            for value in (*given, *rng.sample(WRONG[kind], 5)):
                checked += 1
                with pytest.raises(ConfigError, match=rf"^{name} must be of type {re.escape(kind.__name__)}\b"):
                    settings(**{name: value})
    assert checked >= 10


def test_a_whole_number_is_a_share_too() -> None:
    settings = Stage1Settings(max_similarity=1)
    assert (settings.max_similarity, type(settings.max_similarity)) == (1.0, float)
    assert settings == Stage1Settings(max_similarity=1.0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("batch_size", (0, -3)),
        ("limit", (0, -1)),
        ("max_pixels", (0, -9)),
        ("frames", ([0], [64, -1], [8.5], ["64"], [True])),
        ("fps", (0, -1.0, float("nan"), float("inf"), "fast", "", [2.0])),
    ],
)
def test_an_evaluation_is_not_asked_for_what_cannot_be(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{name} must be "):
            Settings(**{name: value})
    for fps in (None, "none", "2", 1, 0.5):
        Settings(fps=fps, frames=[64, 128], batch_size=1, limit=None, max_pixels=50176)
