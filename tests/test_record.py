"""`longvpo.json`: there and back, what is refused of a stranger's, what never leaves this machine, older cards."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longvpo_hf.public import public_text
from longvpo_hf.record import (
    FORMAT,
    RECORD_FILE,
    AdapterRecord,
    DatasetRecord,
    EvaluationRecord,
    LicenceRecord,
    MethodRecord,
    ModelRecord,
    RecordError,
    Sampling,
    Source,
    TrainedOn,
    TrainingRecord,
    file,
    hub_commit,
    read_record,
    weights_digest,
    write_record,
)

METHOD = MethodRecord("longvpo-stage1", "stage1-2", "@article{x}", 12)
DATASET = DatasetRecord(
    "Rows",
    (METHOD,),
    models={"answers": Source("org/model", "a" * 40, on_hub=True)},
    settings={"max_clips": 8, "nested": {"values": [1, 2.5, None, True, "é 🎬"]}},
    facts={"videos": 3},
    funnel={"stages": {"rows": 12}, "dropped": {"refusal": 2}},
    reasons={"refusal": "the model declined"},
    seed=7,
    num_rows=12,
    num_clips=30,
    licences=(LicenceRecord("CC BY 4.0", 30, 3, ("a", "b")),),
    digest="0123456789abcdef",
    versions={"longvpo-hf": "0.1.0"},
)
MODEL = ModelRecord(
    "mine",
    "me/mine",
    Source("base", digest="feedfacecafebeef"),
    Sampling(64, None, 448 * 448),
    (TrainedOn(Source("me/rows", "b" * 40, on_hub=True), (METHOD,)),),
    TrainingRecord({"sigmoid": 1.0}, 0.01, 1.0, "row", adapter=AdapterRecord("LoRA", 4, 8, ("q_proj",)), num_steps=3),
    progress={"loss": (0.7, None)},
    evaluations=(EvaluationRecord("video-text-to-text", "mlvu", "MLVU", "accuracy", 74.1),),
    licence={"license": "mit"},
    citations=("@article{y}",),
    tags=("dpo",),
    runs={"Trackio": "https://example.com/x"},
)
RECORDS: list[DatasetRecord | ModelRecord] = [DATASET, MODEL]


def stored(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    return content


def store(folder: Path, content: object) -> None:
    (folder / RECORD_FILE).write_text(json.dumps(content), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("record", RECORDS, ids=["dataset", "model"])
def test_a_record_is_read_as_it_was_written(tmp_path: Path, record: Any) -> None:
    write_record(tmp_path, record)
    assert read_record(tmp_path, type(record)) == record
    assert stored(tmp_path)["format"] == FORMAT


def test_most_of_a_record_may_be_missing(tmp_path: Path) -> None:
    store(tmp_path, {"kind": "model", "name": "m", "load_from": "m", "base": {"name": ""}})
    assert read_record(tmp_path, ModelRecord) == ModelRecord("m", "m", Source(""))


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    write_record(tmp_path, replace(MODEL, progress={"loss": (math.nan, math.inf)}))
    assert stored(tmp_path)["progress"] == {"loss": [None, None]}


@pytest.mark.parametrize("record", RECORDS, ids=["dataset", "model"])
def test_fields_of_a_newer_version_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, record: DatasetRecord | ModelRecord
) -> None:
    write_record(tmp_path, record)
    newer = stored(tmp_path)

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                add(item)
            if "name" in value or "kind" in value or "num_frames" in value:
                value["from the future"] = {"x": [1]}
        elif isinstance(value, list):
            for item in value:
                add(item)

    add(newer)
    newer["format"] = FORMAT + 1
    store(tmp_path, newer)
    with caplog.at_level(logging.WARNING):
        read = read_record(tmp_path, type(record))
    assert "newer than" in caplog.text
    assert read is not None
    write_record(tmp_path, read)
    assert stored(tmp_path) == newer


# -------------------------------------------------------------------------------------------------- a stranger's record


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a JSON tree are."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def with_value(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    at = tree
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return tree


HOSTILE: list[Callable[[random.Random], Any]] = [
    lambda rng: None,
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice([0, -1, 2**63, -(2**80), 10**400]),
    lambda rng: rng.choice([0.5, -1e300]),
    lambda rng: rng.choice(["", "x" * rng.choice([10, 30_000]), "\x1b[2J", "\ud800", "../../x", "a b", "`|<b>"]),
    lambda rng: [1] * rng.choice([0, 3, 20_000]),
    lambda rng: {str(i): i for i in range(rng.choice([0, 3, 20_000]))},
    lambda rng: json.loads("[" * 50 + "]" * 50),
]


@pytest.mark.parametrize("record", RECORDS, ids=["dataset", "model"])
def test_any_field_of_any_value_is_read_or_named(tmp_path: Path, record: DatasetRecord | ModelRecord) -> None:
    write_record(tmp_path, record)
    whole = stored(tmp_path)
    rng = random.Random(3)
    refused = 0
    for _ in range(600):
        path = rng.choice(list(places(whole)))
        store(tmp_path, with_value(whole, path, rng.choice(HOSTILE)(rng)))
        read, message = read_or_error(tmp_path, type(record))
        if read is None:
            refused += 1
            assert message.startswith(f"{tmp_path / RECORD_FILE} is not a record that can be read: ")
            assert len(message) < 1000
            assert message.isprintable()
        else:  # what is read can be written and read again
            write_record(tmp_path, read)
            assert read_record(tmp_path, type(record)) is not None
    assert 200 < refused < 590


def read_or_error(folder: Path, kind: Any) -> tuple[Any, str]:
    try:
        return read_record(folder, kind), ""
    except RecordError as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{", "codec can't decode"),
        (b"[]", "kind must be 'model', got None"),
        (b'{"kind": "dataset", "title": "x"}', "kind must be 'model', got 'dataset'"),
        (b'{"kind": "model"}', "the record lacks some of"),
        (b'{"kind": "model", "seed": NaN}', "JSON has no NaN"),
        (b"[" * 100_000, "nested deeper than 12"),
        (b'{"kind": "model", "name": "' + b"x" * 5_000_000 + b'"}', "at most 4194304"),
        (b'{"kind": "model", "name": 3}', "name must be str, got 3"),
        (b'{"kind": "model", "sampling": {"num_frames": 0}}', "sampling: num_frames must be \u2265 1, got 0"),
        (b'{"kind": "model", "sampling": {"fps": 0}}', "fps must be > 0"),
        (b'{"kind": "model", "base": {"name": "../x", "on_hub": true}}', "base: On the Hub are only names of its form"),
        (b'{"kind": "model", "base": {"name": "a/b", "on_hub": true, "revision": "](http://x"}}', "base: On the Hub"),
    ],
)
def test_a_record_that_cannot_be_is_one_clear_error(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / RECORD_FILE).write_bytes(content)
    with pytest.raises(RecordError) as raised:
        read_record(tmp_path, ModelRecord)
    assert fault in str(raised.value)
    assert "delete it" in str(raised.value)


# ---------------------------------------------------------------------------------------- what never leaves the machine


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/ho" + "me/someone/films", "films"),
        ("~/films/best ones", "best ones"),
        ("videofolder /da" + "ta/private/films, all of them", "videofolder films, all of them"),
        ('{"root": "/sr' + 'v/x/y"}', '{"root": "y"}'),
        ("C:\\Users\\someone\\films", "films"),
        ("from C:\\Users\\someone\\films on", "from films on"),
        ("key hf_" + "abcdefghijklmnopqrstuvwxyz", "key …"),
        ("sk-" + "abcdefghijklmnopqrst", "…"),
        ("https://arxiv.org/abs/2602.02341", "https://arxiv.org/abs/2602.02341"),
        ("hf://datasets/a/b@main/c", "hf://datasets/a/b@main/c"),
        ("1/2, and/or, 3 /s, </think>, OpenGVLab/InternVL3-8B", "1/2, and/or, 3 /s, </think>, OpenGVLab/InternVL3-8B"),
        ("- 5 °C\n- 7 °C", "- 5 °C\n- 7 °C"),
    ],
)
def test_texts_lose_paths_and_tokens(text: str, public: str) -> None:
    assert public_text(text) == public


def test_no_folder_and_no_token_is_in_any_field(tmp_path: Path) -> None:
    folder, token = "/ho" + "me/someone/secret", "hf_" + "abcdefghijklmnopqrstuvwxyz"
    write_record(tmp_path, DATASET)
    for path in places(stored(tmp_path)):
        content = with_value(stored(tmp_path), path, f"{folder}/x")
        settings = {f"{folder}/key": [token, {"deep": (f"in {folder}/a.mp4: {token}", Path(folder))}]}
        record = replace(DATASET, title=f"{folder}/rows", settings=settings, facts={str(path): json.dumps(content)})
        write_record(tmp_path / "out", record)
        text = (tmp_path / "out" / RECORD_FILE).read_text(encoding="utf-8")
        assert "someone" not in text
        assert token not in text


# -------------------------------------------------------------------------------------------------- what names a model


def test_where_a_model_is_from() -> None:
    commit = "c" * 40
    assert Source.of_model("org/model", commit) == Source("org/model", commit, on_hub=True)
    assert Source.of_model("org/model@v1") == Source("org/model", "v1", on_hub=True)
    assert Source.of_model("stage1", "0123456789abcdef") == Source("stage1", digest="0123456789abcdef")
    assert Source.of_model("rule over captions") == Source("rule over captions")


def test_weights_are_read_again_only_where_they_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    reader = file._read_digest
    monkeypatch.setattr(file, "_read_digest", lambda path: read.append(path.name) or reader(path))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = weights_digest(tmp_path)
    assert weights_digest(tmp_path) == first
    assert len(read) == 2  # just written: a second write might not show in its times
    now = time.time_ns()
    monkeypatch.setattr(file.time, "time_ns", lambda: now + 10_000_000_000)
    assert [weights_digest(tmp_path) for _ in range(5)] == [first] * 5
    assert len(read) == 3
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert weights_digest(tmp_path) != first


def test_the_record_is_no_part_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = weights_digest(tmp_path)
    write_record(tmp_path, MODEL)
    assert weights_digest(tmp_path) == before
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) != before


def test_equal_trainings_in_two_folders_have_equal_digests(tmp_path: Path) -> None:
    """What a training writes about itself names its folder and its time; peft writes sets, in any order."""
    rng = random.Random(0)
    names = [f"model.layers.{number}.{part}" for number in range(9) for part in ("q_proj", "v_proj")]
    digests = set()
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        config = {"r": 8, "target_modules": rng.sample(names, len(names)), "base_model_name_or_path": f"{folder}/base"}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "training_args.bin").write_bytes(f"output_dir={folder}".encode())
        (folder / "trainer_state.json").write_text(f'{{"train_runtime": {number}}}', encoding="utf-8")
        digests.add(weights_digest(folder))
    assert len(digests) == 1
    for name, content in {
        "adapter_config.json": json.dumps({**config, "r": 16}),
        "adapter_model.safetensors": "others",
        "tokenizer.json": "{}",
    }.items():
        (folder / name).write_text(content, encoding="utf-8")
        assert weights_digest(folder) not in digests, name
        digests.add(weights_digest(folder))


def test_the_commit_is_that_of_the_revision_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--model"
    for ref, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "adapter_config.json").write_text("{}")
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / ref).write_text(commit)
    found = [hub_commit("org/model", revision) for revision in (None, "main", "v1", "b" * 40, "gone")]
    assert found == ["a" * 40, "a" * 40, "b" * 40, "b" * 40, ""]
    assert hub_commit("no name of the Hub") == ""


# -------------------------------------------------------------------------------------------- before there were records

OLD_MODEL_CARD = """---
base_model: org/base
datasets:
- me/rows
license: mit
tags: [generated_from_trainer, trl, dpo, longvpo]
---

# Stage 1

sampler = FrameSampler(num_frames=64, fps=None, max_pixels=112896)
"""

OLD_DATASET_CARD = """---
tags:
- preference
- dpo
- video
- longvpo-stage1
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
---

# Rows of Stage 1
"""


def test_an_older_checkpoint_is_known_by_its_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_text(OLD_MODEL_CARD, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        record = read_record(tmp_path, ModelRecord)
        assert read_record(tmp_path, ModelRecord) == record
    assert caplog.text.count("was read from its card") == 1
    assert record is not None
    assert record.sampling == Sampling(64, None, 112896)
    assert record.base == Source("org/base", on_hub=True)
    assert [data.source.name for data in record.data] == ["me/rows"]
    assert record.licence == {"license": "mit"}


def test_an_older_dataset_is_known_by_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(OLD_DATASET_CARD, encoding="utf-8")
    record = read_record(tmp_path, DatasetRecord)
    assert record is not None
    assert (record.title, record.by_reference) == ("Rows of Stage 1", True)
    assert [method.name for method in record.methods] == ["longvpo-stage1"]


@pytest.mark.parametrize("kind", [DatasetRecord, ModelRecord])
@pytest.mark.parametrize(
    "card",
    [
        "",
        "# Someone's model\n",
        "---\ntags: [a\n---\n",
        "---\ntags: 3\nbase_model: {}\n---\n",
        "---\n- x\n---\n",
        "FrameSampler(num_frames=" + "9" * 5000 + ", fps=1, max_pixels=None)",
    ],
)
def test_a_card_of_another_is_no_record(tmp_path: Path, card: str, kind: Any) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert read_record(tmp_path, kind) is None


@pytest.mark.parametrize("fps", ["1.2.3", "0", "..."])
def test_frames_that_cannot_be_are_not_taken_from_a_card(tmp_path: Path, fps: str) -> None:
    (tmp_path / "README.md").write_text(OLD_MODEL_CARD.replace("fps=None", f"fps={fps}"), encoding="utf-8")
    record = read_record(tmp_path, ModelRecord)
    assert record is not None
    assert record.sampling is None


def test_without_record_and_card_nothing_is_known(tmp_path: Path) -> None:
    assert read_record(tmp_path, ModelRecord) is None
    assert read_record(tmp_path / "gone", ModelRecord) is None
