"""What a reply means, and the metric `longvideo_mcq` that counts right ones."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import longvpo_hf.evaluation.longvideo_mcq as metric_folder
from longvpo_hf.evaluation.longvideo_mcq.answers import is_right, letter_of, wilson_interval

FOLDER = Path(metric_folder.__file__).parent

#: Replies to a question with options A to D, and the option each names.
REPLIES = {
    "C": "C",
    " c ": "C",
    "**C**": "C",
    "(C)": "C",
    "C.": "C",
    "C. The dog runs": "C",
    "Answer: C": "C",
    "The answer is (B).": "B",
    "The correct answer is C: red": "C",
    "(B) A man": "B",
    "The answer is D because the Cat sleeps": "D",
    "Option B": "B",
    "답은 B": "B",
    "答案是C": "C",
    "<think>It could be A or B.</think>C": "C",
    "<thinking>(A)? (B)?</thinking>\n\nThe answer is (D).": "D",
    "It is A, no.</think> B": "B",
    "<think>It is A, or perhaps B": "",
    "": "",
    "   \n": "",
    "E": "",
    "I cannot tell.": "",
    "I'm sorry, but I can't answer that.": "",
    "Cannot be determined": "",
    "Based on the video, unclear.": "",
    "dog": "",
    "A or B": "",
    "not (A) but (B)": "B",
    "(A), (B)": "",
}


@pytest.mark.parametrize(("reply", "letter"), REPLIES.items())
def test_the_option_a_reply_names(reply: str, letter: str) -> None:
    assert letter_of(reply, "ABCD") == letter


def test_right_replies() -> None:
    assert is_right("Answer: C", "C", "ABCD")
    assert not is_right("Answer: C", "B", "ABCD")
    assert not is_right("I cannot tell.", "A", "ABCD")
    assert is_right(" Red\n Balloon!", "red balloon")
    assert not is_right("a red balloon", "red balloon")
    assert is_right("<think>blue?</think>red", "red")
    assert not is_right("", "red")
    assert is_right("**“Red.”**", "red")
    assert is_right("红色。", "红色")


@pytest.mark.parametrize(
    ("reply", "answer"), [("", "+"), ("", ""), (".", "?"), ("-5", "5"), (".5", "5"), ("C", "C++"), ("5", "5 %")]
)
def test_marks_that_belong_to_an_answer(reply: str, answer: str) -> None:
    assert not is_right(reply, answer)
    assert not answer or is_right(f" {answer}\n", answer)


def test_interval_is_wilsons() -> None:
    # By hand: p = 0.9, n = 10, z = 1.96 -> centre (0.9 + 0.19207) / 1.38415 = 0.78898, half 0.19318.
    assert wilson_interval(9, 10) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    low, high = wilson_interval(0, 5)
    assert low == 0
    assert high == pytest.approx(3.8415 / (5 + 3.8415), abs=1e-4)  # z² / (n + z²)
    assert wilson_interval(5, 5) == (pytest.approx(1 - high), 1)
    with pytest.raises(ValueError, match="got 6 of 5"):
        wilson_interval(6, 5)
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson_interval(0, 0)


@pytest.fixture(scope="module")
def metric() -> Any:
    """As a user loads it."""
    evaluate = pytest.importorskip("evaluate", reason="needs the extra eval")
    return evaluate.load(str(FOLDER))


def test_metric_overall_and_by_group(metric: Any) -> None:
    result = metric.compute(
        predictions=["**C**", "The answer is (B).", "I cannot tell.", "", "(A)"],
        references=["C", "B", "A", "B", "D"],
        groups=["60s", "60s", "600s", "600s", "600s"],
    )
    assert result["accuracy"] == pytest.approx(40)
    assert result["n"] == 5
    assert result["unparsed"] == pytest.approx(40)
    assert result["cut_off"] == 0
    # Wilson for 2 of 5 by hand: centre (0.4 + 0.38415) / 1.7683 = 0.44345, half 1.96·√(0.048 + 0.038415) / 1.7683.
    assert result["interval_95"] == [pytest.approx(11.76, abs=0.01), pytest.approx(76.93, abs=0.01)]
    assert list(result["by_group"]) == ["60s", "600s"]
    assert result["by_group"]["60s"]["accuracy"] == 100
    long = result["by_group"]["600s"]
    assert (long["accuracy"], long["n"], long["unparsed"]) == (0, 3, pytest.approx(200 / 3))


def test_metric_tells_what_was_cut_off_from_what_chose_nothing(metric: Any) -> None:
    result = metric.compute(
        predictions=["<think>It is A", "A dog.", "A", "<think>red"], references=["A", "A", "A", "red"]
    )
    assert result["accuracy"] == 25
    assert result["cut_off"] == 50
    assert result["unparsed"] == pytest.approx(100 / 3)  # of the three with options


def test_metric_on_texts_and_more_options(metric: Any) -> None:
    texts = metric.compute(predictions=["Red.", "blue", "it is red"], references=["red", "green", "red"])
    assert (texts["accuracy"], texts["unparsed"]) == (pytest.approx(100 / 3), 0)
    assert "by_group" not in texts
    assert metric.compute(predictions=["H"], references=["H"], num_options=8)["accuracy"] == 100
    with pytest.raises(ValueError, match="The reference 'H' is none of ABCDE; give num_options=8"):
        metric.compute(predictions=["H"], references=["H"])
    with pytest.raises(ValueError, match="got 1 for 2 predictions"):
        metric.compute(predictions=["A", "B"], references=["A", "B"], groups=["x"])
    with pytest.raises(ValueError, match=r"num_options must be in \[2, 26\], got 1"):
        metric.compute(predictions=["A"], references=["A"], num_options=1)


def test_metric_needs_nothing_of_this_package(tmp_path: Path, metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the Hub it comes alone: the folder is copied away, and the package is not to be found."""
    import evaluate

    alone = tmp_path / "longvideo_mcq"
    shutil.copytree(FOLDER, alone)
    for path in alone.glob("*.py"):  # other content: else evaluate takes the module it has
        path.write_text(path.read_text(encoding="utf-8") + "# a copy\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "longvpo_hf", None)
    copied = evaluate.load(str(alone))
    assert type(copied) is not type(metric)
    assert copied.compute(predictions=["(A)"], references=["A"])["accuracy"] == 100
