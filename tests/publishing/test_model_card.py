"""The model card: what it says, that names cannot break it, that a wheel holds it, and that its code loads the model.

What talks to the Hub runs in processes of its own against `hub_double`: `train_and_push` trains a model and an adapter
and pushes both, `do_as_the_card_says` downloads them into an empty cache and runs the cards' code.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import inspect
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from test_hub import of_corpora, write
from torchcodec.encoders import VideoEncoder

from conftest import make_dataset
from hub_double import TOKEN, HubDouble, card_errors
from longvpo_hf import LongVPOConfig, papers
from longvpo_hf.preference import VideoPreference
from longvpo_hf.publishing.model_card import CURVE_FILE, model_card, update_model_card, write_model_card
from longvpo_hf.record import (
    RECORD_FILE,
    AdapterRecord,
    EvaluationRecord,
    MethodRecord,
    ModelRecord,
    Sampling,
    Source,
    TrainedOn,
    TrainingRecord,
    read_record,
)

ROOT = Path(__file__).resolve().parents[2]
BASE, DATASET, FULL, ADAPTER = "org/tiny_base", "longvpo/stage1", "someone/stage1-full", "someone/stage1-lora"
SAMPLING = Sampling(3, 1.0, None)
LOGS = [
    {"step": 1, "loss": 0.7, "rewards/accuracies": 0.25, "rewards/margins": -0.01},
    {"step": 2, "loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.125},
    {"step": 2, "eval_loss": 0.6, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0},
]


def result(dataset: str = "MLVU", value: float = 74.1) -> EvaluationRecord:
    return EvaluationRecord(
        task_type="video-text-to-text",
        dataset_type=dataset.lower(),  # results of one type and split become one entry of the index
        dataset_name=dataset,
        dataset_split="dev",
        metric_type="accuracy",
        metric_name="M-Avg",
        metric_value=value,
    )


def _fields(result: EvaluationRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if name != "extra"}


def written(folder: Path, **facts: Any) -> str:
    """The card of these facts, checked as the Hub would."""
    known = {"name": "mine", "load_from": "me/mine", "base": Source.of(BASE), "sampling": SAMPLING}
    log_history = facts.pop("log_history", ())
    record = ModelRecord(**{**known, **facts})
    write_model_card(folder, record, log_history)
    assert read_record(folder, ModelRecord) == record
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert card_errors(text) == []
    return text


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# ------------------------------------------------------------------------------------------------- text and numbers


def test_evaluation_stands_in_the_table_and_in_the_model_index(tmp_path: Path) -> None:
    text = written(tmp_path, evaluations=(result(), result("LVBench", 50.1)))
    assert "| MLVU | dev | M-Avg | 74.1 | – |\n| LVBench | dev | M-Avg | 50.1 | – |\n" in text
    assert "No result was recorded" not in text
    (index,) = ModelCard(text).data.to_dict()["model-index"]
    assert index["name"] == "mine"
    assert [entry["metrics"][0]["value"] for entry in index["results"]] == [74.1, 50.1]


def test_a_result_stands_with_its_bounds_beside_that_of_the_base(tmp_path: Path) -> None:
    known = {"protocol": "mlvu: at most 64 frames", "questions": 2174, "interval_95": [72.24, 75.86]}
    base = {"base": {"value": 70.4, "interval_95": [68.5, 72.3]}}
    text = written(tmp_path, evaluations=(replace(result(), metric_args={**known, **base}), result("LVBench", 50.1)))
    assert "| MLVU | dev | M-Avg | 70.4 (68.5–72.3) | 74.1 (72.2–75.9) | 2174 |\n" in text
    assert "| LVBench | dev | M-Avg | – | 50.1 | – |\n" in text
    assert "\nHow it was measured:\n\n- mlvu: at most 64 frames\n" in text
    (index,) = ModelCard(text).data.to_dict()["model-index"]
    assert index["results"][0]["metrics"][0]["args"] == {"protocol": known["protocol"]}


@pytest.mark.parametrize("bounds", ["ab", [1, "x"], [True, False], [1.0], {"0": 1, "1": 2}, 3])
def test_bounds_that_are_none_are_not_shown(tmp_path: Path, bounds: Any) -> None:
    strange = replace(result(), metric_args={"interval_95": bounds, "base": 7, "questions": NASTY[0]})
    text = written(tmp_path, evaluations=(strange,))
    assert "| MLVU | dev | M-Avg | 74.1 | a \\| b \\| c |\n" in text


def test_without_results_the_card_says_so(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert "## Evaluation\n\nNo result was recorded: nothing is known of how well this model answers." in text
    assert "| benchmark |" not in text
    assert "model-index" not in text


def test_limits_are_those_of_the_run(tmp_path: Path) -> None:
    ours = (TrainedOn(Source.of(DATASET), (MethodRecord("longvpo-stage2"),)),)
    text = written(tmp_path, data=ours)
    assert "- In training it saw at most 3 frames, 1 a second, of each video." in text
    assert "- Questions and answers of longvpo-stage2 were written and filtered by models" in text
    text = written(tmp_path, data=(TrainedOn(Source.of("me/labelled"), (MethodRecord("by-hand"),)),), sampling=None)
    assert "written and filtered" not in text
    assert "## Limits\n\n- Nothing was measured beyond what is said above.\n\n## Licence\n" in text


def test_a_card_that_somebody_wrote_into_is_left_as_it_is(tmp_path: Path) -> None:
    old = ModelRecord("mine", "me/mine", Source.of(BASE))
    new = replace(old, evaluations=(result(),))
    assert update_model_card(tmp_path, old, new), "no card, nothing to lose"
    assert not (tmp_path / "README.md").exists()
    write_model_card(tmp_path, old, LOGS)
    assert update_model_card(tmp_path, old, new)
    card = tmp_path / "README.md"
    assert card.read_text(encoding="utf-8") == model_card(new, has_curve=True)
    card.write_text(card.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    assert not update_model_card(tmp_path, new, old)
    assert card.read_text(encoding="utf-8").endswith("My own words.\n")
    assert read_record(tmp_path, ModelRecord) == old


def test_a_merged_adapter_is_loaded_as_a_whole_model(tmp_path: Path) -> None:
    training = TrainingRecord(adapter=AdapterRecord("LoRA", 4, 8, ("q_proj",)))
    merged = ModelRecord("mine", "me/mine", Source.of(BASE), training=training).merged()
    text = written(tmp_path, training=merged.training)
    assert "PeftModel" not in text
    assert "A fine-tuned version of" in text
    assert "| trained weights | LoRA of rank 4, α 8 on q_proj, merged into the base |" in text
    assert ModelCard(text).data.library_name == "transformers"


def test_curve_stands_beside_the_card(tmp_path: Path) -> None:
    progress = {"loss": (0.7, 0.5), "rewards/accuracies": (0.25, 0.75), "rewards/margins": (-0.01, 0.125)}
    text = written(tmp_path, log_history=LOGS, progress=progress)
    assert f"]({CURVE_FILE})" in text
    assert "| loss | 0.7 | 0.5 |\n| reward accuracy | 0.25 | 0.75 |\n| reward margin | -0.01 | 0.125 |\n" in text
    picture = (tmp_path / CURVE_FILE).read_bytes()
    assert picture.startswith(b"\x89PNG")
    written(tmp_path / "other", log_history=[*LOGS, {**LOGS[1], "step": 3, "loss": 5.0}])
    assert (tmp_path / "other" / CURVE_FILE).read_bytes() != picture


def test_before_training_there_is_no_curve(tmp_path: Path) -> None:
    assert CURVE_FILE not in written(tmp_path)
    assert not (tmp_path / CURVE_FILE).exists()


def test_licence_is_the_base_model_s(tmp_path: Path) -> None:
    text = written(tmp_path, licence={"license": "other", "license_name": "qwen", "license_link": "LICENSE"})
    assert ModelCard(text).data["license_name"] == "qwen"
    assert "\nqwen, the base model's." in text
    text = written(tmp_path)
    assert "license" not in ModelCard(text).data.to_dict()
    assert "\nNot stated: the base model's licence is not known here, and applies." in text


@pytest.mark.parametrize(
    ("source", "name", "on_hub", "load_from"),
    [
        (Source.of(BASE, "abc"), BASE, True, BASE),
        (Source.of("/ho" + "me/someone/base"), "base", False, "path/to/base"),
        (Source.of("../runs/base"), "base", False, "path/to/base"),
        (Source.of("no repository | name"), "no repository | name", False, "path/to/no repository | name"),
        (Source.of(""), "", False, "path/to/the/base/model"),
    ],
)
def test_only_what_is_on_the_hub_is_a_base_model(
    tmp_path: Path, source: Source, name: str, on_hub: bool, load_from: str
) -> None:
    assert (source.name, source.on_hub, source.load_from) == (name, on_hub, load_from)
    training = TrainingRecord(adapter=AdapterRecord("LoRA", 4, 8, ("q_proj",)))
    data = ModelCard(written(tmp_path, base=source, training=training, data=(TrainedOn(source),))).data.to_dict()
    assert data.get("base_model") == (name if on_hub else None)
    assert data.get("datasets") == ([name] if on_hub else None)
    assert data.get("base_model_relation") == ("adapter" if on_hub else None)


NASTY = [
    "a | b | c",
    "a\n---\n# b\n| c | d |",
    "a: [b], {c: d} # &e *f !g 'h\" %i",
    "{{ 7 * 7 }}{% raw %}",
    "`a` ``` b",
    "<script>alert(1)</script>",
    "[click](http://evil.example) ![x](y)",
    'a"); import os; print("b',
    "\\",
]


@pytest.mark.parametrize("nasty", NASTY)
def test_names_from_outside_cannot_break_the_card(tmp_path: Path, nasty: str) -> None:
    facts = {
        "name": nasty,
        "load_from": nasty,
        "base": Source(nasty, nasty),
        "data": (TrainedOn(Source.of(nasty), (MethodRecord(nasty, nasty, f"{nasty}\n```\n{nasty}"),)),),
        "tags": (nasty,),
        "runs": {nasty: "javascript:x", "run": f"https://x.example/{nasty}"},
        "licence": {"license": "other", "license_name": nasty},
        "citations": (papers.LONGVPO, papers.TRL),
        "versions": {nasty: nasty},
    }
    for adapter in (None, AdapterRecord(nasty, 4, 8, (nasty,))):
        training = TrainingRecord({nasty: 1.0}, reference=nasty, lr_scheduler_type=nasty, optim=nasty, adapter=adapter)
        plain = written(tmp_path, evaluations=(result("plain"),), **{**facts, "training": training})
        text = written(tmp_path, evaluations=(result(nasty),), **{**facts, "training": training})
        data = ModelCard(text).data
        assert data.eval_results is not None
        assert (data.model_name, data.eval_results[0].dataset_name) == (nasty, nasty)
        assert nasty in data["tags"]
        # The same lines whatever the name is, each row of a table with the bars it should have.
        body = text.split("\n---\n", 1)[1]
        assert len(body.splitlines()) == len(plain.split("\n---\n", 1)[1].splitlines())
        shown = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
        rows = [line for line in shown.splitlines() if line.startswith("|")]
        bars = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows]
        assert bars == [3] * 20 + [6] * 3
        assert [line for line in shown.splitlines() if line.startswith("#")][1:] == [
            "## How to load it",
            "## Training",
            "## Evaluation",
            "## Limits",
            "## Licence",
            "## Versions",
            "## Citation",
        ]
        assert body.count("```") == 2 * 5
        assert "<script>" not in shown
        assert not re.search(r"(?<!\\)\]\(http://evil", shown)
        assert "49" not in shown
        # In code, a name is a text and nothing else.
        load, ask = (ast.parse(block) for block in code_blocks(text))
        assert {type(node) for node in load.body} == {ast.ImportFrom, ast.Assign}
        assert len(ask.body) == 7
        texts = {node.value for node in ast.walk(load) if isinstance(node, ast.Constant)}
        assert nasty in texts


def test_a_run_on_trackio_or_on_jobs_is_told_as_trl_tells_it(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training, when trackio has finished its run, the tag that it left names the Space."""
    from longvpo_hf import LongVPOTrainer
    from tiny_models import build

    monkeypatch.setenv("JOB_ID", "1")
    model, processor = build("internvl")
    args = LongVPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, num_frames=3, reference="anchor")
    rows = make_dataset(preferences[:2])
    trainer = LongVPOTrainer(
        model=model, ref_model=deepcopy(model), args=args, train_dataset=rows, processing_class=processor
    )
    trainer.create_model_card(tags=["trackio", "trackio:https://huggingface.co/spaces/me/runs"])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Logged at [Trackio](https://huggingface.co/spaces/me/runs)." in text
    assert {"hf_jobs", "trackio:https://huggingface.co/spaces/me/runs"} <= set(ModelCard(text).data.tags or ())


# --------------------------------------------------------------------------------------------------------- the wheel


def test_template_is_found_in_a_wheel_made_of_the_sdist(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = (
        "import sys; from pathlib import Path; from longvpo_hf.publishing.model_card import *\n"
        "from longvpo_hf.record import ModelRecord, Source\n"
        "write_model_card(Path('card'), ModelRecord('mine', 'me/mine', Source.of('org/base')))\n"
        "print(sys.modules['longvpo_hf'].__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "installed" / "longvpo_hf" / "__init__.py")
    assert 'from_pretrained("me/mine"' in (tmp_path / "card" / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- through the double


def _weight(model: Any) -> float:
    """One number that changes with any weight."""
    return sum(float(p.double().abs().sum()) for _, p in sorted(model.state_dict().items()) if p.is_floating_point())


def train_and_push(rows: str) -> dict[str, Any]:
    """Puts a base model and rows on the Hub, trains on them for two steps (all weights; LoRA) and pushes both."""
    from datasets import load_dataset
    from huggingface_hub import create_repo, upload_folder
    from peft import LoraConfig

    from longvpo_hf import LongVPOConfig, LongVPOTrainer
    from longvpo_hf.publishing.dataset import push_dataset
    from tiny_models import build

    model, processor = build("internvl")
    model.save_pretrained("base")
    processor.save_pretrained("base")
    ModelCard("---\nlicense: apache-2.0\n---\n").save("base/README.md")
    create_repo(BASE)
    told: dict[str, Any] = {"base revision": upload_folder(repo_id=BASE, folder_path="base").oid}
    told["data revision"] = push_dataset(Path(rows), DATASET)
    told["weight base"] = _weight(model)
    for repo, adapter in ((FULL, None), (ADAPTER, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))):
        output = Path.cwd() / repo.split("/")[1]
        trainer = LongVPOTrainer(
            model=BASE,
            args=LongVPOConfig(
                output_dir=str(output),
                hub_model_id=repo,
                hub_token=TOKEN,
                max_steps=2,
                per_device_train_batch_size=2,
                num_frames=3,
                reference="anchor",
                learning_rate=0.03,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_steps=2,
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=load_dataset(DATASET, split="train"),
            peft_config=adapter,
        )
        trainer.train()
        told[f"checkpoint {repo}"] = sorted(path.name for path in (output / "checkpoint-2").iterdir())
        told[f"README.md at checkpoint {repo}"] = (output / "README.md").read_text(encoding="utf-8")
        told[f"{RECORD_FILE} at checkpoint {repo}"] = (output / "checkpoint-2" / RECORD_FILE).read_text(
            encoding="utf-8"
        )
        trainer.push_to_hub(eval_results=[EvalResult(**_fields(result()))])
        told[f"losses {repo}"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        told[f"weight {repo}"] = _weight(trainer.model.merge_and_unload() if adapter else trainer.model)
        told[f"attention {repo}"] = trainer.model.get_decoder().config._attn_implementation
    return told


def do_as_the_card_says() -> dict[str, Any]:
    """Runs the code of both cards, with nothing but their names to start from."""
    from transformers import AutoProcessor

    told: dict[str, Any] = {}
    for repo in (FULL, ADAPTER):
        names: dict[str, Any] = {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for block in code_blocks(ModelCard.load(repo).content):
                exec(block, names)
        model, processor = names["model"], names["processor"]
        told[f"answered {repo}"] = bool(printed.getvalue().strip())
        told[f"processor {repo}"] = [type(processor).__name__, AutoProcessor.from_pretrained(repo).chat_template]
        told[f"model {repo}"] = type(model).__name__
        told[f"attention {repo}"] = model.get_decoder().config._attn_implementation
        told[f"weight {repo}"] = _weight(model.merge_and_unload() if repo == ADAPTER else model)
    return told


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory, preferences: list[VideoPreference]) -> dict[str, Any]:
    """What `train_and_push` and `do_as_the_card_says` told, and the files on the Hub."""
    folder = tmp_path_factory.mktemp("pushed")
    rows = write(folder / "rows", of_corpora(preferences, ["mit"]))
    (folder / "reader").mkdir()
    minute = torch.randint(0, 256, (120, 3, 32, 32), dtype=torch.uint8)
    VideoEncoder(minute, frame_rate=2).to_file(str(folder / "reader" / "video.mp4"))
    with HubDouble() as hub:
        told = hub.call(train_and_push, rows, cwd=folder / "trainer", hf_home=folder / "home")
        read = hub.call(do_as_the_card_says, cwd=folder / "reader", hf_home=folder / "home of a reader")
        return {"told": told, "read": read, "folder": folder, **{repo: hub.files(repo) for repo in (FULL, ADAPTER)}}


@pytest.mark.parametrize("repo", [FULL, ADAPTER])
def test_card_tells_of_the_run(pushed: dict[str, Any], repo: str) -> None:
    told, text = pushed["told"], pushed[repo]["README.md"].decode()
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.license) == (BASE, [DATASET], "apache-2.0")
    assert (data.library_name, data["base_model_relation"]) == (
        ("peft", "adapter") if repo == ADAPTER else ("transformers", "finetune")
    )
    assert {"trl", "dpo", "longvpo"} <= set(data.tags or ())
    assert data.eval_results == [EvalResult(**_fields(result()))]
    rows = dict(re.findall(r"^\| ([^|]*) \| ([^|]*) \|$", text, re.MULTILINE))
    assert told["base revision"] in text
    assert told["data revision"] in rows["dataset"]
    assert rows["method"] == "longvpo-stage1"
    assert rows["loss"] == "1 × sigmoid + 1 × sft"
    assert rows["β"] == "0.01"
    assert rows["the reference model sees"] == "the row's reference clips, or its evidence where it names none"
    assert rows["frames of the policy"] == "at most 3 frames, 1 a second, 200704 pixels each"
    assert rows["trained weights"] == ("LoRA of rank 4, α 8 on q_proj, v_proj" if repo == ADAPTER else "all")
    assert rows["learning rate"].startswith("0.03, constant, ")
    assert rows["batch"] == "2 rows = 2 (per device) × 1 (accumulated) × 1 (processes)"
    assert rows["epochs"].endswith("(2 steps)")
    assert rows["tree packing"].startswith("on")
    first, last = told[f"losses {repo}"]
    assert f"| loss | {first:.4g} | {last:.4g} |" in text
    assert pushed[repo][CURVE_FILE].startswith(b"\x89PNG")
    for citation in ("2602.02341", "rafailov2023direct", "vonwerra2020trl"):
        assert citation in text


@pytest.mark.parametrize("repo", [FULL, ADAPTER])
def test_record_says_what_the_card_says(pushed: dict[str, Any], repo: str, tmp_path: Path) -> None:
    told = pushed["told"]
    (tmp_path / RECORD_FILE).write_bytes(pushed[repo][RECORD_FILE])
    record = read_record(tmp_path, ModelRecord)
    assert record is not None
    assert record.base == Source(BASE, told["base revision"], on_hub=True)
    (data,) = record.data
    assert data.source == Source(DATASET, told["data revision"], on_hub=True)
    assert data.methods == (MethodRecord("longvpo-stage1", "stage1-1", papers.LONGVPO),)
    assert record.sampling == Sampling(3, 1.0, 448 * 448)
    assert record.training is not None
    assert (record.training.losses, record.training.num_steps) == ({"sigmoid": 1.0, "sft": 1.0}, 2)
    assert record.training.adapter == (AdapterRecord("LoRA", 4, 8, ("q_proj", "v_proj")) if repo == ADAPTER else None)
    assert list(record.progress["loss"]) == told[f"losses {repo}"]
    assert record.evaluations == (result(),)
    assert record.versions["trl"] == importlib.metadata.version("trl")
    at_checkpoint = json.loads(told[f"{RECORD_FILE} at checkpoint {repo}"])
    assert at_checkpoint["training"]["num_steps"] == 2
    assert at_checkpoint["base"]["revision"] == told["base revision"]


@pytest.mark.parametrize("repo", [FULL, ADAPTER])
def test_card_tells_nothing_of_the_machine(pushed: dict[str, Any], repo: str) -> None:
    assert "from_pretrained" in pushed["told"][f"README.md at checkpoint {repo}"]
    published, told = pushed[repo], pushed["told"]
    names = ("README.md", RECORD_FILE)
    texts = [*(published[name].decode() for name in names), *(told[f"{name} at checkpoint {repo}"] for name in names)]
    for text in texts:
        assert "hf_" not in text
        assert str(pushed["folder"]) not in text
        assert str(Path.home()) not in text


@pytest.mark.parametrize("repo", [FULL, ADAPTER])
def test_no_file_on_the_hub_holds_the_token(pushed: dict[str, Any], repo: str) -> None:
    assert "training_args.bin" in pushed[repo]
    assert [name for name, data in pushed[repo].items() if TOKEN.encode() in data] == []


@pytest.mark.parametrize("repo", [FULL, ADAPTER])
def test_a_checkpoint_holds_its_processor(pushed: dict[str, Any], repo: str) -> None:
    wanted = {"processor_config.json", "tokenizer.json", "chat_template.jinja"}
    assert wanted <= set(pushed["told"][f"checkpoint {repo}"])
    assert wanted <= pushed[repo].keys()
    assert not [name for name in pushed[repo] if name.startswith("checkpoint")]


@pytest.mark.parametrize("repo", [FULL, ADAPTER])
def test_its_code_loads_the_trained_model_and_asks_it(pushed: dict[str, Any], repo: str) -> None:
    told, read = pushed["told"], pushed["read"]
    assert read[f"answered {repo}"]
    assert read[f"processor {repo}"][0] == "InternVLProcessor"
    assert "<|im_start|>" in read[f"processor {repo}"][1]
    assert read[f"model {repo}"] == ("PeftModel" if repo == ADAPTER else "InternVLForConditionalGeneration")
    assert read[f"weight {repo}"] == pytest.approx(told[f"weight {repo}"], rel=1e-6)
    assert told[f"weight {repo}"] != pytest.approx(told["weight base"], rel=1e-6)


@pytest.mark.parametrize("repo", [FULL, ADAPTER])
def test_tree_packing_stays_at_home(pushed: dict[str, Any], repo: str) -> None:
    assert pushed["told"][f"attention {repo}"] == "longvpo_tree"
    assert pushed["read"][f"attention {repo}"] == "sdpa"
    texts = {name: data for name, data in pushed[repo].items() if name.endswith((".json", ".md", ".jinja"))}
    assert [name for name, data in texts.items() if b"longvpo_tree" in data] == []
    if repo == FULL:
        assert json.loads(texts["config.json"])["architectures"] == ["InternVLForConditionalGeneration"]


def test_what_it_uses_of_trl_is_there() -> None:
    """Private or unexported: a move shall fail here with its name."""
    from transformers import Trainer
    from trl import DPOTrainer
    from trl.trainer import utils

    from longvpo_hf.training.trainer import LongVPOTrainer

    theirs = list(inspect.signature(DPOTrainer.create_model_card).parameters)
    assert list(inspect.signature(LongVPOTrainer.create_model_card).parameters)[: len(theirs)] == theirs
    assert "rafailov2023direct" in DPOTrainer._paper["citation"]
    assert DPOTrainer._tag_names == ["trl", "dpo"]
    assert inspect.signature(utils.get_comet_experiment_url).parameters == {}
    assert inspect.signature(utils.get_trackio_space_url).parameters == {}
    assert "self.create_model_card(model_name=model_name, **kwargs)" in inspect.getsource(Trainer.push_to_hub)
