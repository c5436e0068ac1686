"""Malformed records: each a drop with its file and place, whatever is wrong with it, and never the end of the run."""

from __future__ import annotations

import csv
import io
import json
import random
import signal
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpora import drops, llava_list, llava_record, read, write, write_jsonl
from longvpo_hf.errors import ConfigError, CorpusError
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake import IntakeLimits, Source, parquet
from longvpo_hf.intake.record_files import read_records
from longvpo_hf.intake.records import BadRecord, Record


def places(path: Path, limits: IntakeLimits | None = None) -> list[tuple[str, Any]]:
    """Each record of a file: its place, and its fields or the reason that it was dropped for."""
    found = []
    for item in read_records(path, limits):
        if isinstance(item, Dropped):
            assert item.path == str(path)
            found.append((item.detail.split(":")[0], item.reason))
        else:
            found.append((item.place, dict(item.fields)))
    return found


# ---------------------------------------------------------------------------------------------------- instances by file

GOOD = b'{"a": 1}'
BAD = [
    b'{"a": 1,}',
    b'{"a": 1',
    b'{"a"}',
    b"nonsense",
    b"7",
    b'"a string"',
    b"[1, 2]",
    b"null",
    b'{"a": "\xff"}',  # not UTF-8
    b'{"a": ' + b"[" * 3_000 + b"]" * 3_000 + b"}",
    b'{"a": ' + b"9" * 5_000 + b"}",
    b'"{\\"a\\": 1}"',  # JSON in JSON
    b'{"a": "\t"}',
]
#: Of a list, a missing brace takes the rest with it; what is not UTF-8 costs the record that needs it, as it is read.
LINES_ONLY = (b'{"a": 1', b'{"a": "\xff"}')


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_costs_itself(tmp_path: Path, bad: bytes) -> None:
    path = write(tmp_path / "x.jsonl", b"\n".join([GOOD, bad, GOOD]))
    assert places(path) == [("line 1", {"a": 1}), ("line 2", "bad_record"), ("line 3", {"a": 1})]


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad not in LINES_ONLY])
def test_a_bad_member_of_a_list_costs_itself(tmp_path: Path, bad: bytes) -> None:
    path = write(tmp_path / "x.json", b"[" + b", ".join([GOOD, bad, GOOD]) + b"]")
    assert places(path) == [("record 0", {"a": 1}), ("record 1", "bad_record"), ("record 2", {"a": 1})]


def test_half_characters_cost_the_record_that_needs_them(tmp_path: Path) -> None:
    records = [
        {"file_name": "a.mp4", "caption": "half \ud800", "other": "x"},
        {"file_name": "b.mp4", "caption": "whole", "other": "\udfff"},
    ]
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / "root" / name, name)
    write_jsonl(tmp_path / "root" / "metadata.jsonl", records)
    first, second, dropped = read("videofolder", tmp_path / "root")
    assert [item.caption for item in (first, second) if isinstance(item, Source)] == ["", "whole"]
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "bad_record"
    assert "line 1: field 'caption' has half a character" in dropped.detail
    json.dumps(dropped.detail).encode("utf-8")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_passed_over(tmp_path: Path, suffix: str) -> None:
    content = {
        ".jsonl": b'{"a": "1"}\n\xef\xbb\xbf{"a": "2"}\n',
        ".json": b'[{"a": "1"}, {"a": "2"}]',
        ".csv": b"a\n1\n2\n",
    }
    path = write(tmp_path / f"x{suffix}", b"\xef\xbb\xbf" + content[suffix])
    assert [fields for _, fields in places(path)] == [{"a": "1"}, {"a": "2"}]
    utf_16 = write(tmp_path / f"y{suffix}", content[suffix].decode("utf-8").encode("utf-16"))
    assert [reason for _, reason in places(utf_16)] == ["bad_record"]


def test_nan_costs_only_the_field_that_it_is_in() -> None:
    record = Record("f", "r", json.loads('{"start": NaN, "end": Infinity, "caption": "c"}'))
    assert record.text("caption") == "c"
    for name in ("start", "end"):
        with pytest.raises(BadRecord, match=f"field '{name}' must be seconds"):
            record.seconds(name)


@pytest.mark.parametrize(
    "value", ["9" * 400 + ":00:00", "1:" + "0" * 5_000, "9" * 20, 10**400, 1e300, -(10**400), "1:2:3:4"]
)
def test_impossible_times_are_no_times(value: object) -> None:
    with pytest.raises(BadRecord, match=r"^f, r: field 't' must be seconds or a time") as raised:
        Record("f", "r", {"t": value}).seconds("t")
    assert len(str(raised.value)) < 500


def test_csv_whose_fields_do_not_fit_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "file_name,caption\na.mp4,A dog, running\nb.mp4\nc.mp4,c\n")
    assert places(path) == [
        ("line 2", "bad_record"),
        ("line 3", {"file_name": "b.mp4"}),
        ("line 4", {"file_name": "c.mp4", "caption": "c"}),
    ]


def test_parquet_rows_that_python_cannot_hold(tmp_path: Path) -> None:
    text = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    times = pa.array([0, 0, 2**62], pa.timestamp("s"))
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"t": text, "when": times.cast(pa.int64())}), path)
    assert [place for place, value in places(path) if value == "bad_record"] == ["row 1"]
    assert [value["t"] for _, value in places(path) if value != "bad_record"] == ["a", "c"]


def test_of_a_damaged_parquet_file_the_good_row_groups_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rng = random.Random(0)
    rows = [{"n": i, "text": rng.randbytes(40).hex()} for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    found = places(path)
    assert [value["n"] for _, value in found if value != "bad_record"] == [*range(100), *range(200, 300)]
    assert [place for place, value in found if value == "bad_record"] == ["rows 100 to 199"]


BREAKING = """
import os, sys
sys.path.append(sys.argv[1])
from longvpo_hf.intake import parquet
rows_of = parquet._group
def group(file, index, *rest):
    if index == 1:
        os.kill(os.getpid(), {signal})
    return rows_of(file, index, *rest)
parquet._group = group
parquet.serve(int(sys.argv[2]))
"""


def read_by(program: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """`places` of a Parquet file of three row groups, where its reading process runs this program."""
    pq.write_table(pa.table({"n": list(range(6))}), path, row_group_size=2)
    monkeypatch.setattr(parquet, "_PROGRAM", program)
    monkeypatch.setattr(parquet._Reader, "_idle", [])
    return places(path)


def test_a_row_group_that_ends_the_process_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_by(BREAKING.format(signal=int(signal.SIGSEGV)), tmp_path / "x.parquet", monkeypatch)
    assert [place for place, value in found if value == "bad_record"] == ["row group 1"]
    assert [value["n"] for _, value in found if value != "bad_record"] == [0, 1, 4, 5]


def test_a_process_that_is_killed_from_outside_costs_nothing_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CorpusError, match=r"ended from outside \(signal 9\)"):
        read_by(BREAKING.format(signal=int(signal.SIGKILL)), tmp_path / "x.parquet", monkeypatch)


def test_one_process_reads_one_file_after_another_and_ends_when_nobody_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": list(range(6))}), path, row_group_size=2)
    list(read_records(path))
    readers = psutil.Process().children()
    for _ in range(3):
        list(read_records(path))
    assert psutil.Process().children() == readers
    unfinished = read_records(path)
    next(unfinished)
    assert len(psutil.Process().children()) == len(readers)
    unfinished.close()
    assert len(psutil.Process().children()) == len(readers) - 1
    (tmp_path / "y.parquet").write_bytes(b"PAR1 but nothing else PAR1")
    assert len(places(tmp_path / "y.parquet")) == 1


# ------------------------------------------------------------------------------------------- as a reader passes them on


def test_each_malformed_record_is_named_with_its_place(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    for i in range(4):
        write(root / f"{i}.mp4", str(i))
    good = [llava_record(f"{i}.mp4", f"caption {i}", f"id{i}") for i in range(4)]
    bad: list[dict[str, Any]] = [
        {**good[0], "video": 3},
        {**good[0], "conversations": []},
        {"id": "x"},
        {**good[0], "video": "\udc80"},
    ]
    lines = [json.dumps(item) for pair in zip(good, bad, strict=True) for item in pair]
    lines.insert(3, "{broken")
    write(root / "x_cap.jsonl", "\n".join(lines))
    found = read("llava-video", root)
    assert [item.source_id for item in found if isinstance(item, Source)] == ["id0", "id1", "id2", "id3"]
    assert [(item.reason, item.path, item.detail.split(":")[0]) for item in drops(found)] == [
        ("bad_record", str(root / "x_cap.jsonl"), f"line {number}") for number in (2, 4, 5, 7, 9)
    ]


def test_a_bad_scene_of_a_film_costs_itself(tmp_path: Path) -> None:
    root = tmp_path / "vript"
    data = {}
    for number in (1, 2, 3):
        write(root / f"v-Scene-00{number}.mp4", str(number))
        caption = {"content": f"scene {number}"} if number != 2 else {"content": 7}
        data[f"v-Scene-00{number}"] = {"video_id": "v", "caption": caption}
    write_jsonl(root / "x_captions.jsonl", [{"meta": {}, "data": data}])
    first, dropped, third = read("vript", root)
    assert [item.caption for item in (first, third) if isinstance(item, Source)] == ["scene 1.", "scene 3."]
    assert isinstance(dropped, Dropped)
    assert "line 1: field 'data.v-Scene-002.caption.content' must be a str, got int 7" in dropped.detail


def test_more_than_the_bound_ends_the_run(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    write(root / "a.mp4", b"a")
    write_jsonl(root / "x_cap.jsonl", [llava_record("a.mp4"), *([{"id": 1}] * 5)])
    assert len(drops(read("llava-video", root, IntakeLimits(max_bad_records=5)))) == 5
    message = (
        r"x_cap\.jsonl, line 6: field 'id' must be a str, got int 1.* More than max_bad_records=4 .*is this llava-video"
    )
    with pytest.raises(CorpusError, match=message):
        read("llava-video", root, IntakeLimits(max_bad_records=4))


def test_a_corpus_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    write_jsonl(root / "x_cap.jsonl", [{"a": 1}])
    with pytest.raises(
        CorpusError, match=r"x_cap\.jsonl, line 1: field 'id' is missing.* None of the videos of .*llava"
    ):
        read("llava-video", root)


def test_files_of_macos_are_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    write(root / "a.mp4", b"a")
    write(root / "._x_cap.json", b"\0\5\x16\7")
    write(root / "__MACOSX" / "._a.mp4", b"\0")
    llava_list(root / "x_cap.json", llava_record("a.mp4"))
    found = read("llava-video", root)
    assert len(found) == 2
    assert [(item.reason, item.path) for item in drops(found)] == [("macos_file", str(root / "._x_cap.json"))]


@pytest.mark.parametrize(("name", "value"), [("max_bad_records", -1), ("max_record_bytes", 0), ("max_expansion", 0.5)])
def test_limits_that_do_not_fit(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be ≥ [01], got "):
        IntakeLimits(**{name: value})


# ----------------------------------------------------------------------------------------------------- random instances

TOKENS = [
    '"',
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "a",
    "1",
    "-",
    ".",
    "e",
    "true",
    "null",
    "NaN",
    " ",
    "\t",
    "é",
    "\\u",
    "\\ud83d",
    "\0",
]


def jsonl_file(path: Path, records: list[str]) -> Path:
    return write(path.with_suffix(".jsonl"), "\n".join(records))


def list_file(path: Path, records: list[str]) -> Path:
    return write(path.with_suffix(".json"), "[" + ",\n".join(records) + "]")


@pytest.mark.parametrize("seed", range(10))
def test_random_garbage_costs_no_other_line(tmp_path: Path, seed: int) -> None:
    """Lines of random tokens among good ones: every good one is read, at its place, and every bad one is named."""
    rng = random.Random(seed)
    lines, good = [], {}
    for number in range(1, 60):
        if rng.random() < 0.5:
            good[f"line {number}"] = {"n": number, "text": "".join(rng.choices('ab"\\{}[],é\U0001f600', k=9))}
            lines.append(json.dumps(good[f"line {number}"], ensure_ascii=rng.random() < 0.5))
        else:
            lines.append("{" + "".join(rng.choices(TOKENS, k=rng.randint(1, 12))))
    found = places(jsonl_file(tmp_path / "x", lines))
    assert {place: value for place, value in found if isinstance(value, dict) and "n" in value} == good
    assert [place for place, _ in found] == [f"line {number}" for number in range(1, 60)]


def unclosed(text: str) -> bool:
    """Whether brackets or quotation marks of garbage do not close, so that it swallows what follows in its list."""
    depth, in_string, escaped = 0, False, False
    for character in text:
        if in_string:
            in_string, escaped = escaped or character != '"', not escaped and character == "\\"
        elif character == '"':
            in_string = True
        else:
            depth += (character in "[{") - (character in "]}")
            if depth < 0:
                return True
    return depth != 0 or in_string


@pytest.mark.parametrize("seed", range(10))
def test_random_garbage_in_a_list_costs_no_other_member(tmp_path: Path, seed: int) -> None:
    """The same in a list, where what follows can be told apart as long as brackets and quotation marks close."""
    rng = random.Random(seed)
    members, good = [], []
    for number in range(60):
        if rng.random() < 0.5:
            good.append({"n": number, "text": "".join(rng.choices('ab"\\{}[],é\U0001f600', k=9))})
            members.append(json.dumps(good[-1], ensure_ascii=rng.random() < 0.5))
        else:
            garbage = "".join(rng.choices(TOKENS, k=rng.randint(1, 12)))
            while unclosed(garbage) or not garbage.strip(" ,\t"):
                garbage = "".join(rng.choices(TOKENS, k=rng.randint(1, 12)))
            members.append(f"{{{garbage}}}")
    found = places(list_file(tmp_path / "x", members))
    assert [value for _, value in found if isinstance(value, dict) and "n" in value] == good


@pytest.mark.parametrize("seed", range(10))
def test_any_bytes_end_in_records_and_drops(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        table = pa.Table.from_pylist([{"a": "x" * 10, "b": 1}] * 50)
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        rows = io.StringIO()
        csv.writer(rows).writerows([["a", "b"]] + [["x,\"'\n", "y"]] * 50)
        content = bytearray(
            {
                ".jsonl": b'{"a": "x"}\n' * 50,
                ".json": b"[" + b'{"a": "x"}, ' * 50 + b"{}]",
                ".csv": rows.getvalue().encode(),
                ".parquet": buffer.getvalue(),
            }[suffix]
        )
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        for item in read_records(write(tmp_path / f"{seed}{suffix}", bytes(content))):
            assert isinstance(item, Record) or (isinstance(item, Dropped) and item.reason == "bad_record")
