"""A row survives its way through Parquet and `load_dataset` unchanged, and a bad one is named with its field."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value, Video, load_dataset, load_from_disk
from datasets.table import embed_table_storage
from torchcodec.decoders import VideoDecoder

from longvpo_hf.preference import TRAINING_COLUMNS, Provenance, VideoPreference, row_schema, undecoded
from longvpo_hf.publishing.dataset import DatasetWriter
from longvpo_hf.record import DatasetRecord, MethodRecord
from longvpo_hf.timeline import Clip, Timeline, View
from media import write_video

TEXTS = [
    "Why?",
    "日本語の質問",
    'a "quoted", comma',
    "two\nlines\ttab",
    "🎬 é ß",
    "  spaces  ",
    "x" * 3000,
    "\\n",
    "None",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files of 2 s, two of the same name in different folders."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "other").mkdir()
    paths = [folder / "a clip.mp4", folder / "other" / "a clip.mp4", folder / "ü.mp4"]
    return [str(write_video(path, 20, first=50 * i)) for i, path in enumerate(paths)]


def make_rows(videos: list[str], number: int = 40, seed: int = 0) -> list[VideoPreference]:
    """Rows of every kind: texts of all sorts, one to five clips, with and without evidence, reference, provenance."""
    rng = random.Random(seed)
    rows = []
    for i in range(number):
        clips = []
        for _ in range(rng.randrange(1, 6)):
            start = rng.choice([0.0, rng.random()])
            end = start + rng.choice([1.0, 0.1, rng.uniform(0.05, 1)])
            clips.append(
                Clip(
                    rng.choice(videos),
                    start,
                    end,
                    *(rng.choice(["", text]) for text in rng.sample(TEXTS, 3)),
                    source_start_seconds=rng.choice([None, start, 60 * rng.random()]),
                )
            )
        chosen, rejected = rng.sample(TEXTS, 2)
        provenance = Provenance(
            method=rng.choice(["", "longvpo-stage1"]),
            chosen_view=str(View.only([0])),
            answer_model=rng.choice(TEXTS),
            similarities=tuple(rng.uniform(-1, 1) for _ in range(rng.randrange(3))),
            verdicts=tuple(rng.sample(TEXTS, rng.randrange(3))),
            seed=rng.choice([0, 7, 2**40]),
        )
        rows.append(
            VideoPreference(
                Timeline(tuple(clips)),
                question=f"{i} {rng.choice(TEXTS)}",
                chosen=chosen,
                rejected=rejected,
                evidence=tuple(rng.sample(range(len(clips)), rng.randrange(len(clips) + 1))),
                reference=tuple(rng.sample(range(len(clips)), rng.randrange(len(clips) + 1))),
                provenance=rng.choice([provenance, Provenance()]),
            )
        )
    return rows


def without_paths(row: VideoPreference) -> dict[str, Any]:
    """A row as data, its media left out."""
    return row.to_row(lambda clip: "")


# ------------------------------------------------------------------------------------------------ there and back


def test_row_to_parquet_to_row_is_unchanged(tmp_path: Path, videos: list[str]) -> None:
    rows = make_rows(videos)
    assert {len(row.evidence) for row in rows} >= {0, 1, 2}
    assert {len(row.provenance.similarities) for row in rows} >= {0, 1, 2}
    table = pa.Table.from_pylist([row.to_row(lambda clip: clip.path) for row in rows], schema=row_schema())
    pq.write_table(table, tmp_path / "rows.parquet")
    again = [VideoPreference.from_row(row) for row in pq.read_table(tmp_path / "rows.parquet").to_pylist()]
    assert again == rows


def test_rows_of_before_clips_had_an_origin_are_still_read() -> None:
    older = good_row()
    older["clips"][1] = {**older["clips"][1], "source_id": "film"}
    older["clips"][1].pop("origin", None)
    older["provenance"] = {"recipe": "longvpo-stage1"}
    read = VideoPreference.from_row(older)
    assert read.timeline.clips[1].source_id == "film"
    assert read.provenance.method == "longvpo-stage1"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, videos: list[str]) -> tuple[Path, list[VideoPreference]]:
    """A dataset folder as builders write it, and its rows."""
    folder = tmp_path_factory.mktemp("datasets") / "rows"
    rows = make_rows(videos)
    with DatasetWriter(folder) as writer:
        for row in rows:
            writer.add(row)
        writer.write_record(DatasetRecord("Rows", (MethodRecord("test"),)))
    return folder, rows


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_gives_the_rows_back(
    written: tuple[Path, list[VideoPreference]], videos: list[str], streaming: bool, tmp_path: Path
) -> None:
    folder, rows = written
    dataset = undecoded(load_dataset(str(folder), split="train", streaming=streaming, cache_dir=str(tmp_path)))
    loaded = [VideoPreference.from_row(row) for row in dataset]
    assert [without_paths(row) for row in loaded] == [without_paths(row) for row in rows]
    media = {Path(path).read_bytes(): path for path in videos}
    for row, source in zip(loaded, rows, strict=True):
        # Same name, other content: each clip shows its own file.
        assert [media[Path(clip.path).read_bytes()] for clip in row.timeline.clips] == [
            clip.path for clip in source.timeline.clips
        ]
    assert len(list((folder / "clips").glob("??/*"))) == 3, "media is stored once however many rows show it"


def test_a_loaded_row_has_what_a_trainer_needs(written: tuple[Path, list[VideoPreference]], tmp_path: Path) -> None:
    row = undecoded(load_dataset(str(written[0]), split="train", cache_dir=str(tmp_path)))[0]
    assert set(TRAINING_COLUMNS) <= set(row)
    trained = VideoPreference.from_row({name: row[name] for name in TRAINING_COLUMNS})
    assert trained.id == written[1][0].id


@pytest.mark.parametrize("form", ["disk", "pushed", "streamed"])
def test_rows_that_store_their_media_themselves_need_no_other_file(
    videos: list[str], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save_to_disk` and `Dataset.push_to_hub` put the bytes of the files into the rows."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    rows = make_rows(videos)
    with DatasetWriter(tmp_path / "rows") as writer:
        for row in rows:
            writer.add(row)
        writer.write_record(DatasetRecord("Rows", (MethodRecord("test"),)))
    dataset = undecoded(load_dataset(str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache")))
    before = [VideoPreference.from_row(row) for row in dataset]
    sizes = [[(Path(clip.path).name, Path(clip.path).read_bytes()) for clip in row.timeline.clips] for row in before]
    if form == "disk":
        dataset.save_to_disk(tmp_path / "stored")
        stored = load_from_disk(tmp_path / "stored")
    else:
        pushed = dataset.with_format("arrow").map(embed_table_storage, batched=True)  # as `push_to_hub` does
        pushed.with_format(None).to_parquet(tmp_path / "stored.parquet")
        streaming = form == "streamed"
        stored = load_dataset(
            "parquet", data_files=str(tmp_path / "stored.parquet"), split="train", streaming=streaming
        )
    shutil.rmtree(tmp_path / "rows")
    for _ in range(2):  # a second reading finds the files of the first
        after = [VideoPreference.from_row(row) for row in undecoded(stored)]
        assert [without_paths(row) for row in after] == [without_paths(row) for row in before]
        assert sizes == [
            [(Path(clip.path).name, Path(clip.path).read_bytes()) for clip in row.timeline.clips] for row in after
        ]
    assert len([path for path in (tmp_path / "home" / "longvpo_hf" / "videos").rglob("*") if path.is_file()]) == 3


def test_no_name_of_stored_media_leaves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    rng = random.Random(0)
    given = [
        "..",
        ".",
        "",
        "/",
        "../../x.mp4",
        "/etc/passwd",
        "a\0b.mp4",
        "C:\\x.mp4",
        "..\\x",
        "\ud800.mp4",
        "é" * 200,
    ]
    given += ["".join(rng.choices("./\\\0\n\u202eaé\ud800", k=rng.randint(1, 40))) for _ in range(200)]
    for name in (*given, None, 3, b"x.mp4"):
        row = good_row()
        row["clips"] = [{**clip, "video": {"bytes": b"content", "path": name}} for clip in row["clips"]]
        for clip in VideoPreference.from_row(row).timeline.clips:
            path = Path(clip.path)
            assert path.read_bytes() == b"content", repr(name)
            folder = tmp_path / "home" / "longvpo_hf" / "videos"
            assert path.resolve().is_relative_to(folder), repr(name)
            assert len(path.relative_to(folder).parts) == 2, repr(name)


def test_undecoded_opens_no_decoder(written: tuple[Path, list[VideoPreference]], tmp_path: Path) -> None:
    dataset = load_dataset(str(written[0]), split="train", cache_dir=str(tmp_path))
    assert isinstance(dataset[0]["clips"][0]["video"], VideoDecoder)
    assert set(undecoded(dataset)[0]["clips"][0]["video"]) == {"path", "bytes"}
    plain = Dataset.from_list([{"prompt": "a"}])
    assert undecoded(plain) is plain


# --------------------------------------------------------------------------------------------------------- ids


def test_the_id_follows_from_the_content() -> None:
    clip = Clip("/somewhere/a.mp4", 0.0, 1.0)
    row = VideoPreference(Timeline((clip,)), "Why?", "yes", "no", (0,), (0,))
    moved = VideoPreference(Timeline((Clip("/elsewhere/a.mp4", 0.0, 1.0),)), "Why?", "yes", "no", (0,), (0,))
    assert row.id == moved.id, "the id does not depend on the machine's folders"
    others = [
        VideoPreference(Timeline((Clip("a.mp4", 0.0, 1.1),)), "Why?", "yes", "no", (0,), (0,)),
        VideoPreference(Timeline((clip, clip)), "Why?", "yes", "no", (0,), (0,)),
        VideoPreference(Timeline((clip,)), "Why", "yes", "no", (0,), (0,)),
        VideoPreference(Timeline((clip,)), "Why?", "no", "yes", (0,), (0,)),
        VideoPreference(Timeline((clip,)), "Why?", "yes", "no", (), (0,)),
        VideoPreference(Timeline((clip,)), "Why?", "yes", "no", (0,), ()),
    ]
    assert len({row.id, *(other.id for other in others)}) == 7


def test_the_id_is_the_same_whoever_made_the_row() -> None:
    """Whole seconds, lists and numbers of NumPy: a row keeps its id when it was stored and read."""
    clips = (Clip("a.mp4", 0.0, 1.0), Clip("b.mp4", 2.0, 3.0))
    row = VideoPreference(Timeline(clips), "Why?", "yes", "no", (1,), (1,))
    # As callers without a type checker have them.
    any_clip: Any = Clip
    any_timeline: Any = Timeline
    untyped: Any = VideoPreference
    made = untyped(
        any_timeline([any_clip(Path("a.mp4"), 0, 1), any_clip("b.mp4", np.float32(2), 3)]),
        "Why?",
        "yes",
        "no",
        [np.int64(1)],
        np.array([1]),
    )
    assert made == row
    assert made.id == row.id == VideoPreference.from_row(made.to_row(lambda clip: clip.path)).id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "question of a preference must be text, got NoneType"),
        ({"chosen": b"yes"}, "chosen of a preference must be text, got bytes"),
        ({"rejected": ["no"]}, "rejected of a preference must be text, got list"),
        ({"evidence": (1.0,)}, "evidence must be a whole number, got 1.0"),
        ({"evidence": 1}, "evidence must be whole numbers, got 1"),
        ({"timeline": [Clip("a.mp4", 0.0, 1.0)]}, "timeline of a preference must be a Timeline, got list"),
    ],
)
def test_what_is_no_preference_is_refused(change: dict[str, Any], message: str) -> None:
    good = {"timeline": Timeline((Clip("a.mp4", 0.0, 1.0),)), "question": "Why?", "chosen": "yes", "rejected": "no"}
    untyped: Any = VideoPreference
    with pytest.raises(ValueError, match=message):
        untyped(**{**good, **change})
    with pytest.raises(ValueError, match="A row must be a mapping of its fields, got list"):
        untyped.from_row([change])


def test_the_reference_view() -> None:
    timeline = Timeline(tuple(Clip("a.mp4", i, i + 1) for i in range(3)))
    assert VideoPreference(timeline, "q", "a", "b", reference=(2, 0)).reference_view == View.only([0, 2])
    assert VideoPreference(timeline, "q", "a", "b", evidence=(1,)).reference_view == View.whole()


# ---------------------------------------------------------------------------------------------------- bad rows


SYSTEM = {"role": "system", "content": "Be brief."}


def good_row() -> dict[str, Any]:
    clips = [{"file_name": f"{i}.mp4", "start_seconds": 0.0, "end_seconds": 2.0} for i in range(2)]
    return {
        "id": "r17",
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "clips": clips,
        "evidence": [0],
        "reference": [],
    }


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the field that `path` names, but for its last member, to that last member."""

    def change(row: dict[str, Any]) -> None:
        place: Any = row
        for step in path[:-2]:
            place = place[step]
        place[path[-2]] = path[-1]

    return change


def test_messages_before_the_question_come_through() -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    row = {**good_row(), "prompt": [SYSTEM, *turns, *good_row()["prompt"]]}
    read = VideoPreference.from_row(row)
    assert (read.question, [message.role for message in read.context]) == ("Why?", ["system", "user", "assistant"])
    assert read.to_row(lambda clip: clip.path)["prompt"] == read.prompt == row["prompt"]
    # Rows without them keep the ids they have; rows with them are others.
    bare = VideoPreference.from_row({**good_row(), "id": ""})
    assert bare.id == "a0b9cbc333501f757bbdc4c4"
    assert replace(bare, context=read.context, id="").id != bare.id


def test_the_good_row_is_good() -> None:
    row = VideoPreference.from_row(good_row())
    assert (row.id, row.question, row.chosen, row.rejected, row.evidence) == ("r17", "Why?", "yes", "no", (0,))
    assert VideoPreference.from_row({**good_row(), "evidence": None, "provenance": None}).evidence == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("prompt", "Why?"), r"row r17: prompt must be a list of messages .*last has the role 'user', got 'Why\?'"),
        (put("prompt", []), "row r17: prompt must be a list of messages"),
        (put("prompt", 0, "role", "system"), "row r17: prompt must be .*the role 'user'"),
        (put("prompt", [*good_row()["prompt"], *good_row()["chosen"]]), "row r17: prompt must be .*the role 'user'"),
        (put("prompt", [{"role": "tool", "content": "x"}, *good_row()["prompt"]]), "message 0 of .*'tool'.*row r17"),
        (put("prompt", [*good_row()["prompt"], SYSTEM, *good_row()["prompt"]]), "message 1 of .*'system'.*row r17"),
        (
            put("chosen", [*good_row()["chosen"], *good_row()["prompt"], *good_row()["chosen"]]),
            "row r17: chosen must be",
        ),
        (put("prompt", 0, "content", None), "row r17: prompt must be"),
        (put("prompt", 0, "content", "  \n"), r"question of a preference is empty \(row r17\); drop the row"),
        (put("chosen", None), "row r17: chosen must be .*the role 'assistant', got None"),
        (put("chosen", 0, "content", ""), r"chosen of a preference is empty \(row r17\)"),
        (put("chosen", 0, "content", "no"), r"chosen and rejected are the same, 'no' \(row r17\)"),
        (put("rejected", [{"role": "user", "content": "no"}]), "row r17: rejected must be .*the role 'assistant'"),
        (put("rejected", 0, "content", " "), r"rejected of a preference is empty \(row r17\)"),
        (put("clips", []), r"row r17: clips must be a list of at least one clip, got \[\]"),
        (put("clips", None), "row r17: clips must be a list of at least one clip, got None"),
        (put("clips", 1, "b.mp4"), r"row r17: clips\[1\] must have file_name or video, .* got 'b.mp4'"),
        (put("clips", 1, "file_name", None), r"row r17: clips\[1\].file_name must be a path .* got NoneType"),
        (put("clips", 1, "file_name", ""), r"row r17: clips\[1\]: A clip needs the path of its source file"),
        (put("clips", 1, "video", {"path": None, "bytes": b""}), r"row r17: clips\[1\].video must be a path"),
        (put("clips", 0, "end_seconds", None), r"row r17: clips\[0\].end_seconds must be a number, got None"),
        (put("clips", 0, "end_seconds", 0.0), r"row r17: clips\[0\]: .* end_seconds must be > start_seconds = 0.0"),
        (put("clips", 0, "start_seconds", "0"), r"row r17: clips\[0\].start_seconds must be a number, got '0'"),
        (put("clips", 0, "start_seconds", -1.0), r"row r17: clips\[0\]: start_seconds of a clip must be .* got -1.0"),
        (put("evidence", [2]), r"evidence \(row r17\) must be in \[0, 2\), got 2"),
        (put("evidence", 0), "row r17: evidence must be a list of whole numbers, got 0"),
        (put("reference", [-1]), r"reference \(row r17\) must be in \[0, 2\), got -1"),
        (put("reference", [0.5]), r"row r17: reference must be a list of whole numbers, got \[0.5\]"),
        (
            put("provenance", {"recipes": "x"}),
            r"row r17: provenance must have no other fields than \['method'.*'recipes'",
        ),
        (put("provenance", "x"), "row r17: provenance must have"),
    ],
)
def test_a_bad_row_is_named_with_its_field(change: Callable[[dict[str, Any]], None], message: str) -> None:
    row = copy.deepcopy(good_row())
    change(row)
    with pytest.raises(ValueError, match=f"^{message}"):
        VideoPreference.from_row(row)


def test_a_decoded_video_is_the_file_that_it_was_decoded_from(videos: list[str]) -> None:
    """As streams give them after `map` and `filter`."""
    features = Features(
        {"clips": List({"video": Video(), "start_seconds": Value("float64"), "end_seconds": Value("float64")})}
    )
    clips = [{"video": videos[0], "start_seconds": 0.0, "end_seconds": 1.0}]
    dataset = Dataset.from_dict({"clips": [clips]}, features=features)
    decoded = dataset[0]
    assert isinstance(decoded["clips"][0]["video"], VideoDecoder)
    for row in (decoded, undecoded(dataset)[0]):
        assert VideoPreference.from_row({**good_row(), **row}).timeline.clips[0].path == videos[0]
    with pytest.raises(ValueError, match=r"row r17: clips\[0\].video must be a path or a Video, got float\."):
        VideoPreference.from_row({**good_row(), "clips": [{**clips[0], "video": 1.5}]})
