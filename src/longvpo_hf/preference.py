"""One preference row and its Arrow form: the contract between building and training.

Rows follow TRL's conversational preference format (`prompt`, `chosen` and `rejected` as lists of messages), with the
video beside it as `clips`.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from longvpo_hf.artifacts import file_with
from longvpo_hf.errors import DatasetError
from longvpo_hf.timeline import Clip, Timeline, View, clip_indices

if TYPE_CHECKING:
    import pyarrow as pa

#: Columns a trainer needs of a row.
TRAINING_COLUMNS = ("id", "prompt", "chosen", "rejected", "clips", "evidence", "reference")


@cache
def row_schema() -> pa.Schema:
    """Arrow schema of a row. The `videofolder` builder of `datasets` turns `file_name` into a `video` column."""
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return pa.schema(
        [
            ("id", pa.string()),
            ("prompt", messages),
            ("chosen", messages),
            ("rejected", messages),
            (
                "clips",
                pa.list_(
                    pa.struct(
                        [
                            ("file_name", pa.string()),
                            ("start_seconds", pa.float64()),
                            ("end_seconds", pa.float64()),
                            ("caption", pa.string()),
                            (
                                "origin",
                                pa.struct(
                                    [
                                        ("source_id", pa.string()),
                                        ("start_seconds", pa.float64()),
                                        ("end_seconds", pa.float64()),
                                    ]
                                ),
                            ),
                            ("licence", pa.string()),
                        ]
                    )
                ),
            ),
            ("evidence", pa.list_(pa.int32())),
            ("reference", pa.list_(pa.int32())),
            (
                "provenance",
                pa.struct(
                    [
                        ("method", pa.string()),
                        ("chosen_view", pa.string()),
                        ("rejected_view", pa.string()),
                        ("question_model", pa.string()),
                        ("answer_model", pa.string()),
                        ("prompt_version", pa.string()),
                        ("similarities", pa.list_(pa.float64())),
                        ("verdicts", pa.list_(pa.string())),
                        ("seed", pa.int64()),
                        ("question_type", pa.string()),
                        ("reasoning", pa.string()),
                    ]
                ),
            ),
        ]
    )


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a row came from.

    Args:
        method: How the row was made, e.g. `"longvpo-stage1"`.
        chosen_view: View of the timeline the chosen answer was generated from, as `str(View)`.
        rejected_view: The same of the rejected answer.
        question_model: Who wrote the question, as `name@revision`.
        answer_model: Who gave both answers, as `name@revision`.
        prompt_version: Version of the prompt texts.
        similarities: Cosine of each clip's embedding with the anchor's, in timeline order; empty where not measured.
        verdicts: The verdict of each filter that kept the row.
        seed: Seed of the run.
        question_type: Kind of question, where the method has kinds.
        reasoning: Why the evidence answers the question, in the question writer's words (Stage 2: citing scenes).
    """

    method: str = ""
    chosen_view: str = ""
    rejected_view: str = ""
    question_model: str = ""
    answer_model: str = ""
    prompt_version: str = ""
    similarities: tuple[float, ...] = ()
    verdicts: tuple[str, ...] = ()
    seed: int = 0
    question_type: str = ""
    reasoning: str = ""


class RowError(DatasetError):
    """A row that cannot be trained on.

    Attributes:
        kind: One of `ROW_PROBLEMS`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        """Lets the error leave a worker process unchanged."""
        return type(self), (self.kind, str(self))


#: Why a row cannot be trained on, whatever the model.
ROW_PROBLEMS = {
    "no_clips": "the row has no clips",
    "messages": "the prompt does not end with the user's message, or an answer is not one message of the assistant",
    "empty_text": "the question or an answer is empty",
    "same_answers": "chosen and rejected are the same, so there is nothing to prefer",
    "malformed": "a field is missing or of another type, or a number is out of range",
}


class Message(NamedTuple):
    """A turn of a conversation: who speaks (`system`, `user` or `assistant`), and the text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class VideoPreference:
    """One question about one timeline with a preferred and a dispreferred answer.

    Args:
        timeline: What the policy sees.
        question: Asked of the video, as plain text.
        chosen: The preferred answer.
        rejected: The dispreferred answer.
        evidence: Indices of the clips that hold the answer (Stage 1: the anchor; Stage 2: the cited scenes).
        reference: Indices of the clips the reference model is scored on; empty means the whole timeline.
        provenance: Where the row came from.
        id: Content hash; computed when empty.
        context: Messages before the question: a system prompt, earlier turns. The video comes before the text of the
            first message of the user.

    Raises:
        RowError: If a text is empty or no text, both answers are the same, or the context has a role that is not known.
        ValueError: If an index is no whole number or outside the timeline, or the timeline is none.
    """

    timeline: Timeline
    question: str
    chosen: str
    rejected: str
    evidence: tuple[int, ...] = ()
    reference: tuple[int, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)
    id: str = ""
    context: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        where = f" (row {self.id})" if self.id else ""
        if not isinstance(self.timeline, Timeline):
            raise ValueError(f"timeline of a preference must be a Timeline, got {type(self.timeline).__name__}{where}.")
        for name in ("question", "chosen", "rejected"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise RowError("messages", f"{name} of a preference must be text, got {type(text).__name__}{where}.")
            if not text.strip():
                raise RowError(
                    "empty_text", f"{name} of a preference is empty{where}; drop the row before training on it."
                )
        if self.chosen == self.rejected:
            raise RowError(
                "same_answers", f"chosen and rejected are the same, {self.chosen!r}{where}: there is nothing to prefer."
            )
        for place, (role, _) in enumerate(self.context):
            if role not in ("system", "user", "assistant") or (role == "system" and place > 0):
                raise RowError(
                    "messages",
                    f"message {place} of the prompt has the role {role!r}{where}: roles are user and assistant, and "
                    "system for the first.",
                )
        for name in ("evidence", "reference"):
            object.__setattr__(self, name, clip_indices(getattr(self, name), f"{name}{where}", len(self.timeline)))
        if not self.id:
            object.__setattr__(self, "id", self._content_hash())

    @property
    def reference_view(self) -> View:
        """The view that the row wants the reference model to be scored on."""
        return View.only(self.reference) if self.reference else View.whole()

    @property
    def prompt(self) -> list[dict[str, str]]:
        """All messages that the answers follow, in TRL's form."""
        return [message._asdict() for message in (*self.context, Message("user", self.question))]

    def _content_hash(self) -> str:
        clips = [(PurePosixPath(clip.path).name, clip.start_seconds, clip.end_seconds) for clip in self.timeline.clips]
        content: list[Any] = [clips, self.question, self.chosen, self.rejected, self.evidence, self.reference]
        content += [self.context] if self.context else []  # rows without one keep the ids they have
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:24]

    def to_row(self, file_name: Callable[[Clip], str]) -> dict[str, Any]:
        """The row as it stands in `train.parquet` (see `row_schema`).

        Args:
            file_name: Gives a clip's media file relative to the metadata file, e.g. `clips/ab12.mp4`.
        """
        return {
            "id": self.id,
            "prompt": self.prompt,
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "clips": [
                {
                    "file_name": file_name(clip),
                    "start_seconds": clip.start_seconds,
                    "end_seconds": clip.end_seconds,
                    "caption": clip.caption,
                    "origin": clip.origin._asdict(),
                    "licence": clip.licence,
                }
                for clip in self.timeline.clips
            ],
            "evidence": list(self.evidence),
            "reference": list(self.reference),
            "provenance": asdict(self.provenance),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> VideoPreference:
        """The inverse of `to_row`; also takes rows from `load_dataset` with undecoded media.

        Raises:
            DatasetError: If a field is missing or has the wrong form; the message names the row and the field.
        """
        if not isinstance(row, Mapping):
            raise RowError("malformed", f"A row must be a mapping of its fields, got {type(row).__name__}.")
        where = f"row {row.get('id') or '?'}"
        clips = row.get("clips")
        if not isinstance(clips, list) or not clips:
            kind = "malformed" if clips else "no_clips"
            raise RowError(kind, f"{where}: clips must be a list of at least one clip, got {clips!r}.")
        *context, question = _messages_of(row, "prompt", "user", where)
        return cls(
            timeline=Timeline(tuple(_clip_of(clip, f"{where}: clips[{i}]") for i, clip in enumerate(clips))),
            question=question.content,
            chosen=_answer_of(row, "chosen", where),
            rejected=_answer_of(row, "rejected", where),
            evidence=_indices_of(row, "evidence", where),
            reference=_indices_of(row, "reference", where),
            provenance=_provenance_of(row.get("provenance"), where),
            id=row.get("id") or "",
            context=tuple(context),
        )


def undecoded(dataset: Any) -> Any:
    """The dataset with its clips as paths, so that reading a row does not open a decoder for each of its clips.

    Rows with clips come as plain Python, whatever format was set (`with_format`). Others are returned unchanged.
    """
    from datasets import Dataset, IterableDataset, List, Video

    # A stream that was mapped does not know its columns.
    if isinstance(dataset, (Dataset, IterableDataset)) and "clips" in (dataset.column_names or ["clips"]):
        dataset = dataset.with_format(None)
    features = getattr(dataset, "features", None) or {}
    clips = features.get("clips")
    if isinstance(clips, List) and isinstance(clips.feature, dict) and isinstance(clips.feature.get("video"), Video):
        if isinstance(dataset, IterableDataset):  # streamed from the Hub, casting comes after the decoding threads
            return dataset.decode(False)
        if isinstance(features.get("preview"), Video):
            dataset = dataset.cast_column("preview", Video(decode=False))
        return dataset.cast_column("clips", List({**clips.feature, "video": Video(decode=False)}))
    return dataset


def _messages_of(row: Mapping[str, Any], name: str, last: str, where: str) -> list[Message]:
    """Messages of a row, of which the last has the role `last`."""
    stored = row.get(name)
    messages = [
        Message(message["role"], message["content"])
        for message in (stored if isinstance(stored, list) else [])
        if isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    ]
    if not messages or len(messages) != len(stored or ()) or messages[-1].role != last:
        raise RowError(
            "messages",
            f"{where}: {name} must be a list of messages {{'role': …, 'content': text}} of which the last has the role "
            f"{last!r}, got {reprlib.repr(stored)}.",
        )
    return messages


def _answer_of(row: Mapping[str, Any], name: str, where: str) -> str:
    messages = _messages_of(row, name, "assistant", where)
    if len(messages) > 1:
        raise RowError(
            "messages",
            f"{where}: {name} must be one message of the assistant, got {len(messages)}; earlier ones go into prompt.",
        )
    return messages[0].content


def _indices_of(row: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    indices = row.get(name)
    if indices is None:
        return ()
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise DatasetError(f"{where}: {name} must be a list of whole numbers, got {indices!r}.")
    return tuple(indices)


#: Of those fields of `Provenance`, and of their members, that are no text.
_PROVENANCE_KINDS: dict[str, tuple[type, ...]] = {"similarities": (int, float, type(None)), "seed": (int,)}


def _provenance_of(stored: Any, where: str) -> Provenance:
    if stored is None:
        return Provenance()
    known = [field.name for field in fields(Provenance)]
    if isinstance(stored, Mapping) and "recipe" in stored:  # its name in older rows
        stored = {"method" if name == "recipe" else name: value for name, value in stored.items()}
    if not isinstance(stored, Mapping) or not set(stored) <= set(known):
        raise DatasetError(f"{where}: provenance must have no other fields than {known}, got {stored!r}.")
    named: dict[str, Any] = {name: value for name, value in stored.items() if value is not None}
    for name, value in named.items():
        members, kinds = [value], _PROVENANCE_KINDS.get(name, (str,))
        if name in ("similarities", "verdicts") and isinstance(value, list | tuple):
            members, named[name] = list(value), tuple(value)
        elif name in ("similarities", "verdicts"):
            members = [...]
        if not all(isinstance(member, kinds) and not isinstance(member, bool) for member in members):
            raise DatasetError(f"{where}: provenance.{name} is of another type: {reprlib.repr(value)}.")
    return Provenance(**named)


def _origin_of(clip: Mapping[str, Any]) -> dict[str, Any]:
    """`source_id` and `source_start_seconds`; rows of version 0.1.0.dev had a `source_id` and no `origin`."""
    origin = clip.get("origin")
    if not isinstance(origin, Mapping):
        return {"source_id": clip.get("source_id") or ""}
    return {"source_id": origin.get("source_id") or "", "source_start_seconds": origin.get("start_seconds")}


def _clip_of(clip: Any, where: str) -> Clip:
    if not isinstance(clip, Mapping):
        raise DatasetError(f"{where} must have file_name or video, start_seconds and end_seconds, got {clip!r}.")
    name = "video" if "video" in clip else "file_name"
    media = clip.get(name)
    if type(media).__name__ == "VideoDecoder":  # decoded, as streams give it once they were mapped or filtered
        from datasets import Video

        media = Video().encode_example(media)
    if isinstance(media, Mapping):  # datasets' undecoded Video: {"path", "bytes"}
        content, media = media.get("bytes"), media.get("path")
        if isinstance(content, bytes) and content:
            media = str(file_with(content, media if isinstance(media, str) else ""))
    if not isinstance(media, str):
        raise DatasetError(f"{where}.{name} must be a path or a Video, got {type(media).__name__}.")
    for bound in ("start_seconds", "end_seconds"):
        if not isinstance(clip.get(bound), (int, float)):
            raise DatasetError(f"{where}.{bound} must be a number, got {clip.get(bound)!r}.")
    try:
        return Clip(
            path=media,
            start_seconds=clip["start_seconds"],
            end_seconds=clip["end_seconds"],
            caption=clip.get("caption") or "",
            **_origin_of(clip),
            licence=clip.get("licence") or "",
        )
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from error
