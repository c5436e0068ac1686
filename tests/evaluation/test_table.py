"""The paper's table: which numbers stand in which cell, and whose they are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCardData

from longvpo_hf.evaluation.paper import PAPER, paper_model
from longvpo_hf.evaluation.results import eval_results, model_index
from longvpo_hf.evaluation.table import EvalRun, card_section, comparison, to_markdown


def run(
    stage: str = "base", num_frames: int = 512, model: str = "OpenGVLab/InternVL3-8B-hf", **scores: float
) -> EvalRun:
    tasks = {}
    for name, score in scores.items():
        groups = {"short": {"score": score + 1, "n": 6}, "long": {"score": score - 1, "n": 4}}
        tasks[name] = {"overall": score, "n": 10, "unparsed": 0.5, "groups": groups if name == "videomme" else {}}
    if "mlvu" in tasks:
        tasks["mlvu"] |= {"overall": 1.0, "m_avg": scores["mlvu"]}
    return EvalRun(model, stage, num_frames, tasks)


def cell(table: dict[str, Any], frames: int, name: str, column: int) -> Any:
    (part,) = [part for part in table["tables"] if part["num_frames"] == frames]
    (row,) = [row for row in part["rows"] if row["name"] == name]
    return row["cells"][column]


def test_measured_and_paper_side_by_side() -> None:
    runs = [run("stage2", mlvu=76.0, videomme=66.1), run("stage1", mlvu=75.55), run(mlvu=70.04, videomme=67.0)]
    table = comparison(runs)
    assert table["paper"] == "InternVL3-8B"
    (part,) = table["tables"]
    labels = [(column["label"], column["source"]) for column in part["columns"]]
    stages = ["base", "Stage 1", "Stage 2"]
    assert labels == [*((stage, "measured") for stage in stages), *((stage, "paper") for stage in stages)]
    base = {"value": 70.04, "delta": None, "source": "measured", "n": 10, "unparsed": 0.5, "cut_off": None}
    base["protocol"] = base["spread"] = None
    assert cell(table, 512, "mlvu", 0) == base, "M-Avg, not the overall score"
    # As printed: 75.6 − 70.0, of the numbers rounded to one place.
    assert cell(table, 512, "mlvu", 1)["delta"] == pytest.approx(5.5 if f"{75.55:.1f}" == "75.5" else 5.6)
    assert cell(table, 512, "mlvu", 2)["delta"] == pytest.approx(6.0)
    assert cell(table, 512, "mlvu", 3) == {"value": 71.4, "delta": None, "source": "paper"}
    assert cell(table, 512, "mlvu", 5) == {"value": 76.4, "delta": 5.0, "source": "paper"}
    assert cell(table, 512, "videomme", 1) is None
    assert cell(table, 512, "videomme", 2)["delta"] == pytest.approx(-0.9)
    assert [row["name"] for row in part["rows"]] == ["mlvu", "videomme"], "what nobody measured is left out"
    assert json.loads(json.dumps(table)) == table


def test_every_cell_of_the_markdown_says_whose_number_it_is() -> None:
    text = to_markdown(comparison([run(mlvu=70.0, mvbench=72.0), run("stage1", model="me/stage1", mlvu=75.5)]))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert (
        lines[0] == "| benchmark | base, measured | Stage 1, measured | base, paper | Stage 1, paper | Stage 2, paper |"
    )
    assert lines[1] == (
        "| MLVU (M-Avg) | 70.0 measured | 75.5 (+5.5) measured | 71.4 paper | 75.1 (+3.7) paper | 76.4 (+5.0) paper |"
    )
    assert lines[2].startswith("| MVBench | 72.0 measured | – | 75.4 paper | 75.1 (-0.3) paper |")
    for line in lines[1:]:
        for shown in line.strip("|").split("|")[1:]:
            assert re.fullmatch(r" (–|\d+\.\d( \([+-]\d+\.\d\))? (measured|paper)) ", shown)
    assert "- Stage 1, measured: me/stage1" in text
    assert "- paper: InternVL3-8B (LongVPO, arXiv 2602.02341), 512 frames" in text
    assert "counted as wrong: MLVU (M-Avg) 0.5 %, 0.5 %; MVBench 0.5 %" in text


def test_both_parsers_stand_in_the_table_by_name() -> None:
    base, tuned = run(lvbench=48.0, mlvu=60.0), run("stage1", lvbench=50.0)
    base.tasks["lvbench"].update(official=44.0, cut_off=0.0)  # type: ignore[attr-defined]
    tuned.tasks["lvbench"].update(official=52.0, cut_off=12.5)  # type: ignore[attr-defined]
    table = comparison([base, tuned])
    assert [(row["name"], row["parser"]) for row in table["tables"][0]["rows"]] == [
        ("lvbench", "ours"),
        ("lvbench", "official"),
        ("mlvu", "ours"),
    ]
    text = to_markdown(table)
    assert "| LVBench, ours | 48.0 measured | 50.0 (+2.0) measured | – | – | – |" in text
    assert "| LVBench, official | 44.0 measured | 52.0 (+8.0) measured | 48.8 paper | 52.4 (+3.6) paper |" in text
    assert "| MLVU (M-Avg) | 60.0 measured | – | 71.4 paper |" in text, "a result of before has one score"
    assert "(ours) and by each benchmark's own rule (official)" in text
    assert "inside their reasoning, counted as wrong; --max-new-tokens gives room: LVBench 0.0 %, 12.5 %" in text
    assert text.count("LVBench 0.5 %, 0.5 %") == 1, "shares are told once"
    assert "reasoning" not in to_markdown(comparison([run(lvbench=48.0)]))


def test_the_paper_stands_beside_its_own_number_of_frames_alone() -> None:
    table = comparison([run(num_frames=512, lvbench=48.0), run(num_frames=64, lvbench=40.0)])
    assert [(part["num_frames"], len(part["columns"])) for part in table["tables"]] == [(64, 1), (512, 4)]
    text = to_markdown(table)
    at_64 = text[: text.index("at most 512 frames of each video")]
    assert "The paper has numbers of InternVL3-8B at 512 frames, none at 64." in at_64
    assert " paper |" not in at_64


def test_models_the_paper_does_not_know() -> None:
    table = comparison([run(model="Qwen/Qwen3-VL-8B-Instruct", lvbench=48.0)])
    assert table["paper"] is None
    assert "paper" not in to_markdown(table)
    asked = comparison([run("stage1", model="me/mine", lvbench=48.0)], paper="InternVL2.5-8B")
    assert [column["note"] for column in asked["tables"][0]["columns"]] == [
        "",
        "",
        "128 training frames",
        "128 training frames",
        "256 training frames",
    ]
    assert cell(asked, 512, "lvbench", 0)["delta"] is None, "no base was measured"
    assert "| Stage 1, paper (256 training frames) |" in to_markdown(asked)


def test_groups_are_measured_alone() -> None:
    text = to_markdown(comparison([run(videomme=60.0), run("stage1", videomme=65.0, mlvu=70.0)]))
    assert "| group | base, measured | Stage 1, measured |" in text
    assert "| Video-MME, without subtitles: long | 59.0 measured | 64.0 measured |" in text


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("OpenGVLab/InternVL3-8B-hf", "InternVL3-8B"),
        ("OpenGVLab/InternVL2_5-8B", "InternVL2.5-8B"),
        ("OpenGVLab/InternVideo2_5_Chat_8B", "InternVideo2.5-8B"),
        ("DAMO-NLP-SG/VideoLLaMA3-7B", "Video-LLaMA3-7B"),
        ("OpenGVLab/InternVL3-38B-hf", None),
        ("OpenGVLab/InternVL3_5-8B-HF", None),
        ("OpenGVLab/InternVL3-2B-hf", None),
    ],
)
def test_which_of_the_paper_s_models_a_name_is(name: str, key: str | None) -> None:
    assert paper_model(name) == key


def test_the_paper_s_numbers() -> None:
    """A few of them, typed again; and the changes that the paper's text claims follow from them."""
    base, first, second, longer = PAPER["InternVL2.5-8B"]
    assert (base.scores["mlvu"], first.scores["mlvu"], second.scores["mlvu"], longer.scores["mlvu"]) == (
        67.6,
        73.5,
        74.1,
        74.8,
    )
    assert PAPER["InternVL3-8B"][2].scores["lvbench"] == 53.6
    assert PAPER["InternVideo2.5-8B"][1].scores["videomme_subtitles"] == 73.1
    assert "mvbench" not in PAPER["Video-LLaMA3-7B"][0].scores
    for lines in PAPER.values():
        assert lines[0].stage == "base"
        assert all(40 < score < 80 for line in lines for score in line.scores.values())


def test_model_index_holds_what_was_measured_and_survives_the_card() -> None:
    runs = [
        run("stage2", 64, "me/stage2", videomme=60.0, videomme_subtitles=64.126),
        run("stage2", 512, "me/stage2", mlvu=70),
    ]
    index = model_index("stage2", runs)
    assert [entry["dataset"]["type"] for entry in index[0]["results"]] == ["lmms-eval/Video-MME", "sy1998/MLVU_dev"]
    video_mme = [(metric["name"], metric["value"]) for metric in index[0]["results"][0]["metrics"]]
    assert video_mme == [
        ("Video-MME, without subtitles, 64 frames", 60.0),
        ("Video-MME, with subtitles, 64 frames", 64.13),
    ]
    results = eval_results(runs)
    written = ModelCardData(model_name="stage2", eval_results=results).to_yaml()
    read = ModelCardData(**yaml.safe_load(written))
    assert read.eval_results is not None
    assert {fact(result) for result in read.eval_results} == {fact(result) for result in results}
    assert "paper" not in written
    with pytest.raises(ValueError, match="its own results only, got those of"):
        eval_results([*runs, run(mlvu=70)])


def fact(result: EvalResult) -> tuple[Any, ...]:
    return result.dataset_name, result.metric_name, result.metric_value, result.dataset_split


def test_card_section_shows_names_as_they_are(tmp_path: Path) -> None:
    nasty = run("a | <b>", model="x](http://evil) <script>", lvbench=50.0)
    text = card_section(comparison([nasty, run(model=str(tmp_path / "mine"), lvbench=49.0)]))
    assert text.startswith("## Benchmarks\n")
    assert "<" not in text.replace("&lt;", "")
    assert "](http" not in text.replace("\\](", "")
    assert str(tmp_path) not in text
    header = next(line for line in text.splitlines() if line.startswith("| benchmark"))
    assert len(re.split(r"(?<!\\)\|", header)) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": None}, "num_frames"),
        ({"model": ""}, "A result needs a model"),
        ({"tasks": {"mmlu": {"overall": 1}}}, "no suite is called 'mmlu'; known are lvbench"),
        ({"tasks": {"mlvu": {"overall": 50.0}}}, "mlvu.m_avg must be a percentage, got None"),
        ({"tasks": {"lvbench": {"overall": 101}}}, "lvbench.overall must be a percentage, got 101"),
        ({"tasks": {"lvbench": {"overall": float("nan")}}}, "must be a percentage, got nan"),
        ({"tasks": ["lvbench"]}, "is no result of"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    record = {"model": "m", "stage": None, "num_frames": 8, "tasks": {"lvbench": {"overall": 50.0, "n": 3}}}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(record))
    assert EvalRun.read(path) == EvalRun("m", "base", 8, {"lvbench": {"overall": 50.0, "n": 3}})
    path.write_text(json.dumps({**record, **change}))
    with pytest.raises(ValueError, match=r"result.json is no result of `longvpo eval`") as caught:
        EvalRun.read(path)
    assert message in str(caught.value)
    del record["num_frames"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="the field 'num_frames' is missing"):
        EvalRun.read(path)


def test_results_that_make_no_table() -> None:
    with pytest.raises(ValueError, match="at least one result"):
        comparison([])
    with pytest.raises(ValueError, match="Two results are of stage 'base' at 512 frames"):
        comparison([run(lvbench=1.0), run(lvbench=2.0)])
    with pytest.raises(ValueError, match=r"The paper has no numbers of 'GPT'; it has InternVL2\.5-8B"):
        comparison([run(lvbench=1.0)], paper="GPT")


def test_table_loads_nothing_heavy() -> None:
    program = (
        "import sys, longvpo_hf.evaluation.table; print([m for m in ('torch', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
