"""The tables of `docs/families.md` are those that the tiny models make."""

from __future__ import annotations

import families_page
from longvpo_hf.families import families
from longvpo_hf.families.refused import REFUSED


def test_the_tables_are_as_measured() -> None:
    page = families_page.PAGE.read_text(encoding="utf-8")
    assert families_page.updated(page) == page, "run python tests/families_page.py"
    for model_type in (*(family.model_type for family in families()), *(refused.model_type for refused in REFUSED)):
        assert page.count(f"| `{model_type}` |") == 1


def test_a_cell_that_is_wrong_is_noticed() -> None:
    page = families_page.PAGE.read_text(encoding="utf-8")
    assert families_page.refused_table() in page
    wrong = page.replace("sides rounded to 32", "sides rounded to 28", 1)
    assert wrong != page
    assert families_page.families_table() not in wrong
