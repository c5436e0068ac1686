"""Publishes the model of a study, with its report, on the Hub.
    python -m longvpo_hf.studies.push MODEL REPO default|private|public

An adapter whose base is a folder of this machine is merged into it first: nobody else has that base.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from longvpo_hf.artifacts import whole_folder
from longvpo_hf.errors import DatasetError, advice
from longvpo_hf.processes import end_with_parent
from longvpo_hf.public import public_text

#: Files of a training that are of use to nobody else, or say where on this machine it ran.
_LEFT_OUT = ("checkpoint-", "checkpoint_files.json", "_", ".", "training_args.bin", "runs")


def push(model: Path, repo_id: str, private: bool | None) -> str:
    """Uploads a model with card, record and report, in one commit; gives its address.

    Raises:
        DatasetError: If the repository cannot be written to.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
    except (HfHubHTTPError, HFValidationError) as error:
        raise DatasetError(
            f"The model {repo_id} cannot be written to ({str(error).strip().splitlines()[0]}). Log in with `hf auth "
            "login`, with a token that may write to the namespace, and name it namespace/name."
        ) from error
    folder = _whole(model)
    operations = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(_LEFT_OUT) for part in path.relative_to(folder).parts)
    ]
    run = model.parent
    report = run / "report.md"
    if report.is_file():
        text = public_text(report.read_text(encoding="utf-8"))
        operations.append(CommitOperationAdd("report.md", text.encode("utf-8")))
        pictures = sorted((run / "pictures").glob("*.png"))
        operations += [CommitOperationAdd(f"pictures/{path.name}", path) for path in pictures]
    return str(api.create_commit(repo_id, operations, commit_message="Model and report of a study").commit_url)


def _whole(model: Path) -> Path:
    """The model's folder, or one into which its adapter was merged."""
    adapter = model / "adapter_config.json"
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else None
    if base is None or not Path(base).is_dir():
        return model
    from longvpo_hf.responders.checkpoint import load_checkpoint

    merged, processor = load_checkpoint(str(model), merged=True)
    folder = model.with_name(f"{model.name}-merged")
    with whole_folder(folder) as part:
        merged.save_pretrained(part)
        processor.save_pretrained(part)
        for name in ("README.md", "longvpo.json", "training_curve.png"):
            if (model / name).is_file():
                (part / name).write_bytes((model / name).read_bytes())
    return folder


if __name__ == "__main__":
    end_with_parent()
    with advice("longvpo run"):
        where = push(Path(sys.argv[1]), sys.argv[2], {"private": True, "public": False}.get(sys.argv[3]))
        print(f"pushed: {where}")
