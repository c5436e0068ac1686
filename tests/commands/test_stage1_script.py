"""`dataset_scripts/stage1.py`: from a folder of videos to a dataset, as its users call it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from torchcodec.encoders import VideoEncoder

from cli import result_of
from conftest import write_clip
from longvpo_hf.commands.build import stage1
from longvpo_hf.frames import FrameSampler
from longvpo_hf.intake.formats import from_reference
from longvpo_hf.preference import VideoPreference, undecoded
from pushes import ASKED, WHERE, pushed, watch_pushes
from scenes import same_files

SCRIPTS = Path(__file__).parents[2] / "dataset_scripts"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of 16 s in folders, and a file that is none."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(4):
        frames = torch.zeros(64, 3, 48, 64, dtype=torch.uint8)
        frames[:, number % 3] = torch.arange(64, dtype=torch.uint8)[:, None, None] * 3 + number
        path = root / ("ab"[number % 2]) / f"video-{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        VideoEncoder(frames, frame_rate=4).to_file(str(path), extra_options={"threads": 1})
    (root / "note.mp4").write_text("not a video")
    return root


def arguments(videos: Path, output: Path, *more: str) -> list[str]:
    return [
        "--corpus", "videofolder", "--source", str(videos), "--responder", "scripted", "--cutting", "windows",
        "--max-clip-seconds", "8", "--num-rows", "20", "--output", str(output), *more,
    ]  # fmt: skip


def test_a_rehearsal_makes_rows_that_open(videos: Path, tmp_path: Path, capsys) -> None:
    stage1.main(arguments(videos, tmp_path / "rows", "--judge", "scripted"))
    rows = undecoded(load_dataset(str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache")))
    assert len(rows) == 20
    preference = VideoPreference.from_row(rows[0])
    assert len(FrameSampler(64, fps=1)(preference.timeline)) >= 8
    assert 7.5 < preference.timeline.clips[0].duration_seconds < 8.5
    output = capsys.readouterr().out
    assert "5 sources" in output
    assert "8 clips" in output
    assert "1 unreadable" in output
    card = (tmp_path / "rows" / "README.md").read_text()
    assert "windows, 3 to 8 s" in card
    assert "not checked" in card
    assert "by tenth of the timeline" in card


def test_rows_by_reference_name_files_below_the_corpus(videos: Path, tmp_path: Path) -> None:
    stage1.main(arguments(videos, tmp_path / "rows", "--media", "reference"))
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["README.md", "longvpo.json", "train.parquet"]
    rows = load_dataset(str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache"))
    assert {clip["file_name"] for row in rows for clip in row["clips"]} <= {
        f"{'ab'[number % 2]}/video-{number}.mp4" for number in range(4)
    }
    located = from_reference(rows, videos)
    preference = VideoPreference.from_row(located[0])
    assert preference.reference == tuple(rows[0]["reference"])
    assert len(FrameSampler(64, fps=1)(preference.timeline)) >= 8
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match=r"row .*field clips\[0\].file_name: .* is not in video_root"):
        from_reference(rows, tmp_path / "elsewhere")
    escaped = rows.map(lambda row: {"clips": [{**clip, "file_name": "../x.mp4"} for clip in row["clips"]]})
    with pytest.raises(ValueError, match="leads elsewhere"):
        from_reference(escaped, videos)


def test_a_dry_run_asks_nothing_and_says_what_it_would_cost(videos: Path, tmp_path: Path, capsys) -> None:
    stage1.main(arguments(videos, tmp_path / "rows", "--dry-run"))
    assert not (tmp_path / "rows").exists()
    output = capsys.readouterr().out
    assert "rows              20" in output
    # 8 clips: at most 8 questions and 8 answers from anchors, and 20 from the others.
    assert "model calls       36: 8 questions" in output


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "-1"], "seed must be ≥ 0"),
        (["--seed", str(2**63)], "seed must be ≥ 0 and < 2^63"),
        (["--patience-seconds", "nan"], "--patience-seconds"),
        (["--patience-seconds", "-1"], "--patience-seconds"),
        (["--push-to-hub", "https://some.where/me/rows"], "--push-to-hub must be NAMESPACE/NAME"),
        (["--push-to-hub", "me/../rows"], "--push-to-hub must be NAMESPACE/NAME"),
        (["--responder", ""], "--responder is empty"),
        (["--writer", " "], "--writer is empty"),
        (["--output", "{videos}/rows"], "lies within --source"),
        (["--output", "{videos}/a/../b/rows"], "lies within --source"),
        (["--output", "{link}/rows"], "lies within --source"),
        (["--cache", "{videos}/cache"], "lies within --source"),
        (["--output", "{videos}"], "lies within --source"),
        (["--output", "{other}"], "is neither empty nor a dataset"),
        (["--output", "{other}/file"], "is neither empty nor a dataset"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_the_work(
    videos: Path, tmp_path: Path, more: list[str], message: str, dry_run: list[str]
) -> None:
    before = sorted(videos.rglob("*"))
    (tmp_path / "link").symlink_to(videos)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("somebody's")
    words = [word.format(videos=videos, link=tmp_path / "link", other=tmp_path / "other") for word in more]
    refused = result_of(lambda: stage1.main(arguments(videos, tmp_path / "rows", *words, *dry_run)))
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert sorted(videos.rglob("*")) == before
    assert not (tmp_path / "rows").exists()


def test_a_dry_run_looks_at_some_videos_and_counts_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        write_clip(tmp_path / "videos" / f"{number}.mp4", (20 * number, 100, 100))  # other content, the same length

    def told() -> list[str]:
        stage1.main(arguments(tmp_path / "videos", tmp_path / "rows", "--dry-run"))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("clips", "model", "looked"))]

    whole = told()
    assert whole[0].startswith("clips             6 of 4.0 s")
    monkeypatch.setattr("longvpo_hf.commands.build.videos._LOOKED_AT", 2)
    looked, *some = told()
    assert looked == "looked at         one of 3 videos; the others are taken to be like it"
    assert some == whole


def test_benchmark_videos_are_left_out_and_the_card_says_so(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("video-1\n")
    stage1.main(arguments(videos, tmp_path / "rows", "--benchmark-videos", f"MLVU={tmp_path / 'list.txt'}"))
    log = [json.loads(line) for line in (tmp_path / "rows.log" / "dropped.jsonl").read_text().splitlines()]
    assert [entry["path"].rpartition("/")[2] for entry in log if entry["reason"] == "benchmark_video"] == [
        "video-1.mp4"
    ]
    assert "MLVU (1 ids" in (tmp_path / "rows" / "README.md").read_text()
    sources = {clip["origin"]["source_id"] for row in pq.read_table(tmp_path / "rows" / "train.parquet").to_pylist()
               for clip in row["clips"]}  # fmt: skip
    assert not any("video-1" in source for source in sources)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--responder", "endpoint", "--model", "m"], "needs --base-url"),
        (["--responder", "endpoint", "--base-url", "http://127.0.0.1:9/v1"], "needs --model"),
    ],
)
def test_what_is_missing_is_said_at_once(videos: Path, tmp_path: Path, more, message) -> None:
    result = result_of(lambda: stage1.main(arguments(videos, tmp_path / "rows", *more)))
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_empty_corpus_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    result = result_of(lambda: stage1.main(arguments(tmp_path / "nothing", tmp_path / "rows")))
    assert result.exit_code == 2
    assert re.search(r"^stage1.py: .*nothing.*$", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


def test_killed_while_cutting_it_goes_on_with_the_same_result(videos: Path, tmp_path: Path) -> None:
    stage1.main(arguments(videos, tmp_path / "whole"))
    cut = arguments(videos, tmp_path / "cut", "--cache", str(tmp_path / "cache"))
    command = [sys.executable, str(SCRIPTS / "stage1.py"), *cut]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    clips = tmp_path / "cache" / "clips"
    while process.poll() is None and len(list(clips.rglob("*.mp4"))) < 3:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in clips.rglob("*.mp4")}
    stage1.main(cut)
    assert {path.name: path.stat().st_mtime_ns for path in clips.rglob("*.mp4")}.items() >= before.items()
    assert (tmp_path / "cut" / "train.parquet").read_bytes() == (tmp_path / "whole" / "train.parquet").read_bytes()


def test_shards_and_a_merge_write_what_one_run_writes(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the merge alone pushes it."""
    seen = watch_pushes(monkeypatch)
    stage1.main(arguments(videos, tmp_path / "one", "--cache", str(tmp_path / "cache")))
    assert seen == []
    sharded = arguments(videos, tmp_path / "many", "--cache", str(tmp_path / "cache"), *WHERE)
    for shard in ("1", "0"):
        assert not (tmp_path / "many").exists()
        stage1.main([*sharded, "--num-shards", "2", "--shard", shard])
    assert "Shard 0 of 2 has done its part" in capsys.readouterr().out
    assert seen == [ASKED, ASKED]
    stage1.main([*sharded, "--merge"])
    assert seen[2:] == [ASKED, pushed(tmp_path / "many")]
    same_files(tmp_path / "one", tmp_path / "many")
    stage1.main([*arguments(videos, tmp_path / "two", "--cache", str(tmp_path / "cache")), "--executor", "processes",
                 "--num-workers", "1"])  # fmt: skip
    same_files(tmp_path / "one", tmp_path / "two")


def test_a_shard_whose_corpus_lacks_a_file_names_it_and_what_others_made(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, fewer = tmp_path / "whole", tmp_path / "fewer"
    for folder in (whole, fewer):
        shutil.copytree(videos, folder)
        record = {"file_name": "b/video-1.mp4", "caption": "Greens that grow."}
        (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    (fewer / "b" / "video-1.mp4").unlink()
    for source, shard in ((whole, "0"), (fewer, "1")):
        stage1.main([*arguments(source, tmp_path / "rows", "--cache", str(tmp_path / "cache")),
                     "--num-shards", "2", "--shard", shard])  # fmt: skip
    said = capsys.readouterr().out.partition("Shard 1 of 2 has done its part. ")[2]
    assert "1 of 1 pieces are missing: cut-00000" in said
    assert "Of these, cut-00000 are there as made with" in said
    assert "The corpus here is without b/video-1.mp4 (missing_file)." in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "1"], "--num-shards and --shard belong together"),
        (["--num-shards", "2", "--shard", "2"], "shard must be in [0, num_shards=2), got 2"),
        (["--num-shards", "2", "--shard", "1", "--merge"], "leave out --shard"),
        (["--executor", "processes"], "--executor processes needs --num-workers ≥ 1, got 0"),
        (["--executor", "processes", "--merge"], "starts its own workers"),
        (["--address", "auto"], "--address is that of a Ray cluster: add --executor ray"),
    ],
)
def test_who_works_is_said_once(videos: Path, tmp_path: Path, options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        stage1.main(arguments(videos, tmp_path / "rows", *options))
    assert message in capsys.readouterr().err


def test_a_corpus_that_moved_keeps_its_finished_work(videos: Path, tmp_path: Path) -> None:
    """Rows by reference name files below the corpus, and so does all that is kept."""
    more = ("--media", "reference", "--cache", str(tmp_path / "cache"), "--num-shards", "1", "--shard", "0")
    output, kept = tmp_path / "rows", []
    shutil.copytree(videos, tmp_path / "here")
    for name in ("here", "there"):
        if name == "there":
            (tmp_path / "here").rename(tmp_path / "there")
        stage1.main(arguments(tmp_path / name, output, *more))
        stage1.main(arguments(tmp_path / name, output, *more[:4], "--merge"))
        job = {str(path): path.stat().st_ino for path in (tmp_path / "rows.job").rglob("*") if path.is_file()}
        kept.append((job, (output / "train.parquet").read_bytes()))
    assert kept[0] == kept[1]
    assert len(kept[0][0]) > 3


@pytest.fixture(scope="module")
def odd(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora of one video each, with a record or a container that a bound may be too small for."""
    root = tmp_path_factory.mktemp("odd")
    content = (videos / "a" / "video-0.mp4").read_bytes()
    for name in ("folder", "finevideo", "llava", "same"):
        (root / name).mkdir()
    for name in ("folder", "same"):
        (root / name / "a.mp4").write_bytes(content)
    records = [{"file_name": "a.mp4", "caption": "c" * 200}, {"file_name": "b.mp4", "caption": 3}]
    (root / "folder" / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    row = {"mp4": content, "json": {"original_video_filename": "a.mp4", "content_metadata": {"scenes": []}}}
    pq.write_table(pa.Table.from_pylist([row]), root / "finevideo" / "a.parquet")
    turns = [{"from": "gpt", "value": "c"}]
    (root / "llava" / "x_cap.json").write_text(json.dumps([{"id": "i", "video": "a.mp4", "conversations": turns}]))
    with zipfile.ZipFile(root / "llava" / "x.zip", "w") as archive:
        archive.writestr("a.mp4", content)
    pq.write_table(pa.table({"file_name": pa.nulls(2**20 + 1)}), root / "same" / "metadata.parquet")
    return root


@pytest.mark.parametrize(
    ("corpus", "folder", "option", "value", "message"),
    [
        ("videofolder", "folder", "--max-bad-records", "0", "More than max_bad_records=0 records"),
        ("videofolder", "folder", "--max-record-bytes", "150", "line 1: longer than max_record_bytes=150"),
        ("videofolder", "folder", "--max-frame-px", "100", "more than max_frame_px=100"),
        ("videofolder", "folder", "--max-frame-seconds", "0.1", "more than max_frame_seconds=0.1"),
        ("finevideo", "finevideo", "--max-row-bytes", "900", "over max_row_bytes=900"),
        ("finevideo", "finevideo", "--max-index-bytes", "90", "over max_index_bytes=90"),
        ("llava-video", "llava", "--max-video-bytes", "900", "exceeds max_video_bytes"),
        ("llava-video", "llava", "--max-index-bytes", "9", "over max_index_bytes=9"),
        ("videofolder", "same", "--max-expansion", "5", "over max_expansion=5 rows a byte"),
    ],
)
def test_each_bound_is_an_option_that_holds(
    odd: Path, tmp_path: Path, corpus: str, folder: str, option: str, value: str, message: str
) -> None:
    words = ["--corpus", corpus, "--source", str(odd / folder), "--responder", "scripted", "--cutting", "windows"]
    words += ["--num-rows", "2", "--output", str(tmp_path / "rows"), "--cache", str(tmp_path / "cache"), "--dry-run"]
    if option == "--max-row-bytes":
        words += ["--max-record-bytes", "100"]  # rows that are smaller are read many at a time, and none is too large

    result = result_of(lambda: stage1.main([*words, option, value]))
    drops = "".join(path.read_text() for path in sorted(tmp_path.rglob("dropped.jsonl")))
    assert message in result.output + drops
