"""What the needle probe and the position probe share: a question's clips inserted among others, asked, judged and kept.

A question about a few frames (`ProbeQuestion`) at a place in a long video is a `Timeline` of its clips and those of a
`Filler`, each of which gets the same number of frames; any responder can answer it.
"""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import math
import struct
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from longvpo_hf.artifacts import Fields, Log, make_folder, whole_file
from longvpo_hf.decoding import GREEDY, Decoding
from longvpo_hf.errors import ConfigError, LongVPOError, VideoError
from longvpo_hf.evaluation.longvideo_mcq.answers import LETTERS, is_cut_off, is_right, letter_of
from longvpo_hf.evaluation.protocol import PACKAGES, Protocol, parsers
from longvpo_hf.frames import VideoFile, spread_frames, whole_clip
from longvpo_hf.paths import path_inside
from longvpo_hf.record import installed_versions
from longvpo_hf.responders import Request, Responder, Unanswered
from longvpo_hf.responders.generating import SHORT_TOKENS
from longvpo_hf.timeline import Clip, Timeline, View

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BY_LETTER = "Answer with the option's letter only."
_IN_SHORT = "Answer with a single word or phrase."
#: What CUDA says where memory that torch does not hand out itself is full: of a kernel, of cuBLAS.
_FULL_DEVICE = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """A question about a few frames, which the probes lay among others.

    Args:
        clips: What it is about, in order; each is shown as `frames_per_clip` frames.
        text: The question, as it is asked.
        answer: The truth: one of `letters`, or a text.
        letters: The letters of its options; empty where the reply must be the answer's text.
        frames_per_clip: Frames of each clip, of the question's and of the filler's.

    Raises:
        ValueError: If there is no clip, no text, or an answer that is none of the letters.
    """

    clips: tuple[Clip, ...]
    text: str
    answer: str
    letters: str = ""
    frames_per_clip: int = 1

    def __post_init__(self) -> None:
        if not self.clips or not self.text.strip() or not self.answer.strip():
            raise ConfigError(f"A probe's question needs clips, a text and an answer, got {self}.")
        if self.letters and self.answer not in tuple(self.letters):
            raise ConfigError(f"The answer must be one of the letters {self.letters}, got {self.answer!r}.")
        if self.frames_per_clip < 1:
            raise ConfigError(f"frames_per_clip must be ≥ 1, got {self.frames_per_clip}.")

    @property
    def num_frames(self) -> int:
        """Frames of its own clips."""
        return len(self.clips) * self.frames_per_clip

    def laid_among(self, others: Sequence[Clip], place: int) -> Request:
        """The question about a timeline in which `place` of the other clips stand before its own.

        Raises:
            ValueError: If the sampler would not show each clip as `frames_per_clip` frames.
        """
        clips = (*others[:place], *self.clips, *others[place:])
        budget = len(clips) * self.frames_per_clip
        counts = spread_frames([clip.duration_seconds for clip in clips], budget)
        if set(counts) != {self.frames_per_clip}:
            raise ConfigError(
                f"Each clip must be shown as {self.frames_per_clip} frames, but by their lengths clips would get "
                f"{min(counts)} to {max(counts)}; give clips of one length, or frames_per_clip=1."
            )
        return Request(self.text, Timeline(clips), View.sparse(budget))


class Filler(typing.Protocol):
    """What a question's clips are inserted among."""

    @property
    def name(self) -> str:
        """What it is, for titles and results; with `name` equal the clips must be equal too."""
        ...

    def clips(self, question: ProbeQuestion, number: int) -> Sequence[Clip]:
        """`number` clips that do not hold the question's answer; the same ones whenever they are asked for.

        Raises:
            ValueError: If there are not so many.
        """
        ...


class VideoFiller:
    """Frames of one video, spread evenly over all of it.

    Args:
        path: The video file.

    Raises:
        longvpo_hf.frames.UnreadableVideo: If it is missing or no video.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._video = VideoFile(str(path))

    @property
    def name(self) -> str:
        """See `Filler.name`."""
        return f"frames of {self._path.name} ({self._video.num_frames} frames, {self._video.end_seconds:g} s)"

    def clips(self, question: ProbeQuestion, number: int) -> Sequence[Clip]:
        """See `Filler.clips`."""
        if number > self._video.num_frames:
            raise ConfigError(
                f"{self._path.name} has {self._video.num_frames} frames, and {number} are asked for; name a longer "
                "video or fewer frames."
            )
        return _parts(Clip(str(self._path), max(0.0, self._video.begin_seconds), self._video.end_seconds), number)


class BlankFiller:
    """Black frames, of the size and length of the question's own.

    Args:
        folder: Where their files are written.
    """

    name = "black frames"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[str, tuple[int, int]] = {}

    def clips(self, question: ProbeQuestion, number: int) -> Sequence[Clip]:
        """See `Filler.clips`."""
        import torch

        shown, seconds = question.clips[0].path, question.clips[0].duration_seconds
        if shown not in self._sizes:
            self._sizes[shown] = VideoFile(shown).size
        height, width = self._sizes[shown]
        path = self._folder / f"black-{width}x{height}-{math.ceil(seconds)}s.mp4"
        if not path.is_file():
            _encode(torch.zeros((math.ceil(seconds), 3, height, width), dtype=torch.uint8), path)
        return (Clip(str(path), 0.0, seconds),) * number


def read_questions(path: Path, num_frames: int, media: Path) -> list[ProbeQuestion]:
    """Questions about short videos or pictures, from a file of JSON lines.

    Args:
        path: Each line an object with `video` (a video or picture, relative to the file's folder and inside of it),
            `question`, `answer`, and perhaps `options`: at least two texts, of which `answer` is one, or its letter.
        num_frames: Frames of each video, spread evenly over it; a picture is one frame.
        media: Folder where pictures are written as videos of one frame.

    Raises:
        ValueError: If there is no such file, or a line is not as described; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON texts may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The questions of {path} cannot be read ({error}): name a file of JSON lines.") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ConfigError(f"a JSON object with video, question and answer is needed, got {line.strip()[:80]}")
            if missing := [name for name in ("video", "question", "answer") if name not in record]:
                raise ConfigError(f"the field '{missing[0]}' is missing")
            options = record.get("options")
            if not isinstance(options, (list, NoneType)):
                raise ConfigError(f"options must be a list of texts, got {options!r}")
            if not isinstance(record["video"], str):
                raise ConfigError(f"video must be the name of a file, got {record['video']!r}")
            video = path_inside(path.parent, record["video"])
            question = make_question(video, record["question"], record["answer"], options or (), num_frames, media)
        except RecursionError as error:
            raise ConfigError(f"{path.name}, line {number}: it is nested too deep.") from error
        except ValueError as error:
            raise ConfigError(f"{path.name}, line {number}: {error}") from error
        questions.append(question)
    if not questions:
        raise ConfigError(f"{path.name} holds no questions; each line is a JSON object with video, question, answer.")
    return questions


def make_question(
    video: Path, question: str, answer: str, options: Sequence[str], num_frames: int, media: Path
) -> ProbeQuestion:
    """A question about one video or picture; the arguments are those of `read_questions`' records.

    Raises:
        ValueError: If the video or picture cannot be opened, if the question, the answer or an option is not a text or
            is empty, if there are not 2 to 26 different options, or if the answer is not among them.
    """
    for name, text in (("question", question), ("answer", answer), *(("option", option) for option in options)):
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{name} must be a text that is not empty, got {text!r}.")
    letters = LETTERS[: len(options)]
    if options:
        if not 2 <= len(set(options)) == len(options) <= len(LETTERS):
            raise ConfigError(f"options must be 2 to {len(LETTERS)} different texts, got {list(options)}.")
        if answer not in (*options, *letters):
            raise ConfigError(f"answer must be one of the options {list(options)} or its letter, got {answer!r}.")
        answer = letters[list(options).index(answer)] if answer in options else answer
        lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        text = "\n".join([question, *lines, _BY_LETTER])
    else:
        text = f"{question}\n{_IN_SHORT}"
    if video.suffix.lower() in _IMAGES:
        clips = [whole_clip(str(_as_video(video, media)))]
    else:
        clips = _parts(whole_clip(str(video)), num_frames)
    return ProbeQuestion(tuple(clips), text, answer, letters)


# -------------------------------------------------------------------------------------------------------------- asking


class DoesNotFit(LongVPOError):
    """Not even one request alone fits in memory."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one request.

    Args:
        right: Whether the reply was the answer.
        parsed: Whether it named an option; True for questions without options, and for replies that were cut off.
        cut_off: Whether it ended inside its reasoning: it is wrong, whatever it holds.
    """

    right: bool
    parsed: bool
    cut_off: bool


def ask(responder: Responder, questions: Sequence[ProbeQuestion], requests: Sequence[Request]) -> list[Verdict]:
    """Asks the requests, one for each of the questions, and judges the replies.

    Raises:
        DoesNotFit: If a request alone does not fit in memory. Requests that only do not fit together are asked one by
            one.
        longvpo_hf.frames.UnreadableVideo: If a request's video cannot be decoded.
    """
    replies = _replies(responder, requests)
    return [
        Verdict(
            is_right(reply, question.answer, question.letters),
            not question.letters or is_cut_off(reply) or bool(letter_of(reply, question.letters)),
            is_cut_off(reply),
        )
        for reply, question in zip(replies, questions, strict=True)
    ]


def _replies(responder: Responder, requests: Sequence[Request]) -> list[str]:
    try:
        return responder.respond(requests)
    except Exception as error:
        said = _said_of_memory(error)
        if not said:
            if (failure := _failures(error)[0]) is error:
                raise
            raise failure from failure.__cause__
    # Out of the except block, so that the traceback no longer holds the call's tensors.
    _free_memory()
    if len(requests) == 1:
        raise DoesNotFit(said)
    return [reply for request in requests for reply in _replies(responder, [request])]


def _failures(error: Exception) -> list[Exception]:
    """What went wrong in a call: itself, or why each of its requests has no answer."""
    return [each for each in error.results if not isinstance(each, str)] if isinstance(error, Unanswered) else [error]


def _said_of_memory(error: Exception) -> str:
    """What an allocation that failed said, of the model or of the decoder; "" if something else went wrong."""
    for failure in _failures(error):
        cause: BaseException | None = failure
        while cause is not None:
            if _is_out_of_memory(cause):
                return str(cause).strip().split("\n")[0] or type(cause).__name__
            cause = cause.__cause__
    return ""


def _is_out_of_memory(error: BaseException) -> bool:
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, Exception) and should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL_DEVICE)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- keeping


class Journal:
    """Results by key in a file of JSON lines, each written as soon as it is known: a killed run continues after it.

    Args:
        path: The file.
        settings: What all results depend on.

    Raises:
        ValueError: If the file holds results of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        make_folder(path.parent)
        self._log = Log(path)
        self._values: dict[str, Any] = {}
        mine = json.loads(json.dumps(settings))
        theirs = None
        for entry in self._log.entries:
            if "settings" in entry:
                theirs, self._values = entry["settings"], {}
            else:
                self._values[entry["key"]] = entry["value"]
        if theirs is None:  # a new one, or one whose first line was torn
            self._values = {}
            self._append({"settings": mine})
        elif theirs != mine:
            differing = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
            raise ConfigError(
                f"{path.parent} holds a probe with other settings ({', '.join(differing)}); name another --output, or "
                "delete it."
            )

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value
        self._append({"key": key, "value": value})

    def _append(self, fields: Fields) -> None:
        self._log.append(fields)
        self._log.close()


def settings_of(
    probe: str, responder: Responder, questions: Sequence[ProbeQuestion], filler: Filler, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What a probe's results depend on, beside frames and places; without the folders of this machine.

    Args:
        facts: More of it: what the caller knows of the model, frame sizes and seeds.
    """
    asked = [
        [[Path(clip.path).name, clip.start_seconds, clip.end_seconds] for clip in question.clips]
        + [question.text, question.answer, question.letters, question.frames_per_clip]
        for question in questions
    ]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    return {
        "probe": probe,
        "model": responder.name,
        "filler": filler.name,
        "questions": len(questions),
        "questions_digest": digest,
        **facts,
    }


def protocol_of(settings: Mapping[str, Any], frames: str, repeats: int = 1) -> Protocol:
    """What a probe's numbers depend on besides the model, as `longvpo eval` says it of a benchmark's.

    Args:
        settings: As `settings_of` made them.
        frames: How many frames a question is about, in words.
        repeats: Times that every question was asked, each at another place.
    """
    max_pixels, decoding = settings.get("max_pixels"), settings.get("decoding")
    pixels = "" if max_pixels is None else f", {max_pixels} pixels each"
    return Protocol(
        suite=f"{settings['probe']} probe",
        questions=settings["questions_digest"][:8],
        limit=None,
        sampling=f"{frames} frames{pixels}",
        shown=f"its clips among {settings['filler']}",
        subtitles="none",
        parser=parsers()["ours"],
        decoding=str(GREEDY if decoding is None else Decoding(**decoding)),
        max_new_tokens=settings.get("max_new_tokens", SHORT_TOKENS),
        repeats=repeats,
        dtype=settings.get("dtype", "not said"),
        backend="transformers",
        versions=installed_versions(PACKAGES),
    )


def as_it_is(text: str) -> str:
    """A name as matplotlib shows it unchanged: between two `$` it would read mathematics, or fail to."""
    return text.replace("$", r"\$")


# --------------------------------------------------------------------------------------------------------------- media


def _parts(clip: Clip, number: int) -> list[Clip]:
    """The clip in `number` parts of equal length."""
    if number < 1:
        raise ConfigError(f"A clip is parted into ≥ 1 parts, got {number}.")
    bounds = [clip.start_seconds + clip.duration_seconds * part / number for part in range(number + 1)]
    return [Clip(clip.path, start, end) for start, end in itertools.pairwise(bounds)]


def _as_video(image: Path, media: Path) -> Path:
    """A picture as a video of one frame, one second long.

    Raises:
        VideoError: If it cannot be read, has more pixels than Pillow opens, or longer sides than a video's frame may.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        content = image.read_bytes()
    except OSError as error:
        raise VideoError(f"The picture {image} cannot be read: {error.strerror}.") from error
    path = media / f"{hashlib.sha256(content).hexdigest()[:20]}.mp4"
    if not path.is_file():
        try:
            with Image.open(io.BytesIO(content)) as opened:
                upright = ImageOps.exif_transpose(opened)  # as viewers show it, and as videos are decoded
                pixels = torch.from_numpy(np.array(upright.convert("RGB")))
        except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, struct.error) as error:
            raise VideoError(f"The picture {image} cannot be read: it is damaged, too large or no picture.") from error
        try:
            _encode(pixels.permute(2, 0, 1)[None].contiguous(), path)
        except RuntimeError as error:  # H.264 has no sides so long
            height, width, _ = pixels.shape
            raise VideoError(
                f"The picture {image} of {width} × {height} pixels cannot be shown as a frame: scale it down."
            ) from error
    return path


def _encode(frames: Any, path: Path) -> None:
    """Writes uint8 frames `[N, 3, H, W]` as a video of one frame a second, with hardly any loss."""
    from torchcodec.encoders import VideoEncoder

    # yuv444p: any size, and colours keep their edges.
    with whole_file(path) as file:
        VideoEncoder(frames, frame_rate=1).to_file_like(
            file, "mp4", codec="libx264", pixel_format="yuv444p", crf=8, extra_options={"threads": 1}
        )
