"""Readers of corpora: each on a small fixture of exactly its corpus' shape, and with a record that is not so."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import stat
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpora import read, sources, write_jsonl, write_tar, write_zip
from longvpo_hf.artifacts import file_digest as sha256_of
from longvpo_hf.errors import CorpusError
from longvpo_hf.funnel import Dropped
from longvpo_hf.intake import CORPORA, IntakeLimits, Scene, Source, read_corpus
from longvpo_hf.intake.archives import Archive, archives_under
from longvpo_hf.intake.record_files import read_records
from longvpo_hf.intake.records import Record
from media import write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four short videos of different content."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{i}.mp4", 4, first=10 * i) for i in range(4)]


def same_content(source: Source, video: Path) -> bool:
    return sha256_of(source.path) == sha256_of(video) and source.sha256 in ("", sha256_of(video))


# -------------------------------------------------------------------------------------------------- a folder of videos


def folder_of(root: Path, videos: list[Path]) -> Path:
    for name, video in zip(("b/two.mp4", "one.mp4", "b/deep/er/three.MKV"), videos, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(video.read_bytes())
    (root / "notes.txt").write_text("no video", encoding="utf-8")
    return root


def test_videofolder_any_layout(tmp_path: Path, videos: list[Path]) -> None:
    found = sources(read("videofolder", folder_of(tmp_path / "root", videos)))
    assert [source.source_id for source in found] == ["b/deep/er/three.MKV", "b/two.mp4", "one.mp4"]
    assert {(source.caption, source.licence) for source in found} == {("", "")}


def metadata_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    write_jsonl(path.with_suffix(".jsonl"), rows)


def metadata_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def metadata_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))


@pytest.mark.parametrize("write", [metadata_jsonl, metadata_csv, metadata_parquet])
def test_videofolder_with_captions(
    tmp_path: Path, videos: list[Path], write: Callable[[Path, list[dict[str, str]]], None]
) -> None:
    root = folder_of(tmp_path / "root", videos)
    rows = [
        {"file_name": "one.mp4", "caption": 'A "dog", running', "source_id": "yt1", "licence": "MIT"},
        {"file_name": "b/two.mp4", "caption": "two\nlines", "source_id": "", "licence": ""},
        {"file_name": "gone.mp4", "caption": "x", "source_id": "", "licence": ""},
        {"file_name": "../outside.mp4", "caption": "x", "source_id": "", "licence": ""},
    ]
    write(root / "metadata", rows)
    three, two, one, *dropped = read("videofolder", root)
    assert isinstance(one, Source)
    assert isinstance(two, Source)
    assert isinstance(three, Source)
    assert (one.caption, one.source_id, one.licence) == ('A "dog", running', "yt1", "MIT")
    assert (two.caption, two.source_id) == ("two\nlines", "b/two.mp4")
    assert three.caption == ""
    assert [(item.reason, Path(item.path).name) for item in dropped] == [  # type: ignore[union-attr]
        ("outside_root", "outside.mp4"),
        ("missing_file", "gone.mp4"),
    ]


def test_videofolder_drops_links_that_lead_out(tmp_path: Path, videos: list[Path]) -> None:
    root = folder_of(tmp_path / "root", videos)
    os.symlink(videos[0], root / "out.mp4")
    os.symlink(videos[0].parent, root / "out")
    os.symlink(root / "one.mp4", root / "within.mp4")
    found = read("videofolder", root)
    assert [(item.reason, item.source_id) for item in found if isinstance(item, Dropped)] == [
        ("outside_root", "out"),
        ("outside_root", "out.mp4"),
    ]
    assert "within.mp4" in [item.source_id for item in found if isinstance(item, Source)]


def test_videofolder_drops_names_that_no_row_can_hold(tmp_path: Path, videos: list[Path]) -> None:
    root = folder_of(tmp_path / "root", videos)
    os.link(videos[0], os.fsencode(root) + b"/caf\xe9.mp4")
    found = read("videofolder", root)
    assert [item.reason for item in found if isinstance(item, Dropped)] == ["bad_name"]
    assert len(found) == 4  # and the three that were there


def test_links_within_the_cache_of_hugging_face_stay(tmp_path: Path, videos: list[Path]) -> None:
    repo = tmp_path / "hub" / "datasets--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "0123").write_bytes(videos[0].read_bytes())
    root = repo / "snapshots" / "4567" / "videos"
    root.mkdir(parents=True)
    os.symlink("../../../blobs/0123", root / "kept.mp4")
    os.symlink(videos[1], root / "out.mp4")
    kept, out = read("videofolder", root)
    assert isinstance(kept, Source)
    assert same_content(kept, videos[0])
    assert isinstance(out, Dropped)
    assert out.reason == "outside_root"


def test_videofolder_metadata_without_file_name(tmp_path: Path, videos: list[Path]) -> None:
    root = folder_of(tmp_path / "root", videos)
    write_jsonl(root / "metadata.jsonl", [{"file_name": "one.mp4", "caption": "c"}, {"name": "two.mp4"}])
    *_, one, dropped = read("videofolder", root)
    assert isinstance(one, Source)
    assert one.caption == "c"
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.path) == ("bad_record", str(root / "metadata.jsonl"))
    assert re.fullmatch(r"line 2: field 'file_name' is missing.*it has name.*", dropped.detail)
    message = r"metadata\.jsonl, line 2: field 'file_name' is missing.*max_bad_records=0"
    with pytest.raises(CorpusError, match=message):
        list(read_corpus("videofolder", root, tmp_path / "cache", IntakeLimits(max_bad_records=0)))


# ------------------------------------------------------------------------------------------------------------ FineVideo


def finevideo_row(video: bytes, start: str = "00:00:00.000", name: str = "-2UrQ5HpE1c.mp4") -> dict[str, Any]:
    def scene(first: str, last: str, title: str) -> dict[str, Any]:
        return {
            "sceneId": 1,
            "title": title,
            "timestamps": {"start_timestamp": first, "end_timestamp": last},
            "activities": [{"description": f"{title} happens.", "timestamp": {"start_timestamp": first}}],
        }

    content = {"description": "The whole.", "scenes": [scene(start, "00:00:01.500", "A"), scene("00:02", "2.5", "B")]}
    return {"mp4": video, "json": {"content_metadata": content, "original_video_filename": name}}


def test_finevideo(tmp_path: Path, videos: list[Path]) -> None:
    root = tmp_path / "finevideo"
    (root / "data").mkdir(parents=True)
    for shard, members in enumerate((videos[:2], videos[2:3])):
        rows = [finevideo_row(v.read_bytes(), name=f"id-{shard}{i}.mp4") for i, v in enumerate(members)]
        pq.write_table(pa.Table.from_pylist(rows), root / "data" / f"train-0000{shard}-of-00002.parquet")
    found = sources(read("finevideo", root))
    assert [source.source_id for source in found] == ["id-00", "id-01", "id-10"]
    assert all(same_content(source, video) for source, video in zip(found, videos, strict=False))
    assert found[0].scenes == (Scene(0.0, 1.5, "A. A happens."), Scene(2.0, 2.5, "B. B happens."))
    assert (found[0].caption, found[0].licence) == ("The whole.", "CC-BY, each video's own terms")
    # Extracted once: the second run writes nothing new.
    before = {path: path.stat().st_size for path in (tmp_path / "cache" / "videos").iterdir()}
    assert len(before) == 3
    read("finevideo", root)
    assert {path: path.stat().st_size for path in (tmp_path / "cache" / "videos").iterdir()} == before


def broken(row: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    change(row)
    return row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (broken(finevideo_row(b"x"), lambda r: r.pop("mp4")), r"row 0: field 'mp4' is missing; a bytes is expected"),
        (broken(finevideo_row(b"x"), lambda r: r.update(json="{}")), r"'json\.original_video_filename' is missing"),
        (finevideo_row(b"x", start="soon"), r"scenes\[0\]\.timestamps\.start_timestamp' must be seconds .*'soon'"),
    ],
)
def test_finevideo_not_as_expected(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    root = tmp_path / "finevideo"
    root.mkdir()
    pq.write_table(pa.Table.from_pylist([row]), root / "bad.parquet")
    with pytest.raises(CorpusError, match=r"bad\.parquet, " + ".*" + message):
        read("finevideo", root)


# ------------------------------------------------------------------------------------------------------------- PE-Video


def pe_video_json(**fields: Any) -> bytes:
    return json.dumps({"uid": 1, "category": "animals", **fields}).encode()


def test_pe_video(tmp_path: Path, videos: list[Path]) -> None:
    root = tmp_path / "pe"
    samples = {
        "000.json": pe_video_json(human_caption="by a human", model_caption="by a model"),
        "000.mp4": videos[0].read_bytes(),
        "001.json": pe_video_json(human_caption=None, model_caption="by a model"),
        "001.mp4": videos[1].read_bytes(),
    }
    write_tar(root / "train" / "000000.tar", samples)
    write_tar(root / "train" / "000001.tar", {"x/002.mp4": videos[2].read_bytes(), "x/002.json": samples["001.json"]})
    for _ in range(2):  # the second time from the cache
        found = sources(read("pe-video", root))
        assert [(source.source_id, source.caption) for source in found] == [
            ("000", "by a human"),
            ("001", "by a model"),
            ("002", "by a model"),
        ]
        assert all(same_content(source, video) for source, video in zip(found, videos, strict=False))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"7.mp4": b"v", "7.json": pe_video_json(text="x")},
            r"::7\.json, the record: field 'human_caption' is missing",
        ),
        ({"7.mp4": b"v"}, r"sample 7: 7\.json is missing beside its video"),
        ({"7.mp4": b"v", "7.json": b"{"}, r"::7\.json is no readable json"),
        ({"7.mp4": b"v", "7.json": pe_video_json(human_caption=3)}, r"field 'human_caption' must be a str, got int 3"),
    ],
)
def test_pe_video_not_as_expected(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / "pe" / "0.tar", files)
    with pytest.raises(CorpusError, match=r"0\.tar.*" + message):
        read("pe-video", tmp_path / "pe")


# ----------------------------------------------------------------------------------------------------- LLaVA-Video-178K


def llava_record(number: int, video: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"caption {number}"}]
    return {"id": f"id{number}", "data_source": "0_30_s_academic_v0_1", "video": video, "conversations": turns}


def test_llava_video(tmp_path: Path, videos: list[Path]) -> None:
    config = tmp_path / "llava" / "0_30_s_academic_v0_1"
    names = [f"academic_source/NextQA/{i}.mp4" for i in range(4)]
    # Two in a tar.gz, one in a plain tar, one extracted already.
    write_tar(
        config / "a_videos_1.tar.gz", {n: v.read_bytes() for n, v in zip(names[:2], videos, strict=False)}, "w:gz"
    )
    write_tar(config / "a_videos_2.tar", {names[2]: videos[2].read_bytes()})
    (config.parent / "academic_source/NextQA").mkdir(parents=True)
    (config.parent / names[3]).write_bytes(videos[3].read_bytes())
    records = [llava_record(i, name) for i, name in enumerate([*names, "academic_source/NextQA/gone.mp4"])]
    (config / "0_30_s_academic_v0_1_cap_processed.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    (config / "0_30_s_academic_oe_v0_1_qa_processed.json").write_text("[]", encoding="utf-8")  # not read: no captions
    *found, gone = read("llava-video", tmp_path / "llava")
    assert [(s.source_id, s.caption, s.name) for s in sources(found)] == [
        (f"id{i}", f"caption {i}", f"{i}.mp4") for i in range(4)
    ]
    assert all(same_content(source, video) for source, video in zip(sources(found), videos, strict=True))
    assert isinstance(gone, Dropped)
    assert (gone.reason, gone.source_id) == ("missing_file", "id4")
    assert "2 archives" in gone.detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": "a", "conversations": []}]', r"record 0: field 'conversations' has no turn of 'gpt'"),
        ('[{"id": "a", "conversations": [{"from": "gpt", "value": "c"}]}]', r"record 0: field 'video' is missing"),
        ('[{"id": 7}]', r"record 0: field 'id' must be a str, got int 7"),
        ('[{"id": "a", "conversations": [3]}]', r"field 'conversations\[0\]' has no fields but is int 3"),
        ('[{"id": "a",]', r"record 0: no readable json"),
        ('{"id": "a"}', r"a list of records is expected"),
        ("[3]", r"record 0: a record with named fields is expected, got int 3"),
    ],
)
def test_llava_video_not_as_expected(tmp_path: Path, content: str, message: str) -> None:
    root = tmp_path / "llava"
    root.mkdir()
    (root / "x_cap_processed.json").write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"x_cap_processed\.json.*" + message):
        read("llava-video", root)


# ---------------------------------------------------------------------------------------------------------------- Vript


def vript_record(video_id: str, numbers: Iterable[int], **caption: Any) -> dict[str, Any]:
    def clip(clip_id: str) -> dict[str, Any]:
        text = {"shot_type": "Close-up", "camera_movement": "Panning.", "content": f"In {clip_id}", "scene_title": "t"}
        return {"video_id": video_id, "clip_id": clip_id, "video_title": "T", "caption": {**text, **caption}}

    ids = [f"{video_id}-Scene-{number:03d}" for number in numbers]
    meta = {"video_id": video_id, "video_title": "T", "num_clips": len(ids), "integrity": True}
    return {"meta": meta, "data": {clip_id: clip(clip_id) for clip_id in ids}}


def vript_folder(root: Path, videos: list[Path]) -> Path:
    clips = {f"339dXVNQXac/339dXVNQXac-Scene-00{i + 1}.mp4": v.read_bytes() for i, v in enumerate(videos[:2])}
    clips["339dXVNQXac/339dXVNQXac_cut_meta.json"] = b"{}"
    write_zip(root / "vript_long_videos_clips" / "clips_1_of_1095.zip", clips)
    other = {"-_MRAAhEKio/-_MRAAhEKio-Scene-010.mp4": videos[2].read_bytes()}
    write_zip(root / "vript_long_videos_clips" / "clips_2_of_1095.zip", other)
    return root


VRIPT_RECORDS = [vript_record("339dXVNQXac", [2, 1]), vript_record("-_MRAAhEKio", [10])]
VRIPT_EXPECTED = [
    ("339dXVNQXac", "Close-up. Panning. In 339dXVNQXac-Scene-001."),
    ("339dXVNQXac", "Close-up. Panning. In 339dXVNQXac-Scene-002."),
    ("-_MRAAhEKio", "Close-up. Panning. In -_MRAAhEKio-Scene-010."),
]


@pytest.mark.parametrize("form", ["jsonl", "json", "zip"])
def test_vript(tmp_path: Path, videos: list[Path], form: str) -> None:
    root = vript_folder(tmp_path / "vript", videos)
    captions = root / "vript_captions"
    files = {f"{r['meta']['video_id']}_caption.json": json.dumps(r).encode() for r in VRIPT_RECORDS}
    if form == "json":
        captions.mkdir()
        for name, content in files.items():
            (captions / name).write_bytes(content)
    else:
        write_zip(captions / "vript_long_videos_captions.zip", files)
    if form == "jsonl":  # beside the zip, as on the Hub, and instead of it
        write_jsonl(captions / "vript_long_videos_captions.jsonl", VRIPT_RECORDS)
    found = sources(read("vript", root))
    # One folder's files come in the order of their names, where - stands before 3.
    expected = VRIPT_EXPECTED if form != "json" else [VRIPT_EXPECTED[2], *VRIPT_EXPECTED[:2]]
    assert [(source.source_id, source.caption) for source in found] == expected
    by_caption = {source.caption: source for source in found}
    for (_, caption), video in zip(VRIPT_EXPECTED, videos, strict=False):
        assert same_content(by_caption[caption], video)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"meta": {}}, r"line 1: field 'data' is missing; a dict is expected \(it has meta\)"),
        (vript_record("v", [1], content=""), r"line 1: field 'data\.v-Scene-001\.caption\.content' is empty"),
        ({"data": {"v-Scene-001": []}}, r"line 1: field 'data\.v-Scene-001' has no fields but is list \[\]"),
    ],
)
def test_vript_not_as_expected(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    write_jsonl(tmp_path / "vript" / "x_captions.jsonl", [record])
    with pytest.raises(CorpusError, match=r"x_captions\.jsonl, " + message):
        read("vript", tmp_path / "vript")


# ------------------------------------------------------------------------------------------------------- ShareGPT4Video


def sharegpt4video_record(video_id: str, zip_folder: str, **changes: Any) -> dict[str, Any]:
    captions = [{"idx": "1", "content": "a frame"}, {"idx": "-1", "content": f"all of {video_id}"}]
    record = {"video_id": video_id, "video_path": f"panda/{video_id}.mp4", "timestamp": ["00:00:00"]}
    return {**record, "zip_folder": zip_folder, "captions": captions, **changes}


def test_sharegpt4video(tmp_path: Path, videos: list[Path]) -> None:
    root = tmp_path / "share"
    # The same name in both zips: zip_folder decides.
    for number, video in enumerate(videos[:2], 1):
        zipped = root / "zip_folder" / "panda" / f"panda_videos_{number}.zip"
        write_zip(zipped, {"--_S9IDQPLg_1.mp4": video.read_bytes()})
    records = [sharegpt4video_record("--_S9IDQPLg_1", f"panda_videos_{number}.zip") for number in (2, 1)]
    write_jsonl(root / "sharegpt4video_40k.jsonl", records)
    found = sources(read("sharegpt4video", root))
    assert [(s.source_id, s.caption, s.licence) for s in found] == [
        ("--_S9IDQPLg_1", "all of --_S9IDQPLg_1", "CC-BY-NC-4.0")
    ] * 2
    assert same_content(found[0], videos[1])
    assert same_content(found[1], videos[0])


def test_sharegpt4video_not_as_expected(tmp_path: Path) -> None:
    record = sharegpt4video_record("v", "z.zip", captions=[{"idx": "1", "content": "a frame"}])
    write_jsonl(tmp_path / "share" / "a.jsonl", [record])
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 1: field 'captions' has no idx '-1'.*\['1'\]"):
        read("sharegpt4video", tmp_path / "share")


# ----------------------------------------------------------------------------------------------------------- LongVA-TPO


def longva_folder(root: Path, files: Mapping[str, bytes], rows: str) -> Path:
    """`dataset.csv`, and a tar.gz cut into three parts in the midst of its bytes."""
    whole = write_tar(root / "videos" / "whole", files, "w:gz")
    content = whole.read_bytes()
    whole.unlink()
    size = len(content) // 3 + 1
    for number, part in enumerate("abc"):
        (root / "videos" / f"videos.part.a{part}").write_bytes(content[number * size : (number + 1) * size])
    (root / "dataset.csv").write_text(rows, encoding="utf-8")
    return root


def test_longva_tpo(tmp_path: Path, videos: list[Path]) -> None:
    files = {f"videos/v{i}.mp4": video.read_bytes() for i, video in enumerate(videos[:3])}
    rows = 'video,question,chosen,rejected\nv0.mp4,"What, exactly?",a,b\nv0.mp4,q,c,d\nvideos/v2.mp4,q,e,f\n'
    root = longva_folder(tmp_path / "tpo", files, rows)
    found = sources(read("longva-tpo", root))
    assert [(source.source_id, source.licence) for source in found] == [("v0", "MIT"), ("v2", "MIT")]
    assert same_content(found[0], videos[0])
    assert same_content(found[1], videos[2])


def test_longva_tpo_not_as_expected(tmp_path: Path) -> None:
    root = longva_folder(tmp_path / "tpo", {"v.mp4": b"v"}, "id,question\nv,q\n")
    with pytest.raises(CorpusError, match=r"dataset\.csv, line 2: field 'video' is missing.*it has id, question"):
        read("longva-tpo", root)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    root = longva_folder(tmp_path / "tpo", {"v.mp4": b"v" * 1000}, "video\nv.mp4\n")
    (root / "videos" / "videos.part.ab").unlink()
    with pytest.raises(CorpusError, match=r"videos\.part\.ac: a part of videos before it is missing"):
        read("longva-tpo", root)


# ------------------------------------------------------------------------------------------------- archives, in general


def hostile_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in ("../up.mp4", "/abs.mp4", "good.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        for name, kind in (
            ("soft.mp4", tarfile.SYMTYPE),
            ("hard.mp4", tarfile.LNKTYPE),
            ("pipe.mp4", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../../etc/passwd"
            tar.addfile(info)
    return path


def hostile_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../up.mp4", "/abs.mp4", "good.mp4", "..\\back.mp4"):
            archive.writestr(name, b"abc")
        link = zipfile.ZipInfo("soft.mp4")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    return path


@pytest.mark.parametrize("make", [hostile_tar, hostile_zip])
def test_members_that_leave_their_root_are_dropped(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    root = tmp_path / "llava"
    root.mkdir()
    hostile = make(root / f"x.{make.__name__[-3:]}")
    names = [member.name for archive in archives_under(root) for member in archive.members()]
    assert len(names) >= 5
    records = [llava_record(i, Path(name.replace("\\", "/")).name) for i, name in enumerate(names)]
    (root / "x_cap_processed.json").write_text(json.dumps(records), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    found = read("llava-video", root)
    reasons = {item.path: item.reason for item in found if isinstance(item, Dropped)}
    # Looked for by its base name, a member that leaves is found, and refused.
    assert reasons == {f"{hostile}::{name}": "outside_root" for name in names if name != "good.mp4"}
    assert [item.name for item in found if isinstance(item, Source)] == ["good.mp4"]
    new = [path for path in tmp_path.rglob("*") if path not in before and path.suffix == ".mp4"]
    assert [path.read_bytes() for path in new] == [b"abc"]
    assert not (tmp_path.parent / "up.mp4").exists()


@pytest.mark.parametrize("name", ["../x.mp4", "/etc/x.mp4", "a/../../x.mp4", "C:\\x.mp4", "a\\..\\..\\x.mp4"])
def test_records_that_leave_their_root_are_dropped(tmp_path: Path, videos: list[Path], name: str) -> None:
    root = tmp_path / "llava"
    root.mkdir()
    (tmp_path / "x.mp4").write_bytes(videos[0].read_bytes())
    (root / "x_cap_processed.json").write_text(json.dumps([llava_record(0, name)]), encoding="utf-8")
    (dropped,) = read("llava-video", root)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.source_id) == ("outside_root", "id0")


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_of_a_damaged_tar_what_comes_before_is_kept(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "llava"
    content = {f"{i}.mp4": random.Random(i).randbytes(20_000) for i in range(4)}
    path = write_tar(root / f"x.{kind}", content, "w" if kind == "tar" else "w:gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (root / "x_cap_processed.json").write_text(json.dumps([llava_record(3, "3.mp4")]), encoding="utf-8")
    with pytest.raises(CorpusError, match=rf"x\.{kind}, at \d\.mp4: the archive is damaged .*get it again"):
        read("llava-video", root)
    # What was written is whole; no partial file stays.
    assert list((tmp_path / "cache" / "parts").iterdir()) == []
    records = [llava_record(i, f"{i}.mp4") for i in range(4)]
    (root / "x_cap_processed.json").write_text(json.dumps(records), encoding="utf-8")
    for _ in range(2):  # also from the index
        found = read("llava-video", root)
        kept = [item.source_id for item in found if isinstance(item, Source)]
        assert kept == [f"id{i}" for i in range(len(kept))]
        assert 1 <= len(kept) <= 2
        dropped = [item for item in found if isinstance(item, Dropped)]
        assert [item.path for item in dropped if item.reason == "damaged_archive" and not item.source_id] == [str(path)]
        assert {item.source_id for item in dropped if item.source_id} == {f"id{i}" for i in range(len(kept), 4)}


def test_of_a_damaged_zip_the_other_members_are_kept(tmp_path: Path, videos: list[Path]) -> None:
    root = tmp_path / "llava"
    path = write_zip(root / "x.zip", {f"{i}.mp4": video.read_bytes() for i, video in enumerate(videos)})
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF  # within the first member
    path.write_bytes(content)
    records = [llava_record(i, f"{i}.mp4") for i in range(4)]
    (root / "x_cap_processed.json").write_text(json.dumps(records), encoding="utf-8")
    for _ in range(2):
        dropped, *kept = read("llava-video", root)
        assert [item.source_id for item in sources(kept)] == ["id1", "id2", "id3"]
        assert isinstance(dropped, Dropped)
        assert (dropped.reason, dropped.path) == ("damaged_archive", f"{path}::0.mp4")
    content[-30:] = b"\0" * 30  # the end of the list of contents
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"x\.zip, at its start: the archive is damaged .*get it again"):
        read("llava-video", root)


def test_an_extraction_that_broke_off_goes_on(
    tmp_path: Path, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longvpo_hf.intake.store import VideoStore

    root = tmp_path / "llava"
    write_tar(root / "x.tar", {f"{i}.mp4": video.read_bytes() for i, video in enumerate(videos)})
    (root / "x_cap_processed.json").write_text(json.dumps([llava_record(3, "3.mp4")]), encoding="utf-8")
    put, calls = VideoStore.put, []

    def put_two(self: VideoStore, content: Any, name: str) -> Path:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(name)
        return put(self, content, name)

    with monkeypatch.context() as patch:
        patch.setattr(VideoStore, "put", put_two)
        with pytest.raises(KeyboardInterrupt):
            read("llava-video", root)
    assert calls == ["0.mp4", "1.mp4"]
    again: list[str] = []
    monkeypatch.setattr(VideoStore, "put", lambda s, content, name: (again.append(name), put(s, content, name))[1])
    (source,) = sources(read("llava-video", root))
    assert same_content(source, videos[3])
    assert again == ["2.mp4", "3.mp4"]
    # What is extracted whole is not even read again, also for a video that is not in it.
    monkeypatch.setattr(Archive, "members", lambda self: pytest.fail("the archive is read again"))
    records = [llava_record(3, "3.mp4"), llava_record(9, "9.mp4")]
    (root / "x_cap_processed.json").write_text(json.dumps(records), encoding="utf-8")
    assert [type(item) for item in read("llava-video", root)] == [Source, Dropped]


# ---------------------------------------------------------------------------------------------------- records, at large


def test_unknown_corpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corpus must be one of videofolder, finevideo"):
        read_corpus("kinetics", tmp_path, tmp_path)


@pytest.mark.parametrize("corpus", CORPORA)
def test_no_folder_is_an_error(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(CorpusError, match="is no folder"):
        list(read_corpus(corpus, tmp_path / "absent", tmp_path / "cache"))


@pytest.mark.parametrize("corpus", [corpus for corpus in CORPORA if corpus != "videofolder"])
def test_a_folder_without_records_is_an_error(tmp_path: Path, corpus: str) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(CorpusError, match=r"holds no|is missing"):
        read(corpus, tmp_path / "root")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(3, 3.0), (2.5, 2.5), ("83.5", 83.5), ("01:23.5", 83.5), ("00:01:23,500", 83.5), ("1:00:00", 3600.0)],
)
def test_times(value: object, seconds: float) -> None:
    assert Record("f", "r", {"t": value}).seconds("t") == seconds


@pytest.mark.parametrize("value", [None, "", "-1", "1:2:3:4", True, float("nan"), -1.0, "12 s", []])
def test_no_times(value: object) -> None:
    with pytest.raises(CorpusError, match=r"^f, r: field 't' must be seconds"):
        Record("f", "r", {"t": value}).seconds("t")


def test_broken_files_name_their_place(tmp_path: Path) -> None:
    for name, content, message in [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: no readable json"),
        ("b.jsonl", b"\xff\xfe", r"b\.jsonl, is no readable \.jsonl file: it is in UTF-16; save it in UTF-8"),
        ("c.parquet", b"PAR1", r"c\.parquet, is no readable \.parquet file"),
        ("d.csv", b'a,b\n"x', r"d\.csv, line 2: no readable csv: unexpected end of data"),
        ("e.csv", b"a,a\n1,2\n", r"e\.csv, line 1: the column str 'a' is there more than once"),
    ]:
        (tmp_path / name).write_bytes(content)
        found = [item for item in read_records(tmp_path / name) if isinstance(item, Dropped)]
        assert [item.reason for item in found] == ["bad_record"]
        assert re.search(message, f"{found[0].path}, {found[0].detail}")
    (tmp_path / "f.txt").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"f\.txt must be one of \.jsonl, \.json, \.csv, \.parquet"):
        list(read_records(tmp_path / "f.txt"))


def test_a_list_longer_than_a_read_is_read_in_order(tmp_path: Path) -> None:
    records = [{"n": n, "text": 'ä]"{[\\' * (n % 7)} for n in range(40_000)]
    (tmp_path / "long.json").write_text(json.dumps(records), encoding="utf-8")
    assert (tmp_path / "long.json").stat().st_size > 2 * 1024**2
    found = [(record.place, record.fields["n"]) for record in read_records(tmp_path / "long.json")]
    assert found == [(f"record {n}", n) for n in range(40_000)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    def write(number: int) -> Path:
        path = tmp_path / f"{number}{suffix}"
        rows = [{"n": str(n), "text": "x" * 1000} for n in range(number)]
        if suffix == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        elif suffix == ".jsonl":
            write_jsonl(path, rows)
        elif suffix == ".csv":
            metadata_csv(path, rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
        return path

    def peak(path: Path) -> int:
        tracemalloc.start()
        count = sum(1 for _ in read_records(path))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == int(path.stem)
        return peak_bytes

    peak(write(10))  # imports and the like
    small, large = peak(write(4_000)), peak(write(10_000))
    assert large < small + 1024**2, (small, large)


def test_memory_does_not_grow_with_an_archive(tmp_path: Path) -> None:
    def peak(number: int) -> int:
        root = tmp_path / str(number)
        write_tar(root / "x.tar", {f"{'n' * 80}{n}.txt": b"" for n in range(number)})
        (archive,) = archives_under(root)
        tracemalloc.start()
        assert sum(1 for _ in archive.members()) == number
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak_bytes

    peak(10)
    assert peak(2_000) < peak(500) + 100_000
