"""The Stage-1 builder on real files: what each answer saw, where the anchors stand, what is dropped and why.

How a build survives kills, and its judge, are in `test_kills.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from numpy.typing import NDArray

from longvpo_hf.errors import ConfigError
from longvpo_hf.frames import FrameSampler
from longvpo_hf.methods.stage1 import Stage1Settings, build_stage1
from longvpo_hf.preference import VideoPreference, undecoded
from longvpo_hf.responders import Request, Responder, ScriptedResponder
from longvpo_hf.timeline import Clip
from media import indices_of, write_video

FRAMES_PER_CLIP = 3
NUM_CLIPS = 24


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """24 clips of three files: clip i shows frames 3 i, 3 i + 1 and 3 i + 2, for a tenth of a second each."""
    folder = tmp_path_factory.mktemp("pool")
    clips = []
    for number in range(3):
        first = number * NUM_CLIPS // 3
        path = write_video(
            folder / f"{number}.mp4", FRAMES_PER_CLIP * NUM_CLIPS // 3, 10, first=FRAMES_PER_CLIP * first
        )
        clips += [
            Clip(str(path), 0.3 * i, 0.3 * (i + 1), source_id=f"video {number}", licence="cc0-1.0")
            for i in range(NUM_CLIPS // 3)
        ]
    return clips


def unrelated(pool: Sequence[Clip]) -> list[Clip]:
    """The clips as if each were of a video of its own."""
    return [replace(clip, source_id=f"video of clip {number}") for number, clip in enumerate(pool)]


def seen(request: Request) -> list[int]:
    """Which clips of the pool a request shows, by the frames that are decoded for it."""
    assert request.timeline is not None
    num_clips = len(request.view.of(request.timeline))
    frames = FrameSampler(FRAMES_PER_CLIP * num_clips)(request.timeline, request.view)
    shown = [index // FRAMES_PER_CLIP for index in indices_of(frames.pixels)]
    assert shown == [clip for clip in shown[::FRAMES_PER_CLIP] for _ in range(FRAMES_PER_CLIP)]
    return shown[::FRAMES_PER_CLIP]


#: Asks about the one clip it sees; answers with the numbers of the clips it sees.
WRITER = ScriptedResponder("writer@1", lambda request: f"what is in number {seen(request)} ?")
ANSWERER = ScriptedResponder("answerer@2", lambda request: f"saw {seen(request)}")


def build(
    pool: Sequence[Clip],
    output: Path,
    embed: Any = None,
    writer: Responder = WRITER,
    answerer: Responder = ANSWERER,
    **settings: Any,
) -> tuple[list[VideoPreference], dict[str, dict[str, int]]]:
    """The rows of a build as the trainer reads them, and its funnel."""
    funnel = build_stage1(pool, writer, answerer, output, Stage1Settings(**settings), embed)
    if not funnel["stages"]["rows"]:
        return [], funnel
    # A cache of its own: `datasets` tells folders apart by their last name alone.
    cache = str(output.with_name(output.name + ".cache"))
    dataset = undecoded(load_dataset(str(output), split="train", cache_dir=cache))
    return [VideoPreference.from_row(row) for row in dataset], funnel


def shown_by(row: VideoPreference) -> list[int]:
    return seen(Request("", row.timeline))


def test_chosen_saw_the_anchor_alone_and_rejected_all_but_it(pool: list[Clip], tmp_path: Path) -> None:
    rows, _ = build(pool, tmp_path / "rows", num_rows=30, max_clips=5)
    assert len(rows) == 30
    assert {len(row.timeline) for row in rows} == {2, 3, 4, 5}
    for row in rows:
        clips, (anchor,) = shown_by(row), row.evidence
        assert len(set(clips)) == len(clips), "a clip stands twice in a timeline"
        assert row.question == f"what is in number {[clips[anchor]]} ?"
        assert row.chosen == f"saw {[clips[anchor]]}"
        assert row.rejected == f"saw {clips[:anchor] + clips[anchor + 1 :]}"
        assert row.reference == row.evidence
        assert row.provenance.chosen_view == f"only({anchor})"
        assert row.provenance.rejected_view == f"without({anchor})"
        assert (row.provenance.question_model, row.provenance.answer_model) == ("writer@1", "answerer@2")
        assert row.provenance.method == "longvpo-stage1"
        assert row.provenance.similarities == ()
        assert {clip.licence for clip in row.timeline.clips} == {"cc0-1.0"}


@pytest.mark.parametrize("questions_per_timeline", [1, 3])
def test_every_question_of_a_timeline_has_its_own_anchor(
    pool: list[Clip], tmp_path: Path, questions_per_timeline: int
) -> None:
    settings = {"num_rows": 24, "min_clips": 3, "max_clips": 6, "questions_per_timeline": questions_per_timeline}
    rows, _ = build(unrelated(pool), tmp_path / "rows", **settings)
    anchors: dict[Any, list[int]] = {}
    for row in rows:
        anchors.setdefault(row.timeline, []).extend(row.evidence)
        assert row.rejected == f"saw {[clip for i, clip in enumerate(shown_by(row)) if i not in row.evidence]}"
    assert len(anchors) == 24 // questions_per_timeline
    assert all(len(set(places)) == questions_per_timeline for places in anchors.values())


def test_anchors_stand_everywhere_alike(pool: list[Clip], tmp_path: Path) -> None:
    rows, _ = build(pool, tmp_path / "rows", num_rows=48, min_clips=4, max_clips=4, seed=3)
    # One anchor in each of 48 equal parts of the timeline, so 12 at each of 4 places: not about, but exactly.
    assert Counter(row.evidence[0] for row in rows) == {0: 12, 1: 12, 2: 12, 3: 12}


def test_same_seed_same_bytes(pool: list[Clip], tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        build(pool, tmp_path / name, num_rows=20, max_clips=4, seed=seed)
    contents = {
        name: {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in "abc"
    }
    assert contents["a"] == contents["b"]
    assert contents["a"]["train.parquet"] != contents["c"]["train.parquet"]
    assert sorted(contents["a"]) == [
        "README.md",
        *sorted(n for n in contents["a"] if n.startswith("clips/")),
        "longvpo.json",
        "train.parquet",
    ]
    assert len(contents["a"]) == 6, "three files of media, each once"


# --------------------------------------------------------------------------------------------- similarity filter


def embed(clips: Sequence[Clip]) -> NDArray[np.float64]:
    """Eight kinds of clips, any two of them at a cosine of 0.5, all of one kind at 1; lengths differ."""
    kinds = 0.5**0.5 * np.concatenate([np.eye(8), np.ones((8, 1))], axis=1)
    return kinds[np.arange(len(clips)) % 8] * (1 + np.arange(len(clips)))[:, None]


def test_no_distractor_is_like_an_anchor_and_rows_say_how_like(pool: list[Clip], tmp_path: Path) -> None:
    rows, _ = build(pool, tmp_path / "rows", embed, num_rows=40, max_clips=6, questions_per_timeline=2)
    for row in rows:
        clips, (anchor,) = shown_by(row), row.evidence
        expected = [1.0 if clip % 8 == clips[anchor] % 8 else 0.5 for clip in clips]
        assert row.provenance.similarities == pytest.approx(expected)
        assert expected.count(1.0) == 1, "a clip of the anchor's kind is among the distractors"
    unfiltered, _ = build(pool, tmp_path / "unfiltered", num_rows=40, max_clips=6)
    assert any(len({clip % 8 for clip in shown_by(row)}) < len(row.timeline) for row in unfiltered)
    assert "cosine ≤ 0.6" in (tmp_path / "rows" / "README.md").read_text()
    assert "not applied" in (tmp_path / "unfiltered" / "README.md").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_without_an_embedder_no_distractor_is_of_the_anchor_s_video(
    pool: list[Clip], tmp_path: Path, seed: int
) -> None:
    settings = {"num_rows": 30, "max_clips": 8, "questions_per_timeline": 2, "seed": seed}
    rows, funnel = build(pool, tmp_path / "rows", **settings)
    assert len(rows) == 30
    for row in rows:
        videos = [clip.source_id for clip in row.timeline.clips]
        assert videos.count(videos[row.evidence[0]]) == 1
    assert set(funnel["dropped"]) <= {"no_distractors", "duplicate_row", "duplicate_question"}
    assert "clips of one video are not distractors of each other" in (tmp_path / "rows" / "README.md").read_text()
    named_by_path, _ = build([replace(clip, source_id="") for clip in pool], tmp_path / "paths", **settings)
    assert [shown_by(row) for row in named_by_path] == [shown_by(row) for row in rows]


def test_clips_of_one_video_alone_need_an_embedder(pool: list[Clip], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"All clips are of one video.*give an embedder"):
        build(pool[:8], tmp_path / "rows", num_rows=2, max_clips=2)
    rows, _ = build(pool[:8], tmp_path / "rows", embed, num_rows=2, max_clips=2)
    assert len(rows) == 2


def test_too_few_unlike_clips_are_counted_and_said(pool: list[Clip], tmp_path: Path) -> None:
    alike = {"num_rows": 10, "min_clips": 2, "max_clips": 3, "max_similarity": 0.4, "max_rounds": 2}
    # All clips are alike at a bound of 0.4.
    with pytest.raises(ValueError, match="No row came out; dropped: no_distractors 20"):
        build(pool, tmp_path / "rows", embed, **alike)
    funnel = json.loads((tmp_path / "rows.log" / "funnel.json").read_text())
    assert funnel["dropped"] == {"no_distractors": 20}
    assert funnel["stages"]["rows"] == 0


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((3, 2)), r"one vector per clip, \[24, dim\], got shape \[3, 2\]"),
        (np.ones(24), r"one vector per clip, \[24, dim\], got shape \[24\]"),
        (np.zeros((24, 2)), "24 zero vectors; a cosine needs a direction"),
    ],
)
def test_embeddings_are_checked(pool: list[Clip], tmp_path: Path, vectors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(pool, tmp_path / "rows", lambda clips: vectors, num_rows=1, max_clips=2)
    assert not (tmp_path / "rows").exists()


# --------------------------------------------------------------------------------------------------------- drops


def test_an_unreadable_clip_is_dropped_and_its_batch_is_not_lost(pool: list[Clip], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(pool[0].path).read_bytes()[:700])
    bad = [Clip(str(broken), 0.0, 0.3), Clip(str(tmp_path / "no.mp4"), 0.0, 0.3), Clip(pool[0].path, 2.3, 9.0)]
    rows, funnel = build([*bad, *unrelated(pool)[:9]], tmp_path / "rows", num_rows=25, max_clips=3, max_rounds=20)
    assert len(rows) == 25 == funnel["stages"]["rows"]
    paths = {(clip.start_seconds, clip.end_seconds) for row in rows for clip in row.timeline.clips}
    assert paths <= {(clip.start_seconds, clip.end_seconds) for clip in pool[:9]}
    assert {"unreadable", "missing_file", "beyond_end"} == set(funnel["dropped"])
    dropped = read_dropped(tmp_path / "rows")
    assert Counter(drop["reason"] for drop in dropped) == funnel["dropped"]
    for reason, clip in zip(("unreadable", "missing_file", "beyond_end"), bad, strict=True):
        details = [drop["detail"] for drop in dropped if drop["reason"] == reason]
        assert details
        assert all(f"{clip.path} [{clip.start_seconds}, {clip.end_seconds}) s" in detail for detail in details)


def read_dropped(output: Path) -> list[dict[str, Any]]:
    lines = (output.with_name(output.name + ".log") / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_dropped_and_funnel_files_say_what_happened(pool: list[Clip], tmp_path: Path) -> None:
    def write(request: Request) -> str:
        (clip,) = seen(request)
        return "" if clip % 4 == 0 else f"what is in number {clip} ?"

    def answer(request: Request) -> str:
        clips = seen(request)
        if len(clips) > 1:
            return "SAW the  seven!"
        return "saw seven" if clips[0] % 4 == 1 else "" if clips[0] % 4 == 2 else f"saw {clips[0]}"

    rows, funnel = build(
        pool,
        tmp_path / "rows",
        writer=ScriptedResponder("writer", write),
        answerer=ScriptedResponder("answerer", answer),
        num_rows=12,
        min_clips=3,
        max_clips=3,
        max_rounds=30,
    )
    assert len(rows) == 12
    assert {shown_by(row)[row.evidence[0]] % 4 for row in rows} == {3}
    assert set(funnel["dropped"]) == {"empty_question", "empty_answer", "answers_agree"}
    dropped = read_dropped(tmp_path / "rows")
    assert Counter(drop["reason"] for drop in dropped) == funnel["dropped"]
    agreeing = next(drop for drop in dropped if drop["reason"] == "answers_agree")
    assert (agreeing["chosen"], agreeing["rejected"]) == ("saw seven", "SAW the  seven!")
    log = tmp_path / "rows.log"
    assert json.loads((log / "funnel.json").read_text()) == funnel
    stages = funnel["stages"]
    assert (stages["clips"], stages["rows"]) == (NUM_CLIPS, 12)
    beyond = stages.get("drafts beyond the rows asked for", 0)
    assert stages["drafts"] == 12 + sum(funnel["dropped"].values()) + beyond
    card = (tmp_path / "rows" / "README.md").read_text()
    for reason, number in funnel["dropped"].items():
        assert f"| dropped: {reason} (" in card.replace("\\", "")
        assert f" | {number} |" in card


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_no_half_dataset(
    pool: list[Clip], tmp_path: Path, error: type[BaseException]
) -> None:
    calls = []

    def breaking(request: Request) -> str:
        calls.append(request)
        if len(calls) > 20:
            raise error("stop")
        return f"saw {seen(request)}"

    output = tmp_path / "rows"
    build(pool, output, num_rows=5, max_clips=3)
    before = (output / "train.parquet").read_bytes()
    with pytest.raises(error):
        build(pool, output, answerer=ScriptedResponder("breaking", breaking), num_rows=30, max_clips=3)
    assert (output / "train.parquet").read_bytes() == before, "the earlier dataset was touched"
    with pytest.raises(error):
        build(pool, tmp_path / "new", answerer=ScriptedResponder("breaking", breaking), num_rows=30, max_clips=3)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} <= {
        "rows", "rows.log", "rows.job", "rows.cache", "new.log", "new.job",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rows": 0}, "num_rows must be ≥ 1, got 0"),
        ({"questions_per_timeline": 0}, "questions_per_timeline must be ≥ 1, got 0"),
        ({"max_rounds": 0}, "max_rounds must be ≥ 1, got 0"),
        ({"min_clips": 1}, "2 ≤ min_clips ≤ max_clips, got min_clips=1"),
        ({"min_clips": 5, "max_clips": 4}, "got min_clips=5, max_clips=4"),
        ({"max_similarity": 1.1}, r"a cosine in \[-1, 1\], got 1.1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage1Settings(**settings)


def test_a_pool_too_small_is_refused(pool: list[Clip], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A pool of 4 clips cannot fill timelines of up to max_clips=5"):
        build(pool[:4], tmp_path / "rows", num_rows=1, max_clips=5)
