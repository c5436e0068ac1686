"""Which steps of a run are done: a note for each step beside what it made, and what earlier settings left.

A step is done when its note says so, with the identity that the step has now, and what it made is there with the record
that the note names. What a step made under other settings is never overwritten: it moves to `earlier/`, and comes back
when these settings do.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from longvpo_hf.artifacts import digest, write_json
from longvpo_hf.errors import DatasetError, LongVPOError
from longvpo_hf.record import RECORD_FILE, DatasetRecord, ModelRecord, read_record, weights_digest
from longvpo_hf.record.codec import to_json
from longvpo_hf.studies.steps import Step, identities

STATE, EARLIER, LOGS = "state", "earlier", "logs"

#: `done`; `begun`: a killed or failed run of it goes on; `changed`: it was made under other settings; `lost`: what it
#: made is gone or is not what it made; `waiting`.
State = Literal["done", "begun", "changed", "lost", "waiting"]


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of a step's work.

    Args:
        step: Its name.
        identity: See `steps`.
        settings: What its result follows from.
        needs: Identities of the steps it took from.
        is_finished: Whether it came to its end.
        seconds: That it took, over all its runs.
        peak_gib: Most memory of its processes at once; None where not known.
        process_group: Of the last process that worked on it.
        record: Digest of what it made; empty where there is nothing to compare.
    """

    step: str
    identity: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    is_finished: bool = False
    seconds: float = 0.0
    peak_gib: float | None = None
    process_group: int = 0
    record: str = ""


class Ledger:
    """The notes of a run.

    Args:
        run: The run's folder.
        steps: Its steps.
    """

    def __init__(self, run: Path, steps: Sequence[Step]) -> None:
        self.run = run
        self.steps = {step.name: step for step in steps}
        self.identities = identities(steps)

    def note(self, name: str) -> Note | None:
        """The note of a step; None if nothing was begun, or the note cannot be read."""
        return _read(self.run / STATE / f"{name}.json")

    def result(self, name: str) -> Any:
        """What a step's program found out; None if it writes nothing of the kind."""
        path = self.run / STATE / f"{name}.result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def state(self, name: str) -> State:
        """See `State`."""
        note = self.note(name)
        if note is None:
            return "waiting"
        if note.identity != self.identities[name]:
            return "changed"
        if not note.is_finished:
            return "begun"
        return "done" if note.record == self._record(self.steps[name]) else "lost"

    def why(self, name: str) -> str:
        """What of a changed step's settings is another, or which step before it changed."""
        note, step = self.note(name), self.steps[name]
        if note is None:
            return ""
        differences = [
            f"{key}: {_short(old)} → {_short(new)}" for key, old, new in _differences(note.settings, step.settings)
        ]
        before = [need for need in step.needs if note.needs.get(need) != self.identities[need]]
        if before:
            differences.append(f"{', '.join(before)} changed")
        return "; ".join(differences[:4]) or "it is another step now"

    def begin(self, name: str, *, delete: bool) -> bool:
        """Readies the run's folder for a step, and says whether it is done after all.

        What the step made under other settings moves to `earlier/`, or is deleted; what it once made under the present
        ones comes back.
        """
        state = self.state(name)
        if state in ("changed", "lost"):
            self._clear(name, delete=delete)
            if self._bring_back(name):
                return True
        if self.note(name) is None:
            step = self.steps[name]
            needs = {need: self.identities[need] for need in step.needs}
            self._write(Note(name, self.identities[name], _json(step.settings), needs))
        return False

    def update(self, name: str, **changes: Any) -> None:
        """Changes fields of a step's note."""
        note = self.note(name)
        assert note is not None
        self._write(replace(note, **changes))

    def finish(self, name: str) -> None:
        """Notes that a step came to its end.

        Raises:
            DatasetError: If what it should have made is not there.
        """
        record = self._record(self.steps[name])
        if record is None:
            raise DatasetError(f"{name} ended without what it makes; see {self.run / LOGS / name}.log.")
        self.update(name, is_finished=True, record=record)

    def _write(self, note: Note) -> None:
        write_json(self.run / STATE / f"{note.step}.json", asdict(note))

    def _record(self, step: Step) -> str | None:
        """Digest of what a step made; None if it is not there, or not whole."""
        folder = self.run / step.name
        try:
            if step.kind == "build":
                record = read_record(folder, DatasetRecord) if (folder / "train.parquet").is_file() else None
                return None if record is None else record.digest
            if step.kind == "world":
                truths = sorted(folder.glob("*/truth.json"))
                return digest([path.read_text(encoding="utf-8") for path in truths]) if truths else None
            if step.kind == "base":
                return weights_digest(folder)
            if step.kind == "train":
                return _trained(folder)
        except (LongVPOError, OSError, ValueError):
            return None
        results = [self.run / STATE / f"{step.name}.result.json", *sorted(folder.glob("*.json"))]
        found = [path for path in results if path.is_file()]
        return "" if found or step.kind == "push" else None

    def _parts(self, name: str) -> list[Path]:
        """What of the run's folder is a step's result. Journals of builds stay: they know what they follow from."""
        names = (name, f"{name}.log", f"{name}-base", f"{STATE}/{name}.json", f"{STATE}/{name}.result.json")
        return [path for part in names if (path := self.run / part).exists()]

    def _clear(self, name: str, *, delete: bool) -> None:
        note = self.note(name)
        was = note.identity if note else "unknown"
        if self.state(name) == "lost":
            was = f"{was}-not-as-made-{int(time.time())}"
        folder = self.run / EARLIER / f"{name}-{was}"
        # The note last: until it has gone, the rest is known to be of other settings.
        for path in sorted(self._parts(name), key=lambda path: path.name == f"{name}.json"):
            if delete:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            target = folder / path.relative_to(self.run)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)

    def _bring_back(self, name: str) -> bool:
        folder = self.run / EARLIER / f"{name}-{self.identities[name]}"
        if not (folder / STATE / f"{name}.json").is_file():
            return False
        parts = [path for path in folder.iterdir() if path.name != STATE] + sorted(
            (folder / STATE).iterdir(), key=lambda path: path.name == f"{name}.json"
        )
        for path in parts:
            path.replace(self.run / path.relative_to(folder))
        shutil.rmtree(folder)
        return self.state(name) == "done"


def _trained(folder: Path) -> str | None:
    """Tells a trained model from others by its record; results that are added to it later change nothing."""
    record = read_record(folder, ModelRecord) if (folder / RECORD_FILE).is_file() else None
    if record is None or not any(folder.glob("*.safetensors")):
        return None
    return digest(to_json([record.base, record.data, record.training, record.progress]))


def _read(path: Path) -> Note | None:
    try:
        return Note(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """What differs between two JSON values, by the names on the way."""
    new = _json(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            difference
            for key in dict.fromkeys([*old, *new])
            for difference in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        ]
    return [] if old == new else [(where.removeprefix("options."), old, new)]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
