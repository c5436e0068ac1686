"""What a study publishes: its model with card and report, and nothing of the machine it ran on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hub_double import HubDouble


def test_a_model_is_pushed_with_its_report_and_nothing_of_this_machine(tmp_path: Path) -> None:
    run = tmp_path / "run"
    files = {
        "m/config.json": "{}",
        "m/model.safetensors": "weights",
        "m/README.md": "---\ntags: []\n---\n# A card",
        "m/probe/step-2/position.json": "{}",
        "m/training_args.bin": str(tmp_path),
        "m/checkpoint-3/optimizer.pt": "large",
        "m/_probe_media/clip.mp4": "film",
        "m/.lock": "",
        "report.md": f"# A study\n\n    longvpo inspect {run}/stage1-rows\n",
        "pictures/accuracy.png": "picture",
        "state/m.json": "{}",
    }
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text, encoding="utf-8")
    with HubDouble() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "longvpo_hf.studies.push", str(run / "m"), "someone/m", "private", "first-try"],
            env={**hub.environment(tmp_path / "hf")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["model", "someone/m"]
        commit = repository.at("first-try")
        assert commit is not None
        published = commit[1]
    assert repository.private
    assert not set(repository.files) - {".gitattributes"}, "the branch alone"
    assert set(published) - {".gitattributes"} == {
        "config.json", "model.safetensors", "README.md", "probe/step-2/position.json", "report.md",
        "pictures/accuracy.png",
    }  # fmt: skip
    assert published["report.md"].decode() == "# A study\n\n    longvpo inspect stage1-rows\n"
    assert not any(str(tmp_path).encode() in content for content in published.values())


def test_a_name_that_cannot_be_written_to_is_advice(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with HubDouble() as hub:
        words = [sys.executable, "-m", "longvpo_hf.studies.push", str(tmp_path / "m"), "not a name", "default"]
        environment = hub.environment(tmp_path / "hf")
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
