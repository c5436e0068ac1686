"""Several processes that share a row give what one gives: scores, loss, every gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_packing import ready_model

import sharing
from longvpo_hf.training.packing import reason_not_shared
from longvpo_hf.training.packing.sharing import _chunks, _cuts

Found = dict[str, Any]
CASES = [(size, case) for size, cases in sharing.SHARED.items() for case in cases]
WHOLE = [(size, case) for size, cases in sharing.WHOLE.items() for case in cases]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Found]]]:
    """By number of processes, what each of them found in each case."""
    result = tmp_path_factory.mktemp("sharing") / "result.json"
    done = subprocess.run(
        [sys.executable, sharing.__file__, str(result), *map(str, sharing.SHARED)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize(("size", "case"), [*CASES, *WHOLE], ids=str)
def test_processes_that_share_a_row_equal_one(
    found: dict[str, list[dict[str, Found]]], size: int, case: sharing.Case
) -> None:
    of_first = found[str(size)][0][str(case)]
    assert of_first["weights"]
    assert of_first["scores"] <= 1e-5
    assert of_first["fields"] <= 1e-5
    assert of_first["loss"] <= 1e-5
    assert of_first["gradients"] <= (1e-10 if case.dtype == torch.float64 else 1e-5)
    assert of_first["head"] <= 1e-5  # TRL sums it up in float32


@pytest.mark.parametrize(("size", "case"), CASES, ids=str)
def test_every_token_is_held_once(found: dict[str, list[dict[str, Found]]], size: int, case: sharing.Case) -> None:
    for *own, _ in zip(*(of_rank[str(case)]["held"] for of_rank in found[str(size)]), [0, 0], strict=True):
        assert sorted(place for places in own for place in places) == list(range(sum(map(len, own))))
        assert all(own)


@pytest.mark.parametrize(("size", "case"), WHOLE, ids=str)
def test_a_row_that_cannot_be_cut_is_computed_by_all(
    found: dict[str, list[dict[str, Found]]], size: int, case: sharing.Case
) -> None:
    assert all(of_rank[str(case)]["held"] == [None, None] for of_rank in found[str(size)])


def test_what_is_kept_for_the_backward_pass_is_shared(found: dict[str, list[dict[str, Found]]]) -> None:
    (case,) = (str(case) for case in sharing.SHARED[2] if case.frames == (48,))
    first, second = (of_rank[case] for of_rank in found["2"])
    for of_rank in (first, second):
        assert 0.4 < of_rank["bytes"] / first["bytes of one"] < 0.6


# ------------------------------------------------------------------------------------------------ how a trunk is cut


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_processes_attend_alike(size: int) -> None:
    """Scores of each process, a token with those before it: at most a tenth more than the mean."""
    starts = list(range(20, 20 + 256 * 33, 33))
    trunk = starts[-1] + 60
    cuts = _cuts(trunk, starts, size)
    work = [0.0] * size
    for rank, begin, end in _chunks(cuts):
        work[rank] += (end * (end + 1) - begin * (begin + 1)) / 2
    assert sum(work) == trunk * (trunk + 1) / 2
    assert max(work) < 1.1 * sum(work) / size
    assert set(cuts[1:-1]) <= set(starts)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("family", [*sharing.ROPES, *sharing.OTHERS, "qwen2_5_omni_thinker"])
def test_models_whose_rows_are_shared(family: str) -> None:
    assert reason_not_shared(ready_model(family)) is None


def test_models_whose_rows_are_not_shared() -> None:
    assert "linear attention" in str(reason_not_shared(ready_model("qwen3_5")))
    assert "'llava_onevision' cannot be parted" in str(reason_not_shared(ready_model("llava_onevision")))
    windowed = ready_model("internvl")
    windowed.get_decoder().config.layer_types = ["full_attention", "sliding_attention"]
    windowed.get_decoder().config.sliding_window = 8
    assert "sliding window (sliding_window=8)" in str(reason_not_shared(windowed))
