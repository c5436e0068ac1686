"""Needle and position probe: which frames are shown, what is counted, what happens when memory or the run ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import tiny_models
from cli import longvpo
from longvpo_hf.evaluation.needle import plot_needle, probe_needle
from longvpo_hf.evaluation.position import plot_position, probe_position, summary
from longvpo_hf.evaluation.probes import (
    BlankFiller,
    DoesNotFit,
    Filler,
    Journal,
    ProbeQuestion,
    Verdict,
    VideoFiller,
    ask,
    make_question,
)
from longvpo_hf.evaluation.protocol import Protocol
from longvpo_hf.families.vision import vision_tower
from longvpo_hf.frames import FrameSampler, UnreadableVideo
from longvpo_hf.miniature.language import WORDS
from longvpo_hf.miniature.probes import WorldFiller, clips_needed, world_questions
from longvpo_hf.miniature.world import MARKERS, write_world
from longvpo_hf.responders import Request, ScriptedResponder, Unanswered
from longvpo_hf.responders.checkpoint import checkpoint_digest, load_checkpoint, load_responder
from longvpo_hf.timeline import Clip
from media import indices_of, write_video

torch.set_num_threads(1)

HAYSTACK_FRAMES = 100
NEEDLE_FRAME = 150


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`haystack.mp4` holds frames 0 to 99, `needle.mp4` frames 150 to 157."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "haystack.mp4", HAYSTACK_FRAMES)
    write_video(folder / "needle.mp4", 8, first=NEEDLE_FRAME)
    return folder


def questions_about(media: Path, number: int, num_frames: int = 1) -> list[ProbeQuestion]:
    """Multiple-choice questions whose right answer is B."""
    return [
        make_question(media / "needle.mp4", f"What is it, number {i}?", "a dog", ["a cat", "a dog"], num_frames, media)
        for i in range(number)
    ]


def place_of_needle(request: Request) -> int:
    """How many clips stand before the needle's."""
    assert request.timeline is not None
    return next(i for i, clip in enumerate(request.timeline.clips) if clip.path.endswith("needle.mp4"))


def number_in(request: Request) -> int:
    return int(request.text.split("number ")[1].split("?")[0])


def scripted(answer: Callable[[Request], str]) -> ScriptedResponder:
    return ScriptedResponder("scripted", answer)


# ----------------------------------------------------------------------------------------------- which frames are shown


@pytest.mark.parametrize("num_frames", [1, 3])
def test_the_needle_stands_at_its_place_and_the_haystack_is_the_same_everywhere(media: Path, num_frames: int) -> None:
    (question,) = questions_about(media, 1, num_frames)
    others = VideoFiller(media / "haystack.mp4").clips(question, 20)
    # 20 equal parts of 100 frames, each by its centre: frames 2, 7, 12, … or, at a border between two, the next.
    haystack = [5 * part + 2 for part in range(20)]
    needle = {1: [NEEDLE_FRAME + 4], 3: [NEEDLE_FRAME + 1, NEEDLE_FRAME + 4, NEEDLE_FRAME + 6]}[num_frames]
    sampler = FrameSampler(64)
    for place in (0, 7, 20):
        request = question.laid_among(others, place)
        assert request.timeline is not None
        frames = sampler(request.timeline, request.view)
        assert indices_of(frames.pixels) == [*haystack[:place], *needle, *haystack[place:]]


def test_each_depth_of_a_needle(media: Path, tmp_path: Path) -> None:
    places: list[tuple[int, int]] = []

    def answer(request: Request) -> str:
        assert request.timeline is not None
        assert request.view.num_frames == len(request.timeline)
        places.append((len(request.timeline), place_of_needle(request)))
        return "B"

    questions = questions_about(media, 1)
    filler = VideoFiller(media / "haystack.mp4")
    probe_needle(scripted(answer), questions, filler, [11, 21], 3, tmp_path / "a")
    assert places == [(11, 0), (11, 5), (11, 10), (21, 0), (21, 10), (21, 20)]
    places.clear()
    probe_needle(scripted(answer), questions, filler, [11], 1, tmp_path / "b")
    assert places == [(11, 5)]


def test_black_frames_have_the_size_of_the_question_s_video(media: Path, tmp_path: Path) -> None:
    (question,) = questions_about(media, 1, 2)
    others = BlankFiller(tmp_path / "blank").clips(question, 6)
    assert others[0].duration_seconds == pytest.approx(0.4), "0.8 s in two parts"
    request = question.laid_among(others, 3)
    assert request.timeline is not None
    frames = FrameSampler(64)(request.timeline, request.view)
    assert frames.pixels.shape == (8, 3, 32, 48)
    black = frames.pixels.amax(dim=(1, 2, 3)) < 8
    assert black.tolist() == [True] * 3 + [False] * 2 + [True] * 3
    assert indices_of(frames.pixels[3:5]) == [NEEDLE_FRAME + 2, NEEDLE_FRAME + 6]


def test_clips_of_unlike_length_cannot_have_several_frames_each(media: Path) -> None:
    path = str(media / "haystack.mp4")
    question = ProbeQuestion((Clip(path, 0.0, 1.0),), "?", "x", frames_per_clip=2)
    with pytest.raises(
        ValueError, match="Each clip must be shown as 2 frames, but by their lengths clips would get 1 to"
    ):
        question.laid_among([Clip(path, 1.0, 9.0)], 0)


def test_a_haystack_that_is_too_short_is_told_before_anything_is_asked(media: Path, tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        raise AssertionError("asked")

    filler = VideoFiller(media / "haystack.mp4")
    with pytest.raises(ValueError, match=r"haystack.mp4 has 100 frames, and 199 are asked for; name a longer video"):
        probe_needle(scripted(answer), questions_about(media, 1), filler, [8, 200], 3, tmp_path)
    with pytest.raises(ValueError, match="A video of 3 frames has no room for a needle of 3 frames"):
        probe_needle(scripted(answer), questions_about(media, 1, 3), filler, [3], 3, tmp_path)
    with pytest.raises(ValueError, match="needs questions, lengths and depths, got 0 questions"):
        probe_needle(scripted(answer), [], filler, [3], 3, tmp_path)


# ------------------------------------------------------------------------------------------------------ what is counted


def test_cells_are_counted(media: Path, tmp_path: Path) -> None:
    """Question i is answered rightly if at least 3·i clips stand before the needle; number 3 never, in no option."""

    def answer(request: Request) -> str:
        number = number_in(request)
        if number == 3:
            return "I cannot tell."
        return "The answer is (B)." if place_of_needle(request) >= 3 * number else "(A)"

    result = probe_needle(
        scripted(answer), questions_about(media, 4), VideoFiller(media / "haystack.mp4"), [9, 5], 3, tmp_path
    )
    # 5 frames: places 0, 2, 4; 9 frames: places 0, 4, 8.
    assert result["frames"] == [5, 9]
    assert result["depths_percent"] == [0, 50, 100]
    assert [(cell["frames"], cell["depth_percent"], cell["right"]) for cell in result["cells"]] == [
        (5, 0, 1),
        (5, 50, 1),
        (5, 100, 2),
        (9, 0, 1),
        (9, 50, 2),
        (9, 100, 3),
    ]
    assert {cell["unparsed"] for cell in result["cells"]} == {1}
    last = result["cells"][-1]
    assert (last["percent"], last["number"]) == (75, 4)
    # Wilson for 3 of 4 by hand: centre (0.75 + 0.4802) / 1.9604 = 0.6275, half 1.96·√(0.046875 + 0.06003) / 1.9604.
    assert last["interval_95"] == [pytest.approx(30.06, abs=0.02), pytest.approx(95.44, abs=0.02)]
    assert result["stopped"] is None
    assert json.loads((tmp_path / "needle.json").read_text()) == result
    assert min(Image.open(tmp_path / "needle.png").size) > 200
    assert str(tmp_path) not in (tmp_path / "needle.json").read_text()


def test_texts_must_be_the_answer_and_options_must_be_named() -> None:
    clip = (Clip("x.mp4", 0.0, 1.0),)
    questions = [
        ProbeQuestion(clip, "?", "a Red balloon"),
        ProbeQuestion(clip, "?", "red"),
        ProbeQuestion(clip, "?", "C", letters="ABCD"),
        ProbeQuestion(clip, "?", "C", letters="ABCD"),
    ]
    replies = iter(["A  red balloon.\n", "red or green", "<think>A?</think>**C**", "Cannot tell"])
    verdicts = ask(scripted(lambda _: next(replies)), questions, [Request("?")] * 4)
    assert verdicts == [
        Verdict(True, True, False),
        Verdict(False, True, False),
        Verdict(True, True, False),
        Verdict(False, False, False),
    ]


def test_positions_are_spread_evenly_and_distances_are_counted_to_the_question(media: Path, tmp_path: Path) -> None:
    """Right are the answers about a video alone, and those outside of the middle third."""
    asked: list[tuple[int, int]] = []

    def answer(request: Request) -> str:
        assert request.timeline is not None
        after = len(request.timeline) - 2 - place_of_needle(request)
        asked.append((len(request.timeline), after))
        return "B" if len(request.timeline) == 2 or not 10 <= after < 20 else "A"

    questions = questions_about(media, 6, 2)
    result = probe_position(scripted(answer), questions, VideoFiller(media / "haystack.mp4"), 32, 50, tmp_path, seed=3)
    assert asked[:6] == [(2, 0)] * 6
    assert {length for length, _ in asked[6:]} == {32}
    distances = [trial["distance_frames"] for trial in result["trials"]]
    assert sorted(distances) == sorted(after for _, after in asked[6:])
    # 300 trials, one in each of as many equal parts of 31 places: 9.7 a place, and one more or less at its borders.
    assert set(np.bincount(distances, minlength=31)) <= {8, 9, 10, 11}
    assert result["longest_distance_frames"] == 30
    assert result["upper_bound"] == {"number": 6, "percent": 100, "band_95": [100, 100]}
    assert result["thirds"]["middle"]["percent"] == 0
    assert result["thirds"]["begin"]["percent"] == result["thirds"]["end"]["percent"] == 100
    assert result["dip"] == {"percent": 100, "band_95": [100, 100]}
    assert result["alone"] == [1] * 6
    assert result["unparsed_percent"] == 0
    assert [part["percent"] for part in result["curve"]][:3] == [100, 100, 100]
    assert json.loads((tmp_path / "position.json").read_text()) == result
    assert min(Image.open(tmp_path / "position.png").size) > 200


def test_summary_by_hand() -> None:
    alone = np.array([1.0, 1.0, 0.0, 1.0])
    distances = np.array([[0.0, 0.4], [0.05, 0.5], [0.45, 1.0], [0.95, 0.6]])
    right = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    result = summary(alone, distances, right, seed=0)
    assert result["upper_bound"]["percent"] == 75
    # Middle third: 0.4 right, 0.5 wrong, 0.45 wrong, 0.6 right.
    assert result["thirds"]["middle"] == {"number": 4, "percent": 50, "band_95": [0, 100]}
    assert result["thirds"]["end"]["percent"] == 50  # 0 right, 0.05 wrong
    assert result["thirds"]["begin"]["percent"] == 100  # 1 and 0.95 right
    assert result["dip"]["percent"] == 25
    assert [part["number"] for part in result["curve"]] == [2, 0, 0, 0, 2, 1, 1, 0, 0, 2]
    assert result["curve"][0]["percent"] == 50
    assert result["curve"][1] == {
        "from_share": 0.1,
        "to_share": 0.2,
        "number": 0,
        "percent": None,
        "band_95": None,
    }


def test_bands_are_those_of_a_bootstrap_over_questions() -> None:
    """Against a loop that draws questions one after the other. Answers to one question are all alike here."""
    rng = np.random.default_rng(5)
    alone = (rng.random(60) < 0.9).astype(float)
    easy = rng.random((60, 1)) < 0.6
    distances = rng.random((60, 8))
    right = np.repeat(easy, 8, axis=1).astype(float)
    result = summary(alone, distances, right, seed=0)

    inside = (distances >= 1 / 3) & (distances < 2 / 3)
    dips = []
    for _ in range(2000):
        drawn = rng.integers(0, 60, size=60)
        hits = [right[q][inside[q]] for q in drawn]
        dips.append(100 * (alone[drawn].mean() - np.concatenate(hits).mean()))
    low, high = np.percentile(dips, [2.5, 97.5])
    assert result["dip"]["band_95"] == [pytest.approx(low, abs=2), pytest.approx(high, abs=2)]
    # 480 answers taken as independent would give a band of under half that width.
    naive = 2 * 1.96 * 100 * np.sqrt(0.6 * 0.4 / inside.sum())
    assert high - low > 1.5 * naive


def test_no_answer_in_the_middle_is_told(tmp_path: Path) -> None:
    result = summary(np.ones(2), np.array([[0.0], [1.0]]), np.ones((2, 1)), seed=0)
    assert result["dip"] == {"percent": None, "band_95": None}
    figure = plot_position({"m": {**result, "longest_distance_frames": 9, "filler": "f", "frames": 10}})
    assert "no answer in the middle" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_curves_of_several_models_and_maps_side_by_side(media: Path, tmp_path: Path) -> None:
    questions, filler = questions_about(media, 2), VideoFiller(media / "haystack.mp4")
    maps, curves = [], {}
    for name, reply in (("before", "A"), ("after", "B")):
        responder = ScriptedResponder(name, lambda _, reply=reply: reply)
        maps.append(probe_needle(responder, questions, filler, [4, 8], 2, tmp_path / name))
        curves[name] = probe_position(responder, questions, filler, 13, 6, tmp_path / name)
    figure = plot_needle(maps)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["before", "after"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0"] * 4
    assert [text.get_text() for text in figure.axes[1].texts] == ["100"] * 4
    labels = [text.get_text() for text in plot_position(curves).axes[0].get_legend().get_texts()]
    assert labels[:2] == ["before: dip 0 points (0 to 0)", "before: video alone, 0 %"]
    assert labels[3] == "after: video alone, 100 %"
    many = plot_position({f"model {number}": curves["after"] for number in range(7)})
    assert sum("dip" in text.get_text() for text in many.axes[0].get_legend().get_texts()) == 7


def test_names_are_shown_as_they_are(media: Path, tmp_path: Path) -> None:
    """Also those that matplotlib would take for mathematics."""
    shutil.copy(media / "haystack.mp4", tmp_path / r"$\foo$.mp4")
    responder = ScriptedResponder(r"a$\bar$", lambda _: "B")
    questions, filler = questions_about(media, 1), VideoFiller(tmp_path / r"$\foo$.mp4")
    probe_needle(responder, questions, filler, [4], 1, tmp_path)
    probe_position(responder, questions, filler, 4, 1, tmp_path)
    assert (tmp_path / "needle.png").is_file()
    assert (tmp_path / "position.png").is_file()


def test_results_carry_their_protocol(media: Path, tmp_path: Path) -> None:
    """One hash for what may be compared, another for what may not, and the difference by name."""
    film = VideoFiller(media / "haystack.mp4")

    def protocol(folder: str, frames: int = 9, filler: Filler = film, **facts: Any) -> Protocol:
        responder, questions = scripted(lambda _: "B"), questions_about(media, 2)
        probe_position(responder, questions, filler, frames, 3, tmp_path / folder, facts=facts)
        return Protocol.from_json(json.loads((tmp_path / folder / "position.json").read_text())["protocol"])

    first = protocol("a", weights="a", max_new_tokens=16, dtype="float32", max_pixels=400)
    assert first == protocol("b", weights="b", max_new_tokens=16, dtype="float32", max_pixels=400)
    assert "position probe: 9 frames, 400 pixels each; shown: its clips among frames of haystack.mp4" in first.line
    assert "all questions, 3 times" in first.line
    assert "greedy, at most 16 tokens; float32" in first.line
    sampled = {"temperature": 0.5, "top_p": 1.0, "decoding_seed": 3, "thinking": None}
    other = protocol("c", 13, BlankFiller(tmp_path / "media"), weights="a", max_new_tokens=16, decoding=sampled)
    assert other.hash != first.hash
    differing = {line.partition(" ")[0] for line in first.differences(other)}
    assert differing == {"sampling", "shown", "decoding", "dtype"}


# -------------------------------------------------------------------------------------------------- when memory is full


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


class Narrow:
    """Answers B where `fits` says that so many requests, the longest of so many clips, fit in memory."""

    name = "narrow"

    def __init__(self, fits: Callable[[int, int], bool], error: Exception) -> None:
        self.fits, self.error = fits, error
        self.calls: list[tuple[int, int]] = []

    def respond(self, requests: Sequence[Request], *callbacks: Any) -> list[str]:
        longest = max(len(request.timeline) for request in requests if request.timeline)
        self.calls.append((len(requests), longest))
        if not self.fits(len(requests), longest):
            raise self.error
        return ["B"] * len(requests)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: f"{type(error).__name__} {str(error)[:24]}")
def test_full_memory_is_known_by_its_errors(media: Path, error: Exception) -> None:
    (question,) = questions_about(media, 1)
    with pytest.raises(DoesNotFit):
        ask(Narrow(lambda number, clips: False, error), [question], [question.laid_among((), 0)])


def test_a_decoder_that_ran_out_of_memory_is_no_bad_video(media: Path) -> None:
    (question,) = questions_about(media, 1)
    requests = [question.laid_among((), 0)]
    bad = UnreadableVideo("unreadable", question.clips[0], "no frames")
    with pytest.raises(UnreadableVideo):
        ask(Narrow(lambda number, clips: False, bad), [question], requests)
    # As a responder of several requests tells it.
    with pytest.raises(UnreadableVideo):
        ask(Narrow(lambda number, clips: False, Unanswered(["B", bad])), [question] * 2, requests * 2)
    bad.__cause__ = OUT_OF_MEMORY[2]
    for error in (bad, Unanswered([bad])):
        with pytest.raises(DoesNotFit, match="can't allocate memory") as caught:
            ask(Narrow(lambda number, clips: False, error), [question], requests)
        assert str(media) not in str(caught.value), "folders of this machine are not told"


def test_the_probe_ends_at_the_first_length_that_does_not_fit(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OUT_OF_MEMORY[0]
    responder = Narrow(lambda number, clips: clips <= 16, error)
    filler = VideoFiller(media / "haystack.mp4")
    result = probe_needle(responder, questions_about(media, 2), filler, [8, 32, 64, 16], 3, tmp_path)
    assert [(cell["frames"], cell["percent"]) for cell in result["cells"]] == [(8, 100)] * 3 + [(16, 100)] * 3
    assert result["stopped"]["frames"] == 32
    assert result["stopped"]["reason"].startswith("does not fit in memory: ")
    assert responder.calls[-2:] == [(2, 32), (1, 32)], "one alone is tried, and nothing longer"
    assert json.loads((tmp_path / "needle.json").read_text())["stopped"] == result["stopped"]
    assert "32 frames do not fit in memory" in capsys.readouterr().out
    figure = plot_needle([result])
    assert "32 frames did not fit in memory" in figure.axes[0].get_xlabel()
    assert len(figure.axes[0].patches) == 2 * 3, "the cells of both lengths that were not run are hatched"

    larger = Narrow(lambda number, clips: True, error)
    again = probe_needle(larger, questions_about(media, 2), filler, [8, 16, 32, 64], 3, tmp_path)
    assert again["stopped"] is None
    assert [clips for _, clips in larger.calls] == [32] * 3 + [64] * 3, "what is known is not asked again"


def test_requests_that_only_do_not_fit_together_are_asked_one_by_one(media: Path, tmp_path: Path) -> None:
    responder = Narrow(lambda number, clips: number == 1, MemoryError())
    result = probe_needle(responder, questions_about(media, 3), VideoFiller(media / "haystack.mp4"), [8], 1, tmp_path)
    assert responder.calls == [(3, 8), (1, 8), (1, 8), (1, 8)]
    assert result["cells"][0]["right"] == 3


def test_other_errors_are_not_taken_for_full_memory(media: Path, tmp_path: Path) -> None:
    responder = Narrow(lambda number, clips: False, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    filler = VideoFiller(media / "haystack.mp4")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        probe_needle(responder, questions_about(media, 1), filler, [8], 1, tmp_path)


def test_the_position_probe_says_that_its_frames_do_not_fit(media: Path, tmp_path: Path) -> None:
    responder = Narrow(lambda number, clips: clips < 8, OUT_OF_MEMORY[0])
    with pytest.raises(DoesNotFit, match=r"20 frames do not fit in memory \(CUDA out of memory.*give fewer"):
        probe_position(responder, questions_about(media, 1), VideoFiller(media / "haystack.mp4"), 20, 2, tmp_path)


# ---------------------------------------------------------------------------------------------------- when it is killed


def test_a_killed_run_goes_on_where_it_was(media: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def answer(request: Request) -> str:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(place_of_needle(request))
        return "B" if len(calls) % 2 else "A"

    questions, filler = questions_about(media, 1), VideoFiller(media / "haystack.mp4")
    with pytest.raises(KeyboardInterrupt):
        probe_needle(scripted(answer), questions, filler, [9, 17], 3, tmp_path)
    journal = tmp_path / "needle.journal.jsonl"
    journal.write_text(journal.read_text() + '["17 frames, depth 1.0000')  # a line that was being written
    rest: list[int] = []

    def go_on(request: Request) -> str:
        rest.append(place_of_needle(request))
        return "B"

    result = probe_needle(scripted(go_on), questions, filler, [9, 17], 3, tmp_path)
    assert (calls, rest) == ([0, 4, 8, 0, 8], [16])
    assert [cell["right"] for cell in result["cells"]] == [1, 0, 1, 0, 1, 1]
    again = probe_needle(scripted(go_on), questions, filler, [9, 17], 3, tmp_path)
    assert again == result
    assert rest == [16]


def test_a_killed_position_probe_ends_with_the_same_numbers(media: Path, tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        return "B" if place_of_needle(request) % 3 else "A"

    calls = 0

    def killed(request: Request) -> str:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise KeyboardInterrupt
        return answer(request)

    questions, filler = questions_about(media, 9), VideoFiller(media / "haystack.mp4")
    whole = probe_position(scripted(answer), questions, filler, 21, 7, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        probe_position(scripted(killed), questions, filler, 21, 7, tmp_path / "killed")
    assert probe_position(scripted(answer), questions, filler, 21, 7, tmp_path / "killed") == whole
    assert whole["curve"] != probe_position(scripted(answer), questions, filler, 21, 7, tmp_path / "b", 1)["curve"]


def test_results_of_other_settings_are_not_mixed(media: Path, tmp_path: Path) -> None:
    filler = VideoFiller(media / "haystack.mp4")
    probe_needle(scripted(lambda _: "B"), questions_about(media, 1), filler, [9], 3, tmp_path, {"weights": "a"})
    with pytest.raises(ValueError, match=r"other settings \(weights\); name another --output"):
        probe_needle(scripted(lambda _: "B"), questions_about(media, 1), filler, [9], 3, tmp_path, {"weights": "b"})
    with pytest.raises(ValueError, match=r"other settings \(questions, questions_digest, weights\)"):
        probe_needle(scripted(lambda _: "B"), questions_about(media, 2), filler, [9], 3, tmp_path)


def test_a_journal_keeps_what_it_was_told(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "journal.jsonl"
    journal = Journal(path, {"a": (1, 2)})
    journal["x"] = [1, 0]
    path.write_text(path.read_text() + '["y", [')
    journal = Journal(path, {"a": [1, 2]})
    assert "x" in journal
    assert "y" not in journal
    journal["y"] = 3
    assert Journal(path, {"a": [1, 2]})["y"] == 3


def test_weights_tell_checkpoints_of_one_name_apart(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    before = checkpoint_digest(str(tmp_path))
    assert checkpoint_digest(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert checkpoint_digest(str(tmp_path)) != before


def test_weights_of_an_adapter_are_its_base_model_s_too(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "model.safetensors").write_bytes(b"1234")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = checkpoint_digest(str(adapter))
    assert checkpoint_digest(str(adapter)) == before
    (base / "model.safetensors").write_bytes(b"12345")
    assert checkpoint_digest(str(adapter)) != before


def test_weights_on_the_hub_are_told_by_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert checkpoint_digest("org/on-the-hub") == ""
    cached = tmp_path / "models--org--on-the-hub"
    (cached / "refs").mkdir(parents=True)
    for commit in ("1" * 40, "2" * 40):
        (cached / "refs" / "main").write_text(commit)
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "config.json").write_text("{}")
        assert checkpoint_digest("org/on-the-hub") == commit


# ------------------------------------------------------------------------------------------------- questions and worlds


def test_a_world_s_haystack_never_holds_the_needle_s_marker(tmp_path: Path) -> None:
    clips = write_world(tmp_path, 300, seed=1)
    by_clip = {item.clip: item for item in clips}
    filler = WorldFiller(clips, seed=4)
    for question in world_questions(clips, 20, seed=2, language=WORDS):
        asked = by_clip[question.clips[0]]
        assert (question.text, question.answer) == (WORDS.question(asked.marker), asked.colour)
        others = filler.clips(question, 100)
        assert asked.marker not in {by_clip[clip].marker for clip in others}
        assert len(set(others)) == 100
        assert list(filler.clips(question, 40)) == list(others)[:40]
        assert question.laid_among(others, 3).view.num_frames == 202
    english = world_questions(clips, 20, seed=2, language=None, frames_per_clip=1)[0]
    asked = by_clip[english.clips[0]]
    assert f"{english.answer}. {asked.colour}\n" in english.text
    assert asked.wall in english.text
    assert english.letters == "ABCDEFGH"
    with pytest.raises(ValueError, match="a larger world"):
        filler.clips(world_questions(clips, 1, seed=2, language=WORDS)[0], 300)


def test_enough_clips_are_made(tmp_path: Path) -> None:
    clips = write_world(tmp_path, clips_needed(800), seed=0)
    filler = WorldFiller(clips, seed=0)
    most = max(range(len(clips)), key=lambda i: sum(clips[i].marker == other.marker for other in clips))
    assert len(MARKERS) == 64
    question = ProbeQuestion((clips[most].clip,), "?", "x", frames_per_clip=2)
    assert len(filler.clips(question, 399)) == 399


# --------------------------------------------------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full`: a tiny model; `bare`: an adapter of it without a processor; `lora`: the same with one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model, processor = tiny_models.build("internvl")
    model.save_pretrained(folder / "full")
    processor.save_pretrained(folder / "full")
    model.config.name_or_path = str(folder / "full")
    torch.manual_seed(1)
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for name in ("bare", "lora"):
        adapter.peft_config["default"].base_model_name_or_path = str(folder / "full")
        adapter.save_pretrained(folder / name)
    processor.save_pretrained(folder / "lora")
    return folder


def test_checkpoints_are_whole_models_and_adapters(checkpoints: Path, media: Path) -> None:
    question = questions_about(media, 1)[0]
    request = question.laid_among(VideoFiller(media / "haystack.mp4").clips(question, 5), 2)
    replies = {}
    for name in ("full", "bare", "lora"):
        responder = load_responder(str(checkpoints / name), 8, 56 * 56, 2, 12)
        assert responder.name == name
        (replies[name],) = responder.respond([request])
        tower = vision_tower(responder.model)
        assert hasattr(tower, "_forward_of_all_frames"), "frames go through the tower a few at a time"
        assert not any(weight.requires_grad for weight in responder.model.parameters())
    assert replies["bare"] == replies["lora"] != replies["full"]
    with pytest.raises(OSError, match="nowhere"):
        load_checkpoint(str(checkpoints / "nowhere"))


def test_needle_by_command(checkpoints: Path, media: Path, tmp_path: Path) -> None:
    command = [
        "probe",
        "needle",
        str(checkpoints / "bare"),
        "--frames",
        "4,12",
        "--depths",
        "2",
        "--output",
        str(tmp_path),
    ]
    command += ["--needle", str(media / "needle.mp4"), "--question", "Which?", "--answer", "dog"]
    command += ["--option", "cat", "--option", "dog", "--max-pixels", "3136"]
    result = longvpo(command)
    assert result.exit_code == 2
    assert "A needle of your own needs a --haystack" in result.output
    result = longvpo([*command, "--haystack", str(media / "haystack.mp4")])
    assert result.exit_code == 0, result.output
    cells = json.loads((tmp_path / "needle.json").read_text())["cells"]
    assert [(cell["frames"], cell["depth_percent"]) for cell in cells] == [(4, 0), (4, 100), (12, 0), (12, 100)]
    assert "needle.png" in result.output
    result = longvpo([*command, "--haystack", str(media / "none.mp4")])
    assert result.exit_code == 2
    assert "missing_file" in result.output


def test_frames_have_the_size_of_training(checkpoints: Path, media: Path, tmp_path: Path) -> None:
    card = "sampler = FrameSampler(num_frames=64, fps=2.0, max_pixels=1234)"
    shutil.copytree(checkpoints / "full", tmp_path / "trained")
    (tmp_path / "trained" / "README.md").write_text(f"```python\n{card}\n```\n", encoding="utf-8")
    command = ["probe", "needle", str(tmp_path / "trained"), "--frames", "4", "--depths", "1", "--number", "1"]
    result = longvpo([*command, "--max-new-tokens", "1", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "needle.json").read_text())["max_pixels"] == 1234


@pytest.mark.parametrize("more", [[], ["--haystack"], ["--distractors"]], ids=lambda more: "".join(more) or "black")
def test_position_by_command(checkpoints: Path, media: Path, tmp_path: Path, more: list[str]) -> None:
    command = ["probe", "position", str(checkpoints / "full"), "--frames", "16", "--number", "3", "--placements", "2"]
    command += ["--output", str(tmp_path), "--max-new-tokens", "2", *more]
    command += [str(media / "haystack.mp4")] if more == ["--haystack"] else []
    result = longvpo(command)
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "position.json").read_text())
    assert len(measured["trials"]) == 6
    name = {"": "black frames", "--haystack": "frames of haystack.mp4", "--distractors": "other clips of the miniature"}
    assert measured["filler"].startswith(name["".join(more)])
