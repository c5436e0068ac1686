"""What is in a corpus is counted before anything is decoded; scenes that are files of their own make up their film."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from corpora import contents, drops, llava_list, llava_record, sources, write, write_jsonl, write_tar, write_zip
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake import (
    BenchmarkVideos,
    CorpusSurvey,
    CuttingSettings,
    IntakeLimits,
    Source,
    clips_of,
    read_corpus,
)
from longvpo_hf.timeline import Clip
from media import write_video


def survey(corpus: str, root: Path, benchmarks: BenchmarkVideos | None = None) -> CorpusSurvey:
    return CorpusSurvey(corpus, root, root.parent / "cache", IntakeLimits(), benchmarks)


def test_a_survey_counts_what_is_there_and_gives_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("a.mp4", "x/b.mp4", "y/b.mp4", "c.gif", "D.MP4", "e.GIF", "ytb_fFjv93ACGo8.mp4"):
        write(root / name, name)
    names = ["a.mp4", "b.mp4", "gone.mp4", "D.MP4"]
    write_jsonl(root / "metadata.jsonl", [*({"file_name": name, "caption": name} for name in names), {"caption": "?"}])
    lists = {"Video-MME": write(tmp_path / "v.txt", "fFjv93ACGo8\nother-0000"), "MLVU": write(tmp_path / "m.txt", "z")}
    found = survey("videofolder", root, BenchmarkVideos.from_files(lists))
    report = found.report
    assert (report.num_videos, report.num_films, report.num_captioned, report.num_in_benchmarks) == (5, 5, 2, 1)
    assert [str(matches) for matches in report.benchmarks] == ["Video-MME 1 of 2 ids", "MLVU 0 of 1 ids"]
    assert report.dropped == {"unknown_suffix": 2, "ambiguous_name": 1, "missing_file": 1, "bad_record": 1}
    assert report.unknown_suffixes == {".gif": 2}
    text = "\n".join(report.lines())
    for expected in (
        "corpus            videofolder: 5 videos",
        "captions          2 of 5 videos have one",
        "benchmarks        1 videos are in one and left out: Video-MME 1 of 2 ids; MLVU 0 of 1 ids",
        "left out          1 missing_file: ",
        "gone.mp4",
        "left out          1 ambiguous_name: ",
        "b.mp4: fits 2 different files: 'x/b.mp4', 'y/b.mp4'",
        "left out          1 bad_record: ",
        f"{root / 'metadata.jsonl'}: line 5: field 'file_name' is missing",
        "unknown suffixes  .gif 2",
    ):
        assert expected in text
    # It can be gone through more than once, and gives what the reader gives.
    items = list(read_corpus("videofolder", root, tmp_path / "cache"))
    assert list(found) == items
    assert list(found) == items


def test_a_survey_reads_archives_once_and_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "llava"
    write_zip(root / "x.zip", {"a.mp4": b"not a video", "b.mp4": b"neither"})
    llava_list(root / "x_cap.json", llava_record("a.mp4"), llava_record("b.mp4"), llava_record("c.mp4"))
    found = survey("llava-video", root)
    assert (found.report.num_videos, found.report.dropped) == (2, {"missing_file": 1})
    monkeypatch.setattr("longvpo_hf.intake.archives.Archive.members", lambda *_: pytest.fail("it is read again"))
    assert contents(found) == [("a caption", b"not a video"), ("a caption", b"neither")]


# ----------------------------------------------------------------------------------- scenes that are files of their own


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_what_is_wrong_with_archives_is_said_once_and_again_when_read_again(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "llava"
    files = {"a.mp4": b"a", "._a.mp4": b"m", "__MACOSX/._b.mp4": b"m", "b.mp4": b"b" * 4000}
    if kind == "zip":
        write_zip(root / "x.zip", files)
    else:
        write_tar(root / "x.tar", files)
        content = (root / "x.tar").read_bytes()
        (root / "x.tar").write_bytes(content[: content.rindex(b"b" * 100)])
    llava_list(root / "x_cap.json", *(llava_record(name, name, name) for name in ("a.mp4", "b.mp4", "c.mp4")))
    first, again = (list(read_corpus("llava-video", root, tmp_path / "cache")) for _ in range(2))
    assert first == again
    reasons = Counter(item.reason for item in first if isinstance(item, Dropped))
    damaged = {"damaged_archive": 2} if kind == "tar" else {}  # the archive, and the record's video in it
    assert reasons == {"macos_file": 1, "missing_file": 1, **damaged}


def test_names_do_not_command_a_terminal(tmp_path: Path) -> None:
    for name in ("a\x1b[2J.gif", "b.g\nif", "\u202ec.gif"):
        write(tmp_path / "root" / name, name)
    write(tmp_path / "root" / "a.mp4", "a")
    text = "".join(survey("videofolder", tmp_path / "root").report.lines())
    assert text.isprintable()
    assert r"a\x1b[2J.gif" in text


def vript_record(film: str, numbers: list[int]) -> dict[str, Any]:
    def scene(number: int) -> dict[str, Any]:
        text = {"shot_type": "", "camera_movement": "", "content": f"{film} {number}", "scene_title": "t"}
        return {"video_id": film, "clip_id": f"{film}-Scene-{number:03d}", "caption": text}

    ids = [f"{film}-Scene-{number:03d}" for number in numbers]
    return {"meta": {"video_id": film}, "data": {clip_id: scene(n) for clip_id, n in zip(ids, numbers, strict=True)}}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_scenes_of_a_film_follow_each_other_in_order(tmp_path: Path, zipped: bool, seed: int) -> None:
    """Vript as it is published, zips of a folder for each film, or unpacked; written in any order."""
    rng = random.Random(seed)
    root = tmp_path / "vript"
    films = {
        film: sorted(rng.sample(range(1, 1_200), k=rng.randint(2, 12))) for film in ("339dXVNQXac", "-_MRAAhEKio", "b")
    }
    records = []
    for film, numbers in films.items():
        rng.shuffle(scrambled := list(numbers))
        records.append(vript_record(film, scrambled))
        files = {f"{film}/{film}-Scene-{number:03d}.mp4": f"{film} {number}".encode() for number in scrambled}
        if zipped:
            write_zip(root / "vript_long_videos_clips" / f"clips_{film}_of_9.zip", files)
        else:
            for name, content in files.items():
                write(root / "vript_long_videos_clips" / name, content)
    write_jsonl(root / "vript_captions" / "vript_long_videos_captions.jsonl", records)
    found = survey("vript", root)
    assert contents(found) == [(f"{film} {n}.", f"{film} {n}".encode()) for film, ns in films.items() for n in ns]
    assert found.report.num_films == 3
    assert found.report.num_videos == found.report.num_captioned == sum(map(len, films.values()))
    by_video: dict[str, int] = {}
    for source in sources(found):
        by_video[found.video_of(str(source.path))] = by_video.get(found.video_of(str(source.path)), 0) + 1
    assert by_video == {film: len(numbers) for film, numbers in films.items()}


def test_whole_films_beside_their_scenes_are_not_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "vript"
    write_zip(root / "vript_long_videos" / "video_1_of_9.zip", {"f.mp4": b"the whole film"})
    write_zip(root / "vript_long_videos_clips" / "clips_1_of_9.zip", {"f/f-Scene-001.mp4": b"1"})
    write_jsonl(root / "x_captions.jsonl", [vript_record("f", [1])])
    assert contents(sources(survey("vript", root))) == [("f 1.", b"1")]
    assert [path.read_bytes() for path in (tmp_path / "cache" / "videos").iterdir()] == [b"1"]


@pytest.mark.parametrize("zipped", [True, False])
def test_clips_of_scenes_know_their_time_in_the_film(tmp_path: Path, zipped: bool) -> None:
    root = tmp_path / "vript"
    cut = {
        "clips": [{"clip_id": f"f-Scene-00{n}.mp4", "start_time": time} for n, time in ((1, "0"), (2, "00:01:30.5"))]
    }
    files = {
        f"f/f-Scene-00{n}.mp4": write_video(tmp_path / f"{n}.mp4", 10, first=20 * n).read_bytes() for n in (1, 2, 3)
    }
    files["f/f_cut_meta.json"] = json.dumps(cut).encode()
    files["g/g_cut_meta.json"] = b"{broken"
    if zipped:
        write_zip(root / "clips_1.zip", files)
    else:
        for name, content in files.items():
            write(root / name, content)
    write_jsonl(root / "x_captions.jsonl", [vript_record("f", [1, 2, 3])])
    clips = list(clips_of(survey("vript", root), CuttingSettings(0.5, 2.0, "windows")))
    assert all(isinstance(clip, Clip) for clip in clips), clips
    # Of the third nothing is known: its times are those of its file.
    assert [clip.origin for clip in clips if isinstance(clip, Clip)] == [
        ("f", 0.0, 1.0),
        ("f", 90.5, 91.5),
        ("f", 0.0, 1.0),
    ]


def test_a_survey_of_a_corpus_without_films_names_each_file(tmp_path: Path) -> None:
    write(tmp_path / "root" / "a.mp4", b"a")
    found = survey("videofolder", tmp_path / "root")
    (source,) = sources(found)
    assert found.video_of(str(source.path)) == str(source.path)
    assert drops(found) == []
    assert all(isinstance(item, Source | Dropped) for item in found)
