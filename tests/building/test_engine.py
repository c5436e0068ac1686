"""The one method type: what a method may say, what `build` does whatever it says, the documented fifth, training."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import trainers
from conftest import make_dataset
from longvpo_hf.artifacts import Log
from longvpo_hf.building.asking import Asker, Remembered
from longvpo_hf.building.engine import build
from longvpo_hf.building.method import Draft, Drop, Method, Part, QuestionFilter, evidence, whole, without_evidence
from longvpo_hf.building.rehearsal import rehearsal
from longvpo_hf.building.rows import degradation
from longvpo_hf.building.scenes import Rotation
from longvpo_hf.captions import CaptionedVideo
from longvpo_hf.funnel import Funnel, log_folder
from longvpo_hf.methods.stage2 import Stage2Settings, build_stage2
from longvpo_hf.methods.temporal import TemporalSettings, build_temporal
from longvpo_hf.preference import VideoPreference
from longvpo_hf.responders import CutOff, NoAnswer, Request, Responder, Unanswered
from longvpo_hf.timeline import Timeline, View
from media import unfilmed_bytes
from scenes import (
    Scripted,
    answer_by_clips,
    ask_of_type,
    captioned,
    check_funnel,
    cite,
    filmed,
    rows_as_loaded,
    rows_of,
    same_files,
    seen,
    stop_at,
    things,
    told,
    unfilmed,
)

ANSWERER = Scripted(answer_by_clips, "answerer@2")


def about_two(drafts: Sequence[Draft], ask: Asker) -> list[Draft | Drop]:
    """Asks about the third and the fifth scene of each video."""
    return [
        replace(draft, question=f"What of {things(draft.timeline)}, time {draft.number} ?", evidence=(2, 4))
        for draft in drafts
    ]


def method(**more: Any) -> Method:
    given = {
        "reasons": {"odd": "the video has an odd number"},
        "write": about_two,
        "chosen": evidence,
        "rejected": without_evidence,
    }
    return Method(**{"name": "own", "prompt_version": "own-1", "question_model": "nobody", **given, **more})


def make(
    output: Path,
    videos: Sequence[CaptionedVideo],
    methods: Sequence[Method],
    num_rows: int = 8,
    answerer: Responder = ANSWERER,
    drafts: Callable[[int, int], Iterator[list[Draft]]] | None = None,
    **more: Any,
) -> tuple[list[VideoPreference], dict[str, dict[str, int]]]:
    parts = [Part(one, drafts or Rotation(videos, 0), num_rows) for one in methods]
    given = {"seed": 0, "max_rounds": 4, "follows_from": [], "facts": {}, "remedy": "Add videos."}
    funnel = build(
        parts, answerer, output, name="own", title="Own", funnel=Funnel(log_folder(output)), **{**given, **more}
    )
    check_funnel(output, funnel)
    return rows_of(output), funnel


@pytest.fixture
def videos(tmp_path: Path) -> list[CaptionedVideo]:
    return unfilmed(tmp_path / "media", [6, 5, 7, 8])


# ------------------------------------------------------------------------------------------------------------ the views


def test_the_policy_may_see_a_part(tmp_path: Path) -> None:
    """Evidence and reference then count the clips of the part."""
    films = filmed(tmp_path, [6, 7])
    answerer = Scripted(lambda request: f"saw {seen(request)}")
    one = method(
        policy=lambda draft, rng: View.only([1, 2, 4, 5]),
        reference=lambda draft, rng: View.only([4, 5]),
        chosen=whole,
        rejected=lambda draft, rng: View.ordered([5, 0]),
    )
    make(tmp_path / "rows", films, [one], 2, answerer)
    rows = rows_as_loaded(tmp_path / "rows")
    for row in rows:
        first = things(row.timeline)[0] - 1
        assert things(row.timeline) == [first + scene for scene in (1, 2, 4, 5)]
        assert seen(Request("", row.timeline)) == things(row.timeline)
        assert things(row.timeline, row.evidence) == [first + 2, first + 4]
        assert things(row.timeline, row.reference) == [first + 4, first + 5]
        assert row.chosen == f"saw {list(range(first, first + (6 if first == 0 else 7)))}"
        assert row.rejected == f"saw {[first + 5, first]}"
        assert (row.provenance.chosen_view, row.provenance.rejected_view) == ("whole", "only(5,0)")


def test_the_policy_may_see_another_order(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    rows, _ = make(
        tmp_path / "rows", videos, [method(policy=lambda draft, rng: View.ordered([4, 0, 2]), reference=evidence)], 4
    )
    for row in rows:
        first = things(row.timeline)[1]
        assert things(row.timeline) == [first + 4, first, first + 2]
        assert row.evidence == (2, 0)
        assert row.reference == (2, 0)
        assert row.reference_view == View.only([0, 2])


def test_a_reference_that_is_whole_follows_the_policy(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    rows, _ = make(tmp_path / "rows", videos, [method(policy=lambda draft, rng: View.only([2, 4]))], 4)
    assert {(row.evidence, row.reference, len(row.timeline)) for row in rows} == {((0, 1), (), 2)}


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"policy": View.only([0, 2])}, r"own: the policy's view must show all evidence; it lacks clips \[4\]"),
        (
            {"policy": View.only([2, 4]), "reference": View.only([2, 3])},
            r"the policy's view must show all that the reference is scored on; it lacks clips \[3\]",
        ),
        ({"policy": View.sparse(4)}, r"the policy's view is sparse\(4\), but a row holds clips, not frames"),
        ({"reference": View.sparse(2)}, r"the reference's view is sparse\(2\), but a row holds clips, not frames"),
        ({"policy": View.only([2, 4, 9])}, r"must be in \[0, \d\), got 9"),
    ],
)
def test_views_that_no_row_can_hold(
    videos: list[CaptionedVideo], tmp_path: Path, views: dict[str, View], message: str
) -> None:
    as_functions = {name: (lambda draft, rng, view=view: view) for name, view in views.items()}
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "rows", videos, [method(**as_functions)])
    assert not (tmp_path / "rows").exists()


def test_views_know_all_that_the_writer_said_and_draw_by_the_draft_alone(
    videos: list[CaptionedVideo], tmp_path: Path
) -> None:
    known: dict[str, list[tuple[Any, ...]]] = {}
    seen_by: list[dict[str, list[tuple[Any, ...]]]] = []

    def noting(role: str, view: View) -> Callable[[Draft, np.random.Generator], View]:
        def of(draft: Draft, rng: np.random.Generator) -> View:
            said = (draft.question, draft.evidence, draft.question_type, draft.reasoning)
            known.setdefault(role, []).append((*said, rng.random()))
            return view

        return of

    def write(drafts: Sequence[Draft], ask: Asker) -> list[Draft | Drop]:
        return [
            replace(
                d, question=f"What {things(d.timeline)} {d.number}?", evidence=(1,), question_type="k", reasoning="r"
            )
            for d in drafts
        ]

    for name in ("a", "b"):
        known.clear()
        views = {
            "chosen": View.only([1]),
            "rejected": View.only([0]),
            "policy": View.whole(),
            "reference": View.whole(),
        }
        make(tmp_path / name, videos, [method(write=write, **{role: noting(role, v) for role, v in views.items()})])
        assert {said[1:4] for calls in known.values() for said in calls} == {((1,), "k", "r")}
        assert len({said[4] for calls in known.values() for said in calls}) == 32, "each role of each draft draws anew"
        seen_by.append(dict(known))
    assert seen_by[0] == seen_by[1]
    same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (View.without([1, 3]), "no evidence"),
        (View.only([1, 2]), "part of the evidence"),
        (View.only([1, 3]), "all evidence"),
        (View.sparse(4), "sparse frames"),
        (View.ordered([3, 1]), "other order"),
    ],
)
def test_the_card_names_what_rejected_answers_lack(tmp_path: Path, view: View, words: str) -> None:
    (video,) = unfilmed(tmp_path / "media", [5])
    assert degradation(view, Draft(video.timeline, (1, 3))) == words


# --------------------------------------------------------------------------------------------------- drafts and filters


def test_filters_see_what_is_left_and_stand_in_the_row(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    sizes: list[int] = []

    def odd(drafts: Sequence[Draft], ask: Asker) -> list[Drop | None]:
        sizes.append(len(drafts))
        return [Drop("odd", "odd") if things(draft.timeline)[0] % 2 else None for draft in drafts]

    def none(drafts: Sequence[Draft], ask: Asker) -> list[Drop | None]:
        sizes.append(len(drafts))
        return [None] * len(drafts)

    filters = (QuestionFilter("even", odd), QuestionFilter("any", none))
    rows, funnel = make(tmp_path / "rows", videos, [method(question_filters=filters)], 4, max_rounds=1)
    assert sizes == [4, 3]  # videos begin with things 0, 6, 11 and 18
    assert (len(rows), funnel["dropped"]) == (3, {"odd": 1})
    assert rows[0].provenance.verdicts == ("even", "any", "answers_differ")
    assert "dropped: odd (the video has an odd number) | 1 |" in (tmp_path / "rows" / "README.md").read_text()
    reasons = json.loads((tmp_path / "rows.log" / "reasons.json").read_text())
    assert reasons == {"odd": "the video has an odd number"}


def test_drafts_that_bring_their_question_are_told_apart(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    """Questions of a corpus, for example: other ones must not meet the answers to those of before."""

    def keep(drafts: Sequence[Draft], ask: Asker) -> list[Draft | Drop]:
        return list(drafts)

    for word in ("old", "new"):

        def drafts(round_index: int, missing: int, word: str = word) -> Iterator[list[Draft]]:
            yield from ([Draft(video.timeline, (0,), question=f"What {word} thing?")] for video in videos)

        answerer = Scripted(lambda request: f"{request.text} {told(request)}")
        rows, _ = make(tmp_path / "rows", videos, [method(write=keep)], 4, answerer, drafts)
        assert {row.question for row in rows} == {f"What {word} thing?"}
        assert all(word in row.chosen for row in rows)


def test_several_drafts_of_a_timeline_and_drafts_too_many(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    def drafts(round_index: int, missing: int) -> Iterator[list[Draft]]:
        for video in videos:
            yield [Draft(video.timeline, number=number) for number in range(3)]
        yield []

    rows, funnel = make(tmp_path / "rows", videos, [method()], 10, drafts=drafts)
    assert funnel["stages"] == {"timelines": 4, "drafts": 12, "drafts beyond the rows asked for": 2, "rows": 10}
    assert [row.question[-3] for row in rows] == list("0120120120")


def test_rows_are_never_doubled_across_parts(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    rows, funnel = make(tmp_path / "rows", videos, [method(), method(), method(chosen=whole)], 4, max_rounds=1)
    assert len(rows) == 4 == len({row.id for row in rows})
    assert funnel["dropped"].keys() == {"duplicate_row", "duplicate_question"}


def test_a_question_that_is_there_is_not_answered_again(tmp_path: Path) -> None:
    """Where videos give no more questions, further rounds cost nothing but asking the writer, which is remembered."""
    videos = unfilmed(tmp_path / "many", [4] * 70)
    writer, answerer = Scripted(cite, "writer"), Scripted(answer_by_clips, "answerer")
    settings = Stage2Settings(num_rows=600, max_rounds=3)
    funnel = build_stage2(videos, writer, answerer, tmp_path / "rows", settings)
    check_funnel(tmp_path / "rows", funnel)
    rows = rows_of(tmp_path / "rows")
    # Answered before they are known are those of the other kind of rejected answer, and of the same piece of 64.
    assert len(rows) < 360
    assert len(answerer.requests) < 3 * len(rows)
    alone = Scripted(answer_by_clips, "answerer")
    of_one_kind = replace(settings, partial_share=1.0)
    build_stage2(videos, writer, alone, tmp_path / "one kind", of_one_kind)
    assert len(alone.requests) < 2.1 * len(rows_of(tmp_path / "one kind"))
    assert funnel["dropped"]["duplicate_question"] > 600
    assert len({(row.timeline, row.question) for row in rows}) == len(rows)

    # Stopped and called again, it asks for nothing and knows the same questions.
    asked = len(writer.requests) + len(answerer.requests)
    assert build_stage2(videos, writer, answerer, tmp_path / "rows", settings) == funnel
    assert len(writer.requests) + len(answerer.requests) == asked
    assert rows_of(tmp_path / "rows") == rows


def test_a_question_whose_row_was_dropped_is_answered_again(tmp_path: Path) -> None:
    """Only rows make a question known: another view of its rejected answer may give one."""
    videos = unfilmed(tmp_path / "many", [4] * 64)
    one = method(write=lambda drafts, ask: [replace(d, question="What is it?", evidence=(1,)) for d in drafts])
    first: set[Timeline] = set()

    def agreeing_at_first(request: Request) -> str:
        assert request.timeline is not None
        if request.view.drop and request.timeline not in first:
            first.add(request.timeline)
            return "saw [1]"
        return "saw [1]" if request.view.keep else answer_by_clips(request)

    rows, funnel = make(tmp_path / "rows", videos, [one], 64, Scripted(agreeing_at_first))
    assert (len(rows), funnel["dropped"]) == (64, {"answers_agree": 64})


def test_a_row_that_fails_at_the_end_is_made_up_for(tmp_path: Path) -> None:
    """A clip that neither answer saw is missing: the next round goes on with other videos, also after whole pieces."""
    videos = unfilmed(tmp_path / "many", [6] * 70)
    gone = {Rotation(videos, 0).order(0)[place] for place in (0, 9)}
    for index in gone:
        *clips, last = videos[index].timeline.clips
        videos[index] = CaptionedVideo(Timeline((*clips, replace(last, path=str(tmp_path / "gone.mp4")))))
    one = method(rejected=lambda draft, rng: View.only([2]))
    rows, funnel = make(tmp_path / "rows", videos, [one], 64)
    assert (len(rows), funnel["dropped"]) == (64, {"missing_file": 2})
    assert len({row.timeline for row in rows}) == 64


def test_other_bounds_of_a_model_never_meet_old_pieces(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    """Models of one name that answer with other bounds, or other weights, see `responders.identity`."""

    class Bounded(Scripted):
        settings: Any = None

    for bound in (3, 9):
        answerer = Bounded(lambda request, bound=bound: answer_by_clips(request)[:4] + str(told(request))[:bound])
        answerer.settings = {"max_new_tokens": bound}
        settings = Stage2Settings(num_rows=4, partial_share=0.0)
        build_stage2(videos, Scripted(cite), answerer, tmp_path / "rows", settings)
        assert answerer.requests, "asked again"
        assert {len(row.chosen) <= 7 for row in rows_of(tmp_path / "rows")} == {bound == 3}


def test_halves_of_characters_end_no_build(tmp_path: Path) -> None:
    """Models leave some in the escapes of JSON, and where they are cut off."""
    (video,) = unfilmed(tmp_path / "media", [6])

    def write(request: Request) -> str:
        return cite(request).replace("What do", "What \\ud83d do").replace("A colour", "A \\ud83d\\ude00")

    answerer = Scripted(lambda request: f"{answer_by_clips(request)} \ud83d")
    build_stage2([video], Scripted(write), answerer, tmp_path / "written", Stage2Settings(num_rows=1))
    (row,) = rows_of(tmp_path / "written")
    assert row.question.startswith("What \ufffd do")
    assert row.chosen.endswith(" \ufffd")
    assert row.provenance.reasoning.endswith("Answer: A \U0001f600.")


def test_another_folder_is_not_replaced(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    output = tmp_path / "films"
    output.mkdir()
    make(output, videos, [method()], 2)  # an empty one is
    make(output, videos, [method()], 4)  # and a dataset
    (output / "train.parquet").unlink()
    before = sorted(output.rglob("*"))
    with pytest.raises(ValueError, match=r"films is neither empty nor a dataset, and would be replaced; name ano"):
        make(output, videos, [method()], 2)
    assert sorted(output.rglob("*")) == before


def test_the_folder_that_this_runs_in_is_not_replaced(
    videos: list[CaptionedVideo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "deeper")
    for name in ("../deeper", "../../empty", str(tmp_path / "empty")):
        with pytest.raises(ValueError, match="is or holds the folder that this runs in"):
            make(Path(name), videos, [method()], 2)
    make(tmp_path / "rows", videos, [method()], 2)
    monkeypatch.chdir(tmp_path / "rows" / "clips")
    with pytest.raises(ValueError, match="is or holds the folder that this runs in"):
        make(tmp_path / "rows", videos, [method()], 4)


def test_stopped_while_an_earlier_dataset_goes(
    videos: list[CaptionedVideo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a dataset in its place would look like a folder of somebody else's."""
    output = tmp_path / "rows"
    make(output, videos, [method()], 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop_at("train.parquet"))
        with pytest.raises(KeyboardInterrupt):
            make(output, videos, [method()], 4)
    assert len(make(output, videos, [method()], 4)[0]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"media", "rows", "rows.job", "rows.log"}


def test_too_few_rows_are_said_with_the_remedy(
    videos: list[CaptionedVideo], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picky = Scripted(lambda request: "same" if things(request.timeline)[0] else answer_by_clips(request))
    rows, _ = make(tmp_path / "rows", videos, [method()], 8, picky, max_rounds=2)
    out = "".join(capsys.readouterr())
    assert f"{len(rows)} of 8 rows after 2 rounds; dropped: answers_agree" in out
    assert "Add videos." in out


def test_randomness_follows_from_the_draft(tmp_path: Path) -> None:
    here = captioned(tmp_path / "here" / "a.mp4", range(3)).timeline
    there = captioned(tmp_path / "there" / "a.mp4", range(3)).timeline
    other = captioned(tmp_path / "here" / "b.mp4", range(3)).timeline
    draws = [
        Draft(here).random(0, "x").random(),
        Draft(other).random(0, "x").random(),
        Draft(here, number=1).random(0, "x").random(),
        Draft(here, (1,)).random(0, "x").random(),
        Draft(here, question="What?").random(0, "x").random(),
        Draft(here).random(1, "x").random(),
        Draft(here).random(0, "y").random(),
    ]
    assert len(set(draws)) == 7
    assert Draft(there).random(0, "x").random() == draws[0], "a folder's name decides nothing"


# --------------------------------------------------------------------------------------------------------------- asking


def asker(folder: Path, piece: str) -> Asker:
    """Who asks in a piece of work of a build."""
    return Asker(Log(folder / f"{piece}.log"), Remembered(folder / "answers"))


def test_what_is_remembered_is_asked_once(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    responder = Scripted(lambda request: f"{request.text} {len(responder.requests)}")
    ask, timeline = asker(tmp_path, "first"), videos[0].timeline
    asked = [
        Request("a"),
        Request("b"),
        Request("a"),
        Request("a", timeline),
        Request("a", timeline, View.only([0, 1])),
    ]
    first = ask(responder, asked, "x", remember=True)
    assert first[0] == first[2]
    assert len(responder.requests) == 4
    # The same clips in a timeline of their own are the same to a model.
    again = [Request("b"), Request("a", Timeline(timeline.clips[:2])), Request("a", timeline, View.sparse(2))]
    assert ask(responder, again, "x", remember=True)[:2] == [first[1], first[4]]
    assert len(responder.requests) == 5
    assert ask(Scripted(lambda request: "else", "other"), [Request("a")], "x", remember=True) == ["else"]
    assert ask(responder, [Request("a")], "x") != [first[0]], "not remembered, not looked up"

    later = asker(tmp_path, "later")
    assert later(responder, asked, "x", remember=True) == first
    assert len(responder.requests) == 6

    class Silent(Scripted):
        def respond(self, requests: Sequence[Request], *callbacks: Any) -> list[str]:
            raise Unanswered([NoAnswer("status 500")] * len(requests))

    silent = Silent(lambda request: "")
    drop = Drop("no_answer", "status 500")
    assert ask(silent, [Request("c")], "x", remember=True) == [drop]
    assert asker(tmp_path, "latest")(responder, [Request("c")], "x", remember=True) == [drop]


def test_answers_that_were_cut_off_make_no_row(videos: list[CaptionedVideo], tmp_path: Path) -> None:
    """Neither a chosen nor a rejected one; and what is remembered of them is that they were."""

    def half(request: Request) -> str:
        answer = answer_by_clips(request)
        is_chosen = len(told(request)) == 2  # the evidence alone
        return CutOff(answer) if ("time 0" if is_chosen else "time 1") in request.text else answer

    rows, funnel = make(tmp_path / "rows", videos, [method()], 2 * len(videos), Scripted(half))
    assert all(row.question.endswith(("time 2 ?", "time 3 ?")) for row in rows)
    assert funnel["dropped"] == {"cut_off": 2 * len(videos)}

    ask = asker(tmp_path, "first")
    (first,) = ask(Scripted(lambda request: CutOff("<think>so</think> a ")), [Request("?")], "x", remember=True)
    assert first == "a"
    later = asker(tmp_path, "later")
    for again in (first, *later(Scripted(lambda request: CutOff()), [Request("?")], "x", remember=True)):
        assert isinstance(again, CutOff)
        assert again == "a"


def test_one_request_never_has_two_chosen_answers_also_where_a_build_was_stopped(tmp_path: Path) -> None:
    """Timelines of one clip in common, about which all ask the same; a model that says another thing each time."""
    things_of = [[0, *range(10 * n, 10 * n + 3)] for n in range(1, 101)]
    path = tmp_path / "media" / "0.mp4"
    path.parent.mkdir()
    path.write_bytes(unfilmed_bytes("video"))
    timelines = []
    for numbers in things_of:
        clips = captioned(path, numbers).timeline.clips
        moved = [replace(c, start_seconds=float(n), end_seconds=n + 1.0) for c, n in zip(clips, numbers, strict=True)]
        timelines.append(CaptionedVideo(Timeline(tuple(moved))))

    def write(drafts: Sequence[Draft], ask: Asker) -> list[Draft | Drop]:
        return [replace(draft, question="What is it?", evidence=(0,)) for draft in drafts]

    calls: list[Request] = []

    def moody(request: Request) -> str:
        calls.append(request)
        if len(calls) == 80:  # in the second piece: the first asks for one chosen answer and 64 rejected ones
            raise KeyboardInterrupt
        return f"{told(request)} {len(calls)}"

    answerer = Scripted(moody)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "rows", timelines, [method(write=write)], 100, answerer)
    rows, _ = make(tmp_path / "rows", timelines, [method(write=write)], 100, answerer)
    assert len(rows) == 100
    assert {row.chosen for row in rows} == {"[0] 1"}
    assert len({row.rejected for row in rows}) == 100


# ----------------------------------------------------------------------------------------------------- the fifth method

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"


def documented() -> str:
    section = DOCUMENT.read_text(encoding="utf-8").partition("## A fifth method")[2]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


def test_the_documented_method_works_in_under_60_lines(tmp_path: Path) -> None:
    code = documented()
    assert len(code.splitlines()) < 60
    assert max(map(len, code.splitlines())) <= 120
    space: dict[str, Any] = {}
    exec(compile(code, "docs/methods.md", "exec"), space)
    films = filmed(tmp_path, [5, 4, 6])

    def ask(request: Request) -> str:
        assert request.timeline is None
        return "Which comes first, " + " or ".join(re.findall(r'"thing (\d+) appears"', request.text)) + "?"

    answerer = Scripted(lambda request: f"saw {seen(request)}", "answerer@2")
    funnel = space["build_shuffled"](films, Scripted(ask, "writer@1"), answerer, tmp_path / "rows", 9)
    check_funnel(tmp_path / "rows", funnel)
    rows = rows_as_loaded(tmp_path / "rows")
    assert len(rows) == 9
    for row in rows:
        whole_video = things(row.timeline)
        assert row.chosen == f"saw {whole_video}"
        order = json.loads(row.rejected.removeprefix("saw "))
        assert sorted(order) == whole_video != order
        places = ",".join(str(thing - whole_video[0]) for thing in order)
        assert row.provenance.rejected_view == f"only({places})"
        assert {int(n) for n in re.findall(r"\d+", row.question)} <= set(whole_video)
        assert (row.provenance.method, row.provenance.prompt_version) == ("shuffled-order", "shuffled-1")
    assert "other order 100 %" in (tmp_path / "rows" / "README.md").read_text()
    again = space["build_shuffled"](films, Scripted(ask, "writer@1"), answerer, tmp_path / "again", 9)
    assert again == funnel
    assert (tmp_path / "again" / "train.parquet").read_bytes() == (tmp_path / "rows" / "train.parquet").read_bytes()
    rehearsed = space["build_shuffled"](films, rehearsal(), rehearsal(), tmp_path / "rehearsed", 9)
    assert rehearsed["stages"]["rows"] == 9


# ------------------------------------------------------------------------------------------------------------- training


def test_rows_train_unchanged(tmp_path: Path) -> None:
    films = filmed(tmp_path, [5, 4])
    answerer = Scripted(lambda request: f"saw {told(request)[0]}{request.view.num_frames or ''}")
    build_stage2(films, Scripted(cite), answerer, tmp_path / "stage2", Stage2Settings(num_rows=2, partial_share=0.0))
    settings = TemporalSettings(mode="comprehensive", num_rows=2, sparse_frames=2)
    build_temporal(films, Scripted(ask_of_type), answerer, tmp_path / "temporal", settings)
    by_name = {}
    for name in ("stage2", "temporal"):
        rows = [replace(row, timeline=films_of(row, tmp_path / name)) for row in rows_of(tmp_path / name)]
        by_name[name] = (rows, make_dataset(rows))
        trainer = trainers.make(tmp_path / name, by_name[name][1], reference="row", max_steps=1)
        trainer.train()
        assert math.isfinite(trainers.logged(trainer)[0])
        # The paper's reference for both is the whole video.
        batch = trainers.batch_of(trainer, by_name[name][1])
        assert batch["reference"]["visual_tokens"] == batch["visual_tokens"]

    rows, dataset = by_name["stage2"]
    trainer = trainers.make(tmp_path / "anchor", dataset, reference="anchor", max_steps=1)
    assert [trainer.data_collator.reference_view(row) for row in rows] == [View.only(row.evidence) for row in rows]
    assert not trainers.batch_of(trainer, dataset)["places"].isnan().any()
    trainer.train()
    assert math.isfinite(trainers.logged(trainer)[0])

    rows, dataset = by_name["temporal"]
    message = f"row {rows[0].id}: reference='anchor' needs .* and it names none. Use reference='row' or 'full'"
    with pytest.raises(ValueError, match=message):
        trainers.make(tmp_path / "none", dataset, reference="anchor", max_steps=1)
    full = trainers.make(tmp_path / "full", dataset, reference="full", max_steps=1)
    assert trainers.batch_of(full, dataset)["places"].isnan().all(), "rows without evidence have no place"


def films_of(row: VideoPreference, folder: Path) -> Timeline:
    """A row's timeline with its media where the dataset holds them."""
    return Timeline(tuple(replace(clip, path=str(folder / clip.path)) for clip in row.timeline.clips))


def test_the_parquet_of_every_method_has_one_schema(tmp_path: Path) -> None:
    videos = unfilmed(tmp_path / "media", [6, 5])
    build_stage2(videos, Scripted(cite), ANSWERER, tmp_path / "a", Stage2Settings(num_rows=2))
    build_temporal(videos, Scripted(ask_of_type), ANSWERER, tmp_path / "b", TemporalSettings(num_rows=2))
    make(tmp_path / "c", videos, [method()], 2)
    schemas = [pq.read_schema(tmp_path / name / "train.parquet") for name in "abc"]
    assert schemas[0].equals(schemas[1])
    assert schemas[0].equals(schemas[2])
