"""The builder of temporal preferences: what each answer saw, types and segments, and the post-filter.

Views are checked on decoded frames. Kills are in `test_stage2.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longvpo_hf.captions import CaptionedVideo, Summary
from longvpo_hf.methods import temporal
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.preference import VideoPreference
from longvpo_hf.responders import NoAnswer, Request, Responder, one_by_one
from longvpo_hf.timeline import Clip, Timeline
from media import unfilmed_bytes
from scenes import (
    FRAMES_PER_SCENE,
    Scripted,
    answer_by_clips,
    ask_of_type,
    captioned,
    check_funnel,
    dropped_of,
    filmed,
    frames_of,
    rows_as_loaded,
    rows_of,
    same_files,
    seen,
    things,
    told,
    unfilmed,
)

WRITER = Scripted(ask_of_type, "writer@1")
ANSWERER = Scripted(answer_by_clips, "answerer@2")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[CaptionedVideo]:
    """Fewer scenes than sparse frames, as many, and far more."""
    return filmed(tmp_path_factory.mktemp("films"), [3, 4, 5, 12])


def build(
    videos: Sequence[CaptionedVideo],
    output: Path,
    writer: Responder = WRITER,
    answerer: Responder = ANSWERER,
    judge: Responder | None = None,
    **settings: Any,
) -> tuple[list[VideoPreference], dict[str, dict[str, int]]]:
    funnel = build_temporal(videos, writer, answerer, output, TemporalSettings(**settings), judge)
    check_funnel(output, funnel)
    return rows_of(output), funnel


# ------------------------------------------------------------------------------------------------------------ the views


@pytest.mark.parametrize("chosen_from", ["segment", "whole"])
def test_localized_answers_saw_the_segment_and_all_but_it(
    films: list[CaptionedVideo], tmp_path: Path, chosen_from: str
) -> None:
    answerer = Scripted(lambda request: f"saw {seen(request)}", "answerer@2")
    settings = TemporalSettings(mode="localized", num_rows=16, chosen_from=chosen_from)
    build_temporal(films, WRITER, answerer, tmp_path / "rows", settings)
    rows = rows_as_loaded(tmp_path / "rows")
    assert len(rows) == 16
    for row in rows:
        whole, (segment,) = things(row.timeline), row.evidence
        assert row.question.startswith(f"Between thing {whole[segment]} and thing {whole[segment]}: ")
        assert row.chosen == f"saw {whole if chosen_from == 'whole' else [whole[segment]]}"
        assert row.rejected == f"saw {whole[:segment] + whole[segment + 1 :]}"
        assert row.reference == ()
        origin = row.provenance
        assert origin.chosen_view == ("whole" if chosen_from == "whole" else f"only({segment})")
        assert origin.rejected_view == f"without({segment})"
        assert (origin.method, origin.prompt_version) == ("temporal-localized", temporal.PROMPT_VERSION)
        assert origin.question_type in temporal.QUESTION_TYPES
        assert row.question.endswith(f": {temporal.QUESTION_TYPES[origin.question_type]}?")
        assert VideoPreference.from_row(row.to_row(lambda clip: clip.path)) == row


@pytest.mark.parametrize("sparse_frames", [1, 4, 7])
def test_comprehensive_answers_saw_the_whole_and_a_few_frames_of_it(
    films: list[CaptionedVideo], tmp_path: Path, sparse_frames: int
) -> None:
    answerer = Scripted(lambda request: f"saw {frames_of(request)}")
    settings = TemporalSettings(mode="comprehensive", num_rows=8, sparse_frames=sparse_frames)
    build_temporal(films, WRITER, answerer, tmp_path / "rows", settings)
    rows = rows_as_loaded(tmp_path / "rows")
    assert {len(row.timeline) for row in rows} == {3, 4, 5, 12}
    for row in rows:
        whole = things(row.timeline)
        frames = range(whole[0] * FRAMES_PER_SCENE, (whole[-1] + 1) * FRAMES_PER_SCENE)
        assert row.question.startswith(f"Between thing {whole[0]} and thing {whole[-1]}: ")
        assert row.chosen == f"saw {list(frames)}"
        shown: list[int] = json.loads(row.rejected.removeprefix("saw "))
        assert len(shown) == sparse_frames
        # Spread: one in each of so many equal parts, give or take a scene.
        for place, frame in enumerate(shown):
            middle = (place + 0.5) * len(frames) / sparse_frames
            assert abs(frame - frames[0] - middle) <= FRAMES_PER_SCENE + 0.5
        assert (row.evidence, row.reference) == ((), ())
        origin = row.provenance
        assert origin.chosen_view == "whole"
        assert origin.rejected_view.startswith(f"sparse({sparse_frames})")
        assert (" of only(" in origin.rejected_view) == (len(whole) > sparse_frames)
        assert origin.method == "temporal-comprehensive"
    assert f"{sparse_frames} frames" in (tmp_path / "rows" / "README.md").read_text()


@pytest.mark.parametrize(("share", "localized"), [(0.5, 16), (0.25, 8), (0.0, 0), (1.0, 32)])
def test_the_mix_is_the_one_asked_for(tmp_path: Path, share: float, localized: int) -> None:
    videos = unfilmed(tmp_path / "media", [6] * 40)
    rows, _ = build(videos, tmp_path / "rows", num_rows=32, localized_share=share)
    assert Counter(row.provenance.method for row in rows) == Counter(
        {"temporal-localized": localized, "temporal-comprehensive": 32 - localized}
    )
    card = (tmp_path / "rows" / "README.md").read_text()
    assert "Temporal Preference Optimization" in card


# --------------------------------------------------------------------------------------------------- types and segments


@pytest.mark.parametrize("mode", ["localized", "comprehensive"])
def test_types_come_evenly_and_all_of_them_before_one_comes_again_for_a_video(tmp_path: Path, mode: str) -> None:
    videos = unfilmed(tmp_path / "media", [6] * 16)
    rows, funnel = build(videos, tmp_path / "rows", mode=mode, num_rows=16 * 8)
    assert Counter(row.provenance.question_type for row in rows) == dict.fromkeys(temporal.QUESTION_TYPES, 16)
    assert {len(temporal.QUESTION_TYPES), len({row.provenance.question_type for row in rows})} == {8}
    assert funnel["dropped"] == {}
    of_video: dict[Timeline, set[str]] = {}
    for row in rows:
        of_video.setdefault(row.timeline, set()).add(row.provenance.question_type)
    assert {len(types) for types in of_video.values()} == {8}
    rows, _ = build(videos, tmp_path / "few", mode=mode, num_rows=8, seed=2)
    assert len({row.provenance.question_type for row in rows}) == 8


def test_a_comprehensive_question_of_a_type_is_asked_once_about_a_video(tmp_path: Path) -> None:
    """Eight rows a video are all there are: the same prompt gives the same question."""
    (video,) = unfilmed(tmp_path / "media", [6])
    writer = Scripted(ask_of_type)
    rows, funnel = build([video], tmp_path / "rows", writer, mode="comprehensive", num_rows=12)
    assert len(rows) == 8
    assert len(writer.requests) == 8
    assert set(funnel["dropped"]) <= {"duplicate_row", "duplicate_question"}


def test_segments_stand_everywhere_alike(tmp_path: Path) -> None:
    videos = unfilmed(tmp_path / "media", [4] * 40)
    rows, _ = build(videos, tmp_path / "rows", mode="localized", num_rows=40)
    # One segment in each of 40 equal parts of the timeline, so 10 at each of 4 places: not about, but exactly.
    assert Counter(row.evidence for row in rows) == {(0,): 10, (1,): 10, (2,): 10, (3,): 10}
    assert "evidence positions" in (tmp_path / "rows" / "README.md").read_text()


def test_a_segment_has_a_caption(tmp_path: Path) -> None:
    (whole,) = unfilmed(tmp_path / "media", [6])
    clips = [replace(clip, caption=clip.caption if i in (1, 4) else "") for i, clip in enumerate(whole.timeline.clips)]
    answerer = Scripted(lambda request: str(request.view))
    video = CaptionedVideo(Timeline(tuple(clips)))
    rows, _ = build([video], tmp_path / "rows", WRITER, answerer, mode="localized", num_rows=10)
    assert {row.evidence for row in rows} == {(1,), (4,)}


# -------------------------------------------------------------------------------------------------- the question writer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('{"question": null}', "declined"),
        ('{"question": "None."}', "declined"),
        ("None", "declined"),
        ("<think>There is {none}.</think>\nnull", "declined"),
        ("What is it?", "malformed_question"),
        ('{"query": "What is it?"}', "malformed_question"),
        ('{"question": ["What is it?"]}', "malformed_question"),
        ('{"question": 7}', "malformed_question"),
        ('{"question": "What is it', "malformed_question"),
        ('{"question": ""}', "empty_question"),
        ('{"question": "It is a dog."}', "no_question"),
        ('{"question": "What is in scene 3?"}', "names_position"),
    ],
)
def test_what_is_no_question_has_a_name(tmp_path: Path, answer: str, reason: str) -> None:
    writer = Scripted(lambda request: answer)
    with pytest.raises(ValueError, match=f"No row came out; dropped: {reason} 1"):
        build(unfilmed(tmp_path / "media", [5]), tmp_path / "rows", writer, mode="localized", num_rows=1, max_rounds=1)
    (drop,) = dropped_of(tmp_path / "rows")
    assert drop["path"].endswith("0.mp4")


@pytest.mark.parametrize("around", ["{}", "```json\n{}\n```", "<think>{{}}</think> Here: {} !"])
def test_a_question_is_found_in_what_stands_around_it(tmp_path: Path, around: str) -> None:
    writer = Scripted(lambda request: around.replace("{{}}", "x").replace("{}", ask_of_type(request)))
    rows, _ = build(unfilmed(tmp_path / "media", [5]), tmp_path / "rows", writer, mode="localized", num_rows=1)
    assert rows[0].question.startswith("Between thing")
    assert writer.requests[0].schema == temporal.QUESTION_SCHEMA


@pytest.mark.parametrize("num_scenes", [10, 100, 1000])
@pytest.mark.parametrize("max_context_characters", [1000, 24_000])
@pytest.mark.parametrize("has_summaries", [True, False])
def test_prompts_keep_their_bound(
    tmp_path: Path, num_scenes: int, max_context_characters: int, has_summaries: bool
) -> None:
    path = tmp_path / "long.mp4"
    path.write_bytes(unfilmed_bytes("long"))
    clips = tuple(Clip(str(path), float(i), i + 1.0, f"thing {i} appears ".ljust(1200, "x")) for i in range(num_scenes))
    summaries = [Summary(1, i, i + 7, "s" * 800, tuple(map(str, range(i, i + 8)))) for i in range(0, num_scenes - 8, 8)]
    video = CaptionedVideo(Timeline(clips), tuple(summaries) if has_summaries else ())
    writer = Scripted(lambda request: '{"question": "What is it, ' + str(len(request.text)) + '?"}')
    judge = Scripted(lambda request: '{"better": "Yes", "ambiguous": "No", "correct": "Yes"}')
    answerer = Scripted(lambda request: str(request.view.num_frames or len(told(request))))
    build(
        [video], tmp_path / "rows", writer, answerer, judge, num_rows=2, max_context_characters=max_context_characters
    )
    for request in [*writer.requests, *judge.requests]:
        context = request.text.partition("shows:\n")[2].partition("\n\n")[0]
        assert 0 < len(context) <= max_context_characters
        if "one short segment" in request.text:
            assert context.count("\n") == 0, "who asks about a segment is told of it alone"
            assert context.startswith("Scene #")
        elif "a whole video" in request.text and num_scenes * 1212 > max_context_characters:
            numbers = [int(number) for number in re.findall(r"^Scenes? #(\d+)", context, re.MULTILINE)]
            assert numbers[0] < num_scenes * 0.1
            assert numbers[-1] > num_scenes * 0.9 - 8


# ------------------------------------------------------------------------------------------------------ the post-filter

VERDICTS = [
    (better, ambiguous, correct)
    for better in ("Yes", "No", "Equally")
    for ambiguous in ("Yes", "No")
    for correct in ("Yes", "No")
]


def outcome(better: str, ambiguous: str, correct: str) -> str:
    if better != "Yes":
        return "not_better"
    if ambiguous != "No":
        return "ambiguous"
    return "row" if correct == "Yes" else "not_correct"


@pytest.mark.parametrize("mode", ["localized", "comprehensive"])
def test_the_post_filter_asks_three_questions(tmp_path: Path, mode: str) -> None:
    """All twelve combinations of verdicts, each for one of twelve videos."""
    videos = unfilmed(tmp_path / "media", [5] * 12)

    def verdict_of(thing: int) -> tuple[str, str, str]:
        return VERDICTS[thing // 5]

    def judge(request: Request) -> str:
        assert request.timeline is None
        assert request.schema == temporal.POST_FILTER_SCHEMA
        lines = re.findall(r"^Scene #\d: thing (\d+) appears$", request.text, re.MULTILINE)
        assert len(lines) == (1 if mode == "localized" else 5)
        thing = int(lines[0])
        assert f"Answer 1: saw [{thing}" in request.text
        return json.dumps(dict(zip(("better", "ambiguous", "correct"), verdict_of(thing), strict=True)))

    settings = {"mode": mode, "num_rows": 12, "max_rounds": 1}
    rows, funnel = build(videos, tmp_path / "rows", judge=Scripted(judge, "judge@3"), **settings)
    assert {verdict_of(things(row.timeline)[0]) for row in rows} == {("Yes", "No", "Yes")}
    expected = Counter(outcome(*verdict) for verdict in VERDICTS)
    assert Counter(funnel["dropped"]) + Counter(row=len(rows)) == expected
    assert rows[0].provenance.verdicts == ("answers_differ", "post_filter")
    assert all("judge: {" in drop["detail"] for drop in dropped_of(tmp_path / "rows"))
    assert "judge@3" in (tmp_path / "rows" / "README.md").read_text()


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ('{"better": "yes.", "ambiguous": "NO", "correct": " Yes "}', "row"),
        ('<think>Hm. {"better": "No"}</think>```{"better": "Yes", "ambiguous": "No", "correct": "Yes"}```', "row"),
        ("Yes, No, Yes", "malformed_verdict"),
        ("", "malformed_verdict"),
        ('{"better": "Yes", "ambiguous": "No"}', "malformed_verdict"),
        ('{"better": "Yes", "ambiguous": "No", "correct": "Equally"}', "malformed_verdict"),
        ('{"better": "Perhaps", "ambiguous": "No", "correct": "Yes"}', "malformed_verdict"),
        ('{"better": true, "ambiguous": false, "correct": true}', "malformed_verdict"),
        ('{"better": null, "ambiguous": ["No"], "correct": {}}', "malformed_verdict"),
    ],
)
def test_verdicts_are_read_or_have_a_name(tmp_path: Path, verdict: str, expected: str) -> None:
    videos, judge = unfilmed(tmp_path / "media", [5]), Scripted(lambda request: verdict)
    if expected == "row":
        assert len(build(videos, tmp_path / "rows", judge=judge, num_rows=1)[0]) == 1
        return
    with pytest.raises(ValueError, match=f"No row came out; dropped: {expected} 1"):
        build(videos, tmp_path / "rows", judge=judge, num_rows=1, max_rounds=1)


def test_without_a_judge_the_card_says_so(tmp_path: Path) -> None:
    build(unfilmed(tmp_path / "media", [5]), tmp_path / "rows", num_rows=2)
    assert "none: not applied" in (tmp_path / "rows" / "README.md").read_text()


# -------------------------------------------------------------------------------------------- bad input, the same again


def test_bad_videos_and_requests_without_an_answer_cost_their_rows_only(
    films: list[CaptionedVideo], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(films[3].timeline.clips[0].path).read_bytes()[:900])

    class Patchy(Scripted):
        """Decodes what it is asked about; has no answer about the third video's whole."""

        def respond(self, requests: Sequence[Request], *callbacks: Any) -> list[str]:
            def answer(request: Request) -> str:
                if told(request) == [7, 8, 9, 10, 11]:
                    raise NoAnswer("status 422")
                return self.answer(request)

            return one_by_one(requests, answer, *callbacks[:1])

    answerer = Patchy(lambda request: f"saw {frames_of(request)}")
    bad = [captioned(broken, range(90, 95)), captioned(tmp_path / "gone.mp4", range(80, 85))]
    rows, funnel = build([*films, *bad], tmp_path / "rows", WRITER, answerer, num_rows=24, max_rounds=20)
    assert len(rows) == 24
    assert {"no_answer", "missing_file"} < set(funnel["dropped"])
    assert funnel["dropped"].keys() & {"unreadable", "beyond_end"}
    assert all(max(things(row.timeline)) < 80 for row in rows)


def test_same_seed_same_rows(tmp_path: Path) -> None:
    videos = unfilmed(tmp_path / "media", [6] * 10)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(videos, tmp_path / name, num_rows=20, seed=seed)
    same_files(tmp_path / "a", tmp_path / "b")
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "c")


def test_other_settings_never_meet_old_pieces(tmp_path: Path) -> None:
    videos, output = unfilmed(tmp_path / "media", [6] * 10), tmp_path / "rows"
    longer = [
        CaptionedVideo(Timeline(tuple(replace(c, caption=f"{c.caption} again") for c in video.timeline.clips)))
        for video in videos
    ]
    changes: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"chosen_from": "whole"}, {"sparse_frames": 3}, {"max_context_characters": 5000},
        {"localized_share": 0.4}, {"videos": longer},
        {"writer": Scripted(ask_of_type, "other")}, {"answerer": Scripted(answer_by_clips, "other")},
    ]  # fmt: skip
    pieces: set[str] = set()
    for change in changes:
        build(**{"videos": videos, "output": output, "num_rows": 10, **change})
        now = {path.name for path in (tmp_path / "rows.job").iterdir()}
        assert len(now - pieces) >= 2, change
        pieces = now
    build(videos, output, num_rows=10)
    assert {path.name for path in (tmp_path / "rows.job").iterdir()} == pieces


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "both"}, "mode must be 'localized', 'comprehensive' or 'mixed', got 'both'"),
        ({"num_rows": 0}, "num_rows must be ≥ 1, got 0"),
        ({"sparse_frames": 0}, "sparse_frames must be ≥ 1, got 0"),
        ({"max_rounds": 0}, "max_rounds must be ≥ 1, got 0"),
        ({"localized_share": -0.1}, r"localized_share must be in \[0, 1\], got -0.1"),
        ({"chosen_from": "evidence"}, "chosen_from must be 'segment' or 'whole', got 'evidence'"),
        ({"max_context_characters": 10}, "max_context_characters must be ≥ 1000, got 10"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemporalSettings(**settings)


def test_defaults_are_the_papers() -> None:
    paper = TemporalSettings()
    assert (paper.num_rows, paper.mode, paper.localized_share, paper.num_localized) == (10_000, "mixed", 0.5, 5_000)
    assert len(temporal.QUESTION_TYPES) == 8
