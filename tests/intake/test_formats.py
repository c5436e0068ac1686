"""Rows that other people publish become rows the trainer takes; what they should not hold is named, row and field."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, Video, load_dataset

import tiny_models
from longvpo_hf import VideoPreferenceCollator
from longvpo_hf.errors import ConfigError, DatasetError
from longvpo_hf.frames import FrameSampler
from longvpo_hf.intake import formats
from longvpo_hf.intake.formats import from_longva_tpo, from_longvpo, from_reference, from_trl
from longvpo_hf.preference import VideoPreference, row_schema
from media import indices_of, write_video


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two videos, of 2 s and 1 s, a text file, and a way out."""
    folder = tmp_path_factory.mktemp("published")
    root = folder / "root"
    (root / "sub").mkdir(parents=True)
    write_video(root / "a.mp4", 20)
    write_video(root / "sub" / "b.mp4", 10, first=100)
    write_video(folder / "outside.mp4", 5)
    (root / "text.mp4").write_text("no video")
    (root / "link.mp4").symlink_to(folder / "outside.mp4")
    (root / "inner.mp4").symlink_to(root / "sub" / "b.mp4")
    (root / "up").symlink_to(folder)
    return root


def turns(question: Any = "Why?", answer: str = "yes") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]


def trl_row(**changed: Any) -> dict[str, Any]:
    question, chosen = turns()
    _, rejected = turns(answer="no")
    return {"prompt": question, "chosen": chosen, "rejected": rejected, "video": "a.mp4", **changed}


def read_all(dataset: Dataset) -> list[VideoPreference]:
    """The rows as the trainer reads them; the dataset has the columns of the contract and nothing else."""
    assert dataset.features == Features.from_arrow_schema(row_schema())
    return [VideoPreference.from_row(row) for row in dataset]


# ------------------------------------------------------------------------------------------------------------ TRL


def test_one_video_a_row_becomes_a_clip_of_the_whole_file(root: Path) -> None:
    (row,) = read_all(from_trl(Dataset.from_list([trl_row()]), root))
    assert (row.question, row.chosen, row.rejected) == ("Why?", "yes", "no")
    (clip,) = row.timeline.clips
    assert (clip.path, clip.start_seconds, clip.end_seconds) == (str(root / "a.mp4"), 0.0, 2.0)
    assert (clip.source_id, row.provenance.method) == ("a.mp4", "trl")
    assert (row.evidence, row.reference) == ((), ())
    assert indices_of(FrameSampler(20)(row.timeline).pixels) == list(range(20))


def test_several_videos_are_laid_end_to_end(root: Path) -> None:
    row = trl_row(videos=["sub/b.mp4", "a.mp4", "inner.mp4"])
    del row["video"]
    (row_read,) = read_all(from_trl(Dataset.from_list([row]), root))
    assert [clip.duration_seconds for clip in row_read.timeline.clips] == [1.0, 2.0, 1.0]
    shown = indices_of(FrameSampler(8)(row_read.timeline).pixels)
    assert shown == [102, 107, 2, 7, 12, 17, 102, 107]


@pytest.mark.parametrize(
    ("changed", "question"),
    [
        ({"prompt": "Why?", "chosen": "yes", "rejected": "no"}, "Why?"),
        ({"prompt": "<video>\nWhy?", "chosen": "yes", "rejected": "no"}, "Why?"),
        ({"prompt": turns([{"type": "video", "text": None}, {"type": "text", "text": "Why?"}])[0]}, "Why?"),
        ({"prompt": turns([{"type": "text", "text": "Why"}, {"type": "text", "text": "so?"}])[0]}, "Why\nso?"),
        ({"prompt": turns("Why <3 it? <image> ")[0]}, "Why <3 it?"),
        (
            {"chosen": [*turns()[0], *turns()[1]], "rejected": [*turns()[0], *turns(answer="no")[1]], "prompt": None},
            "Why?",
        ),
    ],
)
def test_every_way_trl_writes_a_preference(root: Path, changed: dict[str, Any], question: str) -> None:
    (row,) = read_all(from_trl(Dataset.from_list([trl_row(**changed)]), root))
    assert (row.question, row.chosen, row.rejected) == (question, "yes", "no")


@pytest.mark.parametrize("column", ["video", "videos"])
def test_videos_stored_in_the_dataset_are_written_once(root: Path, tmp_path: Path, column: str) -> None:
    names = ["a.mp4", "sub/b.mp4", "a.mp4"]
    stored = [{"path": f"../../nowhere/{Path(name).name}", "bytes": (root / name).read_bytes()} for name in names]
    rows = [{**trl_row(), column: [value] if column == "videos" else value} for value in stored]
    for row in rows:
        if column == "videos":
            del row["video"]
    feature = List(Video()) if column == "videos" else Video()
    messages = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": messages, "chosen": messages, "rejected": messages, column: feature})
    dataset = Dataset.from_list(rows, features=features)
    empty, cache = tmp_path / "empty", tmp_path / "cache"
    empty.mkdir()
    read = [read_all(from_trl(dataset, empty, cache_dir=cache)) for _ in range(2)]
    assert read[0] == read[1]
    paths = [Path(row.timeline.clips[0].path) for row in read[0]]
    assert paths[0] == paths[2] != paths[1]
    for path, name in zip(paths, names, strict=True):
        content = (root / name).read_bytes()
        assert path == cache / hashlib.sha256(content).hexdigest()[:20] / Path(name).name
        assert path.read_bytes() == content
    assert {path for path in cache.rglob("*") if path.is_file()} == set(paths), "nothing else is left behind"


def test_the_default_cache_lies_under_hf_home(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    dataset = Dataset.from_list([trl_row(video={"path": None, "bytes": (root / "a.mp4").read_bytes()})])
    (row,) = read_all(from_trl(dataset.cast_column("video", Video()), root))
    assert Path(row.timeline.clips[0].path).is_relative_to(tmp_path / "home" / "longvpo_hf" / "videos")


def test_a_video_folder_with_preferences(root: Path, tmp_path: Path) -> None:
    """What `load_dataset("videofolder")` gives: absolute paths, inside of the folder."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((root / "a.mp4").read_bytes())
    row = {"file_name": "a.mp4", "prompt": "Why?", "chosen": "yes", "rejected": "no"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    dataset = load_dataset("videofolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "c"))
    (read,) = read_all(from_trl(dataset, folder))
    assert read.timeline.clips[0].path == str(folder / "a.mp4")
    assert read.timeline.clips[0].source_id == "a.mp4"
    with pytest.raises(ValueError, match="row 0: video must name a file inside video_root"):
        from_trl(dataset, root)


def test_the_collator_takes_the_rows(root: Path) -> None:
    rows = from_trl(Dataset.from_list([trl_row(), trl_row(video="sub/b.mp4")]), root)
    batch = VideoPreferenceCollator(tiny_models.build("internvl")[1], num_frames=4, fps=None)(list(rows))
    assert batch["video_index"].tolist() == [0, 1]
    assert [video["pixel_values"].shape[0] for video in batch["videos"]] == [4, 4]


def test_rows_about_images_need_no_conversion(root: Path) -> None:
    dataset = Dataset.from_list([{"prompt": "Why?", "chosen": "yes", "rejected": "no", "images": ["a.png"]}])
    with pytest.raises(ValueError, match=r"one of the columns video and videos, got .*'images'.* need no conversion"):
        from_trl(dataset, root)


# ----------------------------------------------------------------------------------------------- released datasets


def flat_row(**changed: Any) -> dict[str, Any]:
    return {"video": "a.mp4", "question": "Why?", "chosen": "yes", "rejected": "no", **changed}


def test_longvpo_training_data(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "InternVL3_stage1_short2long_training.jsonl"
    rows = [
        flat_row(task_type="anchor", video=["a.mp4", "sub/b.mp4"], question="<video>\nWhy?"),
        flat_row(task_type="reasoning", video=["a.mp4"]),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    first, second = read_all(from_longvpo(dataset, root))
    assert [clip.path for clip in first.timeline.clips] == [str(root / "a.mp4"), str(root / "sub" / "b.mp4")]
    assert [clip.source_id for clip in first.timeline.clips] == ["a.mp4", "sub/b.mp4"]
    assert (first.question, first.chosen, first.rejected) == ("Why?", "yes", "no")
    assert (first.provenance.method, second.provenance.method) == ("longvpo-anchor", "longvpo-reasoning")
    assert first.id != second.id


def test_longva_tpo(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "dataset.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["video", "question", "chosen", "rejected"])
        writer.writeheader()
        writer.writerow(flat_row(video="sub/b.mp4", chosen='yes, "really"\nyes'))
    dataset = load_dataset("csv", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    (row,) = read_all(from_longva_tpo(dataset, root))
    assert row.chosen == 'yes, "really"\nyes'
    assert row.provenance.method == "temporal-longva"
    assert row.timeline.clips[0].path == str(root / "sub" / "b.mp4")


@pytest.mark.parametrize("convert", [from_longvpo, from_longva_tpo])
def test_missing_columns_are_named(root: Path, convert: Any) -> None:
    dataset = Dataset.from_list([{"video": "a.mp4", "question": "Why?", "chosen": "yes"}])
    with pytest.raises(ValueError, match=r"Rows need the columns \['video', .*: \[.*'rejected'\] are missing"):
        convert(dataset, root)


# -------------------------------------------------------------------------------------------------- what is refused

OUTSIDE = [
    "../outside.mp4",
    "sub/../../outside.mp4",
    "sub/../a.mp4",
    "..\\outside.mp4",
    "/etc/passwd",
    "C:\\a.mp4",
    "link.mp4",
    "up/outside.mp4",
    "a\0.mp4",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_root(root: Path, name: str) -> None:
    message = "row 1: video must name a file inside video_root=.*, got .*, which leads elsewhere"
    good = {"video": "a.mp4"}
    with pytest.raises(ValueError, match=f"^{message}"):
        from_trl(Dataset.from_list([trl_row(**good), trl_row(video=name)]), root)
    with pytest.raises(ValueError, match=f"^{message}"):
        from_longva_tpo(Dataset.from_list([flat_row(**good), flat_row(video=name)]), root)
    with pytest.raises(ValueError, match=f"^{message}"):
        from_longvpo(Dataset.from_list([flat_row(task_type="x", **good), flat_row(task_type="x", video=name)]), root)


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name != "C:\\a.mp4"] + ["ABSOLUTE"])
def test_no_path_of_an_undecoded_video_leads_out_of_the_root(root: Path, name: str) -> None:
    """A dataset's Parquet file may hold any path there."""
    path = str(root.parent / "outside.mp4") if name == "ABSOLUTE" else name
    dataset = Dataset.from_list([trl_row(video={"path": path, "bytes": None})])
    with pytest.raises(ValueError, match=r"^row 0: video must name a file inside video_root"):
        from_trl(dataset, root)


def test_an_absolute_name_is_refused_even_inside_the_root(root: Path) -> None:
    with pytest.raises(ValueError, match="row 0: video must name a file inside"):
        from_trl(Dataset.from_list([trl_row(video=str(root / "a.mp4"))]), root)


def test_a_relative_root_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    (row,) = read_all(from_trl(Dataset.from_list([trl_row()]), "root"))
    assert row.timeline.clips[0].path == str(root / "a.mp4")


def test_a_root_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"video_root must be the folder the videos are in, and .*nowhere is none"):
        from_trl(Dataset.from_list([trl_row()]), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video": "no.mp4"}, "video: missing_file: .*no.mp4: no such file"),
        ({"video": "text.mp4"}, "video: unreadable: .*text.mp4"),
        ({"video": ""}, "video must be a video or the name of its file, got ''"),
        ({"video": None}, "video must be a video or the name of its file, got None"),
        ({"prompt": None}, "without a prompt, chosen and rejected must begin with the same messages"),
        ({"prompt": ""}, "without a prompt"),
        ({"prompt": [*turns()[0], *turns()[1]]}, "prompt must be a message of the user, got role 'assistant'"),
        ({"prompt": [{"role": "tool", "content": "x"}, *turns()[0]]}, r"prompt\[0\] must be a message of the system"),
        ({"chosen": [*turns()[1], *turns()[0], *turns()[1]]}, "chosen must be text or one message of the assistant"),
        ({"prompt": [{"role": "system", "content": "Hi"}]}, "prompt must be a message of the user, got role 'system'"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt must have text as its content, got None"),
        ({"prompt": turns([{"type": "video", "text": None}])[0]}, "prompt must have text as its content"),
        ({"chosen": None}, "chosen must be text or messages, got None"),
        ({"chosen": turns()[0]}, "chosen must be a message of the assistant, got role 'user'"),
        ({"rejected": []}, r"rejected must be text or messages, got \[\]"),
        ({"rejected": turns()[1]}, "chosen and rejected are the same"),
        ({"chosen": turns(answer=" ")[1]}, "chosen of a preference is empty"),
    ],
)
def test_a_trl_row_not_as_expected_is_named(root: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^row 0: {message}"):
        from_trl(Dataset.from_list([trl_row(**changed)]), root)


def test_a_system_prompt_and_earlier_turns_are_kept(root: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, *turns()[0], *turns()[1], *turns("And then?")[0]]
    (row,) = read_all(from_trl(Dataset.from_list([trl_row(prompt=prompt)]), root))
    assert [message.role for message in row.context] == ["system", "user", "assistant"]
    assert row.context[0].content == "Be brief."
    assert row.question == "And then?"


def test_in_a_list_of_videos_the_one_is_named(root: Path) -> None:
    row = trl_row(videos=["a.mp4", "no.mp4"])
    del row["video"]
    with pytest.raises(ValueError, match=r"^row 0: videos\[1\]: missing_file: .*no.mp4"):
        from_trl(Dataset.from_list([row]), root)
    with pytest.raises(ValueError, match=r"^row 0: videos must name at least one video, got \[\]"):
        from_trl(Dataset.from_list([{**row, "videos": []}]), root)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"question": None}, "question must be text, got None"),
        ({"question": "<video>\n"}, "question of a preference is empty"),
        ({"chosen": 3}, "chosen must be text, got 3"),
        ({"rejected": "yes"}, "chosen and rejected are the same, 'yes'"),
        ({"task_type": " "}, "task_type is empty"),
        ({"video": 7}, "video must be a video or the name of its file, got 7"),
    ],
)
def test_a_flat_row_not_as_expected_is_named(root: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^row 0: {message}"):
        from_longvpo(Dataset.from_list([flat_row(**{"task_type": "x", **changed})]), root)


BAD_FLAT = [
    {"video": "no.mp4"},
    {"video": "text.mp4"},
    {"video": "../outside.mp4"},
    {"video": "link.mp4"},
    {"video": ""},
    {"question": " "},
    {"rejected": "yes"},
]


def test_rows_that_cannot_be_used_are_left_out_where_asked(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [flat_row(question="first?"), *(flat_row(**bad) for bad in BAD_FLAT), flat_row(question="last?")]
    kept = read_all(from_longva_tpo(Dataset.from_list(rows), root, missing="drop"))
    assert [row.question for row in kept] == ["first?", "last?"]
    (record,) = caplog.records
    assert record.getMessage().startswith("7 of 9 rows were left out:\n  row 1: video: missing_file: ")
    assert record.getMessage().endswith("… and 2 more")
    with pytest.raises(ValueError, match=r"^row 1: video: missing_file"):
        from_longva_tpo(Dataset.from_list(rows), root)
    with pytest.raises(DatasetError, match=r"None of 7 rows can be used:\n  row 0: video: missing_file.*\n  row 1: "):
        from_longva_tpo(Dataset.from_list(rows[1:-1]), root, missing="drop")
    with pytest.raises(ConfigError, match="missing must be 'raise' or 'drop', got 'ignore'"):
        from_longva_tpo(Dataset.from_list(rows), root, missing="ignore")  # type: ignore[arg-type]


def test_every_form_can_leave_rows_out(root: Path) -> None:
    trl = [trl_row(), trl_row(video="no.mp4")]
    assert len(from_trl(Dataset.from_list(trl), root, missing="drop")) == 1
    longvpo = [flat_row(task_type="x"), flat_row(task_type=" ")]
    assert len(from_longvpo(Dataset.from_list(longvpo), root, missing="drop")) == 1
    clips = [
        {"file_name": name, "start_seconds": 0.0, "end_seconds": 1.0} for name in ("a.mp4", "no.mp4", "/etc/passwd")
    ]
    reference = Dataset.from_list([{"id": str(i), "clips": [clip]} for i, clip in enumerate(clips)])
    (row,) = from_reference(reference, root, missing="drop")
    assert (row["id"], row["clips"][0]["file_name"]) == ("0", str(root / "a.mp4"))
    with pytest.raises(DatasetError, match=r"row 1, field clips\[0\]\.file_name: no\.mp4 is not in video_root"):
        from_reference(reference, root)


@pytest.mark.parametrize(
    "changed",
    [{"chosen": 5}, {"chosen": {"role": "assistant"}}, {"prompt": 3}, {"video": {"path": 4}}, {"chosen": [[]]}],
)
def test_rows_of_other_types_are_rows_that_cannot_be_used(root: Path, changed: dict[str, Any]) -> None:
    rows = [trl_row(), trl_row(**changed)]

    class Rows(list[dict[str, Any]]):
        """A dataset whose column has two types, which Arrow would refuse."""

        column_names = tuple(rows[0])
        features: ClassVar[dict[str, None]] = dict.fromkeys(rows[0])

        def with_format(self, form: None) -> Rows:
            return self

    assert len(from_trl(Rows(rows), root, missing="drop")) == 1  # type: ignore[arg-type]


def test_placeholders_around_a_question_take_linear_time(root: Path) -> None:
    question = " " * 200_000 + "x" + " <" * 100_000
    begin = time.process_time()
    (row,) = read_all(from_longva_tpo(Dataset.from_list([flat_row(question=f"<video>{question}")]), root))
    assert row.question == question.lstrip()
    assert time.process_time() - begin < 5  # a bound for what goes wrong by orders of magnitude


@pytest.mark.parametrize(
    ("question", "read"),
    [
        ("<image>\n<image>\n<image>\nWhy?", "Why?"),
        ("<video><image> Why? <image>\n<video>", "Why?"),
        ("  Why <video> here?  ", "  Why <video> here?  "),
        ("Why?\n<image><image>", "Why?"),
    ],
)
def test_all_placeholders_around_a_question_are_taken_off(root: Path, question: str, read: str) -> None:
    """One was left of LLaVA's rows with a placeholder for each frame, and reached the model as text."""
    (row,) = read_all(from_longva_tpo(Dataset.from_list([flat_row(question=question)]), root))
    assert row.question == read


@pytest.mark.parametrize("convert", [from_trl, from_longvpo, from_longva_tpo, from_reference])
def test_what_is_no_split_of_rows_is_refused(root: Path, convert: Any) -> None:
    rows = Dataset.from_list([{**flat_row(task_type="x"), **trl_row(), "id": "0", "clips": []}])
    for splits in ({"train": rows}, DatasetDict(train=rows)):
        with pytest.raises(DatasetError, match=r"Give one split, .* got the splits train\."):
            convert(splits, root)
    if convert is not from_reference:
        with pytest.raises(DatasetError, match="There are no rows"):
            convert(rows.select([]), root)
    else:
        with pytest.raises(DatasetError, match="cannot be streamed"):
            convert(rows.to_iterable_dataset(), root)
        assert len(convert(rows.select([]), root)) == 0


def test_each_file_is_opened_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    whole_clip = formats.whole_clip

    def counted(path: str) -> Any:
        opened.append(path)
        return whole_clip(path)

    monkeypatch.setattr(formats, "whole_clip", counted)
    rows = [flat_row(video=name, question=f"{i}?") for i, name in enumerate(["a.mp4", "sub/b.mp4", "a.mp4"])]
    assert len(from_longva_tpo(Dataset.from_list(rows), root)) == 3
    assert opened == [str(root / "a.mp4"), str(root / "sub" / "b.mp4")]
