"""`dataset_scripts/stage2.py` and `temporal.py`: from a folder of long videos to a dataset, as users call them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torchcodec.encoders import VideoEncoder
from transformers import AutoModelForImageTextToText, Qwen2Config, Qwen2ForCausalLM

import tiny_models
from cli import longvpo, result_of
from conftest import write_clip
from longvpo_hf.captions import read_captions
from longvpo_hf.commands.build import stage1, stage2, temporal
from longvpo_hf.commands.build.models import Models, check_models
from longvpo_hf.commands.build.options import WriterSettings
from longvpo_hf.preference import VideoPreference, undecoded
from longvpo_hf.responders import LocalResponder, Request, chat
from longvpo_hf.responders.text import TextResponder
from longvpo_hf.timeline import Clip, Timeline
from pushes import ASKED, WHERE, pushed, watch_pushes

SCENES_OF_VIDEO = (5, 6, 7)


SCRIPTS = Path(__file__).parents[2] / "dataset_scripts"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of scenes of 4 s that begin with a cut, and a file that is none."""
    root = tmp_path_factory.mktemp("videos")
    draw = torch.Generator().manual_seed(0)
    for number, scenes in enumerate(SCENES_OF_VIDEO):
        colours = torch.randint(0, 256, (scenes, 3, 1, 1), generator=draw, dtype=torch.uint8)
        frames = colours.repeat_interleave(16, 0).expand(-1, -1, 48, 64).contiguous()
        VideoEncoder(frames, frame_rate=4).to_file(str(root / f"v{number}.mp4"), extra_options={"threads": 1})
    (root / "note.mp4").write_text("not a video")
    return root


def arguments(videos: Path, output: Path, *more: str) -> list[str]:
    return [
        "--corpus", "videofolder", "--source", str(videos), "--responder", "scripted",
        "--num-rows", "12", "--output", str(output), *more,
    ]  # fmt: skip


def rows_of(folder: Path) -> list[VideoPreference]:
    rows = undecoded(load_dataset(str(folder), split="train", cache_dir=str(folder.with_name(folder.name + ".cache"))))
    return [VideoPreference.from_row(row) for row in rows]


def test_a_rehearsal_of_stage_2_makes_rows_over_detected_scenes(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_pushes(monkeypatch)
    stage2.main(arguments(videos, tmp_path / "rows", "--judge", "scripted", *WHERE))
    assert seen == [ASKED, pushed(tmp_path / "rows")]
    rows = rows_of(tmp_path / "rows")
    assert len(rows) == 12
    # The cuts were found: each timeline is one video, each clip one scene of 4 s.
    assert {len(row.timeline) for row in rows} == set(SCENES_OF_VIDEO)
    assert all(abs(clip.duration_seconds - 4) < 0.5 for row in rows for clip in row.timeline.clips)
    assert all(clip.caption for row in rows for clip in row.timeline.clips)
    for row in rows:
        assert len(row.evidence) == 2
        assert row.reference == ()
        assert all(f"Scene #{scene}" in row.provenance.reasoning for scene in row.evidence)
    output = capsys.readouterr().out
    assert "4 sources" in output
    assert "1 unreadable" in output
    card = (tmp_path / "rows" / "README.md").read_text()
    for told in ("longvpo-stage2", "captions by | scripted", "part of the evidence", "18 |"):
        assert told in card
    # The captions are of use on their own: the corpus is not read again.
    captions = tmp_path / "rows.scenes"
    assert [len(video.timeline) for video in read_captions(captions)] == list(SCENES_OF_VIDEO)
    again = ["--captions", str(captions), "--responder", "scripted", "--num-rows", "12", "--judge", "scripted"]
    stage2.main([*again, "--output", str(tmp_path / "again")])
    assert [row.id for row in rows_of(tmp_path / "again")] == [row.id for row in rows]


def test_long_videos_become_timelines_that_fit(videos: Path, tmp_path: Path) -> None:
    stage2.main(arguments(videos, tmp_path / "rows", "--max-scenes", "4"))
    assert {len(row.timeline) for row in rows_of(tmp_path / "rows")} <= {2, 3, 4}


def test_settings_reach_the_rows(videos: Path, tmp_path: Path) -> None:
    more = ["--reference", "evidence", "--chosen-from", "whole", "--partial-share", "1", "--media", "reference"]
    stage2.main(arguments(videos, tmp_path / "rows", *more))
    for row in pq.read_table(tmp_path / "rows" / "train.parquet").to_pylist():
        assert row["reference"] == row["evidence"]
        assert row["provenance"]["chosen_view"] == "whole"
        (seen,) = (int(row["provenance"]["rejected_view"][len("only(") : -1]),)
        assert seen in row["evidence"]
        assert {clip["file_name"] for clip in row["clips"]} <= {"v0.mp4", "v1.mp4", "v2.mp4"}


@pytest.mark.parametrize(
    ("mode", "recipes"),
    [
        ("localized", {"temporal-localized": 12}),
        ("comprehensive", {"temporal-comprehensive": 12}),
        ("mixed", {"temporal-localized": 6, "temporal-comprehensive": 6}),
    ],
)
def test_a_rehearsal_of_temporal_preferences(
    videos: Path, tmp_path: Path, mode: str, recipes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_pushes(monkeypatch)
    temporal.main(arguments(videos, tmp_path / "rows", "--mode", mode, *WHERE))
    assert seen == [ASKED, pushed(tmp_path / "rows")]
    rows = rows_of(tmp_path / "rows")
    found = [row.provenance.method for row in rows]
    assert {name: found.count(name) for name in set(found)} == recipes
    for row in rows:
        assert row.provenance.verdicts == ("answers_differ", "post_filter")  # the writer judges unless told otherwise
        assert bool(row.evidence) == (row.provenance.method == "temporal-localized")
    temporal.main([*arguments(videos, tmp_path / "bare", "--mode", mode), "--judge", "none"])
    assert "none: not applied" in (tmp_path / "bare" / "README.md").read_text()


@pytest.mark.parametrize("name", ["stage2", "temporal"])
def test_a_dry_run_asks_nothing(name: str, videos: Path, tmp_path: Path, capsys) -> None:
    {"stage2": stage2, "temporal": temporal}[name].main(
        arguments(videos, tmp_path / "rows", "--dry-run", "--judge", "scripted")
    )
    assert not (tmp_path / "rows").exists()
    assert not (tmp_path / "rows.scenes").exists()
    # 18 captions, 12 questions, 24 answers, and a verdict (two in Stage 2) a row.
    verdicts = {"stage2": 24, "temporal": 12}[name]
    assert f"model calls       {18 + 12 + 24 + verdicts}: 18 captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "more", "most"),
    [
        ("stage2", [], 5 + 6 + 7 + 3),  # a question for each scene, and one that is free for each video
        ("temporal", ["--mode", "comprehensive"], 8 * 3),
        ("temporal", ["--mode", "localized", "--num-rows", "300"], 8 * 18),
    ],
)
def test_a_dry_run_promises_what_can_be(name: str, more: list[str], most: int, videos: Path, tmp_path: Path, capsys):
    asked = [*arguments(videos, tmp_path / "rows"), "--num-rows", "60", "--judge", "scripted", *more]
    main = {"stage2": stage2, "temporal": temporal}[name].main
    main([*asked, "--dry-run"])
    said = re.findall(r"rows +(\d+) at most, not \d+: more different questions cannot be", capsys.readouterr().out)
    assert said == [str(most)]
    main(asked)
    assert 0 < len(rows_of(tmp_path / "rows")) <= most


def test_a_folder_without_videos_points_to_no_empty_log(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = result_of(lambda: stage2.main(arguments(tmp_path / "empty", tmp_path / "rows")))
    assert result.exit_code == 2
    assert result.stderr.strip().endswith(f"no clip came out of {tmp_path / 'empty'}: it holds no video.")


@pytest.mark.parametrize("module", [stage1, stage2, temporal])
def test_a_second_command_for_an_output_is_refused_before_it_touches_anything(
    module: ModuleType, videos: Path, tmp_path: Path
) -> None:
    """While the first one cuts, captions or asks; see also `tests/building/test_faults.py`."""
    program = "import sys; from pathlib import Path; from longvpo_hf.artifacts import locked\n"
    program += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / "rows")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        result = result_of(lambda: module.main(arguments(videos, tmp_path / "rows")))
        assert result.exit_code == 2
        assert re.search(rf"rows is being written by another run \(process {first.pid} on .*\): wait", result.stderr)
        assert {path.name for path in tmp_path.iterdir()} == {".rows.lock", ".rows.lock.json"}


def test_a_dry_run_leaves_the_log_of_rows_that_are_there(videos: Path, tmp_path: Path) -> None:
    stage2.main(arguments(videos, tmp_path / "rows", "--num-rows", "60"))
    log = {path.name: path.read_bytes() for path in (tmp_path / "rows.log").iterdir()}
    assert b"duplicate_question" in log["dropped.jsonl"]
    stage2.main(arguments(videos, tmp_path / "rows", "--dry-run"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "rows.log").iterdir()} == log


@pytest.mark.parametrize(
    ("url", "more", "key"),
    [
        ("https://api.openai.com/v1", {}, "openai's"),
        ("https://router.huggingface.co/v1", {}, "hugging face's"),
        ("https://router.huggingface.co/v1", {"api_key_env": "OWN_KEY"}, "own"),
        ("http://localhost:8000/v1", {"api_key_env": "NO_KEY"}, None),
        ("http://localhost:8000/v1", {}, None),
        ("https://a1.eu-west-1.aws.endpoints.huggingface.cloud", {}, None),
        ("https://api.openai.com.somebody.example/v1", {}, None),
        ("http://somebody.example/v1", {"api_key_env": "OWN_KEY", "plain_http_key": True}, "own"),
    ],
)
def test_each_endpoint_is_shown_its_own_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, more: dict[str, Any], key: str | None
) -> None:
    for name, value in (("OPENAI_API_KEY", "openai's"), ("HF_TOKEN", "hugging face's"), ("OWN_KEY", "own")):
        monkeypatch.setenv(name, value.replace(" ", "-"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    sent = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.headers["authorization"])
        return httpx2.Response(200, json={"choices": [{"message": {"content": "yes"}}]})

    monkeypatch.setattr(chat, "_client", lambda is_local: httpx2.AsyncClient(transport=httpx2.MockTransport(answer)))
    settings = WriterSettings(base_url=url, **more)
    assert Models(settings, 8, seed=0).reading("endpoint:m").respond([Request("?")]) == ["yes"]
    assert sent == [f"Bearer {(key or 'EMPTY').replace(' ', '-')}"]


@pytest.mark.parametrize(
    ("command", "more"),
    [(stage1, ["--judge", "endpoint:blind"]), (stage2, ["--captioner", "endpoint:blind"]), (temporal, [])],
    ids=["stage1", "stage2", "temporal"],
)
def test_an_endpoint_is_asked_before_anything_is_cut(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: ModuleType, more: list[str]
) -> None:
    """Models that see are shown a picture, models that read are not; a dry run asks no model."""
    asked: list[tuple[str, bool]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        shows = len(body["messages"][0]["content"]) > 1
        asked.append((body["model"], shows))
        if body["model"] == "blind" and shows:
            return httpx2.Response(400, json={"error": "not a multimodal model"})
        return httpx2.Response(200, json={"choices": [{"message": {"content": "yes"}}]})

    monkeypatch.setattr(chat, "_client", lambda is_local: httpx2.AsyncClient(transport=httpx2.MockTransport(answer)))
    args = arguments(videos, tmp_path / "rows", "--base-url", "http://localhost:1/v1", *more)
    args[args.index("scripted")] = "endpoint:blind" if command is temporal else "scripted"
    with pytest.raises(SystemExit):
        command.main(args)
    assert "blind at http://localhost:1/v1 answers text but takes no images: " in capsys.readouterr().err
    assert asked == [("blind", True), ("blind", False)]
    assert not list(tmp_path.rglob("*.mp4"))
    asked.clear()
    command.main([*args, "--dry-run"])
    assert not asked


def test_a_writer_is_shown_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        asked.append((body["model"], len(body["messages"][0]["content"])))
        return httpx2.Response(200, json={"choices": [{"message": {"content": "Yellow, blue"}}]})

    monkeypatch.setattr(chat, "_client", lambda is_local: httpx2.AsyncClient(transport=httpx2.MockTransport(answer)))
    settings = WriterSettings(base_url="http://localhost:1/v1")
    check_models(settings, ["endpoint:sees", None, "scripted", "endpoint:sees"], ["endpoint:reads", None])
    assert asked == [("sees", 2), ("reads", 1)]


def test_the_second_iteration_is_told_on_the_card(videos: Path, tmp_path: Path) -> None:
    more = arguments(videos, tmp_path / "rows")
    more[more.index("--responder")] = "--iterate-from"
    stage2.main(more)
    assert "| iteration | 2, from scripted |" in (tmp_path / "rows" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--responder", "scripted"], "--corpus and --source are needed, or --captions"),
        (["--responder", "scripted", "--captions", "corpus"], "--corpus and --source are needed"),
        (["--captions", "x", "--writer", "endpoint", "--responder", "a"], "needs --base-url"),
        (["--captions", "x"], "responder"),
        (["--captions", "x", "--responder", "a", "--iterate-from", "b"], "--iterate-from"),
    ],
)
def test_what_is_missing_is_said_at_once(tmp_path: Path, more, message) -> None:
    result = result_of(lambda: stage2.main([*more, "--output", str(tmp_path / "rows")]))
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_without_captions_ends_in_one_line(tmp_path: Path) -> None:
    words = ["--captions", str(tmp_path), "--responder", "scripted", "--output", str(tmp_path / "rows")]
    result = result_of(lambda: stage2.main(words))
    assert result.exit_code == 2
    assert re.fullmatch(r"stage2.py: .*captions.*\n", result.stderr)


def test_killed_while_captioning_it_goes_on_with_the_same_result(videos: Path, tmp_path: Path) -> None:
    stage2.main(arguments(videos, tmp_path / "whole"))
    command = [sys.executable, str(SCRIPTS / "stage2.py"), *arguments(videos, tmp_path / "cut")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pieces = tmp_path / "cut.scenes.job"
    while process.poll() is None and not list(pieces.glob("*.jsonl")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stage2.main(arguments(videos, tmp_path / "cut"))
    assert (tmp_path / "cut" / "train.parquet").read_bytes() == (tmp_path / "whole" / "train.parquet").read_bytes()
    logs = [json.loads((tmp_path / f"{name}.log" / "funnel.json").read_text()) for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_an_adapter_answers_as_what_it_was_trained_to_be(videos: Path, tmp_path: Path) -> None:
    """Stage 1 with LoRA leaves an adapter: it must answer, under its own name, and not as its base does."""
    model, processor = tiny_models.build("internvl")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "stage1")
    models = Models(WriterSettings(max_new_tokens=8), 8, seed=0)
    shown = [Request(text, Timeline((Clip(str(videos / "v0.mp4"), 0.0, 4.0),))) for text in ("What?", "Who is it?")]
    base, tuned = (models.seeing(str(tmp_path / name)) for name in ("base", "stage1"))
    assert (base.name, tuned.name) == ("base", "stage1")
    wanted = LocalResponder(adapted.eval(), processor, tuned.sampler, max_new_tokens=8)
    assert tuned.respond(shown) == wanted.respond(shown) != base.respond(shown)
    assert tuned.settings["weights"] not in ("", base.settings["weights"])


def test_a_language_model_writes_what_it_reads(tmp_path: Path, videos: Path) -> None:
    """A real Qwen2 of random weights: its questions run on, so that every draft is dropped by name."""
    _, processor = tiny_models.build("internvl")
    tokenizer = processor.tokenizer
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    responder = TextResponder(model, tokenizer, max_new_tokens=6, batch_size=2)
    texts = ["one", "a much longer one than the others are", "three words here"]
    together = responder.respond([Request(text) for text in texts])
    assert together == [responder.respond([Request(text)])[0] for text in texts]  # padding changes nothing
    assert len(set(together)) > 1
    hostile = "".join(tokenizer.all_special_tokens)  # plain text: the prompt has none of them
    assert set(responder._encode(f"a {hostile} b")).isdisjoint(tokenizer.all_special_ids)
    assert hostile in tokenizer.decode(responder._encode(f"a {hostile} b"))
    clip = Clip(str(videos / "v0.mp4"), 0.0, 1.0)
    with pytest.raises(ValueError, match="sees no video"):
        responder.respond([Request("?", Timeline((clip,)))])

    model.save_pretrained(tmp_path / "language-model")
    tokenizer.save_pretrained(tmp_path / "language-model")
    more = ["--writer", str(tmp_path / "language-model"), "--writer-max-new-tokens", "4", "--num-rows", "2"]
    result = result_of(lambda: stage2.main(arguments(videos, tmp_path / "rows", *more)))
    assert result.exit_code == 2
    assert re.search(r"No row came out; dropped: cut_off \d+", result.stderr)
    dropped = [json.loads(line) for line in (tmp_path / "rows.log" / "dropped.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in dropped} == {"unreadable", "cut_off"}


def test_vript_as_it_is_published_becomes_films_of_scenes(tmp_path: Path) -> None:
    """Each scene is a file of its own in a zip: the documented command groups them into their films, in order."""
    root = tmp_path / "vript"
    (root / "vript_captions").mkdir(parents=True)
    records = []
    for film in range(2):
        name, clip_ids = f"film{film}", [f"film{film}-Scene-{number:03d}" for number in range(1, 5)]
        with zipfile.ZipFile(root / f"clips_{film + 1}_of_2.zip", "w") as archive:
            for number, clip_id in enumerate(clip_ids):
                path = write_clip(tmp_path / "made" / f"{clip_id}.mp4", (60 * number + 20, 100 * film + 40, 90))
                archive.write(path, f"{name}/{clip_id}.mp4")
        captions = {
            clip_id: {"clip_id": clip_id, "video_id": name, "caption": {"content": f"Scene {number} of {name}"}}
            for number, clip_id in enumerate(clip_ids)
        }
        records.append({"meta": {"video_id": name}, "data": captions})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (root / "vript_captions" / "vript_captions.jsonl").write_text(lines)
    words = ["--corpus", "vript", "--source", str(root), "--captions", "corpus", "--responder", "scripted"]
    done = longvpo(["build", "stage2", *words, "--num-rows", "6", "--output", str(tmp_path / "rows")])
    assert done.exit_code == 0, done.output
    for row in rows_of(tmp_path / "rows"):
        origins = [clip.origin.source_id for clip in row.timeline.clips]
        assert len(origins) == 4
        assert origins == sorted(origins)
        assert len({origin.partition("-Scene")[0] for origin in origins}) == 1
    looked = longvpo(["build", "stage2", *words, "--num-rows", "6", "--output", str(tmp_path / "dry"), "--dry-run"])
    assert "8 videos, scenes of 2 films" in looked.stdout
    assert "8 of 8 videos have one" in looked.stdout
