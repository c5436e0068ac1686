"""LongVPO Stage 2 (arXiv 2602.02341): preference rows over several scenes of one long video.

A language model that reads the scenes' captions (`building.captioning`) writes a question and cites the scenes that it
needs, the *evidence*. Chosen is the answer given from them, rejected the one given from some of them or from none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longvpo_hf.building.asking import Asker
from longvpo_hf.building.filters import check_question, is_ellipsis
from longvpo_hf.building.judging import YES_OR_NO, described, unless
from longvpo_hf.building.method import Answered, Draft, Drop, Method, PairFilter, Part, ViewOf, evidence, whole
from longvpo_hf.building.rehearsal import all_things_in, digits_of, things_in
from longvpo_hf.building.scenes import Rotation, evidence_captions, follows_from, with_captions, within
from longvpo_hf.errors import ConfigError, check_seed, check_types
from longvpo_hf.funnel import Funnel, open_log
from longvpo_hf.papers import LONGVPO
from longvpo_hf.paths import common_folder
from longvpo_hf.responders import CutOff, Request, Responder
from longvpo_hf.responders.replies import json_object
from longvpo_hf.timeline import Timeline, View

if TYPE_CHECKING:
    import numpy as np

    from longvpo_hf.building.executors import Executor
    from longvpo_hf.captions import CaptionedVideo

NAME = "longvpo-stage2"
#: Version of the prompt texts below; a change of wording is a new version.
PROMPT_VERSION = "stage2-2"
#: Drops of this method's own.
REASONS = {
    "unknown_scene": "the reasoning cites a scene that does not exist or has no caption",
    "too_few_scenes": "the reasoning cites fewer than two scenes",
    "lacks_focus": "the reasoning does not cite the scene the question was to be about",
    "unsupported": "the judge: the captions do not support the chosen answer",
    "rejected_is_right": "the judge: the rejected answer is right too",
}
#: Settings of the training on these rows, with their source; see `training.config.LongVPOConfig`.
TRAINING: Mapping[str, tuple[Any, str]] = {
    "reference": ("full", "LongVPO, Stage 2: on the whole video; `anchor` scores it on the evidence scenes"),
    "beta": (0.01, "LongVPO"),
    "sft_weight": (1.0, "LongVPO: α"),
    "learning_rate": (5e-7, "LongVPO"),
    "warmup_steps": (0.01, "LongVPO: a share of the steps"),
}

#: More than "Scene #100000: " and a line break.
_LABEL_CHARACTERS = 20

#: What the question writer answers; `json_object` reads it.
QUESTION_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("question", "answer", "reasoning")},
    "required": ["question", "answer", "reasoning"],
    "additionalProperties": False,
}

#: "Scene #3", "#3", "scene 3", "#3-#5", "Scenes #3, 4 and #7", "Scenes #3 to #5".
_CITED = re.compile(
    r"\bscenes\s+(?:#\s*)?\d{1,6}"
    r"(?:\s*(?:,(?:\s*and\b)?|&|\band\b|\bto\b|\bthrough\b|[-–])\s*(?:scenes?\s*)?(?:#\s*)?\d{1,6})*"
    r"|(?:#\s*|\bscene\s+)\d{1,6}(?:\s*[-–]\s*#?\d{1,6})?",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?:(\bto\b|\bthrough\b|[-–])\s*)?(?:scenes?\s*)?(?:#\s*)?(\d{1,6})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stage2Settings:
    """What a Stage-2 build is asked for.

    Args:
        num_rows: Rows to make (LongVPO: 6k).
        chosen_from: View of the chosen answer: the cited scenes (LongVPO, §4.1 and Fig. 3), or the whole video (§3.4).
            A model that needs this training is at its best on few scenes.
        reference: View the reference model is scored on (LongVPO: the whole video; the evidence is ours to measure).
        partial_share: Share of rows whose rejected answer is given from a part of the evidence; that of the others is
            given from the scenes that are not cited, or from a part too where all are cited (LongVPO has both and names
            no share: ours).
        max_tries: How often a question is asked for where an answer is refused; each further try says why.
        max_context_characters: Most characters of captions that the question writer and the judge read, about 6,000
            tokens. Of a longer video the writer reads a spread of scenes and the summaries of all; where the evidence
            is longer, the judge reads the start of each caption.
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
        check_types(self)
        check_seed(self.seed)
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


def most_rows(timelines: Sequence[Timeline], settings: Stage2Settings, max_caption_characters: int) -> int | None:
    """Most rows that can be made of videos; None where that is not known before questions are asked for.

    Where all captions of a video fit into a prompt, there is one prompt for each scene and one that leaves the choice
    free, and the same prompt gives the same question.

    Args:
        timelines: The videos. Clips without captions are taken to get one, unless others of the video have theirs.
        settings: See `Stage2Settings`.
        max_caption_characters: Bound on a caption that is still to be written.
    """
    most = 0
    for timeline in timelines:
        captions = [clip.caption for clip in timeline.clips if clip.caption]
        lengths = list(map(len, captions)) or [max_caption_characters] * len(timeline)
        if sum(lengths) + _LABEL_CHARACTERS * len(lengths) > settings.max_context_characters:
            return None
        most += len(lengths) + 1 if len(lengths) > 1 else 0
    return most


# ------------------------------------------------------------------------------------------------------------- prompts


def question_prompt(scenes: Sequence[tuple[int, str]], overview: Sequence[str], focus: int | None, again: str) -> str:
    """Asks for a question that takes several scenes to answer, with the reasoning.

    Args:
        scenes: Number and caption of the scenes that may be cited, in order.
        overview: What happens in the whole video, a line each; empty where `scenes` are all there are.
        focus: A scene the question must need; None leaves the choice free.
        again: What to do better than at the tries before, see `try_again`; empty at the first.
    """
    told = "What happens in the whole video:\n" + "\n".join(overview) + "\n\n" if overview else ""
    lines = "\n".join(f"Scene #{number}: {caption}" for number, caption in scenes)
    needed = f" One of them must be Scene #{focus}." if focus is not None else ""
    return (
        f"{told}These are scenes of one long video, in order:\n{lines}\n\n"
        "Write one question about the video that can only be answered by whoever has seen two or more of these scenes "
        f"and puts together what they show.{needed} Ask as somebody would who watches the video: describe people, "
        "things and events, never name scenes by their numbers nor say where in the video they are. Write the answer, "
        "and the reasoning that leads to it, which cites every scene that is needed, and no other, as "
        f'"Scene #N".{again}\nAnswer with a JSON object and nothing else: '
        '{"question": "...", "answer": "...", "reasoning": "..."}'
    )


#: What to do better, by what was wrong with a reply. Small models repeat a complaint in place of an answer, so these
#: are orders, none of which could pass for a question or an object.
_BETTER = {
    "malformed_question": "Give the JSON object alone, with no word before or after it.",
    "cut_off": "Keep each of its three texts under 40 words.",
    "copied_example": "Put texts of your own in place of the dots.",
    "unknown_scene": "Cite no other scenes than those above.",
    "too_few_scenes": "Cite two or more scenes in the reasoning.",
    "lacks_focus": "Cite the scene that must be among them.",
    "names_position": "Leave numbers of scenes and places in the video out of the question.",
    "empty_question": "Put a question into the object.",
    "no_question": "End the question with a question mark.",
    "question_too_long": "Ask in one sentence.",
    "refusal": "Go by what the descriptions of the scenes say.",
}


def try_again(reasons: Sequence[str]) -> str:
    """Asks for another try.

    Args:
        reasons: Why the tries before were refused, in order. Their number makes each try another request, as a request
            that was asked before is only remembered.
    """
    orders = " ".join(dict.fromkeys(_BETTER[reason] for reason in reasons))
    return f"\nWrite version {len(reasons) + 1}. {orders}"


def support_prompt(question: str, answer: str, captions: Sequence[str]) -> str:
    """Asks whether an answer holds, given the captions of the scenes it is about."""
    lines = "\n".join(captions)
    return (
        f"What a video shows:\n{lines}\n\nQuestion about it: {question}\nAnswer: {answer}\n"
        f"Do these descriptions support the answer, and contradict no part of it? {YES_OR_NO}"
    )


# ---------------------------------------------------------------------------------------------------------- the method


def method(
    videos: Sequence[CaptionedVideo],
    question_writer: Responder,
    settings: Stage2Settings,
    rejected: ViewOf,
    judge: Responder | None = None,
) -> Method:
    """How Stage-2 rows are made.

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
        name=NAME,
        prompt_version=PROMPT_VERSION,
        question_model=question_writer.name,
        write=_Writer(question_writer, videos, settings),
        chosen=views[settings.chosen_from],
        rejected=rejected,
        reference=views[settings.reference],
        pair_filters=(
            PairFilter("supported", partial(_drop_unsupported, judge, settings.max_context_characters), judge.name),
            PairFilter(
                "rejected_is_wrong", partial(_drop_right_ones, judge, settings.max_context_characters), judge.name
            ),
        )
        if judge
        else (),
        reasons=REASONS,
        citation=LONGVPO,
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
    executor: Executor | None = None,
) -> dict[str, dict[str, int]]:
    """Builds a Stage-2 dataset; see `building.engine.build` for how it resumes.

    Args:
        videos: What questions are asked about, as often as it takes. Those with fewer than two captions are dropped.
        question_writer: See `method`.
        answerer: Gives both answers: the model that will be trained.
        output: Folder of the dataset; an earlier one there is replaced.
        settings: See `Stage2Settings`.
        judge: See `method`; None leaves it out, which the card then says.
        media_root: See `publishing.dataset.DatasetWriter`: None publishes the media, a folder names them by reference.
        facts: What else the card should say of how the videos came about.
        funnel: One that has counted what came before the videos; it is closed here. None starts with the videos.
        executor: Who works the pieces, see `building.executors`; None: this process.

    Returns:
        The funnel: what came through each stage, what was dropped for which reason. Every draft is a row or a drop.

    Raises:
        ConfigError: If no video has two captions.
        DatasetError: If no row came out.
    """
    from longvpo_hf.building.engine import build
    from longvpo_hf.building.executors import HERE

    executor = executor or HERE
    with open_log(executor.place(output), funnel) as funnel:
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
            name=NAME,
            title="LongVPO Stage 2: preference rows over several scenes",
            seed=settings.seed,
            max_rounds=settings.max_rounds,
            follows_from=follows_from(settings, usable, question_writer, judge),
            funnel=funnel,
            media_root=media_root,
            settings=settings,
            root=common_folder(clip.path for video in usable for clip in video.timeline.clips),
            executor=executor,
            models={"questions": question_writer, "judge": judge},
            facts={
                "method": NAME,
                "rows asked for": settings.num_rows,
                "videos": len(usable),
                "question model": question_writer.name,
                "answer model": answerer.name,
                "judge": described(judge),
                "chosen answers from": settings.chosen_from,
                "reference scored on": settings.reference,
                "prompt version": PROMPT_VERSION,
                "seed": settings.seed,
                **(facts or {}),
            },
            remedy="Add videos, raise max_rounds or max_tries, or choose a stronger question writer.",
        )


# -------------------------------------------------------------------------------------------------- the question writer


class _Writer:
    """Asks for questions over scenes, and again where an answer is refused."""

    def __init__(self, writer: Responder, videos: Sequence[CaptionedVideo], settings: Stage2Settings) -> None:
        self._writer = writer
        self._videos = {video.timeline: video for video in videos}
        self._settings = settings

    def __call__(self, drafts: Sequence[Draft], ask: Asker) -> list[Draft | Drop]:
        outcomes: list[Draft | Drop] = [Drop("malformed_question")] * len(drafts)
        waiting: dict[int, list[str]] = {i: [] for i in range(len(drafts))}  # and why the tries before were refused
        for _ in range(self._settings.max_tries):
            shown = {i: self._shown(drafts[i]) for i in waiting}
            requests = [self._request(drafts[i], shown[i], reasons) for i, reasons in waiting.items()]
            answers = ask(self._writer, requests, "questions", remember=True)
            for i, answer in zip(list(waiting), answers, strict=True):
                if isinstance(answer, Drop):  # the model gave nothing: asking on will not help
                    outcomes[i] = answer
                    del waiting[i]
                    continue
                outcomes[i] = outcome = _read(drafts[i], answer, shown[i], self._focus(drafts[i]))
                if isinstance(outcome, Drop):
                    waiting[i].append(outcome.reason)
                else:
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

    def _request(self, draft: Draft, shown: Sequence[int], reasons: Sequence[str]) -> Request:
        video = self._videos[draft.timeline]
        captions, overview = [draft.timeline.clips[scene].caption for scene in shown], []
        room = self._settings.max_context_characters
        if len(shown) < len(video.captioned_scenes):
            room //= 2
            overview = within(video.history, room)
        captions = within(captions, room - sum(len(f"Scene #{scene}: ") for scene in shown))
        scenes, focus = list(zip(shown, captions, strict=True)), self._focus(draft)
        text = question_prompt(scenes, overview, focus, try_again(reasons) if reasons else "")
        return Request(text, schema=QUESTION_SCHEMA, rehearsed=partial(_rehearsed_question, text, scenes, focus))


def _rehearsed_question(text: str, scenes: Sequence[tuple[int, str]], focus: int | None) -> str:
    captions = dict(scenes)
    others = sorted((scene for scene in captions if scene != focus), key=lambda scene: digits_of(f"{text}{scene}"))
    cited = ([] if focus is None else [focus]) + others
    return json.dumps(
        {
            "question": "What do "
            + " and ".join(things_in(captions[scene]) for scene in cited[:2])
            + " have in common?",
            "answer": "They are things.",
            "reasoning": " and ".join(f"Scene #{scene}" for scene in cited[:2]) + " show them.",
        }
    )


def _read(draft: Draft, answer: str, shown: Sequence[int], focus: int | None) -> Draft | Drop:
    """The draft with what the writer answered, or what is wrong with it."""
    fields = json_object(answer)
    texts = [(fields or {}).get(name) for name in ("question", "answer", "reasoning")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return Drop("cut_off" if isinstance(answer, CutOff) else "malformed_question", answer)
    if any(is_ellipsis(str(text)) for text in texts):
        return Drop("copied_example", answer)
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


# ----------------------------------------------------------------------------------------------------- views, the judge


def part_of_evidence(draft: Draft, rng: np.random.Generator) -> View:
    """Some of the cited scenes, not all."""
    size = int(rng.integers(1, len(draft.evidence)))
    return View.only(int(clip) for clip in rng.choice(draft.evidence, size, replace=False))


def uncited(draft: Draft, rng: np.random.Generator) -> View:
    """The scenes that are not cited; some of the cited ones where all are."""
    if len(draft.evidence) == len(draft.timeline):
        return part_of_evidence(draft, rng)
    return View.without(draft.evidence)


def _drop_unsupported(judge: Responder, most: int, pairs: Sequence[Answered], ask: Asker) -> list[Drop | None]:
    answers = [(pair.draft, pair.chosen) for pair in pairs]
    return _judged(judge, most, answers, ask, supported=True, reason="unsupported")


def _drop_right_ones(judge: Responder, most: int, pairs: Sequence[Answered], ask: Asker) -> list[Drop | None]:
    answers = [(pair.draft, pair.rejected) for pair in pairs]
    return _judged(judge, most, answers, ask, supported=False, reason="rejected_is_right")


def _judged(
    judge: Responder, most: int, answers: Sequence[tuple[Draft, str]], ask: Asker, supported: bool, reason: str
) -> list[Drop | None]:
    """Drops answers unless the captions of the evidence support them, or unless they do not."""
    requests = []
    for draft, answer in answers:
        captions = within(evidence_captions(draft), most)
        text = support_prompt(draft.question, answer, captions)
        requests.append(Request(text, rehearsed=partial(_rehearsed_support, captions, answer)))
    verdicts = ask(judge, requests, "judging pairs")
    return [unless(supported, verdict, reason, answer) for (_, answer), verdict in zip(answers, verdicts, strict=True)]


def _rehearsed_support(captions: Sequence[str], answer: str) -> str:
    """The chosen answer is supported; the rejected one is not, since it lacks some of the captions' things."""
    return "Yes" if all_things_in(answer, "\n".join(captions)) else "No"
