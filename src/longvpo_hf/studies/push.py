"""Publishes the model of a study, with its report, on the Hub.

    python -m longvpo_hf.studies.push MODEL REPO default|private|public [REVISION]

An adapter whose base is a folder of this machine is merged into it first: nobody else has that base. The card is made
anew: with the name on the Hub, with what the study measured, and with the trainings and the base that came before.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from longvpo_hf.artifacts import whole_folder
from longvpo_hf.errors import DatasetError, advice
from longvpo_hf.evaluation.results import HUB_FOLDER
from longvpo_hf.processes import end_with_parent
from longvpo_hf.public import public_text
from longvpo_hf.publishing.dataset import require_private
from longvpo_hf.publishing.model_card import CURVE_FILE, model_card
from longvpo_hf.record import RECORD_FILE, ModelRecord, read_record, record_text
from longvpo_hf.studies.results import results_of
from longvpo_hf.studies.study import BASE

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
        DatasetError: If the repository cannot be written to, or is to be private and is there and public.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private:
            require_private(api, repo_id, "model")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:  # the last: offline, no network
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DatasetError(
            f"The model {repo_id} cannot be written to ({reason}). Log in with `hf auth login`, with a token that may "
            "write to the namespace, and name it namespace/name."
        ) from error
    folder = _whole(model)
    run = model.parent
    operations = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_left_out(path.relative_to(folder))
    ]
    record = published_record(model, repo_id, is_merged=folder != model)
    if record is not None:
        card = model_card(record, has_curve=(model / CURVE_FILE).is_file(), has_report=(run / "report.md").is_file())
        made = {"README.md": card, RECORD_FILE: record_text(record)}
        operations = [operation for operation in operations if operation.path_in_repo not in made]
        operations += [CommitOperationAdd(name, text.encode("utf-8")) for name, text in made.items()]
    report = run / "report.md"
    if report.is_file():
        text = public_text(report.read_text(encoding="utf-8"))
        operations.append(CommitOperationAdd("report.md", text.encode("utf-8")))
        pictures = sorted((run / "pictures").glob("*.png"))
        operations += [CommitOperationAdd(f"pictures/{path.name}", path) for path in pictures]
    message = "Model and report of a study"
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)


def published_record(model: Path, repo_id: str, *, is_merged: bool) -> ModelRecord | None:
    """The record of a model as it is published; None if it has none.

    Args:
        model: Its folder, in the run's.
        repo_id: Its name on the Hub.
        is_merged: Whether the adapter that was trained is merged into its base.
    """
    record = read_record(model, ModelRecord)
    if record is None:
        return None
    if is_merged:
        record = record.merged()
    base, data = record.base, record.data
    if not record.adapter:  # an adapter's own base must be loaded
        for before in _trainings_before(model.parent, record):
            base, data = before.base, (*before.data, *data)
    return replace(
        record,
        name=repo_id.rpartition("/")[2],
        load_from=repo_id,
        base=base,
        data=tuple({each.source: each for each in data}.values()),
        evaluations=results_of(model.parent, model.name, BASE) or record.evaluations,
    )


def _trainings_before(run: Path, record: ModelRecord) -> Iterator[ModelRecord]:
    """The records of the models of the run that a model was trained from, the last first."""
    known = {record.name}
    while not record.base.on_hub and record.base.name and record.base.name not in known:
        known.add(record.base.name)
        before = read_record(run / record.base.name, ModelRecord)
        if before is None:
            return
        yield before
        record = before


def _is_left_out(path: Path) -> bool:
    return path.parts[0] != HUB_FOLDER and any(part.startswith(_LEFT_OUT) for part in path.parts)


def _whole(model: Path) -> Path:
    """The model's folder, or one into which its adapter was merged."""
    adapter = model / "adapter_config.json"
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else None
    if base is None or not Path(base).is_dir():
        return model
    from longvpo_hf.responders.checkpoint import load_checkpoint

    merged, processor = load_checkpoint(str(model), dtype="auto", merged=True)
    folder = model.with_name(f"{model.name}-merged")
    with whole_folder(folder) as part:
        merged.save_pretrained(part)
        processor.save_pretrained(part)
        if (model / CURVE_FILE).is_file():
            (part / CURVE_FILE).write_bytes((model / CURVE_FILE).read_bytes())
        if (model / HUB_FOLDER).is_dir():
            shutil.copytree(model / HUB_FOLDER, part / HUB_FOLDER)
    return folder


if __name__ == "__main__":
    end_with_parent()
    with advice("longvpo run"):
        model, repo_id, private, *revision = sys.argv[1:]
        where = push(Path(model), repo_id, {"private": True, "public": False}.get(private), *revision)
        print(f"pushed: {where}")
