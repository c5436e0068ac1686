"""The dataset on the Hub: its card, what a push refuses, and the way from a folder to two training steps.

What talks to the Hub runs in a process of its own against `hub_double`; functions here that no test framework calls
(`push_and_train`, `push_again`) are what it runs.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Video, load_dataset
from huggingface_hub import DatasetCard, HfApi

from hub_double import MAX_FILES_PER_FOLDER, TOKEN, HubDouble, card_errors
from longvpo_hf import papers
from longvpo_hf.errors import DatasetError
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.preference import Provenance, VideoPreference, undecoded
from longvpo_hf.public import markdown, public_name
from longvpo_hf.publishing.dataset import DatasetWriter, add_preview, prepare_push, push_dataset
from longvpo_hf.publishing.dataset_card import dataset_card
from longvpo_hf.record import DatasetRecord, LicenceRecord, MethodRecord, read_record, write_record
from longvpo_hf.timeline import Timeline

REPO = "longvpo/stage1"


def of_corpora(preferences: list[VideoPreference], licences: list[str]) -> list[VideoPreference]:
    """The rows with a recipe, and with clips that name a source and, by turns, a licence."""
    return [
        replace(
            preference,
            provenance=Provenance(method="longvpo-stage1"),
            timeline=Timeline(
                tuple(
                    replace(clip, source_id=f"video{i}", licence=licences[i % len(licences)])
                    for i, clip in enumerate(preference.timeline.clips)
                )
            ),
        )
        for preference in preferences
    ]


RECORD = DatasetRecord(
    "Rows",
    (MethodRecord("longvpo-stage1", "stage1-1", papers.LONGVPO),),
    funnel={"stages": {"rows": 8}, "dropped": {"answers_agree": 2}},
    reasons={"answers_agree": "chosen and rejected say the same"},
)


def write(folder: Path, preferences: list[VideoPreference], record: DatasetRecord = RECORD) -> Path:
    with DatasetWriter(folder) as writer:
        for preference in preferences:
            writer.add(preference)
        writer.write_record(record)
    return folder


# ------------------------------------------------------------------------------------------------------------ the card


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["CC BY 4.0"], "cc-by-4.0"),
        (["cc_by_nc_4.0 ", "MIT"], ["cc-by-nc-4.0", "mit"]),
        (["Vript | own licence", "mit"], ["mit", "other"]),
        (["", "mit"], ["mit", "unknown"]),
        ([""], None),
    ],
)
def test_card_names_the_clips_licences(
    tmp_path: Path, preferences: list[VideoPreference], licences: list[str], expected: Any
) -> None:
    text = (write(tmp_path / "rows", of_corpora(preferences, licences)) / "README.md").read_text()
    assert card_errors(text) == []
    assert DatasetCard(text).data.to_dict().get("license") == expected
    for licence in licences:
        assert f"| {markdown(licence) or 'not stated'} | " in text


def test_card_counts_clips_and_sources(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    clip = preferences[0].timeline.clips[0]
    sources = tuple(replace(clip, source_id=f"v{i:02}", licence="mit") for i in range(23))
    rows = [replace(preferences[0], timeline=Timeline(sources), id="")] * 2
    text = (write(tmp_path / "rows", rows) / "README.md").read_text()
    names = ", ".join(f"v{i:02}" for i in range(20))
    assert f"| mit | 23 | 23 | {names}, … and 3 more |" in text


def test_card_cites_each_paper_once() -> None:
    cited = [("a", papers.TPO), ("b", papers.LONGVPO), ("c", papers.TPO)]
    text = dataset_card(replace(RECORD, methods=tuple(MethodRecord(name, "1", paper) for name, paper in cited)))
    assert re.findall(r"https://arxiv.org/abs/([\d.]+)", text) == ["2501.13919", "2602.02341"]
    assert DatasetCard(text).data["tags"][-3:] == ["a", "b", "c"]


def test_card_explains_the_funnel() -> None:
    text = dataset_card(RECORD)
    assert "| rows | 8 |\n| dropped: answers_agree (chosen and rejected say the same) | 2 |\n" in text


def test_card_says_who_wrote_the_rows_and_where_no_licence_is_stated() -> None:
    licences = (LicenceRecord("", 3, 1, ("a",)), LicenceRecord("mit", 1, 1, ("b",)))
    text = dataset_card(replace(RECORD, licences=licences))
    assert "## Limits\n\nQuestions and answers were written and filtered by models" in text
    assert "**No licence is stated for 3 clips.**" in text
    text = dataset_card(replace(RECORD, methods=(MethodRecord("by-hand"),), licences=licences[1:]))
    assert "## Limits" not in text
    assert "No licence" not in text


def test_names_from_outside_cannot_break_the_card() -> None:
    nasty = "a | b\n---\n| c: [x](http://y) `z` <b> {{ 1 }}"
    text = dataset_card(
        DatasetRecord(
            nasty,
            (MethodRecord(nasty, nasty, f"{nasty}\n```\n<b>"),),
            facts={nasty: nasty},
            funnel={"stages": {nasty: 1}, "dropped": {nasty: 1}},
            reasons={nasty: nasty},
            licences=(LicenceRecord(nasty, 1, 2, (nasty,)),),
        )
    )
    assert card_errors(text) == []
    assert DatasetCard(text).data["tags"][-1] == nasty
    rows = [line for line in text.splitlines() if line.startswith(("| a ", "| dropped"))]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3, 3, 3, 5]
    body = text.split("\n---\n", 1)[1]
    assert body.count("```") == 4
    body = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    assert "<b>" not in body
    assert "[x](" not in body


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("/ho" + "me/someone/models/mine@main", "mine@main"),
        ("C:\\models\\mine", "mine"),
        ("~/models/mine", "mine"),
        ("../mine", "mine"),
        ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3-8B-hf"),
        ("cosine ≤ 0.6", "cosine ≤ 0.6"),
        ("x" * 5000, "x" * 5000),
    ],
)
def test_local_paths_lose_their_folders(tmp_path: Path, name: str, public: str) -> None:
    assert public_name(name) == public
    write_record(tmp_path, replace(RECORD, facts={"model": name}))
    assert (read_record(tmp_path, DatasetRecord) or RECORD).facts == {"model": public}
    assert f"| model | {markdown(public)} |" in dataset_card(replace(RECORD, facts={"model": name}))


def test_a_folder_here_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("runs/base") == "base"


# ------------------------------------------------------------------------------------------------ what a push refuses


def test_push_refuses_rows_without_their_media(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    folder = write(tmp_path / "rows", preferences)
    media = sorted((folder / "clips").glob("*/*"))
    media[1].unlink()
    with pytest.raises(ValueError, match=rf"^1 media files .* e\.g\. 'clips/{media[1].name[:2]}/{media[1].name}'"):
        push_dataset(folder, REPO)


SECRET = b"-----BEGIN PRIVATE KEY-----"


@pytest.mark.parametrize("content", [SECRET, b"", b"#EXTM3U\nfile:///etc/passwd", b"\0\0\0\x40ftypisom" + SECRET])
def test_what_is_no_video_is_not_published(tmp_path: Path, preferences: list[VideoPreference], content: bytes) -> None:
    """Whatever gave the name of the file: neither answer may have been given from it, so that nobody decoded it."""
    (tmp_path / "key.mp4").write_bytes(content)
    first, second = preferences[0], preferences[1]
    clips = (first.timeline.clips[0], replace(first.timeline.clips[0], path=str(tmp_path / "key.mp4")))
    with DatasetWriter(tmp_path / "rows") as writer:
        writer.add(second)
        with pytest.raises(UnreadableVideo, match=r"unreadable: .*key\.mp4"):
            writer.add(replace(first, timeline=Timeline(clips), evidence=(), reference=(), id=""))
        writer.write_record(RECORD)
    files = [path for path in (tmp_path / "rows").rglob("*") if path.is_file()]
    assert not any(SECRET in path.read_bytes() for path in files)
    assert len(pq.read_table(tmp_path / "rows" / "train.parquet")) == 1


@pytest.mark.parametrize("kind", ["name", "link"])
def test_push_refuses_media_that_lead_out_of_the_folder(
    tmp_path: Path, preferences: list[VideoPreference], kind: str
) -> None:
    folder = write(tmp_path / "rows", preferences)
    media = next((folder / "clips").glob("*/*.mp4"))
    (tmp_path / "private.mp4").write_bytes(media.read_bytes())
    if kind == "link":
        (media.parent / "extra.mp4").symlink_to(tmp_path / "private.mp4")
        message = r"extra\.mp4 is a link to .*private\.mp4, which would be published"
    else:
        rows = pq.read_table(folder / "train.parquet").to_pylist()
        rows[0]["clips"][0]["file_name"] = "../private.mp4"
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        message = r"1 media files .* are missing, e\.g\. '\.\./private\.mp4'"
    with pytest.raises(DatasetError, match=message):
        push_dataset(folder, REPO)


@pytest.mark.parametrize("name", ["README.md", "train.parquet"])
def test_push_refuses_what_is_no_dataset(tmp_path: Path, preferences: list[VideoPreference], name: str) -> None:
    folder = write(tmp_path / "rows", preferences)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"lacks {name}"):
        push_dataset(folder, REPO)


def test_push_refuses_a_folder_of_more_files_than_the_hub_takes(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_one_folder(write(tmp_path / "rows", preferences))
    number = len(list((folder / "clips").iterdir()))
    monkeypatch.setattr("longvpo_hf.publishing.dataset.MAX_FILES_PER_FOLDER", number - 1)
    with pytest.raises(DatasetError, match=rf"clips holds {number} media files and the Hub takes at most {number - 1}"):
        push_dataset(folder, REPO)


def in_one_folder(folder: Path) -> Path:
    """The dataset as it was laid out before media were spread over folders."""
    table = pq.read_table(folder / "train.parquet")
    rows = table.to_pylist()
    for row in rows:
        for clip in row["clips"]:
            clip["file_name"] = f"clips/{Path(clip['file_name']).name}"
    for path in list((folder / "clips").glob("*/*")):
        path.rename(folder / "clips" / path.name)
    for parent in (folder / "clips").iterdir():
        if parent.is_dir():
            parent.rmdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_with_its_media_in_one_folder_still_loads(
    tmp_path: Path, preferences: list[VideoPreference], streaming: bool
) -> None:
    folder = in_one_folder(write(tmp_path / "rows", preferences))
    dataset = undecoded(load_dataset(str(folder), split="train", streaming=streaming, cache_dir=str(tmp_path)))
    loaded = [VideoPreference.from_row(row) for row in dataset]
    for row, source in zip(loaded, preferences, strict=True):
        assert [Path(clip.path).read_bytes() for clip in row.timeline.clips] == [
            Path(clip.path).read_bytes() for clip in source.timeline.clips
        ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_preview_is_a_video_column_and_rows_stay_what_they_are(
    tmp_path: Path, preferences: list[VideoPreference], streaming: bool
) -> None:
    folder = write(tmp_path / "rows", preferences)
    add_preview(folder)
    add_preview(folder)  # changes nothing more
    dataset = load_dataset(str(folder), split="train", streaming=streaming, cache_dir=str(tmp_path))
    assert isinstance(dataset.features["preview"], Video)
    rows = list(undecoded(dataset))
    for row, source in zip(rows, preferences, strict=True):
        loaded = VideoPreference.from_row(row)
        assert (loaded.id, loaded.question, loaded.evidence) == (source.id, source.question, source.evidence)
        anchor = source.timeline.clips[source.evidence[0]]
        assert Path(row["preview"]["path"]).read_bytes() == Path(anchor.path).read_bytes()


# ------------------------------------------------------------------------------------------------- through the double


def push_without_leave(source: str, output: str) -> dict[str, str]:
    """Asks for write access where there is none, by name and by a build."""
    from longvpo_hf.commands.build import stage1

    told = {}
    for repo in (REPO, "no such/name at all"):
        with pytest.raises(DatasetError) as refused:
            prepare_push(repo)
        told[repo] = str(refused.value)
    words = ["--corpus", "videofolder", "--source", source, "--responder", "scripted", "--num-rows", "4"]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        stage1.main([*words, "--output", output, "--push-to-hub", REPO])
    return {**told, "build": said.getvalue()}


def test_a_push_is_refused_before_any_work(
    tmp_path: Path, preferences: list[VideoPreference], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = Path(preferences[0].timeline.clips[0].path).parent, tmp_path / "build" / "rows"
    with HubDouble() as hub:
        environment = hub.environment
        monkeypatch.setattr(hub, "environment", lambda home: environment(home) | {"HF_TOKEN": f"{TOKEN}-of-a-guest"})
        told = hub.call(push_without_leave, source, output, cwd=tmp_path, hf_home=tmp_path / "home")
        assert not hub.repositories
    for repo in (REPO, "no such/name at all"):
        assert f"The dataset {repo} cannot be written to" in told[repo]
    assert f"The dataset {REPO} cannot be written to" in told["build"]
    assert not output.parent.exists()


def commit_too_many(number: str) -> dict[str, str]:
    """Commits so many files into one folder, past the checks of `push_dataset`."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    api = prepare_push(REPO)
    files = [CommitOperationAdd(f"clips/{i}.txt", b"x") for i in range(int(number))]
    try:
        api.create_commit(REPO, files, commit_message="Many", repo_type="dataset")
    except HfHubHTTPError as error:
        return {"refusal": str(error)}
    return {"refusal": ""}


def test_the_double_refuses_more_files_in_a_folder_than_the_hub(tmp_path: Path) -> None:
    with HubDouble() as hub:
        for number in (MAX_FILES_PER_FOLDER, MAX_FILES_PER_FOLDER + 1):
            refusal = hub.call(commit_too_many, number, cwd=tmp_path, hf_home=tmp_path / "home")["refusal"]
            assert ("10000 files per directory" in refusal) == (number > MAX_FILES_PER_FOLDER)


def test_what_is_public_is_not_taken_for_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a build, nor by a study, nor by a training, before any work of theirs."""
    from longvpo_hf import LongVPOConfig, LongVPOTrainer  # which the processes that import this file do not need
    from longvpo_hf.studies.push import push

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **facts: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "auth_check", lambda self, repo_id, **facts: None)
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo_id, **facts: SimpleNamespace(private=False))

    class Untrained(LongVPOTrainer):
        def __init__(self) -> None:
            where = {"output_dir": str(tmp_path), "hub_model_id": "someone/m"}
            self.args = LongVPOConfig(**where, hub_private_repo=True, use_cpu=True, report_to=[])

        def is_world_process_zero(self) -> bool:
            return True

    with pytest.raises(DatasetError, match=f"The dataset {REPO} is there already and is public"):
        prepare_push(REPO, private=True)
    for asks in (lambda: push(tmp_path, "someone/m", True), Untrained().init_hf_repo):
        with pytest.raises(DatasetError, match="The model someone/m is there already and is public"):
            asks()
    prepare_push(REPO)  # as it is, it may be written to


def push_and_train(folder: str) -> dict[str, Any]:
    """Pushes the dataset and takes two training steps on it, map-style and streamed, in the same order."""
    import copy

    from datasets import load_dataset

    from longvpo_hf import LongVPOConfig, LongVPOTrainer
    from tiny_models import build

    told: dict[str, Any] = {"revision": push_dataset(Path(folder), REPO, private=True)}
    for streaming in (False, True):
        rows = load_dataset(REPO, split="train", streaming=streaming)
        model, processor = build("internvl")
        trainer = LongVPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            args=LongVPOConfig(
                output_dir="run",
                max_steps=2,
                per_device_train_batch_size=2,
                num_frames=3,
                reference="anchor",
                learning_rate=1e-3,
                train_sampling_strategy="sequential",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=rows,
            processing_class=processor,
        )
        trainer.train()
        told["streamed" if streaming else "loaded"] = [
            entry["loss"] for entry in trainer.state.log_history if "loss" in entry
        ]
        trainer.create_model_card()
        told["card streamed" if streaming else "card loaded"] = Path("run/README.md").read_text()
    return told


def push_to_a_branch(source: str, output: str) -> dict[str, str]:
    """Builds rows and pushes them to a branch of a private dataset, then loads them from there."""
    from longvpo_hf.commands.build import stage1

    words = ["--corpus", "videofolder", "--source", source, "--responder", "scripted", "--num-rows", "4"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        stage1.main([*words, "--output", output, "--push-to-hub", REPO, "--private", "--revision", "trial"])
    return {"said": said.getvalue(), "rows": str(len(load_dataset(REPO, split="train", revision="trial")))}


def test_a_build_pushes_to_the_branch_that_is_named(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    source = Path(preferences[0].timeline.clips[0].path).parent
    with HubDouble() as hub:
        told = hub.call(push_to_a_branch, source, tmp_path / "rows", cwd=tmp_path, hf_home=tmp_path / "home")
        repository = hub.repositories["dataset", REPO]
    assert repository.private
    assert repository.files == {}
    assert "train.parquet" in repository.branches["trial"][-1][1]
    assert told["rows"] == "4"
    assert f'revision="{repository.branches["trial"][-1][0]}"' in told["said"]


def push_again(folder: str) -> dict[str, Any]:
    """Pushes other rows under a name that cannot be, another and the same name, then a card that the Hub refuses."""
    with pytest.raises(DatasetError):
        push_dataset(Path(folder), "no such/name at all")
    push_dataset(Path(folder), f"{REPO}-trial")
    told = {"revision": push_dataset(Path(folder), REPO)}
    card = Path(folder) / "README.md"
    card.write_text(card.read_text().replace("license: mit", "license: my own"))
    try:
        push_dataset(Path(folder), REPO)
    except ValueError as error:
        told["refusal"] = str(error)
    return told


def test_from_folder_to_training_steps(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    folder = write(tmp_path / "rows", of_corpora(preferences, ["mit"]))
    with HubDouble() as hub:
        told = hub.call(push_and_train, folder, cwd=tmp_path / "cwd", hf_home=tmp_path / "home")
        repository = hub.repositories["dataset", REPO]
        assert repository.private
        assert told["revision"] == repository.commits[-1][0]
        names = {name for name in repository.files if name != ".gitattributes"}
        recorded = json.loads(repository.files["longvpo.json"])
        assert (recorded["num_rows"], recorded["num_clips"], recorded["methods"][0]["name"]) == (
            8,
            12,
            "longvpo-stage1",
        )
        assert names == {
            "longvpo.json",
            "README.md",
            "train.parquet",
            *(f"clips/{path.name[:2]}/{path.name}" for path in (folder / "clips").glob("*/*")),
        }
        assert f'load_dataset("{REPO}"'.encode() in repository.files["README.md"]
        # Every clip is downloaded once for map-style loading, however many rows show it.
        clips = [line for line in hub.requests if "GET" in line and "/clips/" in line and " 200 " in line]
        assert len(clips) == len(set(clips)) == 4
        # And streaming reads them from the Hub while it trains.
        assert any("/clips/" in line and " 206 " in line for line in hub.requests)

        assert len(told["loaded"]) == 2
        assert told["streamed"] == pytest.approx(told["loaded"], rel=1e-6)
        for way in ("loaded", "streamed"):
            assert DatasetCard(told[f"card {way}"]).data["datasets"] == [REPO]
            assert "| method | longvpo-stage1 |" in told[f"card {way}"]
            assert f"datasets/{REPO}/tree/{told['revision']}" in told[f"card {way}"]

        fewer = write(tmp_path / "fewer", of_corpora(preferences[:2], ["mit"]))
        again = hub.call(push_again, fewer, cwd=tmp_path / "cwd", hf_home=tmp_path / "home2")
        assert repository.commits[-1][0] == again["revision"] != told["revision"]
        for name in (REPO, f"{REPO}-trial"):  # each card names its own, not the first that was pushed to
            assert f'load_dataset("{name}", split'.encode() in hub.repositories["dataset", name].files["README.md"]
        media = {
            clip["file_name"] for row in pq.read_table(fewer / "train.parquet")["clips"].to_pylist() for clip in row
        }
        assert {name for name in repository.files if name.startswith("clips/")} == media
        assert len(media) == 3
        assert "license" in again["refusal"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("# no YAML", "no YAML block"),
        ("---\na: [\n---\n", "invalid YAML"),
        ("---\nlicense: my own\n---\n", "license"),
        ("---\nbase_model: /a/b/c\n---\n", "base_model"),
        ("---\ntags: x\n---\n", "tags"),
        ("---\nmodel-index:\n- name: x\n  results:\n  - dataset: {name: y}\n---\n", "model-index"),
    ],
)
def test_the_double_refuses_bad_cards(content: str, error: str) -> None:
    assert error in "".join(card_errors(content))
