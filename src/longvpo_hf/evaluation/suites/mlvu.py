"""MLVU (arXiv 2406.04264), multiple choice: the development set, and the test set with its nine tasks and six options.

What papers report is M-Avg, the mean of the tasks' scores.
"""

from __future__ import annotations

from longvpo_hf.evaluation.official import by_rank_of_four
from longvpo_hf.evaluation.scoring import by_group
from longvpo_hf.evaluation.suite import LETTERS, UNZIP, Question, Row, Suite, letters_of


def _read_dev(row: Row, _: str) -> Question:
    return Question(
        text=f"{row.text('question')}\nOnly give the best option.\nBest option: (",
        letters=LETTERS[:4],
        answer=row.text("answer"),
        videos=(f"mlvu/{row.text('video_name')}",),
        group=row.text("task_type"),
    )


def _read_test(row: Row, _: str) -> Question:
    return Question(
        text=row.text("question"),  # lmms-eval adds nothing here
        letters=letters_of(row.text("question")) or LETTERS[:6],
        answer=row.text("answer"),
        videos=(f"mlvu_test/{row.text('video_name')}",),
        group=row.text("task_type"),
    )


SUITES = (
    Suite(
        name="mlvu",
        title="MLVU (M-Avg)",
        dataset="sy1998/MLVU_dev",
        split="test",
        read=_read_dev,
        media="mlvu",
        unpack=UNZIP,
        official=by_rank_of_four,
        units=by_group,
        headline="m_avg",
        groups=("topic_reasoning", "anomaly_reco", "needle", "ego", "plotQA", "order", "count"),
    ),
    Suite(
        name="mlvu_test",
        title="MLVU-Test (M-Avg)",
        dataset="sy1998/MLVU_Test",
        split="test",
        read=_read_test,
        media="mlvu_test",
        unpack=UNZIP,
        # lmms-eval looks for A to D only, so that questions whose answer is E or F are wrong by this rule.
        official=by_rank_of_four,
        units=by_group,
        headline="m_avg",
        groups=(
            *("topic_reasoning", "anomaly_reco", "needleQA", "ego", "plotQA", "sportsQA", "order", "count"),
            "tutorialQA",
        ),
    ),
)
