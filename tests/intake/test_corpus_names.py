"""Names that records give: the right file, or a drop that says why; never another record's video."""

from __future__ import annotations

import json
import random
import unicodedata
import warnings
import zipfile
from pathlib import Path

import pytest

from corpora import contents, drops, llava_list, llava_record, read, sources, write, write_jsonl, write_tar, write_zip
from longvpo_hf.intake import Source
from longvpo_hf.intake.store import walk

# ------------------------------------------------------------------------------------------- one name, several files


def test_an_archive_beside_the_record_comes_first(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    for part in ("one", "two", "three"):
        write_tar(root / part / "videos.tar", {"0001.mp4": part.encode()})
        llava_list(root / part / f"{part}_cap.json", llava_record("0001.mp4", f"of {part}"))
    assert contents(sources(read("llava-video", root))) == [
        ("of one", b"one"),
        ("of three", b"three"),
        ("of two", b"two"),
    ]


def test_an_archive_of_the_record_s_name_comes_first(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    for part in ("a_cap", "b_cap"):
        write_zip(root / f"{part}.zip", {"0001.mp4": part.encode()})
        llava_list(root / f"{part}.json", llava_record("0001.mp4", part))
    assert contents(sources(read("llava-video", root))) == [("a_cap", b"a_cap"), ("b_cap", b"b_cap")]


def test_a_name_that_fits_several_files_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    for part in ("x", "y"):
        write_tar(root / f"{part}.tar", {"0001.mp4": part.encode(), "0002.mp4": b"the same"})
    llava_list(root / "all_cap.json", llava_record("0001.mp4"), llava_record("0002.mp4"), llava_record("x/0001.mp4"))
    found = read("llava-video", root)
    (dropped,) = drops(found)
    assert (dropped.reason, dropped.path) == ("ambiguous_name", "0001.mp4")
    assert "fits 2 different files: 'x.tar::0001.mp4', 'y.tar::0001.mp4'" in dropped.detail
    # The same content twice is no question, and the archive's name is one of the folders a name may have.
    assert [content for _, content in contents(found)] == [b"the same", b"x"]


def test_archives_of_one_name_are_told_apart(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    for part in ("a", "b"):
        write_tar(root / part / "videos.tar", {"0001.mp4": part.encode()})
    llava_list(root / "all_cap.json", llava_record("0001.mp4"))
    (dropped,) = drops(read("llava-video", root))
    assert "'a/videos.tar::0001.mp4', 'b/videos.tar::0001.mp4'" in dropped.detail


def test_loose_files_in_folders_are_found_by_their_names(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    write(root / "deep" / "er" / "1.mp4", b"1")
    write(root / "deep" / "2.mp4", b"deep")
    write(root / "other" / "2.mp4", b"other")
    llava_list(root / "x_cap.json", llava_record("1.mp4"), llava_record("2.mp4"), llava_record("deep/2.mp4"))
    found = read("llava-video", root)
    assert [item.reason for item in drops(found)] == ["ambiguous_name"]
    assert [content for _, content in contents(found)] == [b"1", b"deep"]


def test_a_file_of_another_folder_is_not_taken(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    write_tar(root / "split2.tar", {"0001.mp4": b"2"})
    write(root / "split3" / "0002.mp4", b"3")
    llava_list(
        root / "x_cap.json",
        llava_record("split1/0001.mp4"),
        llava_record("split1/0002.mp4"),
        llava_record("split2/0001.mp4"),
    )
    found = read("llava-video", root)
    assert [(item.reason, item.path) for item in drops(found)] == [
        ("missing_file", "split1/0001.mp4"),
        ("missing_file", "split1/0002.mp4"),
    ]
    assert "other folders have a file of this name: 'split2.tar::0001.mp4'" in drops(found)[0].detail
    assert [content for _, content in contents(found)] == [b"2"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_twice_in_one_archive(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "llava"
    files = [("a.mp4", b"first"), ("b.mp4", b"same"), ("a.mp4", b"second"), ("b.mp4", b"same")]
    if kind == "tar":
        write_tar(root / "x.tar", files)
    else:
        root.mkdir()
        with warnings.catch_warnings(), zipfile.ZipFile(root / "x.zip", "w") as archive:
            warnings.simplefilter("ignore", UserWarning)  # zipfile's, of the repeated name
            for name, content in files:
                archive.writestr(name, content)
    llava_list(root / "x_cap.json", llava_record("a.mp4"), llava_record("b.mp4"))
    found = read("llava-video", root)
    assert [(item.reason, item.path) for item in drops(found)] == [("ambiguous_name", "a.mp4")]
    assert [content for _, content in contents(found)] == [b"same"]


@pytest.mark.parametrize(
    ("named", "stored"),
    [
        ("sub\\a.mp4", "sub/a.mp4"),
        ("sub/A.MP4", "sub/a.mp4"),
        ("sub/a.mp4", "Sub/a.MP4"),
        ("./sub//a.mp4", "sub/a.mp4"),
        (unicodedata.normalize("NFC", "café/ü.mp4"), unicodedata.normalize("NFD", "café/ü.mp4")),
        (unicodedata.normalize("NFD", "café/ü.mp4"), unicodedata.normalize("NFC", "café/ü.mp4")),
        ("12:30.mp4", "12:30.mp4"),
        ("concat:x.mp4", "concat:x.mp4"),
    ],
)
@pytest.mark.parametrize("place", ["folder", "tar", "zip"])
def test_names_that_are_spelled_otherwise(tmp_path: Path, named: str, stored: str, place: str) -> None:
    root = tmp_path / "llava"
    {
        "folder": lambda: write(root / stored, b"v"),
        "tar": lambda: write_tar(root / "x.tar", {stored: b"v"}),
        "zip": lambda: write_zip(root / "x.zip", {stored: b"v"}),
    }[place]()
    llava_list(root / "x_cap.json", llava_record(named))
    assert contents(sources(read("llava-video", root))) == [("a caption", b"v")]


def test_a_name_as_it_is_spelled_comes_before_one_of_another_case(tmp_path: Path) -> None:
    root = tmp_path / "llava"
    write_tar(root / "x.tar", {"A.mp4": b"upper", "a.mp4": b"lower", "B.mp4": b"B", "b.MP4": b"b"})
    llava_list(root / "x_cap.json", llava_record("A.mp4"), llava_record("a.mp4"), llava_record("b.mp4"))
    found = read("llava-video", root)
    assert [content for _, content in contents(found)] == [b"upper", b"lower"]
    assert [(item.reason, item.path) for item in drops(found)] == [("ambiguous_name", "b.mp4")]


@pytest.mark.parametrize("seed", range(6))
def test_no_random_record_gets_the_video_of_another(tmp_path: Path, seed: int) -> None:
    """Folders, tars and zips that all use the same few names: the content says whose video it is."""
    rng = random.Random(seed)
    root = tmp_path / "llava"
    expected: dict[str, bytes | None] = {}
    names = ["1.mp4", "sub/1.mp4", "2.MP4", "a b.mp4", "1.5.mp4", "é.mp4"]
    for number in range(12):
        folder = root / "/".join(rng.choices(["p", "q", "r"], k=rng.randint(1, 3))) / str(number)
        files = {name: f"{number} {name}".encode() for name in rng.sample(names, k=rng.randint(1, len(names)))}
        if "1.mp4" in files:
            files.pop("sub/1.mp4", None)  # else `1.mp4` could be either
        match rng.choice(["folder", "tar", "tar.gz", "zip"]):
            case "folder":
                for name, content in files.items():
                    write(folder / rng.choice(["", "videos"]) / name, content)
            case "zip":
                write_zip(folder / "v.zip", files)
            case kind:
                write_tar(folder / f"v.{kind}", files, "w" if kind == "tar" else "w:gz")
        records = []
        for name in rng.sample(names, k=3):
            caption = f"{number} {name}"
            records.append(llava_record(name, caption, caption))
            expected[caption] = files.get(name, files.get(f"sub/{name}"))
        llava_list(folder / f"{number}_cap.json", *records)
    found = read("llava-video", root)
    given = dict(contents(found))
    for caption, content in expected.items():
        if content is not None:
            assert given.pop(caption) == content
    # A record whose own folder lacks the video may find it above, only if there is one: its content has that name.
    for caption, content in given.items():
        assert content.decode().endswith(caption.split(" ", 1)[1])
    assert len(found) == len(expected)


# ----------------------------------------------------------------------------------------------------- webdataset keys


def pe_json(caption: str) -> bytes:
    return json.dumps({"human_caption": caption}).encode()


def test_keys_with_dots_are_samples_of_their_own(tmp_path: Path) -> None:
    names = ["take 1.0", "take 1.5", "take 2", "b/take 1.0", "plain"]
    files = {
        f"{name}{suffix}": f"{name}".encode() if suffix == ".mp4" else pe_json(name)
        for name in names
        for suffix in (".mp4", ".json")
    }
    write_tar(tmp_path / "pe" / "0.tar", files)
    assert contents(sources(read("pe-video", tmp_path / "pe"))) == [(name, name.encode()) for name in names]


def test_a_sample_whose_files_have_different_endings(tmp_path: Path) -> None:
    files = {"0001.video.mp4": b"1", "0001.json": pe_json("1"), "0002.mp4": b"2", "0002.meta.json": pe_json("2")}
    write_tar(tmp_path / "pe" / "0.tar", files)
    assert contents(sources(read("pe-video", tmp_path / "pe"))) == [("1", b"1"), ("2", b"2")]


def test_records_may_come_before_all_videos(tmp_path: Path) -> None:
    files = {f"{i}.json": pe_json(str(i)) for i in range(5)} | {f"{i}.mp4": str(i).encode() for i in (3, 1, 4, 0, 2)}
    write_tar(tmp_path / "pe" / "0.tar", files)
    assert contents(sources(read("pe-video", tmp_path / "pe"))) == [(str(i), str(i).encode()) for i in range(5)]


def test_two_tars_with_the_same_keys(tmp_path: Path) -> None:
    for shard in ("000", "001"):
        write_tar(tmp_path / "pe" / f"{shard}.tar", {"0001.mp4": shard.encode(), "0001.json": pe_json(f"of {shard}")})
    found = sources(read("pe-video", tmp_path / "pe"))
    assert contents(found) == [("of 000", b"000"), ("of 001", b"001")]
    assert [source.source_id for source in found] == ["0001", "001/0001"]


def test_what_does_not_make_a_sample_is_named(tmp_path: Path) -> None:
    files = [
        *(("a.mp4", b"a"), ("a.json", pe_json("first")), ("a.json", pe_json("second"))),
        *(("b.mp4", b"b1"), ("b.webm", b"b2"), ("b.json", pe_json("b"))),
        *(("c.mp4", b"c"), ("d.json", pe_json("d")), ("._a.json", b"\0\5"), ("__MACOSX/a.mp4", b"\0")),
        *(("e.mp4", b"e"), ("e.JSON", pe_json("e")), ("f.gif", b"GIF"), ("f.json", pe_json("f"))),
    ]
    write_tar(tmp_path / "pe" / "0.tar", files)
    found = read("pe-video", tmp_path / "pe")
    assert contents(found) == [("first", b"a"), ("e", b"e")]
    assert sorted((item.reason, item.source_id or item.path.rpartition("/")[2]) for item in drops(found)) == [
        ("ambiguous_name", "b"),
        ("bad_record", "a"),
        ("bad_record", "c"),
        ("macos_file", "0.tar"),
        ("missing_file", "d"),
        ("missing_file", "f"),
        ("unknown_suffix", "0.tar::f.gif"),
    ]
    reasons = {item.source_id: item.detail for item in drops(found)}
    assert "a second record of it; the first is used" in reasons["a"]
    assert "c.json is missing beside its video" in reasons["c"]


@pytest.mark.parametrize("seed", range(4))
def test_random_tars_give_each_video_its_own_record(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    keys = {"".join(rng.choices("ab.1_- é", k=rng.randint(1, 6))).strip(". ") for _ in range(60)}
    keys = {f"{rng.choice(['', 'x/', 'x.y/'])}{key}" for key in keys if key and not key.startswith("._")}
    files = [
        (f"{key}{suffix}", key.encode() if suffix == ".mp4" else pe_json(key))
        for key in sorted(keys)
        for suffix in (".mp4", ".json")
    ]
    rng.shuffle(files)
    write_tar(tmp_path / "pe" / "0.tar", files)
    found = sources(read("pe-video", tmp_path / "pe"))
    assert {(caption, content.decode()) for caption, content in contents(found)} == {(key, key) for key in keys}
    assert len({source.source_id for source in found}) >= len({key.rpartition("/")[2] for key in keys})


# ------------------------------------------------------------------------------------------------------ metadata files


def test_metadata_of_subfolders(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("top.mp4", "train/a.mp4", "test/a.mp4", "test/deep/b.mp4"):
        write(root / name, name)
    write_jsonl(root / "train" / "metadata.jsonl", [{"file_name": "a.mp4", "caption": "train a", "licence": "MIT"}])
    write(root / "test" / "metadata.csv", "file_name,caption\na.mp4,test a\ndeep/b.mp4,b\n")
    write(root / "test" / "deep" / "metadata.json", json.dumps([{"file_name": "b.mp4", "license": "CC0"}]))
    write_jsonl(
        root / "metadata.jsonl",
        [{"file_name": "top.mp4", "caption": "top"}, {"file_name": "train/a.mp4", "source_id": "yt"}],
    )
    found = sources(read("videofolder", root))
    assert [(s.path.relative_to(root).as_posix(), s.caption, s.source_id, s.licence) for s in found] == [
        ("test/a.mp4", "test a", "test/a.mp4", ""),
        ("test/deep/b.mp4", "b", "test/deep/b.mp4", "CC0"),
        ("top.mp4", "top", "top.mp4", ""),
        ("train/a.mp4", "train a", "yt", "MIT"),
    ]


def test_several_records_of_a_video_add_up_and_conflicts_are_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in "abc":
        write(root / f"{name}.mp4", name)
    write_jsonl(
        root / "metadata.jsonl",
        [
            {"file_name": "a.mp4", "caption": "first"},
            {"file_name": "b.mp4", "caption": "b"},
            {"file_name": "a.mp4", "caption": "second"},
            {"file_name": "b.mp4", "caption": "b"},
        ],
    )
    write(root / "metadata.csv", "file_name,licence,caption\na.mp4,MIT,\nc.mp4,CC0,c\nb.mp4,,other\n")
    found = read("videofolder", root)
    # Files are read in the order of their names, csv first; the first record of a field is used.
    kept = [(item.caption, item.licence) for item in found if isinstance(item, Source)]
    assert kept == [("first", "MIT"), ("other", ""), ("c", "CC0")]
    assert [(item.reason, Path(item.path).name, item.detail.split(" than ")[0]) for item in drops(found)] == [
        ("repeated_record", "metadata.jsonl", "line 2: another caption of b.mp4"),
        ("repeated_record", "metadata.jsonl", "line 3: another caption of a.mp4"),
        ("repeated_record", "metadata.jsonl", "line 4: another caption of b.mp4"),
    ]


def test_metadata_that_fits_nothing_or_several_files_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("x/a.mp4", "y/a.mp4", "y/b.mp4"):
        write(root / name, name)
    write_jsonl(root / "metadata.jsonl", [{"file_name": name, "caption": name} for name in ("a.mp4", "b.mp4", "c.mp4")])
    write_jsonl(root / "captions.jsonl", [{"file_name": "y/a.mp4", "caption": "lost"}])
    found = read("videofolder", root)
    assert [item.caption for item in found if isinstance(item, Source)] == ["", "", "b.mp4"]
    assert {(item.reason, item.path.rpartition("/")[2]) for item in drops(found)} == {
        ("ambiguous_name", "a.mp4"),
        ("missing_file", "c.mp4"),
        ("unread_metadata", "captions.jsonl"),
    }


def test_metadata_of_what_is_no_video_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    names = ("a.divx", "b.jpg", "._c.mp4", "metadata.jsonl", "d.mp4")
    for name in names:
        write(root / name, name)
    write_jsonl(root / "metadata.jsonl", [{"file_name": name, "caption": name} for name in names])
    found = read("videofolder", root)
    assert [item.caption for item in found if isinstance(item, Source)] == ["d.mp4"]
    named = [item.path for item in drops(found) if "names it" in item.detail]
    assert sorted(named) == sorted(names[:-1]), "each record is used or reported"


def test_files_that_may_be_videos_are_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("a.gif", "b.m2ts", "C.MOV", "d", "e.rm", "._f.mp4", "notes.txt", "a.jpg", ".DS_Store"):
        write(root / name, name)
    found = read("videofolder", root)
    assert [item.path.name for item in found if isinstance(item, Source)] == ["C.MOV", "b.m2ts"]
    assert [(item.reason, Path(item.path).name) for item in drops(found)] == [
        ("macos_file", "._f.mp4"),
        ("unknown_suffix", "a.gif"),
        ("unknown_suffix", "d"),
        ("unknown_suffix", "e.rm"),
    ]


def test_a_corpus_folder_that_is_a_link_is_read(tmp_path: Path) -> None:
    """`./my_videos` is often a link to a disk where there is room; links inside it are another matter."""
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "disk" / "a" / "film.mp4").touch()
    (tmp_path / "videos").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk" / "again").symlink_to(tmp_path / "disk" / "a", target_is_directory=True)
    assert [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path / "videos")] == [
        "videos/a/film.mp4",
        "videos/again",
    ]
