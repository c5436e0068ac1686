"""From an answered pair to its row, and what the dataset's card tells of the rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from longvpo_hf.building.filters import normalise
from longvpo_hf.building.method import Answered, Draft, Method, spans_of
from longvpo_hf.errors import DatasetError
from longvpo_hf.preference import Provenance, VideoPreference
from longvpo_hf.timeline import Timeline, View


def row_of(method: Method, pair: Answered, answer_model: str, seed: int) -> VideoPreference:
    """The row of a pair.

    Args:
        method: How the pair was made; gives the policy's and the reference's view.
        pair: The pair.
        answer_model: Name of who gave both answers.
        seed: Decides every random choice.

    Raises:
        DatasetError: If no row can hold the views: the policy's must show all evidence and all that the reference is
            scored on, and both choose clips, not frames.
    """
    draft = pair.draft
    policy = method.policy(draft, draft.random(seed, "policy"))
    scored = method.reference(draft, draft.random(seed, "reference"))
    place = {index: position for position, index in enumerate(policy.indices(len(draft.timeline)))}
    reference = () if scored == View.whole() else scored.indices(len(draft.timeline))
    for whose, view, needed in (("policy", policy, draft.evidence), ("reference", scored, reference)):
        hidden = [index for index in needed if index not in place]
        if hidden:
            what = "all evidence" if whose == "policy" else "all that the reference is scored on"
            raise DatasetError(f"{method.name}: the policy's view must show {what}; it lacks clips {hidden}.")
        if view.num_frames is not None:
            raise DatasetError(
                f"{method.name}: the {whose}'s view is {view}, but a row holds clips, not frames: choose clips "
                "here, and frames in the training's settings."
            )
    return VideoPreference(
        timeline=Timeline(tuple(draft.timeline.clips[index] for index in place)),
        question=draft.question,
        chosen=pair.chosen,
        rejected=pair.rejected,
        evidence=tuple(place[index] for index in draft.evidence),
        reference=tuple(place[index] for index in reference),
        provenance=Provenance(
            method=method.name,
            chosen_view=str(pair.asked.chosen_view),
            rejected_view=str(pair.asked.rejected_view),
            question_model=method.question_model,
            answer_model=answer_model,
            prompt_version=method.prompt_version,
            question_type=draft.question_type,
            reasoning=draft.reasoning,
            similarities=draft.similarities,
            verdicts=(
                *(question_filter.verdict for question_filter in method.question_filters),
                "answers_differ",
                *(pair_filter.verdict for pair_filter in method.pair_filters),
            ),
            seed=seed,
        ),
    )


def question_id(timeline: Timeline, question: str, root: str) -> str:
    """The same for questions that say the same about the same timeline, its files named below the folder `root`."""
    content = [spans_of(timeline, root), normalise(question)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:32]


def question_of(method: Method, draft: Draft, seed: int, root: str) -> str:
    """The `question_id` that a draft's question has in its row, whose timeline is what the policy sees."""
    policy = method.policy(draft, draft.random(seed, "policy"))
    return question_id(policy.of(draft.timeline), draft.question, root)


def degradation(view: View, draft: Draft) -> str:
    """What a view lacks, in words for the card; it follows from a row's evidence and `rejected_view`."""
    seen = view.indices(len(draft.timeline))
    if list(seen) != sorted(seen):
        return "other order"
    found = set(seen) & set(draft.evidence)
    if draft.evidence and not found:
        return "no evidence"
    if len(found) < len(draft.evidence):
        return "part of the evidence"
    return "all evidence" if view.num_frames is None else "sparse frames"


class Shares:
    """Counts what the card tells of the rows: where evidence is, what rejected answers lack, types of question."""

    def __init__(self) -> None:
        self._tenths = [0] * 10  # of the timeline
        self._rejected_from: Counter[str] = Counter()
        self._types: Counter[str] = Counter()

    def count(self, pair: Answered) -> None:
        """Counts one row."""
        draft = pair.draft
        for index in draft.evidence:
            self._tenths[min(9, int(10 * draft.timeline.centre(index)))] += 1
        self._rejected_from[degradation(pair.asked.rejected_view, draft)] += 1
        if draft.question_type:
            self._types[draft.question_type] += 1

    def facts(self) -> dict[str, object]:
        """Named facts for the card."""
        total = sum(self._tenths)
        facts: dict[str, object] = {}
        if total:
            shares = ", ".join(f"{100 * number / total:.0f} %" for number in self._tenths)
            facts["evidence positions"] = f"by tenth of the timeline: {shares}"
        for name, counter in (("rejected answers from", self._rejected_from), ("question types", self._types)):
            number = sum(counter.values())
            if number:
                facts[name] = ", ".join(f"{kind} {100 * n / number:.0f} %" for kind, n in counter.most_common())
        return facts
