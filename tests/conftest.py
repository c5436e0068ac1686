"""What test files share: a few colour-coded clips as real mp4 files, and preference rows about them.

Everything is made anew for a test session in its own folders; nothing is downloaded and no cache of the user's is read.
`HF_HOME` is set before anything of Hugging Face is imported, because datasets keys its cache by the dataset's name.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_HOME = tempfile.TemporaryDirectory(prefix="longvpo-hf-tests-")
os.environ["HF_HOME"] = _HOME.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # dataloader workers are forked

import pytest  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torchcodec.encoders import VideoEncoder  # noqa: E402

from longvpo_hf.preference import VideoPreference  # noqa: E402
from longvpo_hf.timeline import Clip, Timeline  # noqa: E402

torch.set_num_threads(1)

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (235, 235, 235)}
CLIP_SECONDS = 4.0
_FPS = 4
_SIZE_PX = 64


def write_clip(path: Path, colour: tuple[int, int, int], seconds: float = CLIP_SECONDS) -> Path:
    """Writes an mp4 of one colour that grows brighter, so that no two frames are alike: 64 × 64, 4 frames a second."""
    frames = torch.empty(round(seconds * _FPS), 3, _SIZE_PX, _SIZE_PX, dtype=torch.uint8)
    for number, frame in enumerate(frames):
        frame[:] = (torch.tensor(colour) * (0.5 + 0.5 * number / len(frames))).to(torch.uint8)[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    VideoEncoder(frames, frame_rate=_FPS).to_file(str(path), extra_options={"threads": 1})
    return path


def make_preferences(clips: Mapping[str, Clip]) -> list[VideoPreference]:
    """Eight rows: two questions about each of four timelines of three clips; answers of unequal length.

    The anchor is the row's evidence and reference; over the rows it stands at the begin, in the middle and at the end.
    """
    orders = [("red", "green", "blue"), ("blue", "white", "red"), ("green", "red", "white"), ("white", "blue", "green")]
    rows = []
    for number, order in enumerate(orders):
        timeline = Timeline(tuple(clips[name] for name in order))
        for question in range(2):
            anchor = (number + question) % len(order)
            rows.append(
                VideoPreference(
                    timeline=timeline,
                    question=("What colour?", "And which one is it?")[question],
                    chosen=order[anchor],
                    rejected=f"it is {order[(anchor + 1) % len(order)]}" + "!" * number,
                    evidence=(anchor,),
                    reference=(anchor,),
                )
            )
    return rows


def make_dataset(preferences: Sequence[VideoPreference], **columns: Sequence[Any]) -> Dataset:
    """Rows as a dataset in memory, their clips as plain paths, with more columns beside."""
    rows = [preference.to_row(lambda clip: clip.path) for preference in preferences]
    return Dataset.from_list([{**row, **{k: v[i] for k, v in columns.items()}} for i, row in enumerate(rows)])


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Leaves no variable behind: commands that run within a test set some for the libraries they are about to use."""
    before = dict(os.environ)
    yield
    now = os.environ.get("PYTEST_CURRENT_TEST", "")
    os.environ.clear()
    os.environ.update(before, PYTEST_CURRENT_TEST=now)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clip]:
    """A clip of each of `COLOURS`, 4 s long."""
    folder = tmp_path_factory.mktemp("clips")
    return {
        name: Clip(str(write_clip(folder / f"{name}.mp4", colour)), 0.0, CLIP_SECONDS)
        for name, colour in COLOURS.items()
    }


@pytest.fixture(scope="session")
def preferences(clips: dict[str, Clip]) -> list[VideoPreference]:
    """See `make_preferences`."""
    return make_preferences(clips)


@pytest.fixture
def dataset(preferences: list[VideoPreference]) -> Dataset:
    """The rows of `preferences`."""
    return make_dataset(preferences)
