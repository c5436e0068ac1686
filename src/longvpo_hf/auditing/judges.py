"""Judges that see no video: by length, by the question's words, by how often an answer is chosen, by all words."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longvpo_hf.auditing.findings import MIN_GROUPS, Finding, Verdict, judged
from longvpo_hf.auditing.pairs import Pair, content_words, overlap

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix

#: The share of one answer among all chosen ones at which a model may learn to always give it. Conventions.
_WARN_SHARE, _FAIL_SHARE = 0.25, 0.5
#: The classifier reads at most so many rows, drawn evenly, and so many words of a text: seconds, not minutes.
_MAX_ROWS = 5_000
_MAX_WORDS = 48
_FOLDS = 5
_SHOWN = 12
_BESIDE = " when asked "


def _picks(difference: float) -> float:
    """1 where a score speaks for the chosen answer, 0 where it speaks for the other, 0.5 where it says nothing."""
    return 0.5 if difference == 0 else float(difference > 0)


def length(pairs: Sequence[Pair], groups: Sequence[int]) -> Finding:
    """Is the longer answer, or the shorter one, the chosen one?"""
    differences = [len(content_words(pair.chosen)) - len(content_words(pair.rejected)) for pair in pairs]
    right = [_picks(difference) for difference in differences]
    longer = sum(right) >= len(right) / 2
    means = [
        sum(len(content_words(getattr(pair, side))) for pair in pairs) / len(pairs) for side in ("chosen", "rejected")
    ]
    return judged(
        "length",
        "Does length give the chosen answer away?",
        right if longer else [1 - value for value in right],
        groups,
        f"The {'longer' if longer else 'shorter'} answer is the chosen one",
        "Ask for answers of one length (a bound on words in the prompt), or drop pairs whose lengths differ most: "
        "`longvpo rows filter --max-length-ratio 1.5`.",
        (
            ("words of a chosen answer, mean", f"{means[0]:.1f}"),
            ("words of a rejected answer, mean", f"{means[1]:.1f}"),
        ),
        _most(pairs, [abs(difference) for difference in differences]),
    )


def question_words(pairs: Sequence[Pair], groups: Sequence[int]) -> Finding:
    """Does the question give its answer away?"""
    scores = []
    for pair in pairs:
        question = set(content_words(pair.question))
        share = [
            sum(word in question for word in set(answer)) / len(set(answer)) if answer else 0.0
            for answer in (content_words(pair.chosen), content_words(pair.rejected))
        ]
        scores.append(share[0] - share[1])
    return judged(
        "question_words",
        "Does the question give its answer away?",
        [_picks(score) for score in scores],
        groups,
        "The answer of which more words stand in the question is the chosen one",
        "Have the question writer ask without naming the answer; a judge drops such questions (`--judge`).",
        examples=_most(pairs, [abs(score) for score in scores]),
    )


def repeated_answers(pairs: Sequence[Pair], groups: Sequence[int]) -> Finding:
    """Are some answers chosen, and others rejected, wherever they stand?"""
    chosen, rejected = (Counter(getattr(pair, side) for pair in pairs) for side in ("chosen", "rejected"))
    own: Counter[tuple[int, str, tuple[str, ...]]] = Counter()
    for pair, group in zip(pairs, groups, strict=True):
        own[group, "chosen", pair.chosen] += 1
        own[group, "rejected", pair.rejected] += 1

    def elsewhere(answer: tuple[str, ...], group: int) -> int:
        """How much more often an answer is chosen than rejected in other groups."""
        others = chosen[answer] - own[group, "chosen", answer]
        return others - (rejected[answer] - own[group, "rejected", answer])

    right = [
        _picks(elsewhere(pair.chosen, group) - elsewhere(pair.rejected, group))
        for pair, group in zip(pairs, groups, strict=True)
    ]
    return judged(
        "repeated_answers",
        "Are some answers always chosen, or always rejected?",
        right,
        groups,
        "The answer that is chosen more often in other rows is the chosen one",
        "Drop the rows of the answers listed, or make a rejected answer of each kind as often as a chosen one.",
        tuple(
            (" ".join(answer)[:80], f"chosen {chosen[answer]}, rejected {rejected[answer]}")
            for answer, _ in (chosen + rejected).most_common(_SHOWN)
            if chosen[answer] + rejected[answer] > 1
        ),
    )


def one_answer(pairs: Sequence[Pair], groups: Sequence[int]) -> Finding:
    """Is one answer chosen in very many rows?"""
    counts = Counter(pair.chosen for pair in pairs)
    answer, number = counts.most_common(1)[0]
    share = number / len(pairs)
    title = "Is one answer chosen again and again?"
    said = f"The most frequent chosen answer, “{' '.join(answer)[:60]}”, is that of {share:.1%} of the rows."
    threshold = f"warn above {_WARN_SHARE:.0%}, fail above {_FAIL_SHARE:.0%} of the rows"
    if len(set(groups)) < MIN_GROUPS:
        return Finding("one_answer", title, Verdict.UNKNOWN, said, threshold, share)
    verdict = Verdict.FAIL if share > _FAIL_SHARE else Verdict.WARN if share > _WARN_SHARE else Verdict.PASS
    remedy = "Keep some of these rows only, or ask questions with more kinds of answers."
    examples = tuple(pair.id for pair in pairs if pair.chosen == answer)[:_SHOWN]
    return Finding("one_answer", title, verdict, said, threshold, share, remedy, (), examples)


def all_words(pairs: Sequence[Pair], groups: Sequence[int]) -> Finding:
    """Can a classifier tell the chosen from the rejected answer by their words and those of the question?"""
    name, title = "words", "Can the chosen answer be told by its words?"
    if len(set(groups)) < MIN_GROUPS:
        said = f"{len(set(groups))} groups of rows are too few to train a classifier on (≥ {MIN_GROUPS})."
        return Finding(name, title, Verdict.UNKNOWN, said)
    try:
        from sklearn.feature_extraction import FeatureHasher  # noqa: F401  # whether it is there
    except ImportError:
        said = "Not measured: it needs scikit-learn, `pip install longvpo-hf[audit]`."
        return Finding(name, title, Verdict.UNKNOWN, said)
    step = max(1, -(-len(pairs) // _MAX_ROWS))
    read = list(range(0, len(pairs), step))
    right, telling = _classify([pairs[i] for i in read], [groups[i] for i in read])
    return judged(
        name,
        title,
        right,
        [groups[i] for i in read],
        "A classifier that reads questions and answers alone (cross-validated over groups) picks the chosen one",
        "Look at the most telling words: they are what a model would learn. Drop the rows that hold them, or make both "
        "answers with the same model, prompt and bound on tokens.",
        telling,
    )


def _features(question: Sequence[str], answer: Sequence[str]) -> set[str]:
    """An answer's words, neighbours, first and last word, and its words beside those of the question."""
    answer = answer[:_MAX_WORDS]
    found = set(answer) | {f"{a} {b}" for a, b in itertools.pairwise(answer)}
    if answer:
        found |= {f"starts with {answer[0]}", f"ends with {answer[-1]}"}
    asked = set(content_words(question)[:_MAX_WORDS])
    return found | {f"{a}{_BESIDE}{q}" for q in asked for a in set(content_words(answer))}


def _classify(pairs: Sequence[Pair], groups: Sequence[int]) -> tuple[list[float], tuple[tuple[str, str], ...]]:
    """Whether a classifier that was trained on other groups tells each pair rightly; and the most telling words."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    # A word that stands in one row alone tells nothing of others.
    vectorizer = CountVectorizer(analyzer=lambda features: features, binary=True, min_df=3, max_features=50_000)
    sides = [[_features(pair.question, getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected")]
    try:
        vectorizer.fit([*sides[0], *sides[1]])
    except ValueError:  # no word stands in three texts
        return [0.5] * len(pairs), ()
    difference: csr_matrix = (vectorizer.transform(sides[0]) - vectorizer.transform(sides[1])).tocsr().astype(float)

    def trained(rows: np.ndarray) -> LogisticRegression:
        part = difference[rows]
        signs = np.where(np.arange(len(rows)) % 2, 1, -1)  # half of the pairs the other way round
        model = LogisticRegression(C=0.1, fit_intercept=False, solver="liblinear", random_state=0)
        return model.fit(part.multiply(signs[:, None]).tocsr(), signs)

    right = np.full(len(pairs), 0.5)
    for train, held_out in GroupKFold(_FOLDS).split(difference, groups=groups):
        scores = trained(train).decision_function(difference[held_out])
        right[held_out] = [_picks(score) for score in scores]
    weights = trained(np.arange(len(pairs))).coef_[0]
    names = vectorizer.get_feature_names_out()
    # Words and their neighbours before words beside a question's: these repeat what those say, for each question.
    order = sorted(range(len(names)), key=lambda i: (_BESIDE in names[i], -abs(weights[i])))
    first_beside = next((place for place, i in enumerate(order) if _BESIDE in names[i]), len(order))
    shown = [*order[: min(_SHOWN, first_beside)], *order[first_beside : first_beside + _SHOWN // 3]]
    telling = tuple(
        (str(names[i])[:80], f"speaks for {'chosen' if weights[i] > 0 else 'rejected'} ({weights[i]:+.2f})")
        for i in shown
        if abs(weights[i]) > 1e-6
    )
    return right.tolist(), telling


def blind_answers(
    pairs: Sequence[Pair], groups: Sequence[int], replies: Sequence[Sequence[str]], model: str
) -> Finding:
    """Does a model that is asked without the video answer like the chosen answer?

    Args:
        pairs: The pairs that were asked about.
        groups: The group of each.
        replies: What the model replied to each question alone, as words.
        model: Its name.
    """
    right = []
    for pair, reply in zip(pairs, replies, strict=True):
        said = content_words(reply)
        right.append(_picks(overlap(said, content_words(pair.chosen)) - overlap(said, content_words(pair.rejected))))
    return judged(
        "blind",
        "Can the questions be answered without the video?",
        right,
        groups,
        f"What {model} replies without the video is nearer to the chosen answer",
        "Drop the questions that a model answers blind, or ask for details that only the video shows.",
        examples=tuple(pair.id for pair, value in zip(pairs, right, strict=True) if value == 1)[:_SHOWN],
    )


def _most(pairs: Sequence[Pair], scores: Sequence[float]) -> tuple[str, ...]:
    """Ids of the rows with the largest scores."""
    order = sorted(range(len(pairs)), key=lambda i: -scores[i])[:_SHOWN]
    return tuple(pairs[i].id for i in order if scores[i] > 0)
