"""Every prompt text that a builder sends to a model. A change of wording is a new version, which stands in the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Version of the texts of each method.
STAGE1_VERSION = "stage1-1"
STAGE2_VERSION = "stage2-1"
TEMPORAL_VERSION = "temporal-1"

#: Version of the texts of recursive captioning.
CAPTIONS_VERSION = "captions-1"

#: How every prompt to a judge ends.
YES_OR_NO = "Answer Yes or No."


def question_from_clip(caption: str) -> str:
    """Asks for a question that only this clip answers (LongVPO: from the anchor and its caption, if there is one)."""
    hint = f"The clip's caption: {caption}\n" if caption else ""
    return (
        "You see one short clip of a longer video. "
        f"{hint}"
        "Write one question about it that can be answered from this clip alone and from no other clip: name several "
        "distinct things that are seen in it, so that whoever watches the long video can find it, and ask for one "
        "detail. Do not say where in the video the clip is. Answer with the question only."
    )


def is_specific(question: str, caption: str) -> str:
    """Asks whether a question is specific to the clip that is shown.

    LongVPO: it must depend on several distinct visual elements of the anchor and not be answerable from other clips.
    """
    hint = f"The clip's caption: {caption}\n" if caption else ""
    return (
        f"You see one clip of a longer video.\n{hint}Question about it: {question}\n"
        "Does answering it depend on several distinct things seen in this clip, so that it could not be answered from "
        f"other clips? {YES_OR_NO}"
    )


def is_also_right(question: str, chosen: str, rejected: str) -> str:
    """Asks whether the rejected answer is right too, of the clip that holds the answer."""
    return (
        f"You see the clip a question is about.\nQuestion: {question}\nAnswer 1: {chosen}\nAnswer 2: {rejected}\n"
        f"Is answer 2 also right? {YES_OR_NO}"
    )


def caption_scene(history: Sequence[str], max_words: int) -> str:
    """Asks for the caption of the scene that is shown (LongVPO, Stage 2: from its frames and the captions before it).

    Args:
        history: What came before, in order, a line each; empty for the first scene.
        max_words: How long the caption may be.
    """
    told = "What came before it:\n" + "\n".join(history) + "\n\n" if history else ""
    return (
        f"You see one scene of a longer video. {told}"
        f"Describe this scene in at most {max_words} words: who and what is seen, what they do and what changes. Name "
        "people, things and places that were there before as they were named before, and tell nothing again that only "
        "happened before. Answer with the description only."
    )


def summarise_captions(descriptions: Sequence[str], max_words: int) -> str:
    """Asks for a summary of what happens in neighbouring scenes, so that a later one can be described with it.

    Args:
        descriptions: Their captions or summaries, in order, a line each.
        max_words: How long the summary may be.
    """
    lines = "\n".join(descriptions)
    return (
        f"These are descriptions of neighbouring scenes of one video, in order:\n{lines}\n\n"
        f"Sum them up in at most {max_words} words, in order of time: who and what appears, what they do and what "
        "changes. Keep the names of people, things and places. Answer with the summary only."
    )


#: What a writer of questions over scenes answers; `json_object` reads it.
QUESTION_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("question", "answer", "reasoning")},
    "required": ["question", "answer", "reasoning"],
    "additionalProperties": False,
}


def question_over_scenes(
    scenes: Sequence[tuple[int, str]], overview: Sequence[str], focus: int | None, refused: str
) -> str:
    """Asks for a question that takes several scenes to answer, with the reasoning (LongVPO, Stage 2).

    Args:
        scenes: Number and caption of the scenes that may be cited, in order.
        overview: What happens in the whole video, a line each; empty where `scenes` are all there are.
        focus: A scene the question must need; None leaves the choice free.
        refused: What was wrong with the answer before; empty at the first try.
    """
    told = "What happens in the whole video:\n" + "\n".join(overview) + "\n\n" if overview else ""
    lines = "\n".join(f"Scene #{number}: {caption}" for number, caption in scenes)
    needed = f" One of them must be Scene #{focus}." if focus is not None else ""
    again = f"\nYour last answer was refused: {refused}. Write another one." if refused else ""
    return (
        f"{told}These are scenes of one long video, in order:\n{lines}\n\n"
        "Write one question about the video that can only be answered by whoever has seen two or more of these scenes "
        f"and puts together what they show.{needed} Ask as somebody would who watches the video: describe people, "
        "things and events, never name scenes by their numbers nor say where in the video they are. Write the answer, "
        "and the reasoning that leads to it, which cites every scene that is needed, and no other, as "
        '"Scene #N".\nAnswer with a JSON object and nothing else: '
        f'{{"question": "...", "answer": "...", "reasoning": "..."}}{again}'
    )


def is_supported(question: str, answer: str, captions: Sequence[str]) -> str:
    """Asks whether an answer holds, given the captions of the scenes it is about."""
    lines = "\n".join(captions)
    return (
        f"What a video shows:\n{lines}\n\nQuestion about it: {question}\nAnswer: {answer}\n"
        f"Do these descriptions support the answer, and contradict no part of it? {YES_OR_NO}"
    )


#: Kinds of question a temporal preference may be about. The paper has eight kinds; their names are not public, so these
#: are ours: kinds that the benchmarks of long video ask for.
QUESTION_TYPES: Mapping[str, str] = {
    "action": "what somebody does",
    "object": "what a thing looks like, or which thing is used",
    "person": "who somebody is, or how a person looks",
    "attribute": "a detail such as a colour, a number or a written text",
    "place": "where something happens",
    "order": "what happens before or after something else",
    "cause": "why something happens, or what follows from it",
    "summary": "what goes on as a whole",
}

TEMPORAL_QUESTION_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"question": {"type": ["string", "null"]}},
    "required": ["question"],
    "additionalProperties": False,
}


def temporal_question(captions: Sequence[str], question_type: str, is_segment: bool) -> str:
    """Asks for a question of one of `QUESTION_TYPES`, or none (TPO: "answers None").

    Args:
        captions: What the segment, or the whole video, shows, a line each.
        question_type: Key of `QUESTION_TYPES`.
        is_segment: Whether the question is about one segment of a longer video.
    """
    lines = "\n".join(captions)
    what = "one short segment of a longer video" if is_segment else "a whole video, in order"
    where = (
        "whoever has seen this segment, and nobody else, can answer it: name distinct things that are seen in it"
        if is_segment
        else "only whoever has seen all of the video can answer it, not somebody who saw a few pictures of it"
    )
    return (
        f"This is what {what} shows:\n{lines}\n\n"
        f"Write one question about it that asks {QUESTION_TYPES[question_type]}, so that {where}. It must have one "
        "right answer. Do not say where in the video something is. If no such question can be asked, answer null.\n"
        'Answer with a JSON object and nothing else: {"question": "..."} or {"question": null}'
    )


POST_FILTER_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "better": {"enum": ["Yes", "No", "Equally"]},
        "ambiguous": {"enum": ["Yes", "No"]},
        "correct": {"enum": ["Yes", "No"]},
    },
    "required": ["better", "ambiguous", "correct"],
    "additionalProperties": False,
}


def post_filter(captions: Sequence[str], question: str, chosen: str, rejected: str) -> str:
    """Asks the three questions of TPO's post-filter at once."""
    lines = "\n".join(captions)
    return (
        f"What a video shows:\n{lines}\n\nQuestion: {question}\nAnswer 1: {chosen}\nAnswer 2: {rejected}\n"
        "better: Is answer 1 better than answer 2? Yes, No or Equally.\n"
        "ambiguous: Does the question with answer 1 contradict what the video shows, or has the question another "
        "possible answer? Yes or No.\n"
        "correct: Is answer 1 correct, given what the video shows? Yes or No.\n"
        'Answer with a JSON object and nothing else: {"better": "...", "ambiguous": "...", "correct": "..."}'
    )
