"""A torn checkpoint is passed over by name: each of its files, cut anywhere, with and without a seal."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import Dataset

import trainers
from conftest import make_dataset, make_preferences
from longvpo_hf.artifacts import file_digest, sampled_digest
from longvpo_hf.errors import ConfigError, StorageError, storage_error
from longvpo_hf.launch.checkpoints import checkpoint_to_resume
from longvpo_hf.timeline import Clip
from longvpo_hf.training.checkpoints import SEAL_FILE, last_whole_checkpoint, seal, torn

#: Files whose end their own form shows.
FORMS = (".json", ".safetensors", ".pt", ".pth", ".bin")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clips: dict[str, Clip]) -> Path:
    """A run with two checkpoints, of one step and of two."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trainers.make(folder, make_dataset(make_preferences(clips)), save_strategy="steps", save_steps=1).train()
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def files_of(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL_FILE]


def test_both_checkpoints_of_a_run_are_whole(run: Path) -> None:
    for step in (1, 2):
        checkpoint = run / f"checkpoint-{step}"
        assert torn(checkpoint) is None
        sealed = json.loads((checkpoint / SEAL_FILE).read_text())
        files = {path.relative_to(checkpoint).as_posix(): path for path in files_of(checkpoint)}
        assert sealed["files"] == {name: path.stat().st_size for name, path in files.items()}
        assert sealed["sha256"] == {name: file_digest(path) for name, path in files.items()}
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "longvpo.json"} <= files.keys()
    assert last_whole_checkpoint(run) == run / "checkpoint-2"


def test_a_file_cut_anywhere_tears_a_sealed_checkpoint(copy: Path) -> None:
    checkpoint, rng = copy / "checkpoint-2", random.Random(0)
    for path in files_of(checkpoint):
        whole = path.read_bytes()
        for length in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(3))}:
            path.write_bytes(whole[:length])
            assert f"{path.name} has {length} bytes and was written with {len(whole)}" in str(torn(checkpoint))
        path.unlink()
        assert torn(checkpoint) is not None
        path.write_bytes(whole)
        assert torn(checkpoint) is None


def test_a_flipped_bit_tears_a_sealed_checkpoint(copy: Path) -> None:
    checkpoint, rng = copy / "checkpoint-2", random.Random(2)
    for path in files_of(checkpoint):
        whole = path.read_bytes()
        for _ in range(3):
            place = rng.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            assert torn(checkpoint) == f"{path.relative_to(checkpoint)} has other bytes than were written"
        path.write_bytes(whole)
    assert last_whole_checkpoint(copy) == checkpoint


def test_an_older_seal_has_sizes_alone(copy: Path) -> None:
    seal_file = copy / "checkpoint-2" / SEAL_FILE
    seal_file.write_text(json.dumps({"files": json.loads(seal_file.read_text())["files"]}))
    assert torn(copy / "checkpoint-2") is None


def test_a_long_file_is_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longvpo_hf.artifacts._PIECES", 4)
    monkeypatch.setattr("longvpo_hf.artifacts._PIECE_BYTES", 10)
    path, content = tmp_path / "weights", bytes(range(100))
    path.write_bytes(content)
    whole = sampled_digest(path)
    assert whole == hashlib.sha256(content[:10] + content[30:40] + content[60:70] + content[90:]).hexdigest()
    for changed in (content[:99], bytes(100), content[:50] + bytes(50), b"x" + content[1:], content[:99] + b"x"):
        path.write_bytes(changed)
        assert sampled_digest(path) != whole


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses what would make a file longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("cut", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_disk_that_is_full_while_a_checkpoint_is_saved_costs_no_other(
    run: Path, copy: Path, dataset: Dataset, cut: str
) -> None:
    """One sentence; the last whole checkpoint stays, and the same run goes on to the same weights."""
    shutil.rmtree(copy / "checkpoint-2")
    trainer = trainers.make(copy.parent, dataset, save_strategy="steps", save_steps=1)
    with files_of_at_most((run / "checkpoint-2" / cut).stat().st_size - 1), pytest.raises(Exception) as refused:  # noqa: PT011
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-1"))
    told = refused.value if isinstance(refused.value, StorageError) else storage_error(refused.value)
    assert told is not None, refused.value
    assert "\n" not in str(told)
    assert last_whole_checkpoint(copy) == copy / "checkpoint-1"
    trainer = trainers.make(copy.parent, dataset, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=str(last_whole_checkpoint(copy)))
    assert last_whole_checkpoint(copy) == copy / "checkpoint-2"
    name = "checkpoint-2/model.safetensors"
    assert (copy / name).read_bytes() == (run / name).read_bytes()


def test_a_file_cut_anywhere_tears_a_checkpoint_without_a_seal(copy: Path) -> None:
    checkpoint, rng = copy / "checkpoint-2", random.Random(1)
    (checkpoint / SEAL_FILE).unlink()
    assert torn(checkpoint) is None
    seen = set()
    for path in files_of(checkpoint):
        if path.suffix in FORMS:
            seen.add(path.suffix)
            whole = path.read_bytes()
            end = len(whole.rstrip()) if path.suffix == ".json" else len(whole)
            for length in {0, end - 1, *(rng.randrange(end) for _ in range(8))}:
                path.write_bytes(whole[:length])
                assert path.name in str(torn(checkpoint)), (path.name, length)
            path.write_bytes(whole)
    assert seen == set(FORMS)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}', '{"files": {"a": "b"}}', '{"files": {"a": null}}'])
def test_a_seal_that_cannot_be_read_is_torn_too(copy: Path, content: str) -> None:
    (copy / "checkpoint-2" / SEAL_FILE).write_text(content)
    assert torn(copy / "checkpoint-2") == f"{SEAL_FILE} cannot be read"


def test_torn_ones_are_passed_over_by_name(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    (copy / "checkpoint-15").mkdir()
    (copy / "checkpoint-best").mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(copy) == copy / "checkpoint-1"
    assert f"{copy / 'checkpoint-15'} is not whole and is passed over: it has no trainer_state.json" in caplog.text
    assert f"{copy / 'checkpoint-2'} is not whole and is passed over: optimizer.pt has 0 bytes" in caplog.text
    shutil.rmtree(copy / "checkpoint-1")
    assert last_whole_checkpoint(copy) is None
    assert last_whole_checkpoint(copy / "gone") is None


def test_weights_in_several_files_are_all_there(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "the weights model-1.safetensors are missing" in str(torn(tmp_path))


def test_a_seal_is_what_counts_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "of_another.json").write_text("not JSON, and nobody's business")
    assert torn(tmp_path) is not None
    seal(tmp_path)
    assert torn(tmp_path) is None


def test_a_run_resumes_from_a_whole_checkpoint(copy: Path) -> None:
    (copy / "checkpoint-2" / "model.safetensors").write_bytes(b"x")

    def asked(value: str | None) -> str | None:
        return checkpoint_to_resume(trainers.settings(copy.parent, resume_from_checkpoint=value))

    assert asked("true") == str(copy / "checkpoint-1")
    assert asked(str(copy / "checkpoint-1")) == str(copy / "checkpoint-1")
    with pytest.raises(ConfigError, match=r"checkpoint-2: model.safetensors has 1 bytes and was written with \d+"):
        asked(str(copy / "checkpoint-2"))
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        asked(None)


def test_training_goes_on_from_it(copy: Path, dataset: Dataset) -> None:
    (copy / "checkpoint-2" / "trainer_state.json").write_text("{")
    trainer = trainers.make(copy.parent, dataset, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=str(last_whole_checkpoint(copy)))
    assert trainer.state.global_step == 2
    assert torn(copy / "checkpoint-2") is None
