"""The recipes: their configurations load, each runs through `accelerate launch`, adapters merge, killed runs resume."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import tiny_models
from hub_double import HubDouble
from longvpo_hf import LongVPOTrainer, VideoPreference, launch
from longvpo_hf.miniature.machine import one_thread
from longvpo_hf.miniature.settings import MiniatureSettings
from longvpo_hf.miniature.workshop import Workshop
from longvpo_hf.preference import Provenance
from longvpo_hf.publishing.dataset import DatasetWriter
from longvpo_hf.record import DatasetRecord, MethodRecord, ModelRecord, read_record, write_record
from media import write_video
from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
CONFIGS = sorted((RECIPES / "configs").rglob("*.yaml"))
ACCELERATE = sorted((RECIPES / "accelerate").glob("*.yaml"))


STAGE1, STAGE2, TEMPORAL = (launch.load_recipe(name) for name in ("stage1", "stage2", "temporal"))
WRITE_CONFIGS = load_script(RECIPES / "write_configs.py")


# ------------------------------------------------------------------------------------------------ configurations


def recipe_of(config: Path) -> str:
    return config.stem.removeprefix("pretrained_").partition("_")[0]


def arguments(config: Path, *more: str) -> tuple[Any, Any, Any]:
    defaults = TEMPORAL.PAPER if recipe_of(config) == "temporal" else {}
    return launch.parse(["--config", str(config), "--use_cpu", "true", *more], defaults)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_configuration_loads_and_its_launch_commands_name_what_is_there(config: Path) -> None:
    recipe, model, training = arguments(config)
    given = yaml.safe_load(config.read_text(encoding="utf-8"))
    for name, value in given.items():
        if name == "report_to":
            continue
        holder = next(part for part in (recipe, model, training) if hasattr(part, name))
        assert getattr(holder, name) in (value, str(value)) or name == "use_cpu", name
    text = "\n".join(line[2:] for line in config.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    commands = re.findall(r"^ +(?:OMP_NUM_THREADS=1 )?(accelerate launch(?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        assert f"recipes/{recipe_of(config)}.py" in words
        assert ROOT / words[words.index("--config") + 1] == config
        files = [word for word in words if word.startswith("recipes/")]
        assert all((ROOT / file).is_file() for file in files), files
        if "--config_file" in words:
            processes = load_config_from_file(words[words.index("--config_file") + 1]).num_processes
            rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
            assert rows == (64 if recipe_of(config) == "temporal" else 8)  # the papers' batches


def test_every_base_has_every_way_to_train() -> None:
    bases = {path.name for path in (RECIPES / "configs").iterdir() if path.is_dir()}
    assert bases == {*WRITE_CONFIGS.BASES, "miniature"}
    launches = {"lora": ["one_gpu"], "full": ["fsdp2", "zero3"]}
    for name, base in WRITE_CONFIGS.BASES.items():
        assert base.modes == (("lora",) if name == "qwen3_vl_30b_a3b" else ("lora", "full"))
        for recipe in ("stage1", "stage2"):
            for mode in base.modes:
                text = (RECIPES / "configs" / name / f"{recipe}_{mode}.yaml").read_text(encoding="utf-8")
                assert re.findall(r"accelerate/(\w+)\.yaml", text) == launches[mode]


def test_the_costs_of_every_file_fit_its_machine() -> None:
    costs = json.loads(WRITE_CONFIGS.COSTS.read_text(encoding="utf-8"))
    assert set(costs) == {f"{name}/{recipe}_{mode}" for name, recipe, mode in WRITE_CONFIGS.texts()}
    for file, launches in costs.items():
        frames = WRITE_CONFIGS.BASES[file.partition("/")[0]].num_frames
        for launch_, cost in launches.items():
            assert 0 < cost["gib"] < 80, (file, launch_)  # an H100
            assert cost["frames"] == (32 if "temporal" in file else frames), (file, launch_)


def test_the_files_are_what_the_tables_say() -> None:
    written = {RECIPES / "configs" / b / f"{r}_{m}.yaml": text for (b, r, m), text in WRITE_CONFIGS.texts().items()}
    assert {path for path in CONFIGS if path.parent.name != "miniature"} == set(written)
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run recipes/write_configs.py"


def test_the_costs_are_those_of_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [("smolvlm2_500m", "stage2", "lora"), ("internvl3_2b", "stage1", "full")]
    monkeypatch.setattr(WRITE_CONFIGS, "_names", lambda: names)
    costs = json.loads(WRITE_CONFIGS.COSTS.read_text(encoding="utf-8"))
    files = [f"{name}/{recipe}_{mode}" for name, recipe, mode in names]
    found = WRITE_CONFIGS.estimate()
    assert list(found) == files
    for file in files:
        for way, cost in found[file].items():
            assert cost == costs[file][way]


def test_an_unknown_setting_of_a_file_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "stage1.yaml"
    config.write_text("model_name_or_path: m\ndataset_name: d\nlearning_rat: 1.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="learning_rat"):
        arguments(config)


def test_temporal_defaults_are_the_papers() -> None:
    base = ["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu", "true"]
    _, _, training = launch.parse(base, TEMPORAL.PAPER)
    assert (training.beta, training.sft_weight, training.learning_rate) == (0.2, 1.0, 3e-7)
    assert (training.warmup_steps, training.num_frames, training.freeze_vision_tower) == (0.1, 32, True)
    _, _, training = launch.parse([*base, "--beta", "0.3"], TEMPORAL.PAPER)
    assert training.beta == 0.3


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_loads_its_configurations(file: Path) -> None:
    expected = {
        "one_gpu": ("NO", 1, 1),
        "cp8": ("FSDP", 8, 1),
        "ddp": ("MULTI_GPU", 8, 1),
        "fsdp2": ("FSDP", 8, 1),
        "fsdp2_two_nodes": ("FSDP", 16, 2),
        "zero2": ("DEEPSPEED", 8, 1),
        "zero3": ("DEEPSPEED", 8, 1),
    }
    config = load_config_from_file(str(file))
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == expected[file.stem]
    assert config.parallelism_config.get("parallelism_config_cp_size", 1) == (8 if file.stem == "cp8" else 1)
    if file.stem.startswith(("fsdp2", "cp")):
        assert config.fsdp_config["fsdp_version"] == 2
    if file.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])


# ------------------------------------------------------------------------------------------------ one run of each


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, preferences: list[VideoPreference]) -> Path:
    """Eight rows as a dataset on disk."""
    folder = tmp_path_factory.mktemp("data") / "rows"
    with DatasetWriter(folder) as writer:
        for preference in preferences:
            writer.add(replace(preference, provenance=Provenance("longvpo-stage2"), id=""))
        writer.write_record(DatasetRecord("Rows", (MethodRecord("longvpo-stage2"),)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternVL with its processor."""
    folder = tmp_path_factory.mktemp("models") / "base"
    model, processor = tiny_models.build("internvl")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def options(model: Path, rows: Path, output: Path, **more: object) -> list[str]:
    """Two steps of two rows on the CPU."""
    given: dict[str, object] = {
        "model_name_or_path": model,
        "dataset_name": rows,
        "output_dir": output,
        "num_frames": 6,
        "max_pixels": 56 * 56,
        "beta": 0.5,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": "false",
        "bf16": "false",
        "use_cpu": "true",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        **more,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def launched(recipe: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(RECIPES / f"{recipe}.py"), *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def logged(trainer: LongVPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("recipe", ["stage2", "temporal"])
def test_a_recipe_runs_through_accelerate_launch(recipe: str, tmp_path: Path, base: Path, rows: Path) -> None:
    output = tmp_path / recipe
    pushing = {}
    if recipe == "stage2":
        pushing = {"push_to_hub": "true", "hub_model_id": "someone/stage2"}
        pushing |= {"hub_private_repo": "true", "hub_revision": "trial"}
    probing = {"probe_steps": 2, "probe_frames": 8, "probe_number": 1, "probe_placements": 1}
    command = launched(recipe, *options(base, rows, output, **pushing, **probing))
    with HubDouble() as hub:
        done = subprocess.run(
            command,
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["model", "someone/stage2"] if pushing else None
    before, after = (load_file(folder / "model.safetensors") for folder in (base, output))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in changed)
    assert any("vision" in name for name in changed) == (recipe == "stage2")  # TPO freezes the tower
    assert AutoProcessor.from_pretrained(output).chat_template
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "longvpo-stage2" in card
    assert str(tmp_path) not in card
    assert (output / "_probe_media").is_dir()
    if repository is not None:
        assert repository.private
        assert set(repository.files) <= {".gitattributes"}, "the branch alone"
        assert "pushed: http" in done.stdout
        assert "someone/stage2" in done.stdout
        published = repository.branches["trial"][-1][1]
        assert published["README.md"].decode() == card
        assert {"model.safetensors", "training_curve.png", "probe/step-2/position.json"} <= set(published)
        assert not any(name.startswith("_") for name in published)
        telling = {name for name, content in published.items() if str(tmp_path).encode() in content}
        assert telling <= {"training_args.bin"}  # transformers' own record of `output_dir`


def miniature(folder: Path, output: Path, **more: object) -> list[str]:
    """The miniature's Stage 1, in its fast form."""
    given = {
        "config": RECIPES / "configs" / "miniature" / "stage1.yaml",
        "model_name_or_path": folder / "base",
        "dataset_name": folder / "stage1-rows",
        "output_dir": output,
        "logging_steps": 1,
        "disable_tqdm": "true",
        **more,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


#: An epoch of 96 rows is 12 steps.
LONG = {"max_steps": 16, "per_device_train_batch_size": 8, "save_steps": 3}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the miniature through `accelerate launch` that was killed with -9 in its epoch."""
    folder = tmp_path_factory.mktemp("miniature")
    with one_thread():
        workshop = Workshop(folder / "m", MiniatureSettings.fast())
        workshop.worlds()
        workshop.base()
        workshop.stage1_rows("stage1-rows")
    output, log = folder / "killed", folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            launched("stage1", *miniature(folder / "m", output, **LONG)),
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        deadline = time.monotonic() + 600
        while not (output / "checkpoint-3" / "checkpoint_files.json").is_file():  # written last
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (output / "model.safetensors").exists()
    return folder


def test_a_killed_run_resumes_to_the_same_end(killed: Path) -> None:
    (killed / "killed" / "checkpoint-15").mkdir()  # one that was not written to its end
    with one_thread():
        with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
            STAGE1.main(miniature(killed / "m", killed / "killed", **LONG))
        words = miniature(killed / "m", killed / "killed", **LONG, resume_from_checkpoint="true")
        resumed = STAGE1.main(words)
        control = STAGE1.main(miniature(killed / "m", killed / "control", **LONG))
    assert resumed.state.global_step == control.state.global_step == 16
    assert logged(resumed, "loss") == logged(control, "loss")
    ends = [load_file(killed / name / "model.safetensors") for name in ("killed", "control")]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


@pytest.mark.parametrize("family", ["molmo2", "qwen3_5"])  # the families' contract trains all, without a recipe
def test_other_families_train_an_adapter_by_the_recipe(family: str, tmp_path: Path, rows: Path) -> None:
    model, processor = tiny_models.build(family)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    words = options(tmp_path / "base", rows, tmp_path / "model", use_peft="true", lora_r=2, max_steps=1)
    trainer = STAGE1.main(words)
    moved = {name for name, weight in trainer.model.named_parameters() if "lora_B" in name and weight.any()}
    assert moved
    assert all(re.search(r"(language_model|text_model)\.", name) for name in moved)
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------ adapters


def test_a_stage_1_adapter_is_merged_and_becomes_policy_and_reference_of_stage_2(
    tmp_path: Path, base: Path, rows: Path
) -> None:
    adapter = tmp_path / "stage1"
    STAGE1.main(options(base, rows, adapter, use_peft="true", lora_r=2, lora_alpha=8, lora_dropout=0.0))
    weights = load_file(adapter / "adapter_model.safetensors")
    assert not any("vision" in name for name in weights)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (adapter / name).unlink(missing_ok=True)  # a folder without processor: the base's is taken

    recorded = read_record(adapter, ModelRecord)
    write_record(adapter, replace(recorded, licence={"license": "mit"}))
    second = tmp_path / "stage2"
    trainer = STAGE2.main(options(adapter, rows, second, max_steps=1, learning_rate=0.0, reference="full"))

    merged = load_file(tmp_path / "stage2-base" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    layer = "layers.0.self_attn.q_proj"
    (name,) = [name for name in merged if name.endswith(f"{layer}.weight") and "language_model" in name]
    a, b = (next(w for n, w in weights.items() if layer in n and f"lora_{which}" in n) for which in "AB")
    torch.testing.assert_close(merged[name], before[name] + 8 / 2 * b @ a)  # W + α/r · B A
    assert not torch.equal(merged[name], before[name])
    # Policy and reference are the same merged model: no reward before the first step has an effect.
    assert logged(trainer, "rewards/margins") == [0.0]
    assert torch.equal(load_file(second / "model.safetensors")[name], merged[name])

    # The card of what is trained on it knows the licence, and the rows before its own.
    between, last = (read_record(tmp_path / name, ModelRecord) for name in ("stage2-base", "stage2"))
    assert (between.adapter, between.data) == ("", recorded.data)
    assert (last.base.name, last.licence) == ("stage2-base", {"license": "mit"})

    third = STAGE2.main(options(adapter, rows, tmp_path / "third", max_steps=1, use_peft="true", reference="full"))
    settings = json.loads((tmp_path / "third" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "third-base")
    assert logged(third, "rewards/margins") == [0.0]
    reloaded = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(settings["base_model_name_or_path"]), tmp_path / "third"
    )
    trained = dict(third.model.named_parameters())
    for name, tensor in reloaded.named_parameters():
        torch.testing.assert_close(tensor, trained[name], msg=name)


def test_a_merged_base_is_made_anew_for_another_adapter(tmp_path: Path, base: Path, rows: Path) -> None:
    adapter = tmp_path / "stage1"
    STAGE1.main(options(base, rows, adapter, use_peft="true", lora_r=2, max_steps=1))

    def start() -> int:
        _, model, training = launch.parse(options(adapter, rows, tmp_path / "stage2"))
        assert launch.start_from(model, training) == str(tmp_path / "stage2-base")
        return (tmp_path / "stage2-base" / "model.safetensors").stat().st_mtime_ns

    first = start()
    assert start() == first
    STAGE1.main(options(base, rows, adapter, use_peft="true", lora_r=2, max_steps=2))
    assert start() != first


def test_four_bit_says_what_it_needs(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_peft=true"):
        launch.parse(options(base, rows, tmp_path, load_in_4bit="true"))
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ValueError, match="pip install bitsandbytes"):
            launch.parse(options(base, rows, tmp_path, load_in_4bit="true", use_peft="true"))


def test_four_bit_trains_an_adapter_near_the_whole_precision(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bitsandbytes is installed. On a CPU it repacks weights in evaluation, and cannot train them after it."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    words = {"use_peft": "true", "lora_r": 2, "lora_dropout": 0.0}
    plain = STAGE1.main(options(base, rows, tmp_path / "plain", **words))
    packed = STAGE1.main(options(base, rows, tmp_path / "packed", **words, load_in_4bit="true"))
    held = packed.model.get_base_model().get_decoder().layers[0].self_attn.q_proj.base_layer.weight
    assert held.dtype == torch.uint8
    assert logged(packed, "loss") == pytest.approx(logged(plain, "loss"), rel=0.1)
    assert logged(packed, "loss") != logged(plain, "loss")
    assert (tmp_path / "packed" / "adapter_model.safetensors").is_file()


def test_trackio_holds_what_the_log_holds(base: Path, rows: Path, tmp_path: Path) -> None:
    output, folder = tmp_path / "model", tmp_path / "trackio"
    words = options(base, rows, output, report_to="trackio", project="longvpo", run_name="one", save_strategy="steps")
    done = subprocess.run(
        launched("stage1", *words, "--save_steps", "2"),
        env={**environment(), "TRACKIO_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    history = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    with closing(sqlite3.connect(folder / "longvpo.db")) as database:
        held = database.execute("SELECT metrics FROM metrics WHERE run_name = 'one' ORDER BY id").fetchall()
    steps = [entry for entry in map(json.loads, (metrics for (metrics,) in held)) if "train/loss/sft" in entry]
    assert len(steps) == len(history) == 2
    for entry, logs in zip(steps, history, strict=True):
        for name in ("loss", "loss/sft", "rewards/margins", "visual_tokens", "ref_logps_per_token/chosen"):
            assert entry[f"train/{name}"] == pytest.approx(logs[name]), name


def test_rows_may_be_held_out_streamed_saved_or_without_media(tmp_path: Path, base: Path, rows: Path) -> None:
    held_out = {"dataset_test_split": "train", "eval_strategy": "steps", "eval_steps": 1}
    words = options(base, rows, tmp_path / "a", max_steps=1, dataset_streaming="true", **held_out)
    trainer = STAGE1.main(words)
    assert len(logged(trainer, "eval_rewards/margins")) == 1
    recipe, _, _ = launch.parse(options(base, rows, tmp_path / "b"))
    held, none = launch.load_rows(recipe)
    assert none is None
    held.save_to_disk(str(tmp_path / "saved"))
    recipe, _, _ = launch.parse(options(base, tmp_path / "saved", tmp_path / "b"))
    assert launch.load_rows(recipe)[0]["id"] == held["id"]
    of_rows, of_saved = (
        STAGE1.main(options(base, given, tmp_path / f"{given.name}-model", max_steps=2))
        for given in (rows, tmp_path / "saved")
    )
    assert logged(of_saved, "loss") == logged(of_rows, "loss")
    recipe, _, _ = launch.parse(options(base, rows, tmp_path / "b", replay_name=rows))
    assert launch.load_rows(recipe)[0]["id"] == [*held["id"], *held["id"][:4]]  # half as many are mixed in
    with pytest.raises(ValueError, match="needs video_root"):
        launch.parse(options(base, rows, tmp_path / "b", dataset_form="longvpo"))
    (tmp_path / "flat").mkdir()
    flat = [{"video": name, "question": "q?", "chosen": "a", "rejected": "b"} for name in ("no.mp4", "a.mp4")]
    (tmp_path / "flat" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", 4)
    words = {"dataset_form": "longva-tpo", "video_root": tmp_path / "videos"}
    recipe, _, _ = launch.parse(options(base, tmp_path / "flat", tmp_path / "b", **words, dataset_missing="drop"))
    assert len(launch.load_rows(recipe)[0]) == 1
    recipe, _, _ = launch.parse(options(base, tmp_path / "flat", tmp_path / "b", **words))
    with pytest.raises(ValueError, match="row 0: video: missing_file"):
        launch.load_rows(recipe)


# ------------------------------------------------------------------------------------------------ hooks


def test_a_probe_is_logged_and_changes_nothing_of_the_training(tmp_path: Path, base: Path, rows: Path) -> None:
    plain = STAGE1.main(options(base, rows, tmp_path / "plain"))
    probed = STAGE1.main(
        options(base, rows, tmp_path / "probed", probe_steps=2, probe_frames=12, probe_number=4, probe_placements=1)
    )
    assert logged(probed, "loss") == logged(plain, "loss")
    dips = [(entry["step"], entry["probe/dip"]) for entry in probed.state.log_history if "probe/dip" in entry]
    assert [step for step, _ in dips] == [0, 2]
    for step, dip in dips:
        folder = tmp_path / "probed" / "probe" / f"step-{step}"
        assert json.loads((folder / "position.json").read_text())["dip"]["percent"] == dip
        assert (folder / "position.png").is_file()
    assert probed.model.training == plain.model.training


def test_a_sharded_model_is_not_probed(base: Path, rows: Path, tmp_path: Path) -> None:
    trainer = SimpleNamespace(is_fsdp_enabled=True, is_deepspeed_enabled=False)
    with pytest.raises(ValueError, match="longvpo probe position"):
        launch.PositionProbe(trainer, SimpleNamespace())


def test_benchmarks_lack_their_data_before_training_and_stand_in_the_card_after_it(
    tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = options(base, rows, tmp_path / "model", benchmarks="mlvu", benchmark_data=tmp_path, max_steps=1)

    def lacking(benchmarks: Any, root: Path) -> None:
        raise ValueError(f"{[benchmark.name for benchmark in benchmarks]} are not in {root}")

    monkeypatch.setattr("longvpo_hf.launch.finishing.check", lacking)
    with pytest.raises(ValueError, match=re.escape(f"['mlvu'] are not in {tmp_path}")):
        STAGE1.main(words)
    assert not (tmp_path / "model").exists()

    def evaluate(contestants: Any, benchmarks: Any, root: Path, output: Path, settings: Any) -> list[dict[str, Any]]:
        assert (Path(contestants[0].checkpoint) / "model.safetensors").is_file()  # saved by then
        assert [benchmark.name for benchmark in benchmarks] == ["mlvu"]
        task = {"overall": 61.0, "m_avg": 62.5, "n": 8, "unparsed": 0.0, "groups": {}}
        return [{"model": "model", "stage": None, "num_frames": 64, "tasks": {"mlvu": task}} for _ in settings.frames]

    monkeypatch.setattr("longvpo_hf.evaluation.run.evaluate", evaluate)
    monkeypatch.setattr("longvpo_hf.launch.finishing.check", lambda benchmarks, root: None)
    # The results go where the model went.
    pushes: list[dict[str, Any]] = []
    monkeypatch.setattr(LongVPOTrainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", "me/mine"))
    monkeypatch.setattr(LongVPOTrainer, "push_to_hub", lambda self, **facts: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **facts: pushes.append(facts))
    pushing = ["--push_to_hub", "true", "--hub_model_id", "me/mine", "--hub_revision", "trial"]
    STAGE1.main([*words, "--benchmark_frames", "64", *pushing])
    (facts,) = pushes
    assert (facts["repo_id"], facts["revision"]) == ("me/mine", "trial")
    assert {"longvpo.json", "README.md", ".eval_results/*"} <= set(facts["allow_patterns"])
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "62.5" in card
    assert "64 frames" in card
