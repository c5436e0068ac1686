"""The smallest study end to end, as `make demo` runs it, with few steps; and its report in a browser."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from chromium import Chromium
from cli import longvpo
from forked import longvpo_of_forks
from longvpo_hf.miniature.world import read_world
from longvpo_hf.record import ModelRecord, read_record
from longvpo_hf.studies.report import _page, _rendered
from longvpo_hf.studies.report.sections import Section, Table
from longvpo_hf.studies.study import shipped_studies

WORLDS = ("pretraining", "stage1", "stage2", "evaluation")
MODELS = ("base", "stage1-model", "stage2-model")
CHANGES = {
    "lengths": [1, 8],
    "questions_per_length": 12,
    "pair_lengths": [2, 4],
    "pair_questions_per_length": 8,
    "steps": 2,
    "stage2_steps": 2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped study of a minute, with less to measure."""
    content = yaml.safe_load(shipped_studies()["miniature-fast"].read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("study") / "small.yaml"
    content = {**content, "seed": 3, "miniature": {**content["miniature"], **CHANGES}}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(study: Path) -> Path:
    """Its finished run."""
    folder = study.parent / "run"
    result = longvpo_of_forks(["run", str(study), "--output", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


def test_it_leaves_all_that_it_promises(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    for model in MODELS:
        measured = metrics["results"][f"{model}-lengths"]
        assert list(measured["accuracy"]) == ["1", "8"]
        assert list(measured["pairs"]["accuracy"]) == ["2", "4"]
        for part, length in ((measured, "8"), (measured["pairs"], "4")):
            low, high = part["interval"][length]
            assert low <= part["accuracy"][length] <= high
        assert sum(part["questions"] for part in measured["positions"]["8"].values()) == 12
        assert AutoProcessor.from_pretrained(finished / model).chat_template
    for stage in ("stage1", "stage2"):
        rows = load_dataset(str(finished / f"{stage}-rows"), split="train", cache_dir=str(finished / "elsewhere"))
        assert len(rows) == metrics["results"][f"{stage}-rows"]["funnel"]["stages"]["rows"] > 0
        record = read_record(finished / f"{stage}-model", ModelRecord)
        assert record is not None
        assert next(data.source.name for data in record.data) == f"{stage}-rows"
    report = (finished / "report.md").read_text(encoding="utf-8")
    assert "mean nothing" in report
    assert f"| 8 | {metrics['results']['base-lengths']['accuracy']['8']:.1f} (" in report
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", report):
        assert (finished / picture).is_file()


def test_it_is_done_and_a_changed_setting_is_said_first(finished: Path, study: Path) -> None:
    again = longvpo(["run", str(study), "--output", str(finished)])
    assert again.exit_code == 0
    assert again.stdout.count(": done\n") == 11
    content = yaml.safe_load(study.read_text(encoding="utf-8"))
    content["miniature"]["stage2_steps"] = 3
    content["steps"][3]["learning_rate"] = 2e-3
    other = study.with_name("other.yaml")
    other.write_text(yaml.safe_dump(content), encoding="utf-8")
    plan = longvpo(["run", str(other), "--output", str(finished), "--dry-run"])
    assert plan.exit_code == 0
    assert re.search(r"stage2-model is made anew: .*max_steps: 2 → 3; .*learning_rate: none → 0.002", plan.stdout)
    assert "stage2-model-lengths is made anew: stage2-model changed" in plan.stdout
    assert "stage1-model is made anew" not in plan.stdout


def test_training_changed_the_language_model_and_not_the_vision_tower(finished: Path) -> None:
    weights = [AutoModelForImageTextToText.from_pretrained(finished / model).state_dict() for model in MODELS]
    for start, trained in pairwise(weights):
        changed = {name for name in start if not torch.equal(start[name], trained[name])}
        assert any("language_model" in name for name in changed)
        assert not any("vision_tower" in name for name in changed)


def test_evaluation_clips_were_in_no_training(finished: Path) -> None:
    worlds = {name: read_world(finished / "world" / name) for name in WORLDS}
    media = {name: {Path(item.clip.path).read_bytes() for item in clips} for name, clips in worlds.items()}
    for name in WORLDS[:-1]:
        assert media["evaluation"].isdisjoint(media[name])


def test_truth_of_the_rows_is_what_the_media_show(finished: Path) -> None:
    """Counted again, from the captions of the world that the scenes of each row have by their source ids."""
    told = json.loads((finished / "metrics.json").read_text())["results"]["stage2-rows"]["truth"]
    truth = {item.clip.source_id: item for item in read_world(finished / "world" / "stage2")}
    rows = load_dataset(str(finished / "stage2-rows"), split="train", cache_dir=str(finished / "elsewhere"))
    right = wrong = exact = 0
    for row in rows.with_format("arrow")[:].to_pylist():
        markers = re.findall(r"[a-z]+-[a-z]+", row["prompt"][0]["content"])
        sources = [clip["origin"]["source_id"] for clip in row["clips"]]
        scenes = [truth[source] for source in sources]
        found = [[scene.colour for scene in scenes if scene.marker == marker] for marker in markers]
        answer = " ".join(colours[0] for colours in found) if all(len(colours) == 1 for colours in found) else None
        right += row["chosen"][0]["content"] == answer
        wrong += row["rejected"][0]["content"] != answer
        places = {place for place, scene in enumerate(scenes) if scene.marker in markers}
        exact += places == set(row["evidence"]) and len(places) == 2
        # Long videos are runs of consecutive scenes of one file.
        starts = [float(source.split("#")[1]) for source in sources]
        assert len({source.split("#")[0] for source in sources}) == 1
        assert starts == [starts[0] + index for index in range(len(starts))]
        assert 4 <= len(starts) <= 8
    assert told["rows"] == {"pairs": len(rows), "chosen_right": right, "rejected_wrong": wrong, "evidence_exact": exact}
    assert told["before filters"]["pairs"] >= len(rows)


# ---------------------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


def complaints(browser: Chromium) -> list[object]:
    """What the page's console or its policy objected to, and what it asked of a network."""
    asked = [event["params"]["request"]["url"] for event in browser.events if "requestWillBeSent" in event["method"]]
    said = [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    return said + [url for url in asked if not url.startswith(("file:", "data:"))]


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_opens_without_a_network_at_any_width(
    finished: Path, browser: Chromium, width: int, scheme: str
) -> None:
    browser.colours(scheme)
    browser.size(width, 900)
    browser.open(finished / "report.html")
    assert complaints(browser) == []
    assert browser.run("document.querySelectorAll('tr.done').length") == 11
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.run("document.querySelectorAll('.strip .evidence').length") >= 4
    assert (
        browser.run("getComputedStyle(document.querySelector('section')).borderRadius") == "12px"
    )  # the style applies


HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> | `x` ]( </style>"


def test_what_comes_from_outside_is_shown_as_text(tmp_path: Path, browser: Chromium) -> None:
    clip = {"index": 0, "start": 0, "end": 1, "picture": None}
    row = {
        "question": HOSTILE,
        "chosen": HOSTILE,
        "rejected": HOSTILE,
        "clips": [clip],
        "evidence": [0],
        "num_clips": 1,
    }
    section = Section(
        HOSTILE,
        [HOSTILE],
        bars=[(HOSTILE, [(HOSTILE, 3, HOSTILE)])],
        rows=[{**row, "error": ""}],
        tables=[Table(HOSTILE, [HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]])],
        commands=[(HOSTILE, HOSTILE)],
    )
    step = dict.fromkeys(("name", "state", "shown", "outcome", "planned", "spent", "memory"), HOSTILE)
    texts = dict.fromkeys(("name", "lead", "planned", "spent", "memory", "footer"), HOSTILE)
    data = {**texts, "notices": [HOSTILE], "refresh": False, "steps": [step], "sections": [section]}
    page = tmp_path / "report.html"
    page.write_text(_page(data), encoding="utf-8")
    browser.open(page)
    assert complaints(browser) == []
    assert browser.run("document.title").startswith("<img src=x")
    assert browser.run("document.querySelectorAll('script, img').length") == 0
    assert "onerror" in browser.run("document.querySelector('.question').textContent")
    assert "<script" not in _rendered("report.md.j2", data).replace("    " + HOSTILE, "")  # but for the command's block
