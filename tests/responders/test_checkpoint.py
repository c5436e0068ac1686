"""Models before work: what a checkpoint lacks is one sentence, before it is loaded and before a video is cut."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model

import tiny_models
from cli import longvpo
from longvpo_hf.errors import ModelError
from longvpo_hf.hub import go_offline_if_unreachable
from longvpo_hf.responders.checkpoint import check_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an adapter of it."""
    folder = tmp_path_factory.mktemp("models")
    model, processor = tiny_models.build("internvl")
    model.save_pretrained(folder / "whole", max_shard_size="200KB")
    processor.save_pretrained(folder / "whole")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "whole")
    adapted.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "whole", tmp_path / "copy"))


def test_what_is_whole_passes(models: Path) -> None:
    assert check_checkpoint(str(models / "whole")) is True
    assert check_checkpoint(str(models / "adapter")) is True


def test_every_file_that_is_cut_or_gone_is_named(copy: Path) -> None:
    weights = sorted(copy.glob("*.safetensors"))
    assert len(weights) > 1
    for path in [*weights, copy / "model.safetensors.index.json", copy / "config.json"]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelError) as cut:
            check_checkpoint(str(copy))
        assert path.name in str(cut.value) or str(copy) in str(cut.value)
        assert "\n" not in str(cut.value)
        path.unlink()
        if not path.name.endswith(".index.json"):  # weights without an index are those of one file
            with pytest.raises(ModelError, match=r"lacks weights|holds no model"):
                check_checkpoint(str(copy))
        path.write_bytes(content)
    assert check_checkpoint(str(copy))


def test_a_run_that_left_checkpoints_only_is_hinted_at(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"did you mean .*checkpoint-20\?"):
        check_checkpoint(str(tmp_path / "run"))


def test_an_adapter_whose_base_is_gone(models: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(models / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, message in (
        ("/gone/base", r"base model of the adapter .*adapter is /gone/base\. There is no folder /gone/base"),
        ("runs/gone/base", r"is runs/gone/base \(a folder is looked for in /.*\)\. There is no folder runs/gone/base"),
        (None, "names no base model"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(ModelError, match=message):
            check_checkpoint(str(adapter))


@pytest.mark.parametrize(
    "name", ["./gone", "/gone/model", "a/b/c", "somebody/model", "model", "not a name", "~/model", "", " "]
)
def test_what_is_nowhere_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"There is no folder|is neither a folder nor a") as refused:
        check_checkpoint(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("command", ["stage1", "stage2", "temporal"])
@pytest.mark.parametrize("role", ["--responder", "--writer", "--judge"])
def test_a_build_without_its_model_cuts_nothing(tmp_path: Path, command: str, role: str) -> None:
    """Nor does it look at the corpus, which is not there either."""
    words = ["build", command, "--corpus", "videofolder", "--source", str(tmp_path / "videos")]
    words += ["--responder", "scripted", role, str(tmp_path / "gone"), "--output", str(tmp_path / "rows")]
    result = longvpo(words)
    assert result.exit_code == 2
    assert f"There is no folder {tmp_path / 'gone'}: name a folder with a model" in result.stderr
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- without a net


def test_a_hub_that_is_not_there_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def head(url: str, **settings: Any) -> None:
        asked.append(url)
        raise httpx2.ConnectError("Name or service not known")

    monkeypatch.setattr(httpx2, "head", head)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_HUB_OFFLINE", False)
    go_offline_if_unreachable([str(tmp_path), None])
    assert asked == [], "nothing is needed of it"
    go_offline_if_unreachable([str(tmp_path), "somebody/model"])
    go_offline_if_unreachable(["somebody/model"])
    assert asked == [constants.ENDPOINT]
    assert constants.HF_HUB_OFFLINE
    said = capsys.readouterr().err
    assert said.startswith(f"{constants.ENDPOINT} cannot be reached (Name or service not known): going on with what is")
    assert said.count("\n") == 1
