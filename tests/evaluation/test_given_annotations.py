"""Annotations as somebody may have changed them: no field of another kind is asked, scored, or ends in a traceback."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import benchmark_doubles as doubles
from longvpo_hf.errors import ConfigError
from longvpo_hf.evaluation.preflight import check
from longvpo_hf.evaluation.suite import Question
from longvpo_hf.evaluation.suites import suites

#: None of these is a question, a list of options, an answer, a video's name or a group.
NOTHING: tuple[Any, ...] = (
    None,
    "",
    " \n",
    [],
    {},
    ["a"],
    {"a": 1},
    [None] * 4,
    float("nan"),
    True,
    b"bytes",
    object(),
)
FIELDS = [
    (suite.name, field) for suite in suites().values() if not suite.asked_with for field in doubles.a_row(suite.name)
]


def asked(name: str, row: dict[str, Any]) -> Question:
    suite = suites()[name]
    return suite.question(row, suite.subsets[0] if suite.subsets else "", 17)


def question(name: str, **changed: Any) -> Question:
    return asked(name, {**doubles.a_row(name), **changed})


def question_or_error(name: str, row: dict[str, Any]) -> tuple[Question | None, str]:
    try:
        return asked(name, row), ""
    except ConfigError as error:
        return None, str(error)


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_field_of_another_kind_is_refused_or_not_read(name: str, field: str) -> None:
    as_it_is = question(name)
    for value in NOTHING:
        found, error = question_or_error(name, {**doubles.a_row(name), field: value})
        if found is None:
            assert error.startswith(suites()[name].dataset)
            assert "row 17: " in error
        else:
            assert found == as_it_is, (field, value)


def test_fields_at_random() -> None:
    """Any number of fields at once, of any kind, also lacking."""
    for seed in range(300):
        rng = random.Random(seed)
        name = rng.choice([suite.name for suite in suites().values() if not suite.asked_with])
        row = doubles.a_row(name)
        kinds = (*NOTHING, 3, -1, 10**30, 0.5, "x", "\0", "\ud800", ["one", "two"], ["one"] * 27, "A" * 10_000)
        for field in rng.sample(sorted(row), rng.randint(1, len(row))):
            row[field] = rng.choice(kinds)
            if rng.random() < 0.2:
                del row[field]
        found, error = question_or_error(name, row)
        if found is None:
            assert len(error) < 2_000, seed
            continue
        assert found.answer in found.letters, seed
        assert "None" not in found.text + found.group, seed
        assert not any("None" in video for video in found.videos), seed


@pytest.mark.parametrize("number", [-1, 5, 99, 10**30])
def test_the_number_of_an_option_that_is_not_there(number: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"'correct_choice' must be the number of an option, from 0 to 4, got {number}"
    ):
        question("longvideobench", correct_choice=number)


@pytest.mark.parametrize("options", ["A. one, B. two", ["one"], ["one"] * 27, [["one"], ["two"]]])
@pytest.mark.parametrize(
    ("name", "field"), [("videomme", "options"), ("cgbench", "choices"), ("mvbench", "candidates")]
)
def test_what_is_no_list_of_options(name: str, field: str, options: Any) -> None:
    """A text is a sequence of letters: each was an option of its own."""
    with pytest.raises(ConfigError, match=f"'{field}' must be a list of 2 to 26 options"):
        question(name, **{field: options})


def test_options_may_be_numbers_and_one_may_be_empty() -> None:
    assert question("tvbench", candidates=[1, 2, 2.5], answer="2.5").letters == "ABC"
    assert "(B) \n" in question("mvbench", candidates=["one", ""], answer="one").text


def test_a_group_of_more_questions_than_four_is_refused() -> None:
    suite = suites()["videomme_v2"]
    records: list[Any] = [
        {"video": "v", "facts": {"place": place, "steps": "[1, 2, 3, 4]"}, "score": 100.0, "group": "logic"}
        for place in range(5)
    ]
    with pytest.raises(ConfigError, match="four questions at most, v has 5"):
        suite.units(records, "score")


def test_the_preflight_names_the_row_and_a_split_without_rows(tmp_path: Path) -> None:
    folder = tmp_path / "sy1998" / "MLVU_dev"
    folder.mkdir(parents=True)
    rows = [*doubles.mlvu_rows()[:2], {**doubles.mlvu_rows()[2], "answer": None}]
    Dataset.from_list(rows).to_parquet(folder / "test-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match=r"sy1998/MLVU_dev, test, row 2: The field 'answer' must be a text, got None"):
        check([suites()["mlvu"]], tmp_path)
    empty = tmp_path / "empty"
    (empty / "sy1998" / "MLVU_dev").mkdir(parents=True)
    Dataset.from_list(rows).select([]).to_parquet(empty / "sy1998" / "MLVU_dev" / "test-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="sy1998/MLVU_dev, test: there are no rows"):
        check([suites()["mlvu"]], empty)
