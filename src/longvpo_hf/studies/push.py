"""Publishes the model of a study, with its report, on the Hub.

    python -m longvpo_hf.studies.push MODEL REPO default|private|public [REVISION]

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


def push(model: Path, repo_id: str, private: bool | None, revision: str | None = None) -> str:
    """Uploads a model with card, record and report, in one commit; gives its address.

    Args:
        model: Its folder, in the run's.
        repo_id: `namespace/name` on the Hub; created if it does not exist.
        private: Whether a new repository is private; None leaves it to the namespace's setting.
        revision: Branch to push to; created if it does not exist. None: `main`.

    Raises:
        DatasetError: If the repository cannot be written to.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:  # the last: offline, no network
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DatasetError(
            f"The model {repo_id} cannot be written to ({reason}). Log in with `hf auth login`, with a token that may "
            "write to the namespace, and name it namespace/name."
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
    message = "Model and report of a study"
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)


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
        model, repo_id, private, *revision = sys.argv[1:]
        where = push(Path(model), repo_id, {"private": True, "public": False}.get(private), *revision)
        print(f"pushed: {where}")
