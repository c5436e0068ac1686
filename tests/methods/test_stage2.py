"""The Stage-2 builder: what each answer saw, how questions are asked for and read, what the judge does, and kills.

Views are checked on decoded frames; the rest asks scripted models about videos that nobody opens.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longvpo_hf.building.captioning import CaptioningSettings, caption_videos
from longvpo_hf.captions import CaptionedVideo, Summary
from longvpo_hf.frames import UnreadableVideo
from longvpo_hf.methods import stage2
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2, most_rows
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.preference import VideoPreference
from longvpo_hf.record import DatasetRecord, read_record
from longvpo_hf.responders import NoAnswer, Request, Responder, Unanswered
from longvpo_hf.timeline import Clip, Timeline
from media import unfilmed_bytes
from scenes import (
    Scripted,
    about,
    answer_by_clips,
    ask_of_type,
    captioned,
    check_funnel,
    cite,
    dropped_of,
    filmed,
    rows_as_loaded,
    rows_of,
    same_files,
    seen,
    things,
    told,
    unfilmed,
)

WRITER = Scripted(cite, "writer@1")
ANSWERER = Scripted(answer_by_clips, "answerer@2")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[CaptionedVideo]:
    return filmed(tmp_path_factory.mktemp("films"), [6, 5, 7])


@pytest.fixture
def videos(tmp_path: Path) -> list[CaptionedVideo]:
    return unfilmed(tmp_path / "media", [6, 5, 7, 9])


def build(
    videos: Sequence[CaptionedVideo],
    output: Path,
    writer: Responder = WRITER,
    answerer: Responder = ANSWERER,
    judge: Responder | None = None,
    **settings: Any,
) -> tuple[list[VideoPreference], dict[str, dict[str, int]]]:
    funnel = build_stage2(videos, writer, answerer, output, Stage2Settings(**settings), judge)
    return rows_of(output), funnel


# ------------------------------------------------------------------------------------------------------------ the views


@pytest.mark.parametrize("chosen_from", ["evidence", "whole"])
@pytest.mark.parametrize(("partial_share", "reference"), [(0.0, "whole"), (0.5, "evidence"), (1.0, "whole")])
def test_each_answer_saw_its_scenes(
    films: list[CaptionedVideo], tmp_path: Path, chosen_from: str, partial_share: float, reference: str
) -> None:
    answerer = Scripted(lambda request: f"saw {seen(request)}", "answerer@2")
    settings = {"chosen_from": chosen_from, "partial_share": partial_share, "reference": reference}
    funnel = build_stage2(films, WRITER, answerer, tmp_path / "rows", Stage2Settings(num_rows=12, **settings))
    rows = rows_as_loaded(tmp_path / "rows")
    assert len(rows) == 12 == funnel["stages"]["rows"]
    kinds: Counter[str] = Counter()
    for row in rows:
        whole, cited = things(row.timeline), things(row.timeline, row.evidence)
        assert cited == [int(n) for n in re.findall(r"thing (\d+)", row.question)]
        assert 2 <= len(cited) <= 4
        assert row.chosen == f"saw {whole if chosen_from == 'whole' else cited}"
        shown: list[int] = json.loads(row.rejected.removeprefix("saw "))
        assert shown
        kinds["partial" if set(shown) < set(cited) else "none" if not set(shown) & set(cited) else "?"] += 1
        if not set(shown) & set(cited):
            assert shown == [thing for thing in whole if thing not in cited], "rejected is to see all that is not cited"
        assert row.reference == (row.evidence if reference == "evidence" else ())
        origin = row.provenance
        evidence = ",".join(map(str, row.evidence))
        assert origin.chosen_view == ("whole" if chosen_from == "whole" else f"only({evidence})")
        places = [whole.index(thing) for thing in shown]
        is_part = set(shown) < set(cited)
        assert origin.rejected_view == (f"only({','.join(map(str, places))})" if is_part else f"without({evidence})")
        assert [int(n) for n in re.findall(r"Scene #(\d+)", origin.reasoning)] == list(row.evidence)
        assert origin.reasoning.endswith("Answer: A colour.")
        assert (origin.method, origin.prompt_version) == ("longvpo-stage2", stage2.PROMPT_VERSION)
        assert (origin.question_model, origin.answer_model) == ("writer@1", "answerer@2")
        assert origin.verdicts == ("answers_differ",)
    assert kinds["?"] == 0
    if partial_share != 0.5:
        assert kinds == {("none", "partial")[int(partial_share)]: 12}
    assert all(VideoPreference.from_row(row.to_row(lambda clip: clip.path)) == row for row in rows)


def test_the_mix_of_rejected_answers_is_the_one_asked_for(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    """Also where filters drop most rows of one kind: here every other answer from a part of the evidence is right."""
    many = unfilmed(tmp_path / "many", [8] * 300)
    right = Scripted(lambda r: "right" if len(told(r)) < 5 and sum(told(r)) % 3 else f"saw {told(r)}", "answerer@2")
    for share in (0.2, 0.5):
        rows, funnel = build(many, tmp_path / f"{share}", answerer=right, num_rows=300, partial_share=share)
        partial = [row.provenance.rejected_view.startswith("only") for row in rows]
        assert (len(rows), sum(partial)) == (300, 300 * share)
        assert len({(row.timeline, row.question) for row in rows}) == 300
        assert funnel["dropped"]["answers_agree"] > 10
        assert f"part of the evidence {100 * share:.0f} %" in (tmp_path / f"{share}" / "README.md").read_text()


def test_where_all_scenes_are_cited_the_rejected_answer_saw_a_part(tmp_path: Path) -> None:
    pairs = unfilmed(tmp_path / "pairs", [2] * 8)
    rows, _ = build(pairs, tmp_path / "rows", num_rows=8, partial_share=0.0)
    assert {row.evidence for row in rows} == {(0, 1)}
    assert {row.provenance.rejected_view for row in rows} == {"only(0)", "only(1)"}


# -------------------------------------------------------------------------------------------------- the question writer

GOOD = about({1: "thing 1 appears", 3: "thing 3 appears"})
FIELDS = json.loads(GOOD)


def ask_once(answer: str | list[str], tmp_path: Path, max_tries: int = 1, length: int = 6) -> Any:
    """What comes of a question writer's answers about one video: the row or the drop, and what the writer was asked."""
    answers = [answer] if isinstance(answer, str) else list(answer)
    writer = Scripted(lambda request: answers[min(len(writer.requests) - 1, len(answers) - 1)])
    # `requests` grows per batch before it answers, and there is one draft, so one request a batch.
    output = tmp_path / "rows"
    settings = Stage2Settings(num_rows=1, max_rounds=1, max_tries=max_tries)
    try:
        funnel = build_stage2(unfilmed(tmp_path / "media", [length]), writer, ANSWERER, output, settings)
    except ValueError:  # no row came out
        (drop,) = dropped_of(output)
        return drop, writer.requests
    check_funnel(output, funnel)
    (row,) = rows_of(output)
    return row, writer.requests


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Sure! Here it is:\n{GOOD}\nI hope this helps {{or not}}.",
        f'<think>Scene #9? {{"question": "What?", "answer": "x", "reasoning": "Scene #0 Scene #2"}}</think>\n{GOOD}',
        f"Thoughts without a begin, Scene #77.</think>{GOOD}",
        json.dumps({**FIELDS, "more": 1}),
    ],
    ids=["bare", "fence", "words", "thoughts", "end of thoughts", "more fields"],
)
def test_a_question_is_found_in_what_stands_around_it(answer: str, tmp_path: Path) -> None:
    row, _ = ask_once(answer, tmp_path)
    assert (row.question, row.evidence) == ("What do thing 1 and thing 3 share?", (1, 3))


def with_reasoning(reasoning: str) -> str:
    return json.dumps({**FIELDS, "reasoning": reasoning})


@pytest.mark.parametrize(
    ("reasoning", "evidence"),
    [
        ("In Scene #1 a dog; scene #3 too. Scene #1 again.", (1, 3)),
        ("Scene 1, then scene 3.", (1, 3)),
        ("Scenes #1, #2 and #4 show it.", (1, 2, 4)),
        ("Scenes 1 and 4 show it.", (1, 4)),
        ("Scenes #1 to #4 show it.", (1, 2, 3, 4)),
        ("Seen in Scenes 2-4.", (2, 3, 4)),
        ("It changes from Scene #1 to Scene #4.", (1, 4)),
        ("It is there (#1) and gone (#4).", (1, 4)),
        ("Scene #1, 2 men; Scene #4 none.", (1, 4)),
    ],
)
def test_citations(reasoning: str, evidence: tuple[int, ...], tmp_path: Path) -> None:
    row, _ = ask_once(with_reasoning(reasoning), tmp_path)
    assert row.evidence == evidence


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "malformed_question"),
        ("What do they share?", "malformed_question"),
        (GOOD[:-10], "malformed_question"),
        ("[1, 2]", "malformed_question"),
        (json.dumps({"question": "What?", "reasoning": "Scene #1 and Scene #3"}), "malformed_question"),
        (json.dumps({**FIELDS, "answer": " "}), "malformed_question"),
        (json.dumps({**FIELDS, "question": ["What?"]}), "malformed_question"),
        (json.dumps({**FIELDS, "reasoning": None}), "malformed_question"),
        (with_reasoning("Scene #1 and Scene #6"), "unknown_scene"),
        (with_reasoning("Scene #1 and Scene #1234567"), "unknown_scene"),
        (with_reasoning("Scene #1 and Scene #" + "9" * 5000), "unknown_scene"),
        (with_reasoning("Scene #3, and Scene #3"), "too_few_scenes"),
        (with_reasoning("It follows from what is seen."), "too_few_scenes"),
        (json.dumps({**FIELDS, "question": "What do scene 1 and scene 3 share?"}), "names_position"),
        (json.dumps({**FIELDS, "question": "What do Scenes #1 and #3 share?"}), "names_position"),
        (json.dumps({**FIELDS, "question": "What does the man in #1 hold that he drops in #3?"}), "names_position"),
        (json.dumps({**FIELDS, "question": "What happens at the end of the video?"}), "names_position"),
        (json.dumps({**FIELDS, "question": "Tell what they share."}), "no_question"),
        (json.dumps({**FIELDS, "question": "I'm sorry, what?"}), "refusal"),
    ],
)
def test_what_is_wrong_with_a_question_has_a_name(answer: str, reason: str, tmp_path: Path) -> None:
    drop, requests = ask_once(answer, tmp_path)
    assert drop["reason"] == reason
    assert len(requests) == 1


def test_tries_are_bounded_each_is_told_why_and_none_is_the_same(tmp_path: Path) -> None:
    one_scene, unknown = with_reasoning("Scene #3"), with_reasoning("Scene #1 and Scene #8")
    drop, requests = ask_once([one_scene, one_scene, unknown], tmp_path / "a", max_tries=3)
    assert drop["reason"] == "unknown_scene"
    texts = [request.text for request in requests]
    assert len(texts) == 3 == len(set(texts))
    assert "version" not in texts[0]
    order = "Cite two or more scenes in the reasoning."
    for number, text in enumerate(texts[1:], 2):
        assert text.replace(f"\nWrite version {number}. {order}", "") == texts[0]
        assert text.endswith(texts[0].rpartition("\n")[2]), "the last line says what to answer with"
    assert all(request.schema == stage2.QUESTION_SCHEMA for request in requests)
    assert all(request.timeline is None for request in requests)

    row, requests = ask_once(["no JSON", one_scene, GOOD, "never asked"], tmp_path / "b", max_tries=5)
    assert row.evidence == (1, 3)
    assert len(requests) == 3
    assert (
        "object alone, with no word before or after it. Cite two or more scenes in the reasoning." in requests[2].text
    )


def test_a_model_that_is_not_reached_is_not_asked_again(tmp_path: Path) -> None:
    class Silent(Scripted):
        def respond(self, requests: Sequence[Request], *callbacks: Any) -> list[str]:
            self.requests += requests
            raise Unanswered([NoAnswer("status 500")] * len(requests))

    writer = Silent(cite)
    with pytest.raises(ValueError, match="No row came out; dropped: no_answer 1"):
        build(unfilmed(tmp_path / "media", [5]), tmp_path / "rows", writer, num_rows=1, max_rounds=1, max_tries=4)
    assert len(writer.requests) == 1


@pytest.mark.parametrize("seed", range(4))
def test_no_more_rows_come_than_can(tmp_path: Path, seed: int) -> None:
    """One for each scene and a free one, where a prompt holds all captions; else nobody knows before."""
    rng = random.Random(seed)
    videos = unfilmed(tmp_path / "media", [rng.randint(2, 6) for _ in range(rng.randint(1, 3))])
    timelines = [video.timeline for video in videos]
    most = most_rows(timelines, Stage2Settings(), 600)
    assert most == sum(len(timeline) + 1 for timeline in timelines)
    bare = [Timeline(tuple(replace(clip, caption="") for clip in timeline.clips)) for timeline in timelines]
    assert most_rows(bare, Stage2Settings(), 600) == most
    assert most_rows(bare, Stage2Settings(), 12_000) is None
    assert most_rows([Timeline(timelines[0].clips[:1])], Stage2Settings(), 600) == 0

    # Each prompt has its own question, so that all there can be come, and no more.
    def write(request: Request) -> str:
        fields = json.loads(cite(request))
        return json.dumps({**fields, "question": f"What do {zlib.crc32(request.text.encode()):x} share?"})

    rows, _ = build(videos, tmp_path / "rows", Scripted(write), num_rows=2 * most, max_rounds=3, seed=seed)
    assert len(rows) == most


def test_further_questions_about_a_video_have_a_focus_each_another(tmp_path: Path) -> None:
    (video,) = unfilmed(tmp_path / "media", [6])
    asked: list[int | None] = []

    def write(request: Request) -> str:
        found = re.findall(r"One of them must be Scene #(\d+)", request.text)
        asked.append(int(found[0]) if found else None)
        return cite(request)

    rows, _ = build([video], tmp_path / "rows", Scripted(write), num_rows=7, max_rounds=8)
    assert asked[0] is None
    assert sorted(asked[1:7], key=str) == [0, 1, 2, 3, 4, 5], "every scene is in focus before one is again"
    assert all(focus in row.evidence for row, focus in zip(rows, asked, strict=False) if focus is not None)


def test_a_question_without_its_focus_is_dropped(tmp_path: Path) -> None:
    (video,) = unfilmed(tmp_path / "media", [9])
    with_two = Scripted(lambda request: about({0: "thing 0 appears", 1: "thing 1 appears"}))
    _, funnel = build([video], tmp_path / "rows", with_two, num_rows=9, max_rounds=2, max_tries=2)
    # 18 drafts less one of the first row ask for focus 0 to 8; those of 0 and 1 repeat the first question.
    assert {"lacks_focus"} < set(funnel["dropped"]) <= {"lacks_focus", "duplicate_question", "duplicate_row"}
    assert funnel["stages"]["rows"] == 1
    check_funnel(tmp_path / "rows", funnel)


# ---------------------------------------------------------------------------------------------------------- long videos


def long_video(num_scenes: int, caption_characters: int) -> CaptionedVideo:
    """Scenes with long captions, three levels of summaries over all but the last ones."""
    clips = [
        Clip("long.mp4", float(i), i + 1.0, f"thing {i} appears ".ljust(caption_characters, "x"))
        for i in range(num_scenes)
    ]
    summaries = [Summary(1, i, i + 7, "s" * 800, tuple(map(str, range(i, i + 8)))) for i in range(0, num_scenes - 8, 8)]
    return CaptionedVideo(Timeline(tuple(clips)), tuple(summaries))


@pytest.mark.parametrize("max_context_characters", [1000, 6000, 24_000])
@pytest.mark.parametrize("num_scenes", [10, 100, 1000])
@pytest.mark.parametrize("has_summaries", [True, False])
def test_prompts_keep_their_bound_and_only_scenes_that_are_shown_can_be_cited(
    num_scenes: int, max_context_characters: int, has_summaries: bool, tmp_path: Path
) -> None:
    (tmp_path / "long.mp4").write_bytes(unfilmed_bytes("long"))
    video = long_video(num_scenes, 600)
    clips = tuple(replace(clip, path=str(tmp_path / "long.mp4")) for clip in video.timeline.clips)
    video = CaptionedVideo(Timeline(clips), video.summaries if has_summaries else ())
    shown: list[list[int]] = []

    def write(request: Request) -> str:
        scenes = request.text.partition("These are scenes of one long video, in order:\n")[2]
        shown.append([int(n) for n in re.findall(r"^Scene #(\d+): thing", scenes, re.MULTILINE)])
        told_of = {scene: f"thing {scene} appears" for scene in shown[-1]}
        focus = [int(n) for n in re.findall(r"One of them must be Scene #(\d+)", request.text)]
        others = [scene for scene in told_of if scene not in focus]
        return about({scene: told_of[scene] for scene in sorted([*focus, *others[: 2 - len(focus)]])})

    writer = Scripted(write)
    rows, _ = build(
        [video], tmp_path / "rows", writer, num_rows=3, max_context_characters=max_context_characters, max_rounds=4
    )
    own = len(stage2.question_prompt([], ["."], num_scenes, ""))
    for request, scenes in zip(writer.requests, shown, strict=True):
        assert len(request.text) <= max_context_characters + own
        assert len(scenes) >= 2
    for row in rows:
        assert set(row.evidence) <= set().union(*shown)
    if num_scenes * 612 > max_context_characters:
        assert "What happens in the whole video:" in writer.requests[0].text
        assert len({tuple(scenes) for scenes in shown}) > 1, "another question is shown other scenes"
        if max_context_characters == 24_000 and num_scenes == 1000:
            assert len(shown[0]) >= 15
            assert max(shown[0]) - min(shown[0]) > 800, "what is shown is spread"
    else:
        assert shown[0] == list(range(num_scenes))


@pytest.mark.parametrize("lengths", [[30_000, 30_000], [30_000, 20, 20], [400] * 9])
def test_prompts_keep_their_bound_where_captions_are_giant(lengths: list[int], tmp_path: Path) -> None:
    """A corpus' own captions may have any length; the judge is told no more than the writer."""
    (tmp_path / "odd.mp4").write_bytes(unfilmed_bytes("odd"))
    clips = [
        replace(clip, caption=f"{clip.caption} {'x' * length}")
        for clip, length in zip(
            captioned(tmp_path / "odd.mp4", range(len(lengths))).timeline.clips, lengths, strict=True
        )
    ]

    def write(request: Request) -> str:
        shown = re.findall(r"^Scene #(\d+): ", request.text.partition("in order:\n")[2], re.MULTILINE)
        return about({int(scene): f"thing {scene} appears" for scene in shown})

    writer, judge = Scripted(write), Scripted(lambda request: "Yes" if "saw [0, 1" in request.text else "No")
    settings = {"num_rows": 1, "max_context_characters": 1000, "chosen_from": "whole"}
    rows, _ = build([CaptionedVideo(Timeline(tuple(clips)))], tmp_path / "rows", writer, judge=judge, **settings)
    assert len(rows[0].evidence) >= 2
    own = len(stage2.question_prompt([], ["."], None, ""))
    assert max(len(request.text) for request in writer.requests) <= 1000 + own
    asked = (rows[0].question, rows[0].chosen, rows[0].rejected)
    assert max(len(request.text) for request in judge.requests) <= 1000 + len(stage2.support_prompt(*asked[:2], []))


def test_a_scene_that_is_not_shown_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "long.mp4").write_bytes(unfilmed_bytes("long"))
    video = long_video(100, 600)
    clips = tuple(replace(clip, path=str(tmp_path / "long.mp4")) for clip in video.timeline.clips)

    def write(request: Request) -> str:
        scenes = {int(n) for n in re.findall(r"^Scene #(\d+): thing", request.text, re.MULTILINE)}
        hidden = next(scene for scene in range(100) if scene not in scenes)
        return about({min(scenes): "thing 1 appears", hidden: "thing 2 appears"})

    with pytest.raises(ValueError, match="No row came out; dropped: unknown_scene 1"):
        build(
            [CaptionedVideo(Timeline(clips), video.summaries)], tmp_path / "rows", Scripted(write), num_rows=1,
            max_rounds=1, max_tries=2, max_context_characters=6000,
        )  # fmt: skip


def test_scenes_without_a_caption_are_never_cited_but_seen(tmp_path: Path) -> None:
    (whole,) = unfilmed(tmp_path / "media", [6])
    clips = [replace(clip, caption="" if i in (0, 3) else clip.caption) for i, clip in enumerate(whole.timeline.clips)]
    video = CaptionedVideo(Timeline(tuple(clips)))
    writer = Scripted(cite)
    answerer = Scripted(lambda request: str([clip.start_seconds for clip in request.view.of(request.timeline).clips]))
    rows, _ = build([video], tmp_path / "rows", writer, answerer, num_rows=4, partial_share=0.0)
    assert all(not {"Scene #0:", "Scene #3:"} & set(request.text.split("\n")) for request in writer.requests)
    for row in rows:
        assert not {0, 3} & set(row.evidence)
        assert {"0.0", "0.8999999999999999"} <= set(re.findall(r"[\d.]+", row.rejected))
        assert len(row.timeline) == 6


def test_videos_with_too_few_captions_are_dropped_by_name(tmp_path: Path) -> None:
    videos = unfilmed(tmp_path / "media", [1, 5, 3])
    bare = [replace(clip, caption="") for clip in videos[2].timeline.clips[1:]]
    one = CaptionedVideo(Timeline((videos[2].timeline.clips[0], *bare)))
    rows, funnel = build([videos[0], videos[1], one], tmp_path / "rows", num_rows=3)
    assert {row.timeline for row in rows} == {
        Timeline(
            tuple(
                replace(c, path=f"clips/{name[:2]}/{name}")
                for c in videos[1].timeline.clips
                for name in [Path(row.timeline.clips[0].path).name]
            )
        )
        for row in rows
    }
    assert funnel["dropped"]["too_few_captions"] == 2
    assert [drop["source_id"] for drop in dropped_of(tmp_path / "rows")[:2]] == ["0", "2"]
    with pytest.raises(ValueError, match="None of 2 videos has 2 captioned scenes or more"):
        build([videos[0], one], tmp_path / "none", num_rows=3)
    assert json.loads((tmp_path / "none.log" / "funnel.json").read_text())["dropped"] == {"too_few_captions": 2}


# ------------------------------------------------------------------------------------------------------------ the judge


@pytest.mark.parametrize(
    ("of_chosen", "of_rejected", "outcome"),
    [
        ("Yes.", "No.", "row"),
        ("**yes**, they do", "no, since", "row"),
        ("<think>No? Yes.</think>Yes", "<think>Yes?</think> No", "row"),
        ("No.", "No.", "unsupported"),
        ("Yes", "Yes", "rejected_is_right"),
        ("No", "Yes", "unsupported"),
        ("Maybe.", "No", "malformed_verdict"),
        ("Yes", "", "malformed_verdict"),
    ],
)
def test_the_judge_of_answers(
    videos: list[CaptionedVideo], tmp_path: Path, of_chosen: str, of_rejected: str, outcome: str
) -> None:
    answerer = Scripted(lambda request: f"{'right' if len(told(request)) > 1 else 'wrong'} {told(request)}")
    judge = Scripted(lambda request: of_chosen if "Answer: right" in request.text else of_rejected, "judge@3")
    settings = {"num_rows": 6, "partial_share": 1.0, "max_rounds": 1}
    pairs = unfilmed(tmp_path / "pairs", [2] * 6)
    if outcome != "row":
        with pytest.raises(ValueError, match=f"No row came out; dropped: {outcome} 6"):
            build(pairs, tmp_path / "rows", WRITER, answerer, judge, **settings)
        assert all("judge: " in drop["detail"] for drop in dropped_of(tmp_path / "rows"))
        # What is dropped for its chosen answer costs no second verdict.
        assert len(judge.requests) == (12 if "Yes" in of_chosen else 6)
        return
    rows, _ = build(pairs, tmp_path / "rows", WRITER, answerer, judge, **settings)
    assert rows[0].provenance.verdicts == ("answers_differ", "supported", "rejected_is_wrong")
    assert "judge@3" in (tmp_path / "rows" / "README.md").read_text()
    record = read_record(tmp_path / "rows", DatasetRecord)
    assert record is not None
    assert {what: (model.name, model.revision) for what, model in record.models.items()} == {
        "questions": ("writer", "1"),
        "judge": ("judge", "3"),
        "answers": (answerer.name, ""),
    }
    assert (record.num_rows, record.settings["partial_share"]) == (len(rows), 1.0)
    assert [method.name for method in record.methods] == ["longvpo-stage2"]
    assert "huang2025longvpo" in record.methods[0].citation
    for request in judge.requests:
        assert request.timeline is None
        assert len(re.findall(r"^Scene #\d: thing \d+ appears$", request.text, re.MULTILINE)) == 2


# ------------------------------------------------------------------------------------------------------------ bad input


def test_an_unreadable_scene_costs_its_rows_only(films: list[CaptionedVideo], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(films[0].timeline.clips[0].path).read_bytes()[:700])
    bad = captioned(broken, range(60, 66))
    answerer = Scripted(lambda request: f"saw {seen(request)}")
    rows, funnel = build([*films, bad], tmp_path / "rows", WRITER, answerer, num_rows=12)
    assert len(rows) == 12
    assert all(min(things(row.timeline)) < 60 for row in rows)
    check_funnel(tmp_path / "rows", funnel)
    unreadable = [drop for drop in dropped_of(tmp_path / "rows") if drop["reason"] == "unreadable"]
    assert unreadable
    assert all(drop["path"] == str(broken) and str(broken) in drop["detail"] for drop in unreadable)


def test_a_missing_scene_that_neither_answer_saw_costs_its_row_only(tmp_path: Path) -> None:
    scenes = []
    for number in range(6):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(unfilmed_bytes(f"scene {number}"))
        scenes.append(Clip(str(path), 0.0, 1.0, f"thing {number} appears", "one"))
    (tmp_path / "5.mp4").unlink()
    good = unfilmed(tmp_path / "media", [6])[0]

    def write(request: Request) -> str:  # never about the scene that is missing
        return cite(replace(request, text=request.text.replace("Scene #5: ", "")))

    rows, funnel = build(
        [CaptionedVideo(Timeline(tuple(scenes))), good], tmp_path / "rows", Scripted(write), num_rows=4,
        partial_share=1.0, max_rounds=20, max_tries=1,
    )  # fmt: skip
    assert len(rows) == 4
    assert {len({clip.path for clip in row.timeline.clips}) for row in rows} == {1}
    assert funnel["dropped"]["missing_file"] > 0
    check_funnel(tmp_path / "rows", funnel)


def test_requests_without_an_answer_cost_their_rows_only(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    class Patchy(Scripted):
        """Has no answer where thing 3 is to be seen, and cannot decode thing 20."""

        def respond(self, requests: Sequence[Request], *callbacks: Any) -> list[str]:
            results: list[Any] = []
            for request in requests:
                clips = request.view.of(request.timeline).clips
                if 3 in told(request):
                    results.append(NoAnswer("status 500"))
                elif 20 in told(request):
                    results.append(UnreadableVideo("unreadable", clips[0], "cut off"))
                else:
                    results.append(self.answer(request))
            if all(isinstance(result, str) for result in results):
                return results
            raise Unanswered(results)

    rows, funnel = build(videos, tmp_path / "rows", WRITER, Patchy(answer_by_clips), num_rows=15, max_rounds=30)
    assert len(rows) == 15
    assert {"no_answer", "unreadable"} <= set(funnel["dropped"])
    assert not any("thing 3 " in row.question or "thing 20 " in row.question for row in rows)
    check_funnel(tmp_path / "rows", funnel)


# ------------------------------------------------------------------------------------------------------- the same again


def test_same_seed_same_rows_wherever_the_videos_lie(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(videos, tmp_path / name, num_rows=20, seed=seed)
    same_files(tmp_path / "a", tmp_path / "b")
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "c")
    shutil.copytree(tmp_path / "media", tmp_path / "moved")
    moved = [
        CaptionedVideo(
            Timeline(tuple(replace(c, path=str(tmp_path / "moved" / Path(c.path).name)) for c in v.timeline.clips))
        )
        for v in videos
    ]
    build(moved, tmp_path / "d", num_rows=20, seed=1)
    assert (tmp_path / "a" / "train.parquet").read_bytes() == (tmp_path / "d" / "train.parquet").read_bytes()


def pieces_of(output: Path) -> set[str]:
    return {path.name for path in output.with_name(output.name + ".job").iterdir()}


def test_other_settings_captions_and_models_never_meet_old_pieces(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    output = tmp_path / "rows"
    build(videos, output, num_rows=10)
    judge = Scripted(lambda request: "Yes" if "Answer: saw all" in request.text else "No", "judge")
    renamed = [
        CaptionedVideo(Timeline(tuple(replace(c, caption=f"{c.caption}.") for c in v.timeline.clips))) for v in videos
    ]
    summed = [*videos[:3], CaptionedVideo(videos[3].timeline, (Summary(1, 0, 1, "Things.", ("0", "1")),))]
    louder = Scripted(lambda request: answer_by_clips(request).upper(), "louder")
    before = pieces_of(output)
    changes: list[dict[str, Any]] = [
        {"seed": 1}, {"chosen_from": "whole"}, {"reference": "evidence"}, {"partial_share": 0.25}, {"max_tries": 2},
        {"max_context_characters": 5000}, {"writer": Scripted(cite, "other")}, {"answerer": louder},
        {"videos": renamed}, {"videos": summed}, {"judge": judge},
    ]  # fmt: skip
    for change in changes:
        with_change = {"videos": videos, **change}
        with suppress(ValueError):  # the judge leaves no row
            build(output=output, num_rows=10, **with_change)
        after = pieces_of(output)
        assert len(after - before) >= 1, change
        before = after
    build(videos, output, num_rows=10)
    assert pieces_of(output) == before
    assert not any(row.chosen.isupper() for row in rows_of(output))


def test_more_rounds_keep_what_was_made(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    writer = Scripted(lambda request: "no" if int(json.dumps(request.text).count("#")) % 2 else cite(request))
    picky = Scripted(lambda request: "same" if 4 in told(request) else answer_by_clips(request))
    build(videos, tmp_path / "rows", writer, picky, num_rows=30, max_rounds=1)
    asked = len(picky.requests)
    assert asked
    _, funnel = build(videos, tmp_path / "rows", writer, picky, num_rows=30, max_rounds=4)
    assert funnel["stages"]["rows"] > 0
    again = len(picky.requests) - asked
    build(videos, tmp_path / "anew", writer, picky, num_rows=30, max_rounds=4)
    assert len(picky.requests) - asked - again == asked + again
    assert rows_of(tmp_path / "anew") == rows_of(tmp_path / "rows")


def test_a_moody_model_that_is_stopped_keeps_what_it_said(tmp_path: Path) -> None:
    videos = unfilmed(tmp_path / "many", [6] * 90)
    calls: Counter[str] = Counter()

    def moody(request: Request) -> str:
        calls["n"] += 1
        if calls["n"] == 150:  # in the second piece: the first has 64 questions and 128 answers
            raise KeyboardInterrupt
        return f"{answer_by_clips(request)} {calls['n']}"

    answerer = Scripted(moody)
    settings = {"num_rows": 90, "partial_share": 1.0}
    with pytest.raises(KeyboardInterrupt):
        build(videos, tmp_path / "rows", WRITER, answerer, **settings)
    assert not (tmp_path / "rows").exists()
    first = {request.text for request in answerer.requests[:64]}
    rows, _ = build(videos, tmp_path / "rows", WRITER, answerer, **settings)
    said = {row.question: int(row.chosen.split()[-1]) for row in rows}
    assert len(said) == len(rows) == 90
    assert all((number <= 64) == (question in first) for question, number in said.items())


# -------------------------------------------------------------------------------------------------------------- kill −9

LENGTHS = [6, 5, 7, 4, 6, 8, 5, 6, 7, 6] * 8


def whole_run(folder: Path, dies_at: tuple[str, int] = ("", 0)) -> None:
    """Captions videos and builds both kinds of datasets; may kill its own process −9 when a role is asked so often."""
    asked: Counter[str] = Counter()

    def role(name: str, answer: Any) -> Scripted:
        def counted(request: Request) -> str:
            asked[name] += 1
            if (name, asked[name]) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return str(answer(request))

        return Scripted(counted, name)

    def caption(request: Request) -> str:
        (clip,) = request.view.of(request.timeline).clips
        return f"thing {round(clip.start_seconds / 0.3) + 100 * int(Path(clip.path).stem)} appears, as ever"

    def judge(request: Request) -> str:
        if "better" in request.text:
            verdict = {"better": "Yes", "ambiguous": "No", "correct": "Yes" if len(request.text) % 7 else "No"}
            return json.dumps(verdict)
        return "Yes" if re.search(r"Answer: saw \[\d+, \d+", request.text) else "No"

    bare = [
        Timeline(tuple(replace(clip, caption="") for clip in video.timeline.clips))
        for video in unfilmed(folder.parent / "media", LENGTHS)
    ]
    captions = caption_videos(
        bare, role("captions", caption), role("summaries", lambda _: "Things appear."), folder / "scenes",
        CaptioningSettings(max_caption_characters=40, max_summary_characters=40, max_history_characters=240),
    )  # fmt: skip
    build_stage2(
        captions, role("questions", cite), role("answers", answer_by_clips), folder / "stage2",
        Stage2Settings(num_rows=90, seed=5), role("verdicts", judge),
    )  # fmt: skip
    build_temporal(
        captions, role("temporal questions", ask_of_type), role("temporal answers", answer_by_clips),
        folder / "temporal", TemporalSettings(num_rows=80, seed=5), role("post-filter", judge),
    )  # fmt: skip


def test_kill_9_in_each_stage(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole_run(tmp_path / "whole")
    stops = [
        ("captions", 300), ("summaries", 2), ("questions", 40), ("answers", 100), ("verdicts", 70),
        ("temporal answers", 90), ("post-filter", 20),
    ]  # fmt: skip
    for stop in stops:
        script = (
            f"import sys; sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}; "
            "from pathlib import Path; "
            f"from test_stage2 import whole_run; whole_run(Path({str(tmp_path / 'cut')!r}), {stop!r})"
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, (stop, ended.stderr[-2000:])
    assert not (tmp_path / "cut" / "temporal").exists()
    whole_run(tmp_path / "cut")
    for name in ("scenes.parquet", "captions.json"):
        assert (tmp_path / "cut" / "scenes" / name).read_bytes() == (tmp_path / "whole" / "scenes" / name).read_bytes()
    for name in ("stage2", "temporal"):
        same_files(tmp_path / "cut" / name, tmp_path / "whole" / name)
        assert json.loads((tmp_path / "whole" / f"{name}.log" / "funnel.json").read_text())["dropped"]


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rows": 0}, "num_rows must be ≥ 1, got 0"),
        ({"max_tries": 0}, "max_tries must be ≥ 1, got 0"),
        ({"max_rounds": 0}, "max_rounds must be ≥ 1, got 0"),
        ({"max_context_characters": 999}, "max_context_characters must be ≥ 1000, got 999"),
        ({"partial_share": 1.1}, r"partial_share must be in \[0, 1\], got 1.1"),
        ({"chosen_from": "scenes"}, "chosen_from must be 'evidence' or 'whole', got 'scenes'"),
        ({"reference": "anchor"}, "reference must be 'evidence' or 'whole', got 'anchor'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage2Settings(**settings)


def test_defaults_are_the_papers() -> None:
    paper = Stage2Settings()
    assert (paper.num_rows, paper.reference) == (6_000, "whole")
