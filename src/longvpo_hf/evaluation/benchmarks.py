"""The benchmarks: where their questions and videos are, and what a row of theirs asks.

A row, as the benchmark's authors publish it, becomes a `Question`. Datasets, splits, fields, file names and prompts are
those of lmms-eval's own tasks (0.7.3), except that an MVBench video may also be in `data0613`, as lmms-eval intends.
Everything is in one folder, the data root: annotations under the dataset's id, or else in the Hub's cache; media where
lmms-eval unpacks them.
"""

from __future__ import annotations

import functools
import os
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvpo_hf.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

#: Names the data root, for lmms-eval, which has no argument for it.
DATA_ROOT_VARIABLE = "LONGVPO_EVAL_DATA"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice question about a video.

    Args:
        text: Question, options and instruction, as the model is asked.
        letters: Letters of its options, e.g. `ABCD`.
        answer: The right one.
        videos: Names its video may have, under the data root; the first that exists is taken.
        group: Its group among the benchmark's `groups`; empty where there are none.
        subtitles: Name of its subtitles' file under the data root; the file may be missing.
    """

    text: str
    letters: str
    answer: str
    videos: tuple[str, ...]
    group: str = ""
    subtitles: str = ""

    def __post_init__(self) -> None:
        if len(self.answer) != 1 or self.answer not in self.letters:
            raise ConfigError(
                f"The right answer must be one of {self.letters!r}, got {self.answer!r}: {self.text[:200]!r}"
            )


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark, or one way to run it.

    Args:
        name: Its name in results; its task's name in lmms-eval is this with `longvpo_` before it.
        dataset: Its dataset on the Hub.
        split: The split that is asked.
        read: Makes a question of a row; the second argument is the subset.
        media: Folder of its videos, under the data root.
        unpack: Command that fills `media` from the downloaded archives; `{archives}` and `{media}` are put in.
        revision: Branch of the dataset; None for its main one.
        subsets: Configurations of the dataset, each a task of its own; none where it has one only.
        groups: What scores are reported by, in order.
        subtitles: Folder of its subtitles under the data root; empty where it is asked without.
        gated: Whether its authors ask for consent before a download.
        max_new_tokens: Bound on an answer of a model that does not reason: the longest of lmms-eval's own tasks, room
            for "The best answer is (C)" and some more.
    """

    name: str
    dataset: str
    split: str
    read: Callable[[Row, str], Question]
    media: str
    unpack: str
    revision: str | None = None
    subsets: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    subtitles: str = ""
    gated: bool = False
    max_new_tokens: int = 32

    def question(self, row: Row, subset: str = "") -> Question:
        """What a row asks.

        Raises:
            ValueError: If the row lacks a field, or its answer is none of its options.
        """
        try:
            return self.read(row, subset)
        except KeyError as error:
            raise ConfigError(
                f"A row of {self.dataset} lacks the field {error}; it has {sorted(row)}. Is this the dataset, at the "
                "revision that lmms-eval 0.7 uses?"
            ) from None

    def rows(self, root: Path, subset: str = "") -> Dataset:
        """Its rows, from the folder `root / dataset` if there is one, else from the Hub or its cache."""
        return _rows(self.dataset, self.revision, self.split, root, subset)


def data_root() -> Path:
    """The folder that holds annotations and media: `LONGVPO_EVAL_DATA`, else `HF_HOME`, as for lmms-eval."""
    for variable in (DATA_ROOT_VARIABLE, "HF_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    return Path("~/.cache/huggingface").expanduser()


def locate(root: Path, *names: str) -> Path | None:
    """The first of the files `names` that exists under `root`.

    Raises:
        ValueError: If a name leads out of `root`: rows are somebody else's text.
    """
    for name in names:
        path = Path(os.path.normpath(root / name))
        if not path.is_relative_to(os.path.normpath(root)):
            raise ConfigError(f"A benchmark's file must lie inside of {root}, got {name!r}, which leads elsewhere.")
        if path.is_file():
            return path
    return None


@functools.lru_cache(maxsize=64)
def _rows(dataset: str, revision: str | None, split: str, root: Path, subset: str) -> Dataset:
    """Kept: the preflight and every task of a process ask for the same ones."""
    from datasets import Dataset, load_dataset

    local = root / dataset
    if local.is_dir():
        # Streamed: the cache of datasets knows a folder by its last name and its card alone, and would give the rows
        # of another root, or those the folder held before.
        return Dataset.from_list(list(load_dataset(str(local), subset or None, split=split, streaming=True)))
    return load_dataset(dataset, subset or None, split=split, revision=revision)


# ------------------------------------------------------------------------------------------------------ what rows ask

LETTERS = string.ascii_uppercase
#: Where neither row nor benchmark says otherwise.
_FOUR = LETTERS[:4]


def _longvideobench(row: Row, _: str) -> Question:
    options = [row[f"option{i}"] for i in range(5)]
    options = [option for option in options if option != "N/A"]
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return Question(
        text="\n".join([row["question"], *lines, "Answer with the option's letter from the given choices directly.\n"]),
        letters=LETTERS[: len(options)],
        answer=LETTERS[row["correct_choice"]],
        videos=(f"datasets/longvideobench/videos/{row['video_path']}",),
        group=f"{row['duration_group']}s",
    )


def _mlvu(row: Row, _: str) -> Question:
    return Question(
        text=f"{row['question']}\nOnly give the best option.\nBest option: (",
        letters=_FOUR,
        answer=row["answer"],
        videos=(f"mlvu/{row['video_name']}",),
        group=row["task_type"],
    )


def _videomme(row: Row, _: str) -> Question:
    return Question(
        text="\n".join(
            [
                "Select the best answer to the following multiple-choice question based on the video and the "
                "subtitles. Respond with only the letter (A, B, C, or D) of the correct option.",
                row["question"],
                *row["options"],
                "\nAnswer with the option's letter from the given choices directly.",
            ]
        ),
        letters=LETTERS[: len(row["options"])],
        answer=row["answer"],
        videos=tuple(f"videomme/data/{row['videoID']}.{ending}" for ending in ("mp4", "MP4", "mkv")),
        group=row["duration"],
    )


def _videomme_subtitles(row: Row, _: str) -> Question:
    plain = _videomme(row, _)
    return Question(
        plain.text, plain.letters, plain.answer, plain.videos, plain.group, f"videomme/subtitle/{row['videoID']}.srt"
    )


def _mvbench(row: Row, subset: str) -> Question:
    candidates = row["candidates"]
    options = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, candidates, strict=False))
    folder = _MVBENCH_FOLDERS[subset]
    folders = [folder, *([f"data0613/{folder}"] if folder.startswith(("clevrer/", "star/")) else [])]
    return Question(
        text=f"Question:{row['question']}\nOption:\n{options}Only give the best option.\n",
        letters=LETTERS[: len(candidates)],
        answer=LETTERS[candidates.index(row["answer"])] if row["answer"] in candidates else "",
        videos=tuple(f"mvbench_video/{each}/{row['video']}" for each in folders),
        group=subset,
    )


def _lvbench(row: Row, _: str) -> Question:
    options = row.get("options") or []
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return Question(
        text="\n".join([row["question"], *lines, "Answer the question with the option letter"]),
        letters=LETTERS[: len(options)] or _FOUR,
        answer=row["answer"],
        videos=(f"lvbench/{row['video_path']}",),
    )


_MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
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

#: As lmms-eval does, wherever in the repository the archives are.
_UNZIP = "find {archives} -name '*.zip' -exec unzip -n {{}} -d {media} \\;"
_VIDEOMME = Benchmark(
    name="videomme",
    dataset="lmms-eval/Video-MME",
    split="test",
    read=_videomme,
    media="videomme",
    unpack=_UNZIP,
    groups=("short", "medium", "long"),
)

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="longvideobench",
            dataset="longvideobench/LongVideoBench",
            split="validation",
            read=_longvideobench,
            media="datasets/longvideobench",
            unpack="cat {archives}/videos.tar.part.* | tar -x -C {media}",
            groups=("15s", "60s", "600s", "3600s"),
            gated=True,
        ),
        Benchmark(
            name="mlvu",
            dataset="sy1998/MLVU_dev",
            split="test",
            read=_mlvu,
            media="mlvu",
            unpack=_UNZIP,
            groups=("topic_reasoning", "anomaly_reco", "needle", "ego", "plotQA", "order", "count"),
        ),
        _VIDEOMME,
        Benchmark(
            name="videomme_subtitles",
            dataset=_VIDEOMME.dataset,
            split=_VIDEOMME.split,
            read=_videomme_subtitles,
            media=_VIDEOMME.media,
            unpack=_VIDEOMME.unpack,
            groups=_VIDEOMME.groups,
            subtitles="videomme/subtitle",
        ),
        Benchmark(
            name="mvbench",
            dataset="OpenGVLab/MVBench",
            split="train",
            read=_mvbench,
            media="mvbench_video",
            unpack="cp -rn {archives}/. {media}",
            revision="video",
            subsets=tuple(_MVBENCH_FOLDERS),
            groups=tuple(_MVBENCH_FOLDERS),
        ),
        Benchmark(
            name="lvbench",
            dataset="lmms-eval/LVBench",
            split="train",
            read=_lvbench,
            media="lvbench",
            unpack=_UNZIP,
        ),
    )
}
