"""Every regular expression of the package takes steps that grow with its text, and not with the square of it.

Texts come from outside: a pattern that backtracks lets one reply or one subtitle hold up a run for hours. Steps are
counted by a matcher of the tests' own (`patterns.py`), so nothing is timed.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import longvpo_hf
from patterns import Counting, TooManySteps, samples

SOURCE = Path(longvpo_hf.__file__).parent
#: A text of so many characters, one twice and one four times as long: the second adds twice the steps of the first
#: where steps grow with the text, four times where they grow with its square. Between, since both may be there.
LENGTH = 60
MOST_GROWTH = 2.2
FEW_STEPS = 100
CALLS = ("compile", "match", "search", "fullmatch", "sub", "subn", "split", "findall", "finditer")
WHOLE = ("match", "fullmatch")
MOST_UNITS, MOST_PARTS = 6, 600


def patterns_of(path: Path) -> Iterator[tuple[str, re.Pattern[Any], bool]]:
    """The patterns of a file: where, which, and whether it is only matched from the start of a text."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    dotted = ".".join(("longvpo_hf", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    named: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named.setdefault(node.value.id, set()).add(node.attr)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re"):
            continue
        where = f"{path.relative_to(SOURCE)}:{node.lineno}"
        if node.func.attr != "compile":
            flags = [getattr(re, part.attr) for part in ast.walk(node) if isinstance(part, ast.Attribute)
                     and part.attr in ("IGNORECASE", "DOTALL", "MULTILINE")]  # fmt: skip
            assert isinstance(node.args[0], ast.Constant), f"{where}: name the pattern, so that it can be tried"
            yield where, re.compile(node.args[0].value, sum(flags)), node.func.attr in WHOLE
    module = importlib.import_module(dotted)
    for name, value in vars(module).items():
        if isinstance(value, re.Pattern) and name in named:
            used = named[name] - {"pattern", "flags"}
            yield f"{path.relative_to(SOURCE)}:{name}", value, bool(used) and used <= set(WHOLE)


def hostile_texts(pattern: re.Pattern[Any]) -> Iterator[tuple[str, str, str]]:
    """What the parts of a pattern match, repeated, after its start and before what it never matches: in three
    lengths.
    """
    tree = Counting(pattern, 1).tree
    units = [unit for unit in dict.fromkeys(samples(tree)) if unit]
    most = max(MOST_UNITS, MOST_PARTS // max(1, len(units)))
    units = [*units[:: -(-len(units) // most) or 1], " ", "a", "1", "\n"]
    starts = ["", *(unit for unit in units if len(unit) > 1)][:3]
    for start, unit in itertools.product(starts, dict.fromkeys(units)):
        number = max(4, LENGTH // len(unit))
        yield tuple(f"{start}{unit * times}\0" for times in (number, 2 * number, 4 * number))  # type: ignore[misc]


def is_linear(pattern: re.Pattern[Any], texts: tuple[str, str, str], is_whole: bool = False) -> bool:
    counting = Counting(pattern, 10**5)
    try:
        short, longer, longest = (counting.search(text, is_whole) for text in texts)
    except TooManySteps:
        return False
    return longest - longer <= MOST_GROWTH * (longer - short) + FEW_STEPS


PATTERNS = {
    where: (pattern, is_whole)
    for path in sorted(SOURCE.rglob("*.py"))
    if "re." in path.read_text(encoding="utf-8")
    for where, pattern, is_whole in patterns_of(path)
}


@pytest.fixture(autouse=True)
def deep() -> Iterator[None]:
    """The matcher calls itself for every repetition."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("where", PATTERNS)
def test_steps_grow_with_the_text(where: str) -> None:
    pattern, is_whole = PATTERNS[where]
    for texts in hostile_texts(pattern):
        assert is_linear(pattern, texts, is_whole), f"{where}: {pattern.pattern!r} backtracks on {texts[0][:60]!r}…"


def test_the_patterns_of_the_package_are_found() -> None:
    assert len(PATTERNS) > 60
    assert {"intake/records.py:_CLOCK", "evaluation/subtitles.py:_TIMES"} <= set(PATTERNS)
    assert any(where.startswith("paths.py:") for where in PATTERNS)  # one without a name, by its line


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d+:", r"\s*\s*x", r"(a+)+b", r"<a>.*?</a>", r"\s+$", r"(?:^|\n)[\W_]*([^\W_])[\W_]*$", r"(a|a)*b",
        r"<[^>]*>", r"#?\s*#?\s*\d", r"<answer>(.*?)</answer>|[a-z]", r"(?i)(x\s*)*\s*y", r"a*a*b",
    ],
)  # fmt: skip
def test_what_backtracks_is_found(pattern: str) -> None:
    compiled = re.compile(pattern)
    assert not all(is_linear(compiled, texts) for texts in hostile_texts(compiled))


@pytest.mark.parametrize("where", PATTERNS)
def test_the_counting_matcher_agrees_with_re(where: str) -> None:
    """Else it would count something else."""
    pattern, _ = PATTERNS[where]
    if isinstance(pattern.pattern, bytes):
        return
    for text in {texts[0][:40] for texts in itertools.islice(hostile_texts(pattern), 8)}:
        counting = Counting(pattern, 10**6)
        for place in range(len(text) + 1):
            match = pattern.match(text, place)
            assert counting.end(text, place) == (match.end() if match else None), (text, place)
