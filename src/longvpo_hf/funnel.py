"""The funnel of a build: what came through each stage, and what was dropped for which named reason.

Every drop is counted and written to a file that a person can read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvpo_hf.artifacts import locked, make_folder, naming, remove_parts, write_json

#: Why something is dropped, whatever the method; a method has reasons of its own beside these. The names are those in
#: `dropped.jsonl` and on the dataset card.
REASONS = {
    "empty_question": "the question writer gave no text",
    "no_question": "what the question writer gave is not a question",
    "question_too_long": "the question is far longer than a question",
    "names_position": "the question says where in the video its clip is",
    "refusal": "the model declined instead of asking, answering or describing",
    "control_token": "a reply holds a model's control token (<|im_end|>, <image>) by its letters",
    "answer_too_long": "an answer is far longer than an answer",
    "cut_off": "a reply reached the bound on tokens (--max-new-tokens, --writer-max-new-tokens) before its end",
    "copied_example": "the question writer gave the example in its prompt back",
    "repeats_question": "an answer repeats the question",
    "empty_answer": "an answer has no text",
    "empty_caption": "a scene's caption has no text",
    "no_captions": "no scene of the video got a caption",
    "answers_agree": "chosen and rejected say the same, so there is nothing to prefer",
    "malformed_question": "the question writer did not give the JSON object that was asked for",
    "too_few_captions": "too few scenes of the video have a caption",
    "malformed_verdict": "the judge did not give the verdict that was asked for",
    "duplicate_question": "the same question of the same timeline is there already",
    "duplicate_row": "the same timeline with the same question and answers is there already",
    "refused": "a content filter of the model's server withheld the answer",
    "no_answer": "the model's server refused the request, or answered others but not this one, however often asked",
    "missing_file": "a clip's file is not there",
    "unreadable": "a clip's file cannot be decoded",
    "beyond_end": "a clip ends after its file",
    "before_begin": "a clip ends before its file begins",
    "untimed": "the frames of a file decode, but when they are shown cannot be told; ffmpeg can repair it",
    "too_many_pixels": "a frame has more pixels than the bound (--max-frame-px)",
    "stretched": "a file declares that one of its frames is shown longer than the bound (--max-frame-seconds)",
    "unreachable": "a remote file was not answered in time",
    "lost_frames": "a few frames at a file's start or end cannot be decoded; the file is used without them",
    "not_shown": "a file is cut off, or another is joined on behind its end; what FFmpeg shows of it is used",
    "split_caption": "a caption describes what is cut into several clips, so it goes to none; the clips are used",
    "outside_root": "a record or an archive names a file outside its corpus (.., an absolute path, a link)",
    "bad_name": "a file's name is not UTF-8",
    "bad_record": "a record of a corpus is malformed, too long (--max-record-bytes), or lacks a field it must have",
    "ambiguous_name": "the name that a record gives fits several different files",
    "repeated_record": "another record describes the same video otherwise; the first is used",
    "unread_metadata": "a file of records that is not read: it does not have the name of one",
    "unknown_suffix": "a file that is not known to be a video, by its suffix",
    "macos_file": "a file in which macOS keeps what it knows of another (._name): neither a video nor a record",
    "damaged_archive": "an archive, or a file in one, is damaged; what comes before in it is kept",
    "too_large": "a file in an archive exceeds a bound (--max-video-bytes, --max-expansion)",
    "single_frame": "a file holds one frame: a picture, not a video",
    "too_short": "a video or a scene is shorter than the shortest clip asked for",
    "duplicate_video": "a video of the same content is there already",
    "benchmark_video": "the video is in a benchmark that models are evaluated on",
}


@dataclass(frozen=True, slots=True)
class Dropped:
    """A video or clip that is left out, and why; what readers and cutters give in its place.

    Args:
        reason: One of `REASONS`.
        path: The file, or `archive::member`.
        source_id: The corpus' name for the source video; empty where it has none.
        detail: What was seen, for a person.
    """

    reason: str
    path: str
    source_id: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"{self.reason!r} is no named reason; have {sorted(REASONS)}.")


class Funnel:
    """Counts what each stage of a build let through, and writes every drop to a file.

    Args:
        folder: Where `dropped.jsonl`, `funnel.json` and `reasons.json` are written.

    Attributes:
        reasons: What each reason means: those of `REASONS` and those that were explained.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stages: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()
        self.reasons = dict(REASONS)
        make_folder(folder)
        remove_parts(folder)
        (folder / "funnel.json").unlink(missing_ok=True)  # of an earlier run: this one may end before its own
        # By lines: a run that ends with an error, or is killed, says what it dropped.
        # Half a character (in a file's name) is written as the escape that JSON has for it.
        self._path = folder / "dropped.jsonl"
        self._file = self._path.open("w", buffering=1, encoding="utf-8", errors="backslashreplace")

    def explain(self, reasons: Mapping[str, str]) -> None:
        """Adds a method's own reasons.

        Raises:
            ValueError: If one of them has another meaning already.
        """
        for name, meaning in reasons.items():
            if self.reasons.setdefault(name, meaning) != meaning:
                raise ValueError(f"The reason {name!r} means {self.reasons[name]!r} already, got {meaning!r}.")

    def count(self, stage: str, number: int = 1) -> None:
        """Adds `number` to what came through `stage`."""
        self._stages[stage] += number

    def drop(self, reason: str, **what: Any) -> None:
        """Counts a drop and writes what was dropped.

        Raises:
            ValueError: If `reason` is not one of `reasons`.
        """
        if reason not in self.reasons:
            raise ValueError(f"{reason!r} is no named reason; have {sorted(self.reasons)}.")
        self._drops[reason] += 1
        with naming(self._path):
            self._file.write(json.dumps({"reason": reason, **what}, ensure_ascii=False) + "\n")

    def close(self) -> dict[str, dict[str, int]]:
        """Writes `funnel.json` and returns it: what came through each stage, what was dropped for each reason."""
        with naming(self._path):
            self._file.close()
        funnel = {"stages": dict(self._stages), "dropped": dict(self._drops.most_common())}
        write_json(self._folder / "reasons.json", {name: self.reasons[name] for name in funnel["dropped"]})
        write_json(self._folder / "funnel.json", funnel)
        return funnel


@contextmanager
def open_log(output: Path, funnel: Funnel | None = None) -> Iterator[Funnel]:
    """The log of a build, which alone may write `output` until the block ends.

    Args:
        output: The folder that is built.
        funnel: One that has counted what came before the build; None starts one in `log_folder(output)`.

    Raises:
        artifacts.Locked: If another run writes it.
    """
    with locked(output):  # before the log is opened: that of the other run stays
        yield funnel or Funnel(log_folder(output))


def log_folder(output: Path) -> Path:
    """Where a build writes its drops and its funnel: beside the dataset, which holds nothing but itself."""
    return output.with_name(output.name + ".log")


def in_one_line(funnel: Mapping[str, Mapping[str, int]]) -> str:
    """The drops of a funnel, e.g. `empty_answer 3, refusal 1`."""
    return ", ".join(f"{reason} {number}" for reason, number in funnel["dropped"].items()) or "nothing"
