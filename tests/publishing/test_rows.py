"""`longvpo rows`: merged, filtered, split and sampled datasets keep rows, ids, media and records."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from cli import longvpo
from longvpo_hf.preference import Provenance, VideoPreference
from longvpo_hf.publishing.dataset import DatasetWriter, add_preview
from longvpo_hf.publishing.rows import RowsFolder, answer_sources, hang_together
from longvpo_hf.record import DatasetRecord, MethodRecord, read_record
from longvpo_hf.record import Source as Model
from longvpo_hf.timeline import Clip, Timeline


def write(folder: Path, rows: list[VideoPreference], method: str, media_root: Path | None = None) -> Path:
    with DatasetWriter(folder, media_root) as writer:
        for row in rows:
            writer.add(replace(row, provenance=Provenance(method=method)))
        models = {"answers": Model(f"model of {method}")}
        writer.write_record(DatasetRecord(method, (MethodRecord(method, citation=f"@{method}"),), models, seed=3))
    return folder


def named(clips: dict[str, Clip]) -> dict[str, Clip]:
    """The clips with a source each."""
    return {name: replace(clip, source_id=f"film-{name}") for name, clip in clips.items()}


def about(clips: dict[str, Clip], names: str, anchor: int, question: str = "What is it?") -> VideoPreference:
    timeline = Timeline(tuple(clips[name] for name in names.split()))
    return VideoPreference(timeline, question, "one two three", "one", evidence=(anchor,), reference=(anchor,))


@pytest.fixture
def some(clips: dict[str, Clip]) -> list[VideoPreference]:
    """Ten rows: one question of each clip, and more, as anchor and as distractor."""
    mine = named(clips)
    return [
        about(mine, "red green", 0),
        about(mine, "red blue", 0, "And what else?"),
        about(mine, "green red", 0),
        about(mine, "blue white", 0),
        about(mine, "white red", 0),
        about(mine, "white blue", 0, "Which one?"),
    ]


def ids(folder: Path) -> list[str]:
    return [str(name) for name in pq.read_table(folder / "train.parquet").column("id").to_pylist()]


def test_previews_come_along_where_all_rows_have_one(tmp_path: Path, some: list[VideoPreference]) -> None:
    first, second = write(tmp_path / "a", some[:4], "one"), write(tmp_path / "b", some[4:], "two")
    add_preview(first)
    for words, expected in ((["sample", str(first), "--num-rows", "3"], 3), (["merge", str(first), str(second)], 0)):
        assert longvpo(["rows", *words, "--output", str(tmp_path / words[0])]).exit_code == 0
        rows = pq.read_table(tmp_path / words[0] / "train.parquet").to_pylist()
        shown = [row["preview_file_name"] for row in rows if "preview_file_name" in row]
        assert len(shown) == expected
        assert shown == [row["clips"][row["evidence"][0]]["file_name"] for row in rows][:expected]


def test_merge_keeps_each_row_once_and_shares_media(tmp_path: Path, some: list[VideoPreference]) -> None:
    first, second = write(tmp_path / "a", some[:4], "one"), write(tmp_path / "b", some[2:], "two")
    result = longvpo(["rows", "merge", str(first), str(second), "--output", str(tmp_path / "both")])
    assert result.exit_code == 0, result.output
    assert "6 of 8 rows" in result.stdout
    assert "duplicate_row 2" in result.stdout
    assert ids(tmp_path / "both") == list(dict.fromkeys([*ids(first), *ids(second)]))
    assert len(list((tmp_path / "both" / "clips").rglob("*.mp4"))) == 4
    record = read_record(tmp_path / "both", DatasetRecord)
    assert record is not None
    assert [(method.name, method.num_rows, method.citation) for method in record.methods] == [
        ("one", 4, "@one"),
        ("two", 2, "@two"),
    ]
    assert {model.name for model in record.models.values()} == {"model of one", "model of two"}
    assert record.num_rows == 6
    assert record.seed is None
    rows = load_dataset(str(tmp_path / "both"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 6


def test_filter_names_each_reason(tmp_path: Path, some: list[VideoPreference]) -> None:
    close = replace(some[5], chosen="one two", rejected="two three", id="")
    folder = write(tmp_path / "a", [*some[:5], close], "one")
    (tmp_path / "bench.txt").write_text("film-green\n", encoding="utf-8")
    (tmp_path / "drop.txt").write_text(ids(folder)[0] + "\n", encoding="utf-8")

    def left(*options: str) -> tuple[list[int], str]:
        result = longvpo(["rows", "filter", str(folder), "--output", str(tmp_path / "out"), *options])
        assert result.exit_code == 0, result.output
        return [ids(folder).index(row) for row in ids(tmp_path / "out")], result.stdout

    assert left("--max-length-ratio", "2")[0] == [5]
    for wrong in ("0.5", "-1", "nan"):
        refused = longvpo(["rows", "filter", str(folder), "--output", str(tmp_path / "x"), "--max-length-ratio", wrong])
        assert "must be ≥ 1" in refused.stderr
    assert left("--max-rows-per-source", "1")[0] == [0, 2, 3, 4]
    assert left("--drop-ids", str(tmp_path / "drop.txt"))[0] == [1, 2, 3, 4, 5]
    (tmp_path / "drop.txt").write_text(f"{ids(folder)[0]}\nabsent,1\n", encoding="utf-8")
    kept, said = left("--drop-ids", str(tmp_path / "drop.txt"))
    assert kept == [1, 2, 3, 4, 5]
    assert "1 of the 2 ids in" in said
    assert "'absent,1'" in said
    for content in (b"", b" \n", b"\xff\xfea\0"):
        (tmp_path / "wrong").write_bytes(content)
        words = ["rows", "filter", str(folder), "--output", str(tmp_path / "x"), "--drop-ids", str(tmp_path / "wrong")]
        assert "wrong names no row." in (stderr := longvpo(words).stderr) or "is no text in UTF-8" in stderr
    kept, said = left("--benchmark-videos", f"Bench={tmp_path / 'bench.txt'}")
    assert kept == [1, 3, 4, 5]
    assert "benchmark_video 2" in said
    assert left("--method", "one")[0] == [0, 1, 2, 3, 4, 5]
    result = longvpo(["rows", "filter", str(folder), "--output", str(tmp_path / "none"), "--method", "other"])
    assert result.exit_code == 2
    assert "No row is left" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", [["split"], ["sample", "--num-rows", "1"], ["filter"], ["merge"]])
@pytest.mark.parametrize("place", ["a/new", "a/b/c", "a"])
def test_no_dataset_is_written_into_another(
    tmp_path: Path, some: list[VideoPreference], words: list[str], place: str
) -> None:
    folder = write(tmp_path / "a", some, "one")
    before = sorted(tmp_path.rglob("*"))
    read = [str(folder), str(folder)] if words == ["merge"] else [str(folder)]
    result = longvpo(["rows", words[0], *read, *words[1:], "--output", str(tmp_path / place)])
    assert result.exit_code == 2
    assert re.search("lies in the dataset|is a dataset that is read", result.stderr)
    assert sorted(tmp_path.rglob("*")) == before


def test_split_never_asks_about_a_source_on_both_sides(tmp_path: Path, some: list[VideoPreference]) -> None:
    folder = write(tmp_path / "a", some, "one")
    for seed in range(6):
        output = tmp_path / f"split{seed}"
        result = longvpo(["rows", "split", str(folder), "--output", str(output), "--seed", str(seed), "--strict"])
        assert result.exit_code == 0, result.output
        sides = {
            side: list(RowsFolder(output / side).rows(lambda name, error: pytest.fail(error)))
            for side in ("train", "test")
        }
        asked = {side: frozenset().union(*map(answer_sources, rows)) for side, rows in sides.items()}
        assert not asked["train"] & asked["test"]
        shown = {clip.source_id for row in sides["train"] for clip in row.timeline.clips}
        assert not shown & asked["test"]
        assert sides["test"]


def test_split_without_strict_keeps_every_row(tmp_path: Path, some: list[VideoPreference]) -> None:
    folder = write(tmp_path / "a", some, "one")
    result = longvpo(["rows", "split", str(folder), "--output", str(tmp_path / "out"), "--test-share", "0.3"])
    assert result.exit_code == 0, result.output
    assert sorted(ids(tmp_path / "out" / "train") + ids(tmp_path / "out" / "test")) == sorted(ids(folder))
    audit = longvpo(["audit", str(tmp_path / "out" / "train"), "--evaluation", str(tmp_path / "out" / "test")])
    assert "both ask about 0 sources and have 0 rows in common" in audit.stdout


def test_sample_follows_from_its_seed(tmp_path: Path, some: list[VideoPreference]) -> None:
    folder = write(tmp_path / "a", some, "one")
    drawn = []
    for name, seed in (("a1", "1"), ("a2", "1"), ("b", "2")):
        words = ["rows", "sample", str(folder), "--output", str(tmp_path / name), "--num-rows", "3", "--seed", seed]
        assert longvpo(words).exit_code == 0
        drawn.append(ids(tmp_path / name))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3
    result = longvpo(["rows", "sample", str(folder), "--output", str(tmp_path / "c"), "--num-rows", "7"])
    assert "at most the number of different rows, 6, got 7" in result.stderr


def test_rows_by_reference_stay_by_reference(tmp_path: Path, some: list[VideoPreference]) -> None:
    root = Path(some[0].timeline.clips[0].path).parent
    folder = write(tmp_path / "a", some, "one", media_root=root)
    words = ["rows", "sample", str(folder), "--output", str(tmp_path / "b"), "--num-rows", "2"]
    refused = longvpo(words)
    assert refused.exit_code == 2
    assert "--video-root" in refused.stderr
    assert longvpo([*words, "--video-root", str(root)]).exit_code == 0
    assert not (tmp_path / "b" / "clips").exists()
    record = read_record(tmp_path / "b", DatasetRecord)
    assert record is not None
    assert record.by_reference


def test_refusals(tmp_path: Path, some: list[VideoPreference]) -> None:
    folder = write(tmp_path / "a", some, "one")
    for words, said in (
        (["merge", str(folder), "--output", str(tmp_path / "b")], "at least two"),
        (["merge", str(folder), str(folder), "--output", str(folder)], "is a dataset that is read"),
        (["filter", str(tmp_path), "--output", str(tmp_path / "b")], "is no preference dataset"),
        (["split", str(folder), "--output", str(tmp_path / "b"), "--test-share", "1"], "between 0 and 1"),
    ):
        result = longvpo(["rows", *words])
        assert result.exit_code == 2, result.output
        assert said in result.stderr


def test_hang_together_by_hand() -> None:
    assert hang_together([["a"], ["b"], ["a", "c"], ["d"], ["c", "d"]]) == [0, 1, 0, 0, 0]
