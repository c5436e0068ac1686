"""Doubles of what an evaluation needs: benchmarks of the published schema with tiny videos, and a model of one answer.

`write_data_root` makes the folder that `--data-root` names. `write_model` makes a checkpoint that answers one letter
to everything, and `write_adapter` a LoRA that changes that letter: scores can then be counted by hand. Nothing is
downloaded. Knows nothing of lmms-eval.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model

from media import write_video
from tiny_models import build

MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "data0613/star/Charades_segment",  # the other place lmms-eval means to look in
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}

#: One line of subtitles per second: `line 0` in [0, 1), and so on; line 3 is empty.
SRT = "\r\n".join(
    f'{number + 1}\r\n00:00:0{number},000 --> 00:00:0{number + 1},000\r\n<font color="white" size=".72c">'
    f"{'' if number == 3 else f'line {number}'}</font>\r\n"
    for number in range(6)
)


def longvideobench_rows() -> list[dict[str, Any]]:
    """One question of each duration, the right ones C, C, A, B; the first has five options, the others four."""
    return [
        {
            "video_id": f"v{number}",
            "question": "At the table, what happens?",
            "question_wo_referring_query": "What happens?",
            "correct_choice": "ABCDE".index(letter),
            "topic_category": "KH-Knowledge-History",
            "question_category": "S2E",
            "level": "L1-Perception",
            "id": f"v{number}_0",
            "video_path": f"v{number}.mp4",
            "subtitle_path": f"v{number}_en.json",
            "duration_group": group,
            "starting_timestamp_for_subtitles": 0.0,
            "duration": 3.0,
            "view_count": 7,
            **{f"option{i}": "N/A" if i == 4 and number else f"Some thing {i}" for i in range(5)},
        }
        for number, (letter, group) in enumerate(zip("CCAB", (15, 60, 600, 3600), strict=True))
    ]


def mlvu_rows() -> list[dict[str, Any]]:
    """Nine questions: C is right in needle (2 of 3), ego and order, and nowhere else."""
    asked = [("needle", "C"), ("needle", "C"), ("needle", "A"), ("ego", "C"), ("order", "C"), ("plotQA", "B")]
    asked += [("count", "D"), ("anomaly_reco", "A"), ("topic_reasoning", "B")]
    return [
        {
            "video_name": f"v{number % 3}.mp4",
            "duration": 3.0,
            "question": "What is it?\n(A) one\n(B) two\n(C) three\n(D) four",
            "answer": letter,
            "task_type": task,
        }
        for number, (task, letter) in enumerate(asked)
    ]


def videomme_rows() -> list[dict[str, Any]]:
    """Four questions: short C and B, medium C, long D."""
    asked = [("short", "C"), ("short", "B"), ("medium", "C"), ("long", "D")]
    return [
        {
            "video_id": f"{number:03}",
            "duration": duration,
            "domain": "Knowledge",
            "sub_category": "Law",
            "url": "https://www.youtube.com/watch?v=x",
            "videoID": f"v{number % 3}",
            "question_id": f"{number:03}-1",
            "task_type": "OCR Problems",
            "question": "What is written?",
            "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
            "answer": letter,
        }
        for number, (duration, letter) in enumerate(asked)
    ]


def mvbench_rows(number: int) -> list[dict[str, Any]]:
    """Of subset `number`: a question with two options (B is right), and one with three (C in even subsets, else A)."""
    return [
        {"video": "v0.mp4", "question": "Which?", "candidates": ["one", "two"], "answer": "two"},
        {
            "video": "v1.mp4",
            "question": "Which?",
            "candidates": ["one", "two", "three"],
            "answer": "one" if number % 2 else "three",
        },
    ]


def lvbench_rows() -> list[dict[str, Any]]:
    """Two questions, C and A."""
    return [
        {
            "video_path": f"v{number}.mp4",
            "question": "What year?\n(A) 1\n(B) 2\n(C) 3\n(D) 4",
            "answer": letter,
            "question_type": ["reasoning"],
        }
        for number, letter in enumerate("CA")
    ]


def mlvu_test_rows() -> list[dict[str, Any]]:
    """Three questions of six options, about two tasks: C, F and C."""
    options = "\n".join(f"({letter}) thing {letter}" for letter in "ABCDEF")
    return [
        {"video_name": f"v{number}.mp4", "duration": 3.0, "question": f"What is it?\n{options}", "answer": letter,
         "task_type": task}
        for number, (task, letter) in enumerate([("needleQA", "C"), ("sportsQA", "F"), ("sportsQA", "C")])
    ]  # fmt: skip


def timescope_rows() -> list[dict[str, Any]]:
    """Three questions, of lengths 60 and 10800: C, A and C."""
    text = "Which city is named?\nA. Rome\nB. Oslo\nC. Lima\nD. Bern"
    return [
        {"id": number, "video": f"v{number}.mp4", "input": text, "answer": letter, "type": "QA", "length": length}
        for number, (length, letter) in enumerate([(60, "C"), (60, "A"), (10800, "C")])
    ]


def videomme_v2_rows() -> list[dict[str, Any]]:
    """Two videos of four questions: a relevance group with three Cs, and steps of which C is right in the first two."""
    options = "\n".join(f"{letter}. thing {number}" for number, letter in enumerate("ABCDEFGH"))
    groups = [("relevance", "[1, 2, 3, 4]", "CCHC"), ("logic", "[1, [2, 3], 4]", "CCBC")]
    return [
        {"video_id": f"v{video}", "question_id": f"{video:03}-{place + 1}", "question": "What then?",
         "options": options, "answer": letter, "group_type": kind, "group_structure": structure, "level": 1,
         "second_head": "x", "third_head": "y"}
        for video, (kind, structure, letters) in enumerate(groups)
        for place, letter in enumerate(letters)
    ]  # fmt: skip


def videoevalpro_rows() -> list[dict[str, Any]]:
    """Two questions: C of local perception, E of holistic reasoning."""
    return [
        {"video": f"v{number}.mp4", "question": "What is it?", "options": [f"{each}. thing" for each in "ABCDE"],
         "answer": letter, "answer_text": "thing", "qa_type": kind}
        for number, (kind, letter) in enumerate([("Local Perception", "C"), ("Holistic Reasoning", "E")])
    ]  # fmt: skip


def cgbench_rows() -> list[dict[str, Any]]:
    """Two questions about one video, of eight options: C and H."""
    return [
        {"qid": number, "video_uid": "v0", "question": "What is it?", "choices": [f"thing {i}" for i in range(8)],
         "right_answer": letter, "duration": 2.0, "domain": "Life Record", "sub_category": "Vlog"}
        for number, letter in enumerate("CH")
    ]  # fmt: skip


#: Its tasks, and where a video of each is, in turn at the places that lmms-eval looks at.
TVBENCH_FOLDERS = {
    name: folder.format(name)
    for name, folder in zip(
        ("action_antonym", "action_count", "action_localization", "action_sequence", "egocentric_sequence",
         "moving_direction", "object_count", "object_shuffle", "scene_transition", "unexpected_action"),
        ("", "video", "videos", "data", "{}", "video/{}", "videos/{}", "{}", "{}", "{}"),
        strict=True,
    )
}  # fmt: skip


def tvbench_rows(number: int) -> list[dict[str, Any]]:
    """Of subset `number`: one question; C is right in even subsets, else A."""
    return [{"video": "v0.mp4", "question": "Which?", "candidates": ["Up", "down", "left"],
             "answer": "up" if number % 2 else "Left"}]  # fmt: skip


def a_row(suite: str) -> dict[str, Any]:
    """A row of a suite, of its first subset where it has subsets."""
    rows = {
        "longvideobench": longvideobench_rows(),
        "mlvu": mlvu_rows(),
        "mlvu_test": mlvu_test_rows(),
        "videomme": videomme_rows(),
        "videomme_v2": videomme_v2_rows(),
        "lvbench": lvbench_rows(),
        "timescope": timescope_rows(),
        "longtimescope": timescope_rows(),
        "videoevalpro": videoevalpro_rows(),
        "cgbench": cgbench_rows(),
        "mvbench": mvbench_rows(0),
        "tvbench": tvbench_rows(0),
    }
    return rows[suite][0]


def write_data_root(root: Path) -> Path:
    """All benchmarks in the schema and at the places that lmms-eval 0.7.3 has them; videos of 2, 3 and 6 seconds."""
    write_parquet(root / "longvideobench/LongVideoBench", {"validation": longvideobench_rows()})
    write_parquet(root / "sy1998/MLVU_dev", {"test": mlvu_rows()})
    write_parquet(root / "lmms-eval/Video-MME", {"test": videomme_rows()})
    write_parquet(root / "lmms-eval/LVBench", {"train": lvbench_rows()})
    write_parquet(root / "sy1998/MLVU_Test", {"test": mlvu_test_rows()})
    write_parquet(root / "Apollo-LMMs/TimeScope", {"test": timescope_rows()})
    write_parquet(root / "Apollo-LMMs/LongTimeScope2", {"test": timescope_rows()})
    write_parquet(root / "MME-Benchmarks/Video-MME-v2", {"test": videomme_v2_rows()})
    write_parquet(root / "TIGER-Lab/VideoEval-Pro", {"test": videoevalpro_rows()})
    _write_configs(root / "CG-Bench/CG-Bench", {"cg-bench": [], "cg-bench-mini": cgbench_rows()})
    for dataset, names, rows in (
        ("OpenGVLab/MVBench", MVBENCH_FOLDERS, mvbench_rows),
        ("FunAILab/TVBench", TVBENCH_FOLDERS, tvbench_rows),
    ):
        _write_configs(root / dataset, {name: rows(number) for number, name in enumerate(names)})
    videos = root / "videos"
    videos.mkdir()
    lengths = (20, 30, 60)
    files = [write_video(videos / f"v{i}.mp4", num_frames, size=(64, 64)) for i, num_frames in enumerate(lengths)]
    files.append(Path(shutil.copy(files[0], videos / "v3.mp4")))
    folders = ["datasets/longvideobench/videos", "mlvu", "videomme/data", "lvbench", "mlvu_test", "timescope"]
    folders += ["longtimescope", "videomme_v2", "videoevalpro/videos_filtered", "cg_videos_720p"]
    folders += [f"mvbench_video/{each}" for each in MVBENCH_FOLDERS.values()]
    folders += [f"tvbench/{each}" for each in TVBENCH_FOLDERS.values()]
    for folder in sorted({str(Path(each)) for each in folders}):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            os.link(file, root / folder / file.name)
    (root / "videomme/subtitle").mkdir()
    (root / "videomme/subtitle/v2.srt").write_text(SRT, encoding="utf-8", newline="")
    return root


def write_parquet(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A dataset repository of Parquet files."""
    (folder / "data").mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        name = f"data/{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows)), folder / name)
        files.append({"split": split, "path": name})
    _write_readme(folder, [{"config_name": "default", "data_files": files}])


def _write_configs(folder: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A dataset repository with a JSON file for each configuration."""
    (folder / "json").mkdir(parents=True)
    for name, content in rows.items():
        (folder / "json" / f"{name}.json").write_text(json.dumps(list(content)), encoding="utf-8")
    _write_readme(
        folder,
        [{"config_name": name, "data_files": [{"split": "train", "path": f"json/{name}.json"}]} for name in rows],
    )


def _write_readme(folder: Path, configs: Sequence[Mapping[str, Any]]) -> None:
    # JSON is YAML.
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(list(configs))}\n---\n", encoding="utf-8")


def write_model(folder: Path, answer: str = "C") -> Path:
    """A checkpoint with its processor that answers `answer`, one letter, whatever it sees.

    Its layers add nothing, so the next token depends on the last one alone: the line break that ends every prompt is
    followed by the letter, the letter by the end of the answer.
    """
    model, processor = build("internvl")
    tokenizer = processor.tokenizer
    newline, *letters = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in "\nABCD")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) and "language_model" in name:
                weight.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.zero_()
        head.zero_()
        embedding[newline, 0] = 1
        embedding[letters, 1] = 1
        head[letters["ABCD".index(answer)], 0] = head[tokenizer.eos_token_id, 1] = 1
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, answer: str = "B") -> Path:
    """A LoRA adapter of `write_model`'s checkpoint that answers `answer`; its folder holds no processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(base)
    letter = AutoProcessor.from_pretrained(base).tokenizer(answer, add_special_tokens=False)["input_ids"][-1]
    adapted = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_A" in name:
                weight.zero_()
                weight[0, 0] = 1
            elif "lora_B" in name:
                weight.zero_()
                weight[letter, 0] = 9
    adapted.save_pretrained(folder)
    return folder
