"""The page of `longvpo inspect`, for rows and captions: what it holds, what bounds it, and that text stays text.

How it looks and acts in a browser is tested in test_inspect_browser.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cli import longvpo
from conftest import CLIP_SECONDS, COLOURS
from longvpo_hf.building.captioning import CaptioningSettings, caption_videos
from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.preference import Provenance, VideoPreference, row_schema
from longvpo_hf.publishing.dataset import DatasetWriter
from longvpo_hf.publishing.inspect_page import MAX_ROWS, captions, write_inspect_page
from longvpo_hf.publishing.inspect_page.parts import clips_to_show, sample
from longvpo_hf.publishing.inspect_page.plots import histogram
from longvpo_hf.responders import Request, ScriptedResponder
from longvpo_hf.timeline import Clip, Timeline

#: Each would act if it were taken for HTML, for the end of the page's data, or for a part of the template.
HOSTILE = (
    '</script><script>document.title = "hurt"</script>',
    '<img src="x" onerror="document.title = \'hurt\'">',
    "<!-- <script>",
    "]]> --> \u2028 \u2029 \x00 \u202e &lt;b&gt; &quot; {{data}} {{script_hash}}",
    "\"'`><svg onload=document.title='hurt'>",
    "javascript:document.title='hurt'",
)
HOSTILE_NAME = "<img src=x onerror=document.title='hurt'> \"&amp;{{data}}"


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema | None = None) -> Path:
    """A dataset's `train.parquet` without media, by default with the columns of today."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema or row_schema())
    pq.write_table(table, folder / "train.parquet")
    return folder


def write_dataset(folder: Path, preferences: Iterable[VideoPreference]) -> Path:
    with DatasetWriter(folder) as writer:
        for preference in preferences:
            writer.add(preference)
    return folder


def write_log(folder: Path, drops: Iterable[object], funnel: object) -> None:
    """The log of a build beside a dataset."""
    log = folder.with_name(folder.name + ".log")
    log.mkdir()
    (log / "dropped.jsonl").write_text("".join(json.dumps(drop) + "\n" for drop in drops), encoding="utf-8")
    (log / "funnel.json").write_text(json.dumps(funnel), encoding="utf-8")


def data_of(page: Path) -> dict[str, Any]:
    """What the page's script reads."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert match is not None
    return json.loads(match[1])


def inspected(folder: Path, **options: Any) -> dict[str, Any]:
    return data_of(write_inspect_page(folder, **options).path)


STAGE2 = Provenance("longvpo-stage2", question_type="order", reasoning="Scene #1 is green, Scene #6 is blue.")


def stage2_row(clips: Mapping[str, Clip]) -> VideoPreference:
    """A timeline of eight scenes with two of them as evidence, scored on the whole."""
    scenes = tuple(clips[name] for name in (*COLOURS, *COLOURS))
    return VideoPreference(Timeline(scenes), "Which came first?", "Red.", "Blue.", evidence=(1, 6), provenance=STAGE2)


class Elements(HTMLParser):
    """Every tag of a page with its attributes, and the text of its title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.title = ""
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_title = tag == "title"

    def handle_data(self, data: str) -> None:
        self.title += data if self._in_title else ""

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


# --------------------------------------------------------------------------------------------------- text stays text


def hostile_dataset(folder: Path, clips: Mapping[str, Clip]) -> Path:
    """A row for each hostile text, which stands in every field that takes one, and the same in the log."""
    (folder / "clips").mkdir(parents=True)
    rows = []
    for number, text in enumerate(HOSTILE):
        name = "clips/" + text.replace("/", "∕").replace("\x00", "") + ".mp4"
        shutil.copyfile(clips["red"].path, folder / name)
        clip = replace(clips["red"], path=name, caption=text, source_id=text, licence=text)
        texts = dict.fromkeys(("method", "chosen_view", "rejected_view", "question_model", "answer_model"), text)
        origin = Provenance(**texts, prompt_version=text, verdicts=(text,), similarities=(0.5,))
        preference = VideoPreference(
            Timeline((clip, clip)), text, f"{text} chosen", f"{text} rejected", (0,), (1,), origin, id=f"{number}{text}"
        )
        rows.append(preference.to_row(lambda clip: clip.path))
    rows.append({**rows[0], "id": HOSTILE[0], "chosen": [{"role": HOSTILE[0], "content": HOSTILE[1]}]})
    write_rows(folder, rows)
    drops = [{"reason": text, text: text, "number": 1} for text in HOSTILE]
    numbers = dict.fromkeys(HOSTILE, 1)
    write_log(folder, [*drops, {"reason": "lone surrogate", "text": "\ud800"}], {"stages": numbers, "dropped": numbers})
    return folder


def test_hostile_text_is_data_and_comes_back_as_it_was(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    folder = hostile_dataset(tmp_path / HOSTILE_NAME, clips)
    page = write_inspect_page(folder).path
    text = page.read_text(encoding="utf-8")
    block = text.split('id="data">')[1].split("<")[0]
    assert text.split(block)[1].startswith("</script>\n<script>\n"), "the data hold a `<`"
    assert block.isascii()
    data = json.loads(block)
    assert data["name"] == HOSTILE_NAME
    shown = [row for row in data["rows"] if "error" not in row]
    assert [row["question"] for row in shown] == list(HOSTILE)
    assert [row["clips"][0]["caption"] for row in shown] == list(HOSTILE)
    assert [row["facts"]["method"] for row in shown] == list(HOSTILE)
    assert list(data["stages"]) == list(HOSTILE)
    assert [reason["drops"][0] for reason in data["reasons"][: len(HOSTILE)]] == [
        {text: text, "number": "1"} for text in HOSTILE
    ]
    elements = Elements(text)
    assert elements.title == f"{HOSTILE_NAME} · longvpo inspect"
    assert [attributes.get("type") for attributes in elements.named("script")] == ["application/json", None]
    assert not elements.named("img")


def test_page_refers_to_nothing_outside_and_its_policy_names_its_own_script_and_style(
    tmp_path: Path, clips: Mapping[str, Clip]
) -> None:
    page = write_inspect_page(write_dataset(tmp_path / "rows", [stage2_row(clips)])).path
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    addresses = [value for _, found in elements.found for name, value in found.items() if name in ("src", "href")]
    assert addresses
    assert all(str(address).startswith(("#", "data:,")) for address in addresses)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg\b)", text)
    assert not any(name.startswith("on") for _, found in elements.found for name in found)
    policy = next(meta for meta in elements.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    hashes = {
        tag: base64.b64encode(
            hashlib.sha256(text.split(f"<{tag}>")[1].split(f"</{tag}>")[0].encode()).digest()
        ).decode()
        for tag in ("style", "script")
    }
    assert policy["content"] == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    )


def test_no_path_of_the_machine_is_on_the_page(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    folder = write_dataset(tmp_path / "rows", [stage2_row(clips)])
    next((folder / "clips").glob("*/*")).write_bytes(b"no video")
    drop = {"reason": "unreadable", "clip": f"{tmp_path}/a.mp4", "detail": f"unreadable: {tmp_path}/a.mp4: cut short"}
    write_log(folder, [drop], {"stages": {}, "dropped": {"unreadable": 1}})
    page = write_inspect_page(folder).path
    assert str(tmp_path) not in page.read_text(encoding="utf-8")
    (reason,) = data_of(page)["reasons"]
    assert reason["drops"] == [{"clip": "a.mp4", "detail": "unreadable: a.mp4: cut short"}]
    assert reason["about"] == "a clip's file cannot be decoded"


# ---------------------------------------------------------------------------------------------------------- the rows


def test_row_shows_every_clip_with_its_middle_frame(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    names = ("green", "red", "blue")
    timeline = Timeline((clips["green"], replace(clips["red"], start_seconds=1.0), clips["blue"]))
    origin = Provenance(
        "longvpo-stage1", "only(1)", "without(1)", "writer@1", "answerer@2", "p1", (0.1, 1.0, -0.2), ("v",)
    )
    preference = VideoPreference(timeline, "Q?", "yes", "no", (1,), (1,), origin)
    data = inspected(write_dataset(tmp_path / "rows", [preference]))
    (row,) = data["rows"]
    assert {
        name: row[name] for name in ("id", "question", "chosen", "rejected", "num_clips", "seconds", "verdicts")
    } == {
        "id": preference.id,
        "question": "Q?",
        "chosen": "yes",
        "rejected": "no",
        "num_clips": 3,
        "seconds": 11.0,
        "verdicts": ["v"],
    }
    assert row["facts"] == {
        "method": "longvpo-stage1",
        "chosen answer seen from": "only(1)",
        "rejected answer seen from": "without(1)",
        "question by": "writer@1",
        "answers by": "answerer@2",
        "prompt version": "p1",
        "seed": "0",
    }
    assert [(clip["index"], clip["start"], clip["end"]) for clip in row["clips"]] == [(0, 0, 4), (1, 4, 7), (2, 7, 11)]
    assert [(clip["file_start"], clip["file_end"]) for clip in row["clips"]] == [(0, 4), (1, 4), (0, 4)]
    assert [clip["similarity"] for clip in row["clips"]] == [0.1, 1.0, -0.2]
    assert row["thirds"] == [1]
    assert row["evidence_spans"] == row["reference_spans"] == [[0.3636, 0.6364]]
    # conftest's clips brighten from a half to the whole of their colour: the middle tells itself from begin and end.
    middles = {"green": 2.0, "red": 2.5, "blue": 2.0}
    for name, clip in zip(names, row["clips"], strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(data["pictures"][clip["picture"]])))
        assert image.size == (64, 64)
        brightness = 0.5 + 0.5 * middles[name] / CLIP_SECONDS
        for seen, wanted in zip(image.getpixel((32, 32)), COLOURS[name], strict=True):
            assert abs(seen - wanted * brightness) < 14, (name, image.getpixel((32, 32)))


def test_row_says_where_in_its_source_a_clip_is_from(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    cut_out = replace(clips["red"], source_id="film", source_start_seconds=3723.4)
    unnamed = replace(clips["blue"], source_start_seconds=9.0)
    preference = VideoPreference(Timeline((cut_out, unnamed)), "Q?", "yes", "no", (0,))
    (row,) = inspected(write_dataset(tmp_path / "rows", [preference]))["rows"]
    spans = [(clip["source"], clip["source_start"], clip["source_end"]) for clip in row["clips"]]
    assert spans == [("film", 3723.4, 3727.4), ("", None, None)]
    # Rows of before knew the source, and not where in it.
    older = preference.to_row(lambda clip: "clips/gone.mp4")
    for clip in older["clips"]:
        clip["source_id"] = clip.pop("origin")["source_id"]
    write_rows(tmp_path / "older", [older], schema=pa.Table.from_pylist([older]).schema)
    (row,) = inspected(tmp_path / "older")["rows"]
    assert [(clip["source"], clip["source_start"]) for clip in row["clips"]] == [("film", None), ("", None)]


def test_rows_of_any_numbers_are_shown_or_say_what_is_wrong(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rng = random.Random(1)
    rows = []
    for number in range(200):
        row = preferences[number % len(preferences)].to_row(lambda clip: "clips/gone.mp4")
        for clip in row["clips"]:
            bounds = [0.0, 1.0, -1.0, 5e-324, 1e-300, 1e300, 1.7e308, math.inf, math.nan]
            clip["start_seconds"], clip["end_seconds"] = rng.choice(bounds), rng.choice(bounds)
            clip["origin"]["start_seconds"] = rng.choice(bounds)
        row["evidence"] = rng.choice([[0], [-1], [2**31 - 1], [0, 0], []])
        row["provenance"]["similarities"] = rng.choice([[], [math.nan], [1e308, -1e308], [0.5] * 9])
        rows.append(row)
    write_rows(tmp_path / "rows", rows)
    data = inspected(tmp_path / "rows")
    wrong = [row for row in data["rows"] if "error" in row]
    assert len(data["rows"]) == 200
    assert 20 < len(wrong) == data["invalid"] < 200


def test_stage_2_row_has_several_evidence_clips_and_the_whole_as_reference(
    tmp_path: Path, clips: Mapping[str, Clip]
) -> None:
    data = inspected(write_dataset(tmp_path / "rows", [stage2_row(clips)]))
    (row,) = data["rows"]
    assert row["evidence"] == [1, 6]
    assert row["facts"]["kind of question"] == "order"
    assert row["facts"]["reasoning"] == "Scene #1 is green, Scene #6 is blue."
    assert row["evidence_spans"] == [[0.125, 0.25], [0.75, 0.875]]
    assert row["reference"] == []
    assert row["reference_spans"] == [[0, 1]]
    assert row["thirds"] == [0, 2]
    assert len(data["pictures"]) == len(COLOURS), "a clip that stands twice is one picture"


def test_third_is_of_the_seconds_not_of_the_clips(tmp_path: Path) -> None:
    timeline = Timeline(tuple(Clip("clips/gone.mp4", 0.0, seconds) for seconds in (8.0, 1.0, 1.0)))
    rows = [VideoPreference(timeline, "Q?", "yes", "no", (index,)).to_row(lambda clip: clip.path) for index in range(3)]
    data = inspected(write_rows(tmp_path / "rows", rows))
    assert [row["thirds"] for row in data["rows"]] == [[1], [2], [2]]


def test_clip_without_picture_says_why_and_stops_nothing(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    folder = tmp_path / "rows"
    (folder / "clips").mkdir(parents=True)
    shutil.copyfile(clips["red"].path, folder / "clips" / "good.mp4")
    shutil.copyfile(clips["red"].path, tmp_path / "secret.mp4")
    (folder / "clips" / "text.mp4").write_text("no video", encoding="utf-8")
    spans = [
        ("clips/good.mp4", 0.0, 4.0),
        ("clips/text.mp4", 0.0, 4.0),
        ("clips/gone.mp4", 0.0, 4.0),
        ("clips/good.mp4", 3.0, 9.0),
        ("../secret.mp4", 0.0, 4.0),
        (str(tmp_path / "secret.mp4"), 0.0, 4.0),
    ]
    timeline = Timeline(tuple(Clip(*span) for span in spans))
    preference = VideoPreference(timeline, "Q?", "yes", "no", (0,), (0,))
    data = inspected(write_rows(folder, [preference.to_row(lambda clip: clip.path)]))
    shown = data["rows"][0]["clips"]
    assert [clip["picture"] for clip in shown] == [0, None, None, None, None, None]
    assert [clip["problem"].split(":")[0] for clip in shown] == [
        "", "unreadable", "missing_file", "beyond_end", "outside", "outside",
    ]  # fmt: skip
    assert len(data["pictures"]) == 1


def test_rows_of_any_types_are_rows_and_never_the_end_of_the_page(
    tmp_path: Path, preferences: list[VideoPreference]
) -> None:
    """Every column, and some fields of provenance, as each of many types; the other rows' page is written."""
    good = preferences[0].to_row(lambda clip: "clips/gone.mp4")
    not_text = pa.array([b"\xff\xfe<script>"], pa.binary()).view(pa.string())
    others = [
        pa.array([None], pa.null()),
        pa.array([2**63 - 1]),
        pa.array([1e308]),
        pa.array([True]),
        pa.array(["<script>alert(1)</script>"]),
        pa.array([b"\xff"]),
        not_text,
        pa.array([2**62], pa.timestamp("us")),
        pa.array([[["nested"]]]),
        pa.array([[None]], pa.list_(pa.string())),
        pa.array([[{"role": "user", "content": None}]]),
        pa.array([[{"role": 1, "content": ["x"]}]]),
        pa.array([{"file_name": 5, "start_seconds": "x"}]),
        pa.array([[{"video": "a\x00b", "start_seconds": 1.0, "end_seconds": 1e300}]]),
    ]
    whole = pa.Table.from_pylist([good])
    tables = [whole.set_column(i, name, [other]) for i, name in enumerate(whole.column_names) for other in others]
    for name, value in itertools.product(good["provenance"], ([["x"]], {"a": 1}, 2**63 - 1, "<b>", [None], None)):
        tables.append(pa.Table.from_pylist([{**good, "provenance": {name: value}}]))
    for number, table in enumerate(tables):
        folder = tmp_path / f"rows{number}"
        folder.mkdir()
        pq.write_table(table, folder / "train.parquet")
        data = inspected(folder)
        assert len(data["rows"]) == 1, table.schema
        assert data["invalid"] == sum("error" in row for row in data["rows"])
        assert "<script>alert" not in (folder / "inspect.html").read_text(encoding="utf-8")


def test_row_that_is_no_preference_says_why_and_is_counted(tmp_path: Path, preferences: list[VideoPreference]) -> None:
    rows = [preference.to_row(lambda clip: "clips/gone.mp4") for preference in preferences]
    rows[2]["rejected"] = [{"role": "assistant", "content": preferences[2].chosen}]
    rows[5]["evidence"] = [3]
    data = inspected(write_rows(tmp_path / "rows", rows))
    assert data["invalid"] == 2
    assert [row["number"] for row in data["rows"] if "error" in row] == [2, 5]
    assert "there is nothing to prefer" in data["rows"][2]["error"]
    assert data["rows"][2]["id"] == preferences[2].id
    assert "must be in [0, 3), got 3" in data["rows"][5]["error"]
    assert sum(data["plots"][0]["counts"]) == 6


def by_reference(folder: Path, root: Path, clips: Mapping[str, Clip]) -> Path:
    """Rows that name their media below `root`, which holds them, without holding them themselves."""
    paths = [root / "a" / "red.mp4", root / "blue.mp4"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clips[path.stem].path, path)
    timeline = Timeline(tuple(Clip(str(path), 0.0, CLIP_SECONDS) for path in paths))
    with DatasetWriter(folder, media_root=root) as writer:
        writer.add(VideoPreference(timeline, "Q?", "yes", "no", (0,), (0,)))
    return folder


def test_rows_by_reference_have_pictures_where_their_media_lie(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    folder = by_reference(tmp_path / "rows", tmp_path / "corpus", clips)
    without = inspected(folder)
    assert [clip["problem"].split(":")[0] for clip in without["rows"][0]["clips"]] == ["missing_file"] * 2
    assert without["notices"] == ["These rows come without their media. Name the folder it lies in with --video-root."]
    data = inspected(folder, video_root=tmp_path / "corpus")
    assert [clip["picture"] for clip in data["rows"][0]["clips"]] == [0, 1]
    assert [clip["file"] for clip in data["rows"][0]["clips"]] == ["a/red.mp4", "blue.mp4"]
    assert data["notices"] == []
    with pytest.raises(ValueError, match=r"video_root must be the folder that the rows' media lie in, got .*nowhere"):
        write_inspect_page(folder, video_root=tmp_path / "nowhere")


def test_nothing_outside_of_the_video_root_is_opened(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    root = tmp_path / "corpus"
    folder = by_reference(tmp_path / "rows", root, clips)
    shutil.copyfile(clips["green"].path, tmp_path / "secret.mp4")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "inner.mp4").symlink_to(root / "blue.mp4")
    names = ("link.mp4", "../secret.mp4", str(tmp_path / "secret.mp4"), str(root / "blue.mp4"), "inner.mp4")
    timeline = Timeline(tuple(Clip(name, 0.0, CLIP_SECONDS) for name in names))
    write_rows(folder, [VideoPreference(timeline, "Q?", "yes", "no", (0,), (0,)).to_row(lambda clip: clip.path)])
    data = inspected(folder, video_root=root)
    problems = [clip["problem"].split(":")[0] for clip in data["rows"][0]["clips"]]
    assert problems == ["outside", "outside", "outside", "outside", ""]


# ---------------------------------------------------------------------------------------------------- captioned videos


def captions_of(
    folder: Path, videos: Iterable[Timeline], texts: Iterable[str] = (), captioner: str = "captioner@1"
) -> list[CaptionedVideo]:
    """Captions that a script gives; `texts` are those of the first scenes, in turn."""
    given = iter(texts)

    def tell(request: Request) -> str:
        assert request.view.keep is not None
        return next(given, f"Scene {request.view.keep[0]} shows a colour.")

    summariser = ScriptedResponder("summariser@1", lambda request: "Colours follow on colours.")
    settings = CaptioningSettings(420, 100, 100, 4)  # sums up from about 12 captions on
    return caption_videos(list(videos), ScriptedResponder(captioner, tell), summariser, folder, settings)


def scenes(clips: Mapping[str, Clip], number: int, source_id: str = "walk.mp4") -> Timeline:
    names = list(COLOURS)
    return Timeline(
        tuple(
            replace(clips[names[i % 4]], source_id=source_id, licence="MIT", end_seconds=(2.0, 4.0)[i % 2])
            for i in range(number)
        )
    )


def test_captions_are_shown_as_timelines_under_their_summaries(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    captioned, _ = captions_of(tmp_path / "captions", [scenes(clips, 20), scenes(clips, 2, "")], ["", "A dog."])
    page = write_inspect_page(tmp_path / "captions", video_root=Path(clips["red"].path).parent)
    assert (page.num_rows, page.total_rows, page.things) == (2, 2, "videos")
    text = page.path.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert str(Path(clips["red"].path).parent) not in text
    data = data_of(page.path)
    assert (data["kind"], data["name"], data["total"]) == ("videos", "captions", 2)
    assert data["facts"] == ["captions by captioner@1", "summaries by summariser@1"]
    video, short = data["rows"]
    assert (video["id"], short["id"]) == ("walk.mp4", "red.mp4")
    assert (video["num_clips"], video["num_captions"], video["seconds"]) == (20, 19, 60.0)
    assert video["history"] == list(captioned.history)
    assert [scene["caption"] for scene in video["scenes"]] == [clip.caption for clip in captioned.timeline.clips]
    assert video["scenes"][0]["caption"] == ""
    scene = video["scenes"][3]
    assert (scene["start"], scene["end"], scene["span"]) == (8, 12, [0.1333, 0.2])
    assert (scene["file_start"], scene["file_end"], scene["file"], scene["licence"]) == (0, 4, "white.mp4", "MIT")
    assert scene["path"] == [summary.id for summary in captioned.summary_path(3)] != []
    assert [(one["level"], one["first"], one["last"], one["text"]) for one in video["summaries"]] == [
        (summary.level, summary.first_scene, summary.last_scene, "Colours follow on colours.")
        for summary in sorted(captioned.summaries, key=lambda one: (one.first_scene, -one.level))
    ]
    assert video["summaries"][0]["span"][0] == round(2 / 60, 4), "scene 0 has no caption, so nothing sums it up"
    assert len(data["pictures"]) == 4, "a scene that stands in two videos is one picture"
    plots = {plot["title"]: plot for plot in data["plots"]}
    assert sum(plots["Length of a caption"]["counts"]) == sum(plots["Summaries over a scene"]["counts"]) == 21
    assert [reason["name"] for reason in data["reasons"]] == ["empty_caption"]
    assert data["stages"]["scenes"] == 22


def test_captions_are_bounded_whatever_their_scenes(
    tmp_path: Path, clips: Mapping[str, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = [scenes(clips, 50) for _ in range(10)]
    captions_of(tmp_path / "captions", videos)
    monkeypatch.setattr(captions, "_SCENES", 100)
    monkeypatch.setattr(captions, "PICTURES", 20)
    data = inspected(tmp_path / "captions", num_rows=5, video_root=Path(clips["red"].path).parent)
    assert len(data["rows"]) == 5
    for video in data["rows"]:
        shown = [scene["index"] for scene in video["scenes"]]
        assert len(shown) == 20
        assert max(b - a for a, b in zip([-1, *shown], [*shown, 50], strict=True)) <= 3, "spread over the timeline"
        assert sum(scene["picture"] is not None for scene in video["scenes"]) == 4
        assert len(video["summaries"]) <= 20


def test_captions_show_no_picture_of_a_file_elsewhere(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    captions_of(tmp_path / "captions", [scenes(clips, 2)])
    data = inspected(tmp_path / "captions")
    assert data["pictures"] == []
    assert all(scene["problem"].startswith("outside: ") for scene in data["rows"][0]["scenes"])


def test_hostile_captions_are_data(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    page = write_inspect_page(hostile_captions(tmp_path / HOSTILE_NAME, clips)).path
    text = page.read_text(encoding="utf-8")
    block = text.split('id="data">')[1].split("<")[0]
    assert text.split(block)[1].startswith("</script>\n<script>\n"), "the data hold a `<`"
    data = json.loads(block)
    captions = [scene["caption"] for scene in data["rows"][0]["scenes"]]
    assert captions[: len(HOSTILE)] == [" ".join(text.split()) for text in HOSTILE]
    assert not Elements(text).named("img")


def hostile_captions(folder: Path, clips: Mapping[str, Clip]) -> Path:
    timeline = Timeline(
        tuple(replace(clip, source_id=HOSTILE[0], licence=HOSTILE[1]) for clip in scenes(clips, 14).clips)
    )
    captions_of(folder, [timeline], HOSTILE, captioner=HOSTILE[1])
    return folder


def test_broken_captions_are_named(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    captions_of(tmp_path / "captions", [scenes(clips, 1)])
    (tmp_path / "captions" / "scenes.parquet").unlink()
    with pytest.raises(ValueError, match=r"captions lacks scenes\.parquet"):
        write_inspect_page(tmp_path / "captions")


# ------------------------------------------------------------------------------------------------ sampling and bounds


def many_rows(total: int, num_clips: int = 1, text: str = "yes") -> list[dict[str, Any]]:
    timeline = Timeline((Clip("clips/gone.mp4", 0.0, 4.0),) * num_clips)
    return [
        VideoPreference(timeline, f"Question {i}?", text, "no", (i % num_clips,)).to_row(lambda clip: clip.path)
        for i in range(total)
    ]


def test_rows_are_drawn_evenly_and_by_the_seed(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "rows", many_rows(1003))
    first, again, other = (
        write_inspect_page(folder, tmp_path / f"{name}.html", num_rows=10, seed=seed)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert (first.num_rows, first.total_rows) == (10, 1003)
    assert first.path.read_bytes() == again.path.read_bytes()
    numbers = [row["number"] for row in data_of(first.path)["rows"]]
    assert [number * 10 // 1003 for number in numbers] == list(range(10)), "one of each tenth"
    assert [row["question"] for row in data_of(first.path)["rows"]] == [f"Question {number}?" for number in numbers]
    assert numbers != [row["number"] for row in data_of(other.path)["rows"]]
    assert data_of(first.path)["total"] == 1003


@pytest.mark.parametrize(("total", "wanted"), [(3, 2), (7, 5), (10, 10), (2, 200), (0, 5)])
def test_no_row_is_drawn_twice(total: int, wanted: int) -> None:
    for seed in range(20):
        drawn = sample(total, wanted, seed)
        assert len(set(drawn)) == len(drawn) == min(total, wanted)
        assert drawn == sorted(drawn)
        assert all(0 <= number < total for number in drawn)


@pytest.mark.parametrize("num_rows", [0, MAX_ROWS + 1])
def test_number_of_rows_is_bounded(tmp_path: Path, num_rows: int) -> None:
    folder = write_rows(tmp_path / "rows", many_rows(1))
    with pytest.raises(ValueError, match=rf"^num_rows must be in \[1, 5000\] .* got {num_rows}\.$"):
        write_inspect_page(folder, num_rows=num_rows)


def test_page_is_bounded_by_its_rows_not_by_theirs(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "rows", many_rows(200, num_clips=300, text="long " * 20_000))
    data = inspected(folder)
    assert len(data["rows"]) == 200
    for row in data["rows"]:
        shown = [clip["index"] for clip in row["clips"]]
        assert len(shown) == 24
        assert set(row["evidence"]) <= set(shown)
        assert max(b - a for a, b in zip([-1, *shown], [*shown, 300], strict=True)) < 40, "spread over the timeline"
        assert row["chosen"].endswith("… (96,000 more characters)")
    assert (folder / "inspect.html").stat().st_size < 4_000_000
    assert len(inspected(folder, num_rows=20)["rows"][0]["clips"]) == 64, "fewer rows, more of each"


def test_clips_to_show_are_evidence_then_reference_then_others() -> None:
    assert clips_to_show(4, (1,), (), 9) == [0, 1, 2, 3]
    assert clips_to_show(100, (7, 93), (40,), 3) == [7, 40, 93]
    assert clips_to_show(100, (7, 93), (40, 41), 3) == [7, 41, 93]
    assert clips_to_show(100, tuple(range(100)), (), 2) == [25, 75]
    assert clips_to_show(100, (0,), (), 3) == [0, 25, 75]


def test_dataset_without_rows_is_a_page(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "rows", [])
    write_log(folder, [{"reason": "no_distractors"}], {"stages": {"rows": 0}, "dropped": {"no_distractors": 1}})
    data = inspected(folder)
    assert (data["rows"], data["plots"], data["total"]) == ([], [], 0)
    assert data["stages"] == {"rows": 0}


# ------------------------------------------------------------------------------------------------ plots and the log


def test_plots_count_all_rows_also_those_not_shown(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        num_clips = 2 + number % 4
        clips = tuple(Clip("clips/gone.mp4", 0.0, 2.0) for _ in range(num_clips))
        similarities = tuple(1.0 if i == 0 else (0.31, math.nan)[number % 2] for i in range(num_clips))
        preference = VideoPreference(
            Timeline(clips), f"{number}?", "yes", "no", (0,), (0,), Provenance(similarities=similarities)
        )
        rows.append(preference.to_row(lambda clip: clip.path))
    data = inspected(write_rows(tmp_path / "rows", rows), num_rows=3)
    plots = {plot["title"]: plot for plot in data["plots"]}
    places = plots["Where the evidence stands"]
    # The first of 2, 3, 4 and 5 equal clips has its middle at 25, 16.7, 12.5 and 10 % of the timeline.
    assert places["counts"] == [0, 30, 10, 0, 0, 0, 0, 0, 0, 0]
    assert places["expected"] == 4
    lengths = plots["Clips per row"]
    assert dict(zip(lengths["labels"], lengths["counts"], strict=True)) == {"2": 10, "3": 10, "4": 10, "5": 10}
    seconds = plots["Length of a timeline"]
    assert (seconds["axis"], sum(seconds["counts"])) == ("seconds", 40)
    likeness = plots["How like the anchor the others are"]
    # Even rows have 2 or 4 clips: 1 or 3 others, all at 0.31; odd rows say nothing.
    assert dict(zip(likeness["edges"], likeness["counts"], strict=False))["0.3"] == sum(likeness["counts"]) == 40


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({7.5: 3}, {"labels": ["7.5"], "counts": [3]}),
        ({0.0: 1, 24.0: 2}, {"edges": [f"{2 * i}" for i in range(14)], "counts": [1, *[0] * 11, 2]}),
        ({100.0: 1, 130.0: 4}, {"edges": [f"{100 + 5 * i}" for i in range(8)], "counts": [1, 0, 0, 0, 0, 0, 4]}),
        ({0.1: 1, 0.3: 1}, {"edges": [f"{0.1 + 0.02 * i:g}" for i in range(12)], "counts": [1, *[0] * 9, 1]}),
    ],
)
def test_histogram_has_round_bounds(numbers: dict[float, int], expected: dict[str, Any]) -> None:
    assert histogram(numbers) == expected


def test_some_drops_of_each_reason_are_shown_and_all_counted(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "rows", many_rows(1))
    drops = [{"reason": "answers_agree", "number": i} for i in range(1000)] + [{"reason": "empty_answer", "chosen": ""}]
    write_log(folder, drops, {"stages": {"clips": 9, "rows": 1}, "dropped": {"answers_agree": 1000, "empty_answer": 1}})
    data = inspected(folder)
    assert data["stages"] == {"clips": 9, "rows": 1}
    assert [(reason["name"], reason["total"], len(reason["drops"])) for reason in data["reasons"]] == [
        ("answers_agree", 1000, 25),
        ("empty_answer", 1, 1),
    ]
    numbers = [int(drop["number"]) for drop in data["reasons"][0]["drops"]]
    assert len(set(numbers)) == 25
    assert max(numbers) > 500 > min(numbers), "from the whole file"


def test_log_that_broke_off_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "rows", many_rows(1))
    write_log(folder, [{"reason": "refusal"}, {"reason": 3}, ["no drop"]], {"stages": {"rows": "many"}, "dropped": {}})
    with (folder.with_name("rows.log") / "dropped.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"reason": "answers_a')
    data = inspected(folder)
    assert [(reason["name"], reason["total"]) for reason in data["reasons"]] == [("refusal", 1)]
    assert data["stages"] == {}
    lines, funnel = data["notices"]
    assert lines == "Lines of rows.log/dropped.jsonl that could not be read and are not shown: 3."
    assert funnel.startswith("rows.log/funnel.json could not be read: 'stages' must name whole numbers")


def test_dataset_without_a_log_says_nothing_of_it(tmp_path: Path) -> None:
    data = inspected(write_rows(tmp_path / "rows", many_rows(1)))
    assert (data["stages"], data["reasons"], data["notices"]) == ({}, [], [])


# ---------------------------------------------------------------------------------------------------- files, command


def test_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no preference dataset: it lacks train\.parquet"):
        write_inspect_page(tmp_path)
    (tmp_path / "train.parquet").write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as Parquet"):
        write_inspect_page(tmp_path)
    pq.write_table(pa.table({"id": ["a"], "prompt": ["b"]}), tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match=r"lacks the columns \['chosen', 'clips', 'evidence', 'reference', 'rejected'\]"
    ):
        write_inspect_page(tmp_path)
    assert not (tmp_path / "inspect.html").exists()


def test_command_writes_the_page_and_says_what_it_shows(
    tmp_path: Path, clips: Mapping[str, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path / "rows", [stage2_row(clips)])
    monkeypatch.chdir(folder)
    result = longvpo(["inspect", "."])
    assert result.exit_code == 0, result.output
    assert f"Showing 1 of 1 rows: {folder / 'inspect.html'}" in result.output
    assert data_of(folder / "inspect.html")["name"] == "rows", "`.` has a name"
    result = longvpo(["inspect", ".", "--rows", "1", "--seed", "3", "--output", "new/page.html"])
    assert result.exit_code == 0, result.output
    assert data_of(folder / "new" / "page.html")["seed"] == 3


def test_command_shows_captions_and_media_that_lie_elsewhere(tmp_path: Path, clips: Mapping[str, Clip]) -> None:
    captions_of(tmp_path / "captions", [scenes(clips, 2)])
    result = longvpo(["inspect", str(tmp_path / "captions")])
    assert result.exit_code == 0, result.output
    assert f"Showing 1 of 1 videos: {tmp_path / 'captions' / 'inspect.html'}" in result.output
    folder = by_reference(tmp_path / "rows", tmp_path / "corpus", clips)
    result = longvpo(["inspect", str(folder), "--video-root", str(tmp_path / "corpus")])
    assert result.exit_code == 0, result.output
    assert len(data_of(folder / "inspect.html")["pictures"]) == 2


def test_command_refuses_in_one_line(tmp_path: Path) -> None:
    result = longvpo(["inspect", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"longvpo inspect: {tmp_path} is no preference dataset")
    assert "Traceback" not in result.stderr
