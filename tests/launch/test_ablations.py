"""The arms of the ablations: their rows, how they are trained, and the table of their results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import load_dataset

from conftest import make_dataset
from longvpo_hf import VideoPreference
from longvpo_hf.miniature.language import SENTENCES, WORDS
from longvpo_hf.miniature.settings import MiniatureSettings
from longvpo_hf.miniature.temporal import _ask_about_a_marker
from longvpo_hf.preference import undecoded
from longvpo_hf.responders import Request
from scripts import load_script

ABLATIONS = load_script(Path(__file__).resolve().parents[2] / "recipes" / "ablations.py")


def written(folder: Path) -> list[VideoPreference]:
    """The rows in a folder."""
    rows = undecoded(load_dataset(str(folder), split="train", cache_dir=str(folder / "cache")))
    return [VideoPreference.from_row(row) for row in rows]


def test_anchors_move_to_the_begin_and_nothing_else(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ABLATIONS, "make_rows", lambda workshop, name: None)
    single = list(make_dataset(preferences))
    ABLATIONS._single_first(SimpleNamespace(rows=lambda folder: single), tmp_path / "first")
    moved = written(tmp_path / "first")
    assert len(moved) == len(preferences)
    for before, after in zip(preferences, moved, strict=True):
        (anchor,) = before.evidence
        assert after.evidence == after.reference == (0,)
        spans = [(Path(clip.path).stat().st_size, clip.end_seconds) for clip in before.timeline.clips]
        rest = spans[:anchor] + spans[anchor + 1 :]
        assert [(Path(c.path).stat().st_size, c.end_seconds) for c in after.timeline.clips] == [spans[anchor], *rest]
        assert (after.question, after.chosen, after.rejected) == (before.question, before.chosen, before.rejected)


def test_a_tenth_of_the_chosen_answers_is_wrong_and_fewer_rows_are_some_of_them(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ABLATIONS, "make_rows", lambda workshop, name: None)
    asked = [replace(row, question=f"{row.question} {time}", id="") for time in range(5) for row in preferences]
    rows = list(make_dataset(asked))  # forty
    workshop = SimpleNamespace(rows=lambda folder: rows, settings=SimpleNamespace(seed=3))

    for name in ("wrong", "half", "tenth"):
        ABLATIONS.ROWS[name](workshop, tmp_path / name)
    wrong, right = written(tmp_path / "wrong"), [VideoPreference.from_row(row) for row in rows]
    changed = [(mine, given) for mine, given in zip(wrong, right, strict=True) if mine.chosen != given.chosen]
    assert len(changed) == 4
    answers = {row.chosen for row in right}
    for mine, given in changed:
        assert mine.chosen in answers - {given.chosen, given.rejected}
        assert (mine.question, mine.rejected, mine.evidence) == (given.question, given.rejected, given.evidence)
    for name, number in (("half", 20), ("tenth", 4)):
        few = {(row.question, row.chosen, row.rejected) for row in written(tmp_path / name)}
        assert len(few) == number
        assert few <= {(row.question, row.chosen, row.rejected) for row in right}


def test_an_arm_at_equal_time_takes_the_steps_that_this_time_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, asked = {"anchored": 0.2, "sampled": 0.5}, {}

    def main(words: list[str]) -> Any:
        given = yaml.safe_load(Path(words[1]).read_text(encoding="utf-8"))
        arm = Path(given["output_dir"]).name
        asked[arm] = given["max_steps"]
        clock[0] += seconds.get(arm, 0.0) * given["max_steps"]
        return SimpleNamespace(state=SimpleNamespace(log_history=[], global_step=given["max_steps"]))

    clock = [5.0]
    monkeypatch.setattr(ABLATIONS.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(ABLATIONS, "load_recipe", lambda name: SimpleNamespace(main=main))
    made: dict[str, Any] = {}
    workshop = SimpleNamespace(
        folder=tmp_path,
        settings=MiniatureSettings(seed=1),
        language=WORDS,
        once=lambda name, work: made[name] if name in made else made.setdefault(name, work()),
    )
    found = ABLATIONS.train(workshop, ABLATIONS.ARMS["sampled-timed"])
    assert asked == {"anchored": 300, "sampled": 300, "sampled-timed": 120}  # 300 · 0.2 / 0.5
    assert found["steps"] == 120


def test_in_the_world_of_a_language_model_arms_are_trained_as_its_study_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, tuple[dict[str, Any], list[str]]] = {}

    def main(words: list[str]) -> Any:
        given = yaml.safe_load(Path(words[1]).read_text(encoding="utf-8"))
        trained[Path(given["output_dir"]).name] = given, words[2:]
        return SimpleNamespace(state=SimpleNamespace(log_history=[], global_step=given["max_steps"]))

    monkeypatch.setattr(ABLATIONS, "load_recipe", lambda name: SimpleNamespace(main=main))
    settings = ABLATIONS.settings("pretrained", 61, False)
    workshop = SimpleNamespace(folder=tmp_path, settings=settings, language=SENTENCES, once=lambda name, work: work())
    for name in ("sampled", "localized", "stage2-from-base"):
        ABLATIONS.train(workshop, ABLATIONS.ARMS[name])
    for name, steps in (("sampled", 200), ("localized", 200), ("stage2-from-base", 80)):
        given, _ = trained[name]
        assert (given["use_peft"], given["beta"], given["max_steps"]) == (True, 0.1, steps)
        assert Path(given["model_name_or_path"]).name == "base"
    assert trained["localized"][0]["reference"] == "full"
    # A recipe refuses to score beforehand what is not drawn yet.
    assert trained["sampled"][1][-2:] == ["--precompute_ref_log_probs", "false"]
    assert trained["sampled"][0]["view_distillation_max_new_tokens"] > SENTENCES.max_answer_tokens

    asked: list[tuple[str, str]] = []
    workshop.captions = lambda scenes: {}
    workshop.stage2_rows = lambda rows, scenes, answerer: asked.append((rows, answerer)) or {"funnel": {}, "truth": {}}
    ABLATIONS.make_rows(workshop, "stage2")
    assert asked == [("rows-stage2", "base")]


def test_the_table_has_mean_and_standard_deviation_over_the_seeds() -> None:
    def measured(value: float) -> dict[str, Any]:
        return {"accuracy": {"16": value}, "pairs": {"accuracy": {"4": value / 2}}}

    arms = [{name: measured(value) for name in ABLATIONS.ARMS} for value in (90.0, 94.0)]
    del arms[1]["single"]  # not done yet
    seeds = {"1": {"base": measured(50.0), "arms": arms[0]}, "2": {"base": measured(53.0), "arms": arms[1]}}
    machine = {"processor": "p", "cores": 1, "platform": "l"}
    facts = {"machine": machine, "versions": {}, "command": "c", "fast": False, "lengths": [16], "remarks": ["by hand"]}
    text = ABLATIONS.report({**facts, "world": "miniature", "questions_per_length": 4, "seeds": seeds})
    assert "| base | 2 | 51.5 ± 2.1 |" in text  # sqrt(2 · 1.5²) = 2.12
    assert "| SFT alone | 2 | 92.0 ± 2.8 |" in text  # sqrt(2 · 2²) = 2.83
    assert "| stage2-from-base | 2 | 46.0 ± 1.4 |" in text  # about two clips
    assert "| one | 1 | 90.0 |" in text
    assert "| single | 90.0 | – |" in text
    assert "- by hand" in text
    assert all(f"## {question}" in text for question in ABLATIONS.QUESTIONS)
    # An arm that stands beside others is not shown alone as well.
    few = {"base": measured(50.0), "arms": {name: measured(90.0) for name in ("anchored", "sft", "localized")}}
    text = ABLATIONS.report({**facts, "world": "miniature", "questions_per_length": 4, "seeds": {"1": few}})
    assert [title in text for title in ("## Which loss", "## Temporal", "## Stage 2")] == [True, True, False]


def test_a_template_asks_about_a_marker_of_the_captions() -> None:
    request = Request("This is what a whole video shows:\nScene #0: navy-gold , red\nScene #1: teal-lime , blue")
    asked = json.loads(_ask_about_a_marker(request, WORDS))["question"]
    assert asked in ("what colour in the navy-gold clip ?", "what colour in the teal-lime clip ?")
    assert json.loads(_ask_about_a_marker(Request("nothing"), WORDS))["question"] is None
