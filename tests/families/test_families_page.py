"""The tables of `docs/families.md` are those that the tiny models make."""

from __future__ import annotations

import families_page
from longvpo_hf.families import families
from longvpo_hf.families.refused import REFUSED


def test_the_tables_are_as_measured_and_a_wrong_cell_is_mended() -> None:
    page = families_page.PAGE.read_text(encoding="utf-8")
    wrong = page.replace("sides rounded to 32", "sides rounded to 28", 1).replace("`kimi_k25`", "`kimi_k2`", 1)
    assert wrong != page
    assert families_page.updated(wrong) == page, "run python tests/families_page.py"
    for model_type in (*(family.model_type for family in families()), *(refused.model_type for refused in REFUSED)):
        assert page.count(f"| `{model_type}` |") == 1
