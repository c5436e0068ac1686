"""Questions that users give to the probes: files of JSON lines, videos, pictures."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cli import longvpo
from longvpo_hf.errors import ConfigError, VideoError
from longvpo_hf.evaluation.probes import make_question, read_questions
from longvpo_hf.frames import FrameSampler
from media import write_video


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`needle.mp4` holds eight frames."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "needle.mp4", 8)
    return folder


def test_questions_of_a_file(media: Path, tmp_path: Path) -> None:
    shutil.copy(media / "needle.mp4", tmp_path / "short.mp4")
    Image.new("RGB", (47, 31), (200, 40, 40)).save(tmp_path / "picture.png")
    records: list[dict[str, Any]] = [
        {"video": "short.mp4", "question": "Which?", "answer": "dog", "options": ["cat", "dog", "A"]},
        {"video": "short.mp4", "question": "Which?", "answer": "C", "options": ["cat", "dog", "cow"]},
        {"video": "picture.png", "question": "Colour?", "answer": "red"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, records)))
    first, second, third = read_questions(path, 4, tmp_path / "made")
    assert first.text == "Which?\nA. cat\nB. dog\nC. A\nAnswer with the option's letter only."
    assert (first.answer, first.letters, second.answer, len(first.clips)) == ("B", "ABC", "C", 4)
    assert (third.text, third.answer) == ("Colour?\nAnswer with a single word or phrase.", "red")
    assert len(third.clips) == 1
    request = third.laid_among((), 0)
    assert request.timeline is not None
    pixels = FrameSampler(1)(request.timeline).pixels
    assert pixels.shape == (1, 3, 31, 47)
    assert (pixels.float().mean(dim=(0, 2, 3)) - torch.tensor([200.0, 40.0, 40.0])).abs().max() < 6


def test_a_question_may_hold_whatever_json_may(media: Path, tmp_path: Path) -> None:
    shutil.copy(media / "needle.mp4", tmp_path / "short.mp4")
    path = tmp_path / "questions.jsonl"
    record = {"video": "short.mp4", "question": "Which\u2028one?", "answer": "red"}
    path.write_bytes(f"{json.dumps(record, ensure_ascii=False)}\r\n".encode())
    assert [question.text.splitlines()[0] for question in read_questions(path, 1, tmp_path)] == ["Which"]


def test_a_picture_stands_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    Image.new("RGB", (64, 32)).save(tmp_path / "photo.jpg", exif=turned)
    question = make_question(tmp_path / "photo.jpg", "What?", "red", (), 1, tmp_path / "made")
    request = question.laid_among((), 0)
    assert request.timeline is not None
    assert FrameSampler(1)(request.timeline).pixels.shape == (1, 3, 64, 32)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"video": "../needle.mp4", "question": "?", "answer": "x"},
            "line 1: .* must name a file inside",
        ),
        (
            {"video": "/etc/passwd", "question": "?", "answer": "x"},
            "line 1: .* must name a file inside",
        ),
        ({"video": "none.mp4", "question": "?", "answer": "x"}, "line 1: missing_file"),
        ({"video": "needle.mp4", "answer": "x"}, "line 1: the field 'question' is missing"),
        (
            {"video": "needle.mp4", "question": "?", "answer": "x", "options": ["a", "b"]},
            "line 1: answer must be one of",
        ),
        ({"video": "needle.mp4", "question": "?", "answer": ""}, "line 1: answer must be a text that is not empty"),
        ({"video": 3, "question": "?", "answer": "x"}, "line 1: video must be the name of a file"),
    ],
)
def test_records_that_are_not_as_expected(media: Path, record: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = media / f"{tmp_path.name}.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read_questions(path, 1, tmp_path)


ASKED = {"video": "needle.mp4", "question": "Which?", "answer": "a"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["needle.mp4", "Which?", "a"], "a JSON object with video, question and answer is needed"),
        ("needle.mp4", "a JSON object"),
        (None, "a JSON object"),
        (ASKED | {"answer": None}, "answer must be a text that is not empty, got None"),
        (ASKED | {"question": 5}, "question must be a text"),
        (ASKED | {"question": " "}, "question must be a text that is not empty"),
        (ASKED | {"options": "ab"}, "options must be a list of texts, got 'ab'"),
        (ASKED | {"options": {"a": "b"}}, "options must be a list"),
        (ASKED | {"options": ["a"]}, "options must be 2 to 26 different texts"),
        (ASKED | {"options": ["a", "b", "a"]}, "options must be 2 to 26 different texts"),
        (ASKED | {"options": [f"{number}" for number in range(26)] + ["a"]}, "options must be 2 to 26"),
        (ASKED | {"options": ["a", 1]}, "option must be a text"),
        (ASKED | {"video": ["needle.mp4"]}, "video must be the name of a file"),
    ],
)
def test_a_line_of_another_form_is_named_in_words(media: Path, tmp_path: Path, record: Any, message: str) -> None:
    path = media / f"{tmp_path.name}.jsonl"
    path.write_text(json.dumps(ASKED) + "\n" + json.dumps(record))
    with pytest.raises(ConfigError, match=f"^{path.name}, line 2: {message}"):
        read_questions(path, 1, tmp_path)


def test_random_lines_are_questions_or_one_sentence(media: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    values = [None, True, 5, 2.5, "", " ", "a", "A", [], ["a"], ["a", "b"], ["a", None], {}, {"a": 1}, "x" * 9000]
    path = media / "random.jsonl"
    outcomes: set[str] = set()
    said: list[str] = []
    for _ in range(300):
        record = dict(ASKED)
        for name in rng.sample(["video", "question", "answer", "options"], rng.randint(1, 3)):
            record[name] = rng.choice([*values, "needle.mp4"])
        line = json.dumps(record)
        if rng.random() < 0.2:
            line = line[: rng.randrange(len(line))]
        path.write_text(line or " ")
        try:
            questions = read_questions(path, 1, tmp_path)
        except ConfigError as error:
            said.append(str(error))
            outcomes.add("refused")
        else:
            assert all(isinstance(record[name], str) for name in ("question", "answer")), record
            assert len(questions) == 1
            outcomes.add("asked")
    assert outcomes == {"refused", "asked"}
    raw = ("object has no", "not subscriptable", "indices", "unhashable", "argument")
    assert not [each for each in said if any(words in each for words in raw)]


def test_a_file_of_questions_that_cannot_be_read(media: Path, tmp_path: Path) -> None:
    (tmp_path / "utf16.jsonl").write_text(json.dumps(ASKED), encoding="utf-16")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for name in ("gone.jsonl", "utf16.jsonl", "."):
        with pytest.raises(ConfigError, match=r"cannot be read .*: name a file of JSON lines"):
            read_questions(tmp_path / name, 1, tmp_path)
    with pytest.raises(ConfigError, match="line 1: "):
        read_questions(tmp_path / "deep.jsonl", 1, tmp_path)
    (media / "marked.jsonl").write_text(json.dumps(ASKED), encoding="utf-8-sig")  # as Windows' editors save it
    assert len(read_questions(media / "marked.jsonl", 1, tmp_path)) == 1


def test_pictures_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(picture: Path) -> None:
        make_question(picture, "What?", "red", (), 1, tmp_path / "made")

    with pytest.raises(VideoError, match=r"gone\.png cannot be read: No such file"):
        ask(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(VideoError, match="cannot be read: Is a directory"):
        ask(tmp_path / "folder.png")
    rng, read = random.Random(3), 0
    said: list[str] = []
    for kind in ("png", "jpg", "webp", "bmp"):
        whole = tmp_path / f"whole.{kind}"
        Image.frombytes("RGB", (40, 24), rng.randbytes(40 * 24 * 3)).save(whole)
        content = whole.read_bytes()
        for number in range(12):
            damaged = bytearray(content[: rng.randrange(len(content))] if number % 2 else content)
            for _ in range(rng.randint(1, 8) if damaged else 0):
                damaged[rng.randrange(min(len(damaged), 64))] = rng.randrange(256)
            picture = tmp_path / f"{number}.{kind}"
            picture.write_bytes(damaged)
            try:
                ask(picture)
                read += 1  # damage that no decoder sees
            except VideoError as error:
                said.append(str(error))
    assert read < 40
    assert all("cannot be read: it is damaged" in each or "scale it down" in each for each in said)
    Image.new("RGB", (20_000, 4)).save(tmp_path / "panorama.png")
    with pytest.raises(VideoError, match="of 20000 × 4 pixels cannot be shown as a frame: scale it down"):
        ask(tmp_path / "panorama.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(VideoError, match="too large"):
        ask(tmp_path / "whole.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--needle", "n.png"], "--needle needs --question and --answer"),
        (["--needle", "n.png", "--question", "q"], "--needle needs --question and --answer"),
        (["--question", "q"], "are about a --needle; name it"),
        (["--answer", "a"], "are about a --needle; name it"),
        (["--option", "a"], "are about a --needle; name it"),
    ],
)
def test_a_needle_and_its_question_belong_together(words: list[str], message: str) -> None:
    result = longvpo(["probe", "needle", "a/model", *words])
    assert result.exit_code == 2
    assert message in result.stderr
