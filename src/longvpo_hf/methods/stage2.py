"""LongVPO Stage 2: preference rows over several scenes of one long video.

Takes captioned videos (`captioning.py`), who writes questions from captions, who answers and, if wanted, who judges;
gives a dataset folder (`hub.py`). The question writer cites the scenes its question needs, the evidence. Chosen is the
answer given from them, rejected the one given from a part of them or from none of them. How rows are made of the method
is `engine.py`'s; knows nothing of training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longvpo_hf.building import prompts
from longvpo_hf.building.engine import (
    Asker,
    Draft,
    Drop,
    Method,
    Pair,
    PairFilter,
    Part,
    ViewOf,
    build,
    evidence,
    log_folder,
    what_rows_follow_from,
    whole,
)
from longvpo_hf.building.filters import check_question
from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.errors import ConfigError
from longvpo_hf.funnel import REASONS, Funnel
from longvpo_hf.responders import Request, Responder, identity
from longvpo_hf.responders.replies import json_object, yes_or_no
from longvpo_hf.timeline import View

if TYPE_CHECKING:
    import numpy as np

METHOD = "longvpo-stage2"

#: "Scene #3", "#3", "scene 3", "#3-#5", "Scenes #3, 4 and #7", "Scenes #3 to #5".
_CITED = re.compile(
    r"\bscenes\s+#?\s*\d{1,6}(?:\s*(?:,\s*and\b|,|&|\band\b|\bto\b|\bthrough\b|[-–])\s*(?:scenes?\s*)?#?\s*\d{1,6})*"
    r"|(?:#\s*|\bscene\s+)\d{1,6}(?:\s*[-–]\s*#?\d{1,6})?",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(\bto\b|\bthrough\b|[-–])?\s*(?:scenes?\s*)?#?\s*(\d{1,6})", re.IGNORECASE)
#: Fewest characters of a line that still says something.
_LINE_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Stage2Settings:
    """What a Stage-2 build is asked for.

    Args:
        num_rows: Rows to make (paper: 6k).
        chosen_from: View the chosen answer is given from. The paper says both: the critical scenes (§4.1, Fig. 3) and
            the full video (§3.4). Default the scenes: it says so twice, and a model that needs this training is at its
            best on few scenes.
        reference: View the reference model is scored on. The paper: the whole video. The evidence is ours to measure.
        partial_share: Share of rows whose rejected answer is given from a part of the evidence; the others' from the
            scenes that are not cited, or from a part too where all are. The paper has both and no share: even, ours.
        max_tries: How often a question is asked for where an answer is refused; each further try says why.
        max_context_characters: Most characters of captions the question writer and the judge are shown, about 6,000
            tokens. Of a longer video the writer sees a spread of scenes and the summaries of all; the judge, where the
            evidence is longer, the begin of each caption.
        max_rounds: How often more questions are asked for to make up for dropped ones before giving up.
        seed: Same seed, same videos, same models: same rows.
    """

    num_rows: int = 6_000
    chosen_from: Literal["evidence", "whole"] = "evidence"
    reference: Literal["whole", "evidence"] = "whole"
    partial_share: float = 0.5
    max_tries: int = 3
    max_context_characters: int = 24_000
    max_rounds: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_rows", "max_tries", "max_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be ≥ 1, got {getattr(self, name)}.")
        if self.max_context_characters < 1000:
            raise ConfigError(f"max_context_characters must be ≥ 1000, got {self.max_context_characters}.")
        if not 0 <= self.partial_share <= 1:
            raise ConfigError(f"partial_share must be in [0, 1], got {self.partial_share}.")
        for name in ("chosen_from", "reference"):
            if getattr(self, name) not in ("evidence", "whole"):
                raise ConfigError(f"{name} must be 'evidence' or 'whole', got {getattr(self, name)!r}.")


def method(
    videos: Sequence[CaptionedVideo],
    question_writer: Responder,
    settings: Stage2Settings,
    rejected: ViewOf,
    judge: Responder | None = None,
) -> Method:
    """Stage 2 as a method.

    Args:
        videos: The captioned videos of the drafts.
        question_writer: Writes questions from captions; sees no frame.
        settings: See `Stage2Settings`.
        rejected: `part_of_evidence` or `uncited`.
        judge: Says whether the captions of the evidence support the chosen answer, and whether the rejected one is
            right after all; sees no frame. None leaves that out.
    """
    views: dict[str, ViewOf] = {"evidence": evidence, "whole": whole}
    return Method(
        name=METHOD,
        prompt_version=prompts.STAGE2_VERSION,
        question_model=question_writer.name,
        write=_Writer(question_writer, videos, settings),
        chosen=views[settings.chosen_from],
        rejected=rejected,
        reference=views[settings.reference],
        pair_filters=(
            PairFilter("supported", partial(_drop_unsupported, judge, settings.max_context_characters)),
            PairFilter("rejected_is_wrong", partial(_drop_right_ones, judge, settings.max_context_characters)),
        )
        if judge
        else (),
    )


def build_stage2(
    videos: Sequence[CaptionedVideo],
    question_writer: Responder,
    answerer: Responder,
    output: Path,
    settings: Stage2Settings,
    judge: Responder | None = None,
    media_root: Path | None = None,
    facts: Mapping[str, object] | None = None,
    funnel: Funnel | None = None,
) -> dict[str, dict[str, int]]:
    """Builds a Stage-2 dataset; see `engine.build` for how it resumes.

    Args:
        videos: What questions are asked about, as often as it takes. Those with fewer than two captions are dropped.
        question_writer: See `method`.
        answerer: Gives both answers: the model that will be trained.
        output: Folder of the dataset; see `hub.py`. An earlier one there is replaced.
        settings: See `Stage2Settings`.
        judge: See `method`; None leaves it out, which the card then says.
        media_root: See `hub.DatasetWriter`: None publishes the media, a folder names them by reference.
        facts: What else the card shall say of how the videos came about.
        funnel: One that has counted what came before the videos; it is closed here. None begins with the videos.

    Returns:
        The funnel: what came through each stage, what was dropped for which reason. Every draft is a row or a drop.

    Raises:
        ValueError: If no row came out.
    """
    funnel = funnel or Funnel(log_folder(output))
    usable = with_captions(videos, 2, funnel)
    num_partial = round(settings.num_rows * settings.partial_share)
    shares: list[tuple[ViewOf, int]] = [(part_of_evidence, num_partial), (uncited, settings.num_rows - num_partial)]
    kinds = [(view, num_rows) for view, num_rows in shares if num_rows]
    return build(
        [
            # In turns: what becomes of one kind decides nothing of the other's drafts.
            Part(
                method(usable, question_writer, settings, view, judge),
                Rotation(usable, settings.seed, first=kind, step=len(kinds)),
                num_rows,
            )
            for kind, (view, num_rows) in enumerate(kinds)
        ],
        answerer,
        output,
        name=METHOD,
        title="LongVPO Stage 2: preference rows over several scenes",
        seed=settings.seed,
        max_rounds=settings.max_rounds,
        follows_from=follows_from(settings, usable, question_writer, judge),
        funnel=funnel,
        media_root=media_root,
        facts={
            "method": METHOD,
            "rows asked for": settings.num_rows,
            "videos": len(usable),
            "question model": question_writer.name,
            "answer model": answerer.name,
            "judge": judge.name if judge else "none",
            "chosen answers from": settings.chosen_from,
            "reference scored on": settings.reference,
            "prompt version": prompts.STAGE2_VERSION,
            "seed": settings.seed,
            **(facts or {}),
        },
        remedy="Add videos, raise max_rounds or max_tries, or choose a stronger question writer.",
    )


def with_captions(videos: Sequence[CaptionedVideo], at_least: int, funnel: Funnel) -> list[CaptionedVideo]:
    """The videos with so many captioned scenes; the others are dropped.

    Raises:
        ValueError: If none is left.
    """
    usable = []
    for video in videos:
        if len(video.captioned_scenes) >= at_least:
            usable.append(video)
        else:
            clip = video.timeline.clips[0]
            funnel.drop("too_few_captions", path=clip.path, source_id=clip.source_id, scenes=len(video.timeline))
    funnel.count("videos with captions", len(usable))
    if not usable:
        funnel.close()
        raise ConfigError(
            f"None of {len(videos)} videos has {at_least} captioned scenes or more. Lower the length of a scene, or "
            "look at the captions with longvpo inspect."
        )
    return usable


def follows_from(
    settings: Any, videos: Sequence[CaptionedVideo], question_writer: Responder, judge: Responder | None
) -> list[Any]:
    """See `engine.build`."""
    summed_up = [video.history for video in videos if video.summaries]
    return [what_rows_follow_from(settings), identity(question_writer), identity(judge) if judge else "", summed_up]


class Rotation:
    """Drafts that go round the videos, each time in another order; a draft's `number` counts the times.

    Args:
        videos: The captioned videos.
        seed: Decides the orders.
        first: Number of the first time.
        step: From one time's number to the next: with as many rotations as this, no two give the same draft.
    """

    def __init__(self, videos: Sequence[CaptionedVideo], seed: int, first: int = 0, step: int = 1) -> None:
        self._videos = videos
        self._seed = seed
        self._first = first
        self._step = step
        self._drawn = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def order(self, number: int) -> Sequence[int]:
        """In which order the videos come the given time."""
        import numpy as np

        if self._order[0] != number:
            drawn = np.random.default_rng([self._seed, number]).permutation(len(self._videos))
            self._order = (number, drawn.tolist())
        return self._order[1]

    def __call__(self, round_index: int, missing: int) -> Iterator[list[Draft]]:
        """As many drafts as rows are missing, going on where the round before stopped."""
        drawn, self._drawn = self._drawn, self._drawn + missing  # at once: who takes all drafts may not ask for more
        for place in range(drawn, drawn + missing):
            times, position = divmod(place, len(self._videos))
            number = self._first + self._step * times
            yield [Draft(self._videos[self.order(number)[position]].timeline, number=number)]


class _Writer:
    """Asks for questions over scenes, and again where an answer is refused."""

    def __init__(self, writer: Responder, videos: Sequence[CaptionedVideo], settings: Stage2Settings) -> None:
        self._writer = writer
        self._videos = {video.timeline: video for video in videos}
        self._settings = settings

    def __call__(self, drafts: Sequence[Draft], ask: Asker) -> list[Draft | Drop]:
        outcomes: list[Draft | Drop] = [Drop("malformed_question")] * len(drafts)
        waiting = dict.fromkeys(range(len(drafts)), "")  # and why the try before was refused
        for _ in range(self._settings.max_tries):
            shown = {i: self._shown(drafts[i]) for i in waiting}
            requests = [
                Request(self._prompt(drafts[i], shown[i], refused), schema=prompts.QUESTION_SCHEMA)
                for i, refused in waiting.items()
            ]
            answers = ask(self._writer, requests, "questions", remember=True)
            for i, answer in zip(list(waiting), answers, strict=True):
                outcome = (
                    answer if isinstance(answer, Drop) else _read(drafts[i], answer, shown[i], self._focus(drafts[i]))
                )
                outcomes[i] = outcome
                if isinstance(outcome, Drop) and not isinstance(answer, Drop):
                    # With all reasons so far, no try is the same as one before, which would only be remembered.
                    before = f", and the one before: {waiting[i]}" if waiting[i] else ""
                    waiting[i] = REASONS[outcome.reason] + before
                else:  # written, or the model was not reached: asking on will not help
                    del waiting[i]
            if not waiting:
                break
        return outcomes

    def _focus(self, draft: Draft) -> int | None:
        """A scene that a further question about a video must need, so that it differs from those before it."""
        if draft.number == 0:
            return None
        scenes = self._videos[draft.timeline].captioned_scenes
        order = replace(draft, number=0).random(self._settings.seed, "focus").permutation(scenes)
        return int(order[(draft.number - 1) % len(order)])

    def _shown(self, draft: Draft) -> list[int]:
        """The scenes the writer is shown: all, or a spread of as many as fit."""
        import numpy as np

        scenes = self._videos[draft.timeline].captioned_scenes
        lengths = {scene: len(draft.timeline.clips[scene].caption) + len(f"Scene #{scene}: \n") for scene in scenes}
        most = self._settings.max_context_characters
        if sum(lengths.values()) <= most:
            return list(scenes)
        rng = draft.random(self._settings.seed, "scenes")
        # Half of the room is the summaries'. One scene of each of so many equal parts.
        number = max(2, int(len(scenes) * (most / 2) / sum(lengths.values())))
        picked = [scenes[int(place)] for place in (np.arange(number) + rng.random(number)) * len(scenes) / number]
        focus = self._focus(draft)
        shown = [] if focus is None else [focus]
        for scene in rng.permutation(picked).tolist():
            fits = sum(lengths[other] for other in (*shown, scene)) <= most // 2
            if scene not in shown and (fits or len(shown) < 2):
                shown.append(scene)
        return sorted(shown)

    def _prompt(self, draft: Draft, shown: Sequence[int], refused: str) -> str:
        video = self._videos[draft.timeline]
        captions, overview = [draft.timeline.clips[scene].caption for scene in shown], []
        room = self._settings.max_context_characters
        if len(shown) < len(video.captioned_scenes):
            room //= 2
            overview = within(video.history, room)
        captions = within(captions, room - sum(len(f"Scene #{scene}: ") for scene in shown))
        return prompts.question_over_scenes(
            list(zip(shown, captions, strict=True)), overview, self._focus(draft), refused
        )


def within(lines: Sequence[str], most: int) -> list[str]:
    """The lines, cut so that together they have at most so many characters; a spread of them where they are many."""
    if sum(len(line) + 1 for line in lines) <= most:
        return list(lines)
    number = max(1, min(len(lines), most // _LINE_CHARACTERS))
    spread = [lines[(2 * place + 1) * len(lines) // (2 * number)] for place in range(number)]
    return [line[: most // number - 1] for line in spread]


def _read(draft: Draft, answer: str, shown: Sequence[int], focus: int | None) -> Draft | Drop:
    """The draft with what the writer answered, or what is wrong with it."""
    fields = json_object(answer)
    texts = [(fields or {}).get(name) for name in ("question", "answer", "reasoning")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return Drop("malformed_question", answer)
    question, sketch, reasoning = (str(text).strip() for text in texts)
    cited = _cited(reasoning)
    detail = f"{question} — {reasoning}"
    if not set(cited) <= set(shown):
        return Drop("unknown_scene", detail)
    if len(cited) < 2:
        return Drop("too_few_scenes", detail)
    if focus is not None and focus not in cited:
        return Drop("lacks_focus", detail)
    reason = "names_position" if _CITED.search(question) else check_question(question)
    if reason:
        return Drop(reason, question)
    return replace(draft, question=question, evidence=tuple(cited), reasoning=f"{reasoning} Answer: {sketch}")


def _cited(reasoning: str) -> list[int]:
    """The scenes a reasoning cites, in order."""
    cited: set[int] = set()
    for match in _CITED.finditer(reasoning):
        begin = None
        for through, number in _NUMBER.findall(match[0]):
            scene = int(number)
            cited.update(range(begin, scene) if through and begin is not None else (), [scene])
            begin = scene
    return sorted(cited)


def part_of_evidence(draft: Draft, rng: np.random.Generator) -> View:
    """Some of the cited scenes, not all."""
    size = int(rng.integers(1, len(draft.evidence)))
    return View.only(int(clip) for clip in rng.choice(draft.evidence, size, replace=False))


def uncited(draft: Draft, rng: np.random.Generator) -> View:
    """The scenes that are not cited; some of the cited ones where all are."""
    if len(draft.evidence) == len(draft.timeline):
        return part_of_evidence(draft, rng)
    return View.without(draft.evidence)


def _drop_unsupported(judge: Responder, most: int, pairs: Sequence[Pair], ask: Asker) -> list[Drop | None]:
    return _judged(judge, most, [(pair, pair.chosen) for pair in pairs], ask, wanted=True, reason="unsupported")


def _drop_right_ones(judge: Responder, most: int, pairs: Sequence[Pair], ask: Asker) -> list[Drop | None]:
    answers = [(pair, pair.rejected) for pair in pairs]
    return _judged(judge, most, answers, ask, wanted=False, reason="rejected_is_right")


def _judged(
    judge: Responder, most: int, answers: Sequence[tuple[Pair, str]], ask: Asker, wanted: bool, reason: str
) -> list[Drop | None]:
    requests = [
        Request(prompts.is_supported(pair.draft.question, answer, within(evidence_captions(pair.draft), most)))
        for pair, answer in answers
    ]
    drops: list[Drop | None] = []
    for (_, answer), verdict in zip(answers, ask(judge, requests, "judging pairs"), strict=True):
        said = verdict if isinstance(verdict, Drop) else yes_or_no(verdict)
        if isinstance(said, Drop):
            drops.append(said)
        elif said is wanted:
            drops.append(None)
        else:
            drops.append(Drop("malformed_verdict" if said is None else reason, f"{answer} — judge: {verdict}"))
    return drops


def evidence_captions(draft: Draft) -> list[str]:
    """Captions of the evidence, or of all scenes where no scene stands out, a line each."""
    scenes = draft.evidence or range(len(draft.timeline))
    captions = ((scene, draft.timeline.clips[scene].caption) for scene in scenes)
    return [f"Scene #{scene}: {caption}" for scene, caption in captions if caption]
