"""Studies as YAML: what is refused by name, what their steps are, and what a step's identity follows from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cli import longvpo
from longvpo_hf.errors import ConfigError
from longvpo_hf.studies.session import Session
from longvpo_hf.studies.steps import InRun, Step, identities, steps_of
from longvpo_hf.studies.study import AUTO, Build, Train, find_study, read_study, shipped_studies

NAN, INFINITE = float("nan"), float("inf")
PLAIN = {
    "base": "someone/model",
    "videos": {"corpus": "videofolder", "source": "films"},
    "steps": [
        {"build": "stage1", "num_rows": 20, "writer": "scripted"},
        {"train": "stage1", "config": "internvl3_2b/stage1_lora", "learning_rate": 1e-6},
        {"build": "stage2", "num-rows": 10},
        {"train": "stage2", "config": "internvl3_2b/stage2_lora", "replay": "stage1-rows"},
    ],
    "evaluate": {"probes": ["position", {"probe": "needle", "frames": "16,32"}], "tasks": ["mlvu"], "limit": 3},
}


def written(folder: Path, **changes: object) -> Path:
    """The plain study with changes; None leaves a key out."""
    content = {name: value for name, value in {**PLAIN, **changes}.items() if value is not None}
    path = folder / "my_study.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def steps(folder: Path, base: str = "b", videos: str = "v", **changes: object) -> list[Step]:
    return steps_of(read_study(written(folder, **changes)), base, lambda source: videos)


def test_a_study_is_its_steps_with_measurements_before_and_after(tmp_path: Path) -> None:
    found = steps(tmp_path)
    measures = ("position", "needle", "benchmarks")
    assert [step.name for step in found] == [
        *(f"base-{what}" for what in measures),
        "stage1-rows",
        "stage1-rows-audit",
        "stage1-model",
        *(f"stage1-model-{what}" for what in measures),
        "stage2-rows",
        "stage2-rows-audit",
        "stage2-model",
        *(f"stage2-model-{what}" for what in measures),
    ]
    needs = {step.name: step.needs for step in found}
    assert needs["stage1-rows"] == ()
    assert needs["stage1-model"] == ("stage1-rows",)
    assert needs["stage2-rows"] == ("stage1-model",)
    assert needs["stage2-model"] == ("stage1-model", "stage2-rows", "stage1-rows")
    assert needs["stage2-model-needle"] == ("stage2-model",)
    assert needs["stage1-rows-audit"] == ("stage1-rows",)
    after = {step.name: step.after for step in found}
    assert after["stage2-model"] == ("stage2-rows-audit", "stage1-rows-audit")
    words = {step.name: step.words(Path("/run")) for step in found}
    assert " ".join(words["stage2-rows"][3:]).startswith(
        "build stage2 --corpus videofolder --source films --num-rows 10"
    )
    assert words["stage2-rows"][words["stage2-rows"].index("--responder") + 1] == "/run/stage1-model"
    assert words["base-needle"][3:] == [
        "probe", "needle", "someone/model", "--frames", "16,32", "--output", "/run/base-needle"
    ]  # fmt: skip
    training = words["stage2-model"]
    for option, value in {
        "replay_name": "stage1-rows",
        "dataset_name": "stage2-rows",
        "output_dir": "stage2-model",
    }.items():
        assert training[training.index(f"--{option}") + 1] == f"/run/{value}"


@pytest.mark.parametrize(("responder", "word", "needs"), [
    ("base", "someone/model", ()),
    ("stage1-model", "/run/stage1-model", ("stage1-model",)),
    ("scripted", "scripted", ()),
    ("someone/else", "someone/else", ()),
])  # fmt: skip
def test_rows_are_answered_by_the_model_that_is_named(
    tmp_path: Path, responder: str, word: str, needs: tuple[str, ...]
) -> None:
    given = [{**step, "responder": responder} if number == 2 else step for number, step in enumerate(PLAIN["steps"])]
    (found,) = [step for step in steps(tmp_path, steps=given, evaluate=None) if step.name == "stage2-rows"]
    words = found.words(Path("/run"))
    assert words[words.index("--responder") + 1] == word
    assert words.count("--responder") == 1
    assert found.needs == needs


def test_rows_are_audited_against_the_benchmarks_whose_videos_their_build_drops(tmp_path: Path) -> None:
    lists = ["mlvu=mlvu.txt", "videomme=videomme.txt"]
    both = {"source": "films", "corpus": "videofolder", "benchmark-videos": lists}
    compiled = steps_of(read_study(written(tmp_path, videos=both, evaluate=None)), "b", lambda source: "v")
    found = {step.name: step.words(Path("/run")) for step in compiled}
    for name in ("stage1-rows", "stage2-rows"):
        assert found[f"{name}-audit"][3:] == [
            "audit", f"/run/{name}", "--output", f"/run/{name}-audit/audit.html",
            "--benchmark-videos", lists[0], "--benchmark-videos", lists[1],
        ]  # fmt: skip
    without = {step.name: step.words(Path("/run")) for step in steps(tmp_path, evaluate=None)}
    assert "--benchmark-videos" not in without["stage1-rows-audit"]


def test_a_configuration_for_the_processor_is_started_on_it(tmp_path: Path) -> None:
    trains = [
        {"train": "stage1", "config": "miniature/stage1"},
        {"train": "stage1", "config": "internvl3_2b/stage1_lora"},
    ]
    found = steps(tmp_path, steps=[PLAIN["steps"][0], *trains], evaluate=None)
    assert ["cpu" in step.program for step in found if step.kind == "train"] == [True, False]


def test_a_second_step_of_a_kind_has_a_name_of_its_own(tmp_path: Path) -> None:
    again = [*PLAIN["steps"], {"build": "stage2"}, {"train": "stage2", "config": "internvl3_2b/stage2_lora"}]
    names = [step.name for step in steps(tmp_path, steps=again, evaluate=None)]
    assert names[6:] == ["stage2-rows-2", "stage2-rows-2-audit", "stage2-model-2"]


def changed(folder: Path, **changes: object) -> set[str]:
    """The steps that have another identity with changes."""
    before = identities(steps(folder, evaluate=None))
    after = identities(steps(folder, evaluate=None, **changes))
    different = {name for name in after if before.get(name) != after[name]}
    audits = {name for name in different if name.endswith("-audit")}
    assert audits == {f"{name}-audit" for name in different if name.endswith("-rows")}
    return different - audits


def test_an_identity_follows_from_what_changes_the_result_and_from_nothing_else(tmp_path: Path) -> None:
    def with_step(number: int, **options: object) -> list[dict[str, object]]:
        return [{**step, **options} if place == number else step for place, step in enumerate(PLAIN["steps"])]

    everything = {"stage1-rows", "stage1-model", "stage2-rows", "stage2-model"}
    assert changed(tmp_path) == set()
    assert changed(tmp_path, steps=with_step(0, num_rows=21)) == everything
    assert changed(tmp_path, steps=with_step(1, learning_rate=2e-6)) == everything - {"stage1-rows"}
    assert changed(tmp_path, steps=with_step(2, judge="scripted")) == {"stage2-rows", "stage2-model"}
    assert changed(tmp_path, steps=with_step(2, responder="scripted")) == {"stage2-rows", "stage2-model"}
    assert changed(tmp_path, steps=with_step(3, beta=0.2)) == {"stage2-model"}
    assert changed(tmp_path, seed=1) == everything
    assert changed(tmp_path, base="b2") == everything  # the base's weights
    assert changed(tmp_path, videos="v2") == everything
    assert changed(tmp_path, steps=with_step(0, num_workers=3)) == set()
    assert changed(tmp_path, push_to="me/model") == {"push"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bas": 1}, r"unknown key bas\. Did you mean base\?"),
        ({"base": None}, "base is missing"),
        ({"steps": []}, "at least one step"),
        ({"steps": {}}, "steps must be a list"),
        ({"steps": [{"num_rows": 3}]}, r"steps\[0\] must have one of `build` and `train`, got num_rows"),
        ({"steps": [{"build": "stage1", "train": "stage1"}]}, "one of `build` and `train`"),
        ({"steps": [{"build": "stage3"}]}, "build must be one of stage1, stage2, temporal, got 'stage3'. Did you mean"),
        ({"steps": [{"build": "stage1", "output": "x"}]}, "output is decided by the study itself"),
        ({"seed": "0"}, "seed must be a whole number, got '0'"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"seed": -1}, "seed must be ≥ 0"),
        ({"seed": 2**32}, r"seed must be ≥ 0 and < 2\^32, got 4294967296"),
        ({"name": "../../elsewhere"}, "name is that of a folder in runs/"),
        ({"name": "/elsewhere"}, "name is that of a folder in runs/"),
        ({"name": "a" * 101}, "name is that of a folder in runs/"),
        ({"name": ".."}, "name is that of a folder in runs/"),
        ({"name": "a\\b"}, "name is that of a folder in runs/"),
        ({"name": "two\nlines"}, "name is that of a folder in runs/"),
        ({"steps": [{"build": "stage1", "name": "base"}]}, "base is the model that the study starts from"),
        ({"steps": [{"build": "stage1", "responder": " "}]}, "responder is empty"),
        ({"steps": [{"train": "stage1", "output_dir": "x"}]}, "output_dir is decided by the study itself; .* `name`"),
        ({"steps": [{"train": "stage1", "dataset-name": "x"}]}, "dataset-name is decided .* `rows`"),
        ({"steps": [{"train": "stage1", "max_pixels": None}]}, "train: stage1: max_pixels has no value"),
        *(({"steps": [{"train": "stage1", "num_processes": n}]}, f"must be ≥ 1, got {n}") for n in (0, -2)),
        ({"evaluate": {"probes": ["needle", {"probe": "needle", "depths": 3}]}}, "needle is there twice"),
        ({"evaluate": {"probes": [{"probe": "needle", "output": "x"}]}}, "probe: needle: output is decided by"),
        ({"evaluate": {"tasks": ["mlvu"], "output": "x"}}, "evaluate: output is decided by the study itself"),
        ({"push_to": "no-namespace"}, "push_to must be NAMESPACE/NAME"),
        ({"push_to": "https://some.where/me/model"}, "push_to must be NAMESPACE/NAME"),
        ({"push_to": "me/../model"}, "push_to must be NAMESPACE/NAME"),
        ({"evaluate": {"probes": ["position", "needles"]}}, "Did you mean needle"),
        ({"evaluate": {"probes": ["lengths"]}}, "need base: miniature"),
        ({"evaluate": ["mlvu"]}, "evaluate must be a mapping"),
        ({"videos": {"corpus": "videofolder"}}, "source is missing"),
        ({"hours": 3}, "base: auto and hours go together"),
        *(({"base": "auto", "hours": hours}, "hours must be a number > 0, got") for hours in (NAN, INFINITE, 0, -1.5)),
        ({"base": "auto"}, "base: auto and hours go together"),
        ({"base": "miniature"}, "has videos of its own"),
        ({"push_to": 3}, "push_to must be a text"),
        ({"private": True}, "name the repository with push_to"),
        ({"revision": "try"}, "name the repository with push_to"),
    ],
)
def test_a_mistake_in_the_file_is_refused_by_name(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read_study(written(tmp_path, **changes))
    assert "my_study.yaml: " in str(error.value)


@pytest.mark.parametrize("text", ["", "[", "- 1", "3", "base: x\nsteps: [1]", "\x00"])
def test_what_is_no_study_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"s\.yaml"):
        read_study(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps": [{"build": "stage1", "num_row": 3}]},
            r"build stage1: Unknown option.*num-row.*Did you mean --num-rows",
        ),
        ({"steps": [{"build": "stage1", "num_rows": "many"}]}, "num-rows"),
        ({"evaluate": {"probes": [{"probe": "needle", "frame": 3}]}}, "probe needle: Unknown option"),
        ({"evaluate": {"tasks": ["mlvu"], "limits": 3}}, "eval: Unknown option"),
        ({"evaluate": {"tasks": ["mlvu"], "frames": "8,x"}}, 'eval: Invalid value "8,x" for --frames'),
        ({"evaluate": {"tasks": ["mlvu"], "frames": [8, 16]}}, r"eval: frames has one value, got \[8, 16\]"),
        ({"evaluate": {"tasks": ["mlvu"], "base_url": "http://localhost:1"}}, "eval: --base-url is about a server"),
        ({"evaluate": {"tasks": ["mlvu"], "protocol": ""}}, "eval: --protocol is empty"),
        ({"evaluate": {"probes": [{"probe": "needle", "frames": "0"}]}}, 'needle: Invalid value "0" for --frames'),
        ({"evaluate": {"probes": [{"probe": "needle", "frames": [4, 8]}]}}, r"frames has one value, got \[4, 8\]"),
        ({"evaluate": {"probes": [{"probe": "needle", "question": "What?"}]}}, "needle: --question, .* name it"),
        ({"evaluate": {"probes": [{"probe": "position", "video_frames": 4}]}}, "position: --video-frames is about"),
        ({"steps": [{"build": "stage1", "num_rows": [3, 4]}]}, r"stage1: num_rows has one value, got \[3, 4\]"),
        ({"steps": [*PLAIN["steps"][:1], {**PLAIN["steps"][1], "accelerate_config": "no"}]}, "no is not a file"),
        *(
            ({"steps": [*PLAIN["steps"][:1], {**PLAIN["steps"][1], "use_cpu": True, **given}]}, "it is one process")
            for given in ({"accelerate_config": "ddp"}, {"num_processes": 2})
        ),
        ({"steps": [{"train": "stage1", "config": "internvl3_2b/stage1_lora"}]}, "there are no rows to train on"),
        (
            {"steps": [PLAIN["steps"][0], {**PLAIN["steps"][1], "rows": "rows"}]},
            "rows is no step before it that makes rows",
        ),
        (
            {"steps": [PLAIN["steps"][0], {**PLAIN["steps"][1], "start": "x"}]},
            "x is no step before it that makes model",
        ),
        ({"steps": [{**PLAIN["steps"][0], "name": "A/../b"}]}, "A step's name is a folder's"),
        ({"steps": [{**PLAIN["steps"][0], "name": "state"}]}, "A step's name is a folder's"),
        ({"steps": [{**step, "name": "x"} for step in PLAIN["steps"][:2]]}, "Two steps are called x"),
    ],
)
def test_a_mistake_in_a_step_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        steps(tmp_path, **changes)


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_a_shipped_study_is_read_and_has_its_steps(name: str) -> None:
    study = find_study(name)
    assert study.name == name
    configured = [
        step if isinstance(step, Build) or step.config else Train(step.train, config="internvl3_8b/stage1_lora")
        for step in study.steps
    ]
    if study.base == AUTO:
        study = type(study)("someone/model", tuple(configured), study.videos, study.evaluate)
    else:
        study = read_study(shipped_studies()[name]) if study.base == "miniature" else study
    found = [step.kind for step in steps_of(with_configs(study, configured), "b", lambda source: "v")]
    assert found.count("build") == found.count("train") > 0


def with_configs(study, configured):
    from dataclasses import replace

    return replace(study, steps=tuple(configured))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1e-6}, "Unknown option --learning_rat. Did you mean --learning_rate?"),
        ({"beta": "low"}, "beta"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"beta": -0.1}, "beta must be ≥ 0, got -0.1"),
    ],
)
def test_a_setting_that_the_recipe_does_not_know_costs_no_build(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    study = tmp_path / "s.yaml"
    train = {"train": "stage1", "config": "miniature/stage1", **options}
    study.write_text(yaml.safe_dump({"base": "miniature", "steps": [{"build": "stage1"}, train]}), encoding="utf-8")
    for more in ([], ["--dry-run"]):
        result = longvpo(["run", str(study), "--output", str(tmp_path / "run"), *more])
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "run" / "world").exists()


@pytest.mark.parametrize("content", ["root:x:0:0\n", "- 1\n", "a: [\n", ""])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content, encoding="utf-8")
    trains = [PLAIN["steps"][0], {"train": "stage1", "config": str(tmp_path / "config.yaml")}]
    with pytest.raises(ConfigError, match=r"config\.yaml (is no recipe's configuration|cannot be read as YAML)"):
        steps(tmp_path, steps=trains, evaluate=None)
    checked = longvpo(["check", str(tmp_path / "config.yaml")])
    assert checked.exit_code == 2
    refused = r"config\.yaml (is no recipe's configuration|cannot be read as YAML)"
    assert re.search(refused, checked.stderr.splitlines()[-1])


def test_a_name_that_is_no_study_is_refused_with_the_nearest() -> None:
    result = longvpo(["run", "miniatur"])
    assert result.exit_code == 2
    assert "not a shipped study. Did you mean miniature" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("keys", "words"), [
    ({}, ["default"]),
    ({"private": False}, ["public"]),
    ({"private": True, "revision": "trial"}, ["private", "trial"]),
])  # fmt: skip
def test_a_push_goes_where_the_study_says_after_all_was_measured(
    tmp_path: Path, keys: dict[str, object], words: list[str]
) -> None:
    *_, last = steps(tmp_path, push_to="me/model", **keys)
    assert last.program == ("-m", "longvpo_hf.studies.push", InRun("stage2-model"), "me/model", *words)
    assert set(last.needs) == {
        "stage2-model",
        *(f"stage2-model-{what}" for what in ("position", "needle", "benchmarks")),
    }


def test_what_is_missing_is_one_list_with_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    result = longvpo(["run", str(written(tmp_path, push_to="me/model")), "--dry-run"])
    assert result.exit_code == 1
    for lack, remedy in {
        "the model someone/model": "hf download someone/model",
        "videos: films is no folder": "--videos FOLDER",
        "facebook/dinov2-base": "hf download facebook/dinov2-base",
        "MLVU": "hf download",
        "a GPU": "use_cpu: true",
        "a token of the Hub": "hf auth login",
    }.items():
        assert lack.lower() in result.stdout.lower(), lack
        assert remedy in result.stdout
    refused = longvpo(["run", str(tmp_path / "my_study.yaml")])
    assert refused.exit_code == 2
    assert "before anything runs, this is missing" in refused.stderr
    assert not (tmp_path / "runs" / "my_study" / "stage1-rows").exists()


@pytest.mark.parametrize(("language_model", "gguf", "remedy"), [
    ("someone/language", True, "hf download someone/language"),
    ("no/such/folder", True, "hf download no/such/folder"),
    (None, False, "longvpo-hf[pretrained]"),
    (None, True, None),
])  # fmt: skip
def test_a_language_model_out_of_reach_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language_model: str | None, gguf: bool, remedy: str | None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("longvpo_hf.studies.planning.find_spec", lambda name: object() if gguf else None)
    miniature = {"scale": "pretrained", **({"language_model": language_model} if language_model else {})}
    study = written(tmp_path, base="miniature", miniature=miniature, videos=None, evaluate=None,
                    steps=[{"build": "stage1"}])  # fmt: skip
    result = longvpo(["run", str(study), "--output", str(tmp_path / "run"), "--dry-run"])
    assert result.exit_code == (1 if remedy else 0)
    assert (remedy or "Nothing is missing.") in result.stdout


def test_a_plan_is_of_the_gpu_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = written(
        tmp_path,
        base="OpenGVLab/InternVL3-2B-hf",
        steps=[PLAIN["steps"][0]],
        evaluate={"probes": [{"probe": "position", "number": 1000}]},
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def plan(gpu_memory_gib: float | None) -> tuple[float, str]:
        session = Session.open(str(study), tmp_path / "run", gpu_memory_gib=gpu_memory_gib)
        hours = session.known_costs()["base-position"].hours
        assert hours is not None
        return hours, session.plan(session.steps, [])

    here, in_words = plan(None)
    assert "on this machine" in in_words
    elsewhere, in_words = plan(24.0)  # in the same folder: what was planned for this machine does not hold
    assert "on a GPU of 24 GiB at 300 TFLOP/s" in in_words
    # 2.089 billion parameters read 1,000 questions' 5 videos of 100 frames of 256 tokens.
    assert elsewhere == pytest.approx(2 * 2.089e9 * 1000 * 5 * 100 * 256 / 300e12 / 3600, rel=0.01)
    assert here > 10 * elsewhere
    assert plan(None)[0] == here
