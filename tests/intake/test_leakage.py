"""Benchmarks' videos are found however a corpus spells their ids, and what was found is counted per list."""

from __future__ import annotations

import random
import string
import time
from pathlib import Path

import pytest

from corpora import write
from longvpo_hf.errors import CorpusError
from longvpo_hf.intake import BenchmarkVideos, Source

ID = "fFjv93ACGo8"
TRICKY = ("-2UrQ5HpE1c", "_a-b_c-d_e-", "--_S9IDQPLg", "abcdefghijk")


def benchmarks(tmp_path: Path, *lines: str) -> BenchmarkVideos:
    return BenchmarkVideos.from_files({"Video-MME": write(tmp_path / "list.txt", "\n".join(lines))})


SPELLED = (
    "{}", "{}.mp4", "ytb_{}", "ytb_{}.mp4", "v_{}", "v_{}.webm", "{}_10_20", "{}_10.5_20.25.mp4", "{}-Scene-001",
    "{}-Scene-001.mp4", "{}_scene_3", "{}_13_0to241.mp4", "videos/{}/clip.mp4", "youtube_{}", "{}.12.mp4",
    "part1/v_{}_0_10.mp4", "Some title [{}].mkv", "https://www.youtube.com/watch?v={}", "https://youtu.be/{}?t=3",
)  # fmt: skip


@pytest.mark.parametrize("spelled", SPELLED)
@pytest.mark.parametrize("video_id", [ID, *TRICKY])
def test_ids_are_found_as_corpora_spell_them(tmp_path: Path, spelled: str, video_id: str) -> None:
    listed = benchmarks(tmp_path, video_id)
    for source in (
        Source(Path("0.mp4"), source_id=spelled.format(video_id)),
        Source(Path("0.mp4"), source_id="x", name=spelled.format(video_id)),
        Source(Path("0.mp4"), source_id="x", film=spelled.format(video_id)),
    ):
        assert (listed.match(source) or "").startswith(f"Video-MME has the id {video_id}"), source


@pytest.mark.parametrize(
    "line",
    [
        *(ID, f"{ID}.mp4", f"videos/{ID}.mp4", f'"{ID}",', f"\ufeff{ID}", f"https://www.youtube.com/watch?v={ID}"),
        *(f"https://www.youtube.com/watch?t=1&v={ID}&list=x", f"https://youtu.be/{ID}?si=abc", f"youtu.be/{ID}"),
        *(f"https://youtube.com/shorts/{ID}/", f"m.youtube.com/watch?v={ID}", f"https://host.example/a/{ID}.mp4?x=1"),
    ],
)
def test_ids_are_read_as_lists_spell_them(tmp_path: Path, line: str) -> None:
    assert benchmarks(tmp_path, line).match(Source(Path(f"ytb_{ID}.mp4")))


#: Whole files in which an id would not be found, since a line of them is more than one.
OTHER_FORMS = {
    "JSON": f'["{ID}", "{TRICKY[0]}"]',
    "JSON lines": f'{{"videoID": "{ID}"}}\n{{"videoID": "{TRICKY[0]}"}}\n',
    "records": f'[\n  {{"videoID": "{ID}", "duration": "short"}}\n]\n',
    "CSV": f"videoID,duration\n{ID},short\n{TRICKY[0]},long\n",
    "quoted CSV": f'videoID,question\n{ID},"Who, and when?"\n{TRICKY[0]},"Why?"\n',
    "TSV": f"{ID}\tshort\n{TRICKY[0]}\tlong\n",
    "semicolons": f"{ID};short\n{TRICKY[0]};long\n",
    "a table": f"| {ID} | short |\n| {TRICKY[0]} | long |\n",
    "one long line": f"{ID}\n{'x' * 200_000}\n",
    "no text": f"PAR1\0\0{ID}\n",
    "nothing": "",
    "marks": '"",\n',
    "notes": "# nothing yet\n\n",
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_lists_in_which_nothing_would_be_found_are_refused(tmp_path: Path, form: str) -> None:
    (tmp_path / "list").write_text(OTHER_FORMS[form], encoding="utf-8")
    with pytest.raises(CorpusError, match=r"list, the list of the videos of Video-MME, .* per line is expected"):
        BenchmarkVideos.from_files({"Video-MME": tmp_path / "list"})


@pytest.mark.parametrize("content", [ID.encode("utf-16"), bytes(range(256)), b"\x1f\x8b\x08" + bytes(range(200, 256))])
def test_lists_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(CorpusError, match="list is no text in UTF-8"):
        BenchmarkVideos.from_files({"Video-MME": tmp_path / "list"})


def test_random_tables_are_refused_and_random_lists_are_not(tmp_path: Path) -> None:
    rng = random.Random(0)
    letters = string.ascii_letters + string.digits + "-_"
    for _ in range(60):
        ids = ["".join(rng.choices(letters, k=11)) for _ in range(rng.randint(2, 20))]
        mark, width = rng.choice("\t,;|"), rng.randint(2, 5)
        rows = [mark.join([name, *("".join(rng.choices(letters, k=5)) for _ in range(width - 1))]) for name in ids]
        with pytest.raises(CorpusError, match="is a table"):
            benchmarks(tmp_path, *rows)
        spelled = [rng.choice([name, f'"{name}",', f"{name}.mp4", f"a, b and {name}.mp4"]) for name in ids]
        listed = benchmarks(tmp_path, *spelled, rng.choice(ids))
        assert all(listed.match(Source(Path(f"{name}.mp4"), source_id=f"a, b and {name}.mp4")) for name in ids[:1])


@pytest.mark.parametrize("lines", [("[", f'"{ID}",', f'"{TRICKY[0]}"', "]"), (f"A film, or two [{ID}].mp4",), (ID,)])
def test_lists_of_names_with_marks_in_them_are_lists(tmp_path: Path, lines: tuple[str, ...]) -> None:
    assert benchmarks(tmp_path, *lines).match(Source(Path("0.mp4"), source_id=f"A film, or two [{ID}].mp4"))


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ("12", "a_12_b.mp4"),  # a short id within a longer name
        ("surveillance", "surveillance_camera_3.mp4"),  # a word
        ("20240101", "2024/20240101_120000.mp4"),  # a date
        (ID, f"x{ID}.mp4"),  # part of a longer word
        (ID, f"{ID}x.mp4"),
        (ID, f"{ID.lower()}.mp4"),
        ("b", "a/b/c.mp4"),
    ],
)
def test_what_is_no_id_does_not_match(tmp_path: Path, listed: str, name: str) -> None:
    assert benchmarks(tmp_path, listed).match(Source(Path(name), source_id=name)) is None


@pytest.mark.parametrize("listed", ["12", "movie101"])
def test_short_ids_match_without_what_corpora_write_around_them(tmp_path: Path, listed: str) -> None:
    for name in (listed, f"v_{listed}.mp4", f"{listed}_10_20.mp4", f"{listed}-Scene-004.mp4"):
        assert benchmarks(tmp_path, listed).match(Source(Path("0.mp4"), source_id=name)), name


def test_random_ids_in_random_spellings(tmp_path: Path) -> None:
    rng = random.Random(0)
    letters = string.ascii_letters + string.digits + "-_"
    ids = ["".join(rng.choices(letters, k=11)) for _ in range(300)]
    listed = benchmarks(tmp_path, *ids[:150])
    for number, video_id in enumerate(ids):
        found = listed.match(Source(Path("0.mp4"), source_id=rng.choice(SPELLED).format(video_id)))
        assert (found is not None) == (number < 150), video_id
    (matches,) = listed.matches()
    assert (matches.num_ids, matches.num_ids_matched) == (len(set(ids[:150])), len(set(ids[:150])))


def test_what_was_looked_for_and_found_is_counted_per_list(tmp_path: Path) -> None:
    digest = "ab" * 32
    listed = BenchmarkVideos.from_files(
        {
            "Video-MME": write(tmp_path / "1.txt", "# a comment\n" + "\n".join(f"{ID[:-1]}{i}" for i in range(5))),
            "MLVU": write(tmp_path / "2.txt", f"{ID[:-1]}0\nmovie\n{digest.upper()}"),
            "LVBench": write(tmp_path / "3.txt", "nothing"),
        }
    )
    assert listed.match(Source(Path("0.mp4"), source_id=f"ytb_{ID[:-1]}0"))
    assert listed.match(Source(Path("0.mp4"), source_id=f"v_{ID[:-1]}0_1_2"))  # the same id again
    assert listed.match(Source(Path("0.mp4"), source_id=f"{ID[:-1]}3"))
    assert listed.match(Source(Path("0.mp4"), source_id="other"), digest)
    assert [str(matches) for matches in listed.matches()] == [
        "Video-MME 2 of 5 ids",
        "MLVU 1 of 2 ids and 1 of 1 hashes",
        "LVBench 0 of 1 ids",
    ]
    assert "Found and left out: Video-MME 2 of 5 ids; MLVU 1 of 2 ids and 1 of 1 hashes; LVBench" in listed.checked()


def test_long_names_of_many_parts_are_compared_in_bounded_time(tmp_path: Path) -> None:
    listed = benchmarks(tmp_path, ID)
    begin = time.process_time()
    for name in ("_1" * 100_000, "-" * 100_000, "v_" * 50_000, "1_1to" * 50_000, "a/" * 50_000, "://" * 50_000):
        assert listed.match(Source(Path("0.mp4"), source_id=name)) is None
    # A bound for what goes wrong by orders of magnitude, not a measurement.
    assert time.process_time() - begin < 5
