"""The report of a run: `report.html`, one page that needs nothing but itself, and `report.md`; both follow the run.

They hold the steps with what is done, each dataset's funnel and some of its rows, training curves, and what was
measured before and after. Whatever comes from outside (questions, answers, names) is shown as text: the templates
escape it, and the page's policy forbids scripts.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.artifacts import whole_file, write_json, write_text
from longvpo_hf.errors import LongVPOError
from longvpo_hf.public import markdown
from longvpo_hf.record import installed_versions
from longvpo_hf.studies.ledger import State
from longvpo_hf.studies.report.made import outcome_of, sections_of_step
from longvpo_hf.studies.report.measured import measured_sections
from longvpo_hf.studies.report.sections import Picture, Section, clock
from longvpo_hf.studies.running import Progress, in_time
from longvpo_hf.studies.steps import Step

if TYPE_CHECKING:
    from longvpo_hf.studies.session import Session

_SHOWN: dict[State, str] = {
    "done": "✓ done",
    "begun": "stopped",
    "changed": "settings changed",
    "lost": "its result is gone",
    "waiting": "waiting",
}


class Report:
    """Writes the report of a session.

    Args:
        session: The study and its run.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[tuple[str, str], list[Section]] = {}
        self.page = session.run_folder / "report.html"

    def write(self, running: Sequence[Progress]) -> None:
        """Writes page and Markdown as things stand.

        Args:
            running: The steps that run.
        """
        session = self._session
        data = self._data({progress.step: progress for progress in running})
        for section in data["sections"]:
            for picture in section.pictures:
                _write_picture(session.run_folder / "pictures", picture)
        write_text(session.run_folder / "report.md", _rendered("report.md.j2", data))
        write_text(self.page, _page(data))
        write_json(session.run_folder / "metrics.json", self._metrics())

    def _data(self, running: Mapping[str, Progress]) -> dict[str, Any]:
        session, ledger = self._session, self._session.ledger
        notes = {step.name: ledger.note(step.name) for step in session.steps}
        states = {step.name: ledger.state(step.name) for step in session.steps}
        done = [step for step in session.steps if states[step.name] == "done"]
        peaks = [note.peak_gib for note in notes.values() if note and note.peak_gib]
        spent = sum(running[name].seconds if name in running else note.seconds for name, note in notes.items() if note)
        planned = [hours for step in session.steps if (hours := session.hours_of(step)) is not None]
        is_over = len(done) == len(session.steps)
        steps = []
        for step in session.steps:
            note, state, hours = notes[step.name], states[step.name], session.hours_of(step)
            progress = running.get(step.name)
            seconds = progress.seconds if progress else note.seconds if note else 0.0
            steps.append(
                {
                    "name": step.name,
                    "state": "running" if progress else state,
                    "shown": _in_words(progress) if progress else _SHOWN[state],
                    "outcome": outcome_of(step, session.run_folder, ledger) if state == "done" else "",
                    "planned": "–" if hours is None else in_time(3600 * hours),
                    "spent": in_time(seconds) if note else "–",
                    "memory": f"{note.peak_gib:.1f} GiB" if note and (note.peak_gib or 0) >= 0.05 else "–",
                }
            )
        return {
            "name": session.study.name,
            "lead": _lead(session, len(done), is_over, bool(running)),
            "notices": session.notices,
            "refresh": bool(running),
            "steps": steps,
            "planned": in_time(3600 * sum(planned)) if planned else "–",
            "spent": in_time(spent),
            "memory": f"{max(peaks):.1f} GiB" if peaks else "–",
            "sections": [*self._sections(done), *_how_to_go_on(session, is_over)],
            "footer": _footer(),
        }

    def _sections(self, done: Sequence[Step]) -> list[Section]:
        """What is measured first: it is what the run is for. Then how it came about."""
        session = self._session
        measured = tuple(step.name for step in done if step.kind == "evaluate")
        found = list(self._once("measured", repr(measured), lambda: measured_sections(session, done)))
        for step in done:
            identity = session.ledger.identities[step.name]
            found += self._once(step.name, identity, lambda step=step: sections_of_step(step, session))
        return found

    def _once(self, name: str, identity: str, make: Any) -> list[Section]:
        """Sections that are made once, however often the report is written."""
        key = (name, identity)
        if key not in self._known:
            try:
                self._known[key] = list(make())
            except LongVPOError as error:  # must not cost the run its work
                return [Section(name, [f"This part of the report could not be made: {error}"])]
        return self._known[key]

    def _metrics(self) -> dict[str, Any]:
        """The numbers of the report, for programs."""
        session, ledger = self._session, self._session.ledger
        done = [step for step in session.steps if ledger.state(step.name) == "done"]
        notes = {step.name: ledger.note(step.name) for step in done}
        return {
            "study": session.study.name,
            "seed": session.study.seed,
            "steps": {
                name: {"seconds": note.seconds, "peak_gib": note.peak_gib, "settings": note.settings}
                for name, note in notes.items()
                if note
            },
            "results": {step.name: ledger.result(step.name) for step in done if ledger.result(step.name)},
            "versions": {"python": platform.python_version(), **installed_versions()},
            "machine": _machine(),
        }


def _lead(session: Session, num_done: int, is_over: bool, is_running: bool) -> str:
    state = "finished" if is_over else "running" if is_running else "not finished"
    return (
        f"{state}: {num_done} of {len(session.steps)} steps done · from {session.base_name} · seed {session.study.seed}"
    )


def _in_words(progress: Progress) -> str:
    left = f", {progress.left} left" if progress.left else ""
    return f"▶ {progress.text or 'at work'}{left}"


def _how_to_go_on(session: Session, is_over: bool) -> list[Section]:
    """What to type next."""
    commands: list[tuple[str, str]] = []
    if not is_over:
        commands.append(("The same command goes on where this one stopped:", session.command))
    run = session.run_folder
    states = {step.name: session.ledger.state(step.name) for step in session.steps}
    rows = [step.name for step in session.steps if step.kind == "build" and states[step.name] == "done"]
    models = [step.name for step in session.steps if step.kind == "train" and states[step.name] == "done"]
    commands += [("Look at all rows:", f"longvpo inspect {run / name}") for name in rows]
    if models:
        world = f" --world {run / 'world' / 'evaluation'}" if session.is_miniature else ""
        frames = "8,16,32" if session.is_miniature else "64,256,1024"
        commands.append(("Probe the last model:", f"longvpo probe needle {run / models[-1]} --frames {frames}{world}"))
        if not session.is_miniature and session.study.push_to is None:
            commands.append(
                ("Publish it: name a repository in the study, and run it again:", "push_to: my-org/my-model")
            )
    return [Section("How to go on", commands=commands)] if commands else []


def _machine() -> dict[str, Any]:
    from longvpo_hf.miniature.machine import processor_name

    return {"platform": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()}


def _footer() -> str:
    machine = _machine()
    versions = ", ".join(f"{name} {number}" for name, number in installed_versions().items())
    return f"{machine['processor']}, {machine['cores']} cores, {machine['platform']} · {versions}"


def _write_picture(folder: Path, picture: Picture) -> None:
    path = folder / f"{picture.name}.png"
    if not path.is_file() or path.read_bytes() != picture.png:
        with whole_file(path) as file:
            file.write(picture.png)


def _asset(name: str) -> str:
    return files("longvpo_hf.studies.report").joinpath(name).read_text(encoding="utf-8")


def _page(data: Mapping[str, Any]) -> str:
    style = _asset("page.css")
    # Of all that is between the tags, the line break before it too.
    digest = base64.b64encode(hashlib.sha256(f"\n{style}".encode()).digest()).decode()
    return _rendered("page.html", {**data, "style": style, "style_hash": f"sha256-{digest}"})


def _rendered(template: str, data: Mapping[str, Any]) -> str:
    import jinja2

    is_page = template.endswith(".html")
    environment = jinja2.Environment(
        autoescape=is_page, undefined=jinja2.StrictUndefined, trim_blocks=not is_page, lstrip_blocks=not is_page
    )
    environment.filters |= {"md": markdown, "clock": clock, "base64": lambda png: base64.b64encode(png).decode()}
    if is_page:
        # Its hash stands in the page's policy: of ours alone, unescaped.
        from markupsafe import Markup

        data = {**data, "style": Markup(data["style"])}
    text = environment.from_string(_asset(template)).render(data)
    return text if is_page else re.sub(r"\n{3,}", "\n\n", text)
